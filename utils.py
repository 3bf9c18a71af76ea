"""Small parts that every script needs: command line, schedules, meters, progress, the record of a run."""

import argparse
import contextlib
import copy
import csv
import datetime
import difflib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from engine.runtime import UserError, write_atomically

# ---------------------------------------------------------------- the command line


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of a flag, where there is one to add."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "(default:" in action.help:
            return action.help
        return super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "__name__", None)
        return {"int": "N", "float": "F"}.get(kind) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one sentence instead of the whole usage, and the defaults in the help."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        if not first_process():  # which has the same command line, and says it
            sys.exit(2)
        hint = "--help lists all flags"
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if unknown != message.split()[0]:
            near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1)
            hint = f"did you mean {near[0]}?" if near else hint
        raise UserError(f"{message} ({hint})")

    def parse_given(self, argv):
        """The arguments of ``argv``, and the names of those that stand there."""
        unset = object()
        names = {action.dest for action in self._actions if action.dest != "help"}
        args = self.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
        given = {name for name in names if getattr(args, name) is not unset}
        for name in names - given:
            setattr(args, name, copy.copy(self.get_default(name)))
        return args, given


def between(kind, least, largest=math.inf):
    """The type of a flag: a number of a kind, int or float, from ``least`` to ``largest``."""

    def number(text):
        value = kind(text)
        if not least <= value <= largest:
            limits = f"{least} or more" if largest == math.inf else f"{least} to {largest}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limits}")
        return value

    number.__name__ = kind.__name__  # argparse: invalid int value
    return number


def count_or_fraction(text):
    """A count, a fraction below 1, or ``all``, the fraction 1.0."""
    if text == "all":
        return 1.0
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text} is neither a count nor a fraction such as 0.05, nor all")
    return int(value) if value >= 1 else value


def first_process():
    """Whether this is the process that speaks before there is a ``Runtime``: the first of torchrun's."""
    return int(os.environ.get("RANK", 0)) == 0


def say(*lines):
    """Lines on standard error about the command line, which is the same in all processes: once."""
    if first_process():
        print("\n".join(lines), file=sys.stderr)


def tell(runtime, *lines):
    """Lines on standard error, once for all processes."""
    if runtime.is_main and lines:
        print("\n".join(lines), file=sys.stderr)


# ---------------------------------------------------------------- schedules


