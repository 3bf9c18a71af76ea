"""What a person looks at after a run: whether its probabilities can be trusted, its mistakes, a page of all.

``visualize.py`` reads the run and draws; here the outputs of its networks are measured (``outputs_of``,
``calibration``, ``mistakes``) and everything is put together as one HTML file (``write``).
"""

import base64
import datetime
import io
import json
import os
import shlex
from html import escape
from typing import NamedTuple

import torch
from PIL import Image

from evaluation import predictions
from loader import batches
from pictures.drawing import STUDENT, TEACHER, encoded, method_of, things_of
from runtime import write_atomically
from utils import read_checked, read_confusion

# --------------------------------------------------------------------------------------------- measurements


class Outputs(NamedTuple):
    """What the networks of a run say about the M test images that could be read."""

    positions: torch.Tensor  # (M,) int64, in the test set
    targets: torch.Tensor  # (M,) int64
    probabilities: dict  # {STUDENT: (M, K) float32}, with a teacher also {TEACHER: …}

    @property
    def ensemble(self):
        """(M, K) the mean of the probabilities of all networks."""
        return sum(self.probabilities.values()) / len(self.probabilities)

    def prediction(self, run):
        """Who predicts in a run, in words, and (M, K): the student or, with --ensemble, the mean of both."""
        if run.args.get("ensemble") and TEACHER in self.probabilities:
            return "ensemble of teacher and student", self.ensemble
        return "student", self.probabilities[STUDENT]


def outputs_of(networks, dataset, views, runtime):
    """``Outputs`` of {title: network}; each network sees every test image once."""
    probabilities = {}
    for title, network in networks.items():
        walk = predictions(network, dataset.test, views, runtime)
        parts = [[each.cpu() for each in (logits.softmax(dim=1), *rest)] for logits, *rest in walk]
        found, targets, mask = (torch.cat(each)[: len(dataset.test)] for each in zip(*parts, strict=True))
        probabilities[title] = found[mask > 0]
    return Outputs(mask.nonzero()[:, 0], targets[mask > 0], probabilities)


class Calibration(NamedTuple):
    """Test images by the probability of the class they were taken for, in M bins."""

    counts: torch.Tensor  # (M,) int64, images
    accuracy: torch.Tensor  # (M,) float64, share that is right, NaN in an empty bin
    confidence: torch.Tensor  # (M,) float64, mean probability, NaN in an empty bin
    error: float  # the expected calibration error, 0 to 1


def calibration(probabilities, targets, bins=15):
    """The reliability of a network's largest probability and its expected calibration error.

    Guo et al., On Calibration of Modern Neural Networks (ICML 2017), equations 2 and 3: the confidence of an
    image is the largest of its probabilities. Bin m of M holds the images whose confidence lies in
    ((m − 1) / M, m / M]; acc is the share of them that is right and conf the mean of their confidences.
    ECE = Σ_m |B_m| / n · |acc(B_m) − conf(B_m)|.

    Args:
        probabilities: (N, K) float32.
        targets: (N,) int64.
    """
    confidence, predicted = probabilities.double().max(dim=1)
    bin_of = (confidence * bins).ceil().long().clamp(1, bins) - 1
    counts = bin_of.bincount(minlength=bins)
    right = bin_of.bincount((predicted == targets).double(), minlength=bins)
    confident = bin_of.bincount(confidence, minlength=bins)
    error = (right - confident).abs().sum().item() / len(targets)
    return Calibration(counts, right / counts, confident / counts, error)


class Example(NamedTuple):
    """A test image and what the networks say about it."""

    image: torch.Tensor  # (3, H, W) uint8, as the networks see it
    name: str  # path of its file, else its position in the test set
    true: str  # name of its class
    guesses: dict  # {"student": (name of the most probable class, its probability, the true class's), …}
    distance: float | None  # total variation distance of teacher and student, where there is a teacher


def disagreement(outputs):
    """The total variation distance of the predictions of teacher and student: (M,) float32, 0 to 1.

    Half the sum over the classes of |p − q|: the most that the two can differ about any set of classes.
    """
    return (outputs.probabilities[TEACHER] - outputs.probabilities[STUDENT]).abs().sum(dim=1) / 2


