"""Data sets, the split into labelled and unlabelled images, and the loaders that yield batches on the device.

``load_dataset`` reads a data set, splits it and returns a ``Dataset``; ``TrainLoader`` draws batches from it
without end; ``batches`` walks through a set once, in order, for evaluation.

Small images are held as one uint8 tensor on the device and a batch is an ``index_select`` there. Large ones
stay on disk and are decoded by DataLoader workers, straight to uint8 crops. Both ways the n-th image of a
run depends on the seed and on n alone: not on the number of workers, and not on whether the run was resumed.
"""

import contextlib
import hashlib
import math
import os
import signal
import struct
import sys
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from runtime import UserError, write_atomically

NAMES = ("twomoons", "digits", "cifar10", "cifar100", "svhn", "stl10", "imagenet", "folder")

# Channel mean and standard deviation of the training images / 255, as published for each data set.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SMALL = 64  # pixels: up to this size a folder of images is held in memory
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, 5 and above turn by a quarter
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)


# --------------------------------------------------------------------------------------- what is handed on


class Batch(NamedTuple):
    """One training batch, all of it on the device; B labelled images and N = mu * B unlabelled ones."""

    images_l: torch.Tensor  # (B, 3, H, W) uint8; two moons: (B, 2) float32
    targets: torch.Tensor  # (B,) int64
    images_u: torch.Tensor | None  # (N, 3, H, W) uint8; None when mu is 0
    targets_u: torch.Tensor | None  # (N,) int64, -1 where unknown, None if all are: for metrics alone


