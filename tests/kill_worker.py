"""Kills training runs at random moments: what test_faults.py runs in a process of its own.

That process has imported everything and computed nothing: the runs are forks of it, which start at once.
"""

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch

import main
from engine import runtime
from run import identity

FLAGS = (
    "--dataset digits --resize 8 --num-labeled 10 --model wrn-10-1 --batch-size 4 --mu 2 --device cpu "
    "--workers 0 --teacher-dropout 0.3 --student-dropout 0.2 --pseudo-label sample --align 0.2 "
    "--confidence soft --feedback-momentum 0.9 --teacher-lr 0.05 --student-lr 0.02 --switch-every 3 "
    "--ensemble --total-steps 20 --eval-step 2 --finetune-epochs 0 --no-pictures "
    "--name run --resume auto"
).split()


def start(folder, flags):
    """A run in its own process; returns the process number."""
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os._exit(main.run([*FLAGS, *flags]))
    return pid


def finish(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def killed_behind_its_first_file(arguments, folder):
    """``python main.py ARGUMENTS`` in a folder, killed when it has written a checkpoint's first file."""
    os.chdir(folder)
    write = runtime.write_atomically

    def write_and_die(path, content):
        write(path, content)
        if path.endswith(".pth.tar"):
            os.kill(os.getpid(), signal.SIGKILL)

    runtime.write_atomically = write_and_die
    main.run(arguments)


def forked(arguments, prepare=None, *options):
    """The exit status of ``python main.py ARGUMENTS``, whose process begins with ``prepare(*options)``."""
    pid = os.fork()
    if pid == 0:
        if prepare:
            prepare(*options)
        os._exit(main.run(arguments))
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_when_training_begins():
    main.train_loop = killed


def kill_at(moment):
    """Right before this process makes, moves or removes a file or folder for the ``moment``-th time."""
    changes = []

    def count(event, _):
        if event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            changes.append(event)
            if len(changes) == moment:
                killed()

    sys.addaudithook(count)


def kill_at_while_it_replaces(moment):
    """The same, counted from where the old run is set aside; ends behind the first checkpoint."""
    set_aside, save = identity.set_aside, identity.save

    def counted(*arguments):
        kill_at(moment)
        set_aside(*arguments)

    def last(*arguments):
        save(*arguments)
        os._exit(0)

    identity.set_aside, identity.save = counted, last


def digests():
    """{path: digest, "" for a folder} of what runs have left in this folder."""
    paths = [path for place in ("checkpoint", "results") for path in Path(place).rglob("*")]
    return {
        str(path): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in paths
        if path.suffix not in (".lock", ".tmp")
    }


def killed_while_it_replaces(folder, old, new):
    """Kills ``new``, which replaces the run of ``old``, at every change of the files.

    Each time ``old`` is given again: it is refused, but tidies up. Then kills this command likewise, after a
    ``new`` that was killed when its training began.

    Prints the ``digests`` of the old run, and the lists of those that each kill and its refusal have left.
    """
    os.chdir(folder)
    assert forked(old) == 0
    found = [digests()]
    shutil.copytree(".", "../whole")
    assert forked(new, kill_when_training_begins) == -signal.SIGKILL
    shutil.copytree(".", "../aside")
    for start, command, prepare in (("whole", new, kill_at_while_it_replaces), ("aside", old, kill_at)):
        left, status = [], -signal.SIGKILL
        while status == -signal.SIGKILL:
            shutil.rmtree("checkpoint"), shutil.rmtree("results")
            shutil.copytree(f"../{start}", ".", dirs_exist_ok=True)
            status = forked(command, prepare, len(left) + 1)
            assert forked(old) == 2
            left.append(digests())
        found.append(left)
    print(json.dumps(found))


def check(folder):
    """Every checkpoint can be read."""
    for path in Path(folder, "checkpoint").glob("*.pth.tar"):
        torch.load(path, weights_only=True)


def run(folder, kills, *flags):
    """Trains once unbroken in FOLDER/unbroken, then in FOLDER/broken-0, -1, …: each run is killed at random
    moments and continued with --resume auto until it ends or ``kills`` are reached, and then to its end."""
    root = Path(folder)
    (root / "unbroken").mkdir()
    began = time.monotonic()
    finish(start(root / "unbroken", flags))
    duration = time.monotonic() - began
    moments = random.Random(0)
    done = number = 0
    while done < kills:
        folder = root / f"broken-{number}"
        folder.mkdir()
        number, alive = number + 1, True
        while alive and done < kills:
            pid = start(folder, flags)
            time.sleep(moments.uniform(0, duration / 2))
            alive = os.waitpid(pid, os.WNOHANG) == (0, 0)
            if alive:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                done += 1
                check(folder)
        finish(start(folder, flags))
    print(f"{done} kills of {number} runs, {duration:.1f} s unbroken")
