"""Reduced MPL: the perceptron and its gradient."""

import copy

import pytest
import torch
import torch.nn.functional as F
from steps import PLAIN_SGD, double_views, reduced, sgd_by_hand, smoothed_cross_entropy, weights

from methods.feedback import ESTIMATORS


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
