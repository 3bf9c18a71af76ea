"""Runs main.py in processes of their own, forked from one that has imported it: they start at once.

A process that starts as ``python main.py`` spends seconds on importing PyTorch; tests that need to see that
(signals at the start, scripts, the import itself, torchrun's command line) start it so.
"""

import gc
import importlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run.script import execute

ROOT = Path(__file__).resolve().parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "main",
        "tune",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "torch.distributed.launcher.api",
        "sklearn.datasets",
        "matplotlib.figure",
    ]
)


def places(count):
    """What each of several processes on this machine finds in its environment, as torchrun's do."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    ranks = map(str, range(count))
    return [meeting | {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(count)} for rank in ranks]


def _call(function, arguments, environment, outputs):
    gc.freeze()
    multiprocessing.set_start_method(None, force=True)  # its own processes start as in any script
    os.environ.update(environment)
    for number, path in outputs.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    try:
        status = function(*arguments)
    except SystemExit as end:  # what it holds goes, loaders with their processes among it
        status = end.code
    if status:
        sys.exit(status)


def _launch(function, arguments, restarts, outputs):
    """The agent that torchrun is, in this process; what it starts is forked, too."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        1, 1, 2, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=restarts, start_method="fork"
    )
    elastic_launch(config, _call)(function, arguments, {}, outputs)


class Started:
    """``function(*arguments)`` in ``processes`` that find each other as those of torchrun do.

    With what tests use of ``subprocess.Popen``. ``returncode`` is the largest of what the function returned
    in each process; what they all write is one text. With ``restarts``, a number, there are two under the
    agent that torchrun is: it starts both again where one is lost, and hands signals on.
    """

    def __init__(self, function, *arguments, processes=1, restarts=None):
        self.arguments, self.returncode = arguments, None
        self.folder = tempfile.TemporaryDirectory()
        self.streams = {1: f"{self.folder.name}/out", 2: f"{self.folder.name}/err"}
        self.processes = []
        if restarts is not None:
            function, arguments = _launch, (function, arguments, restarts, self.streams)
            processes = 1
        for environment in places(processes) if processes > 1 else [{}]:
            self.processes.append(
                SERVER.Process(target=_call, args=(function, arguments, environment, self.streams))
            )
            self.processes[-1].start()
        self.pid = self.processes[0].pid

    def said(self):
        """What has been written to standard output and to standard error."""
        return [Path(path).read_text() if os.path.exists(path) else "" for path in self.streams.values()]

    def poll(self):
        codes = [process.exitcode for process in self.processes]
        self.returncode = None if None in codes else max(codes)
        return self.returncode

    def wait_for(self, condition, timeout=200):
        """Until ``condition()`` holds, which it does before the processes end."""
        end = time.monotonic() + timeout
        while not condition():
            assert self.poll() is None and time.monotonic() < end, self.said()
            time.sleep(0.005)

    def send_signal(self, number):
        for process in self.processes:
            os.kill(process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=500):
        """The standard output and error, once all have ended."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0, end - time.monotonic()))
        if self.poll() is None:
            self.kill()
            raise subprocess.TimeoutExpired(self.arguments, timeout)
        return self.said()


def run(function, *arguments, processes=1):
    """``Started`` to its end, as a ``subprocess.CompletedProcess``."""
    started = Started(function, *arguments, processes=processes)
    said = started.communicate()
    return subprocess.CompletedProcess(arguments, started.returncode, *said)


def script(name, arguments, cwd):
    """What ``python NAME.py ARGUMENTS`` does in ``cwd``; ends the process, or returns after a success."""
    os.chdir(cwd)
    sys.argv = [str(ROOT / f"{name}.py"), *arguments]
    execute(importlib.import_module(name).run, arguments)


def run_main(arguments, cwd, processes=1):
    """``python main.py ARGUMENTS`` in ``cwd``, on one thread a process."""
    return run(script, "main", [str(argument) for argument in arguments], str(cwd), processes=processes)
