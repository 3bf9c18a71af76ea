"""A network with what trains it: forward passes, gradients in micro-batches, optimiser, schedule, EMA."""

import contextlib
import functools

import torch
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.profiler import record_function

from engine.checkpoint import average_key, load_state
from engine.norms import full_precision
from engine.optimizers import batch_norms, begin_momentum
from models import ModelEMA, count_flops
from utils import UserError


def phase(name):
    """Decorator: a profile shows the function's calls as this phase of a step (``benchmarks/profile.py``).

    Without a profiler it costs less than a microsecond, where ``record_function`` alone costs dozens.
    """

    def decorate(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            if not torch.autograd._profiler_enabled():
                return function(*args, **kwargs)
            with record_function(name):
                return function(*args, **kwargs)

        return call

    return decorate


class Learner:
    """A network with its optimiser, learning-rate schedule, gradient scaler and, if asked for, EMA.

    Args:
        network: moved to the device.
        runtime: where to run.
        optimizer: a function of the network on the device that returns its optimiser.
        schedule: the learning rate as a function of the step; each group of parameters learns at its
            ``scale`` times this (``parameter_groups``).
        grad_clip: bound of the gradient's norm, 0 for none.
        ema: decay of the moving average, or None for no average.
        input_shape: of one image, to count ``multiply_adds``; None counts nothing.
    """

    def __init__(self, network, runtime, *, optimizer, schedule, grad_clip=0.0, ema=None, input_shape=None):
        self.per_image = count_flops(network, input_shape) if input_shape else 0  # of one forward pass
        self.multiply_adds = 0  # of all passes so far in this process, see ``_count``
        self.network = runtime.place(network)
        self.compiled = runtime.compile(self.network)  # for passes without gradient, or of this process alone
        self.training_network = runtime.parallel(self.network)
        self.runtime, self.schedule, self.grad_clip = runtime, schedule, grad_clip
        self.optimizer = optimizer(self.network)
        self.scaler = runtime.grad_scaler()
        if isinstance(self.optimizer, torch.optim.SGD) and (
            runtime.kind == "xla" or self.scaler.is_enabled()
        ):
            begin_momentum(self.optimizer)
        self.ema = ModelEMA(self.network, ema) if ema is not None else None
        self.compiled_ema = runtime.compile(self.ema.network) if self.ema else None
        self.forward_mode = True  # False once an operation of the network had no forward derivative

    @property
    def parameters(self):
        """The parameters that learn, by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    @property
    def predictor(self):
        """The network that is evaluated: the EMA, where there is one."""
        return self.ema.network if self.ema else self.network

    @property
    def networks(self):
        """The network and, where there is one, its average."""
        return [self.network] + ([self.ema.network] if self.ema else [])

    @property
    def scales(self):
        """What the learning rate is multiplied by for each of ``parameters``, by name."""
        groups = self.optimizer.param_groups
        scales = {id(p): group.get("scale", 1.0) for group in groups for p in group["params"]}
        return {name: scales[id(p)] for name, p in self.parameters.items()}

    def _count(self, images, backward=True):
        """Count a pass and, where gradients are enabled, the backward pass behind it: two forward passes."""
        passes = 3 if backward and torch.is_grad_enabled() else 1
        self.multiply_adds += passes * len(images) * self.per_image

    # forward passes: (N, …) images → (N, K) logits, float32 (float64 where the network is)
    #
    #                    weights      batch norm, dropout                    graph
    #   learner(…)       own          as in training, statistics move        for ``backward``
    #   preview          own          as in training, statistics stay        none
    #   preview_at       given        as in training, statistics stay        in the given weights
    #   measure          own          the batch's statistics, no dropout     where gradients are enabled
    #   predict          own          running statistics, no dropout         where gradients are enabled
    #   predict_at       given        running statistics, no dropout         in the given weights
    #   predict_average  average      running statistics, no dropout         none

    @phase("forward")
    def __call__(self, images):
        """The training pass: the only one that moves the running statistics."""
        self._count(images)
        training_mode(self.network)
        with self.runtime.autocast():
            return full_precision(self.training_network(images))

    @phase("forward")
    @torch.no_grad()
    def preview(self, images):
        """The logits that the next training pass would give."""
        self._count(images)
        training_mode(self.network)
        with without_trace(self.network), self.runtime.autocast():
            return full_precision(self.compiled(images))

    def preview_at(self, parameters, images):
        """``preview`` at other weights, by name: in full precision, not compiled, for derivatives in them."""
        self._count(images, backward=False)
        training_mode(self.network)
        with without_trace(self.network):
            return full_precision(functional_call(self.network, parameters, (images,)))

    def measure(self, images):
        """For losses that are compared with each other. Gradients that no scaler protects: never in fp16."""
        self._count(images)
        training_mode(self.network)
        with without_trace(self.network, dropout=False), self.runtime.autocast(scaled=False):
            return full_precision(self.compiled(images))

    def predict(self, images):
        """As an evaluation sees the network. Gradients that no scaler protects: never in fp16."""
        self._count(images)
        self.network.eval()
        with self.runtime.autocast(scaled=False):
            return full_precision(self.compiled(images))

    def predict_at(self, parameters, images):
        """``predict`` at other weights, by name: in full precision, not compiled, for derivatives in them."""
        self._count(images, backward=False)
        self.network.eval()
        return full_precision(functional_call(self.network, parameters, (images,)))

    @phase("forward")
    @torch.no_grad()
    def predict_average(self, images):
        """``predict`` of the moving average."""
        self._count(images)
        with self.runtime.autocast():
            return full_precision(self.compiled_ema(images))

    # a step

    def rate_at(self, step):
        """The learning rate of a step, a ``Runtime.number``."""
        return self.runtime.number(self.schedule, step)

    @phase("backward")
    def backward(self, loss, batches):
        """Gradients of the mean loss, averaged over processes and unscaled, into the parameters' ``grad``.

        Args:
            loss: function of a micro-batch that returns its loss and a dict of scalars.
            batches: the micro-batches; only one of them has its graph in memory at a time.

        Returns:
            the means of the scalars, detached.
        """
        self.optimizer.zero_grad(set_to_none=True)
        rows = []
        for number, batch in enumerate(batches, 1):
            last = number == len(batches)
            with contextlib.nullcontext() if last else self.runtime.no_sync(self.training_network):
                value, scalars = loss(batch)
                self.scaler.scale(value / len(batches)).backward()
            rows.append(torch.stack([scalar.detach() for scalar in scalars.values()]))
        self.scaler.unscale_(self.optimizer)
        return dict(zip(scalars, torch.stack(rows).mean(dim=0), strict=True))

    @phase("update")
    def update(self, rate):
        """One optimiser step at ``rate`` (``rate_at``), scaled for each group, on the gradients of
        ``backward``, then the EMA."""
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("scale", 1.0)  # checkpoints of earlier versions have no scale
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.network)

    def learn(self, loss, batches, step):
        """``backward``, then ``update`` at the rate of the step; returns the means of the scalars."""
        scalars = self.backward(loss, batches)
        self.update(self.rate_at(step))
        return scalars

    def sync_statistics(self):
        """Average the running statistics over all processes, each of which keeps those of its own batches.

        Call it any time; after every step if a network in evaluation mode labels."""
        buffers = [buffer for network in self.networks for buffer in network.buffers()]
        self.runtime.all_reduce_mean([buffer for buffer in buffers if buffer.is_floating_point()])

    # saving

    def state_dict(self, role):
        """Under the keys of MPL-pytorch: ``ROLE_state_dict``, ``ROLE_optimizer``, ``ROLE_scaler``, and
        ``avg_state_dict`` for the student's moving average (``teacher_avg_state_dict`` for the teacher's)."""
        state = {
            f"{role}_state_dict": self.network.state_dict(),
            f"{role}_optimizer": self.optimizer.state_dict(),
            f"{role}_scaler": self.scaler.state_dict(),
        }
        if self.ema:
            state[f"{average_key(role)}_state_dict"] = self.ema.network.state_dict()
            state[f"{average_key(role)}_updates"] = self.ema.updates
        return state

    def load_state_dict(self, state, role, path):
        """Continue from ``state_dict(role)``; UserError, which names ``path``, where it does not fit."""
        try:
            load_state(self.network, state[f"{role}_state_dict"], path)
            self.optimizer.load_state_dict(state[f"{role}_optimizer"])
            if state[f"{role}_scaler"]:  # empty where the precision was another, without a scaler
                self.scaler.load_state_dict(state[f"{role}_scaler"])
            if self.ema:
                load_state(self.ema.network, state[f"{average_key(role)}_state_dict"], path)
                self.ema.updates.copy_(state[f"{average_key(role)}_updates"])
        except KeyError as error:
            raise UserError(
                f"{path} has no {error}: it was not written by this --method, --weak-pass and --switch-every"
            ) from error
        except ValueError as error:  # torch: groups of other parameters
            raise UserError(
                f"the optimiser in {path} is of another network, --freeze-body or --body-lr-scale"
            ) from error


# ---------------------------------------------------------------- networks in training


def training_mode(network):
    """Training mode, but for batch norm that does not learn: a frozen body keeps its running statistics."""
    network.train()
    for norm in batch_norms(network):
        if not norm.weight.requires_grad:
            norm.eval()


@contextlib.contextmanager
def without_trace(network, dropout=True):
    """Context in which passes leave a network as it was: batch norm normalises as before, its running
    statistics stay. Without ``dropout`` only batch norm stays in training mode."""
    modules, norms = list(network.modules()), batch_norms(network)
    training = [module.training for module in modules]
    tracking = [norm.track_running_stats for norm in norms]
    try:
        for module in modules if not dropout else ():
            module.training = module.training and isinstance(module, _BatchNorm)
        for norm in norms:
            norm.track_running_stats = False
        yield
    finally:
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        for norm, mode in zip(norms, tracking, strict=True):
            norm.track_running_stats = mode