def mistakes(outputs, dataset, count):
    """The images worth a look: {title: up to ``count`` of ``Example``, the worst first}.

    Those on which teacher and student disagree most, if there is a teacher, and those that the student takes
    for a wrong class with the largest probability.
    """
    titles = {}
    if TEACHER in outputs.probabilities:
        distances = disagreement(outputs)
        order = distances.argsort(descending=True, stable=True)
        titles["Teacher and student disagree most"] = order[:count].tolist()
    confidence, predicted = outputs.probabilities[STUDENT].max(dim=1)
    wrong = (predicted != outputs.targets).nonzero()[:, 0]
    order = confidence[wrong].argsort(descending=True, stable=True)
    titles["Most confidently wrong"] = wrong[order][:count].tolist()

    chosen = [row for rows in titles.values() for row in rows]
    shown = dataset.test.subset(outputs.positions[chosen])
    pixels = torch.cat([images for images, _, _ in batches(shown, len(shown), "cpu")]) if chosen else []
    names = shown.names or shown.files or outputs.positions[chosen].tolist()
    examples = []
    for row, image, name in zip(chosen, pixels, names, strict=True):
        true, guesses = outputs.targets[row].item(), {}
        for title, probabilities in outputs.probabilities.items():
            p = probabilities[row]
            guesses[title.split()[0]] = (dataset.classes[p.argmax()], p.max().item(), p[true].item())
        distance = distances[row].item() if TEACHER in outputs.probabilities else None
        examples.append(Example(image, str(name), dataset.classes[true], guesses, distance))
    rest = iter(examples)
    return {title: [next(rest) for _ in rows] for title, rows in titles.items()}


# ---------------------------------------------------------------------------------------------------- words


def percent(share):
    """A probability in words, on one line; one that only rounding makes 0 or 100 is not called so."""
    words = "> 99.9" if 0.9995 <= share < 1 else "< 0.1" if 0 < share < 0.0005 else f"{100 * share:.1f}"
    return f"{words} %".replace(" ", "\N{NO-BREAK SPACE}")


def hours(seconds):
    return str(datetime.timedelta(seconds=round(seconds)))


RESULT = {  # of summary.json: what a figure is called, and how it is written
    "top1": ("Test accuracy", "{:.2f} %"),
    "mean_class_top1": ("Mean of the accuracies of the classes", "{:.2f} %"),
    "top5": ("Right class among the five most probable", "{:.2f} %"),
    "best_top1": ("Test accuracy of the network that the validation images chose", "{:.2f} %"),
    "finetune_top1": ("Test accuracy after finetuning on the labelled images", "{:.2f} %"),
    "student_top1": ("Test accuracy of the student alone", "{:.2f} %"),
    "teacher_top1": ("Test accuracy of the teacher", "{:.2f} %"),
    "largest_class_top1": ("To compare: always naming the largest class", "{:.2f} %"),
    "test_images": ("Test {things}", "{:,}"),
    "num_labeled": ("Labelled {things}", "{:,}"),
    "steps": ("Training steps", "{:,}"),
    "train_seconds": ("Time of training (hours:minutes:seconds)", hours),
    "device": ("Computed on", "{}"),
    "torch": ("PyTorch", "{}"),
    "commit": ("Commit of the program", "{}"),
}


def result_rows(text, things):
    """The text of summary.json as a list of (words, value); what was not measured is left out."""
    summary, rows = dict(json.loads(text)), []
    if summary["selection"] != "val":  # then it is the last network
        summary["best_top1"] = None
    for name, (words, form) in RESULT.items():
        if summary.get(name) is not None:
            value = form(summary[name]) if callable(form) else form.format(summary[name])
            ensemble = name == "top1" and summary.get("ensemble_top1") is not None
            words = "Test accuracy of the ensemble" if ensemble else words.format(things=things)
            rows.append((words, value))
    if summary.get("never_predicted"):
        rows.append(("Classes that nothing was taken for", ", ".join(summary["never_predicted"])))
    return rows


def command_line(text):
    """The command that made the run, of the text of args.json; None where earlier versions wrote none."""
    command = json.loads(text).get("command")
    return command and shlex.join(["python", os.path.basename(command[0]), *command[1:]])


# ----------------------------------------------------------------------------------------------------- page

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f23; --soft: #57606a; --paper: #fff; --line: #d0d7de;
  --pale: #f3f5f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #a3adb7; --paper: #14171a; --line: #3a4149; --pale: #20252a }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.2 }
h2 { margin: 2.5rem 0 .5rem; font-size: 1.25rem }
h3 { margin: 1.5rem 0 .5rem; font-size: 1rem }
p { margin: .5rem 0; max-width: 44rem }
.soft, figcaption { color: var(--soft) }
pre { margin: 0; padding: .75rem; background: var(--pale); border-radius: .4rem; white-space: pre-wrap;
  font-size: .875rem }
