"""The page of a run: calibration of the probabilities, mistakes, and the file report.html.

``visualize.py`` reads the run and draws. This module analyses the outputs of its networks (``outputs_of``,
``calibration``, ``mistakes``), and ``write`` fills the template report.html.j2.
"""

import base64
import datetime
import io
import json
import os
import shlex
from typing import NamedTuple

import jinja2
import torch
from PIL import Image
from torch.nn import functional as F

from engine.evaluation import predictions
from engine.files import read_checked, write_atomically
from engine.images import dimensions
from engine.loader import batches
from pictures.drawing import STUDENT, TEACHER, encoded, method_of, things_of
from run.record import read_confusion

# --------------------------------------------------------------------------------------------- measurements


class Outputs(NamedTuple):
    """The predictions of a run's networks for the M readable test images."""

    positions: torch.Tensor  # (M,) int64, in the test set
    targets: torch.Tensor  # (M,) int64
    probabilities: dict  # {STUDENT: (M, K) float32}, with a teacher also {TEACHER: …}

    @property
    def ensemble(self):
        """(M, K) the mean of the probabilities of all networks."""
        return sum(self.probabilities.values()) / len(self.probabilities)

    def prediction(self, run):
        """The predictor of a run, in words, and its (M, K) probabilities: the student or, with --ensemble,
        the mean of both networks."""
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
    """Test images in M bins, by the probability of their predicted class."""

    counts: torch.Tensor  # (M,) int64, images
    accuracy: torch.Tensor  # (M,) float64, share of correct predictions, NaN in an empty bin
    confidence: torch.Tensor  # (M,) float64, mean probability, NaN in an empty bin
    error: float  # the expected calibration error, 0 to 1


def calibration(probabilities, targets, bins=15):
    """The reliability of a network's largest probability and its expected calibration error.

    Guo et al., On Calibration of Modern Neural Networks (ICML 2017), equations 2 and 3: the confidence of an
    image is the largest of its probabilities. Bin m of M holds the images whose confidence lies in
    ((m − 1) / M, m / M]; acc is their accuracy and conf the mean of their confidences.
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


# ------------------------------------------------------------------------------------------------- mistakes


THUMBNAIL = 160  # pixels, the longer side of an image on the page


class Guess(NamedTuple):
    """The prediction of a network for an image."""

    taken: str  # name of the most probable class
    probability: float  # of this class
    of_true: float  # probability of the true class


class Example(NamedTuple):
    """A test image and the predictions of the networks for it."""

    image: torch.Tensor  # (3, H, W) uint8, as the networks see it, but in the proportions of its file
    name: str  # path of its file, else its position in the test set
    true: str  # name of its class
    guesses: dict  # {"teacher", "student", "ensemble": ``Guess``}, as far as they exist
    distance: float | None  # total variation distance of teacher and student; None without a teacher


def total_variation(p, q):
    """The distance of distributions, (…, K) → (…), 0 to 1: half the sum over the classes of |p − q|.

    It is the largest difference of the two distributions' probabilities over all sets of classes.
    """
    return (p - q).abs().sum(dim=-1) / 2


def mistakes(outputs, dataset, count, prediction=None):
    """Two lists of images: {title: up to ``count`` objects ``Example``, the worst first}.

    The first has the images on which teacher and student disagree most, if there is a teacher. The second has
    the images whose wrong class has the largest probability.

    Args:
        prediction: result of ``Outputs.prediction``; by default the student's.
    """
    name, probabilities = prediction or (STUDENT, outputs.probabilities[STUDENT])
    networks = outputs.probabilities | {name: probabilities}
    networks = {title.split()[0]: each for title, each in networks.items()}  # "student (EMA)" is the student
    worst = {}
    if "teacher" in networks:
        distances = total_variation(networks["teacher"], networks["student"])
        worst["Teacher and student disagree most"] = distances.argsort(descending=True, stable=True)
    confidence, predicted = probabilities.max(dim=1)
    wrong = (predicted != outputs.targets).nonzero()[:, 0]
    order = confidence[wrong].argsort(descending=True, stable=True)
    worst["Most confidently wrong"] = wrong[order]
    return {title: examples_of(rows[:count], outputs, networks, dataset) for title, rows in worst.items()}


def examples_of(rows, outputs, networks, dataset):
    """``Example`` of some of the M images. rows: (N,) int64. networks: {name: (M, K) probabilities}."""
    if not len(rows):
        return []
    shown, examples = dataset.test.subset(outputs.positions[rows]), []
    images = torch.cat([images for images, _, _ in batches(shown, len(shown), "cpu")])
    names = shown.names or shown.files or outputs.positions[rows].tolist()
    files = shown.files or [os.path.join(dataset.path, name) for name in shown.names or ()]
    for i, row in enumerate(rows.tolist()):
        image, true, guesses, distance = images[i], shown.targets[i].item(), {}, None
        if files and dataset.crop == "pad":  # the networks see the whole image, stretched to a square
            image = in_proportion(image, dimensions(files[i]))
        for network, probabilities in networks.items():
            p = probabilities[row]
            guesses[network] = Guess(dataset.classes[p.argmax()], p.max().item(), p[true].item())
        if "teacher" in networks:
            distance = total_variation(networks["teacher"][row], networks["student"][row]).item()
        examples.append(Example(image, str(names[i]), dataset.classes[true], guesses, distance))
    return examples


def in_proportion(image, size):
    """A stretched image, (3, S, S) uint8, in the proportions of ``size``, its (width, height) or None."""
    if size is None or size[0] == size[1]:
        return image
    scale = min(image.shape[-1] / min(size), THUMBNAIL / max(size))
    width, height = (max(1, round(scale * side)) for side in size)
    return F.interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0]


# ---------------------------------------------------------------------------------------- words and pictures


def percent(share):
    """A probability as text without a line break; only exactly 0 and 1 become 0 and 100 %."""
    if 0.9995 <= share < 1:
        words = "> 99.9 %"
    elif 0 < share < 0.0005:
        words = "< 0.1 %"
    else:
        words = f"{100 * share:.1f} %"
    return words.replace(" ", "\N{NO-BREAK SPACE}")


def hours(seconds):
    return str(datetime.timedelta(seconds=round(seconds)))


def inline(png):
    """A data address with the bytes of a PNG, so that the page needs no other file."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def thumbnail(image):
    """(3, H, W) uint8 as a picture in the page."""
    image, file = Image.fromarray(image.permute(1, 2, 0).numpy()), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    image.save(file, format="png")
    return inline(file.getvalue())


