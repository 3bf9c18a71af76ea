"""The scripts as a user runs them: training, killing, resuming, evaluating, getting it wrong."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from PIL import Image
from test_data import write_cifar, write_stl10, write_svhn

import main
import visualize
from augmentation import ImageViews
from data import load_dataset
from engine.evaluation import measure_accuracy
from run.record import read_run
from utils import UserError

ROOT = Path(main.__file__).parent
TINY = (
    "--dataset digits --resize 8 --num-labeled 10 --model wrn-10-1 --batch-size 4 --mu 2 --nesterov "
    "--teacher-lr 0.02 --student-lr 0.02 --warmup-steps 2 --uda-steps 4 --label-smoothing 0.1 --device cpu "
    "--student-dropout 0.3 --teacher-dropout 0.3 --finetune-epochs 2 --workers 0 --no-pictures"
).split()
RUN = [*TINY, *"--total-steps 24 --eval-step 6 --pseudo-label sample --name run".split()]
RUN += "--weak-pass ema --pseudo-label-view strong".split()
MOONS = (
    "--dataset twomoons --num-labeled 6 --batch-size 6 --mu 4 --device cpu --finetune-epochs 0 --no-pictures"
).split()


def run(*arguments, cwd, check=True):
    """Run main.py in ``cwd``."""
    done = forked.run_main(arguments, cwd)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def checkpoint(folder, name):
    return torch.load(folder / "checkpoint" / f"{name}.pth.tar", weights_only=True)


def tensors(state, prefix=""):
    """All tensors of a nested checkpoint by path, clocks left out."""
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else []
    return {path: t for key, value in items for path, t in tensors(value, f"{prefix}/{key}").items()}


def assert_same_checkpoint(a, b):
    a, b = tensors(a), tensors(b)
    assert a.keys() == b.keys()
    assert len(a) > 50
    for path, tensor in a.items():
        assert torch.equal(tensor, b[path]), path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A finished run of 24 steps, all that is random switched on."""
    folder = tmp_path_factory.mktemp("unbroken")
    done = run(*RUN, "--pictures", cwd=folder)
    return folder, done


def test_what_a_run_leaves(unbroken):
    folder, done = unbroken
    results = folder / "results" / "run"
    summary = json.loads((results / "summary.json").read_text())
    design = (
        "name dataset method num_labeled seed steps top1 top5 best_top1 best_step selection oracle_top1 "
        "teacher_top1 tta_top1 finetune_top1 pflop train_seconds images_per_second device torch commit run "
        "mean_class_top1 largest_class_top1 never_predicted test_images ensemble_top1 student_top1"
    )
    assert set(summary) == set(design.split())
    assert summary["selection"] == "last"
    assert summary["best_top1"] == summary["top1"] <= summary["oracle_top1"]
    lines = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "top1" in line] == [6, 12, 18, 24]
    assert max(line["top1"] for line in lines if "top1" in line) == summary["oracle_top1"]
    assert len((results / "labeled_indices.txt").read_text().split()) == 10
    assert json.loads((results / "args.json").read_text())["mu"] == 2
    assert list(results.glob("events.out.tfevents.*"))
    assert (results / "curves.png").stat().st_size > 1000
    saved = {path.name for path in (folder / "checkpoint").iterdir() if path.name[0] != "."}
    kinds = ("last", "best", "finetune_last", "finetune_best")
    assert saved == {f"run_{kind}.pth.tar" for kind in kinds}
    assert f"top-1 {summary['top1']:.2f} %" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("kind", ["best", "finetune_best"])
def test_evaluate_repeats_the_accuracy(unbroken, kind):
    folder, _ = unbroken
    arguments = [*TINY[:10], "--device", "cpu", "--evaluate", "--resume", f"checkpoint/run_{kind}.pth.tar"]
    done = run(*arguments, cwd=folder)
    summary = json.loads((folder / "results" / "run" / "summary.json").read_text())
    evaluated = json.loads((folder / "results" / f"run_{kind}" / "summary.json").read_text())
    assert evaluated["top1"] == summary["best_top1" if kind == "best" else "finetune_top1"]
    assert f"top-1 {evaluated['top1']:.2f} %" in done.stdout


def test_finetune_alone(unbroken, tmp_path):
    folder, _ = unbroken
    path = folder / "checkpoint" / "run_last.pth.tar"
    here = ["--save-path", "checkpoint", "--results-path", "results"]
    run(*TINY, "--finetune", "--resume", path, "--name", "alone", *here, cwd=tmp_path)
    summary = json.loads((tmp_path / "results" / "alone" / "summary.json").read_text())
    trained = json.loads((folder / "results" / "run" / "summary.json").read_text())
    assert summary["top1"] == trained["top1"] and summary["train_seconds"] is None  # what it measured
    alone = checkpoint(tmp_path, "alone_finetune_last")
    before, after = checkpoint(folder, "run_last"), alone["avg_state_dict"]
    assert alone["finetune_step"] > 0
    assert any(not torch.equal(before["avg_state_dict"][key], after[key]) for key in after)
    assert before["avg_state_dict"].keys() == after.keys()


