"""Classes and probabilities of images: what evaluation counts, rows, copies, export, and hostile input."""

import csv
import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import damage
from test_faults import CHECKPOINTS, IMAGES, TINY
from test_run_state import photographs

import main
import predict
from augmentation import ImageViews
from engine.files import write_csv
from engine.images import ORIENTATION
from engine.runtime import Runtime
from engine.tables import find_table

ROOT = Path(main.__file__).parent
COLUMNS = ["image", "class", "probability", "class_2", "probability_2"]
FOLDER = (
    "--dataset folder --data-path mine --num-labeled 12 --model wrn-10-1 --batch-size 6 --device cpu "
    "--workers 0 --finetune-epochs 0 --method supervised --student-lr 0.1 --nesterov "
    "--no-pictures"
).split()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder of images, and a run with each way to read them: ``small`` whole, ``large`` their centres."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for part, seed in (("train", 0), ("test", 1)):
            photographs(folder / "mine" / part, count=12 if part == "train" else 5, seed=seed)
        strange_images(folder / "mine/test/owl")
        small, large = ("--resize", "12", "--total-steps", "40"), ("--resize", "65", "--total-steps", "20")
        assert main.run([*FOLDER, *small, "--name", "small"]) == 0
        assert main.run([*FOLDER, *large, "--amp", "--channels-last", "--name", "large"]) == 0
        assert main.run([*TINY, "--name", "digits"]) == 0
    return folder


