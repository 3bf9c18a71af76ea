"""Files on disk: atomic writes, checked reads, CSV."""

import contextlib
import csv
import glob
import json
import os
import pickle
import zipfile
from types import SimpleNamespace

import torch

from utils import UserError


def write_atomically(path, write):
    """``write(file)`` to a binary file; a crash at any moment leaves the old file or the new one whole.

    Temporary file beside it, flush to disk, rename, flush of the folder.

    Raises:
        UserError: the file cannot be written; the old one is as it was.
    """
    temporary = f"{path}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer raises the second when a write fails
        with contextlib.suppress(OSError):
            os.remove(temporary)
        reason = getattr(error, "strerror", None) or "the disk may be full"
        raise UserError(f"cannot write {path}: {reason}") from error


def read_content(path, mmap=False):
    """What ``Runtime.save`` wrote, on the CPU. Never runs code from the file (``weights_only``).

    With ``mmap`` the tensors stay in the file, and are read where they are needed.

    Raises:
        UserError: no such file, or not a readable checkpoint.
    """
    if not os.path.isfile(path):
        folder = "; this is a folder: give a file such as checkpoint/NAME_best.pth.tar" * os.path.isdir(path)
        raise UserError(being_replaced(path) or f"there is no checkpoint {path}{folder}")
    if str(path).endswith((".pt2", ".onnx")):
        raise UserError(f"{path} is an exported network: give the checkpoint that it was exported from")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load would not notice a wrong byte in a tensor
            if archive.testzip() is not None:
                raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        zipfile.BadZipFile,
        ValueError,
        KeyError,
    ) as error:
        raise UserError(
            f"{path} is damaged or was not written by this program: nothing could be loaded from it; "
            "take another checkpoint of the run"
        ) from error


def moved_to(path):
    """Where ``--overwrite`` has moved a checkpoint (``run.identity.set_aside``); None if it has not."""
    folder, name = os.path.split(os.path.abspath(path))
    return next(glob.iglob(os.path.join(glob.escape(folder), ".*.replaced-*", glob.escape(name))), None)


def being_replaced(path):
    """A sentence about a missing checkpoint that ``--overwrite`` has moved; None for any other."""
    if moved := moved_to(path):
        return (
            f"there is no checkpoint {path}: --overwrite keeps it in {moved} until the new run has saved; if "
            "the new run was killed, --resume auto puts it back"
        )
    return None


def read_checked(path, parse=json.loads):
    """What ``parse`` makes of the text of a file; UserError for one that cannot be read."""
    try:
        return parse(path.read_text())
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def csv_text(rows):
    """Rows of values as lines of a CSV file; what holds a comma, a quote or a line break is quoted."""
    lines = []
    csv.writer(SimpleNamespace(write=lines.append)).writerows(rows)  # its \r\n makes it quote both characters
    return "".join(line.removesuffix("\r\n") + "\n" for line in lines)


def write_csv(path, rows):
    """Write a CSV file atomically; UserError where that is not possible."""
    text = csv_text(rows).encode("utf-8", "surrogateescape")  # names of files may be no UTF-8
    write_atomically(path, lambda file: file.write(text))


@contextlib.contextmanager
def writing(path):
    """Context in which an OSError becomes a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error
