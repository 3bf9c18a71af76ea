"""Consistency: alignment, which images count, the weak passes, FixMatch."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from steps import build, double_views, in_double, make_views, sharpened_uda, weights

import main
from engine.optimizers import sgd
from engine.runtime import Runtime
from methods.method import Logits
from methods.uda import Consistency, DistributionAlignment, teacher_logits


def student_pass(method, views=None):
    """The student's logits (N, K) in its training pass: the labelled images stand behind the strong ones."""
    views = views or make_views()
    return method.student(torch.cat([views.strong, views.labeled]))[: len(views.strong)]


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
        classes = torch.zeros(len(parts[0].labeled), dtype=torch.int64)
        scalars = [ours.loss(part, classes, 1.0)[1] for part in parts]
        loss = sum(each["uda_loss"] for each in scalars) / 2
        assert loss.item() == pytest.approx(expected, rel=1e-12)
        found = torch.cat([ours.weights(ours.align(part.weak)) for part in parts])
        assert found.tolist() == pytest.approx(weights, rel=1e-12)
        assert sum(each["uda_mask"] for each in scalars).item() / 2 == pytest.approx(
            np.mean(weights), rel=1e-6
        )
        assert 0 < min(weights) < 0.5 < max(weights) if confidence == "soft" else 0 < np.mean(weights) < 1
        if confidence != "soft":
            bound = {"threshold": threshold, "relative": ours.lowest}[confidence]
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


def test_teacher_without_feedback_is_the_uda_network():
    mpl, uda = build("--feedback", "none"), build(method="uda")
    mpl.teacher.network.load_state_dict(uda.student.network.state_dict())
    for step in range(3):
        mpl.step(make_views(step), step)
        uda.step(make_views(step), step)
    assert torch.equal(weights(mpl.teacher.network), weights(uda.student.network))


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
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = method.student.schedule(step)
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
