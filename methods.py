"""The training step of each method: supervised, uda, pseudo-label, mpl.

A method owns its networks, optimisers, schedules, gradient scalers and EMA. ``step`` takes one step on the
``Views`` of one batch and returns a dict of scalar tensors for the meters, without waiting for the device;
``predictor`` is the network that is evaluated; ``state_dict`` holds all that continuing needs. A step that
is asked to ``diagnose`` also measures what is too dear for every step, into ``diagnostics``.
"""

import argparse
import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F

import feedback
from augmentation import Views
from models import ModelEMA, build_model
from runtime import UserError
from utils import learning_rate, load_state, network_name, ramp_up

# ---------------------------------------------------------------- losses


def soft_cross_entropy(labels, logits, label_smoothing=0.0):
    """Cross-entropy of each image against a distribution, (N,); labels and logits are (N, K)."""
    if label_smoothing:
        labels = labels * (1 - label_smoothing) + label_smoothing / labels.shape[1]
    return -(labels * F.log_softmax(logits, dim=1)).sum(dim=1)


def uda_loss(weak_logits, strong_logits, temperature, threshold):
    """Unsupervised data augmentation: CE(softmax(weak/τ), strong) where the sharpened prediction is sure.

    The mean is over all N images, those below the threshold counting as zero. The threshold is compared with
    the largest probability of the sharpened prediction, as in the published code and MPL-pytorch: with ten
    classes and τ 0.7, 0.6 is a probability of 0.41 to 0.57 before sharpening. The weak view has no gradient.

    Args:
        weak_logits, strong_logits: (N, K).
        temperature: τ, below 1 sharpens.
        threshold: largest sharpened probability from which on an image counts.

    Returns:
        loss (), share of images that count ().
    """
    sharpened = F.softmax(weak_logits.detach() / temperature, dim=1)
    mask = (sharpened.amax(dim=1) >= threshold).float()
    return (mask * soft_cross_entropy(sharpened, strong_logits)).mean(), mask.mean()


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


def agreement(labels, truth):
    """Share of pseudo labels (N, K) whose class is the true one, of the images whose truth (N,) is known."""
    known = truth >= 0
    return ((labels.argmax(dim=1) == truth) & known).sum() / known.sum().clamp_min(1)


class Alignment:
    """Distribution alignment: a bias per class that makes the mean prediction on the weak views uniform.

    Consistency alone never gives back a cluster that few labels left to its neighbour. The bias, added to the
    teacher's logits wherever they become targets or pseudo labels, does: each step moves it by
    rate · log(uniform / m), m the mean of the aligned predictions of the batch. Rate 1 is one iteration of
    Sinkhorn's algorithm; a lower one smooths over batches. For classes of equal size, and batches with many
    unlabelled images per class (ten, say): of fewer the logarithm of m is mostly noise. After ReMixMatch
    (Berthelot et al., ICLR 2020) and Sinkhorn Label Allocation (Tai et al., ICML 2021).

    Args:
        rate: of the bias, 0 for none.
        num_classes: K.
        runtime: where to run.
    """

    def __init__(self, rate, num_classes, runtime):
        self.rate, self.runtime = rate, runtime
        self.bias = torch.zeros(num_classes, device=runtime.device)

    def __call__(self, logits):
        """Logits (N, K) of the aligned predictions; the bias is a constant to their gradient."""
        return logits + self.bias if self.rate else logits

    @torch.no_grad()
    def update(self, parts):
        """After a step, with the weak views' logits (N, K) of each part of its batch; all processes agree."""
        if self.rate:
            (mean,) = self.runtime.average_([F.softmax(self(torch.cat(parts)), dim=1).mean(dim=0)])
            self.bias -= self.rate * (mean.clamp_min(1e-6) * len(mean)).log()
            self.bias -= self.bias.mean()  # an offset common to all classes says nothing, and would grow

    def state_dict(self):
        return {"align_bias": self.bias}

    def load_state_dict(self, state):
        if "align_bias" in state:  # checkpoints of earlier versions have none: zero
            self.bias.copy_(state["align_bias"])


