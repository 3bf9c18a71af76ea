"""From a table of labels beside image files to sets of images (``--labels FILE``).

The table is text, separated by commas, tabs or semicolons, with a header: one column names an image file,
another one its class, and a third one may say to which part of the data set it belongs. Images without a
label are unlabelled.
"""

import csv
import io
import itertools
import os
import re
from collections import Counter, defaultdict
from typing import NamedTuple
from urllib.parse import unquote

from engine.folders import Found, composed, image_tree, listed, part_of, relative
from engine.images import IMAGE_SUFFIXES, ImageSet, reason
from utils import UserError

# names of columns, in lower case
FILE_COLUMNS = ("filename", "file", "file_name", "image", "image_name", "img", "data", "path", "filepath")
FILE_COLUMNS += ("file_path", "image_path", "img_path")
ID_COLUMNS = ("image_id", "id")  # name the file only where no column above does
LABEL_COLUMNS = ("label", "labels", "class", "classes", "category", "target", "choice", "class_name")
LABEL_COLUMNS += ("label_name", "true_class", "breed", "species")
SPLIT_COLUMNS = ("split", "set", "subset")


class Row(NamedTuple):
    """A line of a table."""

    line: int  # number in the file, from 1
    file: str  # as it is written
    label: str  # "" where there is none
    part: str  # a key of ``folders.NAMES_OF_PARTS``


def find_table(path, root, columns=(), classes=None, only_test=False):
    """The parts of a data set whose labels are in a table, as ``folders.Found``.

    Args:
        path: of the table.
        root: folder of the images; names are relative to it.
        columns: names of the file column and the label column; empty: found by the usual names.
        classes: the class names of a run, if there is one: the table must not have others.
        only_test: leave out the training images where the table says which images are for testing.

    Raises:
        UserError: the table cannot be read, or a line of it is wrong.
    """
    rows, (file_column, label_column) = read_rows(path, columns)
    files, notes = image_tree(root, "--data-path")
    row_of = _files_of_rows(rows, _Tree(files, root, os.path.dirname(os.path.abspath(path))), path)
    labelled = {file: row for file, row in row_of.items() if row.label and row.part != "unlabeled"}
    classes = _classes([*labelled.values()], path, label_column, classes)
    number = {composed(name): k for k, name in enumerate(classes)}

    parts = {}
    for part in ("train", "test", "val"):
        # in the order in which class folders are read: a folder and its table make the same run
        chosen = sorted((number[row.label], file) for file, row in labelled.items() if row.part == part)
        if chosen:
            targets, paths = zip(*chosen, strict=True)
            parts[part] = ImageSet(targets, files=[*paths], names=_names(paths, root))
    if "train" not in parts and not (only_test and "test" in parts):
        raise UserError(f"{path} has no training images with a label: add some")

    # a test image whose label is missing is not learned from
    left_out = [file for file, row in row_of.items() if not row.label and row.part in ("test", "val")]
    without_row = [file for file in files if file not in row_of]
    without_label = sorted(row_of.keys() - labelled.keys() - set(left_out))
    rest = sorted(without_label + without_row)
    unlabeled = ImageSet([-1] * len(rest), files=rest, names=_names(rest, root)) if rest else None

    lines = [f"{path}: {len(labelled):,} images with a label (columns '{file_column}', '{label_column}')"]
    if rest:
        lines.append(
            f"unlabelled images: {len(without_label):,} without a label in the table, "
            f"{len(without_row):,} without a row{_among_test(without_row, root)}"
        )
    if left_out:
        lines.append(f"{len(left_out):,} test or validation images without a label are left out")
    return Found(
        classes,
        None if only_test and "test" in parts else parts["train"],
        parts.get("test"),
        val=parts.get("val"),
        unlabeled=None if only_test else unlabeled,
        notes=(*lines, *notes),
    )


def _classes(rows, path, column, known):
    """The names of the classes in the order of the targets: numbers by value, others as class folders are."""
    if not rows:
        raise UserError(f"no row of {path} has a label in the column '{column}': fill in some")
    if known:
        names = set(map(composed, known))
        for row in rows:
            if row.label not in names:
                raise UserError(
                    f"line {row.line} of {path}: '{row.label}' is not a class of the run: use one of "
                    f"{listed(known)}"
                )
        return list(known)
    names = sorted({row.label for row in rows})
    if all(name.isdecimal() for name in names):
        names.sort(key=int)
    if len(names) < 2:
        raise UserError(
            f"the column '{column}' of {path} has only one class, '{names[0]}': at least 2 classes are needed"
        )
    if len(names) > 100 and len(names) > len(rows) / 2:
        raise UserError(
            f"the column '{column}' of {path} has {len(names):,} different values in {len(rows):,} rows, "
            "too many for classes: name the right columns with --label-columns FILE LABEL"
        )
    return names


