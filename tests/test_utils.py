"""Schedules, meters, accuracy, and the record of a run."""

import json
import math
import os
import re
import signal
import sys
from argparse import ArgumentTypeError, Namespace

import pytest
import torch

import main
import utils
from engine.runtime import Runtime
from run import record
from run.arguments import count_or_fraction
from run.record import RunLog, read_confusion
from utils import Meters, NonFiniteError, UserError, learning_rate, ramp_up


def test_counts_and_fractions():
    assert [count_or_fraction(text) for text in ("40", "0.05", "all")] == [40, 0.05, 1.0]
    for text in ("5%", "1.5", "0", "-3", "nan", "inf"):
        with pytest.raises(ArgumentTypeError, match=f"^{text} must be a count, a fraction such as"):
            count_or_fraction(text)


def test_learning_rate_waits_warms_up_and_falls():
    schedule = {"peak": 0.1, "total_steps": 100, "warmup_steps": 10, "wait_steps": 20}
    rates = [learning_rate(step, **schedule) for step in range(101)]
    assert rates[:20] == [0.0] * 20
    assert rates[20:30] == pytest.approx([0.01 * k for k in range(1, 11)])
    expected = [0.05 * (1 + math.cos(math.pi * k / 70)) for k in range(71)]
    assert rates[30:] == pytest.approx(expected)
    assert learning_rate(150, **schedule) == pytest.approx(0.0, abs=1e-12)
    assert learning_rate(0, peak=0.1, total_steps=100) == 0.1


