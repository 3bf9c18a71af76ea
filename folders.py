"""From trees of files to sets of images: class folders, training and test parts, what is left out and why."""

import hashlib
import os
import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from images import IMAGE_SUFFIXES, ImageSet, reason
from runtime import UserError

# --------------------------------------------------------------------------------------------- class folders


class Found(NamedTuple):
    """The parts of a data set of files, before any pixel is read."""

    classes: list  # names, in the order of the targets
    train: ImageSet | None  # None where only the test set was asked for
    test: ImageSet | None  # None: test images are still to be split off from the training images
    val: ImageSet | None = None  # chooses among checkpoints; None: to be drawn from the training images
    unlabeled: ImageSet | None = None  # further images to learn from, without labels
    notes: tuple = ()  # sentences for the user


def find_folders(root, classes=None, only_test=False):
    """What a folder of class folders holds: ``train/`` with ``test/`` or ``val/``, or one level of classes.

    Args:
        classes: the class names of a run, if there is one: the folders must not have others.
        only_test: leave out the training images where there is a folder of test images.

    Raises:
        UserError: no class folders, an unknown class, no images, a file in two classes, or a part is missing.
    """
    test_name = next((p for p in ("test", "val") if os.path.isdir(os.path.join(root, p))), None)
    has_train = os.path.isdir(os.path.join(root, "train"))
    if test_name and not has_train and not only_test:
        raise UserError(f"'{root}' has {test_name}/ but no train/: add the folder of training images")
    if has_train and test_name is None:
        raise UserError(
            f"'{root}' has train/ but neither test/ nor val/: add one of them, or give "
            f"'{os.path.join(root, 'train')}' itself to have it split"
        )
    known, (train, test), notes = class_folders(root, test_name, classes, only_test)
    return Found(known, train, test, notes=tuple(notes))


def class_folders(root, test_name, classes=None, only_test=False):
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
            raise UserError(f"class '{unknown[0]}' of '{place}' is not one of the run's: {listed(known)}")
        if unknown:
            raise UserError(f"class '{unknown[0]}' of '{place}' has no folder in '{first}': add or remove it")
    ignored, owner = Counter(), {}
    parts = [place and _list_classes(place, known, root, ignored, owner) for place in places]
    lines = _ignored_kinds(ignored)
    reserved = ("train", "test", "val")
    named = [name for name in known if name.lower() in reserved and name not in reserved]
    how = "the parts of a data set are found by the names train, test and val in small letters"
    if named and len(named) == len(known):
        raise UserError(f"the folders of '{root}' are {listed(named)}: {how}")
    lines += [f"the folder '{name}' in '{root}' is taken for a class: {how}" for name in named]
    return known, parts, lines


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


# -------------------------------------------------------------------------------------- trees of image files


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
        raise UserError(f"the folder {error.filename} cannot be read: {reason(error)}") from error
    return sorted(found)


def _ancestors(folder):
    """Identities of a folder and of all folders above it: a link to one of them would lead in a circle."""
    parents, path = set(), os.path.realpath(folder)
    while True:
        status = os.stat(path)
        parents.add((status.st_dev, status.st_ino))
        if path == os.path.dirname(path):
            return parents
        path = os.path.dirname(path)


def _ignored(name):
    """Whether a file or folder is hidden, or one of those that a Mac adds to archives."""
    return name[0] == "." or name == "__MACOSX"


def _ignored_kinds(ignored):
    """A line for the user about files that were left out, in a list; ``ignored``: Counter of their kinds."""
    if not ignored:
        return []
    kinds = ", ".join(f"{kind} {count}" for kind, count in ignored.most_common())
    photographs = ignored.keys() & {".heic", ".heif", ".avif", ".raw", ".cr2", ".nef", ".arw", ".dng"}
    advice = " (photographs among them, which cannot be read: convert them to JPEG)" if photographs else ""
    return [f"{sum(ignored.values())} ignored: {kinds}{advice}"]


def listed(classes):
    """Class names for a message: up to ten of them; of more, how many there are."""
    more = f", … ({len(classes)} in all)" if len(classes) > 10 else ""
    return ", ".join(map(str, classes[:10])) + more


def _suffixes():
    return ", ".join(IMAGE_SUFFIXES)


def relative(files, root):
    """The rest of paths that begin with ``root``, with "/" on every system."""
    start = len(os.path.join(root, ""))
    return [path[start:].replace(os.sep, "/") for path in files]


# -------------------------------------------------------------------- training and test images of one folder


def split_folder(found, root, classes, test_fraction, record, only_test):
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


def refuse_trained(test, record, root):
    """UserError if the run of the record has learned from an image that is to test it."""
    learned = torch.isin(test.fingerprints, record["trained"])
    learned &= ~torch.isin(test.fingerprints, record["tested"])
    if learned.any():
        raise UserError(
            f"{int(learned.sum())} of the {len(learned)} test images in '{root}' were trained on by this "
            f"run, such as {test.names[int(learned.int().argmax())]}: test it on other images"
        )


def place_of(name):
    """A number in [0, 1), uniformly distributed, that depends only on a name: the same on every machine."""
    # macOS stores an accent as a character of its own, other systems do not
    key = unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64
