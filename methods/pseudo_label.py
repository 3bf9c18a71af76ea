"""Pseudo labels of a teacher that does not learn; in rounds, with a student that becomes the teacher, Noisy
Student (Xie et al., CVPR 2020)."""

import torch

from methods.method import (
    Method,
    known_accuracy,
    micro_batches,
    pseudo_labels,
    soft_cross_entropy,
)
from models import count_flops


class PseudoLabel(Method):
    """A fixed teacher, from ``--teacher-checkpoint``, labels; the student learns from these labels alone."""

    uses_pseudo_labels = uses_label_view = uses_teacher_checkpoint = uses_student_model = True
    uses_mixup = False
    says_all = True

    def __init__(self, args, num_classes, image_size, runtime, class_shares=None):
        super().__init__(args, num_classes, image_size, runtime)
        self.teacher_network = runtime.place(self.fixed_teacher(num_classes, image_size))
        self.compiled_teacher = runtime.compile(self.teacher_network)
        self.multiply_adds_of_label = count_flops(self.teacher_network, self.input_shape)

    def step(self, views, step, truth=None, diagnose=False):
        args = self.args

        def loss_of(batch):
            with torch.no_grad(), self.runtime.autocast():
                view = batch.views.weak if args.pseudo_label_view == "weak" else batch.views.strong
                labels = pseudo_labels(self.compiled_teacher(view).float(), args.pseudo_label)
                self.student.multiply_adds += len(view) * self.multiply_adds_of_label
            logits = self.student(batch.views.strong)
            loss = soft_cross_entropy(labels, logits, args.label_smoothing).mean()
            return loss, {"student_loss": loss} | known_accuracy(labels, batch.truth)

        return self.student.learn(loss_of, micro_batches(views, views, truth, args.accumulate), step)
