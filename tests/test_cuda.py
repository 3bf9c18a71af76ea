"""CUDA: the steps of the CPU, no wait for the device, a captured step, half precision, the program itself."""

import json

import pytest
import torch
from steps import (
    CAPTURED,
    DROPOUT,
    build,
    captured_training,
    double_views,
    in_double,
    make_views,
    weights,
)

import main
from augmentation import Views
from engine.runtime import Runtime
from utils import UserError

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
STEPS = {
    "supervised": ("supervised",),
    "uda": ("uda", "--align", 0.2),
    "none": ("mpl", "--feedback", "none"),
    "taylor": ("mpl", "--feedback", "taylor", "--align", 0.2),
    "dot, sampled": ("mpl", "--feedback", "dot", "--pseudo-label", "sample", "--feedback-momentum", 0.9),
    "exact, forward": ("mpl", "--feedback", "exact", "--feedback-jvp", "forward"),
    "exact, difference": ("mpl", "--feedback", "exact", "--feedback-jvp", "difference"),
    "in parts": ("mpl", "--feedback", "exact", "--accumulate", 2),
    "weak pass apart": ("mpl", "--pseudo-label-view", "strong", "--weak-pass", "apart"),
    "reduced": ("reduced-mpl", "--feedback", "exact", "--pseudo-label", "soft"),
    "semimeta": ("semimeta", "--mixup-alpha", 0.5),
    "semimeta, difference": ("semimeta", "--feedback-jvp", "difference", "--accumulate", 2),
    "mixup": ("mpl", "--feedback", "none", "--mixup-alpha", 0.5, "--student-labeled-weight", 0.5),
    "weak pass ema": ("mpl", "--feedback", "none", "--weak-pass", "ema"),
}
SAME_LABELS = [name for name in STEPS if "sampled" not in name]  # devices draw different numbers


def on_cuda(views):
    return Views(*(tensor.cuda() for tensor in views))


def method_of(name, runtime, *flags):
    method, *more = STEPS[name]
    return build(*more, *flags, method=method, runtime=runtime)


def train_in_double(name, runtime, steps=3):
    """The weights of all networks, brought to the CPU, after some steps in float64."""
    method = in_double(method_of(name, runtime))
    for step in range(steps):
        views = double_views(step)
        method.step(views if runtime.kind == "cpu" else on_cuda(views), step + 5)
    return {role: weights(learner.network).cpu() for role, learner in method.learners.items()}


@pytest.mark.parametrize("name", SAME_LABELS)
def test_steps_are_those_of_the_cpu(name):
    there, here = (train_in_double(name, Runtime(device)) for device in ("cuda", "cpu"))
    for role, weight in here.items():
        torch.testing.assert_close(there[role], weight, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("flags", [(), DROPOUT])
def test_a_step_does_not_wait_for_the_device(name, flags):
    runtime = Runtime("cuda", amp=True, channels_last=True)
    method, views = method_of(name, runtime, *flags), on_cuda(make_views())
    for step in range(2):  # cuDNN's search waits
        method.step(views, step, diagnose=True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        method.step(views, 2, torch.zeros(8, dtype=torch.long, device="cuda"), diagnose=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "name, compiled",
    [*((name, False) for name in CAPTURED), ("taylor", True), ("exact, difference", True)],
)
def test_replayed_steps_are_the_steps(name, compiled):
    """Steps taken as they are come before, between and behind the replays."""
    rows, learned = captured_training(name, Runtime("cuda", graphed=True, compiled=compiled), 7)
    expected_rows, expected = captured_training(name, Runtime("cuda", compiled=compiled), 7)
    torch.testing.assert_close(rows, expected_rows, rtol=1e-4, atol=1e-6)
    for key, value in expected.items():
        torch.testing.assert_close(learned[key], value, rtol=1e-5, atol=1e-7)


def test_a_captured_step_draws_no_dropout_twice():
    method = method_of("exact, forward", Runtime("cuda", graphed=True), *DROPOUT)
    with pytest.raises(UserError, match="cannot draw the same dropout twice"):
        method.step(on_cuda(make_views()), 0)


@pytest.mark.parametrize("dtype", ("bf16", "fp16"))
@pytest.mark.parametrize("name", STEPS)
def test_half_precision(name, dtype):
    """The first losses are near those of full precision, later ones finite, and steps are taken."""
    runtime = Runtime("cuda", amp=True, amp_dtype=dtype)
    half, full = method_of(name, runtime), method_of(name, Runtime("cuda"))
    before = weights(half.student.network).clone()
    first, expected = (method.step(on_cuda(make_views()), 5) for method in (half, full))
    if "sampled" not in name:  # a label that is drawn changes with the last bit of a prediction
        for key in expected:
            if key.endswith("loss"):
                torch.testing.assert_close(first[key].float(), expected[key], rtol=0.03, atol=0.03)
    for step in range(20):  # the first steps in fp16 only find the scale
        later = half.step(on_cuda(make_views(seed=step)), step + 6)
    assert all(torch.isfinite(value).all() for value in later.values())
    assert not torch.equal(weights(half.student.network), before)


@pytest.mark.parametrize("form", ("--amp-dtype fp16", "--cuda-graph"))
def test_the_program_on_cuda(form, tmp_path, monkeypatch):
    """Trains, goes on after a stop, evaluates what it saved to the last digit."""
    monkeypatch.chdir(tmp_path)
    recipe = (
        "--dataset digits --num-labeled 40 --model wrn-10-1 --batch-size 16 --mu 2 --eval-step 20 --amp "
        f"{form} --channels-last --nesterov --finetune-epochs 2 --device cuda --warmup-steps 5"
    ).split()
    assert main.run([*recipe, "--total-steps", "20"]) == 0
    assert main.run([*recipe, "--total-steps", "40", "--resume", "auto"]) == 0
    summary = json.loads((tmp_path / "results/digits/summary.json").read_text())
    assert summary["steps"] == 40 and summary["device"].startswith("cuda")
    assert main.run([*recipe, "--evaluate", "--resume", "checkpoint/digits_best.pth.tar"]) == 0
    evaluated = json.loads((tmp_path / "results/digits_best/summary.json").read_text())
    assert evaluated["top1"] == summary["top1"]


def test_a_run_of_replayed_steps_is_the_run(tmp_path, monkeypatch):
    """Its first steps, before what CUDA adds up in another order each time has grown."""
    monkeypatch.chdir(tmp_path)
    recipe = (
        "--dataset digits --num-labeled 40 --model wrn-10-1 --batch-size 16 --mu 2 --eval-step 6 "
        "--log-step 1 --channels-last --nesterov --finetune-epochs 0 --device cuda --warmup-steps 5 "
        "--threshold 0.2 --no-pictures --total-steps 12"
    ).split()
    figures = []
    for flag in ("--cuda-graph", "--no-cuda-graph"):
        assert main.run([*recipe, flag, "--name", flag.strip("-")]) == 0
        lines = (tmp_path / "results" / flag.strip("-") / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        figures.append([value for row in rows for key, value in row.items() if key.endswith("_loss")])
    assert figures[0] == pytest.approx(figures[1], rel=0.02)