class ImageSet:
    """Images (or points) and their classes, in memory or as files on disk.

    Args:
        targets: (N,) int64, -1 where the class is not known.
        images: (N, 3, H, W) uint8 or (N, 2) float32; None for files.
        files: N paths, for images that are decoded when they are needed.
        size: pixels, height and width of what is decoded from files.
        workers: DataLoader processes that decode files for evaluation.
        skip_unreadable: leave out files that cannot be decoded instead of stopping.
        names: N names relative to the folder of the data set, with "/"; None for sets without files.
        fingerprints: (N,) int64 digests of the files' content; None for sets without files.
    """

    def __init__(
        self,
        targets,
        images=None,
        files=None,
        size=0,
        workers=0,
        skip_unreadable=False,
        names=None,
        fingerprints=None,
    ):
        self.targets = torch.as_tensor(targets, dtype=torch.int64)
        self.images = images
        self.files = files
        self.size = size
        self.workers = workers
        self.skip_unreadable = skip_unreadable
        self.names = names
        self.fingerprints = fingerprints

    @property
    def in_memory(self):
        return self.images is not None

    def __len__(self):
        return len(self.targets)

    def _with(self, targets, images, files, names, fingerprints):
        """A set of the same kind that holds these images."""
        return ImageSet(
            targets, images, files, self.size, self.workers, self.skip_unreadable, names, fingerprints
        )

    def subset(self, indices):
        """The images at these positions, in this order, as a new set."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        tensors = [t if t is None else t[indices] for t in (self.targets, self.images, self.fingerprints)]
        lists = [x if x is None else [x[i] for i in indices.tolist()] for x in (self.files, self.names)]
        return self._with(tensors[0], tensors[1], *lists, tensors[2])

    def to(self, device):
        """The same set with its tensors on the device."""
        images = self.images.to(device) if self.in_memory else None
        return self._with(self.targets.to(device), images, self.files, self.names, self.fingerprints)

    def extended(self, other):
        """This set followed by ``other``, which holds images of the same kind."""
        targets = torch.cat([self.targets, other.targets])
        images = torch.cat([self.images, other.images]) if self.in_memory else None
        files = None if self.in_memory else self.files + other.files
        names = fingerprints = None
        if self.fingerprints is not None and other.fingerprints is not None:
            names = self.names + other.names
            fingerprints = torch.cat([self.fingerprints, other.fingerprints])
        return self._with(targets, images, files, names, fingerprints)


@dataclass
class Dataset:
    """A data set, split for semi-supervised learning."""

    name: str
    classes: list  # names, in the order of the targets
    mean: list  # per channel, of images / 255; for points 0
    std: list  # per channel, of images / 255; for points 1
    flip: bool  # whether a mirrored image keeps its class
    size: int  # pixels, height and width; 0 for points
    crop: str  # "pad": random crops after padding; "none": the workers already crop, or points
    labeled: ImageSet | None  # None, as the next two, where only the test set was asked for
    unlabeled: ImageSet | None  # every training image, validation images excepted
    val: ImageSet | None
    test: ImageSet
    labeled_indices: list  # positions of the labelled images in the training set
    val_indices: list = field(default_factory=list)  # and of the validation images
    path: str = ""  # where the files lie, absolute; "" for data sets without a folder
    notes: list = field(default_factory=list)  # sentences for the user about what was found

    @property
    def num_classes(self):
        return len(self.classes)

    def record(self):
        """What a checkpoint keeps of its data, so that no later command can confuse them.

        Returns:
            dict of plain values and tensors: "name", "classes", "mean", "std", "size", "crop", "path";
            "labeled", "val", "test": for a folder lists of names relative to it, for other data sets int64
            positions (of the test set: how many); "labeled_prints", "labeled_targets", "val_prints",
            "val_targets": for a folder (N,) int64 fingerprints and classes of these images; "trained",
            "tested": for a folder (N,) int64 fingerprints of the images that the networks learn from or are
            chosen by, and of the test images.
        """
        content = {
            "name": self.name,
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "size": self.size,
            "crop": self.crop,
            "path": self.path,
        }
        if self.labeled.names is None:
            content |= {"labeled": torch.tensor(self.labeled_indices), "test": len(self.test)}
            return content | {"val": torch.tensor(self.val_indices) if self.val else None}
        for kind, part in (("labeled", self.labeled), ("val", self.val or self.labeled.subset([]))):
            content |= {f"{kind}_prints": part.fingerprints, f"{kind}_targets": part.targets}
        learned = [part for part in (self.labeled, self.unlabeled, self.val) if part is not None]
        return content | {
            "labeled": self.labeled.names,
            "val": self.val.names if self.val else None,
            "test": self.test.names,
            "trained": torch.cat([part.fingerprints for part in learned]).unique(),
            "tested": self.test.fingerprints,
        }


class _Source(NamedTuple):
    """What a reader returns: a data set before it is split."""

    classes: list
    mean: tuple
    std: tuple
    flip: bool
    size: int
    crop: str
    train: ImageSet | None  # None where only the test set was asked for
    test: ImageSet
    notes: tuple = ()
    unlabeled: ImageSet | None = None  # further images to learn from without their labels


# ------------------------------------------------------------------------------------------ load_dataset


def load_dataset(
    name,
    data_path="data",
    *,
    num_labeled,
    num_val=0,
    seed=0,
    resize=None,
    labeled_indices=None,
    unlabeled_path=None,
    unlabeled_mode="add",
    test_fraction=0.2,
    workers=2,
    skip_unreadable=False,
    svhn_extra=False,
    record=None,
    only_test=False,
):
    """Read a data set and split its training images into labelled, unlabelled and validation images.

    Args:
        name: one of ``NAMES``.
        data_path: folder that holds the data; downloads go there.
        num_labeled: labelled images over all classes (a count, also as a string), or a fraction of every
            class (``0.03``). Not used with ``labeled_indices``.
        num_val: further labelled images, held out from the training images for choosing among models;
            a count or a fraction.
        seed: of the split. Points, test sets and the test part of a folder are the same for every seed.
        resize: pixels, height and width of the images (default: 16 for digits, 32 for CIFAR and SVHN, 96 for
            STL-10, 224 for ImageNet, for a folder the size of its images up to 64, else 224).
        labeled_indices: file of the labelled images, as written by ``write_labeled``.
        unlabeled_path: any tree of images without classes, added to the unlabelled set
            (``unlabeled_mode="add"``) or in its place (``"only"``). Test and validation images in it are
            left out.
        test_fraction: part of every class that is set aside for testing when a folder has no ``test``.
        workers: threads that read images into memory, or DataLoader processes that decode them.
        skip_unreadable: leave out, with a line on standard error, images that cannot be decoded.
        svhn_extra: SVHN: its 531,131 ``extra`` images are unlabelled ones, as in the paper.
        record: ``Dataset.record()`` of a run that goes on or is evaluated: classes, statistics, labelled,
            validation and test images are those of the run. Checkpoints of earlier versions recorded no
            images: they are then drawn as those versions drew them.
        only_test: read the test set alone; no labels are drawn. A folder without ``test`` that holds none of
            the run's images is a test set as a whole.

    Raises:
        UserError: data that is not there, cannot be split as asked, or is not that of the record; test
            images that the run of the record was trained on.
    """
    if name not in NAMES:
        raise UserError(f"data set '{name}' is not known: use one of {', '.join(NAMES)}")
    if seed < 0:
        raise UserError(f"seed {seed} is negative: use 0 or more")
    if resize is not None and resize < 1:
        raise UserError(f"images cannot be resized to {resize} pixels: use 1 or more")
    if unlabeled_mode not in ("add", "only"):
        raise UserError(f"mode '{unlabeled_mode}' of the unlabelled images is not known: use add or only")

    if name == "twomoons":
        source = _two_moons()
    elif name == "digits":
        source = _digits(resize or 16)
    elif name == "folder":
        source = _folder(data_path, resize, test_fraction, workers, skip_unreadable, record, only_test)
    elif name == "imagenet":
        source = _imagenet(data_path, resize or 224, workers, skip_unreadable)
    else:
        source = _torchvision(name, data_path, resize, svhn_extra)
    if record and list(source.classes) != list(record["classes"]):
        raise UserError(
            f"the classes of {name} are {_listed(source.classes)}, "
            f"those of the run {_listed(record['classes'])}"
        )
    described = record or {"mean": source.mean, "std": source.std}
    dataset = Dataset(
        name=name,
        classes=list(source.classes),
        mean=list(described["mean"]),
        std=list(described["std"]),
        flip=source.flip,
        size=source.size,
        crop=source.crop,
        labeled=None,
        unlabeled=None,
        val=None,
        test=source.test,
        labeled_indices=[],
        path=os.path.abspath(data_path) if name not in ("twomoons", "digits") else "",
        notes=list(source.notes),
    )
    if record and "tested" in record and source.test.fingerprints is not None:
        before, now = record["tested"], source.test.fingerprints
        if not torch.equal(before.sort().values, now.sort().values):
            dataset.notes.append(
                f"{len(now):,} test images, {int(torch.isin(now, before).sum()):,} of them among the "
                f"{len(before):,} that the run was measured on"
            )
    if only_test:
        return dataset

    train = source.train
    if record and "labeled" in record:
        labeled, val = recorded_images(record, train, data_path)
        if labeled_indices is not None and read_labeled(labeled_indices, train, source.classes) != labeled:
            raise UserError(
                f"{labeled_indices} lists other labelled images than the {len(labeled)} that the run has "
                "learned from: leave --labeled-indices out, or start a new run"
            )
    else:
        given = None
        if labeled_indices is not None:
            given = read_labeled(labeled_indices, train, source.classes)
        labeled, val = split_labels(
            train.targets,
            num_labeled,
            num_val,
            len(source.classes),
            seed,
            classes=source.classes,
            labeled=given,
            names=train.names if record is None else None,
        )
    dataset.labeled_indices, dataset.val_indices = labeled, val
    dataset.labeled = train.subset(labeled)
    dataset.val = train.subset(val) if val else None
    dataset.unlabeled = train
    if val:
        dataset.unlabeled = train.subset(np.setdiff1d(np.arange(len(train)), val))
    if source.unlabeled is not None:
        dataset.unlabeled = dataset.unlabeled.extended(source.unlabeled)
    if unlabeled_path is not None:
        extra = _unlabeled_images(unlabeled_path, dataset, train, workers, skip_unreadable)
        dataset.unlabeled = dataset.unlabeled.extended(extra) if unlabeled_mode == "add" else extra
    dataset.notes += _class_sizes(train.targets, source.classes)
    if record and train.names is not None and "trained" in record:
        before, now = record["trained"], dataset.record()["trained"]
        if not torch.equal(before, now):
            dataset.notes.append(
                f"the images to learn from are not those that the run began with: {len(before):,} different "
                f"ones then, {len(now):,} now"
            )
    return dataset


def recorded_images(record, train, path):
    """Positions in the training set of the labelled and the validation images of a run, two sorted lists.

    Raises:
        UserError: one of them is not there any more, or is another image now.
    """
    if train.names is None:
        positions = [[] if record[kind] is None else record[kind].tolist() for kind in ("labeled", "val")]
        if max(positions[0] + positions[1]) >= len(train):
            raise UserError(
                f"'{path}' has {len(train)} training images, fewer than when the run was started: give the "
                "same data"
            )
        return positions
    here = {}
    for i, key in enumerate(zip(train.fingerprints.tolist(), train.targets.tolist(), strict=True)):
        here.setdefault(key, []).append(i)
    found = []
    for kind in ("labeled", "val"):
        names, positions, gone = record[kind] or [], [], []
        keys = zip(record[f"{kind}_prints"].tolist(), record[f"{kind}_targets"].tolist(), strict=True)
        for name, key in zip(names, keys, strict=True):
            same = here.get(key, [])  # copies of one image: the one that is still called so, or any
            same.sort(key=lambda i: train.names[i] != name, reverse=True)
            positions.append(same.pop()) if same else gone.append(name)
        if gone:
            raise UserError(
                f"{len(gone)} of the run's {len(names)} {'labelled' if kind == 'labeled' else 'validation'} "
                f"images are not among the training images of '{path}' any more, under this or another name, "
                f"such as {gone[0]}: put them back, or give the folder that the run was started with"
            )
        found.append(sorted(positions))
    return found


def _class_sizes(targets, classes):
    """The lines about the classes: how many training images each has, and a warning if plainly unequal."""
    sizes = np.bincount(targets, minlength=len(classes)).tolist()
    shown = ", ".join(f"{name}: {size:,}" for name, size in list(zip(classes, sizes, strict=True))[:10])
    lines = [f"training images of {len(classes)} classes: {shown}" + ", …" * (len(classes) > 10)]
    if max(sizes) > 2 * min(sizes):
        most, least = classes[int(np.argmax(sizes))], classes[int(np.argmin(sizes))]
        lines.append(
            f"the classes are unequal: '{most}' has {max(sizes):,} training images, '{least}' "
            f"{min(sizes):,}. Look at the mean over classes beside top-1; --align assumes equal classes; a "
            "count of labels is drawn evenly, a fraction in proportion"
        )
    return lines


def _listed(classes):
    """Class names for a message: up to ten of them, and how many."""
    return f"{', '.join(map(str, classes[:10]))}{', …' * (len(classes) > 10)} ({len(classes)})"


# --------------------------------------------------------------------------------------------- the split


def split_labels(targets, num_labeled, num_val, num_classes, seed, *, classes=None, labeled=None, names=None):
    """Draw the labelled and the validation images, class by class.

    Args:
        targets: (N,) classes of the training images, 0 to num_classes - 1.
        num_labeled, num_val: counts, divided evenly over the classes; or fractions of every class, rounded,
            at least one image each. The count N, or the fraction 1.0 (less validation), takes every image.
        seed: of ``numpy.random.RandomState``, whose streams are frozen: a split never changes.
        classes: names for messages.
        labeled: positions that are labelled already: only the validation images are drawn.
        names: N names of files; the order in which a class is drawn then depends on the seed and on each
            image's own name, not on which others there are.

    Returns:
        Two sorted lists of positions without overlap: labelled, validation. The labelled images do not
        depend on num_val, and those of a smaller count are among those of a larger one.

    Raises:
        UserError: a count that does not divide, or a class with too few images.
    """
    targets = np.asarray(targets)
    classes = classes or [str(k) for k in range(num_classes)]
    sizes = np.bincount(targets, minlength=num_classes).tolist()
    per_val = _per_class(num_val, sizes, "--num-val", classes)
    if labeled is None:
        per_label = _per_class(num_labeled, sizes, "--num-labeled", classes)
        if isinstance(_number(num_labeled, "--num-labeled"), float):  # a fraction makes room for validation
            per_label = [
                min(n, max(1, size - v)) for n, size, v in zip(per_label, sizes, per_val, strict=True)
            ]
        if sum(per_label) == 0:
            raise UserError(f"--num-labeled {num_labeled} leaves no labels: use at least {num_classes}")
    else:
        labeled = np.asarray(labeled)
        per_label = np.bincount(targets[labeled], minlength=num_classes).tolist()
    for name, size, n, v in zip(classes, sizes, per_label, per_val, strict=True):
        if size == 0:
            raise UserError(f"class '{name}' has no training images: add some or remove the class")
        if n + v > size:
            raise UserError(
                f"class '{name}' has {size} training images, too few for {n} labelled and {v} validation "
                "images: lower --num-labeled or --num-val, or add images"
            )

    random = np.random.RandomState(seed)
    chosen, val = [], []
    for k in range(num_classes):
        members = np.flatnonzero(targets == k)
        if names is None:
            order = random.permutation(members)
        else:
            order = np.array(sorted(members, key=lambda i: place_of(f"{seed}/{names[i]}")), dtype=np.int64)
        taken = order[: per_label[k]] if labeled is None else order[np.isin(order, labeled)]
        rest = order[np.isin(order, taken, invert=True)]
        chosen += taken.tolist()
        val += rest[: per_val[k]].tolist()
    return sorted(chosen), sorted(val)


def _per_class(number, sizes, flag, classes):
    """How many images of each class a count or a fraction means, as a list of int."""
    number = _number(number, flag)
    if isinstance(number, float):
        return [min(size, max(1, int(number * size + 0.5))) for size in sizes]
    if number == sum(sizes):
        return list(sizes)
    each, remainder = divmod(number, len(sizes))
    if remainder:
        near = [n for n in (each * len(sizes), (each + 1) * len(sizes)) if n > 0]
        raise UserError(
            f"{flag} {number} does not divide by the {len(sizes)} classes ({', '.join(classes[:10])}): use "
            + " or ".join(map(str, near))
            + (", or a fraction of every class such as 0.1" if flag == "--num-labeled" else "")
        )
    return [each] * len(sizes)


def _number(value, flag):
    """A count as int, a fraction as float, from a number or a string; ``1`` is a count, ``1.0`` is not."""
    try:
        number = value if isinstance(value, float) else int(value)
    except (TypeError, ValueError):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
    if number < 0 or (isinstance(number, float) and not 0 < number <= 1):
        raise UserError(f"{flag} {value} is neither a count nor a fraction: use e.g. 4000 or 0.1")
    return number


def place_of(name):
    """A number in [0, 1), evenly spread, that depends on a name alone: the same on every machine."""
    # a Mac writes an accent as a letter of its own, others do not
    key = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64


def labeled_file(dataset):
    """The name of the file that lists a run's labelled images: names of a folder's files, or positions."""
    return "labeled_indices.txt" if dataset.labeled.names is None else "labeled.txt"


def write_labeled(folder, dataset):
    """Write which images are labelled, one per line, for ``load_dataset(labeled_indices=file)``.

    Raises:
        UserError: the file cannot be written.
    """
    lines = dataset.labeled_indices if dataset.labeled.names is None else dataset.labeled.names
    text = "".join(f"{line}\n" for line in lines)
    path = os.path.join(folder, labeled_file(dataset))
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def read_labeled(path, train, classes):
    """Sorted positions of the labelled images, from a file of one name (folders) or position per line.

    Raises:
        UserError: no such file, a line that is no image of the training set, an image given twice, or a
            class without a labelled image.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the labelled images from {path}: {_reason(error)}") from error
    position = {name: i for i, name in enumerate(train.names or map(str, range(len(train))))}
    expected = f"a position in the training set, 0 to {len(train) - 1}"
    if train.names:
        expected = f"the name of a training image, such as {train.names[0]}"
    indices = []
    for number, line in enumerate(lines, start=1):
        line = line.rstrip("\r") if train.names else line.strip()
        if not line:
            continue
        if line not in position:
            raise UserError(f"line {number} of {path} is '{line[:40]}': it must be {expected}")
        indices.append(position[line])
    if len(set(indices)) < len(indices):
        twice = next(index for index in indices if indices.count(index) > 1)
        twice = train.names[twice] if train.names else f"position {twice}"
        raise UserError(f"{path} names {twice} twice: leave one of the two lines")
    labelled = np.bincount(np.asarray(train.targets)[indices], minlength=len(classes))
    if not labelled.all():
        missing = classes[int(labelled.argmin())]
        raise UserError(f"{path} has no image of class '{missing}': add at least one of each class")
    return sorted(indices)


