"""How fast the data path is, as ratios between two ways of doing the same thing in one run.

    python benchmark.py augment                          # 896 pairs of 32 × 32: one CIFAR-10 step
    python benchmark.py augment --size 224 --pairs 64    # the ImageNet policy
    python benchmark.py augment --device cuda --static   # the form without branches, on the GPU
    python benchmark.py data                             # what a training step spends outside its networks
    python benchmark.py decode                           # photographs from disk, against torchvision
    python benchmark.py step                             # what each feedback, and the weak pass, costs
    python benchmark.py scale                            # two processes against one with two threads

A figure alone says as much about the machine as about the code. So each subcommand measures both ways
alternately, in one run, and prints the ratio of the medians.
"""

import argparse
import functools
import os
import random
import resource
import socket
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.multiprocessing as multiprocessing
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch.func import functional_call
from torchvision import transforms
from torchvision.transforms import functional

import feedback
import main as training
from augmentation import GREY, OPERATIONS, ImageViews
from data import Dataset, ImageSet, TrainLoader, read_crop
from methods import METHODS, soft_cross_entropy
from models import build_model, count_flops, count_parameters
from runtime import Runtime
from utils import Meters

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


# -------------------------------------------------------------------------------------------------- measuring


def median_seconds(functions, repeats):
    """Seconds per call of each function: the median of ``repeats`` calls, made in turns after a warm-up."""
    seconds = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, samples in zip(functions, seconds, strict=True):
            start = time.perf_counter()
            function()
            if repeat:
                samples.append(time.perf_counter() - start)
    return [statistics.median(samples) for samples in seconds]


def print_ratios(unit, rows):
    """rows: (what, rate of this project, rate of the reference), both in ``unit``."""
    print(f"{'':<24}{'here':>12}{'reference':>12}{'ratio':>8}   {unit}")
    for what, here, reference in rows:
        print(f"{what:<24}{here:>12,.0f}{reference:>12,.0f}{here / reference:>8.1f}")


