"""The training steps: losses against their formulas, methods against each other."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler, teacher_file
from recorded import RecordedStep, fuse
from test_cli import tensors
from torchvision.ops import StochasticDepth

import main
from augmentation import Views
from engine.learner import Learner, sgd
from engine.runtime import Runtime
from methods import METHODS, feedback
from methods.feedback import ESTIMATORS
from methods.method import Logits, MicroBatch, pseudo_label_accuracy, pseudo_labels, soft_cross_entropy
from methods.uda import Consistency, DistributionAlignment, teacher_logits
from models import LinearHead, build_model, leaky_relu
from run.arguments import flag
from utils import UserError

FLAGS = (
    "--dataset digits --model wrn-10-1 --batch-size 4 --mu 2 --nesterov --teacher-lr 0.1 --student-lr 0.1 "
    "--total-steps 100 --uda-steps 10 --label-smoothing 0.1 --lambda-u 2 --threshold 0.05"
).split()


def build(*flags, method="mpl", runtime=None):
    """A method on 8-pixel images of 3 classes, weights from seed 0."""
    words = ["--method", "mpl", *FLAGS, *map(str, flags), "--method", method]
    model = words[-words[::-1].index("--model")]  # the last that is given
    if "--teacher-checkpoint" not in words:
        words += ["--teacher-checkpoint", teacher_file(model, 3, 8)]
    args = main.parse_arguments(words)
    torch.manual_seed(0)
    return with_predictions(METHODS[method](args, 3, 8, runtime or Runtime("cpu")))


def with_predictions(method, n=8):
    """A method that is given what a fixed teacher says of n images, where it needs that."""
    if hasattr(method, "predictions"):
        predictions = F.softmax(3 * torch.randn(n, 3, generator=torch.Generator().manual_seed(2)), dim=1)
        method.predictions = predictions.half().to(method.runtime.device)
    return method


def make_views(seed=1, batch=4, unlabeled=8):
    generator = torch.Generator().manual_seed(seed)

    def images(n):
        return torch.randn(n, 3, 8, 8, generator=generator)

    targets, indices = torch.arange(batch) % 3, torch.arange(unlabeled).flip(0)
    return Views(images(batch), targets, images(unlabeled), images(unlabeled), indices)


def in_double(method):
    """The method with all its networks in float64."""
    for learner in method.learners.values():
        learner.network.double()
        if learner.ema:
            learner.ema.network.double()
    if hasattr(method, "baseline"):
        method.baseline = method.baseline.double()
    return method


def double_views(seed):
    return Views(*(t.double() if t.is_floating_point() else t for t in make_views(seed=seed)))


def student_pass(method, views=None):
    """The student's logits (N, K) in its training pass: the labelled images stand behind the strong ones."""
    views = views or make_views()
    return method.student(torch.cat([views.strong, views.labeled]))[: len(views.strong)]


def weights(network):
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


def test_soft_cross_entropy_against_torch():
    logits, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    ours = soft_cross_entropy(F.one_hot(targets, 4).float(), logits, 0.15)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.15))


@pytest.mark.parametrize("target", [None, [0.1, 0.5, 0.15, 0.25]], ids=["uniform", "labeled"])
def test_alignment_against_sinkhorn(target):
    """On one batch its bias converges to that of Sinkhorn's algorithm: rows sum to 1, columns to N times the
    target."""
    logits = 3 * torch.randn(12, 4) + torch.tensor([3.0, 1.0, 0.0, -2.0])
    align = DistributionAlignment(0.2, 4, Runtime("cpu"), target)
    for _ in range(300):
        align.update(logits.chunk(3))
    plan, columns = logits.exp(), 12 * torch.tensor(target or [0.25] * 4)
    for _ in range(300):
        plan = plan / plan.sum(dim=0) * columns
        plan = plan / plan.sum(dim=1, keepdim=True)
    torch.testing.assert_close(F.softmax(align(logits), dim=1), plan, rtol=1e-3, atol=1e-4)


def test_rate_1_is_one_iteration_of_sinkhorn():
    logits = torch.randn(12, 4)
    prediction = F.softmax(logits, dim=1)
    iterated = F.normalize(prediction / prediction.sum(dim=0), p=1, dim=1)
    moved = {rate: DistributionAlignment(rate, 4, Runtime("cpu")) for rate in (0.2, 1)}
    for align in moved.values():
        align.update([logits])
    torch.testing.assert_close(F.softmax(moved[1](logits), dim=1), iterated)
    torch.testing.assert_close(moved[0.2].bias, 0.2 * moved[1].bias)
    assert moved[1].bias.sum().abs() < 1e-6


def aligned_to_class_1(*flags, method="mpl"):
    """A method whose aligned predictions are all class 1, and the scalars of its first step."""
    each = build("--align", 0.1, *flags, method=method)
    each.align.bias.copy_(torch.tensor([0.0, 1000.0, 0.0]))
    return each, each.step(make_views(), 5, truth=torch.ones(8, dtype=torch.long))


def test_aligned_predictions_are_the_targets_of_uda():
    _, scalars = aligned_to_class_1(method="uda")
    assert scalars["pseudo_label_accuracy"] == 1 == scalars["uda_mask"]
    _, _, strong = teacher_logits(build(method="uda").student, make_views())
    torch.testing.assert_close(scalars["uda_loss"], F.cross_entropy(strong, torch.ones(8, dtype=torch.long)))


@pytest.mark.parametrize("kind", ("argmax", "sample", "soft"))
def test_aligned_predictions_are_the_pseudo_labels(kind):
    _, scalars = aligned_to_class_1("--pseudo-label", kind, "--label-smoothing", 0)
    assert scalars["pseudo_label_accuracy"] == 1
    expected = F.cross_entropy(student_pass(build()), torch.ones(8, dtype=torch.long))
    torch.testing.assert_close(scalars["student_loss"], expected)


@pytest.mark.parametrize(
    "flags", (("taylor", "same"), ("taylor", "strong"), ("dot", "same"), ("exact", "same"))
)
def test_the_feedback_goes_through_the_alignment(flags):
    """A teacher whose aligned labels cannot change gets nothing from it: it learns as without feedback."""
    name, view = flags
    kind = "soft" if name == "exact" else "argmax"
    given = ("--pseudo-label", kind, "--feedback-view", view, "--feedback-weight", 1000)
    moved, scalars = aligned_to_class_1("--feedback", name, *given)
    alone, _ = aligned_to_class_1("--feedback", "none")
    assert scalars["feedback"] != 0
    torch.testing.assert_close(weights(moved.teacher.network), weights(alone.teacher.network))


@pytest.mark.parametrize("method", ["uda", "fixmatch", "mpl"])
def test_a_step_moves_the_alignment_by_its_weak_predictions(method):
    each, expected = build("--align", 0.2, method=method), DistributionAlignment(0.2, 3, Runtime("cpu"))
    start = torch.tensor([2.0, -1.0, -1.0])
    for align in (each.align, expected):
        align.bias.copy_(start)
    learner = each.learners.get("teacher", each.student)
    expected.update([teacher_logits(learner, make_views(), graph=False).weak])
    each.step(make_views(), 0)
    assert (expected.bias - start).abs().max() > 0.01
    torch.testing.assert_close(each.align.bias, expected.bias)


def test_a_checkpoint_from_before_alignment_and_confidence():
    flags = ("--align", 0.2, "--confidence", "soft")
    method = build(*flags)
    method.step(make_views(), 0)
    state = method.state_dict()
    del state["align_bias"], state["confidence_moments"]
    fresh = build(*flags)
    fresh.load_state_dict(state, "old.pth.tar")
    assert torch.equal(fresh.align.bias, torch.zeros(3))
    torch.testing.assert_close(fresh.consistency.moments, torch.tensor([1 / 3, 1.0]))


# ---------------------------------------------------------------- which images count


def probabilities(logits):
    return np.exp(logits) / np.exp(logits).sum()


class ReferenceConsistency:
    """The UDA loss image by image, in float64 and NumPy, from ALGORITHM's equations: τ 0.5, bias b."""

    def __init__(self, method, confidence, distance, threshold, bias):
        self.hard, self.confidence, self.distance = method == "fixmatch", confidence, distance
        self.threshold, self.bias = threshold, bias
        self.mean, self.variance = 0.7, 0.02  # as if after many steps

    def step(self, labeled, weak, strong):
        """The loss, the weights (N,)."""
        weak = weak + self.bias
        sure = [probabilities(row).max() for row in weak]
        self.mean = 0.999 * self.mean + 0.001 * np.mean(sure)
        self.variance = 0.999 * self.variance + 0.001 * np.var(sure, ddof=1)
        of_labeled = np.mean([probabilities(row).max() for row in labeled])
        losses, weights = [], []
        for w, s, m in zip(weak, strong, sure, strict=True):
            target = np.eye(3)[w.argmax()] if self.hard else probabilities(w / 0.5)
            if self.confidence == "soft":
                distance = min(0, m - self.mean) ** 2
                weights.append(np.exp(-distance / (2 * self.variance / 4)))
            elif self.confidence == "relative":
                weights.append(float(m >= self.threshold * of_labeled))
            else:
                weights.append(float((m if self.hard else target.max()) >= self.threshold))
            p = probabilities(s)
            cosine = (target * p).sum() / np.sqrt((target**2).sum() * (p**2).sum())
            losses.append(-cosine if self.distance == "cos" else -(target * np.log(p)).sum())
        return np.mean(np.array(weights) * losses), weights