# -------------------------------------------------------------------------- data sets that need no files


def _two_moons():
    """Two interleaved half circles, 2 x 1,000 points for training and for testing, Gaussian noise of 0.1.

    Both axes are scaled to mean 0 and standard deviation 1 over the training points.
    """

    def points(seed):
        angle = np.linspace(0, math.pi, 1000)
        upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], axis=1)
        noise = np.random.RandomState(seed).normal(scale=0.1, size=(2000, 2))
        return np.concatenate([upper, lower]) + noise

    def scaled(values):
        values = (values - train.mean(axis=0)) / train.std(axis=0)
        return ImageSet(np.repeat([0, 1], 1000), torch.from_numpy(values.astype(np.float32)))

    train = points(0)
    return _Source(
        ["upper moon", "lower moon"],
        (0.0, 0.0),
        (1.0, 1.0),
        False,
        0,
        "none",
        train=scaled(train),
        test=scaled(points(1)),
    )


def _digits(size):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels: 1,297 for training, 500 for testing."""
    from sklearn.datasets import load_digits

    values, targets = load_digits(return_X_y=True)  # (1797, 64) in 0..16
    order = np.random.RandomState(0).permutation(len(targets))
    images = torch.from_numpy(values[order]).float().view(-1, 1, 8, 8) * (255 / 16)
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).repeat(1, 3, 1, 1)
    train, test = (ImageSet(targets[order[part]], images[part]) for part in (slice(1297), slice(1297, None)))
    mean, std = channel_statistics(train.images)
    return _Source([str(k) for k in range(10)], mean, std, False, size, "pad", train, test)


# ------------------------------------------------------------------------------------ torchvision's data sets


def _torchvision(name, data_path, size, svhn_extra=False):
    """CIFAR-10, CIFAR-100, SVHN or STL-10 as torchvision reads, checks and, on first use, downloads them.

    STL-10 brings 100,000 images without labels, SVHN 531,131 easier ones with labels (``svhn_extra``), which
    are learned from without them.
    """
    from torchvision import datasets

    make, title, archive = {
        "cifar10": (datasets.CIFAR10, "CIFAR-10", "cifar-10-python.tar.gz"),
        "cifar100": (datasets.CIFAR100, "CIFAR-100", "cifar-100-python.tar.gz"),
        "svhn": (datasets.SVHN, "SVHN", "train_32x32.mat and test_32x32.mat"),
        "stl10": (datasets.STL10, "STL-10", "stl10_binary.tar.gz"),
    }[name]
    choices = [{"train": True}, {"train": False}]
    if name in ("svhn", "stl10"):
        choices = [{"split": "train"}, {"split": "test"}]
        choices += [{"split": "unlabeled"}] if name == "stl10" else []
        if svhn_extra:
            choices += [{"split": "extra"}]
            archive = "train_32x32.mat, test_32x32.mat and extra_32x32.mat"

    try:
        try:
            parts = [make(data_path, download=False, **choice) for choice in choices]
        except RuntimeError:  # not there, or not with the right checksum
            with _alone(data_path):
                parts = [make(data_path, download=True, **choice) for choice in choices]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{title} is not in '{data_path}', or damaged, and could not be downloaded ({_reason(error)}): "
            f"put {archive} into that folder, or use --dataset digits or twomoons, which need no download, "
            "or --dataset folder with your own images"
        ) from error

    sets = []
    for part in parts:
        images = torch.from_numpy(part.data)
        images = (images.permute(0, 3, 1, 2) if name.startswith("cifar") else images).contiguous()
        if size not in (None, images.shape[-1]):
            images = torch.cat([_resized(chunk, size) for chunk in images.split(1000)])
        sets.append(ImageSet(part.targets if name.startswith("cifar") else part.labels, images))
    classes = [str(k) for k in range(10)] if name == "svhn" else parts[0].classes
    statistics = STATISTICS.get(name) or channel_statistics(sets[0].images)
    size = sets[0].images.shape[-1]
    unlabeled = sets[2] if len(sets) > 2 else None
    return _Source(classes, *statistics, name != "svhn", size, "pad", *sets[:2], unlabeled=unlabeled)


def _resized(images, size):
    """(N, 3, H, W) uint8 images at ``size`` x ``size``, bicubic with antialiasing."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True)


