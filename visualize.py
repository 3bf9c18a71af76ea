"""Pictures and tables of finished runs, and pictures of the augmentation.

    python visualize.py curves results/A [results/B …]        losses and accuracies over the steps
    python visualize.py regions results/A [results/B …]       two moons: what each student says where
    python visualize.py confusion results/A [results/B …]     which class is taken for which
    python visualize.py classes results/A [results/B …]       the accuracy of each class
    python visualize.py features results/A                    images as the network sees them, in 2-D
    python visualize.py calibration results/A                 whether probabilities can be trusted
    python visualize.py mistakes results/A                    the images that are most confidently wrong
    python visualize.py report results/A                      all of a run as one HTML page
    python visualize.py augment --dataset digits              real images, their views, every operation
    python visualize.py table results/A results/B …           accuracies over seeds, as a Markdown table

``table`` prints it, the others print the path of what they wrote; ``main.py`` calls
``finished_run`` at the end of training.
Curves, confusion matrices and accuracies of classes need the files in the folder of a run alone; the others
are computed from its checkpoint and its data.
"""

import sys

from run import script

if __name__ == "__main__":
    script.begin("visualize.py")

import itertools
import json
import math
import os
import re
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import data
from augmentation import TABLE, Draws, ImageViews, PointViews
from engine.checkpoint import Checkpoint, file_name
from engine.evaluation import measure_accuracy, predictions
from engine.files import being_replaced
from engine.loader import batches
from engine.runtime import Runtime
from models import head_of
from pictures import report
from pictures.drawing import (
    OVER,
    STUDENT,
    TEACHER,
    draw_augmentation,
    draw_calibration,
    draw_classes,
    draw_confusion,
    draw_curves,
    draw_features,
    draw_mistakes,
    draw_regions,
    method_of,
    names_of,
    picture_path,
    save,
    series,
    things_of,
)
from run.arguments import Parser, between
from run.record import read_confusion, read_run, read_summary
from utils import UserError

# ------------------------------------------------------------------------------------------ reading a run


def located(run, data_path=None, save_path=None):
    """The run, with its data and its checkpoints in these folders where they are given."""
    args = dict(run.args)
    if data_path:
        args["data_path"] = data_path
    if save_path:
        args["save_path"] = save_path
        args.pop("results_path", None)  # the checkpoints are looked for nowhere else
    return run._replace(args=args)


def checkpoint_path(run):
    """The checkpoint that a run selected: the best on the validation images, without them the last."""
    if run.args.get("evaluate"):
        return run.args["resume"]
    places = [run.args["save_path"]]
    if "results_path" in run.args:  # where it lies beside the results, if both were moved
        there = os.path.relpath(run.args["save_path"], run.args["results_path"])
        places.append(os.path.normpath(run.folder.parent / there))
    kind = "finetune_best" if run.args.get("finetune") else "best"
    paths = [os.path.join(place, file_name(run.args["name"], kind)) for place in places]
    return next(filter(os.path.isfile, paths), paths[0])


def stopped_before_its_evaluation(run, path):
    """A sentence where a run has saved, but not its best at ``path``; None else."""
    if isinstance(path, list) or os.path.isfile(path):
        return None
    last = path.replace(file_name("", "best"), file_name("", "last"))
    stopped = f"{run.name} was stopped before its first evaluation: --resume auto continues it"
    return stopped if os.path.isfile(last) else None


def missing_checkpoint(run, path):
    """Why there is nothing to load at the ``checkpoint_path`` of a run; None if there is."""
    if isinstance(path, list):
        return f"{run.folder} is an evaluation of several checkpoints: evaluate and draw each separately"
    if not os.path.isfile(path):
        return (
            stopped_before_its_evaluation(run, path)
            or being_replaced(path)
            or f"there is no checkpoint {path} of {run.name}: start visualize.py in the folder where "
            "the run was started, or give the folder of its checkpoints with --save-path"
        )
    return None


