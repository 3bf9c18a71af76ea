"""What the methods share: the class ``Method``, micro-batches, pseudo labels and their loss, networks.

A method owns its networks with what trains them (``engine/learner.py``). ``step`` takes one step on the
``Views`` of one batch and returns a dict of scalar tensors for the meters, without waiting for the device.
Plain attributes such as ``uses_unlabeled`` say what a method uses.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from augmentation import Views, mixup, mixup_shares, neighbours
from engine.checkpoint import Checkpoint
from engine.learner import Learner
from engine.loader import batches
from engine.optimizers import RMSProp, muon, parameter_groups, sgd
from models import build_model
from utils import UserError, learning_rate, ramp_up

# ---------------------------------------------------------------- micro-batches


class Logits(NamedTuple):
    """What a teacher says of a micro-batch."""

    labeled: torch.Tensor  # (B, K)
    weak: torch.Tensor  # (N, K)
    strong: torch.Tensor  # (N, K)


@dataclass(eq=False)
class MicroBatch:
    """B labelled and N unlabelled images, the whole batch or an equal part of it (``--accumulate``), and what
    the networks say of them in the course of a step; K classes."""

    views: Views  # for the student, and for its labelled loss
    mixed: Views  # for the teacher: the same, but with --mixup-alpha its labelled images are mixed
    truth: torch.Tensor | None  # (N,) int64, true classes of the unlabelled images where known: for meters
    logits: Logits | None = None  # the teacher's
    labels: torch.Tensor | None = None  # (N, K) float32, the teacher's pseudo labels
    feedback: torch.Tensor | None = None  # of these labels: () or (N, K)


def micro_batches(views, mixed, truth, count):
    """The batch in ``count`` equal parts; the command line has made sure that its images divide."""

    def parts(tensor):
        return [None] * count if tensor is None else tensor.chunk(count)

    def parts_of_views(views):
        return [Views(*part) for part in zip(*map(parts, views), strict=True)]

    rows = zip(parts_of_views(views), parts_of_views(mixed), parts(truth), strict=True)
    return [MicroBatch(*row) for row in rows]


# ---------------------------------------------------------------- pseudo labels


def soft_cross_entropy(labels, logits, label_smoothing=0.0):
    """Cross-entropy of each image against a distribution, (N,); labels and logits are (N, K)."""
    if label_smoothing:
        labels = labels * (1 - label_smoothing) + label_smoothing / labels.shape[1]
    return -(labels * F.log_softmax(logits, dim=1)).sum(dim=1)


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


def known_accuracy(labels, truth):
    """The share of correct pseudo labels, (N, K) distributions or logits, as a meter, over the images whose
    truth (N,) is known; {} where the data set knows none."""
    if truth is None:
        return {}
    known = truth >= 0
    right = (labels.argmax(dim=1) == truth) & known
    return {"pseudo_label_accuracy": right.sum() / known.sum().clamp_min(1)}


# ---------------------------------------------------------------- the class


class Method:
    """What the methods share: a student that is evaluated through its EMA, and saving.

    Args:
        args: the command line.
        num_classes: K.
        image_size: pixels; networks for small images have another first layer.
        runtime: where to run.
        class_shares: K shares of the classes among the labelled images.
    """

    # What the method uses: main.py names given flags that have no effect with it. A class that is not said
    # to be complete (``says_all``), such as a new one, is taken to read every flag.
    uses_unlabeled = True  # unlabelled images, --mu for each labelled one
    uses_strong_view = True  # the strong view of the unlabelled images
    uses_mixup = True  # labelled images may be mixed: --mixup-alpha
    mixes_unlabeled = False  # with unlabelled images, not with each other
    uses_unlabeled_weight = False  # a loss of the unlabelled images has the weight --lambda-u
    uses_consistency = False  # the teacher, or the only network, agrees with itself on both views: --align
    hard_targets = False  # what it agrees with are classes: no --temperature, no --uda-loss
    uses_pseudo_labels = False  # a teacher labels for the student: --pseudo-label
    uses_label_view = False  # what labels sees the view of --pseudo-label-view
    uses_feedback = False  # the student's labelled loss trains what labels for it: --feedback
    uses_derivative = False  # a directional derivative beside --feedback exact: --feedback-jvp
    uses_teacher_checkpoint = False  # a fixed teacher, from --teacher-checkpoint
    uses_student_model = False  # the student may be another network: --student-model
    trains_teacher = False  # a teacher learns beside the student: --ensemble, --student-wait-steps
    works_on_host = False  # a step needs the host, too: --cuda-graph cannot capture it
    says_all = False  # whether these attributes are complete

    teacher_network = None  # where there is one, to be evaluated beside the student

    def __init__(self, args, num_classes, image_size, runtime, class_shares=None):
        self.args, self.runtime, self.num_classes = args, runtime, num_classes
        self.diagnostics = {}  # scalars of the last step that was asked to ``diagnose``
        self.input_shape = (3, image_size, image_size) if image_size else (2,)  # of one image or point
        network = self.build_network(args, num_classes, image_size, "student")
        self.warmup_steps = args.teacher_warmup_steps if self.trains_teacher else 0
        self.wait_steps = max(args.student_wait_steps, self.warmup_steps) if self.trains_teacher else 0
        self.student = self.learner(network, args.student_lr, self.wait_steps, ema=args.ema)
        self.learners = {"student": self.student}

    def learner(self, network, peak, wait_steps=0, ema=None, body_scale=None, input_shape=None):
        """A learner of the network as the command line describes it, with this peak learning rate."""
        args = self.args
        body_scale = args.body_lr_scale if body_scale is None else body_scale

        def optimizer(network):
            if args.optimizer == "sgd":
                return sgd(network, peak, args.momentum, args.nesterov, args.weight_decay, body_scale)
            if args.optimizer == "muon":
                return muon(network, peak, args.momentum, args.weight_decay, body_scale)
            groups = parameter_groups(network, args.weight_decay, body_scale)
            if args.optimizer == "adamw":
                return torch.optim.AdamW(groups, lr=peak)
            return RMSProp(groups, peak, args.momentum)

        def schedule(step):
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
            network,
            self.runtime,
            optimizer=optimizer,
            schedule=schedule,
            grad_clip=args.grad_clip,
            ema=ema,
            input_shape=input_shape or self.input_shape,
        )

    def fit(self, dataset, views):
        """What networks take from the unlabelled images before the first step of a new run (``FastCNN.fit``):
        from up to 2,000 of them, evenly spaced, as an evaluation sees them, the same in all processes."""
        fitted = [n for learner in self.learners.values() for n in learner.networks if hasattr(n, "fit")]
        if fitted:
            count = len(dataset.unlabeled)
            chosen = dataset.unlabeled.subset(range(0, count, math.ceil(count / 2000)))
            images = [views.evaluation(images[mask > 0]) for images, _, mask in batches(chosen, 250, "cpu")]
            for network in fitted:
                network.fit(torch.cat(images))

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
            {name: () tensor}, the scalars of the meters. The progress shows the first name that ends in
            _loss.
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

    # networks

    @classmethod
    def network_name(cls, args, role):
        """The name of a role's network, "teacher" or "student"."""
        if role == "student" and cls.uses_student_model and args.student_model:
            return args.student_model
        return args.model

    @classmethod
    def networks(cls, args):
        """{role: name} of the networks that are built; a fixed teacher is the one in its checkpoint."""
        roles = ["teacher", "student"] if cls.trains_teacher else ["student"]
        return {role: cls.network_name(args, role) for role in roles}

    @classmethod
    def predicting_roles(cls, args):
        """The networks whose mean probabilities are evaluated."""
        return ["student", "teacher"] if args.ensemble and cls.trains_teacher else ["student"]

    @classmethod
    def build_network(cls, args, num_classes, image_size, role):
        """The network of ``--model``, or of ``--student-model`` for the student; UserError if it does not
        fit. A run that is resumed gets its weights from the checkpoint: nothing is downloaded."""
        try:
            return build_model(
                cls.network_name(args, role),
                num_classes,
                image_size=image_size,
                dropout=args.student_dropout if role == "student" else args.teacher_dropout,
                stochastic_depth=args.stochastic_depth,
                pretrained=args.pretrained and not (args.weights or args.resume),
                weights=None if args.resume else args.weights,
                freeze_body=args.freeze_body,
                bn_momentum=args.bn_momentum,
                bn_eps=args.bn_eps,
            )
        except ValueError as error:
            raise UserError(str(error)) from error

    def fixed_teacher(self, num_classes, image_size):
        """The network that predicts in ``--teacher-checkpoint``, on the CPU, in evaluation mode, not to
        learn."""
        args, path = self.args, self.args.teacher_checkpoint
        saved = Checkpoint.read(path, self.runtime)
        known = saved.get("data", {}).get("classes")
        if known and len(known) != num_classes:
            theirs = saved.get("args", {}).get("dataset", "other data")
            raise UserError(
                f"the teacher in {path} was trained on {theirs} and knows {len(known)} classes, but "
                f"{args.dataset} has {num_classes}: give one that was trained on the same classes"
            )
        # the network that is in the file, whatever --model says of the student
        model = saved["networks"].get("student") or self.network_name(args, "student")
        return saved.network("student", num_classes, image_size, model).eval().requires_grad_(False)

    @property
    def predictor(self):
        """The network that is evaluated: the EMA of the student."""
        return self.student.predictor

    @property
    def members(self):
        """{role: network} whose mean probabilities are evaluated: the student's EMA; with ``--ensemble`` also
        the teacher, its EMA where it has one."""
        return {role: self.learners[role].predictor for role in self.predicting_roles(self.args)}

    # saving

    @property
    def multiply_adds(self):
        """The multiply-adds of all steps of this process so far: a backward pass counts as two forward
        passes, evaluations do not count."""
        return sum(learner.multiply_adds for learner in self.learners.values())

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