@contextlib.contextmanager
def _alone(folder):
    """Hold a lock file in the folder, so that of several processes one downloads and the others wait."""
    try:
        import fcntl

        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".download.lock"), "w")  # noqa: SIM115 (closed below)
    except (ImportError, OSError):  # no such locks here, or a folder that cannot be written to
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# -------------------------------------------------------------------------------------- folders of images


class _Listing(NamedTuple):
    """Image files that were found, not read yet."""

    files: list  # N paths
    targets: np.ndarray  # (N,) classes, -1 where not known
    names: list | None = None  # N names relative to the data path
    fingerprints: torch.Tensor | None = None  # (N,) int64

    def subset(self, chosen):
        """The files where ``chosen`` (N,) is true."""
        indices = np.flatnonzero(chosen)
        names = None if self.names is None else [self.names[i] for i in indices]
        fingerprints = None if self.fingerprints is None else self.fingerprints[torch.from_numpy(indices)]
        return _Listing([self.files[i] for i in indices], self.targets[indices], names, fingerprints)

    def on_disk(self, size, workers, skip_unreadable):
        """The images as an ``ImageSet`` that is decoded by workers."""
        names, fingerprints = self.names, self.fingerprints
        return ImageSet(self.targets, None, self.files, size, workers, skip_unreadable, names, fingerprints)


def _imagenet(data_path, size, workers, skip_unreadable):
    """ImageNet in torchvision's layout: ``train/<class>/*`` and ``val/<class>/*``, decoded by workers."""
    for part in ("train", "val"):
        if not os.path.isdir(os.path.join(data_path, part)):
            raise UserError(
                f"'{data_path}' has no folder '{part}': --dataset imagenet needs train/ and val/ with one "
                "folder per class in each"
            )
    classes, (train, test), notes = _class_folders(data_path, "val")
    train, test = (
        part._replace(names=None).on_disk(size, workers, skip_unreadable) for part in (train, test)
    )
    return _Source(classes, *STATISTICS["imagenet"], True, size, "none", train, test, notes)


def _folder(data_path, resize, test_fraction, workers, skip_unreadable, record=None, only_test=False):
    """Any folder of class folders: ``train/`` with ``test/`` or ``val/``, or one level that is split here.

    ``val/`` stands in for a missing ``test/``; validation images are drawn from the training images.
    Images of one size up to 64 pixels, or ``resize`` up to 64, are held in memory, each the whole image,
    stretched to a square where it is none. Others are decoded by workers, ``resize`` or 224 pixels.
    """
    if not os.path.isdir(data_path):
        raise UserError(f"there is no folder '{data_path}': give the folder of your images with --data-path")
    test_name = next((p for p in ("test", "val") if os.path.isdir(os.path.join(data_path, p))), None)
    has_train = os.path.isdir(os.path.join(data_path, "train"))
    if test_name and not has_train and not only_test:
        raise UserError(f"'{data_path}' has {test_name}/ but no train/: add the folder of training images")
    if has_train and test_name is None:
        raise UserError(
            f"'{data_path}' has train/ but neither test/ nor val/: add one of them, or give "
            f"'{os.path.join(data_path, 'train')}' itself to have it split"
        )
    classes, parts, notes = _class_folders(data_path, test_name, record and record["classes"], only_test)
    parts = [part and part._replace(fingerprints=fingerprints(part.files, workers)) for part in parts]
    if test_name is None:
        parts, more = _split_folder(parts[0], data_path, classes, test_fraction, record, only_test)
        notes += more
    train, test = parts
    if record and "trained" in record:
        _refuse_trained(test, record, data_path)
    elif train and not record:
        twins = torch.isin(test.fingerprints, train.fingerprints)
        if twins.any():
            name = test.names[int(twins.int().argmax())]
            notes.append(
                f"{int(twins.sum())} of {len(twins)} test images are among the training images too, such as "
                f"{name}: the accuracy will be too high by them"
            )
    notes += [_sizes(test if only_test else train)]
    if resize is None or resize <= SMALL:
        read = _read_images(train or test, resize, workers, skip_unreadable)
        if read is not None:
            size, test_set = read.images.shape[-1], read
            if not only_test:
                test_set = _read_images(test, size, workers, skip_unreadable)
            statistics = (None, None) if record else channel_statistics(read.images)
            return _Source(classes, *statistics, True, size, "pad", read, test_set, tuple(notes))
    size = resize or 224
    sets = [part and part.on_disk(size, workers, skip_unreadable) for part in (train, test)]
    statistics = (
        (None, None) if record else channel_statistics(_sample(train, 1000, workers, skip_unreadable))
    )
    return _Source(classes, *statistics, True, size, "none", *sets, tuple(notes))


