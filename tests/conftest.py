"""What all tests share."""

import functools
import gc
import os
import shutil
import sysconfig
import tempfile

# one thread in every process, before any of them imports PyTorch: on small tensors faster than several
os.environ["OMP_NUM_THREADS"] = "1"
# Inductor writes code without vector instructions: to find out which of them the compiler knows takes it ten
# to twenty seconds in each process. Nor does it start processes that compile: two run tests already
os.environ |= {"TORCHINDUCTOR_VEC_ISA_OK": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}

import pytest

# PyTorch is imported where it is needed: the process that hands out the tests does not need it

TEACHERS = tempfile.TemporaryDirectory()  # checkpoints of fixed teachers, removed when the tests end


@functools.cache
def teacher_file(model, num_classes, image_size):
    """The path of a checkpoint that can be given as ``--teacher-checkpoint``: a network as it starts."""
    import torch

    from models import build_model

    path = os.path.join(TEACHERS.name, f"{model}-{num_classes}-{image_size}.pt")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        state = build_model(model, num_classes, image_size=image_size).state_dict()
        torch.save({"step": 0, "student_state_dict": state}, path)
    return path


needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))),
    reason="torch.compile needs a C++ compiler and Python's headers",
)


@pytest.fixture
def bf16(monkeypatch):
    """A CPU computes in bf16, as slowly as it may: PyTorch emulates what a processor does not have."""
    monkeypatch.setattr("engine.runtime.Runtime._has_bf16", lambda self: True)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test's random numbers do not depend on the tests before it."""
    import torch

    torch.manual_seed(0)


def pytest_collection_finish():
    """What has been imported is no garbage: it is not searched again and again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items):
    """The files that take longest first: two processes share the files, and end at about the same time."""
    longest = [f"test_{name}.py" for name in ("xla", "faults", "cli", "run_state", "tune", "method")]
    items.sort(key=lambda item: longest.index(item.path.name) if item.path.name in longest else len(longest))