@pytest.mark.parametrize(
    ("method", "confidence", "distance"),
    [
        ("uda", "threshold", "ce"),
        ("uda", "threshold", "cos"),
        ("uda", "relative", "ce"),
        ("uda", "soft", "cos"),
        ("fixmatch", "threshold", "ce"),
        ("fixmatch", "relative", "ce"),
        ("fixmatch", "soft", "ce"),
    ],
)
def test_the_consistency_loss_against_the_formula(method, confidence, distance):
    """Over three steps of two micro-batches each, in float64. In each, the mask would be another one if the
    prediction were sharpened where it is not, or the other way round."""
    threshold = 0.9 if confidence == "relative" else 0.75
    words = f"--dataset twomoons --method mpl --temperature 0.5 --threshold {threshold} --align 0.2"
    words += f" --confidence {confidence} --uda-loss {distance} --method {method}"
    args, generator = main.parse_arguments(words.split()), torch.Generator().manual_seed(0)
    ours = Consistency(args, 3, Runtime("cpu"), hard=method == "fixmatch")
    ours.align.bias = torch.tensor([0.5, -0.7, 0.2], dtype=torch.float64)
    reference = ReferenceConsistency(method, confidence, distance, threshold, ours.align.bias.numpy())
    torch.testing.assert_close(ours.moments, torch.tensor([1 / 3, 1]))
    ours.moments = torch.tensor([reference.mean, reference.variance], dtype=torch.float64)
    for _ in range(3):
        labeled, weak, strong = (
            1.5 * torch.randn(n, 3, dtype=torch.float64, generator=generator) for n in (8, 24, 24)
        )
        weak.requires_grad_()
        strong.requires_grad_()
        expected, weights = reference.step(*(each.detach().numpy() for each in (labeled, weak, strong)))
        parts = [
            Logits(*part) for part in zip(*(each.chunk(2) for each in (labeled, weak, strong)), strict=True)
        ]
        ours.observe(parts)
        losses, shares = zip(*(ours(part) for part in parts), strict=True)
        loss = sum(losses) / 2
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        found = torch.cat([ours.weights(ours.align(part.weak)) for part in parts])
        assert found.tolist() == pytest.approx(weights, rel=1e-12)
        assert sum(shares).item() / 2 == pytest.approx(np.mean(weights), rel=1e-6)
        assert 0 < min(weights) < 0.5 < max(weights) if confidence == "soft" else 0 < np.mean(weights) < 1
        if confidence != "soft":
            bound = {"threshold": threshold, "relative": ours.least}[confidence]
            aligned = ours.align(weak.detach())
            masks = [F.softmax(aligned / t, dim=1).amax(dim=1) >= bound for t in (0.5, 1)]
            assert not torch.equal(*masks)
        loss.backward()
        assert weak.grad is None and strong.grad.abs().sum() > 0


@pytest.mark.parametrize("confidence", ["threshold", "relative"])
def test_a_step_of_fixmatch_against_its_formula(confidence):
    """The gradient of CE on labels + λ · mask · CE(argmax of weak, strong), float64; τ changes nothing."""
    flags = ("--threshold", 0.5, "--temperature", 0.1, "--confidence", confidence)
    method, views = in_double(build(*flags, method="fixmatch")), double_views(1)
    network = copy.deepcopy(method.student.network).train()
    images = torch.cat([views.labeled, views.weak, views.strong])
    labeled, weak, strong = network(images).split([4, 8, 8])
    bound = 0.5 * F.softmax(labeled, dim=1).amax(1).mean() if confidence == "relative" else 0.5
    sure = F.softmax(weak, dim=1).amax(1) >= bound
    unlabeled = (sure * F.cross_entropy(strong, weak.argmax(1), reduction="none")).mean()
    (F.cross_entropy(labeled, views.targets, label_smoothing=0.1) + unlabeled).backward()
    scalars = method.step(views, 4)  # half-way up to λ 2
    assert 0 < scalars["uda_mask"] == sure.double().mean()
    for ours, p in zip(method.student.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, p.grad, rtol=1e-10, atol=1e-13)


def test_pseudo_labels():
    logits = torch.tensor([[2.0, 0.0, 1.0], [0.0, 0.0, 5.0]], requires_grad=True)
    assert pseudo_labels(logits, "argmax").tolist() == [[1, 0, 0], [0, 0, 1]]
    torch.testing.assert_close(pseudo_labels(logits, "soft"), F.softmax(logits.detach(), dim=1))
    torch.manual_seed(0)
    drawn = pseudo_labels(logits[:1].expand(50_000, 3), "sample")
    assert drawn.sum(1).eq(1).all() and not drawn.requires_grad
    expected = F.softmax(logits[0].detach(), dim=0)
    error = (expected * (1 - expected) / 50_000).sqrt()
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()


def test_pseudo_label_accuracy_leaves_out_what_is_not_known():
    labels = F.one_hot(torch.tensor([0, 1, 2, 0]), 3).float()
    assert pseudo_label_accuracy(labels, torch.tensor([0, 2, -1, -1])).item() == 0.5
    assert pseudo_label_accuracy(labels, torch.tensor([-1, -1, -1, -1])).item() == 0.0