def _split_folder(found, root, classes, test_fraction, record, only_test):
    """A folder without ``test``: [training listing or None, test listing], and lines for the user.

    An image's side depends on its own name, class folder included, so that adding or removing others moves
    none. With the record of a run its images keep their side, whatever they are called now.
    """
    if not 0 < test_fraction < 1:
        raise UserError(f"--test-fraction {test_fraction} leaves no images to train or to test: use e.g. 0.2")
    if record and "labeled" not in record:
        train, test = _split_as_before(found, classes, test_fraction)
        return [None if only_test else train, test], []
    if record and "trained" not in record:  # the run was not one on a folder
        return [None, found], []
    testing = np.array([place_of(name) < test_fraction for name in found.names], dtype=bool)
    if record:
        trained = torch.isin(found.fingerprints, record["trained"]).numpy()
        tested = torch.isin(found.fingerprints, record["tested"]).numpy()
        names = set(record["test"])
        named = np.array([name in names for name in found.names], dtype=bool)
        known = torch.isin(torch.cat([record["trained"], record["tested"]]), found.fingerprints)
        moved = known.float().mean() > 0.5  # the run's folder in another place, not one that shares an image
        if only_test and not moved and os.path.abspath(root) != record["path"]:
            return [None, found], [f"'{root}' is not the run's folder: all of its images are test images"]
        testing = (tested & named) | (~trained & (tested | testing))
    train, test = found.subset(~testing), found.subset(testing)
    lines = []
    if not only_test:
        counts = np.bincount(test.targets, minlength=len(classes))
        missing = [name for name, count in zip(classes, counts, strict=True) if count == 0]
        if missing:
            lines.append(
                f"no test image of these classes came out: {_listed(missing)}; a larger --test-fraction or a "
                "folder test/ helps"
            )
    if not len(test.files):
        raise UserError(
            f"none of the {len(found.files)} images in '{root}' came out as a test image: raise "
            "--test-fraction or add a folder test/"
        )
    return [None if only_test else train, test], lines


def _split_as_before(found, classes, test_fraction):
    """The split by position of earlier versions, for the checkpoints that they wrote."""
    test, random = [], np.random.RandomState(0)
    for k in range(len(classes)):
        order = random.permutation(np.flatnonzero(found.targets == k))
        test += order[: min(len(order) - 1, max(1, int(test_fraction * len(order) + 0.5)))].tolist()
    testing = np.isin(np.arange(len(found.files)), test)
    return [found.subset(~testing), found.subset(testing)]


def _refuse_trained(test, record, root):
    """UserError where the run of the record has learned from an image that is to test it."""
    learned = torch.isin(test.fingerprints, record["trained"])
    learned &= ~torch.isin(test.fingerprints, record["tested"])
    if learned.any():
        raise UserError(
            f"{int(learned.sum())} of the {len(learned)} test images in '{root}' were trained on by this "
            f"run, such as {test.names[int(learned.int().argmax())]}: test it on other images"
        )


def _unlabeled_images(path, dataset, train, workers, skip_unreadable):
    """The images of a tree without classes as an ImageSet of the same kind as the training set.

    Images of the test and of the validation set are left out: of a folder those with the same content, of
    other data sets in memory those with the same pixels.
    """
    if dataset.size == 0:
        raise UserError("two moons are points: --unlabeled-path needs a data set of images")
    if not os.path.isdir(path):
        raise UserError(f"there is no folder '{path}' of unlabelled images: correct --unlabeled-path")
    files = [found for found, _ in _image_files(path, _ancestors(path), Counter())]
    held_out = [part for part in (dataset.test, dataset.val) if part is not None]
    names = [os.path.relpath(file, path).replace(os.sep, "/") for file in files]
    listing = _Listing(files, np.full(len(files), -1), names, fingerprints(files, workers))
    known = [0]
    if not train.in_memory or train.names is not None:
        seen = [x.fingerprints if x.names else fingerprints(x.files, workers) for x in held_out]
        known = torch.isin(listing.fingerprints, torch.cat(seen)).numpy()
        listing = listing.subset(~known)
    if files and not listing.files:
        raise UserError(f"all images in '{path}' are test or validation images: correct --unlabeled-path")
    if not files:
        raise UserError(
            f"there are no images in '{path}': --unlabeled-path needs image files ({_suffixes()})"
        )
    if not train.in_memory:
        extra = listing.on_disk(dataset.size, workers, skip_unreadable)
    else:
        extra = _read_images(listing, dataset.size, workers, skip_unreadable)
        if train.names is None:
            seen = {image.numpy().tobytes() for part in held_out for image in part.images}
            known = np.array([image.numpy().tobytes() in seen for image in extra.images])
            extra = extra.subset(np.flatnonzero(~known))
    if sum(known):
        dataset.notes.append(
            f"{sum(known)} of {len(files)} images in '{path}' are test or validation images: left out"
        )
    return extra


PARTS = ("train", "test", "val")


def _class_folders(root, test_name, classes=None, only_test=False):
    """Class names, the listings of training and test images, and lines for the user.

    With ``test_name`` the two come from ``root/train`` (not with ``only_test``) and ``root/<test_name>``;
    without it the first holds all images of ``root``. ``classes``: those of a run, which others must not
    extend.

    Raises:
        UserError: no class folders, an unknown class, no images, or a file in two classes.
    """
    places = {"train": os.path.join(root, "train"), "test": test_name and os.path.join(root, test_name)}
    if test_name is None:
        places["train"] = root
    if only_test and test_name:
        places["train"] = None
    first = places["train"] or places["test"]
    known = list(classes) if classes else _class_names(first)
    for place in filter(None, places.values()):
        unknown = sorted(set(_class_names(place, at_least=1)) - set(known))
        if unknown and classes:
            raise UserError(f"class '{unknown[0]}' of '{place}' is not one of the run's: {_listed(known)}")
        if unknown:
            raise UserError(f"class '{unknown[0]}' of '{place}' has no folder in '{first}': add or remove it")
    ignored, owner, parts = Counter(), {}, []
    for place in places.values():
        parts.append(place and _list_classes(place, known, root, ignored, owner))
    lines = []
    if ignored:
        kinds = ", ".join(f"{kind} {count}" for kind, count in ignored.most_common())
        photographs = ignored.keys() & {".heic", ".heif", ".avif", ".raw", ".cr2", ".nef", ".arw", ".dng"}
        advice = (
            " (photographs among them, which cannot be read: convert them to JPEG)" if photographs else ""
        )
        lines.append(f"{sum(ignored.values())} ignored: {kinds}{advice}")
    named = [name for name in known if name.lower() in PARTS and name not in PARTS]
    how = "the parts of a data set are found by the names train, test and val in small letters"
    if named and len(named) == len(known):
        raise UserError(f"the folders of '{root}' are {_listed(named)}: {how}")
    lines += [f"the folder '{name}' in '{root}' is taken for a class: {how}" for name in named]
    return known, parts, lines


def _class_names(root, at_least=2):
    """Sorted names of the folders in ``root``, hidden ones excepted."""
    names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not _ignored(e.name))
    if not names:
        raise UserError(
            f"there are no class folders in '{root}': put the images of each class into a folder there"
        )
    if len(names) < at_least:
        raise UserError(f"'{root}' has only one class folder, '{names[0]}': at least 2 classes are needed")
    return names


def _list_classes(place, classes, root, ignored, owner):
    """The listing of all images below ``place/<class>``, in the order of class and path.

    Args:
        root: names are relative to it.
        ignored: Counter of what is left out, by type; grows.
        owner: the class of every file seen so far, by its identity; grows.
    """
    files, targets, outside = [], [], _ancestors(place)
    for k, name in enumerate(classes):
        folder = os.path.join(place, name)
        for path, identity in _image_files(folder, outside, ignored) if os.path.isdir(folder) else ():
            other, first = owner.setdefault(identity, (k, path)) if identity else (k, path)
            if other != k:
                raise UserError(
                    f"{path} is the same file as {first}, in the classes '{name}' and '{classes[other]}': "
                    "remove one of them, or the link that leads there"
                )
            files.append(path)
            targets.append(k)
    if not files:
        raise UserError(
            f"there are no images in the class folders of '{place}': files must end in {_suffixes()}"
        )
    names = [os.path.relpath(path, root).replace(os.sep, "/") for path in files]
    return _Listing(files, np.array(targets), names)


