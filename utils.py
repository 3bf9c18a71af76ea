"""Small parts that every script needs: schedules, meters, checkpoints, a run's name, progress and record."""

import contextlib
import datetime
import errno
import json
import math
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from runtime import UserError, write_atomically

# ---------------------------------------------------------------- schedules


def learning_rate(step, *, peak, total_steps, warmup_steps=0, wait_steps=0, shape="cosine"):
    """Learning rate at ``step`` (0, 1, …): zero while waiting, a warm-up, then as ``shape`` says.

    cosine: linear warm-up, then a cosine to zero over the steps that are left (published code).
    constant: linear warm-up, then the peak.
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
    return _half_cosine(peak, 0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def _half_cosine(start, end, progress):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ramp_up(step, steps):
    """Weight of the unlabelled loss: min(1, (step + 1) / steps), 1 for ``steps`` = 0."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


# ---------------------------------------------------------------- meters


class NonFiniteError(Exception):
    """A loss was not finite: the run stops with exit status 3."""


class Meters:
    """Mean and standard deviation of named scalars since the last ``reset``, kept on the device.

    ``update`` never waits for the device; ``read`` does. The first step at which a scalar was not finite
    is remembered on the device too, so that ``read`` can name it however late it is called.

    With several processes ``read`` returns the same in all of them: means over processes.
    """

    def __init__(self, runtime):
        self.runtime = runtime
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
            self.mean, self.squares, self.bad = (torch.zeros_like(values) for _ in range(3))
            self.count = torch.zeros_like(values[0])
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
            raise NonFiniteError(f"step {self.first_step + int(first) - 1}: {terms} is not finite")
        deviation = (self.squares / (self.count - 1).clamp_min(1)).sqrt()
        means, stds = self.runtime.all_reduce_mean([self.mean.clone(), deviation])
        stds = {f"{name}_std": std for name, std in zip(self.names, stds.tolist(), strict=True)}
        return dict(zip(self.names, means.tolist(), strict=True)) | stds

    def state_dict(self):
        keys = ("names", "first_step", "count", "mean", "squares", "bad")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state, device):
        for key, value in state.items():
            setattr(self, key, value.to(device) if isinstance(value, torch.Tensor) else value)


# ---------------------------------------------------------------- checkpoints


def network_name(args, role):
    """The --model of a role, "teacher" or "student", by the arguments of a run as a dict."""
    return (args.get("student_model") if role == "student" else None) or args["model"]


def load_state(module, state, path):
    """``module.load_state_dict`` with a sentence instead of a list when the network is another one.

    Raises:
        UserError: names or shapes differ.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the network in {path} is not the one asked for: give the --model and --num-classes that it was "
            "trained with"
        ) from error


# ---------------------------------------------------------------- a run's name and files


def check_name(name, trains=False):
    """Returns the name of a run, which is also that of its files; UserError if it cannot be one.

    ``trains``: not the record of an evaluation. Then its checkpoints must not be taken for another run's.
    """
    if trains and (match := re.search(r"_(last|best|finetune|step\d+)$", name)):
        raise UserError(
            f"'{name}' ends in {match[0]}, as the checkpoints of a run named '{name[: match.start()]}' do: "
            "choose another --name"
        )
    if not name or name.startswith(".") or len(os.fsencode(name)) > 200 or set(name) & set("/\\\0\n"):
        raise UserError(
            f"{name!r} cannot be the name of a run: use 1 to 200 letters without path separators, the first "
            "of them no dot"
        )
    return name


def checkpoint_path(args, kind):
    """``checkpoint/NAME_KIND.pth.tar``."""
    return os.path.join(args.save_path, f"{args.name}_{kind}.pth.tar")


def checkpoints_of(args):
    """All checkpoints of the run's name that there are: {path: step in the name, None without one}."""
    pattern = re.compile(
        re.escape(args.name) + r"_(?:last|best|finetune_last|finetune_best|step(\d{8,}))\.pth\.tar"
    )
    names = os.listdir(args.save_path) if os.path.isdir(args.save_path) else []
    found = filter(None, map(pattern.fullmatch, names))
    return {os.path.join(args.save_path, match[0]): match[1] and int(match[1]) for match in found}


def drop_checkpoints(args, step):
    """Of the checkpoints that are named after their step, keep the last ``--keep`` up to this one.

    Those of later steps predate this run.
    """
    numbered = {number: path for path, number in checkpoints_of(args).items() if number is not None}
    kept = sorted(number for number in numbered if number <= step)[-args.keep :]
    for number in numbered.keys() - set(kept):
        os.remove(numbered[number])


def make_folder(path):
    """Make a folder, and see that it can be written to; UserError if not."""
    with writing(path):
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe-{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)


