"""The training step of each method: supervised, uda, fixmatch, pseudo-label, mpl, reduced-mpl, semimeta.

A method owns its networks with what trains them (``learner.py``). ``step`` takes one step on the ``Views`` of
one batch and returns a dict of scalar tensors for the meters, without waiting for the device. ``predictor``
is the network that is evaluated, ``state_dict`` all that continuing needs. Plain attributes such as
``uses_unlabeled`` say what a method uses. A step that is asked to ``diagnose`` also measures what is too
expensive for every step, into ``diagnostics``.
"""

import argparse
import contextlib
import functools
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F

import feedback
from augmentation import Views, mixup, mixup_shares, neighbours
from evaluation import stored_predictions
from learner import Learner, RMSProp, parameter_groups, sgd
from loader import to_device
from models import LabelPerceptron, build_model
from runtime import UserError
from utils import learning_rate, load_state, predictor_state, ramp_up, tell

# ---------------------------------------------------------------- losses


def soft_cross_entropy(labels, logits, label_smoothing=0.0):
    """Cross-entropy of each image against a distribution, (N,); labels and logits are (N, K)."""
    if label_smoothing:
        labels = labels * (1 - label_smoothing) + label_smoothing / labels.shape[1]
    return -(labels * F.log_softmax(logits, dim=1)).sum(dim=1)


UDA_LOSSES = {  # of each image, (N,); the names are the choices of --uda-loss
    "ce": soft_cross_entropy,
    "cos": lambda targets, logits: -F.cosine_similarity(targets, F.softmax(logits, dim=1), dim=1),
}


def uda_loss(targets, strong_logits, weights, kind="ce"):
    """Unsupervised data augmentation: weight · CE(target, strong), the mean over all N images, ().

    Args:
        targets: (N, K) distributions, of the weak view, without gradient.
        strong_logits: (N, K).
        weights: (N,), 0 to 1: how much an image counts.
        kind: ``cos``: the negative cosine between target and prediction in place of their cross-entropy
            (TransferMPL).
    """
    return (weights * UDA_LOSSES[kind](targets, strong_logits)).mean()


def largest_probability(logits):
    """Confidence of each image's prediction, (N,), from logits (N, K)."""
    return F.softmax(logits, dim=1).amax(dim=1)


def pseudo_labels(logits, kind):
    """The teacher's labels for the student, (N, K) distributions without gradient, from logits (N, K).

    ``argmax``: the most probable class, one-hot. ``sample``: one class drawn from the prediction (the
    paper's ŷ ~ T(x_u)), one-hot. ``soft``: the prediction itself (the published code, of the strong view).
    """
    logits = logits.detach()
    if kind == "soft":
        return F.softmax(logits, dim=1)
    if kind == "sample":  # Gumbel's trick: argmax of log p + g, on the device, without a wait
        logits = logits - torch.empty_like(logits).exponential_().log()
    return F.one_hot(logits.argmax(dim=1), logits.shape[1]).to(logits.dtype)


def pseudo_label_accuracy(labels, truth):
    """Share of pseudo labels (N, K) whose class is the true one, of the images whose truth (N,) is known."""
    known = truth >= 0
    return ((labels.argmax(dim=1) == truth) & known).sum() / known.sum().clamp_min(1)


class DistributionAlignment:
    """Distribution alignment: a bias per class that brings the mean prediction on the weak views to a target.

    Consistency alone cannot recover a cluster that few labels assigned to a neighbouring class. The bias,
    added to the teacher's logits wherever they become targets or pseudo labels, does: each step moves it by
    rate · log(target / m), m the mean of the aligned predictions of the batch. Rate 1 is one iteration of
    Sinkhorn's algorithm; a lower one smooths over batches. The target is uniform, for classes of equal size,
    or the labelled images' distribution. For batches with many unlabelled images per class (ten, say): of
    fewer the logarithm of m is mostly noise. After ReMixMatch (Berthelot et al., ICLR 2020), which aims at
    the labelled images' distribution, and Sinkhorn Label Allocation (Tai et al., ICML 2021).

    Args:
        rate: of the bias, 0 for none.
        num_classes: K.
        runtime: where to run.
        target: K shares of the classes, all above 0; None: equal ones.
    """

    def __init__(self, rate, num_classes, runtime, target=None):
        self.rate, self.runtime = rate, runtime
        self.bias = torch.zeros(num_classes, device=runtime.device)
        odds = [num_classes] * num_classes if target is None else [1 / share for share in target]
        self.per_share = torch.tensor(odds, dtype=self.bias.dtype, device=runtime.device)

    def __call__(self, logits):
        """Logits (N, K) of the aligned predictions; the bias is a constant to their gradient."""
        return logits + self.bias if self.rate else logits

    @torch.no_grad()
    def update(self, weak_logits):
        """After a step, with the weak views' logits (N, K) of each micro-batch; the same in all processes."""
        if self.rate:
            prediction = F.softmax(self(torch.cat(weak_logits)), dim=1)
            (mean,) = self.runtime.all_reduce_mean([prediction.mean(dim=0)])
            self.bias -= self.rate * (mean.clamp_min(1e-6) * self.per_share).log()
            self.bias -= self.bias.mean()  # an offset common to all classes says nothing, and would grow

    def state_dict(self):
        return {"align_bias": self.bias}

    def load_state_dict(self, state):
        if "align_bias" in state:  # checkpoints of earlier versions have none: zero
            self.bias.copy_(state["align_bias"])


