"""From trees of files to sets of images: class folders, training and test parts, what is left out and why."""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch

from engine.images import IMAGE_SUFFIXES, ImageSet, reason
from utils import UserError

# ------------------------------------------------------------------------------------- the parts of a folder

# what people call the parts of a data set; capital letters, "_", "-" and spaces make no difference
NAMES_OF_PARTS = {
    "train": ("train", "training", "trainset", "trainingset", "segtrain", "labeled", "labelled"),
    "test": ("test", "testing", "testset", "segtest"),
    "val": ("val", "valid", "validation", "valset", "validationset", "dev"),
    "unlabeled": ("unlabeled", "unlabelled", "unsup", "unsupervised"),
}
WORDS_OF_PARTS = {
    "train": "training images",
    "test": "test images",
    "val": "validation images",
    "unlabeled": "images without labels",
}


class Found(NamedTuple):
    """The parts of a data set of files, before any pixel is read."""

    classes: list  # names, in the order of the targets
    train: ImageSet | None  # None where only the test set was asked for
    test: ImageSet | None  # None: test images are still to be split off from the training images
    val: ImageSet | None = None  # chooses among checkpoints; None: to be drawn from the training images
    unlabeled: ImageSet | None = None  # further images to learn from, without labels
    notes: tuple = ()  # sentences for the user


def find_folders(root, record=None, only_test=False, unlabeled_path=None, taken=()):
    """What a folder of class folders holds: training, test, validation and unlabelled images.

    The classes lie in ``root`` itself, or in folders there with the usual names of the parts of a data set.

    Args:
        record: of a run, if there is one: its classes are the only ones, whatever they are called.
        only_test: leave out all but the test images where there is a folder of test images.
        unlabeled_path: a folder of unlabelled images that takes the place of ``root/unlabeled``.
        taken: further folders that are no classes, because the program writes there.

    Raises:
        UserError: it is not plain which folder is what, a part is missing, there are no class folders, an
            unknown class, no images, or a file in two classes.
    """
    classes = list(record["classes"]) if record else None
    taken = [path for path in (unlabeled_path, *taken) if path]
    places, others = _places(root, classes, taken, only_test)
    one_level, split_here = places.get("train") == root, "test" not in places

    # the parts that this run does not use
    why = {}
    if only_test or (record and record.get("val") is None):
        why["val"] = "the run was started without it"
    if unlabeled_path:
        why["unlabeled"] = "--unlabeled-path names another folder"
    elif only_test or (record and record["fingerprint"] == "pieces"):  # the rule of versions that ignored it
        why["unlabeled"] = "the run was started without it"
    unused = [] if one_level else [f"{name}/" for name in others]
    unused += [f"{_shown(places.pop(part), root)} ({why[part]})" for part in why if part in places]

    # the images
    base = places["train"] if split_here else root  # the same names as if that folder had been given
    ignored = Counter()
    train = None if only_test and not split_here else places["train"]
    folders = [train, places.get("test"), places.get("val")]
    known, (train, test, val) = class_folders(base, folders, ignored, classes, taken)
    unlabeled = None
    if "unlabeled" in places:
        place = places["unlabeled"]
        files = [path for path, _ in _image_files(place, _ancestors(place), ignored)]
        unlabeled = ImageSet([-1] * len(files), files=files, names=relative(files, root)) if files else None

    # what the user should know
    notes = []
    if not only_test and (len(places) > 1 or not one_level):
        notes.append(f"'{root}' has {', '.join(_described(root, places))}")
    if not only_test and unused:
        notes.append(f"not used in '{root}': {listed(unused)}")
    return Found(known, train, test, val, unlabeled, (*notes, *ignored_kinds(ignored)))


def _places(root, classes, taken, only_test):
    """{part: its folder}, and the names of the folders in ``root`` that are no parts.

    Without folders of training and test images, these are the classes, and "train" is ``root``.
    """
    parts, others = _by_part(root, classes, taken)
    places = {part: _innermost(_only_one(root, part, names), part) for part, names in parts.items()}
    if "val" in places and "test" not in places:
        places["test"] = places.pop("val")
    if not places.keys() & {"train", "test"}:
        return places | {"train": root}, others
    if not (only_test and "test" in places):
        _refuse_unclear(root, places, others)
    if "train" in places:
        inside, _ = _by_part(places["train"], classes, taken)
        for name in inside.get("unlabeled", ()):
            before = [places["unlabeled"]] if "unlabeled" in places else []
            here = os.path.join(places["train"], name)
            _only_one(root, "unlabeled", [*before, here])
            places["unlabeled"] = here
    return places, others


