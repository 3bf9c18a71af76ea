"""The phases that a profile shows, the plain step against its formulas, and the commands end to end."""

import argparse
import copy
import functools
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler
from torch.autograd import DeviceType

import main as training
from benchmarks import augment, common, feedback, profile, start, step
from benchmarks.common import Step, StepProcess
from benchmarks.plain import PlainImages, PlainStep
from benchmarks.profile import PHASES, Phases, busy_and_gaps, kernels, profiled
from engine.learner import Learner
from engine.optimizers import sgd
from engine.runtime import Runtime
from methods.feedback import Exact, StudentStep
from utils import UserError

MAIN = "--model wrn-10-1 --resize 8 --batch-size 4 --mu 2".split()  # flags of main.py
TINY = [*MAIN, "--repeats", "2", "--threads", "1"]


def options(*flags):
    return training.parse_arguments(["--dataset", "cifar10", "--device", "cpu", *MAIN, *map(str, flags)])


# ---------------------------------------------------------------- reading a profile


def event(name, start, end, device=DeviceType.CPU, annotation=False, kernels=()):
    """One of the profiler's, from second ``start`` to second ``end``; kernels take so many seconds."""
    return SimpleNamespace(
        name=name,
        time_range=SimpleNamespace(start=1e6 * start, end=1e6 * end),
        device_type=device,
        is_user_annotation=annotation,
        kernels=[SimpleNamespace(duration=1e6 * seconds) for seconds in kernels],
    )


def test_gaps_between_kernels():
    """Kernels that overlap count once; one that ends before its predecessor opens no gap."""
    assert busy_and_gaps([(0, 2), (3, 8), (4, 5), (10, 11)]) == (8, [1, 2])
    assert busy_and_gaps([]) == (0, [])


def test_kernels_among_what_the_profiler_saw():
    """The host's operators and annotations over several kernels do not count."""
    on_device = functools.partial(event, device=DeviceType.CUDA)
    events = [
        event("aten::mm", 0, 9),
        on_device("Optimizer.step", 1, 8, annotation=True),
        on_device("gemm", 5, 7),
        on_device("add", 3, 4),
        on_device("gemm", 1, 2),
    ]
    assert kernels(events) == ([("gemm", 3, 2), ("add", 1, 1)], [(1, 2), (3, 4), (5, 7)])


NESTED = [
    *(event("forward", 3, 5, annotation=True), event("backward", 2, 6, annotation=True)),
    *(event("method", 1, 9, annotation=True), event("step", 0, 10, annotation=True)),
    event("forward", 4, 30, device=DeviceType.CUDA, annotation=True),  # the same, as the device sees it
    event("step", 10, 12, annotation=True),
]


def test_the_inner_phase_counts():
    seconds = Phases(NESTED).host_seconds()
    expected = {"forward": 2, "backward": 2, "method": 4, "step": 2 + 2}
    assert seconds == pytest.approx(dict.fromkeys(PHASES, 0) | expected)


def test_kernels_belong_to_the_phase_that_launched_them():
    """A mark has the kernels of its operators, too: they count once. What nothing marks is the step's."""
    marked = event("forward", 3, 5, annotation=True, kernels=[7, 1])
    operators = [
        event("aten::convolution", 4, 4.5, kernels=[7, 1]),
        event("aten::convolution_backward", 5, 5.5, kernels=[4]),
        event("aten::add", 20, 21, kernels=[1]),
    ]
    seconds = Phases(NESTED).kernel_seconds([marked, *operators], total=15)
    expected = {"forward": 8, "backward": 4, "step": 1 + 2}
    assert seconds == pytest.approx(dict.fromkeys(PHASES, 0) | expected)


# ---------------------------------------------------------------- the phases of a step


def operators_by_phase(step):
    """{operator: Counter of the phases of its calls} in one step."""
    events, _ = profiled(step, 1)
    phases, calls = Phases(events), {}
    for each in events:
        calls.setdefault(each.name, Counter())[phases.at(each.time_range.start)] += 1
    return calls


def test_operators_run_in_their_phases():
    calls = operators_by_phase(Step(options()))
    assert set(calls["aten::_log_softmax"]) == {"backward", "feedback"}
    assert set(calls["aten::one_hot"]) == {"method"}  # the pseudo labels
    assert set(calls["aten::_log_softmax_backward_data"]) == {"backward"}
    assert set(calls["Optimizer.step#SGD.step"]) == {"update"}
    assert calls["aten::index_select"]["draw"] == 2
    assert calls["step"] == {"step": 1} and calls["draw"] == {"draw": 1} and calls["meters"] == {"meters": 1}


CONVOLUTIONS = 9  # of wrn-10-1