class Consistency:
    """The UDA loss of a batch: the targets of the unlabelled images, and how much each of them counts.

    The target is the sharpened weak prediction softmax(T(weak)/τ), or, ``hard``, the most probable class. The
    weight is 0 or 1, but for soft, and decided by (``--confidence``)

        threshold   largest probability of the sharpened prediction (hard: of the prediction) ≥ threshold
        relative    m ≥ threshold · mean of the largest probabilities of the labelled images
        soft        exp(−min(0, m − μ)² / (2 σ²/4)), with moving averages μ and σ² of mean and variance of m

    where m is the largest probability of the weak prediction before sharpening. threshold tests the sharpened
    one, as the published code and MPL-pytorch do: with ten classes and τ 0.7, 0.6 is a probability of 0.41 to
    0.57 before sharpening. relative is AdaMatch's (Berthelot et al., ICLR 2022), soft SoftMatch's (Chen et
    al., ICLR 2023), with its decay of 0.999, first values 1/K and 1, and unbiased variance.

    Weak predictions are aligned (``--align``), labelled ones are not: theirs are those of the loss on labels,
    of the view that ``--labeled-view`` says. The statistics are over the whole batch of all processes.

    Args:
        args: the command line.
        num_classes: K.
        runtime: where to run.
        class_shares: K shares of the classes among the labelled images, for ``--align-to labeled``.
        hard: the targets are classes.
    """

    def __init__(self, args, num_classes, runtime, class_shares=None, hard=False):
        self.args, self.runtime, self.hard = args, runtime, hard
        target = class_shares if args.align_to == "labeled" else None
        self.align = DistributionAlignment(args.align, num_classes, runtime, target)
        self.least = args.threshold  # of the largest probability; relative sets it anew in every step
        self.moments = torch.tensor([1 / num_classes, 1.0], device=runtime.device)  # μ and σ²
        runtime.replicate([self.moments])
        self.reads_batch = args.confidence != "threshold"  # before the first of its micro-batches has a loss

    @torch.no_grad()
    def observe(self, logits):
        """Before the losses of a batch, with the ``Logits`` of its micro-batches: its statistics."""
        if self.args.confidence == "relative":
            largest = largest_probability(torch.cat([each.labeled for each in logits]))
            (mean,) = self.runtime.all_reduce_mean([largest.mean()])
            self.least = self.args.threshold * mean
        elif self.args.confidence == "soft":
            largest = largest_probability(self.align(torch.cat([each.weak for each in logits])))
            # measured from the moving average, so that subtracting squares cancels little
            offsets = largest - self.moments[0]
            (means,) = self.runtime.all_reduce_mean([torch.stack([offsets, offsets.square()]).mean(dim=1)])
            offset, square = means.unbind()
            count = len(largest) * self.runtime.world_size
            variance = (square - offset.square()) * count / max(1, count - 1)
            self.moments += 0.001 * torch.stack([offset, variance - self.moments[1]])

    def weights(self, logits):
        """How much each image counts, (N,), from its aligned weak logits (N, K)."""
        args = self.args
        if args.confidence == "soft":
            mean, variance = self.moments.unbind()
            below = (largest_probability(logits) - mean).clamp_max(0)
            return (-2 * below.square() / variance.clamp_min(torch.finfo(variance.dtype).tiny)).exp()
        sharpened = args.confidence == "threshold" and not self.hard
        return (largest_probability(logits / args.temperature if sharpened else logits) >= self.least).float()

    def __call__(self, logits):
        """The loss () and the mean weight () of a micro-batch with these ``Logits``; the weak view has no
        gradient."""
        args, weak = self.args, self.align(logits.weak.detach())
        targets = pseudo_labels(weak, "argmax") if self.hard else F.softmax(weak / args.temperature, dim=1)
        weights = self.weights(weak)
        kind = "ce" if self.hard else args.uda_loss
        return uda_loss(targets, logits.strong, weights, kind), weights.mean()

    def state_dict(self):
        return self.align.state_dict() | {"confidence_moments": self.moments}

    def load_state_dict(self, state):
        self.align.load_state_dict(state)
        if "confidence_moments" in state:  # checkpoints of earlier versions have none
            self.moments.copy_(state["confidence_moments"])


# ---------------------------------------------------------------- micro-batches


class MicroBatch(NamedTuple):
    """An equal part of a batch: views, and the true classes (N,) of its unlabelled images where known."""

    views: Views
    truth: torch.Tensor | None


def micro_batches(views, truth, count):
    """The batch in ``count`` equal parts; the command line has seen that its images divide."""
    pieces = [[None] * count if tensor is None else tensor.chunk(count) for tensor in (*views, truth)]
    return [MicroBatch(Views(*piece[:-1]), piece[-1]) for piece in zip(*pieces, strict=True)]


# ---------------------------------------------------------------- methods


