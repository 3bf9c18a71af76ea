"""Consistency: the UDA loss of unlabelled images, which of them count, and the methods UDA and FixMatch.

The teacher of MPL has the same passes (``teacher_logits``), alignment and loss (``Consistency``).
"""

import torch
import torch.nn.functional as F

from methods.method import Logits, Method, known_accuracy, micro_batches, pseudo_labels, soft_cross_entropy

# ---------------------------------------------------------------- the loss


UDA_LOSSES = {  # of each image, (N,); the names are the choices of --uda-loss
    "ce": soft_cross_entropy,
    "cos": lambda targets, logits: -F.cosine_similarity(targets, F.softmax(logits, dim=1), dim=1),
}


def largest_probability(logits):
    """Confidence of each image's prediction, (N,), from logits (N, K)."""
    return F.softmax(logits, dim=1).amax(dim=1)


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
        self.inverse_target = torch.tensor(odds, dtype=self.bias.dtype, device=runtime.device)

    def __call__(self, logits):
        """Logits (N, K) of the aligned predictions; the bias is a constant to their gradient."""
        return logits + self.bias if self.rate else logits

    @torch.no_grad()
    def update(self, weak_logits):
        """After a step, with the weak views' logits (N, K) of each micro-batch; the same in all processes."""
        if self.rate:
            prediction = F.softmax(self(torch.cat(weak_logits)), dim=1)
            (mean,) = self.runtime.all_reduce_mean([prediction.mean(dim=0)])
            self.bias -= self.rate * (mean.clamp_min(1e-6) * self.inverse_target).log()
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
        self.lowest = args.threshold  # of the largest probability; relative sets it anew in every step
        self.moments = torch.tensor([1 / num_classes, 1.0], device=runtime.device)  # μ and σ²
        runtime.replicate([self.moments])
        self.reads_batch = args.confidence != "threshold"  # the weights need the logits of the whole batch

    @torch.no_grad()
    def observe(self, logits):
        """Take the statistics of a batch, from the ``Logits`` of its micro-batches, before its losses."""
        if self.args.confidence == "relative":
            largest = largest_probability(torch.cat([each.labeled for each in logits]))
            (mean,) = self.runtime.all_reduce_mean([largest.mean()])
            self.lowest = self.args.threshold * mean
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
        if args.confidence == "threshold" and not self.hard:
            logits = logits / args.temperature
        return (largest_probability(logits) >= self.lowest).float()

    def loss(self, logits, targets, lambda_u):
        """CE on labels + λ · UDA, (), of a micro-batch with these ``Logits``, and its scalars.

        UDA is the mean of weight · CE(target, strong) over all N unlabelled images, ``--uda-loss cos`` of the
        negative cosine (TransferMPL); the weak view has no gradient.
        """
        args, weak = self.args, self.align(logits.weak.detach())
        labeled_loss = F.cross_entropy(logits.labeled, targets, label_smoothing=args.label_smoothing)
        if self.hard:
            distances = soft_cross_entropy(pseudo_labels(weak, "argmax"), logits.strong)
        else:
            distances = UDA_LOSSES[args.uda_loss](F.softmax(weak / args.temperature, dim=1), logits.strong)
        weights = self.weights(weak)
        uda_loss = (weights * distances).mean()
        scalars = {"labeled_loss": labeled_loss, "uda_loss": uda_loss, "uda_mask": weights.mean()}
        return labeled_loss + lambda_u * uda_loss, scalars

    def state_dict(self):
        return self.align.state_dict() | {"confidence_moments": self.moments}

    def load_state_dict(self, state):
        self.align.load_state_dict(state)
        if "confidence_moments" in state:  # checkpoints of earlier versions have none
            self.moments.copy_(state["confidence_moments"])


# ---------------------------------------------------------------- a teacher's passes


def teacher_logits(learner, views, weak_pass="joint", graph=True):
    """Logits of the labelled, weak and strong images of a batch.

    With ``weak_pass`` joint they come from one pass, so that batch norm sees all of them (published code);
    apart, the weak images pass by themselves and without gradient, which saves their backward pass; ema, they
    pass without gradient through the moving average of the weights (Mean Teacher, Tarvainen and Valpola,
    NeurIPS 2017; with the average of batch norm's running statistics, EMAN, Cai et al., CVPR 2021). Without
    ``graph`` nothing is kept for a backward pass, and running statistics stay as they are.
    """
    forward = learner if graph else learner.preview
    if weak_pass == "joint":
        images = torch.cat([views.labeled, views.weak, views.strong])
        return Logits(*forward(images).split([len(views.labeled), len(views.weak), len(views.strong)]))
    if weak_pass == "ema":
        weak = learner.predict_average(views.weak)
    else:
        with torch.no_grad():
            weak = forward(views.weak)
    sizes = [len(views.labeled), len(views.strong)]
    labeled, strong = forward(torch.cat([views.labeled, views.strong])).split(sizes)
    return Logits(labeled, weak, strong)


# ---------------------------------------------------------------- the methods


class UDA(Method):
    """Unsupervised Data Augmentation (Xie et al. 2020): one network, consistent under augmentation."""

    uses_consistency = uses_unlabeled_weight = True
    says_all = True

    def __init__(self, args, num_classes, image_size, runtime, class_shares=None):
        super().__init__(args, num_classes, image_size, runtime)
        self.consistency = Consistency(args, num_classes, runtime, class_shares, self.hard_targets)
        self.align = self.consistency.align

    def step(self, views, step, truth=None, diagnose=False):
        args, student, weak_logits = self.args, self.student, []
        lambda_u = self.unlabeled_weight(step)
        batches = micro_batches(views, self.mixed(views, step), truth, args.accumulate)
        # where the whole batch's statistics weigh each image, micro-batches pass twice, with the same dropout
        twice = self.consistency.reads_batch and len(batches) > 1
        before = self.runtime.rng_state() if twice else None
        if twice:
            self.consistency.observe([self.logits(batch, graph=False) for batch in batches])

        def loss_of(batch):
            logits = self.logits(batch, graph=True)
            weak_logits.append(logits.weak.detach())
            if not twice:
                self.consistency.observe([logits])
            loss, scalars = self.consistency.loss(logits, batch.mixed.targets, lambda_u)
            return loss, scalars | known_accuracy(self.align(logits.weak), batch.truth)

        with self.runtime.replay(before):
            scalars = student.learn(loss_of, batches, step)
        if args.weak_pass == "ema":
            student.sync_statistics()
        self.align.update(weak_logits)
        return scalars

    def logits(self, batch, graph):
        return teacher_logits(self.student, batch.mixed, self.args.weak_pass, graph)

    def state_dict(self):
        return super().state_dict() | self.consistency.state_dict()

    def load_state_dict(self, state, path):
        super().load_state_dict(state, path)
        self.consistency.load_state_dict(state)


class FixMatch(UDA):
    """FixMatch (Sohn et al., NeurIPS 2020): UDA whose target is the most probable class of the weak view,
    where its probability, not sharpened, reaches the threshold."""

    hard_targets = True
