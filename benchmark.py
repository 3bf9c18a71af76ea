"""How fast the program is: ratios between two ways of doing one thing in one run, and a step taken apart.

    python benchmark.py augment                          # 896 pairs of 32 × 32: one CIFAR-10 step
    python benchmark.py augment --size 224 --pairs 64    # the ImageNet policy
    python benchmark.py augment --device cuda --static   # the form without branches, on the GPU
    python benchmark.py data                             # what a training step spends outside its networks
    python benchmark.py decode                           # photographs from disk, against torchvision
    python benchmark.py predict                          # predict.py on photographs, against decoding them
    python benchmark.py step                             # what each feedback, and the weak pass, costs
    python benchmark.py step --plain                     # a whole step against one as public code writes it
    python benchmark.py profile                          # a step's phases, kernels, bytes and FLOP
    python benchmark.py cost --picture cost.png          # time and memory over batch, μ, width and depth
    python benchmark.py scale                            # two processes against one with two threads

On a machine with a GPU, before and after a change of the step:

    recipe="--device cuda --model wrn-28-2 --batch-size 128 --mu 7 --amp --channels-last"
    ema="--weak-pass ema --feedback-view strong"
    python benchmark.py profile $recipe --repeats 20 --json profile.json
    python benchmark.py profile $recipe --repeats 20 --compile --json profile_compiled.json
    python benchmark.py profile $recipe --repeats 20 --compile $ema --json profile_ema.json
    python benchmark.py step $recipe --repeats 20
    python benchmark.py step --plain $recipe --compile $ema --repeats 5 --steps 20
    python benchmark.py cost $recipe --repeats 10 --batches 32 64 128 256 --json cost.json --picture cost.png

A figure alone says as much about the machine as about the code. So a comparison measures both ways
alternately, in one run, and prints the ratio of the medians, and a profile measures beside the step what the
machine can do. Commands that take steps understand main.py's flags, too: ``--feedback exact --accumulate 2``.
"""

import os
import sys

if __name__ == "__main__" and "predict" in sys.argv[1:2]:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as predict.py does, before PyTorch is imported

import argparse
import contextlib
import copy
import functools
import itertools
import json
import math
import operator
import random
import re
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
from torch.autograd import DeviceType
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torchvision import transforms
from torchvision.transforms import functional

import main as training
import predict as classifier
from augmentation import GREY, OPERATIONS, ImageViews
from data import Dataset
from engine.files import write_atomically
from engine.folders import image_tree
from engine.images import ImageSet, read_crop
from engine.learner import without_trace
from engine.loader import TrainLoader
from engine.runtime import Runtime
from methods import METHODS, feedback
from methods.method import soft_cross_entropy
from models import build_model, count_flops, count_parameters
from pictures import drawing
from utils import Meters, UserError

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


# -------------------------------------------------------------------------------------------------- measuring


def seconds_of(function):
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(measurements, repeats):
    """The median of what each measurement returns in ``repeats`` calls, made in turns after a warm-up."""
    results = [[measure() for measure in measurements] for _ in range(repeats + 1)][1:]
    return [statistics.median(samples) for samples in zip(*results, strict=True)]


def median_seconds(functions, repeats):
    """Seconds per call of each function, as ``medians``."""
    return medians([functools.partial(seconds_of, function) for function in functions], repeats)


def print_ratios(unit, rows, digits=1):
    """rows: (what, rate of this project, rate of the reference), in ``unit``. ``digits``: of the ratio."""
    print(f"{'':<24}{'here':>12}{'reference':>12}{'ratio':>8}   {unit}")
    for what, here, reference in rows:
        print(f"{what:<24}{here:>12,.0f}{reference:>12,.0f}{here / reference:>8.{digits}f}")


def threads_of(number):
    return f"{number} thread{'s' * (number != 1)}"


