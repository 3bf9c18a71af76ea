"""Meta Pseudo Labels (Pham, Dai, Xie, Luong, Le, CVPR 2021) on one page. Needs PyTorch and nothing else.

    python docs/minimal.py                  # supervised, hard and soft labels: half a minute on one CPU core
    python docs/minimal.py soft --seed 3    # one of them

Two moons: 2,000 points in the plane, two classes, 6 labels. A teacher T labels the points, a student S learns
from these labels alone, and the teacher learns from three things: the 6 labels, its own consistency under
noise (UDA, Xie et al. 2020), and the feedback, how the student's step changed its loss on the 6 labels.
Nearly all of the gain over the labels alone is UDA's: FEEDBACK_WEIGHT = 0 ends at about the same accuracy.

To use it elsewhere, copy ``step`` and bring your own networks and views. As it stands, it is for networks
without batch norm and dropout. Batch norm must not update its running statistics while the feedback is
measured. Dropout must be off for L_old, L_new and v, and draw the masks of the student's step again in the
forward-mode pass. ``feedback.py`` in this repository shows how.
"""

import argparse
import copy
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jvp

STEPS = 4000
BATCH = 200  # unlabelled points in a step; all 6 labelled points are in every step
RATE = 0.3  # peak learning rate of every network
WARMUP = 800  # steps in which the learning rate grows; then it falls along a cosine
NOISE = 0.2  # standard deviation of the strong view's noise
TEMPERATURE = 0.3  # τ: UDA's target is softmax(logits / τ), sharper than the prediction if τ < 1
THRESHOLD = 0.9  # only points whose target is at least this certain count in the UDA loss
UDA_WEIGHT, UDA_STEPS = 8.0, 1500  # λ, and the steps over which it grows from 0
FEEDBACK_WEIGHT = 1.0  # 0: a UDA teacher whose labels a student learns, to see what the feedback adds
EMA = 0.995  # decay of the student's moving average


# ---------------------------------------------------------------- data, views, networks


def two_moons():
    """Two interleaved half circles, scaled to mean 0 and deviation 1: points (2000, 2), classes (2000,)."""
    angle = torch.linspace(0, math.pi, 1000)
    upper = torch.stack([angle.cos(), angle.sin()], dim=1)
    lower = torch.stack([1 - angle.cos(), 0.5 - angle.sin()], dim=1)
    points = torch.cat([upper, lower]) + 0.1 * torch.randn(2000, 2)
    return (points - torch.tensor([0.5, 0.25])) / torch.tensor([0.87, 0.5]), torch.arange(2000) // 1000


def views(points):
    """Weak and strong view of the same points. For images: flip and crop, and RandAugment on top."""
    return points, points + NOISE * torch.randn_like(points)


def network():
    """Points (N, 2) to logits (N, 2)."""
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2))


def sgd(network):
    return torch.optim.SGD(network.parameters(), lr=RATE, momentum=0.9, nesterov=True)


# ---------------------------------------------------------------- one step of Meta Pseudo Labels


