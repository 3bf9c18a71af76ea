"""A run cannot be mistaken for another: what a checkpoint remembers, what is refused, what is kept."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import teacher_file
from PIL import Image
from test_cli import ROOT, assert_same_checkpoint, run, tensors
from test_data import write_cifar

import main
import utils
import visualize
from data import load_dataset
from engine.checkpoint import Checkpoint
from engine.evaluation import check_same_test, measure_accuracy, predictions
from methods import METHODS as METHOD_CLASSES
from models import mean_prediction
from pictures import drawing
from run import arguments, identity
from run.record import SUMMARY, measured, read_run, result_lines, unequal_labels
from utils import UserError

DIGITS = (
    "--dataset digits --resize 8 --num-labeled 10 --model wrn-10-1 --batch-size 4 --device cpu --workers 0 "
    "--student-dropout 0.3 --total-steps 8 --eval-step 4 --finetune-epochs 8 --finetune-batch-size 2 "
    "--finetune-lr 0.01 --amp --channels-last --no-pictures --name run"
).split()
MPL = [*DIGITS, *"--mu 2 --align 0.2 --teacher-dropout 0.3 --pseudo-label sample".split()]
FOLDER = (
    "--dataset folder --num-labeled 6 --model wrn-10-1 --resize 12 --batch-size 6 --mu 2 --device cpu "
    "--workers 0 --total-steps 4 --eval-step 2 --finetune-epochs 0 --no-pictures --method uda"
).split()


def photographs(root, classes=("cat", "dog", "owl"), count=16, seed=0):
    """``root/<class>/<n>.png``: images of several sizes, each class with a colour of its own."""
    random = np.random.RandomState(seed)
    for k, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            size = random.randint(10, 30, 2)
            pixels = random.randint(0, 130, (*size, 3)) + 120 * (np.arange(3) == k)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:02d}.png")
    return root


def load(path):
    return torch.load(path, weights_only=True)


def build_network(args, *about):
    return METHOD_CLASSES[args.method].build_network(args, *about)


def summary(name):
    return json.loads(Path("results", name, "summary.json").read_text())


def counted(folder):
    """The accuracy in percent that a run's confusion matrix shows."""
    counts = torch.tensor(json.loads(Path(folder, "confusion.json").read_text())["counts"])
    return 100 * counts.trace().item() / counts.sum().item()


def by_class(folder):
    """What a run's confusion matrix shows: the mean over classes of their accuracies and the share of the
    largest class, in percent, and the classes that no image was taken for."""
    confusion = json.loads(Path(folder, "confusion.json").read_text())
    counts, sizes = confusion["counts"], [sum(row) for row in confusion["counts"]]
    recalls = [row[i] / size for i, (row, size) in enumerate(zip(counts, sizes, strict=True)) if size]
    unnamed = [name for i, name in enumerate(confusion["classes"]) if not any(row[i] for row in counts)]
    return 100 * sum(recalls) / len(recalls), 100 * max(sizes) / sum(sizes), unnamed


def metrics(name):
    return [json.loads(line) for line in Path("results", name, "metrics.jsonl").read_text().splitlines()]


def command(*words):
    return main.run([*map(str, words)])


def refused(capsys, *words):
    """The sentence that the command ends with, status 2."""
    capsys.readouterr()
    assert command(*words) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("main.py: ")]
    assert len(lines) == 1
    return lines[0]


def everything(folder):
    """The bytes of all files below a folder, TensorBoard's and hidden ones left out."""
    paths = (path for path in Path(folder).rglob("[!.]*") if path.is_file() and "/." not in str(path))
    return {path: path.read_bytes() for path in paths if "tfevents" not in path.name}


METHODS = {
    "fixmatch": [*DIGITS, *"--mu 2 --method fixmatch --confidence soft --align 0.2".split()],
    "mpl": [*MPL, *"--method mpl --switch-every 4 --ensemble --student-lr 0.02".split()],  # ends switched
    "reduced-mpl": [*DIGITS, *"--mu 2 --method reduced-mpl --feedback dot --pseudo-label sample".split()],
    "supervised": [*DIGITS, "--method", "supervised"],
    "semimeta": [*DIGITS, *"--mu 2 --mixup-alpha 0.5 --method semimeta".split()],
}


METHODS["reduced-mpl"] += ["--teacher-checkpoint", teacher_file("wrn-10-1", 10, 8)]


def train_in(folder, words):
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert command(*words) == 0
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="module", params=METHODS)
def trained(request, tmp_path_factory):
    """A finished and finetuned run of each method on digits."""
    return train_in(tmp_path_factory.mktemp(request.param), METHODS[request.param])


@pytest.fixture(scope="module")
def supervised(tmp_path_factory):
    """One such run, for what does not depend on the method."""
    return train_in(tmp_path_factory.mktemp("one"), METHODS["supervised"])


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def copied(supervised, here):
    """A copy of a finished run, in the place where this test works."""
    shutil.copytree(supervised, here, dirs_exist_ok=True)
    for path in here.glob("checkpoint/*.pth.tar"):  # as if it had been trained here
        state = load(path)
        state["args"] |= {"save_path": str(here / "checkpoint"), "results_path": str(here / "results")}
        torch.save(state, path)
    return here


# ---------------------------------------------------------------- no other flag


@pytest.mark.parametrize("kind", ["best", "finetune_best"])
def test_evaluate_needs_the_checkpoint_alone(trained, here, kind, capsys):
    """In an empty folder, to the last digit; the record goes where the run's are, and holds all."""
    assert command("--evaluate", "--resume", trained / f"checkpoint/run_{kind}.pth.tar") == 0
    was = json.loads((trained / "results/run/summary.json").read_text())
    folders = sorted((trained / "results").glob(f"run_{kind}*"), key=lambda path: path.stat().st_mtime)
    now = json.loads((folders[-1] / "summary.json").read_text())
    assert now["top1"] == was["best_top1" if kind == "best" else "finetune_top1"]
    assert (now["dataset"], now["num_labeled"], now["method"]) == ("digits", 10, was["method"])
    assert now["steps"] == 8 and now["name"] == folders[-1].name
    assert counted(folders[-1]) == now["top1"] and counted(trained / "results/run") == was["best_top1"]
    counts = torch.tensor(json.loads((folders[-1] / "confusion.json").read_text())["counts"])
    assert now["mean_class_top1"] == pytest.approx(100 * (counts.diag() / counts.sum(dim=1)).mean().item())
    assert now["largest_class_top1"] == pytest.approx(100 * counts.sum(dim=1).max().item() / 500)
    assert now["never_predicted"] == [str(k) for k in range(10) if counts[:, k].sum() == 0]
    args = json.loads((folders[-1] / "args.json").read_text())
    assert args["evaluate"] and args["resume"].endswith(f"run_{kind}.pth.tar") and args["amp"]
    if kind == "best":
        keys = ("mean_class_top1", "largest_class_top1", "never_predicted", "top5")
        assert [now[key] for key in keys] == [was[key] for key in keys]
    mean, largest, unnamed = by_class(folders[-1])
    assert now["mean_class_top1"] == pytest.approx(mean) and now["never_predicted"] == unnamed
    assert now["largest_class_top1"] == pytest.approx(largest)
    assert f"top-1 {now['top1']:.2f} %" in capsys.readouterr().out.splitlines()[-1]
    assert not list(here.iterdir())


def test_each_evaluation_keeps_its_own_record(copied):
    training = everything("results/run")
    for _ in range(2):
        assert command("--evaluate", "--resume", "checkpoint/run_last.pth.tar") == 0
    assert command("--evaluate", "--resume", "checkpoint/run_last.pth.tar", "--name", "mine") == 0
    assert command("--evaluate", "--resume", "checkpoint/run_last.pth.tar", "--name", "run") == 0
    for name in ("run_last", "run_last-2", "mine", "run_last-3"):  # the last one by a recipe, say
        assert summary(name)["top1"] == summary("run")["top1"] and summary(name)["name"] == name
    assert everything("results/run") == training


def test_a_moved_checkpoint_writes_where_the_command_is_given(supervised, here):
    shutil.copy(supervised / "checkpoint/run_last.pth.tar", here / "moved.pth.tar")
    assert command("--evaluate", "--resume", "moved.pth.tar") == 0
    assert (
        summary("moved")["top1"] == json.loads((supervised / "results/run/summary.json").read_text())["top1"]
    )


def test_finetuning_needs_the_checkpoint_alone(trained, here):
    """Bit for bit what the training run's own finetuning gave."""
    flags = ["--name", "again", "--save-path", here / "c", "--results-path", here / "results"]
    assert command("--finetune", "--resume", trained / "checkpoint/run_last.pth.tar", *flags) == 0
    again, before = (
        load(here / "c/again_finetune_last.pth.tar"),
        trained / "checkpoint/run_finetune_last.pth.tar",
    )
    assert_same_networks(again["avg_state_dict"], load(before)["avg_state_dict"])
    assert summary("again")["finetune_top1"] == load(before)["finetune_top1"]


def assert_same_networks(a, b):
    assert a.keys() == b.keys() and len(a) > 20
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_resume_needs_the_checkpoint_alone(trained, here, tmp_path_factory):
    """Half of a run, continued from another folder with no flag but its length, ends as the whole one."""
    whole = load(trained / "checkpoint/run_last.pth.tar")
    place = tmp_path_factory.mktemp("half")
    os.chdir(place)
    interrupt_at(5, METHODS[whole["args"]["method"]])
    os.chdir(here)
    assert load(place / "checkpoint/run_last.pth.tar")["step"] == 5
    assert command("--resume", place / "checkpoint/run_last.pth.tar") == 0
    assert_same_checkpoint(load(place / "checkpoint/run_last.pth.tar"), whole)
    assert_same_networks(
        load(place / "checkpoint/run_finetune_last.pth.tar")["avg_state_dict"],
        load(trained / "checkpoint/run_finetune_last.pth.tar")["avg_state_dict"],
    )
    assert not list(here.iterdir())


def interrupt_at(step, words):
    """Run ``main.py`` in this process and send it SIGTERM after this many batches; returns the status."""
    drawn = []

    class Interrupting(main.TrainLoader):
        def __next__(self):
            drawn.append(None)
            if len(drawn) == step:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().__next__()

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(main, "TrainLoader", Interrupting)
        command(*words)
    return stopped.value.code


