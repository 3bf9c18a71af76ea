"""How the student's labelled loss reaches the teacher: taylor, dot, exact.

The teacher should minimise J(θ_T) = CE(y_l, S(x_l; θ_S')), the student's labelled loss after its step
θ_S' = θ_S − η s ∇ CE(q, S(x_u; θ_S)) on the teacher's pseudo labels q, where s is 1 or, with
``--body-lr-scale`` and for each parameter of the body, that factor. Each estimator looks at one
``StudentStep``, before and after it, and returns a *value*; ``feedback_term`` makes of it the term of the
teacher's loss:

    estimator   value                                        term, with q = softmax(T(x_u))
    taylor      h = L_old − L_new,                  ()       h · CE(ŷ, T(x_u))
    dot         h = η ⟨s ∇L_new, ∇CE(ŷ, S(x_u))⟩,   ()       h · CE(ŷ, T(x_u))
    exact       ∂J/∂q = (η/N) · D,                  (N, K)   Σ q · ∂J/∂q

In the student's pass on x_u the labelled images stand behind x_u, seen by batch norm alone; exact
differentiates that pass. T(x_u) are the logits that the labels were made of: with ``--align`` the aligned
ones, the bias a constant. The scalar forms are the REINFORCE estimate of the gradient for a hard label ŷ ~ q
(paper, equation 12 and appendix A); exact is the gradient of J itself for soft labels. In each of them the
labelled losses are measured on the same images, normalised by the same rule (their own batch statistics),
without dropout, and nothing is left behind: running statistics, random state and parameters are as before.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.func import jvp

from engine.learner import Learner, phase
from utils import UserError


@dataclass
class StudentStep:
    """One step of the student, as an estimator sees it: N unlabelled and B labelled images, K classes."""

    student: Learner  # at θ_S before its step, at θ_S' after it
    images_u: torch.Tensor  # (N, …) the images that the student learned from
    images_l: torch.Tensor  # (B, …) labelled images, which stood behind them in its pass
    targets: torch.Tensor  # (B,) int64
    rate: float  # η, the student's learning rate in this step; a () tensor while a step is captured
    random_state: dict  # of the runtime, before the student's pass: to draw the same dropout again
    label_smoothing: float = 0.0  # α: the student learned (1 − α)·q + α/K
    micro_batches: int = 1  # the batch was taken in so many parts, each normalised by itself
    jvp: str = "auto"  # how exact differentiates: forward, difference or auto, see there


def copies(tensors):
    """Detached copies of a dict of tensors, in a few kernel launches for all of them."""
    with torch.no_grad():
        return dict(zip(tensors, torch._foreach_mul(list(tensors.values()), 1.0), strict=True))


# ---------------------------------------------------------------- measuring


@phase("feedback")
def labeled_loss(step):
    """CE(y_l, S(x_l)), (), of this process's labelled images and the student as it is now."""
    logits = [step.student.measure(part) for part in step.images_l.chunk(step.micro_batches)]
    return F.cross_entropy(torch.cat(logits), step.targets)


@phase("feedback")
def labeled_gradient(student, forward, images, targets, parts=1):
    """v = s ∇ CE(y_l, S(x_l)) by parameter name, averaged over all processes; s is each parameter's scale of
    the learning rate, so that a plain step moves the loss by −η ⟨v, its gradient⟩.

    Args:
        student: the Learner.
        forward: its forward pass, (B, …) images → (B, K) logits.
        images, targets: (B, …) and (B,) int64, taken in ``parts`` equal parts, one graph in memory at a time.
    """
    parameters, scales, gradient = student.parameters, student.scales, None
    for part, classes in zip(images.chunk(parts), targets.chunk(parts), strict=True):
        loss = F.cross_entropy(forward(part), classes) / parts
        added = torch.autograd.grad(loss, list(parameters.values()))
        gradient = added if gradient is None else torch._foreach_add(gradient, added)
    if set(scales.values()) != {1.0}:
        gradient = torch._foreach_mul(gradient, list(scales.values()))
    return dict(zip(parameters, student.runtime.all_reduce_mean(list(gradient)), strict=True))