# ---------------------------------------------------------------- one network and what trains it


class Learner:
    """A network with its optimiser, learning-rate schedule, gradient scaler and, if asked for, EMA.

    Args:
        network: moved to the device.
        runtime: where to run.
        optimizer: a function of the network on the device that returns its optimiser.
        rate: the learning rate as a function of the step.
        grad_clip: bound of the gradient's norm, 0 for none.
        ema: decay of the moving average, or None for no average.
    """

    def __init__(self, network, runtime, *, optimizer, rate, grad_clip=0.0, ema=None):
        self.network = runtime.place(network)
        self.forward = runtime.compile(self.network)  # for passes of this process alone
        self.training_network = runtime.parallel(self.network)
        self.runtime, self.rate, self.grad_clip = runtime, rate, grad_clip
        self.optimizer = optimizer(self.network)
        self.scaler = runtime.grad_scaler()
        self.ema = ModelEMA(self.network, ema) if ema is not None else None
        self.ema_network = runtime.compile(self.ema.network) if self.ema else None

    @property
    def parameters(self):
        """The parameters that learn, by name."""
        return {name: p for name, p in self.network.named_parameters() if p.requires_grad}

    def __call__(self, images):
        """Logits (N, K) in training mode, float32 (float64 where the network is)."""
        training_mode(self.network)
        with self.runtime.autocast():
            return feedback.full_precision(self.training_network(images))

    @torch.no_grad()
    def average(self, images):
        """Logits (N, K) of the moving average, in evaluation mode, float32 (float64 where the network is)."""
        with self.runtime.autocast():
            return feedback.full_precision(self.ema_network(images))

    @torch.no_grad()
    def preview(self, images):
        """The logits of a call that is still to come; running statistics are left as they are."""
        training_mode(self.network)
        with feedback.without_trace(self.network), self.runtime.autocast():
            return feedback.full_precision(self.forward(images))

    def backward(self, loss, parts):
        """Gradients of the mean loss, averaged over processes and unscaled, into the parameters' ``grad``.

        Args:
            loss: function of one part of a batch that returns its loss and a dict of scalars.
            parts: of the batch; only one of them has its graph in memory at a time.

        Returns:
            the means of the scalars, detached.
        """
        self.optimizer.zero_grad(set_to_none=True)
        rows = []
        for number, part in enumerate(parts, 1):
            last = number == len(parts)
            with contextlib.nullcontext() if last else self.runtime.apart(self.training_network):
                value, scalars = loss(part)
                self.scaler.scale(value / len(parts)).backward()
            rows.append(torch.stack([scalar.detach() for scalar in scalars.values()]))
        self.scaler.unscale_(self.optimizer)
        return dict(zip(scalars, torch.stack(rows).mean(dim=0), strict=True))

    def update(self, rate):
        """One optimiser step at ``rate`` on the gradients of ``backward``, then the EMA."""
        if self.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.grad_clip)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.ema:
            self.ema.update(self.network)

    def learn(self, loss, parts, step):
        """One step of the network alone; as ``backward``."""
        scalars = self.backward(loss, parts)
        self.update(self.rate(step))
        return scalars

    def agree(self):
        """Make the running statistics, which each process keeps of its own batches, the same on all: their
        mean. Moving averages are linear, so that it does not matter how often this is done, unless a network
        that uses them labels: that one agrees after every step."""
        networks = [self.network] + ([self.ema.network] if self.ema else [])
        buffers = [buffer for network in networks for buffer in network.buffers()]
        self.runtime.average_([buffer for buffer in buffers if buffer.is_floating_point()])

    def state_dict(self, role):
        """Under the keys of MPL-pytorch: ``ROLE_state_dict``, ``ROLE_optimizer``, ``ROLE_scaler``, and
        ``avg_state_dict`` for the student's moving average (``teacher_avg_state_dict`` for the teacher's)."""
        state = {
            f"{role}_state_dict": self.network.state_dict(),
            f"{role}_optimizer": self.optimizer.state_dict(),
            f"{role}_scaler": self.scaler.state_dict(),
        }
        if self.ema:
            average = average_key(role)
            state[f"{average}_state_dict"] = self.ema.network.state_dict()
            state[f"{average}_updates"] = self.ema.updates
        return state

    def load_state_dict(self, state, role, path):
        try:
            load_state(self.network, state[f"{role}_state_dict"], path)
            self.optimizer.load_state_dict(state[f"{role}_optimizer"])
            if state[f"{role}_scaler"]:  # empty where the precision was another, without a scaler
                self.scaler.load_state_dict(state[f"{role}_scaler"])
            if self.ema:
                average = average_key(role)
                load_state(self.ema.network, state[f"{average}_state_dict"], path)
                self.ema.updates.copy_(state[f"{average}_updates"])
        except KeyError as error:
            raise UserError(
                f"{path} has no {error}: it was not written by this --method and --weak-pass"
            ) from error
        except ValueError as error:  # torch: groups of other parameters
            raise UserError(f"the optimiser in {path} is of another network or --freeze-body") from error