.table { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); text-align: start;
  vertical-align: top; font-weight: normal; overflow-wrap: break-word }
thead th { color: var(--soft) }
td.number, th.number { text-align: end }
td.number { white-space: nowrap }
summary { cursor: pointer }
.wide { margin: .75rem 0; overflow-x: auto; background: #fff; border: 1px solid var(--line);
  border-radius: .4rem }
.wide img { display: block; width: 100%; min-width: 40rem; height: auto }
.images { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1.25rem 1rem;
  margin: 0; padding: 0; list-style: none }
.images figure { margin: 0 }
.images img { display: block; width: 100%; height: auto; border-radius: .25rem }
.images .small { image-rendering: pixelated }
.images figcaption { margin-top: .35rem; font-size: .875rem; line-height: 1.4 }
.images figcaption span { display: block }
.images .true { color: var(--ink) }
"""

# the policy forbids the page to load or run anything, whatever a name in it may hold
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: report of a run</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
<p class="soft">{method} on {dataset}, {model}</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""
ABOUT = {
    "Teacher and student disagree most": "<p>Distance: half the sum over the classes of the differences "
    "between the two networks' probabilities (total variation distance), from 0, the same, to 1.</p>",
    "Most confidently wrong": "<p>The wrong class got the largest probability.</p>",
}


def name_of(value):
    """A name from outside as HTML: nothing in it is markup, and its direction of writing ends with it."""
    return f"<bdi>{escape(str(value))}</bdi>"


def picture(png, alt, attributes=""):
    """An image in the page itself; ``png``: bytes, ``alt``: what it shows, for those who do not see it."""
    source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
    return f'<img src="{source}" alt="{escape(alt)}"{attributes}>'


def chart(figure, alt):
    """A figure over the whole width, which a narrow screen moves sideways."""
    label = f'tabindex="0" role="group" aria-label="{escape(alt)}"'  # so that keys can move it, too
    return f'<div class="wide" {label}>{picture(encoded(figure, "png"), alt)}</div>'


def table(head, rows, numbers):
    """A table whose cells are HTML; the first of a row is its heading, ``numbers`` are columns of figures."""
    css = [' class="number"' * (column in numbers) for column in range(len(rows[0]))]
    heads = "".join(f'<th scope="col"{c}>{cell}</th>' for c, cell in zip(css, head, strict=False))
    lines = [f"<thead><tr>{heads}</tr></thead>"] if head else []
    for first, *rest in rows:
        cells = "".join(f"<td{c}>{cell}</td>" for c, cell in zip(css[1:], rest, strict=True))
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    return '<div class="table"><table>\n' + "\n".join(lines) + "\n</table></div>"


def class_table(counts, classes, things):
    """Accuracy of each class and what it is most often taken for. counts: (K, K) int64, row = true class."""
    rows = []
    for k, name in enumerate(classes):
        total, others = counts[k].sum(), counts[k].copy()
        others[k] = 0
        right = f"{100 * counts[k, k] / total:.1f} %" if total else "–"
        other = f"{name_of(classes[others.argmax()])} ({others.max():,})" if others.any() else "–"
        rows.append((name_of(name), right, f"{counts[k, k]:,} of {total:,}", other))
    return table(("Class", "Accuracy", f"Right {things}", "Most often taken for"), rows, (1, 2))


def thumbnail(example):
    """An image of at most 160 pixels with its classes and probabilities below it, as an item of a list."""
    file, size = io.BytesIO(), example.image.shape[-1]
    image = Image.fromarray(example.image.permute(1, 2, 0).numpy())
    image.thumbnail((160, 160))
    image.save(file, format="png")
    lines = [f'<span class="true">true: {name_of(example.true)}</span>']
    for network, (taken, p, true) in example.guesses.items():
        right = "" if taken == example.true else f", true class {percent(true)}"
        lines.append(f"<span>{network}: {name_of(taken)} {escape(percent(p) + right)}</span>")
    if example.distance is not None:
        lines.append(f"<span>distance {example.distance:.3f}</span>")
    taken = example.guesses["student"][0]
    alt = f"Test image {example.name}: {example.true}, which the student takes for {taken}"
    shown = picture(file.getvalue(), alt, ' class="small"' * (size <= 64))
    return f"<li><figure>{shown}<figcaption>{''.join(lines)}</figcaption></figure></li>"


def about_calibration(measured, who, checkpoint, things):
    """What the reliability diagram says, in sentences; ``who`` predicts."""
    total = measured.counts.sum()
    sure = ((measured.counts * measured.confidence).nansum() / total).item()
    right = ((measured.counts * measured.accuracy).nansum() / total).item()
    return (
        f"The {who} in {os.path.basename(checkpoint)} is right on {percent(right)} of the test {things}, "
        f"and the largest of its probabilities is {percent(sure)} on average. The expected calibration "
        f"error is {percent(measured.error)}: how far probability and accuracy are apart, on average over "
        f"{len(measured.counts)} bins weighted by their {things} (Guo et al., 2017)."
    )


def sections(run, figures, outputs, dataset, checkpoint, missing):
    """{heading: HTML} of the page, in its order; what cannot be shown is a sentence that says why."""
    things, parts = things_of(run), {}

    # from the files of the run
    path = run.folder / "summary.json"
    if path.exists():
        rows = read_checked(path, lambda text: result_rows(text, things))
        parts["Result"] = table((), [(escape(words), name_of(value)) for words, value in rows], ())
    else:
        parts["Result"] = "<p>There is no summary.json: the training has not ended.</p>"
    command = read_checked(run.folder / "args.json", command_line)
    parts["Command"] = (
        f"<pre><code>{escape(command)}</code></pre>" if command else "<p>It was not recorded.</p>"
    )
    if "curves" in figures:
        alt = f"Losses and accuracies of {run.name} over the training steps"
        parts["Training"] = chart(figures["curves"], alt)
    else:
        parts["Training"] = "<p>Nothing was measured over the steps of training: there are no curves.</p>"
    if "confusion" in figures:
        counts, classes = read_confusion(run.folder / "confusion.json")
        rows = class_table(counts, classes, things)
        alt = f"Confusion matrix of {len(classes)} classes; the table of the classes has its diagonal"
        parts["Confusion"] = chart(figures["confusion"], alt)
        few = len(classes) <= 30
        shown = f"<details{' open' * few}><summary>{len(classes)} classes</summary>{rows}</details>"
        parts["Accuracy of each class"] = shown
    else:
        parts["Confusion"] = "<p>There is no confusion.json: no network was evaluated on the test set.</p>"

    # from its checkpoint
    if missing:
        why = f"<p>Left out: {escape(missing)}.</p>"
        return parts | {"Calibration": why, "Decision regions" if things == "points" else "Mistakes": why}
    who, prediction = outputs.prediction(run)
    words = about_calibration(calibration(prediction, outputs.targets), who, checkpoint, things)
    alt = "Reliability diagram: the accuracy of images over the probability of their class"
    parts["Calibration"] = f"<p>{escape(words)}</p>{chart(figures['calibration'], alt)}"
    if things == "points":
        alt = "Decision regions of the networks in the plane, with the training points"
        return parts | {"Decision regions": chart(figures["regions"], alt)}
    parts["Mistakes"] = ""
    for title, examples in mistakes(outputs, dataset, 12).items():
        shown = "\n".join(map(thumbnail, examples))
        shown = f'<ul class="images">\n{shown}\n</ul>' if shown else "<p>There is no such image.</p>"
        parts["Mistakes"] += f"<h3>{title}</h3>{ABOUT[title]}\n{shown}"
    return parts


def write(run, figures, outputs, dataset, checkpoint, missing):
    """Write the page of a run, report.html in its folder; returns the path.

    The page needs no other file and no network, and runs no script.

    Args:
        figures: {"curves", "confusion", "calibration", "regions": figure}, those that there are.
        outputs, dataset: ``Outputs`` and ``Dataset``, None without a checkpoint.
        checkpoint: path of the one that was measured.
        missing: why there is no checkpoint, as a sentence without a full stop; None where there is one.

    Raises:
        UserError: a file of the run is damaged or the page cannot be written; an earlier page stays whole.
    """
    body = "\n".join(
        f"<section>\n<h2>{heading}</h2>\n{content}\n</section>"
        for heading, content in sections(run, figures, outputs, dataset, checkpoint, missing).items()
    )
    page = PAGE.format(
        title=escape(run.name),
        style=STYLE,
        method=escape(str(method_of(run))),
        dataset=escape(str(run.args["dataset"])),
        model=escape(str(run.args["model"])),
        body=body,
    )
    path = run.folder / "report.html"
    # bytes of a file's name that are no UTF-8 become question marks
    write_atomically(path, lambda file: file.write(page.encode("utf-8", "replace")))
    return path