def strange_images(folder):
    """CMYK, grey, transparent, 16 bits, turned by its EXIF orientation, and a single pixel."""
    pixels = np.random.RandomState(2).randint(0, 256, (40, 25, 4)).astype(np.uint8)
    Image.fromarray(pixels, "CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(pixels).save(folder / "transparent.png")
    Image.fromarray(pixels[..., 0]).save(folder / "grey.png")
    Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    Image.fromarray(pixels[:1, :1, :3]).save(folder / "pixel.png")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(pixels[..., :3]).save(folder / "turned.jpg", exif=exif)


@pytest.fixture
def here(tmp_path, monkeypatch, runs):
    """An empty folder to run in, with links to the runs' images and checkpoints."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").symlink_to(runs / "mine")
    (tmp_path / "checkpoint").symlink_to(runs / "checkpoint")
    return tmp_path


SMALL, LARGE, DIGITS = (f"checkpoint/{name}_last.pth.tar" for name in ("small", "large", "digits"))
PLAIN = ("--device", "cpu", "--workers", "0")


def read(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


def predicted(capsys, *arguments, flags=PLAIN):
    """The rows of the CSV file on standard output, as dicts, and what stands on standard error."""
    capsys.readouterr()
    assert predict.run([*map(str, arguments), *flags]) == 0
    said = capsys.readouterr()
    return read(said.out), said.err


def refused(capsys, *arguments):
    """The sentence that the command ends with."""
    capsys.readouterr()
    assert predict.run([*map(str, arguments), *PLAIN]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("predict.py: ") and "Traceback" not in said
    return said.splitlines()[-1]


def changed(folder, content):
    """A checkpoint of the small run with other entries; the second level of dicts is merged."""
    good = torch.load(SMALL, weights_only=True)
    for key, value in content.items():
        good[key] = good[key] | value if isinstance(value, dict) and key in good else value
    torch.save(good, folder / "changed.pth.tar")
    return folder / "changed.pth.tar"


# ---------------------------------------------------------------- what evaluation counts


@pytest.mark.parametrize(("path", "tolerance"), [(SMALL, 2e-6), (LARGE, 0.02)])
def test_predict_gives_what_evaluate_counts(path, tolerance, here, capsys):
    assert main.run(["--evaluate", "--resume", path, "--workers", "0", "--results-path", "results"]) == 0
    record = here / "results" / Path(path).name.removesuffix(".pth.tar")
    evaluated = read((record / "predictions.csv").read_text())
    assert list(evaluated[0]) == ["image", "true_class", "class", "probability"]
    confusion = json.loads((record / "confusion.json").read_text())
    counts = torch.zeros(3, 3, dtype=torch.int64)
    for row in evaluated:
        assert row["image"].startswith(f"test/{row['true_class']}/")
        counts[confusion["classes"].index(row["true_class"]), confusion["classes"].index(row["class"])] += 1
    assert counts.tolist() == confusion["counts"] and (counts.sum(dim=0) > 0).sum() > 1

    rows, _ = predicted(capsys, path, "mine/test")
    assert list(rows[0]) == COLUMNS and len(rows) == len(evaluated) == 21
    classes = {f"test/{row['image']}": row["class"] for row in rows}
    assert classes == {row["image"]: row["class"] for row in evaluated}
    shares = {f"test/{row['image']}": float(row["probability"]) for row in rows}
    # bf16 sums in another order where images stand in another order
    assert shares == pytest.approx({r["image"]: float(r["probability"]) for r in evaluated}, abs=tolerance)


def test_an_ensemble_is_the_one_that_is_evaluated(here, capsys):
    """A run with --ensemble: both networks, as main.py counts them."""
    teacher = torch.load(SMALL, weights_only=True)["avg_state_dict"]
    head = [name for name in teacher if teacher[name].shape[:1] == (3,)][-2:]
    teacher |= {name: -2 * teacher[name] for name in head}
    content = {"args": {"ensemble": True, "method": "mpl"}, "teacher_state_dict": teacher}
    names = {"student": "wrn-10-1", "teacher": "wrn-10-1"}
    path = changed(here, content | {"networks": names, "predicting": ["student", "teacher"]})
    assert main.run(["--evaluate", "--resume", str(path), "--workers", "0", "--results-path", "results"]) == 0
    evaluated = read((here / "results/changed/predictions.csv").read_text())
    rows, _ = predicted(capsys, path, "mine/test")
    both = {f"test/{row['image']}": (row["class"], row["probability"]) for row in rows}
    assert {name: of for name, (of, _) in both.items()} == {row["image"]: row["class"] for row in evaluated}
    early = torch.load(path, weights_only=True)  # earlier versions said neither
    del early["networks"], early["predicting"]
    torch.save(early, "early.pth.tar")
    assert predicted(capsys, "early.pth.tar", "mine/test")[0] == rows
    student, _ = predicted(capsys, SMALL, "mine/test")
    assert both != {f"test/{row['image']}": (row["class"], row["probability"]) for row in student}


def test_batch_norm_has_the_epsilon_of_the_run(here, capsys):
    path = changed(here, {"args": {"bn_eps": 0.5}})
    assert main.run(["--evaluate", "--resume", str(path), "--workers", "0", "--results-path", "results"]) == 0
    evaluated = read((here / "results/changed/predictions.csv").read_text())
    rows, _ = predicted(capsys, path, "mine/test")
    found = {f"test/{row['image']}": float(row["probability"]) for row in rows}
    assert found == pytest.approx({row["image"]: float(row["probability"]) for row in evaluated}, abs=2e-6)
    plain, _ = predicted(capsys, SMALL, "mine/test")
    assert found != {f"test/{row['image']}": float(row["probability"]) for row in plain}


def test_batches_and_workers_do_not_matter(here, capsys):
    """Sizes that do and do not divide the 21 images, and the network without mixed precision."""
    flags = ("--device", "cpu", "--no-amp", "--no-channels-last")
    whole, _ = predicted(capsys, LARGE, "mine/test", flags=(*flags, "--workers", "0"))
    for more in (("--batch-size", "4", "--workers", "1"), ("--batch-size", "7", "--workers", "2")):
        rows, _ = predicted(capsys, LARGE, "mine/test", flags=(*flags, *more))
        assert [(row["image"], row["class"]) for row in rows] == [(r["image"], r["class"]) for r in whole]
        shares = ([float(row["probability"]) for row in each] for each in (rows, whole))
        assert next(shares) == pytest.approx(next(shares), abs=2e-6)


def test_predictions_of_images_in_memory_have_their_positions(here, capsys):
    assert main.run(["--evaluate", "--resume", DIGITS, "--results-path", "results"]) == 0
    rows = read((here / "results/digits_last/predictions.csv").read_text())
    assert [row["image"] for row in rows] == [str(number) for number in range(500)]
    right = sum(row["class"] == row["true_class"] for row in rows)
    summary = json.loads((here / "results/digits_last/summary.json").read_text())
    assert 100 * right / 500 == pytest.approx(summary["top1"]) and 0 < right < 500
    assert all(0.1 <= float(row["probability"]) <= 1 for row in rows)


def test_predictions_leave_out_what_cannot_be_read(here):
    """For several processes see test_distributed.py."""
    shutil.copytree(here / "mine/", here / "own")
    damage(here / "own/test/cat")
    flags = [
        "--evaluate",
        "--resume",
        LARGE,
        "--results-path",
        "results",
        "--workers",
        "0",
        "--skip-unreadable",
    ]
    assert main.run([*flags, "--data-path", "mine", "--name", "whole"]) == 0
    assert main.run([*flags, "--data-path", "own", "--name", "damaged"]) == 0
    whole, rest = (
        read((here / f"results/{name}/predictions.csv").read_text()) for name in ("whole", "damaged")
    )
    assert [row["image"] for row in whole] == [row["image"] for row in rest]
    assert [row["class"] for row in whole] == [row["class"] for row in rest]


def test_precision_and_memory_order_are_those_of_training(here):
    bf16 = Runtime("cpu", amp=True, alone=True).amp_dtype  # None where the processor has none
    for path, flags, expected in (
        (SMALL, [], (None, False)),
        (LARGE, [], (bf16, True)),
        (LARGE, ["--no-amp", "--no-channels-last"], (None, False)),
        (SMALL, ["--amp", "--channels-last"], (bf16, True)),
    ):
        runtime = Runtime("cpu", alone=True)
        predict.read_classifier(predict.build_parser().parse_args([path, "mine", *flags]), runtime)
        assert (runtime.amp_dtype, runtime.channels_last) == expected


@pytest.mark.parametrize("path", (SMALL, LARGE))
def test_an_early_checkpoint_recorded_no_crop(path, here, capsys):
    content = torch.load(path, weights_only=True)
    del content["data"]["crop"]
    torch.save(content, "early.pth.tar")
    assert predicted(capsys, "early.pth.tar", "mine") == predicted(capsys, path, "mine")


def test_fp16_is_left_where_there_is_none(here, capsys):
    expected, _ = predicted(capsys, SMALL, "mine/test")
    path = changed(here, {"args": {"amp": True, "amp_dtype": "fp16"}})
    rows, said = predicted(capsys, path, "mine/test")
    assert rows == expected and "fp16 needs CUDA: predicting in float32 on cpu" in said


def test_a_finetuned_checkpoint_of_an_ensemble_is_its_student(here, capsys):
    expected, _ = predicted(capsys, SMALL, "mine/test")
    path = changed(here, {"args": {"ensemble": True, "method": "mpl"}, "finetune_step": 3})
    assert predicted(capsys, path, "mine/test")[0] == expected


# ---------------------------------------------------------------- rows


def test_any_tree_in_natural_order(here, capsys):
    names = ("10.png", "2.png", "a/b/1.png", "a/b/01.png", "b2/1.png", "b10/1.png")
    for name in names:
        (here / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy("mine/test/cat/00.png", here / "tree" / name)
    (here / "tree/photo.heic").write_bytes(b"")
    rows, said = predicted(capsys, SMALL, "tree/")
    assert [row["image"] for row in rows] == ["2.png", "10.png", *names[3:1:-1], *names[4:]]
    assert "1 ignored: .heic 1 (photographs among them" in said


def test_the_most_probable_classes(here, capsys):
    two, _ = predicted(capsys, SMALL, "mine/test")
    rows, _ = predicted(capsys, SMALL, "mine/test", "--top", "9")
    assert list(rows[0]) == [*COLUMNS, "class_3", "probability_3"]
    for row, other in zip(rows, two, strict=True):
        assert row.items() >= other.items()
        shares = [float(row[key]) for key in row if key.startswith("probability")]
        assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1, abs=2e-6)
        assert {row[key] for key in row if key.startswith("class")} == {"cat", "dog", "owl"}
    one, _ = predicted(capsys, SMALL, "mine/test", "--top", "1")
    assert list(one[0]) == COLUMNS[:3]


@pytest.mark.parametrize("top", ("1", "3"))
def test_uncertain_images_come_first_by_their_margin(top, here, capsys):
    weights = torch.load(SMALL, weights_only=True)["avg_state_dict"]
    *_, weight, bias = (name for name in weights if weights[name].shape[:1] == (3,))
    spread = {weight: torch.randn(weights[weight].shape), bias: torch.tensor([0.0, 0.5, -0.5])}
    path = changed(here, {"avg_state_dict": spread})
    rows, _ = predicted(capsys, path, "mine/test", "--top", "3")
    shares = {
        row["image"]: [float(row[key]) for key in ("probability", "probability_2", "probability_3")]
        for row in rows
    }
    expected = sorted(shares, key=lambda name: shares[name][0] - shares[name][1])[:4]
    least_sure = sorted(shares, key=lambda name: shares[name][0])[:4]
    widest = sorted(shares, key=lambda name: shares[name][0] - shares[name][2])[:4]
    assert expected not in (least_sure, widest)  # which other ideas of a margin would list
    listed, said = predicted(capsys, path, "mine/test", "--uncertain", "4", "--top", top, "--copy-to", "next")
    assert [row["image"] for row in listed] == expected
    assert "4 images with the smallest margin between first class and runner-up" in said
    assert len([path for path in (here / "next").rglob("*") if path.is_file()]) == 4


def test_out_is_what_standard_output_gets(here, capsys):
    """Of images that the run does not know; what it knows has a test below."""
    for number in range(5):
        pixels = np.random.RandomState(100 + number).randint(0, 256, (12, 12, 3), dtype=np.uint8)
        (here / "new").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(here / f"new/{number}.png")
    capsys.readouterr()
    assert predict.run([SMALL, "new", *PLAIN]) == 0
    printed = capsys.readouterr().out
    assert predict.run([SMALL, "new", "--out", "rows.csv", *PLAIN]) == 0
    assert (here / "rows.csv").read_text() == printed and not capsys.readouterr().out


@pytest.mark.parametrize("workers", ("0", "1"))
def test_unreadable_images_are_named_and_left_out(workers, here, capsys):
    (here / "own").mkdir()
    shutil.copy("mine/test/cat/00.png", here / "own/bild 0.png")
    for name, write in IMAGES.items():
        write(here / "own" / f"{name}.png")
    rows, said = predicted(capsys, SMALL, "own", flags=("--device", "cpu", "--workers", workers))
    assert [row["image"] for row in rows] == ["bild 0.png"]
    for name in IMAGES:
        assert f"{name}.png cannot be read" in said
    assert "--skip-unreadable" not in said  # which is no flag of this program
    (here / "own/bild 0.png").unlink()
    (here / "rows.csv").write_text("mine")
    assert "none of the 5 images in 'own' can be read" in refused(capsys, SMALL, "own", "--out", "rows.csv")
    assert (here / "rows.csv").read_text() == "mine"


def test_files_and_folders_are_named_as_they_are_given(here, capsys):
    """Each file once, also between flags; a folder alone names its images by their paths in it."""
    whole, _ = predicted(capsys, SMALL, "mine/test")
    expected = {row["image"]: {**row, "image": f"mine/test/{row['image']}"} for row in whole}
    files = ("mine/test/owl/04.png", "mine/test/cat/01.png")
    one, _ = predicted(capsys, SMALL, files[0])
    assert one == [expected["owl/04.png"]]
    rows, _ = predicted(capsys, SMALL, files[0], "--top", "2", "mine/test/cat", files[1])
    assert rows == [*(expected[f"cat/{k:02d}.png"] for k in range(5)), expected["owl/04.png"]]
    alone, _ = predicted(capsys, SMALL, "--batch-size", "7", "mine/test/cat/", "--copy-to", "sorted")
    assert alone == [{**expected[f"cat/{k:02d}.png"], "image": f"{k:02d}.png"} for k in range(5)]
    most, *_, least = sorted(expected.values(), key=margin, reverse=True)
    files = (most["image"], least["image"])
    rows, _ = predicted(capsys, SMALL, *files, "--uncertain", "1", "--copy-to", "next")
    assert rows == [least] and margin(least) < margin(most)
    assert [*contents("next").values()] == [(here / least["image"]).read_bytes()]


def margin(row):
    return float(row["probability"]) - float(row["probability_2"])


def test_a_corrected_table_is_read_back(here, capsys):
    """Predict, correct the table, train again: names of any kind, and what is not sure stays unlabelled."""
    names = ("a,b.png", 'say "x".png', " spaces .png", "猫/10.png", "猫/2.png", "f\udcff.png", "left.png")
    for name, source in zip(names, sorted((here / "mine/test/dog").iterdir()) * 2, strict=False):
        (here / "new" / name).parent.mkdir(parents=True, exist_ok=True)
        with Image.open(source) as image:  # each a picture of its own
            image.resize((20 + len(name), 20)).save(here / "new" / name)
    assert predict.run([SMALL, "new", "--out", "table.csv", *PLAIN]) == 0
    rows = read((here / "table.csv").read_text(errors="surrogateescape"))
    assert {row["image"] for row in rows} == {*names}
    labels = dict(zip(names, ("cat", "dog", "owl", "owl", "dog", "cat", ""), strict=True))
    corrected = [(row["image"], labels[row["image"]], *list(row.values())[2:]) for row in rows]
    for kept in (corrected, [row for row in corrected if row[1]]):  # without a class, or without the row
        write_csv("table.csv", [COLUMNS, *kept])
        found = find_table("table.csv", "new")
        assert found.classes == ["cat", "dog", "owl"]
        classes = dict(zip(found.train.names, found.train.targets.tolist(), strict=True))
        assert classes == {name: found.classes.index(label) for name, label in labels.items() if label}
        assert found.unlabeled.names == ["left.png"]
    words = "--labels table.csv --data-path new --num-labeled all --total-steps 1 --batch-size 3 --resize 12"
    assert main.run([*FOLDER, *words.split(), "--name", "again", "--save-path", "again"]) == 0
    data = torch.load("again/again_last.pth.tar", weights_only=True)["data"]
    known = dict(zip(data["labeled"], data["labeled_targets"].tolist(), strict=True))
    assert known == {name: ["cat", "dog", "owl"].index(labels[name]) for name in known}
    assert {*known, *data["test"]} == {*names[:6]}


# ---------------------------------------------------------------- copies


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()
    }


def test_copies_in_class_folders_replace_nothing(here, capsys):
    rows, _ = predicted(capsys, SMALL, "mine/test")
    expected = {(row["class"], (here / "mine/test" / row["image"]).read_bytes()) for row in rows}
    first = here / "sorted" / rows[0]["class"] / Path(rows[0]["image"]).name
    first.parent.mkdir(parents=True)
    first.write_text("mine")
    for _ in range(2):  # the second time all of them are there
        predicted(capsys, SMALL, "mine/test", "--copy-to", "sorted")
        found = contents("sorted")
        assert found.pop(str(first.relative_to(here / "sorted"))) == b"mine"
        assert {(path.split("/")[0], content) for path, content in found.items()} == expected
        assert len(found) == 21
    assert any(path.endswith("-2.png") for path in found)  # 00.png of several classes


def test_copies_are_told_apart_by_their_content(here, capsys):
    """Two images of one name, size in bytes and time are two copies, each as old as its image."""
    for folder, grey in (("a", 10), ("b", 11)):
        (here / "own" / folder).mkdir(parents=True)
        Image.new("RGB", (12, 12), (grey, grey, grey)).save(here / "own" / folder / "1.bmp")
        os.utime(here / "own" / folder / "1.bmp", (10**9, 10**9))
    rows, _ = predicted(capsys, SMALL, "own", "--copy-to", "sorted")
    assert rows[0]["class"] == rows[1]["class"]
    copies = [path for path in (here / "sorted").rglob("*") if path.is_file()]
    assert {path.name for path in copies} == {"1.bmp", "1-2.bmp"}
    assert {path.read_bytes() for path in copies} == set(contents("own").values())
    assert {path.stat().st_mtime for path in copies} == {10**9}


HOSTILE = ["../../cat\r", "..", '<b>dog</b>, "big"\r\n\n\x00\ud800']


def test_names_of_classes_lead_nowhere_else(here, capsys):
    path = changed(here, {"data": {"classes": HOSTILE}})
    (here / "a/b/c").mkdir(parents=True)
    before = contents(here)
    predicted(capsys, path, "mine", "--copy-to", "a/b/c/sorted")
    places = {Path(each).parts[:4] for each in contents(here).keys() - before.keys()}
    assert places and all(place[:3] == ("a", "b", "c") and place[3] == "sorted" for place in places)
    assert all(len(Path(each).parts) == 6 for each in contents(here).keys() - before.keys())


def test_names_of_folders():
    names = ["a/b", "a_b", "A_B", "", ".", "..", "/", "x" * 300, "é" * 200, "con:\n", ".hidden", "end. "]
    folders = predict.folder_names(names)
    assert len({name.casefold() for name in folders}) == len(names)
    for name in folders:
        assert (
            len(name.encode()) <= 200 and not set(name) & set("/\\:\n\0") and name.strip(". ") == name != ""
        )
    assert predict.folder_names(["ein Löwe", "猫", "New York"]) == ["ein Löwe", "猫", "New York"]


def test_names_of_classes_are_quoted(here, capsys):
    rows, _ = predicted(capsys, changed(here, {"data": {"classes": HOSTILE}}), "mine/test", "--top", "3")
    names = [*HOSTILE[:2], HOSTILE[2].replace("\ud800", "\\ud800")]
    assert len(rows) == 21
    assert all({row["class"], row["class_2"], row["class_3"]} == set(names) for row in rows)


def test_copies_are_not_taken_for_new_images(here, capsys):
    shutil.copytree(here / "mine/", here / "own")
    for place in ("own", "own/sorted", "own/../own/a"):
        assert "--copy-to" in refused(capsys, SMALL, "own", "--copy-to", place)
    assert len(contents("own")) == len(contents(here / "mine/"))


# ---------------------------------------------------------------- export


def reference(images):
    """The probabilities of the small run's network, normalised as in evaluation."""
    arguments = predict.build_parser().parse_args([SMALL, "mine"])
    classifier = predict.read_classifier(arguments, Runtime("cpu"))
    views = ImageViews(*(classifier.images[name] for name in ("size", "mean", "std")))
    with torch.no_grad():
        return classifier.classes, classifier.network(views.evaluation(images)).softmax(dim=1)


def test_an_exported_network_gives_the_same_probabilities(here, capsys):
    assert predict.run([SMALL, "--export", "net.pt2"]) == 0
    extra = {"classes.json": ""}
    network = torch.export.load("net.pt2", extra_files=extra).module()
    for count in (1, 2, 9):
        images = torch.randint(256, (count, 3, 1, 1), dtype=torch.uint8).repeat(1, 1, 12, 12)
        classes, expected = reference(images)
        torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-6)
        assert not network(images).requires_grad
    assert len(expected.argmax(dim=1).unique()) > 1
    assert json.loads(extra["classes.json"]) == classes == ["cat", "dog", "owl"]


