"""Which images exist: the data sets, folders of images, and the split into labelled and unlabelled ones.

``load_dataset`` calls the reader of a data set (``READERS``, one function each), splits what it returns and
hands on a ``Dataset``: the labelled, unlabelled, validation and test images, each an ``ImageSet``. By then
small images are in memory; of large ones only the paths are known, and ``loader.py`` decodes them.

A new data set needs one function that returns a ``Source`` and one line of ``READERS``.
"""

import contextlib
import hashlib
import math
import os
import struct
import sys
import unicodedata
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F

from runtime import UserError, write_atomically

# Channel mean and standard deviation of the training images / 255, as published for each data set.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SMALL = 64  # pixels: a folder of images up to this size is held in memory
ORIENTATION = 0x0112  # the EXIF tag; 1 is upright, 5 and above turn by 90 or 270 degrees
IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)


# ---------------------------------------------------------------------------------------------- containers


@dataclass(eq=False)
class ImageSet:
    """Images (or points) and their classes, in memory or as files on disk."""

    targets: torch.Tensor  # (N,) int64, -1 where the class is not known; given as any sequence of int
    images: torch.Tensor | None = None  # (N, 3, H, W) uint8 or (N, 2) float32; None for files
    files: list | None = None  # N paths of images that are decoded when they are needed
    size: int = 0  # pixels, height and width to which files are decoded
    crop: str = "none"  # what evaluation sees of a file: its centre, or with "pad" the whole image
    workers: int = 0  # DataLoader processes that decode files for evaluation
    skip_unreadable: bool = False  # leave out files that cannot be decoded instead of stopping
    names: list | None = None  # of a folder: N paths relative to it, with "/"
    fingerprints: torch.Tensor | None = None  # of a folder: (N,) int64 digests of the files' content

    def __post_init__(self):
        self.targets = torch.as_tensor(self.targets, dtype=torch.int64)

    @property
    def in_memory(self):
        return self.images is not None

    def __len__(self):
        return len(self.targets)

    def subset(self, indices):
        """The images at these positions, in this order, as a new set."""
        indices = torch.as_tensor(indices, dtype=torch.int64)
        positions = indices.tolist()
        return replace(
            self,
            targets=self.targets[indices],
            images=None if self.images is None else self.images[indices],
            files=None if self.files is None else [self.files[i] for i in positions],
            names=None if self.names is None else [self.names[i] for i in positions],
            fingerprints=None if self.fingerprints is None else self.fingerprints[indices],
        )

    def to(self, device):
        """The same set with images and targets on the device."""
        images = self.images.to(device) if self.in_memory else None
        return replace(self, targets=self.targets.to(device), images=images)

    def extended(self, other):
        """This set followed by ``other``, which holds images of the same kind."""
        known = self.fingerprints is not None and other.fingerprints is not None
        return replace(
            self,
            targets=torch.cat([self.targets, other.targets]),
            images=torch.cat([self.images, other.images]) if self.in_memory else None,
            files=None if self.in_memory else self.files + other.files,
            names=self.names + other.names if known else None,
            fingerprints=torch.cat([self.fingerprints, other.fingerprints]) if known else None,
        )


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
OPTIONS += ("skip_unreadable", "svhn_extra")


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
    source = READERS[name](
        data_path,
        resize,
        test_fraction=test_fraction,
        workers=workers,
        skip_unreadable=skip_unreadable,
        svhn_extra=svhn_extra,
        record=record,
        only_test=only_test,
    )
    if record and list(source.classes) != list(record["classes"]):
        raise UserError(
            f"the classes of {name} are {_listed(source.classes)}, "
            f"those of the run {_listed(record['classes'])}"
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


def _listed(classes):
    """Class names for a message: up to ten of them; of more, how many there are."""
    more = f", … ({len(classes)} in all)" if len(classes) > 10 else ""
    return ", ".join(map(str, classes[:10])) + more


# ----------------------------------------------------------------------------------------------- the readers
#
# One function per data set, all called as reader(path, resize, **options) with the options of load_dataset
# that concern reading: test_fraction, workers, skip_unreadable, svhn_extra, record, only_test. Each names
# those that it uses. ``resize`` is None for the data set's own size.


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
    classes, parts, notes = _class_folders(path, "val")
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


def _folder(path, resize, *, test_fraction, workers, skip_unreadable, record, only_test, **_):
    """Any folder of class folders: ``train/`` with ``test/`` or ``val/``, or one level that is split here.

    ``val/`` is used if there is no ``test/``; validation images are drawn from the training images. If all
    images have the same size up to 64 pixels, or ``resize`` is at most 64, they are held in memory, each as a
    whole and stretched to a square. Otherwise workers decode crops of ``resize`` or 224 pixels.
    """
    if not os.path.isdir(path):
        raise UserError(f"there is no folder '{path}': give the folder of your images with --data-path")
    test_name = next((p for p in ("test", "val") if os.path.isdir(os.path.join(path, p))), None)
    has_train = os.path.isdir(os.path.join(path, "train"))
    if test_name and not has_train and not only_test:
        raise UserError(f"'{path}' has {test_name}/ but no train/: add the folder of training images")
    if has_train and test_name is None:
        raise UserError(
            f"'{path}' has train/ but neither test/ nor val/: add one of them, or give "
            f"'{os.path.join(path, 'train')}' itself to have it split"
        )
    classes, (train, test), notes = _class_folders(path, test_name, record and record["classes"], only_test)
    for part in (train, test):
        if part is not None:
            part.fingerprints = fingerprints(part.files, workers)
    if test_name is None:
        train, test, more = _split_folder(train, path, classes, test_fraction, record, only_test)
        notes += more
    if record and "trained" in record:
        _refuse_trained(test, record, path)
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
        way = (
            f"put some into {test_name}/" if test_name else "a larger --test-fraction or a folder test/ helps"
        )
        notes += [f"these classes have no test image: {_listed(missing)}; {way}"] if missing else []
    notes.append(_sizes(test if only_test else train))

    first = None
    if resize is None or resize <= SMALL:
        first = _read_images(test if only_test else train, resize, workers, skip_unreadable)
    if first is not None:
        size, crop = first.images.shape[-1], "pad"
        mean, std = (None, None) if record else channel_statistics(first.images)
        if only_test:
            test = first
        else:
            train, test = first, _read_images(test, size, workers, skip_unreadable)
    else:
        size, crop = resize or 224, "none"
        mean, std = (None, None) if record else _sampled_statistics(train, workers, skip_unreadable)
        decoding = {"size": size, "workers": workers, "skip_unreadable": skip_unreadable}
        test = replace(test, **decoding)
        train = None if only_test else replace(train, **decoding)
    return Source(classes, mean, std, flip=True, size=size, crop=crop, train=train, test=test, notes=notes)


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
            f"{title} is not in '{path}', or damaged, and could not be downloaded ({_reason(error)}): "
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


def resized(images, size):
    """(N, 3, H, W) uint8 images at ``size`` x ``size``, bicubic with antialiasing."""
    return F.interpolate(images, (size, size), mode="bicubic", antialias=True)


# -------------------------------------------------------------------------------------- folders of images


def _class_folders(root, test_name, classes=None, only_test=False):
    """Class names, [training images, test images] as files with names, and lines for the user.

    With ``test_name`` the images are those of ``root/train`` (None with ``only_test``) and of
    ``root/<test_name>``; without it all images of ``root``, and None.

    Args:
        classes: those of a run, if there is one: the folders must not have others.

    Raises:
        UserError: no class folders, an unknown class, no images, or a file in two classes.
    """
    train = root if test_name is None else os.path.join(root, "train")
    test = test_name and os.path.join(root, test_name)
    places = [None if only_test and test else train, test]
    first = places[0] or test
    known = list(classes) if classes else _class_names(first)
    for place in filter(None, places):
        unknown = sorted(set(_class_names(place, at_least=1)) - set(known))
        if unknown and classes:
            raise UserError(f"class '{unknown[0]}' of '{place}' is not one of the run's: {_listed(known)}")
        if unknown:
            raise UserError(f"class '{unknown[0]}' of '{place}' has no folder in '{first}': add or remove it")
    ignored, owner = Counter(), {}
    parts = [place and _list_classes(place, known, root, ignored, owner) for place in places]
    lines = _ignored_kinds(ignored)
    reserved = ("train", "test", "val")
    named = [name for name in known if name.lower() in reserved and name not in reserved]
    how = "the parts of a data set are found by the names train, test and val in small letters"
    if named and len(named) == len(known):
        raise UserError(f"the folders of '{root}' are {_listed(named)}: {how}")
    lines += [f"the folder '{name}' in '{root}' is taken for a class: {how}" for name in named]
    return known, parts, lines


def _ignored_kinds(ignored):
    """A line for the user about files that were left out, in a list; ``ignored``: Counter of their kinds."""
    if not ignored:
        return []
    kinds = ", ".join(f"{kind} {count}" for kind, count in ignored.most_common())
    photographs = ignored.keys() & {".heic", ".heif", ".avif", ".raw", ".cr2", ".nef", ".arw", ".dng"}
    advice = " (photographs among them, which cannot be read: convert them to JPEG)" if photographs else ""
    return [f"{sum(ignored.values())} ignored: {kinds}{advice}"]


def _class_names(root, at_least=2):
    """Sorted names of the folders in ``root``, except hidden ones."""
    names = sorted(e.name for e in os.scandir(root) if e.is_dir() and not _ignored(e.name))
    if not names:
        raise UserError(
            f"there are no class folders in '{root}': put the images of each class into a folder there"
        )
    if len(names) < at_least:
        raise UserError(f"'{root}' has only one class folder, '{names[0]}': at least 2 classes are needed")
    return names


def _list_classes(place, classes, root, ignored, owner):
    """All images below ``place/<class>`` as an ``ImageSet`` of files, in the order of class and path.

    Args:
        root: names are relative to it.
        ignored: Counter of what is left out, by type; grows.
        owner: (class, path) of every file seen so far, by the file's identity; grows.
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
    return ImageSet(targets, files=files, names=relative(files, root))


def relative(files, root):
    """The rest of paths that begin with ``root``, with "/" on every system."""
    start = len(os.path.join(root, ""))
    return [path[start:].replace(os.sep, "/") for path in files]


def _ancestors(folder):
    """Identities of a folder and of all folders above it: a link to one of them would lead in a circle."""
    parents, path = set(), os.path.realpath(folder)
    while True:
        status = os.stat(path)
        parents.add((status.st_dev, status.st_ino))
        if path == os.path.dirname(path):
            return parents
        path = os.path.dirname(path)


def image_tree(root, argument):
    """Sorted paths of all images at any depth below a folder, and lines for the user about other files.

    Args:
        argument: what of the command line says the folder, for messages.

    Raises:
        UserError: there is no such folder, no image in it, or a folder that cannot be read.
    """
    if os.path.isfile(root):
        raise UserError(f"'{root}' is a file: give the folder it lies in as {argument}")
    if not os.path.isdir(root):
        raise UserError(f"there is no folder '{root}' of images: correct {argument}")
    ignored = Counter()
    files = [path for path, _ in _image_files(root, _ancestors(root), ignored)]
    lines = _ignored_kinds(ignored)
    if not files:
        found = f" ({lines[0]})" if lines else ""
        raise UserError(
            f"there are no images in '{root}'{found}: {argument} needs image files ({_suffixes()})"
        )
    return files, lines


def _image_files(root, outside, ignored):
    """Sorted (path, identity) of all image files at any depth below ``root``, except hidden ones.

    Links are followed, but every real folder is visited only once, and none of ``outside``. A broken link is
    listed without an identity, so that reading it fails with its name.

    Args:
        outside: identities of folders, (device, inode).
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
    """Whether a file or folder is hidden, or one of those that a Mac adds to archives."""
    return name[0] == "." or name == "__MACOSX"


def _suffixes():
    return ", ".join(IMAGE_SUFFIXES)


def _split_folder(found, root, classes, test_fraction, record, only_test):
    """The training images (None with ``only_test``) and the test images of a folder without ``test``, and
    lines for the user.

    On which side an image falls depends only on its own name, class folder included: adding or removing other
    images does not move it. With the record of a run, images that the run knew stay on their side, even if
    they have been renamed.
    """
    if not 0 < test_fraction < 1:
        raise UserError(f"--test-fraction {test_fraction} leaves no images to train or to test: use e.g. 0.2")
    if record and "labeled" not in record:
        testing = _split_by_position(found.targets.numpy(), len(classes), test_fraction)
        train, test = found.subset(np.flatnonzero(~testing)), found.subset(np.flatnonzero(testing))
        return None if only_test else train, test, []
    if record and "trained" not in record:  # the run was not on a folder
        return None, found, []
    testing = np.array([place_of(name) < test_fraction for name in found.names], dtype=bool)
    if record:
        trained = torch.isin(found.fingerprints, record["trained"]).numpy()
        tested = torch.isin(found.fingerprints, record["tested"]).numpy()
        names = set(record["test"])
        named = np.array([name in names for name in found.names], dtype=bool)
        # the run's folder in another place, not one that shares an image; "trained" also counts other folders
        parts = (record.get("labeled_prints", record["trained"]), record["tested"])
        moved = all(torch.isin(part, found.fingerprints).float().mean() > 0.5 for part in parts)
        if only_test and not moved and os.path.abspath(root) != record["path"]:
            return None, found, [f"'{root}' is not the run's folder: all of its images are test images"]
        testing = (tested & named) | (~trained & (tested | testing))
    train, test = found.subset(np.flatnonzero(~testing)), found.subset(np.flatnonzero(testing))
    if not len(test):
        raise UserError(
            f"none of the {len(found)} images in '{root}' is a test image: raise --test-fraction or add a "
            "folder test/"
        )
    return None if only_test else train, test, []


def _split_by_position(targets, num_classes, test_fraction):
    """The split of early versions, for their checkpoints: (N,) bool, whether an image is a test image."""
    test, random = [], np.random.RandomState(0)
    for k in range(num_classes):
        order = random.permutation(np.flatnonzero(targets == k))
        test += order[: min(len(order) - 1, max(1, int(test_fraction * len(order) + 0.5)))].tolist()
    return np.isin(np.arange(len(targets)), test)


def _refuse_trained(test, record, root):
    """UserError if the run of the record has learned from an image that is to test it."""
    learned = torch.isin(test.fingerprints, record["trained"])
    learned &= ~torch.isin(test.fingerprints, record["tested"])
    if learned.any():
        raise UserError(
            f"{int(learned.sum())} of the {len(learned)} test images in '{root}' were trained on by this "
            f"run, such as {test.names[int(learned.int().argmax())]}: test it on other images"
        )


def fingerprints(files, workers=1):
    """(N,) int64 digests of the files' content: equal for copies, whatever their names.

    Of files above 128 KiB only three pieces of 32 KiB and the size count. For a file that cannot be read the
    digest is that of its path.
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
        extra = _read_images(extra, dataset.size, workers, skip_unreadable)
        seen = {image.numpy().tobytes() for part in held_out for image in part.images}
        known = np.array([image.numpy().tobytes() in seen for image in extra.images])
    else:
        seen = [x.fingerprints if x.names else fingerprints(x.files, workers) for x in held_out]
        known = torch.isin(extra.fingerprints, torch.cat(seen)).numpy()
    if known.all():
        raise UserError(f"all images in '{path}' are test or validation images: correct --unlabeled-path")
    extra = extra.subset(np.flatnonzero(~known))
    if train.in_memory and not extra.in_memory:
        extra = _read_images(extra, dataset.size, workers, skip_unreadable)
    if known.any():
        dataset.notes.append(
            f"{known.sum()} of {len(files)} images in '{path}' are test or validation images: left out"
        )
    return extra


# ------------------------------------------------------------------------------- image files into memory

# What decoders raise for damaged files of the various formats.
DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, OverflowError),
    *(struct.error, zlib.error, Image.DecompressionBombError),
)


class _OtherSize(Exception):
    """An image does not have the size of the first one."""


def _read_images(image_set, size, workers, skip_unreadable):
    """Read a set of files into one uint8 tensor, by a pool of threads (decoding releases Python's lock).

    Args:
        size: pixels, height and width; None takes the longer side of the first image.

    Returns:
        ImageSet in memory, or None if ``size`` is None and not all images have one size up to 64 pixels.
    """
    files, expected = image_set.files, None
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
                images[i] = read_whole(files[i], size, expected)
            except DECODING_ERRORS as error:
                if not skip_unreadable:
                    raise UserError(f"{cannot_read(files[i], error)}: {REPAIR}") from error
                readable[i] = False

    # Measured: small files spend their time in Python, so that two threads are slower than one.
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
        listed = ", ".join(skipped[:10])
        print(
            f"skipped {len(skipped)} of {len(files)} images, which cannot be read: {listed}", file=sys.stderr
        )
        if not readable.any():
            raise UserError(
                f"none of {len(files)} images could be read, {files[0]} and so on: check the files"
            )
        images, image_set = images[torch.from_numpy(readable)], image_set.subset(np.flatnonzero(readable))
    return ImageSet(
        image_set.targets, images.contiguous(), names=image_set.names, fingerprints=image_set.fingerprints
    )


def read_whole(path, size, expected=None):
    """The whole image, stretched to a square: (size, size, 3) uint8 array.

    With ``expected`` = (width, height), an image of another size raises ``_OtherSize``.
    """
    with Image.open(path) as file:
        if expected is None:
            file.draft("RGB", (size, size))  # a JPEG is decoded at 1/2, 1/4 or 1/8 if that is large enough
        image = upright_rgb(file)
    if expected and image.size != expected:
        raise _OtherSize
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


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


REPAIR = "replace or remove it, or leave out such files with --skip-unreadable"


def cannot_read(path, error):
    """What is wrong with an image that cannot be decoded; where it stops a run, ``REPAIR`` follows."""
    return f"the image {path} cannot be read ({_reason(error)})"


def _reason(error):
    """The first line of an exception's message, without a full stop."""
    error = getattr(error, "reason", error)  # of a failed download
    text = getattr(error, "strerror", None) or str(error)
    lines = text.strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def _image_size(path):
    """(width, height) of an image as seen upright; None if it cannot be opened."""
    try:
        with Image.open(path) as image:
            turned = image.getexif().get(ORIENTATION, 1) >= 5
            return image.size[::-1] if turned else image.size
    except DECODING_ERRORS:
        return None


def _sizes(image_set):
    """The line about the sizes of the images of a set of files, from up to 200 of them."""
    sizes = [_image_size(path) for path in image_set.files[:: 1 + len(image_set) // 200]]
    sizes = sorted(filter(None, sizes), key=lambda size: size[0] * size[1])
    if not sizes:
        return "no image could be opened to see its size"
    least, most = (f"{width} × {height}" for width, height in (sizes[0], sizes[-1]))
    return f"images of {least} pixels" if least == most else f"images of {least} to {most} pixels"


def channel_statistics(images):
    """Mean and standard deviation per channel of uint8 images / 255, from at most 10,000 of them.

    Args:
        images: (N, C, H, W) uint8; evenly spaced ones are taken, so that every run gets the same result.

    Returns:
        Two tuples of C floats.
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


def _sampled_statistics(image_set, workers, skip_unreadable):
    """The same for a set of files, from up to 1,000 evenly spaced ones, reduced."""
    sample = image_set.subset(range(0, len(image_set), max(1, math.ceil(len(image_set) / 1000))))
    return channel_statistics(_read_images(sample, SMALL, workers, skip_unreadable).images)


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


def place_of(name):
    """A number in [0, 1), uniformly distributed, that depends only on a name: the same on every machine."""
    # macOS stores an accent as a character of its own, other systems do not
    key = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64


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
