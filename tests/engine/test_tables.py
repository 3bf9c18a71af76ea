"""Tables of labels: which file each row means, which class it has, what is refused."""

import shutil
import unicodedata

import numpy as np
import pytest
import torch
from test_data import picture, refusal, write_tree
from test_run_state import FOLDER, command, load, photographs, refused

import main
from data import load_dataset
from engine.tables import find_table
from utils import UserError


def files(root, *names):
    """Empty files of these names: a table is read before any pixel is."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def table(path, *lines, encoding="utf-8", end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(line + end for line in lines).encode(encoding))
    return path


def classes_of(found, part="train"):
    """{name: class} of a part that was found."""
    images = getattr(found, part)
    return dict(zip(images.names, (found.classes[k] for k in images.targets), strict=True))


def read(path, root, **options):
    """{name: class} of the training images, and the names of the unlabelled ones."""
    found = find_table(str(path), str(root), **options)
    return classes_of(found), found.unlabeled.names if found.unlabeled else []


def sentence(path, root, **options):
    with pytest.raises(UserError) as caught:
        find_table(str(path), str(root), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


EXPECTED = {"a.jpg": "cat", "sub/b.jpg": "dog"}


# ---------------------------------------------------------------- columns and text


@pytest.mark.parametrize(
    ("header", "cells"),
    [
        ("image,label", "{file},{label}"),
        ("Filename,Class", "{file},{label}"),
        ("choice,created_at,file_name", "{label},2024-01-02,{file}"),
        ("id,image,choice,annotator", "7,{file},{label},1"),  # Label Studio numbers its tasks
        ("image_id,category", "{file},{label}"),
        ("id,breed", "{file},{label}"),
        ("Image,Id", "{file},{label}"),  # of two columns, one known
        ("photo,label", "{file},{label}"),
        ("id_code,diagnosis,", "{file},{label},"),
        ("image,class,probability,class_2,probability_2", "{file},{label},0.6,bird,0.4"),
        ("  path , target ", " {file} , {label} "),
    ],
)
def test_columns_are_known_by_their_names(header, cells, tmp_path):
    files(tmp_path / "in", *EXPECTED)
    rows = [cells.format(file=file, label=label) for file, label in EXPECTED.items()]
    path = table(tmp_path / "labels.csv", header, *rows)
    columns = ("ID_code", "diagnosis") if header.startswith("id_code") else ()
    assert read(path, tmp_path / "in", columns=columns) == (EXPECTED, [])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings(separator, encoding, tmp_path):
    files(tmp_path / "in", "a b.jpg", "Löwe,1;2.jpg")
    rows = [("image", "label", "note"), ("a b.jpg", "猫", ""), ('"Löwe,1;2.jpg"', "Löwe"), (), ("", "")]
    path = table(tmp_path / "labels.csv", *map(separator.join, rows), encoding=encoding, end="\r\n")
    assert read(path, tmp_path / "in") == ({"a b.jpg": "猫", "Löwe,1;2.jpg": "Löwe"}, [])


def test_accents_of_a_mac_and_of_other_systems_are_the_same(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "é.jpg") for form in ("NFC", "NFD"))
    for here, there in ((composed, decomposed), (decomposed, composed)):
        shutil.rmtree(tmp_path / "in", ignore_errors=True)
        files(tmp_path / "in", here, "b.jpg", "c.jpg")
        label = {name: name.replace(".jpg", "") for name in (composed, decomposed)}
        lines = ("image,label", f"{there},{label[there]}", f"b.jpg,{label[here]}", "c.jpg,other")
        found, _ = read(table(tmp_path / "labels.csv", *lines), tmp_path / "in")
        assert found == {here: label[composed], "b.jpg": label[composed], "c.jpg": "other"}


def test_numbers_are_names_in_the_order_of_their_values(tmp_path):
    files(tmp_path / "in", *(f"{k}.png" for k in range(12)))
    path = table(tmp_path / "labels.csv", "id,label", *(f"{k},{11 - k}" for k in range(12)))
    found = find_table(str(path), str(tmp_path / "in"))
    assert found.classes == [str(k) for k in range(12)]
    assert classes_of(found) == {f"{k}.png": str(11 - k) for k in range(12)}


def test_classes_of_a_run_keep_their_order(tmp_path):
    """Also one that the table does not have, and one whose accent a Mac stores otherwise."""
    root, mac = files(tmp_path / "in", *EXPECTED), unicodedata.normalize("NFD", "Löwe")
    path = table(tmp_path / "labels.csv", "image,label", "a.jpg,cat", "sub/b.jpg,Löwe")
    found = find_table(str(path), str(root), classes=[mac, "dog", "cat"])
    assert found.classes == [mac, "dog", "cat"]
    assert classes_of(found) == {"a.jpg": "cat", "sub/b.jpg": mac}
    assert "line 3" in (said := sentence(path, root, classes=["cat", "dog"])) and "'Löwe'" in said


# ---------------------------------------------------------------- which file is meant


@pytest.mark.parametrize(
    "written",
    [
        "in/sub/b.jpg",  # relative to the table
        "sub/b.jpg",  # relative to the folder of images
        "./sub/b.jpg",
        "../top/in/sub/b.jpg",
        "sub\\b.jpg",
        "{root}/sub/b.jpg",
        "{link}/sub/b.jpg",
        "{link}/sub/b",
        "b.jpg",  # at any depth
        "b",
        "sub/b",
        "/elsewhere/photos/sub/b.jpg",  # the folder of another machine
        "C:\\Users\\me\\photos\\sub\\b.jpg",
        "https://example.org/photos/sub/b.jpg?size=1",
        "s3://bucket/sub/b.jpg",
        "/data/local-files/?d=photos/sub/b.jpg",
        "/data/upload/1/0a1b2c3d-b.jpg",
    ],
)
def test_a_file_is_found_by_what_a_table_calls_it(written, tmp_path):
    root = files(tmp_path / "top/in", *EXPECTED, "c.jpg")
    (tmp_path / "link").symlink_to(root)
    other = written.replace("sub/b", "a").replace("sub\\b", "a").replace("b.jpg", "a.jpg")
    other = "a" if written == "b" else other.replace("/sub/b", "/a")
    names = [name.format(root=root, link=tmp_path / "link") for name in (other, written)]
    path = table(tmp_path / "top/labels.csv", "image,label", f"{names[0]},cat", f"{names[1]},dog")
    assert read(path, root) == read(path, tmp_path / "link") == (EXPECTED, ["c.jpg"])


def test_names_with_signs_of_addresses_are_taken_as_they_are_first(tmp_path):
    uploaded = ("0a1b2c3d-b.jpg", "b.jpg", "c d.jpg", "c%20d.jpg", "e f.jpg")
    files(tmp_path / "in", *uploaded)
    written = ("/data/upload/3/0a1b2c3d-b.jpg", "/data/upload/3/ffffffff-b.jpg", "/data/upload/3/c%20d.jpg")
    rows = [f"{name},{k}" for k, name in enumerate((*written, "/data/upload/3/e%20f.jpg"))]
    found, rest = read(table(tmp_path / "labels.csv", "image,choice", *rows), tmp_path / "in")
    assert found == {"0a1b2c3d-b.jpg": "0", "b.jpg": "1", "c%20d.jpg": "2", "e f.jpg": "3"}
    assert rest == ["c d.jpg"]


def test_no_image_of_another_folder_stands_in_for_a_missing_one(tmp_path):
    """The right picture or a sentence: names that begin with different folders keep them, prefixes stay."""
    root = files(tmp_path / "in", "cats/2.jpg", "dogs/1.jpg", "dogs/3.jpg", "test/9.jpg", "x/b.jpg")
    web = "https://example.org/photos"
    for lost, lines in {
        f"{web}/0a1b2c3d-b.jpg": (f"{web}/2.jpg,cat", f"{web}/3.jpg,dog", f"{web}/0a1b2c3d-b.jpg,cat"),
        "cats/1.jpg": ("cats/2.jpg,cat", "dogs/3.jpg,dog", "cats/1.jpg,cat"),
        "/old/cats/1.jpg": ("/old/cats/2.jpg,cat", "/old/dogs/3.jpg,dog", "/old/cats/1.jpg,cat"),
        "9.jpg": ("cats/2.jpg,cat", "dogs/3.jpg,dog", "9.jpg,cat"),  # a test image
        "0a1b2c3d-b.jpg": ("cats/2.jpg,cat", "dogs/3.jpg,dog", "0a1b2c3d-b.jpg,cat"),
    }.items():
        path = table(tmp_path / "labels.csv", "image,label", *lines)
        assert f"line 4 of {path}: there is no image '{lost}'" in sentence(path, root)
    path = table(tmp_path / "labels.csv", "image,label", "cats/1.jpg,cat", "dogs/3.jpg,dog")
    assert f"line 2 of {path}: there is no image 'cats/1.jpg'" in sentence(path, root / "dogs")
    path = table(tmp_path / "labels.csv", "image,label", "cats/2.jpg,cat", "dogs/3.jpg,dog", "test/9.jpg,cat")
    assert read(path, root)[0] == {"cats/2.jpg": "cat", "dogs/3.jpg": "dog", "test/9.jpg": "cat"}


def test_images_beside_the_table_and_outside_the_folder(tmp_path):
    root = files(tmp_path / "photos", "a.jpg")
    files(tmp_path / "lists", "b.jpg")
    path = table(tmp_path / "lists/labels.csv", "image,label", "../photos/a.jpg,cat", "b.jpg,dog")
    assert read(path, root) == ({"a.jpg": "cat", "../lists/b.jpg": "dog"}, [])
    assert sorted(find_table(str(path), str(root)).train.files) == [
        str(tmp_path / "lists/b.jpg"),
        str(root / "a.jpg"),
    ]


# ---------------------------------------------------------------- parts


def test_a_split_column(tmp_path):
    names = [f"{k}.jpg" for k in range(10)]
    root = files(tmp_path / "in", *names)
    parts = ("train", "Training", "TEST", "testing", "val", "valid", "train", "unlabeled", "test", "train")
    labels = ("cat", "dog", "cat", "dog", "cat", "dog", "", "cat", "")
    rows = [",".join(row) for row in zip(names, labels, parts, strict=False)]
    path = str(table(tmp_path / "labels.csv", "file,label,Split", *rows))
    found = find_table(path, str(root))
    assert classes_of(found) == {"0.jpg": "cat", "1.jpg": "dog"}
    assert classes_of(found, "test") == {"2.jpg": "cat", "3.jpg": "dog"}
    assert classes_of(found, "val") == {"4.jpg": "cat", "5.jpg": "dog"}
    # the test image without a label, 8.jpg, is in no part
    assert found.unlabeled.names == ["6.jpg", "7.jpg", "9.jpg"]
    assert found.unlabeled.targets.tolist() == [-1] * 3
    assert "1 test or validation images without a label are left out" in found.notes
    only = find_table(path, str(root), only_test=True)
    assert (
        only.train is None
        and only.unlabeled is None
        and classes_of(only, "test") == classes_of(found, "test")
    )
    without = table(tmp_path / "labels.csv", "file,label", "0.jpg,cat", "1.jpg,dog")
    found = find_table(str(without), str(root))
    assert found.test is None and found.val is None  # to be split off


def test_a_file_that_is_named_twice_counts_once(tmp_path):
    root = files(tmp_path / "in", "a.jpg", "b.jpg", "c.jpg")
    rows = ("a.jpg,cat", "./a.jpg,cat", "b.jpg,dog", "b.jpg,", "c.jpg,", "c.jpg,dog")
    path = table(tmp_path / "labels.csv", "image,label", *rows)
    assert read(path, root) == ({"a.jpg": "cat", "b.jpg": "dog", "c.jpg": "dog"}, [])
    assert find_table(str(path), str(root)).train.names == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_class_without_a_test_image_is_named(tmp_path):
    layout(tmp_path / "in", [f"{k}.png" for k in range(6)])
    rows = [f"{k}.png,{('cat', 'dog')[k % 2]},{'test' if k == 0 else 'train'}" for k in range(6)]
    path = table(tmp_path / "labels.csv", "image,label,split", *rows)
    dataset = load_dataset("folder", tmp_path / "in", labels=path, num_labeled=2)
    assert dataset.test.names == ["0.png"] and {*dataset.unlabeled.names} == {f"{k}.png" for k in range(1, 6)}
    assert "these classes have no test image: dog; give some of their rows the split test" in dataset.notes


def test_a_folder_and_its_table_make_the_same_run(tmp_path):
    """All that follows from names: the test images, the labelled ones, their order."""
    write_tree(tmp_path / "in", {"ant": 30, "bee": 20})
    names = sorted(path.relative_to(tmp_path / "in") for path in (tmp_path / "in").rglob("*.png"))
    np.random.RandomState(0).shuffle(names)
    path = table(tmp_path / "labels.csv", "image,class", *(f"{name},{name.parent}" for name in names))
    options = {"num_labeled": 6, "num_val": 4, "seed": 3}
    one = load_dataset("folder", tmp_path / "in", **options)
    other = load_dataset("folder", tmp_path / "in", labels=path, **options)
    assert one.classes == other.classes == ["ant", "bee"]
    for part in ("labeled", "unlabeled", "val", "test"):
        ours, theirs = getattr(one, part), getattr(other, part)
        assert ours.names == theirs.names and torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.targets, theirs.targets) and len(ours)


# ---------------------------------------------------------------- tables as they come


def layout(root, names, size=(10, 10)):
    """Small images of these names; returns their pixels by name."""
    pixels = {}
    for k, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        image = picture(*size, seed=k)
        image.save(root / name)
        pixels[name] = np.asarray(image).transpose(2, 0, 1)
    return pixels


def assert_pixels(images, pixels):
    for name, image in zip(images.names, images.images, strict=True):
        assert np.array_equal(image, pixels[name]), name


@pytest.mark.parametrize("test", ["test", "Testing", "seg_test", "test-set"])
def test_kaggle_s_flat_folder_with_its_table(tmp_path, test):
    """``train.csv`` names images of ``train/`` by their stems; images of ``test/`` have no rows."""
    root = tmp_path / "kaggle"
    label = {f"{k:02d}": ("frog", "truck")[k % 2] for k in range(20)}
    pixels = layout(
        root, [*(f"train/{stem}.png" for stem in label), *(f"{test}/{stem}.png" for stem in label)]
    )
    path = table(root / "train.csv", "id,label", *(f"{stem},{name}" for stem, name in label.items()))
    table(root / "sample_submission.csv", "id,label", "00,frog")
    dataset = load_dataset("folder", root, labels=path, num_labeled=6)
    assert dataset.classes == ["frog", "truck"]
    known = {f"train/{stem}.png": ["frog", "truck"].index(name) for stem, name in label.items()}
    for part in (dataset.labeled, dataset.test):
        assert part.targets.tolist() == [known[name] for name in part.names] and len(part)
        assert_pixels(part, pixels)
    assert_pixels(dataset.unlabeled, pixels)
    assert {*dataset.test.names} < known.keys()  # unlabelled images never test
    assert {*dataset.unlabeled.names} == pixels.keys() - {*dataset.test.names}
    assert dataset.unlabeled.targets.tolist() == [known.get(name, -1) for name in dataset.unlabeled.names]
    assert (
        f"unlabelled images: 0 without a label in the table, 20 without a row, 20 of them in {test}/"
        in dataset.notes
    )


def test_label_studio_s_export(tmp_path):
    """Names as at upload or as in the folder that was uploaded; a skipped task has no choice."""
    root, header = (
        tmp_path / "photos",
        "annotation_id,annotator,choice,created_at,id,image,lead_time,updated_at",
    )
    uploaded = [f"pic {k}.png" if k % 3 else f"0000000{k % 10}-pic-{k}.png" for k in range(20)]
    pixels = layout(root, [*uploaded, "late.png"])
    stored = [f"ab12cd{k:02d}-{name}" if k % 3 else name for k, name in enumerate(uploaded)]
    choice = [("cat", "dog")[k % 2] for k in range(19)] + [""]
    paths = [f"/data/upload/4/{name.replace(' ', '%20')}" for name in stored]
    rows = [f"{k},1,{choice[k]},2024-05-06T07:08:09Z,{k + 900},{paths[k]},3.5," for k in range(20)]
    path = table(tmp_path / "project-4-at-2024-05-06.csv", header, *rows)
    dataset = load_dataset("folder", root, labels=path, num_labeled=1.0)
    known = {name: ["cat", "dog"].index(choice[k]) for k, name in enumerate(uploaded[:19])}
    assert {*dataset.labeled.names, *dataset.test.names} == known.keys()
    for part in (dataset.labeled, dataset.test):
        assert part.targets.tolist() == [known[name] for name in part.names] and len(part)
        assert_pixels(part, pixels)
    assert {*dataset.unlabeled.names} - {*dataset.labeled.names} == {uploaded[19], "late.png"}


@pytest.mark.parametrize("resize", [None, 80])
def test_labels_are_counted_among_the_rows_with_a_label(resize, tmp_path):
    """Also of images that are decoded by workers: a count, a fraction, all; the others are unlabelled."""
    names = [f"{k:02d}.png" for k in range(40)]
    layout(tmp_path / "in", names)
    rows = [f"{name},{'cat' if k < 16 else 'dog' if k < 32 else ''}" for k, name in enumerate(names[:36])]
    path = table(tmp_path / "labels.csv", "image,label", *rows)
    counts = {}
    for number in (4, 0.5, 1.0):
        dataset = load_dataset(
            "folder", tmp_path / "in", labels=path, num_labeled=number, resize=resize, test_fraction=0.3
        )
        counts[number] = len(dataset.labeled)
        assert not {*dataset.test.names} & {*names[32:]} and len(dataset.test)
        assert {*dataset.unlabeled.names} == {*names} - {*dataset.test.names}
        assert dataset.unlabeled.in_memory == (resize is None) and len(dataset.unlabeled.fingerprints)
    train = 32 - len(dataset.test)
    assert counts == {4: 4, 0.5: counts[0.5], 1.0: train} and abs(counts[0.5] - train / 2) <= 1


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["a.jpg,cat", "b.jpg,dog", "a.jpg,dog"], ("line 4", "'dog'", "'cat'", "line 2")),
        (["a.jpg,cat", "c.jpg,dog"], ("line 3", "no image 'c.jpg'")),
        (["a.jpg,cat", "note.txt,dog"], ("line 3", "'note.txt' is not an image")),
        (["a.jpg,cat", "d,dog"], ("line 3", "'d' matches", "d.jpg", "d.png")),
        (["a.jpg,cat", "same.jpg,dog"], ("line 3", "'same.jpg' matches", "x/same.jpg", "y/same.jpg")),
        (["a.jpg,cat", ",dog"], ("line 3", "no image")),
        (["a.jpg,cat", "b.jpg,dog, spotted"], ("line 3", "3 columns", "quotes")),
        (["a.jpg,cat", 'b.jpg,"dog'], ("line 3",)),
        (["a.jpg,cat", "b.jpg,cat"], ("'label'", "one class, 'cat'")),
        (["a.jpg,", "b.jpg"], ("no row", "label")),
        ([], ("no rows",)),
    ],
)
def test_a_wrong_line_gets_a_sentence(lines, words, tmp_path):
    root = files(tmp_path / "in", "a.jpg", "b.jpg", "d.jpg", "d.png", "x/same.jpg", "y/same.jpg", "note.txt")
    path = table(tmp_path / "labels.csv", "image,label", *lines)
    said = sentence(path, root)
    assert str(path) in said and all(word in said for word in words), said


@pytest.mark.parametrize(
    ("lines", "columns", "words"),
    [
        (["image,path,label", "a.jpg,a.jpg,x"], (), ("'image', 'path'", "--label-columns FILE LABEL")),
        (["image,true_class,class", "a.jpg,x,y"], (), ("'true_class', 'class'", "--label-columns")),
        (["a.jpg,cat", "b.jpg,dog"], (), ("a.jpg, cat", "header", "--label-columns")),
        (
            ["name,width,height,label", "a.jpg,1,1,x"],
            (),
            ("names of the images", "name, width, height, label"),
        ),
        (["image,label", "a.jpg,x"], ("image", "kind"), ("no column 'kind'", "image, label")),
        (
            ["image,label,split", "a.jpg,x,train", "b.jpg,y,fold 3"],
            (),
            ("line 3", "'fold 3'", "train, val, test"),
        ),
        (["image,label,split", "a.jpg,x,test", "b.jpg,y,test"], (), ("no training images",)),
    ],
)
def test_a_wrong_header_gets_a_sentence(lines, columns, words, tmp_path):
    path = table(tmp_path / "labels.csv", *lines)
    said = sentence(path, files(tmp_path / "in", "a.jpg", "b.jpg"), columns=columns)
    assert str(path) in said and all(word in said for word in words), said


@pytest.mark.parametrize(("count", "values"), [(202, 102), (202, 101), (150, 101), (150, 100)])
def test_a_column_of_other_things_is_not_the_class(count, values, tmp_path):
    names = [f"{k}.jpg" for k in range(count)]
    root = files(tmp_path / "in", *names)
    rows = [f"{name},n{k % values}" for k, name in enumerate(names)]
    path = table(tmp_path / "labels.csv", "image,label", *rows)
    if (count, values) in ((202, 102), (150, 101)):
        assert f"{values} different values in {count} rows" in sentence(path, root)
    else:
        assert read(path, root)[0] == {name: f"n{k % values}" for k, name in enumerate(names)}


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04\0\0 a workbook", "image,label\na.jpg,x".encode("utf-16-le")]
)
def test_a_file_that_is_no_text_gets_a_sentence(content, tmp_path):
    files(tmp_path / "in", "a.jpg")
    (tmp_path / "labels.xlsx").write_bytes(content)
    assert "save it as CSV in UTF-8" in sentence(tmp_path / "labels.xlsx", tmp_path / "in")
    assert "No such file" in sentence(tmp_path / "none.csv", tmp_path / "in")
    path = table(tmp_path / "labels.csv", "image,label", "a.jpg,Löwe", encoding="cp1252")
    assert "line 2" in (said := sentence(path, tmp_path / "in")) and "UTF-8" in said


def test_only_folders_have_tables(tmp_path):
    assert "--dataset folder" in refusal("digits", num_labeled=10, labels="labels.csv")


# ---------------------------------------------------------------- runs


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Photographs in one flat folder, ``mine``, and their table; five of each class are not in it."""
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "sorted", count=24)
    (tmp_path / "mine").mkdir()
    rows = []
    for path in sorted((tmp_path / "sorted").rglob("*.png")):
        name = f"{path.parent.name}-{path.name}"
        path.rename(tmp_path / "mine" / name)
        rows += [f"{name},{path.parent.name}"] if int(path.stem) < 19 else []
    table(tmp_path / "labels.csv", "image,class", *rows)
    return tmp_path


