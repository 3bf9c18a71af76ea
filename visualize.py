"""Pictures of finished runs and of the augmentation.

    python visualize.py curves results/A [results/B …]        losses and accuracies over the steps
    python visualize.py regions results/A [results/B …]       two moons: what each student says where
    python visualize.py confusion results/A                   which class is taken for which
    python visualize.py features results/A                    the test images as the network sees them, in 2-D
    python visualize.py augment --dataset digits              real images, their views, every operation

Each prints the path of the file that it wrote. ``main.py`` calls ``finished_run`` at the end of training.
What is shown stands in the files of a run or is computed here from its checkpoint and its data.
"""

import os
import signal
import sys


def interrupted(*_):
    """Ctrl-C while the program is still being imported: nothing is there to be tidied up."""
    os.write(2, b"visualize.py: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)

import argparse
import contextlib
import itertools
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
from augmentation import OPERATIONS, Draws, ImageViews, PointViews
from models import build_model, head_of
from runtime import Runtime, UserError
from utils import load_state, network_name

WIDTH = 9.0  # inches; at 100 pixels per inch what a README shows
PIXELS_PER_INCH = 150
EVALUATION_BATCH = 256  # as in main.py, so that both measure the same accuracy

# Okabe and Ito's colours, which people with any colour vision can tell apart
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, GREY, DARK = "#CC79A7", "#56B4E9", "#000000", "#8C8C8C", "#4D4D4D"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
PALE = ("#CFE4F2", "#F7DAC8", "#CDEBE1", "#FAE9C6")  # the same colours behind points
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")

TEACHER, STUDENT = "teacher", "student (EMA)"
METHOD_NAMES = {
    "supervised": "supervised",
    "uda": "UDA",
    "fixmatch": "FixMatch",
    "pseudo-label": "pseudo labels",
    "mpl": "Meta Pseudo Labels",
    "reduced-mpl": "Reduced MPL",
    "semimeta": "Semi-Meta",
}


# ------------------------------------------------------------------------------------------ reading a run


class Run(NamedTuple):
    """What a training run left."""

    folder: Path
    args: dict  # args.json
    records: list  # metrics.jsonl, a dict per evaluation

    @property
    def name(self):
        return self.folder.name

    @property
    def method(self):
        return METHOD_NAMES.get(self.args["method"], self.args["method"])

    @property
    def things(self):
        """What the data set consists of."""
        return "points" if self.args["dataset"] == "twomoons" else "images"


def read_run(folder):
    """The run in ``results/NAME``.

    Raises:
        UserError: no such folder, or no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"there is no folder {folder}: give the results folder of a run, such as results/digits"
        )
    try:
        args = json.loads((folder / "args.json").read_text())
        if missing := {"name", "method", "dataset", "model", "save_path", "data_path"} - set(args):
            raise ValueError(f"args.json has no {', '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder} is not the folder of a run: it has no readable args.json") from error
    metrics = folder / "metrics.jsonl"
    try:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        # a run that is still going, or was killed, may end in half a line
        records = [json.loads(line) for line in lines if line.endswith("}")]
    except (OSError, ValueError) as error:
        raise UserError(f"{metrics} cannot be read: {error}") from error
    return Run(Path(os.path.abspath(folder)), args, records)


def read_dataset(run, state, data_path=None, only_test=True):
    """The data set of a run as its checkpoint ``state`` remembers it: the same images in the same parts.

    Args:
        only_test: the test images alone, which needs no labels.
    """
    names = ("num_labeled", "num_val", "seed", "resize", "test_fraction", "workers", "skip_unreadable")
    names = (*names, "svhn_extra")
    options = {name: run.args[name] for name in names if name in run.args}
    record = state.get("data")
    if record and not options.get("resize"):
        options["resize"] = record["size"] or None
    indices = run.folder / "labeled_indices.txt"  # earlier versions wrote it and recorded nothing
    recorded = bool(record) and "labeled" in record
    return data.load_dataset(
        run.args["dataset"],
        data_path or run.args["data_path"],
        labeled_indices=str(indices) if indices.exists() and not recorded and not only_test else None,
        record=record,
        only_test=only_test,
        **options,
    )


def read_checkpoint(run, save_path=None):
    """The path and the content of a run's checkpoint.

    It is the one that the run selected: the best on the validation images, without them the last.

    Raises:
        UserError: no checkpoint, or none of this program.
    """
    if run.args.get("evaluate"):
        path = run.args["resume"]
    else:
        kind = "finetune_best" if run.args.get("finetune") else "best"
        places = [save_path or run.args["save_path"]]
        if (
            not save_path and "results_path" in run.args
        ):  # where it lies beside the results, if both were moved
            there = os.path.relpath(run.args["save_path"], run.args["results_path"])
            places.append(os.path.normpath(os.path.join(run.folder.parent, there)))
        paths = [os.path.join(place, f"{run.args['name']}_{kind}.pth.tar") for place in places]
        path = next(filter(os.path.isfile, paths), paths[0])
    if not os.path.isfile(path):
        raise UserError(
            f"there is no checkpoint {path} of {run.name}: start this from the folder where the run was "
            "started, or say with --save-path where its checkpoints are"
        )
    state = Runtime("cpu", alone=True).load(path)
    if not isinstance(state, dict) or "avg_state_dict" not in state:
        raise UserError(f"{path} holds no student: it is not a checkpoint of this program")
    return path, state


def read_networks(run, dataset, runtime, path, state):
    """The networks in a checkpoint, ready to predict: {TEACHER: …, STUDENT: …}, or the student alone.

    Raises:
        UserError: they are not those of the run.
    """
    networks = {}
    for title, key in ((TEACHER, "teacher_state_dict"), (STUDENT, "avg_state_dict")):
        if key in state:
            model = network_name(run.args, "student" if title == STUDENT else "teacher")
            eps = run.args.get("bn_eps")
            network = build_model(model, dataset.num_classes, image_size=dataset.size, bn_eps=eps)
            load_state(network, state[key], path)
            networks[title] = runtime.place(network).eval()
    return networks


def _tested(run, data_path, save_path, dataset=None):
    """What measuring a run's student takes: data set with its test images, ``Runtime``, network."""
    path, state = read_checkpoint(run, save_path)
    runtime = make_runtime(run.args)
    dataset = dataset or read_dataset(run, state, data_path)
    return dataset, runtime, read_networks(run, dataset, runtime, path, state)[STUDENT]


def make_runtime(args):
    """Where to evaluate: in the run's precision and memory order, on the device that there is."""
    device = "cuda" if args.get("device") != "cpu" and torch.cuda.is_available() else "cpu"
    dtype = args.get("amp_dtype", "bf16")
    amp = args.get("amp", False) and (device, dtype) != ("cpu", "fp16")
    return Runtime(device, amp, dtype, args.get("channels_last", False), alone=True)


def evaluation_view(dataset):
    """The function that makes network inputs of a batch of images or points."""
    if dataset.size == 0:
        return PointViews(0.0, 0.0).evaluation
    return ImageViews(dataset.size, dataset.mean, dataset.std, crop=dataset.crop).evaluation


@torch.no_grad()
def predict(network, image_set, dataset, runtime):
    """(N,) true and (N,) predicted classes of the images of a set, on the CPU."""
    view, truth, predicted = evaluation_view(dataset), [], []
    for images, targets, mask in data.batches(image_set, EVALUATION_BATCH, runtime.device):
        with runtime.autocast():
            logits = network(view(images))
        real = mask > 0
        truth.append(targets[real].cpu())
        predicted.append(logits.argmax(dim=1)[real].cpu())
    return torch.cat(truth), torch.cat(predicted)


def accuracy(truth, predicted):
    """Per cent."""
    return 100 * (truth == predicted).float().mean().item()


# --------------------------------------------------------------------------------------------- the canvas


def new_figure(height):
    """An empty figure of README width. Without pyplot: no window system and no global state."""
    from matplotlib.figure import Figure  # half a second to import: only where something is drawn

    return Figure(figsize=(WIDTH, height), dpi=PIXELS_PER_INCH, layout="constrained", facecolor="white")


def save(figure, path):
    """Write the figure as PNG, whole or not at all; returns the path."""
    path = Path(path)
    if path.suffix != ".png":
        raise UserError(f"the picture is a PNG, but {path} does not end in .png")
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(temporary, format="png")
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):  # of a folder that refuses everything
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write the picture {path}: {error.strerror or error}") from error
    return str(path)


