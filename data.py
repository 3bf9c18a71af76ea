"""Which images exist: the data sets, folders of images, and the split into labelled and unlabelled ones.

``load_dataset`` calls the reader of a data set (``READERS``, one function each), splits what it returns and
hands on a ``Dataset``: the labelled, unlabelled, validation and test images, each an ``ImageSet``. By then
small images are in memory; of large ones only the paths are known, and ``engine/loader.py`` decodes them.

A new data set needs one function that returns a ``Source`` and one line of ``READERS``.
"""

import math
import os
from collections import Counter
from dataclasses import dataclass, field, replace
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
    notes: tuple = ()  # sentences for the user about what was found
    reading: Reading | None = None  # of files: with the scale of deep images that was found


@dataclass
class Dataset:
    """A data set, split for semi-supervised learning."""

    name: str
    classes: list  # the next six: as in Source
    mean: list
    std: list
    flip: bool
    size: int
    crop: str
    labeled: ImageSet | None  # None, as the next two, where only the test set was asked for
    unlabeled: ImageSet | None  # every training image except the validation images
    val: ImageSet | None
    test: ImageSet
    labeled_indices: list  # positions of the labelled images in the training set
    val_indices: list = field(default_factory=list)  # and of the validation images
    copies: list = field(default_factory=list)  # of training images that are left out, see ``load_dataset``
    path: str = ""  # folder of the files, absolute; "" for data sets without files
    fingerprint: str = "bytes"  # the rule by which files are known, see ``images.fingerprints``
    notes: list = field(default_factory=list)  # sentences for the user about what was found
    reading: Reading = field(default_factory=Reading)  # how files become pixels

    @property
    def num_classes(self):
        return len(self.classes)

    def record(self):
        """What a checkpoint keeps about its data, so that no later command can confuse it with other data.

        Returns:
            dict of plain values and tensors: "name", "classes", "mean", "std", "size", "crop", "path",
            "value_range" (low and high of deep images, None without).
            Of a folder also "labeled", "val", "test": lists of names; "labeled_prints", "labeled_targets",
            "val_prints", "val_targets": (N,) int64 fingerprints and classes of these images; "trained",
            "tested": (N,) int64 fingerprints of the images that the networks learn from or are chosen by, and
            of the test images; "fingerprint": their rule, not there in records of the earlier rule. Of other
            data sets "labeled", "val": int64 positions; "test": how many; "copies": int64 positions of images
            that are left out, among the training images followed by the further unlabelled ones.
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
        }
        if self.labeled.names is None:
            content |= {"labeled": torch.tensor(self.labeled_indices), "test": len(self.test)}
            content |= {"copies": torch.tensor(self.copies, dtype=torch.int64)}
            return content | {"val": torch.tensor(self.val_indices) if self.val else None}
        content |= {"fingerprint": "bytes"} if self.fingerprint == "bytes" else {}
        for kind, part in (("labeled", self.labeled), ("val", self.val or self.labeled.subset([]))):
            content |= {f"{kind}_prints": part.fingerprints, f"{kind}_targets": part.targets}
        learned = [part for part in (self.labeled, self.unlabeled, self.val) if part is not None]
        return content | {
            "labeled": self.labeled.names,
            "val": self.val.names if self.val else None,
            "test": self.test.names,
            "trained": torch.cat([part.fingerprints for part in learned]).unique(),
            "tested": self.test.fingerprints,
            "tested_targets": self.test.targets,
        }


# -------------------------------------------------------------------------------------------- load_dataset

# keywords of load_dataset that a run passes on from its flags as they are
OPTIONS = ("num_labeled", "num_val", "seed", "unlabeled_path", "unlabeled_mode", "test_fraction", "workers")
OPTIONS += ("skip_unreadable", "svhn_extra", "labels", "label_columns", "keep_test_copies")
OPTIONS += ("save_path", "results_path", "value_range", "max_megapixels")


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
    labels=None,
    label_columns=(),
    keep_test_copies=False,
    save_path="checkpoint",
    results_path="results",
    value_range=None,
    max_megapixels=Reading.max_megapixels,
    record=None,
    only_test=False,
):
    """Read a data set and split its training images into labelled, unlabelled and validation images.

    Args:
        name: one of ``NAMES``.
        data_path: folder that holds the data; downloads go there.
        num_labeled: labelled images over all classes (int), or a fraction of every class (float). Not used
            with ``labeled_indices``.
        num_val: further labelled images, held out from the training images to choose among checkpoints; int
            or float, as above.
        seed: of the split into labelled and unlabelled. Points, test sets and the test part of a folder are
            the same for every seed.
        resize: pixels, height and width of the images (default: 16 for digits, 32 for CIFAR and SVHN, 96 for
            STL-10, 224 for ImageNet; for a folder the size of its images up to 64, else 224).
        labeled_indices: file of the labelled images, as written by ``write_labeled``.
        unlabeled_path: any tree of images without classes, added to the unlabelled set
            (``unlabeled_mode="add"``) or replacing it (``"only"``). Default: ``unlabeled`` inside a folder.
        test_fraction: part of every class that is set aside for testing if a folder has no ``test``.
        workers: threads that read images into memory, or DataLoader processes that decode them.
        skip_unreadable: leave out images that cannot be decoded, with a line on standard error.
        svhn_extra: add SVHN's 531,131 ``extra`` images to the unlabelled ones, as in the paper.
        labels: table of the images' classes, in the place of class folders (see tables.py).
        label_columns: names of its file column and its label column; empty: found by the usual names.
        keep_test_copies: also learn from copies of test and validation images, which are else left out.
        save_path, results_path: folders of the program's own, which are no classes.
        value_range: low and high of deep images, the values that become levels 0 and 255 (default: as in the
            record; for a new run what ``find_value_range`` finds in its training images).
        max_megapixels: images with more pixels cannot be read.
        record: ``Dataset.record()`` of the run that is continued or evaluated: classes, statistics, and the
            labelled, validation and test images are those of the run. Checkpoints of early versions recorded
            no images; these are then drawn as those versions drew them.
        only_test: read only the test set and draw no labels. A folder without ``test`` that holds none of the
            run's images is a test set as a whole.

    Raises:
        UserError: the data is missing, cannot be split as asked, or is not that of the record; or the run of
            the record was trained on test images.
    """
    if name not in READERS:
        raise UserError(f"data set '{name}' is not known: use one of {', '.join(NAMES)}")
    if resize is not None and resize < 1:
        raise UserError(f"images cannot be resized to {resize} pixels: use 1 or more")
    if labels and name != "folder":
        raise UserError(f"--labels {labels} is for images of your own: give --dataset folder, not {name}")
    rule = "bytes" if not record else record.get("fingerprint", "pieces")
    value_range = value_range or (record or {}).get("value_range")
    reading = Reading(value_range and tuple(value_range), max_megapixels)
    source = READERS[name](
        data_path,
        resize,
        test_fraction=test_fraction,
        workers=workers,
        skip_unreadable=skip_unreadable,
        svhn_extra=svhn_extra,
        labels=labels,
        label_columns=label_columns,
        unlabeled_path=unlabeled_path,
        own_paths=(save_path, results_path),
        rule=rule,
        reading=reading,
        record=record,
        only_test=only_test,
    )
    if record and list(source.classes) != list(record["classes"]):
        raise UserError(
            f"the classes of {name} are {listed(source.classes)}, "
            f"those of the run {listed(record['classes'])}"
        )
    dataset = Dataset(
        name=name,
        classes=list(source.classes),
        mean=list(record["mean"] if record else source.mean),
        std=list(record["std"] if record else source.std),
        flip=source.flip,
        size=source.size,
        crop=source.crop,
        labeled=None,
        unlabeled=None,
        val=None,
        test=source.test,
        labeled_indices=[],
        path="" if name in WITHOUT_FILES else os.path.abspath(data_path),
        fingerprint=rule,
        notes=list(source.notes),
        reading=source.reading or reading,
    )
    if reading.value_range:
        dataset.notes.append(value_range_line(reading.value_range))
    if record and "tested" in record and source.test.fingerprints is not None:
        before, now = record["tested"], source.test.fingerprints
        if not torch.equal(before.sort().values, now.sort().values):
            dataset.notes.append(
                f"{len(now):,} test images, {int(torch.isin(now, before).sum()):,} of them among the "
                f"{len(before):,} that the run was measured on"
            )
    if only_test:
        return dataset

    # a run goes on with the images that it began with: earlier versions kept copies of test images
    train, positional = source.train, source.train.names is None
    of_before = bool(record) and ("copies" if positional else "fingerprint") not in record
    keeps = keep_test_copies or of_before
    if keeps and not record:
        dataset.notes += _leak(source)

    # labelled and validation images; positions are in the training images, followed by a folder's val/
    pool = train if source.val is None else train.extended(source.val)
    if record and "labeled" in record:
        labeled, val = recorded_images(record, pool, data_path)
        if labeled_indices is not None and read_labeled(labeled_indices, pool, source.classes) != labeled:
            raise UserError(
                f"{labeled_indices} lists other labelled images than the {len(labeled)} that the run has "
                "learned from: leave --labeled-indices out, or start a new run"
            )
    else:
        given = None if labeled_indices is None else read_labeled(labeled_indices, train, source.classes)
        labeled, val = split_labels(
            train.targets,
            num_labeled,
            num_val,
            len(source.classes),
            seed,
            classes=source.classes,
            labeled=given,
            names=train.names if record is None else None,
            prints=train.fingerprints,
            copies=[] if keeps else _copies(train, [source.test, source.val]),
        )
        if source.val is not None:
            val = [len(train) + i for i in _own_validation(source, num_val, keeps, dataset.notes)]
    dataset.labeled_indices, dataset.val_indices = labeled, val
    dataset.labeled = pool.subset(labeled)
    dataset.val = pool.subset(val) if val else None

    # unlabelled images: the training images, the data set's further ones, those that the user adds
    further = source.unlabeled if positional else None
    if positional and record:
        dataset.copies = torch.as_tensor(record.get("copies", [])).tolist()
    elif not keeps:
        found = _copies(train, [dataset.test, dataset.val])
        if further is not None:
            found += [len(train) + i for i in _copies(further, [dataset.test, dataset.val])]
        dataset.copies = sorted({*found} - {*labeled, *val})
    kept = np.setdiff1d(np.arange(len(train)), dataset.copies)
    learned = train.targets[kept]
    moved = [
        i for i in labeled if i >= len(train)
    ]  # labelled images that now lie beside the validation images
    dataset.unlabeled = _part(pool, [*np.setdiff1d(kept, val), *moved])
    if further is not None:
        kept = np.setdiff1d(np.arange(len(further)), np.array(dataset.copies, dtype=int) - len(train))
        dataset.unlabeled = dataset.unlabeled.extended(_part(further, kept))
    if dataset.copies:
        dataset.notes.append(
            f"images left out as copies of test or validation images: {len(dataset.copies):,}"
            + ("" if record else " (--keep-test-copies keeps them)")
        )
    added = [] if positional or source.unlabeled is None else [(source.unlabeled, data_path)]
    if unlabeled_path is not None:
        added.append((_tree(unlabeled_path, dataset, None if positional else rule, workers), unlabeled_path))
    if unlabeled_mode == "only" and not added:
        raise UserError(
            f"--unlabeled-mode only needs images without labels: put them into a folder unlabeled/ in "
            f"'{data_path}', or name their folder with --unlabeled-path DIR"
        )
    for number, (images, place) in enumerate(added):
        if not record:  # there may be no deep image among the training images
            dataset.reading, lines = scaled(dataset.reading, images.files, workers)
            dataset.notes += lines
        decoding = {"workers": workers, "skip_unreadable": skip_unreadable, "reading": dataset.reading}
        images = replace(images, size=dataset.size, **decoding)
        images = _unlabeled_images(images, place, dataset, train, keep_test_copies)
        if not record:
            dataset.notes += constant_lines(images, f"the images in '{place}'")
        replaces = number == 0 and unlabeled_mode == "only"
        dataset.unlabeled = images if replaces else dataset.unlabeled.extended(images)
    dataset.notes += _class_sizes(learned, source.classes)

    if record and train.names is not None and "trained" in record:
        before, now = record["trained"], dataset.record()["trained"]
        if not torch.equal(before, now):
            dataset.notes.append(
                f"the images to learn from are not those that the run had before: {len(before):,} different "
                f"ones then, {len(now):,} now"
            )
    return dataset


def _part(images, positions):
    """The images at these positions; the set itself where these are all."""
    return images if len(positions) == len(images) else images.subset(positions)


def _copies(images, held_out):
    """Positions of the images that are copies of one in the sets ``held_out``, of which some may be None."""
    prints = [part.fingerprints for part in held_out if part is not None]
    if images.fingerprints is None or any(each is None for each in prints):  # points have no copies
        return []
    return np.flatnonzero(torch.isin(images.fingerprints, torch.cat(prints))).tolist()


def _leak(source):
    """The warning about test images among the images to learn from, in a list."""
    test = source.test
    learned = [part for part in (source.train, source.unlabeled) if part is not None]
    twins = _copies(test, learned)
    if not twins:
        return []
    example = f", such as {test.names[twins[0]]}" if test.names else ""
    return [
        f"{len(twins):,} of {len(test):,} test images are among the training images too{example}: "
        "the accuracy will be too high by them"
    ]


def _own_validation(source, num_val, keeps, notes):
    """Positions of the images in a folder's val/ that choose among checkpoints: no copies of test images."""
    val = source.val
    if num_val:
        raise UserError(
            f"there are validation images already, such as {val.names[0]}: leave out --num-val {num_val}"
        )
    copies = [] if keeps else _copies(val, [source.test])
    if len(copies) == len(val):
        raise UserError(
            f"all validation images are copies of test images, such as {val.names[0]}: replace or remove them"
        )
    if copies:
        notes.append(f"{len(copies):,} of {len(val):,} validation images are copies of test images: left out")
    return np.setdiff1d(np.arange(len(val)), copies).tolist()


