"""What is made of a folder: its parts, its classes, what is left out of it, and what is refused."""

import os
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_cli import run
from test_data import picture, refusal, write_cifar, write_stl10, write_tree
from test_run_state import FOLDER, load, summary

import data
import main
import visualize
from data import Dataset, load_dataset, split_labels, write_labeled
from engine import images
from engine.checkpoint import upgrade
from engine.folders import image_tree, place_of
from run.record import read_run

CLASSES = {"cat": 4, "dog": 4}


def under(*places, count=4):
    """Counts of images for ``write_tree``: the two classes in each place."""
    return {f"{place}/{name}": count for place in places for name in ("cat", "dog")}


def folders_of(image_set):
    """Number of images by the folder that they lie in."""
    counts = {}
    for name in image_set.names if image_set else ():
        counts[os.path.dirname(name)] = counts.get(os.path.dirname(name), 0) + 1
    return counts


def parts(dataset):
    """The folders of the images to learn from, with a class and without, to validate and to test."""
    classed = dataset.unlabeled.targets >= 0
    learned, free = (dataset.unlabeled.subset(torch.nonzero(x).flatten()) for x in (classed, ~classed))
    return {
        name: folders_of(part)
        for name, part in (("train", learned), ("free", free), ("val", dataset.val), ("test", dataset.test))
        if part
    }


def said(dataset):
    return "\n".join(dataset.notes)


# ---------------------------------------------------------------- layouts: the table of docs/details.md

