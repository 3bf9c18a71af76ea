"""SemiMeta against differentiating through its step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from steps import build, double_views, in_double, mixed_by_hand, sgd_by_hand, smoothed_cross_entropy

from methods import feedback


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