def test_finetuning_begins_with_the_network_that_validation_chose(here):
    """At a rate of 0 it leaves the weights as they are."""
    words = [*DIGITS, *"--method supervised --num-val 50 --total-steps 12 --eval-step 2".split()]
    assert command(*words, "--finetune-lr", "0", "--finetune-epochs", "1") == 0
    kinds = ("best", "last", "finetune_last")
    best, last, tuned = (load(f"checkpoint/run_{kind}.pth.tar") for kind in kinds)
    assert best["step"] == summary("run")["best_step"] < last["step"] == 12
    assert command("--evaluate", "--resume", "checkpoint/run_best.pth.tar") == 0
    assert summary("run_best")["steps"] == best["step"]
    best, last, tuned = (state["avg_state_dict"]["conv1.weight"] for state in (best, last, tuned))
    assert torch.equal(tuned, best) and not torch.equal(tuned, last)


def test_a_step_of_finetuning_is_one_of_sgd(copied):
    """All labelled images are one batch: what a flag changes in the first step, by Nesterov's rule."""
    before = load("checkpoint/run_last.pth.tar")["avg_state_dict"]
    words = ["--finetune", "--resume", "checkpoint/run_last.pth.tar", "--finetune-batch-size", "10"]
    words += ["--finetune-epochs", "1", "--finetune-lr", "0.1"]
    after = {}
    for name, *flags in (
        ("plain", "--finetune-momentum", "0"),
        ("momentum", "--finetune-momentum", "0.5"),
        ("decay", "--finetune-momentum", "0", "--finetune-weight-decay", "0.2"),
        ("body", "--finetune-momentum", "0", "--body-lr-scale", "0.25"),
    ):
        assert command(*words, "--name", name, *flags) == 0
        saved = load(f"checkpoint/{name}_finetune_last.pth.tar")
        assert saved["finetune_step"] == 1
        after[name] = saved["avg_state_dict"]
    network = build_network(main.parse_arguments(DIGITS), 10, 8, "student")
    head = [*dict(network.named_parameters())][-2:]
    for name, parameter in network.named_parameters():
        moved = {kind: state[name] - before[name] for kind, state in after.items()}
        assert moved["plain"].abs().max() > 0
        norm = parameter.dim() == 1 and name not in head
        pulled = torch.zeros_like(before[name]) if norm else -0.1 * 0.2 * before[name]
        scale = 1 if name in head else 0.25
        for kind, expected in (
            ("momentum", 1.5 * moved["plain"]),
            ("decay", moved["plain"] + pulled),
            ("body", scale * moved["plain"]),
        ):
            torch.testing.assert_close(moved[kind], expected, rtol=1e-3, atol=1e-6, msg=f"{kind}, {name}")


def test_each_step_draws_numbers_of_its_own(here, monkeypatch):
    """Dropout and drawn labels differ from step to step and from seed to seed, not from run to run."""
    drawn, step_of = [], METHOD_CLASSES["supervised"].step

    def step(self, *arguments, **options):
        drawn.append(torch.get_rng_state().sum().item())
        return step_of(self, *arguments, **options)

    monkeypatch.setattr(METHOD_CLASSES["supervised"], "step", step)
    words = [*DIGITS, "--method", "supervised", "--finetune-epochs", "0", "--overwrite"]
    for seed in (0, 1, 0):
        assert command(*words, "--seed", seed) == 0
    assert len(set(drawn[:16])) == 16 and drawn[16:] == drawn[:8]


def test_a_resumed_run_keeps_its_meters(here):
    """A line of metrics.jsonl whose steps lie before and after a stop is that of an unbroken run."""
    words = [*DIGITS, "--method", "supervised", "--finetune-epochs", "0"]
    assert command(*words, "--name", "whole", "--student-dropout", "0") == 0
    assert interrupt_at(3, [*words, "--name", "broken", "--student-dropout", "0"]) == 143
    assert command("--resume", "checkpoint/broken_last.pth.tar") == 0
    assert len(metrics("whole")) == 2
    for whole, broken in zip(metrics("whole"), metrics("broken"), strict=True):
        assert whole | {"images_per_second": 0} == broken | {"images_per_second": 0}


def test_a_short_training_is_continued(here):
    """The fitted first layer, Muon and the cost are those of an unbroken run; all steps are fractions."""
    words = [*DIGITS, "--resize", "16", "--method", "mpl", "--model", "fastcnn-8-8-8", "--optimizer", "muon"]
    words += ["--schedule", "linear", "--warmup-steps", "0.5", "--eval-step", "0.5", "--finetune-epochs", "0"]
    words += ["--tta", "mirror"]
    assert command(*words, "--name", "whole") == 0
    assert interrupt_at(3, [*words, "--name", "broken"]) == 143
    assert command("--resume", "checkpoint/broken_last.pth.tar") == 0
    whole, broken = (load(f"checkpoint/{name}_last.pth.tar") for name in ("whole", "broken"))
    assert_same_checkpoint(whole, broken)
    for network in ("teacher", "student", "avg"):
        filters = whole[f"{network}_state_dict"]["whiten.weight"]  # random ones are no pairs
        assert torch.equal(filters[:12], -filters[12:])
    assert whole["pflop"] == broken["pflop"] == summary("whole")["pflop"] > 0
    assert (whole["args"]["warmup_steps"], whole["args"]["eval_step"]) == (4, 4)
    assert summary("whole")["tta_top1"] == summary("broken")["tta_top1"] is not None


@pytest.mark.parametrize("with_test", [True, False])
def test_a_folder_is_evaluated_finetuned_and_continued_from_anywhere(here, monkeypatch, with_test):
    if with_test:
        photographs(here / "mine/train"), photographs(here / "mine/test", count=5, seed=1)
    else:
        photographs(here / "mine", count=24)
    monkeypatch.chdir(photographs(here / "elsewhere").parent)
    words = [*FOLDER, "--data-path", "mine", "--finetune-epochs", "2"]
    assert command(*words) == 0
    (here / "empty").mkdir()
    monkeypatch.chdir(here / "empty")
    for kind, figure in (("last", "top1"), ("finetune_last", "finetune_top1")):
        assert command("--evaluate", "--resume", f"../checkpoint/mine_{kind}.pth.tar") == 0
        monkeypatch.chdir(here)
        assert summary(f"mine_{kind}")["top1"] == summary("mine")[figure]
        monkeypatch.chdir(here / "empty")
    flags = ["--total-steps", "6", "--finetune-epochs", "0"]
    assert command("--resume", "../checkpoint/mine_last.pth.tar", *flags) == 0
    assert load(here / "checkpoint/mine_last.pth.tar")["step"] == 6
    assert not list(Path().iterdir())
    monkeypatch.chdir(here)
    names = Path("results/mine/labeled.txt").read_text().splitlines()
    assert len(names) == 6 and all(Path("mine", name).is_file() for name in names)


def test_pictures_of_a_run_from_anywhere(copied, monkeypatch, capsys):
    (copied / "empty").mkdir()
    args = json.loads(Path("results/run/args.json").read_text())
    args |= {"save_path": str(copied / "checkpoint")}
    Path("results/run/args.json").write_text(json.dumps(args))
    monkeypatch.chdir(copied / "empty")
    for picture, *flags in (("confusion",), ("features", "--projection", "pca"), ("curves",)):
        visualize.main([picture, "../results/run", *flags])
        assert (copied / f"results/run/{picture}.png").is_file()


def test_a_checkpoint_of_an_earlier_version(here, capsys):
    """Written by the version before checkpoints knew their data: with the flags of then, and without."""
    (here / "checkpoint").mkdir()
    shutil.copy(
        Path(__file__).with_name("checkpoint_of_version_0.pth.tar"), here / "checkpoint/old_last.pth.tar"
    )
    state = load("checkpoint/old_last.pth.tar")
    assert "labeled" not in state["data"] and "run" not in state
    for flags in ((), ("--dataset", "twomoons", "--num-labeled", "6", "--device", "cpu")):
        assert command("--evaluate", "--resume", "checkpoint/old_last.pth.tar", *flags) == 0
    assert summary("old_last")["top1"] == summary("old_last-2")["top1"] == state["top1"]
    words = "--dataset twomoons --num-labeled 6 --batch-size 6 --mu 4 --finetune-epochs 0 --device cpu"
    words = [*words.split(), "--eval-step", "6"]
    assert command(*words, "--total-steps", "99", "--name", "old", "--resume", "auto") == 0
    assert load("checkpoint/old_last.pth.tar")["step"] == 99
    assert len(load("checkpoint/old_last.pth.tar")["data"]["labeled"]) == 6


def test_a_student_of_another_model_than_its_teacher(here):
    words = [*MPL, *"--student-model wrn-10-2 --total-steps 1 --eval-step 1 --finetune-epochs 0".split()]
    assert command(*words) == 0
    state = load("checkpoint/run_last.pth.tar")
    for key, model in (("teacher", "wrn-10-1"), ("student", "wrn-10-2"), ("avg", "wrn-10-2")):
        expected = build_network(main.parse_arguments([*DIGITS, "--model", model]), 10, 8, "student")
        found = state[f"{key}_state_dict"]
        assert {name: value.shape for name, value in found.items()} == {
            name: value.shape for name, value in expected.state_dict().items()
        }
    assert command("--evaluate", "--resume", "checkpoint/run_last.pth.tar") == 0
    assert summary("run_last")["top1"] == summary("run")["top1"]


def test_a_device_that_is_not_here_is_left(copied, monkeypatch):
    state = load("checkpoint/run_last.pth.tar")
    state["args"] |= {"device": "mps"}
    torch.save(state, "checkpoint/run_last.pth.tar")
    assert command("--evaluate", "--resume", "checkpoint/run_last.pth.tar") == 0
    assert summary("run_last")["device"].startswith(("cpu", "cuda"))


def test_a_precision_that_is_not_here_is_left(copied, capsys):
    state = load("checkpoint/run_last.pth.tar")
    state["args"] |= {"amp_dtype": "fp16"}
    torch.save(state, "checkpoint/run_last.pth.tar")
    assert command("--evaluate", "--resume", "checkpoint/run_last.pth.tar") == 0
    assert "evaluating in float32" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ({"step": "8"}, {"args": [1]}, {"data": None}, {"data": {"classes": ["a"], "size": 8}})
)
def test_a_checkpoint_of_another_form(copied, capsys, content):
    torch.save(load("checkpoint/run_last.pth.tar") | content, "checkpoint/run_last.pth.tar")
    for words in (("--evaluate",), ("--finetune",), ()):
        sentence = refused(capsys, *words, "--resume", "checkpoint/run_last.pth.tar")
        assert "is not a checkpoint of this program" in sentence


