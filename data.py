"""Which images exist: the data sets, folders of images, and the split into labelled and unlabelled ones.

``load_dataset`` calls the reader of a data set (``READERS``, one function each), splits what it returns and
hands on a ``Dataset``: the labelled, unlabelled, validation and test images, each an ``ImageSet``. By then
small images are in memory; of large ones only the paths are known, and ``engine/loader.py`` decodes them.

A new data set needs one function from ``Options`` to a ``Source``, and one row of ``READERS``, or of
``POINTS`` for points in the plane. A new flag of the data needs an ``add(…)`` in ``main.py`` and a field of
``Options``, which every reader gets.
"""

import math
import os
from collections import Counter, defaultdict
from dataclasses import dataclass, field, fields, replace
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from filelock import FileLock
from torch.nn import functional as F

from engine.files import write_atomically
from engine.folders import (
    class_folders,
    find_folders,
    ignored_kinds,
    image_tree,
    listed,
    place_of,
    refuse_trained,
    relative,
    split_folder,
)
from engine.images import (
    SMALL,
    ImageSet,
    Reading,
    channel_statistics,
    constant_lines,
    find_value_range,
    fingerprints,
    pixel_prints,
    prints_in_stages,
    read_images,
    reason,
    resized,
    sampled_statistics,
    sizes_line,
    value_range_line,
)
from engine.tables import find_table
from utils import UserError

# Channel mean and standard deviation of the training images / 255, as published for each data set.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


# ---------------------------------------------------------------------------------------------- containers


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to read and how to split it: the data flags of ``main.py``, and for which run.

    A run that is older than a flag has the default, which is also the default of the flag.
    """

    # the images
    dataset: str  # one of NAMES
    data_path: str = "data"  # folder that holds the data; downloads go there
    num_classes: int | None = None  # how many there must be; None: any number
    resize: int | None = None  # pixels, height and width; None: the data set's own size
    workers: int = 2  # threads that read images into memory, or DataLoader processes that decode them
    skip_unreadable: bool = False  # leave out images that cannot be decoded, with a line on standard error
    value_range: tuple | None = None  # as in ``Reading``; None: the run's, else what the images have
    max_megapixels: float = Reading.max_megapixels
    svhn_extra: bool = False  # add SVHN's 531,131 ``extra`` images to the unlabelled ones, as in the paper
    labels: str | None = None  # table of the images' classes instead of class folders, see engine/tables.py
    label_columns: tuple | None = None  # its file column and its label column; None: found by the usual names
    save_path: str = "checkpoint"  # folders of the program's own, which are no classes
    results_path: str = "results"

    # the split
    test_fraction: float = 0.2  # of every class, set aside for testing if a folder has no ``test``
    num_labeled: int | float | None  # how many over all classes (int), or a fraction of every class (float)
    num_val: int = 0  # further labelled images, held out to choose among checkpoints
    labeled_indices: str | None = None  # file of the labelled images (``write_labeled``) instead of a number
    seed: int = 0  # of labelled and validation images; which images are for testing does not depend on it
    unlabeled_path: str | None = None  # tree of further images without classes
    unlabeled_mode: str = "add"  # to the training images; "only": instead of them
    keep_test_copies: bool = False  # also learn from copies of test and validation images

    # the run
    record: dict | None = None  # ``Dataset.record()`` of the run that is continued or evaluated
    only_test: bool = False  # read only the test images, and draw no labels

    @property
    def rule(self):
        """The rule of the files' fingerprints, see ``images.fingerprints``: a run stays with its own."""
        return self.record["fingerprint"] if self.record else "bytes"

    @property
    def learns_copies(self):
        """Whether copies of test images are learned from: the runs of earlier versions did, and still do."""
        record = self.record
        earlier = bool(record) and (record["labeled"] is None or record["fingerprint"] == "pieces")
        return self.keep_test_copies or earlier

    @property
    def reading(self):
        """How files become pixels; the scale of deep images is None where it has yet to be looked for."""
        value_range = self.value_range
        if not value_range and self.record:
            value_range = self.record["value_range"]
        return Reading(tuple(value_range) if value_range else None, self.max_megapixels)

    def as_files(self, images, reading, size=0):
        """A set of files that are decoded when they are needed, as these options say."""
        decoding = {"workers": self.workers, "skip_unreadable": self.skip_unreadable, "reading": reading}
        return replace(images, size=size, **decoding)


class Source(NamedTuple):
    """What a reader returns: a data set before it is split."""

    classes: list  # names, in the order of the targets
    mean: tuple | None  # per channel, of images / 255; None where a run's record has it
    std: tuple | None
    flip: bool  # whether a mirrored image keeps its class
    size: int  # pixels, height and width; 0 for points
    crop: str  # "pad": random crops after padding; "none": the workers already crop, or points
    train: ImageSet | None  # may be None if only the test set was asked for
    test: ImageSet
    val: ImageSet | None = None  # validation images of its own; None: they are drawn from the training images
    unlabeled: ImageSet | None = None  # further images to learn from, without their labels
    unread: ImageSet | None = None  # files without classes, to be read when it is known which are left out
    notes: tuple = ()  # sentences for the user about what was found
    reading: Reading | None = None  # of files: with the scale of deep images that was found
    path: str | None = None  # folder of the files; None: the data set has no files

    @property
    def has_names(self):
        """Whether a run knows its images by their names and fingerprints, not by their positions."""
        return self.train.names is not None