def test_killed_and_resumed_is_bit_identical(unbroken, tmp_path):
    """SIGKILL between two checkpoints; the resumed run ends with the tensors of the unbroken one."""
    folder, _ = unbroken
    process = forked.Started(forked.script, "main", RUN, str(tmp_path))
    metrics = tmp_path / "results" / "run" / "metrics.jsonl"
    process.wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2)
    process.kill()
    process.communicate()
    step = checkpoint(tmp_path, "run_last")["step"]
    assert 0 < step < 24, "the run was not killed half-way"
    run(*RUN, "--resume", "checkpoint/run_last.pth.tar", cwd=tmp_path)
    assert_same_checkpoint(checkpoint(folder, "run_last"), checkpoint(tmp_path, "run_last"))
    assert_same_checkpoint(checkpoint(folder, "run_finetune_last"), checkpoint(tmp_path, "run_finetune_last"))
    args = json.loads((tmp_path / "results/run/args.json").read_text())
    resumed = [*RUN, "--resume", "checkpoint/run_last.pth.tar"]
    assert args["command"][1:] == RUN  # the one that began the run stays
    assert [words[1:] for words in args["continued"]] == [resumed]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    reference = (folder / "results" / "run" / "metrics.jsonl").read_text().splitlines()
    for line, other in zip(lines, map(json.loads, reference), strict=True):
        assert line | {"images_per_second": 0} == other | {"images_per_second": 0}


def test_terminated_saves_and_resumes(tmp_path):
    """SIGTERM to a script is one to the program."""
    flags = [*MOONS, "--total-steps", "300", "--eval-step", "300", "--name", "run"]
    arguments = [*recipe_words("recipes/twomoons.sh"), *flags]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    run(*arguments, cwd=whole)
    process = start("recipes/twomoons.sh", *flags, cwd=broken)
    assert any("results go to" in line for line in process.stderr)  # training begins
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    assert 0 < checkpoint(broken, "run_last")["step"] < 300
    run(*arguments, "--resume", "checkpoint/run_last.pth.tar", cwd=broken)
    a, b = tensors(checkpoint(whole, "run_last")), tensors(checkpoint(broken, "run_last"))
    assert all(torch.equal(tensor, b[path]) for path, tensor in a.items())


def test_validation_chooses_and_the_test_set_does_not(tmp_path):
    arguments = "--num-val 50 --total-steps 12 --eval-step 2 --name run --finetune-epochs 20 --seed 3".split()
    run(*TINY, *arguments, cwd=tmp_path)
    lines = (tmp_path / "results" / "run" / "metrics.jsonl").read_text().splitlines()
    *lines, finetuned = [json.loads(line) for line in lines]
    summary = json.loads((tmp_path / "results" / "run" / "summary.json").read_text())
    best = max(lines, key=lambda line: line["val_top1"])  # the first of equals
    assert best["top1"] < max(line["top1"] for line in lines)  # the test set would have chosen another
    assert summary["selection"] == "val"
    assert (summary["best_step"], summary["best_top1"]) == (best["step"], best["top1"])
    assert checkpoint(tmp_path, "run_best")["step"] == best["step"]
    counts = json.loads((tmp_path / "results" / "run" / "confusion.json").read_text())["counts"]
    right = sum(counts[i][i] for i in range(10))
    assert 100 * right / sum(map(sum, counts)) == best["top1"]  # of the network that was chosen

    # by images that are no test images
    networks, dataset, views, runtime = visualize.load(read_run(tmp_path / "results/run"), only_test=False)
    student = networks[visualize.STUDENT]
    for line, prefix in ((best, ""), (finetuned, "finetune_")):
        student.load_state_dict(checkpoint(tmp_path, f"run_{prefix}best")["avg_state_dict"])
        for image_set, name in ((dataset.val, "val_top1"), (dataset.test, "top1")):
            measured, _ = measure_accuracy(runtime, {"student": student}, image_set, views)
            assert measured["top1"] == line[prefix + name]
    held_out, test = (
        {image.numpy().tobytes() for image in part.images} for part in (dataset.val, dataset.test)
    )
    assert len(dataset.val) == 50 and not held_out & test