@pytest.mark.parametrize("arguments", ({"total_steps": "many"}, {"method": "magic"}, {"model": [1]}))
def test_a_checkpoint_with_foreign_arguments(copied, capsys, arguments):
    state = load("checkpoint/run_last.pth.tar")
    state["args"] |= arguments
    torch.save(state, "checkpoint/run_last.pth.tar")
    assert "was written with --" in refused(capsys, "--resume", "checkpoint/run_last.pth.tar")


def test_a_checkpoint_names_the_networks_that_its_run_built(trained):
    content = load(trained / "checkpoint/run_last.pth.tar")
    model = content["args"]["model"]
    roles = ("teacher", "student") if content["args"]["method"] == "mpl" else ("student",)
    assert content["networks"] == dict.fromkeys(roles, model)


def test_the_teacher_of_pseudo_labels_is_the_network_in_its_file(supervised, here):
    teacher = ["--teacher-checkpoint", supervised / "checkpoint/run_best.pth.tar"]
    words = [*DIGITS, "--mu", "1", "--model", "wrn-10-2", "--method", "pseudo-label", *teacher]
    assert command(*words, "--finetune-epochs", "0") == 0
    expected = json.loads((supervised / "results/run/summary.json").read_text())["best_top1"]
    assert summary("run")["teacher_top1"] == expected


def norms(words=(), saved=None, path=None):
    """(epsilon, momentum) of the batch norms that a command builds for ResNet-18."""
    words = ["--dataset", "folder", "--model", "resnet18", *words]
    arguments = main.parse_arguments(words, Checkpoint(saved) if saved else None, path)
    network = build_network(arguments, 3, 80, "student")
    return {(m.eps, m.momentum) for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)}


def test_batch_norm_is_the_published_one_unless_weights_bring_theirs(here):
    resnet = build_network(main.parse_arguments(["--model", "resnet18"]), 3, 80, "student")
    torch.save(resnet.state_dict(), "weights.pth")
    assert norms() == {(1e-3, 0.01)}
    assert norms(words=["--weights", "weights.pth"]) == {(1e-5, 0.1)}
    assert norms(words=["--bn-eps", "0.5", "--bn-momentum", "0.25"]) == {(0.5, 0.25)}
    args = {"model": "resnet18", "dataset": "folder", "pretrained": False, "name": "x"}
    saved = {"step": 1, "args": args}
    resumed = {"words": ["--resume", "x.pth.tar"], "saved": saved, "path": "x.pth.tar"}
    assert norms(**resumed) == {(1e-5, 0.01)}  # as the earlier version that wrote it had them
    saved["args"] |= {"bn_eps": 1e-3, "bn_momentum": 0.01}
    assert norms(**resumed) == {(1e-3, 0.01)}
    saved["args"] |= {"bn_eps": None, "bn_momentum": None, "pretrained": True}
    assert norms(**resumed) == {(1e-5, 0.1)}


def test_images_are_normalised_as_the_weights_expect(here, supervised):
    photographs(here / "mine", count=24)
    resnet = build_network(main.parse_arguments(["--model", "wrn-10-1"]), 3, 12, "student")
    torch.save(resnet.state_dict(), "weights.pth")
    own = load_dataset("folder", here / "mine", num_labeled=6, resize=12).mean
    theirs = load(supervised / "checkpoint/run_last.pth.tar")["data"]["mean"]
    imagenet = [0.485, 0.456, 0.406]
    checkpoint = str(supervised / "checkpoint/run_last.pth.tar")
    for number, (flags, expected) in enumerate(
        (
            ([], own),
            (["--weights", "weights.pth"], imagenet),
            (["--weights", checkpoint], theirs),
            (["--weights", checkpoint, "--normalize", "dataset"], own),
            (["--normalize", "imagenet"], imagenet),
        )
    ):
        assert command(*FOLDER, "--data-path", "mine", "--name", f"run{number}", *flags) == 0
        assert load(f"checkpoint/run{number}_last.pth.tar")["data"]["mean"] == pytest.approx(expected)
    assert command("--evaluate", "--resume", "checkpoint/run1_last.pth.tar") == 0
    assert summary("run1_last")["top1"] == summary("run1")["top1"]
    shutil.move(checkpoint, here / "gone.pth.tar")  # the run knows what its first weights expected
    try:
        assert command("--resume", "checkpoint/run2_last.pth.tar", "--total-steps", "6") == 0
    finally:
        shutil.move(here / "gone.pth.tar", checkpoint)
    state = load("checkpoint/run2_last.pth.tar")
    assert state["step"] == 6 and state["data"]["mean"] == pytest.approx(theirs)


def test_an_evaluation_alone_normalises_as_its_run_did(here, monkeypatch):
    """Of a data set that has statistics of its own: each probability is of images as the network learned."""
    write_cifar(here, monkeypatch, classes=10, packed=False)
    words = "--dataset cifar10 --data-path . --num-labeled 10 --model wrn-10-1 --batch-size 10 --device cpu"
    words = [*words.split(), *"--method supervised --total-steps 4 --eval-step 4 --workers 0".split()]
    words += "--student-lr 0.1 --finetune-epochs 0 --no-pictures --normalize imagenet --name run".split()
    assert command(*words) == 0
    assert command("--evaluate", "--resume", "checkpoint/run_last.pth.tar") == 0
    network = build_network(main.parse_arguments(words), 10, 32, "student")
    network.load_state_dict(load("checkpoint/run_last.pth.tar")["avg_state_dict"])
    pixels = load_dataset("cifar10", here, num_labeled=10).test.images / 255
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network.eval()((pixels - mean) / std).softmax(dim=1)
    lines = Path("results/run_last/predictions.csv").read_text().splitlines()[1:]
    rows = [line.split(",") for line in lines]
    assert [row[2] for row in rows] == [f"class {k}" for k in expected.argmax(dim=1).tolist()]
    shares = torch.tensor([float(row[3]) for row in rows])
    torch.testing.assert_close(shares, expected.amax(dim=1), rtol=1e-4, atol=2e-6)


# ---------------------------------------------------------------- what a run is about does not change


@pytest.mark.parametrize(
    ("flags", "values"),
    [
        ("--seed 3", ("--seed 0", "--seed 3")),
        ("--num-labeled 20", ("--num-labeled 10", "--num-labeled 20")),
        ("--num-val 10", ("--num-val 0", "--num-val 10")),
        ("--resize 16", ("--resize 8", "--resize 16")),
        ("--model wrn-10-2", ("--model wrn-10-1", "--model wrn-10-2")),
        ("--optimizer adamw", ("--optimizer sgd", "--optimizer adamw")),
        ("--method mpl --switch-every 5", ("--method mpl",)),
        ("--body-lr-scale 0.1", ("--body-lr-scale 1.0", "--body-lr-scale 0.1")),
        ("--method pseudo-label --teacher-checkpoint x", ("--method pseudo-label",)),
        ("--dataset svhn", ("--dataset digits", "--dataset svhn")),
    ],
)
def test_another_run_is_not_continued(copied, capsys, flags, values):
    before = everything(copied)
    words = ["--resume", "checkpoint/run_last.pth.tar", "--total-steps", "12", *flags.split()]
    sentence = refused(capsys, *words)
    assert all(value in sentence for value in values) and "run_last.pth.tar" in sentence
    assert everything(copied) == before


@pytest.mark.parametrize(
    ("was", "now", "rest"),
    [
        ("--weak-pass joint", "--weak-pass apart", "--pseudo-label-view strong"),
        ("--weak-pass apart", "--weak-pass ema", "--pseudo-label-view strong"),
        ("--student-model wrn-10-1", "--student-model wrn-10-2", ""),
        ("--test-fraction 0.2", "--test-fraction 0.3", "--dataset folder"),
        ("--switch-every 5", "--switch-every 6", ""),
        ("--svhn-extra False", "--svhn-extra", "--dataset svhn"),
        ("--freeze-body False", "--freeze-body", "--pretrained"),
        ("--seed 0", "--seed 1", ""),
        ("--num-val 10", "--num-val 20", ""),
    ],
)
def test_what_a_run_is_about_cannot_change(was, now, rest):
    before = [*rest.split(), *([] if was.endswith("False") else was.split())]
    saved = {"step": 3, "args": vars(main.parse_arguments(before))}
    again = main.parse_arguments([*before, "--resume", "x.pth.tar"], saved, "x.pth.tar")
    assert vars(again) | {"resume": None, "start_step": 0} == saved["args"]
    with pytest.raises(UserError, match=f"trained with {was}: it cannot continue with {now}"):
        main.parse_arguments([*now.split(), "--resume", "x.pth.tar"], saved, "x.pth.tar")


def continued(before, *flags, **data):
    """The arguments of a command that goes on from step 3 of a run with the arguments ``before``."""
    saved = {"step": 3, "args": vars(before), "data": data}
    return main.parse_arguments([*flags, "--resume", "x.pth.tar"], saved, "x.pth.tar")


def test_what_belongs_to_a_command_is_not_remembered():
    args = continued(main.parse_arguments(["--overwrite"]))
    assert not args.overwrite and args.start_step == 3 and args.resume == os.path.abspath("x.pth.tar")


def test_a_run_does_not_end_before_its_checkpoint():
    assert continued(main.parse_arguments([]), "--total-steps", "3").start_step == 3
    with pytest.raises(UserError, match=r"x\.pth\.tar is already at step 3: give a larger --total-steps"):
        continued(main.parse_arguments([]), "--total-steps", "2")


def test_the_size_of_a_run_that_took_its_images_size(capsys):
    before = main.parse_arguments(["--dataset", "folder"])
    assert before.resize is None
    assert continued(before, "--resize", "32", size=32).resize == 32
    with pytest.raises(UserError, match="trained with --resize 32: it cannot continue with --resize 16"):
        continued(before, "--resize", "16", size=32)


def test_paths_are_remembered_whole(here, monkeypatch, capsys):
    """A run goes on from any folder; that its unlabelled images are others is said."""
    flags = ("--data-path", "--save-path", "--results-path", "--unlabeled-path", "--labeled-indices")
    flags += ("--weights", "--teacher-checkpoint")
    words = [word for flag in flags for word in (flag, f"a{flag}")]
    before = main.parse_arguments([*words, "--method", "pseudo-label"])
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    for args in (before, continued(before, "--save-path", str(here / "a--save-path"))):
        for flag in flags:
            if flag != "--results-path" or args is before:
                assert getattr(args, flag.strip("-").replace("-", "_")) == str(here / f"a{flag}")
    capsys.readouterr()
    continued(before, "--unlabeled-path", "other")
    there = here / "elsewhere/other"
    assert f"--unlabeled-path {here}/a--unlabeled-path → {there}" in capsys.readouterr().err


