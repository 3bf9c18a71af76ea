"""Small parts that every script needs: messages, schedules, meters, interrupts, progress, errors."""

import datetime
import math
import os
import signal
import sys
import time

import torch
from tqdm import tqdm

# ---------------------------------------------------------------- the command line


def first_process():
    """Whether this process prints before a ``Runtime`` exists: the first or only process."""
    return int(os.environ.get("RANK", 0)) == 0


def say(*lines):
    """Print lines on standard error before a ``Runtime`` exists, in the first process only."""
    if first_process():
        print("\n".join(lines), file=sys.stderr)


def tell(runtime, *lines):
    """Print lines on standard error, in the main process only."""
    if runtime.is_main and lines:
        print("\n".join(lines), file=sys.stderr)


# ---------------------------------------------------------------- schedules


def learning_rate(step, *, peak, total_steps, warmup_steps=0, wait_steps=0, shape="cosine", milestones=()):
    """Learning rate at ``step`` (0, 1, …): zero for ``wait_steps``, then a warm-up, then the given shape.

    cosine: linear warm-up, then a cosine to zero over the remaining steps (published code).
    linear: linear warm-up, then a line to zero.
    constant: linear warm-up, then the peak.
    milestones: linear warm-up, then the peak, divided by 10 at each of the steps ``milestones``. Milestones
    count from the start of the run, not from the end of the wait.
    one-cycle: half a cosine from peak / 25 up to the peak during the warm-up (``warmup_steps`` 0: during
    three tenths of the steps), then half a cosine down to peak / 250,000 (Smith & Topin 2018, with the
    constants of PyTorch's OneCycleLR, but a constant momentum).
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
    if shape == "linear":
        return peak * (total_steps - step) / max(1, total_steps - warmup_steps)
    if shape == "milestones":
        return peak / 10 ** sum(step + wait_steps >= milestone for milestone in milestones)
    return _half_cosine(peak, 0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))


def _half_cosine(start, end, progress):
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def ramp_up(step, steps, wait_steps=0):
    """Factor of the unlabelled loss: 0 during the wait; t steps after it min(1, (t + 1) / steps), or 1 if
    ``steps`` is 0."""
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

    ``read`` returns means over all processes, the same values in each process.

    Args:
        runtime: the ``Runtime``.
        checkpoint: path of the last checkpoint, for the message about a scalar that is not finite.
    """

    def __init__(self, runtime, checkpoint):
        self.runtime, self.checkpoint = runtime, checkpoint
        self.reset()

    def reset(self):
        self.names = self.first_step = None
        self.count = self.mean = self.squares = self.bad = None

    def update(self, scalars, step):
        """Add the scalars of one step, ``{name: () tensor}``. Call it for each step in order, with the same
        names. Steps are counted on the device: a number in the graph would make XLA compile each step."""
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


# ---------------------------------------------------------------- what happens around a loop


class Interrupt:
    """Context that remembers SIGTERM, SIGINT or a fault in the data, so that a loop can stop after a step.

    Attributes:
        signal: number of the signal, 0 for none.
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
        """The exit status if the run must stop after this step, else 0; the same in all processes.

        Several processes exchange their statuses in every step and read the result in the next step, so
        that no process waits. With ``wait`` they read the result at once.
        """
        status = 128 + self.signal if self.signal else 2 if self.fault else 0
        if runtime.processes == 1:
            return status
        earlier, self.asked = self.asked, runtime.all_reduce_max_int(status)
        answer = self.asked if wait else earlier
        return 0 if answer is None else int(answer)

    def end(self, status):
        """End this process with ``status``; UserError in the process that has found a fault."""
        if self.fault:
            raise UserError(self.fault)
        sys.exit(status)

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


class Throughput:
    """Adds the images and seconds of training, without evaluations, to the totals of a run.

    Args:
        totals: a dict with ``trained_images`` and ``train_seconds``.
        images_per_step: images of all processes in a step.
        step: the first step.
    """

    def __init__(self, totals, images_per_step, step):
        self.totals, self.images_per_step = totals, images_per_step
        self.restart(step)

    def restart(self, step):
        """Count from now on, after ``step`` steps of the run."""
        self.taken, self.started = step, time.perf_counter()

    def count(self, step):
        """Add the images and seconds since the last call, up to ``step``; returns images per second."""
        images, seconds = (step - self.taken) * self.images_per_step, time.perf_counter() - self.started
        self.totals["trained_images"] += images
        self.totals["train_seconds"] += seconds
        self.restart(step)
        return images / seconds


class Cost:
    """Adds the operations of each step to the total of a run, in PFLOP: 10¹⁵ operations, two a multiply-add.

    Args:
        totals: a dict with ``pflop``.
        method: counts its ``multiply_adds``, in this process.
        processes: number of processes that share the batch.
    """

    def __init__(self, totals, method, processes):
        self.totals, self.method, self.processes = totals, method, processes
        self.counted, self.step = method.multiply_adds, 0

    def count(self):
        """After every step. A replayed CUDA graph does not count; it costs as much as the step before."""
        if self.method.multiply_adds > self.counted:
            self.step = self.method.multiply_adds - self.counted
            self.counted = self.method.multiply_adds
        self.totals["pflop"] += 2e-15 * self.step * self.processes


class Progress:
    """The progress of a loop on standard error: a bar on a terminal, otherwise a line a minute.

    Args:
        name: name of the run.
        total, done: number of all steps, and of the steps that an earlier process has taken.
        active: False prints nothing.
        unit: name of a step in the output.
    """

    SECONDS = 60  # between two lines if there is no terminal

    def __init__(self, name, total, done=0, active=True, unit="step"):
        self.name, self.total, self.done, self.active, self.unit = name, total, done, active, unit
        self.taken, self.figures = 0, ""
        self.began = self.said = time.monotonic()
        self.bar = None
        if active and sys.stderr.isatty():
            self.bar = tqdm(total=total, initial=done, desc=name, unit=unit)

    def step(self, figures=None, count=1):
        """Call after each step, or after ``count`` steps. ``figures``: text with new figures, if any."""
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
        """Print a line beside the bar."""
        self.said = time.monotonic()
        if self.active:
            text = f"{self.name}  {text}"
            self.bar.write(text, file=sys.stderr) if self.bar else print(text, file=sys.stderr)

    def record(self, step, record):
        """Print a line with the figures of an evaluation, without standard deviations."""
        shown = {name: value for name, value in record.items() if not name.endswith("_std")}
        shown = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        self.line(f"step {step}/{self.total}  {shown}")

    def stopped(self, when, path):
        """Print the last line of a loop that a signal has ended."""
        self.line(f"stopped {when}; continue with --resume {path}")
        self.close()

    def close(self):
        if self.bar:
            self.bar.close()


# ---------------------------------------------------------------- errors


class UserError(Exception):
    """An error that the user can correct: shown as one sentence, without a traceback, exit status 2."""