LAYOUTS = {
    "`train/`, `test/`": (
        under("train", "test"),
        {"train": under("train"), "test": under("test")},
    ),
    "`train/`, `val/`": (
        under("train", "val"),
        {"train": under("train"), "test": under("val")},
    ),
    "`Train/`, `Valid/`, `Test/`": (
        under("Train", "Valid", "Test"),
        {"train": under("Train"), "val": under("Valid"), "test": under("Test")},
    ),
    "`training/`, `validation/`, `testing/`": (
        under("training", "validation", "testing"),
        {"train": under("training"), "val": under("validation"), "test": under("testing")},
    ),
    "`Training/`, `Testing/`": (
        under("Training", "Testing"),
        {"train": under("Training"), "test": under("Testing")},
    ),
    "`training_set/`, `test_set/`": (
        under("training_set", "test_set"),
        {"train": under("training_set"), "test": under("test_set")},
    ),
    "`seg_train/seg_train/`, `seg_test/seg_test/`, `seg_pred/`": (
        under("seg_train/seg_train", "seg_test/seg_test") | {"seg_pred/seg_pred": 3},
        {"train": under("seg_train/seg_train"), "test": under("seg_test/seg_test")},
    ),
    "`train/`, `test/`, `unlabelled/`": (
        under("train", "test") | {"unlabelled": 5},
        {"train": under("train"), "test": under("test"), "free": {"unlabelled": 5}},
    ),
    "`train/` with `unsup/` inside, `test/`": (
        under("train", "test") | {"train/unsup": 5},
        {"train": under("train"), "test": under("test"), "free": {"train/unsup": 5}},
    ),
    "`train/`, `dev/`, `test/`, `masks/`, `docs/`": (
        under("train", "dev", "test") | {"masks": 2, "docs/raw": 1},
        {"train": under("train"), "val": under("dev"), "test": under("test")},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_parts(tmp_path, layout):
    counts, expected = LAYOUTS[layout]
    write_tree(tmp_path, counts)
    dataset = load_dataset("folder", tmp_path, num_labeled=2)
    assert dataset.classes == ["cat", "dog"] and parts(dataset) == expected
    assert dataset.test.targets.tolist() == [0] * 4 + [1] * 4
    assert not set(dataset.labeled.names) - set(dataset.unlabeled.names)
    for part, folders in expected.items():
        words = {"train": "training images", "test": "test images", "val": "validation images"}
        place = os.path.commonpath(folders)
        assert f"{words.get(part, 'images without labels')} in {place}/" in said(dataset)
    assert ("choose the checkpoint" in said(dataset)) == ("val" in expected)
    assert ("not used in" in said(dataset)) == bool(
        {name.split("/")[0] for name in counts} & {"masks", "seg_pred"}
    )


ONE_LEVEL = {
    "`cat/`, `dog/`": (CLASSES, {}, ""),
    "`cat/`, `dog/`, `unlabeled/`": (CLASSES | {"unlabeled/deep": 5}, {"unlabeled/deep": 5}, ""),
    "`cat/`, `dog/`, `Unsupervised/`": (CLASSES | {"Unsupervised": 5}, {"Unsupervised": 5}, ""),
    "`labeled/`, `unlabeled/`": (under("labeled") | {"unlabeled": 5}, {"unlabeled": 5}, "labeled"),
    "`labelled/`": (under("labelled"), {}, "labelled"),
}


@pytest.mark.parametrize("layout", ONE_LEVEL)
def test_layouts_that_are_split_here(tmp_path, layout):
    """On the same sides and with the same labels as the class folders alone."""
    counts, free, place = ONE_LEVEL[layout]
    write_tree(tmp_path / "mine", counts)
    write_tree(tmp_path / "plain", CLASSES)
    options = {"num_labeled": 2, "test_fraction": 0.4}
    dataset = load_dataset("folder", tmp_path / "mine", **options)
    plain = load_dataset("folder", tmp_path / "plain", **options)
    assert dataset.classes == ["cat", "dog"] and parts(dataset).get("free", {}) == free
    assert dataset.test.names == plain.test.names and dataset.labeled.names == plain.labeled.names
    assert dataset.unlabeled.names[: len(plain.unlabeled)] == plain.unlabeled.names
    assert all(os.path.isfile(tmp_path / "mine" / place / name) for name in dataset.test.names)
    assert (f"images without labels in {next(iter(free), 'none').split('/')[0]}/" in said(dataset)) == bool(
        free
    )


REFUSED = {
    "train, training, test": (
        under("train", "training", "test"),
        "train/ and training/, which both mean training",
    ),
    "valid, val": (
        under("train", "test", "val", "Valid"),
        "Valid/ and val/, which both mean validation images",
    ),
    "test alone": (under("Testing"), "has Testing/ but no train/: add the folder of training images"),
    "test beside classes": (
        CLASSES | under("test"),
        "has test/ beside folders that look like classes (cat, dog): move the class folders into",
    ),
    "dev as a class": (CLASSES | {"dev": 2}, "dev/ beside folders that look like classes (cat, dog)"),
    "train alone": (under("Training"), "has Training/ but neither test/ nor val/: add one of them, or give"),
    "train beside classes": (
        CLASSES | under("train"),
        "has train/ beside folders that look like classes (cat, dog) but neither",
    ),
    "labeled beside classes": (
        CLASSES | under("labeled"),
        "has labeled/ beside folders that look like classes",
    ),
    "train, unlabeled": (
        under("train") | {"unlabeled": 3},
        "itself to split it into training and test images, with --unlabeled-path",
    ),
    "two unlabelled": (CLASSES | {"unlabeled": 3, "unsup": 3}, "which both mean images without labels"),
    "unlabelled twice": (
        under("train", "test") | {"unlabeled": 3, "train/unlabeled": 3},
        "unlabeled/ and train/unlabeled/, which both mean images without labels",
    ),
    "unlabelled alone": ({"unlabeled": 3}, "there are no class folders"),
}


@pytest.mark.parametrize("layout", REFUSED)
def test_layouts_that_are_not_plain_are_refused(tmp_path, layout):
    counts, sentence = REFUSED[layout]
    write_tree(tmp_path, counts)
    assert sentence in refusal("folder", tmp_path, num_labeled=2)


@pytest.mark.parametrize("layout", [*LAYOUTS, *ONE_LEVEL])
def test_a_layout_is_a_line_of_the_docs(layout):
    text = (Path(main.__file__).parent / "docs/details.md").read_text()
    assert f"\n| {layout} |" in text.split("## What is made of a folder")[1].split("\n## ")[0]


# ---------------------------------------------------------------- folders that other flags name


@pytest.mark.parametrize("flag", ["unlabeled_path", "save_path", "results_path"])
def test_a_folder_of_another_flag_is_no_class(tmp_path, flag):
    write_tree(tmp_path, CLASSES | {"more": 5})
    assert load_dataset("folder", tmp_path, num_labeled=3).classes == ["cat", "dog", "more"]
    dataset = load_dataset("folder", tmp_path, num_labeled=2, **{flag: tmp_path / "more"})
    assert dataset.classes == ["cat", "dog"]
    assert parts(dataset).get("free") == ({"": 5} if flag == "unlabeled_path" else None)
    write_tree(tmp_path / "two/train", CLASSES | {"more": 5}), write_tree(tmp_path / "two/test", CLASSES)
    dataset = load_dataset("folder", tmp_path / "two", num_labeled=2, **{flag: tmp_path / "two/train/more"})
    assert dataset.classes == ["cat", "dog"]


def test_the_programs_own_folders_are_no_classes(tmp_path, monkeypatch):
    write_tree(tmp_path, CLASSES | {"results/run": 2, "checkpoint": 1})
    assert len(load_dataset("folder", tmp_path, num_labeled=4).classes) == 4
    monkeypatch.chdir(tmp_path)
    assert load_dataset("folder", ".", num_labeled=2).classes == ["cat", "dog"]


def test_flags_of_a_command_reach_the_data(tmp_path):
    write_tree(tmp_path, CLASSES | {"kept": 3, "written": 2})
    words = ["--dataset", "folder", "--data-path", str(tmp_path), "--num-labeled", "2"]
    words += ["--save-path", str(tmp_path / "kept"), "--results-path", str(tmp_path / "written")]
    assert main.read_data(main.parse_arguments(words), None, False).classes == ["cat", "dog"]


def test_another_folder_of_unlabelled_images_takes_the_place_of_the_one_inside(tmp_path):
    write_tree(tmp_path / "mine", CLASSES | {"unlabeled": 5})
    write_tree(tmp_path / "more", {"any": 3})
    options = {"num_labeled": 2, "unlabeled_path": tmp_path / "more"}
    dataset = load_dataset("folder", tmp_path / "mine", **options)
    assert parts(dataset)["free"] == {"any": 3}
    assert "unlabeled/ (--unlabeled-path names another folder)" in said(dataset)
    named = load_dataset(
        "folder", tmp_path / "mine", **options | {"unlabeled_path": tmp_path / "mine/unlabeled"}
    )
    assert parts(named)["free"] == {"": 5} and "not used" not in said(named)


@pytest.mark.parametrize("resize", [None, 80])
def test_unlabelled_images_inside_the_folder_can_be_the_only_ones(tmp_path, resize):
    written = write_tree(tmp_path, CLASSES | {"unlabeled": 5})
    options = {"num_labeled": 2, "unlabeled_mode": "only", "resize": resize}
    dataset = load_dataset("folder", tmp_path, **options)
    assert dataset.unlabeled.targets.tolist() == [-1] * 5 and len(dataset.labeled) == 2
    paths = sorted(path for path in written if "unlabeled" in path)
    if resize is None:
        assert np.array_equal(dataset.unlabeled.images.numpy(), [written[path] for path in paths])
    else:
        assert dataset.unlabeled.files == paths and dataset.unlabeled.size == 80
    shutil.rmtree(tmp_path / "unlabeled")
    assert f"put them into '{tmp_path}/unlabeled'" in refusal("folder", tmp_path, **options)


# ---------------------------------------------------------------- a validation set of its own


def test_the_folders_validation_images_choose_the_checkpoint(tmp_path):
    write_tree(tmp_path / "mine", under("train", "test", "val", count=6))
    words = [*FOLDER[:2], "--data-path", "mine", "--num-labeled", "6", *FOLDER[4:]]
    done = run(*words, "--total-steps", "8", cwd=tmp_path)
    assert "validation images in val/ (they choose the checkpoint, as with --num-val)" in done.stderr
    os.chdir(tmp_path)
    record, found = load("checkpoint/mine_last.pth.tar")["data"], summary("mine")
    assert found["selection"] == "val"
    assert sorted(record["val"]) == [f"val/{name}/{i:03d}.png" for name in ("cat", "dog") for i in range(6)]
    lines = [line for line in read_run(Path("results/mine")).records if "val_top1" in line]
    best = max(lines, key=lambda line: line["val_top1"])
    assert (found["best_step"], found["best_top1"]) == (best["step"], best["top1"])

    # of the network of that step, on these images
    networks, dataset, views, runtime = visualize.load(read_run(Path("results/mine")), only_test=False)
    assert parts(dataset) == {
        "train": under("train", count=6),
        "val": under("val", count=6),
        "test": under("test", count=6),
    }
    assert load("checkpoint/mine_best.pth.tar")["step"] == best["step"]
    networks[visualize.STUDENT].load_state_dict(load("checkpoint/mine_best.pth.tar")["avg_state_dict"])
    students = {"student": networks[visualize.STUDENT]}
    assert main.measure_accuracy(runtime, students, dataset.val, views)[0]["top1"] == best["val_top1"]
    run("--evaluate", "--resume", "checkpoint/mine_best.pth.tar", cwd=tmp_path)
    assert summary("mine_best")["selection"] == "val" and summary("mine_best")["top1"] == best["top1"]


@pytest.mark.parametrize("resize", [None, 80])
def test_a_run_finds_its_own_validation_images_again(tmp_path, resize):
    write_tree(tmp_path, under("train", "test", "val"))
    options = {"num_labeled": 4, "resize": resize}
    dataset = load_dataset("folder", tmp_path, **options)
    record = dataset.record()
    again = load_dataset("folder", tmp_path, **options, record=record)
    assert parts(again) == parts(dataset) and again.val.names == dataset.val.names
    assert len(load_dataset("folder", tmp_path, **options, record=record, only_test=True).test) == 8

    # an image of each kind in the place of another kind, a new one among the validation images
    labelled, free = dataset.labeled.names[0], set(dataset.unlabeled.names) - set(dataset.labeled.names)
    (tmp_path / labelled).rename(tmp_path / "val/cat/labelled.png")
    (tmp_path / "val/dog/001.png").rename(tmp_path / "train/dog/validation.png")
    picture(10, 10, seed=9).save(tmp_path / "val/cat/new.png")
    again = load_dataset("folder", tmp_path, **options, record=record)
    assert "val/cat/labelled.png" in again.labeled.names and len(again.labeled) == 4
    assert "train/dog/validation.png" in again.val.names and len(again.val) == 8
    assert set(again.unlabeled.names) == (
        free | set(dataset.labeled.names) - {labelled} | {"val/cat/labelled.png"}
    )
    assert torch.equal(again.record()["trained"], record["trained"])
    (tmp_path / "val/dog/002.png").unlink()
    sentence = refusal("folder", tmp_path, **options, record=record)
    assert "1 of the run's 8 validation images" in sentence and "val/dog/002.png" in sentence


def test_validation_images_of_its_own_beside_num_val_are_refused(tmp_path):
    write_tree(tmp_path, under("train", "test", "val"))
    assert "leave out --num-val 2" in refusal("folder", tmp_path, num_labeled=2, num_val=2)


def test_a_run_without_validation_images_stays_without(tmp_path):
    write_tree(tmp_path, under("train", "test"))
    record = load_dataset("folder", tmp_path, num_labeled=2).record()
    write_tree(tmp_path / "val", CLASSES)
    dataset = load_dataset("folder", tmp_path, num_labeled=2, record=record)
    assert dataset.val is None and "val/ (the run was started without it)" in said(dataset)
    assert set(parts(dataset)["train"]) == {"train/cat", "train/dog"}


def test_validation_images_that_are_test_images_are_left_out(tmp_path):
    write_tree(tmp_path, under("train", "test", "val"))
    shutil.copy(tmp_path / "test/dog/003.png", tmp_path / "val/dog/copy.png")
    dataset = load_dataset("folder", tmp_path, num_labeled=2)
    assert len(dataset.val) == 8 and "val/dog/copy.png" not in dataset.val.names
    assert "1 of 9 validation images are copies of test images: left out" in said(dataset)
    assert len(load_dataset("folder", tmp_path, num_labeled=2, keep_test_copies=True).val) == 9
    shutil.rmtree(tmp_path / "val"), shutil.copytree(tmp_path / "test", tmp_path / "val")
    assert "all validation images are copies" in refusal("folder", tmp_path, num_labeled=2)


# ---------------------------------------------------------------- what systems leave beside photographs

SYSTEM = (
    "@eaDir",
    "@tmp",
    "$RECYCLE.BIN",
    "lost+found",
    ".thumbnails",
    "#recycle",
    "System Volume Information",
)


@pytest.mark.parametrize("name", [*SYSTEM, "__MACOSX", "#snapshot"])
def test_folders_of_the_system_are_left_out_everywhere(tmp_path, name):
    write_tree(tmp_path, under("train", "test") | {name: 2, f"train/{name}": 2, f"train/cat/a/{name}/b": 2})
    dataset = load_dataset("folder", tmp_path, num_labeled=2)
    assert parts(dataset) == {"train": under("train"), "test": under("test")}
    files, _ = image_tree(str(tmp_path / "train"), "FOLDER")
    assert len(files) == 8 and not any(name in file for file in files)


def test_files_of_the_system_are_left_out(tmp_path):
    write_tree(tmp_path, CLASSES)
    (tmp_path / "cat/Thumbs.db").write_bytes(b"")
    (tmp_path / "cat/.hidden.png").write_bytes(b"")
    picture(10, 10).save(tmp_path / "cat/@R1.png")
    files, lines = image_tree(str(tmp_path), "FOLDER")
    assert len(files) == 8 and lines == ["1 ignored: names that begin with @ 1"]


def test_photographs_beside_the_class_folders_are_counted(tmp_path):
    write_tree(tmp_path, under("train", "test"))
    for place in ("train/loose.jpg", "train/more.png", "test/loose.jpg", "cover.png"):
        picture(10, 10).save(tmp_path / place)
    (tmp_path / "train/notes.txt").write_text("")
    dataset = load_dataset("folder", tmp_path, num_labeled=2)
    assert "4 ignored: images beside the class folders 4" in said(dataset) and len(dataset.unlabeled) == 8


# ---------------------------------------------------------------- fingerprints


def test_fingerprints_are_of_all_bytes(tmp_path):
    """Pictures that differ in one byte, anywhere, in files of 480 kB."""
    pixels = np.zeros((400, 400, 3), np.uint8)
    places = [(0, 0), (100, 7), (150, 0), (199, 399), (290, 5), (399, 399)]
    files = []
    for k, (x, y) in enumerate([*places, places[2]]):
        changed = pixels.copy()
        changed[x, y] = 1
        files.append(str(tmp_path / f"{k}.bmp"))
        Image.fromarray(changed).save(files[-1])
    for rule in (images.fingerprints, images.prints_in_stages):
        prints = rule(files, 2).tolist()
        assert prints[-1] == prints[2] and len(set(prints)) == len(places), rule
    assert len(set(images.fingerprints(files, 2, "pieces").tolist())) < len(places)  # why there is a new rule


def test_stages_tell_files_apart_by_size_ends_and_content(tmp_path):
    contents = [b"a", b"ab", b"ba", b"ab", b"x" * 9000 + b"1" + b"x" * 9000, b"x" * 9000 + b"2" + b"x" * 9000]
    contents += [contents[4], b"", b"", b"y" + contents[4][1:]]
    for k, content in enumerate(contents):
        (tmp_path / str(k)).write_bytes(content)
    prints = images.prints_in_stages([str(tmp_path / str(k)) for k in range(len(contents))]).tolist()
    for a, content in enumerate(contents):
        assert [b for b, other in enumerate(prints) if other == prints[a]] == [
            b for b, other in enumerate(contents) if other == content
        ]


def old_record(dataset, files, **changed):
    """The record that an earlier version would have written of this data set, as a checkpoint is read."""
    record = dataset.record() | changed
    del record["fingerprint"]
    record = upgrade({"data": record})["data"]
    old = dict(zip(files, images.fingerprints(files, 1, "pieces").tolist(), strict=True))

    def prints(part):
        return torch.tensor([old[os.path.join(dataset.path, name)] for name in part.names])

    learned = [part for part in (dataset.labeled, dataset.unlabeled, dataset.val) if part is not None]
    return record | {
        "labeled_prints": prints(dataset.labeled),
        "trained": torch.cat([prints(part) for part in learned]).unique(),
        "tested": prints(dataset.test),
    }


def test_records_of_the_earlier_fingerprints_go_on(tmp_path):
    """With images above 128 KiB, whose two fingerprints differ; copies stay where they were."""
    random = np.random.RandomState(0)
    for name in under("train", "test"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(4):
            pixels = random.randint(0, 256, (240, 240, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{number}.bmp")
    for number in range(2):  # at least one of them is not labelled
        shutil.copy(tmp_path / f"test/cat/{number}.bmp", tmp_path / f"train/cat/copy-{number}.bmp")
    options = {"num_labeled": 2, "resize": 16}
    first = load_dataset("folder", tmp_path, **options, keep_test_copies=True)
    files, _ = image_tree(str(tmp_path), "")
    record = old_record(first, files)
    write_tree(tmp_path / "unlabeled", {"any": 2})  # earlier versions did not use it
    again = load_dataset("folder", tmp_path, **options, record=record)
    assert again.labeled.names == first.labeled.names and again.test.names == first.test.names
    assert again.unlabeled.names == first.unlabeled.names
    assert {f"train/cat/copy-{number}.bmp" for number in range(2)} < set(again.unlabeled.names)
    assert "unlabeled/ (the run was started without it)" in said(again)
    assert not any(
        "the images to learn from have changed" in note or "measured on" in note for note in again.notes
    )
    written = again.record()
    assert written["fingerprint"] == "pieces"  # the run stays with its rule
    assert torch.equal(written["trained"], record["trained"])
    evaluated = load_dataset("folder", tmp_path, **options, record=written, only_test=True)
    assert evaluated.test.names == first.test.names


def test_a_record_without_fingerprints_of_the_labels_knows_its_moved_folder(tmp_path):
    """As one version wrote it, which knew the images that it learned from by their fingerprints together."""
    write_tree(tmp_path / "mine", {"cat": 20, "dog": 20})
    first = load_dataset("folder", tmp_path / "mine", num_labeled=4)
    record = first.record()
    for key in ("labeled_prints", "labeled_targets", "val_prints", "val_targets", "tested_targets"):
        del record[key]
    (tmp_path / "mine").rename(tmp_path / "moved")
    options = {"num_labeled": 4, "record": upgrade({"data": record})["data"], "only_test": True}
    test = load_dataset("folder", tmp_path / "moved", **options).test
    assert test.names == first.test.names
    (tmp_path / "moved" / test.names[0]).rename(tmp_path / "moved/cat/renamed.png")
    assert "cat/renamed.png" in load_dataset("folder", tmp_path / "moved", **options).test.names


def test_a_folder_that_was_a_class_stays_one(tmp_path):
    """A record of an earlier version, which took it for a class."""
    renamed = {"unlabeled": "some", "@home": "any", "test": "one"}
    write_tree(tmp_path, {"any": 8, "cat": 8, "one": 8, "some": 8})
    first = load_dataset("folder", tmp_path, num_labeled=4, test_fraction=0.4)

    def earlier(value):
        if isinstance(value, list):
            return [earlier(each) for each in value]
        for now, before in renamed.items():
            value = value.replace(before, now) if isinstance(value, str) else value
        return value

    record = {key: earlier(value) for key, value in first.record().items() if key != "path"}
    record["path"] = str(tmp_path)
    for now, before in renamed.items():
        (tmp_path / before).rename(tmp_path / now)
    record["classes"] = ["@home", "cat", "test", "unlabeled"]
    for only_test in (False, True):
        again = load_dataset("folder", tmp_path, num_labeled=4, record=record, only_test=only_test)
        assert again.classes == ["@home", "cat", "test", "unlabeled"]
        assert only_test or len(again.unlabeled) == len(first.unlabeled)
        assert torch.equal(again.test.targets.bincount(), first.test.targets.bincount())


# ---------------------------------------------------------------- copies of test images


def test_stl10_learns_from_no_test_image(tmp_path, monkeypatch):
    """Test images among the unlabelled ones, as in the published files, and one among the labelled ones."""
    count = {"train": 30, "test": 10, "unlabeled": 30}
    write = write_stl10(tmp_path, monkeypatch, count)
    make, folder = torchvision.datasets.STL10, tmp_path / "stl10_binary"
    write["unlabeled"][[3, 7, 8]] = write["test"][[1, 1, 5]]
    write["train"][12] = write["test"][9]
    for part in ("train", "unlabeled"):
        write[part].transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")
    monkeypatch.setattr(make, "_check_integrity", lambda self: True)
    dataset = load_dataset("stl10", tmp_path, num_labeled=20)
    kept = [i for i in range(30) if i != 12]
    free = [i for i in range(30) if i not in (3, 7, 8)]
    expected = np.concatenate([write["train"][kept], write["unlabeled"][free]])
    assert np.array_equal(dataset.unlabeled.images.numpy(), expected)
    assert "images left out as copies of test or validation images: 4 (" in said(dataset)
    assert dataset.record()["copies"].tolist() == [12, 33, 37, 38]
    assert 12 not in dataset.labeled_indices and len(dataset.labeled_indices) == 20
    assert np.array_equal(dataset.labeled.images.numpy(), write["train"][dataset.labeled_indices])

    # positions stay those of the original training set; what was drawn without copies is drawn still
    whole = load_dataset("stl10", tmp_path, num_labeled=20, keep_test_copies=True)
    assert len(whole.unlabeled) == 60 and whole.record()["copies"].tolist() == []
    assert (
        "3 of 10 test images are also among the training images: the test accuracy will be too high"
        in said(whole)
    )
    assert len(set(dataset.labeled_indices) ^ set(whole.labeled_indices)) <= 2
    again = load_dataset("stl10", tmp_path, num_labeled=20, record=dataset.record(), resize=48)
    assert len(again.unlabeled) == 56 and again.copies == dataset.copies
    assert len(load_dataset("stl10", tmp_path, num_labeled=20, record=whole.record()).unlabeled) == 60
    of_before = {key: value for key, value in whole.record().items() if key != "copies"}
    of_before = upgrade({"data": of_before})["data"]
    assert len(load_dataset("stl10", tmp_path, num_labeled=20, record=of_before).unlabeled) == 60


def test_labels_are_drawn_as_ever_where_no_copy_is_concerned():
    targets = [0, 1, 2] * 5
    assert split_labels(targets, 6, 3, 3, seed=0) == ([0, 1, 5, 6, 7, 11], [3, 4, 14])
    # without 5, a labelled image of class 2, the next in the order of that class moves up
    labeled, val = split_labels(targets, 6, 3, 3, seed=0, copies=[5])
    assert set(labeled) == {0, 1, 6, 7, 11, 14} and {3, 4} < set(val) and 5 not in labeled + val
    assert split_labels(targets, 6, 3, 3, seed=0, copies=[2]) == split_labels(targets, 6, 3, 3, seed=0)
    assert len(split_labels(targets, 15, 0, 3, seed=0, copies=[5])[0]) == 14  # all that there are


def test_a_validation_image_is_no_copy_of_a_labelled_one():
    targets = [0, 1, 2] * 5
    labeled, val = split_labels(targets, 6, 3, 3, seed=0)
    prints = torch.arange(15)
    prints[val[0]] = prints[labeled[0]]
    now, others = split_labels(targets, 6, 3, 3, seed=0, prints=prints)
    assert now == labeled and val[0] not in others and len(others) == 3 and set(val[1:]) < set(others)


@pytest.mark.parametrize("resize", [None, 80])
def test_copies_of_test_and_validation_images_in_a_folder(tmp_path, resize):
    write_tree(tmp_path, under("train", "test", "val", count=5) | {"unlabeled": 4})
    shutil.copy(tmp_path / "test/cat/001.png", tmp_path / "train/cat/copy.png")
    shutil.copy(tmp_path / "val/dog/002.png", tmp_path / "train/dog/copy.png")
    shutil.copy(tmp_path / "val/dog/003.png", tmp_path / "unlabeled/copy.png")
    options = {"num_labeled": 1.0, "resize": resize}
    dataset = load_dataset("folder", tmp_path, **options)
    learned = {*dataset.labeled.names, *dataset.unlabeled.names}
    assert len(learned) == 14 and not any("copy" in name for name in learned)
    assert "copies of test or validation images: 2 (" in said(dataset)
    assert "1 of 5 images in" in said(dataset) and "training images of 2 classes: cat: 5, dog: 5" in said(
        dataset
    )
    kept = load_dataset("folder", tmp_path, **options, keep_test_copies=True)
    assert sum("copy" in name for name in kept.unlabeled.names) == 3 and len(kept.labeled) == 12
    assert "1 of 10 test images are also among the training images, such as test/cat/001.png" in said(kept)
    again = load_dataset("folder", tmp_path, **options, record=dataset.record())
    assert again.unlabeled.names == dataset.unlabeled.names
    again = load_dataset("folder", tmp_path, **options, record=kept.record(), keep_test_copies=True)
    assert again.unlabeled.names == kept.unlabeled.names and again.labeled.names == kept.labeled.names


def test_copies_of_drawn_validation_images_are_left_out(tmp_path):
    write_tree(tmp_path, under("train", "test", count=6))
    options = {"num_labeled": 2, "num_val": 4}
    plain = load_dataset("folder", tmp_path, **options)
    shutil.copy(tmp_path / plain.val.names[0], tmp_path / "train/cat/zz.png")
    dataset = load_dataset("folder", tmp_path, **options)
    held = {(tmp_path / name).read_bytes() for name in dataset.val.names}
    assert not held & {(tmp_path / name).read_bytes() for name in dataset.unlabeled.names}
    assert len(dataset.unlabeled) == 8 and "validation images: 1 (" in said(dataset)


def test_labels_that_are_given_are_no_test_images(tmp_path):
    write_tree(tmp_path, under("train", "test"))
    shutil.copy(tmp_path / "test/cat/001.png", tmp_path / "train/cat/copy.png")
    options = {"num_labeled": None, "labeled_indices": tmp_path / "list.txt"}
    names = ["train/cat/000.png", "train/cat/copy.png", "train/dog/000.png"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert load_dataset("folder", tmp_path, **options).labeled.names == [names[0], names[2]]
    assert load_dataset("folder", tmp_path, **options, keep_test_copies=True).labeled.names == names
    (tmp_path / "list.txt").write_text("\n".join(names[1:]))
    assert "class 'cat' has no labelled image apart from 1 copies of test" in refusal(
        "folder", tmp_path, **options
    )


def test_a_class_of_nothing_but_copies_is_named(tmp_path):
    write_tree(tmp_path, under("train", "test", count=1))
    shutil.copy(tmp_path / "test/cat/000.png", tmp_path / "train/cat/000.png")
    sentence = refusal("folder", tmp_path, num_labeled=2)
    assert "class 'cat' has no training images apart from 1 copies of test or validation images" in sentence


def test_imagenet_is_compared_when_a_run_begins(tmp_path, monkeypatch):
    write_tree(tmp_path, under("train", "val", count=6), size=(70, 70), suffix="jpg")
    shutil.copy(tmp_path / "val/dog/001.jpg", tmp_path / "train/dog/copy.jpg")
    write_tree(tmp_path / "more", {"any": 2}, size=(70, 70), suffix="jpg")
    shutil.copy(tmp_path / "val/cat/000.jpg", tmp_path / "more/copy.jpg")
    options = {"num_labeled": 4, "num_val": 2, "resize": 16}
    dataset = load_dataset("imagenet", tmp_path, **options)
    assert len(dataset.unlabeled) == 10 and not any("copy" in file for file in dataset.unlabeled.files)
    assert dataset.path == str(tmp_path)
    assert dataset.copies == [12] and "validation images: 1 (" in said(dataset)
    more = load_dataset("imagenet", tmp_path, **options, unlabeled_path=tmp_path / "more")
    assert len(more.unlabeled) == 12 and not any("copy" in file for file in more.unlabeled.files)
    assert len(load_dataset("imagenet", tmp_path, **options, keep_test_copies=True).unlabeled) == 11
    monkeypatch.setattr(data, "prints_in_stages", None)  # a run that goes on compares nothing
    again = load_dataset("imagenet", tmp_path, **options, record=dataset.record())
    assert again.unlabeled.files == dataset.unlabeled.files and again.labeled.files == dataset.labeled.files
    assert (
        len(load_dataset("imagenet", tmp_path, **options, record=dataset.record(), only_test=True).test) == 12
    )


@pytest.mark.parametrize("resize", [1, 2, 16])
def test_copies_are_known_by_the_pixels_of_the_data_set(resize):
    """Not by what is left of them at one pixel, where hundreds of digits are alike."""
    dataset = load_dataset("digits", num_labeled=40, resize=resize)
    assert len(dataset.unlabeled) == 1297 and dataset.copies == []


def test_copies_in_cifar_are_known_before_they_are_resized(tmp_path, monkeypatch):
    write_cifar(tmp_path, monkeypatch, classes=10, packed=False)
    make = torchvision.datasets.CIFAR10
    read = make.__init__

    def with_copies(self, root, train=True, **options):
        """Training image 5 is test image 3, and training image 6 differs from it in one value by one."""
        read(self, root, train=train, **options)
        if train:
            self.data[5:7] = make(root, train=False).data[3]
            self.data[6, 0, 0, 0] ^= 1

    monkeypatch.setattr(make, "__init__", with_copies)
    for resize in (None, 2):
        dataset = load_dataset("cifar10", tmp_path, num_labeled=10, resize=resize)
        assert dataset.copies == [5] and len(dataset.unlabeled) == 39
    assert torch.equal(dataset.unlabeled.images[5], dataset.test.images[3])  # at two pixels: the image 6


def test_keeping_the_copies_is_part_of_a_run(tmp_path, capsys):
    words = (
        "--dataset twomoons --num-labeled 6 --total-steps 2 --eval-step 2 --device cpu --no-pictures".split()
    )
    assert main.run([*words, "--name", "run", *places(tmp_path), "--finetune-epochs", "0"]) == 0
    checkpoint = str(tmp_path / "checkpoint/run_last.pth.tar")
    assert main.run(["--resume", checkpoint, "--keep-test-copies", "--total-steps", "4"]) == 2
    assert (
        "--keep-test-copies False: it cannot continue with --keep-test-copies True" in capsys.readouterr().err
    )


def places(folder):
    return ["--save-path", str(folder / "checkpoint"), "--results-path", str(folder / "results")]


# ---------------------------------------------------------------- classes and sides


def test_pictures_in_two_classes_are_counted(tmp_path):
    write_tree(tmp_path, {"cat": 6, "dog": 6, "owl": 6})
    assert "in two classes" not in said(load_dataset("folder", tmp_path, num_labeled=3))
    for source, copy in (
        ("cat/000", "dog/a"),
        ("cat/000", "owl/a"),
        ("dog/001", "owl/b"),
        ("owl/002", "owl/c"),
    ):
        shutil.copy(tmp_path / f"{source}.png", tmp_path / f"{copy}.png")
    dataset = load_dataset("folder", tmp_path, num_labeled=3)
    assert "2 pictures lie in two classes, such as cat/000.png and dog/a.png" in said(dataset)


def test_the_last_image_of_a_class_is_kept_for_training(tmp_path):
    write_tree(tmp_path, {"ant": 30, "bee": 30})
    tested = next(f"{i}.png" for i in range(99) if place_of(f"cow/{i}.png") < 0.2)
    pair = [f"{i}.png" for i in range(99) if place_of(f"dog/{i}.png") < 0.2][:2]
    for folder, names in (("cow", [tested]), ("dog", pair)):
        (tmp_path / folder).mkdir()
        for number, name in enumerate(names):
            picture(10, 10, seed=900 + number + len(folder + name)).save(tmp_path / folder / name)
    dataset = load_dataset("folder", tmp_path, num_labeled=4)
    last = max(pair, key=lambda name: place_of(f"dog/{name}"))
    learned = [name for name in dataset.unlabeled.names if name[:3] in ("cow", "dog")]
    assert learned == [f"cow/{tested}", f"dog/{last}"]
    assert [name for name in dataset.test.names if name[:3] == "dog"] == [
        f"dog/{name}" for name in pair if name != last
    ]
    assert "one of each is kept for training: cow, dog" in said(dataset)
    again = load_dataset("folder", tmp_path, num_labeled=4, record=dataset.record())
    assert again.unlabeled.names == dataset.unlabeled.names and again.test.names == dataset.test.names


def test_accents_of_any_form_are_on_the_same_side(tmp_path):
    """A copy from a Mac writes é as two characters: images are tested, labelled and held out all the same."""
    names = [f"{letter}{number}.png" for number in range(12) for letter in "éüñ"]
    datasets = []
    for form in ("NFC", "NFD"):
        for folder in ("café", "thé"):
            place = tmp_path / form / unicodedata.normalize(form, folder)
            place.mkdir(parents=True)
            for number, name in enumerate(names):
                image = picture(10, 10, seed=number + 100 * len(folder))
                image.save(place / unicodedata.normalize(form, name))
        datasets.append(load_dataset("folder", tmp_path / form, num_labeled=8, num_val=4))
    for part in ("test", "labeled", "val"):
        one, other = ({unicodedata.normalize("NFC", n) for n in getattr(d, part).names} for d in datasets)
        assert one == other and one
    assert set(datasets[0].test.names) != set(datasets[1].test.names)  # as they are written


def test_written_labels_can_be_given_back_beside_validation_images(tmp_path):
    write_tree(tmp_path, under("train", "test", "val"))
    first = load_dataset("folder", tmp_path, num_labeled=4)
    write_labeled(tmp_path, first)
    again = load_dataset("folder", tmp_path, num_labeled=None, labeled_indices=tmp_path / "labeled.txt")
    assert isinstance(again, Dataset) and again.labeled.names == first.labeled.names
    assert again.val.names == first.val.names