def test_the_checkpoints_of_a_name(here):
    """None of another run whose name only looks alike: --overwrite removes what is found."""
    own = ["last", "best", "finetune_last", "finetune_best", "step00000002", "step00000004", "step00000008"]
    others = ("a.b.c_last", "aXb_last", "my-a.b_last", "a.b_x_last", "a.b_step8", "a.b_last.pth.tar")
    for name in (*(f"a.b_{kind}" for kind in own), *others):
        Path(f"{name}.pth.tar").write_text("")
    args = argparse.Namespace(save_path=".", name="a.b", keep=1)
    found = identity.checkpoints_of(args)
    assert found == {f"./a.b_{kind}.pth.tar": int(kind[4:]) if "step" in kind else None for kind in own}
    assert not identity.checkpoints_of(argparse.Namespace(save_path=".", name="c"))  # ends as a.b.c does
    identity.drop_checkpoints(args, 4)
    kept = {path.name for path in here.glob("a.b_step*")}
    assert kept == {"a.b_step00000004.pth.tar", "a.b_step8.pth.tar"}


def test_images_of_another_size_are_seen_in_that_of_the_run(here, capsys):
    for first, (root, size) in enumerate((("mine/train", 12), ("mine/test", 12), ("new/test", 20))):
        for number, name in enumerate(("cat", "dog", "owl") * 4):
            (here / root / name).mkdir(parents=True, exist_ok=True)
            pixels = np.random.RandomState(number + 100 * first).randint(
                0, 256, (size, size, 3), dtype=np.uint8
            )
            Image.fromarray(pixels).save(here / root / name / f"{number}.png")
    words = [*FOLDER, "--data-path", "mine"]
    del words[words.index("--resize") : words.index("--resize") + 2]
    assert command(*words) == 0
    assert command("--evaluate", "--resume", "checkpoint/mine_last.pth.tar", "--data-path", "new") == 0
    args, state = main.parse_arguments(words), load("checkpoint/mine_last.pth.tar")
    args.data_path = "new"
    args.evaluate = True
    assert main.read_data(args, state["data"], labels_given=False).test.images.shape == (12, 3, 12, 12)
    assert "evaluating at" not in capsys.readouterr().err
    drawn = visualize.load(read_run("results/mine_last"))[1]
    assert drawn.test.images.shape == (12, 3, 12, 12)


def test_other_labelled_images_are_refused(copied, capsys):
    positions = Path("results/run/labeled_indices.txt").read_text().split()
    Path("same.txt").write_text("\n".join(reversed(positions)))
    other = load_dataset("digits", num_labeled=10, seed=5)
    Path("other.txt").write_text("\n".join(map(str, other.labeled_indices)))
    words = ["--resume", "checkpoint/run_last.pth.tar", "--total-steps", "9", "--finetune-epochs", "0"]
    assert "other.txt lists other labelled images" in refused(
        capsys, *words, "--labeled-indices", "other.txt"
    )
    assert command(*words, "--labeled-indices", "same.txt") == 0


def test_changes_are_said(copied, capsys):
    flags = "--total-steps 12 --batch-size 2 --student-lr 0.01 --finetune-epochs 0".split()
    assert command("--resume", "checkpoint/run_last.pth.tar", *flags) == 0
    said = capsys.readouterr().err
    assert (
        "--batch-size 4 → 2" in said and "--student-lr 0.05 → 0.01" in said and "--total-steps 8 → 12" in said
    )
    assert "continuing (as run) from step 8" in said


def test_resume_auto_says_that_there_is_nothing(here, capsys):
    assert command(*DIGITS, "--method", "supervised", "--finetune-epochs", "0", "--resume", "auto") == 0
    assert "no checkpoint of run: starting at step 0" in capsys.readouterr().err


@pytest.fixture
def folder_run(here):
    """A finished run on a folder without ``test/``; the folder is ``mine``."""
    photographs(here / "mine", count=24)
    assert command(*FOLDER, "--data-path", "mine") == 0
    return here / "checkpoint/mine_last.pth.tar"


def test_another_folder_is_not_continued(folder_run, here, capsys):
    words = ["--resume", folder_run, "--total-steps", "6"]
    photographs(here / "other", count=24, seed=7)  # the same names, other images
    assert "6 of the run's 6 labelled" in refused(capsys, *words, "--data-path", "other")
    photographs(here / "classes", classes=("ape", "bee", "cow"))
    assert "class 'ape'" in refused(capsys, *words, "--data-path", "classes")
    shutil.copytree(here / "mine", here / "moved")
    assert command(*words, "--data-path", "moved") == 0
    assert f"--data-path {here}/mine → {here}/moved" in capsys.readouterr().err
    names = Path("results/mine/labeled.txt").read_text().splitlines()
    kept = (here / "moved" / names[1]).read_bytes()
    (here / "moved" / names[1]).rename((here / "moved" / names[1]).with_name("renamed.png"))
    assert command("--resume", folder_run, "--total-steps", "8") == 0  # found by its content
    now = Path("results/mine/labeled.txt").read_text().splitlines()
    assert kept in [(here / "moved" / name).read_bytes() for name in now] and len(now) == 6
    (here / "moved" / names[0]).unlink()
    sentence = refused(capsys, "--resume", folder_run, "--total-steps", "10")
    assert names[0] in sentence and "1 of the run's 6 labelled" in sentence


def test_images_that_were_added_are_said_and_learned_from(folder_run, here, capsys):
    photographs(here / "more", count=30, seed=3)
    for path in (here / "more").rglob("*.png"):
        shutil.copy(path, here / "mine" / path.parent.name / f"new-{path.name}")
    labelled = load(folder_run)["data"]["labeled"]
    assert command("--resume", folder_run, "--total-steps", "6") == 0
    said = capsys.readouterr().err
    assert "the images to learn from have changed" in said
    assert load(folder_run)["data"]["labeled"] == labelled


def test_a_moved_folder_is_known_beside_many_unlabelled_images(here, capsys):
    photographs(here / "mine", count=24)
    photographs(here / "more", count=100, seed=8)
    flags = ["--data-path", "mine", "--unlabeled-path", "more"]
    assert command(*FOLDER, *flags) == 0
    shutil.move(here / "mine", here / "moved")
    last = here / "checkpoint/mine_last.pth.tar"
    assert command("--evaluate", "--resume", last, "--data-path", "moved", "--name", "again") == 0
    assert summary("again")["test_images"] == len(load(last)["data"]["test"]) < 72
    assert summary("again")["top1"] == summary("mine")["top1"]


def test_evaluating_on_other_classes_is_refused(folder_run, here, capsys):
    photographs(here / "other", classes=("ape", "cat"))
    sentence = refused(capsys, "--evaluate", "--resume", folder_run, "--data-path", "other")
    assert "class 'ape'" in sentence and "cat, dog, owl" in sentence
    sentence = refused(capsys, "--evaluate", "--resume", folder_run, "--dataset", "digits")
    assert "0, 1, 2" in sentence and "cat, dog, owl" in sentence


def test_evaluating_on_images_of_the_training_is_refused(folder_run, here, capsys):
    record = load(folder_run)["data"]
    learned = {path.name for path in (here / "mine/cat").iterdir()} - {
        name.split("/")[1] for name in record["test"] if name.startswith("cat/")
    }
    photographs(here / "new/test", count=3, seed=11)
    assert command("--evaluate", "--resume", folder_run, "--data-path", "new") == 0
    copy = here / "new/test/cat/renamed.png"
    shutil.copy(here / "mine/cat" / sorted(learned)[0], copy)
    assert "renamed.png" in refused(capsys, "--evaluate", "--resume", folder_run, "--data-path", "new")
    copy.rename(here / "new/test/cat/99.png")
    shutil.move(here / "new/test", here / "level")  # one level, with a training image, without a test image
    sentence = refused(capsys, "--evaluate", "--resume", folder_run, "--data-path", "level")
    assert "1 of the 10 test images" in sentence and "99.png" in sentence
    shutil.copy(here / "mine" / record["test"][0], here / "level/dog/tested.png")  # and with one
    sentence = refused(capsys, "--evaluate", "--resume", folder_run, "--data-path", "level")
    assert "1 of the 11 test images" in sentence and "99.png" in sentence
    (here / "level/cat/99.png").unlink()
    assert command("--evaluate", "--resume", folder_run, "--data-path", "level", "--name", "level") == 0
    assert summary("level")["test_images"] == 10
    assert f"on the 10 test images of folder in {here}/level" in capsys.readouterr().err
    shutil.copytree(here / "mine/cat", here / "one/cat")  # a class of the run's own folder
    sentence = refused(capsys, "--evaluate", "--resume", folder_run, "--data-path", "one")
    assert f"{len(learned)} of the 24 test images" in sentence


