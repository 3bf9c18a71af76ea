"""A step of Meta Pseudo Labels as public PyTorch code writes it; ``benchmarks/step.py`` compares with it."""

import copy

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

from augmentation import GREY
from benchmarks.common import MEAN, STD
from models import build_model


class PlainImages(torch.utils.data.Dataset):
    """Random images whose views are made one by one from Pillow images, as data sets usually do.

    One item: a labelled image in its weak view (3, H, W), its class, and the weak and the strong views of
    ``mu`` unlabelled images, (mu, 3, H, W) each.
    """

    def __init__(self, length, mu, size):
        self.length, self.mu = length, mu
        self.images = np.random.default_rng(0).integers(256, size=(1000, size, size, 3), dtype=np.uint8)
        crop = [
            transforms.RandomHorizontalFlip(),
            transforms.RandomCrop(size, padding=size // 8, fill=GREY),
        ]
        to_tensor = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
        cutout = transforms.RandomErasing(p=1, scale=(0.25, 0.25), ratio=(1, 1))
        self.weak = transforms.Compose([*crop, *to_tensor])
        self.strong = transforms.Compose([*crop, transforms.RandAugment(2, 16), *to_tensor, cutout])

    def __len__(self):
        return self.length

    def __getitem__(self, item):
        first = item * (1 + self.mu)
        numbers = [number % len(self.images) for number in range(first, first + 1 + self.mu)]
        labeled, *unlabeled = [Image.fromarray(self.images[number]) for number in numbers]
        weak = torch.stack([self.weak(image) for image in unlabeled])
        strong = torch.stack([self.strong(image) for image in unlabeled])
        return self.weak(labeled), numbers[0] % 10, weak, strong


class PlainStep:
    """The step, with the flags of ``args`` (main.py's), float32 and contiguous.

    Hard pseudo labels from the weak views, the labelled images inside the student's batch, the feedback
    (L_new − L_old) · CE(argmax T(strong), T(strong)), a moving average updated parameter by parameter, and
    every loss read in every step.
    """

    def __init__(self, args, size, device):
        self.args, self.device = args, device
        self.teacher = build_model(args.model, 10, image_size=size).to(device)
        self.student = build_model(args.model, 10, image_size=size).to(device)
        self.average = copy.deepcopy(self.student)
        self.teacher_sgd = self.sgd(self.teacher, args.teacher_lr)
        self.student_sgd = self.sgd(self.student, args.student_lr)

    def sgd(self, network, rate):
        momentum, decay = self.args.momentum, self.args.weight_decay
        return torch.optim.SGD(network.parameters(), rate, momentum, nesterov=True, weight_decay=decay)

    def __call__(self, labeled, targets, weak, strong):
        """As a loader gives them: (B, 3, H, W), (B,), (B, mu, 3, H, W) twice. → {name: float}"""
        args, smoothing = self.args, self.args.label_smoothing
        labeled, targets = labeled.to(self.device), targets.to(self.device)
        weak, strong = weak.flatten(0, 1).to(self.device), strong.flatten(0, 1).to(self.device)

        # the teacher labels
        logits = self.teacher(torch.cat([labeled, weak, strong]))
        logits_l, logits_w, logits_s = logits.split([len(labeled), len(weak), len(strong)])
        sharpened = torch.softmax(logits_w.detach() / args.temperature, dim=1)
        confidence, labels = sharpened.max(dim=1)

        # the student learns
        student_logits = self.student(torch.cat([labeled, strong]))
        old_loss = F.cross_entropy(student_logits[: len(labeled)].detach(), targets)
        student_loss = F.cross_entropy(student_logits[len(labeled) :], labels, label_smoothing=smoothing)
        update(self.student_sgd, student_loss)
        with torch.no_grad():
            new_loss = F.cross_entropy(self.student(labeled), targets)

        # the teacher learns
        labeled_loss = F.cross_entropy(logits_l, targets, label_smoothing=smoothing)
        confident = (confidence >= args.threshold).float()
        uda_loss = (confident * F.cross_entropy(logits_s, sharpened, reduction="none")).mean()
        feedback_loss = (new_loss - old_loss) * F.cross_entropy(logits_s, logits_s.argmax(dim=1))
        teacher_loss = labeled_loss + args.lambda_u * uda_loss + feedback_loss
        update(self.teacher_sgd, teacher_loss)

        with torch.no_grad():
            for averaged, parameter in zip(self.average.parameters(), self.student.parameters(), strict=True):
                averaged.mul_(args.ema).add_(parameter, alpha=1 - args.ema)
            for averaged, buffer in zip(self.average.buffers(), self.student.buffers(), strict=True):
                averaged.copy_(buffer)
        losses = dict(labeled_loss=labeled_loss, uda_loss=uda_loss, feedback_loss=feedback_loss)
        losses |= dict(old_loss=old_loss, new_loss=new_loss)
        losses |= dict(student_loss=student_loss, teacher_loss=teacher_loss)
        return {name: loss.item() for name, loss in losses.items()}


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
