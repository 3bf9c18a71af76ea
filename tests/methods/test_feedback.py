"""The feedback against references: differentiating through the step, enumeration, constructed problems."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchvision.models import VisionTransformer
from torchvision.models.efficientnet import EfficientNet, MBConvConfig
from torchvision.ops import StochasticDepth

from engine.learner import Learner
from engine.optimizers import sgd
from engine.runtime import Runtime
from methods import feedback
from methods.feedback import ESTIMATORS, StudentStep, feedback_term
from models import build_model
from utils import UserError


class Small(nn.Module):
    """A convolution, optionally batch norm and dropout, a linear layer."""

    def __init__(self, num_classes, norm=True, dropout=0.0):
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(4, num_classes)

    def forward(self, x):
        x = torch.tanh(self.norm(self.convolution(x)))
        return self.head(self.dropout(x.mean((2, 3))))


def problem(num_classes=3, n=6, batch=4, norm=True, dropout=0.0, dtype=torch.float64, seed=0, size=5):
    """A student, its images, and the teacher's logits."""
    torch.manual_seed(seed)
    network = Small(num_classes, norm, dropout).to(dtype).train()
    return {
        "network": network,
        "images_u": torch.randn(n, 3, size, size, dtype=dtype),
        "images_l": torch.randn(batch, 3, size, size, dtype=dtype),
        "targets": torch.randint(num_classes, (batch,)),
        "logits": torch.randn(n, num_classes, dtype=dtype, requires_grad=True),
    }


def take_step(
    problem,
    labels,
    rate,
    smoothing=0.0,
    runtime=None,
    jvp="auto",
    body_scale=1.0,
    parts=1,
    estimators=ESTIMATORS,
):
    """One plain SGD step of a copy of the student on ``labels``: a StudentStep with ``estimators`` that
    have looked at it before; in its pass the labelled images stand behind the unlabelled ones, in each of
    its equal ``parts``."""
    runtime = runtime or Runtime("cpu")
    student = Learner(
        copy.deepcopy(problem["network"]),
        runtime,
        optimizer=lambda network: sgd(network, rate, 0.0, False, 0.0, body_scale),
        schedule=lambda step: rate,
    )
    names = ("images_u", "images_l", "targets")
    given = (*(problem[name] for name in names), rate, runtime.rng_state(), smoothing)
    step = StudentStep(student, *given, micro_batches=parts, jvp=jvp)

    def loss(part):
        images_u, images_l, labels = part
        log_p = F.log_softmax(student(torch.cat([images_u, images_l]))[: len(labels)], dim=1)
        targets = labels * (1 - smoothing) + smoothing / labels.shape[1]
        loss = -(targets * log_p).sum(1).mean()
        return loss, {"loss": loss}

    each = (problem["images_u"], problem["images_l"], labels)
    student.backward(loss, list(zip(*(tensor.chunk(parts) for tensor in each), strict=True)))
    step.estimators = {name: ESTIMATORS[name]() for name in estimators}
    for estimator in step.estimators.values():
        estimator.before(step)
    student.update(rate)
    student.optimizer.zero_grad()
    return step


def value_of(name, step):
    return step.estimators[name].after(step)


taylor, dot, exact = (functools.partial(value_of, name) for name in ("taylor", "dot", "exact"))


def tiny_efficientnet():
    """Three blocks of torchvision's EfficientNet, the last two of which are often left out in training."""
    blocks = [MBConvConfig(1, 3, 1, 32, 16, 1, 0.25, 1), MBConvConfig(4, 3, 1, 16, 16, 2, 0.25, 1)]
    network = EfficientNet(blocks, dropout=0.0, stochastic_depth_prob=0.9, num_classes=3)
    for module in network.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # as in build_model
    return network