FIXMATCH_FLAGS = (
    "mu",
    "mixup_alpha",
    "confidence",
    "threshold",
    "lambda_u",
    "uda_steps",
    "align",
    "align_to",
    "weak_pass",
)
UDA_FLAGS = (*FIXMATCH_FLAGS, "temperature", "uda_loss")
LABEL_FLAGS = ("pseudo_label", "pseudo_label_view", "student_model")


class Method:
    """What the methods share: a student that is evaluated through its EMA, and saving.

    Args:
        args: the command line.
        num_classes: K.
        image_size: pixels; networks for small images have another first layer.
        runtime: where to run.
        class_shares: K shares of the classes among the labelled images.
    """

    uses_unlabeled = True  # unlabelled images, --mu for each labelled one
    uses_strong_view = True  # the strong view of the unlabelled images
    uses_feedback = False  # the student's labelled loss trains what labels for it: --feedback
    uses_teacher_checkpoint = False  # a fixed teacher, from --teacher-checkpoint
    uses_student_model = False  # the student may be another network: --student-model
    trains_teacher = False  # a teacher learns beside the student: --ensemble, --student-wait-steps
    flags = ()  # of main.py, without effect for some methods but not for this one: named in messages alone

    teacher_network = None  # where there is one, to be evaluated beside the student

    def __init__(self, args, num_classes, image_size, runtime, class_shares=None):
        self.args, self.runtime, self.num_classes = args, runtime, num_classes
        self.diagnostics = {}  # scalars of the last step that was asked to ``diagnose``
        network = build_network(args, num_classes, image_size, "student")
        self.warmup_steps = args.teacher_warmup_steps if self.trains_teacher else 0
        self.wait_steps = max(args.student_wait_steps, self.warmup_steps) if self.trains_teacher else 0
        self.student = self.learner(network, args.student_lr, self.wait_steps, ema=args.ema)
        self.learners = {"student": self.student}

    def learner(self, network, peak, wait_steps=0, ema=None, body_scale=None):
        """A learner of the network as the command line describes it, with this peak learning rate."""
        args = self.args
        body_scale = args.body_lr_scale if body_scale is None else body_scale

        def optimizer(network):
            if args.optimizer == "sgd":
                return sgd(network, peak, args.momentum, args.nesterov, args.weight_decay, body_scale)
            groups = parameter_groups(network, args.weight_decay, body_scale)
            if args.optimizer == "adamw":
                return torch.optim.AdamW(groups, lr=peak)
            return RMSProp(groups, peak, args.momentum)

        def rate(step):
            return learning_rate(
                step,
                peak=peak,
                total_steps=args.total_steps,
                warmup_steps=args.warmup_steps,
                wait_steps=wait_steps,
                shape=args.schedule,
                milestones=args.milestones,
            )

        return Learner(
            network, self.runtime, optimizer=optimizer, rate=rate, grad_clip=args.grad_clip, ema=ema
        )

    def prepare(self, dataset, views, folder):
        """What is computed once, before the first step of every process that trains the run.

        Args:
            dataset: ``Dataset``.
            views: ``ImageViews`` or ``PointViews``.
            folder: where the run's record is, for files to be found again when it is resumed.
        """

    def step(self, views, step, truth=None, diagnose=False):
        """One training step.

        Args:
            views: ``Views`` of one batch.
            step: its number, from 0.
            truth: (N,) true classes of the unlabelled images, -1 where unknown, or None: for meters alone.
            diagnose: also measure ``diagnostics``.

        Returns:
            {name: () tensor}, the scalars of the meters.
        """
        raise NotImplementedError

    def mixed(self, views, step, partners=None, partner_targets=None):
        """The views with labelled images mixed, and targets (B, K), where ``--mixup-alpha`` asks for it: each
        with another labelled image, or with its row of ``partners`` (B, …), whose targets are (B, K)."""
        args, runtime, labeled = self.args, self.runtime, views.labeled
        if not args.mixup_alpha:
            return views
        shares = mixup_shares(labeled, args.mixup_alpha, args.seed, step, runtime.rank, runtime.world_size)
        targets = F.one_hot(views.targets, self.num_classes).to(labeled.dtype)
        if partners is None:
            partners, partner_targets = neighbours(labeled), neighbours(targets)
        return views._replace(
            labeled=mixup(labeled, partners, shares), targets=mixup(targets, partner_targets, shares)
        )

    def unlabeled_weight(self, step):
        """λ(t), the weight of the unlabelled images' loss, for arithmetic with tensors."""

        def weight(step):
            return self.args.lambda_u * ramp_up(step, self.args.uda_steps, self.warmup_steps)

        return self.runtime.scalar(self.runtime.number(weight, step))

    @property
    def predictor(self):
        """The network that is evaluated: the EMA of the student."""
        return self.student.predictor

    @property
    def members(self):
        """{role: network} whose mean probabilities are evaluated: the student's EMA; with ``--ensemble`` also
        the teacher, its EMA where it has one."""
        return {role: self.learners[role].predictor for role in predicting_roles(vars(self.args))}

    def sync_statistics(self):
        """The same running statistics in all processes: before an evaluation or a checkpoint."""
        for learner in self.learners.values():
            learner.sync_statistics()

    def state_dict(self):
        state = {}
        for role, learner in self.learners.items():
            state |= learner.state_dict(role)
        return state

    def load_state_dict(self, state, path):
        """Continue from ``state_dict()``; ``path`` is named in errors (``UserError``)."""
        for role, learner in self.learners.items():
            learner.load_state_dict(state, role, path)