def title(axes, text):
    axes.set_title(text, loc="left", fontsize=10, fontweight="bold")


def plain(axes):
    """Two sides of the frame, light grid lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=9)


# ------------------------------------------------------------------------------------------------- curves

SHORT = {
    "labeled_loss": "labelled",
    "uda_loss": "UDA",
    "student_loss": "pseudo labels",
    "test_loss": "test",
    "finetune_loss": "finetuning",
    "top1": "test",
    "top5": "test, top-5",
    "val_top1": "validation",
    "finetune_top1": "finetuned",
    "finetune_val_top1": "finetuned, val.",
    "pseudo_label_accuracy": "correct",
    "uda_mask": "above threshold",
    "feedback": "feedback",
}
LONG = {
    "top1": "Test accuracy (top-1, %)",
    "val_top1": "Validation accuracy (top-1, %)",
    "test_loss": "Test loss (nats)",
    "labeled_loss": "Labelled loss in training (nats)",
    "student_loss": "Student's loss on pseudo labels (nats)",
    "pseudo_label_accuracy": "Correct pseudo labels (%)",
    "feedback": "Feedback to the teacher (nats)",
}
ACCURACIES = ("top1", "top5", "val_top1", "finetune_top1", "finetune_val_top1")
SHARES = ("pseudo_label_accuracy", "uda_mask")  # logged as 0…1, shown in per cent


def series(run, key):
    """Steps and values of one figure over a run, as two lists; shares in per cent."""
    points = [(record["step"], record[key]) for record in run.records if record.get(key) is not None]
    factor = 100 if key in SHARES else 1
    return [step for step, _ in points], [factor * value for _, value in points]


def draw_curves(runs):
    """Losses, accuracies, pseudo labels and feedback of one run; of several, one panel per figure.

    Raises:
        UserError: a run that has not been evaluated yet.
    """
    for run in runs:
        if not run.records:
            raise UserError(
                f"{run.folder} has no metrics yet: the first ones are written after --eval-step steps"
            )
    return _draw_run(runs[0]) if len(runs) == 1 else _draw_comparison(runs)


def _draw_run(run):
    keys = [
        key for key in dict.fromkeys(key for record in run.records for key in record) if series(run, key)[0]
    ]
    top5_says_nothing = min(series(run, "top5")[1], default=100) == 100  # as with five classes or fewer
    first, last = run.records[0]["step"], max(run.records[-1]["step"], run.records[0]["step"] + 1)
    panels = [
        ("Losses", "cross-entropy (nats)", [key for key in keys if key.endswith("_loss")]),
        (
            f"Accuracy of the {STUDENT}",
            "accuracy (%)",
            [k for k in keys if k in ACCURACIES and not (k == "top5" and top5_says_nothing)],
        ),
        ("Pseudo labels", f"unlabelled {run.things} (%)", [key for key in SHARES if key in keys]),
        (
            "Feedback to the teacher, mean ± s.d.",
            "feedback (nats)",
            [key for key in keys if key == "feedback"],
        ),
    ]
    panels = [panel for panel in panels if panel[2]]
    figure = new_figure(0.5 + 2.7 * ((len(panels) + 1) // 2))
    grid = figure.subplots((len(panels) + 1) // 2, 2, squeeze=False).ravel()
    for axes, (heading, unit, shown) in zip(grid, panels, strict=False):
        title(axes, heading)
        axes.set_ylabel(unit, fontsize=9)
        for key, colour in zip(shown, itertools.cycle(COLOURS), strict=False):
            steps, values = series(run, key)
            _line(axes, steps, values, key, colour)
            if key == "feedback":
                _spread(axes, run, colour)
        _finish(axes, shown)
        axes.set_xlim(first - 0.03 * (last - first), last + 0.03 * (last - first))
        if unit == "accuracy (%)":
            label_ends(axes, {key: f"{_short(key)} {series(run, key)[1][-1]:.2f} %" for key in shown})
        elif shown != ["feedback"]:
            label_ends(axes, {key: _short(key) for key in shown})
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.suptitle(f"{run.name}: {run.method} on {run.args['dataset']}", x=0.01, ha="left", fontsize=11)
    return figure


def _draw_comparison(runs):
    keys = [key for key in LONG if any(series(run, key)[0] for run in runs)]
    if not keys:
        raise UserError(
            "these runs have only finetuned: there is nothing that the curves of several runs show"
        )
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [f"{run.folder.parent.name}/{run.name}" for run in runs]
    figure = new_figure(0.6 + 2.6 * ((len(keys) + 1) // 2) + 0.12 * len(runs))
    grid = figure.subplots((len(keys) + 1) // 2, 2, squeeze=False).ravel()
    lines = {}
    for axes, key in zip(grid, keys, strict=False):
        title(axes, LONG[key])
        for number, (run, name) in enumerate(zip(runs, names, strict=True)):
            steps, values = series(run, key)
            if steps:
                colour = COLOURS[number % len(COLOURS)]
                line = _line(axes, steps, values, key, colour, "-" if number < len(COLOURS) else "--")
                about = [run.method, *(f"top-1 {value:.2f} %" for value in series(run, "top1")[1][-1:])]
                lines.setdefault(f"{name}  ({', '.join(about)})", line)
        _finish(axes, [key])
    for axes in grid[len(keys) :]:
        axes.remove()
    figure.legend(lines.values(), lines.keys(), loc="outside lower left", ncols=2, fontsize=9, frameon=False)
    return figure


def _short(key):
    return SHORT.get(key, key.replace("_", " "))


def _line(axes, steps, values, key, colour, style="-"):
    few = len(steps) <= 30 and not key.startswith("finetune")  # then each evaluation is a dot
    options = {"marker": "o" if few or len(steps) == 1 else None, "markersize": 3, "linewidth": 1.6}
    return axes.plot(steps, values, style, color=colour, label=key, **options)[0]


def _spread(axes, run, colour):
    """The band of one standard deviation around the mean feedback, where it was logged."""
    rows = [r for r in run.records if r.get("feedback") is not None and r.get("feedback_std") is not None]
    if rows:
        steps, mean, std = (
            np.array([row[key] for row in rows]) for key in ("step", "feedback", "feedback_std")
        )
        axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)


def _finish(axes, keys):
    """Axes, ticks and scales, by the values that were drawn."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    plain(axes)
    axes.set_xlabel("training step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    if "feedback" in keys:
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)
    values = np.concatenate([line.get_ydata() for line in axes.get_lines() if line.get_label() in keys])
    if all(key.endswith("_loss") for key in keys) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if any(key in SHARES or key.endswith(("top1", "top5")) for key in keys) and np.ptp(values) < 1:
        middle = (values.min() + values.max()) / 2  # at least a point of per cent, so that noise looks small
        axes.set_ylim(middle - 0.6, middle + 0.6)