RUN = [word for word in FOLDER if word not in ("--dataset", "folder")]
LAST = "checkpoint/run_last.pth.tar"


def test_a_run_on_a_table_is_continued_and_evaluated_without_flags(here, monkeypatch, capsys):
    assert command(*RUN, "--data-path", "mine", "--labels", "labels.csv", "--name", "run") == 0
    record = load(LAST)["data"]
    assert record["name"] == "folder" and record["classes"] == ["cat", "dog", "owl"]
    assert all(name.startswith(record["classes"][k]) for name, k in zip(
        record["labeled"], record["labeled_targets"].tolist(), strict=True
    ))  # fmt: skip
    assert len(record["trained"]) + len(record["tested"]) == 72
    (here / "elsewhere").mkdir()
    monkeypatch.chdir(here / "elsewhere")
    assert command("--resume", here / LAST, "--total-steps", "6") == 0
    assert command("--evaluate", "--resume", here / LAST) == 0
    assert "changed since" in capsys.readouterr().err
    now = load(here / LAST)["data"]
    assert now["labeled"] == record["labeled"] and torch.equal(now["tested"], record["tested"])


def test_a_run_does_not_go_on_with_other_labels(here, capsys):
    assert command(*RUN, "--data-path", "mine", "--labels", "labels.csv", "--name", "run") == 0
    one = load(LAST)["data"]["labeled"][0]
    text = (here / "labels.csv").read_text()
    table(here / "other.csv", text.replace(f"{one},cat", f"{one},dog"))
    said = refused(capsys, "--resume", LAST, "--total-steps", "6", "--labels", "other.csv")
    assert f"{one} has the label 'dog', but had 'cat' when the run was started: start a new run" in said
    table(here / "other.csv", text.replace(",owl", ",tiger"))
    said = refused(capsys, "--resume", LAST, "--total-steps", "6", "--labels", "other.csv")
    assert "'tiger' is not a class of the run: use one of cat, dog, owl" in said
    shutil.copy("labels.csv", "other.csv")
    assert command("--resume", LAST, "--total-steps", "6", "--labels", "other.csv") == 0
    assert f"--labels {here}/labels.csv → {here}/other.csv" in capsys.readouterr().err