def average_key(role):
    """What the keys of a role's moving average start with in a checkpoint."""
    return "avg" if role == "student" else f"{role}_avg"


def batch_norms(network):
    return [m for m in network.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]


def training_mode(network):
    """Training mode, but for batch norm that does not learn: a frozen body keeps its running statistics."""
    network.train()
    for norm in batch_norms(network):
        if not norm.weight.requires_grad:
            norm.eval()


def parameter_groups(network, weight_decay):
    """The parameters that learn, without weight decay on batch norm."""
    plain = {id(p) for norm in batch_norms(network) for p in norm.parameters()}
    learning = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in learning if id(p) not in plain], "weight_decay": weight_decay},
        {"params": [p for p in learning if id(p) in plain], "weight_decay": 0.0},
    ]


def sgd(network, rate, momentum, nesterov, weight_decay):
    groups = parameter_groups(network, weight_decay)
    return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=nesterov and momentum > 0)


class Part(NamedTuple):
    """An equal part of a batch: views, and the true classes (N,) of its unlabelled images where known."""

    views: Views
    truth: torch.Tensor | None


def parts_of(views, truth, count):
    """The batch in ``count`` equal parts. ValueError where its images do not divide."""
    if any(len(tensor) % count for tensor in views if tensor is not None):
        raise ValueError(f"a batch of {[len(t) for t in views if t is not None]} has no {count} equal parts")
    pieces = [[None] * count if tensor is None else tensor.chunk(count) for tensor in (*views, truth)]
    return [Part(Views(*piece[:-1]), piece[-1]) for piece in zip(*pieces, strict=True)]


# ---------------------------------------------------------------- methods


class Method:
    """What the methods share: a student that is evaluated through its EMA, and saving.

    Args:
        args: the command line.
        num_classes: K.
        image_size: pixels; networks for small images have another first layer.
        runtime: where to run.
    """

    teacher_network = None  # where there is one, to be evaluated beside the student

    def __init__(self, args, num_classes, image_size, runtime):
        self.args, self.runtime = args, runtime
        self.diagnostics = {}  # scalars of the last step that was asked to ``diagnose``
        self.num_classes, self.image_size = num_classes, image_size
        wait_steps = args.student_wait_steps if args.method == "mpl" else 0
        network = build_network(args, num_classes, image_size, "student")
        self.student = self.learner(network, args.student_lr, wait_steps, ema=args.ema)
        self.learners = {"student": self.student}

    def learner(self, network, peak, wait_steps=0, ema=None):
        """A learner of the network as the command line describes it, with this peak learning rate."""
        args = self.args

        def optimizer(network):
            if args.optimizer == "adamw":
                return torch.optim.AdamW(parameter_groups(network, args.weight_decay), lr=peak)
            return sgd(network, peak, args.momentum, args.nesterov, args.weight_decay)

        def rate(step):
            return learning_rate(
                step,
                peak=peak,
                total_steps=args.total_steps,
                warmup_steps=args.warmup_steps,
                wait_steps=wait_steps,
                shape=args.schedule,
            )

        return Learner(
            network, self.runtime, optimizer=optimizer, rate=rate, grad_clip=args.grad_clip, ema=ema
        )

    @property
    def predictor(self):
        """The network that is evaluated: the EMA of the student."""
        return self.student.ema.network

    def agree(self):
        """The same running statistics in all processes: before an evaluation or a checkpoint."""
        for learner in self.learners.values():
            learner.agree()

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

    def step(self, views, step, truth=None, diagnose=False):
        return self.student.learn(self._loss, parts_of(views, truth, self.args.accumulate), step)

    def _loss(self, part):
        logits = self.student(part.views.labeled)
        smoothing = self.args.label_smoothing
        loss = F.cross_entropy(logits, part.views.targets, label_smoothing=smoothing)
        return loss, {"labeled_loss": loss}