def through_the_step(problem, rate, smoothing=0.0, seed=None, body_scale=1.0, parts=1):
    """dJ/dlogits by differentiating through the student's step with a graph of the gradient; all parameters
    but the head's move by ``body_scale`` times as much. Each of the ``parts`` is normalised by itself."""
    network, logits = problem["network"], problem["logits"]
    parameters = {name: p.detach().clone().requires_grad_() for name, p in network.named_parameters()}

    def forward(parameters, images):
        buffers = {name: b.clone() for name, b in network.named_buffers()}
        return functional_call(network, (parameters, buffers), (images,))

    labels = F.softmax(logits, dim=1)
    labels = labels * (1 - smoothing) + smoothing / labels.shape[1]
    if seed is not None:
        torch.manual_seed(seed)
    pairs = zip(*(problem[name].chunk(parts) for name in ("images_u", "images_l")), strict=True)
    on_unlabeled = [forward(parameters, torch.cat(pair))[: len(pair[0])] for pair in pairs]
    log_p = F.log_softmax(torch.cat(on_unlabeled), dim=1)
    loss = -(labels * log_p).sum(1).mean()
    gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    after = {
        name: p - rate * (1.0 if name.startswith("head.") else body_scale) * g
        for (name, p), g in zip(parameters.items(), gradient, strict=True)
    }
    dropout = [m for m in network.modules() if isinstance(m, (nn.Dropout, StochasticDepth))]
    for module in dropout:
        module.eval()
    on_labeled = torch.cat([forward(after, part) for part in problem["images_l"].chunk(parts)])
    objective = F.cross_entropy(on_labeled, problem["targets"])
    for module in dropout:
        module.train()
    return torch.autograd.grad(objective, logits)[0]


def gradient_of(value, problem, labels, **options):
    term = feedback_term(value, problem["logits"], labels, **options)
    return torch.autograd.grad(term, problem["logits"])[0]


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


SIZES = ((1, 1), (6, 4), (20, 20))
CASES = [(norm, k, n, batch) for norm in (True, False) for k in (3, 10) for n, batch in SIZES]


@pytest.mark.parametrize(("norm", "num_classes", "n", "batch"), CASES)
@pytest.mark.parametrize(
    ("mode", "dtype", "tolerance"),
    [
        ("forward", torch.float64, 1e-10),
        ("difference", torch.float64, 1e-4),
        ("difference", torch.float32, 1e-2),
    ],
)
def test_exact_is_the_gradient_through_the_step(norm, num_classes, n, batch, mode, dtype, tolerance):
    p = problem(num_classes, n, batch, norm, dtype=dtype)
    labels = F.softmax(p["logits"].detach(), dim=1)
    step = take_step(p, labels, 0.3, jvp=mode)
    reference = through_the_step(p, 0.3)
    assert reference.norm() > 0
    assert relative_error(gradient_of(exact(step), p, labels), reference) < tolerance


def test_exact_of_a_wide_residual_network():
    """Leaky ReLU, batch norm, residual connections: the network that is trained, in double precision."""
    p = problem(n=4, batch=3, size=8)
    p["network"] = build_model("wrn-10-1", 3, image_size=8).double().train()
    labels = F.softmax(p["logits"].detach(), dim=1)
    step = take_step(p, labels, 0.05)
    assert relative_error(gradient_of(exact(step), p, labels), through_the_step(p, 0.05)) < 1e-10


@pytest.mark.parametrize(("mode", "tolerance"), [("forward", 1e-10), ("difference", 1e-4)])
def test_the_feedback_of_a_body_with_a_rate_of_its_own(mode, tolerance):
    """exact against the reference; dot is exact's gradient along the labels; taylor comes to dot."""
    p = problem()
    labels = F.softmax(p["logits"].detach(), dim=1)
    step = take_step(p, labels, 0.3, jvp=mode, body_scale=0.1)
    reference = through_the_step(p, 0.3, body_scale=0.1)
    assert relative_error(through_the_step(p, 0.3), reference) > 1e-2  # the scale matters
    assert relative_error(gradient_of(exact(step), p, labels), reference) < tolerance
    assert relative_error(dot(step), -(exact(step) * labels).sum()) < tolerance
    step = take_step(p, labels, 1e-5, body_scale=0.1)
    assert relative_error(taylor(step), dot(step)) < 1e-3


