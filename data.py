"""Which images exist: the data sets, folders of images, and the split into labelled and unlabelled ones.

``load_dataset`` calls the reader of a data set (``READERS``, one function each), splits what it returns and
hands on a ``Dataset``: the labelled, unlabelled, validation and test images, each an ``ImageSet``. By then
small images are in memory; of large ones only the paths are known, and ``loader.py`` decodes them.

A new data set needs one function that returns a ``Source`` and one line of ``READERS``.
"""

import contextlib
import math
import os
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from folders import (
    class_folders,
    find_folders,
    image_tree,
    listed,
    place_of,
    refuse_trained,
    relative,
    split_folder,
)
from images import (
    SMALL,
    ImageSet,
    channel_statistics,
    fingerprints,
    read_images,
    reason,
    resized,
    sampled_statistics,
    sizes_line,
)
from runtime import UserError, write_atomically
from tables import find_table

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
    unlabeled: ImageSet | None = None  # further images to learn from, without their labels
    notes: tuple = ()  # sentences for the user about what was found


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
    path: str = ""  # folder of the files, absolute; "" for data sets without files
    notes: list = field(default_factory=list)  # sentences for the user about what was found

    @property
    def num_classes(self):
        return len(self.classes)

    def record(self):
        """What a checkpoint keeps about its data, so that no later command can confuse it with other data.

        Returns:
            dict of plain values and tensors: "name", "classes", "mean", "std", "size", "crop", "path".
            Of a folder also "labeled", "val", "test": lists of names; "labeled_prints", "labeled_targets",
            "val_prints", "val_targets": (N,) int64 fingerprints and classes of these images; "trained",
            "tested": (N,) int64 fingerprints of the images that the networks learn from or are chosen by, and
            of the test images. Of other data sets "labeled", "val": int64 positions; "test": how many.
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


# -------------------------------------------------------------------------------------------- load_dataset

# keywords of load_dataset that a run passes on from its flags as they are
OPTIONS = ("num_labeled", "num_val", "seed", "unlabeled_path", "unlabeled_mode", "test_fraction", "workers")
OPTIONS += ("skip_unreadable", "svhn_extra", "labels", "label_columns")


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
            (``unlabeled_mode="add"``) or replacing it (``"only"``). Test and validation images in it are left
            out.
        test_fraction: part of every class that is set aside for testing if a folder has no ``test``.
        workers: threads that read images into memory, or DataLoader processes that decode them.
        skip_unreadable: leave out images that cannot be decoded, with a line on standard error.
        svhn_extra: add SVHN's 531,131 ``extra`` images to the unlabelled ones, as in the paper.
        labels: table of the images' classes, in the place of class folders (see tables.py).
        label_columns: names of its file column and its label column; empty: found by the usual names.
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
    source = READERS[name](
        data_path,
        resize,
        test_fraction=test_fraction,
        workers=workers,
        skip_unreadable=skip_unreadable,
        svhn_extra=svhn_extra,
        labels=labels,
        label_columns=label_columns,
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
        )
    dataset.labeled_indices, dataset.val_indices = labeled, val
    dataset.labeled = train.subset(labeled)
    dataset.val = train.subset(val) if val else None
    dataset.unlabeled = train.subset(np.setdiff1d(np.arange(len(train)), val)) if val else train
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
                f"the images to learn from are not those that the run had before: {len(before):,} different "
                f"ones then, {len(now):,} now"
            )
    return dataset


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
# that concern reading: test_fraction, workers, skip_unreadable, svhn_extra, labels, label_columns, record,
# only_test. Each names those that it uses. ``resize`` is None for the data set's own size.


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
    images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False)
    images = images.round().to(torch.uint8).repeat(1, 3, 1, 1)
    train, test = (ImageSet(targets[order[part]], images[part]) for part in (slice(1297), slice(1297, None)))
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
    train, test = (ImageSet(part.targets, _fitted(x, resize)) for part, x in zip(parts, images, strict=True))
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
    train, test, *extra = (
        ImageSet(part.labels, _fitted(torch.from_numpy(part.data), resize)) for part in parts
    )
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
    train, test, unlabeled = (
        ImageSet(part.labels, _fitted(torch.from_numpy(part.data), resize)) for part in parts
    )
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


def _imagenet(path, resize, *, workers, skip_unreadable, **_):
    """ImageNet in torchvision's layout: ``train/<class>/*`` and ``val/<class>/*``, decoded by workers."""
    for part in ("train", "val"):
        if not os.path.isdir(os.path.join(path, part)):
            raise UserError(
                f"'{path}' has no folder '{part}': --dataset imagenet needs train/ and val/ with one folder "
                "per class in each"
            )
    size = resize or 224
    classes, parts, notes = class_folders(path, "val")
    train, test = (
        replace(part, names=None, size=size, workers=workers, skip_unreadable=skip_unreadable)
        for part in parts
    )
    return Source(
        classes,
        *STATISTICS["imagenet"],
        flip=True,
        size=size,
        crop="none",
        train=train,
        test=test,
        notes=notes,
    )