class Supervised(Method):
    """Cross-entropy on the labelled images alone."""

    uses_unlabeled = uses_strong_view = False
    flags = ("mixup_alpha",)

    def step(self, views, step, truth=None, diagnose=False):
        args = self.args

        def loss(batch):
            logits = self.student(batch.views.labeled)
            loss = F.cross_entropy(logits, batch.views.targets, label_smoothing=args.label_smoothing)
            return loss, {"labeled_loss": loss}

        batches = micro_batches(self.mixed(views, step), truth, args.accumulate)
        return self.student.learn(loss, batches, step)


class UDA(Method):
    """Unsupervised Data Augmentation (Xie et al. 2020): one network, consistent under augmentation."""

    flags = UDA_FLAGS
    hard_targets = False

    def __init__(self, args, num_classes, image_size, runtime, class_shares=None):
        super().__init__(args, num_classes, image_size, runtime)
        self.consistency = Consistency(args, num_classes, runtime, class_shares, self.hard_targets)
        self.align = self.consistency.align

    def step(self, views, step, truth=None, diagnose=False):
        args = self.args
        weight = self.unlabeled_weight(step)
        batches = micro_batches(self.mixed(views, step), truth, args.accumulate)
        function = functools.partial(teacher_logits, self.student, weak_pass=args.weak_pass)
        passes = TeacherPass(self.runtime, batches, function, ahead=self.consistency.reads_batch)
        self.consistency.observe(passes.logits)

        def loss(k):
            logits = passes.with_graph(k)
            loss, scalars = supervised_and_uda_loss(
                logits, batches[k].views.targets, weight, self.consistency, args
            )
            return loss, scalars | known_accuracy(self.align(logits.weak), batches[k].truth)

        with passes.replay():
            scalars = self.student.learn(loss, range(len(batches)), step)
        if args.weak_pass == "ema":
            self.student.sync_statistics()
        self.align.update([logits.weak for logits in passes.logits])
        return scalars

    def state_dict(self):
        return super().state_dict() | self.consistency.state_dict()

    def load_state_dict(self, state, path):
        super().load_state_dict(state, path)
        self.consistency.load_state_dict(state)


class FixMatch(UDA):
    """FixMatch (Sohn et al., NeurIPS 2020): UDA whose target is the most probable class of the weak view,
    where its probability, not sharpened, reaches the threshold."""

    flags = FIXMATCH_FLAGS
    hard_targets = True


class PseudoLabel(Method):
    """A fixed teacher, from ``--teacher-checkpoint``, labels; the student learns from these labels alone."""

    uses_teacher_checkpoint = uses_student_model = True
    flags = ("mu", *LABEL_FLAGS, "teacher_checkpoint")

    def __init__(self, args, num_classes, image_size, runtime, class_shares=None):
        super().__init__(args, num_classes, image_size, runtime)
        self.teacher_network = runtime.place(fixed_teacher(args, num_classes, image_size, runtime))
        self.compiled_teacher = runtime.compile(self.teacher_network)

    def step(self, views, step, truth=None, diagnose=False):
        args = self.args

        def loss(batch):
            with torch.no_grad(), self.runtime.autocast():
                view = batch.views.weak if args.pseudo_label_view == "weak" else batch.views.strong
                labels = pseudo_labels(self.compiled_teacher(view).float(), args.pseudo_label)
            logits = self.student(batch.views.strong)
            loss = soft_cross_entropy(labels, logits, args.label_smoothing).mean()
            return loss, {"student_loss": loss} | known_accuracy(labels, batch.truth)

        return self.student.learn(loss, micro_batches(views, truth, args.accumulate), step)


