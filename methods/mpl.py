"""Meta Pseudo Labels (Pham et al., CVPR 2021), algorithm 1 of the paper, with a UDA teacher.

``MPL.step`` is the algorithm. Below it stands what its steps 1 to 4 call, in this order, then role-playing,
set-up and saving. The estimators of the feedback are in ``feedback.py``, the teacher's passes and its
consistency loss in ``uda.py``.
"""

import contextlib

import torch
import torch.nn.functional as F

from engine.learner import phase
from methods.feedback import ESTIMATORS, StudentStep, feedback_term
from methods.method import (
    Method,
    known_accuracy,
    micro_batches,
    pseudo_labels,
    soft_cross_entropy,
)
from methods.uda import Consistency, teacher_logits


class MPL(Method):
    """Meta Pseudo Labels.

    The teacher labels the unlabelled images, the student learns from these labels alone, and the teacher
    learns from the labelled images, from its own consistency and from the feedback: how the student's
    labelled loss answered to its step.

    With ``--switch-every`` the two exchange roles in turn (TransferMPL). What trains a network stays with it:
    optimiser, learning rate, dropout, EMA. ``teacher`` and ``student`` name roles, in checkpoints and meters
    too: those of the last step.
    """

    uses_consistency = uses_unlabeled_weight = uses_pseudo_labels = uses_label_view = True
    uses_feedback = uses_student_model = trains_teacher = True
    says_all = True

    consistency_class = Consistency  # has the teacher's loss without feedback

    def __init__(self, args, num_classes, image_size, runtime, class_shares=None):
        super().__init__(args, num_classes, image_size, runtime)
        self.teacher = self.build_teacher(num_classes, image_size)
        self.learners = {"teacher": self.teacher, "student": self.student}
        self.consistency = self.consistency_class(args, num_classes, runtime, class_shares)
        self.align = self.consistency.align
        self.estimator_class = ESTIMATORS.get(args.feedback)  # None for --feedback none
        self.baseline = torch.zeros((), device=runtime.device)  # moving average of a scalar feedback
        self.switched = False  # whether the network that began as the student is the teacher

    def step(self, views, step, truth=None, diagnose=False):
        """Algorithm 1 of the paper. The student descends CE(ŷ, S(x_u)), the teacher

            CE(y_l, T(x_l)) + λ(t) · mean over x_u of weight · CE(softmax(T(weak)/τ), T(strong)) + feedback,

        where the feedback is h · CE(ŷ, T(x_u)) (taylor, dot) or Σ softmax(T(x_u)) · ∂J/∂q (exact), see
        ``feedback.py``. During ``--teacher-warmup-steps`` λ is 0 and the student waits, so that there is no
        feedback.

        ``batches`` holds one object, the whole batch, or with ``--accumulate`` its micro-batches. The whole
        batch passes through the teacher once. Micro-batches pass twice, with the same dropout, for one graph
        in memory at a time: all of them for the labels, then each with a graph for the teacher's loss.
        """
        self.take_roles(step)
        args, runtime, teacher, student = self.args, self.runtime, self.teacher, self.student
        batches = micro_batches(views, self.mixed(views, step), truth, args.accumulate)
        whole = len(batches) == 1
        before_teacher = None if whole else runtime.rng_state()

        # 1. The teacher labels the unlabelled images.
        for batch in batches:
            batch.logits = self.teacher_pass(batch, graph=whole, eager=diagnose)
            batch.labels = pseudo_labels(self.label_logits(batch.logits), args.pseudo_label)

        # 2. The student takes a step on these labels. The estimator looks at it before and after the update.
        rate = student.rate_at(step)
        student_step = StudentStep(
            student=student,
            images_u=views.strong,
            images_l=views.labeled,
            targets=views.targets,
            rate=rate,
            random_state=runtime.rng_state(),  # before the student's pass: exact repeats its dropout
            label_smoothing=args.label_smoothing,
            micro_batches=args.accumulate,
            jvp=args.feedback_jvp,
        )
        estimator = self.estimator_class() if self.estimator_class else None
        student_scalars = student.backward(self.student_loss, batches)
        if estimator:
            estimator.before(student_step)
        student.update(rate)

        # 3. The feedback: how did that step change the student's loss on the labelled images?
        if estimator:
            value = estimator.after(student_step)
            student_scalars["feedback"] = self.give_feedback(value, batches)

        # 4. The teacher takes a step: labels, consistency and feedback.
        lambda_u = self.unlabeled_weight(step)
        self.consistency.observe([batch.logits for batch in batches])

        def teacher_loss(batch):
            logits = batch.logits if whole else self.teacher_pass(batch, graph=True, eager=diagnose)
            loss, scalars = self.consistency.loss(logits, batch.mixed.targets, lambda_u)
            if estimator:
                feedback_loss = args.feedback_weight * self.feedback_loss(batch, logits)
                if diagnose and batch is batches[0] and loss.requires_grad:
                    self.diagnostics = {"feedback_cosine": self.cosine(feedback_loss, loss)}
                loss = loss + feedback_loss
            return loss, scalars | known_accuracy(batch.labels, batch.truth)

        with runtime.replay(before_teacher):
            teacher_scalars = teacher.backward(teacher_loss, batches)
        teacher.update(teacher.rate_at(step))
        if args.weak_pass == "ema":
            teacher.sync_statistics()
        self.align.update([batch.logits.weak for batch in batches])
        return teacher_scalars | student_scalars

    # 1. labels

    def teacher_pass(self, batch, graph, eager=False):
        """``Logits`` of a micro-batch, with or without what a backward pass needs; ``eager``: not compiled,
        for gradients that are taken twice."""
        with self.runtime.uncompiled() if eager else contextlib.nullcontext():
            return teacher_logits(self.teacher, batch.mixed, self.args.weak_pass, graph)

    def label_logits(self, logits):
        """The logits (N, K) that the pseudo labels are made of."""
        return self.align(logits.weak if self.args.pseudo_label_view == "weak" else logits.strong)

    # 2. the student's step

    def student_loss(self, batch):
        """CE(ŷ, S(strong)), (), and its scalars.

        The labelled images stand behind the strong ones, so that batch norm sees both (published code); they
        have a part in the loss only with ``--student-labeled-weight``.
        """
        args, views = self.args, batch.views
        logits = self.student(torch.cat([views.strong, views.labeled]))
        on_strong, on_labeled = logits.split([len(views.strong), len(views.labeled)])
        loss = soft_cross_entropy(batch.labels, on_strong, args.label_smoothing).mean()
        scalars = {"student_loss": loss}
        if args.student_labeled_weight:
            labeled_loss = F.cross_entropy(on_labeled, views.targets, label_smoothing=args.label_smoothing)
            scalars["student_labeled_loss"] = labeled_loss
            loss = loss + args.student_labeled_weight * labeled_loss
        return loss, scalars

    # 3. the feedback

    @phase("feedback")
    def give_feedback(self, value, batches):
        """Give each micro-batch its ``feedback``: the estimator's value, with baseline and sign.

        Returns:
            how much the student improved, (): h, or to first order −Σ q · ∂J/∂q, without the share of
            ``--student-labeled-weight`` that h has.
        """
        args, per_class = self.args, self.estimator_class.per_class
        if self.student.scaler.is_enabled():  # a step that the fp16 scaler skipped has no feedback
            value = torch.where(torch.isfinite(value), value, 0.0)
        if per_class:
            labels = torch.cat([batch.labels for batch in batches])
            improvement = -(value * labels).sum() / args.accumulate  # a value has 1/N of its micro-batch
        else:
            improvement = value
            if args.feedback_momentum:
                self.baseline.lerp_(value, 1 - args.feedback_momentum)
                value = value - self.baseline
        if args.flip_feedback:
            value = -value
        parts = value.chunk(len(batches)) if per_class else [value] * len(batches)
        for batch, part in zip(batches, parts, strict=True):
            batch.feedback = part
        return improvement

    # 4. the teacher's step

    def feedback_loss(self, batch, logits):
        """The feedback's part of the teacher's loss, ()."""
        args, label_logits, labels = self.args, self.label_logits(logits), batch.labels
        if args.feedback_view == "strong" and not self.estimator_class.per_class:
            # MPL-pytorch: labels that the student has not learned
            label_logits = self.align(logits.strong)
            labels = pseudo_labels(label_logits, args.pseudo_label)
        parts = self.runtime.world_size * args.accumulate
        return feedback_term(
            batch.feedback, label_logits, labels, reduction=args.feedback_reduction, parts=parts
        )

    def cosine(self, feedback_loss, own_loss):
        """Cosine between the teacher's gradients of its two losses, ()."""
        parameters = list(self.teacher.parameters.values())
        gradients = [
            torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (feedback_loss, own_loss)
        ]
        means = [self.runtime.all_reduce_mean(list(each)) for each in gradients]
        return F.cosine_similarity(*(torch.cat([g.reshape(-1) for g in each]) for each in means), dim=0)

    # role-playing

    def take_roles(self, step):
        """Exchange the roles every N steps (``--switch-every`` N), first N steps after the student's
        first: before, it would have nothing to teach."""
        if self.args.switch_every:
            learned = max(0, step - self.wait_steps)
            if (learned // self.args.switch_every % 2 == 1) != self.switched:
                self.switch_roles()

    def switch_roles(self):
        """Teacher and student change places. Alignment and baseline begin anew: the new teacher has learned
        aligned labels, so that its predictions are even without a bias."""
        self.teacher, self.student = self.student, self.teacher
        self.learners = {"teacher": self.teacher, "student": self.student}
        self.switched = not self.switched
        self.align.bias.zero_()
        self.baseline.zero_()
        self.runtime.finish_step()  # XLA: zeros inside the graph of the next step would make it another one
        if self.args.weak_pass == "ema":
            self.teacher.sync_statistics()  # of an average that was the student's, and labels from now on

    # set-up and saving

    def build_teacher(self, num_classes, image_size):
        """The learner that the feedback trains."""
        args = self.args
        network = self.build_network(args, num_classes, image_size, "teacher")
        # an average that labels, or that predicts once the network is the student
        average = args.weak_pass == "ema" or args.switch_every
        return self.learner(network, args.teacher_lr, ema=args.ema if average else None)

    @property
    def teacher_network(self):
        return self.teacher.network

    def state_dict(self):
        own = {"feedback_baseline": self.baseline, "switched": self.switched}
        return super().state_dict() | self.consistency.state_dict() | own

    def load_state_dict(self, state, path):
        if state.get("switched", False) != self.switched:  # not in checkpoints of earlier versions
            self.switch_roles()
        super().load_state_dict(state, path)
        self.consistency.load_state_dict(state)
        self.baseline.copy_(state["feedback_baseline"])