@pytest.mark.parametrize(("mode", "tolerance"), [("forward", 1e-10), ("difference", 1e-4)])
def test_the_feedback_of_a_batch_in_parts_that_batch_norm_sees_one_by_one(mode, tolerance):
    """exact, averaged over the parts, against the reference; dot is its gradient along the labels, to which
    taylor comes."""
    p = problem()
    labels = F.softmax(p["logits"].detach(), dim=1)
    step = take_step(p, labels, 0.3, jvp=mode, parts=2)
    reference = through_the_step(p, 0.3, parts=2)
    assert relative_error(through_the_step(p, 0.3), reference) > 1e-2  # the parts matter
    assert relative_error(gradient_of(exact(step), p, labels) / 2, reference) < tolerance
    assert relative_error(dot(step), -(exact(step) * labels).sum() / 2) < tolerance
    step = take_step(p, labels, 1e-5, parts=2)
    assert relative_error(taylor(step), dot(step)) < 1e-3


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 1e-2)])
def test_exact_finds_out_that_a_vision_transformer_has_no_forward_mode(dtype, tolerance):
    """Differentiating through the step needs the attention that is not fused, which has all derivatives."""
    p = problem(size=8, dtype=dtype)
    p["network"] = VisionTransformer(8, 4, num_layers=2, num_heads=2, hidden_dim=8, mlp_dim=16, num_classes=3)
    nn.init.normal_(p["network"].heads.head.weight)  # torchvision starts it at zero
    p["network"].to(dtype).train()
    labels = F.softmax(p["logits"].detach(), dim=1)
    step = take_step(p, labels, 0.3)
    with sdpa_kernel(SDPBackend.MATH):
        reference = through_the_step(p, 0.3)
    assert reference.norm() > 1e-4
    assert relative_error(gradient_of(exact(step), p, labels), reference) < tolerance
    assert not step.student.forward_mode


def test_exact_with_label_smoothing_and_the_same_dropout():
    p = problem(dropout=0.5, n=12)
    labels = F.softmax(p["logits"].detach(), dim=1)
    torch.manual_seed(7)
    step = take_step(p, labels, 0.3, smoothing=0.2)
    reference = through_the_step(p, 0.3, smoothing=0.2, seed=7)
    torch.manual_seed(99)  # whatever was drawn in between
    assert relative_error(gradient_of(exact(step), p, labels), reference) < 1e-10
    step.jvp = "difference"
    assert relative_error(gradient_of(exact(step), p, labels), reference) < 1e-4
    assert relative_error(through_the_step(p, 0.3, smoothing=0.2, seed=8), reference) > 1e-2  # masks matter


def test_exact_with_stochastic_depth():
    """The blocks that the step left out of each image are left out again, and none in the labelled loss."""
    p = problem(n=12, size=8)
    p["network"] = tiny_efficientnet().double().train()
    labels = F.softmax(p["logits"].detach(), dim=1)
    torch.manual_seed(7)
    step = take_step(p, labels, 0.3)
    reference = through_the_step(p, 0.3, seed=7)
    torch.manual_seed(99)  # whatever was drawn in between
    assert relative_error(gradient_of(exact(step), p, labels), reference) < 1e-10
    step.jvp = "difference"
    assert relative_error(gradient_of(exact(step), p, labels), reference) < 1e-4
    assert relative_error(through_the_step(p, 0.3, seed=8), reference) > 1e-2  # what is left out matters
    assert taylor(take_step(p, labels, 0.0)) == 0


def test_exact_falls_back_where_forward_mode_is_missing():
    class NoForwardMode(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return x.sin()

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(*inputs)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0].cos()

    class Student(Small):
        def forward(self, x):
            return NoForwardMode.apply(super().forward(x))

    p = problem()
    p["network"] = Student(3).double().train()
    labels = F.softmax(p["logits"].detach(), dim=1)
    step = take_step(p, labels, 0.3)
    assert relative_error(gradient_of(exact(step), p, labels), through_the_step(p, 0.3)) < 1e-4
    assert not step.student.forward_mode  # the next step does not try again
    step.jvp = "forward"
    with pytest.raises(UserError, match=r"--feedback-jvp forward.*auto or difference"):
        exact(step)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_nothing_is_left_behind(name):
    p = problem(dropout=0.5)
    step = take_step(p, F.softmax(p["logits"].detach(), dim=1), 0.3, estimators=[name])
    state = {key: tensor.clone() for key, tensor in step.student.network.state_dict().items()}
    modes = [module.training for module in step.student.network.modules()]
    random_state = torch.get_rng_state()
    value_of(name, step)
    for key, tensor in step.student.network.state_dict().items():
        assert torch.equal(tensor, state[key]), key
    assert [module.training for module in step.student.network.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in step.student.network.parameters())


@pytest.mark.parametrize("name", ESTIMATORS)
def test_autocast_is_near_full_precision(name, bf16):
    p = problem(dtype=torch.float32, n=16, batch=16)
    labels = F.softmax(p["logits"].detach(), dim=1)
    full = value_of(name, take_step(p, labels, 2.0))
    mixed = value_of(name, take_step(p, labels, 2.0, runtime=Runtime("cpu", amp=True)))
    assert mixed.dtype == torch.float32
    assert 0 < relative_error(mixed, full) < 0.1


