"""What the measurements count, the plain step against its formulas, and the commands end to end."""

import argparse
import copy
import functools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler
from PIL import Image
from recorded import RecordedStep, fuse
from torch.autograd import DeviceType
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmark import PHASES, PlainImages, PlainStep, WatchedStep, Work, busy_and_gaps, fitted, kernels, limit
from models import build_model, count_flops

TINY = "--model wrn-10-1 --size 8 --batch-size 4 --mu 2 --repeats 2 --threads 1".split()


def arguments(*flags, **values):
    """The command line of TINY, with main.py's ``flags``."""
    size = dict(model="wrn-10-1", size=8, batch_size=4, mu=2, repeats=2, threads=1, device="cpu")
    form = dict(amp=False, channels_last=False, compile=False)
    return argparse.Namespace(**size | form | values, flags=[str(flag) for flag in flags])


# ---------------------------------------------------------------- counting


def counted(function):
    """[FLOP, bytes, bytes of products] of a call."""
    with Work() as work:
        function()
    return work.amounts.tolist()


def test_flop_of_a_linear_layer():
    """5 images, 6 inputs, 4 outputs: forward and the gradient of the weight, two FLOP per multiply-add."""
    layer, images = torch.nn.Linear(6, 4, bias=False), torch.randn(5, 6)
    flop, _, product_bytes = counted(lambda: layer(images).sum().backward())
    assert flop == 2 * (2 * 5 * 6 * 4)
    assert product_bytes == 4 * (30 + 24 + 20) + 4 * (30 + 24 + 1)  # backward from a sum: one value, expanded


def test_flop_of_a_network():
    network, images = build_model("wrn-10-1", 10), torch.randn(3, 3, 8, 8)
    assert counted(lambda: network(images))[0] == 3 * 2 * count_flops(network, 8)


a, b = torch.ones(100), torch.ones(100)
matrix = torch.ones(20, 10)
rows = torch.tensor([3, 4, 5])


@pytest.mark.parametrize(
    "function, floats",
    [
        (lambda: a.clone(), 200),
        (lambda: a.to(torch.bfloat16), 150),
        (lambda: a.copy_(b), 200),  # what is there before is not read
        (lambda: a.zero_(), 100),
        (lambda: torch.zeros(100), 100),
        (lambda: torch.empty(100), 0),
        (lambda: a + b, 300),
        (lambda: a * a, 200),  # one input is read once
        (lambda: a.mul_(b), 300),
        (lambda: torch.add(a, b, out=torch.empty(100)), 300),
        (lambda: torch._foreach_add_([a, b], [b, a]), 400),
        (lambda: torch._foreach_copy_([a], [b]), 200),
        (lambda: a[::2].reshape(5, 10).t(), 0),
        (lambda: matrix + torch.ones(1).expand(20, 10), 1 + 200 + 1 + 200),  # the one, and the sum
        (lambda: matrix.index_select(0, rows), 30 + 30 + 6),  # of 20 rows three are read; int64 counts twice
        (lambda: matrix[rows], 30 + 30 + 6),
        (lambda: matrix.t() @ matrix, 200 + 200 + 100),
    ],
)
def test_bytes_of_operators(function, floats):
    assert counted(function)[1] == 4 * floats


def test_the_limit_is_what_takes_longer():
    rates = (100.0, 1000.0)  # bytes/s, FLOP/s
    assert limit(flop=3000, moved=200, rates=rates) == (3.0, "FLOP")
    assert limit(flop=1000, moved=200, rates=rates) == (2.0, "bytes")


def test_gaps_between_kernels():
    """Kernels that overlap count once; one that ends before its predecessor opens no gap."""
    assert busy_and_gaps([(0, 2), (3, 8), (4, 5), (10, 11)]) == (8, [1, 2])
    assert busy_and_gaps([]) == (0, [])


def test_kernels_among_what_the_profiler_saw():
    """The host's operators and annotations over several kernels do not count."""

    def event(name, start, end, device=DeviceType.CUDA, annotation=False):
        span = SimpleNamespace(start=1e6 * start, end=1e6 * end)
        return SimpleNamespace(name=name, time_range=span, device_type=device, is_user_annotation=annotation)

    events = [
        event("aten::mm", 0, 9, device=DeviceType.CPU),
        event("Optimizer.step", 1, 8, annotation=True),
        event("gemm", 5, 7),
        event("add", 3, 4),
        event("gemm", 1, 2),
    ]
    assert kernels(events) == ([("gemm", 3, 2), ("add", 1, 1)], [(1, 2), (3, 4), (5, 7)])


# ---------------------------------------------------------------- the phases of a step


def images_seen(network):
    """A list that gets the number of images of every pass through the network, called as it is."""
    seen = []
    network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    return seen


