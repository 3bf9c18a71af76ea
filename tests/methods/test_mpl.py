"""MPL.step against a reference written from the equations, its feedback, its roles."""

import copy

import pytest
import torch
import torch.nn.functional as F
from steps import (
    PLAIN_SGD,
    build,
    clipped,
    double_views,
    in_double,
    make_views,
    mixed_by_hand,
    sgd_by_hand,
    sharpened_uda,
    smoothed_cross_entropy,
    weights,
)
from test_cli import tensors

from methods.feedback import ESTIMATORS
from methods.method import Logits, MicroBatch


def test_student_learns_from_pseudo_labels_alone():
    """Other classes of the labelled images change the teacher at once, the student only through the teacher,
    one step later."""
    a, b = build("--feedback", "none"), build("--feedback", "none")
    views = make_views()
    a.step(views, 0)
    b.step(views._replace(targets=(views.targets + 1) % 3), 0)
    assert torch.equal(weights(a.student.network), weights(b.student.network))
    assert not torch.equal(weights(a.teacher.network), weights(b.teacher.network))


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
    assert build("--teacher-warmup-steps", 2, "--student-wait-steps", 5).student.schedule(4) == 0


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
    "muon": "--feedback dot --optimizer muon --schedule linear",
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
        assert method.learners["teacher"].schedule(step) == reference.teacher.schedule(step)
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


def test_no_roles_are_exchanged_before_the_student_has_learned():
    method = build("--switch-every", 2, "--student-wait-steps", 3)
    switched = []
    for step in range(10):
        method.step(make_views(step), step)
        switched.append(method.switched)
    assert switched == [False] * 5 + [True] * 2 + [False] * 2 + [True]


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