# ---------------------------------------------------------------- the scalar forms


def every_labelling(n, num_classes):
    grids = torch.meshgrid(*[torch.arange(num_classes)] * n, indexing="ij")
    return torch.stack([grid.reshape(-1) for grid in grids], dim=1)


def test_sampled_dot_is_unbiased():
    """The mean over sampled labels is the gradient of the enumerated expectation Σ P(ŷ) · (−h(ŷ))."""
    n, k = 3, 3
    p = problem(k, n, batch=4, norm=False)
    logits = p["logits"]
    log_q = F.log_softmax(logits, dim=1)
    labellings = every_labelling(n, k)  # (27, 3)
    h = torch.stack([dot(take_step(p, F.one_hot(y, k).double(), 0.5)) for y in labellings])
    log_probability = log_q[torch.arange(n), labellings].sum(1)
    expected = torch.autograd.grad(-(log_probability.exp() * h).sum(), logits)[0]

    each = torch.stack(
        [gradient_of(value, p, F.one_hot(y, k).double()) for y, value in zip(labellings, h, strict=True)]
    )
    samples = 40_000
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(log_probability.exp().detach(), samples, True, generator=generator)
    estimates = each[drawn]
    error = estimates.std(0) / samples**0.5
    assert (estimates.mean(0) - expected).abs().le(4 * error).all()
    assert expected.abs().gt(8 * error).any()  # the bound can tell the gradient from zero


def test_taylor_converges_to_dot():
    """(taylor − dot) / rate vanishes linearly with the rate: slope 1 on logarithmic axes."""
    p = problem(norm=True)
    labels = F.one_hot(torch.randint(3, (6,)), 3).double()
    rates = torch.logspace(-1, -4, 7, dtype=torch.float64)
    gaps = []
    for rate in rates.tolist():
        step = take_step(p, labels, rate)
        gaps.append((taylor(step) - dot(step)).abs() / rate)
    x, y = rates.log(), torch.stack(gaps).log()
    slope = ((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()
    assert 0.9 < slope < 1.1
    assert gaps[-1] < 1e-2 * taylor(take_step(p, labels, 1.0)).abs()


def helpful_problem():
    """One unlabelled image equal to a labelled one of class 0: teaching class 0 helps, class 1 hurts."""
    p = problem(2, 1, 1, norm=False)
    p["images_l"] = p["images_u"].clone()
    p["targets"] = torch.tensor([0])
    p["logits"] = torch.zeros(1, 2, dtype=torch.float64, requires_grad=True)
    return p


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("taught", [0, 1])
def test_sign(name, taught):
    """Descending the term raises the probability of the class that helps; flipped, it lowers it."""
    p = helpful_problem()
    labels = F.one_hot(torch.tensor([taught]), 2).double()
    value = value_of(name, take_step(p, labels, 0.5, estimators=[name]))

    def probability_after(value):
        logits = p["logits"].detach() - 0.5 * gradient_of(value, p, labels)
        return F.softmax(logits, dim=1)[0, 0]

    assert probability_after(value) > 0.5
    assert probability_after(-value) < 0.5


def test_soft_labels_with_a_scalar_feedback_have_no_gradient():
    """The published code multiplies CE(softmax(z) detached, z), whose gradient in z is zero."""
    p = problem()
    labels = F.softmax(p["logits"].detach(), dim=1)
    value = taylor(take_step(p, labels, 0.5))
    assert value.abs() > 1e-4
    assert gradient_of(value, p, labels).abs().max() < 1e-15


def test_mean_is_sum_over_images():
    p = problem()
    labels = F.one_hot(torch.randint(3, (6,)), 3).double()
    value = dot(take_step(p, labels, 0.5))
    torch.testing.assert_close(
        6 * gradient_of(value, p, labels, reduction="mean"), gradient_of(value, p, labels, reduction="sum")
    )


def test_measured_under_the_same_normalisation():
    """Without a step both labelled losses are the same to the last bit, whatever the running statistics."""
    p = problem()
    p["network"].norm.running_mean += 3.0
    step = take_step(p, F.softmax(p["logits"].detach(), dim=1), 0.0)
    assert taylor(step) == 0
    assert feedback.labeled_loss(step) > 0
