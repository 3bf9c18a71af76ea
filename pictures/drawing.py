"""How a picture looks: one canvas and style, and a function for each kind of picture.

Each ``draw_…`` takes the values that it shows and returns a figure, which ``save`` writes. ``visualize.py``
reads files and runs networks to get the values.
"""

import functools
import io
import itertools
import math
import os
import re
import sys
import textwrap
import unicodedata
from pathlib import Path

import numpy as np

from data import POINTS
from engine.files import write_atomically, writing
from utils import UserError

WIDTH = 9.0  # inches: the width of a README at 100 pixels per inch
PIXELS_PER_INCH = 150
SIZES = {"font.size": 9, "axes.labelsize": 10, "axes.titlesize": 10, "figure.titlesize": 10}  # points
TITLE = {"loc": "left", "fontweight": "bold"}  # of axes
HEADING = {"x": 0.01, "ha": "left", "fontweight": "bold"}  # of a figure or of a part of it

# Okabe and Ito's colours, which people with any colour vision can tell apart
BLUE, VERMILION, GREEN, ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"
PURPLE, SKY, BLACK, GREY, DARK = "#CC79A7", "#56B4E9", "#000000", "#8C8C8C", "#4D4D4D"
COLOURS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK)
PALE = ("#CFE4F2", "#F7DAC8", "#CDEBE1", "#FAE9C6")  # the same colours behind points
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")

TEACHER, STUDENT = "teacher", "student (EMA)"
METHOD_NAMES = {
    "uda": "UDA",
    "fixmatch": "FixMatch",
    "pseudo-label": "pseudo labels",
    "mpl": "Meta Pseudo Labels",
    "reduced-mpl": "Reduced MPL",
    "semimeta": "Semi-Meta",
}


# -------------------------------------------------------------------------------------------------- words


def method_of(run):
    """The name of a run's method in pictures."""
    return METHOD_NAMES.get(run.args["method"], run.args["method"])


def things_of(run):
    """The word for the examples of a run's data set: points or images."""
    return "points" if run.args["dataset"] in POINTS else "images"


def names_of(runs):
    """A name for each run; if names repeat, with the folder above."""
    names = [run.name for run in runs]
    unique = len(set(names)) == len(names)
    return names if unique else [f"{run.folder.parent.name}/{run.name}" for run in runs]


def is_ensemble(run):
    """Whether the accuracies of a run belong to the ensemble of teacher and student."""
    return any("ensemble_top1" in record for record in run.records)


# ------------------------------------------------------------------------------------------ letters and fonts

# fonts with a box instead of letters, and fonts of coloured bitmaps, which matplotlib cannot draw
WITHOUT_LETTERS = re.compile(r"last ?resort|adobe blank|color emoji", re.IGNORECASE)


@functools.cache
def letters_of(path):
    """The characters that the font in a file has."""
    from matplotlib.ft2font import FT2Font

    return frozenset(map(chr, FT2Font(path).get_charmap()))


def missing_letters(text):
    """The characters of a text that no installed font has. Fonts with its other letters are added to
    matplotlib.

    matplotlib takes a letter from the first font in its list ``font.family`` that has the letter. If letters
    are missing, the installed font with most of them is added to the list.
    """
    import matplotlib
    from matplotlib.font_manager import FontProperties, findfont, fontManager

    missing = {letter for letter in text if unicodedata.category(letter) not in ("Cc", "Cf", "Zs")}
    for family in matplotlib.rcParams["font.family"]:
        fonts = [findfont(FontProperties(family=[family], weight=weight)) for weight in ("normal", "bold")]
        missing -= letters_of(fonts[0]) & letters_of(fonts[1])
    found = {}
    for font in fontManager.ttflist if missing else ():
        if font.style == "normal" and not WITHOUT_LETTERS.search(font.name) and os.path.isfile(font.fname):
            # letters that all weights of the font have, since titles are bold
            found[font.name] = found.get(font.name, missing) & letters_of(font.fname)
    while any(found.values()):
        best = max(found, key=lambda name: len(found[name]))
        matplotlib.rcParams["font.family"] = [*matplotlib.rcParams["font.family"], best]
        missing -= found[best]
        found = {name: letters & missing for name, letters in found.items()}
    return missing


