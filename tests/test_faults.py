"""What goes wrong around a run: hostile files and flags, a full disk, killed processes.

Every hostile input gets one sentence on standard error and exit status 2, and nothing that was there before
is changed.
"""

import json
import multiprocessing
import os
import pickle
import re
import runpy
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import forked
import kill_worker
import numpy as np
import optuna
import pytest
import torch
from conftest import teacher_file
from PIL import Image
from test_cli import assert_same_checkpoint

import main
import methods
from engine import evaluation, loader
from engine.loader import TrainLoader
from engine.runtime import Runtime
from run.script import execute, run
from utils import UserError

ROOT = Path(main.__file__).parent
TINY = (
    "--dataset digits --resize 8 --num-labeled 10 --model wrn-10-1 --batch-size 4 --mu 2 --device cpu "
    "--total-steps 4 --eval-step 2 --finetune-epochs 0 --workers 0 --no-pictures --name run"
).split()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run, to be damaged."""
    folder = tmp_path_factory.mktemp("trained")
    assert main.run([*TINY, "--save-path", str(folder), "--results-path", str(folder / "results")]) == 0
    return folder / "run_last.pth.tar"


@pytest.fixture
def here(tmp_path, monkeypatch, trained):
    """An empty folder to run in, with a good checkpoint in the place where the run saves."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/run_last.pth.tar").write_bytes(trained.read_bytes())
    return tmp_path