def test_work_by_phase():
    """Forward passes are counted where they belong, to the FLOP, and the sum is PyTorch's own count."""
    step = WatchedStep(arguments())
    method = step.method
    seen = {role: images_seen(learner.network) for role, learner in method.learners.items()}
    work = step.work()
    per_image = 2 * count_flops(method.student.network, 8)
    teacher, student = (work[f"{role} forward"][0] / per_image for role in ("teacher", "student"))
    assert teacher == 4 + 8 + 8 and [teacher] == seen["teacher"]
    assert student == seen["student"][0] >= 8
    assert work["feedback"][0] == (4 + 4) * per_image  # taylor: labelled images, before and after
    for phase in ("teacher", "student"):  # no gradient of the images: a little less than twice forward
        assert 1.5 < work[f"{phase} backward"][0] / work[f"{phase} forward"][0] < 2
    for phase in ("drawing", "views", "optimisers and EMA", "labels and losses", "metering"):
        assert work[phase][0] == 0 and work[phase][1] > 0
    with FlopCounterMode(display=False) as counter:
        step()
    assert sum(work.values())[0] == counter.get_total_flops()


class Operators(TorchDispatchMode):
    """Collects in which phases of a step each operator runs: {name: phases}."""

    def __init__(self, step):
        super().__init__()
        self.step, self.phases = step, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        self.phases.setdefault(name, set()).add(self.step.running[-1])
        return function(*args, **(kwargs or {}))


def test_operators_run_in_their_phases():
    step = WatchedStep(arguments())
    with Operators(step) as operators:
        step()
    phases = operators.phases
    assert phases["convolution"] == {"teacher forward", "student forward", "feedback"}
    assert phases["convolution_backward"] == {"teacher backward", "student backward"}
    assert phases["_log_softmax"] == {"labels and losses", "feedback"}
    assert phases["_log_softmax_backward_data"] == {"teacher backward", "student backward"}
    assert step.running == ["rest"]


@pytest.mark.parametrize(
    "flags",
    [
        ("--feedback", "exact", "--feedback-jvp", "forward"),
        ("--feedback", "dot", "--accumulate", 2),
        ("--weak-pass", "ema", "--feedback-view", "strong"),
        ("--feedback", "none", "--weak-pass", "apart"),
        ("--method", "uda"),
    ],
)
def test_phases_with_flags(flags):
    """A step that is watched learns what it learns unwatched, and no phase but the feedback is empty."""
    args = arguments(*flags)
    steps = []
    for _ in range(2):
        torch.manual_seed(0)
        steps.append(WatchedStep(args))
    watched, alone = steps
    torch.manual_seed(1)
    work = watched.work()
    torch.manual_seed(1)
    alone()
    for role, learner in watched.method.learners.items():
        for ours, theirs in zip(
            learner.network.parameters(), alone.method.learners[role].network.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)
    assert work["labels and losses"][0] == 0  # all passes are known as such
    for role in watched.method.learners:
        assert work[f"{role} forward"][0] > 0 and work[f"{role} backward"][0] > 0
    assert (work["feedback"][0] > 0) == ("none" not in flags and "uda" not in flags)


def test_phases_follow_the_roles():
    """The teacher's passes hold a view more than the student's, also when they have exchanged roles."""
    step = WatchedStep(arguments("--switch-every", 1))
    first, second = step.work(), step.work()
    assert step.method.switched
    for phase in PHASES[2:6]:
        assert first[phase][0] == second[phase][0]


def test_phases_of_a_replayed_step():
    """The marks within a captured step are read anew at every replay, those around it as they come."""
    step, readings = WatchedStep(arguments("--feedback", "taylor")), torch.zeros((), dtype=torch.float64)
    for learner in step.method.learners.values():
        fuse(learner.optimizer)

    def read(external=False):
        return readings.add_(1).clone()

    expected = step.amounts(read, torch.sub)[0]
    step.runtime.graph = lambda function, *generators: RecordedStep(step.runtime, function, generators)
    for steps in (1, 3):
        for record in step.graph_amounts(read, torch.sub, steps):
            assert record == expected
    assert expected["optimisers and EMA"] == 2 and expected["metering"] == 1
    step()  # and goes on without a meter


@needs_compiler
def test_phases_of_compiled_networks(monkeypatch):
    """They are compiled where time is measured, and count as if they were not."""
    calls = []

    def backend(graph, inputs):
        def run(*args):
            calls.append(graph)
            return graph(*args)

        return run

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    step = WatchedStep(arguments(compile=True))
    assert list(step.seconds(1)) == list(PHASES)
    before = len(calls)
    work = step.work()
    assert before > 0 and len(calls) == before
    monkeypatch.undo()
    alone = WatchedStep(arguments()).work()
    for phase in PHASES[2:7]:  # networks and feedback; the bytes of views depend on what is drawn
        assert work[phase].tolist() == alone[phase].tolist()