def test_an_exported_onnx_file_gives_the_same_probabilities(here, capsys):
    pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    assert predict.run([SMALL, "--export", "net.onnx"]) == 0
    session = runtime.InferenceSession("net.onnx")
    for count in (1, 2, 9):
        images = torch.randint(256, (count, 3, 1, 1), dtype=torch.uint8).repeat(1, 1, 12, 12)
        (found,) = session.run(["probabilities"], {"images": images.numpy()})
        classes, expected = reference(images)
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-6)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == classes


@pytest.mark.skipif(
    all(map(importlib.util.find_spec, ("onnx", "onnxscript"))), reason="the packages are installed"
)
def test_onnx_without_its_packages(here, capsys):
    assert "pip install onnx onnxscript" in refused(capsys, SMALL, "--export", "net.onnx")


# ---------------------------------------------------------------- hostile input


@pytest.mark.parametrize("damaged", CHECKPOINTS)
def test_hostile_checkpoints(damaged, here, runs, capsys):
    CHECKPOINTS[damaged](here / "hostile.pth.tar", (runs / SMALL).read_bytes())
    for arguments in (["mine"], ["--export", "net.pt2"]):
        assert "hostile.pth.tar" in refused(capsys, "hostile.pth.tar", *arguments)
    assert not (here / "ran").exists() and not (here / "net.pt2").exists()