class MPL(Method):
    """Meta Pseudo Labels (paper, algorithm 1) with a UDA teacher.

    The teacher labels the unlabelled images, the student learns from these labels alone, and the teacher
    learns from the labelled images, from its own consistency and from the feedback: how the student's
    labelled loss answered to its step.

    With ``--switch-every`` the two exchange roles in turn (TransferMPL). What trains a network stays with it:
    optimiser, learning rate, dropout, EMA. ``teacher`` and ``student`` name roles, in checkpoints and meters
    too: those of the last step.
    """

    uses_feedback = uses_student_model = trains_teacher = True
    flags = (
        *(*UDA_FLAGS, *LABEL_FLAGS, "teacher_lr", "teacher_dropout", "teacher_warmup_steps"),
        *("student_wait_steps", "student_labeled_weight", "feedback", "switch_every", "ensemble"),
    )

    def __init__(self, args, num_classes, image_size, runtime, class_shares=None):
        super().__init__(args, num_classes, image_size, runtime)
        self.teacher = self._build_teacher(num_classes, image_size)
        self.learners = {"teacher": self.teacher, "student": self.student}
        self.consistency = Consistency(args, num_classes, runtime, class_shares)
        self.align = self.consistency.align
        self.switched = False  # whether the network that began as the student is the teacher
        self.estimator = feedback.ESTIMATORS.get(args.feedback)  # None for --feedback none
        self.baseline = torch.zeros((), device=runtime.device)  # moving average of a scalar feedback

    def step(self, views, step, truth=None, diagnose=False):
        """Algorithm 1 of the paper. The student descends CE(ŷ, S(x_u)), the teacher

            CE(y_l, T(x_l)) + λ(t) · mean over x_u of weight · CE(softmax(T(weak)/τ), T(strong)) + feedback,

        where the feedback is h · CE(ŷ, T(x_u)) (taylor, dot) or Σ softmax(T(x_u)) · ∂J/∂q (exact), see
        ``feedback.py``. During ``--teacher-warmup-steps`` λ is 0 and the student waits, so that there is no
        feedback. The batch may be taken in micro-batches, one after the other (``--accumulate``).
        """
        if self._switched_at(step) != self.switched:
            self._switch()
        args, teacher, student = self.args, self.teacher, self.student
        batches = micro_batches(views, truth, args.accumulate)
        teacher_batches = micro_batches(self.mixed(views, step), truth, args.accumulate)

        # 1. The teacher labels the unlabelled images.
        teacher_pass = TeacherPass(self.runtime, teacher_batches, self._teacher_logits, eager=diagnose)
        labels = [pseudo_labels(self._labeling(each), args.pseudo_label) for each in teacher_pass.logits]

        # 2. The student takes a step on these labels. In its pass the labelled images stand behind the strong
        #    ones, so that batch norm sees both (published code); they have a part in the loss only with
        #    --student-labeled-weight.
        reads = self.estimator.reads if self.estimator else ()
        student_step = feedback.StudentStep(
            student=student,
            images_u=views.strong,
            images_l=views.labeled,
            targets=views.targets,
            rate=self.runtime.number(student.rate, step),
            random_state=self.runtime.rng_state() if "random_state" in reads else None,
            label_smoothing=args.label_smoothing,
            micro_batches=len(batches),
            jvp=args.feedback_jvp,
        )

        def student_loss(k):
            part = batches[k].views
            sizes = [len(part.strong), len(part.labeled)]
            on_strong, on_labeled = student(torch.cat([part.strong, part.labeled])).split(sizes)
            loss = soft_cross_entropy(labels[k], on_strong, args.label_smoothing).mean()
            figures = {"student_loss": loss}
            if args.student_labeled_weight:
                smoothing = {"label_smoothing": args.label_smoothing}
                labeled_loss = F.cross_entropy(on_labeled, part.targets, **smoothing)
                figures["student_labeled_loss"] = labeled_loss
                loss = loss + args.student_labeled_weight * labeled_loss
            return loss, figures

        scalars = student.backward(student_loss, range(len(batches)))
        student_step.remember(reads)
        student.update(student_step.rate)

        # 3. The feedback: how did that step change the student's loss on the labelled images?
        values = [None] * len(batches)
        if self.estimator:
            value, scalars["feedback"] = self._estimate(student_step, torch.cat(labels))
            values = value.chunk(len(batches)) if self.estimator.per_class else [value] * len(batches)

        # 4. The teacher takes its step: labels, consistency and feedback.
        self.consistency.observe(teacher_pass.logits)
        weight = self.unlabeled_weight(step)

        def teacher_loss(k):
            logits, targets = teacher_pass.with_graph(k), teacher_batches[k].views.targets
            loss, figures = self._own_loss(logits, targets, weight)
            if self.estimator:
                term = args.feedback_weight * self._feedback_term(values[k], logits, labels[k])
                if diagnose and k == 0 and loss.requires_grad:
                    self.diagnostics = {"feedback_cosine": self._cosine(term, loss)}
                loss = loss + term
            return loss, figures | known_accuracy(labels[k], batches[k].truth)

        with teacher_pass.replay():
            scalars = teacher.learn(teacher_loss, range(len(batches)), step) | scalars
        if args.weak_pass == "ema":
            teacher.sync_statistics()
        self.align.update([logits.weak for logits in teacher_pass.logits])
        return scalars

    def _build_teacher(self, num_classes, image_size):
        """The learner that the feedback trains."""
        args = self.args
        network = build_network(args, num_classes, image_size, "teacher")
        # an average that labels, or that predicts once the network is the student
        average = args.weak_pass == "ema" or args.switch_every
        return self.learner(network, args.teacher_lr, ema=args.ema if average else None)

    def _teacher_logits(self, views, graph):
        """``Logits`` of a micro-batch, with or without what a backward pass needs."""
        return teacher_logits(self.teacher, views, self.args.weak_pass, graph)

    def _own_loss(self, logits, targets, weight):
        """The teacher's loss without feedback, (), and its scalars for the meters."""
        return supervised_and_uda_loss(logits, targets, weight, self.consistency, self.args)

    def _switched_at(self, step):
        """Whether in this step the network that began as the student is the teacher.

        The first change is N steps after the student's first: before, it would have nothing to teach.
        """
        args = self.args
        learned = max(0, step - self.wait_steps)
        return bool(args.switch_every) and learned // args.switch_every % 2 == 1

    def _switch(self):
        """Teacher and student exchange roles. Alignment and baseline were the other teacher's and begin anew:
        this one has learned aligned labels, so that its predictions are even without a bias."""
        self.teacher, self.student = self.student, self.teacher
        self.learners = {"teacher": self.teacher, "student": self.student}
        self.switched = not self.switched
        self.align.bias.zero_()
        self.baseline.zero_()
        self.runtime.finish_step()  # XLA: zeros inside the graph of the next step would make it another one
        if self.args.weak_pass == "ema":
            self.teacher.sync_statistics()  # of an average that was the student's, and labels from now on

    def _labeling(self, logits):
        """The logits that the pseudo labels are made of."""
        return self.align(logits.weak if self.args.pseudo_label_view == "weak" else logits.strong)

    def _estimate(self, student_step, labels):
        """The value of the feedback, with baseline and sign, and how much the student improved, (): h, or to
        first order −Σ q · ∂J/∂q, without the share of ``--student-labeled-weight`` that h has."""
        args = self.args
        value = self.estimator.value(student_step)
        if self.student.scaler.is_enabled():  # a step that the fp16 scaler skipped has no feedback
            value = torch.where(torch.isfinite(value), value, 0.0)
        scalar = not self.estimator.per_class
        improvement = value if scalar else -(value * labels).sum() / args.accumulate
        if scalar and args.feedback_momentum:
            self.baseline.lerp_(value, 1 - args.feedback_momentum)
            value = value - self.baseline
        return -value if args.flip_feedback else value, improvement

    def _feedback_term(self, value, logits, labels):
        """The feedback's term of the teacher's loss, ()."""
        args, labeling = self.args, self._labeling(logits)
        if (
            args.feedback_view == "strong" and not self.estimator.per_class
        ):  # MPL-pytorch: not what the student learned
            labeling = self.align(logits.strong)
            labels = pseudo_labels(labeling, args.pseudo_label)
        shares = self.runtime.world_size * args.accumulate
        return feedback.feedback_term(
            value, labeling, labels, reduction=args.feedback_reduction, shares=shares
        )

    def _cosine(self, term, rest):
        """Cosine between the teacher's gradients of the feedback and of the rest of its loss, ()."""
        parameters = list(self.teacher.parameters.values())
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (term, rest)]
        means = [self.runtime.all_reduce_mean(list(each)) for each in gradients]
        return F.cosine_similarity(*(torch.cat([g.reshape(-1) for g in each]) for each in means), dim=0)

    @property
    def teacher_network(self):
        return self.teacher.network

    def state_dict(self):
        own = {"feedback_baseline": self.baseline, "switched": self.switched}
        return super().state_dict() | self.consistency.state_dict() | own

    def load_state_dict(self, state, path):
        if state.get("switched", False) != self.switched:  # not in checkpoints of earlier versions
            self._switch()
        super().load_state_dict(state, path)
        self.consistency.load_state_dict(state)
        self.baseline.copy_(state["feedback_baseline"])


