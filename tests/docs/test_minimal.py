"""docs/minimal.py, the method on one page: the same steps as ``MPL``, and a script that runs by itself."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import main
from augmentation import Views
from engine.runtime import Runtime
from methods import METHODS

SCRIPT = Path(__file__).parents[2] / "docs" / "minimal.py"


@pytest.fixture(scope="module")
def minimal():
    spec = importlib.util.spec_from_file_location("minimal", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def mpl(minimal, *flags):
    """``METHODS["mpl"]`` in float64 with the settings of minimal.py; λ grows to 3 over 4 steps."""
    words = "--method mpl --dataset twomoons --model mlp-2-8-8-2 --nesterov --weight-decay 0 "
    words += "--warmup-steps 0 --total-steps 100 --lambda-u 3 --uda-steps 4 "
    words += f"--teacher-lr {minimal.RATE} --student-lr {minimal.RATE} --ema {minimal.EMA} "
    words += f"--temperature {minimal.TEMPERATURE} --threshold {minimal.THRESHOLD}"
    method = METHODS["mpl"](main.parse_arguments([*words.split(), *flags]), 2, 0, Runtime("cpu"))
    for network in (method.teacher.network, method.student.network, method.predictor):
        network.double()
    return method


def weights(network):
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


@pytest.mark.parametrize("labels", ["hard", "soft"])
def test_steps_of_one_page_are_those_of_the_method(minimal, labels):
    """Three steps in float64 from the same weights, with momentum, a falling rate and λ(t)."""
    given = {"hard": ("argmax", "taylor"), "soft": ("soft", "exact")}[labels]
    method = mpl(minimal, "--pseudo-label", given[0], "--feedback", given[1])
    with torch.no_grad():  # a start at which some points are certain and the feedback weighs
        for network in (method.teacher.network, method.student.network):
            for p in network.parameters():
                p.mul_(2)
        method.predictor.load_state_dict(method.student.network.state_dict())
    teacher, student = (copy.deepcopy(each.network) for each in (method.teacher, method.student))
    average = copy.deepcopy(student)
    optimizers = minimal.sgd(teacher), minimal.sgd(student)
    x, y = torch.randn(6, 2).double(), torch.arange(6) % 2
    for t in range(3):
        weak, strong = torch.randn(2, 20, 2).double()
        prediction = teacher(weak).detach()
        sure, sharp = (F.softmax(prediction / τ, dim=1).amax(1) for τ in (1, minimal.TEMPERATURE))
        assert (sure >= minimal.THRESHOLD).sum() < (sharp >= minimal.THRESHOLD).sum() < 20
        scalars = method.step(Views(x, y, weak, strong), t)
        assert scalars["feedback"].abs() > 1e-3
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = method.student.schedule(t)
        minimal.step(teacher, student, *optimizers, x, y, weak, strong, 3 * (t + 1) / 4, labels == "soft")
        minimal.update_average(average, student, t)
    expected = (method.teacher.network, method.student.network, method.predictor)
    for ours, theirs in zip((teacher, student, average), expected, strict=True):
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)


def test_the_script_runs_by_itself(tmp_path):
    """In isolated mode, in which nothing of the repository can be imported."""
    command = [sys.executable, "-I", SCRIPT, "--steps", "3"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["supervised", "hard", "soft"]


def test_it_learns_two_moons(minimal):
    """A fifth of the default steps; supervised training on the 6 labels reaches about 80 %."""
    assert minimal.train("supervised", 800, seed=0) < 0.9
    assert minimal.train("hard", 800, seed=0) > 0.98