def learning_rate(step, *, peak, total_steps, warmup_steps=0, wait_steps=0, shape="cosine", milestones=()):
    """Learning rate at ``step`` (0, 1, …): zero while waiting, a warm-up, then as ``shape`` says.

    cosine: linear warm-up, then a cosine to zero over the steps that are left (published code).
    constant: linear warm-up, then the peak.
    milestones: linear warm-up, then the peak, divided by 10 at each of the steps ``milestones``, which count
    from the start of the run, not from the end of the wait.
    one-cycle: half a cosine from peak / 25 up to the peak, over the warm-up (0: three tenths of the steps),
    and half a cosine down to peak / 250,000 (Smith & Topin 2018, figures of PyTorch's OneCycleLR; momentum
    stays as it is).
    """
    step, total_steps = step - wait_steps, total_steps - wait_steps
    if step < 0:
        return 0.0
    if shape == "one-cycle":
        rise = (warmup_steps or 0.3 * total_steps) - 1
        if step <= rise:
            return _half_cosine(peak / 25, peak, step / max(1, rise))
        return _half_cosine(peak, peak / 250_000, (step - rise) / max(1, total_steps - 1 - rise))
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if shape == "constant":
        return peak
    if shape == "milestones":
        return peak / 10 ** sum(step + wait_steps >= milestone for milestone in milestones)
    return _half_cosine(peak, 0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def _half_cosine(start, end, progress):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ramp_up(step, steps, wait_steps=0):
    """Weight of the unlabelled loss, t steps after the wait: min(1, (t + 1) / steps), 1 for ``steps`` = 0;
    while waiting 0."""
    step -= wait_steps
    if step < 0:
        return 0.0
    return min(1.0, (step + 1) / steps) if steps else 1.0


# ---------------------------------------------------------------- meters


class NonFiniteError(Exception):
    """A loss was not finite: the run stops with exit status 3."""


class Meters:
    """Mean and standard deviation of named scalars since the last ``reset``, kept on the device.

    ``update`` never waits for the device; ``read`` does. The first step at which a scalar was not finite
    is remembered on the device too, so that ``read`` can name it however late it is called.

    With several processes ``read`` returns the same in all of them: means over processes.

    Args:
        runtime: where to run.
        checkpoint: path of the last checkpoint, which is named where a scalar was not finite.
    """

    def __init__(self, runtime, checkpoint):
        self.runtime, self.checkpoint = runtime, checkpoint
        self.reset()

    def reset(self):
        self.names = self.first_step = None
        self.count = self.mean = self.squares = self.bad = None

    def update(self, scalars, step):
        """Take in one step's scalars, ``{name: () tensor}``; same names at every step, one step after the
        other. All counting is on the device: a graph that holds the step's number is compiled anew."""
        values = torch.stack([value.detach().float() for value in scalars.values()])
        if self.names is None:
            self.names, self.first_step = list(scalars), step
            self.mean, self.squares, self.bad = (self.runtime.zeros(len(values)) for _ in range(3))
            self.count = self.runtime.zeros()
        self.count += 1
        first_bad = ~torch.isfinite(values) & (self.bad == 0)
        self.bad = torch.where(first_bad, self.count, self.bad)
        delta = values - self.mean  # Welford's recurrence
        self.mean += delta / self.count
        self.squares += delta * (values - self.mean)

    def read(self):
        """``{name: mean, name + "_std": standard deviation}`` as floats, in the order of the names.

        Raises:
            NonFiniteError: a scalar was not finite; the message names the first such step and the terms.
        """
        if self.names is None:
            return {}
        bad = self.runtime.all_reduce_max(self.bad.clone()).tolist()
        if any(bad):
            first = min(count for count in bad if count)
            terms = ", ".join(name for name, count in zip(self.names, bad, strict=True) if count == first)
            step, good = self.first_step + int(first) - 1, os.path.exists(self.checkpoint)
            left = f"the checkpoint {self.checkpoint} predates it" if good else "no checkpoint was written"
            raise NonFiniteError(f"step {step}: {terms} {'are' if ',' in terms else 'is'} not finite; {left}")
        deviation = (self.squares / (self.count - 1).clamp_min(1)).sqrt()
        means, stds = self.runtime.all_reduce_mean([self.mean.clone(), deviation])
        stds = {f"{name}_std": std for name, std in zip(self.names, stds.tolist(), strict=True)}
        return dict(zip(self.names, means.tolist(), strict=True)) | stds

    def state_dict(self):
        keys = ("names", "first_step", "count", "mean", "squares", "bad")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state):
        for key, value in state.items():
            setattr(self, key, self.runtime.put(value) if isinstance(value, torch.Tensor) else value)


# ---------------------------------------------------------------- checkpoints


def well_formed(saved):
    """Whether a file's content has the parts that every checkpoint of this program has, as far as is read."""
    if not isinstance(saved, dict) or not isinstance(saved.get("step"), int):
        return False
    data = saved.get("data", {})
    needed = {"classes": list, "mean": list, "std": list, "size": int}
    described = isinstance(data, dict) and all(
        isinstance(data.get(key), kind) for key, kind in needed.items()
    )
    return isinstance(saved.get("args", {}), dict) and (described or "data" not in saved)