HELD = []  # open files whose locks last as long as this process


def lock(args, make=True):
    """Only one process trains a run of a name: the system lifts the lock when it ends, however it ends.

    Args:
        make: make the file that is locked, ``checkpoint/.NAME.lock``, if it is not there; it stays.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
    """
    path = os.path.join(args.save_path, f".{args.name}.lock")
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    if not make and not os.path.exists(path):
        return
    with writing(path):
        HELD.append(open(path, "a"))  # noqa: SIM115 (open until the process ends)
    try:
        fcntl.lockf(HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # decoding workers do not inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{args.name} is being trained by another process: wait for its end, or give another --name"
            ) from error
        # else a file system without locks: nothing can be known


@contextlib.contextmanager
def writing(path):
    """Context in which an OSError becomes a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


# ---------------------------------------------------------------- what happens around a loop


class Interrupt:
    """Context that remembers SIGTERM or SIGINT, so that a loop can stop between two steps."""

    def __enter__(self):
        self.signal, self.asked = 0, None
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _note(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:  # a second Ctrl-C ends the process at once; launchers repeat SIGTERM
            signal.signal(number, signal.SIG_DFL)

    def stops(self, runtime):
        """The signal that ends the run after this step, 0 for none: the same answer in all processes.

        Several processes ask each other at every step and read the answer at the next, so that none waits.
        """
        if runtime.processes == 1:
            return self.signal
        answer = int(self.asked) if self.asked is not None else 0
        self.asked = runtime.all_reduce_max_int(self.signal)
        return answer

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Progress:
    """How far a loop is, on standard error: a bar on a terminal, elsewhere a line a minute.

    Args:
        name: of the run.
        total, done: steps, and how many of them an earlier process has taken.
        active: False for silence.
    """

    SECONDS = 60  # between two lines without a terminal

    def __init__(self, name, total, done=0, active=True):
        self.name, self.total, self.done, self.active = name, total, done, active
        self.taken, self.figures = 0, ""
        self.began = self.said = time.monotonic()
        self.bar = None
        if active and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=name, unit="step")

    def step(self, figures=None):
        """After each step; ``figures`` in words, where there are new ones."""
        self.taken += 1
        self.figures = figures or self.figures
        if self.bar:
            self.bar.update()
            if figures:
                self.bar.set_postfix_str(figures)
        elif self.active and time.monotonic() - self.said >= self.SECONDS:
            each = (time.monotonic() - self.began) / self.taken
            left = datetime.timedelta(seconds=round(each * (self.total - self.done - self.taken)))
            each = f"{each:.3g} s a step, about {left} left"
            self.line("  ".join(filter(None, (f"{self.done + self.taken}/{self.total}", each, self.figures))))

    def line(self, text):
        """A line of its own."""
        self.said = time.monotonic()
        if self.active:
            text = f"{self.name}  {text}"
            self.bar.write(text, file=sys.stderr) if self.bar else print(text, file=sys.stderr)

    def close(self):
        if self.bar:
            self.bar.close()


# ---------------------------------------------------------------- the record of a run


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
    """``results/NAME/``: args.json, metrics.jsonl, TensorBoard events, summary.json.

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
            elif run_id and self._run_of(beside) == run_id:  # killed before it was put in its place
                self._move(beside)
            else:  # of a run that was killed before it replaced this one
                shutil.rmtree(beside, ignore_errors=True)
            self.folder.mkdir(parents=True, exist_ok=True)
            other = self._run_of(self.folder)
            if other not in (None, run_id) and run_id is not None:
                self._say(f"the record in {self.folder} is of another run and is replaced")
                self._clear()
            self._write_arguments(args, run_id, keep=start_step is None)
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
            from torch.utils.tensorboard import SummaryWriter  # a second to import: only where it is used

            self.writer = SummaryWriter(self.folder, purge_step=self.purge_step)

    def _run_of(self, folder):
        """The id of the run whose record is in a folder, None if it has none."""
        try:
            return json.loads((folder / "args.json").read_text()).get("run")
        except (OSError, ValueError, AttributeError):
            return None

    def _write_arguments(self, args, run_id, keep):
        if not (keep and (self.folder / "args.json").exists()):
            about = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit()}
            self._write("args.json", vars(args) | {"run": run_id, "versions": about, "command": sys.argv})

    def _clear(self):
        """Remove what an earlier run has left in the folder, of all that this program writes."""
        names = ("metrics.jsonl", "summary.json", "args.json", "labeled.txt", "labeled_indices.txt", "*.png")
        for name in (*names, "events.out.tfevents.*"):
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

    def _write(self, name, content):
        text = json.dumps(content, indent=2) + "\n"
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