def test_a_new_folder_is_a_test_set_as_a_whole_and_needs_no_labels(folder_run, here, capsys):
    photographs(here / "new", classes=("cat", "owl"), count=2, seed=5)
    assert command("--evaluate", "--resume", folder_run, "--data-path", "new", "--name", "new") == 0
    assert "all of its images are test images" in capsys.readouterr().err
    state = load(folder_run)
    network = build_network(main.parse_arguments(FOLDER), 3, 12, "student")
    network.load_state_dict(state["avg_state_dict"])
    mean, std = (torch.tensor(state["data"][name]).view(3, 1, 1) for name in ("mean", "std"))
    right = 0
    for path in (here / "new").rglob("*.png"):  # whole images, stretched to the size of the run
        pixels = np.array(Image.open(path).resize((12, 12), Image.Resampling.BICUBIC))
        image = (torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std
        named = network.eval()(image[None]).argmax().item()
        right += ("cat", "dog", "owl")[named] == path.parent.name
    assert summary("new")["test_images"] == 4 and summary("new")["top1"] == 25 * right


def test_no_test_image_was_ever_a_training_image(folder_run, here, capsys):
    """Photographs added, removed, renamed and exchanged: those of the run keep their side."""
    record = load(folder_run)["data"]
    trained = {content(path) for path in (here / "mine").rglob("*.png")}
    tested = {content(here / "mine" / name) for name in record["test"]}
    trained -= tested
    top1 = summary("mine")["top1"]
    photographs(here / "more", count=12, seed=3)
    for path in (here / "more").rglob("*.png"):
        shutil.copy(path, here / "mine" / path.parent.name / f"new-{path.name}")
    paths = sorted((here / "mine/cat").glob("[01]*.png"))
    paths[0].unlink(), paths[5].unlink()
    for path in [*paths[1:5], *paths[6:]]:
        path.rename(path.with_name(f"renamed-{path.name}"))
    owls = sorted((here / "mine/owl").glob("[01]*.png"))
    for a, b in zip(owls[::2], owls[1::2], strict=True):  # exchanged in pairs
        a.rename(here / "kept"), b.rename(a), (here / "kept").rename(b)
    assert command("--evaluate", "--resume", folder_run) == 0
    assert f"among the {len(tested)} that the run was measured on" in capsys.readouterr().err
    seen = load_dataset(
        "folder", here / "mine", num_labeled=None, record=record, resize=12, only_test=True
    ).test
    contents = {content(here / "mine" / name) for name in seen.names}
    assert not contents & trained
    gone = {content_of for content_of in tested if content_of not in contents}
    assert len(gone) <= 2  # the two that were removed, if they were test images
    assert command("--evaluate", "--resume", folder_run) == 0
    for path in (here / "mine").rglob("new-*.png"):
        path.unlink()
    if not gone:
        assert command("--evaluate", "--resume", folder_run, "--name", "again") == 0
        assert summary("again")["top1"] == top1


def content(path):
    return Path(path).read_bytes()


# ---------------------------------------------------------------- names


def test_a_run_of_the_same_name_is_refused_and_kept(copied, capsys):
    before = everything(copied)
    sentence = refused(capsys, *DIGITS, "--method", "supervised")
    assert all(way in sentence for way in ("--resume auto", "--overwrite", "--name"))
    assert everything(copied) == before


def test_a_run_of_the_same_name_in_another_place_is_kept(copied, capsys):
    shutil.copytree("checkpoint", "other")
    before = everything("other")
    words = ["--resume", "checkpoint/run_last.pth.tar", "--total-steps", "12", "--save-path", "other"]
    assert "run was trained before: --resume auto continues it" in refused(capsys, *words)
    assert everything("other") == before


def test_the_finetuning_of_another_run_is_not_this_ones(copied):
    """Left beside it where a run was killed while it replaced another of its name."""
    path = Path("checkpoint/run_finetune_last.pth.tar")
    own = load(path)
    weights = {name: torch.zeros_like(value) for name, value in own["avg_state_dict"].items()}
    torch.save(own | {"run": "another", "avg_state_dict": weights, "finetune_top1": 99.99}, path)
    os.utime(path, (10**9, 10**9))
    assert command("--resume", "checkpoint/run_last.pth.tar") == 0
    assert summary("run")["finetune_top1"] == own["finetune_top1"] == load(path)["finetune_top1"]
    assert_same_networks(load(path)["avg_state_dict"], own["avg_state_dict"])


def test_the_finetuning_of_another_step_is_not_this_ones(copied, capsys):
    torch.save(load("checkpoint/run_last.pth.tar") | {"step": 4}, "checkpoint/run_step00000004.pth.tar")
    before = everything(copied)
    words = ["--finetune", "--resume", "checkpoint/run_step00000004.pth.tar"]
    assert "was already finetuned, with other flags or from another checkpoint" in refused(capsys, *words)
    assert everything(copied) == before


def test_overwriting_deletes_nothing_before_its_first_checkpoint(copied, monkeypatch, capsys):
    Path("results/run/events.out.tfevents.1.old").write_text("of before")
    before, words = (
        everything(copied),
        [*DIGITS, "--method", "supervised", "--overwrite", "--total-steps", "6"],
    )
    drawn = []

    class Stopping(main.TrainLoader):
        def __next__(self):
            drawn.append(None)
            if len(drawn) == 3:
                raise KeyboardInterrupt
            return super().__next__()

    with monkeypatch.context() as patch:
        patch.setattr(main, "TrainLoader", Stopping)
        assert command(*words) == 130
    assert everything(copied) == before
    assert Path("results/run/events.out.tfevents.1.old").exists() and not list(copied.rglob(".run.replaced*"))
    assert "the earlier run is back in its place" in capsys.readouterr().err
    assert command(*words, "--finetune-epochs", "0") == 0
    left = {path.name for path in Path("checkpoint").glob("*.pth.tar")}
    assert left == {"run_last.pth.tar", "run_best.pth.tar"}  # the old one's finetuning is gone
    assert [line["step"] for line in metrics("run") if "top1" in line] == [4, 6]
    assert summary("run")["steps"] == 6 and summary("run")["finetune_top1"] is None
    assert not Path("results/run/events.out.tfevents.1.old").exists()
    assert list(Path("results/run").glob("events*")) and not list(Path("results").glob(".*"))


def test_what_a_killed_run_has_set_aside_is_named_and_put_back(copied, capsys):
    before = everything(copied)
    args = argparse.Namespace(save_path="checkpoint", results_path="results", name="run")
    for resume in (["--resume", "checkpoint/run_last.pth.tar"], ["--resume", "auto", "--name", "run"]):
        identity.set_aside(args, "2026-01-01T00:00:00Z-0123abcd")
        Path("results/run").mkdir()
        aside = copied / "checkpoint/.run.replaced-0123abcd/run_last.pth.tar"
        assert f"--overwrite keeps it in {aside}" in refused(capsys, "--evaluate", *resume)
        assert command("--evaluate", "--resume", aside, "--name", "seen") == 0
        assert summary("seen")["top1"] == summary(".run.replaced-0123abcd")["top1"]
        shutil.rmtree("results/seen")
        assert "no --dataset" not in refused(capsys, *resume, "--seed", "7")  # refused, but found again
        assert everything(copied) == before and not list(copied.rglob(".run.replaced*"))


def test_what_cannot_be_set_aside_stays(copied, monkeypatch, capsys):
    """The place of its record is taken by a file."""
    before = everything(copied)
    monkeypatch.setattr(main, "new_run_id", lambda: "0123abcd")
    Path("results/.run.replaced-0123abcd").write_text("")
    sentence = refused(capsys, *DIGITS, "--method", "supervised", "--overwrite")
    assert "cannot write to" in sentence and "Not a directory" in sentence
    assert everything(copied) == before and not list(Path("checkpoint").glob(".run.replaced*"))


def test_an_earlier_checkpoint_does_not_undo_a_later_one(copied, capsys):
    shutil.copy("checkpoint/run_last.pth.tar", "checkpoint/run_best.pth.tar")
    state = load("checkpoint/run_last.pth.tar")
    torch.save(state | {"step": 4}, "checkpoint/run_best.pth.tar")
    sentence = refused(capsys, "--resume", "checkpoint/run_best.pth.tar")
    assert "step 8" in sentence and "step 4" in sentence and "--overwrite" in sentence
    Path("checkpoint/run_last.pth.tar").write_bytes(b"torn")  # then the earlier one is all that there is
    assert command("--resume", "checkpoint/run_best.pth.tar", "--finetune-epochs", "0") == 0


def test_a_name_that_is_being_trained_is_refused_until_its_process_ends(here, capsys):
    words = [
        *DIGITS,
        "--method",
        "supervised",
        "--total-steps",
        "100000",
        "--eval-step",
        "2",
        "--log-step",
        "1",
    ]
    process = subprocess.Popen([sys.executable, ROOT / "main.py", *words], stderr=-3)
    try:
        while not Path("checkpoint/run_last.pth.tar").exists():
            assert process.poll() is None
            time.sleep(0.05)
        for more in ((), ("--overwrite",), ("--resume", "auto")):
            assert "another process is training run: wait" in refused(capsys, *words, *more)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    step = load("checkpoint/run_last.pth.tar")["step"]
    short = ["--total-steps", step + 2, "--finetune-epochs", "0"]
    assert command("--resume", "checkpoint/run_last.pth.tar", *short) == 0


@pytest.mark.parametrize("end", ["last", "best", "finetune", "finetune_last", "step00000004"])
def test_names_that_are_those_of_checkpoints(end, here, capsys):
    """``run_finetune_last.pth.tar`` would be two things."""
    sentence = refused(capsys, *DIGITS, "--method", "supervised", "--name", f"run_{end}")
    checkpoint = "run_finetune_last" if end == "finetune" else f"run_{end}"
    assert f"'run_{end}' could be taken for the checkpoint {checkpoint} of a run named 'run'" in sentence


def test_a_name_with_a_record_alone_is_kept(copied, capsys):
    assert command("--evaluate", "--resume", "checkpoint/run_last.pth.tar", "--name", "mine") == 0
    sentence = refused(capsys, *DIGITS, "--method", "supervised", "--name", "mine")
    assert "mine already has the results of another run" in sentence and "--resume auto" not in sentence


def test_a_run_killed_before_its_first_checkpoint_starts_again(here, monkeypatch, capsys):
    def killed(*_):
        raise KeyboardInterrupt

    words = [*DIGITS, "--method", "supervised", "--finetune-epochs", "0", "--resume", "auto"]
    with monkeypatch.context() as patch:
        patch.setattr(main, "train_loop", killed)
        assert command(*words) == 130
    assert Path("results/run/args.json").exists()
    assert command(*words) == 0
    assert summary("run")["steps"] == 8 and not list(Path("results").glob(".*"))


def test_resume_auto_of_an_unknown_name_starts_nothing(here, capsys):
    assert "no --dataset to start a run with" in refused(capsys, "--name", "mistyped", "--resume", "auto")


def test_a_finished_run_leaves_nothing_to_train_for_another_name(copied, capsys):
    words = ["--resume", "checkpoint/run_last.pth.tar"]
    assert "the end of its training, step 8" in refused(capsys, *words, "--name", "other")
    assert command(*words) == 0
    assert "--total-steps 8 is reached: nothing is left to train" in capsys.readouterr().err
    assert not list(copied.rglob("*.png"))  # --no-pictures
    assert command(*words, "--finetune", "--name", "tuned", "--finetune-lr", "0.1", "--pictures") == 0
    assert (copied / "results/tuned/confusion.png").exists()
    assert counted("results/tuned") == summary("tuned")["finetune_top1"] != summary("tuned")["top1"]
    tuned = summary("tuned")["finetune_top1"]
    assert command("--resume", "auto", "--name", "tuned") == 0  # has been finetuned alone
    assert summary("tuned")["finetune_top1"] == tuned


def test_pictures_of_a_moved_run(copied, monkeypatch):
    args = json.loads(Path("results/run/args.json").read_text())
    args |= {"save_path": "/gone/checkpoint", "results_path": "/gone/results"}
    Path("results/run/args.json").write_text(json.dumps(args))
    visualize.main(["features", "results/run", "--projection", "pca"])


@pytest.mark.parametrize("name", ["", "..", "a/b", "/tmp/a", ".hidden", "x" * 250, "a\nb"])
def test_names_that_are_none(name, here, capsys):
    assert "cannot be the name of a run" in refused(capsys, *DIGITS, "--method", "supervised", "--name", name)
    assert not list(here.iterdir())


def test_a_folder_run_is_named_after_its_folder(here):
    args = main.parse_arguments(["--dataset", "folder", "--data-path", "/data/my flowers/"])
    assert args.name == "my flowers"
    assert main.parse_arguments(["--dataset", "folder", "--data-path", "/"]).name == "folder"


# ---------------------------------------------------------------- refused before the first step


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--evaluate --finetune --resume x", "--evaluate and --finetune"),
        ("--unlabeled-mode only", "--unlabeled-path"),
        ("--overwrite --resume auto", "give one of the two"),
        ("--freeze-body", "--pretrained or --weights"),
        ("--num-labeled inf", "inf"),
        ("--method mpl --switch-every 5 --student-model wrn-10-2", "leave out --student-model"),
    ],
)
def test_flags_that_cannot_be(flags, words, here, capsys):
    if "--resume" in flags:
        (here / "x").write_text("")
        with pytest.raises(UserError, match=words):
            main.parse_arguments(flags.split())
    else:
        assert words in refused(capsys, *DIGITS, "--method", "uda", *flags.split())
    assert not (here / "results").exists()