def label_ends(axes, labels):
    """The name of each line to the right of its end, moved apart where they would overlap.

    Args:
        labels: {label of the line: text}.
    """
    figure = axes.figure
    figure.draw_without_rendering()  # the layout, so that positions are known in pixels
    ends = []
    for line in axes.get_lines():
        if line.get_label() in labels:
            end = (line.get_xdata()[-1], line.get_ydata()[-1])
            ends.append((axes.transData.transform(end)[1], line, end))
    ends.sort(key=lambda item: item[0])
    gap = 10 / 72 * figure.dpi
    heights = [height for height, _, _ in ends]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    over = (heights[-1] - axes.bbox.y1) if heights else 0
    if over > 0:  # the pile is pushed down from the top again
        heights[-1] -= over
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - gap)
    for height, (_, line, _) in zip(heights, ends, strict=True):
        place = (height - axes.bbox.y0) / axes.bbox.height
        axes.annotate(
            labels[line.get_label()],
            (1.0, place),
            xycoords="axes fraction",
            xytext=(5, 0),
            textcoords="offset points",
            color=line.get_color(),
            fontsize=8.5,
            va="center",
            annotation_clip=False,
        )


# ------------------------------------------------------------------------------------------------ regions


@torch.no_grad()
def decision_regions(network, extent, resolution, device="cpu"):
    """What a network of two moons says at the middles of cells: x (W,), y (H,), classes (H, W) int64.

    Args:
        extent: (left, right, bottom, top).
        resolution: W; H follows from the extent, with about square cells.
    """
    left, right, bottom, top = extent
    rows = max(2, round(resolution * (top - bottom) / (right - left)))
    x = (left + (np.arange(resolution) + 0.5) * (right - left) / resolution).astype(np.float32)
    y = (bottom + (np.arange(rows) + 0.5) * (top - bottom) / rows).astype(np.float32)
    points = torch.from_numpy(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2)).to(device)
    return x, y, network(points).argmax(dim=1).view(rows, resolution).cpu().numpy()