@pytest.mark.parametrize(
    "flags, forward, backward, measured",
    [
        ((), 2, 2, 2),  # taylor: labelled images, before and after
        (("--feedback", "exact", "--feedback-jvp", "difference"), 2, 2, 3),
        (("--feedback", "dot", "--accumulate", 2), 2 + 2 + 2, 4, 2),  # the teacher twice, the student once
        (("--weak-pass", "ema", "--feedback-view", "strong"), 3, 2, 2),
        (("--feedback", "none", "--weak-pass", "apart"), 3, 2, 0),
        (("--method", "uda"), 1, 1, 0),
    ],
)
def test_passes_with_flags(flags, forward, backward, measured):
    """All passes are known as what they are, and a step that is watched learns what it learns unwatched."""
    steps = []
    for _ in range(2):
        torch.manual_seed(0)
        steps.append(Step(options(*flags)))
    watched, alone = steps
    calls = operators_by_phase(watched)
    alone()
    expected = {"forward": forward * CONVOLUTIONS, "feedback": measured * CONVOLUTIONS}
    assert calls["aten::convolution"] == {name: count for name, count in expected.items() if count}
    # the feedback's gradient is the feedback's
    gradients = {phase: n // CONVOLUTIONS for phase, n in calls["aten::convolution_backward"].items()}
    assert gradients.pop("backward") == backward and set(gradients) <= {"feedback"}
    for role, learner in watched.method.learners.items():
        for ours, theirs in zip(
            learner.network.parameters(), alone.method.learners[role].network.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)


@needs_compiler
def test_phases_of_compiled_networks(monkeypatch):
    """The marks are around compiled networks."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    step = Step(options("--compile"))
    step()
    graphs = len(compiled)
    calls = operators_by_phase(step)["aten::convolution"]
    assert graphs == len(compiled) > 0
    assert calls == {"forward": 2 * CONVOLUTIONS, "feedback": 2 * CONVOLUTIONS}


def test_profile(capsys):
    profile.main([*TINY, "--feedback", "dot"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("wrn-10-1, batch 4, mu 2, 8 pixels, float32, cpu")
    phases = {line.split()[0]: float(line.split()[1]) for line in lines[4 : 4 + len(PHASES)]}
    assert list(phases) == list(PHASES) and min(phases.values()) >= 0
    under_the_profiler = float(lines[1].split()[4])
    assert under_the_profiler / 2 < sum(phases.values()) < 1.01 * under_the_profiler  # no phase counts twice
    *rows, last = (line.split() for line in lines[4 + len(PHASES) + 2 :])
    assert len(rows) == 20 and "aten::convolution_backward" in {row[-1] for row in rows}
    milliseconds = [float(row[0]) for row in rows]
    assert milliseconds == sorted(milliseconds, reverse=True) and sum(milliseconds) <= float(last[0])


# ---------------------------------------------------------------- steps in another process


def test_steps_in_a_process_of_their_own():
    """The first seconds there are those of a real step, its memory its own."""
    process = StepProcess(["--dataset", "cifar10", "--device", "cpu", *MAIN], 1)
    assert process(1) > 0 and 100 < process.memory < 5000
    process.close()


def test_steps_whose_process_dies():
    process = StepProcess(["--no-such-flag"], 1)
    with pytest.raises(UserError, match="has ended early"):
        process(1)


def test_double_backward_computes_the_exact_feedback():
    """For the labels that it takes: the same probability for each class."""
    network = training.METHODS["mpl"](options(), 10, 8, Runtime("cpu")).student.network.double()
    learner = Learner(
        network,
        Runtime("cpu"),
        optimizer=lambda network: sgd(network, 0.1, 0.0, False, 0.0),
        schedule=lambda step: 0.1,
    )
    generator = torch.Generator().manual_seed(0)
    images_u, images_l = (torch.randn(n, 3, 8, 8, generator=generator).double() for n in (8, 4))
    labels = torch.full((8, 10), 0.1).double()
    values = []
    for kind in (Exact, feedback.DoubleBackward):
        student = copy.deepcopy(learner)
        given = StudentStep(student, images_u, images_l, torch.arange(4), 0.1, Runtime("cpu").rng_state())
        estimator = kind()
        student.optimizer.zero_grad()
        logits = student(torch.cat([images_u, images_l]))[:8]
        F.cross_entropy(logits, labels).backward()
        estimator.before(given)
        student.update(0.1)
        values.append(estimator.after(given))
    ours, reference = values
    assert reference.abs().max() > 1e-4
    torch.testing.assert_close(ours, reference, rtol=1e-6, atol=1e-9)


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
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (common.MEAN, common.STD))
    levels = (255 * (labeled * std + mean)).round().to(torch.uint8)
    colours = {tuple(pixel) for pixel in levels.flatten(1).T.tolist()}
    assert colours <= {tuple(pixel) for pixel in images.images[3].reshape(-1, 3).tolist()} | {(128,) * 3}
    assert ((strong == 0).all(dim=1).sum(dim=(1, 2)) >= 16).all()  # the cutout: a quarter of the image
    assert not (weak == 0).all(dim=1).any()


def test_step_against_the_plain_one(capsys):
    step.main([*TINY, "--repeats", "1", "--steps", "1", "--feedback", "none"])
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[:2] == ["whole", "step"] and all(float(rate.replace(",", "")) > 0 for rate in line[2:])


# ---------------------------------------------------------------- the other commands


def test_augment(capsys):
    augment.main("--pairs 2 --batches 1 --repeats 1".split())
    printed = capsys.readouterr().out
    assert "2 pairs of 32 × 32, drawn operations, device cpu" in printed and "\n1 thread(s)" in printed


def test_pillow_knows_all_operations():
    views = augment.ImageViews(32, common.MEAN, common.STD)
    pixels = torch.randint(64, 192, (32, 32, 3), dtype=torch.uint8).numpy()
    pillow, image = augment.PillowPairs(views), augment.Image.fromarray(pixels)
    for name in augment.OPERATIONS:
        changed = pillow.operate(name, image)
        assert changed.size == image.size and changed.tobytes() != image.tobytes(), name


@pytest.mark.parametrize("command", [augment, feedback, profile, start, step])
def test_help(command, capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m {command.__name__} ")


@pytest.mark.parametrize("command", [feedback, profile, step])
def test_wrong_words(command, capsys):
    with pytest.raises(UserError, match="--no-such-flag"):
        command.main(["--no-such-flag"])