RESULT = {  # figures of summary.json: their names on the page, and their formats
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
    """The text of summary.json as a list of (words, value), without figures that were not measured."""
    summary, rows = dict(json.loads(text)), []
    if summary["selection"] != "val":  # then the best network is the last network
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
    """The command of the run, from the text of args.json; None if an earlier version wrote none."""
    command = json.loads(text).get("command")
    return command and shlex.join(["python", os.path.basename(command[0]), *command[1:]])


def class_rows(counts, classes):
    """Accuracy and most frequent wrong prediction of each class. counts: (K, K) int64, row = true class."""
    rows = []
    for k, name in enumerate(classes):
        right, total, wrong = counts[k, k], counts[k].sum(), counts[k].copy()
        wrong[k] = 0
        row = {"name": name, "accuracy": "–", "right": f"{right:,} of {total:,}", "other": None}
        if total:
            row["accuracy"] = f"{100 * right / total:.1f} %"
        if wrong.any():
            row |= {"other": classes[wrong.argmax()], "times": f"{wrong.max():,}"}
        rows.append(row)
    return rows


# ----------------------------------------------------------------------------------------------------- page


def write(run, figures, outputs, dataset, checkpoint, missing):
    """Write the page of a run, report.html in its folder; returns the path.

    The page needs no other file and no network, and runs no script.

    Args:
        figures: {"curves", "confusion", "calibration", "regions": figure}, as far as they exist.
        outputs, dataset: ``Outputs`` and ``Dataset``, None without a checkpoint.
        checkpoint: path of the checkpoint of ``outputs``.
        missing: why there is no checkpoint, as a sentence without a full stop; None if there is a checkpoint.

    Raises:
        UserError: a file of the run is damaged or the page cannot be written; an earlier page stays whole.
    """
    things, summary = things_of(run), run.folder / "summary.json"
    values = {
        "name": run.name,
        "method": method_of(run),
        "dataset": run.args["dataset"],
        "model": run.args["model"],
        "things": things,
        "command": read_checked(run.folder / "args.json", command_line),
        "result": read_checked(summary, lambda text: result_rows(text, things)) if summary.exists() else [],
        "classes": [],
        "pictures": {name: inline(encoded(figure, "png")) for name, figure in figures.items()},
        "missing": missing,
    }
    if "confusion" in figures:
        values["classes"] = class_rows(*read_confusion(run.folder / "confusion.json"))
    if not missing:
        predictor, probabilities = prediction = outputs.prediction(run)
        confidence, predicted = probabilities.double().max(dim=1)
        values["calibration"] = {
            "predictor": predictor,
            "checkpoint": os.path.basename(checkpoint),
            "accuracy": (predicted == outputs.targets).double().mean().item(),
            "confidence": confidence.mean().item(),
            "error": calibration(probabilities, outputs.targets).error,
        }
    if not missing and things == "images":
        values["predictor"] = predictor.split()[0]  # "student" or "ensemble"
        values["mistakes"] = mistakes(outputs, dataset, 12, prediction)
    page, path = render(values), run.folder / "report.html"
    # bytes of a file's name that are no UTF-8 become question marks
    write_atomically(path, lambda file: file.write(page.encode("utf-8", "replace")))
    return path


def render(values):
    """The text of the page, from the plain values that ``write`` prepares."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(os.path.dirname(__file__)),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"percent": percent, "thumbnail": thumbnail}
    return environment.get_template("report.html.j2").render(values)