class ReducedMPL(MPL):
    """Reduced Meta Pseudo Labels (paper, section of that name): a large teacher that is passed only once.

    It comes from ``--teacher-checkpoint`` and stays fixed; ``prepare`` stores its class distributions of all
    unlabelled images. A small perceptron makes of them the distributions that the student's labels are taken
    from. The perceptron is all that the feedback trains, and nothing else trains it: in the place of the
    teacher, it takes the steps of ``MPL`` without labelled loss and UDA.
    """

    uses_teacher_checkpoint = True
    trains_teacher = False  # the perceptron is no network for images
    flags = ("mu", "pseudo_label", "student_model", "teacher_checkpoint", "teacher_lr", "feedback")

    def __init__(self, args, num_classes, image_size, runtime, class_shares=None):
        # without the losses of MPL's teacher, its views and its role-playing
        args = argparse.Namespace(**vars(args))
        args.align = args.mixup_alpha = args.student_labeled_weight = 0.0
        args.switch_every = 0
        args.confidence, args.weak_pass = "threshold", "joint"
        args.pseudo_label_view, args.feedback_view = "weak", "same"
        super().__init__(args, num_classes, image_size, runtime, class_shares)
        self.learners = {"perceptron": self.teacher, "student": self.student}
        self.large_teacher = fixed_teacher(args, num_classes, image_size, runtime)
        self.predictions = None  # (N, K) float16, of all unlabelled images

    def prepare(self, dataset, views, folder):
        path = os.path.join(folder, "teacher_predictions.pt")
        self.predictions = stored_predictions(path, self.teacher_network, dataset, views, self.runtime)
        self.large_teacher.cpu()  # leaves the device until it is evaluated at the end

    def _build_teacher(self, num_classes, image_size):
        return self.learner(LabelPerceptron(num_classes), self.args.teacher_lr, body_scale=1.0)

    def _teacher_logits(self, views, graph):
        # not index_select: torch_xla 2.9 ends the process where its index is a chunk of another tensor
        rows = to_device(self.predictions[views.indices], self.runtime.device)
        logits = (self.teacher if graph else self.teacher.forward_only)(*self.runtime.shard((rows,)))
        return Logits(None, logits, logits)  # the same for both views

    def _own_loss(self, logits, targets, weight):
        confidence = F.softmax(logits.weak.detach(), dim=1).amax(dim=1).mean()
        return logits.weak.new_zeros(()), {"label_confidence": confidence}

    @property
    def teacher_network(self):
        return self.runtime.place(self.large_teacher)