def processor_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def resident_peak():
    """The largest resident memory of this process so far, in MiB.

    Where Linux tells (VmHWM) it is the program's own; the general count begins at that of the parent.
    """
    with contextlib.suppress(OSError):
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
        if found:
            return int(found[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write_json(path, report):
    """The report as a JSON file, whole or not at all; nothing without a path."""
    if path:
        write_atomically(path, lambda file: file.write(json.dumps(report, indent=1).encode()))
        print(path)


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
    cores = processor_cores()

    labeled, target = images[:1], torch.zeros(1, dtype=torch.int64)  # as training calls it

    def here():
        for _ in range(args.batches):
            made = views(labeled, target, images)
        return [float(view[-1, -1, -1, -1]) for view in (made.weak, made.strong)]  # waits for the device

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
            rows.append((threads_of(threads), rate_here, threads * args.pairs / seconds_reference))
            print(f"{threads_of(threads)}: {1000 * seconds_here / args.batches:.2f} ms per batch here")
    form = "every operation" if args.static else "drawn operations"
    print(f"{args.pairs} pairs of {args.size} × {args.size}, {form}, device {args.device}")
    print_ratios("pairs/s; reference: Pillow on CPU", rows)


# -------------------------------------------------------------------------------------- a step of the program


def step_options(args, flags=()):
    """The arguments of main.py that a step is taken with; ``flags`` come after those of the command line."""
    size = ["--batch-size", str(args.batch_size), "--mu", str(args.mu), "--model", args.model]
    recipe = ["--dataset", "cifar10", "--nesterov", "--warmup-steps", "10", "--device", args.device, *size]
    recipe += [
        flag
        for flag in ("--amp", "--channels-last", "--compile")
        if getattr(args, flag[2:].replace("-", "_"))
    ]
    return training.parse_arguments([*recipe, *args.flags, *flags])


def runtime_of(options):
    return Runtime(
        options.device,
        options.amp,
        options.amp_dtype,
        channels_last=options.channels_last,
        compiled=options.compile,
        graphed=options.cuda_graph,
    )


def training_step(args, flags=()):
    """Loader, views, method and runtime of one step (MPL's unless the flags differ), on random images."""
    options = step_options(args, flags)
    runtime = runtime_of(options)
    images = torch.randint(256, (5000, 3, args.size, args.size), dtype=torch.uint8)
    whole = ImageSet(torch.arange(5000) % 10, images)
    dataset = Dataset(
        name="cifar10",
        classes=[str(k) for k in range(10)],
        mean=MEAN,
        std=STD,
        flip=True,
        size=args.size,
        crop="pad",
        labeled=whole.subset(range(1000)),
        unlabeled=whole,
        val=None,
        test=whole,
        labeled_indices=list(range(1000)),
    )
    loader = TrainLoader(dataset, options.batch_size, options.mu, 0, runtime)
    views = training.build_views(options, dataset, runtime)
    return loader, views, METHODS[options.method](options, 10, args.size, runtime), runtime


PHASES = (
    "drawing",
    "views",
    "teacher forward",
    "teacher backward",
    "student forward",
    "student backward",
    "feedback",
    "optimisers and EMA",
    "labels and losses",  # the rest of the method's step
    "metering",
    "rest",
)
DATA_PHASES = ("drawing", "views", "metering", "rest")
OUTSIDE = (*DATA_PHASES, "labels and losses")  # of networks and optimisers


class WatchedStep:
    """A training step, from the draw of its images to the meters, that knows at any moment its phase.

    A phase within another one interrupts it: ``teacher backward`` is without the forward passes and the
    losses that the learner evaluates on the way. Marks are around compiled networks, never inside. In a CUDA
    graph they are events of the graph, recorded anew by every replay.
    """

    def __init__(self, args):
        torch.set_num_threads(args.threads)
        self.loader, self.views, self.method, self.runtime = training_step(args)
        self.take = self.runtime.graph(self._take, self.loader.generator)
        self.meters = Meters(self.runtime, "")
        self.number = 0
        self.running = ["rest"]  # the phases that are not over, the innermost one last
        self.read = self.readings = None
        if self.method.args.method == "mpl":
            self.method.take_feedback = self._marked("feedback", self.method.take_feedback)
        for learner in self.method.learners.values():
            self._mark(learner)

    def _mark(self, learner):
        def role():  # --switch-every exchanges them
            return next(role for role, each in self.method.learners.items() if each is learner)

        def forward():
            return f"{role()} forward"

        learner.training_network = self._marked(forward, learner.training_network)
        learner.preview = self._marked(forward, learner.preview)
        learner.predict_average = self._marked(forward, learner.predict_average)
        learner.measure = self._marked("feedback", learner.measure)  # taylor's first, before the update
        learner.update = self._marked("optimisers and EMA", learner.update)
        backward = self._marked(lambda: f"{role()} backward", learner.backward)
        learner.backward = lambda loss, batches: backward(self._marked("labels and losses", loss), batches)

    def _marked(self, phase, function):
        def call(*args, **kwargs):
            with self.phase(phase() if callable(phase) else phase):
                return function(*args, **kwargs)

        return call

    @contextlib.contextmanager
    def phase(self, name):
        self._note()
        self.running.append(name)
        try:
            yield
        finally:
            self._note()
            self.running.pop()

    def _note(self):
        """What the meter reads at the end of a piece of a phase."""
        if self.read:
            self.readings.append((self.running[-1], self.read()))

    def __call__(self):
        with self.phase("drawing"):
            batch = next(self.loader)
        scalars = self.take(batch, self.number)
        with self.phase("metering"):
            self.meters.update(scalars, self.number)
        self.number += 1

    def _take(self, batch, number):
        with self.phase("views"):
            views = self.views(batch.images_l, batch.targets, batch.images_u, self.loader.generator)
        with self.phase("labels and losses"):
            return self.method.step(views, number, batch.targets_u)

    def amounts(self, read, difference, steps=1):
        """Take steps, one after the other without a wait; for each, {phase: how much of a quantity it took}.

        Args:
            read: returns what a meter of the quantity reads now.
            difference: of a later and an earlier reading; called when the device has done its work.
        """
        records = []
        for _ in range(steps):
            self.read, self.readings = read, []
            self._note()
            self()
            self._note()
            records.append(self.readings)
        self.read = None
        self.runtime.wait()
        return [self._by_phase(readings, difference) for readings in records]

    def graph_amounts(self, read, difference, steps):
        """As ``amounts``, of a step captured anew with its marks; waits for the device after every step."""
        graph, within = self.runtime.graph(self._take, self.loader.generator), []
        graph.warm_up = 0

        def take(batch, number):
            before = len(self.readings)
            scalars = graph(batch, number)
            within.extend(self.readings[before:])  # noted while it was captured, in the first step alone
            self.readings[before:] = within
            return scalars

        def read_here():
            return read(external=self.runtime.capturing is not None)

        self.take = take
        records = [self.amounts(read_here, difference)[0] for _ in range(steps)]
        self.take, self.marks = graph, within  # kept: every replay records into them
        return records

    @staticmethod
    def _by_phase(readings, difference):
        first = readings[0][1]
        amounts = dict.fromkeys(PHASES, difference(first, first))
        for (_, earlier), (phase, later) in itertools.pairwise(readings):
            amounts[phase] = amounts[phase] + difference(later, earlier)
        return amounts

    def seconds(self, steps):
        """{phase: seconds} of the step whose total is the median of ``steps``.

        On CUDA the device's own clock: events in the queue of its work, between which it may also idle.
        """

        def recorded(external=False):
            event = torch.cuda.Event(enable_timing=True, external=external)
            event.record()
            return event

        def elapsed(later, earlier):
            return earlier.elapsed_time(later) / 1000

        if self.runtime.graphed:
            records = self.graph_amounts(recorded, elapsed, steps)
        elif self.runtime.kind == "cuda":
            records = self.amounts(recorded, elapsed, steps)
        else:
            records = self.amounts(time.perf_counter, operator.sub, steps)
        return sorted(records, key=lambda record: sum(record.values()))[(steps - 1) // 2]

    def work(self):
        """{phase: [FLOP, bytes, bytes of products alone]} of one step, as ``Work`` counts them.

        What a compiled step would do without being compiled, and a replayed one when it is taken as it is.
        """
        take, self.take = self.take, self._take
        with self.runtime.uncompiled(), Work() as work:
            amounts = self.amounts(work.amounts.copy, np.subtract)[0]
        self.take = take
        return amounts


def describe_step(args, runtime):
    """The size of a step in words."""
    size = f"batch {args.batch_size}, mu {args.mu}, {args.size} pixels, {threads_of(args.threads)}"
    form = [str(runtime.amp_dtype or torch.float32).removeprefix("torch.")]
    form += ["channels last"] * runtime.channels_last + ["compiled"] * runtime.compiled
    return f"{' '.join([args.model, *args.flags])}, {size}, {', '.join(form)}, {runtime.describe()}"


def data(args):
    """Share of a training step outside its method: drawing, augmenting, metering."""
    step = WatchedStep(args)
    step()
    seconds = step.seconds(args.repeats)
    total, outside = sum(seconds.values()), sum(seconds[phase] for phase in DATA_PHASES)
    print(f"{describe_step(args, step.runtime)}: {1000 * total:.1f} ms per step")
    print(f"outside the networks: {100 * outside / total:.2f} % of the step")


# ------------------------------------------------------------------------------ profile: one step taken apart

VIEWS = ("empty", "new_empty", "_unsafe_view")  # beginnings of names of operators that move nothing
OVERWRITING = ("copy_", "fill_", "zero_", "_foreach_copy_", "_foreach_zero_", "exponential_", "random_")
GATHERING = ("index_select", "gather", "index", "embedding")


class Work(TorchDispatchMode):
    """Context that counts the FLOP of tensor operators and estimates the bytes that they move.

    ``amounts``: [FLOP, bytes, bytes of products], (3,) float64. Products are convolutions and matrix
    products; FLOP are theirs, by PyTorch's own formulas. Bytes go between processor and memory: each operator
    reads its inputs and writes its outputs once; one that gathers reads as much as it writes; views are free.
    Caches make it less, operators that read twice (batch norm) more. The bytes of products are what is left
    when all operators between them are fused into them.
    """

    def __init__(self):
        super().__init__()
        self.amounts = np.zeros(3)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        moved = moved_bytes(function, args, kwargs, result)
        formula = flop_registry.get(function._overloadpacket)
        flop = formula(*args, **kwargs, out_val=result) if formula else 0
        self.amounts += (flop, moved, moved if formula else 0)
        return result


def moved_bytes(function, args, kwargs, result):
    """Bytes that one call of an aten operator moves, by the rules of ``Work``."""
    name = function._schema.name.split("::")[1]
    if function.is_view or name.startswith(VIEWS):
        return 0
    read, written = [], tensors_in(result)
    for position, argument in enumerate(function._schema.arguments):
        tensors = tensors_in(args[position] if position < len(args) else kwargs.get(argument.name))
        changed = argument.alias_info is not None and argument.alias_info.is_write
        if changed:
            written += tensors
        if not (changed and (name in OVERWRITING or argument.is_out)):
            read += tensors
    if name in GATHERING:
        read[0] = result
    return sum(sum({id(tensor): size_of(tensor) for tensor in group}.values()) for group in (read, written))


def tensors_in(structure):
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor)]


def size_of(tensor):
    """Bytes of the values of a tensor; those that are expanded lie in memory once."""
    counts = (
        count for count, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not count
    )
    return tensor.element_size() * math.prod(counts)


def hardware(runtime):
    """What the device reaches: bytes per second of a copy, FLOP per second of a matrix product in the
    precision of the step. The fastest of several, because they stand for limits."""
    elements, side = (2**28, 8192) if runtime.kind == "cuda" else (2**24, 1024)
    dtype = runtime.amp_dtype or torch.float32

    def fastest(function, calls=5, repeats=4):
        def several():
            for _ in range(calls):
                function()
            runtime.wait()

        return min(seconds_of(several) for _ in range(repeats)) / calls

    source, target = (torch.ones(elements, device=runtime.device) for _ in range(2))
    copying = fastest(functools.partial(target.copy_, source))
    matrix = torch.rand(side, side, device=runtime.device).to(dtype)
    multiplying = fastest(lambda: matrix @ matrix)
    return 8 * elements / copying, 2 * side**3 / multiplying


def limit(flop, moved, rates):
    """Seconds below which a device of these (bytes/s, FLOP/s) cannot do the work, and which of them binds."""
    seconds = {"bytes": moved / rates[0], "FLOP": flop / rates[1]}
    binding = max(seconds, key=seconds.get)
    return seconds[binding], binding


def profiled(step, steps):
    """What the profiler saw in ``steps`` steps, taken one after the other.

    Returns:
        rows: [(name, seconds, calls)] of all steps; kernels on CUDA, else operators by their own time.
        intervals: [(start, end)] of all kernels in seconds, by start; none on a CPU.
    """
    on_device = step.runtime.kind == "cuda"
    activity = torch.profiler.ProfilerActivity
    step.runtime.wait()
    with torch.profiler.profile(activities=[activity.CPU] + [activity.CUDA] * on_device) as profiler:
        for _ in range(steps):
            step()
        step.runtime.wait()
    if on_device:
        return kernels(profiler.events())
    return [(row.key, row.self_cpu_time_total / 1e6, row.count) for row in profiler.key_averages()], []


def kernels(events):
    """Rows and intervals, as ``profiled``, of what ran on the device: kernels, copies and fills."""
    times, intervals = {}, []
    for event in events:
        # annotations, such as those around an optimiser's step, are spans over kernels
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            start, end = event.time_range.start / 1e6, event.time_range.end / 1e6
            times.setdefault(event.name, []).append(end - start)
            intervals.append((start, end))
    return [(name, sum(each), len(each)) for name, each in times.items()], sorted(intervals)


def busy_and_gaps(intervals):
    """Seconds in which at least one of the (start, end), sorted by start, runs; the gaps between them."""
    busy, gaps, until = 0.0, [], -math.inf
    for start, end in intervals:
        if start > until > -math.inf:
            gaps.append(start - until)
        busy += max(0.0, end - max(start, until))
        until = max(until, end)
    return busy, gaps


def profile(args):
    """One step taken apart: phases, kernels, gaps, and its bytes and FLOP against what the device reaches."""
    step = WatchedStep(args)
    if step.runtime.graphed:
        with torch.profiler.profile():  # a graph made before the first session may hang when replayed in one
            pass
    for _ in range(3):  # compilers and cuDNN search in the first ones
        step()
    step.runtime.wait()
    rates = hardware(step.runtime)
    seconds, work = step.seconds(args.repeats), step.work()
    rows, intervals = profiled(step, args.repeats)
    rows = [(name, taken / args.repeats, calls / args.repeats) for name, taken, calls in rows]
    rows.sort(key=operator.itemgetter(1), reverse=True)
    report = {
        "step": describe_step(args, step.runtime),
        "torch": torch.__version__,
        "copy_bytes_per_second": rates[0],
        "product_flop_per_second": rates[1],
        "phases": {phase: figures(seconds[phase], work[phase], rates) for phase in PHASES},
        "total": figures(sum(seconds.values()), sum(work.values()), rates),
        "outside_seconds": sum(seconds[phase] for phase in OUTSIDE),
        "kernels": [dict(zip(("name", "seconds", "calls"), row, strict=True)) for row in rows[:20]],
        "kernel_seconds": sum(row[1] for row in rows),
        "kernel_calls": sum(row[2] for row in rows),
    }
    if intervals:
        busy, gaps = busy_and_gaps(intervals)
        report["busy_seconds"] = busy / args.repeats
        report["idle_seconds"] = max(0.0, report["total"]["seconds"] - report["busy_seconds"])
        report["gaps"] = {"count": len(gaps) / args.repeats, "seconds": sum(gaps) / args.repeats}
        report["gaps"]["longest"] = max(gaps, default=0.0)
    print_profile(report)
    write_json(args.json, report)


def figures(seconds, work, rates):
    """What the profile says of a phase or of all of them."""
    flop, moved, product_bytes = map(int, work)
    least, binding = limit(flop, moved, rates)
    return {
        "seconds": seconds,
        "flop": flop,
        "bytes": moved,
        "product_bytes": product_bytes,
        "limit_seconds": least,
        "binding": binding,
        "fused_limit_seconds": limit(flop, product_bytes, rates)[0],
    }


def print_profile(report):
    total = report["total"]

    def percent(seconds):
        return 100 * seconds / total["seconds"]

    print(report["step"])
    print(
        f"\n{'phase':<20}{'ms':>10}{'share':>8}{'GFLOP':>10}{'MB':>10}{'limit ms':>10}{'of it':>8}   bound by"
    )
    for phase, row in [*report["phases"].items(), ("the step", total)]:
        reached = row["limit_seconds"] / row["seconds"] if row["seconds"] else 0.0
        time_of = f"{1000 * row['seconds']:>10.2f}{percent(row['seconds']):>6.1f} %"
        work_of = f"{row['flop'] / 1e9:>10.2f}{row['bytes'] / 1e6:>10.1f}"
        limit_of = f"{1000 * row['limit_seconds']:>10.2f}{100 * reached:>6.0f} %"
        print(f"{phase:<20}{time_of}{work_of}{limit_of}   {row['binding'] if row['limit_seconds'] else '–'}")
    outside = report["outside_seconds"]
    print(
        f"outside networks and optimisers ({', '.join(OUTSIDE)}): {1000 * outside:.2f} ms, "
        f"{percent(outside):.2f} %"
    )
    print(
        f"\nmeasured beside it: a copy moves {report['copy_bytes_per_second'] / 1e9:.1f} GB/s, a matrix "
        f"product computes {report['product_flop_per_second'] / 1e12:.3f} TFLOP/s"
    )
    print(
        f"limit = max(bytes / copy, FLOP / product) = {1000 * total['limit_seconds']:.2f} ms, bound by "
        f"{total['binding']}; the step runs at {percent(total['limit_seconds']):.0f} % of this limit\n"
        f"with everything between products fused into them: {total['product_bytes'] / 1e6:.1f} MB, "
        f"{1000 * total['fused_limit_seconds']:.2f} ms, {percent(total['fused_limit_seconds']):.0f} %\n"
        "An estimate: bytes are counted operator by operator, each input and output once; caches and\n"
        "compiled kernels move less, so that a share may exceed 100 %."
    )
    print_kernels(report)


def print_kernels(report):
    what = "kernel" if "gaps" in report else "operator, by its own time"
    print(f"\n{'ms':>10}{'share':>8}{'calls':>8}   {what}; one step, under the profiler")
    for row in report["kernels"]:
        share = 100 * row["seconds"] / report["kernel_seconds"]
        print(f"{1000 * row['seconds']:>10.3f}{share:>6.1f} %{row['calls']:>8.0f}   {row['name'][:70]}")
    print(
        f"{1000 * report['kernel_seconds']:>10.3f}{'100.0 %':>8}{report['kernel_calls']:>8.0f}   all of them"
    )
    if "gaps" not in report:
        print("gaps: none are told apart where processor and device are one")
        return
    gaps = report["gaps"]
    idle = report["idle_seconds"] / report["total"]["seconds"]
    print(
        f"the device computes {1000 * report['busy_seconds']:.2f} ms of the step and idles "
        f"{1000 * report['idle_seconds']:.2f} ms, {100 * idle:.1f} % (the step's time less the kernels')\n"
        f"under the profiler, which slows the host down: {gaps['count']:.0f} gaps a step, together "
        f"{1000 * gaps['seconds']:.2f} ms, the longest {1000 * gaps['longest']:.2f} ms"
    )


# --------------------------------------------------------------------- decode, predict: photographs from disk


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


class _Crops:
    """Evaluation crops of photographs, one by one, for a plain DataLoader."""

    def __init__(self, paths, size):
        self.paths, self.size = paths, size

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        return read_crop(self.paths[i], self.size)


def predict(args):
    """``predict.py``, from a folder of photographs to the CSV file, against a DataLoader that decodes the
    same files in as many processes and does nothing else. The network has random weights."""
    classes = [str(number) for number in range(10)]
    network = build_model(args.model, len(classes), image_size=args.size)
    images = {"size": args.size, "crop": "none", "mean": list(MEAN), "std": list(STD), "classes": classes}
    saved = {"step": 1, "args": {"model": args.model}, "data": images, "avg_state_dict": network.state_dict()}
    with tempfile.TemporaryDirectory() as place:
        checkpoint, table = (os.path.join(place, name) for name in ("last.pth.tar", "predictions.csv"))
        torch.save(saved, checkpoint)
        folder = args.data_path or tempfile.mkdtemp(dir=place)
        if args.data_path is None:
            photographs(folder, min(64, args.images), torch.Generator().manual_seed(0))
            for number in range(64, args.images):  # the same photographs again, under other names
                os.link(os.path.join(folder, f"{number % 64}.jpg"), os.path.join(folder, f"{number}.jpg"))
        paths = image_tree(folder, "--data-path")[0]
        device = ["--device", args.device, "--channels-last"]
        words = [checkpoint, folder, *device, "--workers", str(args.workers), "--out", table]
        options = classifier.build_parser().parse_args(words)

        def decoded():
            for _ in torch.utils.data.DataLoader(_Crops(paths, args.size), 32, num_workers=args.workers):
                pass

        seconds = median_seconds((functools.partial(classifier.classify, options), decoded), args.repeats)
    print(f"{len(paths)} photographs to {args.size} × {args.size}, {args.model}, {args.workers} workers")
    rates = (len(paths) / each for each in seconds)
    print_ratios("images/s; reference: decoding alone", [("predict.py", *rates)], digits=2)


# ---------------------------------------------------------------------------------- step: the feedback's cost


class DoubleBackward(feedback.Exact):
    """What ``Exact`` computes, by differentiating through the step with a graph of its gradient."""

    def after(self, step):
        parameters = {name: before.clone().requires_grad_() for name, before in self.parameters.items()}
        logits = feedback.student_logits(step, parameters)
        labels = torch.full_like(logits, 1 / logits.shape[1], requires_grad=True)
        loss = soft_cross_entropy(labels, logits).mean()
        gradient = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
        after = {name: p - step.rate * g for (name, p), g in zip(parameters.items(), gradient, strict=True)}
        with without_trace(step.student.network, dropout=False):
            logits = functional_call(step.student.network, after, (step.images_l,))
        return torch.autograd.grad(F.cross_entropy(logits, step.targets), labels)[0]


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


def started(worker, *arguments):
    """A process of its own for ``worker(*arguments, pipe)``; returns this end of the pipe."""
    context = multiprocessing.get_context("spawn")
    pipe, end = context.Pipe()
    context.Process(target=worker, args=(*arguments, end), daemon=True).start()
    end.close()  # the worker has its own: if it dies, reading from the pipe ends, too
    return pipe


def answer(pipe):
    try:
        return pipe.recv()
    except EOFError:
        raise UserError("a process that took steps has ended early: it says above why") from None


def step_worker(args, flags, estimators, whole, pipe):
    """In a process of its own, so that its peak memory is its own: each message says how many steps to take.

    Answers with their seconds and the peak of memory in MiB, all of it and what the steps added; ends at 0.

    Args:
        flags: of main.py, after those of the command line.
        estimators: {name: class} that take the place of those in ``feedback.ESTIMATORS``.
        whole: draw images and make views anew for each step, as part of it.
    """
    torch.set_num_threads(args.threads)
    before = resident_peak()
    feedback.ESTIMATORS.update(estimators)
    loader, views, method, runtime = training_step(args, flags)

    def drawn(batch):
        return views(batch.images_l, batch.targets, batch.images_u, loader.generator)

    def whole_step(batch, number):
        return method.step(drawn(batch), number, batch.targets_u)

    batch = next(loader)
    take = runtime.graph(whole_step, loader.generator) if whole else runtime.graph(method.step)
    inputs = loader if whole else itertools.repeat(drawn(batch))
    numbers = itertools.count()
    while count := pipe.recv():
        runtime.wait()
        start = time.perf_counter()
        for number, each in zip(itertools.islice(numbers, count), inputs, strict=False):
            take(each, number)
        runtime.wait()
        seconds = time.perf_counter() - start
        if runtime.kind == "cuda":
            memory = added = torch.cuda.max_memory_allocated() / 2**20
        else:
            memory = resident_peak()
            added = memory - before
        pipe.send((seconds, memory, added))


def step(args):
    """Seconds and peak memory of one MPL step with each form of the feedback, as ratios to none."""
    if args.plain:
        return step_plain(args)
    estimators = {"double backward": {"exact": DoubleBackward}}
    pipes = {
        name: started(step_worker, args, flags, estimators.get(name, {}), False)
        for name, flags in FEEDBACKS.items()
    }
    memory = {}

    def step_of(name):
        pipes[name].send(1)
        seconds, memory[name], _ = answer(pipes[name])
        return seconds

    # in turns: one works while the others wait
    medians_of = medians([functools.partial(step_of, name) for name in FEEDBACKS], args.repeats)
    seconds = dict(zip(FEEDBACKS, medians_of, strict=True))
    for pipe in pipes.values():
        pipe.send(0)
    size = f"batch {args.batch_size}, mu {args.mu}, {threads_of(args.threads)}, {args.device}"
    print(f"{args.model}, {size}, median of {args.repeats} steps")
    print(f"{'feedback':<24}{'ms/step':>12}{'ratio':>8}{'peak MiB':>12}{'ratio':>8}")
    for name in FEEDBACKS:
        ratio, more = seconds[name] / seconds["none"], memory[name] / memory["none"]
        print(f"{name:<24}{1000 * seconds[name]:>12.1f}{ratio:>8.2f}{memory[name]:>12.0f}{more:>8.2f}")


# --------------------------------------------------------------------- step --plain: as public code writes it


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
    """A step of Meta Pseudo Labels as public PyTorch code writes it, with the flags of ``args``.

    float32, contiguous. Hard pseudo labels from the weak views, the labelled images inside the student's
    batch, feedback (L_new − L_old) · CE(argmax T(strong), T(strong)), a moving average updated parameter by
    parameter, and every loss read in every step.
    """

    def __init__(self, args, size, device):
        self.args, self.device = args, device
        self.teacher, self.student = (
            build_model(args.model, 10, image_size=size).to(device) for _ in range(2)
        )
        self.average = copy.deepcopy(self.student)
        self.teacher_optimizer, self.student_optimizer = (
            torch.optim.SGD(
                network.parameters(), rate, args.momentum, nesterov=True, weight_decay=args.weight_decay
            )
            for network, rate in ((self.teacher, args.teacher_lr), (self.student, args.student_lr))
        )

    def __call__(self, labeled, targets, weak, strong):
        """As a loader gives them: (B, 3, H, W), (B,), (B, mu, 3, H, W) twice. → {name: float}"""
        args, smoothing = self.args, self.args.label_smoothing
        labeled, targets = labeled.to(self.device), targets.to(self.device)
        weak, strong = weak.flatten(0, 1).to(self.device), strong.flatten(0, 1).to(self.device)

        logits = self.teacher(torch.cat([labeled, weak, strong]))
        logits_l, logits_w, logits_s = logits.split([len(labeled), len(weak), len(strong)])
        labeled_loss = F.cross_entropy(logits_l, targets, label_smoothing=smoothing)
        sharpened = torch.softmax(logits_w.detach() / args.temperature, dim=1)
        confidence, labels = sharpened.max(dim=1)
        confident = (confidence >= args.threshold).float()
        uda_loss = (confident * F.cross_entropy(logits_s, sharpened, reduction="none")).mean()

        student_logits = self.student(torch.cat([labeled, strong]))
        old_loss = F.cross_entropy(student_logits[: len(labeled)].detach(), targets)
        student_loss = F.cross_entropy(student_logits[len(labeled) :], labels, label_smoothing=smoothing)
        self.student_optimizer.zero_grad()
        student_loss.backward()
        self.student_optimizer.step()

        with torch.no_grad():
            new_loss = F.cross_entropy(self.student(labeled), targets)
        feedback_loss = (new_loss - old_loss) * F.cross_entropy(logits_s, logits_s.argmax(dim=1))
        teacher_loss = labeled_loss + args.lambda_u * uda_loss + feedback_loss
        self.teacher_optimizer.zero_grad()
        teacher_loss.backward()
        self.teacher_optimizer.step()

        with torch.no_grad():
            for averaged, parameter in zip(self.average.parameters(), self.student.parameters(), strict=True):
                averaged.mul_(args.ema).add_(parameter, alpha=1 - args.ema)
            for averaged, buffer in zip(self.average.buffers(), self.student.buffers(), strict=True):
                averaged.copy_(buffer)
        return {
            "labeled_loss": labeled_loss.item(),
            "uda_loss": uda_loss.item(),
            "student_loss": student_loss.item(),
            "old_loss": old_loss.item(),
            "new_loss": new_loss.item(),
            "feedback_loss": feedback_loss.item(),
            "teacher_loss": teacher_loss.item(),
        }


def step_plain(args):
    """Images per second of whole steps, from images in memory on, here and as public code writes them.

    This project's steps are taken in a process of their own, since its runtime changes how memory is kept on
    the CPU. What it sets on a GPU (TF32, cuDNN's search) serves both.
    """
    torch.set_num_threads(args.threads)
    pipe = started(step_worker, args, (), {}, True)
    device = torch.device(args.device) if args.device == "cpu" else Runtime(args.device).device
    options = step_options(args)
    plain = PlainStep(options, args.size, device)
    workers = processor_cores()
    ahead = 2 * workers  # batches that the workers make before they are asked for: PyTorch's default
    length = (1 + args.steps + ahead) * args.batch_size
    plain_loader = torch.utils.data.DataLoader(
        PlainImages(length, args.mu, args.size),
        args.batch_size,
        shuffle=True,
        num_workers=workers,
        persistent_workers=True,
    )

    def here():
        pipe.send(args.steps)
        return answer(pipe)[0]

    def reference():
        batches = iter(plain_loader)
        plain(*next(batches))  # the workers have begun

        def steps():  # each ends by reading its losses from the device
            for batch in itertools.islice(batches, args.steps):
                plain(*batch)

        seconds = seconds_of(steps)
        for _ in batches:  # what was made ahead: the workers rest while the other way is measured
            pass
        return seconds

    seconds = medians([here, reference], args.repeats)
    pipe.send(0)
    images = args.steps * args.batch_size * (1 + args.mu)
    runtime = runtime_of(options)
    print(f"{describe_step(args, runtime)}; the plain step: {workers} worker(s)")
    print("ms per step: {:.1f} here, {:.1f} plain".format(*(1000 * each / args.steps for each in seconds)))
    print_ratios("images/s; reference: a plain step", [("whole step", *(images / each for each in seconds))])


# --------------------------------------------------------------------- cost: over batch, μ, width and depth

VARIED = {
    "batch": "labelled images",
    "mu": "unlabelled per labelled image",
    "width": "K of WRN-D-K",
    "depth": "D of WRN-D-K",
}
TIME_GROWS_AS = {"width": 2}  # a convolution multiplies K channels by K; all else is linear, memory always


def cost_points(args):
    """{what varies: {its value: the command line with it}}, the rest as in ``args``."""
    network = re.fullmatch(r"wrn-(\d+)-(\d+)", args.model)
    if not network:
        raise UserError(f"cost varies depth D and width K of --model wrn-D-K: {args.model} has none")
    depth, width = map(int, network.groups())

    def changed(**values):
        return argparse.Namespace(**vars(args) | values)

    return {
        "batch": {value: changed(batch_size=value) for value in args.batches},
        "mu": {value: changed(mu=value) for value in args.mus},
        "width": {value: changed(model=f"wrn-{depth}-{value}") for value in args.widths},
        "depth": {value: changed(model=f"wrn-{value}-{width}") for value in args.depths},
    }


def cost_of_step(args):
    """Median seconds of whole steps in a fresh process, and the MiB that they added at their peak."""
    pipe = started(step_worker, args, (), {}, True)
    answers = []
    for _ in range(args.repeats + 1):
        pipe.send(1)
        answers.append(answer(pipe))
    pipe.send(0)
    return statistics.median(seconds for seconds, _, _ in answers[1:]), answers[-1][2]


def fitted(x, y, power=1):
    """Least squares y = a + b · x**power over the residuals relative to y: a, b, the power, and the largest
    of these residuals."""
    x, y = np.array(x, dtype=float) ** power, np.array(y)
    slope, offset = np.polyfit(x, y, 1, w=1 / y)
    residual = np.abs(offset + slope * x - y) / y
    largest = float(residual.max())
    return {"a": float(offset), "b": float(slope), "power": power, "largest_residual": largest}


def cost(args):
    """How time and memory of a step grow with batch, μ, width and depth of the network."""
    points = cost_points(args)
    if any(len(values) < 2 for values in points.values()):
        raise UserError("a line needs two different values of each of batch, μ, width and depth")
    if args.picture and not args.picture.endswith(".png"):
        raise UserError(f"the picture is a PNG, but {args.picture} does not end in .png")
    measured = {}  # the point that all lines share is measured once
    for point in itertools.chain(*(values.values() for values in points.values())):
        key = (point.batch_size, point.mu, point.model)
        if key not in measured:
            measured[key] = cost_of_step(point)
            seconds, memory = measured[key]
            size = f"batch {point.batch_size}, mu {point.mu}, {point.model}"
            print(f"{size}: {1000 * seconds:.1f} ms, {memory:.0f} MiB", flush=True)
    runtime = Runtime(args.device, args.amp, channels_last=args.channels_last, compiled=args.compile)
    report = {"step": describe_step(args, runtime), "torch": torch.__version__}
    for name, values in points.items():
        seconds, memory = zip(
            *(measured[point.batch_size, point.mu, point.model] for point in values.values()), strict=True
        )
        x = list(values)
        report[name] = {"values": x, "seconds": seconds, "mebibytes": memory}
        report[name]["fit_seconds"] = fitted(x, seconds, TIME_GROWS_AS.get(name, 1))
        report[name]["fit_mebibytes"] = fitted(x, memory)
    print_cost(report)
    write_json(args.json, report)
    if args.picture:
        print(draw_cost(args.picture, report))


def print_cost(report):
    print(f"\n{report['step']}; whole steps, what varies excepted")
    print(f"{'varied':<10}{'value':>8}{'ms/step':>12}{'MiB':>10}")
    for name in VARIED:
        row = report[name]
        for value, seconds, memory in zip(row["values"], row["seconds"], row["mebibytes"], strict=True):
            print(f"{name:<10}{value:>8}{1000 * seconds:>12.1f}{memory:>10.0f}")
    print("\nleast squares over relative residuals, and the largest of them")
    for name in VARIED:
        for unit, factor, key in (("ms", 1000, "fit_seconds"), ("MiB", 1, "fit_mebibytes")):
            fit = report[name][key]
            value = name + "²" * (fit["power"] == 2)
            print(
                f"{name:<10}{unit:>4} = {factor * fit['a']:>10.2f} + {factor * fit['b']:>10.3f} · {value:<8}"
                f"{100 * fit['largest_residual']:>6.1f} %"
            )


def draw_cost(path, report):
    """Four panels: time (left axis, circles, full line) and memory (right axis, triangles, dashed line).

    Memory's axis leaves more room above, so that the two lines do not hide each other.
    """
    figure = drawing.new_figure(6.5)
    figure.suptitle(report["step"], fontsize=9)
    for axes, (name, unit) in zip(figure.subplots(2, 2).flat, VARIED.items(), strict=True):
        row = report[name]
        along = np.linspace(min(row["values"]), max(row["values"]))
        for side, key, factor, room, label, colour, marker, style in (
            (axes, "seconds", 1000, 1.1, "time per step in ms", drawing.BLUE, "o", "-"),
            (axes.twinx(), "mebibytes", 1, 1.5, "peak memory in MiB", drawing.VERMILION, "^", "--"),
        ):
            fit, y = row[f"fit_{key}"], factor * np.array(row[key])
            side.plot(row["values"], y, marker, color=colour, markersize=7)
            line = fit["a"] + fit["b"] * along ** fit["power"]
            side.plot(along, factor * line, style, color=colour, linewidth=1.5)
            side.set_ylabel(label, color=colour, fontsize=11)
            side.tick_params(axis="y", colors=colour, labelsize=10)
            side.set_ylim(0, room * y.max())
            side.yaxis.set_major_formatter("{x:,.0f}")
            side.spines["top"].set_visible(False)
        axes.set_xticks(row["values"])
        axes.tick_params(axis="x", labelsize=10)
        axes.set_xlabel(f"{'μ' if name == 'mu' else name} ({unit})", fontsize=11)
        axes.grid(True, axis="y", color="#E6E6E6", linewidth=0.7)
    return drawing.save(figure, path)


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
    with socket.socket() as free:  # a port that nobody listens on
        free.bind(("127.0.0.1", 0))
        args.port = free.getsockname()[1]
    sizes = (1, 2)
    groups = [[started(scale_worker, rank, size, args) for rank in range(size)] for size in sizes]

    def step_of(pipes):
        for pipe in pipes:
            pipe.send("step")
        return max(map(answer, pipes))

    steps = [functools.partial(step_of, pipes) for pipes in groups]  # in turns: one works, the other waits
    seconds = dict(zip(sizes, medians(steps, args.repeats), strict=True))
    for pipe in itertools.chain(*groups):
        pipe.send("end")
    images = args.batch_size * (1 + args.mu)
    rate = {size: images / taken for size, taken in seconds.items()}
    network = build_model(args.model, 10)
    reduced = 2 * 4 * count_parameters(network)  # both networks' gradients, float32
    operations = count_flops(network, args.size) * args.batch_size
    # forward and backward are three forward passes: the teacher's on 1 + 2μ images, the student's on 1 + μ
    operations *= 3 * (2 + 3 * args.mu)
    print(f"{args.model}, batch {args.batch_size}, mu {args.mu}, {args.threads} threads in all")
    print_ratios("images/s; reference: one process", [("two processes", rate[2], rate[1])])
    print(
        f"a step reduces {reduced / 1e6:.2f} MB per process and computes "
        f"{operations / 1e9:.1f} G multiply-adds in all"
    )


# ----------------------------------------------------------------------------------------------- command line


def add_step_arguments(command, batch_size, repeats, threads=None):
    command.add_argument("--model", default="wrn-28-2", help="network of teacher and student")
    command.add_argument("--batch-size", type=int, default=batch_size, help="labelled images")
    command.add_argument("--mu", type=int, default=7, help="unlabelled images per labelled one")
    command.add_argument("--size", type=int, default=32, help="side of the images in pixels")
    command.add_argument("--device", default="cpu", help="cpu or cuda")
    command.add_argument("--amp", action="store_true", help="bf16")
    command.add_argument("--channels-last", action="store_true", help="memory order of the recipes")
    command.add_argument("--compile", action="store_true", help="as in main.py")
    command.add_argument("--repeats", type=int, default=repeats, help="steps that are measured")
    threads = threads or torch.get_num_threads()
    command.add_argument(
        "--threads", type=int, default=threads, help="CPU threads, of all processes together"
    )
    command.set_defaults(takes_flags=True)  # main.py's, beside these


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add_command(name, text):
        return commands.add_parser(name, help=text, allow_abbrev=False)  # main.py's flags may begin alike

    command = add_command("augment", "weak and strong views of a batch, against Pillow")
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

    command = add_command("data", "share of a training step outside its networks")
    add_step_arguments(command, batch_size=32, repeats=5)
    command.set_defaults(run=data)

    command = add_command("decode", "photographs from disk, against torchvision's transforms")
    command.add_argument("--data-path", help="folder of JPEGs (default: some are made)")
    command.add_argument("--images", type=int, default=64, help="how many of them")
    command.add_argument("--size", type=int, default=224, help="side of the crops in pixels")
    command.add_argument("--repeats", type=int, default=7, help="measurements of each, alternating")
    command.set_defaults(run=decode)

    command = add_command("predict", "predict.py on a folder of photographs, against decoding them")
    command.add_argument("--data-path", help="folder of images (default: photographs are made)")
    command.add_argument("--images", type=int, default=2000, help="how many are made")
    command.add_argument("--size", type=int, default=32, help="side of the crops in pixels")
    command.add_argument("--model", default="wrn-10-1", help="network that predicts")
    command.add_argument("--device", default="cpu", help="where it runs")
    command.add_argument("--workers", type=int, default=2, help="processes that decode, of both")
    command.add_argument("--repeats", type=int, default=3, help="measurements of each, alternating")
    command.set_defaults(run=predict)

    command = add_command("scale", "two processes on the CPU against one")
    add_step_arguments(command, batch_size=32, repeats=5, threads=2)
    command.set_defaults(run=scale)

    command = add_command("step", "cost of each form of the feedback and of the weak pass, against none")
    add_step_arguments(command, batch_size=8, repeats=5)
    command.add_argument("--plain", action="store_true", help="instead: a step as public code writes it")
    command.add_argument("--steps", type=int, default=5, help="with --plain: steps per measurement")
    command.set_defaults(run=step)

    command = add_command("profile", "one step taken apart")
    add_step_arguments(command, batch_size=32, repeats=5)
    command.add_argument("--json", metavar="FILE", help="write the figures there, too")
    command.set_defaults(run=profile)

    command = add_command("cost", "time and memory of a step over batch, μ, width and depth")
    add_step_arguments(command, batch_size=32, repeats=5)
    command.add_argument(
        "--batches", type=int, nargs="+", default=[8, 16, 32, 64], help="values of --batch-size"
    )
    command.add_argument("--mus", type=int, nargs="+", default=[1, 3, 5, 7], help="values of --mu")
    command.add_argument("--widths", type=int, nargs="+", default=[1, 2, 3, 4], help="K of WRN-D-K")
    command.add_argument("--depths", type=int, nargs="+", default=[10, 16, 22, 28], help="D of WRN-D-K")
    command.add_argument("--json", metavar="FILE", help="write the figures there, too")
    command.add_argument("--picture", metavar="FILE.png", help="draw them")
    command.set_defaults(run=cost)

    args, flags = parser.parse_known_args(argv)
    if flags and not vars(args).get("takes_flags"):
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    args.flags = flags
    try:
        args.run(args)
    except UserError as error:
        parser.exit(2, f"benchmark.py: {error}\n")


if __name__ == "__main__":
    main()