def write_unequal_labels(first):
    """``labels.txt`` with so many images of the first class of digits and one of every other."""
    whole = load_dataset("digits", num_labeled=1297, resize=8).labeled
    places = [(whole.targets == k).nonzero().flatten().tolist() for k in range(10)]
    Path("labels.txt").write_text(
        "\n".join(map(str, [*places[0][:first], *(each[0] for each in places[1:])]))
    )


def test_alignment_knows_the_labelled_classes(here, capsys):
    """One step at rate 1 from the same predictions, to two targets: the biases differ by the logarithm of the
    labelled classes' shares. Of the uniform one a user is warned."""
    write_unequal_labels(3)
    biases = {}
    words = [*DIGITS, *"--mu 2 --method uda --align 1 --total-steps 1 --finetune-epochs 0".split()]
    for target in ("uniform", "labeled"):
        assert command(*words, "--labeled-indices", "labels.txt", "--align-to", target, "--overwrite") == 0
        warned = "3 labelled images are of class '0' and 1 of '1'" in capsys.readouterr().err
        assert warned == (target == "uniform")
        biases[target] = load("checkpoint/run_last.pth.tar")["align_bias"]
    logs = torch.tensor([3.0] + [1.0] * 9).log()
    torch.testing.assert_close(biases["labeled"] - biases["uniform"], logs - logs.mean(), rtol=0, atol=1e-5)


def test_one_labelled_image_more_is_not_unequal(here):
    write_unequal_labels(2)
    dataset = load_dataset("digits", num_labeled=10, labeled_indices="labels.txt")
    args = main.parse_arguments([*DIGITS, "--method", "uda", "--align", "0.2"])
    assert dataset.class_shares == pytest.approx([2 / 11] + [1 / 11] * 9)
    assert not unequal_labels(args, dataset)


def test_an_interrupted_finetuning_is_continued(trained, here):
    """SIGTERM in the middle of finetuning: the training is on record, and it ends bit for bit."""
    whole = load(trained / "checkpoint/run_finetune_last.pth.tar")
    assert interrupt_at(8 + 20, METHODS[whole["args"]["method"]]) == 143
    assert summary("run")["top1"] == json.loads((trained / "results/run/summary.json").read_text())["top1"]
    assert summary("run")["finetune_top1"] is None
    assert load("checkpoint/run_finetune_last.pth.tar")["finetune_step"] == 20
    copies = here / "copies"
    shutil.copytree("checkpoint", copies)
    assert command("--resume", "checkpoint/run_finetune_last.pth.tar") == 0
    again = load("checkpoint/run_finetune_last.pth.tar")
    assert again["finetune_step"] == whole["finetune_step"] == 40
    assert_same_networks(again["avg_state_dict"], whole["avg_state_dict"])
    assert summary("run")["finetune_top1"] == whole["finetune_top1"]
    lines = [line for line in metrics("run") if "finetune_top1" in line]
    reference = (trained / "results/run/metrics.jsonl").read_text().splitlines()
    assert lines == [line for line in map(json.loads, reference) if "finetune_top1" in line]
    shutil.copytree(copies, "checkpoint", dirs_exist_ok=True)  # the same by --resume auto
    assert command("--resume", "auto", "--name", "run") == 0
    assert_same_networks(
        load("checkpoint/run_finetune_last.pth.tar")["avg_state_dict"], whole["avg_state_dict"]
    )


def test_finetuning_otherwise_does_not_replace_the_first(copied, capsys):
    before = everything(copied)
    words = ["--finetune", "--resume", "checkpoint/run_last.pth.tar", "--body-lr-scale", "0.5"]
    assert "was already finetuned" in refused(capsys, *words)
    words = ["--resume", "checkpoint/run_finetune_last.pth.tar", "--body-lr-scale", "0.5"]
    assert "cannot continue with --body-lr-scale 0.5" in refused(capsys, *words)
    words = ["--finetune", "--resume", "checkpoint/run_last.pth.tar", "--finetune-lr", "0.5"]
    assert "was already finetuned" in refused(capsys, *words)
    assert everything(copied) == before
    assert command(*words, "--name", "other") == 0
    assert {path: everything(copied)[path] for path in before} == before
    trained = summary("run")
    assert command(*words, "--overwrite") == 0
    assert summary("run")["train_seconds"] == trained["train_seconds"] is not None
    assert load("checkpoint/run_finetune_last.pth.tar")["args"]["finetune_lr"] == 0.5
    assert load("checkpoint/run_last.pth.tar")["step"] == 8  # the training is as it was


# ---------------------------------------------------------------- what a run says


def test_the_result_comes_before_the_pictures_and_survives_them(here, monkeypatch, capsys):
    found = []

    def broken(*_):
        found.append(summary("run")["top1"])
        raise ValueError("no ink")

    monkeypatch.setattr(visualize, "finished_run", broken)
    assert command(*DIGITS, "--method", "supervised", "--finetune-epochs", "0", "--pictures") == 0
    done = capsys.readouterr()
    assert "could not be drawn: no ink" in done.err
    assert done.out.splitlines()[-1].startswith(f"top-1 {counted('results/run'):.2f} % ")
    assert found == [counted("results/run")]


@pytest.mark.parametrize("place", ["read_data", "train_loop", "visualize"])
def test_ctrl_c_is_one_line_and_130(place, here, monkeypatch, capsys):
    def pressed(*_, **__):
        raise KeyboardInterrupt

    if place == "visualize":
        monkeypatch.setattr(visualize, "finished_run", pressed)
    else:
        monkeypatch.setattr(main, place, pressed)
    assert command(*DIGITS, "--method", "supervised", "--finetune-epochs", "0", "--pictures") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "main.py: interrupted"


@pytest.mark.parametrize("script", ["main.py", "tune.py", "visualize.py"])
def test_ctrl_c_during_the_import_is_one_line_and_130(here, script):
    process = subprocess.Popen(
        [sys.executable, "-X", "importtime", ROOT / script, "--help"], stderr=subprocess.PIPE, text=True
    )
    for line in process.stderr:  # PyTorch is being imported
        if " torch." in line:
            break
    process.send_signal(signal.SIGINT)
    rest = process.stderr.read()
    assert process.wait(60) == 130
    assert f"{script}: interrupted" in rest and "Traceback" not in rest