class UDA(Method):
    """Unsupervised Data Augmentation (Xie et al. 2020): one network, consistent under augmentation."""

    def __init__(self, args, num_classes, image_size, runtime):
        super().__init__(args, num_classes, image_size, runtime)
        self.align = Alignment(args.align, num_classes, runtime)

    def step(self, views, step, truth=None, diagnose=False):
        args = self.args
        weight = self.runtime.scalar(args.lambda_u * ramp_up(step, args.uda_steps))
        weak_logits = []

        def loss(part):
            logits = teacher_logits(self.student, part.views, args.weak_pass)
            weak_logits.append(logits[1])
            loss, scalars = supervised_and_uda_loss(logits, part.views.targets, weight, self.align, args)
            return loss, scalars | known_truth(self.align(logits[1]), part.truth)

        scalars = self.student.learn(loss, parts_of(views, truth, args.accumulate), step)
        if args.weak_pass == "ema":
            self.student.agree()
        self.align.update(weak_logits)
        return scalars

    def state_dict(self):
        return super().state_dict() | self.align.state_dict()

    def load_state_dict(self, state, path):
        super().load_state_dict(state, path)
        self.align.load_state_dict(state)


class PseudoLabel(Method):
    """A fixed teacher, from ``--teacher-checkpoint``, labels; the student learns from these labels alone."""

    def __init__(self, args, num_classes, image_size, runtime):
        super().__init__(args, num_classes, image_size, runtime)
        path = args.teacher_checkpoint
        state = runtime.load(path)
        weights = predictor_state(state, path)
        # the network that is in the file, whatever --model says of the student
        theirs = argparse.Namespace(**vars(args) | {"bn_eps": None} | state.get("args", {}))
        model = network_name(vars(theirs), "student")
        self.teacher_network = build_network(theirs, num_classes, image_size, "teacher", model)
        load_state(self.teacher_network, weights, path)
        runtime.place(self.teacher_network).eval().requires_grad_(False)

    def step(self, views, step, truth=None, diagnose=False):
        return self.student.learn(self._loss, parts_of(views, truth, self.args.accumulate), step)

    def _loss(self, part):
        args, views = self.args, part.views
        with torch.no_grad(), self.runtime.autocast():
            view = views.weak if args.pseudo_label_view == "weak" else views.strong
            labels = pseudo_labels(self.teacher_network(view).float(), args.pseudo_label)
        loss = soft_cross_entropy(labels, self.student(views.strong), args.label_smoothing).mean()
        return loss, {"student_loss": loss} | known_truth(labels, part.truth)