def test_validation_chooses_among_the_finetuned_ones(tmp_path):
    arguments = "--num-val 10 --total-steps 12 --eval-step 2 --seed 4 --name run"
    finetuning = "--finetune-epochs 300 --finetune-lr 0.02"
    run(*TINY, *arguments.split(), *finetuning.split(), cwd=tmp_path)
    lines = (tmp_path / "results/run/metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, lines) if "finetune_loss" in line]
    assert [line["step"] for line in lines] == [12 + step for step in (50, 100, 150, 200, 250, 300)]
    best = max(lines, key=lambda line: line["finetune_val_top1"])  # the first of equals
    assert best["finetune_top1"] < max(line["finetune_top1"] for line in lines)  # the test set's choice
    summary = json.loads((tmp_path / "results/run/summary.json").read_text())
    chosen = checkpoint(tmp_path, "run_finetune_best")
    assert summary["finetune_top1"] == best["finetune_top1"] == chosen["finetune_top1"]
    assert 12 + chosen["finetune_step"] == best["step"]
    run("--evaluate", "--resume", "checkpoint/run_finetune_best.pth.tar", cwd=tmp_path)
    evaluated = json.loads((tmp_path / "results/run_finetune_best/summary.json").read_text())
    assert evaluated["top1"] == best["finetune_top1"]


# ---------------------------------------------------------------- the command line


PUBLISHED = """
    --seed 5 --name cifar10-4K.5 --expand-labels --dataset cifar10 --num-classes 10 --num-labeled 4000
    --total-steps 300000 --eval-step 1000 --randaug 2 16 --batch-size 128 --teacher_lr 0.05 --student_lr 0.05
    --weight-decay 5e-4 --ema 0.995 --nesterov --mu 7 --label-smoothing 0.15 --temperature 0.7
    --threshold 0.6 --lambda-u 8 --warmup-steps 5000 --uda-steps 5000 --student-wait-steps 3000
    --teacher-dropout 0.2 --student-dropout 0.2 --amp
"""
PUBLISHED_FINETUNE = """
    --seed 5 --name cifar10-4K.5 --dataset cifar10 --num-classes 10 --num-labeled 4000 --finetune
    --finetune-epochs 625 --finetune-batch-size 512 --finetune-lr 3e-5 --finetune-weight-decay 0
    --finetune-momentum 0.9 --resume checkpoint/cifar10-4K.5_best.pth.tar --amp
"""
PUBLISHED_EVALUATE = """
    --seed 5 --name cifar10-4K.5 --dataset cifar10 --num-classes 10 --evaluate --workers 4 --data-path ./data
    --save-path ./checkpoint --resume checkpoint/cifar10-4K.5_best.pth.tar --resize 32 --start-step 0
"""


@pytest.mark.parametrize("command", [PUBLISHED, PUBLISHED_FINETUNE, PUBLISHED_EVALUATE])
def test_published_commands_are_accepted(command):
    args = main.parse_arguments(command.split())
    assert (args.seed, args.num_classes) == (5, 10)
    assert args.name == "cifar10-4K.5"
    if command is PUBLISHED:
        assert (args.teacher_lr, args.student_lr, args.randaug) == (0.05, 0.05, [2, 16])
        assert (args.num_labeled, args.batch_size, args.lambda_u) == (4000, 128, 8)


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("--method uda", {"randaug": (2, 16)}),
        ("--method uda --randaug 1 9 --labeled-view strong", {"randaug": (1, 9), "labeled_view": "strong"}),
        ("--method semimeta", {"strong_view": False}),
    ],
)
def test_views_are_those_of_the_flags_and_of_the_data_set(flags, options):
    dataset, generator = load_dataset("digits", num_labeled=10, resize=8), torch.Generator()
    batch = dataset.labeled.images, dataset.labeled.targets, dataset.test.images[:20]
    for flip, crop in ((False, "pad"), (True, "none")):
        dataset.flip, dataset.crop = flip, crop
        args = main.parse_arguments(["--dataset", "digits", *flags.split()])
        made = main.build_views(args, dataset, main.Runtime("cpu"))(*batch, generator.manual_seed(1))
        views = ImageViews(8, dataset.mean, dataset.std, flip=flip, crop=crop, **options)
        for view, expected in zip(made, views(*batch, generator.manual_seed(1)), strict=True):
            assert view is expected is None or torch.equal(view, expected)


def test_the_jitter_of_points_is_that_of_the_flags():
    dataset = load_dataset("twomoons", num_labeled=6)
    args = main.parse_arguments(["--dataset", "twomoons", "--jitter", "0.1", "0.5"])
    points = dataset.unlabeled.images
    made = main.build_views(args, dataset, main.Runtime("cpu"))(points[:2], None, points)
    for view, expected in ((made.weak, 0.1), (made.strong, 0.5)):
        assert (view - points).std().item() == pytest.approx(expected, rel=0.05)
    assert torch.equal(made.labeled, points[:2])


def test_training_starts_without_what_draws():
    names = ("visualize", "pictures", "matplotlib", "jinja2", "sklearn")
    code = f"import sys, main; print([name for name in {names} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