def legible(text):
    """The text, with U+72AC for a character that no installed font has; $ does not begin a formula."""
    missing = missing_letters(text)
    letters = (f"U+{ord(letter):04X}" if letter in missing else letter for letter in text)
    return "".join(letters).replace("$", r"\$")


def class_names(classes):
    """Names of classes, shortened to 16 letters' width. A name that no installed font can write becomes
    "class 3", with a message on standard error."""
    missing = missing_letters("".join(map(str, classes)))
    lost = {k: name for k, name in enumerate(map(str, classes)) if missing & set(name)}
    if lost:
        listed = [f"{name} is class {k}" for k, name in itertools.islice(lost.items(), 10)]
        if len(lost) > 10:
            listed.append("…")
        print(
            f"no installed font can write {len(lost)} of {len(classes)} class names; the picture has "
            f"numbers instead: {', '.join(listed)}. Install a font such as Noto Sans, which has most scripts",
            file=sys.stderr,
        )
    return [f"class {k}" if k in lost else legible(shortened(str(name))) for k, name in enumerate(classes)]


def shortened(name, width=16):
    """The name, cut to the width of ``width`` letters with "…" at the end."""
    if width_of(name) <= width:
        return name
    kept = itertools.takewhile(lambda n: width_of(name[:n]) < width, range(1, len(name)))
    return f"{name[: max(kept)]}…"


def width_of(name):
    """Width in letters; a Chinese, Japanese or Korean letter counts as two."""
    wide = [letter for letter in name if unicodedata.east_asian_width(letter) in ("W", "F")]
    return len(name) + len(wide)


# --------------------------------------------------------------------------------------------- the canvas


def legend_below(figure, lines, entries, **look):
    """A legend under all axes, in two columns if the figure is wide enough."""
    entries = [shortened(entry, 100) for entry in entries]
    for columns in (2, 1):
        legend = figure.legend(lines, entries, loc="outside lower left", ncols=columns, **look)
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()


def new_figure(height, heading=None):
    """An empty figure of README width with a heading, made without pyplot, which would look for a window
    system."""
    import matplotlib.figure  # the import takes half a second: only if something is drawn

    matplotlib.rcParams.update(SIZES | {"legend.frameon": False})
    options = {"dpi": PIXELS_PER_INCH, "layout": "constrained", "facecolor": "white"}
    figure = matplotlib.figure.Figure(figsize=(WIDTH, height), **options)
    if heading is not None:
        figure.suptitle(legible(heading), **HEADING)
    return figure


def grid(figure, count, columns, **shared):
    """A list of ``count`` axes, in rows of ``columns``; the last row may be shorter."""
    cells = figure.subplots(math.ceil(count / columns), columns, squeeze=False, **shared).ravel().tolist()
    for axes in cells[count:]:
        axes.remove()
    return cells[:count]


def bare(axes, *sides):
    """Axes without lines at the top, on the right and at these sides, over a pale grid."""
    axes.spines[["top", "right", *sides]].set_visible(False)
    axes.grid(True, color="#E6E6E6", linewidth=0.7)
    axes.set_axisbelow(True)