def load_state(module, state, path, advice="give the --model and --num-classes that it was trained with"):
    """``module.load_state_dict`` with a sentence instead of a list when the network is another one.

    Raises:
        UserError: names or shapes differ; the message ends with the advice.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the network in {path} is not the one asked for: {advice}") from error


def predictor_state(state, path, role="student"):
    """The weights that predict in a checkpoint: of the student, or of the teacher, the EMA's, else its own.

    Raises:
        UserError: the checkpoint holds neither.
    """
    average = "avg_state_dict" if role == "student" else "teacher_avg_state_dict"
    names = (average, f"{role}_state_dict")
    states = [state.get(name) for name in names] if isinstance(state, dict) else []
    weights = next((each for each in states if isinstance(each, dict) and each), None)
    if not weights:
        raise UserError(f"{path} holds no {role}: it is not a checkpoint of this program and --method")
    return weights


def read_checked(path, parse=json.loads):
    """What ``parse`` makes of the text of a file; UserError for one that cannot be read."""
    try:
        return parse(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def csv_text(rows):
    """Rows of values as lines of a CSV file; what holds a comma, a quote or a line break is quoted."""
    lines = []
    csv.writer(SimpleNamespace(write=lines.append)).writerows(rows)  # its \r\n makes it quote both characters
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def write_csv(path, rows):
    """Write a CSV file atomically; UserError where that is not possible."""
    text = csv_text(rows).encode("utf-8", "surrogateescape")  # names of files may be no UTF-8
    write_atomically(path, lambda file: file.write(text))


@contextlib.contextmanager
def writing(path):
    """Context in which an OSError becomes a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


# ---------------------------------------------------------------- what happens around a loop


class Interrupt:
    """Context that remembers SIGTERM, SIGINT or a fault in the data, so that a loop can stop after a step.

    Attributes:
        signal: its number, 0 for none.
        fault: the sentence about the first image that could not be read, None for none.
    """

    def __enter__(self):
        self.signal, self.fault, self.asked = 0, None, None
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _note(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:  # a second Ctrl-C ends the process at once; launchers repeat SIGTERM
            signal.signal(number, signal.SIG_DFL)

    def note_fault(self, sentence):
        self.fault = self.fault or sentence

    def stops(self, runtime, wait=False):
        """The exit status with which the run ends after this step, 0 if it goes on: the same in all
        processes.

        Several processes ask each other at every step and read the answer at the next, so that none waits,
        or with ``wait`` at once.
        """
        status = 128 + self.signal if self.signal else 2 if self.fault else 0
        if runtime.processes == 1:
            return status
        earlier, self.asked = self.asked, runtime.all_reduce_max_int(status)
        answer = self.asked if wait else earlier
        return 0 if answer is None else int(answer)

    def end(self, status):
        """End this process: one that has found a fault says so."""
        if self.fault:
            raise UserError(self.fault)
        sys.exit(status)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Throughput:
    """Images and seconds of training, evaluations excepted, added to the totals of a run.

    Args:
        totals: a dict with ``trained_images`` and ``train_seconds``.
        images_per_step: of all processes.
        step: the first one.
    """

    def __init__(self, totals, images_per_step, step):
        self.totals, self.images_per_step = totals, images_per_step
        self.restart(step)

    def restart(self, step):
        """Count from here on: ``step`` steps are taken."""
        self.taken, self.started = step, time.perf_counter()

    def count(self, step):
        """Add what was trained since the last call; returns images per second."""
        images, seconds = (step - self.taken) * self.images_per_step, time.perf_counter() - self.started
        self.totals["trained_images"] += images
        self.totals["train_seconds"] += seconds
        self.restart(step)
        return images / seconds


class Progress:
    """How far a loop is, on standard error: a bar on a terminal, elsewhere a line a minute.

    Args:
        name: of the run.
        total, done: steps, and how many of them an earlier process has taken.
        active: False for silence.
        unit: what is counted.
    """

    SECONDS = 60  # between two lines without a terminal

    def __init__(self, name, total, done=0, active=True, unit="step"):
        self.name, self.total, self.done, self.active, self.unit = name, total, done, active, unit
        self.taken, self.figures = 0, ""
        self.began = self.said = time.monotonic()
        self.bar = None
        if active and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=name, unit=unit)

    def step(self, figures=None, count=1):
        """After each step, or ``count`` of them; ``figures`` in words, where there are new ones."""
        self.taken += count
        self.figures = figures or self.figures
        if self.bar:
            self.bar.update(count)
            if figures:
                self.bar.set_postfix_str(figures)
        elif self.active and time.monotonic() - self.said >= self.SECONDS:
            each = (time.monotonic() - self.began) / self.taken
            left = datetime.timedelta(seconds=round(each * (self.total - self.done - self.taken)))
            each = f"{each:.3g} s per {self.unit}, about {left} left"
            self.line("  ".join(filter(None, (f"{self.done + self.taken}/{self.total}", each, self.figures))))

    def line(self, text):
        """A line of its own."""
        self.said = time.monotonic()
        if self.active:
            text = f"{self.name}  {text}"
            self.bar.write(text, file=sys.stderr) if self.bar else print(text, file=sys.stderr)

    def record(self, step, record):
        """A line with the figures of an evaluation, without standard deviations."""
        shown = {name: value for name, value in record.items() if not name.endswith("_std")}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.line(f"step {step}/{self.total}  {shown}")

    def stopped(self, when, path):
        """The last line of a loop that a signal has ended."""
        self.line(f"stopped {when}; go on with --resume {path}")
        self.close()

    def close(self):
        if self.bar:
            self.bar.close()


