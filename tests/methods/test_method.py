"""What holds for every method: pseudo labels, flags, micro-batches, compiled and continued steps."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import needs_compiler, teacher_file
from steps import FLAGS, PARTS, build, double_views, in_double, make_views, weights, with_predictions
from test_cli import tensors
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

import main
from augmentation import Views
from engine.runtime import Runtime
from methods import METHODS
from methods.feedback import ESTIMATORS
from methods.method import Method, known_accuracy, pseudo_labels, soft_cross_entropy
from models import LinearHead, build_model, leaky_relu
from run.arguments import flag, uses
from utils import UserError


def test_soft_cross_entropy_against_torch():
    logits, targets = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0])
    ours = soft_cross_entropy(F.one_hot(targets, 4).float(), logits, 0.15)
    torch.testing.assert_close(ours, F.cross_entropy(logits, targets, reduction="none", label_smoothing=0.15))


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
    assert known_accuracy(labels, torch.tensor([0, 2, -1, -1]))["pseudo_label_accuracy"].item() == 0.5
    assert known_accuracy(labels, torch.tensor([-1, -1, -1, -1]))["pseudo_label_accuracy"].item() == 0.0


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


class MeanTeacherLite(Method):
    """A new method that says nothing but that it uses a flag of its own."""

    uses_rate = True


def with_new_methods(monkeypatch):
    """The parser of a fork with methods of its own, one of them with a flag that no other method uses."""
    monkeypatch.setattr(Method, "uses_rate", False, raising=False)
    monkeypatch.setitem(METHODS, "mean-teacher-lite", MeanTeacherLite)
    monkeypatch.setitem(METHODS, "my-mpl", type("MyMPL", (METHODS["mpl"],), {}))
    monkeypatch.setitem(METHODS, "my-reduced", type("MyReduced", (METHODS["reduced-mpl"],), {}))
    parser = main.build_parser()
    add = parser.group("new")
    add("--rate", type=float, default=0.0, only=uses("uses_rate"))
    monkeypatch.setattr(main, "build_parser", lambda: parser)
    return parser


def unused_by(parser, method):
    return parser.without_effect(parser.parse_given(["--method", method])[0])


def test_a_new_method_uses_every_flag_unless_its_attributes_say_all(monkeypatch):
    parser = with_new_methods(monkeypatch)
    assert not unused_by(parser, "mean-teacher-lite") & (OTHER_VALUES.keys() | {"rate", "teacher_checkpoint"})
    assert "rate" in unused_by(parser, "mpl") and "mu" in unused_by(parser, "supervised")
    assert unused_by(parser, "my-mpl") == unused_by(parser, "mpl")
    monkeypatch.setattr(MeanTeacherLite, "says_all", True)
    monkeypatch.setattr(MeanTeacherLite, "uses_consistency", True)
    unused = unused_by(parser, "mean-teacher-lite")
    assert "align" not in unused and "rate" not in unused and "mu" not in unused and "feedback" in unused


def test_a_changed_flag_of_a_new_method_is_named_when_its_run_continues(monkeypatch, capsys):
    with_new_methods(monkeypatch)
    words = ["--method", "mean-teacher-lite", "--rate", "0.5"]
    saved = {"step": 3, "args": vars(main.parse_arguments(words))}
    main.parse_arguments(["--lambda-u", "3", "--resume", "x.pth.tar"], saved, "x.pth.tar")
    assert "--lambda-u 8.0 → 3" in capsys.readouterr().err
    with pytest.raises(UserError, match="--weak-pass joint: it cannot continue with --weak-pass ema"):
        main.parse_arguments(["--weak-pass", "ema", "--resume", "x.pth.tar"], saved, "x.pth.tar")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("my-mpl --weak-pass ema", "--weak-pass ema has no gradient on the weak view"),
        ("my-mpl --student-wait-steps 300000", "the student never learns"),
        ("my-reduced --teacher-checkpoint x --feedback none", "nothing trains the perceptron"),
        ("my-reduced --teacher-checkpoint x --cuda-graph", "does not work with --method my-reduced"),
    ],
)
def test_a_method_under_a_new_name_keeps_the_checks(arguments, words, monkeypatch):
    with_new_methods(monkeypatch)
    with pytest.raises(UserError, match=words):
        main.parse_arguments(["--method", *arguments.split()])


def test_rates_are_those_of_the_command_line():
    """Of both networks; the student waits for two steps."""
    waiting = ("--student-wait-steps", 2, "--teacher-lr", 0.4, "--student-lr", 0.2, "--total-steps", 12)
    for flags, teacher, student in (
        ("--warmup-steps 4 --schedule constant", [0.1, 0.2, 0.3, 0.4, 0.4], [0, 0, 0.05, 0.1, 0.15]),
        ("--schedule milestones --milestones 3 4", [0.4] * 3 + [0.04, 0.004], [0, 0, 0.2, 0.02, 0.002]),
        ("--schedule cosine", [0.2 * (1 + np.cos(np.pi * t / 12)) for t in range(5)], None),
    ):
        method = build(*waiting, *flags.split())
        assert [method.teacher.schedule(step) for step in range(5)] == pytest.approx(teacher)
        if student:
            assert [method.student.schedule(step) for step in range(5)] == pytest.approx(student)


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


def test_stochastic_depth_of_both_networks():
    method = build("--model", "efficientnet-b0", "--stochastic-depth", 0.4)
    for learner in method.learners.values():
        rates = [module.p for module in learner.network.modules() if isinstance(module, StochasticDepth)]
        assert rates == pytest.approx([0.4 * i / 16 for i in range(16)])
    with pytest.raises(UserError, match="wrn-10-1 has no stochastic depth"):
        build("--stochastic-depth", 0.4)


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


@pytest.mark.parametrize(
    ("method", "flags", "learned"),
    [
        ("supervised", "", 4),
        ("pseudo-label", "", 8),
        ("uda", "--weak-pass apart", 12),
        ("uda", "--weak-pass ema", 12),
        ("fixmatch", "--accumulate 2 --confidence soft", 20),
        ("mpl", "--feedback none", 32),
        ("mpl", "--feedback taylor --accumulate 2", 32),
        ("mpl", "--feedback dot", 36),
        ("mpl", "--feedback exact --feedback-jvp forward", 36),
        ("mpl", "--feedback exact --feedback-jvp difference", 36),
        ("semimeta", "--feedback-jvp forward", 16),
        ("semimeta", "--feedback-jvp difference", 16),
    ],
)
def test_operations_against_pytorchs_counter(method, flags, learned):
    """A backward pass counts as two forward passes. PyTorch's counter knows that nobody needs the gradient of
    the images themselves: one forward pass through the first layer less, for each image that a network
    learned from."""
    each = build(*flags.split(), method=method)
    each.step(make_views(), 49)
    before = each.multiply_adds
    with FlopCounterMode(display=False) as counter:
        each.step(make_views(), 50)
    first_layer = 2 * 16 * 27 * 8 * 8
    assert 2 * (each.multiply_adds - before) == counter.get_total_flops() + learned * first_layer