def test_every_flag_is_explained():
    parser = main.build_parser()
    assert [action.dest for action in parser._actions if not action.help] == []
    assert len(parser._action_groups) > 6
    assert "utils." not in parser.format_help()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--evaluate", "--resume"),
        ("--finetune --resume x --finetune-epochs 0", "nothing to do"),
        ("--method pseudo-label", "--teacher-checkpoint"),
        ("--method reduced-mpl", "--teacher-checkpoint"),
        ("--method reduced-mpl --teacher-checkpoint x --feedback none", "nothing trains the perceptron"),
        ("--mu 0", "--mu"),
        ("--no-such-flag", "--no-such-flag"),
        ("--num-labeled 40.5", "40.5"),
        ("--start-step 7 --total-steps 7", "--start-step"),
        ("--align-to labeled", "--align-to labeled needs --align RATE"),
        ("--weak-pass apart", "--weak-pass apart has no gradient on the weak view"),
        ("--weak-pass ema", "--weak-pass ema has no gradient on the weak view"),
        ("--weak-pass apart --feedback exact", "--pseudo-label-view strong, --feedback none"),
        ("--mixup-alpha 0.5 --batch-size 6 --accumulate 2", "a multiple of 4"),
        ("--teacher-warmup-steps 300000", "--teacher-warmup-steps 300000 must be below"),
        ("--student-wait-steps 300000", "--student-wait-steps 300000 must be below --total-steps"),
    ],
)
def test_refused(arguments, words):
    with pytest.raises(UserError, match=re.escape(words)):
        main.parse_arguments(arguments.split())