@dataclass
class Dataset:
    """A data set, split for semi-supervised learning.

    Positions count the training images, then those of ``Source.val`` or, where there are none, of
    ``Source.unlabeled``.
    """

    name: str
    classes: list  # the next six: as in Source
    mean: list
    std: list
    flip: bool
    size: int
    crop: str
    labeled: ImageSet | None = None  # None, as the next two, where only the test set was asked for
    unlabeled: ImageSet | None = None  # to learn from without labels: the labelled images are among them
    val: ImageSet | None = None  # None also where a run has no validation images
    test: ImageSet | None = None
    labeled_indices: list = field(default_factory=list)  # positions of the labelled images
    val_indices: list = field(default_factory=list)  # positions of the validation images
    copies: list = field(default_factory=list)  # positions of images left out as copies of test or val images
    path: str = ""  # folder of the files, absolute; "" for data sets without files
    fingerprint: str = "bytes"  # the rule by which files are known, see ``images.fingerprints``
    notes: list = field(default_factory=list)  # sentences for the user about what was found
    reading: Reading = field(default_factory=Reading)  # how files become pixels

    @property
    def num_classes(self):
        return len(self.classes)

    @property
    def class_counts(self):
        """How many labelled images each class has, K ints."""
        return torch.bincount(self.labeled.targets, minlength=self.num_classes).tolist()

    @property
    def class_shares(self):
        """Share of each class among the labelled images, K floats."""
        return [count / len(self.labeled) for count in self.class_counts]

    def record(self):
        """What a checkpoint keeps about its data, so that no later command can confuse it with other data.

        Returns:
            dict of plain values and tensors: "name", "classes", "mean", "std", "size", "crop", "path",
            "value_range" (low and high of deep images, None without), "fingerprint" (the files' rule).
            Of a folder also "labeled", "val", "test": lists of names; "labeled_prints", "labeled_targets",
            "val_prints", "val_targets", "tested", "tested_targets": (N,) int64 fingerprints and classes of
            the labelled, validation and test images; "trained": (N,) int64 fingerprints of the images that
            the networks learn from or are chosen by. Of other data sets "labeled", "val": int64 positions;
            "test": how many; "copies": int64 positions of the images that are left out.
        """
        content = {
            "name": self.name,
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "size": self.size,
            "crop": self.crop,
            "path": self.path,
            "value_range": self.reading.value_range and list(self.reading.value_range),
            "fingerprint": self.fingerprint,
        }
        if self.labeled.names is None:
            return content | {
                "labeled": torch.tensor(self.labeled_indices),
                "val": torch.tensor(self.val_indices) if self.val else None,
                "test": len(self.test),
                "copies": torch.tensor(self.copies, dtype=torch.int64),
            }
        val = self.val or self.labeled.subset([])
        learned = [part for part in (self.labeled, self.unlabeled, self.val) if part is not None]
        return content | {
            "labeled": self.labeled.names,
            "labeled_prints": self.labeled.fingerprints,
            "labeled_targets": self.labeled.targets,
            "val": self.val.names if self.val else None,
            "val_prints": val.fingerprints,
            "val_targets": val.targets,
            "test": self.test.names,
            "tested": self.test.fingerprints,
            "tested_targets": self.test.targets,
            "trained": torch.cat([part.fingerprints for part in learned]).unique(),
        }


# -------------------------------------------------------------------------------------------- load_dataset


def read_data(args, record=None, labels_given=False):
    """The data set of a command or, if it evaluates, the test images alone.

    Args:
        args: the flags of a command line or of a run. Flags that came after the run may be missing.
        record: what a checkpoint knows of its data; the run keeps its labelled images.
        labels_given: --labeled-indices was given now, to be compared with the run's labelled images.
    """
    known = {each.name: getattr(args, each.name) for each in fields(Options) if hasattr(args, each.name)}
    if record:
        known["resize"] = known.get("resize") or record["size"] or None
        if record["labeled"] is not None and not labels_given:
            known["labeled_indices"] = None
    return load_dataset(**known, record=record, only_test=args.evaluate)


