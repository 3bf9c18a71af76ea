"""Classes and probabilities of your own images, and the network as a file for other programs.

    python predict.py checkpoint/NAME_best.pth.tar FOLDER > predictions.csv     # a row for each image
    python predict.py CKPT a.jpg b.jpg FOLDER                                   # files and folders
    python predict.py CKPT FOLDER --out table.csv                               # correct it for main.py --labels
    python predict.py CKPT FOLDER --copy-to sorted                              # and copies in class folders
    python predict.py CKPT FOLDER --uncertain 100 --copy-to label_next          # the images to label next
    python predict.py CKPT --export classifier.pt2                              # or .onnx

Only the checkpoint is needed: it knows the network, the classes, the images' size and normalisation.
Images are read as ``main.py --evaluate`` reads them, by the same functions, and get the same predicted classes.
"""

import os
import sys

from run import script

if __name__ == "__main__":
    script.begin("predict.py")
    # the network's threads must not spin, as they would by default, on cores on which images are decoded
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import contextlib
import filecmp
import heapq
import importlib.util
import io
import itertools
import json
import logging
import math
import re
import shutil
from typing import NamedTuple

import torch

from augmentation import ImageViews, normalization
from engine.checkpoint import Checkpoint, well_formed
from engine.evaluation import EVALUATION_BATCH, predictions, ranked
from engine.files import csv_text, write_atomically, write_csv, writing
from engine.folders import image_tree, listed, relative
from engine.images import (
    IMAGE_SUFFIXES,
    ImageSet,
    Reading,
    constant_lines,
    fingerprints,
    value_range_line,
)
from engine.runtime import Runtime
from models import Ensemble
from run.arguments import Parser, between
from utils import Progress, UserError, tell

# ---------------------------------------------------------------- flags


# fmt: off
def build_parser():
    parser = Parser(
        description="Predict the classes of images with a checkpoint of main.py, or export its network to a file.",
        epilog="Examples:\n"
        "  python predict.py checkpoint/NAME_best.pth.tar photos --out predictions.csv\n"
        "  python predict.py checkpoint/NAME_best.pth.tar --export network.pt2",
    )
    as_trained = {"action": argparse.BooleanOptionalAction, "default": None}
    count = between(int, 1)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="checkpoint that main.py has written")
    add("paths", metavar="PATH", nargs="*", help="image files, and folders that are searched at any depth; unreadable images are left out and named on standard error")
    add("--out", metavar="FILE", help="CSV file to write when all images are done (default: standard output); you can correct it and give it to main.py --labels")
    add("--top", type=count, default=2, metavar="K", help="classes per image, the most probable first")
    add("--uncertain", type=count, metavar="N", help="list only the N images that the network is least sure of (smallest margin between the first class and the second), least sure first. Images that already have labels are not excluded")
    add("--copy-to", metavar="DIR", help="also copy each listed image into DIR/CLASS, the folder of its predicted class; no file is replaced")
    add("--export", metavar="FILE", help="write the network to this file instead of predicting, with normalisation and softmax inside: .pt2 for torch.export.load, or .onnx")
    add("--device", default="auto", choices=Runtime.KINDS, help="device that computes; auto: CUDA, else another accelerator, else the CPU")
    add("--batch-size", type=between(int, 1, 2**14), default=EVALUATION_BATCH, help="images that pass through the network at once")
    add("--workers", type=between(int, 0), default=2, help="processes that decode images")
    add("--max-megapixels", type=between(float, 0.001, 1e6), default=500.0, metavar="N", help="largest size of an image in megapixels; larger images count as unreadable")
    add("--amp", help="mixed precision (default: as in training)", **as_trained)
    add("--channels-last", help="store images and filters in the memory order in which convolutions are faster (default: as in training)", **as_trained)
    return parser
# fmt: on


def main(argv):
    """From a command line to a CSV file, sorted copies or an exported network; UserError for invalid input."""
    parser = build_parser()
    args = parser.parse_intermixed_args(argv)
    if bool(args.paths) == bool(args.export):
        parser.error("give either images (files or folders) or --export FILE")
    for path in filter(None, (args.out, args.export)):
        if os.path.isdir(path) or not os.path.isdir(os.path.dirname(path) or "."):
            raise UserError(f"cannot write {path}: give the name of a file in an existing folder")
    if args.export:
        export(args)
    else:
        classify(args)