def _ancestors(folder):
    """Identities of a folder and of all that it lies in: links to them lead in circles."""
    parents, path = set(), os.path.realpath(folder)
    while True:
        status = os.stat(path)
        parents.add((status.st_dev, status.st_ino))
        if path == os.path.dirname(path):
            return parents
        path = os.path.dirname(path)


def _image_files(root, outside, ignored):
    """Sorted (path, identity) of all image files at any depth below ``root``; hidden ones are left out.

    Links are followed, but each real folder is visited once, and none of ``outside``. A link that leads
    nowhere is listed without identity, so that reading it names it.

    Args:
        ignored: Counter of the files that are left out, by suffix or kind; grows.
    """
    found, visited = [], set(outside)

    def visit(folder):
        device = os.stat(folder).st_dev
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            if _ignored(entry.name):
                continue
            identity = device, entry.inode()
            if entry.is_symlink():
                status = os.stat(entry.path) if os.path.exists(entry.path) else None
                identity = status and (status.st_dev, status.st_ino)
            if identity and entry.is_dir():
                if identity not in visited:
                    visited.add(identity)
                    visit(entry.path)
            elif not entry.name.lower().endswith(IMAGE_SUFFIXES):
                ignored[os.path.splitext(entry.name)[1].lower() or "without suffix"] += 1
            elif "\n" in entry.name:
                raise UserError(f"the file name {entry.path!r} holds a line break: rename it")
            elif identity is None or entry.is_file():
                found.append((entry.path, identity))
            else:
                ignored["not a regular file"] += 1

    try:
        visit(root)
    except OSError as error:
        raise UserError(f"the folder {error.filename} cannot be read: {_reason(error)}") from error
    return sorted(found)


def _ignored(name):
    """Hidden files and folders, and what archives from a Mac bring along."""
    return name[0] == "." or name == "__MACOSX"