def step(teacher, student, teacher_sgd, student_sgd, x, y, weak, strong, uda_weight, soft):
    """On B labelled inputs x of classes y (B,), and the weak and the strong view of N unlabelled inputs.

    ``soft`` pseudo labels are distributions over the K classes; otherwise they are hard, one class each.
    """
    # 1. The teacher labels the weak views: soft labels are its prediction q, hard labels the most probable
    #    class (the paper draws a class from q).
    t_x, t_weak, t_strong = teacher(torch.cat([x, weak, strong])).split([len(x), len(weak), len(strong)])
    q = F.softmax(t_weak, dim=1)  # (N, K), with its graph: the feedback reaches the teacher through it
    labels = q.detach() if soft else F.one_hot(q.argmax(dim=1), q.shape[1]).to(q.dtype)  # (N, K)

    # 2. The student takes a step on these labels: θ' = θ − η ∇ CE(labels, S(strong; θ)).
    theta = {name: p.detach().clone() for name, p in student.named_parameters()}
    loss_old = F.cross_entropy(student(x), y).detach()
    student_sgd.zero_grad()
    F.cross_entropy(student(strong), labels).backward()
    student_sgd.step()
    loss_new = F.cross_entropy(student(x), y)  # J = CE(y, S(x; θ')), which the teacher should minimise

    # 3. The feedback to the teacher.
    if soft:
        # Without momentum θ' is linear in q: ∂J/∂q = η/N · d/dε log softmax S(strong; θ + ε v) at ε = 0, with
        # v = ∇J(θ'). One forward-mode pass gives all these values, one for each input and class.
        v = dict(zip(theta, torch.autograd.grad(loss_new, list(student.parameters())), strict=True))
        _, slope = jvp(lambda p: F.log_softmax(functional_call(student, p, (strong,)), dim=1), (theta,), (v,))
        rate = student_sgd.param_groups[0]["lr"]  # η
        feedback = (q * rate / len(strong) * slope).sum()
    else:
        # If the step lowered the student's loss, the teacher becomes surer of these labels, else less sure.
        feedback = (loss_old - loss_new.detach()) * F.cross_entropy(t_weak, labels)

    # 4. The teacher takes a step on the labels, UDA and the feedback. UDA: its prediction of the strong view
    #    should be its sharpened prediction of the weak view, wherever that is certain enough.
    target = F.softmax(t_weak.detach() / TEMPERATURE, dim=1)  # (N, K)
    certain = (target.amax(dim=1) >= THRESHOLD).to(target.dtype)  # (N,), 0 or 1
    uda = (certain * F.cross_entropy(t_strong, target, reduction="none")).mean()
    loss = F.cross_entropy(t_x, y) + uda_weight * uda + FEEDBACK_WEIGHT * feedback
    teacher_sgd.zero_grad()
    loss.backward()
    teacher_sgd.step()


@torch.no_grad()
def update_average(average, student, t):
    """Move the average toward the student after step t; the decay starts low to forget the first weights."""
    decay = min(EMA, (1 + t) / (10 + t))
    for mean, p in zip(average.parameters(), student.parameters(), strict=True):
        mean.lerp_(p, 1 - decay)


# ---------------------------------------------------------------- training


def train(method, steps, seed):
    """Train ``supervised``, or with ``hard`` or ``soft`` labels; return the accuracy on new points."""
    torch.manual_seed(seed)
    points, classes = two_moons()
    test_points, test_classes = two_moons()
    labeled = torch.cat([torch.randperm(1000)[:3], 1000 + torch.randperm(1000)[:3]])  # 3 of each class
    x, y = points[labeled], classes[labeled]  # training uses no other class

    teacher, student = network(), network()
    average = copy.deepcopy(student)  # the network that is evaluated
    teacher_sgd, student_sgd = sgd(teacher), sgd(student)
    for t in range(steps):
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, t - WARMUP) / max(1, steps - WARMUP))
        for optimizer in (teacher_sgd, student_sgd):
            optimizer.param_groups[0]["lr"] = RATE * min(1, (t + 1) / WARMUP) * cosine
        if method == "supervised":
            student_sgd.zero_grad()
            F.cross_entropy(student(x), y).backward()
            student_sgd.step()
        else:
            weak, strong = views(points[torch.randint(len(points), (BATCH,))])
            uda_weight = UDA_WEIGHT * min(1, (t + 1) / UDA_STEPS)
            step(teacher, student, teacher_sgd, student_sgd, x, y, weak, strong, uda_weight, method == "soft")
        update_average(average, student, t)

    with torch.no_grad():
        return (average(test_points).argmax(dim=1) == test_classes).float().mean().item()


if __name__ == "__main__":
    methods = ("supervised", "hard", "soft")
    parser = argparse.ArgumentParser(description="Meta Pseudo Labels on two moons with 6 labels.")
    parser.add_argument("method", nargs="?", choices=methods, help="default: all three")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # faster than several on tensors this small
    for method in [args.method] if args.method else methods:
        accuracy = train(method, args.steps, args.seed)
        print(f"{method:10}  {100 * accuracy:6.2f} % of the test points", flush=True)