def test_no_weight_decay_on_batch_norm():
    network = build_model("wrn-10-1", 3, image_size=8)
    decayed, plain = sgd(network, 0.1, 0.9, True, 5e-4).param_groups
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {id(p) for p in plain["params"]} == {id(p) for m in norms for p in m.parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (5e-4, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(network.parameters()))


# a value other than the default for every flag that some methods do not use
OTHER_VALUES = {
    "align": 0.5,
    "align_to": "labeled",
    "body_lr_scale": 0.1,
    "confidence": "relative",
    "ensemble": None,  # a switch
    "feedback": "exact",
    "feedback_jvp": "difference",
    "feedback_momentum": 0.5,
    "feedback_reduction": "sum",
    "feedback_view": "strong",
    "feedback_weight": 3,
    "flip_feedback": None,
    "lambda_u": 5,
    "mixup_alpha": 1,
    "mu": 3,
    "pseudo_label": "sample",
    "pseudo_label_view": "strong",
    "student_labeled_weight": 1,
    "student_model": "wrn-10-2",
    "student_wait_steps": 5,
    "switch_every": 1,
    "teacher_dropout": 0.5,
    "teacher_lr": 0.3,
    "teacher_warmup_steps": 5,
    "temperature": 0.2,
    "threshold": 0.9,
    "uda_loss": "cos",
    "uda_steps": 50,
    "weak_pass": "ema",
}


@pytest.mark.parametrize(
    "method, flags",
    [
        *((name, ()) for name in METHODS if name not in ("mpl", "reduced-mpl")),
        ("reduced-mpl", ("--pseudo-label", "sample", "--feedback", "dot")),
        ("mpl", ("--feedback", "none")),
        ("mpl", ("--feedback", "exact", "--pseudo-label", "soft")),
    ],
)
def test_flags_without_effect_have_none(method, flags):
    plain = build(*flags, method=method)
    unused = main.build_parser().without_effect(plain.args) & OTHER_VALUES.keys()
    words = [flag(name, OTHER_VALUES[name]).split() for name in unused]
    odd = build(*(word for each in words for word in each), *flags, method=method)
    assert unused
    for step in range(3):
        scalars = []
        for each in (plain, odd):
            torch.manual_seed(step)
            scalars.append(each.step(make_views(seed=step), step))
        assert scalars[0] == scalars[1]
    assert odd.members.keys() == plain.members.keys()
    assert torch.equal(weights(odd.predictor), weights(plain.predictor))


class ReadsAlign(METHODS["supervised"]):
    """A new method that reads a flag without a word about it."""

    def step(self, views, step, truth=None, diagnose=False):
        return super().step(views, step) | {"rate": torch.tensor(self.args.align)}


def test_a_new_method_gets_the_flags_as_they_were_given(monkeypatch):
    monkeypatch.setitem(METHODS, "reads-align", ReadsAlign)
    monkeypatch.setattr(main, "METHODS", METHODS)
    args = main.parse_arguments([*FLAGS, "--align", "0.25", "--method", "reads-align"])
    scalars = ReadsAlign(args, 3, 8, Runtime("cpu")).step(make_views(), 0)
    assert scalars["rate"] == 0.25


def test_momentum_is_kept_in_the_memory_order_of_its_parameters():
    """One kernel for all of them adds what lies at the same place."""
    states = {}
    for order in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        network = build_model("wrn-10-1", 3).to(memory_format=order)
        optimizer = sgd(network, 0.1, 0.9, True, 5e-4)
        network(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        states[order] = optimizer.state_dict()
    optimizer.load_state_dict(states[torch.contiguous_format])
    for number, (p, state) in enumerate(optimizer.state.items()):
        assert state["momentum_buffer"].stride() == p.stride()
        expected = states[torch.contiguous_format]["state"][number]["momentum_buffer"]
        assert torch.equal(state["momentum_buffer"], expected)


def test_supervised_step_is_plain_sgd():
    method, views = build(method="supervised"), make_views()
    torch.manual_seed(0)
    network = build_model("wrn-10-1", 3, image_size=8).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1)
    loss = F.cross_entropy(network(views.labeled), views.targets, label_smoothing=0.1)
    loss.backward()
    scalars = method.step(views, 0)
    torch.testing.assert_close(scalars["labeled_loss"], loss)
    # the first step of Nesterov momentum 0.9 is 1.9 times the gradient (and decay, on all but batch norm)
    groups = method.student.optimizer.param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    pairs = zip(method.student.network.parameters(), network.parameters(), strict=True)
    for ours, p in pairs:
        torch.testing.assert_close(ours.detach(), (p - 0.1 * 1.9 * (p.grad + decay[id(ours)] * p)).detach())
    assert optimizer.param_groups[0]["lr"] == method.student.rate(0)


def test_teacher_without_feedback_is_the_uda_network():
    mpl, uda = build("--feedback", "none"), build(method="uda")
    mpl.teacher.network.load_state_dict(uda.student.network.state_dict())
    for step in range(3):
        mpl.step(make_views(step), step)
        uda.step(make_views(step), step)
    assert torch.equal(weights(mpl.teacher.network), weights(uda.student.network))


def test_student_learns_from_pseudo_labels_alone():
    """Other classes of the labelled images change the teacher at once, the student only through the teacher,
    one step later."""
    a, b = build("--feedback", "none"), build("--feedback", "none")
    views = make_views()
    a.step(views, 0)
    b.step(views._replace(targets=(views.targets + 1) % 3), 0)
    assert torch.equal(weights(a.student.network), weights(b.student.network))
    assert not torch.equal(weights(a.teacher.network), weights(b.teacher.network))


def test_rates_are_those_of_the_command_line():
    """Of both networks; the student waits for two steps."""
    waiting = ("--student-wait-steps", 2, "--teacher-lr", 0.4, "--student-lr", 0.2, "--total-steps", 12)
    for flags, teacher, student in (
        ("--warmup-steps 4 --schedule constant", [0.1, 0.2, 0.3, 0.4, 0.4], [0, 0, 0.05, 0.1, 0.15]),
        ("--schedule milestones --milestones 3 4", [0.4] * 3 + [0.04, 0.004], [0, 0, 0.2, 0.02, 0.002]),
        ("--schedule cosine", [0.2 * (1 + np.cos(np.pi * t / 12)) for t in range(5)], None),
    ):
        method = build(*waiting, *flags.split())
        assert [method.teacher.rate(step) for step in range(5)] == pytest.approx(teacher)
        if student:
            assert [method.student.rate(step) for step in range(5)] == pytest.approx(student)


def test_the_student_waits():
    method = build("--student-wait-steps", 2)
    before = weights(method.student.network)
    for step in range(2):
        method.step(make_views(step), step)
    assert torch.equal(weights(method.student.network), before)
    method.step(make_views(2), 2)
    assert not torch.equal(weights(method.student.network), before)


@pytest.mark.parametrize("estimator", ["none", *ESTIMATORS])
def test_a_teachers_warm_up_is_on_labels_alone(estimator):
    """As with no UDA loss, no feedback and a student that waits; then the teacher's other losses begin."""
    flags = ("--feedback-momentum", 0.9, "--feedback", estimator)
    warming = build("--teacher-warmup-steps", 2, "--student-wait-steps", 1, *flags)
    alone = build("--lambda-u", 0, "--feedback", "none", "--student-wait-steps", 2)
    before = weights(warming.student.network)
    for step in range(2):
        for method in (warming, alone):
            method.step(make_views(step), step)
    assert torch.equal(weights(warming.teacher.network), weights(alone.teacher.network))
    assert torch.equal(weights(warming.student.network), before)
    for method in (warming, alone):
        method.step(make_views(2), 2)
    assert not torch.equal(weights(warming.teacher.network), weights(alone.teacher.network))
    assert not torch.equal(weights(warming.student.network), before)
    assert build("--teacher-warmup-steps", 2, "--student-wait-steps", 5).student.rate(4) == 0


def test_mixup_of_labels_is_supervised_training_on_mixed_images():
    """A step of plain supervised training, with mixup by hand."""
    method, views = build("--mixup-alpha", 0.5, method="supervised"), make_views()
    truth, swapped = F.one_hot(views.targets, 3).float(), torch.tensor([1, 0, 3, 2])
    images, labels = mixed_by_hand(
        views.labeled, truth, views.labeled[swapped], truth[swapped], method.args, 5
    )
    network = copy.deepcopy(method.student.network).train()
    loss = smoothed_cross_entropy(labels.float(), network(images.float()), 0.1)
    loss.backward()
    scalars = method.step(views, 5)
    torch.testing.assert_close(scalars["labeled_loss"], loss.detach())
    for ours, p in zip(method.student.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, p.grad, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- a fixed teacher


def decided_teacher(path, views):
    """A checkpoint whose average, unlike its student, names different classes for different images."""
    torch.manual_seed(4)
    student, average = (build_model("wrn-10-1", 3, image_size=8) for _ in range(2))
    for norm in (module for module in average.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = None  # running statistics are the mean over all batches
    with torch.no_grad():
        average(torch.cat([views.weak, views.strong]).float())
        average.head.weight.mul_(4)
    torch.save({"student_state_dict": student.state_dict(), "avg_state_dict": average.state_dict()}, path)
    return average.double().eval()


@pytest.mark.parametrize("view", ["weak", "strong"])
@pytest.mark.parametrize("kind", ["argmax", "soft"])
def test_a_step_of_pseudo_label_against_its_formula(kind, view, tmp_path):
    """CE of the strong view against what the average in the file says of --pseudo-label-view, in float64."""
    views = double_views(1)
    teacher = decided_teacher(tmp_path / "teacher.pt", views)
    flags = ("--pseudo-label", kind, "--pseudo-label-view", view)
    method = build(*flags, "--teacher-checkpoint", tmp_path / "teacher.pt", method="pseudo-label")
    in_double(method).teacher_network.double()
    with torch.no_grad():
        said = {name: F.softmax(teacher(getattr(views, name)), dim=1) for name in ("weak", "strong")}
    classes = {name: each.argmax(1) for name, each in said.items()}
    assert len(classes[view].unique()) > 1 and (classes["weak"] != classes["strong"]).sum() > 2
    labels = said[view] if kind == "soft" else F.one_hot(classes[view], 3).double()
    network = copy.deepcopy(method.student.network).train()
    loss = smoothed_cross_entropy(labels, network(views.strong), 0.1)
    loss.backward()
    scalars = method.step(views, 0, classes[view])
    assert scalars["pseudo_label_accuracy"] == 1
    torch.testing.assert_close(scalars["student_loss"], loss.detach(), rtol=1e-6, atol=0)
    for ours, p in zip(method.student.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, p.grad, rtol=1e-5, atol=1e-8)


# ---------------------------------------------------------------- exchanging roles


def renamed(state):
    """A checkpoint whose teacher and student have exchanged names; alignment and baseline are at zero."""
    names = {"student": "teacher", "teacher": "student", "avg": "teacher_avg", "teacher_avg": "avg"}
    changed = {}
    for key, value in copy.deepcopy(state).items():
        role = next((role for role in ("teacher_avg", *names) if key.startswith(role + "_")), None)
        changed[key if role is None else names[role] + key.removeprefix(role)] = value
    return changed | {"align_bias": torch.zeros(3), "feedback_baseline": torch.zeros(())}


ROLES = {
    "taylor": "--feedback taylor --feedback-momentum 0.9 --align 0.2 --pseudo-label sample",
    "adamw": "--feedback exact --pseudo-label soft --optimizer adamw --schedule one-cycle",
    "weak-ema": "--feedback none --weak-pass ema --align 0.2",
}


@pytest.mark.parametrize("case", ROLES)
def test_roles_are_exchanged_every_n_steps(case):
    """Bit for bit as by hand: after N steps the checkpoint goes on with teacher and student renamed, each
    network with its rate, dropout, optimiser and average."""
    first = ["--teacher-lr", 0.1, "--student-lr", 0.02, "--teacher-dropout", 0.1, "--student-dropout", 0.4]
    other = ["--teacher-lr", 0.02, "--student-lr", 0.1, "--teacher-dropout", 0.4, "--student-dropout", 0.1]
    method = build(*ROLES[case].split(), *first, "--switch-every", 2)
    by_hand = [build(*ROLES[case].split(), *flags, "--switch-every", 100) for flags in (first, other)]
    names = {id(method.teacher.network): "one", id(method.student.network): "other"}
    teachers = []
    for step in range(6):
        reference = by_hand[step // 2 % 2]
        if step in (2, 4):
            reference.load_state_dict(renamed(by_hand[(step // 2 - 1) % 2].state_dict()), "memory")
        scalars = []
        for each in (method, reference):
            torch.manual_seed(step)
            scalars.append(each.step(make_views(step), step))
        teachers.append(names[id(method.teacher.network)])
        assert scalars[0] == scalars[1]
        assert torch.equal(weights(method.predictor), weights(reference.predictor))
        assert method.learners["teacher"].rate(step) == reference.teacher.rate(step)
        ours, theirs = (tensors(each.state_dict()) for each in (method, reference))
        assert ours.keys() == theirs.keys() and len(ours) > 80
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())
    assert teachers == ["one", "one", "other", "other", "one", "one"]


def test_a_checkpoint_goes_on_in_the_right_role():
    flags = ("--switch-every", 2, "--teacher-lr", 0.1, "--student-lr", 0.02, "--align", 0.2)
    whole = build(*flags)
    for step in range(4):
        resumed = build(*flags)
        if step:
            resumed.load_state_dict(copy.deepcopy(whole.state_dict()), "memory")
        for each in (whole, resumed):
            each.step(make_views(step), step)
        ours, theirs = tensors(whole.state_dict()), tensors(resumed.state_dict())
        assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("uda", "--confidence soft --align 0.2"),
        ("fixmatch", "--confidence soft --align 0.2 --weak-pass ema"),
        ("mpl", "--confidence soft --align 0.2 --feedback dot --feedback-momentum 0.9"),
    ],
)
def test_a_checkpoint_goes_on_as_if_the_run_had_not_stopped(method, flags):
    """After many steps, whose moments of the confidence and bias are not those of the start."""
    whole, resumed = (build(*flags.split(), method=method) for _ in range(2))
    whole.consistency.moments.copy_(torch.tensor([0.5, 0.02]))
    whole.align.bias.copy_(torch.tensor([0.5, -0.7, 0.2]))
    whole.step(make_views(0), 0)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()), "memory")
    for each in (whole, resumed):
        each.step(make_views(1), 1)
    ours, theirs = tensors(whole.state_dict()), tensors(resumed.state_dict())
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("supervised", ""),
        ("uda", "--confidence relative"),
        ("pseudo-label", ""),
        ("mpl", "--feedback taylor"),
        ("mpl", "--feedback dot --accumulate 2"),
        ("mpl", "--feedback exact --pseudo-label-view strong --weak-pass ema"),
        ("semimeta", ""),
    ],
)
def test_an_evaluation_between_two_steps_changes_nothing(method, flags):
    """It leaves the networks that it measures in evaluation mode."""
    taken, measured = (build(*flags.split(), method=method) for _ in range(2))
    for step in range(2):
        for learner in measured.learners.values():
            learner.network.eval()
        for each in (taken, measured):
            torch.manual_seed(step)
            each.step(make_views(step), step)
    ours, theirs = tensors(taken.state_dict()), tensors(measured.state_dict())
    assert all(torch.equal(tensor, theirs[key]) for key, tensor in ours.items())


def test_no_roles_are_exchanged_before_the_student_has_learned():
    method = build("--switch-every", 2, "--student-wait-steps", 3)
    switched = []
    for step in range(10):
        method.step(make_views(step), step)
        switched.append(method.switched)
    assert switched == [False] * 5 + [True] * 2 + [False] * 2 + [True]


def test_a_weak_pass_apart_is_a_pass_without_gradient():
    """One step of UDA against its own formula; batch norm sees the weak images, then the others."""
    apart, joint = build("--weak-pass", "apart", method="uda"), build(method="uda")
    network = copy.deepcopy(apart.student.network).train()
    labeled, targets, weak, strong, _ = make_views()
    with torch.no_grad():
        weak_logits = network(weak)
    labeled_logits, strong_logits = network(torch.cat([labeled, strong])).split([4, 8])
    loss = F.cross_entropy(labeled_logits, targets, label_smoothing=0.1)
    (loss + sharpened_uda(weak_logits, strong_logits, 0.7, 0.05)).backward()
    assert not teacher_logits(build(method="uda").student, make_views(), "apart")[1].requires_grad
    for method in (apart, joint):
        method.step(make_views(), 4)  # half-way up to λ 2
    for ours, p in zip(apart.student.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, p.grad)
    assert not torch.equal(weights(apart.student.network), weights(joint.student.network))
    for ours, buffer in zip(apart.student.network.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(ours, buffer)


def test_a_weak_pass_ema_is_the_moving_average():
    """Two steps of UDA against its own formula; batch norm sees the labelled and strong images alone."""
    method = build("--weak-pass", "ema", method="uda")
    network, average = (copy.deepcopy(method.student.network) for _ in range(2))
    network.train()
    average.eval()
    optimizer = sgd(network, 0.1, 0.9, True, method.args.weight_decay)
    for step in range(2):
        labeled, targets, weak, strong, _ = make_views(step)
        labeled_logits, strong_logits = network(torch.cat([labeled, strong])).split([4, 8])
        loss = F.cross_entropy(labeled_logits, targets, label_smoothing=0.1)
        loss = loss + 2 * (step + 1) / 10 * sharpened_uda(average(weak), strong_logits, 0.7, 0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = method.student.rate(step)
        optimizer.step()
        decay = (1 + step) / (10 + step)
        states = zip(average.state_dict().values(), network.state_dict().values(), strict=True)
        for mean, new in states:
            mean.copy_(decay * mean + (1 - decay) * new if mean.is_floating_point() else new)
        method.step(make_views(step), step)
    assert optimizer.param_groups[0]["lr"] > 0
    for ours, theirs in ((method.student.network, network), (method.predictor, average)):
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
            torch.testing.assert_close(a, b)


def test_the_student_learns_the_labels_of_the_teachers_average():
    method = build("--feedback", "none", "--weak-pass", "ema")
    method.step(make_views(0), 0)  # moves the average away from the network
    views = make_views(1)
    with torch.no_grad():
        labels = method.teacher.ema.network(views.weak).argmax(1)
    network = copy.deepcopy(method.student.network)
    logits = network(torch.cat([views.strong, views.labeled]))[:8]
    loss = F.cross_entropy(logits, labels, label_smoothing=0.1)
    loss.backward()
    assert not torch.equal(labels, method.teacher.preview(views.weak).argmax(1))
    scalars = method.step(views, 1, labels)
    assert scalars["pseudo_label_accuracy"] == 1
    for ours, p in zip(method.student.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, p.grad)


def test_the_average_labels_in_full_precision(bf16):
    method = build("--weak-pass", "ema", method="uda", runtime=Runtime("cpu", amp=True))
    logits = method.student.predict_average(make_views().weak)
    assert logits.dtype == torch.float32
    assert not torch.equal(logits, method.predictor(make_views().weak))  # but passes in half


@pytest.mark.parametrize("weak_pass", ["apart", "ema"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_teacher_without_a_joint_pass_is_the_uda_network(accumulate, weak_pass):
    """With batch norm; in parts, the labels come from a first pass that must see the same batches."""
    flags = ("--weak-pass", weak_pass, "--accumulate", accumulate)
    mpl, uda = build("--feedback", "none", *flags), build(*flags, method="uda")
    mpl.teacher.network.load_state_dict(uda.student.network.state_dict())
    if weak_pass == "ema":
        mpl.teacher.ema.network.load_state_dict(uda.predictor.state_dict())
    labeler = mpl.teacher.predict_average if weak_pass == "ema" else mpl.teacher.preview
    for step in range(2):
        halves = make_views(step).weak.chunk(accumulate)
        labels = torch.cat([labeler(half) for half in halves]).argmax(1)
        scalars = mpl.step(make_views(step), step, labels)
        assert scalars["pseudo_label_accuracy"] == 1
        uda.step(make_views(step), step)
    assert torch.equal(weights(mpl.teacher.network), weights(uda.student.network))


@pytest.mark.parametrize("estimator", ["taylor", "dot", "exact"])
def test_every_feedback_moves_the_teacher(estimator):
    flags = ["--pseudo-label", "sample", "--feedback-reduction", "sum"]
    without, with_feedback = build("--feedback", "none", *flags), build("--feedback", estimator, *flags)
    flipped = build("--feedback", estimator, "--flip-feedback", *flags)
    for method in (without, with_feedback, flipped):
        torch.manual_seed(3)
        scalars = method.step(make_views(), 0)
    assert torch.equal(weights(without.student.network), weights(with_feedback.student.network))
    there = weights(with_feedback.teacher.network) - weights(without.teacher.network)
    back = weights(flipped.teacher.network) - weights(without.teacher.network)
    assert there.norm() > 1e-5
    torch.testing.assert_close(there, -back, rtol=1e-2, atol=1e-6)
    assert torch.isfinite(scalars["feedback"])


def test_moving_average_of_the_feedback():
    """value − b, where b is the average after it has taken in the value; kept by a checkpoint."""
    flags = ["--feedback", "taylor", "--feedback-weight", 1000]
    method, plain = build(*flags, "--feedback-momentum", 0.75), build(*flags)
    without = build("--feedback", "none")
    h = plain.step(make_views(), 0)["feedback"]
    torch.testing.assert_close(method.step(make_views(), 0)["feedback"], h)  # shown as it was measured
    torch.testing.assert_close(method.baseline, 0.25 * h)
    without.step(make_views(), 0)
    base = weights(without.teacher.network)
    torch.testing.assert_close(
        weights(method.teacher.network) - base,
        0.75 * (weights(plain.teacher.network) - base),
        rtol=1e-3,
        atol=1e-5,
    )
    again = build(*flags, "--feedback-momentum", 0.75)
    again.load_state_dict(method.state_dict(), "memory")
    assert torch.equal(again.baseline, method.baseline)


def test_the_published_code_is_a_uda_teacher():
    """Its flags give a feedback whose gradient is zero: the teacher is that of ``--feedback none``."""
    views = "--pseudo-label soft --pseudo-label-view strong".split()
    published = "--feedback taylor --flip-feedback --feedback-momentum 0.99".split()
    a, b = build(*views, *published), build(*views, "--feedback", "none")
    for step in range(3):
        scalars = a.step(make_views(step), step)
        b.step(make_views(step), step)
    assert scalars["feedback"].abs() > 1e-4
    torch.testing.assert_close(weights(a.teacher.network), weights(b.teacher.network), rtol=1e-5, atol=1e-6)


def test_mpl_pytorch_has_the_reverse_sign_on_labels_of_the_strong_view():
    """Its term is (L_new − L_old) · CE(argmax T(strong), T(strong)), averaged over images."""
    flags = ["--flip-feedback", "--feedback-view", "strong"]
    method = build(*flags)
    logits = torch.randn(8, 3, requires_grad=True)
    h = torch.tensor(0.3)
    own = F.cross_entropy(logits, logits.argmax(1))
    student_labels = F.one_hot(torch.zeros(8, dtype=torch.int64), 3).float()
    # -h is what --flip-feedback makes of L_old − L_new
    batch = MicroBatch(None, None, None, labels=student_labels, feedback=-h)
    torch.testing.assert_close(method.feedback_loss(batch, Logits(None, None, logits)), -h * own)
    plain, flipped = build("--feedback-view", "strong"), build(*flags)
    without = build("--feedback", "none")
    for each in (plain, flipped, without):
        each.step(make_views(), 0)
    base = weights(without.teacher.network)
    there, back = weights(plain.teacher.network) - base, weights(flipped.teacher.network) - base
    assert there.norm() > 1e-6
    torch.testing.assert_close(there, -back, rtol=1e-2, atol=1e-6)


# ---------------------------------------------------------------- one whole step against a reference


def sharpened_uda(weak, strong, temperature, threshold):
    """Mean over images of mask · CE(softmax(weak/τ), softmax(strong)), image by image."""
    total = 0.0
    for w, s in zip(weak.detach(), strong, strict=True):
        target = torch.exp(w / temperature) / torch.exp(w / temperature).sum()
        if target.max() >= threshold:
            total = total - (target * (s - s.exp().sum().log())).sum()
    return total / len(weak)


def smoothed_cross_entropy(labels, logits, smoothing):
    """Mean CE of logits (N, K) against smoothed distributions (N, K)."""
    labels = (1 - smoothing) * labels + smoothing / labels.shape[1]
    return -(labels * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1).mean()


def clipped(gradients, bound):
    """Gradients, {name: tensor}, times the number that brings their common norm to the bound; 0 is none."""
    norm = torch.sqrt(sum(gradient.square().sum() for gradient in gradients.values()))
    share = min(1.0, (bound / (norm + 1e-6)).item()) if bound else 1.0  # PyTorch's 1e-6
    return {name: share * gradient for name, gradient in gradients.items()}


def sgd_by_hand(network, gradients, args, rate):
    """The first step of SGD with Nesterov momentum; batch norm has no weight decay. {name: parameter}"""
    gradients = clipped(gradients, args.grad_clip)
    norms = {id(p) for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()}
    after = {}
    for name, p in network.named_parameters():
        gradient = gradients[name] + (0.0 if id(p) in norms else args.weight_decay) * p.detach()
        after[name] = p - rate * (1 + args.momentum if args.nesterov else 1) * gradient
    return after


def mixed_by_hand(images, labels, partners, partner_labels, args, step):
    """Images and label distributions mixed row by row, with the shares that seed and step say."""
    if not args.mixup_alpha:
        return images, labels
    shares = np.random.default_rng((4, args.seed, step)).beta(args.mixup_alpha, args.mixup_alpha, len(images))

    def rows(ours, theirs):
        return torch.stack([s * a + (1 - s) * b for s, a, b in zip(shares, ours, theirs, strict=True)])

    return rows(images, partners), rows(labels, partner_labels)


def reference_step(teacher, student, views, args, step, feedback_term):
    """One step of MPL as the paper's algorithm 1 and the published code say it, in plain PyTorch.

    Copies of teacher and student in training mode are given; their running statistics move. ``feedback_term``
    is a function of the step's tensors, by name. Returns these tensors, with the teacher's gradient.
    """
    labeled, targets, weak, strong, _ = views
    n, batch, k = len(strong), len(labeled), 3
    truth = F.one_hot(targets, k).double()
    swapped = torch.arange(batch) ^ 1  # partners of mixup: neighbours
    at_images, at_labels = mixed_by_hand(labeled, truth, labeled[swapped], truth[swapped], args, step)
    at_teacher = teacher(torch.cat([at_images, weak, strong]))
    t_labeled, t_weak, t_strong = at_teacher[:batch], at_teacher[batch : batch + n], at_teacher[batch + n :]
    labeling = t_weak if args.pseudo_label_view == "weak" else t_strong
    soft = F.softmax(labeling, dim=1)
    labels = soft if args.pseudo_label == "soft" else F.one_hot(soft.argmax(1), k).double()

    # the student's step on the pseudo labels alone; batch norm also sees the labelled images
    at_student = student(torch.cat([strong, labeled]))
    student_loss = smoothed_cross_entropy(labels, at_student[:n], args.label_smoothing)
    on_labels = smoothed_cross_entropy(truth, at_student[n:], args.label_smoothing)
    names, parameters = zip(*student.named_parameters(), strict=True)
    whole = student_loss + args.student_labeled_weight * on_labels
    gradients = torch.autograd.grad(whole, parameters, create_graph=True, retain_graph=True)
    after = sgd_by_hand(student, dict(zip(names, gradients, strict=True)), args, args.student_lr)

    def labeled_loss(parameters):  # under the same normalisation: the labelled images by themselves
        buffers = {name: b.clone() for name, b in student.named_buffers()}
        logits = torch.func.functional_call(student, (parameters, buffers), (labeled,))
        return smoothed_cross_entropy(truth, logits, 0.0)

    old, new = labeled_loss(dict(zip(names, parameters, strict=True))), labeled_loss(after)
    weight = args.lambda_u * min(1, (step + 1) / args.uda_steps)
    loss = smoothed_cross_entropy(at_labels, t_labeled, args.label_smoothing)
    uda = sharpened_uda(t_weak, t_strong, args.temperature, args.threshold)
    found = {"teacher": at_teacher, "student": at_student, "labels": labels, "old": old, "new": new}
    found |= {"student_gradient": gradients, "student_after": after, "rate": args.student_lr}
    total = loss + weight * uda + feedback_term(found | {"labeling": labeling, "strong": t_strong})
    gradient = torch.autograd.grad(total, list(teacher.parameters()))
    gradient = dict(zip(dict(teacher.named_parameters()), gradient, strict=True))
    teacher_after = sgd_by_hand(teacher, gradient, args, args.teacher_lr)
    scalars = {"labeled_loss": loss, "uda_loss": uda, "student_loss": student_loss}
    gradient = clipped(gradient, args.grad_clip).values()
    return found | {"scalars": scalars, "gradient": gradient, "after": (teacher_after, after)}


def through_the_students_step(t):
    """Section 3's J itself: the student's step keeps its graph, and J is differentiated through it."""
    return t["new"]


def published_code_term(t):
    """(L_new − L_old − moving average) · CE(softmax, detached, against its own logits): zero gradient."""
    change = (t["new"] - t["old"]).detach()
    own = F.softmax(t["labeling"].detach(), dim=1)
    return (change - 0.01 * change) * smoothed_cross_entropy(own, t["labeling"], 0.0)


def mpl_pytorch_term(t):
    """(L_new − L_old) · CE(argmax T(strong), T(strong))."""
    own = F.one_hot(t["strong"].argmax(1), 3).double()
    return (t["new"] - t["old"]).detach() * smoothed_cross_entropy(own, t["strong"], 0.0)


def dot_term(t):
    """30 · η ⟨∇L_new, ∇CE(ŷ, S(x_u))⟩ · CE(ŷ, T(x_u)), with the student's gradient before it was clipped."""
    after = torch.autograd.grad(t["new"], list(t["student_after"].values()), retain_graph=True)
    product = sum((a * b).sum() for a, b in zip(after, t["student_gradient"], strict=True))
    return (
        30 * t["rate"] * product.detach() * smoothed_cross_entropy(t["labels"].detach(), t["labeling"], 0.0)
    )


def paper_term(t):
    """(L_old − L_new − moving average) · Σ CE(ŷ, T(x_u)): the log likelihood of all labels."""
    summed = len(t["labels"]) * smoothed_cross_entropy(t["labels"].detach(), t["labeling"], 0.0)
    return 0.99 * (t["old"] - t["new"]).detach() * summed


PLAIN_SGD = ("--momentum", 0, "--weight-decay", 0)  # the step that ``exact`` differentiates
PUBLISHED = "--feedback taylor --flip-feedback --pseudo-label soft --pseudo-label-view strong".split()
WHOLE_STEPS = {
    "exact": ((*PLAIN_SGD, "--feedback", "exact", "--pseudo-label", "soft"), through_the_students_step),
    "exact, strong view": (
        (*PLAIN_SGD, "--feedback", "exact", "--pseudo-label", "soft", "--pseudo-label-view", "strong"),
        through_the_students_step,
    ),
    "exact, mixup, a student that sees labels": (
        (
            *(*PLAIN_SGD, "--feedback", "exact", "--pseudo-label", "soft", "--mixup-alpha", 0.5),
            *("--student-labeled-weight", 0.7),
        ),
        through_the_students_step,
    ),
    "published code": ((*PUBLISHED, "--feedback-momentum", 0.99), published_code_term),
    "mpl-pytorch": (
        ("--feedback", "taylor", "--flip-feedback", "--feedback-view", "strong", "--pseudo-label", "argmax"),
        mpl_pytorch_term,
    ),
    "dot, clipped": (("--feedback", "dot", "--feedback-weight", 30, "--grad-clip", 0.3), dot_term),
    "argmax, sum": (
        ("--feedback", "taylor", "--feedback-reduction", "sum", "--feedback-momentum", 0.99),
        paper_term,
    ),
}


@pytest.mark.parametrize("case", WHOLE_STEPS)
def test_one_whole_step_against_the_reference(case):
    """Logits, losses, the teacher's gradient, weights, running statistics and the average, in float64."""
    flags, term = WHOLE_STEPS[case]
    flags = (*flags, "--temperature", 0.7, "--threshold", 0.7, "--warmup-steps", 0, "--schedule", "constant")
    method = in_double(build(*flags, "--uda-steps", 4, "--lambda-u", 3))
    views = double_views(1)
    teacher, student = (copy.deepcopy(each.network).train() for each in (method.teacher, method.student))
    seen = {"teacher": [], "student": []}
    for role, logits in seen.items():
        method.learners[role].network.register_forward_hook(
            lambda module, inputs, output, logits=logits: logits.append(output.detach())
        )
    scalars = method.step(views, 1)
    reference = reference_step(teacher, student, views, method.args, 1, term)

    def same(ours, theirs):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)

    weak = reference["teacher"].detach()[4:12]
    before_sharpening = (F.softmax(weak, dim=1).amax(1) >= method.args.threshold).double().mean()
    assert before_sharpening < scalars["uda_mask"] < 1
    for role in ("teacher", "student"):
        same(seen[role][0], reference[role].detach())
    for name, value in reference["scalars"].items():
        same(scalars[name], value.detach())
    pairs = zip(method.teacher.network.parameters(), reference["gradient"], strict=True)
    for ours, theirs in pairs:
        assert (ours.grad - theirs).norm() <= 1e-10 * theirs.norm()
    for learner, network, after in zip(
        (method.teacher, method.student), (teacher, student), reference["after"], strict=True
    ):
        for name, value in learner.network.named_parameters():
            same(value.detach(), after[name].detach())
        for ours, theirs in zip(learner.network.buffers(), network.buffers(), strict=True):
            same(ours, theirs)
    decay = 1 / 10  # the first update of the ramp
    before = dict(student.named_parameters())
    for name, value in method.predictor.named_parameters():
        same(value.detach(), (decay * before[name] + (1 - decay) * reference["after"][1][name]).detach())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_exact_repeats_the_dropout_of_the_students_pass(accumulate):
    """Not the teacher's dropout, which was drawn before it."""
    dropout = ("--teacher-dropout", 0.4, "--student-dropout", 0.4)
    exact = ("--feedback", "exact", "--pseudo-label", "soft", "--feedback-jvp", "difference")
    method = in_double(build(*exact, *dropout, "--accumulate", accumulate))
    masks = []

    def keep(module, inputs, output):
        if module.training:
            masks.append(output.detach() != 0)

    method.student.network.head.dropout.register_forward_hook(keep)
    method.step(double_views(1), 0)
    ours, *again = zip(
        *[iter(masks)] * accumulate, strict=True
    )  # the student's pass, and two to differentiate
    assert len(again) == 2 and 0.3 < torch.cat(ours).double().mean() < 0.8
    for each in again:
        assert all(torch.equal(a, b) for a, b in zip(each, ours, strict=True))


# ---------------------------------------------------------------- reduced: a perceptron learns


def reduced(*flags):
    """In float64, with a perceptron that is no longer the identity: all of its layers have a gradient."""
    method = in_double(build(*flags, method="reduced-mpl"))
    head = method.teacher.network.head
    with torch.no_grad():
        head.weight.normal_(std=0.3)
        head.bias.normal_(std=0.3)
    return method


def test_the_perceptron_gets_the_gradient_through_the_students_step():
    """By double backward, in float64; student and perceptron then take that step, no other network does."""
    method = reduced(*PLAIN_SGD, "--feedback", "exact", "--pseudo-label", "soft", "--schedule", "constant")
    args, views = method.args, double_views(1)
    perceptron, student = (copy.deepcopy(each.network).train() for each in (method.teacher, method.student))
    fixed = weights(method.large_teacher).clone(), method.predictions.clone()
    labeled, targets, _, strong, indices = views

    labels = F.softmax(perceptron(method.predictions[indices].double()), dim=1)
    names, parameters = zip(*student.named_parameters(), strict=True)
    logits = student(torch.cat([strong, labeled]))[: len(strong)]
    student_loss = smoothed_cross_entropy(labels, logits, args.label_smoothing)
    gradients = torch.autograd.grad(student_loss, parameters, create_graph=True)
    after = sgd_by_hand(student, dict(zip(names, gradients, strict=True)), args, args.student_lr)
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}
    objective = F.cross_entropy(torch.func.functional_call(student, (after, buffers), (labeled,)), targets)
    expected = torch.autograd.grad(objective, list(perceptron.parameters()))

    scalars = method.step(views, 1, targets.repeat(2))
    torch.testing.assert_close(scalars["student_loss"], student_loss.detach(), rtol=1e-10, atol=0)
    torch.testing.assert_close(scalars["label_confidence"], labels.detach().amax(1).mean())
    right = (labels.argmax(1) == targets.repeat(2)).double().mean()
    assert scalars["pseudo_label_accuracy"] == right
    for ours, theirs in zip(method.teacher.network.parameters(), expected, strict=True):
        assert theirs.norm() > 0 and (ours.grad - theirs).norm() <= 1e-10 * theirs.norm()
    nesterov = dict(zip(dict(perceptron.named_parameters()), expected, strict=True))
    for network, values in (
        (method.student.network, after),
        (method.teacher.network, sgd_by_hand(perceptron, nesterov, args, args.teacher_lr)),
    ):
        for name, value in network.named_parameters():
            torch.testing.assert_close(value.detach(), values[name].detach(), rtol=1e-10, atol=1e-12)
    assert torch.equal(weights(method.large_teacher), fixed[0]) and torch.equal(method.predictions, fixed[1])
    assert method.learners == {"perceptron": method.teacher, "student": method.student}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_the_feedback_trains_the_perceptron(estimator):
    """Its step is proportional to the weight of the feedback, and none at 0."""
    flags = (*PLAIN_SGD, "--feedback", estimator, "--pseudo-label", "sample")
    moved = []
    for weight in (0, 1, -2):
        method = reduced(*flags, "--feedback-weight", weight)
        before = weights(method.teacher.network)
        torch.manual_seed(3)
        method.step(double_views(1), 0, diagnose=True)
        moved.append(weights(method.teacher.network) - before)
    assert moved[0].norm() == 0 < moved[1].norm()
    torch.testing.assert_close(moved[2], -2 * moved[1], rtol=1e-8, atol=1e-12)


def semimeta(*flags):
    """The method in float64, with running statistics and a momentum of steps before."""
    flags = ("--schedule", "constant", "--bn-momentum", 0.5, "--student-lr", 0.05, *flags)
    method = in_double(build(*flags, method="semimeta"))
    for step in range(3):
        method.step(double_views(step), step)
    return method


@pytest.mark.parametrize(
    ("model", "rate", "mode", "tolerance"),
    [("wrn-10-1", 1e-4, "forward", 1e-10), ("mlp-192-16-3", 0.1, "difference", 1e-3)],
)
def test_semimeta_moves_its_labels_by_the_gradient_through_the_step(model, rate, mode, tolerance):
    """−N · ∂L/∂q, L the labelled loss after a step on ‖p − q‖², all in evaluation mode. Leaky ReLU has kinks
    within the published ε, tanh has none."""
    method = semimeta("--feedback-jvp", mode, "--model", model)
    labeled, targets, weak, *_ = double_views(7)
    network = copy.deepcopy(method.student.network).eval()
    parameters = dict(network.named_parameters())
    p = F.softmax(network(weak), dim=1)
    q = p.detach().clone().requires_grad_()
    distance = (p - q).square().sum(1).mean()
    gradient = torch.autograd.grad(distance, list(parameters.values()), create_graph=True)
    after = {name: p - rate * g for (name, p), g in zip(parameters.items(), gradient, strict=True)}
    loss = F.cross_entropy(torch.func.functional_call(network, after, (labeled,)), targets)
    expected = -len(q) * torch.autograd.grad(loss, q)[0]

    v = feedback.labeled_gradient(method.student, method.student.predict, labeled, targets)
    moved = method.pseudo_labels(weak, v, rate) - q.detach()
    assert expected.abs().max() > 1e-3 and (q + expected).min() > 0  # nothing is clipped
    assert (moved - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("alpha", (0, 0.5))
def test_one_step_of_semimeta_against_the_reference(alpha):
    """Section by section: gradient, labels, mixup, loss, step, running statistics, in float64."""
    method = semimeta("--feedback-jvp", "difference", "--label-smoothing", 0, "--momentum", 0)
    args, network = method.args, copy.deepcopy(method.student.network).eval()
    args.mixup_alpha, step = alpha, 3
    labeled, targets, weak, *_ = views = double_views(step)
    parameters = dict(network.named_parameters())

    gradient = torch.autograd.grad(F.cross_entropy(network(labeled), targets), list(parameters.values()))
    norm = torch.cat([g.reshape(-1) for g in gradient]).norm()

    def predictions(epsilon):
        moved = {n: p + epsilon * g / norm for (n, p), g in zip(parameters.items(), gradient, strict=True)}
        return F.softmax(torch.func.functional_call(network, moved, (weak,)), dim=1).detach()

    q = predictions(0) - args.student_lr * norm * (predictions(0.01) - predictions(-0.01)) / 0.01
    assert (q < 0).any()
    q = q.clamp(min=0) / q.clamp(min=0).sum(1, keepdim=True)

    network.train()
    truth = F.one_hot(targets, 3).double()
    images, labels = mixed_by_hand(labeled, truth, weak[::2], q[::2], args, step)
    logits = network(images)
    divergence = F.kl_div(F.log_softmax(logits, dim=1), labels, reduction="batchmean")
    distance = (F.softmax(network(weak), dim=1) - q).square().sum(1).mean()
    (divergence + args.lambda_u * (step + 1) / args.uda_steps * distance).backward()
    gradients = {name: p.grad for name, p in parameters.items()}
    after = sgd_by_hand(network, gradients, args, args.student_lr)

    scalars = method.step(views, step, q.argmax(1))
    assert scalars["pseudo_label_accuracy"] == 1
    loss = smoothed_cross_entropy(labels, logits.detach(), 0.0)  # KL and the entropy of the targets
    torch.testing.assert_close(scalars["labeled_loss"], loss, rtol=1e-9, atol=0)
    torch.testing.assert_close(scalars["consistency_loss"], distance.detach(), rtol=1e-9, atol=0)
    for name, ours in method.student.network.named_parameters():
        torch.testing.assert_close(ours.detach(), after[name].detach(), rtol=1e-9, atol=1e-11)
    for ours, theirs in zip(method.student.network.buffers(), network.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_diagnose_measures_the_cosine_and_changes_nothing():
    a, b = build("--feedback", "exact"), build("--feedback", "exact")
    b.teacher.network.load_state_dict(a.teacher.network.state_dict())
    a.step(make_views(), 0, diagnose=True)
    b.step(make_views(), 0)
    assert torch.equal(weights(a.teacher.network), weights(b.teacher.network))
    assert b.diagnostics == {}


@pytest.mark.parametrize("estimator", ["dot", "exact"])
def test_the_cosine_is_between_the_feedback_and_the_rest_of_the_teachers_loss(estimator):
    """The rest is what the teacher learns without feedback; the feedback's gradient is the difference."""
    gradients, cosines = [], []
    for name in (estimator, "none"):
        method = in_double(build("--feedback", name, "--pseudo-label", "argmax", "--feedback-weight", 10))
        method.step(double_views(1), 5, diagnose=name != "none")
        gradients.append(torch.cat([p.grad.reshape(-1) for p in method.teacher.parameters.values()]))
        cosines.append(method.diagnostics.get("feedback_cosine"))
    whole, rest = gradients
    torch.testing.assert_close(cosines[0], F.cosine_similarity(whole - rest, rest, dim=0), rtol=1e-6, atol=0)


def test_a_step_that_the_fp16_scaler_skips_has_no_feedback():
    """Gradients that overflow leave the student as it is; the teacher goes on as without feedback."""
    method, without = build("--feedback", "dot"), build("--feedback", "none")
    before = weights(method.student.network)
    for each in (method, without):
        each.student.scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
        each.step(make_views(), 0)
    assert torch.equal(weights(method.student.network), before)
    assert torch.equal(weights(method.teacher.network), weights(without.teacher.network))


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("supervised", ("--mixup-alpha", 0.5)),
        ("semimeta", ()),
        ("uda", ()),
        *[("mpl", ("--feedback", name)) for name in ("none", *ESTIMATORS)],
        *[("reduced-mpl", ("--feedback", name)) for name in ESTIMATORS],
    ],
)
def test_bf16_is_near_full_precision(method, flags, bf16):
    runtime = Runtime("cpu", amp=True, channels_last=True)
    flags = [*flags, "--student-lr", 0.01, "--teacher-lr", 0.01]
    full, mixed = build(*flags, method=method), build(*flags, method=method, runtime=runtime)
    for step in range(3):
        a, b = full.step(make_views(step), step), mixed.step(make_views(step), step)
    loss = "student_loss" if method == "reduced-mpl" else "labeled_loss"
    torch.testing.assert_close(a[loss], b[loss], rtol=0.05, atol=0.02)
    assert a[loss] != b[loss] and weights(mixed.student.network).dtype == torch.float32


def test_learns_a_tiny_problem():
    """Three classes that differ by their mean grey level: a few steps are enough."""
    method = build("--temperature", 0.7)
    generator = torch.Generator().manual_seed(0)
    level = torch.tensor([-1.5, 0.0, 1.5])

    def images(targets):
        noise = torch.randn(len(targets), 3, 8, 8, generator=generator)
        return level[targets][:, None, None, None] + 0.3 * noise

    for step in range(60):
        targets, truth = torch.tensor([0, 1, 2, 0]), torch.randint(3, (8,), generator=generator)
        weak = images(truth)
        strong = weak + 0.1 * torch.randn(8, 3, 8, 8, generator=generator)
        scalars = method.step(Views(images(targets), targets, weak, strong), step, truth)
    truth = torch.arange(60) % 3
    assert scalars["pseudo_label_accuracy"] == 1
    assert (method.predictor(images(truth)).argmax(1) == truth).float().mean() > 0.95


# ---------------------------------------------------------------- the batch in parts, other networks


PARTS = [
    ("supervised",),
    ("uda",),
    ("uda", "--align", "0.2"),
    ("uda", "--weak-pass", "apart"),
    ("uda", "--weak-pass", "ema"),
    ("uda", "--confidence", "relative", "--uda-loss", "cos"),
    ("uda", "--confidence", "soft", "--weak-pass", "ema"),
    ("fixmatch", "--threshold", "0.4", "--align", "0.2"),
    ("fixmatch", "--confidence", "relative", "--threshold", "0.9"),
    ("fixmatch", "--confidence", "soft", "--align", "0.2"),
    ("mpl", "--align", "0.2"),
    ("mpl", "--confidence", "relative", "--threshold", "0.9"),
    ("mpl", "--confidence", "soft", "--feedback", "exact", "--pseudo-label", "soft"),
    ("mpl", "--weak-pass", "apart", "--feedback", "exact", "--pseudo-label-view", "strong"),
    ("mpl", "--weak-pass", "ema", "--feedback", "none", "--align", "0.2"),
    ("mpl", "--switch-every", "1", "--align", "0.2"),
    ("mpl", "--mixup-alpha", "0.5", "--feedback", "dot", "--student-labeled-weight", "0.5"),
    ("supervised", "--mixup-alpha", "0.5"),
    ("semimeta", "--mixup-alpha", "0"),
    ("semimeta", "--mixup-alpha", "0.5", "--feedback-jvp", "difference"),
    *(
        ("mpl", "--feedback", name, "--feedback-reduction", reduction, "--pseudo-label", "soft")
        for name, reduction in (("none", "mean"), ("taylor", "mean"), ("dot", "sum"), ("exact", "mean"))
    ),
    ("reduced-mpl", "--feedback", "dot", "--feedback-reduction", "sum"),
    ("reduced-mpl", "--feedback", "exact", "--pseudo-label", "soft"),
]


@pytest.mark.parametrize("flags", PARTS, ids=lambda flags: "-".join(flags[:3:2]))
def test_a_batch_in_parts_is_the_whole_batch(flags):
    """Without batch norm: three steps, in one part and in two and four."""
    method, *flags = flags
    results = []
    torch.set_default_dtype(torch.float64)
    for accumulate in (1, 2, 4):
        words = f"--dataset twomoons --model mlp-2-16-3 --batch-size 8 --accumulate {accumulate}"
        words += " --mu 2 --total-steps 9 --lambda-u 1 --threshold 0.3 --teacher-lr 0.1 --student-lr 0.1"
        words += f" --method {method} --teacher-checkpoint {teacher_file('mlp-2-16-3', 3, 0)}"
        args = main.parse_arguments([*words.split(), *flags])
        torch.manual_seed(0)
        learner = with_predictions(METHODS[method](args, 3, 0, Runtime("cpu")), 16)
        if learner.uses_consistency:  # as if after many steps: some images count less than others
            learner.consistency.moments = torch.tensor([0.6, 0.02])
        generator = torch.Generator().manual_seed(5)
        for step in range(3):
            points, weak, noise = (torch.randn(n, 2, generator=generator) for n in (8, 16, 16))
            views = Views(points, torch.arange(8) % 3, weak, weak + 0.3 * noise, torch.arange(16))
            scalars = learner.step(views, step, torch.arange(16) % 3)
        networks = [weights(each.network) for each in learner.learners.values()]
        moments = learner.consistency.moments if learner.uses_consistency else torch.zeros(2)
        results.append((torch.cat([*networks, moments]), scalars))
    torch.set_default_dtype(torch.float32)
    for networks, scalars in results[1:]:
        torch.testing.assert_close(networks, results[0][0], rtol=1e-9, atol=1e-12)
        for name, value in scalars.items():
            torch.testing.assert_close(value, results[0][1][name], rtol=1e-5, atol=1e-6, check_dtype=False)


def test_parts_see_the_same_dropout_twice():
    """A teacher with dropout labels in a first pass what it learns in the second."""
    method = build("--accumulate", 2, "--teacher-dropout", 0.5, "--feedback", "none")
    torch.manual_seed(2)
    parts = [method.teacher.preview(half) for half in make_views().strong.chunk(2)]
    torch.manual_seed(2)
    again = [method.teacher(half) for half in make_views().strong.chunk(2)]
    for one, other in zip(parts, again, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("mpl", "--feedback none"),
        ("mpl", "--feedback exact --pseudo-label-view strong --weak-pass apart"),
        ("uda", "--confidence relative"),
        ("fixmatch", "--confidence soft"),
    ],
)
def test_the_second_pass_of_each_part_has_the_dropout_of_the_first(method, flags):
    """So that a network learns on the predictions that made the labels, or that told which images count."""
    dropout = ("--teacher-dropout", 0.5, "--student-dropout", 0.5)
    each = build(*flags.split(), *dropout, "--accumulate", 2, method=method)
    learner, masks = each.learners.get("teacher", each.student), []
    hook = lambda module, inputs, output: masks.append(output.detach() != 0)  # noqa: E731
    learner.network.head.dropout.register_forward_hook(hook)
    each.step(make_views(), 0)
    first, second = masks[: len(masks) // 2], masks[len(masks) // 2 :]
    assert len(first) == (4 if "apart" in flags else 2) and not torch.equal(first[-1], first[-2])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_forward_pass_alone_leaves_no_trace():
    method = build()
    before = {name: value.clone() for name, value in method.teacher.network.state_dict().items()}
    method.teacher.preview(make_views().strong)
    after = method.teacher.network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_frozen_batch_norm_of_vectors_keeps_its_statistics():
    """Images have one of their own kind (``models.FrozenBatchNorm2d``)."""
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    network[1].requires_grad_(False)
    network[1].running_mean.fill_(0.5)
    expected, values = copy.deepcopy(network).eval(), torch.randn(8, 3)
    learner = Learner(
        network, Runtime("cpu"), optimizer=lambda network: sgd(network, 0.1, 0, False, 0), rate=lambda _: 0.1
    )
    torch.testing.assert_close(learner(values), expected(values))
    assert network[1].running_mean.eq(0.5).all() and network.training


def test_a_frozen_body_stays_as_it_is(tmp_path):
    """Weights and running statistics; the head learns, and its gradient is that of the whole network's."""
    torch.save(build_model("resnet18", 3, image_size=8).state_dict(), tmp_path / "weights.pth")
    flags = ["--feedback", "exact", "--pseudo-label", "soft", "--weights", tmp_path / "weights.pth"]
    method = build("--freeze-body", "--model", "resnet18", *flags)
    for learner in method.learners.values():
        assert set(learner.parameters) == {"fc.weight", "fc.bias"}
    before = {role: copy.deepcopy(each.network.state_dict()) for role, each in method.learners.items()}
    for step in range(2):
        method.step(make_views(step), step)
    for role, learner in method.learners.items():
        for name, value in learner.network.state_dict().items():
            assert torch.equal(value, before[role][name]) != name.startswith("fc."), name


def test_each_role_has_its_own_dropout():
    method = build("--teacher-dropout", 0.1, "--student-dropout", 0.4)
    rates = {role: each.network.head.dropout.p for role, each in method.learners.items()}
    assert rates == {"teacher": 0.1, "student": 0.4}


def test_the_student_may_be_another_network():
    method = build("--student-model", "wrn-10-2", "--feedback", "exact", "--pseudo-label", "soft")
    sizes = [
        sum(p.numel() for p in network.parameters()) for network in (method.predictor, build().predictor)
    ]
    assert sizes[0] > 3 * sizes[1]
    assert sum(p.numel() for p in method.teacher_network.parameters()) == sizes[1]
    assert torch.isfinite(method.step(make_views(), 0)["feedback"])


def test_adamw_decays_no_batch_norm():
    method = build("--optimizer", "adamw", method="supervised")
    optimizer = method.student.optimizer
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [5e-4, 0.0]
    before = weights(method.predictor)
    method.step(make_views(), 0)
    assert not torch.equal(weights(method.predictor), before)


def test_rmsprop_is_tensorflows():
    """Three steps against its equations, with the rate inside the momentum and epsilon under the root."""
    flags = ("--optimizer", "rmsprop", "--warmup-steps", 4, "--momentum", 0.8)
    method = in_double(build(*flags, method="supervised"))
    network = copy.deepcopy(method.student.network)
    decayed = {id(p) for p in sgd(network, 0.1, 0.9, True, 5e-4).param_groups[0]["params"]}
    squares = [torch.ones_like(p) for p in network.parameters()]
    moves = [torch.zeros_like(p) for p in network.parameters()]
    for step in range(3):
        views = double_views(step)
        network.zero_grad()
        F.cross_entropy(network(views.labeled), views.targets, label_smoothing=0.1).backward()
        with torch.no_grad():
            for p, square, move in zip(network.parameters(), squares, moves, strict=True):
                gradient = p.grad + 5e-4 * p * (id(p) in decayed)
                square.copy_(0.9 * square + 0.1 * gradient**2)
                move.copy_(0.8 * move + 0.1 * (step + 1) / 4 * gradient / (square + 1e-3).sqrt())
                p.sub_(move)
        state, method = method.state_dict(), in_double(build(*flags, method="supervised"))
        method.load_state_dict(state, "state")  # as a run that is resumed at every step
        method.step(views, step)
        torch.testing.assert_close(weights(method.student.network), weights(network), rtol=1e-10, atol=1e-12)


def test_stochastic_depth_of_both_networks():
    method = build("--model", "efficientnet-b0", "--stochastic-depth", 0.4)
    for learner in method.learners.values():
        rates = [module.p for module in learner.network.modules() if isinstance(module, StochasticDepth)]
        assert rates == pytest.approx([0.4 * i / 16 for i in range(16)])
    with pytest.raises(UserError, match="wrn-10-1 has no stochastic depth"):
        build("--stochastic-depth", 0.4)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "rmsprop"])
def test_the_body_learns_at_its_share_of_the_heads_rate(optimizer):
    """A first step, weight decay included, moves the body a tenth as far and the head as far."""
    flags = ("--optimizer", optimizer, "--weight-decay", 0.5)
    moved = {}
    for scale in (1.0, 0.1):
        method = in_double(build(*flags, "--body-lr-scale", scale, method="supervised"))
        before = {name: p.detach().clone() for name, p in method.student.parameters.items()}
        method.step(double_views(1), 0)
        moved[scale] = {name: p.detach() - before[name] for name, p in method.student.parameters.items()}
        assert {
            (group["weight_decay"], group["scale"]) for group in method.student.optimizer.param_groups
        } == {(decay, each) for decay in (0.5, 0.0) for each in (1.0, scale)}
    for name, whole in moved[1.0].items():
        share = 1.0 if name.startswith("head.") else 0.1
        torch.testing.assert_close(moved[0.1][name], share * whole, rtol=1e-6, atol=1e-14)


def test_a_perceptron_has_no_body():
    """All of its layers move as far as without --body-lr-scale."""
    moved = []
    for scale in (1.0, 0.1):
        method = reduced("--feedback", "dot", "--teacher-lr", 100, "--body-lr-scale", scale)
        before = weights(method.teacher.network)
        for p in method.teacher.network.parameters():
            p.grad = torch.ones_like(p)
        method.teacher.update(0.1)
        moved.append(weights(method.teacher.network) - before)
    assert moved[0].abs().min() > 0
    torch.testing.assert_close(moved[0], moved[1])


def test_a_scaled_body_is_continued_and_earlier_checkpoints_are():
    scaled, states = ("--body-lr-scale", 0.1), {}
    for flags in ((), scaled):
        method, other = (build(*flags, "--feedback", "dot") for _ in range(2))
        method.step(make_views(), 0)
        states[flags] = copy.deepcopy(method.state_dict())
        if not flags:  # as an earlier version wrote it
            for role in ("teacher", "student"):
                for group in states[flags][f"{role}_optimizer"]["param_groups"]:
                    del group["scale"]
        other.load_state_dict(states[flags], "x.pth.tar")
        for each in (method, other):
            each.step(make_views(2), 1)
        for role in ("teacher", "student"):
            networks = (each.learners[role].network for each in (method, other))
            assert torch.equal(*map(weights, networks))
    with pytest.raises(UserError, match=r"x\.pth\.tar is of another network.*--body-lr-scale"):
        build(*scaled).load_state_dict(states[()], "x.pth.tar")


class Traced(Runtime):
    """Networks pass through torch.compile's tracing, but not its code generation."""

    def compile(self, function):
        return torch.compile(function, backend="eager", dynamic=False)


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("supervised", ""),
        ("uda", "--weak-pass ema"),
        ("uda", "--confidence soft"),
        ("fixmatch", "--confidence relative --accumulate 2"),
        ("mpl", "--feedback taylor --accumulate 2"),
        ("mpl", "--feedback dot --pseudo-label sample"),
        ("mpl", "--feedback taylor --switch-every 1"),
        ("mpl", "--feedback exact --pseudo-label-view strong --weak-pass apart"),
        ("mpl", "--feedback exact --pseudo-label-view strong --weak-pass ema"),
        ("reduced-mpl", "--feedback exact --pseudo-label soft"),
        ("mpl", "--feedback dot --mixup-alpha 0.5 --student-labeled-weight 0.5"),
        ("semimeta", "--mixup-alpha 0.5"),
        ("semimeta", "--feedback-jvp difference --accumulate 2"),
    ],
)
def test_every_graph_is_whole_and_made_in_the_first_step(method, flags):
    torch.compiler.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    each = build(*flags.split(), "--teacher-dropout", 0.3, method=method, runtime=Traced("cpu"))
    graphs = []
    for step in range(3):
        each.step(make_views(step), step)
        graphs.append(counters["stats"]["unique_graphs"])
    made = graphs[1 if "--switch-every" in flags else 0]  # exchanged roles have graphs of their own
    assert 0 < made == graphs[-1] and not counters["graph_break"]


