"""Supervised training."""

import copy

import torch
import torch.nn.functional as F
from steps import build, make_views, mixed_by_hand, smoothed_cross_entropy

from models import build_model


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
    assert optimizer.param_groups[0]["lr"] == method.student.schedule(0)


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
