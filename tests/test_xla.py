"""XLA on its CPU client, in processes of their own: same losses, few compilations, no detour, sharding."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import xla_worker
from conftest import teacher_file

import main

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torch_xla") is None, reason="torch_xla is for Linux on x86-64 alone"
)

COMMON = (
    "--num-labeled 40 --resize 8 --model wrn-10-1 --batch-size 4 --mu 2 --student-lr 0.001 --nesterov "
    "--warmup-steps 3 --uda-steps 5 --lambda-u 1 --label-smoothing 0.1"
).split()
RUNS = {
    "mpl": (
        "--feedback exact --pseudo-label soft --total-steps 12 --teacher-lr 0.001 --confidence soft "
        "--align 0.2 --switch-every 5"
    ),
    "reduced": (
        "--method reduced-mpl --feedback exact --pseudo-label soft --total-steps 5 --teacher-lr 10 "
        f"--teacher-checkpoint {teacher_file('wrn-10-1', 10, 8)}"
    ),
    "semimeta": "--method semimeta --mixup-alpha 0.5 --total-steps 5",
}
RUNS = {name: [*COMMON, *flags.split()] for name, flags in RUNS.items()}
# a step is compiled in a quarter of the time
COMPILE_FAST = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
)
LOSSES = ("labeled_loss", "uda_loss", "student_loss", "consistency_loss")


def on_the_client(what, given, folder, devices):
    """The results of xla_worker.py in a process of its own."""
    (folder / "given.json").write_text(json.dumps(given))
    environment = os.environ | {
        "PJRT_DEVICE": "CPU",
        "CPU_NUM_DEVICES": str(devices),
        "XLA_FLAGS": COMPILE_FAST,
    }
    worker = [sys.executable, ROOT / "tests/xla_worker.py", what, "given.json", "results.json"]
    result = subprocess.run(worker, capture_output=True, text=True, cwd=folder, env=environment, timeout=800)
    assert result.returncode == 0, result.stderr
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def on_xla(tmp_path_factory):
    """The first steps of some methods, split over two XLA devices."""
    return on_the_client("train", RUNS, tmp_path_factory.mktemp("xla"), devices=2)


def assert_same_losses(one, other, tolerance):
    for ours, theirs in zip(one["losses"], other["losses"], strict=True):
        for name in ours.keys() & set(LOSSES):
            assert ours[name] == pytest.approx(theirs[name], rel=tolerance)
        if "feedback" in theirs:
            assert ours["feedback"] == pytest.approx(theirs["feedback"], rel=0.01, abs=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_losses_are_those_of_the_cpu(on_xla, name, tmp_path):
    here = xla_worker.train("cpu", RUNS[name], str(tmp_path))
    tolerance = 5e-3 if name == "semimeta" else 1e-3  # its labels amplify rounding
    assert_same_losses(on_xla[name], here, tolerance)


@pytest.mark.parametrize("name", RUNS)
def test_the_batch_is_split_over_two_devices(on_xla, name):
    for spec in on_xla[name]["sharding"]:
        assert spec.startswith("{devices=[2") and spec.endswith("]0,1}"), spec


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_compiled_once(on_xla, name):
    """And once with roles exchanged, from step 5 on; nothing when they are as at first again, at step 10."""
    compilations = on_xla[name]["compilations"]
    assert compilations[0] >= 1
    assert len(set(compilations[:5])) == 1
    assert len(set(compilations[5:])) <= 1


@pytest.mark.parametrize("name", RUNS)
def test_nothing_falls_back_to_the_host(on_xla, name):
    """But for an empty tensor that forward mode makes to stand for a tangent of zeros."""
    assert set(on_xla[name]["fallbacks"]) <= {"aten::_efficientzerotensor"}


@pytest.mark.parametrize("name", RUNS)
def test_views_are_those_of_the_cpu(on_xla, name):
    """All pixels, but for those where a fused multiplication rounds a blend to the next grey level."""
    shares = [share for step in on_xla[name]["differing"] for share in step]
    assert sum(shares) / len(shares) < 1e-3


def test_the_digits_recipe_trains_saves_resumes_and_evaluates(tmp_path, monkeypatch):
    """The recipe's own flags, small steps; its checkpoint goes on and is evaluated, on the CPU too."""
    monkeypatch.chdir(tmp_path)
    recipe = (ROOT / "recipes/digits.sh").read_text().split('main.py"', 1)[1]
    small = "--model wrn-10-1 --eval-step 3 --batch-size 4 --resize 4 --no-pictures".split()
    train = [*recipe.replace("\\\n", " ").replace('"$@"', "").split(), *small]

    def summary(name):
        return json.loads((tmp_path / f"results/{name}/summary.json").read_text())

    last = "checkpoint/digits_last.pth.tar"
    flags = (
        "--finetune-epochs 0 --total-steps 3 --student-wait-steps 1",
        f"--finetune-epochs 1 --total-steps 4 --resume {last}",
        f"--evaluate --resume {last}",
    )
    commands = [[*train, "--device", "xla", *words.split()] for words in flags]
    set_up, first, second, *_ = on_the_client("call", commands, tmp_path, devices=1)[0]
    assert set_up < first == second  # a step is compiled once, also where a rate is 0
    trained = summary("digits")
    assert trained["steps"] == 4 and trained["device"] == "1 × xla (CPU)"
    assert summary("digits_last")["top1"] == trained["top1"]

    assert main.run([*train, "--device", "cpu", "--evaluate", "--resume", last]) == 0
    assert summary("digits_last-2")["top1"] == pytest.approx(trained["top1"], abs=1)
    tuned = "checkpoint/digits_finetune_last.pth.tar"
    assert main.run(["--device", "cpu", "--evaluate", "--resume", tuned]) == 0
    assert summary("digits_finetune_last")["top1"] == pytest.approx(trained["finetune_top1"], abs=1)
    further = "--device cpu --finetune-epochs 0 --total-steps 5 --resume".split()
    assert main.run([*train, *further, last]) == 0
    assert summary("digits")["steps"] == 5