def test_lines_between_evaluations(here):
    """Losses, rates and speed every --log-step steps, in the file and for TensorBoard; curves draw them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*MPL, "--method", "mpl", "--finetune-epochs", "0", "--total-steps", "10", "--eval-step", "5"]
    assert command(*words, "--log-step", "2") == 0
    lines = metrics("run")
    assert [line["step"] for line in lines] == [2, 4, 5, 6, 8, 10]
    for line in lines:
        assert {"labeled_loss", "student_loss", "teacher_rate", "student_rate", "images_per_second"} <= set(
            line
        )
        assert ("top1" in line) == (line["step"] % 5 == 0)
    assert command(*words, "--name", "each", "--log-step", "1") == 0
    each = {line["step"]: line["student_loss"] for line in metrics("each")}
    for line, steps in zip(lines, ((1, 2), (3, 4), (5,), (6,), (7, 8), (9, 10)), strict=True):
        assert line["student_loss"] == pytest.approx(np.mean([each[step] for step in steps]), rel=1e-5)
    trained = load("checkpoint/run_last.pth.tar")
    assert trained["trained_images"] == 10 * (4 + 2 * 4)
    speed = trained["trained_images"] / trained["train_seconds"]
    assert summary("run")["images_per_second"] == pytest.approx(speed)
    assert lines[0]["student_rate"] == pytest.approx(utils.learning_rate(1, peak=0.05, total_steps=10))
    events = EventAccumulator("results/run")
    events.Reload()
    assert [event.step for event in events.Scalars("student_loss")] == [2, 4, 5, 6, 8, 10]
    run_read = read_run("results/run")
    assert drawing.series(run_read, "labeled_loss")[0] == [2, 4, 5, 6, 8, 10]
    assert drawing.series(run_read, "top1")[0] == [5, 10]


def test_a_line_a_minute_without_a_terminal(here, monkeypatch, capsys):
    monkeypatch.setattr(utils.Progress, "SECONDS", 0)
    assert command(*DIGITS, "--method", "supervised", "--log-step", "2") == 0
    said = capsys.readouterr().err.splitlines()
    assert any(line.startswith("run  3/8  ") and "left" in line and "loss" in line for line in said)
    assert any(line.startswith("run, finetuning  20/40  ") for line in said)


def test_what_is_said_of_a_folder(here, capsys):
    photographs(here / "mine", count=12)
    for number in range(24):
        Image.new("RGB", (15, 15), (number, 0, 0)).save(here / f"mine/cat/more-{number}.png")
    for number in range(12):
        (here / f"mine/dog/{number}.heic").write_bytes(b"")
    (here / "mine/owl/notes.txt").write_text("")
    assert command(*FOLDER, "--data-path", "mine") == 0
    said = capsys.readouterr().err
    assert "13 ignored: .heic 12, .txt 1 (photographs among them" in said
    assert "training images of 3 classes: cat: " in said
    assert "the classes are unequal: 'cat' has" in said
    assert f"results go to {here}/results/mine" in said and "12 pixels" in said and "images of 1" in said


def test_parts_in_capital_letters_are_parts(here, capsys):
    photographs(here / "mine/Train"), photographs(here / "mine/Test", seed=1)
    photographs(here / "mine", classes=["cat"], seed=2)
    words = [*FOLDER[:2], "--data-path", "mine", "--num-labeled", "3", *FOLDER[4:]]
    assert command(*words) == 0
    said = capsys.readouterr().err
    assert "has training images in Train/, test images in Test/" in said
    assert "not used in 'mine': cat/" in said.replace(f"'{here}/mine'", "'mine'")
    assert len(load("checkpoint/mine_last.pth.tar")["data"]["test"]) == 48


@pytest.mark.parametrize("size", [12, 70])
def test_test_images_among_the_unlabelled_ones_are_left_out(here, capsys, size):
    photographs(here / "mine/train"), photographs(here / "mine/test", count=4, seed=1)
    photographs(here / "more", classes=("any",), count=5, seed=2)
    for path in (here / "mine/test").rglob("*.png"):
        shutil.copy(path, here / "more/any" / f"{path.parent.name}-{path.name}")
    words = [*FOLDER, "--data-path", "mine", "--unlabeled-path", "more", "--resize", size]
    assert command(*words) == 0
    assert "12 of 17 images in" in capsys.readouterr().err
    record = load("checkpoint/mine_last.pth.tar")["data"]
    assert not torch.isin(record["tested"], record["trained"]).any() and len(record["trained"]) == 48 + 5


def test_test_images_of_other_data_sets_among_the_unlabelled_ones_are_left_out(here):
    test = load_dataset("digits", num_labeled=10, resize=8).test.images
    (here / "more").mkdir()
    for number, image in enumerate(test[:7]):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(here / f"more/{number}.png")
    Image.new("RGB", (8, 8), "red").save(here / "more/red.png")
    dataset = load_dataset("digits", num_labeled=10, resize=8, unlabeled_path=here / "more")
    assert len(dataset.unlabeled) == 1297 + 1 and "7 of 8 images" in dataset.notes[0]


def test_images_in_both_parts_are_left_out_or_warned_of(here, capsys):
    photographs(here / "mine/train"), photographs(here / "mine/test", count=4, seed=1)
    shutil.copy(here / "mine/train/cat/03.png", here / "mine/test/cat/copy.png")
    assert command(*FOLDER, "--data-path", "mine", "--name", "without") == 0
    said = capsys.readouterr().err
    assert "images left out as copies of test or validation images: 1 (" in said
    assert "cat: 15, dog: 16, owl: 16" in said and "6 labelled, 47 unlabelled" in said
    record = load("checkpoint/without_last.pth.tar")["data"]
    assert not torch.isin(record["tested"], record["trained"]).any()
    assert command(*FOLDER, "--data-path", "mine", "--keep-test-copies") == 0
    assert "1 of 13 test images are also among the training images, such as test/cat/copy.png" in (
        capsys.readouterr().err
    )
    assert command("--evaluate", "--resume", "checkpoint/mine_last.pth.tar") == 0  # it was one then, too
    assert summary("mine_last")["top1"] == summary("mine")["top1"]


class Naming(torch.nn.Module):
    """Takes every image for the same class, but those of the classes below ``right`` for their own."""

    def __init__(self, targets, num_classes, right, named):
        super().__init__()
        self.targets, self.num_classes, self.right, self.named = targets, num_classes, right, named
        self.seen = 0

    def forward(self, images):
        truth = self.targets[self.seen : self.seen + len(images)]
        self.seen += len(images)
        truth = torch.cat([truth, torch.zeros(len(images) - len(truth), dtype=torch.int64)])
        named = torch.where(truth < self.right, truth, self.named)
        return 9.0 * torch.nn.functional.one_hot(named, self.num_classes).float()


def test_what_is_measured():
    """500 images in batches of 256: the 12 that fill the last batch up count as nothing."""
    dataset = load_dataset("digits", num_labeled=10, resize=8)
    runtime = main.Runtime("cpu")
    views = main.build_views(main.parse_arguments(["--dataset", "digits"]), dataset, runtime)
    truth = dataset.test.targets
    network = Naming(truth, 10, right=3, named=5)
    figures, confusion = measure_accuracy(runtime, {"student": network}, dataset.test, views)
    expected = torch.where(truth < 3, truth, 5)
    assert confusion.sum() == 500
    counts = [[int(((truth == i) & (expected == j)).sum()) for j in range(10)] for i in range(10)]
    assert confusion.tolist() == counts
    assert figures["top1"] == pytest.approx(100 * (truth == expected).double().mean().item(), rel=1e-12)
    assert figures["mean_class_top1"] == pytest.approx(100 * 4 / 10)
    said = measured(figures, confusion, dataset.classes)
    assert said["never_predicted"] == ["3", "4", "6", "7", "8", "9"]
    assert said["largest_class_top1"] == pytest.approx(100 * truth.bincount().max().item() / 500)
    summary = dict.fromkeys(SUMMARY) | said | {"dataset": "digits", "num_labeled": 10, "method": "uda"}
    lines = result_lines(summary | {"seed": 0, "selection": "last"})
    assert "mean over classes 40.00 %" in lines[-1] and "top-5" in lines[-1]
    assert "never predicted: 3, 4, 6" in lines[0] and "always naming the largest class" in lines[0]
    assert lines[0].startswith("500 test images; ")


# ---------------------------------------------------------------- ensembles


def counts_of(probabilities, truth):
    """Top-1 in percent, and how many of class i (row) were taken for class j, counted one by one."""
    counts = [[0] * probabilities.shape[1] for _ in range(probabilities.shape[1])]
    for named, actual in zip(probabilities.argmax(1).tolist(), truth.tolist(), strict=True):
        counts[actual][named] += 1
    return 100 * sum(row[i] for i, row in enumerate(counts)) / len(truth), counts


def test_an_ensemble_is_the_mean_of_probabilities():
    """In float64, one image after the other: not the mean of logits, which names other classes here."""
    dataset, runtime = load_dataset("digits", num_labeled=10, resize=8), main.Runtime("cpu")
    views = main.build_views(main.parse_arguments(["--dataset", "digits"]), dataset, runtime)
    torch.manual_seed(0)
    student, teacher = (torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)) for _ in range(2))
    teacher[1].weight.data *= 5
    images, truth = views.evaluation(dataset.test.images), dataset.test.targets
    logits = [network(images).detach() for network in (student, teacher)]
    each = [torch.softmax(row.double(), dim=1) for row in logits]
    mean = (each[0] + each[1]) / 2
    assert (mean.argmax(1) != (logits[0] + logits[1]).argmax(1)).any()
    torch.testing.assert_close(mean_prediction(logits).softmax(1), mean.float())
    members = {"student": student, "teacher": teacher}
    figures, confusion = measure_accuracy(runtime, members, dataset.test, views)
    top1, counts = counts_of(mean, truth)
    assert confusion.tolist() == counts
    assert figures["top1"] == figures["ensemble_top1"] == pytest.approx(top1, rel=1e-12)
    for role, probabilities in zip(members, each, strict=True):
        assert figures[f"{role}_top1"] == pytest.approx(counts_of(probabilities, truth)[0], rel=1e-6)
    assert figures["test_loss"] == pytest.approx(-mean[range(500), truth].log().mean().item(), rel=1e-6)
    among = mean.topk(5, dim=1).indices.eq(truth[:, None]).any(1)
    assert figures["top5"] == pytest.approx(100 * among.double().mean().item(), rel=1e-6)


@pytest.mark.parametrize(
    ("flags", "kind", "averages"),
    [
        ("", "last", ("avg", "teacher")),
        ("--switch-every 4", "last", ("avg", "teacher_avg")),
        ("--switch-every 1 --num-val 40", "best", ("avg", "teacher_avg")),
    ],
)
def test_a_run_with_an_ensemble(here, capsys, flags, kind, averages):
    """The mean of both networks of the checkpoint is what the record, its pictures and --evaluate show."""
    words = (
        "--dataset twomoons --num-labeled 6 --batch-size 6 --mu 2 --total-steps 7 --eval-step 3 --name run"
    )
    words = [*words.split(), *flags.split(), "--ensemble", "--device", "cpu", "--finetune-epochs", "3"]
    assert command(*words, "--student-lr", "0.2", "--teacher-lr", "0.2") == 0
    state, test = load(f"checkpoint/run_{kind}.pth.tar"), load_dataset("twomoons", num_labeled=6).test
    each = []
    for key in averages:
        network = build_network(main.parse_arguments(["--dataset", "twomoons"]), 2, 0, "student")
        network.load_state_dict(state[f"{key}_state_dict"])
        each.append(torch.softmax(network.eval()(test.images).detach().double(), dim=1))
    top1, counts = counts_of((each[0] + each[1]) / 2, test.targets)
    alone = [counts_of(probabilities, test.targets)[0] for probabilities in each]
    assert json.loads(Path("results/run/confusion.json").read_text())["counts"] == counts
    (line,) = [line for line in metrics("run") if line["step"] == state["step"] and "top1" in line]
    assert command("--evaluate", "--resume", f"checkpoint/run_{kind}.pth.tar") == 0
    for record in (line, summary(f"run_{kind}"), *[summary("run")] * (kind == "last")):
        assert record["top1"] == record["ensemble_top1"] == pytest.approx(top1)
        assert [record["student_top1"], record["teacher_top1"]] == pytest.approx(alone)
    result = capsys.readouterr().out.splitlines()[-1]
    assert f"top-1 {top1:.2f} % (ensemble)" in result and f"student {alone[0]:.2f} %" in result
    assert command("--evaluate", "--resume", "checkpoint/run_finetune_last.pth.tar") == 0
    assert "has only the finetuned student: main.py ignores --ensemble" in capsys.readouterr().err
    assert summary("run_finetune_last")["top1"] == summary("run")["finetune_top1"]
    assert summary("run_finetune_last")["ensemble_top1"] is None
    run_read = visualize.read_run("results/run")
    accuracies = visualize.draw_curves([run_read]).axes[1]
    assert "ensemble" in accuracies.get_title(loc="left")
    assert {"top1", "student_top1", "teacher_top1"} <= {line.get_label() for line in accuracies.get_lines()}
    visualize.main(["regions", "results/run"])


def test_an_ensemble_of_checkpoints(copied, capsys):
    """Runs of another size, network, seed and normalisation: each sees its own images."""
    other = "--method supervised --resize 12 --model wrn-10-2 --seed 1 --total-steps 8 --name other".split()
    assert command(*DIGITS, *other, "--finetune-epochs", "0", "--normalize", "imagenet") == 0
    paths = ["checkpoint/run_last.pth.tar", "checkpoint/other_last.pth.tar"]
    each = []
    for path in paths:
        args, state = main.parse_arguments(["--evaluate", "--resume", path], load(path), path), load(path)
        runtime = main.Runtime("cpu", args.amp, args.amp_dtype, args.channels_last)
        dataset = main.read_data(args, state["data"], labels_given=False)
        network = main.saved_members(args, runtime, state, dataset.num_classes, dataset.size)["student"]
        views = main.build_views(args, dataset, runtime)
        walk = predictions(network, dataset.test, views, runtime)
        each.append(torch.cat([logits[mask > 0] for logits, _, mask in walk]).double().softmax(1))
    top1, counts = counts_of((each[0] + each[1]) / 2, dataset.test.targets)
    capsys.readouterr()
    assert command("--evaluate", "--resume", paths[0], "--resume", paths[1]) == 0
    found = summary("run_last+other_last")
    assert found["top1"] == found["ensemble_top1"] == pytest.approx(top1)
    assert json.loads(Path("results/run_last+other_last/confusion.json").read_text())["counts"] == counts
    assert (found["seed"], found["run"], found["num_labeled"], found["steps"]) == (None, None, 10, 8)
    said = capsys.readouterr()
    assert said.out.splitlines()[-1].endswith("(digits, 10 labels, supervised)")
    alone = [counts_of(probabilities, dataset.test.targets)[0] for probabilities in each]
    for path, expected in zip(paths, alone, strict=True):
        assert f"{path}: top-1 {expected:.2f} %" in said.err
    with pytest.raises(UserError, match="several checkpoints"):
        visualize.main(["features", "results/run_last+other_last"])


def test_checkpoints_that_are_no_ensemble(folder_run, here, capsys):
    photographs(here / "other", count=24, seed=7)
    assert command(*FOLDER, "--data-path", "other") == 0
    both = ["--resume", folder_run, "--resume", here / "checkpoint/other_last.pth.tar"]
    assert "only --evaluate takes several checkpoints" in refused(capsys, *both)
    assert "only --evaluate takes several checkpoints" in refused(capsys, *both, "--finetune")
    sentence = refused(capsys, "--evaluate", *both)
    assert "other_last.pth.tar have different test images" in sentence
    photographs(here / "new", count=3, seed=11)
    assert command("--evaluate", *both, "--data-path", "new", "--name", "new") == 0
    assert summary("new")["test_images"] == 9
    photographs(here / "birds", classes=("ape", "bee"), count=24)
    assert command(*FOLDER, "--data-path", "birds") == 0
    sentence = refused(capsys, "--evaluate", *both[:2], "--resume", "checkpoint/birds_last.pth.tar")
    assert "birds_last.pth.tar have different classes" in sentence


def test_an_ensemble_has_one_truth():
    """Also where images have no fingerprints: the classes of the test images must be the same."""
    one, other = (load_dataset("digits", num_labeled=10, resize=size) for size in (8, 12))
    check_same_test(one, other, "a", "b")
    other.test.targets = other.test.targets.flip(0)
    with pytest.raises(UserError, match="a and b have different test images"):
        check_same_test(one, other, "a", "b")


def test_no_top5_with_five_classes_or_fewer(here, capsys):
    photographs(here / "mine", classes="abcde", count=10)
    words = [*FOLDER[:2], "--num-labeled", "5", *FOLDER[4:]]
    assert command(*words, "--data-path", "mine") == 0
    assert "top-5" not in capsys.readouterr().out and summary("mine")["top5"] is None
    assert not any("top5" in line for line in metrics("mine"))


# ---------------------------------------------------------------- damage


def test_links_that_lead_in_circles(here):
    photographs(here / "mine", count=8)
    plain = load_dataset("folder", here / "mine", num_labeled=3, resize=12)
    (here / "mine/cat/loop").symlink_to(here / "mine")
    (here / "mine/dog/up").symlink_to(here)
    (here / "mine/owl/self").symlink_to("self")
    linked = load_dataset("folder", here / "mine", num_labeled=3, resize=12)
    assert linked.unlabeled.names == plain.unlabeled.names and linked.test.names == plain.test.names


@pytest.mark.parametrize("link", ["folder", "class", "file"])
def test_a_file_in_two_classes_is_an_error(here, link):
    photographs(here / "mine", count=8)
    place, target = {
        "folder": ("cat/more", "dog"),
        "class": ("fox", "dog"),
        "file": ("cat/again.png", "dog/00.png"),
    }[link]
    (here / "mine" / place).symlink_to(here / "mine" / target)
    with pytest.raises(UserError, match=r"same file .* classes '(dog|fox|cat)' and '(dog|cat)'"):
        load_dataset("folder", here / "mine", num_labeled=0.5, resize=12)


def test_a_fifo_is_no_image(here):
    photographs(here / "mine", count=8)
    os.mkfifo(here / "mine/cat/z.jpg")
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", *FOLDER, "--data-path", "mine"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and "1 ignored: not a regular file 1" in done.stderr


def test_a_disk_full_while_the_labels_are_written(here, capsys):
    (here / "results/run").mkdir(parents=True)
    (here / "results/run/labeled_indices.txt.tmp").symlink_to("/dev/full")
    assert "No space left" in refused(capsys, *DIGITS, "--method", "supervised")


def test_a_picture_into_a_folder_that_cannot_be_written(copied):
    with pytest.raises(UserError, match=r"cannot write /proc/a\.png"):
        visualize.main(["curves", "results/run", "--out", "/proc/a.png"])


def test_damaged_lines_of_the_metrics_are_left_out(copied, capsys):
    path = Path("results/run/metrics.jsonl")
    lines = path.read_text().splitlines()
    path.write_text("\n".join(['{"step": 4, "top1": 3}}', "[1, 2]", *lines]) + "\n")
    assert (
        command("--resume", "checkpoint/run_last.pth.tar", "--total-steps", "9", "--finetune-epochs", "0")
        == 0
    )
    assert "2 damaged lines" in capsys.readouterr().err
    assert [line["step"] for line in metrics("run") if "top1" in line] == [4, 8, 9]


def test_a_damaged_summary_is_left_out(copied, capsys):
    path = Path("results/run/summary.json")
    path.write_text(path.read_text()[:40])
    assert command("--finetune", "--resume", "checkpoint/run_last.pth.tar") == 0
    assert "summary.json is damaged" in capsys.readouterr().err
    last, tuned = (load(f"checkpoint/run_{kind}.pth.tar") for kind in ("last", "finetune_last"))
    assert summary("run")["top1"] == last["top1"]
    assert summary("run")["finetune_top1"] == tuned["finetune_top1"]


def test_a_loss_that_is_not_finite_before_any_checkpoint(here, capsys):
    words = [*DIGITS, "--method", "supervised", "--student-lr", "1000", "--nesterov", "--total-steps", "400"]
    assert command(*words, "--eval-step", "400", "--log-step", "20", "--weight-decay", "100") == 3
    assert "is not finite; no checkpoint was written" in capsys.readouterr().err


def test_a_loss_of_finetuning_that_is_not_finite(copied, capsys):
    """Its steps count on from the training's, as in the record."""
    words = ["--finetune", "--resume", "checkpoint/run_last.pth.tar", "--name", "tuned"]
    assert command(*words, "--finetune-lr", "1000", "--finetune-weight-decay", "100000") == 3
    said = capsys.readouterr().err
    step = re.search(r"step (\d+): finetune_loss is not finite; no checkpoint was written", said)
    assert 8 < int(step[1]) < 8 + 40