# ---------------------------------------------------------------- the record of a run


# run state saved in every checkpoint besides the networks
FRESH = {
    "run": None,
    "best_top1": None,
    "best_step": None,
    "best_val_top1": None,
    "oracle_top1": 0.0,
    "train_seconds": 0.0,
    "trained_images": 0,
}
MEASURED = ("top1", "top5", "mean_class_top1", "largest_class_top1", "never_predicted", "test_images")
MEASURED = (*MEASURED, "ensemble_top1", "student_top1")  # of --ensemble, as is "teacher_top1"
POSITION = (*MEASURED, "teacher_top1", "meters", "loader")
SUMMARY = (
    *("name", "dataset", "method", "num_labeled", "seed", "steps", *MEASURED, "best_top1", "best_step"),
    *("selection", "oracle_top1", "teacher_top1", "finetune_top1", "train_seconds", "images_per_second"),
    *("device", "torch", "commit", "run"),
)


def measured(test, confusion, classes):
    """What ``evaluate`` has found, for people: the keys of ``MEASURED``.

    "test_images" counts those that could be read. "largest_class_top1" is what always naming the largest
    class of the test set would score, in percent; "never_predicted" names the classes that no image was
    taken for.
    """
    found = {name: test.get(name) for name in MEASURED}
    found |= {"teacher_top1": test["teacher_top1"]} if "teacher_top1" in test else {}
    found["test_images"] = int(confusion.sum())
    found["largest_class_top1"] = 100 * (confusion.sum(dim=1).max() / confusion.sum()).item()
    predicted = confusion.sum(dim=0) > 0
    found["never_predicted"] = [
        name for name, seen in zip(classes, predicted.tolist(), strict=True) if not seen
    ]
    return found


def figures_of(state):
    """What the summary takes from the state of a run."""
    figures = {name: state.get(name) for name in SUMMARY if name in (*FRESH, *POSITION)}
    return figures | {"images_per_second": state["trained_images"] / state["train_seconds"]}


def summarize(args, runtime, figures, num_labeled, validated, run):
    """The content of summary.json, with the figures that were measured.

    ``validated``: whether validation images chose the checkpoint.
    """
    return (
        dict.fromkeys(SUMMARY)
        | figures
        | {
            "name": args.name,
            "dataset": args.dataset,
            "method": args.method,
            "num_labeled": num_labeled,
            "seed": args.seed,
            "selection": "val" if validated else "last",
            "device": runtime.describe(),
            "torch": torch.__version__,
            "commit": commit(),
            "run": run,
        }
    )