FOREIGN = {
    "points": {"data": {"size": 0}},
    "a gigantic size": {"data": {"size": 10**9}},
    "a negative size": {"data": {"size": -12}},
    "one class": {"data": {"classes": ["cat"]}},
    "another number of classes": {"data": {"classes": ["cat", "dog"]}},
    "classes that are no names": {"data": {"classes": [1, 2, 3]}},
    "no deviation": {"data": {"std": [0.0, 1.0, 1.0]}},
    "a mean that is no number": {"data": {"mean": ["0", 0.5, 0.5]}},
    "two channels": {"data": {"mean": [0.5, 0.5], "std": [1.0, 1.0]}},
    "another crop": {"data": {"crop": ["none"]}},
    "data of another kind": {"data": [1]},
    "arguments of another kind": {"args": [1]},
    "no network": {"networks": {"student": None}},
    "an unknown network": {"networks": {"student": "wrn"}},
    "another network": {"networks": {"student": "wrn-16-1"}},
    "unknown roles": {"predicting": ["referee"]},
    "an epsilon that is no number": {"args": {"bn_eps": "1"}},
    "a tensor for weights": {"avg_state_dict": torch.zeros(3), "student_state_dict": None},
    "other weights": {"avg_state_dict": None, "student_state_dict": {1: 2}},
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_foreign_checkpoints(kind, here, capsys):
    content = dict(FOREIGN[kind])
    if kind in ("a tensor for weights", "other weights", "data of another kind", "arguments of another kind"):
        torch.save(torch.load(SMALL, weights_only=True) | content, here / "changed.pth.tar")
    else:
        changed(here, content)
    assert "changed.pth.tar" in refused(capsys, "changed.pth.tar", "mine")


@pytest.mark.parametrize("missing", ("args", "data"))
def test_a_checkpoint_that_says_too_little(missing, here, capsys):
    content = torch.load(SMALL, weights_only=True)
    del content[missing]
    torch.save(content, "changed.pth.tar")
    assert "does not describe its network" in refused(capsys, "changed.pth.tar", "mine")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere"),
        (["empty"], "no images in 'empty'"),
        (["heic"], ".heic 1 (photographs among them"),
        (["heic/a.heic"], "'heic/a.heic' is not an image: files must end in .jpg"),
        (["mine", "mine/test/cat/99.png"], "no folder 'mine/test/cat/99.png'"),
        ([], "give either images"),
        (["mine", "--export", "net.pt2"], "give either images"),
        (
            ["mine/test/cat", "mine/test/owl", "--copy-to", "mine/test/owl/sorted"],
            "is inside 'mine/test/owl'",
        ),
        (["mine", "--out", "nowhere/rows.csv"], "nowhere/rows.csv"),
        (["mine", "--out", "empty"], "cannot write empty"),
        (["--export", "net.pth"], ".pt2 or .onnx"),
        (["--export", "nowhere/net.pt2"], "nowhere/net.pt2"),
        (["mine", "--copy-to", "/proc/nowhere"], "/proc/nowhere"),
        (["mine", "--top", "0"], "--top"),
        (["mine", "--uncertain", "-1"], "--uncertain"),
        (["mine", "--batch-size", "0"], "--batch-size"),
    ],
)
def test_a_sentence_and_status_2(arguments, words, here, capsys):
    (here / "empty").mkdir()
    (here / "heic").mkdir()
    (here / "heic/a.heic").write_bytes(b"")
    assert words in refused(capsys, SMALL, *arguments)