def draw_regions(panels, dataset):
    """Decision regions side by side, with the training points.

    Args:
        panels: list of (title, network, labelled ImageSet).
        dataset: whose unlabelled points are drawn and whose extent is shown.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.lines import Line2D

    points = dataset.unlabeled.images.numpy()
    (left, bottom), (right, top) = points.min(axis=0) - 0.25, points.max(axis=0) + 0.25
    extent = (left, right, bottom, top)
    columns = min(3, len(panels))
    rows = (len(panels) + columns - 1) // columns
    figure = new_figure(0.45 + rows * (0.95 + (WIDTH / columns - 0.5) * (top - bottom) / (right - left)))
    grid = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    for axes, (heading, network, labeled) in zip(grid, panels, strict=False):
        device = next(network.parameters()).device
        _, _, classes = decision_regions(network, extent, 500, device)
        axes.imshow(
            classes,
            origin="lower",
            extent=extent,
            cmap=ListedColormap(PALE),
            vmin=0,
            vmax=len(PALE) - 1,
            interpolation="nearest",
        )
        axes.plot(*points.T, "o", color=DARK, markersize=1.8, alpha=0.5, markeredgewidth=0)
        for k in range(dataset.num_classes):
            chosen = labeled.images[labeled.targets == k].numpy()
            axes.plot(
                *chosen.T,
                MARKERS[k],
                color=COLOURS[k],
                markersize=9,
                markeredgecolor="black",
                markeredgewidth=1.0,
            )
        axes.set_title(heading, fontsize=10)
        axes.tick_params(labelsize=8)
        axes.set_aspect("equal")
    for number, axes in enumerate(grid):
        if number >= len(panels):
            axes.remove()
            continue
        axes.set_xlabel("x₁", fontsize=9)
        if number % columns == 0:
            axes.set_ylabel("x₂", fontsize=9)
    handles = [
        Line2D(
            [], [], linestyle="", marker=MARKERS[k], color=COLOURS[k], markersize=8, markeredgecolor="black"
        )
        for k in range(dataset.num_classes)
    ]
    handles.append(Line2D([], [], linestyle="", marker="o", color=DARK, markersize=3))
    words = [f"labelled, {name}" for name in dataset.classes] + [f"{len(points):,} unlabelled points"]
    figure.legend(handles, words, loc="outside lower center", ncols=len(words), fontsize=9, frameon=False)
    return figure


def regions_of(runs, data_path=None, save_path=None, dataset=None):
    """The figure for one run (teacher and student) or several (the student of each).

    A ``dataset`` that the caller has read already is taken for all runs.

    Raises:
        UserError: a run on another data set.
    """
    for run in runs:
        if run.args["dataset"] != "twomoons":
            raise UserError(
                f"{run.folder} is not a two-moons run but one on {run.args['dataset']}: decision regions "
                "need points in the plane"
            )
    panels = []
    methods = [run.method for run in runs]
    for run in runs:
        path, state = read_checkpoint(run, save_path)
        runtime = make_runtime(run.args)
        points = dataset or read_dataset(run, state, data_path, only_test=False)
        networks = read_networks(run, points, runtime, path, state)
        if len(runs) > 1:
            name = run.method if methods.count(run.method) == 1 else run.name
            networks = {name: networks[STUDENT]}
        for name, network in networks.items():
            right = accuracy(*predict(network, points.test, points, runtime))
            panels.append((f"{name}\ntest accuracy {right:.2f} %", network, points.labeled))
    return draw_regions(panels, points)


# ---------------------------------------------------------------------------------------------- confusion


def confusion_matrix(truth, predicted, num_classes):
    """(K, K) int64, the images of class i (row) that were taken for class j (column)."""
    pairs = truth * num_classes + predicted
    return torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)


def draw_confusion(counts, classes, heading):
    """Rows in per cent of their class, with the counts below them up to 20 classes.

    Args:
        counts: (K, K) int64.
        classes: K names.
    """
    from matplotlib.colors import PowerNorm

    k = len(classes)
    counts = counts.numpy()
    percent = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
    figure = new_figure(7.3)
    axes = figure.subplots()
    # the square root as colour scale: a few images that went astray are seen
    shown = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
    axes.set_xlabel("predicted class", fontsize=10)
    axes.set_ylabel("true class", fontsize=10)
    title(axes, heading)
    every = max(1, k // 25)
    names = [str(name) if len(str(name)) <= 16 else f"{str(name)[:15]}…" for name in classes][::every]
    upright = len(names) * max(map(len, names)) <= 60
    size = 9 if k <= 20 else 7
    axes.set_xticks(range(0, k, every), names, fontsize=size, rotation=0 if upright else 45)
    axes.set_yticks(range(0, k, every), names, fontsize=size)
    if not upright:
        for label in axes.get_xticklabels():
            label.set(ha="right", rotation_mode="anchor")
    if k <= 20:
        size = 12 if k <= 4 else 9 if k <= 12 else 6.5
        for i in range(k):
            for j in range(k):
                if counts[i, j]:
                    text = (
                        f"{percent[i, j]:.0f} %\n{counts[i, j]}"
                        if k <= 12
                        else f"{percent[i, j]:.0f}\n{counts[i, j]}"
                    )
                    colour = "white" if percent[i, j] > 40 else "black"
                    axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)
    bar = figure.colorbar(shown, ax=axes, shrink=0.8, pad=0.02, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    below = "; below it their number" if k <= 20 else ""
    bar.set_label(f"share of the true class (%){below}", fontsize=9)
    bar.ax.tick_params(labelsize=9)
    return figure


def confusion_of(run, data_path=None, save_path=None, dataset=None):
    """The figure of the predictor of a run, on the test set; ``dataset`` saves reading it again."""
    dataset, runtime, network = _tested(run, data_path, save_path, dataset)
    truth, predicted = predict(network, dataset.test, dataset, runtime)
    right = accuracy(truth, predicted)
    heading = f"{run.name} ({run.method}): {right:.2f} % of {len(truth):,} test {run.things} right"
    return draw_confusion(confusion_matrix(truth, predicted, dataset.num_classes), dataset.classes, heading)


# ----------------------------------------------------------------------------------------------- features

MOST_POINTS, MOST_CLASSES = 2000, 20  # that a picture of features can show


@torch.no_grad()
def penultimate_features(network, image_set, dataset, runtime):
    """What the last layer reads: (N, D) float32, with (N,) true and (N,) predicted classes, on the CPU."""
    features, truth, predicted = [], [], []
    view, seen = evaluation_view(dataset), []
    handle = head_of(network).register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    try:
        for images, targets, mask in data.batches(image_set, EVALUATION_BATCH, runtime.device):
            with runtime.autocast():
                logits = network(view(images))
            read = seen.pop().float()
            if read.dim() == 4:  # a 1×1 convolution as the head, averaged after it
                read = read.mean(dim=(2, 3))
            for part, tensor in ((features, read), (truth, targets), (predicted, logits.argmax(dim=1))):
                part.append(tensor[mask > 0].cpu())
    finally:
        handle.remove()
    return torch.cat(features), torch.cat(truth), torch.cat(predicted)


def draw_features(points, truth, predicted, classes, heading):
    """A map of images, coloured by class, the wrongly predicted ones ringed.

    Args:
        points: (N, 2) positions.
        truth, predicted: (N,) classes.
        classes: names.
    """
    from matplotlib.patheffects import withStroke

    figure = new_figure(6.8)
    axes = figure.subplots()
    for k, name in enumerate(classes):
        chosen = points[truth == k]
        if not len(chosen):
            continue
        marker = MARKERS[k // len(COLOURS) % len(MARKERS)]
        colour = COLOURS[k % len(COLOURS)]
        axes.plot(*chosen.T, marker, color=colour, markersize=4.5, markeredgewidth=0, label=name)
        middle = np.median(chosen, axis=0)
        distances = ((chosen - middle) ** 2).sum(axis=1)
        nearest = chosen[distances.argmin()]  # a point, not the gap between two groups
        halo = [withStroke(linewidth=3, foreground="white")]
        axes.text(*nearest, name, fontsize=11, fontweight="bold", ha="center", va="center", path_effects=halo)
    wrong = points[truth != predicted]
    size, width = (9, 1.1) if len(wrong) <= 100 else (6.5, 0.6)
    axes.plot(
        *wrong.T, "o", markersize=size, markerfacecolor="none", markeredgecolor=BLACK, markeredgewidth=width
    )
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9, markerscale=1.6)
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(
        f"t-SNE: neighbours are alike, positions have no unit        ○ predicted wrongly ({len(wrong):,})",
        fontsize=9,
    )
    title(axes, heading)
    return figure


def features_of(run, data_path=None, save_path=None):
    """The figure of the predictor's penultimate features of up to 2,000 test images in 2-D.

    Raises:
        UserError: too few test images for a map.
    """
    from sklearn.manifold import TSNE

    dataset, runtime, network = _tested(run, data_path, save_path)
    shown = torch.arange(len(dataset.test))
    if dataset.num_classes > MOST_CLASSES:
        shown = shown[dataset.test.targets < MOST_CLASSES]
    shown = shown[:: -(-len(shown) // MOST_POINTS)]
    if len(shown) < 10:
        raise UserError(
            f"{run.args['dataset']} has {len(shown)} test images to show: a map needs at least 10"
        )
    features, truth, predicted = penultimate_features(network, dataset.test.subset(shown), dataset, runtime)
    perplexity = min(30, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features.numpy())
    heading = (
        f"{run.name} ({run.method}): {features.shape[1]} features of {len(features):,} test {run.things}"
    )
    if dataset.num_classes > MOST_CLASSES:
        heading += f", {MOST_CLASSES} of {dataset.num_classes} classes"
    return draw_features(points, truth.numpy(), predicted.numpy(), dataset.classes[:MOST_CLASSES], heading)


# ------------------------------------------------------------------------------------------- augmentation

UNITS = {
    "Rotate": "{:.0f}°",
    "Posterize": "{} bits",
    "Solarize": "from level {}",
    "Color": "factor {:.2f}",
    "Contrast": "factor {:.2f}",
    "Brightness": "factor {:.2f}",
    "Sharpness": "factor {:.2f}",
    "ShearX": "{:.2f} px per px",
    "ShearY": "{:.2f} px per px",
    "TranslateX": "{:.1f} px",
    "TranslateY": "{:.1f} px",
    "Cutout": "half-width {} px",
}
STRONG_VIEWS = 4


def pick(targets, count, seed):
    """Positions of ``count`` images in random order, of as many classes as there are. (N,) → list of int."""
    order = np.random.RandomState(seed).permutation(len(targets))
    drawn = np.asarray(targets)[order]
    by_class = drawn.argsort(kind="stable")
    rank = np.empty(len(drawn), dtype=np.int64)  # 0 for the first image of each class, 1 for the second, …
    rank[by_class] = np.arange(len(drawn)) - np.searchsorted(drawn[by_class], drawn[by_class])
    return order[rank.argsort(kind="stable")][:count].tolist()


def each_operation(image, randaug):
    """One image through every operation, the signed ones with a positive argument.

    image: (3, H, W) uint8 → (15, 3, H, W) uint8, in the order of OPERATIONS.
    """
    count, (_, height, width) = len(OPERATIONS), image.shape
    draws = Draws(
        operation=torch.arange(count)[None],
        negative=torch.zeros(1, count, dtype=torch.bool),
        centre=torch.tensor([height // 2, width // 2]).expand(1, count, 2),
    )
    return randaug.apply(image.expand(count, -1, -1, -1), draws)


def draw_augmentation(images, views, seed, heading):
    """Originals, weak and strong views in rows; below, every operation on the first image.

    Args:
        images: (N, 3, H, W) uint8.
        views: ``ImageViews`` with RandAugment.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = {"original": images, "weak": views.weak(images, generator)}
    for number in range(1, STRONG_VIEWS + 1):
        rows[f"strong {number}"] = views.strong(images, generator)
    arguments = views.randaug.arguments(*images.shape[2:])
    operations = {"original": images[0]}
    for name, image in zip(OPERATIONS, each_operation(images[0], views.randaug), strict=True):
        value = arguments[name]
        operations[f"{name}\n{'no argument' if value is None else UNITS[name].format(value)}"] = image

    cell = (WIDTH - 0.6) / len(images)
    upper, lower = len(rows) * cell + 0.4, 2 * ((WIDTH - 0.2) / 8 + 0.36) + 0.4
    figure = new_figure(upper + lower)
    above, below = figure.subfigures(2, 1, height_ratios=(upper, lower))
    above.suptitle(heading, x=0.01, ha="left", fontsize=10, fontweight="bold")
    below.suptitle(
        f"Each operation alone, magnitude {views.randaug.magnitude:g}",
        x=0.01,
        ha="left",
        fontsize=10,
        fontweight="bold",
    )
    grid = above.subplots(len(rows), len(images), squeeze=False)
    for line, (name, row) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(name, fontsize=9)
        for axes, image in zip(line, row, strict=True):
            _show(axes, image)
    for axes, (name, image) in zip(below.subplots(2, 8).flat, operations.items(), strict=True):
        axes.set_title(name, fontsize=8, pad=3)
        _show(axes, image)
    return figure