def load_dataset(dataset, data_path="data", **options):
    """Read a data set and split its training images into labelled, unlabelled and validation images.

    With the record of a run, classes, statistics, and the labelled, validation and test images are those of
    the run. A folder without ``test`` that holds none of the run's images is a test set as a whole.

    Args:
        dataset, data_path, options: see ``Options``.

    Raises:
        UserError: the data is missing, cannot be split as asked, or is not that of the record; or the run of
            the record was trained on test images.
    """
    options = Options(dataset=dataset, data_path=data_path, **options)
    source = read_source(options)
    dataset = _before_the_split(source, options)
    if options.only_test:
        return dataset
    if options.keep_test_copies and not options.record:
        dataset.notes += _leak(source)

    # labelled and validation images
    pool = source.train if source.val is None else source.train.extended(source.val)
    labeled, val = _labeled_and_val(source, pool, options, dataset.notes)
    dataset.labeled_indices, dataset.val_indices = labeled, val
    dataset.labeled = pool.subset(labeled)
    dataset.val = pool.subset(val) if val else None

    # unlabelled images: the data set's own, without copies, then folders of further ones
    dataset.copies = _to_be_left_out(dataset, source, options)
    dataset.unlabeled = _unlabeled(dataset, source, pool)
    if dataset.copies:
        dataset.notes.append(
            f"images left out as copies of test or validation images: {len(dataset.copies):,}"
            + ("" if options.record else " (--keep-test-copies keeps them)")
        )
    further = _further_folders(dataset, source, options)
    own = [] if options.unlabeled_mode == "only" else [dataset.unlabeled]
    dataset.unlabeled = reduce(ImageSet.extended, [*own, *further])

    # what the user should know
    kept = np.setdiff1d(np.arange(len(source.train)), dataset.copies)
    dataset.notes += _class_sizes(source.train.targets[kept], source.classes)
    if options.record and "trained" in options.record:
        before, now = options.record["trained"], dataset.record()["trained"]
        if not torch.equal(before, now):
            dataset.notes.append(
                "the images to learn from have changed since the checkpoint was written: "
                f"{len(before):,} different images then, {len(now):,} now"
            )
    return dataset


def read_source(options):
    """What the reader of a data set finds, if it is what the options ask for."""
    name, record, resize = options.dataset, options.record, options.resize
    if name not in READERS:
        raise UserError(f"data set '{name}' is not known: use one of {', '.join(NAMES)}")
    if resize is not None and resize < 1:
        raise UserError(f"images cannot be resized to {resize} pixels: use 1 or more")
    if options.labels and name != "folder":
        raise UserError(
            f"--labels {options.labels} is for images of your own: give --dataset folder, not {name}"
        )
    source = READERS[name](options)
    count = len(source.classes)
    if record and list(source.classes) != list(record["classes"]):
        raise UserError(
            f"{name} has the classes {listed(source.classes)}, but the run has {listed(record['classes'])}: "
            "give the data set that the run was started with"
        )
    if options.num_classes not in (None, count):
        raise UserError(
            f"--num-classes {options.num_classes}, but {name} has {count} classes: leave out --num-classes"
        )
    return source


def _before_the_split(source, options):
    """A ``Dataset`` before its training images are split."""
    name, record, reading = options.dataset, options.record, options.reading
    notes = list(source.notes)
    if reading.value_range:
        notes.append(value_range_line(reading.value_range))
    if record and "tested" in record and source.test.fingerprints is not None:
        before, now = record["tested"], source.test.fingerprints
        if not torch.equal(before.sort().values, now.sort().values):
            notes.append(
                f"{len(now):,} test images, {int(torch.isin(now, before).sum()):,} of them among the "
                f"{len(before):,} that the run was measured on"
            )
    return Dataset(
        name=name,
        classes=list(source.classes),
        mean=list(record["mean"] if record else source.mean),
        std=list(record["std"] if record else source.std),
        flip=source.flip,
        size=source.size,
        crop=source.crop,
        test=source.test,
        path="" if source.path is None else os.path.abspath(source.path),
        fingerprint=options.rule,
        notes=notes,
        reading=source.reading or reading,
    )


def _labeled_and_val(source, pool, options, notes):
    """Positions of the labelled and of the validation images in the pool: those of the run, or drawn now."""
    train, record, given = source.train, options.record, options.labeled_indices
    if record and record["labeled"] is not None:
        labeled, val = recorded_images(record, pool, options.data_path)
        if given is not None and read_labeled(given, pool, source.classes) != labeled:
            raise UserError(
                f"{given} lists other labelled images than the {len(labeled)} labelled images of the run: "
                "leave out --labeled-indices, or start a new run"
            )
        return labeled, val
    labeled, val = split_labels(
        train.targets,
        options.num_labeled,
        options.num_val,
        len(source.classes),
        options.seed,
        classes=source.classes,
        labeled=None if given is None else read_labeled(given, train, source.classes),
        names=None if record else train.names,  # early versions, which recorded no images, drew by position
        prints=train.fingerprints,
        copies=[] if options.learns_copies else _copies(train, [source.test, source.val]),
    )
    if source.val is not None:
        val = [len(train) + i for i in _own_validation(source, options, notes)]
    return labeled, val


def _own_validation(source, options, notes):
    """Positions of the images in a folder's val/ that choose among checkpoints: no copies of test images."""
    val = source.val
    if options.num_val:
        raise UserError(
            f"the data set has its own validation images, such as {val.names[0]}: "
            f"leave out --num-val {options.num_val}"
        )
    copies = [] if options.learns_copies else _copies(val, [source.test])
    if len(copies) == len(val):
        raise UserError(
            f"all validation images are copies of test images, such as {val.names[0]}: replace or remove them"
        )
    if copies:
        notes.append(f"{len(copies):,} of {len(val):,} validation images are copies of test images: left out")
    return np.setdiff1d(np.arange(len(val)), copies).tolist()