def summarize_together(name, found, runtime, test, confusion, classes):
    """The content of summary.json for checkpoints that were evaluated together: what they have in common.

    Args:
        name: of the evaluation's record.
        found: (arguments, content) of each checkpoint.
        test, confusion: from ``measure_accuracy``.
    """
    summaries, figures = [], measured(test, confusion, classes)
    for args, saved in found:
        record = saved.get("data") or {}
        labeled = record.get("labeled")
        validated = record["val"] is not None if "val" in record else bool(args.num_val)
        num_labeled = args.num_labeled if labeled is None else len(labeled)
        steps = {"steps": saved["step"]}
        summary = summarize(args, runtime, steps | figures, num_labeled, validated, saved.get("run"))
        summaries.append(summary | {"name": name})
    common = [key for key, value in summaries[0].items() if all(each[key] == value for each in summaries)]
    return dict.fromkeys(summaries[0]) | {key: summaries[0][key] for key in common}


def result_lines(summary):
    """What standard output ends with: two lines, the last one the result."""
    lines, parts = [], [f"top-1 {summary['top1']:.2f} %"]
    parts[0] += " (ensemble)" * (summary["ensemble_top1"] is not None)
    if summary["mean_class_top1"] is not None:
        parts.append(f"mean over classes {summary['mean_class_top1']:.2f} %")
    if summary["top5"] is not None:
        parts.append(f"top-5 {summary['top5']:.2f} %")
    if summary["selection"] == "val" and summary["best_top1"] is not None:
        parts.append(f"chosen by validation {summary['best_top1']:.2f} %")
    if summary["finetune_top1"] is not None:
        parts.append(f"finetuned {summary['finetune_top1']:.2f} %")
    for role in ("student", "teacher"):
        if summary[f"{role}_top1"] is not None:
            parts.append(f"{role} {summary[f'{role}_top1']:.2f} %")
    about = {"dataset": "{}", "num_labeled": "{} labels", "method": "{}", "seed": "seed {}"}
    about = [text.format(summary[key]) for key, text in about.items() if summary[key] is not None]
    if summary["largest_class_top1"] is not None:
        never = summary["never_predicted"]
        never = f"; never predicted: {', '.join(never[:20])}{', …' * (len(never) > 20)}" if never else ""
        images = f"{summary['test_images']:,} test images"
        lines.append(
            f"{images}; always naming the largest class: {summary['largest_class_top1']:.2f} %{never}"
        )
    return [*lines, "  ".join(parts) + f"  ({', '.join(about)})"]


def commit():
    """The commit of the program, with ``-dirty`` for uncommitted changes; None outside a clone."""
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        folder = Path(__file__).resolve().parent
        return subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def new_run_id():
    """What tells a run from all others, also from one of the same name: its start and a random number."""
    return f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%dT%H:%M:%SZ}-{os.urandom(4).hex()}"