def load(run, dataset=None, only_test=True):
    """What measuring a run takes: {TEACHER: network, STUDENT: network}, ``Dataset``, views and ``Runtime``.

    Methods without a teacher have the student alone. ``dataset`` saves reading it again; ``only_test`` reads
    the test images alone, which needs no labels. UserError for a checkpoint that is not one of the run.
    """
    path = checkpoint_path(run)
    if missing := missing_checkpoint(run, path):
        raise UserError(missing)
    # the run's precision and memory order, on the device that there is
    device = "cuda" if run.args.get("device") != "cpu" and torch.cuda.is_available() else "cpu"
    dtype = run.args.get("amp_dtype", "bf16")
    amp = run.args.get("amp", False) and (device, dtype) != ("cpu", "fp16")
    runtime = Runtime(device, amp, dtype, run.args.get("channels_last", False), alone=True)

    # the data set and the networks
    state = runtime.load(path)
    if not isinstance(state, dict) or "avg_state_dict" not in state:
        raise UserError(f"{path} has no student: give a checkpoint that main.py has written")
    titles = {"teacher": TEACHER, "student": STUDENT}
    roles = [role for role in titles if role == "student" or "teacher_state_dict" in state]
    saved = Checkpoint(state | {"predicting": roles}, path)
    dataset = dataset or read_dataset(run, saved.get("data"), only_test)
    members = saved.members(dataset.num_classes, dataset.size)
    networks = {titles[role]: runtime.place(network).eval() for role, network in members.items()}
    points = dataset.size == 0
    views = PointViews(0, 0) if points else ImageViews(dataset.size, dataset.mean, dataset.std)
    return networks, dataset, views, runtime


def read_dataset(run, record, only_test=True):
    """The data set of a run, in the same parts; ``record``: what its checkpoint knows of it."""
    args = Namespace(**run.args | {"evaluate": only_test})
    indices = run.folder / "labeled_indices.txt"  # earlier versions wrote it and recorded nothing
    if indices.exists() and not only_test:
        args.labeled_indices = str(indices)
    return data.read_data(args, record)


# ------------------------------------------------------------------------------------------------- curves


def curves_of(runs, each=False, over="step"):
    """The figure of one run or several; runs that differ by their seed alone are one line with a band.

    With ``each`` every run is a line. ``over``: a key of ``OVER``.
    """
    without = [run for run in runs if run.records and not series(run, "top1")[0]]
    if len(without) < len(runs):
        for run in without:
            print(f"{run.folder} has no accuracies to draw: it is left out", file=sys.stderr)
        runs = [run for run in runs if run not in without]
    if each or len(runs) == 1:
        return draw_curves(runs, over=over)
    rows = configurations_of(runs, otherwise=", or give --each")
    groups = {name: list(row.values()) for name, row in rows.items()}
    return draw_curves(runs, groups if len(groups) < len(runs) else None, over)


# ------------------------------------------------------------------------------------------------ regions


@torch.no_grad()
def decision_regions(network, extent, resolution):
    """The class that a network of two moons gives to each cell of a grid: (H, W) int64, from the bottom up.

    extent: (left, right, bottom, top). resolution: W.
    """
    left, right, bottom, top = extent
    rows = max(2, round(resolution * (top - bottom) / (right - left)))
    x = left + (np.arange(resolution) + 0.5) * (right - left) / resolution
    y = bottom + (np.arange(rows) + 0.5) * (top - bottom) / rows
    points = torch.from_numpy(np.stack(np.meshgrid(x, y), axis=-1).reshape(-1, 2).astype(np.float32))
    logits = network(points.to(next(network.parameters()).device))
    return logits.argmax(dim=1).view(rows, resolution).cpu().numpy()


