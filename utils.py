"""Small parts that every script needs: schedules, meters, checkpoints, the record of a run."""

import contextlib
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from runtime import UserError

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
        bad = self.runtime.max_(self.bad.clone()).tolist()
        if any(bad):
            first = min(count for count in bad if count)
            terms = ", ".join(name for name, count in zip(self.names, bad, strict=True) if count == first)
            raise NonFiniteError(f"step {self.first_step + int(first) - 1}: {terms} is not finite")
        deviation = (self.squares / (self.count - 1).clamp_min(1)).sqrt()
        means, stds = self.runtime.average_([self.mean.clone(), deviation])
        stds = {f"{name}_std": std for name, std in zip(self.names, stds.tolist(), strict=True)}
        return dict(zip(self.names, means.tolist(), strict=True)) | stds

    def state_dict(self):
        keys = ("names", "first_step", "count", "mean", "squares", "bad")
        return {key: getattr(self, key) for key in keys}

    def load_state_dict(self, state, device):
        for key, value in state.items():
            setattr(self, key, value.to(device) if isinstance(value, torch.Tensor) else value)


def topk_correct(logits, targets, ks):
    """For each image and each k: is the target among the k largest logits? k is clipped to K.

    Args:
        logits: (N, K) float.
        targets: (N,) int64.
        ks: sequence of int.

    Returns:
        (len(ks), N) float32 of zeros and ones.
    """
    num_classes = logits.shape[1]
    ranked = logits.topk(min(max(ks), num_classes), dim=1).indices
    hits = ranked.eq(targets[:, None])
    return torch.stack([hits[:, : min(k, num_classes)].any(dim=1) for k in ks]).float()


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


# ---------------------------------------------------------------- the record of a run


def commit():
    """The commit of the program, with ``-dirty`` for uncommitted changes; None outside a clone."""
    try:
        describe = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        folder = Path(__file__).resolve().parent
        return subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@contextlib.contextmanager
def _writing(path):
    """Context in which an OSError becomes a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


class RunLog:
    """``results/NAME/``: args.json, metrics.jsonl, TensorBoard events, summary.json.

    Only the main process writes; in the others every call is a no-op.

    Args:
        folder: ``results/NAME``, made if it is not there.
        args: the arguments of the run, written with the versions and the commit.
        start_step: lines of metrics.jsonl after this step are dropped, since they are about to be written
            (again); None adds to the record of a finished run and keeps its arguments.
        tensorboard: also write event files.

    Raises:
        UserError: the folder cannot be written.
    """

    def __init__(self, folder, args, *, start_step=0, tensorboard=True, active=True):
        self.folder, self.active, self.writer = Path(folder), active, None
        if not active:
            return
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            self.metrics = self.folder / "metrics.jsonl"
            if start_step is not None or not (self.folder / "args.json").exists():
                about = {"python": platform.python_version(), "torch": torch.__version__, "commit": commit()}
                self._write("args.json", vars(args) | {"versions": about, "command": sys.argv})
            if start_step is not None:
                self._drop_after(start_step)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # a second to import: only where it is used

            self.writer = SummaryWriter(self.folder, purge_step=start_step)

    def _drop_after(self, step):
        lines = self.metrics.read_text().splitlines() if self.metrics.exists() else []
        complete = [line for line in lines if line.endswith("}")]  # a killed run may leave half a line
        kept = [line for line in complete if json.loads(line)["step"] <= step]
        self.metrics.write_text("".join(f"{line}\n" for line in kept))

    def _write(self, name, content):
        path = self.folder / name
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        os.replace(temporary, path)

    def evaluation(self, step, record):
        """One line of metrics.jsonl and the same figures to TensorBoard."""
        if not self.active:
            return
        with _writing(self.metrics), open(self.metrics, "a") as file:
            file.write(json.dumps({"step": step} | record) + "\n")
        if self.writer:
            for name, value in record.items():
                if value is not None:
                    self.writer.add_scalar(name, value, step)

    def summary(self, record):
        if self.active:
            with _writing(self.folder):
                self._write("summary.json", record)

    def read_summary(self):
        """What an earlier part of the run has written, {} if nothing."""
        path = self.folder / "summary.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def close(self):
        if self.writer:
            self.writer.close()