def _described(root, places):
    """What each part of a folder is used for, a list of texts."""
    said = {part: f"{WORDS_OF_PARTS[part]} in {_shown(place, root)}" for part, place in places.items()}
    if "test" not in places:
        said["train"] = f"training and test images in {_shown(places['train'], root)}"
    if places.get("train") == root:
        said["train"] = "training and test images in the other folders, one for each class"
    if "val" in places:
        said["val"] += " (they choose the checkpoint, as with --num-val)"
    return [said[part] for part in WORDS_OF_PARTS if part in said]


def _shown(place, root):
    return os.path.relpath(place, root) + "/"


def part_of(name):
    """The part of a data set that a folder of this name holds, a key of ``NAMES_OF_PARTS``, or None."""
    plain = _plain(name)
    return next((part for part, names in NAMES_OF_PARTS.items() if plain in names), None)


def _plain(name):
    return re.sub(r"[-_ ]", "", name).lower()


def _by_part(folder, classes, taken):
    """The folders in ``folder`` as {part: names} and a list of all other names, both sorted.

    Hidden folders and those of ``taken`` are left out. A name of ``classes`` is always one of the others.
    """
    taken, parts, others = {os.path.realpath(path) for path in taken}, {}, []
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        part = part_of(name)
        if name in (classes or ()):
            others.append(name)
        elif not _ignored(name):
            free = os.path.realpath(os.path.join(folder, name)) not in taken
            if part in ("train", "test", "val") or (part and free):
                parts.setdefault(part, []).append(name)
            elif free:
                others.append(name)
    return parts, others


def _only_one(root, part, names):
    """The path of the one folder of a part."""
    if len(names) > 1:
        one, other = (os.path.relpath(os.path.join(root, name), root) for name in names[:2])
        raise UserError(
            f"'{root}' has {one}/ and {other}/, which both mean {WORDS_OF_PARTS[part]}: merge the two "
            "folders, or rename one of them"
        )
    return os.path.join(root, names[0])


def _innermost(place, part):
    """The folder that holds a part's classes: ``seg_train/seg_train``, where that is all in ``seg_train``."""
    while True:
        inside = [e.name for e in os.scandir(place) if e.is_dir() and not _ignored(e.name)]
        if len(inside) != 1 or part_of(inside[0]) != part:
            return place
        place = os.path.join(place, inside[0])


def _refuse_unclear(root, places, others):
    """UserError unless it is plain which images are to be learned from and which are test images.

    Args:
        places: the path of each part that there is; "train" or "test" is among them.
        others: names of the other folders.
    """
    name = {part: os.path.relpath(place, root) for part, place in places.items()}
    beside = f" beside folders that look like classes ({listed(others)})" if others else ""
    if "train" not in places and others:
        raise UserError(
            f"'{root}' has {name['test']}/{beside}: move the class folders into "
            f"{os.path.join(root, 'train')}, or rename {name['test']}/ if it is a class, too"
        )
    if "train" not in places:
        raise UserError(f"'{root}' has {name['test']}/ but no train/: add the folder of training images")
    labeled = _plain(os.path.basename(places["train"])).startswith("label")
    if "test" not in places and not (labeled and ("unlabeled" in places or not others)):
        way = f"give '{places['train']}' itself to split it into training and test images"
        if "unlabeled" in places:
            way += f", with --unlabeled-path '{places['unlabeled']}'"
        raise UserError(
            f"'{root}' has {name['train']}/{beside} but neither test/ nor val/: add one of them, or {way}"
        )


def class_folders(root, places, ignored, classes=None, taken=()):
    """Class names, and the images of each place as files with names; None for a place that is None.

    Args:
        root: names are relative to it.
        places: folders of class folders; the first that is not None says what the classes are.
        ignored: Counter of what is left out, by type; grows.
        classes: those of a run, if there is one: the folders must not have others.
        taken: folders that are no classes.

    Raises:
        UserError: no class folders, an unknown class, no images, or a file in two classes.
    """
    first = next(filter(None, places))
    known = list(classes) if classes else _class_names(first, classes, taken)
    for place in filter(None, places):
        unknown = sorted(set(_class_names(place, classes, taken, at_least=1)) - set(known))
        if unknown and classes:
            raise UserError(
                f"'{place}' has the class '{unknown[0]}', but the run has only the classes {listed(known)}: "
                "remove or rename the folder of this class"
            )
        if unknown:
            raise UserError(
                f"class '{unknown[0]}' of '{place}' has no folder in '{first}': add this folder, or "
                "remove the class"
            )
    loose = sum(_loose_images(folder) for folder in {root, *filter(None, places)})
    if loose:
        ignored["images beside the class folders"] += loose
    owner = {}
    return known, [place and _list_classes(place, known, root, ignored, owner) for place in places]


def _class_names(folder, classes, taken, at_least=2):
    """Sorted names of the folders in ``folder`` that are classes."""
    parts, names = _by_part(folder, classes, taken)
    for part in parts.keys() - {"unlabeled"}:  # a class may be called "test", too
        names += parts[part]
    if not names:
        raise UserError(
            f"there are no class folders in '{folder}': put the images of each class into a folder there"
        )
    if len(names) < at_least:
        raise UserError(f"'{folder}' has only one class folder, '{names[0]}': at least 2 classes are needed")
    return sorted(names)