def gradient_after(step):
    """v = s ∇ CE(y_l, S(x_l; θ_S')) by parameter name, averaged over all processes."""
    student = step.student
    return labeled_gradient(student, student.measure, step.images_l, step.targets, step.micro_batches)


@phase("feedback")
def directional_derivative(function, at, direction, student, *, how="auto", epsilon=None):
    """d/dt function(``at`` + t · ``direction``) at t = 0, of the shape of the function's value.

    Args:
        function: of a dict of the student's parameters by name, to a tensor; not under autocast, where
            tangents lose their dtype and a difference of bf16 values would be rounding.
        at, direction: dicts of tensors by name, without gradient.
        student: the Learner, which remembers whether its network has a forward derivative.
        how: ``forward`` (forward-mode differentiation), ``difference`` (central difference) or ``auto``:
            forward where every operation has a forward derivative, else difference (fused attention has
            none). The first call finds out.
        epsilon: ε of the central difference ‖v‖ · (f(θ + ε v̂) − f(θ − ε v̂)) / 2ε, θ being ``at``, v the
            direction and v̂ = v/‖v‖. None: the cube root of the machine precision, where rounding and
            curvature weigh about the same (float32: 0.005, float64: 6e-6).

    Raises:
        UserError: ``forward``, and an operation has no forward derivative.
    """
    runtime, random_state = student.runtime, student.runtime.rng_state()
    if how == "forward" or (how == "auto" and student.forward_mode):
        try:
            counted = student.multiply_adds
            derivative = jvp(function, (at,), (direction,))[1]
            student.multiply_adds += 2 * (student.multiply_adds - counted)  # two tangents
            return derivative
        except NotImplementedError as error:  # "Trying to use forward AD with … that does not support it"
            if how == "forward":
                raise UserError(
                    "--feedback-jvp forward, but an operation of the student has no forward derivative: use "
                    "auto or difference"
                ) from error
            student.forward_mode = False
    norm = torch.stack([tensor.square().sum() for tensor in direction.values()]).sum().sqrt()
    epsilon = epsilon or torch.finfo(norm.dtype).eps ** (1 / 3)
    scale = epsilon / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def moved(sign):
        there = {name: tensor + sign * scale * direction[name] for name, tensor in at.items()}
        # both passes draw the same dropout masks
        with torch.no_grad(), runtime.replay(random_state), runtime.full_float32():
            return function(there)

    return (moved(+1) - moved(-1)) * (norm / (2 * epsilon))


# ---------------------------------------------------------------- the estimators
#
# One object for each step of the student: ``before(step)`` is called when its gradients are there and its
# weights are not updated yet, ``after(step)`` returns the value.


class Taylor:
    """h = L_old − L_new: how much the student's step lowered its labelled loss, ().

    The difference is of the step that was really taken, with momentum, weight decay and clipping: to first
    order in η, and for a plain step, it is ``dot`` (paper, appendix A). Cost: two forward passes on x_l.

    With ``--student-labeled-weight`` this step is also on the labels, and h includes what they brought. To
    first order in η that is the same whatever the pseudo labels: over sampled ones its part in the teacher's
    gradient is zero on average, and ``--feedback-momentum`` subtracts it.
    """

    per_class = False  # the value is a scalar

    @torch.no_grad()
    def before(self, step):
        self.loss = labeled_loss(step)

    @torch.no_grad()
    def after(self, step):
        losses = torch.stack([self.loss, labeled_loss(step)])
        old, new = step.student.runtime.all_reduce_mean([losses])[0]
        return old - new