def regions_of(runs, dataset=None):
    """The figure of one run (teacher and student) or several (the student of each).

    ``dataset`` saves reading it again.
    """
    for run in runs:
        if run.args["dataset"] not in data.POINTS:
            raise UserError(f"{run.folder} is not a two-moons run: decision regions need points in the plane")
    panels, methods = [], [method_of(run) for run in runs]
    for run in runs:
        networks, moons, views, runtime = load(run, dataset, only_test=False)
        if len(runs) > 1:
            name = method_of(run) if methods.count(method_of(run)) == 1 else run.name
            networks = {name: networks[STUDENT]}
        for name, network in networks.items():
            measured, _ = measure_accuracy(runtime, {"network": network}, moons.test, views)
            heading = f"{name}\ntest accuracy {measured['top1']:.2f} %"
            panels.append((heading, network, moons.labeled))
    points = moons.unlabeled.images.numpy()
    (left, bottom), (right, top) = points.min(axis=0) - 0.25, points.max(axis=0) + 0.25
    extent = (left, right, bottom, top)
    panels = [(heading, decision_regions(net, extent, 500), labeled) for heading, net, labeled in panels]
    return draw_regions(panels, extent, points, moons.classes)


# ---------------------------------------------------------------------------------------------- confusion


def counts_of(runs):
    """The confusion matrices of runs on the test set, from their confusion.json alone.

    Returns:
        [(K, K) int64 counts of each run], K names of classes; UserError if the runs have other classes.
    """
    matrices = []
    for run in runs:
        path = run.folder / "confusion.json"
        if not path.exists():
            chosen = checkpoint_path(run)
            raise UserError(
                stopped_before_its_evaluation(run, chosen)
                or f"there is no {path}: run python main.py --evaluate --resume {chosen} and draw the "
                "folder that it prints"
            )
        counts, classes = read_confusion(path)
        matrices.append(counts)
        if run is runs[0]:
            expected = classes
        elif classes != expected:
            raise UserError(f"{runs[0].folder} and {run.folder} have different classes: draw them separately")
    return matrices, expected


def share_right(counts, run):
    return f"{100 * counts.trace() / counts.sum():.2f} % of {counts.sum():,} test {things_of(run)} right"


def confusion_of(runs):
    """The figure of one matrix, or of several side by side."""
    matrices, classes = counts_of(runs)
    names = [f"{name} ({method_of(run)})" for run, name in zip(runs, names_of(runs), strict=True)]
    break_ = ": " if len(runs) == 1 else "\n"
    panels = [
        (f"{name}{break_}{share_right(counts, run)}", counts)
        for name, run, counts in zip(names, runs, matrices, strict=True)
    ]
    return draw_confusion(panels, classes)


def roles_of(run):
    """The figure of teacher, student and their ensemble, the mean of both networks' probabilities."""
    networks, dataset, views, runtime = load(run)
    if TEACHER not in networks:
        raise UserError(f"the checkpoint of {run.name} has no teacher: draw confusion without --roles")
    outputs, k = report.outputs_of(networks, dataset, views, runtime), dataset.num_classes
    probabilities = outputs.probabilities | {"ensemble of both": outputs.ensemble}
    panels = []
    for name, each in probabilities.items():
        pairs = outputs.targets * k + each.argmax(dim=1)
        counts = pairs.bincount(minlength=k * k).view(k, k).numpy()
        panels.append((f"{run.name}, {name}\n{share_right(counts, run)}", counts))
    return draw_confusion(panels, dataset.classes)


def classes_of(runs):
    """The figure of each class's accuracy in one run or several."""
    matrices, classes = counts_of(runs)
    sizes = np.stack([counts.sum(axis=1) for counts in matrices])
    shown = (sizes > 0).all(axis=0)  # a class without test images has no accuracy
    rows = {}
    for name, run, counts in zip(names_of(runs), runs, matrices, strict=True):
        accuracies = 100 * counts.diagonal()[shown] / counts.sum(axis=1)[shown]
        rows[f"{name} ({method_of(run)}): {share_right(counts, run)}"] = accuracies
    heading = "Accuracy of each class, lowest first"
    if not shown.all():
        heading += f", without {(~shown).sum()} classes that have no test {things_of(runs[0])}"
    return draw_classes(rows, [classes[k] for k in shown.nonzero()[0]], heading)