def lay_out(figure):
    """Place all parts of a figure once and for all; otherwise matplotlib would draw it a second time."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine(None)


def encoded(figure, kind):
    """The bytes of a figure as "png" or "svg"."""
    lay_out(figure)
    file = io.BytesIO()
    # without a date, two SVGs of one figure are equal
    figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
    return file.getvalue()


def save(figure, path):
    """Write the figure as PNG or SVG, depending on the suffix, whole or not at all; returns the path.

    Letters in an SVG are outlines, so that it looks the same with other installed fonts.
    """
    path = Path(path)
    kind = picture_path(path).suffix[1:]
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    content = encoded(figure, kind)
    write_atomically(path, lambda file: file.write(content))
    return str(path)


def picture_path(text):
    """The path of a picture to write; UserError if it does not end in .png or .svg."""
    path = Path(text)
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"a picture is a PNG or an SVG, but {path} does not end in .png or .svg")
    return path


# ------------------------------------------------------------------------------------------------- curves

LINE_NAMES = {  # in the picture of one run
    "labeled_loss": "labelled",
    "uda_loss": "UDA",
    "student_loss": "pseudo labels",
    "test_loss": "test",
    "finetune_loss": "finetuning",
    "top1": "test",
    "student_top1": "test, student",
    "teacher_top1": "test, teacher",
    "top5": "test, top-5",
    "val_top1": "validation",
    "finetune_top1": "finetuned",
    "finetune_val_top1": "finetuned, val.",
    "pseudo_label_accuracy": "correct",
    "uda_mask": "above threshold",
}
ENSEMBLE_NAMES = {  # where teacher and student predict together
    "test_loss": "test, ensemble",
    "top1": "test, ensemble",
    "top5": "test, top-5, ensemble",
    "val_top1": "validation, ensemble",
    "finetune_top1": "finetuned student",
    "finetune_val_top1": "finetuned student, val.",
}
PANEL_TITLES = {  # in the picture of several runs, a panel for each figure
    "top1": "Test accuracy (top-1, %)",
    "val_top1": "Validation accuracy (top-1, %)",
    "test_loss": "Test loss (nats)",
    "labeled_loss": "Labelled loss in training (nats)",
    "student_loss": "Student's loss on pseudo labels (nats)",
    "pseudo_label_accuracy": "Correct pseudo labels (%)",
    "feedback": "Feedback to the teacher (nats)",
}
ACCURACIES = "top1 student_top1 teacher_top1 top5 val_top1 finetune_top1 finetune_val_top1".split()
SHARES = ("pseudo_label_accuracy", "uda_mask")  # logged as 0…1, shown in per cent
# the place of the texts of ``label_ends``: to the right of the axes
BESIDE = {"xycoords": "axes fraction", "xytext": (5, 0), "textcoords": "offset points", "va": "center"}


def series(run, key):
    """Steps and values of one figure over a run, as two lists; shares in per cent."""
    points = [(record["step"], record[key]) for record in run.records if record.get(key) is not None]
    factor = 100 if key in SHARES else 1
    return [step for step, _ in points], [factor * value for _, value in points]


def mean_series(runs, key):
    """Steps, means and standard deviations of one figure over runs, as arrays, at the common steps of all
    runs.

    The standard deviation (n − 1) of a single run is NaN.
    """
    values = [dict(zip(*series(run, key), strict=True)) for run in runs]
    steps = sorted(set.intersection(*map(set, values)))
    table = np.array([[each[step] for step in steps] for each in values])
    deviation = table.std(axis=0, ddof=1) if len(runs) > 1 else np.full(len(steps), np.nan)
    return np.array(steps), table.mean(axis=0), deviation


def draw_curves(runs, groups=None, over="step"):
    """Curves of one run: losses, accuracies, pseudo labels and feedback. Of several runs: one panel per
    figure.

    groups: {name: runs}; each group is one line, the mean of its runs, with a band of ± one standard
        deviation. Without groups each run is a line.
    over: key of the horizontal axis, "step" or "pflop".
    """
    for run in runs:
        if not run.records:
            raise UserError(f"{run.folder} has no metrics yet: the first ones come after --eval-step steps")
    groups = groups or {name: [run] for name, run in zip(names_of(runs), runs, strict=True)}
    if over != "step":  # finetuning has no such records
        for name, each in groups.items():
            groups[name] = [run._replace(records=_placed(run.records, over)) for run in each]
            if not all(run.records for run in groups[name]):
                raise UserError(f"{name} was trained without counting its {over}: draw it over the steps")
    if len(runs) == 1:
        (runs,) = groups.values()
        figure = _draw_run(*runs)
    else:
        figure = _draw_comparison(groups)
    if over != "step":
        for axes in figure.axes:
            axes.set_xlabel(OVER[over])
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.get_major_locator().set_params(integer=False)
    return figure


OVER = {"step": "training step", "pflop": "cost of training in PFLOP (10¹⁵ operations)"}


def _placed(records, over):
    """The records that have this figure, with it in the place of their step."""
    return [record | {"step": record[over]} for record in records if over in record]


def _draw_run(run):
    panels = _panels_of(run)
    heading = f"{run.name}: {method_of(run)} on {run.args['dataset']}"
    figure = new_figure(0.5 + 2.7 * math.ceil(len(panels) / 2), heading)
    first, last = run.records[0]["step"], run.records[-1]["step"]
    if first == last:
        last += 1
    margin = 0.03 * (last - first)
    ends = {}
    for axes, (heading, (unit, keys)) in zip(grid(figure, len(panels), 2), panels.items(), strict=True):
        names = {}
        for key, colour in zip(keys, itertools.cycle(COLOURS), strict=False):
            line = _draw_line(axes, key, *series(run, key), colour)
            names[key] = _line_name(run, key)
            if key in ACCURACIES:
                names[key] += f" {line.get_ydata()[-1]:.2f} %"
        _finish_axes(axes, keys)
        axes.set_title(heading, **TITLE)
        axes.set(ylabel=unit, xlim=(first - margin, last + margin))
        if "feedback" not in keys:
            ends[axes] = names
        elif series(run, "feedback_std")[0] == series(run, "feedback")[0]:
            (steps, std), mean = series(run, "feedback_std"), line.get_ydata()
            axes.fill_between(steps, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
    label_ends(figure, ends)
    return figure


def _panels_of(run):
    """The logged figures of a run by panel: {title: (label of the vertical axis, keys)}."""
    keys = [key for key in dict.fromkeys(itertools.chain(*run.records)) if series(run, key)[0]]
    accuracies = [key for key in ACCURACIES if key in keys]
    if "top5" in keys and min(series(run, "top5")[1]) == 100:  # as with five classes or fewer
        accuracies.remove("top5")
    who = "ensemble and of its networks" if is_ensemble(run) else STUDENT
    panels = {
        "Losses": ("cross-entropy (nats)", [key for key in keys if key.endswith("_loss")]),
        f"Accuracy of the {who}": ("accuracy (%)", accuracies),
        "Pseudo labels": (f"unlabelled {things_of(run)} (%)", [key for key in SHARES if key in keys]),
        "Feedback to the teacher, mean ± s.d.": ("feedback (nats)", [k for k in keys if k == "feedback"]),
    }
    return {heading: (unit, shown) for heading, (unit, shown) in panels.items() if shown}


def _line_name(run, key):
    if key == "uda_mask" and run.args.get("confidence") == "soft":
        return "mean weight"
    if is_ensemble(run) and key in ENSEMBLE_NAMES:
        return ENSEMBLE_NAMES[key]
    return LINE_NAMES.get(key, key.removesuffix("_top1").replace("_", " "))


def _draw_comparison(groups):
    """One line for each group: {name: runs}."""
    keys = [key for key in PANEL_TITLES if any(len(mean_series(runs, key)[0]) for runs in groups.values())]
    if not keys:
        raise UserError("these runs have no logged steps in common: draw the curves of each run by itself")
    figure = new_figure(0.6 + 2.6 * math.ceil(len(keys) / 2) + 0.12 * len(groups))
    entries = {legible(f"{name}  ({_about(runs)})"): runs for name, runs in groups.items()}
    lines = {}
    for axes, key in zip(grid(figure, len(keys), 2), keys, strict=True):
        for number, (entry, runs) in enumerate(entries.items()):
            steps, mean, deviation = mean_series(runs, key)
            if len(steps):
                colour, style = COLOURS[number % len(COLOURS)], "-" if number < len(COLOURS) else "--"
                lines.setdefault(entry, _draw_line(axes, key, steps, mean, colour, style))
                if len(runs) > 1:
                    low, high = mean - deviation, mean + deviation
                    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
        _finish_axes(axes, [key])
        axes.set_title(PANEL_TITLES[key], **TITLE)
    words = None
    if any(len(runs) > 1 for runs in groups.values()):
        words = "lines: means over the seeds; bands: ± one standard deviation"
    legend_below(figure, lines.values(), lines.keys(), title=words, alignment="left")
    return figure


def _about(runs):
    """Words about the runs of one line: method, number of seeds, last accuracy."""
    words = [method_of(runs[0])]
    if is_ensemble(runs[0]):
        words.append("ensemble")
    if len(runs) > 1:
        words.append(f"{len(runs)} seeds")
    _, mean, deviation = mean_series(runs, "top1")
    if len(mean):
        spread = f" ± {deviation[-1]:.2f}" if len(runs) > 1 else ""
        words.append(f"top-1 {mean[-1]:.2f}{spread} %")
    return ", ".join(words)


def _draw_line(axes, key, steps, values, colour, style="-"):
    few = len(steps) <= 30 and not key.startswith("finetune")  # then each evaluation is a dot
    options = {"marker": "o" if few or len(steps) == 1 else None, "markersize": 3, "linewidth": 1.6}
    return axes.plot(steps, values, style, color=colour, label=key, **options)[0]


def _finish_axes(axes, keys):
    """Frame, ticks and scales of axes, from the values that were drawn for these keys."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    # frame, and steps
    bare(axes)
    axes.set_xlabel(OVER["step"])
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))

    # values
    values = np.concatenate([line.get_ydata() for line in axes.get_lines()])
    if all(key.endswith("_loss") for key in keys) and values.min() > 0 and values.max() > 20 * values.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.ticklabel_format(axis="y", useOffset=False)
    if any(key in (*SHARES, *ACCURACIES) for key in keys) and np.ptp(values) < 1:
        middle = (values.min() + values.max()) / 2  # the axis spans more than 1 %, so that noise looks small
        axes.set_ylim(middle - 0.6, middle + 0.6)
    if "feedback" in keys:
        axes.axhline(0, color=GREY, linewidth=0.8, zorder=1)