class SemiMeta(Method):
    """Semi-Supervised Learning with Meta-Gradient (Zhang et al., AISTATS 2021): one network, which learns its
    own predictions after they were moved so as to lower its labelled loss.

    The loss is CE(y_l, f(x_l)) + λ(t) · mean over x_u of ‖softmax f(x_u) − q‖², in training mode, a pass for
    each term; x_u is the weak view. With ``--mixup-alpha`` the first term is on each labelled image mixed
    with an unlabelled one and its pseudo label (published: KL, which differs from CE by the target's entropy
    and has the same gradient).
    """

    uses_strong_view = False
    flags = ("mu", "lambda_u", "uda_steps", "mixup_alpha", "feedback_jvp")
    EPSILON = 0.01  # of the central difference (published code)

    def step(self, views, step, truth=None, diagnose=False):
        args, student = self.args, self.student
        weight = self.unlabeled_weight(step)

        # 1. The pseudo labels: predictions, moved to lower the labelled loss.
        v = feedback.labeled_gradient(student, student.predict, views.labeled, views.targets, args.accumulate)
        parts = views.weak.chunk(args.accumulate)
        rate = self.runtime.number(student.rate, step)
        labels = [self.pseudo_labels(part, v, rate) for part in parts]

        # 2. A step on the labels and on the pseudo labels.
        views = self.mixed(views, step, views.weak[:: args.mu], torch.cat(labels)[:: args.mu])
        batches = micro_batches(views, truth, args.accumulate)

        def loss(k):
            part = batches[k].views
            labeled_loss = F.cross_entropy(
                student(part.labeled), part.targets, label_smoothing=args.label_smoothing
            )
            predictions = F.softmax(student(part.weak), dim=1)
            distance = (predictions - labels[k]).square().sum(dim=1).mean()
            figures = {"labeled_loss": labeled_loss, "consistency_loss": distance}
            return labeled_loss + weight * distance, figures | known_accuracy(labels[k], batches[k].truth)

        scalars = student.learn(loss, range(len(batches)), step)
        student.sync_statistics()  # the next pseudo labels are made with them
        return scalars

    def pseudo_labels(self, images, v, rate):
        """q = p(θ) − 2η · d/dt p(θ + t v) at t = 0, clipped at zero and renormalised, (N, K).

        p = softmax f(x_u) in evaluation mode; v = ∇L, the gradient of the labelled loss by parameter name.
        The change is −N · ∂L/∂q through the step −η ∇ mean ‖p − q‖², at q = p. That step is zero, hence v at
        θ itself. The published code has ‖v‖ · (p(θ + εv̂) − p(θ − εv̂)) / ε for 2 · d/dt p, with v̂ = v/‖v‖.
        """
        student = self.student

        def predictions(parameters):
            return F.softmax(student.predict_at(parameters, images), dim=1)

        at = {name: parameter.detach() for name, parameter in student.parameters.items()}
        derivative = feedback.directional_derivative(
            predictions, at, v, student, how=self.args.feedback_jvp, epsilon=self.EPSILON
        )
        moved = predictions(at) - self.runtime.scalar(2 * rate) * derivative
        return F.normalize(moved.clamp_min(0), p=1, dim=1)


# ---------------------------------------------------------------- a teacher's passes and loss


class Logits(NamedTuple):
    """What a teacher says of a batch, (B, K), (N, K) and (N, K)."""

    labeled: torch.Tensor
    weak: torch.Tensor
    strong: torch.Tensor


def teacher_logits(learner, views, weak_pass="joint", graph=True):
    """Logits of the labelled, weak and strong images of a batch.

    With ``weak_pass`` joint they come from one pass, so that batch norm sees all of them (published code);
    apart, the weak images pass by themselves and without gradient, which saves their backward pass; ema, they
    pass without gradient through the moving average of the weights (Mean Teacher, Tarvainen and Valpola,
    NeurIPS 2017; with the average of batch norm's running statistics, EMAN, Cai et al., CVPR 2021). Without
    ``graph`` nothing is kept for a backward pass, and running statistics stay as they are.
    """
    forward = learner if graph else learner.forward_only
    if weak_pass == "joint":
        images = torch.cat([views.labeled, views.weak, views.strong])
        return Logits(*forward(images).split([len(views.labeled), len(views.weak), len(views.strong)]))
    if weak_pass == "ema":
        weak = learner.ema_forward(views.weak)
    else:
        with torch.no_grad():
            weak = forward(views.weak)
    sizes = [len(views.labeled), len(views.strong)]
    labeled, strong = forward(torch.cat([views.labeled, views.strong])).split(sizes)
    return Logits(labeled, weak, strong)