def _names(files, root):
    """Paths relative to the folder of the images, "../" before files that lie elsewhere."""
    inside = os.path.join(root, "")
    return [
        relative([file], root)[0]
        if file.startswith(inside)
        else os.path.relpath(file, root).replace(os.sep, "/")
        for file in files
    ]


def _among_test(files, root):
    """How many files lie in folders that are named after a test set, for a note: ", 20 of them in test/"."""
    folders = Counter(name.split("/")[0] for name in _names(files, root) if "/" in name)
    return "".join(
        f", {count:,} of them in {folder}/"
        for folder, count in folders.items()
        if part_of(folder) in ("test", "val")
    )


# ------------------------------------------------------------------------------------------ lines of a table


def read_rows(path, columns=()):
    """The rows of a table, and the names of its file column and its label column."""
    text = _text(path)
    first = next(filter(str.strip, text.splitlines()), "")
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",\t;", key=first.count), strict=True)
    rows, header = [], None
    try:
        for cells in reader:
            if not any(map(str.strip, cells)):
                continue
            if header is None:
                header = [cell.strip() for cell in cells]
                file, label, split = _columns(header, columns, path)
                continue
            if any(map(str.strip, cells[len(header) :])):
                raise UserError(
                    f"line {reader.line_num} of {path} has {len(cells)} columns, but the header has "
                    f"{len(header)}: put names that contain the separator in quotes"
                )
            cells += [""] * (len(header) - len(cells))
            part = "train" if split is None else cells[split].strip()
            rows.append(Row(reader.line_num, cells[file], composed(cells[label].strip()), part))
    except csv.Error as error:
        raise UserError(f"line {reader.line_num} of {path} cannot be read: {error}") from error
    if not rows:
        raise UserError(
            f"{path} has no rows: it needs a header such as image,label and a line for each image"
        )
    return [_checked(row, path) for row in rows], (header[file], header[label])


def _text(path):
    """The text of a file in UTF-8 or, with a byte order mark, UTF-16."""
    try:
        with open(path, "rb") as file:
            content = file.read()
        if content.startswith((b"\xff\xfe", b"\xfe\xff")):
            text = content.decode("utf-16")
        else:  # names of files may be no UTF-8
            text = content.decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(f"cannot read the table of labels {path}: {reason(error)}") from error
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{path} is not a text table: save it as CSV in UTF-8")
    return text


def _columns(header, given, path):
    """Positions of the file column, the label column and, None where there is none, the split column."""
    names = [name.lower() for name in header]
    way = "name the columns with --label-columns FILE LABEL"

    def only(found, meaning):
        if len(found) > 1:
            columns = ", ".join(f"'{header[i]}'" for i in found)
            raise UserError(f"several columns of {path} could be {meaning}, {columns}: {way}")
        return found[0] if found else None

    def among(known):
        return [i for i, name in enumerate(names) if name in known]

    split = only(among(SPLIT_COLUMNS), "the split into training and test images")
    if given:
        for name in given:
            if name.lower() not in names:
                raise UserError(f"{path} has no column '{name}': its columns are {listed(header)}")
        file, label = (names.index(name.lower()) for name in given)
        return file, label, None if split in (file, label) else split
    file = only(among(FILE_COLUMNS) or among(ID_COLUMNS), "the names of the images")
    label = only(among(LABEL_COLUMNS), "the labels")
    if len(header) == 2:  # where one of two columns is known, the other one is, too
        file = 1 - label if file is None and label is not None else file
        label = 1 - file if label is None and file is not None else label
    for column, what in ((file, "the names of the images"), (label, "the labels")):
        if column is None:
            raise UserError(
                f"the first line of {path}, {listed(header)}, has no usual column name for {what}: begin the "
                f"table with a header such as image,label, or {way}"
            )
    return file, label, None if split in (file, label) else split


def _checked(row, path):
    """A row whose part is one of those that are known; UserError if that or another cell cannot be meant."""
    where = f"line {row.line} of {path}"
    if not row.file.strip():
        raise UserError(f"{where} names no image: add the name or remove the line")
    try:
        row.label.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: the label is not in UTF-8: save the table as CSV in UTF-8") from None
    part = part_of(row.part)
    if part is None:
        raise UserError(f"{where}: the split is '{row.part}': it must be train, val, test or unlabeled")
    return row._replace(part=part)


# --------------------------------------------------------------------------------------- the files of a table