def label_ends(figure, ends):
    """Write a text to the right of each line's end, without overlaps. Call it last: it fixes the layout of
    the figure.

    ends: {axes: {label of a line: text}}.
    """
    texts = {}
    for axes, labels in ends.items():
        for line in axes.get_lines():
            if line.get_label() in labels:
                text = axes.annotate(labels[line.get_label()], (1, 0.5), color=line.get_color(), **BESIDE)
                text.set(fontsize=8.5, annotation_clip=False)
                texts.setdefault(axes, []).append((line, text))

    lay_out(figure)  # with room for the texts; positions in pixels are now known
    for axes, written in texts.items():
        heights = np.array([axes.transData.transform(line.get_xydata()[-1])[1] for line, _ in written])
        order = heights.argsort(kind="stable")
        apart = moved_apart(heights[order], 10 / 72 * figure.dpi, axes.bbox.y1)
        for number, height in zip(order, apart, strict=True):
            written[number][1].xy = (1, (height - axes.bbox.y0) / axes.bbox.height)


def moved_apart(heights, gap, top):
    """Ascending heights, moved to be at least ``gap`` apart and, as far as possible, at most ``top``."""
    heights = list(heights)
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    if heights and heights[-1] > top:  # push the heights down again
        heights[-1] = top
        for i in range(len(heights) - 2, -1, -1):
            heights[i] = min(heights[i], heights[i + 1] - gap)
    return heights