@pytest.mark.parametrize("arguments", (["mine", "--out", "old"], ["--export", "old.pt2"]))
def test_a_full_disk_leaves_the_old_file(arguments, here, capsys):
    (here / arguments[-1]).write_text("old")
    (here / f"{arguments[-1]}.tmp").symlink_to("/dev/full")
    assert f"cannot write {arguments[-1]}: " in refused(capsys, SMALL, *arguments)
    assert (here / arguments[-1]).read_text() == "old"


def start(*arguments, **options):
    """The program in a process of its own."""
    command = [sys.executable, ROOT / "predict.py", *map(str, arguments), *PLAIN]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_a_full_disk_behind_standard_output(here):
    with open("/dev/full", "w") as full:
        process = start(SMALL, "mine", stdout=full)
        said = process.communicate(timeout=100)[1]
    assert (
        process.returncode == 2
        and said == "predict.py: cannot write to standard output: No space left on device\n"
    )


def test_no_room_for_a_copy(here, capsys):
    """No file may grow beyond 300 bytes: what is there are whole copies, none is the part that had room."""
    small = {content for content in contents(here / "mine/test").values() if len(content) <= 300}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300, before[1]))
    try:
        said = refused(capsys, SMALL, "mine/test", "--copy-to", "sorted")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert said.startswith("predict.py: cannot write to sorted/")
    assert set(contents("sorted").values()) <= small