def _files_of_rows(rows, tree, path):
    """{file: its row}, each file once. UserError for a file that is not there or has two labels."""
    row_of = {}
    for row, found in zip(rows, tree.find_all(rows), strict=True):
        where = f"line {row.line} of {path}"
        if len(found) > 1:
            names = " and ".join(_names(found[:2], tree.root))
            raise UserError(
                f"{where}: '{row.file}' matches {names}: write the path relative to '{tree.root}'"
            )
        if not found and os.path.exists(os.path.join(tree.root, row.file)):
            raise UserError(
                f"{where}: '{row.file}' is not an image: files must end in {', '.join(IMAGE_SUFFIXES)}"
            )
        if not found:
            raise UserError(
                f"{where}: there is no image '{row.file}' in '{tree.root}': correct the line, or give "
                "with --data-path the folder that such paths are relative to"
            )
        before = row_of.setdefault(found[0], row)
        if row.label and before.label and (row.label, row.part) != (before.label, before.part):
            raise UserError(
                f"{where}: '{row.file}' has the label '{row.label}' ({row.part}), but '{before.label}' "
                f"({before.part}) in line {before.line}: keep only one of the two lines"
            )
        if row.label:
            row_of[found[0]] = row
    return row_of


class _Tree:
    """Image files below a folder, found by what a table calls them."""

    def __init__(self, files, root, beside):
        """``beside``: the folder of the table, absolute."""
        self.root, self.places = root, (os.path.abspath(root), beside)
        self.tops = [os.path.join(place, "") for place in (self.places[0], os.path.realpath(root))]
        names = [composed(name) for name in relative(files, root)]
        self.indices = []  # of full names, then of names without suffix: {name: files}, {last part: names}
        for spelled in (names, [os.path.splitext(name)[0] for name in names]):
            files_of, names_of = defaultdict(list), defaultdict(list)
            for name, file in zip(spelled, files, strict=True):
                files_of[name].append(file)
                names_of[name.rpartition("/")[2]].append(name)
            self.indices.append((files_of, names_of))

    def find_all(self, rows):
        """For each row the list of files that it may mean.

        The folders that all names begin with may be those of another machine or program: of these as many are
        left out as it takes to find a file.
        """
        folders = (_parts([*_spellings(row.file)][-1])[:-1] for row in rows)
        shared = [*itertools.takewhile(lambda each: len(set(each)) == 1, zip(*folders, strict=False))]
        dropped = range(1 + len(shared))
        dropped = next((n for n in dropped if any(self.find(row, n) for row in rows[:100])), 0)
        return [self.find(row, dropped) for row in rows]

    def find(self, row, dropped):
        """The files that a row may mean without the first ``dropped`` folders of its name."""
        for name in _spellings(row.file):
            rest = "/".join(_parts(name)[dropped:])
            files = (self._placed(name) if dropped == 0 else []) or self._named(rest)
            if files := files or self._ending(rest, row.part):
                return files
        return []

    def _placed(self, name):
        """The file of this path, absolute or relative to the folder of images or to that of the table."""
        for place in self.places:
            path = os.path.normpath(os.path.join(place, name))
            if files := self._inside(path):
                return files
            if path.lower().endswith(IMAGE_SUFFIXES) and os.path.isfile(path):
                return self._inside(os.path.realpath(path)) or [path]
        return []

    def _inside(self, path):
        """The file of this path if it is below the folder of images."""
        top = next(filter(path.startswith, self.tops), None)
        return self._named(path[len(top) :].replace(os.sep, "/")) if top else []

    def _named(self, name):
        """The file of this name in the folder of images, with or without suffix."""
        name = composed(name)
        return next((files_of[name] for files_of, _ in self.indices if name in files_of), [])

    def _ending(self, name, part):
        """The files at any depth whose name ends like this; a folder of test images has none for training."""
        name = composed(name)
        for files_of, names_of in self.indices:
            near = {full for full in names_of.get(name.rpartition("/")[2], ()) if full.endswith(f"/{name}")}
            if part in ("train", "unlabeled"):
                near = {full for full in near if not _is_test(full.removesuffix(name))}
            if near:
                return [file for full in sorted(near) for file in files_of[full]]
        return []


def _is_test(folders):
    """Whether one of the folders of a path is named after a test or validation set."""
    return any(part_of(folder) in ("test", "val") for folder in folders.split("/"))


def _spellings(written):
    """What a table may mean by the name of a file, the most literal first.

    Label Studio writes ``/data/upload/1/ab12cd34-cat.jpg``, where the name of the file stands behind eight
    letters and a dash, or ``/data/local-files/?d=folder/cat.jpg``; addresses of the web may end in a query.
    """
    names = [written, _with_slashes(written)]
    text = names[1]
    if "://" in text or text.startswith("/data/"):
        path, _, query = text.partition("?")
        decoded = unquote(query.removeprefix("d=") if query.startswith("d=") else path)
        names.append(decoded)
        if "/upload/" in decoded:
            names.append(re.sub(r"/[0-9a-f]{8}-([^/]+)$", r"/\1", decoded))
    return dict.fromkeys(names)


def _with_slashes(written):
    return written.strip().replace("\\", "/")


def _parts(name):
    return [part for part in name.split("/") if part not in ("", ".")]
