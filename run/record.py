"""What a run leaves in ``results/NAME``: its log, its summary, and how both are read again."""

import datetime
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from engine.files import read_checked, write_atomically, write_csv, writing
from models import count_parameters
from utils import UserError, tell

# run state saved in every checkpoint besides the networks
FRESH = {
    "run": None,
    "best_top1": None,
    "best_step": None,
    "best_val_top1": None,
    "oracle_top1": 0.0,
    "train_seconds": 0.0,
    "trained_images": 0,
    "pflop": 0.0,
}


MEASURED = ("top1", "top5", "mean_class_top1", "largest_class_top1", "never_predicted", "test_images")
MEASURED = (*MEASURED, "ensemble_top1", "student_top1")  # of --ensemble, as is "teacher_top1"


POSITION = (*MEASURED, "teacher_top1", "meters", "loader")


SUMMARY = (
    *("name", "dataset", "method", "num_labeled", "seed", "steps", *MEASURED, "best_top1", "best_step"),
    *("selection", "oracle_top1", "teacher_top1", "tta_top1", "finetune_top1", "pflop", "train_seconds"),
    "images_per_second",
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
    if summary["tta_top1"] is not None:
        parts.append(f"mean of several views {summary['tta_top1']:.2f} %")
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


def describe_run(args, runtime, dataset, method, folder, step):
    """What is about to be trained on what, in a few lines; ``method`` is None before finetuning alone."""
    things = f"images, {dataset.size} pixels" if dataset.size else "points"
    lines = [
        f"{args.dataset}: {len(dataset.labeled):,} labelled, {len(dataset.unlabeled):,} unlabelled, "
        f"{len(dataset.test):,} test {things}; {args.method} on {runtime.describe()}",
        *dataset.notes,
    ]
    if method and method.uses_consistency:
        lines += unequal_labels(args, dataset)
    for role, learner in method.learners.items() if method else ():
        perceptron = "five layers on class distributions"
        name = perceptron if role == "perceptron" else method.network_name(args, role)
        learning = sum(p.numel() for p in learner.parameters.values())
        total, operations = count_parameters(learner.network), learner.per_image
        frozen = f" ({learning:,} learn)" if learning < total else ""
        lines.append(f"{role}: {name}, {total:,} parameters{frozen}, {operations:,} multiply-adds an image")
    lines.append(f"results go to {folder}, checkpoints to {args.save_path}")
    if args.resume:
        doing = "finetuning" if args.finetune else "continuing"
        lines.append(f"{doing} (as {args.name}) from step {step} of {args.resume}")
        if not args.finetune and step == args.total_steps:
            lines.append(f"--total-steps {step} is reached: nothing is left to train")
    tell(runtime, *lines)


def unequal_labels(args, dataset):
    """The warning where --align assumes equal classes and the labelled images have others, in a list."""
    counts = dataset.class_counts
    most, least = max(counts), min(counts)
    # a fraction of labels is rounded in each class, so that one image more says nothing
    if not args.align or args.align_to != "uniform" or most <= max(1.5 * least, least + 1):
        return []
    classes = [dataset.classes[counts.index(count)] for count in (most, least)]
    return [
        f"--align assumes equal classes, but {most} labelled images are of class '{classes[0]}' and "
        f"{least} of '{classes[1]}': if the unlabelled images are as unequal, add --align-to labeled"
    ]


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
    ):
        self.folder, self.active, self.writer = Path(folder), active, None
        if not active:
            return
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            before = self._arguments()
            if before.get("run") not in (None, run_id) and run_id is not None:
                self._say(f"{self.folder} has the results of another run: they are replaced")
                self._clear()
                before = {}
            if start_step is not None or not (self.folder / "args.json").exists():
                self._write_arguments(args, run_id, before)
            self._drop(start_step, finetune_from)
        if tensorboard:
            self._open(start_step)

    @property
    def metrics(self):
        return self.folder / "metrics.jsonl"

    def _open(self, purge_step):
        try:
            from torch.utils.tensorboard import SummaryWriter  # a second to import: only where it is used
        except Exception as error:  # not installed, or at odds with another package
            self._say(f"no TensorBoard events are written, metrics.jsonl has the same figures: {error}")
            return
        self.writer = SummaryWriter(self.folder, purge_step=purge_step)

    def _arguments(self):
        """What args.json says of the run in the folder; {} where there is none."""
        try:
            return dict(json.loads((self.folder / "args.json").read_text()))
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
