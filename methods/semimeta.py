"""Semi-Supervised Learning with Meta-Gradient (Zhang et al., AISTATS 2021)."""

import torch
import torch.nn.functional as F

from methods import feedback
from methods.method import Method, known_accuracy, micro_batches


class SemiMeta(Method):
    """Semi-Supervised Learning with Meta-Gradient (Zhang et al., AISTATS 2021): one network, which learns its
    own predictions after they were moved so as to lower its labelled loss.

    The loss is CE(y_l, f(x_l)) + λ(t) · mean over x_u of ‖softmax f(x_u) − q‖², in training mode, a pass for
    each term; x_u is the weak view. With ``--mixup-alpha`` the first term is on each labelled image mixed
    with an unlabelled one and its pseudo label (published: KL, which differs from CE by the target's entropy
    and has the same gradient).
    """

    uses_strong_view = False
    mixes_unlabeled = uses_unlabeled_weight = uses_derivative = True
    says_all = True
    EPSILON = 0.01  # of the central difference (published code)

    def step(self, views, step, truth=None, diagnose=False):
        args, student = self.args, self.student
        weight = self.unlabeled_weight(step)

        # 1. The pseudo labels: predictions, moved to lower the labelled loss.
        v = feedback.labeled_gradient(student, student.predict, views.labeled, views.targets, args.accumulate)
        parts = views.weak.chunk(args.accumulate)
        rate = student.rate_at(step)
        labels = [self.pseudo_labels(part, v, rate) for part in parts]

        # 2. A step on the labels and on the pseudo labels.
        mixed = self.mixed(views, step, views.weak[:: args.mu], torch.cat(labels)[:: args.mu])
        batches = micro_batches(views, mixed, truth, args.accumulate)
        for batch, part in zip(batches, labels, strict=True):
            batch.labels = part

        def loss_of(batch):
            labeled_loss = F.cross_entropy(
                student(batch.mixed.labeled), batch.mixed.targets, label_smoothing=args.label_smoothing
            )
            predictions = F.softmax(student(batch.views.weak), dim=1)
            distance = (predictions - batch.labels).square().sum(dim=1).mean()
            figures = {"labeled_loss": labeled_loss, "consistency_loss": distance}
            return labeled_loss + weight * distance, figures | known_accuracy(batch.labels, batch.truth)

        scalars = student.learn(loss_of, batches, step)
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