def test_the_record_of_another_run_is_not_continued(copied, capsys):
    """A checkpoint that was moved beside the results of another run does not extend its curves."""
    args = json.loads(Path("results/run/args.json").read_text())
    Path("results/run/args.json").write_text(json.dumps(args | {"run": "another"}))
    assert (
        command("--resume", "checkpoint/run_last.pth.tar", "--total-steps", "9", "--finetune-epochs", "0")
        == 0
    )
    assert "has the results of another run: they are replaced" in capsys.readouterr().err
    assert [line["step"] for line in metrics("run")] == [9]


def test_run_from_a_shell_in_an_empty_folder(supervised, here):
    """The mission's own command."""
    done = run("--evaluate", "--resume", supervised / "checkpoint/run_best.pth.tar", cwd=here)
    expected = json.loads((supervised / "results/run/summary.json").read_text())["best_top1"]
    assert f"top-1 {expected:.2f} %" in done.stdout.splitlines()[-1]
    assert len(tensors(load(supervised / "checkpoint/run_best.pth.tar"))) > 20


@pytest.mark.parametrize("resume", ["checkpoint/run_last.pth.tar", "auto"])
def test_the_device_is_the_checkpoints(copied, resume):
    argv = ["--name", "run", "--resume", resume]
    state = load("checkpoint/run_last.pth.tar")
    for device, expected in (
        ("cpu", "cpu"),
        ("mps", "auto" if not torch.backends.mps.is_available() else "mps"),
    ):
        torch.save(state | {"args": state["args"] | {"device": device}}, "checkpoint/run_last.pth.tar")
        parser = main.build_parser()
        assert arguments.device_of(*parser.parse_given(argv)) == expected
        assert arguments.device_of(*parser.parse_given([*argv, "--device", "xla"])) == "xla"


@pytest.mark.parametrize("labels", ["0.03", "all"])
def test_a_run_with_a_share_of_the_labels_goes_on(labels, here):
    words = [*DIGITS, "--method", "supervised", "--num-labeled", labels, "--finetune-epochs", "0"]
    assert command(*words, "--total-steps", "2") == 0
    assert command("--resume", "checkpoint/run_last.pth.tar", "--total-steps", "4") == 0
    assert summary("run")["num_labeled"] == (1297 if labels == "all" else 40)
    assert command(*words, "--resume", "auto", "--total-steps", "6") == 0
    assert command("--evaluate", "--resume", "checkpoint/run_last.pth.tar") == 0
    assert summary("run_last")["num_labeled"] == summary("run")["num_labeled"]