# ----------------------------------------------------------------------------------------------- features

MOST_POINTS = {"test": 1000, "unlabelled": 800, "labelled": 200}  # that a picture of features can show
MOST_CLASSES = 20
PROJECTIONS = {
    "tsne": "t-SNE: neighbours are alike, positions have no unit",
    "pca": "first two principal components: {:.0f} % and {:.0f} % of the variance",
}


def penultimate_features(network, image_set, views, runtime):
    """Inputs of a network's last layer, (N, D) float32, (N,) true and (N,) predicted classes, on the CPU."""
    read, parts = [], []
    handle = head_of(network).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].float()))
    try:
        for logits, targets, mask in predictions(network, image_set, views, runtime):
            features = read.pop()
            if features.dim() == 4:  # a 1×1 convolution as the head, averaged after it
                features = features.mean(dim=(2, 3))
            parts.append([part[mask > 0].cpu() for part in (features, targets, logits.argmax(dim=1))])
    finally:
        handle.remove()
    return tuple(torch.cat(tensors) for tensors in zip(*parts, strict=True))


def project(features, kind):
    """(N, D) float32 → (N, 2) by ``tsne`` or ``pca``, and a text about the axes."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if kind == "pca":
        pca = PCA(n_components=2, svd_solver="full").fit(features)
        return pca.transform(features), PROJECTIONS[kind].format(*100 * pca.explained_variance_ratio_)
    perplexity = min(30, (len(features) - 1) / 3)
    points = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(features)
    return points, PROJECTIONS[kind]


def features_of(run, projection="tsne"):
    """The figure of the student's penultimate features of labelled, unlabelled and test images in 2-D.

    All are projected together; of many images an even sample. An evaluation has test images alone.
    """
    only_test = bool(run.args.get("evaluate"))
    networks, dataset, views, runtime = load(run, only_test=only_test)
    kinds = {"test": dataset.test, "unlabelled": dataset.unlabeled, "labelled": dataset.labeled}
    found = {}
    for kind, image_set in itertools.islice(kinds.items(), 1 if only_test else 3):
        shown = (image_set.targets < MOST_CLASSES).nonzero()[:, 0]
        shown = shown[np.linspace(0, len(shown) - 1, min(len(shown), MOST_POINTS[kind]), dtype=np.int64)]
        if kind == "test" and len(shown) < 10:
            raise UserError(f"{run.name} has {len(shown)} test images to show: a map needs at least 10")
        if len(shown):
            found[kind] = penultimate_features(networks[STUDENT], image_set.subset(shown), views, runtime)
    features = torch.cat([features for features, _, _ in found.values()])
    points, axis_words = project(features.numpy(), projection)
    sizes = [len(truth) for _, truth, _ in found.values()]
    parts = np.split(points, np.cumsum(sizes)[:-1])
    sets = {kind: (part, found[kind][1].numpy()) for kind, part in zip(found, parts, strict=True)}
    counts = ", ".join(f"{size:,} {kind}" for kind, size in zip(found, sizes, strict=True))
    heading = f"{run.name} ({method_of(run)}): {features.shape[1]} features of {counts} {things_of(run)}"
    if dataset.num_classes > MOST_CLASSES:
        heading += f", {MOST_CLASSES} of {dataset.num_classes} classes"
    return draw_features(sets, found["test"][2].numpy(), dataset.classes[:MOST_CLASSES], heading, axis_words)


# --------------------------------------------------------------------------- calibration, mistakes, report


def calibration_of(run, outputs):
    """The figure of how reliable the probabilities of a run are on the test set."""
    who, prediction = outputs.prediction(run)
    heading = f"{run.name} ({method_of(run)}), {who}, test {things_of(run)}"
    return draw_calibration(report.calibration(prediction, outputs.targets), heading)


def mistakes_of(run, count):
    """The figure of up to ``count`` test images of each kind of ``report.mistakes``."""
    if run.args["dataset"] in data.POINTS:
        raise UserError(f"{run.folder} is a run on points, not images: draw its regions")
    networks, dataset, views, runtime = load(run)
    outputs = report.outputs_of(networks, dataset, views, runtime)
    rows = report.mistakes(outputs, dataset, count, outputs.prediction(run))
    if not any(rows.values()):
        raise UserError(f"{run.name} predicts all test images correctly: there are no mistakes to draw")
    return draw_mistakes(rows, dataset.classes, f"{run.name} ({method_of(run)}): test images worth a look")


def report_of(run):
    """Write the page of a run; returns the path. Without a checkpoint it shows the files of the folder."""
    checkpoint = checkpoint_path(run)
    missing = missing_checkpoint(run, checkpoint)
    figures, outputs, dataset = {}, None, None
    if run.records and not run.args.get("evaluate"):
        figures["curves"] = draw_curves([run])
    if (run.folder / "confusion.json").exists():
        figures["confusion"] = confusion_of([run])
    if not missing:
        networks, dataset, views, runtime = load(run)
        outputs = report.outputs_of(networks, dataset, views, runtime)
        figures["calibration"] = calibration_of(run, outputs)
        if run.args["dataset"] in data.POINTS:
            figures["regions"] = regions_of([run])
    return report.write(run, figures, outputs, dataset, checkpoint, missing)


# ------------------------------------------------------------------------------------------- augmentation

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

    image: (3, H, W) uint8 → (R, 3, H, W) uint8, one for each row of TABLE.
    """
    count, (_, height, width) = len(TABLE), image.shape
    draws = Draws(
        operation=torch.arange(count)[None],
        negative=torch.zeros(1, count, dtype=torch.bool),
        centre=torch.tensor([height // 2, width // 2]).expand(1, count, 2),
    )
    return randaug.apply(image.expand(count, -1, -1, -1), draws)


def augmentation_picture(images, views, seed, heading):
    """The figure of originals, weak and strong views, and of every operation on the first image.

    images: (N, 3, H, W) uint8. views: ``ImageViews`` with RandAugment.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = {"original": images, "weak": views.weak(images, generator)}
    for number in range(1, STRONG_VIEWS + 1):
        rows[f"strong {number}"] = views.strong(images, generator)
    arguments = views.randaug.arguments(*images.shape[2:])
    operations = {"original": images[0]}
    for row, image in zip(TABLE, each_operation(images[0], views.randaug), strict=True):
        operations[f"{row.name}\n{row.unit.format(arguments[row.name])}"] = image
    alone = f"Each operation alone, magnitude {views.randaug.magnitude:g}"
    return draw_augmentation(rows, operations, (heading, alone))


def augmentation_of(name, data_path, randaug=(2, 16), seed=0, resize=None, skip_unreadable=False, count=8):
    """The figure of images of a data set, without a run."""
    dataset = data.load_dataset(
        name, data_path, num_labeled=1.0, resize=resize, skip_unreadable=skip_unreadable
    )
    chosen = dataset.labeled.subset(pick(dataset.labeled.targets, count, seed))
    images, _, _ = next(batches(chosen, len(chosen), "cpu"))
    options = {"flip": dataset.flip, "crop": dataset.crop, "randaug": tuple(randaug)}
    views = ImageViews(dataset.size, dataset.mean, dataset.std, **options)
    moves = []
    if dataset.flip:
        moves.append("flip")
    if dataset.crop == "pad":
        moves.append("crop")
    moves = " and ".join(moves) or "as it is"
    about = f"weak: {moves}; strong: that, {randaug[0]} operations"
    if dataset.crop == "pad":
        about += f", cutout, {moves} again"
    name = Path(data_path).resolve().name if name == "folder" else name
    return augmentation_picture(images, views, seed, f"{name}, {dataset.size} pixels; {about}")


# ------------------------------------------------------------------------------------------------- tables

COLUMNS = ("top-1 (%)", "chosen by validation (%)", "finetuned (%)")
# arguments in which the runs of one row may differ, beside main.py's quiet flags
APART = {"seed", "save_path", "results_path", "run", "versions", "command", "continued"}


def accuracies_of(summary):
    """{column: percent} of a run, for the ``COLUMNS`` that it has."""
    chosen = summary["best_top1"] if summary["selection"] == "val" else None
    values = (summary["top1"], chosen, summary["finetune_top1"])
    return {name: value for name, value in zip(COLUMNS, values, strict=True) if value is not None}


def without_seed(name, seed):
    """The name of a run or of its checkpoint without its seed: mpl-3, mpl_seed3 and mpl.3_last.pth.tar."""
    return re.sub(rf"^(.*)[-_.](?:s|seed)?{seed}(?=[_.]|$)", r"\1", name)


def configuration(run, seed):
    """The arguments that the runs of one row have in common, as a text to compare.

    Of a path only the last part counts, without the seed: runs with a teacher for each seed are one row.
    """
    from main import build_parser as build_main_parser  # here: main.py asks this file for its pictures

    flags = build_main_parser().flags
    # an evaluation of a run is another row than the run
    quiet = {name for name, action in flags.items() if action.quiet} - {"evaluate", "finetune"}
    kept = {name: value for name, value in run.args.items() if name not in APART | quiet}
    for name in [name for name in kept if name in flags and flags[name].path]:
        kept[name] = kept[name] and without_seed(os.path.basename(kept[name]), seed)
    return json.dumps(kept, sort_keys=True)


def configurations_of(runs, otherwise=""):
    """{name: {seed: run}}, a row for all runs whose arguments differ by their seed alone.

    UserError for two runs of a row with the same seed; ``otherwise``: what else can be done then.
    """
    found, rows = {}, {}
    for run in runs:
        seed = run.args.get("seed")
        other = found.setdefault(configuration(run, seed), {}).setdefault(seed, run)
        if other is not run:
            raise UserError(
                f"{other.folder} and {run.folder} have the same arguments and seed: leave out one of the "
                f"two{otherwise}"
            )
    for row in found.values():
        seed, run = next(iter(row.items()))
        name = without_seed(run.name, seed)
        rows[name if name not in rows else os.path.relpath(run.folder)] = row  # another one has the name
    return rows


def rows_of(runs):
    """{name: {seed: accuracies}} of each configuration."""
    found = {run.folder: accuracies_of(read_summary(run)) for run in runs}
    rows = configurations_of(runs)
    return {name: {seed: found[run.folder] for seed, run in row.items()} for name, row in rows.items()}


def table_of(runs, baseline=None):
    """A Markdown table with a row for each configuration: runs whose arguments differ by the seed alone.

    The mean and standard deviation of each accuracy over the seeds; with a ``baseline``, the name of a row,
    also the mean and standard error of the difference to it, over the seeds that both rows have.
    """
    rows = rows_of(runs)
    if baseline and baseline not in rows:
        raise UserError(f"there is no row {baseline}: give --baseline one of {', '.join(rows)}")
    measured = {name for row in rows.values() for accuracies in row.values() for name in accuracies}
    columns = [name for name in COLUMNS if name in measured]
    head = ["run", "seeds"]
    for column in columns:
        head.append(f"{column}, mean ± s.d.")
        if baseline:
            head.append(f"minus {baseline}, mean ± s.e.")
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        line = [name, str(len(row))]
        for column in columns:
            values = {seed: accuracies[column] for seed, accuracies in row.items() if column in accuracies}
            line.append(mean_and_spread(list(values.values()), len(row)))
            if baseline:
                others = {} if name == baseline else rows[baseline]
                shared = [seed for seed in values if column in others.get(seed, {})]
                differences = [values[seed] - others[seed][column] for seed in shared]
                line.append(mean_and_spread(differences, len(row), difference=True))
        lines.append(line)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def mean_and_spread(values, seeds, difference=False):
    """A cell: the mean ± the standard deviation of values, or of differences ± the standard error of their
    mean; behind it how many values there are, if fewer than the row's ``seeds``."""
    if not values:
        return "–"
    words = f"{np.mean(values):+.2f}" if difference else f"{np.mean(values):.2f}"
    if len(values) > 1:
        spread = np.std(values, ddof=1)
        if difference:
            spread /= math.sqrt(len(values))
        words += f" ± {spread:.2f}"
    if len(values) < seeds:
        words += f" ({len(values)} of {seeds})"
    return words


# -------------------------------------------------------------------------------- the end of a training run


def finished_run(folder, dataset=None):
    """The pictures that every training run leaves in its folder; returns their paths.

    curves.png, if anything was evaluated in this folder; for two moons regions.png, for images confusion.png.
    ``dataset`` saves reading it again.
    """
    run = read_run(folder)
    paths = [save(draw_curves([run]), run.folder / "curves.png")] if run.records else []
    if run.args["dataset"] in data.POINTS:
        return [*paths, save(regions_of([run], dataset=dataset), run.folder / "regions.png")]
    return [*paths, save(confusion_of([run]), run.folder / "confusion.png")]


# ----------------------------------------------------------------------------------------- the command line


def saved(figure, name, args):
    """Write the picture of a command to --out, else as NAME.png: in the folder of its run, or beside the
    folders of several runs. Returns the path."""
    folder = Path(args.runs[0])
    if len(args.runs) > 1:
        folder = folder.parent
    return save(figure, args.out or folder / f"{name}.png")


def confusion_command(runs, args):
    if not args.roles:
        if args.data_path or args.save_path:
            raise UserError("--data-path and --save-path have an effect only with --roles: leave them out")
        return saved(confusion_of(runs), "confusion", args)
    if len(runs) > 1:
        raise UserError("--roles compares the networks of one run: give one folder")
    return saved(roles_of(runs[0]), "confusion_roles", args)


def calibration_command(runs, args):
    (run,) = runs
    outputs = report.outputs_of(*load(run))
    return saved(calibration_of(run, outputs), "calibration", args)


def augment_command(runs, args):
    options = (args.randaug, args.seed, args.resize, args.skip_unreadable)
    figure = augmentation_of(args.dataset, args.data_path, *options)
    return save(figure, args.out or f"results/augment_{args.dataset}.png")


class Command(NamedTuple):
    """What follows ``python visualize.py``."""

    function: Callable  # (runs, args) → what is printed: the path of a picture or of a page, or a table
    help: str
    arguments: list  # each as ``argument`` returns it


def argument(*names, **options):
    """What ``add_argument`` takes."""
    return names, options


# fmt: off
RUN = argument("runs", nargs=1, metavar="RUN", help="folder such as results/digits")
RUNS = argument("runs", nargs="+", metavar="RUN", help="folder such as results/digits")
PICTURE = {"type": picture_path, "metavar": "FILE"}
OUT = argument("--out", **PICTURE, help="PNG or SVG to write (default: a PNG in the folder of the run)")
CHECKPOINTS = argument("--save-path", metavar="DIR", help="folder of the checkpoints (default: as in the run)")
DATA = argument("--data-path", metavar="DIR", help="folder of the data set (default: as in the run)")
IMAGE_SETS = [name for name in data.NAMES if name not in data.POINTS]

COMMANDS = {
    "curves": Command(
        lambda runs, args: saved(curves_of(runs, args.each, args.over), "curves", args),
        "losses and accuracies over the steps; several runs are compared, as means over their seeds",
        [RUNS, OUT, argument("--each", action="store_true", help="draw a line for each run, even if runs differ by the seed alone"), argument("--over", default="step", choices=OVER, help="horizontal axis: training steps, or the operations of all steps so far")],
    ),
    "regions": Command(
        lambda runs, args: saved(regions_of(runs), "regions", args),
        "decision regions of a run on two moons (--dataset twomoons); several runs side by side",
        [RUNS, OUT, CHECKPOINTS, DATA],
    ),
    "confusion": Command(
        confusion_command,
        "confusion matrix of the test set; several runs side by side",
        [RUNS, OUT, argument("--roles", action="store_true", help="draw teacher, student and ensemble of one run, from its checkpoint"), CHECKPOINTS, DATA],
    ),
    "classes": Command(
        lambda runs, args: saved(classes_of(runs), "classes", args),
        "accuracy of each class, sorted; several runs side by side",
        [RUNS, OUT],
    ),
    "features": Command(
        lambda runs, args: saved(features_of(*runs, args.projection), "features", args),
        "outputs of the layer before the classifier, for labelled, unlabelled and test images, in 2-D",
        [RUN, OUT, argument("--projection", default="tsne", choices=PROJECTIONS, help="method that turns features into points"), CHECKPOINTS, DATA],
    ),
    "calibration": Command(
        calibration_command,
        "accuracy over probability, and the expected calibration error",
        [RUN, OUT, CHECKPOINTS, DATA],
    ),
    "mistakes": Command(
        lambda runs, args: saved(mistakes_of(*runs, args.count), "mistakes", args),
        "test images that are most confidently wrong, or on which teacher and student disagree",
        [RUN, OUT, argument("--count", type=between(int, 1), default=6, metavar="N", help="number of images of each kind of mistake"), CHECKPOINTS, DATA],
    ),
    "report": Command(
        lambda runs, args: os.path.relpath(report_of(*runs)),
        "report.html in the folder of the run: everything on one page, to read and to send",
        [RUN, CHECKPOINTS, DATA],
    ),
    "table": Command(
        lambda runs, args: table_of(runs, args.baseline),
        "accuracies of runs as a Markdown table; runs that differ by the seed alone are one row",
        [
            argument("runs", nargs="+", metavar="RUN", help="folder such as results/digits; all runs: results/*/"),
            argument("--baseline", metavar="ROW", help="also print the differences to this row, between runs of the same seed"),
        ],
    ),
    "augment": Command(
        augment_command,
        "real images, their weak and strong views, and every operation",
        [
            argument("--dataset", default="digits", choices=IMAGE_SETS, help="data set whose training images are shown"),
            argument("--data-path", default="data", metavar="DIR", help="folder of the data set"),
            argument("--randaug", type=between(int, 0), nargs=2, default=[2, 16], metavar=("LAYERS", "MAGNITUDE"), help="operations per strong view, and their strength (default: 2 16)"),
            argument("--resize", type=int, metavar="PIXELS", help="side of the images in pixels (default: as in main.py)"),
            argument("--seed", type=int, default=0, help="seed that chooses the images and their views"),
            argument("--skip-unreadable", action="store_true", help="folder: leave out files that cannot be read"),
            argument("--out", **PICTURE, help="PNG or SVG to write (default: results/augment_DATASET.png)"),
        ],
    ),
}
# fmt: on


def build_parser():
    parser = Parser(description="Pictures and tables of finished runs, and pictures of the augmentation.")
    parser.set_defaults(runs=[])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        for names, options in command.arguments:
            subparser.add_argument(*names, **options)
    return parser


def main(argv):
    args = build_parser().parse_args(argv)
    places = {name: getattr(args, name, None) for name in ("data_path", "save_path")}
    runs = [located(read_run(folder), **places) for folder in args.runs]
    print(COMMANDS[args.command].function(runs, args))


def run(argv):
    """``main``, with errors as one sentence; returns the exit status."""
    return script.run("visualize.py", main, argv)


if __name__ == "__main__":
    script.execute(run, sys.argv[1:])