def _class_sizes(targets, classes):
    """Lines about the classes: how many training images each has, and a warning if they are unequal."""
    sizes = np.bincount(targets, minlength=len(classes)).tolist()
    shown = ", ".join(f"{name}: {size:,}" for name, size in list(zip(classes, sizes, strict=True))[:10])
    lines = [f"training images of {len(classes)} classes: {shown}" + ", …" * (len(classes) > 10)]
    if max(sizes) > 2 * min(sizes):
        most, least = classes[int(np.argmax(sizes))], classes[int(np.argmin(sizes))]
        lines.append(
            f"the classes are unequal: '{most}' has {max(sizes):,} training images, '{least}' "
            f"{min(sizes):,}. Look at the mean over classes beside top-1; --align assumes equal classes "
            "unless --align-to labeled; a count of labels is drawn evenly, a fraction in proportion"
        )
    return lines


# ----------------------------------------------------------------------------------------------- the readers
#
# One function per data set, all called as reader(path, resize, **options) with the options of load_dataset
# that concern reading: test_fraction, workers, skip_unreadable, svhn_extra, labels, label_columns,
# unlabeled_path, own_paths, rule, reading, record, only_test. Each names the options that it uses. ``resize``
# is None for the data set's own size.


def _two_moons(path, resize, **_):
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