@pytest.mark.parametrize("end", ("interrupt", "head"))
def test_it_ends_quietly(end, here):
    """Ctrl-C, or nobody who reads on: more rows than a pipe holds, so that the program cannot have ended."""
    (here / "many").mkdir()
    for number in range(600):
        os.link("mine/test/cat/00.png", here / "many" / f"{'x' * 200}{number}.png")
    process = start(SMALL, "many", "--batch-size", "8", stdout=subprocess.PIPE)
    assert process.stdout.readline().startswith("image,class")
    if end == "head":
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(100) == 141 and said == ""
    else:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=100)[1]
        assert process.returncode == 130 and said == "predict.py: interrupted\n"


def test_a_table_of_predictions_keeps_the_labels_and_the_test_images_of_its_run(here, capsys):
    """Corrected and given back as it is, it teaches nothing from a test image, and tests on no prediction."""
    first = torch.load(SMALL, weights_only=True)["data"]
    predicted(capsys, SMALL, "mine", "--out", "table.csv")
    rows = {row["image"]: row for row in read(Path("table.csv").read_text())}
    classes, tested = first["classes"], set(first["test"])
    for name, row in rows.items():
        assert row["split"] == ("test" if name in tested else "train"), name
        if name in tested or name in first["labeled"]:
            assert row["class"] == next(each for each in name.split("/") if each in classes), name
    words = ["--labels", "table.csv", "--data-path", "mine", "--num-labeled", "all", "--name", "second"]
    words += "--resize 12 --model wrn-10-1 --batch-size 2 --mu 1 --total-steps 1 --finetune-epochs 0".split()
    assert main.run([*words, "--method", "supervised", "--device", "cpu", "--no-pictures"]) == 0
    second = torch.load("checkpoint/second_last.pth.tar", weights_only=True)["data"]
    assert set(second["test"]) == tested and not tested & set(second["labeled"])
    assert not torch.isin(second["trained"], second["tested"]).any()