class TeacherPass:
    """The teacher's logits of each micro-batch, computed before its update and used again in its loss.

    One micro-batch keeps its graph until that step. Several pass through the teacher once more then, with the
    same dropout, so that one graph is in memory at a time.

    Args:
        runtime: where to run.
        batches: the micro-batches.
        function: of views and ``graph``, whether one is kept, that returns their ``Logits``.
        eager: not compiled, so that gradients can be taken through the graph more than once.
        ahead: the logits of all micro-batches are needed before the loss of the first. Otherwise several pass
            through the teacher in their losses alone, and ``logits`` are those that have passed.
    """

    def __init__(self, runtime, batches, function, eager=False, ahead=True):
        self.runtime, self.batches, self.function, self.eager = runtime, batches, function, eager
        self.kept = len(batches) == 1
        self.random_state = runtime.rng_state() if ahead and not self.kept else None
        self.logits = [self._logits(batch, graph=self.kept) for batch in batches if ahead or self.kept]

    def _logits(self, batch, graph):
        with self.runtime.uncompiled() if self.eager else contextlib.nullcontext():
            return self.function(batch.views, graph=graph)

    def with_graph(self, k):
        """The logits of micro-batch k, with what a backward pass needs."""
        if self.kept:
            return self.logits[k]
        logits = self._logits(self.batches[k], graph=True)
        if self.random_state is None:
            self.logits.append(Logits(*(part.detach() for part in logits)))
        return logits

    def replay(self):
        """Context of the second passes, where there are any."""
        if self.random_state is None:
            return contextlib.nullcontext()
        return self.runtime.replay(self.random_state)


def supervised_and_uda_loss(logits, targets, weight, consistency, args):
    """A teacher's loss without feedback, (): CE on labels + weight · UDA, and its scalars for the meters."""
    labeled_loss = F.cross_entropy(logits.labeled, targets, label_smoothing=args.label_smoothing)
    loss, mask = consistency(logits)
    scalars = {"labeled_loss": labeled_loss, "uda_loss": loss, "uda_mask": mask}
    return labeled_loss + weight * loss, scalars


def known_accuracy(labels, truth):
    """The meter of pseudo-label accuracy, where the data set knows the truth."""
    return {} if truth is None else {"pseudo_label_accuracy": pseudo_label_accuracy(labels, truth)}


# ---------------------------------------------------------------- networks


def network_name(args, role):
    """The name of a role's network, "teacher" or "student", by the arguments of a run as a dict."""
    if role == "student" and METHODS[args["method"]].uses_student_model and args.get("student_model"):
        return args["student_model"]
    return args["model"]


def predicting_roles(args):
    """The networks whose mean probabilities are evaluated, by the arguments of a run as a dict."""
    if args.get("ensemble") and METHODS[args["method"]].trains_teacher:
        return ("student", "teacher")
    return ("student",)


def build_network(args, num_classes, image_size, role, model=None):
    """The network of ``--model``, or of ``--student-model`` for the student; UserError if it does not fit.

    ``model`` names another one, whose weights are in a checkpoint. A run that is resumed gets its weights
    from the checkpoint: nothing is downloaded.
    """
    dropout = args.student_dropout if role == "student" else args.teacher_dropout
    try:
        return build_model(
            model or network_name(vars(args), role),
            num_classes,
            image_size=image_size,
            dropout=dropout,
            stochastic_depth=args.stochastic_depth,
            pretrained=args.pretrained and not (args.weights or args.resume or model),
            weights=None if args.resume or model else args.weights,
            freeze_body=args.freeze_body,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def saved_members(args, runtime, saved, dataset, size):
    """The networks that predict, from a checkpoint, on the device: ``Method.members``, {role: network}."""
    members, roles = {}, predicting_roles(vars(args))
    if "finetune_step" in saved and len(roles) > 1:
        tell(runtime, f"{args.resume} holds the finetuned student alone: it is no ensemble")
        roles = ("student",)
    for role in roles:
        network = build_network(args, dataset.num_classes, size, role)
        load_state(network, predictor_state(saved, args.resume, role), args.resume)
        members[role] = runtime.place(network)
    return members


def fixed_teacher(args, num_classes, image_size, runtime):
    """The network that predicts in ``--teacher-checkpoint``, on the CPU, in evaluation mode, not to learn."""
    path = args.teacher_checkpoint
    state = runtime.load(path)
    weights = predictor_state(state, path)
    # the network that is in the file, whatever --model says of the student
    unsaid = {"bn_eps": None, "stochastic_depth": None}  # by checkpoints of earlier versions
    theirs = argparse.Namespace(**vars(args) | unsaid | state.get("args", {}))
    known = state.get("data", {}).get("classes")
    if known and len(known) != num_classes:
        raise UserError(
            f"the teacher in {path} was trained on {theirs.dataset} and knows {len(known)} classes, but "
            f"{args.dataset} has {num_classes}: give one that was trained on the same classes"
        )
    model = network_name(vars(theirs), "student")
    network = build_network(theirs, num_classes, image_size, "teacher", model)
    load_state(network, weights, path)
    return network.eval().requires_grad_(False)


METHODS = {
    "supervised": Supervised,
    "uda": UDA,
    "fixmatch": FixMatch,
    "pseudo-label": PseudoLabel,
    "mpl": MPL,
    "reduced-mpl": ReducedMPL,
    "semimeta": SemiMeta,
}
