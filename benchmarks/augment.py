"""Pairs of weak and strong views per second, compared with the same policy in Pillow, image by image.

    python -m benchmarks.augment                          # 896 pairs of 32 × 32: one CIFAR-10 step
    python -m benchmarks.augment --size 224 --pairs 64    # the ImageNet policy
    python -m benchmarks.augment --device cuda --static   # the form without branches, on the GPU

Both are measured on one thread, then on all threads. Pillow on all threads works like the workers of a data
loader: one process per core makes a batch and hands it back in shared memory.
"""

import functools
import random

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms import functional

from augmentation import GREY, OPERATIONS, ImageViews
from benchmarks.common import MEAN, STD, median_seconds, new_parser, print_ratios, processor_cores, run


def affine(image, *matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=(GREY,) * 3)


def cutout(image, half):
    column, row = random.randrange(image.width), random.randrange(image.height)
    image = image.copy()
    image.paste((GREY,) * 3, (column - half, row - half, column + half, row + half))
    return image


PILLOW = {  # (image, argument, the argument with a random sign); all others are in ImageEnhance
    "AutoContrast": lambda image, x, signed: ImageOps.autocontrast(image),
    "Equalize": lambda image, x, signed: ImageOps.equalize(image),
    "Invert": lambda image, x, signed: ImageOps.invert(image),
    "Rotate": lambda image, x, signed: image.rotate(signed, fillcolor=(GREY,) * 3),
    "Posterize": lambda image, x, signed: ImageOps.posterize(image, min(x, 8)),
    "Solarize": lambda image, x, signed: ImageOps.solarize(image, x),
    "ShearX": lambda image, x, signed: affine(image, 1, signed, 0, 0, 1, 0),
    "ShearY": lambda image, x, signed: affine(image, 1, 0, 0, signed, 1, 0),
    "TranslateX": lambda image, x, signed: affine(image, 1, 0, signed, 0, 1, 0),
    "TranslateY": lambda image, x, signed: affine(image, 1, 0, 0, 0, 1, signed),
    "Cutout": lambda image, x, signed: cutout(image, x),
}


class PillowPairs:
    """The policy of ImageViews the way a data set does it: Pillow and torchvision, one image at a time.

    views: the ImageViews to imitate; sizes and arguments are read from it. batched: convert and normalise all
    images at once instead of one by one, which data sets do not do, but which is the harder reference.
    """

    def __init__(self, views, batched=False):
        self.views = views
        self.batched = batched
        self.arguments = views.randaug.arguments(views.size, views.size)

    def __call__(self, images):
        """images: (N, H, W, 3) uint8 → weak, strong: (N, 3, H, W) float32, normalised."""
        if self.batched:
            pairs = [[np.asarray(view) for view in self.pair(image)] for image in images.numpy()]
            stacked = (torch.from_numpy(np.stack(views)) for views in zip(*pairs, strict=True))
            return tuple(self.views.evaluation(view.permute(0, 3, 1, 2).contiguous()) for view in stacked)
        pairs = [[self.to_tensor(view) for view in self.pair(image)] for image in images.numpy()]
        return tuple(torch.stack(views) for views in zip(*pairs, strict=True))

    def pair(self, image):
        """(H, W, 3) uint8 array → weak and strong view, as Pillow images."""
        weak = self.weak(Image.fromarray(image))
        strong = weak
        p = random.uniform(0.2, 0.8)
        for _ in range(self.views.randaug.num_layers):
            if random.random() < p:
                strong = self.operate(random.choice(OPERATIONS), strong)
        if self.views.crop == "pad":
            strong = self.weak(cutout(strong, self.views.size // 4))
        return weak, strong

    def weak(self, image):
        size = self.views.size
        if self.views.flip and random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.views.crop == "pad":
            left, top = random.randint(0, size // 4), random.randint(0, size // 4)
            image = ImageOps.expand(image, size // 8, (GREY,) * 3).crop((left, top, left + size, top + size))
        return image

    def operate(self, name, image):
        argument = self.arguments[name]
        signed = random.choice((1, -1)) * (argument or 0)
        if name in PILLOW:
            return PILLOW[name](image, argument, signed)
        return getattr(ImageEnhance, name)(image).enhance(argument)

    def to_tensor(self, image):
        return functional.normalize(functional.to_tensor(image), MEAN, STD)


def main(argv=None):
    parser = new_parser("benchmarks.augment", __doc__)
    add = parser.add_argument
    add("--size", type=int, default=32, help="side of the images in pixels; above 64: the ImageNet policy")
    add("--pairs", type=int, default=896, help="images per batch (CIFAR-10 recipe: 7 · 128)")
    add("--device", default="cpu", help="device on which this project makes its views")
    add("--static", action="store_true", help="the form with static shapes and no branches, as on a GPU")
    add("--batched-reference", action="store_true", help="convert Pillow's views in whole batches")
    add("--batches", type=int, default=5, help="batches in a measurement of this project")
    add("--repeats", type=int, default=7, help="measurements of each variant")
    args = parser.parse_args(argv)

    crop, randaug = ("pad", (2, 16)) if args.size <= 64 else ("none", (2, 17))
    policy = functools.partial(ImageViews, args.size, MEAN, STD, crop=crop, randaug=randaug)
    views = policy(static=args.static)
    pillow = PillowPairs(policy(), args.batched_reference)  # sent to the workers
    photographs = torch.randint(256, (args.pairs, 3, args.size // 8, args.size // 8), dtype=torch.uint8)
    images = torch.nn.functional.interpolate(photographs, size=args.size, mode="bilinear")
    layout = images.permute(0, 2, 3, 1).contiguous().share_memory_()  # a data set's arrays, for all workers
    images = images.to(args.device)
    labeled, target = images[:1], torch.zeros(1, dtype=torch.int64)  # as training calls it

    def here():
        for _ in range(args.batches):
            made = views(labeled, target, images)
        return [float(view[-1, -1, -1, -1]) for view in (made.weak, made.strong)]  # waits for the device

    rows, cores = [], processor_cores()
    with multiprocessing.Pool(cores, torch.set_num_threads, (1,)) as pool:
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            reference = functools.partial(pillow, layout)
            if threads > 1:
                reference = functools.partial(pool.map, pillow, [layout] * cores, 1)
            seconds, pillow_seconds = median_seconds((here, reference), args.repeats)
            rate = args.batches * args.pairs / seconds
            rows.append((f"{threads} thread(s)", rate, threads * args.pairs / pillow_seconds))
    form = "every operation" if args.static else "drawn operations"
    print(f"{args.pairs} pairs of {args.size} × {args.size}, {form}, device {args.device}")
    print_ratios("pairs/s; reference: Pillow on CPU", rows)


if __name__ == "__main__":
    run("benchmarks.augment", main)
