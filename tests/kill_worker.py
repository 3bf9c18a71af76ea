"""Kills training runs at random moments: started by test_faults.py.

    python tests/kill_worker.py FOLDER KILLS FLAGS…

Trains once unbroken in FOLDER/unbroken, then in FOLDER/broken-0, -1, …: each run is killed at random moments
and continued with --resume auto until it ends or KILLS are reached, and then to its end. The runs are forks
of this process, which has imported everything and computed nothing, so that they start at once.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib.figure  # noqa: F401, this and the next ones imported here so that no fork has to
import sklearn.datasets  # noqa: F401
import torch
import torch._dynamo
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

import main

FLAGS = (
    "--dataset digits --resize 8 --num-labeled 10 --model wrn-10-1 --batch-size 4 --mu 2 --device cpu "
    "--workers 0 --teacher-dropout 0.3 --student-dropout 0.2 --pseudo-label sample --align 0.2 "
    "--confidence soft --feedback-momentum 0.9 --teacher-lr 0.05 --student-lr 0.02 --switch-every 3 "
    "--ensemble --total-steps 20 --eval-step 2 --finetune-epochs 0 --name run --resume auto"
).split() + sys.argv[3:]


def start(folder):
    """A run in its own process; returns the process number."""
    pid = os.fork()
    if pid == 0:
        os.chdir(folder)
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
        os._exit(main.run(FLAGS))
    return pid


def finish(pid):
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def check(folder):
    """Every checkpoint can be read."""
    for path in Path(folder, "checkpoint").glob("*.pth.tar"):
        torch.load(path, weights_only=True)


if __name__ == "__main__":
    root, kills = Path(sys.argv[1]), int(sys.argv[2])
    (root / "unbroken").mkdir()
    began = time.monotonic()
    finish(start(root / "unbroken"))
    duration = time.monotonic() - began
    moments = random.Random(0)
    done = number = 0
    while done < kills:
        folder = root / f"broken-{number}"
        folder.mkdir()
        number, alive = number + 1, True
        while alive and done < kills:
            pid = start(folder)
            time.sleep(moments.uniform(0, duration / 2))
            alive = os.waitpid(pid, os.WNOHANG) == (0, 0)
            if alive:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                done += 1
                check(folder)
        finish(start(folder))
    print(f"{done} kills of {number} runs, {duration:.1f} s unbroken")