def _show(axes, image):
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest" if image.shape[-1] <= 64 else None)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def augmentation_of(name, data_path, *, randaug=(2, 16), seed=0, resize=None, count=8):
    """The figure for images of a data set, without a run."""
    dataset = data.load_dataset(name, data_path, num_labeled=1.0, resize=resize)
    chosen = dataset.labeled.subset(pick(dataset.labeled.targets, count, seed))
    images, _, _ = next(data.batches(chosen, len(chosen), "cpu"))
    views = ImageViews(
        dataset.size, dataset.mean, dataset.std, flip=dataset.flip, crop=dataset.crop, randaug=tuple(randaug)
    )
    moves = ["flip"] * dataset.flip + ["crop"] * (dataset.crop == "pad")
    moves = " and ".join(moves)
    about = f"weak: {moves or 'as it is'}; strong: that, {randaug[0]} operations"
    if dataset.crop == "pad":
        about += f", cutout, {moves} again"
    name = Path(data_path).resolve().name if name == "folder" else name
    return draw_augmentation(images, views, seed, f"{name}, {dataset.size} pixels; {about}")


# ------------------------------------------------------------------------------------ called after training


def finished_run(folder, dataset=None):
    """The pictures that every training run leaves in its folder; returns their paths.

    curves.png, if anything was evaluated in this folder; for two moons regions.png, for images confusion.png.
    ``dataset`` saves reading it again.
    """
    run = read_run(folder)
    paths = [save(draw_curves([run]), run.folder / "curves.png")] if run.records else []
    if run.args["dataset"] == "twomoons":
        paths.append(save(regions_of([run], dataset=dataset), run.folder / "regions.png"))
    else:
        paths.append(save(confusion_of(run, dataset=dataset), run.folder / "confusion.png"))
    return paths


