"""What the tests of methods share: a method on small images, and batches of views."""

import numpy as np
import torch
import torch.nn.functional as F
from conftest import teacher_file
from recorded import fuse

import main
from augmentation import Views
from engine.runtime import Runtime
from methods import METHODS

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


def weights(network):
    return torch.cat([p.detach().reshape(-1) for p in network.parameters()])


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


PLAIN_SGD = ("--momentum", 0, "--weight-decay", 0)  # the step that ``exact`` differentiates


def reduced(*flags):
    """In float64, with a perceptron that is no longer the identity: all of its layers have a gradient."""
    method = in_double(build(*flags, method="reduced-mpl"))
    head = method.teacher.network.head
    with torch.no_grad():
        head.weight.normal_(std=0.3)
        head.bias.normal_(std=0.3)
    return method


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