class MPL(Method):
    """Meta Pseudo Labels (paper, algorithm 1) with a UDA teacher.

    The teacher labels the unlabelled images, the student learns from these labels alone, and the teacher
    learns from the labelled images, from its own consistency and from the feedback: how the student's
    labelled loss answered to its step.
    """

    def __init__(self, args, num_classes, image_size, runtime):
        super().__init__(args, num_classes, image_size, runtime)
        network = build_network(args, num_classes, image_size, "teacher")
        labels_by_average = args.weak_pass == "ema"
        self.teacher = self.learner(network, args.teacher_lr, ema=args.ema if labels_by_average else None)
        self.learners = {"teacher": self.teacher, "student": self.student}
        self.align = Alignment(args.align, num_classes, runtime)
        self.baseline = torch.zeros((), device=runtime.device)  # moving average of a scalar feedback

    def step(self, views, step, truth=None, diagnose=False):
        with self.runtime.uncompiled() if diagnose else contextlib.nullcontext():
            return self._step(views, step, truth, diagnose)

    def _step(self, views, step, truth, diagnose):
        args = self.args
        parts = parts_of(views, truth, args.accumulate)
        # One part keeps its graph until the teacher's step; several pass through the teacher again then, with
        # the same dropout, so that one graph is in memory at a time.
        kept = len(parts) == 1
        random_state = None if kept else self.runtime.rng_state()
        logits = [teacher_logits(self.teacher, part.views, args.weak_pass, graph=kept) for part in parts]
        labels = [pseudo_labels(self._labeling(each), args.pseudo_label) for each in logits]
        scalars, student_step = self._student_step(views, labels, self.student.rate(step))
        values = [None] * len(parts)
        if student_step is not None:
            value, scalars["feedback"] = self._feedback(student_step, torch.cat(labels))
            values = value.chunk(len(parts)) if value.ndim == 2 else [value] * len(parts)
        weight = self.runtime.scalar(args.lambda_u * ramp_up(step, args.uda_steps))

        def loss(k):
            of_part = logits[k] if kept else teacher_logits(self.teacher, parts[k].views, args.weak_pass)
            targets = parts[k].views.targets
            loss, figures = supervised_and_uda_loss(of_part, targets, weight, self.align, args)
            if values[k] is not None:
                term = args.feedback_weight * self._feedback_term(values[k], of_part, labels[k])
                if diagnose and k == 0:
                    self.diagnostics = {"feedback_cosine": self._cosine(term, loss)}
                loss = loss + term
            return loss, figures | known_truth(labels[k], parts[k].truth)

        with contextlib.nullcontext() if kept else self.runtime.replay(random_state):
            scalars = self.teacher.learn(loss, range(len(parts)), step) | scalars
        if args.weak_pass == "ema":
            self.teacher.agree()
        self.align.update([weak for _, weak, _ in logits])
        return scalars

    def _labeling(self, logits):
        """The logits that the pseudo labels are made of."""
        _, weak, strong = logits
        return self.align(weak if self.args.pseudo_label_view == "weak" else strong)

    def _student_step(self, views, labels, rate):
        """The student learns the labels, a tensor for each part; returns the scalars of its loss and what an
        estimator must know of the step.

        Its pass holds the labelled images behind the strong ones, for batch norm alone (published code)."""
        args, student = self.args, self.student
        random_state = self.runtime.rng_state() if args.feedback == "exact" else None

        def loss(part):
            strong, labeled, targets = part
            logits = student(torch.cat([strong, labeled]))[: len(strong)]
            loss = soft_cross_entropy(targets, logits, args.label_smoothing).mean()
            return loss, {"student_loss": loss}

        count = len(labels)
        parts = zip(views.strong.chunk(count), views.labeled.chunk(count), labels, strict=True)
        scalars = student.backward(loss, list(parts))
        if args.feedback == "none":
            student.update(rate)
            return scalars, None
        student_step = feedback.StudentStep(
            network=student.network,
            forward=student.forward,
            images_u=views.strong,
            images_l=views.labeled,
            targets=views.targets,
            rate=rate,
            random_state=random_state,
            runtime=self.runtime,
            label_smoothing=args.label_smoothing,
            parts=count,
            jvp=args.feedback_jvp,
        )
        student_step.remember(feedback.READS[args.feedback])
        student.update(rate)
        return scalars, student_step

    def _feedback(self, student_step, labels):
        """The value of the feedback, with baseline and sign, and how much the student improved, ()."""
        args = self.args
        value = feedback.ESTIMATORS[args.feedback](student_step)
        if self.student.scaler.is_enabled():  # a step that the fp16 scaler skipped has no feedback
            value = torch.where(torch.isfinite(value), value, 0.0)
        improvement = value if value.ndim == 0 else -(value * labels).sum() / args.accumulate
        if value.ndim == 0 and args.feedback_momentum:
            self.baseline.lerp_(value, 1 - args.feedback_momentum)
            value = value - self.baseline
        return -value if args.flip_feedback else value, improvement

    def _feedback_term(self, value, logits, labels):
        args, labeling = self.args, self._labeling(logits)
        if args.feedback_view == "strong":  # MPL-pytorch: not the labels that the student learned
            labeling = self.align(logits[2])
            labels = pseudo_labels(labeling, args.pseudo_label)
        shares = self.runtime.world_size * args.accumulate
        return feedback.feedback_term(
            value, labeling, labels, reduction=args.feedback_reduction, shares=shares
        )

    def _cosine(self, term, rest):
        """Cosine between the teacher's gradients of the feedback and of the rest of its loss, ()."""
        parameters = list(self.teacher.parameters.values())
        gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (term, rest)]
        flat = [torch.cat([g.reshape(-1) for g in self.runtime.average_(list(each))]) for each in gradients]
        return F.cosine_similarity(*flat, dim=0)

    @property
    def teacher_network(self):
        return self.teacher.network

    def state_dict(self):
        return super().state_dict() | self.align.state_dict() | {"feedback_baseline": self.baseline}

    def load_state_dict(self, state, path):
        super().load_state_dict(state, path)
        self.align.load_state_dict(state)
        self.baseline.copy_(state["feedback_baseline"])


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
            pretrained=args.pretrained and not (args.weights or args.resume or model),
            weights=None if args.resume or model else args.weights,
            freeze_body=args.freeze_body,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def teacher_logits(learner, views, weak_pass="joint", graph=True):
    """Logits of the labelled, weak and strong images of a batch.

    With ``weak_pass`` joint they come from one pass, so that batch norm sees all of them (published code);
    apart, the weak images pass by themselves and without gradient, which saves their backward pass; ema, they
    pass without gradient through the moving average of the weights (Mean Teacher, Tarvainen and Valpola,
    NeurIPS 2017; with the average of batch norm's running statistics, EMAN, Cai et al., CVPR 2021). Without
    ``graph`` nothing is kept for a backward pass, and running statistics stay as they are.
    """
    forward = learner if graph else learner.preview
    if weak_pass != "joint":
        with torch.no_grad():
            weak = learner.average(views.weak) if weak_pass == "ema" else forward(views.weak)
        sizes = [len(views.labeled), len(views.strong)]
        labeled, strong = forward(torch.cat([views.labeled, views.strong])).split(sizes)
        return labeled, weak, strong
    images = torch.cat([views.labeled, views.weak, views.strong])
    return forward(images).split([len(views.labeled), len(views.weak), len(views.strong)])


def supervised_and_uda_loss(logits, targets, weight, align, args):
    """A teacher's loss without feedback, (): CE on labels + weight · UDA (targets aligned), its scalars."""
    labeled, weak, strong = logits
    labeled_loss = F.cross_entropy(labeled, targets, label_smoothing=args.label_smoothing)
    consistency, mask = uda_loss(align(weak), strong, args.temperature, args.threshold)
    scalars = {"labeled_loss": labeled_loss, "uda_loss": consistency, "uda_mask": mask}
    return labeled_loss + weight * consistency, scalars


def known_truth(labels, truth):
    """The meter of pseudo-label accuracy, where the data set knows the truth."""
    return {} if truth is None else {"pseudo_label_accuracy": agreement(labels, truth)}


def predictor_state(state, path):
    """The weights that predict in a checkpoint: the EMA's, else the student's.

    Raises:
        UserError: the checkpoint holds neither.
    """
    weights = (
        state.get("avg_state_dict") or state.get("student_state_dict") if isinstance(state, dict) else None
    )
    if not weights:
        raise UserError(f"{path} holds no network: it is not a checkpoint of this program")
    return weights


METHODS = {"supervised": Supervised, "uda": UDA, "pseudo-label": PseudoLabel, "mpl": MPL}