def fingerprints(files, workers=1):
    """(N,) int64 digests of the files' content: equal for copies, whatever they are called.

    Of files above 128 KiB three pieces of 32 KiB and the size. Files that cannot be read get their path's.
    """
    piece = 2**15

    def digest(path):
        taken = hashlib.blake2b(digest_size=8)
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                taken.update(size.to_bytes(8, "big"))
                for start in (0,) if size <= 4 * piece else (0, size // 2, size - piece):
                    file.seek(start)
                    taken.update(file.read(4 * piece if size <= 4 * piece else piece))
        except OSError:
            taken.update(os.fsencode(path))
        return int.from_bytes(taken.digest(), "big", signed=True)

    with ThreadPoolExecutor(max(1, workers)) as pool:
        chunks = [files[i : i + 256] for i in range(0, len(files), 256)]
        digests = [value for part in pool.map(lambda chunk: [*map(digest, chunk)], chunks) for value in part]
    return torch.tensor(digests, dtype=torch.int64)


def _sizes(listing):
    """The line about the sizes of a listing's images, from up to 200 of them."""
    sizes = list(
        filter(None, (_image_size(path) for path in listing.files[:: 1 + len(listing.files) // 200]))
    )
    if not sizes:
        return "no image could be opened to see its size"
    sizes.sort(key=lambda size: size[0] * size[1])
    least, most = (f"{width} × {height}" for width, height in (sizes[0], sizes[-1]))
    return f"images of {least} pixels" if least == most else f"images of {least} to {most} pixels"


def _suffixes():
    return ", ".join(IMAGE_SUFFIXES)


def channel_statistics(images):
    """Mean and standard deviation per channel of uint8 images / 255, over at most 10,000 of them.

    Args:
        images: (N, C, H, W) uint8.

    Returns:
        Two tuples of C floats. The images are evenly spaced, so that the result is the same in every run.
    """
    images = images[:: max(1, math.ceil(len(images) / 10000))]
    total, squares = torch.zeros(2, images.shape[1], dtype=torch.float64)
    for chunk in images.split(500):
        values = chunk.double() / 255
        total += values.sum(dim=(0, 2, 3))
        squares += values.square().sum(dim=(0, 2, 3))
    count = images.numel() / images.shape[1]
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=0).sqrt().clamp(min=1 / 255)  # images of one colour
    return tuple(mean.tolist()), tuple(std.tolist())


def _sample(listing, count, workers, skip_unreadable):
    """(n, 3, 64, 64) uint8: evenly spaced images of a listing, reduced, for their statistics."""
    every = max(1, math.ceil(len(listing.files) / count))
    chosen = listing.subset(np.arange(len(listing.files)) % every == 0)
    return _read_images(chosen, SMALL, workers, skip_unreadable).images


# --------------------------------------------------------------------------------------- reading image files

# What decoders raise on damaged files of one format or another.
_DAMAGE = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class _OtherSize(Exception):
    """An image that is not of the size of the first one."""


def _reason(error):
    """The first line of what an exception says, without a full stop."""
    error = getattr(error, "reason", error)  # of a failed download
    text = getattr(error, "strerror", None) or str(error)
    lines = text.strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def upright_rgb(image):
    """Decode an opened PIL image to RGB, turned as its EXIF orientation says.

    Grey, palette and CMYK images are converted, 16-bit grey is scaled to 8 bits, and transparent pixels
    become white.
    """
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip at 255
        image = Image.fromarray((np.asarray(image, np.float64) / 257).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == "RGB" else image.convert("RGB")


def read_image(path, size, crop):
    """One image as evaluation sees it: (3, size, size) uint8, the whole image, or its centre for large sets.

    Args:
        size, crop: as in the ``Dataset`` that a network was trained on.

    Raises:
        UserError: a file that cannot be decoded.
    """
    try:
        if crop == "none":
            return read_crop(path, size)
        return torch.from_numpy(np.array(_read_whole(path, size))).permute(2, 0, 1).contiguous()
    except _DAMAGE as error:
        raise UserError(_unreadable(path, error)) from error


def _read_whole(path, size, expected=None):
    """The whole image, stretched to a square: (size, size, 3) uint8 array.

    With ``expected`` = (width, height), an image of another size raises ``_OtherSize``.
    """
    with Image.open(path) as file:
        if expected is None:
            file.draft("RGB", (size, size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 where that is enough
        image = upright_rgb(file)
    if expected and image.size != expected:
        raise _OtherSize
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def _read_images(listing, size, workers, skip_unreadable):
    """Read all files into one uint8 tensor, by a pool of threads (decoding does not hold Python's lock).

    Args:
        listing: N files.
        size: pixels, height and width; None takes the size of the first image (of its longer side).

    Returns:
        ImageSet in memory, or None when ``size`` is None and the images are not of one size up to 64 pixels.
    """
    files, expected = listing.files, None
    if size is None:
        expected = next(filter(None, map(_image_size, files)), None)
        if expected is None or max(expected) > SMALL:
            return None
        size = max(expected)
    images = np.zeros((len(files), size, size, 3), np.uint8)
    readable = np.ones(len(files), bool)

    def read(start):
        for i in range(start, min(start + 256, len(files))):
            try:
                images[i] = _read_whole(files[i], size, expected)
            except _DAMAGE as error:
                if not skip_unreadable:
                    raise UserError(_unreadable(files[i], error)) from error
                readable[i] = False

    # Measured: small files spend their time in Python, and two threads are slower than one there.
    pool = ThreadPoolExecutor(1 if expected else max(1, workers))
    try:
        list(pool.map(read, range(0, len(files), 256)))
    except _OtherSize:
        return None
    finally:
        pool.shutdown(cancel_futures=True)
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    if not readable.all():
        skipped = [files[i] for i in np.flatnonzero(~readable)]
        _warn(f"skipped {len(skipped)} unreadable of {len(files)} images: {', '.join(skipped[:10])}")
        if not readable.any():
            raise UserError(
                f"none of {len(files)} images could be read, {files[0]} and so on: check the files"
            )
        images, listing = images[torch.from_numpy(readable)], listing.subset(readable)
    return ImageSet(
        listing.targets, images.contiguous(), names=listing.names, fingerprints=listing.fingerprints
    )


def _image_size(path):
    """(width, height) of an image that can be opened, turned upright; None if it cannot."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return image.size[::-1] if turned else image.size
    except _DAMAGE:
        return None


def _unreadable(path, error):
    return (
        f"the image {path} cannot be read ({_reason(error)}): replace or remove it, or leave out such files "
        "with --skip-unreadable"
    )


def _report(unreadable, image_set, skipped):
    """Stop at the first unreadable file, or say once per file that it is skipped.

    Args:
        unreadable: list of (position, message).
        skipped: set of the messages given so far; grows.
    """
    for _, message in unreadable:
        if not image_set.skip_unreadable:
            raise UserError(message)
        if message not in skipped:
            skipped.add(message)
            _warn(f"skipped, {len(skipped)} so far: {message}")


def _warn(text):
    print(text, file=sys.stderr)


# --------------------------------------------------------------------------------- crops of large images

CHUNK = 32  # images that a worker decodes at a time: large batches are spread over the workers


def random_crop_box(width, height, random):
    """A box of 8 to 100 % of the area and an aspect ratio of 3/4 to 4/3, the usual crop for ImageNet.

    Args:
        width, height: of the image, pixels.
        random: ``numpy.random.Generator``.

    Returns:
        (left, top, width, height) in whole pixels. Where ten draws do not fit, the largest centred box whose
        aspect ratio is permitted.
    """
    for _ in range(10):
        area = width * height * random.uniform(0.08, 1)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return int(random.integers(width - w + 1)), int(random.integers(height - h + 1)), w, h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    return (width - w) // 2, (height - h) // 2, w, h


def center_crop_box(width, height):
    """(left, top, width, height) of what is left after resizing the shorter side to 256 and cropping 224."""
    side = min(width, height) * 224 / 256
    return (width - side) / 2, (height - side) / 2, side, side


def read_crop(path, size, random=None):
    """Decode a box of an image file: (3, size, size) uint8 tensor, bicubic.

    The box is ``random_crop_box`` for training, ``center_crop_box`` without ``random``. A JPEG is decoded at
    1/2, 1/4 or 1/8 of its size where that leaves the box ``size`` pixels or more, and only the box is
    resized. PyTorch resizes uint8 tensors about three times as fast as Pillow, with the same filter.
    """
    with Image.open(path) as file:
        turned = file.getexif().get(ORIENTATION, 1) >= 5
        width, height = file.size[::-1] if turned else file.size
        if random is None:
            left, top, w, h = center_crop_box(width, height)
        else:
            left, top, w, h = random_crop_box(width, height, random)
        needed = math.ceil(width * size / w), math.ceil(height * size / h)
        file.draft("RGB", needed[::-1] if turned else needed)
        image = upright_rgb(file)
    x, y = image.width / width, image.height / height  # 1 unless the decoder has reduced the image
    left, right = round(left * x), round((left + w) * x)
    top, bottom = round(top * y), round((top + h) * y)
    box = np.array(image.crop((left, top, max(right, left + 1), max(bottom, top + 1))))
    return _resized(torch.from_numpy(box).permute(2, 0, 1)[None], size)[0]


class _Reader:
    """What DataLoader workers run: a list of (path, target, random key or None) in, decoded images out."""

    def __init__(self, size):
        self.size = size

    def __getitems__(self, requests):
        """(n, 3, size, size) uint8, (n,) int64, and a list of (position, message) of unreadable files."""
        images = torch.zeros(len(requests), 3, self.size, self.size, dtype=torch.uint8)
        images = images.contiguous(memory_format=torch.channels_last)  # as they are decoded
        unreadable = []
        for i, (path, _, key) in enumerate(requests):
            try:
                images[i] = read_crop(path, self.size, key and _random(*key))
            except _DAMAGE as error:
                unreadable.append((i, _unreadable(path, error)))
        return images, torch.tensor([target for _, target, _ in requests]), unreadable


def _chunks(requests):
    """A list of requests in pieces of at most CHUNK."""
    return [requests[i : i + CHUNK] for i in range(0, len(requests), CHUNK)]


def _unchanged(sample):
    return sample


def _leave_signals_to_parent(_):
    """A worker ends with the process that started it. A signal to all processes of a group is for that one,
    which still needs its workers to come to the end of a step, and save."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _decode(pieces, size, workers, device, ahead):
    """Iterator of what ``_Reader`` returns for every piece, decoding ``ahead`` pieces or more in advance."""
    return iter(
        torch.utils.data.DataLoader(
            _Reader(size),
            batch_sampler=pieces,
            collate_fn=_unchanged,
            num_workers=workers,
            prefetch_factor=max(2, math.ceil(ahead / workers)) if workers else None,
            pin_memory=device.type == "cuda",
            worker_init_fn=_leave_signals_to_parent,
            generator=torch.Generator(),  # else starting the workers would draw from the networks' generator
        )
    )


def _gather(decoded, count, device):
    """The next ``count`` decoded images and their targets, on the device, and the list of the unreadable."""
    images, targets, unreadable = [], [], []
    for start in range(0, count, CHUNK):
        piece = next(decoded)
        images.append(piece[0].to(device, non_blocking=True))
        targets.append(piece[1].to(device, non_blocking=True))
        unreadable += [(start + i, message) for i, message in piece[2]]
    return torch.cat(images).contiguous(), torch.cat(targets), unreadable


# ------------------------------------------------------------------------------------------------ training


def _random(*key):
    """A numpy Generator for a key of integers, 0 or more; different keys give independent streams."""
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def _to_device(array, device):
    """An array or tensor on the device; the host does not wait for the copy."""
    tensor = torch.as_tensor(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


LABELED, UNLABELED, CROPS, AUGMENTATION = range(4)  # first of all integers that a random key begins with


class _Stream:
    """An endless sequence of positions in a set of n: one shuffle of the set after another.

    Entry p is entry p % n of the permutation of epoch p // n, which is drawn from (seed, name, epoch) alone.
    Permutations are made for ``ahead`` entries or more at a time, so that they seldom go to the device.
    """

    def __init__(self, n, name, seed, ahead, device):
        self.n, self.name, self.seed, self.device = n, name, seed, device
        self.epochs = max(1, math.ceil(ahead / n))
        self.block, self.entries = None, None

    def take(self, start, count):
        """(count,) int64 on the device: entries start to start + count - 1."""
        length = self.epochs * self.n
        parts = []
        while count > 0:
            block, offset = divmod(start, length)
            if block != self.block:
                self.block, self.entries = block, _to_device(self._permutations(block), self.device)
            parts.append(self.entries[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _permutations(self, block):
        epochs = range(block * self.epochs, (block + 1) * self.epochs)
        return np.concatenate([_random(self.name, self.seed, epoch).permutation(self.n) for epoch in epochs])


class _Share(NamedTuple):
    """The part of a stream that one process takes: ``count`` entries of every step."""

    name: int  # LABELED or UNLABELED
    image_set: ImageSet
    stream: _Stream
    count: int
    rank: int
    world_size: int

    def first(self, step):
        """The first entry of a step."""
        return (step * self.world_size + self.rank) * self.count

    def take(self, step):
        """(count,) int64: positions in the set."""
        return self.stream.take(self.first(step), self.count)


def _endless_requests(shares, seed, step):
    """Pieces of requests for all steps from this one on, in the order in which they are gathered.

    A function, not a method: what the workers' iterator holds must not hold the loader in turn, or the
    workers would outlive it until the next garbage collection.
    """
    while True:
        for share in shares:
            positions, first = share.take(step).tolist(), share.first(step)
            targets = share.image_set.targets[positions].tolist()
            files = [share.image_set.files[i] for i in positions]
            keys = [(CROPS, seed, share.name, first + k) for k in range(share.count)]
            yield from _chunks(list(zip(files, targets, keys, strict=True)))
        step += 1


class TrainLoader:
    """Iterator without end over training batches: ``Batch`` on ``runtime.device``.

    Args:
        dataset: ``Dataset``.
        batch_size: B, labelled images per process and step.
        mu: unlabelled images per labelled one; 0 leaves ``images_u`` and ``targets_u`` None.
        seed: of the order, of the crops and of ``generator``.
        runtime: ``Runtime``.
        workers: DataLoader processes for images on disk; not used for sets in memory.

    All processes draw from one shuffle: step t of process r of W takes entries (t W + r) B to
    (t W + r + 1) B - 1 of the labelled stream, and likewise mu B of the unlabelled one.

    Attributes:
        position: steps drawn so far.
        generator: ``torch.Generator`` on the device for the augmentation of the batch drawn last, seeded from
            (seed, step, rank): continuing a run needs no stored random state.

    Raises (when a batch is drawn):
        UserError: an image that cannot be decoded, unless the set skips those: its place is then taken by
            another image of the batch.
    """

    def __init__(self, dataset, batch_size, mu, seed, runtime, workers=2):
        self.seed, self.rank, self.workers, self.device = seed, runtime.rank, workers, runtime.device
        self.generator = runtime.generator(seed)
        self.position = 0
        self.in_memory = dataset.labeled.in_memory
        home = self.device if self.in_memory else torch.device("cpu")
        self.shares = []
        for name, image_set, count in (
            (LABELED, dataset.labeled, batch_size),
            (UNLABELED, dataset.unlabeled, mu * batch_size),
        ):
            if count:
                # XLA compiles a graph anew for every offset that it slices at: the host slices instead
                slicing = torch.device("cpu") if self.device.type == "xla" else home
                stream = _Stream(len(image_set), name, seed, 16 * count * runtime.world_size, slicing)
                share = _Share(name, image_set.to(home), stream, count, runtime.rank, runtime.world_size)
                self.shares.append(share)
        # where no class is known there is nothing to be right about
        self.truth_known = bool((dataset.unlabeled.targets >= 0).any())
        self.decoded = None
        self.skipped = set()

    def __iter__(self):
        return self

    def __next__(self):
        step = self.position
        key = np.random.SeedSequence((AUGMENTATION, self.seed, step, self.rank))
        self.generator.manual_seed(int(key.generate_state(1, np.uint64)[0] >> np.uint64(1)))
        tensors = self._from_memory(step) if self.in_memory else self._from_disk(step)
        self.position = step + 1
        batch = Batch(*tensors, *[None] * (4 - len(tensors)))
        return batch if self.truth_known else batch._replace(targets_u=None)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
        self.decoded = None  # workers start again, from the new position

    def _from_memory(self, step):
        tensors = []
        for share in self.shares:
            index = share.take(step).to(self.device)
            tensors += [
                tensor.index_select(0, index) for tensor in (share.image_set.images, share.image_set.targets)
            ]
        return tensors

    def _from_disk(self, step):
        if self.decoded is None:
            ahead = sum(math.ceil(share.count / CHUNK) for share in self.shares)
            requests = _endless_requests(self.shares, self.seed, step)
            size = self.shares[0].image_set.size
            self.decoded = _decode(requests, size, self.workers, self.device, ahead)
        tensors = []
        for share in self.shares:
            images, targets, unreadable = _gather(self.decoded, share.count, self.device)
            if unreadable:
                try:
                    images, targets = self._replaced(images, targets, unreadable, share.image_set)
                except UserError:
                    self.decoded = None  # the workers stop now, not when the traceback is forgotten
                    raise
            tensors += [images, targets]
        return tensors

    def _replaced(self, images, targets, unreadable, image_set):
        """The batch with other images of it, and their targets, in the place of the unreadable ones."""
        _report(unreadable, image_set, self.skipped)
        bad = [i for i, _ in unreadable]
        good = sorted(set(range(len(images))) - set(bad))
        if not good:
            raise UserError(f"no image of a batch can be read: {unreadable[0][1]}")
        index = torch.arange(len(images))
        index[bad] = torch.tensor([good[k % len(good)] for k in range(len(bad))])
        index = index.to(images.device)
        return images[index], targets[index]


# ---------------------------------------------------------------------------------------------- evaluation


def batches(image_set, batch_size, device, rank=0, world_size=1):
    """Walk through a set once, in order: iterator of (images, targets, mask) on the device.

    Args:
        batch_size: B, the size of every batch, also of the last one.
        rank, world_size: this process and their number; each takes a run of neighbouring images, no image is
            taken twice, and all processes get the same number of batches.

    Yields:
        images (B, 3, H, W) uint8 or (B, 2) float32; targets (B,) int64; mask (B,) float32, 1 for images of
        the set, 0 for padding (zeros, target 0) and for files that were skipped.

    Raises:
        UserError: an image that cannot be decoded, unless the set skips those.
    """
    device = torch.device(device)
    n = len(image_set)
    start, stop = rank * n // world_size, (rank + 1) * n // world_size
    steps = math.ceil(math.ceil(n / world_size) / batch_size)
    limits = [
        (min(first, stop), min(first + batch_size, stop))
        for first in range(start, start + steps * batch_size, batch_size)
    ]
    if not image_set.in_memory:
        yield from _batches_from_disk(image_set, limits, batch_size, device)
        return
    for first, last in limits:
        images = image_set.images[first:last].to(device)
        targets = image_set.targets[first:last].to(device)
        mask = torch.ones(last - first, device=device)
        yield tuple(_padded(tensor, batch_size) for tensor in (images, targets, mask))


def _batches_from_disk(image_set, limits, batch_size, device):
    """``batches`` for a set of files; ``limits`` are the first and last position + 1 of every batch."""
    targets = image_set.targets.tolist()
    pieces = (
        piece
        for first, last in limits
        for piece in _chunks([(image_set.files[i], targets[i], None) for i in range(first, last)])
    )
    ahead = math.ceil(batch_size / CHUNK)
    decoded = _decode(pieces, image_set.size, image_set.workers, device, ahead)
    skipped = set()
    try:
        for first, last in limits:
            mask = torch.ones(last - first)
            if first == last:  # this process has no more images, another one has
                images = torch.zeros(0, 3, image_set.size, image_set.size, dtype=torch.uint8, device=device)
                truth = torch.zeros(0, dtype=torch.int64, device=device)
            else:
                images, truth, unreadable = _gather(decoded, last - first, device)
                _report(unreadable, image_set, skipped)
                mask[[i for i, _ in unreadable]] = 0
            yield tuple(_padded(tensor, batch_size) for tensor in (images, truth, mask.to(device)))
    finally:
        del decoded  # the workers stop now, also where an exception keeps this frame


def _padded(tensor, length):
    """The tensor with zeros appended along its first dimension."""
    if len(tensor) == length:
        return tensor
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])