# ---------------------------------------------------------------- the checkpoint


class Classifier(NamedTuple):
    """What a checkpoint knows: the network, and the images that it was trained for."""

    network: torch.nn.Module  # of a run with --ensemble both of its networks
    classes: list  # K names
    images: dict  # what the run knows of its images: ``data.Dataset.record``


def read_classifier(args, runtime):
    """The ``Classifier`` of a checkpoint on the device, and ``runtime`` configured as the run was.

    Raises:
        UserError: no such file, a damaged or foreign one, or a network of points.
    """
    path = args.checkpoint
    content = runtime.load(path)
    if not well_formed(content) or not {"args", "data"} <= content.keys():
        raise UserError(
            f"{path} does not describe its network and its images: give a checkpoint that main.py has written"
        )
    saved = Checkpoint(content, path)
    known, images = saved["args"], saved["data"]
    if images["size"] == 0:
        raise UserError(f"{path} was trained on points: predict.py needs a network for images")
    crop, value_range = images["crop"], images["value_range"]
    statistics = [*images["mean"], *images["std"]]
    if isinstance(value_range, list):
        statistics += value_range
    if not (
        saved["networks"].keys() >= set(saved["predicting"])
        and isinstance(known.get("bn_eps"), (float, type(None)))
        and crop in ("pad", "none")
        and 0 < images["size"] <= 2**12
        and len(images["classes"]) > 1
        and all(isinstance(name, str) for name in images["classes"])
        and len(images["mean"]) == len(images["std"]) == 3
        and all(isinstance(value, float) and math.isfinite(value) for value in statistics)
        and min(images["std"]) > 0
        and (
            value_range is None
            or (isinstance(value_range, list) and len(value_range) == 2 and value_range[0] < value_range[1])
        )
    ):
        raise UserError(f"{path} has no network for images: give a checkpoint that main.py has written")
    classes = [name.encode("utf-8", "backslashreplace").decode() for name in images["classes"]]
    members = list(saved.members(len(classes), images["size"]).values())

    def chosen(name):
        given = getattr(args, name)
        return bool(known.get(name)) if given is None else given

    amp, dtype = chosen("amp"), "fp16" if known.get("amp_dtype") == "fp16" else "bf16"
    if amp and dtype == "fp16" and runtime.kind != "cuda":
        tell(runtime, f"fp16 needs CUDA: predicting in float32 on {runtime.kind}")
        amp = False
    runtime.configure(amp, dtype, chosen("channels_last"))
    network = Ensemble(members) if len(members) > 1 else members[0]
    return Classifier(runtime.place(network).eval(), classes, images)


# ---------------------------------------------------------------- from images to rows


class Prediction(NamedTuple):
    """What an image was taken for."""

    file: str
    name: str  # the path relative to the folder if one alone was given, else the path as given; with "/"
    classes: list  # most probable first, at least two
    probabilities: list

    @property
    def margin(self):
        """How much more probable the first class is than the runner-up: small where a label tells most."""
        return self.probabilities[0] - self.probabilities[1]


def classify(args):
    """A row for each image, in the natural order of their names, and copies if asked."""
    runtime = Runtime(args.device, alone=True)
    named, notes = named_images(args.paths)
    classifier = read_classifier(args, runtime)
    images = image_set(args, classifier, named)
    if value_range := classifier.images["value_range"]:
        notes.append(value_range_line(value_range))
    which = f"the images in '{args.paths[0]}'" if len(args.paths) == 1 else "the images"
    tell(runtime, *notes, *constant_lines(images, which))
    folders = class_folders(args, classifier.classes) if args.copy_to else None

    # a table that --labels may take back keeps what the run knows: labels, and which images are for testing
    known = known_images(images, classifier) if args.out else {}
    rows = []
    emit = rows.append if args.out else print_row
    with contextlib.closing(predicted(args, runtime, classifier, images)) as found:
        if args.uncertain:
            shown = heapq.nsmallest(args.uncertain, found, key=lambda prediction: prediction.margin)
            tell(runtime, f"{len(shown)} images with the smallest margin between first class and runner-up")
        else:
            shown = found
        count = min(args.top, len(classifier.classes))
        numbered = ((f"class_{k}", f"probability_{k}") for k in range(2, count + 1))
        emit(("image", "class", "probability", *itertools.chain(*numbered), *(["split"] if known else [])))
        for each in shown:
            if folders:
                with writing(folders[each.classes[0]]):
                    copy_image(each.file, folders[each.classes[0]])
            pairs = zip(each.classes, (f"{p:.6f}" for p in each.probabilities), strict=True)
            row = [each.name, *itertools.chain(*itertools.islice(pairs, count))]
            if known:
                name, part = known.get(each.file, (row[1], "train"))
                if name != row[1]:
                    row[1:3] = name, ""  # the run's label, not a prediction
                row.append(part)
            emit(row)
    if args.out:
        write_csv(args.out, rows)