def _loose_images(folder):
    """How many images lie in the folder itself."""
    names = [entry.name for entry in os.scandir(folder) if entry.is_file() and not _ignored(entry.name)]
    return sum(name.lower().endswith(IMAGE_SUFFIXES) for name in names)


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
                    "remove one of the two, or the link to its folder"
                )
            files.append(path)
            targets.append(k)
    if not files:
        found = "".join(f" ({line})" for line in ignored_kinds(ignored))
        raise UserError(
            f"there are no images in the class folders of '{place}'{found}: files must end in {_suffixes()}"
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
        raise UserError(f"'{root}' is a file: give its folder as {argument}")
    if not os.path.isdir(root):
        raise UserError(f"there is no folder '{root}': give an existing folder of images as {argument}")
    ignored = Counter()
    files = [path for path, _ in _image_files(root, _ancestors(root), ignored)]
    lines = ignored_kinds(ignored)
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
                if entry.name[0] in "@$" and entry.name.lower().endswith(IMAGE_SUFFIXES):
                    ignored["names that begin with @"] += 1
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
                raise UserError(f"the file name {entry.path!r} contains a line break: rename it")
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


# what systems keep beside photographs: Mac archives, Linux, QNAP and Synology, Windows
SYSTEM_NAMES = ("__macosx", "lost+found", "#recycle", "#snapshot", "system volume information", "thumbs.db")
SYSTEM_NAMES += ("desktop.ini", "recycler", "$recycle.bin")


def _ignored(name):
    """Whether a file or folder is hidden or the system's own, such as ``@eaDir`` and ``$RECYCLE.BIN``."""
    return name[0] in ".@" or name.lower() in SYSTEM_NAMES


def ignored_kinds(ignored):
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
    images does not move it, unless a class would be left without a training image. With the record of a run,
    images that the run knew stay on their side, even if they have been renamed.
    """
    if not 0 < test_fraction < 1:
        raise UserError(
            f"--test-fraction {test_fraction} leaves no training images or no test images: try 0.2"
        )
    if record and record["labeled"] is None:
        testing = _split_by_position(found.targets.numpy(), len(classes), test_fraction)
        train, test = found.subset(np.flatnonzero(~testing)), found.subset(np.flatnonzero(testing))
        return None if only_test else train, test, []
    if record and "trained" not in record:  # the run was not on a folder
        return None, found, []
    places = np.array([place_of(name) for name in found.names])
    testing, notes = places < test_fraction, []
    if not record:
        targets = found.targets.numpy()
        emptied = sorted({*targets} - {*targets[~testing]})
        for k in emptied:  # keep the image that would be the last to become a test image
            members = np.flatnonzero(targets == k)
            testing[members[places[members].argmax()]] = False
        if emptied:
            notes.append(
                "all images of these classes were drawn for testing, and one of each is kept for training: "
                + listed([classes[k] for k in emptied])
            )
    else:
        trained = torch.isin(found.fingerprints, record["trained"]).numpy()
        tested = torch.isin(found.fingerprints, record["tested"]).numpy()
        names = set(record["test"])
        named = np.array([name in names for name in found.names], dtype=bool)
        # the run's folder in another place, not one that shares an image; "trained" also counts other folders
        parts = (record["labeled_prints"], record["tested"])
        moved = all(torch.isin(part, found.fingerprints).float().mean() > 0.5 for part in parts)
        if only_test and not moved and os.path.abspath(root) != record["path"]:
            return None, found, [f"'{root}' is not the run's folder: all of its images are test images"]
        # a copy of a test image that still has its name was left out, and is not another test image
        kept = torch.isin(found.fingerprints, found.fingerprints[torch.from_numpy(tested & named)]).numpy()
        testing = (tested & named) | (~trained & ~kept & (tested | testing))
    train, test = found.subset(np.flatnonzero(~testing)), found.subset(np.flatnonzero(testing))
    if not len(test):
        raise UserError(
            f"none of the {len(found)} images in '{root}' is a test image: raise --test-fraction or add a "
            "folder test/"
        )
    return None if only_test else train, test, notes


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
            f"this run was trained on {int(learned.sum())} of the {len(learned)} test images in '{root}', "
            f"such as {test.names[int(learned.int().argmax())]}: evaluate it on other images"
        )


def place_of(name):
    """A number in [0, 1), uniformly distributed, that depends only on a name: the same on every machine."""
    key = composed(name).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big") / 2**64


def composed(name):
    """A name with accents in one form: macOS stores them as characters of their own, other systems do not."""
    return unicodedata.normalize("NFC", name)
