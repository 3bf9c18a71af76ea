"""Optimisers: the groups of parameters, SGD, RMSProp as in TensorFlow, and Muon."""

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from models import head_of


def batch_norms(network):
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


def parameter_groups(network, weight_decay, body_scale=1.0):
    """The parameters that learn, without weight decay on batch norm.

    Each group has a ``scale``, by which its learning rate is multiplied: ``body_scale`` for all but the head,
    in groups of their own where that is not 1.
    """
    plain = {id(p) for norm in batch_norms(network) for p in norm.parameters()}
    learning = [p for p in network.parameters() if p.requires_grad]
    parts = {1.0: learning}
    if body_scale != 1:
        head = {id(p) for p in head_of(network).parameters()}
        parts = {
            1.0: [p for p in learning if id(p) in head],
            body_scale: [p for p in learning if id(p) not in head],
        }
    groups = []
    for scale, part in parts.items():
        decayed, rest = [p for p in part if id(p) not in plain], [p for p in part if id(p) in plain]
        groups.append({"params": decayed, "weight_decay": weight_decay, "scale": scale})
        groups.append({"params": rest, "weight_decay": 0.0, "scale": scale})
    return groups


def sgd(network, rate, momentum, nesterov, weight_decay, body_scale=1.0):
    """SGD; on CUDA one kernel for each group, which can read the rate from a tensor (``Runtime.number``)."""
    groups = parameter_groups(network, weight_decay, body_scale)
    fused = next(network.parameters()).is_cuda or None
    nesterov = nesterov and momentum > 0
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=nesterov, fused=fused)

    def as_here(optimizer):  # whatever the device and the memory order where the state was saved
        for group in optimizer.param_groups:
            group["fused"] = fused
        for p, state in optimizer.state.items():
            buffer = state.get("momentum_buffer")
            if buffer is not None and buffer.stride() != p.stride():
                state["momentum_buffer"] = torch.empty_like(p).copy_(buffer)

    optimizer.register_load_state_dict_post_hook(as_here)
    return optimizer


def begin_momentum(optimizer):
    """Give SGD its momentum as zeros, which its first step otherwise makes of the gradient.

    Then the first step is the same operations as all others: XLA need not compile it by itself, and where the
    fp16 scaler skips it, as it often does, CUDA's kernel leaves zeros, not memory that nothing has written.
    """
    for group in optimizer.param_groups:
        for p in group["params"] if group["momentum"] else ():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


class RMSProp(torch.optim.Optimizer):
    """RMSProp as in TensorFlow, with which EfficientNet was published (Tan and Le, ICML 2019).

    From the gradient g of a parameter θ, weight decay included, with s one and m zero at the start:

        s ← 0.9 s + 0.1 g²,    m ← momentum · m + rate · g / √(s + 0.001),    θ ← θ − m.

    PyTorch's own starts with s zero, adds ε to the root and keeps the rate out of m: published rates, found
    with an ε that outweighs most g², mean other steps there.

    Args:
        groups: of parameters, each with its ``weight_decay``.
        rate: learning rate; ``lr`` of a group changes it.
        momentum: published 0.9.
    """

    DECAY, EPSILON = 0.9, 1e-3  # rmsprop_rho and rmsprop_epsilon in the published code

    def __init__(self, groups, rate, momentum):
        super().__init__(groups, {"lr": rate, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:  # as of batch norm in a network without it
                continue
            for p in parameters:
                if p not in self.state:
                    self.state[p] = {"square": torch.ones_like(p), "move": torch.zeros_like(p)}
            squares, moves = ([self.state[p][name] for p in parameters] for name in ("square", "move"))
            gradients = [p.grad for p in parameters]
            gradients = torch._foreach_add(gradients, parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(squares, self.DECAY)
            torch._foreach_addcmul_(squares, gradients, gradients, value=1 - self.DECAY)
            roots = torch._foreach_sqrt(torch._foreach_add(squares, self.EPSILON))
            torch._foreach_mul_(moves, group["momentum"])
            torch._foreach_addcdiv_(moves, gradients, roots, value=group["lr"])
            torch._foreach_sub_(parameters, moves)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024), for matrices and filters: momentum whose singular values are set to about 1.

    A filter of shape (out, in, h, w) is a matrix (out, in · h · w). From its gradient g and momentum m:

        m ← momentum · m + g,    W ← W · √out / ‖W‖ − rate · orthogonal(g + momentum · m).

    The norm of the weights is fixed, as batch norm behind them makes it meaningless: no weight decay. All
    other parameters (biases, batch norm, the head) take the step of SGD with Nesterov momentum.

    Args:
        groups: of parameters; a group with ``matrices`` holds filters and matrices.
        rate: learning rate; ``lr`` of a group changes it.
        momentum: published 0.6 for the networks of cifar10-airbench.
    """

    def __init__(self, groups, rate, momentum):
        super().__init__(groups, {"lr": rate, "momentum": momentum, "matrices": False})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            rate, momentum = group["lr"], group["momentum"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                gradient = p.grad
                if not group["matrices"]:
                    gradient = gradient + group["weight_decay"] * p
                if p not in self.state:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffer = self.state[p]["momentum_buffer"]
                buffer.mul_(momentum).add_(gradient)
                update = gradient + momentum * buffer
                if group["matrices"]:
                    p.mul_(len(p) ** 0.5 / p.norm())
                    update = orthogonal(update.flatten(1)).view_as(p)
                p.sub_(rate * update)


def orthogonal(matrix, steps=5):
    """A matrix (M, N) with the singular vectors of the given one, whose singular values are all about 1.

    By the Newton–Schulz iteration of Muon, X ← a X + (b A + c A²) X with A = X Xᵀ, which brings singular
    values between 0 and 1 to 0.7 to 1.2 in five steps.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # published: steep at zero
    wide = matrix.shape[0] <= matrix.shape[1]
    x = matrix if wide else matrix.T
    x = x / x.norm().clamp_min(1e-7)
    for _ in range(steps):
        product = x @ x.T
        x = a * x + (b * product + c * product @ product) @ x
    return x if wide else x.T


def muon(network, rate, momentum, weight_decay, body_scale=1.0):
    """``Muon`` for the convolutions and matrices of a network but its head."""
    head, groups = {id(p) for p in head_of(network).parameters()}, []
    for group in parameter_groups(network, weight_decay, body_scale):
        matrices = [p for p in group["params"] if p.ndim >= 2 and id(p) not in head]
        chosen = {id(p) for p in matrices}
        rest = [p for p in group["params"] if id(p) not in chosen]
        groups += [group | {"params": matrices, "matrices": True}, group | {"params": rest}]
    return Muon([group for group in groups if group["params"]], rate, momentum)
