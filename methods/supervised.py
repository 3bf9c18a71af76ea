"""Supervised training: the labels alone, what every other method is compared with."""

import torch.nn.functional as F

from methods.method import Method, micro_batches


class Supervised(Method):
    """Cross-entropy on the labelled images alone, mixed in pairs with ``--mixup-alpha``."""

    uses_unlabeled = uses_strong_view = False
    says_all = True

    def step(self, views, step, truth=None, diagnose=False):
        args = self.args

        def loss_of(batch):
            logits = self.student(batch.mixed.labeled)
            loss = F.cross_entropy(logits, batch.mixed.targets, label_smoothing=args.label_smoothing)
            return loss, {"labeled_loss": loss}

        batches = micro_batches(views, self.mixed(views, step), truth, args.accumulate)
        return self.student.learn(loss_of, batches, step)
