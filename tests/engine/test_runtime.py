"""Devices, random state, files."""

import copy
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_compiler
from recorded import RecordedStep, fuse

import main
from engine.files import read_content
from engine.optimizers import sgd
from engine.runtime import Runtime
from utils import UserError


class Payload:
    def __reduce__(self):
        return os.system, ("touch run-by-a-checkpoint",)


def test_unknown_and_missing_devices_are_refused():
    with pytest.raises(UserError, match="auto, cpu, cuda"):
        Runtime("gpu")
    with pytest.raises(UserError, match="fp16 needs CUDA"):
        Runtime("cpu", amp=True, amp_dtype="fp16")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            Runtime("cuda")


def test_auto_takes_the_accelerator_that_pytorch_names(monkeypatch):
    """Other devices than CUDA and MPS are known to PyTorch alone; here a machine that has one is imitated."""
    here = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert Runtime.best() == here and not Runtime.available("xpu")
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("xpu"))
    assert Runtime.best() == ("xpu" if here == "cpu" else here) and Runtime.available("xpu")


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(UserError, match=r"C\+\+ compiler"):
        Runtime("cpu", compiled=True)


def test_what_is_no_checkpoint_is_refused_by_what_it_is(tmp_path):
    with pytest.raises(UserError, match=r"there is no checkpoint .*absent$"):
        read_content(tmp_path / "absent")
    with pytest.raises(UserError, match=r"this is a folder: give a file such as"):
        read_content(tmp_path)
    for name, words in (("mine.pt2", "is an exported network"), ("mine.pth.tar", "is damaged or was not")):
        (tmp_path / name).write_bytes(b"something else")
        with pytest.raises(UserError, match=f"{name} {words}"):
            read_content(tmp_path / name)


