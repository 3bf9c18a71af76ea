"""Optimisers, passes that leave no trace, frozen bodies and scaled rates."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from steps import build, double_views, in_double, make_views, reduced, weights

from engine.learner import Learner
from engine.optimizers import muon, orthogonal, sgd
from engine.runtime import Runtime
from models import LinearHead, build_model
from utils import UserError


def test_no_weight_decay_on_batch_norm():
    network = build_model("wrn-10-1", 3, image_size=8)
    decayed, plain = sgd(network, 0.1, 0.9, True, 5e-4).param_groups
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert {id(p) for p in plain["params"]} == {id(p) for m in norms for p in m.parameters()}
    assert (decayed["weight_decay"], plain["weight_decay"]) == (5e-4, 0.0)
    assert len(decayed["params"]) + len(plain["params"]) == len(list(network.parameters()))


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
        network,
        Runtime("cpu"),
        optimizer=lambda network: sgd(network, 0.1, 0, False, 0),
        schedule=lambda _: 0.1,
    )
    torch.testing.assert_close(learner(values), expected(values))
    assert network[1].running_mean.eq(0.5).all() and network.training


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


def test_orthogonal_keeps_singular_vectors_and_sets_singular_values_to_about_1():
    for shape in ((6, 20), (20, 6), (8, 8)):
        u, _, vh = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
        result = orthogonal(u @ torch.linspace(0.2, 3, len(vh)).double().diag() @ vh)
        values = u.T @ result @ vh.T
        torch.testing.assert_close(values, values.diagonal().diag(), atol=1e-9, rtol=0)
        assert values.diagonal().min() > 0.65 and values.diagonal().max() < 1.25


def test_muon_against_its_formula():
    """Filters by their orthogonalised momentum at a fixed norm, the rest as SGD with Nesterov momentum."""
    layers = {"conv": torch.nn.Conv2d(2, 3, 3), "flat": torch.nn.Flatten(), "head": LinearHead(3, 2)}
    network = torch.nn.Sequential(OrderedDict(layers)).double()
    optimizer = muon(network, 0.1, 0.6, weight_decay=0.01)
    values = {name: p.detach().clone() for name, p in network.named_parameters()}
    momentum = {name: torch.zeros_like(p) for name, p in values.items()}
    for _ in range(3):
        optimizer.zero_grad()
        network(torch.randn(4, 2, 3, 3, dtype=torch.float64)).square().sum().backward()
        for name, p in network.named_parameters():
            filters = name == "conv.weight"
            g = p.grad if filters else p.grad + 0.01 * values[name]
            momentum[name] = 0.6 * momentum[name] + g
            update = g + 0.6 * momentum[name]
            if filters:
                values[name] = values[name] * 3**0.5 / values[name].norm()
                update = orthogonal(update.reshape(3, 18)).reshape(3, 2, 3, 3)
            values[name] = values[name] - 0.1 * update
        optimizer.step()
        for name, p in network.named_parameters():
            torch.testing.assert_close(p.detach(), values[name], rtol=1e-10, atol=1e-12)