# --------------------------------------------------------------------- augment: the reference, image by image


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
            strong = self.weak(self.cutout(strong, self.views.size // 4))
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
        match name:
            case "AutoContrast":
                return ImageOps.autocontrast(image)
            case "Equalize":
                return ImageOps.equalize(image)
            case "Invert":
                return ImageOps.invert(image)
            case "Rotate":
                return image.rotate(signed, fillcolor=(GREY,) * 3)
            case "Posterize":
                return ImageOps.posterize(image, min(argument, 8))
            case "Solarize":
                return ImageOps.solarize(image, argument)
            case "ShearX":
                return self.affine(image, (1, signed, 0, 0, 1, 0))
            case "ShearY":
                return self.affine(image, (1, 0, 0, signed, 1, 0))
            case "TranslateX":
                return self.affine(image, (1, 0, signed, 0, 1, 0))
            case "TranslateY":
                return self.affine(image, (1, 0, 0, 0, 1, signed))
            case "Cutout":
                return self.cutout(image, argument)
            case _:  # Color, Contrast, Brightness, Sharpness
                return getattr(ImageEnhance, name)(image).enhance(argument)

    def affine(self, image, matrix):
        return image.transform(image.size, Image.Transform.AFFINE, matrix, fillcolor=(GREY,) * 3)

    def cutout(self, image, half):
        column, row = random.randrange(image.width), random.randrange(image.height)
        image = image.copy()
        image.paste((GREY,) * 3, (column - half, row - half, column + half, row + half))
        return image

    def to_tensor(self, image):
        return functional.normalize(functional.to_tensor(image), MEAN, STD)


def augment(args):
    """Pairs of weak and strong views per second, here and through Pillow.

    On all threads, Pillow runs as data-loader workers would: one process per core, a batch each, handed back
    in shared memory.
    """
    small = args.size <= 64
    crop, randaug = ("pad", (2, 16)) if small else ("none", (2, 17))
    policy = functools.partial(ImageViews, args.size, MEAN, STD, crop=crop, randaug=randaug)
    views = policy(static=args.static)
    pillow = PillowPairs(policy(), args.batched_reference)  # its own: it is sent to the workers
    photographs = torch.randint(256, (args.pairs, 3, args.size // 8, args.size // 8), dtype=torch.uint8)
    images = torch.nn.functional.interpolate(photographs, size=args.size, mode="bilinear")
    layout = (
        images.permute(0, 2, 3, 1).contiguous().share_memory_()
    )  # a data set's arrays, seen by all workers
    images = images.to(args.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()

    def here():
        for _ in range(args.batches):
            pair = views.pair(images)
        return [float(view[-1, -1, -1, -1]) for view in pair]  # waits for the device

    rows = []
    with multiprocessing.Pool(cores, torch.set_num_threads, (1,)) as pool:
        for threads in sorted({1, cores}):
            torch.set_num_threads(threads)
            if threads == 1:
                reference = functools.partial(pillow, layout)
            else:
                reference = functools.partial(pool.map, pillow, [layout] * cores, 1)
            seconds_here, seconds_reference = median_seconds((here, reference), args.repeats)
            rate_here = args.batches * args.pairs / seconds_here
            rows.append((f"{threads} thread(s)", rate_here, threads * args.pairs / seconds_reference))
            print(f"{threads} thread(s): {1000 * seconds_here / args.batches:.2f} ms per batch here")
    form = "every operation" if args.static else "drawn operations"
    print(f"{args.pairs} pairs of {args.size} × {args.size}, {form}, device {args.device}")
    print_ratios("pairs/s; reference: Pillow on CPU", rows)


# ------------------------------------------------------------------------------------- data: the whole step


def training_step(args, flags=()):
    """The parts of one MPL step on random images of 32 pixels: loader, views, method."""
    size = ["--batch-size", str(args.batch_size), "--mu", str(args.mu), "--model", args.model]
    recipe = ["--dataset", "cifar10", "--nesterov", "--warmup-steps", "10", "--device", args.device, *size]
    recipe += [
        flag
        for flag in ("--amp", "--channels-last", "--compile")
        if getattr(args, flag[2:].replace("-", "_"))
    ]
    options = training.parse_arguments([*recipe, *flags])
    runtime = Runtime(
        options.device, options.amp, channels_last=options.channels_last, compiled=options.compile
    )
    images = torch.randint(256, (5000, 3, 32, 32), dtype=torch.uint8)
    whole = ImageSet(torch.arange(5000) % 10, images)
    dataset = Dataset(
        name="cifar10",
        classes=[str(k) for k in range(10)],
        mean=MEAN,
        std=STD,
        flip=True,
        size=32,
        crop="pad",
        labeled=whole.subset(range(1000)),
        unlabeled=whole,
        val=None,
        test=whole,
        labeled_indices=list(range(1000)),
    )
    loader = TrainLoader(dataset, options.batch_size, options.mu, 0, runtime)
    views = training.build_views(options, dataset, runtime)
    return loader, views, METHODS["mpl"](options, 10, 32, runtime), runtime


def data(args):
    """Share of a training step outside forward, backward and optimiser: drawing, augmenting, metering."""
    loader, views, method, runtime = training_step(args)
    meters = Meters(runtime)
    shares, seconds = [], []
    for step in range(args.repeats + 1):
        start = time.perf_counter()
        batch = next(loader)
        drawn = views(batch.images_l, batch.targets, batch.images_u, loader.generator)
        runtime.wait()
        ready = time.perf_counter()
        scalars = method.step(drawn, step, batch.targets_u)
        runtime.wait()
        stepped = time.perf_counter()
        meters.update(scalars, step)
        runtime.wait()
        end = time.perf_counter()
        if step:
            shares.append((ready - start + end - stepped) / (end - start))
            seconds.append(end - start)
    size = f"batch {args.batch_size}, mu {args.mu}, {torch.get_num_threads()} thread(s), {runtime.describe()}"
    print(f"{args.model}, {size}: {1000 * statistics.median(seconds):.1f} ms per step")
    print(f"outside the networks: {100 * statistics.median(shares):.2f} % of the step")


# ------------------------------------------------------------------------------ decode: photographs from disk


def photographs(folder, count, generator):
    """JPEGs like photographs, of ImageNet's usual 500 × 375 pixels: blurred noise of several scales."""
    for number in range(count):
        size = (375, 500) if number % 4 else (500, 375)
        layers = [
            torch.nn.functional.interpolate(
                torch.rand(1, 3, cells, cells, generator=generator), size, mode="bicubic"
            )
            for cells in (3, 12, 48, 192)
        ]
        image = sum(layer / 2**octave for octave, layer in enumerate(layers)) / 2
        pixels = (255 * image.clamp(0, 1)).byte()[0].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(os.path.join(folder, f"{number}.jpg"), quality=90)


def decode(args):
    """Training and evaluation crops of JPEG files on one core: this project's reader and normalisation of
    batches, against torchvision's reference transforms, image by image."""
    torch.set_num_threads(1)
    normalize = transforms.Normalize(MEAN, STD)
    flipped = transforms.RandomHorizontalFlip()
    bicubic = transforms.InterpolationMode.BICUBIC
    train = transforms.Compose(
        [
            transforms.RandomResizedCrop(args.size, interpolation=bicubic),
            *(flipped, transforms.ToTensor(), normalize),
        ]
    )
    evaluation = transforms.Compose(
        [
            transforms.Resize(round(args.size * 256 / 224), interpolation=bicubic),
            *(transforms.CenterCrop(args.size), transforms.ToTensor(), normalize),
        ]
    )
    views = ImageViews(args.size, MEAN, STD, crop="none", randaug=None)

    def here(random):
        images = torch.stack([read_crop(path, args.size, random) for path in paths])
        return views.evaluation(images if random is None else views.weak(images))

    def reference(transform):
        return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])

    with tempfile.TemporaryDirectory() as folder:
        if args.data_path is None:
            photographs(folder, args.images, torch.Generator().manual_seed(0))
        root = Path(args.data_path or folder)
        paths = [str(path) for path in sorted(root.rglob("*")) if path.suffix.lower() in (".jpg", ".jpeg")]
        paths = paths[: args.images]
        random = np.random.default_rng(0)
        rows = []
        for name, one, transform in (("training crop", random, train), ("evaluation crop", None, evaluation)):
            seconds = median_seconds(
                (functools.partial(here, one), functools.partial(reference, transform)), args.repeats
            )
            rows.append((name, *(len(paths) / each for each in seconds)))
    print(f"{len(paths)} JPEGs to {args.size} × {args.size}, one core")
    print_ratios("images/s; reference: torchvision's transforms", rows)


# ---------------------------------------------------------------------------------- step: the feedback's cost


def double_backward(step):
    """What ``feedback.exact`` computes, by differentiating through the step with a graph of its gradient."""
    parameters = {name: before.clone().requires_grad_() for name, before in step.before.items()}
    with feedback.without_trace(step.network):
        logits = feedback.student_logits(step, parameters)
    labels = torch.full_like(logits, 1 / logits.shape[1], requires_grad=True)
    loss = soft_cross_entropy(labels, logits).mean()
    gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    after = {name: p - step.rate * g for (name, p), g in zip(parameters.items(), gradient, strict=True)}
    with feedback.without_trace(step.network, dropout=False):
        logits = functional_call(step.network, after, (step.images_l,))
    return torch.autograd.grad(F.cross_entropy(logits.float(), step.targets), labels)[0]


FEEDBACKS = {
    "none": ("--feedback", "none"),
    "none, weak pass apart": ("--feedback", "none", "--weak-pass", "apart"),
    "none, weak pass ema": ("--feedback", "none", "--weak-pass", "ema"),
    "taylor": ("--feedback", "taylor"),
    "dot": ("--feedback", "dot"),
    "exact, forward mode": ("--feedback", "exact", "--feedback-jvp", "forward"),
    "exact, difference": ("--feedback", "exact", "--feedback-jvp", "difference"),
    "double backward": ("--feedback", "exact"),  # the estimator is put in its place
}


def step_worker(name, args, pipe):
    """In a process of its own, so that its peak memory is its own: one step for each message, timed."""
    torch.set_num_threads(args.threads)
    loader, views, method, runtime = training_step(args, FEEDBACKS[name])
    if name == "double backward":
        feedback.ESTIMATORS["exact"] = double_backward
    batch = next(loader)
    drawn = views(batch.images_l, batch.targets, batch.images_u, loader.generator)
    step = 0
    while pipe.recv() == "step":
        runtime.wait()
        start = time.perf_counter()
        method.step(drawn, step, batch.targets_u)
        runtime.wait()
        step += 1
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if runtime.kind == "cuda":
            memory = torch.cuda.max_memory_allocated() / 2**20
        pipe.send((time.perf_counter() - start, memory))


def step(args):
    """Seconds and peak memory of one MPL step with each form of the feedback, as ratios to none."""
    context = multiprocessing.get_context("spawn")
    pipes, seconds, memory = {}, {name: [] for name in FEEDBACKS}, {}
    for name in FEEDBACKS:
        pipes[name], end = context.Pipe()
        context.Process(target=step_worker, args=(name, args, end), daemon=True).start()
        end.close()  # the worker has its own: if it dies, reading from the pipe ends, too
    for repeat in range(args.repeats + 1):
        for name, pipe in pipes.items():  # in turns: one works while the others wait
            pipe.send("step")
            taken, memory[name] = pipe.recv()
            if repeat:
                seconds[name].append(taken)
    for pipe in pipes.values():
        pipe.send("end")
    size = f"batch {args.batch_size}, mu {args.mu}, {args.threads} thread(s), {args.device}"
    print(f"{args.model}, {size}, median of {args.repeats} steps")
    print(f"{'feedback':<24}{'ms/step':>12}{'ratio':>8}{'peak MiB':>12}{'ratio':>8}")
    for name in FEEDBACKS:
        median = statistics.median(seconds[name])
        ratio, more = median / statistics.median(seconds["none"]), memory[name] / memory["none"]
        print(f"{name:<24}{1000 * median:>12.1f}{ratio:>8.2f}{memory[name]:>12.0f}{more:>8.2f}")


# ----------------------------------------------------------------------------------- scale: several processes


def scale_worker(rank, world_size, args, pipe):
    """One of ``world_size`` processes: takes a step when it is told to and answers with its seconds."""
    torch.set_num_threads(args.threads // world_size)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(args.port)}
    share = argparse.Namespace(**{**vars(args), "batch_size": args.batch_size // world_size})
    loader, views, method, runtime = training_step(share)
    step = 0
    while pipe.recv() == "step":
        start = time.perf_counter()
        batch = next(loader)
        method.step(views(batch.images_l, batch.targets, batch.images_u, loader.generator), step)
        runtime.wait()
        step += 1
        pipe.send(time.perf_counter() - start)
    runtime.close()


def scale(args):
    """Images per second of two processes (gloo), half the threads and half the batch each, against one."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        args.port = free.getsockname()[1]
    groups, seconds = {}, {1: [], 2: []}
    for world_size in seconds:
        groups[world_size] = []
        for rank in range(world_size):
            pipe, end = context.Pipe()
            worker = context.Process(target=scale_worker, args=(rank, world_size, args, end), daemon=True)
            worker.start()
            end.close()  # as in step
            groups[world_size].append(pipe)
    for repeat in range(args.repeats + 1):
        for world_size, pipes in groups.items():  # in turns: one group works while the other waits
            for pipe in pipes:
                pipe.send("step")
            taken = max(pipe.recv() for pipe in pipes)
            if repeat:
                seconds[world_size].append(taken)
    for pipes in groups.values():
        for pipe in pipes:
            pipe.send("end")
    images = args.batch_size * (1 + args.mu)
    rate = {size: images / statistics.median(samples) for size, samples in seconds.items()}
    network = build_model(args.model, 10)
    reduced = 2 * 4 * count_parameters(network)  # both networks' gradients, float32
    operations = count_flops(network, 32) * args.batch_size
    # forward and backward are three forward passes: the teacher's on 1 + 2μ images, the student's on μ
    operations *= 3 * (1 + 3 * args.mu)
    print(f"{args.model}, batch {args.batch_size}, mu {args.mu}, {args.threads} threads in all")
    print_ratios("images/s; reference: one process", [("two processes", rate[2], rate[1])])
    print(
        f"a step reduces {reduced / 1e6:.2f} MB per process and computes "
        f"{operations / 1e9:.1f} G multiply-adds in all"
    )


# ----------------------------------------------------------------------------------------------- command line


def add_step_arguments(command, batch_size, repeats):
    command.add_argument("--model", default="wrn-28-2", help="network of teacher and student")
    command.add_argument("--batch-size", type=int, default=batch_size, help="labelled images")
    command.add_argument("--mu", type=int, default=7, help="unlabelled images per labelled one")
    command.add_argument("--device", default="cpu", help="cpu or cuda")
    command.add_argument("--amp", action="store_true", help="bf16")
    command.add_argument("--channels-last", action="store_true", help="memory order of the recipes")
    command.add_argument("--compile", action="store_true", help="as in main.py")
    command.add_argument("--repeats", type=int, default=repeats, help="steps that are measured")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("augment", help="weak and strong views of a batch, against Pillow")
    command.add_argument(
        "--size", type=int, default=32, help="side of the images in pixels; above 64: ImageNet"
    )
    command.add_argument("--pairs", type=int, default=896, help="images per batch (CIFAR-10 recipe: 7 · 128)")
    command.add_argument("--device", default="cpu", help="where the batch of this project lives")
    command.add_argument("--static", action="store_true", help="the form with static shapes and no branches")
    command.add_argument(
        "--batched-reference",
        action="store_true",
        help="let the reference convert and normalise whole batches",
    )
    command.add_argument("--batches", type=int, default=5, help="batches per measurement of this project")
    command.add_argument("--repeats", type=int, default=7, help="measurements of each, alternating")
    command.set_defaults(run=augment)

    command = commands.add_parser("data", help="share of a training step outside its networks")
    add_step_arguments(command, batch_size=32, repeats=5)
    command.set_defaults(run=data)

    command = commands.add_parser("decode", help="photographs from disk, against torchvision's transforms")
    command.add_argument("--data-path", help="folder of JPEGs (default: some are made)")
    command.add_argument("--images", type=int, default=64, help="how many of them")
    command.add_argument("--size", type=int, default=224, help="side of the crops in pixels")
    command.add_argument("--repeats", type=int, default=7, help="measurements of each, alternating")
    command.set_defaults(run=decode)

    command = commands.add_parser("scale", help="two processes on the CPU against one")
    add_step_arguments(command, batch_size=32, repeats=5)
    command.add_argument("--threads", type=int, default=2, help="CPU threads over all processes")
    command.set_defaults(run=scale)

    command = commands.add_parser(
        "step", help="cost of each form of the feedback and of the weak pass, against none"
    )
    add_step_arguments(command, batch_size=8, repeats=5)
    command.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    command.set_defaults(run=step)

    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
