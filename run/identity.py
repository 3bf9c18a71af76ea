"""Which run a name means: its files, its lock, what is refused so that no run is mistaken for another."""

import argparse
import contextlib
import errno
import glob
import os
import re
import shutil
from pathlib import Path

from engine.checkpoint import KINDS, SUFFIX, Checkpoint, file_name
from engine.files import moved_to, write_atomically, writing
from utils import UserError, say


def default_name(args):
    """The name of the data set; of a folder, the folder's own; of an evaluation, its checkpoint's."""
    if args.evaluate and args.resume:
        return os.path.basename(args.resume).removesuffix(SUFFIX)
    if args.dataset == "folder":
        return os.path.basename(os.path.abspath(args.data_path)).lstrip(".") or "folder"
    return args.dataset


def check_name(name, trains=False):
    """Returns the name of a run, which is also that of its files; UserError if it cannot be one.

    ``trains``: not the record of an evaluation. Then its checkpoints must not be taken for another run's.
    """
    if trains and (match := re.search(r"_((?:finetune_)?(?:last|best)|finetune|step\d+)$", name)):
        run, kind = name[: match.start()], "finetune_last" if match[1] == "finetune" else match[1]
        raise UserError(
            f"'{name}' could be taken for the checkpoint {run}_{kind} of a run named '{run}': choose another "
            "--name"
        )
    if not name or name.startswith(".") or len(os.fsencode(name)) > 200 or set(name) & set("/\\\0\n"):
        raise UserError(
            f"{name!r} cannot be the name of a run: use 1 to 200 letters without path separators, and "
            "no dot at the start"
        )
    return name


def checkpoint_path(args, kind):
    """``checkpoint/NAME_KIND.pth.tar``."""
    return os.path.join(args.save_path, file_name(args.name, kind))


def checkpoints_of(args):
    """All checkpoints of the run's name that there are: {path: step in the name, None without one}."""
    kinds = rf"_(?:{'|'.join(KINDS)}|step(\d{{8,}}))"
    pattern = re.compile(re.escape(args.name) + kinds + re.escape(SUFFIX))
    names = os.listdir(args.save_path) if os.path.isdir(args.save_path) else []
    found = filter(None, map(pattern.fullmatch, names))
    return {os.path.join(args.save_path, match[0]): match[1] and int(match[1]) for match in found}


def drop_checkpoints(args, step):
    """Of the checkpoints that are named after their step, keep the last ``--keep`` up to this one.

    Those of later steps predate this run.
    """
    numbered = {number: path for path, number in checkpoints_of(args).items() if number is not None}
    kept = sorted(number for number in numbered if number <= step)[-args.keep :]
    for number in numbered.keys() - set(kept):
        os.remove(numbered[number])


def make_folder(path):
    """Make a folder, and see that it can be written to; UserError if not."""
    with writing(path):
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe-{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)


HELD = []  # open files whose locks last as long as this process


def lock(args, make=True):
    """Only one process trains a run of a name: the system lifts the lock when it ends, however it ends.

    Args:
        make: make the file that is locked, ``checkpoint/.NAME.lock``, if it is not there; it stays.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
    """
    path = os.path.join(args.save_path, f".{args.name}.lock")
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    if not make and not os.path.exists(path):
        return
    with writing(path):
        HELD.append(open(path, "a"))  # noqa: SIM115 (open until the process ends)
    try:
        fcntl.lockf(HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # decoding workers do not inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"another process is training {args.name}: wait for its end, or give another --name"
            ) from error
        # else a file system without locks: nothing can be known


def save(args, runtime, content, kinds):
    """Write a checkpoint of each kind, in this order; then the run that this one replaces is deleted.

    Where the first kind fits on the disk and the second does not, the run that is replaced is kept instead.
    """
    try:
        Checkpoint(content).write(runtime, *(checkpoint_path(args, kind) for kind in kinds))
    except UserError:
        for path in checkpoints_of(args) if set_aside_of(args) else ():
            os.remove(path)
        raise
    if runtime.is_main:
        settle(args)


def set_aside(args, run):
    """Move the earlier run of the name out of the way of a new one, whose id is ``run``.

    Its checkpoints go to the folder ``checkpoint/.NAME.replaced-ID``, its record to
    ``results/.NAME.replaced-ID``. The file "record" joins the checkpoints when all of them are moved: it says
    that ``checkpoint/NAME_*`` are the new run's from now on, and where the old record is.
    """
    checkpoints, record = checkpoints_of(args), os.path.join(args.results_path, args.name)
    if not checkpoints and not os.path.isdir(record):
        return
    aside = os.path.join(args.save_path, f".{args.name}.replaced-{run[-8:]}")
    old_record = os.path.join(args.results_path, os.path.basename(aside))
    with writing(aside):
        os.mkdir(aside)
        for path in checkpoints:
            os.rename(path, os.path.join(aside, os.path.basename(path)))
        write_atomically(os.path.join(aside, "record"), lambda file: file.write(os.fsencode(old_record)))
        os.makedirs(record, exist_ok=True)
        os.rename(record, old_record)


def set_aside_of(args):
    """The folders of the checkpoints that ``set_aside`` has moved, one at most."""
    folder, name = glob.escape(args.save_path), glob.escape(args.name)
    return glob.glob(os.path.join(folder, f".{name}.replaced-" + "[0-9a-f]" * 8))