class Dot:
    """h = η · ⟨s ∇ CE(y_l, S(x_l; θ_S')), ∇ CE(ŷ, S(x_u; θ_S))⟩, () (paper, equation 12).

    The derivative of L_old − L_new along the plain step −ηs∇CE: momentum, weight decay and clipping are not
    part of it; the gradient of the labelled images with ``--student-labeled-weight`` is, as in ``Taylor``.
    Cost: one forward and backward pass on x_l.
    """

    per_class = False

    def before(self, step):
        # over all processes, and before the update clips it
        self.gradient = copies({name: p.grad for name, p in step.student.parameters.items()})

    def after(self, step):
        v = gradient_after(step)
        product = torch.stack([(v[name] * self.gradient[name]).sum() for name in v]).sum()
        return step.student.runtime.scalar(step.rate) * product


class Exact:
    """∂J/∂q, the gradient of the student's labelled loss with respect to its pseudo labels, (N, K).

    The gradient of CE(q, S(x_u)) is linear in q, so that differentiating J through the plain step −ηs∇CE
    needs no graph of a gradient: with v = s ∇ CE(y_l, S(x_l; θ_S')),

        ∂J/∂q[i, k] = (η/N) · D[i, k],    D = ∂/∂ε log_softmax(S(x_u; θ_S + ε v)) at ε = 0,

    times 1 − α where the student's labels were smoothed by α. The labelled images in its loss
    (``--student-labeled-weight``) change θ_S' and thereby v, but no derivative in q.

    Momentum, weight decay and clipping are not part of the step that is differentiated. N is the number of
    images in this process's micro-batch: averaging the teacher's gradient over micro-batches and processes
    gives the rest.

    ``step.jvp`` says how D is computed, see ``directional_derivative``.

    Cost: one forward and backward pass on x_l, and on x_u and x_l one pass with tangents (about three forward
    passes) or two forward passes.

    Raises:
        UserError: ``forward``, and an operation of the network has no forward derivative.
    """

    per_class = True  # the value has an entry for each image and class

    def before(self, step):
        self.parameters = copies(step.student.parameters)  # θ_S

    def after(self, step):
        student, v = step.student, gradient_after(step)

        def log_probabilities(parameters):
            return F.log_softmax(student_logits(step, parameters), dim=1)

        with student.runtime.replay(step.random_state):
            derivative = directional_derivative(log_probabilities, self.parameters, v, student, how=step.jvp)
        factor = (1 - step.label_smoothing) * step.rate / (len(step.images_u) // step.micro_batches)
        return student.runtime.scalar(factor) * derivative


ESTIMATORS = {"taylor": Taylor, "dot": Dot, "exact": Exact}  # the names are choices of --feedback


def student_logits(step, parameters):
    """S(x_u; ``parameters``), (N, K), of a pass like the step's own: batch norm sees x_l behind x_u."""
    pairs = zip(*(images.chunk(step.micro_batches) for images in (step.images_u, step.images_l)), strict=True)
    return torch.cat([step.student.preview_at(parameters, torch.cat(pair))[: len(pair[0])] for pair in pairs])


# ---------------------------------------------------------------- the teacher's side


def feedback_term(value, logits, labels, *, reduction="sum", parts=1):
    """The term of the teacher's loss whose gradient is the feedback, ().

    Args:
        value: () from ``Taylor`` or ``Dot``, or (N, K) from ``Exact``.
        logits: (N, K), the teacher's, with gradient, of the view that gave the labels.
        labels: (N, K) distributions, the pseudo labels that the student learned, detached.
        reduction: of the scalar forms' cross-entropies over images. ``sum`` is the log likelihood of all
            labels together and makes the term an unbiased estimate of ∇J; ``mean`` is smaller by the number
            of images and what the published code does. ``exact`` needs no choice.
        parts: number of micro-batches and processes, of N images each, over which the teacher's gradient is
            averaged.
    """
    log_q = F.log_softmax(logits, dim=1)
    if value.ndim == 2:
        return (log_q.exp() * value).sum()
    cross_entropy = -(labels * log_q).sum(dim=1)
    return value * (cross_entropy.mean() if reduction == "mean" else parts * cross_entropy.sum())