# ------------------------------------------------------------------------------------------------ regions


def draw_regions(panels, extent, points, classes):
    """Decision regions side by side, with the training points.

    panels: list of (title, (H, W) int64 regions from the bottom up, labelled ImageSet). extent: (left, right,
    bottom, top) of the regions. points: (N, 2), the unlabelled points. classes: names.
    """
    from matplotlib.colors import ListedColormap

    (left, right, bottom, top), columns = extent, min(3, len(panels))
    height = 0.95 + (WIDTH / columns - 0.5) * (top - bottom) / (right - left)
    figure = new_figure(0.45 + math.ceil(len(panels) / columns) * height)
    cells = grid(figure, len(panels), columns, sharex=True, sharey=True)
    colours = {"cmap": ListedColormap(PALE), "vmin": 0, "vmax": len(PALE) - 1, "interpolation": "nearest"}
    for axes, (heading, regions, labeled) in zip(cells, panels, strict=True):
        axes.imshow(regions, origin="lower", extent=extent, **colours)
        words = f"{len(points):,} unlabelled points"
        axes.plot(*points.T, "o", color=DARK, markersize=1.8, alpha=0.5, markeredgewidth=0, label=words)
        for k, name in enumerate(classes):
            chosen = labeled.images[labeled.targets == k].numpy()
            look = {"color": COLOURS[k], "markersize": 9, "markeredgecolor": BLACK}
            axes.plot(*chosen.T, MARKERS[k], label=f"labelled, {name}", **look)
        axes.set(title=legible(heading), xlabel="x₁", aspect="equal")
    for axes in cells[::columns]:
        axes.set_ylabel("x₂")

    (unlabelled, *labelled), names = axes.get_legend_handles_labels()
    names = [*names[1:], names[0]]
    legend = figure.legend([*labelled, unlabelled], names, loc="outside lower center", ncols=len(names))
    legend.legend_handles[-1].set(markersize=3, alpha=1)  # larger, to be visible
    return figure