def named_images(paths):
    """{file: its name in the table}, each file once, and lines for the user.

    Names are relative to the folder where one alone is given, else paths as they are given.

    Raises:
        UserError: a path is not there or has no image.
    """
    named, notes = {}, []
    for path in paths:
        if os.path.isfile(path):
            if not path.lower().endswith(IMAGE_SUFFIXES):
                raise UserError(f"'{path}' is not an image: files must end in {', '.join(IMAGE_SUFFIXES)}")
            files, names = [path], [path]
        else:
            files, more = image_tree(path, "PATH")
            names = relative(files, path) if len(paths) == 1 else files
            notes += more
        for file, name in zip(files, names, strict=True):
            named.setdefault(file, name.replace(os.sep, "/"))
    return named, notes


def known_images(images, classifier):
    """{file: (class, part)} of the images that the run has labels for; part is "train", "val" or "test"."""
    record, known = classifier.images, {}
    if "tested_targets" not in record:  # not of files, or of an earlier version
        return {}
    for kind, part in (("labeled", "train"), ("val", "val"), ("tested", "test")):
        prints = record["tested"] if kind == "tested" else record[f"{kind}_prints"]
        for number, target in zip(prints.tolist(), record[f"{kind}_targets"].tolist(), strict=True):
            known[number] = classifier.classes[target], part
    prints = fingerprints(images.files, images.workers, record["fingerprint"])
    pairs = zip(images.files, prints.tolist(), strict=True)
    return {file: known[number] for file, number in pairs if number in known}


def image_set(args, classifier, named):
    """The files as an ``ImageSet`` in the natural order of their names: ``2.jpg`` before ``10.jpg``."""

    def natural(file):
        return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", named[file])]

    files, value_range = sorted(named, key=natural), classifier.images["value_range"]
    return ImageSet(
        [-1] * len(files),
        files=files,
        size=classifier.images["size"],
        crop=classifier.images["crop"],
        workers=args.workers,
        skip_unreadable=True,
        reading=Reading(value_range and tuple(value_range), args.max_megapixels),
        names=[named[file] for file in files],
    )


def predicted(args, runtime, classifier, images):
    """Yields a ``Prediction`` for each image that can be read; UserError if there is none."""
    size, mean, std, crop = (classifier.images[name] for name in ("size", "mean", "std", "crop"))
    views = ImageViews(size, mean, std, crop=crop, randaug=None)
    beside_rows = sys.stdout.isatty() and not (args.out or args.uncertain)
    progress = Progress("predicting", len(images), active=not beside_rows, unit="image")
    paths, readable = zip(images.files, images.names, strict=True), 0
    for logits, _, mask in predictions(classifier.network, images, views, runtime, args.batch_size):
        best = ranked(logits, max(2, args.top))
        values = mask, best, logits.softmax(dim=1).gather(1, best)
        batch = list(zip(*(value.tolist() for value in values), strict=True))
        batch = list(zip(itertools.islice(paths, len(batch)), batch, strict=False))  # without the padding
        for (file, name), (read, labels, probabilities) in batch:
            if read:
                readable += 1
                yield Prediction(file, name, [classifier.classes[k] for k in labels], probabilities)
        progress.step(count=len(batch))
    progress.close()
    if not readable:
        where = listed([f"'{path}'" for path in args.paths])
        raise UserError(f"none of the {len(images)} images in {where} can be read: check the files")


def print_row(row):
    """A row on standard output at once; BrokenPipeError if nobody reads it, UserError if it cannot be written."""
    try:
        sys.stdout.write(csv_text([row]))
        sys.stdout.flush()
    except OSError as error:
        # what is left in the buffer is not tried again at the end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"cannot write to standard output: {error.strerror}") from error


# ---------------------------------------------------------------- copies in class folders