def _copies(images, held_out):
    """Positions of the images that are copies of one in the sets ``held_out``, of which some may be None."""
    prints = [part.fingerprints for part in held_out if part is not None]
    if images.fingerprints is None or any(each is None for each in prints):  # points have no copies
        return []
    return np.flatnonzero(torch.isin(images.fingerprints, torch.cat(prints))).tolist()


def _leak(source):
    """The warning about test images among the images to learn from, in a list."""
    test = source.test
    learned = [part for part in (source.train, source.unlabeled, source.unread) if part is not None]
    twins = _copies(test, learned)
    if not twins:
        return []
    example = f", such as {test.names[twins[0]]}" if test.names else ""
    return [
        f"{len(twins):,} of {len(test):,} test images are also among the training images{example}: "
        "the test accuracy will be too high"
    ]


def _class_sizes(targets, classes):
    """Lines about the classes: how many training images each has, and a warning if they are unequal."""
    sizes = np.bincount(targets, minlength=len(classes)).tolist()
    shown = ", ".join(f"{name}: {size:,}" for name, size in list(zip(classes, sizes, strict=True))[:10])
    more = ", …" if len(classes) > 10 else ""
    lines = [f"training images of {len(classes)} classes: {shown}{more}"]
    if max(sizes) > 2 * min(sizes):
        most, least = classes[int(np.argmax(sizes))], classes[int(np.argmin(sizes))]
        lines.append(
            f"the classes are unequal: '{most}' has {max(sizes):,} training images, '{least}' "
            f"{min(sizes):,}; also look at the mean over classes, not only at top-1; --align assumes equal "
            "classes unless --align-to labeled is given; a count of labels is drawn evenly, a fraction in "
            "proportion"
        )
    return lines


# -------------------------------------------------------------------------------------- unlabelled images


def _to_be_left_out(dataset, source, options):
    """Positions of copies of test and validation images: none of them is learned from without its label."""
    if options.record and not source.has_names:
        return torch.as_tensor(options.record["copies"]).tolist()
    if options.learns_copies:
        return []
    held_out = [dataset.test, dataset.val]
    copies = {*_copies(source.train, held_out)}
    if source.unlabeled is not None:
        copies |= {len(source.train) + i for i in _copies(source.unlabeled, held_out)}
    return sorted(copies - {*dataset.labeled_indices, *dataset.val_indices})


def _unlabeled(dataset, source, pool):
    """The images to learn from without labels, before folders of further ones are added."""
    count = len(source.train)
    kept = np.setdiff1d(np.arange(count), [*dataset.copies, *dataset.val_indices])
    moved = [i for i in dataset.labeled_indices if i >= count]  # since the run began, into val/
    unlabeled = _part(pool, [*kept, *moved])
    if source.unlabeled is None:
        return unlabeled
    kept = np.setdiff1d(np.arange(len(source.unlabeled)), np.array(dataset.copies, dtype=int) - count)
    return unlabeled.extended(_part(source.unlabeled, kept))


def _part(images, positions):
    """The images at these positions; the set itself where these are all."""
    return images if len(positions) == len(images) else images.subset(positions)


def _further_folders(dataset, source, options):
    """The images without classes in folders of their own, a set for each folder that there is."""
    found, path = [], options.unlabeled_path
    if source.unread is not None:
        found.append((source.unread, options.data_path))
    if path is not None:
        if dataset.size == 0:
            raise UserError("two moons are points: --unlabeled-path needs a data set of images")
        files, _ = image_tree(path, "--unlabeled-path")
        prints = fingerprints(files, options.workers, options.rule) if source.has_names else None
        names = relative(files, path)
        found.append((ImageSet([-1] * len(files), files=files, names=names, fingerprints=prints), path))
    if options.unlabeled_mode == "only" and not found:
        raise UserError(
            "--unlabeled-mode only needs unlabelled images: put them into "
            f"'{os.path.join(options.data_path, 'unlabeled')}', or give their folder with --unlabeled-path"
        )
    further = []
    for images, place in found:
        # there may be no deep image among the training images
        dataset.reading, lines = _scaled(dataset.reading, images, options)
        dataset.notes += lines
        images = options.as_files(images, dataset.reading, dataset.size)
        images = _without_held_out(images, place, dataset, source, options.keep_test_copies)
        if not options.record:
            dataset.notes += constant_lines(images, f"the images in '{place}'")
        further.append(images)
    return further