class OneBlock(torch.nn.Module):
    """What a WideResNet is made of, once: fewer kernels to be compiled."""

    def __init__(self, dropout):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn = torch.nn.BatchNorm2d(4, momentum=0.1)
        self.head = LinearHead(4, 3, dropout)

    def forward(self, images):
        return self.head(leaky_relu(self.bn(self.conv(images)), 0.2).mean(dim=(2, 3)))


@needs_compiler
@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("mpl", "--feedback taylor"),
        ("mpl", "--feedback exact --pseudo-label-view strong --weak-pass ema"),
        ("reduced-mpl", "--feedback exact --pseudo-label soft --teacher-lr 1000 --model mlp-192-8-3"),
    ],
)
def test_compiled_steps_are_the_steps(method, flags, monkeypatch):
    """Dropout included: the exact feedback repeats the student's pass without the compiler."""
    if method == "mpl":
        monkeypatch.setattr("methods.method.build_model", lambda *_, dropout, **__: OneBlock(dropout))

    def train(compiled):
        words = (*flags.split(), "--student-dropout", 0.3, "--teacher-dropout", 0.3)
        each = in_double(build(*words, method=method, runtime=Runtime("cpu", compiled=compiled)))
        for step in range(2):
            each.runtime.seed(0, step)
            each.step(double_views(step), step + 5, diagnose=step == 1)
        return weights(each.student.network), weights(each.teacher.network)

    torch.compiler.reset()
    for compiled, plain in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-8, atol=1e-10)


