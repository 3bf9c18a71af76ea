"""Pseudo labels of a fixed teacher."""

import copy

import pytest
import torch
import torch.nn.functional as F
from steps import build, double_views, in_double, smoothed_cross_entropy

from models import build_model


def decided_teacher(path, views):
    """A checkpoint whose average, unlike its student, names different classes for different images."""
    torch.manual_seed(4)
    student, average = (build_model("wrn-10-1", 3, image_size=8) for _ in range(2))
    for norm in (module for module in average.modules() if isinstance(module, torch.nn.BatchNorm2d)):
        norm.momentum = None  # running statistics are the mean over all batches
    with torch.no_grad():
        average(torch.cat([views.weak, views.strong]).float())
        average.head.weight.mul_(4)
    states = {"student_state_dict": student.state_dict(), "avg_state_dict": average.state_dict()}
    torch.save({"step": 0} | states, path)
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