def _without_held_out(images, place, dataset, source, keeps_copies):
    """Files without classes as an ``ImageSet`` of the same kind as the training images.

    Test and validation images are left out: for files and folders those with the same content, for other data
    sets those with the same pixels.

    Args:
        place: their folder, for messages.
        keeps_copies: whether test and validation images are kept.
    """
    held_out = [part for part in (dataset.test, dataset.val) if part is not None]
    in_memory = source.train.in_memory
    if in_memory and not source.has_names:
        images = read_images(images, dataset.size)
        images, *held_out = (replace(x, fingerprints=pixel_prints(x.images)) for x in (images, *held_out))
    elif not source.has_names:
        images, *held_out = _compared([images, *held_out], images.workers)
    count, copies = len(images), [] if keeps_copies else _copies(images, held_out)
    if len(copies) == count:
        raise UserError(
            f"all images in '{place}' are test or validation images: give another --unlabeled-path"
        )
    images = images.subset(np.setdiff1d(np.arange(count), copies))
    if in_memory and not images.in_memory:
        images = read_images(images, dataset.size)
    if copies:
        dataset.notes.append(
            f"{len(copies)} of {count} images in '{place}' are test or validation images: left out"
        )
    return images


def _compared(parts, workers):
    """Sets of files with numbers as fingerprints that tell copies among all of them."""
    prints = prints_in_stages([file for part in parts for file in part.files], workers)
    prints = prints.split([len(part) for part in parts])
    return [replace(part, fingerprints=known) for part, known in zip(parts, prints, strict=True)]


# ----------------------------------------------------------------------------------------------- the readers
#
# One function per data set, which takes ``Options`` and returns a ``Source``.


def _two_moons(_):
    """Two interleaved half circles: 2 x 1,000 points each for training and testing, Gaussian noise of 0.1.

    Both axes are scaled to mean 0 and standard deviation 1 over the training points.
    """

    def points(seed):
        angle = np.linspace(0, math.pi, 1000)
        upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        lower = np.stack([1 - np.cos(angle), 0.5 - np.sin(angle)], axis=1)
        noise = np.random.RandomState(seed).normal(scale=0.1, size=(2000, 2))
        return np.concatenate([upper, lower]) + noise

    train, test = points(0), points(1)
    mean, std = train.mean(axis=0), train.std(axis=0)
    train, test = (
        ImageSet(np.repeat([0, 1], 1000), torch.from_numpy(((part - mean) / std).astype(np.float32)))
        for part in (train, test)
    )
    classes = ["upper moon", "lower moon"]
    return Source(classes, (0.0, 0.0), (1.0, 1.0), flip=False, size=0, crop="none", train=train, test=test)


def _digits(options):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels: 1,297 for training, 500 for testing."""
    from sklearn.datasets import load_digits

    size = options.resize or 16
    values, targets = load_digits(return_X_y=True)  # (1797, 64) in 0..16
    order = np.random.RandomState(0).permutation(len(targets))
    images = torch.from_numpy(values[order]).float().view(-1, 1, 8, 8) * (255 / 16)
    prints = pixel_prints(images)
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).repeat(1, 3, 1, 1)
    train, test = (
        ImageSet(targets[order[part]], images[part], fingerprints=prints[part])
        for part in (slice(1297), slice(1297, None))
    )
    return _in_memory([str(k) for k in range(10)], channel_statistics(train.images), train, test, flip=False)


def _cifar10(options):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels."""
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, "CIFAR-10", "cifar-10-python.tar.gz", options)