def test_profile(tmp_path, capsys):
    benchmark.main(["profile", *TINY, "--json", str(tmp_path / "step.json"), "--feedback", "dot"])
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "step.json").read_text())
    assert "--feedback dot" in report["step"] and "float32" in report["step"]
    assert list(report["phases"]) == list(PHASES)
    for name, phase in report["phases"].items():
        assert name in printed
        assert phase["seconds"] >= 0
    total = report["total"]
    for key in ("seconds", "flop", "bytes", "product_bytes"):
        assert total[key] == pytest.approx(sum(phase[key] for phase in report["phases"].values()))
    by = {
        "bytes": total["bytes"] / report["copy_bytes_per_second"],
        "FLOP": total["flop"] / report["product_flop_per_second"],
    }
    assert total["limit_seconds"] == pytest.approx(max(by.values())) == by[total["binding"]]
    assert total["fused_limit_seconds"] <= total["limit_seconds"]
    assert f"bound by {total['binding']}" in printed and "An estimate" in printed
    outside = ("drawing", "views", "metering", "rest", "labels and losses")
    assert report["outside_seconds"] == pytest.approx(sum(report["phases"][p]["seconds"] for p in outside))
    operators = [row["name"] for row in report["kernels"]]
    assert len(operators) == 20 and "aten::convolution_backward" in operators
    seconds = [row["seconds"] for row in report["kernels"]]
    assert seconds == sorted(seconds, reverse=True)
    assert sum(seconds) <= report["kernel_seconds"]


def test_data(capsys):
    benchmark.main(["data", *TINY])
    assert "outside the networks" in capsys.readouterr().out


# ---------------------------------------------------------------- the plain step


def plain_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    labeled = torch.randn(4, 3, 8, 8, generator=generator)
    weak, strong = (torch.randn(4, 2, 3, 8, 8, generator=generator) for _ in range(2))
    return labeled, torch.arange(4), weak, strong


def plain_step(**values):
    options = dict(model="wrn-10-1", momentum=0.9, weight_decay=5e-4, teacher_lr=0.05, student_lr=0.05)
    losses = dict(label_smoothing=0.1, temperature=0.5, threshold=0.2, lambda_u=2.0, ema=0.9)
    return PlainStep(argparse.Namespace(**options | losses | values), 8, torch.device("cpu"))


def test_plain_step_is_its_formulas():
    plain = plain_step()
    teacher, student, average = (copy.deepcopy(n) for n in (plain.teacher, plain.student, plain.average))
    labeled, targets, weak, strong = plain_batch()
    scalars = plain(labeled, targets, weak, strong)
    assert all(isinstance(value, float) for value in scalars.values())
    weak, strong = weak.flatten(0, 1), strong.flatten(0, 1)

    logits_l, logits_w, logits_s = teacher(torch.cat([labeled, weak, strong])).split([4, 8, 8])
    logits = student(torch.cat([labeled, strong]))
    old = F.cross_entropy(logits[:4], targets)
    student_loss = F.cross_entropy(logits[4:], logits_w.argmax(1), label_smoothing=0.1)
    optimizer = torch.optim.SGD(student.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4)
    student_loss.backward()
    optimizer.step()
    with torch.no_grad():
        new = F.cross_entropy(student(labeled), targets)
    feedback = (new - old).detach() * F.cross_entropy(logits_s, logits_s.argmax(1))
    sharp = F.softmax(logits_w.detach() / 0.5, dim=1)
    uda = ((sharp.amax(1) >= 0.2) * -(sharp * F.log_softmax(logits_s, 1)).sum(1)).mean()
    loss = F.cross_entropy(logits_l, targets, label_smoothing=0.1) + 2 * uda + feedback
    optimizer = torch.optim.SGD(teacher.parameters(), 0.05, 0.9, nesterov=True, weight_decay=5e-4)
    loss.backward()
    optimizer.step()

    expected = dict(old_loss=old, new_loss=new, student_loss=student_loss, feedback_loss=feedback)
    expected |= dict(uda_loss=uda, teacher_loss=loss)
    for name, value in expected.items():
        assert scalars[name] == pytest.approx(value.item(), rel=1e-4), name
    assert scalars["feedback_loss"] != 0
    for ours, theirs in ((plain.student, student), (plain.teacher, teacher)):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    for p, before, after in zip(
        plain.average.parameters(), average.parameters(), plain.student.parameters(), strict=True
    ):
        torch.testing.assert_close(p, 0.9 * before + 0.1 * after)


def test_plain_step_learns():
    plain = plain_step(label_smoothing=0.0)
    losses = [plain(*plain_batch())["labeled_loss"] for _ in range(25)]
    assert losses[-1] < 0.3 * losses[0]