def class_folders(args, classes):
    """{class: its folder in ``--copy-to``}. UserError for a place where copies would be taken for new images."""
    place = os.path.realpath(args.copy_to)
    for path in filter(os.path.isdir, args.paths):
        source = os.path.realpath(path)
        if os.path.commonpath((place, source)) == source:
            raise UserError(f"--copy-to {args.copy_to} is inside '{path}': give a folder outside of it")
    with writing(args.copy_to):
        os.makedirs(args.copy_to, exist_ok=True)
    folders = (os.path.join(args.copy_to, name) for name in folder_names(classes))
    return dict(zip(classes, folders, strict=True))


def folder_names(names):
    """A name of one folder for each class, no two the same where upper and lower case are one.

    Names come from a checkpoint, perhaps a stranger's: separators and what else is special on some system
    become underscores, and dots and spaces at the ends are left out, so that no name leads elsewhere.
    """
    safe = []
    for name in names:
        name = re.sub(r'[\x00-\x1f\x7f/\\:*?"<>|]', "_", name).encode()[:150].decode(errors="ignore")
        name = name.strip(". ") or "_"
        while name.casefold() in map(str.casefold, safe):
            name += "_"
        safe.append(name)
    return safe


def copy_image(source, folder):
    """Copy a file into a folder, made if it is not there. Where another file has its name, a number is added;
    a file with the same name and content counts as the copy."""
    os.makedirs(folder, exist_ok=True)
    stem, suffix = os.path.splitext(os.path.basename(source))
    for number in itertools.count(1):
        target = os.path.join(folder, f"{stem}-{number}{suffix}" if number > 1 else f"{stem}{suffix}")
        try:
            file = open(target, "xb")  # noqa: SIM115 (closed below)
        except FileExistsError:
            if filecmp.cmp(source, target, shallow=False):
                return
            continue
        try:
            with file, open(source, "rb") as original:
                shutil.copyfileobj(original, file)
            shutil.copystat(source, target)
        except BaseException:  # Ctrl-C, too: no half of an image stays
            os.remove(target)
            raise
        return


# ---------------------------------------------------------------- export


class Deployed(torch.nn.Module):
    """A network as other programs want it: (N, 3, H, W) uint8 images in, (N, K) float32 probabilities out."""

    def __init__(self, classifier):
        super().__init__()
        self.network = classifier.network
        scale, shift = normalization(classifier.images["mean"], classifier.images["std"])
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images):
        return self.network(images * self.scale + self.shift).softmax(dim=1).detach()


def export(args):
    """Write the network, in float32 and for any N; and as JSON the names of the classes and the value range
    of deep images: in a .pt2 file the extra files ``classes.json`` and ``value_range.json``, in an .onnx file
    the properties ``classes`` and ``value_range``."""
    suffix = os.path.splitext(args.export)[1]
    if suffix not in (".pt2", ".onnx"):
        raise UserError(f"--export {args.export}: the name must end in .pt2 or .onnx")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of operators that are not used here
    if suffix == ".onnx" and not all(map(importlib.util.find_spec, ("onnx", "onnxscript"))):
        raise UserError("--export to ONNX needs two more packages: pip install onnx onnxscript")
    args.amp = args.channels_last = False
    classifier = read_classifier(args, Runtime("cpu", alone=True))
    module, size = Deployed(classifier).eval(), classifier.images["size"]
    facts = {"classes": classifier.classes, "value_range": classifier.images["value_range"]}
    facts = {name: json.dumps(value) for name, value in facts.items()}
    images = torch.zeros(2, 3, size, size, dtype=torch.uint8)
    program = torch.export.export(module, (images,), dynamic_shapes=({0: torch.export.Dim("N")},))
    if suffix == ".pt2":
        buffer = io.BytesIO()  # written to a full disk, torch's archive would end the whole process
        torch.export.save(program, buffer, extra_files={f"{name}.json": text for name, text in facts.items()})
        content = buffer.getvalue()
    else:
        model = torch.onnx.export(
            program, input_names=["images"], output_names=["probabilities"], verbose=False
        ).model_proto
        for name, text in facts.items():
            model.metadata_props.add(key=name, value=text)
        content = model.SerializeToString()
    write_atomically(args.export, lambda file: file.write(content))
    print(args.export)


def run(argv):
    """``main``, with errors as one sentence; returns the exit status."""
    return script.run("predict.py", main, argv)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")  # names of files may be no UTF-8
    script.execute(run, sys.argv[1:])