@needs_compiler
@pytest.mark.parametrize("tracking", [True, False])
@pytest.mark.parametrize("shape", [(6, 3, 4, 4), (24, 3)])
def test_statistics_of_compiled_batch_norm_are_sums(shape, tracking):
    """Outputs, gradients and running statistics are PyTorch's, also of values far from zero."""
    kind = torch.nn.BatchNorm2d if len(shape) == 4 else torch.nn.BatchNorm1d
    plain = torch.nn.Sequential(kind(3, eps=0.3, momentum=0.3))
    torch.nn.init.normal_(plain[0].weight)
    torch.nn.init.normal_(plain[0].bias)
    placed = Runtime("cpu", compiled=True).place(copy.deepcopy(plain))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph.code)
        return graph

    torch.compiler.reset()
    plain[0].track_running_stats = placed[0].track_running_stats = tracking
    images = 1000 + torch.randn(shape)
    pushes = torch.randn(shape)
    results = []
    for network, values in ((plain.double(), images.double()), (torch.compile(placed, backend=keep), images)):
        values.requires_grad_()
        normalized = network(values)
        normalized.backward(pushes.to(normalized.dtype))
        results.append([normalized, values.grad, *(p.grad for p in network.parameters()), *network.buffers()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=1e-3, atol=1e-3)
    assert len(graphs) == 1 and "sum(" in graphs[0] and "batch_norm" not in graphs[0]
    torch.compiler.reset()


@needs_compiler
def test_compiling_keeps_batch_norms_of_other_kinds():
    class Own(torch.nn.BatchNorm2d):
        pass

    others = [Own(3), torch.nn.BatchNorm2d(3, affine=False), torch.nn.BatchNorm1d(3, momentum=None)]
    network = torch.nn.Sequential(*others, torch.nn.Sequential(torch.nn.BatchNorm2d(3)))
    placed = Runtime("cpu", compiled=True).place(copy.deepcopy(network))
    assert [type(norm) for norm in placed[:3]] == [type(norm) for norm in others]
    assert type(placed[3][0]) is not torch.nn.BatchNorm2d


def test_a_cuda_graph_needs_cuda_and_one_process(monkeypatch, capsys):
    runtime, step = Runtime("cpu", graphed=True), object()
    assert "--cuda-graph needs CUDA and is ignored on cpu" in capsys.readouterr().err
    assert runtime.graph(step) is step
    monkeypatch.setattr(runtime, "world_size", 2)
    monkeypatch.setattr(runtime, "kind", "cuda")
    with pytest.raises(UserError, match="single process"):
        runtime.configure(graphed=True)


def fused_sgd(*arguments):
    """``learner.sgd`` as on CUDA."""
    optimizer = sgd(*arguments)
    optimizer.register_load_state_dict_post_hook(fuse)
    fuse(optimizer)
    return optimizer


@pytest.mark.parametrize(
    "flags",
    [
        "--feedback taylor --teacher-dropout 0.2 --student-dropout 0.2 --grad-clip 1",
        "--feedback exact --accumulate 2 --weak-pass ema --pseudo-label-view strong",
        "--method fixmatch --confidence relative --labeled-view strong --student-dropout 0.2",
        "--method semimeta",
    ],
)
def test_a_run_of_replayed_steps_is_the_run(flags, tmp_path, monkeypatch):
    """The whole program, stopped once: views, evaluations between replays, each step's figures."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("methods.method.sgd", fused_sgd)
    monkeypatch.setattr(Runtime, "static", True)
    recipe = (
        "--dataset digits --num-labeled 40 --resize 8 --model wrn-10-1 --batch-size 4 --mu 2 --eval-step 6 "
        "--log-step 1 --warmup-steps 5 --student-wait-steps 2 --uda-steps 10 --threshold 0.2 --nesterov "
        f"--finetune-epochs 0 --no-pictures --device cpu --resume auto {flags}"
    ).split()

    def figures(name):
        for steps in ("8", "12"):
            assert main.run([*recipe, "--name", name, "--total-steps", steps]) == 0
        lines = (tmp_path / "results" / name / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line) | {"images_per_second": 0} for line in lines]

    taken = figures("taken")
    monkeypatch.setattr(
        Runtime, "graph", lambda self, step, *generators: RecordedStep(self, step, generators)
    )
    for before, after in zip(taken, figures("replayed"), strict=True):
        assert after == pytest.approx(before, rel=1e-5, abs=1e-7)
    assert len(taken) == 12


def test_replay_draws_the_same_and_leaves_no_trace():
    runtime = Runtime("cpu")
    state = runtime.rng_state()
    first = torch.rand(5)
    after = torch.get_rng_state()
    with runtime.replay(state):
        again = torch.rand(5)
        torch.rand(100)
    assert torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), after)


def test_dropout_is_decided_by_the_key_and_the_process():
    def drawn(*key, rank=0):
        runtime = Runtime("cpu")
        runtime.rank = rank
        runtime.seed(*key)
        return tuple(torch.rand(3).tolist())

    assert drawn(0, 5) == drawn(0, 5)
    assert len({drawn(0, 5), drawn(0, 6), drawn(1, 5), drawn(0, 5, rank=1)}) == 4


def test_a_generator_is_seeded():
    first, again, other = (torch.rand(3, generator=Runtime("cpu").generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_networks_are_placed_in_the_memory_order_that_was_asked_for():
    for channels_last in (False, True):
        weight = Runtime("cpu", channels_last=channels_last).place(torch.nn.Conv2d(3, 4, 3)).weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_save_writes_every_path(tmp_path):
    runtime, paths = Runtime("cpu"), [tmp_path / "last", tmp_path / "best"]
    runtime.save({"step": 1}, *paths)
    assert [runtime.load(path) for path in paths] == [{"step": 1}] * 2


def test_save_replaces_whole_files_only(tmp_path, monkeypatch):
    runtime, path = Runtime("cpu"), tmp_path / "a.pth.tar"
    runtime.save({"step": 1}, path)

    class Full(dict):
        def __reduce_ex__(self, protocol):
            raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        runtime.save({"step": Full()}, path)
    assert runtime.load(path) == {"step": 1}


@pytest.mark.parametrize("damage", ["truncated", "text", "empty", "missing", "code"])
def test_damaged_checkpoints(tmp_path, damage, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runtime, path = Runtime("cpu"), tmp_path / "a.pth.tar"
    runtime.save({"weights": torch.zeros(1000)}, path)
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif damage == "text":
        path.write_text("hello")
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "missing":
        path.unlink()
    else:
        torch.save({"weights": Payload()}, path)
    with pytest.raises(UserError, match=r"a\.pth\.tar"):
        runtime.load(path)
    assert not (tmp_path / "run-by-a-checkpoint").exists()


def test_bf16_of_the_forward_pass_only(bf16):
    runtime = Runtime("cpu", amp=True)
    layer = torch.nn.Linear(4, 4)
    with runtime.autocast():
        assert layer(torch.zeros(1, 4)).dtype == torch.bfloat16
    assert layer.weight.dtype == torch.float32
    assert not runtime.grad_scaler().is_enabled()


@pytest.mark.skipif(sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="glibc's allocator")
def test_freed_memory_is_kept():
    """In a process of its own: of 64 MiB that were freed 16 are written again without new pages."""
    program = """
import resource, torch
from engine.runtime import Runtime
Runtime("cpu")
def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes * 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(64), faults(16))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    first, second = map(int, done.stdout.split())
    assert second < 100 < first