class RunLog:
    """``results/NAME/``: args.json, metrics.jsonl, TensorBoard events, confusion.json, summary.json; of an
    evaluation predictions.csv, too.

    Only the main process writes; in the others every call is a no-op.

    Args:
        folder: ``results/NAME``, made if it is not there.
        args: the arguments of the run, written with the versions and the commit.
        run_id: ``new_run_id()`` of the run; the record of another run is not continued.
        start_step: lines of metrics.jsonl after this step are dropped, since they are about to be written
            (again); None keeps them.
        finetune_from: likewise, of the lines that finetuning wrote: those after this step are dropped.
        tensorboard: also write event files.
        replace: write beside the record that is there, until ``settle`` puts this one in its place.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(
        self,
        folder,
        args,
        *,
        run_id=None,
        start_step=0,
        finetune_from=None,
        tensorboard=True,
        active=True,
        replace=False,
    ):
        self.folder, self.active, self.writer = Path(folder), active, None
        self.tensorboard, self.purge_step, self.place = tensorboard, start_step, self.folder
        if not active:
            return
        beside = self.folder.with_name(f".{self.folder.name}.new")
        with writing(self.folder):
            if replace:
                shutil.rmtree(beside, ignore_errors=True)
                self.folder = beside
            elif run_id and self._arguments(beside).get("run") == run_id:  # killed while it replaced another
                self._move(beside)
            else:  # of a run that was killed before it replaced this one
                shutil.rmtree(beside, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            before = self._arguments(self.folder)
            if before.get("run") not in (None, run_id) and run_id is not None:
                self._say(f"the record in {self.folder} is of another run and is replaced")
                self._clear()
                before = {}
            if start_step is not None or not (self.folder / "args.json").exists():
                self._write_arguments(args, run_id, before)
            self._drop(start_step, finetune_from)
        self._open()

    @property
    def replacing(self):
        """Whether the run that is to be replaced is still there."""
        return self.active and self.folder != self.place

    @property
    def metrics(self):
        return self.folder / "metrics.jsonl"

    def _open(self):
        if self.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter  # a second to import: only where it is used
            except Exception as error:  # not installed, or at odds with another package
                self.tensorboard = False
                self._say(f"no TensorBoard events are written, metrics.jsonl has the same figures: {error}")
                return
            self.writer = SummaryWriter(self.folder, purge_step=self.purge_step)

    def _arguments(self, folder):
        """What args.json says of the run in a folder; {} where there is none."""
        try:
            return dict(json.loads((folder / "args.json").read_text()))
        except (OSError, ValueError, TypeError):
            return {}

    def _write_arguments(self, args, run_id, before):
        """What the run is now; with the command that began it, and those that went on with it.

        before: what ``_arguments`` said of the folder.
        """
        about = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit()}
        commands = {"command": sys.argv}
        if run_id and before.get("run") == run_id and "command" in before:
            continued = [*before.get("continued", []), sys.argv]
            commands = {"command": before["command"], "continued": continued}
        self._write("args.json", vars(args) | {"run": run_id, "versions": about} | commands)

    def _clear(self):
        """Remove what an earlier run has left in the folder, of all that this program writes. A teacher's
        predictions may stay: they are expensive, and are used only where they fit."""
        names = ("metrics.jsonl", "summary.json", "confusion.json", "predictions.csv", "args.json")
        for name in (*names, "labeled.txt", "labeled_indices.txt", "*.png", "events.out.tfevents.*"):
            for path in self.folder.glob(name):
                path.unlink()

    def _drop(self, start_step, finetune_from):
        lines = self.metrics.read_text(errors="replace").splitlines() if self.metrics.exists() else []
        kept, damaged = [], 0
        for line in lines:
            try:
                record = json.loads(line)
                step, finetuning = record["step"], "finetune_loss" in record
            except (ValueError, KeyError, TypeError):  # a killed run may leave half a line
                damaged += 1
                continue
            limit = finetune_from if finetuning and finetune_from is not None else start_step
            if limit is None or step <= limit:
                kept.append(line)
        if damaged > 1 or (damaged and lines and lines[-1].endswith("}")):
            self._say(f"{damaged} damaged lines of {self.metrics} are left out")
        if len(kept) < len(lines):
            text = "".join(f"{line}\n" for line in kept)
            write_atomically(self.metrics, lambda file: file.write(text.encode()))

    def _say(self, text):
        print(text, file=sys.stderr)

    def _write(self, name, content, indent=2):
        text = json.dumps(content, indent=indent) + "\n"
        write_atomically(self.folder / name, lambda file: file.write(text.encode()))

    def settle(self):
        """To be called when the first checkpoint of a run that replaces another is written."""
        if self.replacing:
            self.close()
            with writing(self.place):
                self._move(self.folder)
            self.folder = self.place
            self._open()

    def _move(self, beside):
        shutil.rmtree(self.place, ignore_errors=True)
        os.rename(beside, self.place)

    def record(self, step, figures):
        """One line of metrics.jsonl and the same figures to TensorBoard."""
        if not self.active:
            return
        with writing(self.metrics), open(self.metrics, "a") as file:
            file.write(json.dumps({"step": step} | figures) + "\n")
        if self.writer:
            for name, value in figures.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)

    def summary(self, record):
        if self.active:
            self._write("summary.json", record)

    def confusion(self, counts, classes):
        """``counts``: (K, K), the test images of class i (row) that were taken for class j (column)."""
        if self.active:
            content = {"classes": list(classes), "counts": counts.long().tolist()}
            self._write("confusion.json", content, indent=None)

    def predictions(self, image_set, classes, found):
        """predictions.csv: what each image was taken for; files by name, other images by their position.

        Args:
            found: (N, 3) float32: class, its probability, and 0 for an image that was skipped, else 1.
        """
        if not self.active:
            return
        names = image_set.names or image_set.files or range(len(image_set))
        rows = [("image", "true_class", "class", "probability")]
        columns = names, image_set.targets.tolist(), *found.T.tolist()
        for name, true, taken, p, read in zip(*columns, strict=True):
            if read:
                rows.append((name, classes[true], classes[int(taken)], f"{p:.6f}"))
        write_csv(self.folder / "predictions.csv", rows)

    def read_summary(self):
        """What an earlier part of the run has written, {} if nothing that can be read."""
        path = self.folder / "summary.json"
        try:
            content = json.loads(path.read_text()) if path.exists() else {}
            if isinstance(content, dict):
                return content
        except (OSError, ValueError):
            pass
        self._say(f"{path} is damaged: its figures are left out")
        return {}

    def close(self):
        if self.writer:
            self.writer.close()
            self.writer = None


class Run(NamedTuple):
    """What a run left in ``results/NAME``, as ``RunLog`` wrote it."""

    folder: Path
    args: dict  # args.json
    records: list  # metrics.jsonl, a dict per line

    @property
    def name(self):
        return self.folder.name


def read_run(folder):
    """The run in ``results/NAME``; UserError if there is none, or none that can be read."""
    folder = Path(folder)
    if not (folder / "args.json").is_file():
        raise UserError(f"{folder} is not the folder of a run, such as results/digits: it holds no args.json")
    args = read_checked(folder / "args.json", _arguments_of_a_run)
    metrics = folder / "metrics.jsonl"
    records = read_checked(metrics, _whole_records) if metrics.exists() else []
    return Run(Path(os.path.abspath(folder)), args, records)


def _arguments_of_a_run(text):
    args = json.loads(text)
    if missing := {"name", "method", "dataset", "model", "save_path", "data_path"} - set(args):
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    return args


def _whole_records(text):
    """A run that is still going, or was killed, may end in half a line."""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def read_summary(run):
    """The content of a ``Run``'s summary.json; UserError if there is none, or none that can be read."""
    path = run.folder / "summary.json"
    if not path.exists():
        raise UserError(f"there is no {path}: a run writes it when its training ends")
    return read_checked(path, _figures_of_a_run)


def _figures_of_a_run(text):
    summary = json.loads(text)
    accuracies = ("top1", "best_top1", "finetune_top1")
    if missing := {"seed", "selection", *accuracies} - set(summary):
        raise ValueError(f"it has no {', '.join(sorted(missing))}")
    for name in accuracies:
        if not isinstance(summary[name], (int, float, type(None))):
            raise ValueError(f"{name} is no number")
    return summary


def read_confusion(path):
    """The counts, (K, K) int64, and the names of K classes in confusion.json; UserError if unreadable."""
    return read_checked(path, _counts_and_classes)


def _counts_and_classes(text):
    content = json.loads(text)
    counts, classes = np.array(content["counts"], dtype=np.int64), content["classes"]
    if counts.shape != (len(classes), len(classes)):
        raise ValueError(f"{len(classes)} classes, but counts of shape {counts.shape}")
    return counts, classes