def _folder(
    path,
    resize,
    *,
    test_fraction,
    workers,
    skip_unreadable,
    labels=None,
    label_columns=(),
    record,
    only_test,
    **_,
):
    """Any folder of class folders: ``train/`` with ``test/`` or ``val/``, or one level that is split here; or
    any folder of images whose classes are in the table ``labels``.

    ``val/`` is used if there is no ``test/``; validation images are drawn from the training images. If all
    images have the same size up to 64 pixels, or ``resize`` is at most 64, they are held in memory, each as a
    whole and stretched to a square. Otherwise workers decode crops of ``resize`` or 224 pixels.
    """
    if not os.path.isdir(path):
        raise UserError(f"there is no folder '{path}': give the folder of your images with --data-path")
    known = record and record["classes"]
    if labels:
        found = find_table(labels, path, label_columns, known, only_test)
    else:
        found = find_folders(path, known, only_test)
    classes, train, test, notes = found.classes, found.train, found.test, list(found.notes)
    unlabeled = found.unlabeled
    for part in (train, test, unlabeled):
        if part is not None:
            part.fingerprints = fingerprints(part.files, workers)
    if found.test is None:
        train, test, more = split_folder(train, path, classes, test_fraction, record, only_test)
        notes += more
    if record and "trained" in record:
        refuse_trained(test, record, path)
    elif train is not None and not record:
        twins = torch.isin(test.fingerprints, train.fingerprints)
        if twins.any():
            name = test.names[int(twins.int().argmax())]
            notes.append(
                f"{int(twins.sum())} of {len(twins)} test images are among the training images too, such as "
                f"{name}: the accuracy will be too high by them"
            )
    if not only_test:
        counts = np.bincount(test.targets, minlength=len(classes))
        missing = [name for name, count in zip(classes, counts, strict=True) if count == 0]
        way = "a larger --test-fraction or a folder test/ helps"
        if found.test is not None:
            way = f"put some into {test.names[0].split('/')[0]}/"
            way = "give some of their rows the split test" if labels else way
        notes += [f"these classes have no test image: {listed(missing)}; {way}"] if missing else []
    notes.append(sizes_line(test if only_test else train))

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
            unlabeled = unlabeled and read_images(unlabeled, size, workers, skip_unreadable)
    else:
        size, crop = resize or 224, "none"
        mean, std = (None, None) if record else sampled_statistics(train, workers, skip_unreadable)
        decoding = {"size": size, "workers": workers, "skip_unreadable": skip_unreadable}
        test = replace(test, **decoding)
        train = None if only_test else replace(train, **decoding)
    return Source(
        classes,
        mean,
        std,
        flip=True,
        size=size,
        crop=crop,
        train=train,
        test=test,
        unlabeled=unlabeled,
        notes=notes,
    )


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
            with _download_lock(path):
                return [make(path, download=True, **choice) for choice in choices]
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"{title} is not in '{path}', or damaged, and could not be downloaded ({reason(error)}): "
            f"put {files} into that folder, or use --dataset digits or twomoons, which need no download, "
            "or --dataset folder with your own images"
        ) from error


@contextlib.contextmanager
def _download_lock(folder):
    """Hold a lock file in the folder, so that one of several processes downloads and the others wait."""
    try:
        import fcntl

        os.makedirs(folder, exist_ok=True)
        file = open(os.path.join(folder, ".download.lock"), "w")  # noqa: SIM115 (closed below)
    except (ImportError, OSError):  # Windows, or a folder that cannot be written to
        yield
        return
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fitted(images, size):
    """(N, 3, H, W) uint8 images, contiguous, resized to ``size`` x ``size`` unless it is None."""
    images = images.contiguous()
    if size in (None, images.shape[-1]):
        return images
    return torch.cat([resized(chunk, size) for chunk in images.split(1000)])


# -------------------------------------------------------------------------------------- unlabelled images


def _unlabeled_images(path, dataset, train, workers, skip_unreadable):
    """The images of a tree without classes as an ``ImageSet`` of the same kind as the training set.

    Test and validation images are left out: for files and folders those with the same content, for other data
    sets those with the same pixels.
    """
    if dataset.size == 0:
        raise UserError("two moons are points: --unlabeled-path needs a data set of images")
    files, _ = image_tree(path, "--unlabeled-path")
    held_out = [part for part in (dataset.test, dataset.val) if part is not None]
    extra = ImageSet(
        [-1] * len(files),
        files=files,
        size=dataset.size,
        workers=workers,
        skip_unreadable=skip_unreadable,
        names=relative(files, path),
        fingerprints=fingerprints(files, workers),
    )
    if train.in_memory and train.names is None:
        extra = read_images(extra, dataset.size, workers, skip_unreadable)
        seen = {image.numpy().tobytes() for part in held_out for image in part.images}
        known = np.array([image.numpy().tobytes() in seen for image in extra.images])
    else:
        seen = [x.fingerprints if x.names else fingerprints(x.files, workers) for x in held_out]
        known = torch.isin(extra.fingerprints, torch.cat(seen)).numpy()
    if known.all():
        raise UserError(f"all images in '{path}' are test or validation images: correct --unlabeled-path")
    extra = extra.subset(np.flatnonzero(~known))
    if train.in_memory and not extra.in_memory:
        extra = read_images(extra, dataset.size, workers, skip_unreadable)
    if known.any():
        dataset.notes.append(
            f"{known.sum()} of {len(files)} images in '{path}' are test or validation images: left out"
        )
    return extra


# ---------------------------------------------------------------------------- labelled and validation images


def split_labels(targets, num_labeled, num_val, num_classes, seed, *, classes=None, labeled=None, names=None):
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
        if isinstance(num_labeled, float):  # a fraction leaves room for validation
            per_label = [
                min(n, max(1, size - v)) for n, size, v in zip(per_label, sizes, per_val, strict=True)
            ]
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
    """How many images of each class a count (int) or a fraction (float) means, as a list of int."""
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
        keys = zip(record[f"{kind}_prints"].tolist(), record[f"{kind}_targets"].tolist(), strict=True)
        for name, key in zip(names, keys, strict=True):
            same = here.get(key, [])  # of copies of one image the one that still has this name, or any
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