# ---------------------------------------------------------------- a captured step


DROPOUT = ("--teacher-dropout", 0.2, "--student-dropout", 0.2)
CAPTURED = {
    "supervised": ("supervised", "--grad-clip", 1, *DROPOUT),
    "uda, soft": ("uda", "--confidence", "soft", *DROPOUT),
    "fixmatch, relative": ("fixmatch", "--confidence", "relative", "--align", 0.2, *DROPOUT),
    "pseudo-label": ("pseudo-label", *DROPOUT),
    "none, waiting": ("mpl", "--feedback", "none", "--student-wait-steps", 2, *DROPOUT),
    "taylor": ("mpl", "--feedback", "taylor", "--teacher-warmup-steps", 2, *DROPOUT),
    "dot, sampled": (
        *("mpl", "--feedback", "dot", "--pseudo-label", "sample", "--feedback-momentum", 0.9),
        *("--body-lr-scale", 0.5, *DROPOUT),
    ),
    "exact, forward": ("mpl", "--feedback", "exact", "--feedback-jvp", "forward", "--teacher-dropout", 0.2),
    "exact, difference": ("mpl", "--feedback", "exact", "--feedback-jvp", "difference"),
    "in parts": ("mpl", "--feedback", "exact", "--accumulate", 2),
    "weak pass ema": ("mpl", "--feedback", "none", "--weak-pass", "ema", *DROPOUT),
    "semimeta": ("semimeta",),
}


