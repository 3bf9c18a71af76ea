"""Seconds and peak memory of a step with each form of the feedback, as ratios to a step without feedback.

    python -m benchmarks.feedback --repeats 3 --threads 2

Each form is measured in a process of its own, in turns with the others. The flags of main.py work, too.
"""

import torch
import torch.nn.functional as F
from torch.func import functional_call

from benchmarks.common import StepProcess, describe, medians, new_parser, parse_step, run
from engine.learner import without_trace
from methods.feedback import Exact, student_logits
from methods.method import soft_cross_entropy


class DoubleBackward(Exact):
    """What ``Exact`` computes, by differentiating through the step with a graph of its gradient.

    For labels of equal probabilities, since a ``StudentStep`` does not have the labels; the cost is the same.
    """

    def after(self, step):
        parameters = {name: before.clone().requires_grad_() for name, before in self.parameters.items()}
        logits = student_logits(step, parameters)
        labels = torch.full_like(logits, 1 / logits.shape[1], requires_grad=True)
        loss = soft_cross_entropy(labels, logits).mean()
        gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        after = {name: p - step.rate * g for (name, p), g in zip(parameters.items(), gradient, strict=True)}
        with without_trace(step.student.network, dropout=False):
            logits = functional_call(step.student.network, after, (step.images_l,))
        return torch.autograd.grad(F.cross_entropy(logits, step.targets), labels)[0]


ESTIMATORS = {"double-backward": DoubleBackward}
FORMS = {
    "none": "--feedback none",
    "none, weak pass apart": "--feedback none --weak-pass apart",
    "none, weak pass ema": "--feedback none --weak-pass ema",
    "taylor": "--feedback taylor",
    "dot": "--feedback dot",
    "exact, forward mode": "--feedback exact --feedback-jvp forward",
    "exact, difference": "--feedback exact --feedback-jvp difference",
    "double backward": "--feedback double-backward",
}


def main(argv=None):
    args = parse_step(new_parser("benchmarks.feedback", __doc__), argv)
    processes = {
        name: StepProcess([*args.words, *flags.split()], args.threads, ESTIMATORS)
        for name, flags in FORMS.items()
    }
    seconds = dict(zip(FORMS, medians(processes.values(), args.repeats), strict=True))
    memory = {name: process.memory for name, process in processes.items()}
    for process in processes.values():
        process.close()
    print(f"{describe(args.options, args.threads)}, median of {args.repeats} steps")
    print(f"{'feedback':<24}{'ms/step':>12}{'ratio':>8}{'peak MiB':>12}{'ratio':>8}")
    for name in FORMS:
        ratio, more = seconds[name] / seconds["none"], memory[name] / memory["none"]
        print(f"{name:<24}{1000 * seconds[name]:>12.1f}{ratio:>8.2f}{memory[name]:>12.0f}{more:>8.2f}")


if __name__ == "__main__":
    run("benchmarks.feedback", main)
