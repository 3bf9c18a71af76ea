"""Reduced Meta Pseudo Labels (paper, section of that name): a large teacher that labels only once."""

import argparse
import os

from engine.evaluation import stored_predictions
from engine.loader import to_device
from methods.method import Logits
from methods.mpl import MPL
from methods.uda import Consistency, largest_probability
from models import LabelPerceptron


class LabelConfidence(Consistency):
    """No loss: the feedback alone trains the perceptron. Its scalar is the mean confidence of its labels."""

    def loss(self, logits, targets, lambda_u):
        return logits.weak.new_zeros(()), {
            "label_confidence": largest_probability(logits.weak.detach()).mean()
        }


class ReducedMPL(MPL):
    """Reduced Meta Pseudo Labels.

    The teacher comes from ``--teacher-checkpoint`` and stays fixed; ``prepare`` stores the class
    distributions that it gives to all unlabelled images. A small perceptron turns them into the distributions
    that the student's labels are taken from. The feedback trains the perceptron, and nothing else does: it
    takes the steps of ``MPL``'s teacher without labelled loss and UDA.
    """

    uses_teacher_checkpoint = True
    uses_mixup = uses_unlabeled_weight = uses_consistency = uses_label_view = False
    trains_teacher = False  # the perceptron is no network for images
    works_on_host = True  # it looks stored predictions up

    consistency_class = LabelConfidence

    def __init__(self, args, num_classes, image_size, runtime, class_shares=None):
        # without the losses of MPL's teacher, its views and its role-playing
        args = argparse.Namespace(**vars(args))
        args.align = args.mixup_alpha = args.student_labeled_weight = 0.0
        args.switch_every = 0
        args.confidence, args.weak_pass = "threshold", "joint"
        args.pseudo_label_view, args.feedback_view = "weak", "same"
        super().__init__(args, num_classes, image_size, runtime, class_shares)
        self.learners = {"perceptron": self.teacher, "student": self.student}
        self.large_teacher = self.fixed_teacher(num_classes, image_size)
        self.predictions = None  # (N, K) float16, of all unlabelled images

    def prepare(self, dataset, views, folder):
        path = os.path.join(folder, "teacher_predictions.pt")
        self.predictions = stored_predictions(path, self.teacher_network, dataset, views, self.runtime)
        self.large_teacher.cpu()  # leaves the device until it is evaluated at the end

    def build_teacher(self, num_classes, image_size):
        perceptron = LabelPerceptron(num_classes)
        return self.learner(perceptron, self.args.teacher_lr, body_scale=1.0, input_shape=(num_classes,))

    def teacher_pass(self, batch, graph, eager=False):
        # not index_select: torch_xla 2.9 ends the process where its index is a chunk of another tensor
        rows = to_device(self.predictions[batch.views.indices], self.runtime.device)
        logits = (self.teacher if graph else self.teacher.preview)(*self.runtime.shard((rows,)))
        return Logits(None, logits, logits)  # the same for both views

    @property
    def teacher_network(self):
        return self.runtime.place(self.large_teacher)