def refused(capsys, *arguments):
    """The sentence that the command ends with."""
    capsys.readouterr()
    assert main.run([*TINY, "--overwrite", *map(str, arguments)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("main.py: ")]
    assert len(lines) == 1
    return lines[0]


class Payload:
    def __reduce__(self):
        return os.system, ("touch ran",)


def flipped(content):
    """Some bits of the tensors' bytes turned over."""
    content = bytearray(content)
    for position in range(len(content) // 3, len(content), len(content) // 7):
        content[position] ^= 0xFF
    return bytes(content)


def foreign_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "no tensors")


CHECKPOINTS = {
    "empty": lambda path, good: path.write_bytes(b""),
    "ten bytes": lambda path, good: path.write_bytes(good[:10]),
    "half": lambda path, good: path.write_bytes(good[: len(good) // 2]),
    "all but the last byte": lambda path, good: path.write_bytes(good[:-1]),
    "flipped bits": lambda path, good: path.write_bytes(flipped(good)),
    "text": lambda path, good: path.write_text("step: 4\n"),
    "a pickle that runs code": lambda path, good: path.write_bytes(pickle.dumps(Payload())),
    "a checkpoint that runs code": lambda path, good: torch.save({"step": Payload()}, path),
    "another zip": lambda path, good: foreign_zip(path),
    "a list": lambda path, good: torch.save([1, 2, 3], path),
    "a tensor": lambda path, good: torch.save(torch.zeros(3), path),
    "bare weights": lambda path, good: torch.save({"fc.weight": torch.zeros(3)}, path),
    "a step and nothing else": lambda path, good: torch.save({"step": 2}, path),
    "a list of data": lambda path, good: torch.save({"data": [1]}, path),
    "a number of networks": lambda path, good: torch.save({"networks": 3, "step": 1}, path),
    "a folder": lambda path, good: path.mkdir(),
    "nothing": lambda path, good: None,
}


@pytest.mark.parametrize("damage", CHECKPOINTS)
@pytest.mark.parametrize(
    "flags",
    ("--resume", "--evaluate --resume", "--weights", "--method pseudo-label --teacher-checkpoint"),
)
def test_hostile_checkpoints(damage, flags, here, trained, capsys):
    CHECKPOINTS[damage](here / "hostile.pth.tar", trained.read_bytes())
    sentence = refused(capsys, *flags.split(), "hostile.pth.tar")
    assert "hostile.pth.tar" in sentence
    assert not (here / "ran").exists()
    assert (here / "checkpoint/run_last.pth.tar").read_bytes() == trained.read_bytes()


def test_weights_that_are_not_finite(here, trained, capsys):
    state = torch.load(trained, weights_only=True)["avg_state_dict"]
    state["conv1.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, here / "nan.pth")
    assert "conv1.weight" in refused(capsys, "--weights", "nan.pth")


@pytest.mark.parametrize(
    "flags",
    (
        ["--model", "wrn-16-1"],
        ["--model", "wrn-10-2"],
        ["--method", "uda"],
        ["--feedback", "none", "--weak-pass", "ema"],
    ),
)
def test_a_checkpoint_of_another_run(flags, here, trained, capsys):
    assert "run_last" in refused(capsys, *flags, "--resume", trained, "--total-steps", 8)


FLAGS = (
    *(
        "--teacher-lr -0.1",
        "--student-lr nan",
        "--student-lr inf",
        "--weight-decay -1",
        "--ema 1.5",
        "--mu -3",
    ),
    *(
        "--temperature 0",
        "--threshold 2",
        "--label-smoothing 1",
        "--teacher-dropout 1",
        "--lambda-u -1",
        "--align 2",
    ),
    *("--batch-size 0", "--batch-size 99999999999", "--num-labeled -40", "--num-labeled nan", "--num-val -1"),
    *("--workers -1", "--seed -1", "--resize 1000000", "--model wrn-10-99999999", "--model wrn-99999999-1"),
    *(
        "--model mlp-2-99999999-10",
        "--grad-clip -1",
        "--total-steps 0",
        "--eval-step -5",
        "--warmup-steps -1",
    ),
    *("--accumulate 3", "--keep -1", "--momentum 1.0", "--randaug -1 5", "--finetune-lr -1", "--mu 1.5"),
    *("--student-wait-steps 4", "--num-val 13"),
    *("--total-steps 1e3", "--device tpu", "--amp-dtype fp8", "--num-labeled 1e12", "--feedback-momentum 1"),
)


@pytest.mark.parametrize(
    ("flags", "obstacle"),
    [
        ("--mixup-alpha 1", "--mixup-alpha"),
        ("--switch-every 2", "--switch-every"),
        ("--optimizer adamw", "--optimizer adamw"),
        ("--amp --amp-dtype fp16", "--amp-dtype fp16"),
        ("--feedback exact --student-dropout 0.2", "--feedback exact and --student-dropout"),
        ("--accumulate 2 --teacher-dropout 0.2", "--accumulate and dropout"),
        ("--accumulate 2 --pseudo-label sample", "--accumulate and --pseudo-label sample"),
        ("--method reduced-mpl", "--method reduced-mpl"),
    ],
)
def test_what_a_cuda_graph_does_not_go_with(flags, obstacle, here, capsys):
    sentence = refused(capsys, "--cuda-graph", *flags.split())
    assert f"--cuda-graph does not work with {obstacle}:" in sentence


@pytest.mark.parametrize("flags", FLAGS)
def test_absurd_flags(flags, here, trained, capsys):
    name, value, *_ = flags.split()
    sentence = refused(capsys, *flags.split())
    words = {"--model": (value,), "--num-labeled 1e12": (name, "100000000000")}  # of each of ten classes
    for word in words.get(name) or words.get(flags) or (name, value):
        assert re.search(rf"(?<![\w.]){re.escape(word)}(?![\w.])", sentence), sentence
    assert not (here / "results").exists()
    assert (here / "checkpoint/run_last.pth.tar").read_bytes() == trained.read_bytes()


def test_help_says_each_default_once():
    text = " ".join(main.build_parser().format_help().split())
    assert "initial weights, batches, augmentation (default: 0)" in text
    assert "before the teacher's classifier (default: 0.0; CIFAR-10 recipe: 0.2)" in text
    assert "(default: None)" not in text and "(default: False)" not in text


def test_help_leaves_commands_on_lines_of_their_own():
    assert "\n  python main.py --name digits --resume auto  " in main.build_parser().format_help()


def test_soft_labels_without_a_gradient_are_spoken_of(capsys):
    main.parse_arguments([*TINY, "--pseudo-label", "soft"])
    assert "--feedback taylor has no gradient" in capsys.readouterr().err
    main.parse_arguments([*TINY, "--pseudo-label", "soft", "--feedback", "exact"])
    assert not capsys.readouterr().err


def photographs(root, size=(12, 12), count=6):
    """Two classes of images, with spaces and other letters in their names."""
    random = np.random.RandomState(0)
    for part in ("train", "test"):
        for name in ("ein Löwe", "猫"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                pixels = random.randint(256, size=(*size, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"bild {number}.png")
    return root / "train" / "猫"


def folder_flags(root):
    return "--dataset", "folder", "--data-path", str(root), "--num-labeled", "4", "--name", "own images ü"


def broken_png(path):
    """A header that promises 100,000 × 100,000 pixels."""
    Image.new("L", (4, 4)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (100_000).to_bytes(4, "big") * 2
    path.write_bytes(content)


IMAGES = {
    "text": lambda path: path.write_text("not an image"),
    "zero bytes": lambda path: path.write_bytes(b""),
    "half an image": lambda path: path.write_bytes((path.parent / "bild 0.png").read_bytes()[:200]),
    "a gigantic header": broken_png,
    "a link to nothing": lambda path: path.symlink_to("gone.png"),
}


@pytest.mark.parametrize(
    ("damage", "size"), [*((damage, 12) for damage in IMAGES), ("half an image", 70), ("text", 70)]
)
def test_hostile_images(damage, size, here, capsys):
    """In memory and through the workers: named, or named and left out with --skip-unreadable."""
    folder = photographs(here / "meine Bilder", (size, size))
    IMAGES[damage](folder / "schlecht.png")
    flags = [*folder_flags(here / "meine Bilder"), "--resize", 12 if size == 12 else 70]
    assert "schlecht.png" in refused(capsys, *flags)
    assert main.run([*TINY, *map(str, flags), "--skip-unreadable"]) == 0
    assert "schlecht.png" in capsys.readouterr().err


@pytest.mark.parametrize("shape", ((1, 1), (1, 20_000), (20_000, 1)))
def test_strange_shapes_are_images(shape, here):
    folder = photographs(here / "own")
    Image.fromarray(np.zeros((*shape, 3), np.uint8)).save(folder / "strange.png")
    assert main.run([*TINY, *folder_flags(here / "own"), "--resize", "12"]) == 0
    summary = json.loads((here / "results/own images ü/summary.json").read_text())
    assert summary["steps"] == 4


@pytest.mark.parametrize("flag", ("--results-path", "--save-path"))
@pytest.mark.parametrize("place", ("/proc/nowhere", "a file"))
def test_folders_that_cannot_be_written(flag, place, here, capsys):
    """/proc refuses even the superuser, whom a read-only folder would not stop."""
    (here / "a file").write_text("mine")
    assert place in refused(capsys, flag, place)
    assert (here / "a file").read_text() == "mine"


def test_a_full_disk(here, trained, capsys):
    """The last checkpoint stays whole where the next one does not fit, or only its first file."""
    (here / "checkpoint/run_last.pth.tar.tmp").symlink_to("/dev/full")
    assert "No space left" in refused(capsys)
    assert (here / "checkpoint/run_last.pth.tar").read_bytes() == trained.read_bytes()
    assert sorted(os.listdir(here / "checkpoint")) == [".run.lock", "run_last.pth.tar"]


def children(pid):
    """Process numbers and commands of the children of a process."""
    listed = subprocess.run(["ps", "--ppid", str(pid), "-o", "pid=,args="], capture_output=True, text=True)
    return [line.split(maxsplit=1) for line in listed.stdout.splitlines()]


def test_a_killed_decoding_worker(here):
    photographs(here / "own", (70, 70))
    flags = [
        *TINY,
        *folder_flags(here / "own"),
        "--resize",
        "70",
        "--workers",
        "1",
        "--total-steps",
        "100000",
    ]
    process = subprocess.Popen(
        [sys.executable, ROOT / "main.py", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (here / "checkpoint/own images ü_last.pth.tar").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    for pid, _ in children(process.pid):
        os.kill(int(pid), signal.SIGKILL)
    assert process.wait(timeout=60) == 2
    errors = process.stderr.read()
    assert "Traceback" not in errors
    assert "process that decodes images has ended" in errors.splitlines()[-1]


def test_keep(here):
    assert main.run([*TINY, "--overwrite", "--total-steps", "10", "--keep", "2"]) == 0
    kept = sorted(path.name for path in (here / "checkpoint").glob("run_step*"))
    assert kept == ["run_step00000008.pth.tar", "run_step00000010.pth.tar"]
    assert main.run([*TINY, "--overwrite", "--total-steps", "4", "--keep", "1"]) == 0
    assert [path.name for path in (here / "checkpoint").glob("run_step*")] == ["run_step00000004.pth.tar"]
    step = load(here / "checkpoint/run_step00000004.pth.tar")["step"]
    assert step == 4


# ---------------------------------------------------------------- an error that nobody foresaw

LARGE = ("--resize", "70", "--batch-size", "2", "--mu", "1", "--name", "run")  # decoded by workers


def broken(place, name, arguments, folder):
    """``python NAME.py ARGUMENTS`` with a bug in one place; writes down which worker processes there are."""
    os.chdir(folder)
    rank, taken = os.environ.get("RANK", "0"), []

    def fails(*_, **__):
        pids = [os.getpid()] if place == "worker" else [w.pid for w in multiprocessing.active_children()]
        note = Path(f"note-{os.getpid()}")
        note.write_text(json.dumps(pids))  # another worker's error may end this process at any moment
        note.rename(f"workers-{os.getpid()}")
        raise RuntimeError("nobody foresaw this")

    def fails_later(function):
        def wrapped(*arguments, **options):
            taken.append(None)
            return fails() if len(taken) == 3 else function(*arguments, **options)

        return wrapped

    if place == "step" or (place == "step of rank 1" and rank == "1"):
        methods.mpl.MPL.step = fails_later(methods.mpl.MPL.step)
    elif place == "worker":
        loader.read_image = fails
    elif place == "prediction":
        evaluation.ranked = fails
    elif place == "search":
        optuna.Trial.report = fails
    sys.argv = [str(ROOT / f"{name}.py"), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


def alive(pid):
    """Whether a process runs, and has not merely nobody who asks for its status."""
    listed = subprocess.run(["ps", "-p", str(pid), "-o", "stat="], capture_output=True, text=True)
    return listed.stdout.strip()[:1] not in ("", "Z")


def ended_with_a_traceback(started, folder):
    """What it said; no process waits for it, and none is left."""
    errors = started.communicate(timeout=100)[1]
    assert started.returncode == 1, errors
    assert "RuntimeError: nobody foresaw this" in errors, errors
    pids = [pid for path in folder.glob("workers-*") for pid in json.loads(path.read_text())]
    assert not any(map(alive, pids))
    return errors, pids


@pytest.mark.parametrize("place", ["step", "worker"])
def test_an_error_ends_a_run_whose_workers_decode(place, tmp_path):
    photographs(tmp_path / "own", (70, 70), count=40)
    flags = [*TINY, *folder_flags(tmp_path / "own"), *LARGE, "--workers", "2", "--total-steps", "1000"]
    started = forked.Started(broken, place, "main", flags, str(tmp_path))
    errors, pids = ended_with_a_traceback(started, tmp_path)
    assert "Traceback (most recent call last)" in errors
    assert 1 <= len(pids) <= 2 if place == "worker" else len(pids) == 2


def test_an_error_ends_a_prediction_whose_workers_decode(tmp_path, trained):
    folder = photographs(tmp_path / "own", (70, 70), count=40)
    content = load(trained)
    content["data"] |= {"size": 70, "crop": "none"}  # so that workers decode
    torch.save(content, tmp_path / "large.pth.tar")
    words = ["large.pth.tar", str(folder), "--batch-size", "2", "--workers", "2", "--device", "cpu"]
    _, pids = ended_with_a_traceback(
        forked.Started(broken, "prediction", "predict", words, str(tmp_path)), tmp_path
    )
    assert len(pids) == 2


@pytest.mark.parametrize("restarts", [None, 1])
def test_an_error_in_one_rank_ends_all(restarts, tmp_path):
    """Alone and under torchrun, which starts them again as often as it may."""
    photographs(tmp_path / "own", (70, 70), count=40)
    flags = [*TINY, *folder_flags(tmp_path / "own"), *LARGE, "--workers", "1", "--total-steps", "1000"]
    how = {"processes": 2} if restarts is None else {"restarts": restarts}
    flags += ["--eval-step", "1000"]
    started = forked.Started(broken, "step of rank 1", "main", flags, str(tmp_path), **how)
    errors, _ = ended_with_a_traceback(started, tmp_path)
    assert errors.count("RuntimeError: nobody foresaw this") == 1 + (restarts or 0), errors


def test_an_error_ends_a_search_and_its_run(tmp_path):
    words = "--study study --search temperature=0.3:3 --dataset twomoons --num-labeled 6 --num-val 100"
    words += " --batch-size 6 --mu 4 --device cpu --total-steps 1000000 --eval-step 20 --no-pictures"
    started = forked.Started(broken, "search", "tune", words.split(), str(tmp_path))
    ended_with_a_traceback(started, tmp_path)
    (log,) = tmp_path.glob("results/study/*.log")
    end = time.monotonic() + 60
    while "stopped after step" not in log.read_text() and time.monotonic() < end:
        time.sleep(0.1)
    assert "stopped after step" in log.read_text()


def on_main(kind):
    """What the first of two processes finds is wrong, while the other waits for its answer."""

    def fails():
        raise kind("wrong in the first")

    execute(lambda argv: run("main.py", lambda argv: Runtime("cpu").on_main(fails), argv), [])


@pytest.mark.parametrize(("kind", "status"), [(ValueError, 1), (UserError, 2)])
def test_what_the_main_process_raises_ends_all(kind, status):
    """Each by itself: torchrun is not there to end the others. The first alone says it."""
    started = forked.Started(on_main, kind, processes=2)
    errors = started.communicate(timeout=100)[1]
    assert [process.exitcode for process in started.processes] == [status, status]
    says = "ValueError: wrong in the first" if status == 1 else "main.py: wrong in the first"
    assert errors.count(says) == 1, errors
    assert errors.count("Traceback (most recent call last)") == (status == 1)


def test_messages_of_arguments_are_printed_once(tmp_path):
    flags = [*TINY, "--warmup-steps", "9", "--jitter", "0", "1", "--total-steps", "2"]
    done = forked.run_main(flags, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("ignores --jitter") == 1
    assert done.stderr.count("the learning rate does not reach its peak") == 1
    changed = forked.run_main([*TINY, "--resume", "auto", "--mu", "1"], tmp_path, processes=2)
    assert changed.returncode == 0, changed.stderr
    assert changed.stderr.count("--mu 2 → 1") == 1
    refused = forked.run_main([*TINY, "--mu", "-3"], tmp_path, processes=2)
    assert refused.returncode == 2 and refused.stderr.count("-3 is out of range") == 1, refused.stderr


def without_tensorboard(arguments, folder):
    for name in [name for name in sys.modules if name.split(".")[0] == "tensorboard"]:
        del sys.modules[name]
    sys.modules.pop("torch.utils.tensorboard", None)
    sys.modules["tensorboard"] = None  # as Python has it for what cannot be imported
    forked.script("main", arguments, folder)


def test_without_tensorboard(tmp_path):
    """One line, also where a run replaces another one."""
    for number in (1, 2):
        done = forked.run(without_tensorboard, [*TINY, "--overwrite"], str(tmp_path))
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("no TensorBoard events are written") == 1, (number, done.stderr)
        assert not list(tmp_path.glob("results/run/events*"))
        lines = (tmp_path / "results/run/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2, 4]


# ---------------------------------------------------------------- an image that turns out to be unreadable

FILES = [*TINY, *LARGE, "--num-labeled", "4", "--dataset", "folder", "--data-path", "own", "--workers", "1"]


def draws(flags, steps, seed=0, mu=None, rank=0, world_size=1):
    """Of each step, the paths of the images that are drawn."""
    args = main.parse_arguments(flags)
    dataset = main.read_data(args, None, False)
    where = SimpleNamespace(
        rank=rank, world_size=world_size, device=torch.device("cpu"), generator=Runtime("cpu").generator
    )
    mu = args.mu if mu is None else mu
    loader = TrainLoader(dataset, args.batch_size, mu, seed, where, workers=0)
    drawn = []
    for step in range(steps):
        drawn.append([share.image_set.files[i] for share in loader.shares for i in share.take(step).tolist()])
    return drawn


def first_drawn(drawn, step, but=()):
    """An image that is drawn at this step, in none of the lists of paths before nor in ``but``."""
    earlier = {path for paths in [*drawn[:step], *but] for path in paths}
    return Path(next(path for path in drawn[step][::-1] if path not in earlier))


def goes_bad(path, patch, name="train_loop"):
    """The file becomes unreadable when ``main.NAME`` begins, which is after the set-up of a run."""
    function = getattr(main, name)

    def then(*arguments):
        path.write_text("no image")
        return function(*arguments)

    patch.setattr(main, name, then)


def assert_same_end(one, other):
    """Two checkpoints whose runs differ in what a file held, which is all that ``data`` is about."""
    assert_same_checkpoint(*({**load(path), "data": None} for path in (one, other)))


def train_while_it_goes_bad(path, arguments, folder):
    goes_bad(Path(path), pytest.MonkeyPatch())
    forked.script("main", arguments, folder)


def assert_same_lines(one, other, name="run"):
    """The same figures at the same steps, but for the speed."""
    lines = []
    for folder in (one, other):
        text = (folder / f"results/{name}/metrics.jsonl").read_text()
        lines.append([json.loads(line) | {"images_per_second": 0} for line in text.splitlines()])
    assert lines[0] == lines[1]


@pytest.fixture
def two_places(tmp_path):
    """Two folders for runs, each with the same photographs."""
    for name in ("whole", "stopped"):
        photographs(tmp_path / name / "own", (70, 70), count=12)
    return tmp_path / "whole", tmp_path / "stopped"


def test_an_unreadable_image_met_later_saves_the_run_first(two_places, monkeypatch, capsys):
    """It goes on from the step before with --skip-unreadable, or as if nothing had happened once repaired."""
    whole, stopped = two_places
    flags = [*FILES, "--total-steps", "8", "--eval-step", "5"]
    monkeypatch.chdir(whole)
    bad = first_drawn(draws(flags, 8), 3)
    assert main.run(flags) == 0
    with monkeypatch.context() as patch:
        goes_bad(bad, patch)
        assert main.run([*flags, "--skip-unreadable", "--name", "skipping"]) == 0

    monkeypatch.chdir(stopped)
    bad = stopped / bad.relative_to(whole)
    content = bad.read_bytes()
    goes_bad(bad, monkeypatch)
    capsys.readouterr()
    assert main.run(flags) == 2
    lines = capsys.readouterr().err.splitlines()
    assert "stopped after step 3; continue with --resume" in lines[-2]
    assert lines[-1].startswith(f"main.py: the image {bad} cannot be read")
    saved = load("checkpoint/run_last.pth.tar")
    assert saved["step"] == 3 and saved["loader"] == {"position": 3}

    assert main.run([*flags, "--resume", "auto"]) == 2  # again, and nothing is lost
    assert_same_checkpoint(load("checkpoint/run_last.pth.tar"), saved)
    again = ["--skip-unreadable", "--resume", "checkpoint/run_last.pth.tar", "--name", "skipping"]
    assert main.run([*flags, *again]) == 0
    monkeypatch.undo()
    monkeypatch.chdir(stopped)
    bad.write_bytes(content)
    assert main.run([*flags, "--resume", "auto"]) == 0
    for name, lines in (("run", [5, 8]), ("skipping", [5, 8])):
        path = f"checkpoint/{name}_last.pth.tar"
        assert_same_end(stopped / path, whole / path)
        metrics = Path(f"results/{name}/metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in metrics] == lines
        assert_same_lines(whole, stopped, name)


def test_an_unreadable_image_in_the_first_batch_leaves_nothing(two_places, monkeypatch):
    monkeypatch.chdir(two_places[0])
    Path(draws(FILES, 1)[0][0]).write_text("no image")
    assert main.run(FILES) == 2
    assert not list(Path("checkpoint").glob("*.tar"))
    assert main.run([*FILES, "--skip-unreadable"]) == 0


def test_an_unreadable_test_image_saves_the_run_first(two_places):
    """Found by one of two processes in the last evaluation, whose checkpoint is written: the run goes on as
    one that left the image out."""
    flags = [*FILES, "--total-steps", "2", "--eval-step", "2"]
    whole, stopped = two_places
    for place in two_places:
        next(place.glob("own/test/*/*.png")).write_text("no image")
    done = forked.run_main([*flags, "--skip-unreadable"], whole, processes=2)
    assert done.returncode == 0, done.stderr
    done = forked.run_main(flags, stopped, processes=2)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("main.py: the image") == 1 and "Traceback" not in done.stderr, done.stderr
    assert load(stopped / "checkpoint/run_last.pth.tar")["step"] == 2
    assert not (stopped / "results/run/summary.json").exists()
    done = forked.run_main([*flags, "--resume", "auto", "--skip-unreadable"], stopped, processes=2)
    assert done.returncode == 0, done.stderr
    figures = [json.loads((place / "results/run/summary.json").read_text()) for place in two_places]
    assert figures[0]["top1"] == figures[1]["top1"] and figures[1]["test_images"] == 23
    assert_same_lines(whole, stopped)


def test_an_unreadable_image_met_by_finetuning_saves_it_first(two_places, monkeypatch, capsys):
    """A labelled one: it goes on when it has been put back, as if nothing had happened."""
    whole, stopped = two_places
    flags = [*FILES, "--total-steps", "1", "--method", "supervised", "--finetune-epochs", "4"]
    flags += ["--finetune-batch-size", "2"]
    monkeypatch.chdir(whole)
    assert main.run(flags) == 0
    bad = stopped / first_drawn(draws(flags, 2, seed=1, mu=0), 1).relative_to(whole)
    content = bad.read_bytes()
    monkeypatch.chdir(stopped)
    with monkeypatch.context() as patch:
        goes_bad(bad, patch, "finetune")
        assert main.run(flags) == 2
    assert "stopped after step 1 of finetuning" in capsys.readouterr().err
    last = Path("checkpoint/run_finetune_last.pth.tar")
    assert load(last)["finetune_step"] == load(last)["loader"]["position"] == 1
    bad.write_bytes(content)
    assert main.run([*flags, "--resume", "auto"]) == 0
    assert_same_checkpoint(load(last), load(whole / last))
    assert_same_lines(whole, stopped)


def test_an_unreadable_image_met_by_one_of_two_processes(two_places, monkeypatch):
    """Both save the same step, and go on as two that left it out from the start."""
    whole, stopped = two_places
    flags = [*FILES, "--total-steps", "8", "--eval-step", "8"]
    monkeypatch.chdir(whole)
    drawn = [draws(flags, 8, rank=rank, world_size=2) for rank in (0, 1)]
    bad = first_drawn(drawn[1], 3, drawn[0][:5])
    words = train_while_it_goes_bad, str(bad), [*flags, "--skip-unreadable"], str(whole)
    done = forked.run(*words, processes=2)
    assert done.returncode == 0, done.stderr
    words = train_while_it_goes_bad, str(stopped / bad.relative_to(whole)), flags, str(stopped)
    done = forked.run(*words, processes=2)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("main.py: the image") == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("stopped after step 5;") == 1, done.stderr
    last = stopped / "checkpoint/run_last.pth.tar"
    assert load(last)["step"] == load(last)["loader"]["position"] == 5
    done = forked.run_main([*flags, "--skip-unreadable", "--resume", "auto"], stopped, processes=2)
    assert done.returncode == 0, done.stderr
    networks = [load(place / "checkpoint/run_last.pth.tar")["avg_state_dict"] for place in two_places]
    for name, tensor in networks[0].items():  # batch norm's statistics were averaged once more
        torch.testing.assert_close(networks[1][name], tensor, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- killed, and started again


def load(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize(
    ("kills", "flags"),
    [
        (4, ()),
        (3, ("--method", "semimeta", "--mixup-alpha", "0.5")),
        (3, ("--method", "reduced-mpl", "--teacher-checkpoint", teacher_file("wrn-10-1", 10, 8))),
    ],
)
def test_killed_at_random_moments(tmp_path, kills, flags):
    """Every checkpoint is readable at any moment, and the run ends as an unbroken one, bit for bit."""
    done = forked.run(kill_worker.run, str(tmp_path), kills, *flags)
    assert done.returncode == 0, done.stderr
    assert f"{kills} kills" in done.stdout
    finished = sorted(tmp_path.glob("broken-*/checkpoint/run_last.pth.tar"))
    assert finished
    for path in finished:
        assert_same_checkpoint(load(path), load(tmp_path / "unbroken/checkpoint/run_last.pth.tar"))


def test_killed_between_its_first_two_checkpoints(tmp_path, monkeypatch):
    """An evaluation writes the best, then the last: where only the best is there, a run goes on from it."""
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--keep", "2", "--resume", "auto"]
    assert main.run(flags) == 0
    last, first, best = (Path(f"checkpoint/run_{kind}.pth.tar") for kind in ("last", "step00000002", "best"))
    whole = load(last)
    first.rename(best)
    last.unlink()
    Path("checkpoint/run_step00000004.pth.tar").unlink()
    assert main.run(flags) == 0
    assert_same_checkpoint(load(last), whole)

    tune = [*TINY, "--finetune", "--finetune-epochs", "1", "--name", "tuned", "--resume"]
    assert main.run([*tune, str(last)]) == 0
    tuned = Path("checkpoint/tuned_finetune_last.pth.tar")
    whole = load(tuned)
    tuned.unlink()
    assert main.run([*tune, "auto"]) == 0
    assert load("checkpoint/tuned_finetune_best.pth.tar")["finetune_step"] == whole["finetune_step"]


def test_killed_while_it_replaces_another_run(tmp_path, monkeypatch, capsys):
    """Between its first two files, before the other run is deleted: it goes on with its own."""
    alone, here = tmp_path / "alone", tmp_path / "here"
    alone.mkdir(), here.mkdir()
    own = [*TINY, "--seed", "1"]
    assert forked.run_main(own, alone).returncode == 0
    assert forked.run_main([*TINY, "--finetune-epochs", "1"], here).returncode == 0
    killed = forked.run(kill_worker.killed_behind_its_first_file, [*own, "--overwrite"], str(here))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    monkeypatch.chdir(here)
    aside = next(Path("checkpoint").glob(".run.replaced-*"))
    first = load("checkpoint/run_best.pth.tar")["run"]
    assert (
        first != load(aside / "run_last.pth.tar")["run"] == load(aside / "run_finetune_last.pth.tar")["run"]
    )
    assert main.run(["--resume", "checkpoint/run_last.pth.tar", "--total-steps", "6"]) == 2
    assert "there is no checkpoint checkpoint/run_last.pth.tar" in capsys.readouterr().err
    assert main.run(["--name", "run", "--resume", "auto"]) == 0
    last = load("checkpoint/run_last.pth.tar")
    assert last["run"] == first
    assert_same_checkpoint(last, load(alone / "checkpoint/run_last.pth.tar"))
    lines = Path("results/run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]
    assert sorted(os.listdir("checkpoint")) == [".run.lock", "run_best.pth.tar", "run_last.pth.tar"]


def test_killed_at_any_moment_while_it_replaces_another_run(tmp_path):
    """Afterwards the old run is in its place, byte for byte, or the new one, which then has a checkpoint."""
    (tmp_path / "here").mkdir()
    commands = [*TINY, "--finetune-epochs", "1"], [*TINY, "--seed", "1", "--overwrite"]
    done = forked.run(kill_worker.killed_while_it_replaces, str(tmp_path / "here"), *commands)
    assert done.returncode == 0, done.stderr
    old, replaced, put_back = json.loads(done.stdout.splitlines()[-1])
    new = next(number for number, files in enumerate(replaced) if files != old)
    assert new > 2 + sum(path.endswith(".pth.tar") for path in old)  # each file is moved by itself
    for files in replaced[new:]:
        names = {path for path in files if path.startswith("checkpoint")}
        assert "checkpoint/run_best.pth.tar" in names
        assert names <= {"checkpoint/run_best.pth.tar", "checkpoint/run_last.pth.tar"}
        assert not any(".replaced-" in path for path in files)
        same = {path for path in files.keys() & old.keys() if files[path] == old[path]}
        assert same <= {"results/run", "results/run/labeled_indices.txt"}
    assert len(replaced) - new > 4 and len(put_back) > 4
    assert all(files == old for files in put_back)


def start_pair(arguments, folder, restarts):
    """``torchrun --nproc-per-node 2 --max-restarts RESTARTS main.py ARGUMENTS`` in a folder."""
    return forked.Started(numbered, [str(argument) for argument in arguments], str(folder), restarts=restarts)


def numbered(arguments, folder):
    """``main.py``, which leaves the number of its process in FOLDER/pid-RANK."""
    Path(folder, f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    return forked.script("main", arguments, folder)


def test_a_lost_process_is_started_again(tmp_path, monkeypatch):
    """torchrun starts both again from the last checkpoint; the run ends as one that lost none."""
    flags = [*TINY, "--eval-step", "4", "--resume", "auto"]
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    whole = forked.run_main([*flags, "--total-steps", "24"], tmp_path / "whole", processes=2)
    assert whole.returncode == 0, whole.stderr
    pair = start_pair([*flags, "--total-steps", "24"], tmp_path / "broken", restarts=2)
    checkpoint = tmp_path / "broken/checkpoint/run_last.pth.tar"
    pair.wait_for(checkpoint.exists)
    os.kill(int((tmp_path / "broken/pid-1").read_text()), signal.SIGKILL)
    errors = pair.communicate(timeout=200)[1]
    assert pair.returncode == 0 and "continuing" in errors, errors
    summaries = [
        json.loads((tmp_path / f"{kind}/results/run/summary.json").read_text())
        for kind in ("whole", "broken")
    ]
    assert summaries[0]["top1"] == summaries[1]["top1"]
    assert_same_checkpoint(load(checkpoint), load(tmp_path / "whole/checkpoint/run_last.pth.tar"))
    monkeypatch.chdir(tmp_path / "broken")  # and goes on in one process
    assert main.run([*flags, "--total-steps", "28"]) == 0
    assert load(checkpoint)["step"] == 28


def test_two_processes_stop_together(tmp_path, monkeypatch):
    """SIGTERM to one of them, twice, as launchers send it, and then to torchrun, which hands it on: they save
    one step, and go on from there when started again."""
    flags = [*TINY, *folder_flags(tmp_path / "own"), "--resize", "70", "--workers", "1", "--num-val", "2"]
    photographs(tmp_path / "own", (70, 70))
    flags += ["--name", "run", "--batch-size", "2", "--resume", "auto"]
    last, step = tmp_path / "checkpoint/run_last.pth.tar", 0
    for to_one in (True, False):
        pair = start_pair([*flags, "--total-steps", "100000"], tmp_path, restarts=0)
        pair.wait_for(lambda before=step: last.exists() and load(last)["step"] > before)
        pid = int((tmp_path / "pid-1").read_text()) if to_one else pair.pid
        for _ in range(1 + to_one):
            os.kill(pid, signal.SIGTERM)
        errors = pair.communicate(timeout=100)[1]
        assert errors.count("stopped after step") == 1, errors
        step = load(last)["step"]
        assert f"stopped after step {step};" in errors
    flags = [*flags, "--total-steps", str(step + 2), "--eval-step", "1", "--finetune-epochs", "2"]
    flags += ["--finetune-batch-size", "1"]
    done = forked.run_main(flags, tmp_path, processes=2)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "results/run/summary.json").read_text())
    assert summary["steps"] == step + 2 and summary["selection"] == "val"
    words = ["--evaluate", "--resume", tmp_path / "checkpoint/run_finetune_best.pth.tar"]
    assert forked.run_main(words, tmp_path).returncode == 0  # a process alone measures the same
    alone = json.loads((tmp_path / "results/run_finetune_best/summary.json").read_text())
    assert summary["finetune_top1"] == alone["top1"]


@pytest.mark.parametrize("flags", (["--optimizer", "adamw"], ["--freeze-body"]))
def test_a_checkpoint_of_another_optimiser(flags, here, trained, capsys):
    assert "run_last" in refused(capsys, *flags, "--resume", trained, "--total-steps", 8)


def test_a_teacher_of_other_classes(here, trained, capsys):
    flags = ["--dataset", "twomoons", "--model", "mlp-2-8-2", "--method", "pseudo-label"]
    sentence = refused(capsys, *flags, "--teacher-checkpoint", trained)
    assert "was trained on digits and knows 10 classes, but twomoons has 2" in sentence
    assert "wrn-10-1 takes images, and these are points" in refused(capsys, *flags[:2])


def test_evaluate_auto(here, capsys):
    assert main.run([*TINY, "--evaluate", "--resume", "auto"]) == 0
    assert (here / "results/run_last/summary.json").exists()
    assert main.run([*TINY, "--name", "other", "--evaluate", "--resume", "auto"]) == 2
    assert "other_last" in capsys.readouterr().err


def test_finetuning_leaves_a_frozen_body_as_it_is(here, trained):
    flags = [
        "--freeze-body",
        "--weights",
        str(trained),
        "--finetune-epochs",
        "3",
        "--finetune-lr",
        "0.1",
        "--name",
        "frozen",
    ]
    assert main.run([*TINY, *flags]) == 0
    before = load(here / "checkpoint/frozen_last.pth.tar")["avg_state_dict"]
    after = load(here / "checkpoint/frozen_finetune_last.pth.tar")["avg_state_dict"]
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == 1  # the head