def test_schedules_that_never_come_are_spoken_of(capsys):
    for flags, outcome in (
        ("--warmup-steps 9", "the learning rate does not reach its peak"),
        ("--switch-every 9", "teacher and student never change places"),
    ):
        main.parse_arguments([*flags.split(), "--total-steps", "9"])
        assert capsys.readouterr().err == f"{flags} is not below --total-steps 9: {outcome}\n"
        main.parse_arguments([*flags.split(), "--total-steps", "10"])
        assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "flags"),
    [
        (
            "--method supervised --feedback taylor --mu 3 --student-model mlp-2-8-8-2",
            "feedback, mu, student_model",
        ),
        ("--method uda --teacher-lr 0.1", "teacher_lr"),
        ("--method uda --confidence soft --threshold 0.5", "threshold"),
        ("--method fixmatch --temperature 0.5 --uda-loss cos --threshold 0.9", "temperature, uda_loss"),
        (
            "--method supervised --confidence soft --align 0.2 --align-to labeled",
            "align, align_to, confidence",
        ),
        ("--method mpl --feedback exact --feedback-view strong --pseudo-label soft", "feedback_view"),
        (
            "--method reduced-mpl --teacher-checkpoint x --feedback dot --feedback-view strong --align 0.1",
            "align, feedback_view",
        ),
        ("--method mpl --feedback none --weak-pass ema --flip-feedback", "flip_feedback"),
        ("--dataset twomoons --randaug 1 9", "randaug"),
        ("--dataset digits --jitter 0 1", "jitter"),
        ("--method supervised --randaug 1 9", "randaug"),
        ("--method semimeta --threshold 0.5 --randaug 1 9 --feedback exact", "feedback, randaug, threshold"),
        ("--method semimeta --mixup-alpha 1 --feedback-jvp difference --lambda-u 1 --uda-steps 5", ""),
        ("--method uda --teacher-warmup-steps 5 --milestones 3", "milestones, teacher_warmup_steps"),
        ("--method pseudo-label --teacher-checkpoint x --mixup-alpha 1", "mixup_alpha"),
        ("--method uda --student-labeled-weight 1 --mixup-alpha 1", "student_labeled_weight"),
        ("--method supervised --randaug 1 9 --labeled-view strong", ""),
        ("--dataset digits --svhn-extra --test-fraction 0.5", "svhn_extra, test_fraction"),
        ("--optimizer rmsprop --nesterov --momentum 0.8", "nesterov"),
        ("--optimizer adamw --nesterov --momentum 0.8", "momentum, nesterov"),
        ("--pretrained --freeze-body --body-lr-scale 0.1", "body_lr_scale"),
    ],
)
def test_flags_without_effect_are_named(arguments, flags, capsys):
    main.parse_arguments(arguments.split())
    said = capsys.readouterr().err
    names = flags.split(", ") if flags else []
    shown = ", ".join("--" + name.replace("_", "-") for name in names)
    assert said.endswith(f", main.py ignores {shown}\n") if flags else not said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--dataset cifar10 --data-path nowhere", ("digits", "folder")),
        ("--dataset folder --data-path nowhere", ("nowhere",)),
        ("--dataset folder --data-path empty", ("empty",)),
        ("--dataset digits --num-labeled 45", ("45", "10 classes")),
        ("--dataset digits --num-labeled 4000", ("class", "images")),
        ("--dataset digits --num-labeled 40 --num-classes 7", ("7", "10")),
        ("--dataset digits --num-labeled 40 --model wrn-11-1", ("depth 11",)),
        ("--dataset digits --num-labeled 40 --resume nothing.pth.tar", ("nothing.pth.tar",)),
        ("--dataset digits --num-labeled 40 --resume text.pth.tar", ("text.pth.tar",)),
        ("--dataset digits --num-labeled 40 --total-step 9", ("--total-step",)),
    ],
)
def test_a_sentence_and_status_2(arguments, words, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth.tar").write_text("not a checkpoint")
    done = run(*arguments.split(), "--device", "cpu", cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    """Status 3, the step and the term named; the checkpoint of before or the run to be replaced stays."""
    arguments = [*TINY, "--total-steps", "8", "--eval-step", "4", "--name", "run"]
    run(*arguments[:-6], "--total-steps", 4, "--eval-step", 4, "--name", "run", cwd=tmp_path)
    good = checkpoint(tmp_path, "run_last")
    bad = good | {"teacher_state_dict": {key: t.clone() for key, t in good["teacher_state_dict"].items()}}
    next(iter(bad["teacher_state_dict"].values())).fill_(float("nan"))
    torch.save(bad, tmp_path / "bad.pth.tar")
    done = run(*arguments, "--resume", "bad.pth.tar", "--overwrite", cwd=tmp_path, check=False)
    assert done.returncode == 3
    assert "step 4" in done.stderr and "labeled_loss" in done.stderr and "Traceback" not in done.stderr
    assert (
        "no checkpoint was written" in done.stderr and "the earlier run is back in its place" in done.stderr
    )
    assert_same_checkpoint(good, checkpoint(tmp_path, "run_last"))
    last = tmp_path / "checkpoint/run_last.pth.tar"
    torch.save(bad, last)
    content = last.read_bytes()
    done = run(*arguments, "--resume", "auto", cwd=tmp_path, check=False)
    assert done.returncode == 3 and f"the checkpoint {last} predates it" in done.stderr
    assert last.read_bytes() == content


@pytest.mark.parametrize("method", ["supervised", "fixmatch", "semimeta"])
def test_other_methods_train(method, tmp_path):
    override = ["--method", "mpl", *TINY, "--method", method, "--total-steps", 4, "--eval-step", 2]
    done = run(*override, cwd=tmp_path)
    assert f"10 labels, {method}" in done.stdout


def test_pseudo_label_from_a_checkpoint(unbroken, tmp_path):
    folder, _ = unbroken
    teacher = folder / "checkpoint" / "run_best.pth.tar"
    arguments = "--method pseudo-label --total-steps 4 --eval-step 2".split()
    run("--method", "mpl", *TINY, *arguments, "--teacher-checkpoint", teacher, cwd=tmp_path)
    summary = json.loads((tmp_path / "results" / "digits" / "summary.json").read_text())
    reference = json.loads((folder / "results" / "run" / "summary.json").read_text())
    assert summary["teacher_top1"] == reference["best_top1"]


# ---------------------------------------------------------------- recipes for large images


def photographs(root, parts, sizes, classes=2):
    """JPEGs of these sizes in every class folder of every part."""
    random = np.random.RandomState(0)
    for part in parts:
        for name in range(classes):
            folder = root / part / f"class{name}"
            folder.mkdir(parents=True)
            for number, size in enumerate(sizes):
                pixels = random.randint(256, size=(*size, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.jpg", quality=90)


def start(name, *flags, cwd, **environment):
    """``bash NAME FLAGS`` in ``cwd``, with this Python, in a process group of its own."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    shell = os.environ | {"PATH": path} | environment
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        ["bash", ROOT / name, *map(str, flags)], cwd=cwd, env=shell, start_new_session=True, **streams
    )


def script(name, *flags, cwd, **environment):
    """The standard output and error of ``start``, which ends well."""
    process = start(name, *flags, cwd=cwd, **environment)
    said = process.communicate(timeout=500)
    assert process.returncode == 0, said[1]
    return subprocess.CompletedProcess(name, 0, *said)


def test_imagenet_recipe_in_two_processes(tmp_path):
    """Twenty images of odd sizes, two processes, batches in two parts, batch norm over both processes."""
    sizes = [(90, 120), (70, 65), (200, 100), (64, 64), (301, 75)]
    photographs(tmp_path / "imagenet", ("train", "val"), sizes)
    tiny = "--resize 64 --model wrn-10-1 --workers 1 --batch-size 2 --accumulate 2 --mu 2 --total-steps 2"
    rest = (
        "--eval-step 2 --warmup-steps 1 --student-wait-steps 0 --uda-steps 1 --finetune-epochs 1 "
        "--no-pictures --device cpu"
    )
    flags = [*tiny.split(), *rest.split(), "--data-path", tmp_path / "imagenet"]
    done = script("run_imagenet.sh", *flags, cwd=tmp_path, GPUS="2")
    assert "(imagenet, 2 labels, mpl, seed 0)" in done.stdout
    summary = json.loads((tmp_path / "results/imagenet-10/summary.json").read_text())
    assert summary["device"].startswith("2 × cpu")
    run("--evaluate", "--resume", "checkpoint/imagenet-10_finetune_best.pth.tar", cwd=tmp_path)
    alone = json.loads((tmp_path / "results/imagenet-10_finetune_best/summary.json").read_text())
    assert summary["finetune_top1"] == alone["top1"] and alone["device"].startswith("cpu")


def test_folder_recipe_on_large_photographs(tmp_path):
    photographs(tmp_path / "mine", ("train", "test"), [(300, 400)] * 4 + [(150, 97)])
    flags = "--no-pretrained --no-freeze-body --resize 32 --num-labeled 0.4 --batch-size 4 --mu 1"
    flags = [
        *flags.split(),
        "--total-steps",
        2,
        "--eval-step",
        2,
        "--switch-every",
        1,
        "--device",
        "cpu",
        "--finetune-epochs",
        1,
        "--no-pictures",
        "--data-path",
        tmp_path / "mine",
    ]
    done = script("recipes/folder.sh", *flags, cwd=tmp_path)
    assert "% (ensemble)" in done.stdout.splitlines()[-1]
    assert checkpoint(tmp_path, "mine_last")["switched"]
    assert "(folder, 4 labels, mpl, seed 0)" in done.stdout
    assert "11,169,858 parameters, " in done.stderr  # with the small stem; a head of 512 · 2 + 2
    refused = [
        "--dataset",
        "folder",
        "--data-path",
        tmp_path / "mine",
        "--freeze-body",
        "--model",
        "resnet18",
    ]
    assert "--no-freeze-body" in run(*refused, cwd=tmp_path, check=False).stderr


def test_the_benchmark_of_methods_goes_on(tmp_path):
    """Killed after its first run and called again: past a run that is busy elsewhere and one that fails."""
    names = [f"{method}-twomoons-6-3" for method in ("supervised", "uda", "pseudo-label", "mpl-none")]
    environment = {"METHODS": "mpl-none pseudo-label uda supervised", "TASKS": "twomoons-6"}
    results = tmp_path / "results/methods"

    def call():
        flags = {"cwd": tmp_path, "SEEDS": "3", "STEPS": "9"} | environment
        return start("benchmarks/methods.sh", "--device", "cpu", "--no-pictures", **flags)

    def finished():
        return [name for name in names if (results / name / "finished").exists()]

    first, deadline = call(), time.monotonic() + 200
    while not finished():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert finished() == names[:1]

    (results / "checkpoint" / f"{names[3]}_last.pth.tar").write_text("damaged")
    with open(results / "checkpoint" / f".{names[1]}.lock", "a") as busy:
        fcntl.lockf(busy, fcntl.LOCK_EX)
        again = call()
        out, err = again.communicate(timeout=400)
    assert again.returncode == 1 and err.splitlines()[-1] == f"benchmarks/methods.sh: {names[3]} has failed"
    assert f"another process is training {names[1]}" in out and err.count("has failed") == 1
    assert finished() == [names[0], names[2]] and "6 labels, supervised" not in out
    teacher = json.loads((results / names[2] / "args.json").read_text())["teacher_checkpoint"]
    assert teacher == str(results / "checkpoint" / f"{names[0]}_best.pth.tar")

    summaries = [json.loads((results / name / "summary.json").read_text()) for name in finished()]
    assert [each["steps"] for each in summaries] == [9, 9]
    old, new = (each["top1"] for each in summaries)
    assert out.endswith(
        f"| {names[0][:-2]} | 1 | {old:.2f} | – |\n| {names[2][:-2]} | 1 | {new:.2f} | {new - old:+.2f} |\n"
    )


def test_the_gpu_script_finds_a_form_that_works(tmp_path):
    """Where the tests fail, as here where there are none, and ``--compile`` does: steps as they are."""
    photographs(tmp_path / "images", ("train", "test"), [(8, 8)] * 10)
    (tmp_path / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *--compile*) exit 1 ;; esac\nexec {sys.executable} "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)
    tiny = "--num-labeled 8 --model wrn-10-1 --batch-size 2 --mu 1 --resize 8 --finetune-epochs 0".split()
    room = {"DEVICE": "cpu", "DATA": "images", "TRAIN": "1", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = script("benchmarks/gpu.sh", "start", *tiny, cwd=tmp_path, **room)
    found = (tmp_path / "gpu/form.txt").read_text()
    form, steps = re.fullmatch(r': "\$\{FORM=(.*)\}" "\$\{STEPS:=(\d+)\}"\n', found).groups()
    assert form == ""
    probe = (tmp_path / "results/gpu-form/metrics.jsonl").read_text().splitlines()[1:]
    speeds = [json.loads(line)["images_per_second"] / 4 for line in probe]
    assert min(speeds) * 14 / 15 - 1 < int(steps) < max(speeds) * 14 / 15 + 1
    last = json.loads((tmp_path / "gpu/metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == int(steps)
    assert done.stdout.splitlines()[-1].split()[:2] == [steps, f"{last['top1']:.2f}"]
    again = script("benchmarks/gpu.sh", "train", *tiny, cwd=tmp_path, **room)
    assert f"--total-steps {steps} is reached: nothing is left to train" in again.stdout


ROUNDS = (
    "--rounds 1 --name ns --dataset twomoons --num-labeled 6 --model mlp-2-8-8-2 --batch-size 6 --mu 4 "
    "--total-steps 300 --eval-step 100 --warmup-steps 10 --finetune-epochs 100 --no-pictures "
    "--device cpu"
).split()


def noisy_student_rounds(flags, cwd, then=":"):
    """The words behind main.py in every round, as the shell hands them to it; ``then``: what it would do."""
    stand_in = f'python() {{ printf "%s " "${{@:2}}"; echo; {then}; }}; . "$0"'
    command = ["bash", "-c", stand_in, ROOT / "recipes/noisy_student.sh", *flags]
    told = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=True).stdout
    return [line.split() for line in told.splitlines()]


def test_noisy_student_goes_on_wherever_it_was_killed(tmp_path):
    """In a round's finetuning, and by SIGTERM in the next round: it ends as if nothing had happened."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    (tmp_path / "checkpoint").mkdir()
    leave = 'touch "$folder/$name-${round}_finetune_best.pth.tar"'
    for words in noisy_student_rounds(ROUNDS, tmp_path, then=leave):
        assert forked.run_main(words, whole).returncode == 0
    for killed_at, number in (("ns-0_finetune_last", signal.SIGKILL), ("ns-1_last", signal.SIGTERM)):
        process = start("recipes/noisy_student.sh", *ROUNDS, cwd=broken)
        deadline = time.monotonic() + 200
        while not (broken / f"checkpoint/{killed_at}.pth.tar").exists():
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        if number == signal.SIGKILL:
            os.killpg(process.pid, number)
        else:  # to the script alone, which hands it on
            process.send_signal(number)
        _, said = process.communicate()
        assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
        assert ("stopped after step" in said) == (number == signal.SIGTERM)
        assert not (broken / "results/ns-1/summary.json").exists(), "killed too late"
    done = script("recipes/noisy_student.sh", *ROUNDS, cwd=broken)
    assert "ns-0" not in done.stderr and "ns-1" in done.stderr  # a finished round is skipped
    for number in (0, 1):
        one, other = (tensors(checkpoint(folder, f"ns-{number}_finetune_last")) for folder in (whole, broken))
        assert one.keys() == other.keys()
        assert all(torch.equal(tensor, other[path]) for path, tensor in one.items())
    teacher, student = (json.loads((broken / f"results/ns-{k}/summary.json").read_text()) for k in (0, 1))
    assert student["teacher_top1"] == teacher["finetune_top1"]


def test_the_rounds_of_noisy_student(tmp_path):
    """The student of a round is the teacher of the next; flags, a folder among them, reach every round."""
    flags = "--rounds 2 --student-model wrn-28-4 --save-path there --seed 7 --mu 2".split()
    told = noisy_student_rounds(flags, tmp_path)
    for words in told:
        place = words.index("--resume")
        assert words[place + 1] == "auto"
        del words[place : place + 2]
    rounds = [main.parse_arguments(words) for words in told]
    there = os.path.abspath("there")
    assert [args.name for args in rounds] == [f"noisy-student-{number}" for number in range(3)]
    assert [args.method for args in rounds] == ["supervised", "pseudo-label", "pseudo-label"]
    teachers = [None, *(f"{there}/noisy-student-{number}_best.pth.tar" for number in (0, 1))]
    assert [args.teacher_checkpoint for args in rounds] == teachers
    assert {(args.seed, args.save_path) for args in rounds} == {(7, there)}
    assert rounds[2].student_model == "wrn-28-4"


@pytest.mark.parametrize("flags", (["--rounds", "two"], ["--rounds"]))
def test_noisy_student_counts_its_rounds(flags, tmp_path):
    process = start("recipes/noisy_student.sh", *flags, cwd=tmp_path)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "--rounds" in said and not (tmp_path / "checkpoint").exists()


# several commands: it has a test of its own
@pytest.mark.parametrize(
    "name",
    sorted(
        str(path.relative_to(ROOT))
        for path in (*ROOT.glob("run_*.sh"), *ROOT.glob("recipes/*.sh"))
        if path.name != "noisy_student.sh"
    ),
)
def test_every_recipe_is_one_command_that_takes_flags(name):
    """Every flag of a recipe is known, and what is given behind it overrides it."""
    text = (ROOT / name).read_text()
    assert text.count("exec ") == 1 and text.rstrip().endswith('"$@"')
    args = main.parse_arguments([*recipe_words(name), "--seed", "7", "--total-steps", "123456"])
    assert args.seed == 7 and args.total_steps == 123_456


def recipe_words(name, **environment):
    """The flags of a recipe script, as the shell hands them to ``main.py``."""
    stand_in = (
        'exec() { "$@"; }; bash() { . "$@"; }; python() { printf "%s\\n" "$@"; }; '
        'torchrun() { python "$@"; }; . "$0"'
    )
    shell = os.environ | {"GPUS": "8"} | environment
    told = subprocess.run(["bash", "-c", stand_in, ROOT / name], capture_output=True, text=True, env=shell)
    words = told.stdout.splitlines()
    return words[1 + next(number for number, word in enumerate(words) if word.endswith("main.py")) :]


def test_imagenet_finetunes_with_the_published_batch():
    for gpus in (1, 4, 8):
        args = main.parse_arguments(recipe_words("run_imagenet.sh", GPUS=str(gpus)))
        assert args.finetune_batch_size * gpus == 512


TINY_RECIPE = (
    "--total-steps 2 --eval-step 2 --batch-size 2 --mu 2 --warmup-steps 1 --student-wait-steps 0 "
    "--finetune-epochs 1 --uda-steps 1 --num-labeled 10 --no-pictures --device cpu"
).split()


@pytest.mark.parametrize(
    ("name", "write", "counts", "unlabelled"),
    [
        ("recipes/stl10.sh", write_stl10, {"train": 20, "test": 5, "unlabeled": 6}, 26),
        ("recipes/svhn.sh", write_svhn, {"train": 20, "test": 5, "extra": 6}, 26),
    ],
)
def test_recipes_with_unlabelled_images_of_their_own(
    name, write, counts, unlabelled, tmp_path, monkeypatch, capsys
):
    """From start to end on tiny files of the true format."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, monkeypatch, counts)
    small = [*TINY_RECIPE, "--resize", "32", "--data-path", str(tmp_path)]
    assert main.run([*recipe_words(name), *small]) == 0
    said = capsys.readouterr()
    assert f"10 labelled, {unlabelled} unlabelled, 5 test images" in said.err
    assert said.out.splitlines()[-1].startswith("top-1 ")
    run_name = main.parse_arguments(recipe_words(name)).name
    assert main.run(["--evaluate", "--resume", f"checkpoint/{run_name}_last.pth.tar"]) == 0


def test_the_semimeta_recipe(tmp_path, monkeypatch, capsys):
    """From start to end on a tiny CIFAR-100; the first step is at a tenth of the rate, the second at less."""
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path, monkeypatch, classes=100, packed=False)
    words = [*recipe_words("recipes/semimeta.sh"), "--resize", "16", "--data-path", str(tmp_path)]
    words += (
        "--total-steps 2 --eval-step 2 --batch-size 4 --num-labeled 100 --device cpu --log-step 1".split()
    )
    assert main.run([*words, "--warmup-steps", "0", "--milestones", "0", "1"]) == 0
    said = capsys.readouterr()
    assert "ignores" not in said.err
    assert "student: convlarge, " in said.err and "(cifar100, 100 labels, semimeta, seed 0)" in said.out
    lines = (tmp_path / "results/semimeta-cifar100-10k/metrics.jsonl").read_text().splitlines()
    rates = [json.loads(line)["student_rate"] for line in lines]
    assert rates == pytest.approx([0.01, 0.001])


def test_finetuning_is_without_dropout(unbroken, tmp_path):
    """A dropout that would drop almost all changes nothing."""
    folder, _ = unbroken
    path = folder / "checkpoint" / "run_last.pth.tar"
    here = ["--finetune", "--resume", path, "--save-path", "checkpoint", "--results-path", "results"]
    run(*here, "--name", "with", "--student-dropout", "0.99", cwd=tmp_path)
    run(*here, "--name", "without", "--student-dropout", "0", cwd=tmp_path)
    a, b = (checkpoint(tmp_path, f"{name}_finetune_last")["avg_state_dict"] for name in ("with", "without"))
    assert all(torch.equal(tensor, b[key]) for key, tensor in a.items())


@pytest.mark.parametrize(
    ("dataset", "model"),
    [
        ("cifar10", "wrn-28-2"),
        ("cifar100", "wrn-28-8"),
        ("stl10", "wrn-37-2"),
        ("imagenet", "resnet50"),
        ("twomoons", "mlp-2-8-8-2"),
        ("folder", "wrn-28-2"),
    ],
)
def test_the_default_network_follows_the_data_set(dataset, model):
    assert main.parse_arguments(["--dataset", dataset]).model == model