def test_a_table_goes_with_its_folder_in_an_evaluation(here, capsys):
    """A run that had a table is evaluated on class folders, and on their table; the results are the same."""
    assert command(*RUN, "--data-path", "mine", "--labels", "labels.csv", "--name", "run") == 0
    photographs(here / "new", count=7, seed=9)
    names = [f"{path.parent.name}/{path.name}" for path in sorted((here / "new").rglob("*.png"))]
    table(here / "new.csv", "path,label", *(f"new/{name},{name.split('/')[0]}" for name in names))
    assert command("--evaluate", "--resume", LAST, "--data-path", "new", "--name", "folders") == 0
    words = ("--data-path", "new", "--labels", "new.csv", "--name", "table")
    assert command("--evaluate", "--resume", LAST, *words) == 0
    assert (here / "results/folders/confusion.json").read_text() == (
        here / "results/table/confusion.json"
    ).read_text()
    assert (here / "results/folders/predictions.csv").read_text().count("\n") == 22


def test_columns_without_a_table_have_no_effect(capsys):
    main.parse_arguments(["--dataset", "folder", "--label-columns", "image", "class"])
    assert "ignores --label-columns" in capsys.readouterr().err
    main.parse_arguments(["--labels", "labels.csv", "--label-columns", "image", "class"])
    assert "ignores" not in capsys.readouterr().err


def test_a_table_says_the_data_set(here, capsys):
    said = refused(capsys, *RUN, "--dataset", "digits", "--labels", "labels.csv", "--name", "x")
    assert "--labels" in said and "--dataset folder" in said
    words = ["--data-path", "mine", "--labels", "labels.csv", "--label-columns", "image", "kind"]
    assert "no column 'kind'" in refused(capsys, *RUN, *words, "--name", "x")
    words[-1] = "class"
    assert command(*RUN, *words, "--name", "x", "--resume", "auto") == 0  # which starts it
    assert command("--evaluate", "--resume", "checkpoint/x_last.pth.tar") == 0
    assert load("checkpoint/x_last.pth.tar")["args"]["label_columns"] == ["image", "class"]