def test_ramp_up():
    assert [ramp_up(step, 4) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert ramp_up(0, 0) == 1
    assert [ramp_up(step, 2, wait_steps=3) for step in range(6)] == [0, 0, 0, 0.5, 1, 1]
    assert [ramp_up(step, 0, wait_steps=1) for step in range(2)] == [0, 1]


def test_meters_against_plain_statistics():
    meters, values = Meters(Runtime("cpu"), ""), torch.randn(50, 2, dtype=torch.float64) * 3 + 100
    for step, (a, b) in enumerate(values):
        meters.update({"a": a, "b": b}, step)
    read = meters.read()
    for index, name in enumerate("ab"):
        assert read[name] == pytest.approx(values[:, index].mean().item(), rel=1e-6)
        assert read[f"{name}_std"] == pytest.approx(values[:, index].std().item(), rel=1e-4)
    meters.reset()
    assert meters.read() == {}


def test_meters_continue_from_a_checkpoint():
    values = torch.randn(20)
    whole, first, second = Meters(Runtime("cpu"), ""), Meters(Runtime("cpu"), ""), Meters(Runtime("cpu"), "")
    for step, value in enumerate(values):
        whole.update({"a": value}, step)
        (first if step < 7 else second).update({"a": value}, step)
        if step == 6:
            second.load_state_dict(first.state_dict())
    assert second.read() == whole.read()


def test_meters_name_the_first_step_and_term_that_was_not_finite(tmp_path):
    meters = Meters(Runtime("cpu"), str(tmp_path / "last"))
    for step in range(5):
        bad = torch.tensor(float("nan") if step >= 3 else 1.0)
        meters.update({"good": torch.tensor(1.0), "bad": bad}, step)
    with pytest.raises(NonFiniteError, match=r"^step 3: bad is not finite; no checkpoint was written$"):
        meters.read()
    (tmp_path / "last").touch()
    with pytest.raises(NonFiniteError, match=r"the checkpoint .*last predates it$"):
        meters.read()
    for step in range(5, 8):  # the good one follows: the first is named
        meters.update({"good": torch.tensor(float("inf")), "bad": torch.tensor(float("nan"))}, step)
    with pytest.raises(NonFiniteError, match=r"^step 3: bad is not finite; "):
        meters.read()


def test_the_record_names_each_command(tmp_path, monkeypatch):
    """The one that began the run, and those that went on with it, in their order."""
    words = [["main.py", "--name", "run"], ["main.py", "--resume", "auto"], ["main.py", "--resume", "x"]]
    for each in words:
        monkeypatch.setattr(sys, "argv", each)
        RunLog(tmp_path, Namespace(seed=0), run_id="one", tensorboard=False)
    args = json.loads((tmp_path / "args.json").read_text())
    assert args["command"] == words[0] and args["continued"] == words[1:]


def test_the_last_line_is_the_result():
    """Each figure is behind its own words."""
    names = ("top1", "mean_class_top1", "top5", "best_top1", "finetune_top1", "student_top1", "teacher_top1")
    summary = dict.fromkeys(record.SUMMARY) | {name: 10.25 + k for k, name in enumerate(names)}
    summary |= {"dataset": "digits", "num_labeled": 40, "method": "mpl", "seed": 3, "selection": "val"}
    summary |= {"oracle_top1": 99.0, "ensemble_top1": 10.25}
    about = "(digits, 40 labels, mpl, seed 3)"
    assert record.result_lines(summary) == [
        "top-1 10.25 % (ensemble)  mean over classes 11.25 %  top-5 12.25 %  chosen by validation 13.25 %  "
        f"finetuned 14.25 %  student 15.25 %  teacher 16.25 %  {about}"
    ]
    without = summary | dict.fromkeys((*names[1:3], *names[4:], "ensemble_top1")) | {"selection": "last"}
    assert record.result_lines(without) == [f"top-1 10.25 %  {about}"]


def test_the_speed_counts_training_alone(monkeypatch):
    """Not the seconds of an evaluation; what an earlier process has trained is in the totals."""
    clock, totals = [100.0], {"trained_images": 30, "train_seconds": 7.0}
    monkeypatch.setattr(utils.time, "perf_counter", lambda: clock[0])
    throughput = utils.Throughput(totals, 10, 3)
    clock[0] += 2
    assert throughput.count(7) == 20
    clock[0] += 4
    assert throughput.count(9) == 5
    clock[0] += 50  # an evaluation
    throughput.restart(9)
    clock[0] += 1
    assert throughput.count(10) == 10
    assert totals == {"trained_images": 30 + 70, "train_seconds": 7.0 + 7}


def test_the_time_that_is_left(monkeypatch, capsys):
    """By the steps of this process, which went on at step 40."""
    clock = [100.0]
    monkeypatch.setattr(utils.time, "monotonic", lambda: clock[0])
    progress = utils.Progress("run", 100, done=40)
    clock[0] += 59
    progress.step("loss 2", count=10)
    assert not capsys.readouterr().err
    clock[0] += 41
    progress.step(count=10)
    assert capsys.readouterr().err == "run  60/100  5 s per step, about 0:03:20 left  loss 2\n"


def test_signals_are_noted_and_handed_back():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with utils.Interrupt() as interrupt:
        assert interrupt.stops(Runtime("cpu")) == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat it
        assert interrupt.stops(Runtime("cpu")) == 128 + signal.SIGTERM  # the exit status
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_record_drops_what_is_about_to_be_written_again(tmp_path):
    log = RunLog(tmp_path, Namespace(seed=0), tensorboard=False)
    for step in (10, 20, 30):
        log.record(step, {"top1": step, "val_top1": None})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 40, "to')  # killed in the middle of a line
    steps = lambda: [json.loads(line)["step"] for line in open(tmp_path / "metrics.jsonl")]  # noqa: E731, SIM115
    RunLog(tmp_path, Namespace(seed=0), start_step=20, tensorboard=False)
    assert steps() == [10, 20]
    RunLog(tmp_path, Namespace(seed=1), start_step=None, tensorboard=False)
    assert steps() == [10, 20]
    assert json.loads((tmp_path / "args.json").read_text())["seed"] == 0
    RunLog(tmp_path, Namespace(seed=2), start_step=0, tensorboard=False)
    assert steps() == []
    assert json.loads((tmp_path / "args.json").read_text())["seed"] == 2


@pytest.mark.parametrize("start_step", [None, 10])
def test_the_record_keeps_what_finetuning_goes_on_from(tmp_path, start_step):
    """Its lines come after those of the training, up to the step that it has come to."""
    log = RunLog(tmp_path, Namespace(seed=0), tensorboard=False)
    log.record(10, {"top1": 1.0})
    for step in (12, 14, 16):
        log.record(step, {"finetune_loss": 1.0})
    options = {"start_step": start_step, "finetune_from": 14, "tensorboard": False}
    RunLog(tmp_path, Namespace(seed=0), **options)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [10, 12, 14]


def test_the_record_of_another_run_is_removed(tmp_path):
    log = RunLog(tmp_path, Namespace(seed=0), run_id="one", tensorboard=False)
    log.record(10, {"top1": 50.0})
    log.confusion(torch.tensor([[3.0, 1.0], [0.0, 4.0]], dtype=torch.float64), ("cat", "dog"))
    log.summary({"top1": 50.0})
    counts, classes = read_confusion(tmp_path / "confusion.json")
    assert counts.tolist() == [[3, 1], [0, 4]] and classes == ["cat", "dog"]
    for name in ("labeled.txt", "labeled_indices.txt", "predictions.csv", "curves.png", "notes.md"):
        (tmp_path / name).write_text("")
    RunLog(tmp_path, Namespace(seed=0), run_id="two", tensorboard=False)
    assert {path.name for path in tmp_path.iterdir()} == {"args.json", "notes.md"}  # which is the user's


@pytest.mark.parametrize("total", (10, 137))
def test_one_cycle_is_pytorchs(total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.3, total_steps=total)
    for step in range(total):
        ours = learning_rate(step + 5, peak=0.3, total_steps=total + 5, wait_steps=5, shape="one-cycle")
        assert ours == pytest.approx(scheduler.get_last_lr()[0], rel=1e-9)
        if step < total - 1:
            optimizer.step()
            scheduler.step()


def test_constant_rate_warms_up_and_stays():
    rates = [learning_rate(t, peak=0.2, total_steps=9, warmup_steps=2, shape="constant") for t in range(9)]
    assert rates == pytest.approx([0.1] + [0.2] * 8)


@pytest.mark.parametrize(
    ("words", "hint"),
    [("--pseudo-labels soft", "did you mean --pseudo-label?"), ("--qqq", "--help lists all flags")],
)
def test_a_misspelt_flag_is_answered_with_the_nearest(words, hint):
    with pytest.raises(UserError, match=re.escape(f"{words} ({hint})")):
        main.build_parser().parse_args(words.split())


def test_a_line_to_zero():
    rates = [learning_rate(t, peak=0.3, total_steps=12, warmup_steps=2, shape="linear") for t in range(13)]
    assert rates == pytest.approx([0.15, 0.3, *(0.03 * left for left in range(10, -1, -1))])


def test_milestones_divide_the_rate_by_ten():
    """They are steps of the run, whatever the wait; before the first one the rate is as constant."""
    for wait in (0, 3):
        schedule = {"peak": 0.2, "total_steps": 20, "warmup_steps": 2, "wait_steps": wait}
        rates = [learning_rate(t, **schedule, shape="milestones", milestones=(8, 12)) for t in range(20)]
        before = [learning_rate(t, **schedule, shape="constant") for t in range(8)]
        assert rates == pytest.approx([*before, *[0.02] * 4, *[0.002] * 8])


def test_a_replayed_step_costs_as_much_as_the_step_before():
    """A CUDA graph runs none of the code that counts."""
    method, totals = Namespace(multiply_adds=7), {"pflop": 1.0}
    cost = utils.Cost(totals, method, processes=3)
    for counted in (5e14, 5e14, 6e14):  # the second step is a replay
        method.multiply_adds = 7 + counted
        cost.count()
    assert totals["pflop"] == pytest.approx(1 + 3 * 2e-15 * (5e14 + 5e14 + 1e14))