# ---------------------------------------------------------------------------------------------- confusion


ROOM_FOR_COUNTS = 22  # points: size of a cell with room for two lines


def draw_confusion(panels, classes):
    """Matrices side by side: each row in per cent of its class, with counts below if there is room.

    panels: list of (title, (K, K) int64 counts, row = true class). classes: K names.
    """
    from matplotlib.colors import PowerNorm

    k, names = len(classes), class_names(classes)
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(7.3 if columns == 1 else rows * (7.2 / columns + 1.2))
    cells = grid(figure, len(panels), columns, sharex=True, sharey=True)
    room = 72 * (6.3 if columns == 1 else 7 / columns) / k  # of a class, in points
    for axes, (heading, counts) in zip(cells, panels, strict=True):
        lines = (textwrap.fill(line, 96 // columns) for line in legible(heading).split("\n"))
        axes.set_title("\n".join(lines), fontsize={1: 10, 2: 9, 3: 8}[columns], **TITLE)
        percent = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
        # the square root as colour scale: a few wrong images can be seen
        shown = axes.imshow(percent, cmap="Blues", norm=PowerNorm(0.5, vmin=0, vmax=100))
        if room >= 14:
            _write_numbers(axes, percent, counts, room)
    shrink = 0.8 if columns == 1 else 0.7 / rows
    bar = figure.colorbar(shown, ax=cells, shrink=shrink, pad=0.02, ticks=[0, 1, 5, 10, 25, 50, 75, 100])
    words = "share of the true class (%)"
    if room >= ROOM_FOR_COUNTS:
        words += "; below it their number"
    bar.set_label(words, fontsize=9)

    # names for as many classes as there is room, slanted if they would overlap
    every = max(1, round(18 / room))
    names, size, slant = names[::every], 9 if room > 20 else 7, {}
    if len(names) * max(map(width_of, names)) > 60 / columns:
        slant = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    for number, axes in enumerate(cells):
        axes.set_xticks(range(0, k, every), names, fontsize=size, **slant)
        axes.set_yticks(range(0, k, every), names, fontsize=size)
        if number % columns == 0:
            axes.set_ylabel("true class")
        if number + columns >= len(cells):
            axes.set_xlabel("predicted class")
            axes.tick_params(labelbottom=True)
    return figure


def _write_numbers(axes, percent, counts, room):
    """Write shares into a matrix, and counts below them if cells of ``room`` points hold two lines."""
    size = 12 if room >= 100 else 9 if room >= 36 else 6.5
    for i, j in np.argwhere(counts):
        text = f"{percent[i, j]:.0f}"
        if size > 6.5:
            text += " %"
        if room >= ROOM_FOR_COUNTS:
            text += f"\n{counts[i, j]}"
        colour = "white" if percent[i, j] > 40 else "black"
        axes.text(j, i, text, ha="center", va="center", fontsize=size, color=colour)


# ------------------------------------------------------------------------------------------------ classes

MOST_LINES = 200  # largest number of classes in a picture


def draw_classes(rows, classes, heading):
    """A line for each class, with a dot at the accuracy of each run; classes with the lowest mean come first.

    rows: {name of a run: (K,) per cent}. classes: K names. At most the 200 lowest classes are shown.
    """
    values, names = np.stack(list(rows.values())), np.array(class_names(classes))
    order = values.mean(axis=0).argsort(kind="stable")[:MOST_LINES]
    columns = math.ceil(len(order) / 50)
    high = math.ceil(len(order) / columns)
    line_height = 0.3 if high <= 20 else 0.2 if high <= 35 else 0.15
    if len(order) < len(classes):
        heading += f", the lowest {len(order)} of {len(classes):,}"
    figure = new_figure(1.3 + 0.2 * len(rows) + high * line_height, heading)
    entries, largest = [legible(name) for name in rows], 8 if high <= 35 else 6
    cells = grid(figure, columns, columns, sharex=True)
    for axes, shown in zip(cells, np.array_split(order, columns), strict=True):
        for number, (row, entry) in enumerate(zip(values, entries, strict=True)):
            # a marker and colour for each run; later markers are smaller, so that none hides another
            look = {"color": COLOURS[number % len(COLOURS)], "markersize": largest * 0.82**number}
            look |= {"markeredgecolor": "white", "markeredgewidth": 0.5, "label": entry, "clip_on": False}
            axes.plot(row[shown], range(len(shown)), MARKERS[number % len(MARKERS)], zorder=3, **look)
        axes.set_yticks(range(len(shown)), names[shown], fontsize=9 if high <= 35 else 7)
        axes.set(ylim=(high - 0.5, -0.5), xlabel="accuracy (%)")
        axes.tick_params(axis="y", length=0)
        bare(axes, "left")
    least = values[:, order].min()
    cells[0].set_xlim(least - 0.06 * max(100 - least, 1), 100)
    legend_below(figure, cells[0].get_lines(), entries)
    return figure


# ----------------------------------------------------------------------------------------------- features


def draw_features(sets, predicted, classes, heading, axis_words):
    """A map of images: test images coloured by class, with rings around wrong predictions; labelled images
    large, unlabelled images small and pale.

    sets: {"test", "labelled", "unlabelled": ((N, 2) positions, (N,) classes)}; only "test" must be there.
    predicted: (N,) classes of the test images. classes: names. axis_words: what the axes are.
    """
    from matplotlib.patheffects import withStroke

    figure = new_figure(6.8)
    axes = figure.subplots()
    axes.set_title(legible(heading), **TITLE)
    if "unlabelled" in sets:
        words = {"label": "unlabelled", "markersize": 2.5, "markeredgewidth": 0}
        axes.plot(*sets["unlabelled"][0].T, "o", color="#C8C8C8", zorder=1, **words)

    # a colour and marker for each class, its name in the middle
    words = {"fontsize": 11, "fontweight": "bold", "ha": "center", "va": "center", "zorder": 6}
    halo = [withStroke(linewidth=3, foreground="white")]
    large = {"linestyle": "", "markersize": 9, "markeredgecolor": BLACK, "markeredgewidth": 1.2}
    points, truth = sets["test"]
    for k, name in enumerate(class_names(classes)):
        look = {"marker": MARKERS[k // len(COLOURS) % len(MARKERS)], "color": COLOURS[k % len(COLOURS)]}
        chosen = points[truth == k]
        if len(chosen):
            axes.plot(*chosen.T, linestyle="", markersize=4.5, markeredgewidth=0, label=name, **look)
            distances = ((chosen - np.median(chosen, axis=0)) ** 2).sum(axis=1)
            nearest = chosen[distances.argmin()]  # a point, not the gap between two groups
            axes.text(*nearest, name, path_effects=halo, **words)
        if "labelled" in sets:
            places, labels = sets["labelled"]
            axes.plot(*places[labels == k].T, zorder=4, **look, **large)
    if "labelled" in sets:
        axes.plot([], [], marker="o", color=GREY, label="labelled", **large)

    # a ring around each wrong prediction
    wrong = points[truth != predicted]
    size, width = (9, 1.1) if len(wrong) <= 100 else (6.5, 0.6)
    ring = {"markersize": size, "markeredgewidth": width, "fillstyle": "none", "zorder": 3}
    axes.plot(*wrong.T, "o", color=BLACK, **ring)
    axes.set(xticks=[], yticks=[], xlabel=f"{axis_words}        ○ predicted wrongly ({len(wrong):,})")
    legend = axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=1.2)
    if "unlabelled" in sets:
        legend.legend_handles[0].set(markersize=5)  # else it can hardly be seen
    return figure


# ------------------------------------------------------------------------------------------- augmentation


def draw_augmentation(rows, operations, headings):
    """Images and their views in rows; below, the result of each operation on one image.

    rows: {name: (N, 3, H, W) uint8}. operations: {title: (3, H, W) uint8}. headings: of the two parts.
    """
    count = len(next(iter(rows.values())))

    # the heights of the two parts follow from square images
    columns = math.ceil(len(operations) / 2)
    upper = len(rows) * (WIDTH - 0.6) / count + 0.4
    lower = 2 * ((WIDTH - 0.2) / columns + 0.36) + 0.4
    figure = new_figure(upper + lower)
    top, bottom = figure.subfigures(2, 1, height_ratios=(upper, lower))
    top.suptitle(legible(headings[0]), **HEADING)
    cells = grid(top, len(rows) * count, count)
    for axes, image in zip(cells, itertools.chain(*rows.values()), strict=True):
        _show(axes, image)
    for axes, name in zip(cells[::count], rows, strict=True):
        axes.set_ylabel(name)
    bottom.suptitle(headings[1], **HEADING)
    cells = grid(bottom, len(operations), columns)
    for axes, (name, image) in zip(cells, operations.items(), strict=True):
        axes.set_title(name, fontsize=8, pad=3)
        _show(axes, image)
    return figure


def _show(axes, image):
    """Draw an image, (3, H, W) uint8, without a frame; the pixels of a small image stay sharp."""
    small = min(image.shape[1:]) <= 64
    axes.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest" if small else None)
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


# -------------------------------------------------------------------------------- calibration and mistakes


def draw_calibration(calibration, heading):
    """Accuracy over probability beside the share of images in each bin.

    calibration: ``report.Calibration``.
    """
    bins, share = len(calibration.counts), (100 * calibration.counts / calibration.counts.sum()).numpy()
    middles = (np.arange(bins) + 0.5) / bins
    figure = new_figure(4.4, heading)
    left, right = grid(figure, 2, 2)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.set(xlim=(0, 1), xlabel="largest probability")
    filled = (calibration.counts > 0).numpy()
    accuracy, confidence = calibration.accuracy.numpy()[filled], calibration.confidence.numpy()[filled]
    left.bar(middles[filled], accuracy, 0.94 / bins, color=BLUE, label="accuracy")
    gap = {"facecolor": "none", "edgecolor": VERMILION, "hatch": "////", "linewidth": 0.8}
    words = "from there to the mean probability"
    left.bar(middles[filled], confidence - accuracy, 0.94 / bins, bottom=accuracy, label=words, **gap)
    left.plot([0, 1], [0, 1], "--", color=GREY, linewidth=1, zorder=0)
    left.set(ylim=(0, 1), ylabel="share that is right")
    left.set_title(f"Expected calibration error {100 * calibration.error:.2f} %", **TITLE)
    right.bar(middles, share, 0.94 / bins, color=SKY)
    right.set(ylabel="share of the test set (%)")
    right.set_title(f"{calibration.counts.sum():,} in {bins} bins", **TITLE)
    figure.legend(loc="outside lower left", ncols=2, frameon=False)
    return figure


ACROSS = 6  # images in a row


def draw_mistakes(rows, classes, heading):
    """Images with their true and predicted classes, grouped by the reason to show them.

    rows: {title: list of ``report.Example``}. classes: names.
    """
    rows = {title: examples for title, examples in rows.items() if examples}
    names = dict(zip(classes, class_names(classes), strict=True))
    networks = next(iter(rows.values()))[0].guesses
    sizes = [example.image.shape[1:] for examples in rows.values() for example in examples]
    tallest = min(
        1, max(height / width for height, width in sizes)
    )  # height of an image of width 1; a taller image is made narrower
    cell = tallest * WIDTH / ACROSS + 0.13 * (2.5 + 2 * len(networks))  # with the lines below
    heights = [0.35 + math.ceil(len(examples) / ACROSS) * cell for examples in rows.values()]
    figure = new_figure(0.4 + sum(heights), heading)
    parts = figure.subfigures(len(rows), 1, height_ratios=heights, squeeze=False)[:, 0]
    for part, (title, examples) in zip(parts, rows.items(), strict=True):
        part.suptitle(title, **HEADING)
        count = math.ceil(len(examples) / ACROSS) * ACROSS  # images have the same size in all parts
        cells = grid(part, count, ACROSS)
        for axes in cells[len(examples) :]:
            axes.set_axis_off()
        for axes, example in zip(cells, examples, strict=False):
            _show(axes, example.image)
            axes.set_anchor("N")
            lines = [f"true: {names[example.true]}"]
            for network, guess in example.guesses.items():
                lines += [f"{network}: {names[guess.taken]}", f"   {100 * guess.probability:.1f} %"]
                if guess.taken != example.true:
                    lines[-1] += f", true {100 * guess.of_true:.1f} %"
            if example.distance is not None:
                lines.append(f"distance {example.distance:.3f}")
            axes.set_xlabel("\n".join(lines), fontsize=7, loc="left")
    return figure