# ------------------------------------------------------------------------------------------- command line


def build_parser():
    parser = argparse.ArgumentParser(
        description="Pictures of finished runs and of the augmentation.", allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name, words, many=False):
        added = commands.add_parser(name, help=words, description=words, allow_abbrev=False)
        if name != "augment":
            added.add_argument(
                "runs", nargs="+" if many else 1, metavar="RUN", help="folder such as results/digits"
            )
        return added

    curves = command("curves", "losses and accuracies over the steps; several runs are compared", many=True)
    regions = command("regions", "two moons: decision regions; several runs side by side", many=True)
    confusion = command("confusion", "which class of the test set is taken for which")
    features = command("features", "penultimate features of the test images in 2-D by t-SNE")
    for added in (regions, confusion, features):
        added.add_argument(
            "--save-path", metavar="DIR", help="folder of the checkpoints (default: as in the run)"
        )
        added.add_argument(
            "--data-path", metavar="DIR", help="folder of the data set (default: as in the run)"
        )

    augment = command("augment", "real images, their weak and strong views, and every operation")
    images = [name for name in data.NAMES if name != "twomoons"]
    augment.add_argument("--dataset", default="digits", choices=images, help="whose training images")
    augment.add_argument("--data-path", default="data", metavar="DIR", help="folder of the data set")
    augment.add_argument(
        "--randaug",
        type=int,
        nargs=2,
        default=[2, 16],
        metavar=("LAYERS", "MAGNITUDE"),
        help="operations per strong view and their strength (default: 2 16)",
    )
    augment.add_argument(
        "--resize", type=int, metavar="PIXELS", help="side of the images (default: as in main.py)"
    )
    augment.add_argument("--seed", type=int, default=0, help="of the images and of their views (default: 0)")
    for added in (curves, regions, confusion, features, augment):
        added.add_argument("--out", metavar="FILE", help="PNG to write (default: in the folder of the run)")
    augment.set_defaults(runs=[])
    return parser


def main(argv):
    args = build_parser().parse_args(argv)
    runs = [read_run(folder) for folder in args.runs]
    if args.command == "augment":
        if min(args.randaug) < 0:
            raise UserError("--randaug takes two numbers that are not negative")
        figure = augmentation_of(
            args.dataset, args.data_path, randaug=args.randaug, seed=args.seed, resize=args.resize
        )
        path = Path("results") / f"augment_{args.dataset}.png"
    elif args.command == "curves":
        figure = draw_curves(runs)
    elif args.command == "regions":
        figure = regions_of(runs, args.data_path, args.save_path)
    else:
        draw = confusion_of if args.command == "confusion" else features_of
        figure = draw(runs[0], args.data_path, args.save_path)
    if runs:  # one run: in its folder; several: beside them
        given = Path(args.runs[0])
        path = (given if len(runs) == 1 else given.parent) / f"{args.command}.png"
    print(save(figure, args.out or path))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        main(sys.argv[1:])
    except UserError as error:
        print(f"visualize.py: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("visualize.py: interrupted", file=sys.stderr)
        sys.exit(130)