def _digits(path, resize, **_):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels: 1,297 for training, 500 for testing."""
    from sklearn.datasets import load_digits

    size = resize or 16
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
    mean, std = channel_statistics(train.images)
    classes = [str(k) for k in range(10)]
    return Source(classes, mean, std, flip=False, size=size, crop="pad", train=train, test=test)


def _cifar10(path, resize, **_):
    """CIFAR-10: 50,000 training and 10,000 test images of 32x32 pixels."""
    from torchvision.datasets import CIFAR10

    return _cifar(CIFAR10, "CIFAR-10", "cifar-10-python.tar.gz", path, resize, STATISTICS["cifar10"])


def _cifar100(path, resize, **_):
    """CIFAR-100: 50,000 training and 10,000 test images of 32x32 pixels."""
    from torchvision.datasets import CIFAR100

    return _cifar(CIFAR100, "CIFAR-100", "cifar-100-python.tar.gz", path, resize, STATISTICS["cifar100"])


def _cifar(make, title, archive, path, resize, statistics):
    parts = _downloaded(make, title, archive, path, [{"train": True}, {"train": False}])
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in parts]
    train, test = (_known(part.targets, x, resize) for part, x in zip(parts, images, strict=True))
    size = train.images.shape[-1]
    return Source(parts[0].classes, *statistics, flip=True, size=size, crop="pad", train=train, test=test)


def _svhn(path, resize, *, svhn_extra, **_):
    """SVHN: 73,257 training and 26,032 test images of house numbers, 32x32 pixels, which are never mirrored.

    With ``svhn_extra`` 531,131 easier images are learned from without their labels.
    """
    from torchvision.datasets import SVHN

    files = "train_32x32.mat and test_32x32.mat"
    splits = [{"split": "train"}, {"split": "test"}]
    if svhn_extra:
        files = "train_32x32.mat, test_32x32.mat and extra_32x32.mat"
        splits.append({"split": "extra"})
    parts = _downloaded(SVHN, "SVHN", files, path, splits)
    train, test, *extra = (_known(part.labels, torch.from_numpy(part.data), resize) for part in parts)
    return Source(
        [str(k) for k in range(10)],
        *STATISTICS["svhn"],
        flip=False,
        size=train.images.shape[-1],
        crop="pad",
        train=train,
        test=test,
        unlabeled=extra[0] if extra else None,
    )


def _stl10(path, resize, **_):
    """STL-10: 5,000 training and 8,000 test images of 96x96 pixels, and 100,000 images without labels."""
    from torchvision.datasets import STL10

    splits = [{"split": "train"}, {"split": "test"}, {"split": "unlabeled"}]
    parts = _downloaded(STL10, "STL-10", "stl10_binary.tar.gz", path, splits)
    train, test, unlabeled = (_known(part.labels, torch.from_numpy(part.data), resize) for part in parts)
    mean, std = channel_statistics(train.images)
    return Source(
        parts[0].classes,
        mean,
        std,
        flip=True,
        size=train.images.shape[-1],
        crop="pad",
        train=train,
        test=test,
        unlabeled=unlabeled,
    )


def _imagenet(path, resize, *, workers, skip_unreadable, reading, record, only_test, **_):
    """ImageNet in torchvision's layout: ``train/<class>/*`` and ``val/<class>/*``, decoded by workers.

    The files are compared with each other when a run begins; its record keeps which ones are copies.
    """
    for part in ("train", "val"):
        if not os.path.isdir(os.path.join(path, part)):
            raise UserError(
                f"'{path}' has no folder '{part}': --dataset imagenet needs train/ and val/ with one folder "
                "per class in each"
            )
    size = resize or 224
    ignored = Counter()
    classes, parts = class_folders(path, [os.path.join(path, part) for part in ("train", "val")], ignored)
    prints, notes = [None, None], ignored_kinds(ignored)
    if not record:
        reading, lines = scaled(reading, parts[0].files, workers)
        notes += lines
    if not record and not only_test:
        prints = prints_in_stages([file for part in parts for file in part.files], workers)
        prints = prints.split([len(part) for part in parts])
    decoding = {"size": size, "workers": workers, "skip_unreadable": skip_unreadable, "reading": reading}
    train, test = (
        replace(part, names=None, fingerprints=known, **decoding)
        for part, known in zip(parts, prints, strict=True)
    )
    if not record:
        notes += constant_lines(train, "the training images")
    return Source(
        classes,
        *STATISTICS["imagenet"],
        flip=True,
        size=size,
        crop="none",
        train=train,
        test=test,
        notes=notes,
        reading=reading,
    )


def _folder(
    path,
    resize,
    *,
    test_fraction,
    workers,
    skip_unreadable,
    labels,
    label_columns,
    unlabeled_path,
    own_paths,
    rule,
    reading,
    record,
    only_test,
    **_,
):
    """Any folder of class folders, parts with the usual names or one level that is split here; or any folder
    of images whose classes are in the table ``labels``.

    If all images have the same size up to 64 pixels, or ``resize`` is at most 64, they are held in memory,
    each as a whole and stretched to a square. Otherwise workers decode crops of ``resize`` or 224 pixels. The
    unlabelled images stay files until it is known which of them are left out.
    """
    if not os.path.isdir(path):
        raise UserError(f"there is no folder '{path}': give the folder of your images with --data-path")
    if labels:
        found = find_table(labels, path, label_columns, record and record["classes"], only_test)
    else:
        found = find_folders(path, record, only_test, unlabeled_path, own_paths)
    classes, train, test, val, notes = found.classes, found.train, found.test, found.val, list(found.notes)
    for part in (train, test, val, found.unlabeled):
        if part is not None:
            part.fingerprints = fingerprints(part.files, workers, rule)
    if not only_test:
        notes += _in_two_classes([part for part in (train, test, val) if part is not None], classes)
    if test is None:
        train, test, more = split_folder(train, path, classes, test_fraction, record, only_test)
        notes += more
    if record and "trained" in record:
        refuse_trained(test, record, path)
    if not only_test:
        counts = np.bincount(test.targets, minlength=len(classes))
        missing = [name for name, count in zip(classes, counts, strict=True) if count == 0]
        way = "a larger --test-fraction or a folder test/ helps"
        if found.test is not None:
            way = f"put some into {test.names[0].split('/')[0]}/"
            way = "give some of their rows the split test" if labels else way
        notes += [f"these classes have no test image: {listed(missing)}; {way}"] if missing else []
    notes.append(sizes_line(test if only_test else train))

    if not record:
        reading, lines = scaled(reading, train.files, workers)
        notes += lines
    train, test, val = (part and replace(part, reading=reading) for part in (train, test, val))
    first = None
    if resize is None or resize <= SMALL:
        first = read_images(test if only_test else train, resize, workers, skip_unreadable)
    if first is not None:
        size, crop = first.images.shape[-1], "pad"
        mean, std = (None, None) if record else channel_statistics(first.images)
        if only_test:
            test = first
        else:
            train, test = first, read_images(test, size, workers, skip_unreadable)
            val = val and read_images(val, size, workers, skip_unreadable)
    else:
        size, crop = resize or 224, "none"
        mean, std = (None, None) if record else sampled_statistics(train, workers, skip_unreadable)
        decoding = {"size": size, "workers": workers, "skip_unreadable": skip_unreadable}
        test = replace(test, **decoding)
        train = None if only_test else replace(train, **decoding)
        val = val and replace(val, **decoding)
    if not record:
        notes += constant_lines(train, "the training images")
    if not record or only_test:
        notes += constant_lines(test, "the test images")
    return Source(
        classes,
        mean,
        std,
        flip=True,
        size=size,
        crop=crop,
        train=train,
        test=test,
        val=val,
        unlabeled=found.unlabeled,
        notes=notes,
        reading=reading,
    )


def scaled(reading, files, workers):
    """The reading with the scale of the deep images among files, if it has none yet, and notes."""
    if reading.value_range:
        return reading, []
    value_range, line = find_value_range(files, reading, workers)
    return replace(reading, value_range=value_range), [line] if line else []


def _in_two_classes(parts, classes):
    """The warning about the same picture in two classes, in a list."""
    first, twice = {}, {}
    for part in parts:
        for name, number, target in zip(
            part.names, part.fingerprints.tolist(), part.targets.tolist(), strict=True
        ):
            known, known_target = first.setdefault(number, (name, target))
            if target != known_target:
                twice.setdefault(number, (known, name))
    if not twice:
        return []
    one, other = next(iter(twice.values()))
    pictures = "1 picture lies" if len(twice) == 1 else f"{len(twice):,} pictures lie"
    return [f"{pictures} in two classes, such as {one} and {other}: leave each in one of them"]


READERS = {
    "twomoons": _two_moons,
    "digits": _digits,
    "cifar10": _cifar10,
    "cifar100": _cifar100,
    "svhn": _svhn,
    "stl10": _stl10,
    "imagenet": _imagenet,
    "folder": _folder,
}
NAMES = tuple(READERS)
POINTS = ("twomoons",)  # of points in the plane, not of images
WITHOUT_FILES = ("twomoons", "digits")  # come with the program and its libraries


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
    """An ``ImageSet`` in memory that is known by its pixels before ``_fitted``."""
    return ImageSet(targets, _fitted(images, size), fingerprints=pixel_prints(images))


def _fitted(images, size):
    """(N, 3, H, W) uint8 images, contiguous, resized to ``size`` x ``size`` unless it is None."""
    images = images.contiguous()
    if size in (None, images.shape[-1]):
        return images
    return torch.cat([resized(chunk, size) for chunk in images.split(1000)])


# -------------------------------------------------------------------------------------- unlabelled images


def _tree(path, dataset, rule, workers):
    """The files of a tree without classes as an ``ImageSet``; with fingerprints unless ``rule`` is None."""
    if dataset.size == 0:
        raise UserError("two moons are points: --unlabeled-path needs a data set of images")
    files, _ = image_tree(path, "--unlabeled-path")
    prints = rule and fingerprints(files, workers, rule)
    return ImageSet([-1] * len(files), files=files, names=relative(files, path), fingerprints=prints)


def _unlabeled_images(extra, place, dataset, train, keeps_copies):
    """Files without classes as an ``ImageSet`` of the same kind as the training images.

    Test and validation images are left out: for files and folders those with the same content, for other data
    sets those with the same pixels.

    Args:
        place: their folder, for messages.
        keeps_copies: whether test and validation images are kept.
    """
    held_out = [part for part in (dataset.test, dataset.val) if part is not None]
    if train.names is None and train.in_memory:
        extra = read_images(extra, dataset.size, extra.workers, extra.skip_unreadable)
        extra, *held_out = (replace(x, fingerprints=pixel_prints(x.images)) for x in (extra, *held_out))
    elif train.names is None:
        prints = prints_in_stages([f for x in (extra, *held_out) for f in x.files], extra.workers)
        prints = prints.split([len(x) for x in (extra, *held_out)])
        extra, *held_out = (
            replace(x, fingerprints=p) for x, p in zip((extra, *held_out), prints, strict=True)
        )
    count, copies = len(extra), [] if keeps_copies else _copies(extra, held_out)
    if len(copies) == count:
        raise UserError(f"all images in '{place}' are test or validation images: correct --unlabeled-path")
    extra = extra.subset(np.setdiff1d(np.arange(count), copies))
    if train.in_memory and not extra.in_memory:
        extra = read_images(extra, dataset.size, extra.workers, extra.skip_unreadable)
    if copies:
        dataset.notes.append(
            f"{len(copies)} of {count} images in '{place}' are test or validation images: left out"
        )
    return extra


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
        num_labeled, num_val: counts (int), divided evenly over the classes; or fractions of every class
            (float), rounded, at least one image each. The count N takes every image, and so does the fraction
            1.0, less the validation images.
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
    sizes = np.bincount(targets[eligible], minlength=num_classes).tolist()
    passed = np.bincount(targets[~eligible], minlength=num_classes).tolist()
    beside = [f" beside {n} copies of test or validation images" if n else "" for n in passed]
    per_val = _per_class(num_val, sizes, len(targets), "--num-val", classes)
    if labeled is None:
        per_label = _per_class(num_labeled, sizes, len(targets), "--num-labeled", classes)
        if isinstance(num_labeled, float):  # a fraction leaves room for validation
            per_label = [
                min(n, max(1, size - v)) for n, size, v in zip(per_label, sizes, per_val, strict=True)
            ]
    else:
        labeled = np.asarray(labeled)[eligible[labeled]]
        per_label = np.bincount(targets[labeled], minlength=num_classes).tolist()
    for name, size, n, v, more in zip(classes, sizes, per_label, per_val, beside, strict=True):
        if size == 0:
            raise UserError(f"class '{name}' has no training images{more}: add some or remove the class")
        if n == 0:
            raise UserError(f"class '{name}' has no labelled image{more}: add at least one")
        if n + v > size:
            raise UserError(
                f"class '{name}' has {size} training images{more}, too few for {n} labelled and {v} "
                "validation images: lower --num-labeled or --num-val, or add images"
            )

    random = np.random.RandomState(seed)
    chosen, rests = [], []
    for k in range(num_classes):
        members = np.flatnonzero(targets == k)
        if names is None:
            order = random.permutation(members)
        else:
            order = np.array(sorted(members, key=lambda i: place_of(f"{seed}/{names[i]}")), dtype=np.int64)
        order = order[eligible[order]]
        taken = order[: per_label[k]] if labeled is None else order[np.isin(order, labeled)]
        rests.append(order[np.isin(order, taken, invert=True)])
        chosen += taken.tolist()
    val = []
    for name, rest, count in zip(classes, rests, per_val, strict=True):
        if prints is not None and count:
            rest = rest[~torch.isin(prints[rest], prints[chosen]).numpy()]
        if len(rest) < count:
            raise UserError(
                f"class '{name}' has {len(rest)} training images that are no copies of labelled ones, too "
                f"few for {count} validation images: lower --num-labeled or --num-val, or add images"
            )
        val += rest[:count].tolist()
    return sorted(chosen), sorted(val)


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
            f"{flag} {number} does not divide by the {len(sizes)} classes ({', '.join(classes[:10])}): use "
            + ", or ".join(ways)
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
        raise UserError(f"cannot read the labelled images from {path}: {reason(error)}") from error
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


def keys_of(record, kind):
    """(fingerprint, class) of each "labeled" or "val" image of a run."""
    return list(zip(record[f"{kind}_prints"].tolist(), record[f"{kind}_targets"].tolist(), strict=True))


def recorded_images(record, train, path):
    """Positions in the training set of the labelled and the validation images of a run, two sorted lists.

    Raises:
        UserError: one of them is missing or has been replaced by another image.
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
        for name, key in zip(names, keys_of(record, kind), strict=True):
            same = here.get(key, [])  # of copies of one image the one that still has this name, or any
            same.sort(key=lambda i: train.names[i] != name, reverse=True)
            positions.append(same.pop()) if same else gone.append(name)
        if gone:
            other = {number: target for number, target in here}
            for name, (number, was) in zip(names, keys_of(record, kind), strict=True):
                if name in gone and number in other:
                    now, was = (record["classes"][k] for k in (other[number], was))
                    raise UserError(
                        f"{name} is labelled '{now}' now and was '{was}' when the run began: start a new run "
                        "under another --name, or put the label back"
                    )
            raise UserError(
                f"{len(gone)} of the run's {len(names)} {'labelled' if kind == 'labeled' else 'validation'} "
                f"images are not among the training images of '{path}' any more, under this or another name, "
                f"such as {gone[0]}: put them back, or give the folder that the run was started with"
            )
        found.append(sorted(positions))
    return found