def captured_training(name, runtime, steps, step_graph=None):
    """Steps in float64, the last but one with its diagnosis and not replayed: their scalars, (steps, M), and
    what was learned, {name: state}. ``step_graph``: how they are repeated, if not as ``runtime`` says."""
    method, *flags = CAPTURED[name]
    each = in_double(build("--warmup-steps", 5, *flags, method=method, runtime=runtime))
    if method == "pseudo-label":
        each.teacher_network.double()
    for learner in each.learners.values():
        fuse(learner.optimizer)
    generator, rows = runtime.generator(0), []

    def step_of(views, step, diagnose=False):
        noise = torch.randn(views.labeled.shape, generator=generator, device=runtime.device)
        views = views._replace(labeled=views.labeled + 0.1 * noise)
        return each.step(views, step, diagnose=diagnose)

    repeated = step_graph(runtime, step_of, [generator]) if step_graph else runtime.graph(step_of, generator)
    for step in range(steps):
        views = Views(*(tensor.to(runtime.device) for tensor in double_views(step)))
        runtime.seed(0, step)
        generator.manual_seed(step)
        scalars = step_of(views, step, diagnose=True) if step == steps - 2 else repeated(views, step)
        rows.append(torch.stack([scalar.detach().double() for scalar in scalars.values()]).clone())
    state = each.state_dict()
    return torch.stack(rows), {key: value for key, value in state.items() if "optimizer" not in key}


@pytest.mark.parametrize("name", CAPTURED)
def test_replayed_steps_are_the_steps(name):
    """What a step needs to know of its number comes by ``Runtime.number``, all else lies where it lay."""
    rows, learned = captured_training(name, Runtime("cpu"), 5, RecordedStep)
    expected_rows, expected = captured_training(name, Runtime("cpu"), 5)
    torch.testing.assert_close(rows, expected_rows, rtol=1e-5, atol=1e-7)
    for key, value in expected.items():
        torch.testing.assert_close(learned[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), "does it wait for the device"),
        (torch.OutOfMemoryError("CUDA out of memory"), "a smaller --batch-size"),
    ],
)
def test_a_step_that_cannot_be_captured(error, advice, capsys):
    """The error as it is, behind a line that says what to do."""

    def step_of(batch, step):
        if step:
            raise error

    repeated = RecordedStep(Runtime("cpu"), step_of, [])
    repeated(Views(*[None] * 5), 0)
    with pytest.raises(type(error), match=str(error)):
        repeated(Views(*[None] * 5), 1)
    said = capsys.readouterr().err
    assert advice in said and "--no-cuda-graph" in said and repeated.runtime.capturing is None
