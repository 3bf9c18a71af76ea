"""Shared by the benchmarks: measuring in turns, a training step of the program, steps in another process."""

import argparse
import os
import re
import resource
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.multiprocessing as multiprocessing

import main as training
from data import Dataset
from engine.images import ImageSet
from engine.learner import phase
from engine.loader import TrainLoader
from engine.runtime import Runtime
from methods import METHODS
from methods.feedback import ESTIMATORS
from run import script
from utils import Meters, UserError

MEAN, STD = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)


# ---------------------------------------------------------------- measuring


def seconds_of(function):
    """Seconds that one call takes."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def medians(measurements, repeats):
    """Call the measurements in turns, ``repeats`` times after a warm-up; the median result of each."""
    results = [[measure() for measure in measurements] for _ in range(repeats + 1)][1:]
    return [statistics.median(samples) for samples in zip(*results, strict=True)]


def median_seconds(functions, repeats):
    """Seconds per call of each function, as ``medians``."""
    return medians([lambda function=function: seconds_of(function) for function in functions], repeats)


def print_ratios(unit, rows):
    """rows: (what, rate of this project, rate of the reference), in ``unit``."""
    print(f"{'':<24}{'here':>12}{'reference':>12}{'ratio':>8}   {unit}")
    for what, here, reference in rows:
        print(f"{what:<24}{here:>12,.0f}{reference:>12,.0f}{here / reference:>8.2f}")


def processor_cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


# ---------------------------------------------------------------- command lines


def new_parser(name, text):
    return argparse.ArgumentParser(
        prog=f"python -m {name}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # main.py's flags may begin alike
    )


def run(name, main):
    """``main`` with this process's command line; a user's error is one sentence."""
    sys.exit(script.run(name, main, sys.argv[1:]))


# ---------------------------------------------------------------- a training step


def parse_step(parser, argv):
    """The parser's arguments. main.py's flags among them are ``words`` and, parsed, ``options``."""
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each variant")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="threads on the CPU")
    args, words = parser.parse_known_args(argv)
    recipe = "--dataset cifar10 --resize 32 --nesterov --warmup-steps 10 --device cpu --model wrn-28-2"
    args.words = [*recipe.split(), "--batch-size", "8", "--mu", "7", *words]
    args.options = training.parse_arguments(args.words)
    torch.set_num_threads(args.threads)
    return args


def runtime_of(options):
    return Runtime(
        options.device,
        options.amp,
        options.amp_dtype,
        channels_last=options.channels_last,
        compiled=options.compile,
        graphed=options.cuda_graph,
    )


def describe(options, threads):
    """Words for the size of a step and for the device that runs it."""
    runtime = runtime_of(options)
    size = f"{options.model}, batch {options.batch_size}, mu {options.mu}, {options.resize} pixels"
    form = [str(runtime.amp_dtype or torch.float32).removeprefix("torch.")]
    form += [name for name in ("channels_last", "compiled", "graphed") if getattr(runtime, name)]
    return f"{size}, {', '.join(form)}, {runtime.describe()}, {threads} thread(s)"


class Step:
    """A training step on random images, from the draw of its images to the meters.

    ``phase`` marks its parts in a profile, as it marks further parts in the program itself.
    """

    def __init__(self, options):
        size = options.resize
        images = torch.randint(256, (5000, 3, size, size), dtype=torch.uint8)
        whole = ImageSet(torch.arange(5000) % 10, images)
        dataset = Dataset(
            name="cifar10",
            classes=[str(k) for k in range(10)],
            mean=MEAN,
            std=STD,
            flip=True,
            size=size,
            crop="pad",
            labeled=whole.subset(range(1000)),
            unlabeled=whole,
            val=None,
            test=whole,
            labeled_indices=list(range(1000)),
        )
        self.runtime = runtime_of(options)
        self.loader = TrainLoader(dataset, options.batch_size, options.mu, 0, self.runtime)
        self.views = training.build_views(options, dataset, self.runtime)
        self.method = METHODS[options.method](options, 10, size, self.runtime)
        self.meters = Meters(self.runtime, "")
        self.take = self.runtime.graph(self.learn, self.loader.generator)
        self.number = 0

    @phase("step")
    def __call__(self):
        scalars = self.take(self.draw(), self.number)
        self.meter(scalars)
        self.number += 1

    @phase("draw")
    def draw(self):
        return next(self.loader)

    @phase("method")
    def learn(self, batch, number):
        return self.method.step(self.make_views(batch), number, batch.targets_u)

    @phase("views")
    def make_views(self, batch):
        return self.views(batch.images_l, batch.targets, batch.images_u, self.loader.generator)

    @phase("meters")
    def meter(self, scalars):
        self.meters.update(scalars, self.number)

    def seconds(self, count):
        """Seconds that ``count`` steps take, one after the other."""
        self.runtime.wait()

        def steps():
            for _ in range(count):
                self()
            self.runtime.wait()

        return seconds_of(steps)


# ---------------------------------------------------------------- steps in another process


class StepProcess:
    """A process that takes steps when it is called, so that its memory and its settings are its own.

    Args:
        words: flags of main.py.
        threads: CPU threads of the process.
        estimators: {name: class}, further values of ``--feedback`` beside ``feedback.ESTIMATORS``.

    Attributes:
        memory: the peak memory of the process so far, on its device, in MiB.
    """

    def __init__(self, words, threads, estimators=None):
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        arguments = (words, threads, estimators or {}, end)
        context.Process(target=_take_steps, args=arguments, daemon=True).start()
        end.close()  # the process has its own: if it dies, reading from the pipe ends, too

    def __call__(self, count=1):
        """Seconds that ``count`` steps take."""
        try:
            self.pipe.send(count)
            seconds, self.memory = self.pipe.recv()
        except (EOFError, ConnectionError):
            raise UserError("a process that takes steps has ended early: see its error above") from None
        return seconds

    def close(self):
        self.pipe.send(0)


def _take_steps(words, threads, estimators, pipe):
    torch.set_num_threads(threads)
    ESTIMATORS.update(estimators)
    step = Step(training.parse_arguments(words))
    while count := pipe.recv():
        pipe.send((step.seconds(count), peak_memory(step.runtime)))


def peak_memory(runtime):
    """The peak memory of this process so far, in MiB: on CUDA the tensors' memory, else resident memory."""
    if runtime.kind == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")  # Linux: this program alone, without the process that started it
    if status.exists():
        return int(re.search(r"VmHWM:\s*(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