def _cifar100(options):
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels."""
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, "CIFAR-100", "cifar-100-python.tar.gz", options)


def _cifar(make, title, archive, options):
    parts = _downloaded(make, title, archive, options.data_path, [{"train": True}, {"train": False}])
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in parts]
    train, test = (_known(part.targets, x, options.resize) for part, x in zip(parts, images, strict=True))
    return _in_memory(parts[0].classes, STATISTICS[options.dataset], train, test, path=options.data_path)


def _svhn(options):
    """SVHN: 73,257 training and 26,032 test images of house numbers, 32x32 pixels, which are never mirrored.

    With ``svhn_extra`` 531,131 easier images are learned from without their labels.
    """
    from torchvision.datasets import SVHN

    files = "train_32x32.mat and test_32x32.mat"
    splits = [{"split": "train"}, {"split": "test"}]
    if options.svhn_extra:
        files = "train_32x32.mat, test_32x32.mat and extra_32x32.mat"
        splits.append({"split": "extra"})
    parts = _downloaded(SVHN, "SVHN", files, options.data_path, splits)
    sets = [_known(part.labels, torch.from_numpy(part.data), options.resize) for part in parts]
    classes = [str(k) for k in range(10)]
    return _in_memory(classes, STATISTICS["svhn"], *sets, flip=False, path=options.data_path)


def _stl10(options):
    """STL-10: 5,000 training and 8,000 test images of 96x96 pixels, and 100,000 images without labels."""
    from torchvision.datasets import STL10

    splits = [{"split": "train"}, {"split": "test"}, {"split": "unlabeled"}]
    parts = _downloaded(STL10, "STL-10", "stl10_binary.tar.gz", options.data_path, splits)
    sets = [_known(part.labels, torch.from_numpy(part.data), options.resize) for part in parts]
    statistics = channel_statistics(sets[0].images)
    return _in_memory(parts[0].classes, statistics, *sets, path=options.data_path)


def _in_memory(classes, statistics, train, test, unlabeled=None, flip=True, path=None):
    """The ``Source`` of small images in memory."""
    size, parts = train.images.shape[-1], {"train": train, "test": test, "unlabeled": unlabeled}
    return Source(classes, *statistics, flip, size, "pad", **parts, path=path)


def _imagenet(options):
    """ImageNet in torchvision's layout: ``train/<class>/*`` and ``val/<class>/*``, decoded by workers.

    The files are compared with each other when a run begins; its record keeps which ones are copies.
    """
    path, size, ignored = options.data_path, options.resize or 224, Counter()
    for part in ("train", "val"):
        if not os.path.isdir(os.path.join(path, part)):
            raise UserError(
                f"'{path}' has no folder '{part}': --dataset imagenet needs train/ and val/ with one folder "
                "per class in each"
            )
    classes, parts = class_folders(path, [os.path.join(path, part) for part in ("train", "val")], ignored)
    reading, lines = _scaled(options.reading, parts[0], options)
    if not options.record and not options.only_test:
        parts = _compared(parts, options.workers)
    train, test = (replace(options.as_files(part, reading, size), names=None) for part in parts)
    notes = ignored_kinds(ignored) + lines
    if not options.record:
        notes += constant_lines(train, "the training images")
    found = {"train": train, "test": test, "notes": notes, "reading": reading, "path": path}
    return Source(classes, *STATISTICS["imagenet"], flip=True, size=size, crop="none", **found)


def _folder(options):
    """Any folder of class folders, parts with the usual names or one level that is split here; or any folder
    of images whose classes are in the table ``labels``.

    If all images have the same size up to 64 pixels, or ``resize`` is at most 64, they are held in memory,
    each as a whole and stretched to a square. Otherwise workers decode crops of ``resize`` or 224 pixels. The
    unlabelled images stay files until it is known which of them are left out.
    """
    found = _parts_of_folder(options)
    parts = found.train, found.test, found.val
    first = found.test if options.only_test else found.train
    reading, lines = _scaled(options.reading, first, options)
    notes = [*found.notes, sizes_line(first), *lines]

    # small images into memory
    train, test, val = (part and options.as_files(part, reading) for part in parts)
    first, small = test if options.only_test else train, None
    if options.resize is None or options.resize <= SMALL:
        small = read_images(first, options.resize)
    if small is None:
        size, crop = options.resize or 224, "none"
        train, test, val = (part and replace(part, size=size) for part in (train, test, val))
    else:
        size, crop = small.images.shape[-1], "pad"
        train = None if options.only_test else small
        test = small if options.only_test else read_images(test, size)
        val = val and read_images(val, size)

    # what a run's record has, or what a new run needs
    mean = std = None
    if not options.record:
        mean, std = sampled_statistics(first) if small is None else channel_statistics(small.images)
    if not options.record and not options.only_test:
        notes += constant_lines(train, "the training images")
    if not options.record or options.only_test:
        notes += constant_lines(test, "the test images")
    parts = {"train": train, "test": test, "val": val, "unread": found.unlabeled}
    more = {"notes": notes, "reading": reading, "path": options.data_path}
    return Source(found.classes, mean, std, flip=True, size=size, crop=crop, **parts, **more)


def _parts_of_folder(options):
    """``_folder`` before any pixel is read, as ``Found``: with fingerprints and with test images."""
    path, record, only_test = options.data_path, options.record, options.only_test
    if not os.path.isdir(path):
        raise UserError(f"there is no folder '{path}': give the folder of your images with --data-path")
    if options.labels:
        classes = record["classes"] if record else None
        found = find_table(options.labels, path, options.label_columns, classes, only_test)
    else:
        own_folders = (options.save_path, options.results_path)
        found = find_folders(path, record, only_test, options.unlabeled_path, own_folders)
    for part in filter(None, (found.train, found.test, found.val, found.unlabeled)):
        part.fingerprints = fingerprints(part.files, options.workers, options.rule)
    train, test, notes = found.train, found.test, list(found.notes)
    if not only_test:
        notes += _in_two_classes(filter(None, (train, test, found.val)))
    if test is None:
        train, test, more = split_folder(train, path, found.classes, options.test_fraction, record, only_test)
        notes += more
    if record and "trained" in record:
        refuse_trained(test, record, path)
    tested = set(test.targets.tolist())
    missing = [name for k, name in enumerate(found.classes) if k not in tested]
    if missing and not only_test:
        if found.test is None:
            way = "a larger --test-fraction or a folder test/ helps"
        elif options.labels:
            way = "give some of their rows the split test"
        else:
            way = f"put some into {test.names[0].split('/')[0]}/"
        notes.append(f"these classes have no test image: {listed(missing)}; {way}")
    return found._replace(train=train, test=test, val=None if only_test else found.val, notes=tuple(notes))


def _scaled(reading, images, options):
    """The reading with the scale of the deep images among new files, if it has none yet, and notes."""
    if options.record or reading.value_range:
        return reading, []
    value_range, line = find_value_range(images.files, reading, options.workers)
    return replace(reading, value_range=value_range), [line] if line else []


def _in_two_classes(parts):
    """The warning about the same picture in two classes, in a list."""
    first, twice = {}, {}
    for part in parts:
        keys = zip(part.names, part.fingerprints.tolist(), part.targets.tolist(), strict=True)
        for name, number, target in keys:
            known, known_target = first.setdefault(number, (name, target))
            if target != known_target:
                twice.setdefault(number, (known, name))
    if not twice:
        return []
    one, other = next(iter(twice.values()))
    pictures = "1 picture lies" if len(twice) == 1 else f"{len(twice):,} pictures lie"
    return [f"{pictures} in two classes, such as {one} and {other}: keep each in only one class"]


POINTS = {"twomoons": _two_moons}  # of points in the plane, not of images
READERS = POINTS | {
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": _svhn,
    "stl10": _stl10,
    "imagenet": _imagenet,
    "folder": _folder,
}
NAMES = tuple(READERS)


# ------------------------------------------------------------------------------------ torchvision's data sets


def _downloaded(make, title, files, path, choices):
    """A torchvision data set's parts, read, verified and, on first use, downloaded.

    Args:
        make: the class in ``torchvision.datasets``.
        title, files: what the data set and its files are called, for messages.
        choices: list of the arguments that choose each part.

    Raises:
        UserError: the files are missing or damaged and cannot be downloaded.
    """
    try:
        try:
            return [make(path, download=False, **choice) for choice in choices]
        except RuntimeError:  # missing, or not with the right checksum
            os.makedirs(path, exist_ok=True)
            with FileLock(os.path.join(path, ".download.lock")):  # one process downloads, the others wait
                return [make(path, download=True, **choice) for choice in choices]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{title} is not in '{path}', or damaged, and could not be downloaded ({reason(error)}): "
            f"put {files} into that folder, or use --dataset digits or twomoons, which need no download, "
            "or --dataset folder with your own images"
        ) from error


def _known(targets, images, size):
    """(N, 3, H, W) uint8 images as an ``ImageSet``, known by their pixels before they are resized.

    They become ``size`` x ``size`` pixels unless it is None.
    """
    prints, images = pixel_prints(images), images.contiguous()
    if size not in (None, images.shape[-1]):
        images = torch.cat([resized(chunk, size) for chunk in images.split(1000)])
    return ImageSet(targets, images, fingerprints=prints)


# ---------------------------------------------------------------------------- labelled and validation images


def split_labels(
    targets,
    num_labeled,
    num_val,
    num_classes,
    seed,
    *,
    classes=None,
    labeled=None,
    names=None,
    prints=None,
    copies=(),
):
    """Draw the labelled and the validation images, class by class.

    Args:
        targets: (N,) classes of the training images, 0 to num_classes - 1.
        num_labeled: a count (int), divided evenly over the classes; or a fraction of every class (float),
            rounded, at least one image each. The count N takes every image, and so does the fraction 1.0,
            less the validation images.
        num_val: a count.
        seed: of ``numpy.random.RandomState``, whose streams never change, so that splits do not either.
        classes: names for messages.
        labeled: positions that are labelled already; only the validation images are drawn.
        names: N names of files. The order in which a class is drawn then depends on the seed and on each
            image's own name, not on which other images there are.
        prints: (N,) numbers that are equal for copies: no validation image is a copy of a labelled one.
        copies: positions of copies of test images, which are passed over.

    Returns:
        Two sorted lists of positions without overlap: labelled, validation. The labelled images do not
        depend on num_val, and those of a smaller count are among those of a larger one.

    Raises:
        UserError: a count that does not divide, or a class with too few images.
    """
    targets = np.asarray(targets)
    classes = classes or [str(k) for k in range(num_classes)]
    eligible = ~np.isin(np.arange(len(targets)), copies)
    random = np.random.RandomState(seed)
    orders = []  # of each class the images in the order in which they are drawn
    passed = []  # of each class the number of copies
    for k in range(num_classes):
        order = np.flatnonzero(targets == k)
        if names is None:
            order = random.permutation(order)
        else:
            order = np.array(sorted(order, key=lambda i: place_of(f"{seed}/{names[i]}")), dtype=np.int64)
        orders.append(order[eligible[order]])
        passed.append(len(order) - len(orders[-1]))

    sizes = [len(order) for order in orders]
    per_val = _per_class(num_val, sizes, len(targets), "--num-val", classes)
    if labeled is not None:
        chosen = [order[np.isin(order, labeled)] for order in orders]
        per_label = [len(taken) for taken in chosen]
    else:
        per_label = _per_class(num_labeled, sizes, len(targets), "--num-labeled", classes)
        if isinstance(num_labeled, float):  # a fraction leaves room for validation
            limits = zip(per_label, sizes, per_val, strict=True)
            per_label = [min(n, max(1, size - v)) for n, size, v in limits]
        chosen = [order[:n] for order, n in zip(orders, per_label, strict=True)]
    for name, size, n, v, more in zip(classes, sizes, per_label, per_val, passed, strict=True):
        beside = f" apart from {more} copies of test or validation images" if more else ""
        if size == 0:
            raise UserError(f"class '{name}' has no training images{beside}: add some or remove the class")
        if n == 0:
            raise UserError(f"class '{name}' has no labelled image{beside}: add at least one")
        if n + v > size:
            raise UserError(
                f"class '{name}' has {size} training images{beside}, too few for {n} labelled and {v} "
                "validation images: lower --num-labeled or --num-val, or add images"
            )

    labeled, val = np.concatenate(chosen), []
    for name, order, taken, count in zip(classes, orders, chosen, per_val, strict=True):
        rest = order[~np.isin(order, taken)]
        if prints is not None and count:
            rest = rest[~torch.isin(prints[rest], prints[labeled]).numpy()]
        if len(rest) < count:
            raise UserError(
                f"class '{name}' has {len(rest)} training images that are neither labelled nor copies of "
                f"labelled images, too few for {count} validation images: lower --num-labeled or --num-val, "
                "or add images"
            )
        val += rest[:count].tolist()
    return sorted(labeled.tolist()), sorted(val)


def _per_class(number, sizes, total, flag, classes):
    """How many images of each class a count (int) or a fraction (float) means, as a list of int.

    Args:
        sizes: of the classes.
        total: how many images the data set has: as a count it means all that there are.
    """
    if isinstance(number, float):
        return [min(size, max(1, int(number * size + 0.5))) for size in sizes]
    if number in (sum(sizes), total):
        return list(sizes)
    each, remainder = divmod(number, len(sizes))
    if remainder:
        most = min(sizes)  # of each class
        near = {n * len(sizes) for n in (min(each, most), min(each + 1, most)) if n > 0}
        ways = [" or ".join(str(n) for n in sorted(near))] if near else []
        if flag == "--num-labeled":
            ways.append("a fraction of every class such as 0.1")
        raise UserError(
            f"{flag} {number} cannot be divided evenly among the {len(sizes)} classes "
            f"({', '.join(classes[:10])}): use {', or '.join(ways)}"
        )
    return [each] * len(sizes)


def write_labeled(folder, dataset):
    """Write which images are labelled, one per line, for ``load_dataset(labeled_indices=file)``.

    The file is ``labeled.txt`` with names of files for a folder, else ``labeled_indices.txt`` with positions.

    Raises:
        UserError: the file cannot be written.
    """
    if dataset.labeled.names is None:
        path, lines = os.path.join(folder, "labeled_indices.txt"), dataset.labeled_indices
    else:
        path, lines = os.path.join(folder, "labeled.txt"), dataset.labeled.names
    text = "".join(f"{line}\n" for line in lines)
    write_atomically(path, lambda file: file.write(text.encode("utf-8", "surrogateescape")))


def read_labeled(path, train, classes):
    """Sorted positions of the labelled images, from a file of one name (folders) or position per line.

    Raises:
        UserError: the file is missing, a line is not an image of the training set, an image is listed twice,
            or a class has no labelled image.
    """
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().split("\n")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the list of labelled images {path}: {reason(error)}") from error
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
        raise UserError(f"{path} lists {twice} twice: remove one of the two lines")
    labelled = np.bincount(np.asarray(train.targets)[indices], minlength=len(classes))
    if not labelled.all():
        missing = classes[int(labelled.argmin())]
        raise UserError(f"{path} has no image of class '{missing}': list at least one image of each class")
    return sorted(indices)


def recorded_images(record, train, path):
    """Positions in the training set of the labelled and the validation images of a run, two sorted lists.

    Raises:
        UserError: one of them is missing or has been replaced by another image.
    """
    if train.names is None:
        positions = [[] if record[kind] is None else record[kind].tolist() for kind in ("labeled", "val")]
        if max(positions[0] + positions[1]) >= len(train):
            raise UserError(
                f"'{path}' has {len(train)} training images, fewer than at the start of the run: put "
                "the missing images back, or give the folder that the run was started with"
            )
        return positions
    here = defaultdict(list)  # positions of each image, known by its fingerprint and class
    for i, key in enumerate(zip(train.fingerprints.tolist(), train.targets.tolist(), strict=True)):
        here[key].append(i)
    classes_now = {number: target for number, target in here}
    found = []
    for kind, word in (("labeled", "labelled"), ("val", "validation")):
        positions, gone = [], []
        prints, targets = record[f"{kind}_prints"].tolist(), record[f"{kind}_targets"].tolist()
        for name, *key in zip(record[kind] or [], prints, targets, strict=True):
            same = here[tuple(key)]  # of copies of one image the one that still has this name, or any
            same.sort(key=lambda i: train.names[i] != name, reverse=True)
            positions.append(same.pop()) if same else gone.append((name, *key))
        for name, number, target in gone:
            if number in classes_now:
                now, was = record["classes"][classes_now[number]], record["classes"][target]
                raise UserError(
                    f"{name} has the label '{now}', but had '{was}' when the run was started: start a new "
                    "run under another --name, or restore the label"
                )
        if gone:
            raise UserError(
                f"{len(gone)} of the run's {len(record[kind])} {word} images are missing from the "
                f"training images of '{path}', such as {gone[0][0]}: put them back (under any name), or "
                "give the folder that the run was started with"
            )
        found.append(sorted(positions))
    return found