def settle(args):
    """Delete the run that was set aside if the new run of its name has a checkpoint, else put it back.

    If it is killed, the next call finishes what it began.

    Raises:
        UserError: another process trains the new run, or the files cannot be moved.
    """
    for aside in set_aside_of(args):
        lock(args)
        checkpoints = checkpoints_of(argparse.Namespace(save_path=aside, name=args.name))
        mark = Path(aside, "record")
        with writing(aside):
            old_record = Path(os.fsdecode(mark.read_bytes())) if mark.exists() else None
            if old_record and checkpoints_of(args):
                shutil.rmtree(old_record, ignore_errors=True)
                for path in checkpoints:  # before the mark
                    os.remove(path)
            else:
                if old_record and old_record.is_dir():
                    record = old_record.with_name(args.name)
                    shutil.rmtree(record, ignore_errors=True)  # of the run that has no checkpoint
                    old_record.rename(record)
                mark.unlink(missing_ok=True)
                for path in checkpoints:
                    os.rename(path, os.path.join(args.save_path, os.path.basename(path)))
                say(f"{args.name}: the new run has no checkpoint, the earlier run is back in its place")
            shutil.rmtree(aside)


def find_again(args):
    """Put back a run that was set aside and has a checkpoint that ``--resume`` looks for."""
    for resume in args.resume or ():
        for path in candidates(args, resume):
            if not os.path.isfile(path) and (moved := moved_to(path)):
                folder = os.path.dirname(moved)
                name = os.path.basename(folder)[1:].rpartition(".replaced-")[0]
                settle(argparse.Namespace(save_path=os.path.dirname(folder), name=name))


def candidates(args, resume):
    """Candidates for ``--resume``, in order of preference; for ``auto`` the files of the run's name.

    The best is written before the last: a run that was killed between its first two files has the best alone.
    """
    if resume != "auto":
        return [resume] if resume else []
    name = args.name or default_name(argparse.Namespace(**vars(args) | {"resume": None}))
    return [os.path.join(args.save_path, file_name(check_name(name), kind)) for kind in KINDS]


def is_own(args, saved):
    """Whether the checkpoint is one of the run that this command goes on with, not of one that it leaves."""
    same_place = bool(args.resume) and os.path.dirname(args.resume) == args.save_path
    return same_place and args.name == saved.get("args", {}).get("name")


@contextlib.contextmanager
def claim(args, runtime, saved, run):
    """Context in which the run has its name: its folders can be written, and no other process has it.

    With ``--overwrite`` the earlier run is set aside, and put back at the end if there is no checkpoint of
    this one.
    """

    def take():
        make_folder(args.results_path)
        make_folder(args.save_path)
        lock(args)
        check_free(args, saved)

    runtime.on_main(take)
    try:
        if args.overwrite and not is_own(args, saved):
            runtime.on_main(lambda: set_aside(args, run))
        yield
    finally:
        if runtime.is_main:
            settle(args)


def check_free(args, saved):
    """UserError if another run has the name, or if there is nothing to train."""
    lock(args, make=False)
    settle(args)
    last, folder = checkpoint_path(args, "last"), os.path.join(args.results_path, args.name)
    ways = "--overwrite replaces it, another --name keeps it"
    checkpoints = checkpoints_of(args)
    if is_own(args, saved):
        if not args.overwrite and not args.finetune and args.resume != last and os.path.isfile(last):
            step = Checkpoint.peek(last).get("step", 0)
            if step > saved["step"]:
                raise UserError(
                    f"{args.resume} is from step {saved['step']}, but {args.name} has reached step {step}: "
                    f"--resume auto continues the run from step {step}, {ways}"
                )
        return
    if not args.overwrite and checkpoints:  # without any, a run that was killed early may start again
        raise UserError(f"{args.name} was trained before: --resume auto continues it, {ways}")
    if not args.overwrite and os.path.exists(os.path.join(folder, "summary.json")):
        raise UserError(f"{folder} already has the results of another run: {ways}")
    if saved and not args.finetune and saved["step"] == args.total_steps:
        raise UserError(
            f"{args.resume} has reached the end of its training, step {saved['step']}: to train {args.name}, "
            "give a larger --total-steps, or --finetune"
        )


def finetuned_before(args, runtime, saved, run, base):
    """What an earlier process has saved of the same finetuning, ``{}`` if nothing.

    Raises:
        UserError: the run was finetuned otherwise before.
    """
    if "finetune_step" in saved:
        return saved
    path = checkpoint_path(args, "finetune_last")
    if not is_own(args, saved) or saved["step"] != base:
        return {}
    if not runtime.on_main(lambda: os.path.isfile(path)):
        return {}
    found = Checkpoint.read(path, runtime)
    names = ["freeze_body", "body_lr_scale", *(name for name in vars(args) if name.startswith("finetune_"))]
    same = all(found["args"].get(name) == getattr(args, name) for name in names)
    if found.get("run") == run and found["step"] == base and same and "loader" in found:
        return found
    if args.finetune and not args.overwrite:
        raise UserError(
            f"{args.name} was already finetuned, with other flags or from another checkpoint: --overwrite "
            "replaces the result, another --name keeps it"
        )
    return {}


def free_folder(path, name):
    """``path/name``, or with the first number behind it that is not taken: no record is ever replaced."""
    number, folder = 1, os.path.join(path, name)
    while os.path.exists(folder):
        number += 1
        folder = os.path.join(path, f"{name}-{number}")
    return folder
