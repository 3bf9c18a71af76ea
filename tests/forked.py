"""Runs main.py in processes of their own, forked from one that has imported it: they start at once.

A process that starts as ``python main.py`` spends seconds on importing PyTorch; tests that need to see that
(signals at the start, scripts, the import itself) start it so.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["main", "torch._dynamo", "torch.utils.tensorboard", "sklearn.datasets", "matplotlib.figure"]
)


def _main(arguments, cwd, outputs):
    import main

    os.chdir(cwd)
    for number, path in outputs.items():
        os.dup2(os.open(path, os.O_WRONLY), number)
    sys.argv = [str(ROOT / "main.py"), *arguments]
    sys.exit(main.run(arguments))


def run_main(arguments, cwd, timeout=300):
    """``python main.py ARGUMENTS`` in ``cwd``, on one thread; returns a ``subprocess.CompletedProcess``."""
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as err:
        process = SERVER.Process(target=_main, args=(arguments, str(cwd), {1: out.name, 2: err.name}))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(arguments, timeout)
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read(), err.read())