def test_plain_images():
    images = PlainImages(length=3, mu=2, size=8)
    labeled, target, weak, strong = images[1]
    assert labeled.shape == (3, 8, 8) and weak.shape == strong.shape == (2, 3, 8, 8) and target == 3
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (benchmark.MEAN, benchmark.STD))
    levels = (255 * (labeled * std + mean)).round().to(torch.uint8)
    colours = {tuple(pixel) for pixel in levels.flatten(1).T.tolist()}
    assert colours <= {tuple(pixel) for pixel in images.images[3].reshape(-1, 3).tolist()} | {(128,) * 3}
    assert ((strong == 0).all(dim=1).sum(dim=(1, 2)) >= 16).all()  # the cutout: a quarter of the image
    assert not (weak == 0).all(dim=1).any()


def test_step_against_the_plain_one(capsys):
    benchmark.main(["step", "--plain", *TINY, "--repeats", "1", "--steps", "1", "--feedback", "none"])
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[:2] == ["whole", "step"] and all(float(rate.replace(",", "")) > 0 for rate in line[2:])


# ---------------------------------------------------------------- cost


def test_fit():
    fit = fitted([1, 2, 3], [12.0, 14.0, 16.0])
    assert fit["a"] == pytest.approx(10) and fit["b"] == pytest.approx(2)
    assert fit["largest_residual"] < 1e-9
    square = fitted([1, 2, 3], [13.0, 22.0, 37.0], power=2)
    assert (square["a"], square["b"]) == (pytest.approx(10), pytest.approx(3))
    # weights 1, 1/4, 1: the line through (0, 1), (1, 2), (2, 1) is level, at 1 + 1/9 of relative residuals
    level = fitted([0, 1, 2], [1.0, 2.0, 1.0])
    assert (level["a"], level["b"]) == (pytest.approx(10 / 9), pytest.approx(0))
    assert level["largest_residual"] == pytest.approx(4 / 9)


def made_up_cost(args):
    """Seconds and MiB of a step, linear in all that is varied, but for the seconds of the width's square."""
    depth, width = map(int, args.model.split("-")[1:])
    size = args.batch_size + 10 * args.mu + 100 * depth
    return 1e-3 * (size + 1000 * width**2), 2.0 * (size + 1000 * width)


def test_cost_draws_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "cost_of_step", made_up_cost)
    values = "--batches 2 4 8 --mus 1 2 --widths 1 2 --depths 10 16 22".split()
    files = ["--json", str(tmp_path / "cost.json"), "--picture", str(tmp_path / "cost.png")]
    benchmark.main(["cost", *TINY, *values, *files])
    report = json.loads((tmp_path / "cost.json").read_text())
    assert report["depth"]["values"] == [10, 16, 22]
    for name, slope in (("batch", 1), ("mu", 10), ("width", 1000), ("depth", 100)):
        seconds, memory = report[name]["fit_seconds"], report[name]["fit_mebibytes"]
        assert seconds["b"] == pytest.approx(1e-3 * slope) and memory["b"] == pytest.approx(2 * slope)
        assert seconds["largest_residual"] < 1e-6
    at_base = [
        report[name]["seconds"][report[name]["values"].index(x)] for name, x in (("batch", 4), ("mu", 2))
    ]
    assert at_base == [pytest.approx(2.024)] * 2
    picture = np.asarray(Image.open(tmp_path / "cost.png").convert("RGB"))
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # time and memory
        assert (picture == colour).all(axis=2).sum() > 1000
    assert "MiB" in capsys.readouterr().out


def test_cost_of_a_step():
    """In a process of its own: the first seconds there are those of a real step, its memory its own."""
    seconds, memory = benchmark.cost_of_step(arguments(repeats=1))
    assert seconds > 0 and 5 < memory < 1000


def test_photographs_are_predicted_and_decoded(capfd):
    """Both ways go over all files: over one more than are made, once the checkpoint can be read."""
    benchmark.main(["predict", "--images", "65", "--repeats", "1", "--workers", "1"])
    printed, errors = capfd.readouterr()
    assert "65 photographs to 32 × 32, wrn-10-1, 1 workers" in printed
    assert re.search(r"predict\.py +[\d,]+ +[\d,]+ +\d+\.\d\d\n", printed)
    assert "skipped" not in errors


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "words, said",
    [
        (["decode", "--feedback", "dot"], "unrecognized arguments: --feedback dot"),
        (["profile", "--no-such-flag"], "--no-such-flag"),
        (["cost", "--model", "resnet50"], "resnet50"),
        (["cost", "--mus", "7"], "two different values"),
        (["cost", "--picture", "cost.jpg"], "does not end in .png"),
    ],
)
def test_wrong_words(words, said, capsys):
    with pytest.raises(SystemExit) as error:
        benchmark.main(words)
    assert error.value.code == 2
    assert said in capsys.readouterr().err
