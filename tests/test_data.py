"""The data sets of data.py on files that the tests write, the split, and the error sentences."""

import hashlib
import math
import pickle
import shutil
import struct
import tarfile
import threading
import time
import unicodedata
import urllib.error
import urllib.request
import zlib
from dataclasses import MISSING, fields

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import data
import main
from data import load_dataset, split_labels, write_labeled
from engine.checkpoint import upgrade
from engine.folders import image_tree, place_of, relative
from engine.images import ImageSet, channel_statistics, pixel_prints
from utils import UserError


def picture(width, height, seed=0):
    """A smooth RGB image, as photographs are: what it looks like does not depend on how it is resized."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 5, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def ramp(width, height):
    """Red grows from 0 to 255 with x and green with y: a crop shows where it was taken."""
    x = np.broadcast_to(np.linspace(0, 255, width), (height, width))
    y = np.broadcast_to(np.linspace(0, 255, height)[:, None], (height, width))
    return Image.fromarray(np.stack([x, y, np.full_like(x, 128)], axis=2).round().astype(np.uint8))


def write_tree(root, counts, size=(10, 10), suffix="png"):
    """``root/<class>/<n>.<suffix>``, counts[class] images each; returns the pixels of PNG files by path.

    Trees of other names hold other images.
    """
    first = zlib.crc32(root.name.encode()) % 10**6
    written = {}
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            path = root / name / f"{i:03d}.{suffix}"
            image = picture(*size, seed=first + len(written))
            image.save(path)
            written[str(path)] = np.asarray(image).transpose(2, 0, 1)
    return written


def refusal(*args, **kwargs):
    """The sentence with which load_dataset refuses."""
    with pytest.raises(UserError) as caught:
        load_dataset(*args, **kwargs)
    text = str(caught.value)
    assert "\n" not in text
    return text


# generated and bundled data


def test_two_moons_are_the_same_points_for_every_seed_with_noise_of_a_tenth():
    first, second = (load_dataset("twomoons", num_labeled=6, seed=seed) for seed in (0, 1))
    assert torch.equal(first.unlabeled.images, second.unlabeled.images)
    assert first.labeled_indices != second.labeled_indices
    points, targets = first.unlabeled.images, first.unlabeled.targets
    assert points.shape == (2000, 2) and points.dtype == torch.float32
    assert targets.bincount().tolist() == [1000, 1000]
    assert torch.allclose(points.mean(dim=0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(points.std(dim=0, correction=0), torch.ones(2), atol=1e-5)
    # The unscaled points have mean (1/2, 1/4), variance 3/4 and 9/16 - 1/pi, and the noise adds 0.01 to both.
    scale = torch.tensor([0.75 + 0.01, 0.5625 - 1 / math.pi + 0.01]).sqrt()
    for k, centre in enumerate([(0, 0), (1, 0.5)]):
        moon = points[targets == k] * scale + torch.tensor([0.5, 0.25])
        radius = (moon - torch.tensor(centre)).norm(dim=1)
        assert radius.mean().item() == pytest.approx(1, abs=0.02)
        assert radius.std().item() == pytest.approx(0.1, abs=0.01)
    assert first.labeled.targets.bincount().tolist() == [3, 3]
    assert first.test.targets.bincount().tolist() == [1000, 1000]
    assert not set(map(tuple, first.test.images.tolist())) & set(map(tuple, points.tolist()))
    assert (first.mean, first.std, first.size, first.crop) == ([0, 0], [1, 1], 0, "none")


def test_a_new_data_set_without_files_has_no_place(monkeypatch):
    """One function and one row of ``READERS`` make it."""

    def noise(options):
        images = torch.arange(40 * 3 * 8 * 8).view(40, 3, 8, 8).to(torch.uint8)
        parts = (ImageSet([0, 1] * 20, images, fingerprints=pixel_prints(images) + k) for k in (0, 100))
        return data._in_memory(["a", "b"], ((0.5,) * 3, (0.2,) * 3), *parts)

    monkeypatch.setitem(data.READERS, "noise", noise)
    for name in ("noise", "digits", "twomoons"):
        dataset = load_dataset(name, "elsewhere", num_labeled=20)
        assert dataset.path == dataset.record()["path"] == ""


def test_digits_are_scikit_learns_in_a_fixed_order_enlarged_bilinearly():
    values, targets = load_digits(return_X_y=True)
    dataset = load_dataset("digits", num_labeled=40, resize=8)
    order = np.random.RandomState(0).permutation(1797)
    expected = (values[order].reshape(-1, 8, 8) * 255 / 16).round()
    for part, images in ((dataset.unlabeled, expected[:1297]), (dataset.test, expected[1297:])):
        assert part.images.dtype == torch.uint8
        for channel in range(3):
            assert np.array_equal(part.images[:, channel].numpy(), images)
    assert dataset.unlabeled.targets.tolist() == targets[order][:1297].tolist()
    assert dataset.test.targets.tolist() == targets[order][1297:].tolist()

    enlarged = load_dataset("digits", num_labeled=40)
    assert enlarged.size == 16 and enlarged.unlabeled.images.shape == (1297, 3, 16, 16)
    small = values[order[7]].reshape(8, 8) * 255 / 16
    # Output pixel 5 lies at input coordinate 5.5 / 2 - 0.5 = 2.25, output pixel 8 at 3.75.
    value = 0.75 * (0.25 * small[2, 3] + 0.75 * small[2, 4]) + 0.25 * (
        0.25 * small[3, 3] + 0.75 * small[3, 4]
    )
    assert enlarged.unlabeled.images[7, 0, 5, 8].item() == pytest.approx(value, abs=0.51)
    assert not enlarged.flip and enlarged.crop == "pad"
    pixels = enlarged.unlabeled.images.double() / 255
    assert enlarged.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-9)
    assert enlarged.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-9)


# torchvision's data sets, in their true formats


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    monkeypatch.setattr(urllib.request, "urlopen", refuse)


def save_str(pickler, text):
    """Write a string as Python 2 did, which wrote the files of CIFAR: reading it needs an encoding."""
    encoded = text.encode("latin1")
    pickler.write(pickle.BINSTRING + struct.pack("<i", len(encoded)) + encoded)
    pickler.memoize(text)


def dump(path, content):
    with open(path, "wb") as file:
        pickler = pickle._Pickler(file, protocol=2)
        pickler.dispatch = {**pickler.dispatch, str: save_str}
        pickler.dump(content)


def write_cifar(root, monkeypatch, *, classes, packed):
    """A CIFAR of 2 x 20 training and 10 test images; returns (images, targets) of both parts."""
    make = torchvision.datasets.CIFAR10 if classes == 10 else torchvision.datasets.CIFAR100
    folder = root / make.base_folder
    folder.mkdir(parents=True)
    label = "labels" if classes == 10 else "fine_labels"
    random = np.random.RandomState(classes)
    names = {"train": ["data_batch_1", "data_batch_2"], "test": ["test_batch"]}
    if classes == 100:
        names = {"train": ["train"], "test": ["test"]}
    parts = []
    for part, count in (("train", 2 * classes), ("test", classes)):
        images, targets = [], []
        for name in names[part]:
            pixels = random.randint(0, 256, (count, 3072)).astype(np.uint8)
            numbers = [i % classes for i in range(count)]
            dump(folder / name, {"data": pixels, label: numbers, "coarse_labels": [0] * count})
            images.append(pixels.reshape(-1, 3, 32, 32))
            targets += numbers
        parts.append((np.concatenate(images), targets))
        monkeypatch.setattr(make, f"{part}_list", [[n, md5(folder / n)] for n in names[part]])
    key = make.meta["key"]
    dump(folder / make.meta["filename"], {key: [f"class {k}" for k in range(classes)]})
    monkeypatch.setattr(make, "meta", {**make.meta, "md5": md5(folder / make.meta["filename"])})
    if packed:
        archive = root / make.filename
        with tarfile.open(archive, "w:gz") as file:
            file.add(folder, make.base_folder)
        monkeypatch.setattr(make, "tgz_md5", md5(archive))
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return parts


@pytest.mark.parametrize(("classes", "packed"), [(10, True), (10, False), (100, True)])
def test_cifar_is_read_from_its_pickles_packed_or_not(
    tmp_path, monkeypatch, offline, capsys, classes, packed
):
    (images, targets), (test_images, test_targets) = write_cifar(
        tmp_path, monkeypatch, classes=classes, packed=packed
    )
    dataset = load_dataset(f"cifar{classes}", tmp_path, num_labeled=classes)
    assert np.array_equal(dataset.unlabeled.images.numpy(), images)
    assert dataset.unlabeled.targets.tolist() == targets
    assert np.array_equal(dataset.test.images.numpy(), test_images)
    assert dataset.test.targets.tolist() == test_targets
    assert dataset.classes == [f"class {k}" for k in range(classes)] and dataset.path == str(tmp_path)
    assert (dataset.num_classes, dataset.size, dataset.flip, dataset.crop) == (classes, 32, True, "pad")
    chosen = dataset.labeled_indices
    assert np.array_equal(dataset.labeled.images.numpy(), images[chosen])
    assert dataset.labeled.targets.tolist() == [targets[i] for i in chosen]
    assert capsys.readouterr().out == ""  # standard output is for results


def test_published_statistics_are_those_of_the_data_set(tmp_path, monkeypatch, offline):
    write_cifar(tmp_path, monkeypatch, classes=10, packed=False)
    dataset = load_dataset("cifar10", tmp_path, num_labeled=10)
    assert dataset.mean == pytest.approx([0.4914, 0.4822, 0.4465])
    assert dataset.std == pytest.approx([0.247, 0.2435, 0.2616])


def test_published_statistics_of_the_other_data_sets(tmp_path, monkeypatch, offline):
    write_cifar(tmp_path, monkeypatch, classes=100, packed=False)
    write_svhn(tmp_path, monkeypatch, {"train": 10, "test": 10})
    cifar100 = load_dataset("cifar100", tmp_path, num_labeled=100)
    assert cifar100.mean == pytest.approx([0.5071, 0.4865, 0.4409])
    assert cifar100.std == pytest.approx([0.2673, 0.2564, 0.2762])
    svhn = load_dataset("svhn", tmp_path, num_labeled=10)
    assert svhn.mean == pytest.approx([0.4377, 0.4438, 0.4728])
    assert svhn.std == pytest.approx([0.198, 0.201, 0.197])


def test_cifar_can_be_enlarged(tmp_path, monkeypatch, offline):
    (images, _), _ = write_cifar(tmp_path, monkeypatch, classes=10, packed=False)
    dataset = load_dataset("cifar10", tmp_path, num_labeled=10, resize=48)
    assert dataset.unlabeled.images.shape == (40, 3, 48, 48) and dataset.size == 48
    pillow = Image.fromarray(images[3].transpose(1, 2, 0)).resize((48, 48), Image.Resampling.BICUBIC)
    difference = dataset.unlabeled.images[3].permute(1, 2, 0).numpy().astype(int) - np.asarray(pillow)
    assert abs(difference).max() <= 1


def test_svhn_is_read_from_its_mat_files_and_never_flipped(tmp_path, monkeypatch, offline):
    parts = write_svhn(tmp_path, monkeypatch, {"train": 30, "test": 20})
    dataset = load_dataset("svhn", tmp_path, num_labeled=20)
    for image_set, (images, labels) in ((dataset.unlabeled, parts["train"]), (dataset.test, parts["test"])):
        assert np.array_equal(image_set.images.numpy(), images)
        assert image_set.targets.tolist() == labels.tolist()
    assert not dataset.flip and dataset.classes[3] == "3" and dataset.path == str(tmp_path)


def write_svhn(root, monkeypatch, counts):
    """SVHN's parts of these counts; returns {part: (images, labels)}."""
    make, random = torchvision.datasets.SVHN, np.random.RandomState(0)
    parts, entries = {}, {}
    for part, count in counts.items():
        images = random.randint(0, 256, (32, 32, 3, count)).astype(np.uint8)
        labels = np.arange(count) % 10 + 1
        path = root / f"{part}_32x32.mat"
        scipy.io.savemat(path, {"X": images, "y": labels[:, None].astype(np.uint8)})
        parts[part] = images.transpose(3, 2, 0, 1), labels % 10
        entries[part] = ["http://nowhere", path.name, md5(path)]
    monkeypatch.setattr(make, "split_list", {**make.split_list, **entries})
    return parts


def test_svhns_extra_images_are_unlabelled_ones(tmp_path, monkeypatch, offline):
    """Beside the training images that validation leaves; labels and splits are as without them."""
    parts = write_svhn(tmp_path, monkeypatch, {"train": 30, "test": 20, "extra": 50})
    plain = load_dataset("svhn", tmp_path, num_labeled=10, num_val=10)
    extra = load_dataset("svhn", tmp_path, num_labeled=10, num_val=10, svhn_extra=True)
    assert (len(plain.unlabeled), len(extra.unlabeled)) == (20, 70)
    assert np.array_equal(extra.unlabeled.images[20:].numpy(), parts["extra"][0])
    assert torch.equal(extra.unlabeled.images[:20], plain.unlabeled.images)
    assert extra.labeled_indices == plain.labeled_indices and torch.equal(
        extra.test.images, plain.test.images
    )


def write_stl10(root, monkeypatch, counts):
    """STL-10's binary files of these counts; returns {part: (N, 3, 96, 96) images}."""
    make, random = torchvision.datasets.STL10, np.random.RandomState(0)
    folder, parts, sums = root / "stl10_binary", {}, {}
    folder.mkdir()
    for part, count in counts.items():
        images = random.randint(0, 256, (count, 3, 96, 96)).astype(np.uint8)
        images.transpose(0, 1, 3, 2).tofile(folder / f"{part}_X.bin")  # column by column
        sums[part] = [[f"{part}_X.bin", md5(folder / f"{part}_X.bin")]]
        if part != "unlabeled":
            (np.arange(count) % 10 + 1).astype(np.uint8).tofile(folder / f"{part}_y.bin")
            sums[part] += [[f"{part}_y.bin", md5(folder / f"{part}_y.bin")]]
        parts[part] = images
    (folder / "class_names.txt").write_text("".join(f"class {k}\n" for k in range(10)))
    monkeypatch.setattr(make, "train_list", sums["train"] + sums["unlabeled"])
    monkeypatch.setattr(make, "test_list", sums["test"])
    return parts


def test_stl10_brings_its_unlabelled_images(tmp_path, monkeypatch, offline):
    parts = write_stl10(tmp_path, monkeypatch, {"train": 20, "test": 10, "unlabeled": 30})
    dataset = load_dataset("stl10", tmp_path, num_labeled=10)
    assert dataset.size == 96 and dataset.crop == "pad" and dataset.flip and dataset.path == str(tmp_path)
    assert dataset.classes == [f"class {k}" for k in range(10)]
    assert np.array_equal(
        dataset.unlabeled.images.numpy(), np.concatenate([parts["train"], parts["unlabeled"]])
    )
    assert dataset.unlabeled.targets.tolist() == [*[k % 10 for k in range(20)], *[-1] * 30]
    assert np.array_equal(dataset.test.images.numpy(), parts["test"])
    assert np.array_equal(dataset.labeled.images.numpy(), parts["train"][dataset.labeled_indices])
    pixels = parts["train"].astype(np.float64) / 255
    assert dataset.mean == pytest.approx(pixels.mean(axis=(0, 2, 3)))
    assert load_dataset("stl10", tmp_path, num_labeled=10, resize=48).unlabeled.images.shape[1:] == (
        3,
        48,
        48,
    )


@pytest.mark.parametrize(
    ("name", "archive"),
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100"),
        ("svhn", ".mat"),
        ("stl10", "stl10_binary"),
    ],
)
def test_missing_data_without_network_names_the_choices(tmp_path, offline, name, archive):
    text = refusal(name, tmp_path, num_labeled=40)
    for part in (archive, str(tmp_path), "digits", "twomoons", "folder", "no network in this test"):
        assert part in text


def test_a_damaged_archive_is_not_read(tmp_path, monkeypatch, offline):
    write_cifar(tmp_path, monkeypatch, classes=10, packed=True)
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(archive.read_bytes()[:-100])
    assert "damaged" in refusal("cifar10", tmp_path, num_labeled=40)


def test_one_process_downloads_while_the_others_wait(tmp_path):
    downloading, together = threading.Lock(), []

    def make(path, download):
        if not download:
            raise RuntimeError("not there")
        together.append(not downloading.acquire(blocking=False))
        time.sleep(0.2)
        downloading.release()

    def read():
        data._downloaded(make, "Images", "images.tar", str(tmp_path / "new"), [{}])

    threads = [threading.Thread(target=read) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert together == [False] * 3


# folders of images


def test_a_folder_of_small_images_is_held_in_memory(tmp_path):
    written = write_tree(tmp_path / "train", {"cat": 6, "ant": 4})
    tested = write_tree(tmp_path / "test", {"ant": 2, "cat": 3})
    dataset = load_dataset("folder", tmp_path, num_labeled=4)
    assert dataset.classes == ["ant", "cat"] and dataset.size == 10 and dataset.crop == "pad" and dataset.flip
    assert dataset.path == str(tmp_path)
    assert dataset.unlabeled.targets.tolist() == [0] * 4 + [1] * 6
    assert np.array_equal(dataset.unlabeled.images.numpy(), [written[path] for path in sorted(written)])
    assert dataset.test.targets.tolist() == [0] * 2 + [1] * 3
    assert np.array_equal(dataset.test.images.numpy(), [tested[path] for path in sorted(tested)])
    pixels = dataset.unlabeled.images.double() / 255
    assert dataset.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())
    assert dataset.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist())


def test_every_image_of_a_large_folder_is_read(tmp_path):
    """More than one thread takes at a time: the pixels are those of the file of this name."""
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        for number in range(200 if name == "train/a" else 101):
            colour = (number, 10 * len(name), 200 if name.endswith("a") else 100)
            Image.new("RGB", (2, 2), colour).save(tmp_path / name / f"{number:03}.png")
    train = load_dataset("folder", tmp_path, num_labeled=2, workers=2).unlabeled
    assert train.images[:, 0, 1, 1].tolist() == [*range(200), *range(101)]
    assert train.images[:, 2, 0, 1].tolist() == [200] * 200 + [100] * 101


def test_statistics_are_taken_from_evenly_spaced_images():
    images = torch.zeros(30000, 3, 1, 1, dtype=torch.uint8)
    images[::6] = 255  # every second one of the 10,000 that are looked at
    mean, std = channel_statistics(images)
    assert mean == pytest.approx([0.5] * 3) and std == pytest.approx([0.5] * 3)
    images[:] = 255
    mean, std = channel_statistics(images)
    assert mean == pytest.approx([1] * 3) and std == pytest.approx([1 / 255] * 3)  # never a division by zero


def test_classes_without_a_test_image_are_named(tmp_path):
    write_tree(tmp_path / "train", {"ant": 4, "bee": 4, "cow": 4})
    write_tree(tmp_path / "test", {"ant": 2, "cow": 2})
    options = {"num_labeled": 3, "resize": 10}
    notes = load_dataset("folder", tmp_path, **options).notes
    assert "these classes have no test image: bee; put some into test/" in notes
    write_tree(tmp_path / "test", {"bee": 1})
    assert not any("no test image" in note for note in load_dataset("folder", tmp_path, **options).notes)


def test_val_stands_in_for_a_missing_test_folder(tmp_path):
    write_tree(tmp_path / "train", {"a": 4, "b": 4})
    write_tree(tmp_path / "val", {"a": 1, "b": 2})
    dataset = load_dataset("folder", tmp_path, num_labeled=2)
    assert dataset.test.targets.tolist() == [0, 1, 1] and dataset.val is None
    write_tree(tmp_path / "test", {"a": 1, "b": 1})
    assert load_dataset("folder", tmp_path, num_labeled=2).test.targets.tolist() == [0, 1]


def sides(dataset):
    """Names of the training and of the test images."""
    return set(dataset.unlabeled.names), set(dataset.test.names)


def test_one_level_is_split_by_the_names_alone(tmp_path):
    """The same for every seed; files that come, go or are moved to another class move no other file."""
    counts = {"a": 60, "b": 40, "c": 30}
    write_tree(tmp_path / "all", counts)
    first = load_dataset("folder", tmp_path / "all", num_labeled=3, seed=0)
    train, test = sides(first)
    assert len(train | test) == 130 and not train & test
    assert all(name in test for name in first.test.names) and 0.1 < len(test) / 130 < 0.3
    assert sides(load_dataset("folder", tmp_path / "all", num_labeled=3, seed=1)) == (train, test)
    gone = [sorted(train)[3], sorted(test)[2]]
    for name in gone:
        (tmp_path / "all" / name).unlink()
    picture(10, 10, seed=77).save(tmp_path / "all" / "a" / "0.png")
    picture(10, 10, seed=78).save(tmp_path / "all" / "c" / "zzz.png")
    (tmp_path / "all" / "b" / "012.png").rename(tmp_path / "all" / "c" / "012-b.png")
    now = sides(load_dataset("folder", tmp_path / "all", num_labeled=3))
    assert train - now[0] <= {*gone, "b/012.png"} and test - now[1] <= {*gone, "b/012.png"}
    halves = sides(load_dataset("folder", tmp_path / "all", num_labeled=3, test_fraction=0.5))
    assert now[1] < halves[1] and 0.35 < len(halves[1]) / 130 < 0.65


def test_accents_as_a_mac_stores_them_split_the_same(tmp_path):
    """A copy from a Mac, with each accent as a character of its own: same sides, labels and validation."""
    names = [f"{letter}{number}.png" for letter in "äéñ" for number in range(20)]
    options, found = {"num_labeled": 6, "num_val": 4, "seed": 1}, []
    for form in ("NFC", "NFD"):
        for k, kind in enumerate(("Löwe", "Ente")):
            folder = tmp_path / form / unicodedata.normalize(form, kind)
            folder.mkdir(parents=True)
            for number, name in enumerate(names):
                picture(8, 8, seed=100 * k + number).save(folder / unicodedata.normalize(form, name))
        dataset = load_dataset("folder", tmp_path / form, **options)
        parts = (dataset.labeled, dataset.val, dataset.test)
        found.append([{unicodedata.normalize("NFC", name) for name in part.names} for part in parts])
    assert found[0] == found[1] and all(found[0])
    assert place_of(unicodedata.normalize("NFD", "Löwe/ä1.png")) == place_of("Löwe/ä1.png")


def test_copies_on_both_sides_stay_where_their_names_are(tmp_path):
    write_tree(tmp_path / "all", {"a": 30, "b": 30})
    train, test = sides(load_dataset("folder", tmp_path / "all", num_labeled=2))
    shutil.copy(tmp_path / "all" / sorted(test)[0], tmp_path / "all" / sorted(train)[0])
    first = load_dataset("folder", tmp_path / "all", num_labeled=2)
    again = load_dataset("folder", tmp_path / "all", num_labeled=2, record=first.record())
    assert sides(first)[1] == sides(again)[1] == test


def test_every_option_is_a_flag_with_the_same_default():
    """A field that is called otherwise would never get its flag's value."""
    flags = main.build_parser().flags
    options = [each for each in fields(data.Options) if each.name not in ("record", "only_test")]
    assert {each.name for each in options} < flags.keys()
    for each in options:
        if each.default is not MISSING:
            assert each.default == flags[each.name].default


def test_files_are_in_the_order_of_their_whole_paths(tmp_path):
    """Checkpoints know the images of some data sets by their positions."""
    names = ("a/x.png", "a-b.png", "a/1/z.png", "a/1.png", "B.png")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        picture(4, 4).save(tmp_path / name)
    files, _ = image_tree(str(tmp_path), "FOLDER")
    assert relative(files, str(tmp_path)) == ["B.png", "a-b.png", "a/1.png", "a/1/z.png", "a/x.png"]


def test_a_run_of_an_early_version_keeps_its_test_images(tmp_path):
    """Whose checkpoint lists none: they were drawn class by class, a rounded share but at least one."""
    write_tree(tmp_path, {"a": 13, "b": 2, "c": 7})
    record = {"classes": ["a", "b", "c"], "mean": [0.5] * 3, "std": [0.2] * 3, "size": 10}
    record = upgrade({"data": record})["data"]
    test = load_dataset("folder", tmp_path, num_labeled=3, record=record).test
    random, expected = np.random.RandomState(0), []
    for name, count, drawn in (("a", 13, 3), ("b", 2, 1), ("c", 7, 1)):
        expected += [f"{name}/{i:03d}.png" for i in sorted(random.permutation(count)[:drawn])]
    assert test.names == expected


def test_the_place_of_a_name_never_changes():
    """In no version and on no machine: it decides on which side an image falls."""
    places = {"a/000.png": 0.5822846876444671, "Löwe/ä1.png": 0.25904230670527806}
    assert {name: place_of(name) for name in places} == places


def test_names_are_the_same_however_the_folder_is_written(tmp_path, monkeypatch):
    write_tree(tmp_path / "tree", {"a": 2, "b": 2})
    monkeypatch.chdir(tmp_path / "tree")
    spellings = (tmp_path / "tree", f"{tmp_path}/tree/", ".", "./", "..//tree", "../tree/../tree/", "a/..")
    for root in map(str, spellings):
        files, _ = image_tree(root, "--data-path")
        assert relative(files, root) == ["a/000.png", "a/001.png", "b/000.png", "b/001.png"], root


def test_a_record_brings_back_the_images_of_its_run(tmp_path):
    """Labelled and validation images, by position or by name; of copies of one image the one of that name."""
    first = load_dataset("digits", num_labeled=10, num_val=20, seed=3, resize=8)
    again = load_dataset("digits", num_labeled=40, seed=5, resize=8, record=first.record())
    assert again.labeled_indices == first.labeled_indices and again.val_indices == first.val_indices
    assert len(again.unlabeled) == 1297 - 20 and torch.equal(again.val.images, first.val.images)

    write_tree(tmp_path / "train", {"a": 6, "b": 6})
    write_tree(tmp_path / "test", {"a": 2, "b": 2})
    shutil.copy(tmp_path / "train/a/000.png", tmp_path / "train/a/again.png")
    given = tmp_path / "labeled.txt"
    for name in ("000", "again"):
        given.write_text(f"train/a/{name}.png\ntrain/b/001.png\n")
        first = load_dataset("folder", tmp_path, num_labeled=2, num_val=4, labeled_indices=given)
        record = first.record()
        again = load_dataset("folder", tmp_path, num_labeled=4, seed=5, record=record)
        assert again.labeled.names == [f"train/a/{name}.png", "train/b/001.png"] == first.labeled.names
        assert again.val.names == first.val.names and len(again.val) == 4
        for part in (first.labeled, first.unlabeled, first.val):
            assert torch.isin(part.fingerprints, record["trained"]).all()
        assert not torch.isin(first.test.fingerprints, record["trained"]).any()


def test_a_file_name_of_two_lines_is_refused(tmp_path):
    """Lists of names have one on each line."""
    write_tree(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / "000.png").rename(tmp_path / "a" / "0\n0.png")
    assert "contains a line break: rename it" in refusal("folder", tmp_path, num_labeled=2)


def test_labelled_images_of_a_folder_depend_on_their_names(tmp_path):
    write_tree(tmp_path / "train", {"a": 20, "b": 20})
    write_tree(tmp_path / "test", {"a": 2, "b": 2})
    few = load_dataset("folder", tmp_path, num_labeled=6, num_val=4)
    more = load_dataset("folder", tmp_path, num_labeled=12)
    assert set(few.labeled.names) < set(more.labeled.names) and not set(few.labeled.names) & set(
        few.val.names
    )
    assert set(load_dataset("folder", tmp_path, num_labeled=6, seed=1).labeled.names) != set(
        few.labeled.names
    )
    write_labeled(tmp_path, few)
    assert (tmp_path / "labeled.txt").read_text().splitlines() == few.labeled.names
    unlabelled = next(name for name in few.unlabeled.names if name not in few.labeled.names)
    (tmp_path / unlabelled).unlink()
    again = load_dataset("folder", tmp_path, num_labeled=None, labeled_indices=tmp_path / "labeled.txt")
    assert again.labeled.names == few.labeled.names
    (tmp_path / "labeled.txt").write_text("3\n")
    assert "such as train/a/" in refusal(
        "folder", tmp_path, num_labeled=2, labeled_indices=tmp_path / "labeled.txt"
    )


def test_files_that_are_no_images_and_hidden_files_are_left_out(tmp_path):
    write_tree(tmp_path, {"a": 5, "b": 5})
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "a" / "._000.png").write_text("what a Mac leaves")
    (tmp_path / ".cache").mkdir()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "a" / "deep" / "er").mkdir(parents=True)
    picture(10, 10).save(tmp_path / "a" / "deep" / "er" / "one.JPG")
    write_tree(tmp_path.parent / f"{tmp_path.name}-elsewhere", {"linked": 3})
    (tmp_path / "b" / "link").symlink_to(tmp_path.parent / f"{tmp_path.name}-elsewhere" / "linked")
    dataset = load_dataset("folder", tmp_path, num_labeled=2)
    assert dataset.classes == ["a", "b"] and len(dataset.unlabeled) + len(dataset.test) == 14


def test_images_of_other_sizes_are_decoded_by_workers_unless_resized_to_64_or_less(tmp_path):
    write_tree(tmp_path, {"a": 4, "b": 4})
    picture(12, 10).save(tmp_path / "b" / "003.png")  # one of another size
    dataset = load_dataset("folder", tmp_path, num_labeled=2)
    assert not dataset.unlabeled.in_memory and dataset.size == 224 and dataset.crop == "none"
    assert len(dataset.mean) == len(dataset.std) == 3
    dataset = load_dataset("folder", tmp_path, num_labeled=2, resize=65)
    assert not dataset.unlabeled.in_memory and dataset.size == 65
    dataset = load_dataset("folder", tmp_path, num_labeled=2, resize=20)
    assert dataset.unlabeled.images.shape[1:] == (3, 20, 20) and dataset.crop == "pad"


def test_a_large_image_among_small_jpegs_is_not_taken_for_a_small_one(tmp_path):
    write_tree(tmp_path, {"a": 4, "b": 4}, size=(16, 16), suffix="jpg")
    picture(32, 32).save(tmp_path / "b" / "003.jpg")  # its decoder could reduce it to 16 x 16
    assert not load_dataset("folder", tmp_path, num_labeled=2, test_fraction=0.25).unlabeled.in_memory


def test_small_images_that_are_not_square_are_stretched(tmp_path):
    write_tree(tmp_path, {"a": 4, "b": 4}, size=(20, 12))
    ramp(20, 12).save(tmp_path / "a" / "000.png")
    dataset = load_dataset("folder", tmp_path, num_labeled=2)
    assert dataset.unlabeled.images.shape[1:] == (3, 20, 20)
    images = torch.cat([dataset.unlabeled.images, dataset.test.images])
    expected = np.asarray(ramp(20, 20)).transpose(2, 0, 1).astype(int)
    assert min(abs(image.int().numpy() - expected).mean() for image in images) < 2


def test_statistics_of_large_images_are_those_of_their_pixels(tmp_path):
    write_tree(tmp_path / "test", {"a": 1, "b": 1})
    for k, name in enumerate("ab"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (100 + i, 90), (100 * k, 50, 200)).save(tmp_path / "train" / name / f"{i}.png")
    dataset = load_dataset("folder", tmp_path, num_labeled=2)
    assert dataset.mean == pytest.approx([50 / 255, 50 / 255, 200 / 255])
    assert dataset.std == pytest.approx([50 / 255, 1 / 255, 1 / 255])


@pytest.mark.parametrize("resize", [None, 80])
def test_unlabelled_images_are_added_or_take_the_place_of_the_others(tmp_path, resize):
    write_tree(tmp_path / "data" / "train", {"a": 4, "b": 4})
    write_tree(tmp_path / "data" / "test", {"a": 1, "b": 1})
    extra = write_tree(tmp_path / "extra", {"x": 2, "y/z": 3})
    arguments = {"num_labeled": 2, "resize": resize, "unlabeled_path": tmp_path / "extra"}
    added = load_dataset("folder", tmp_path / "data", **arguments)
    assert len(added.unlabeled) == 8 + 5
    assert sorted(added.unlabeled.targets.tolist()) == [-1] * 5 + [0] * 4 + [1] * 4
    only = load_dataset("folder", tmp_path / "data", unlabeled_mode="only", **arguments)
    assert only.unlabeled.targets.tolist() == [-1] * 5
    assert len(only.labeled) == 2 and only.labeled.targets.tolist() == [0, 1]
    if resize is None:
        assert np.array_equal(only.unlabeled.images.numpy(), [extra[path] for path in sorted(extra)])
    else:
        assert only.unlabeled.files == sorted(extra)


@pytest.mark.parametrize("mode", ["add", "only"])
def test_validation_images_among_the_unlabelled_ones_are_left_out(tmp_path, mode):
    held_out = load_dataset("digits", num_labeled=10, num_val=20, resize=8).val
    for i, image in enumerate(held_out.images[:7].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    picture(8, 8, seed=5).save(tmp_path / "other.png")
    options = {"num_labeled": 10, "num_val": 20, "resize": 8, "unlabeled_path": tmp_path}
    dataset = load_dataset("digits", unlabeled_mode=mode, **options)
    assert len(dataset.unlabeled) == (1 if mode == "only" else 1297 - 20 + 1)
    seen = {image.numpy().tobytes() for image in dataset.unlabeled.images}
    assert not seen & {image.numpy().tobytes() for image in held_out.images}
    assert np.asarray(picture(8, 8, seed=5)).transpose(2, 0, 1).tobytes() in seen


@pytest.mark.parametrize("resize", [None, 80])
def test_validation_images_of_a_folder_among_the_unlabelled_ones_are_left_out(tmp_path, resize):
    """Whether they are in memory or not."""
    write_tree(tmp_path / "data" / "train", {"a": 6, "b": 6})
    write_tree(tmp_path / "data" / "test", {"a": 1, "b": 1})
    options = {"num_labeled": 2, "num_val": 4, "resize": resize}
    held_out = load_dataset("folder", tmp_path / "data", **options).val
    write_tree(tmp_path / "extra", {"x": 3})
    for i, name in enumerate(held_out.names[:3]):
        shutil.copy(tmp_path / "data" / name, tmp_path / "extra" / f"copy-{i}.png")
    extra = {"unlabeled_path": tmp_path / "extra", "unlabeled_mode": "only"}
    dataset = load_dataset("folder", tmp_path / "data", **options, **extra)
    assert dataset.val.names == held_out.names and len(dataset.unlabeled) == 3
    assert not torch.isin(dataset.unlabeled.fingerprints, held_out.fingerprints).any()


def test_unlabelled_images_that_are_all_test_images_are_refused(tmp_path):
    test = load_dataset("digits", num_labeled=10).test
    for i, image in enumerate(test.images[:3].permute(0, 2, 3, 1).numpy()):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    for mode in ("add", "only"):
        text = refusal("digits", num_labeled=10, unlabeled_path=tmp_path, unlabeled_mode=mode)
        assert "are test or validation images" in text


def test_mistakes_with_folders_get_a_sentence(tmp_path):
    assert "no folder" in refusal("folder", tmp_path / "nothing", num_labeled=2)
    (tmp_path / "empty").mkdir()
    assert "no class folders" in refusal("folder", tmp_path / "empty", num_labeled=2)
    (tmp_path / "bare" / "a").mkdir(parents=True)
    assert "only one class folder, 'a'" in refusal("folder", tmp_path / "bare", num_labeled=2)
    (tmp_path / "bare" / "b").mkdir()
    assert "no images" in refusal("folder", tmp_path / "bare", num_labeled=2)
    write_tree(tmp_path / "single", {"a": 3, "b": 1})
    assert "none of the 4 images" in refusal("folder", tmp_path / "single", num_labeled=2, test_fraction=1e-6)
    assert "--test-fraction 1.5" in refusal("folder", tmp_path / "single", num_labeled=2, test_fraction=1.5)
    write_tree(tmp_path / "half" / "train", {"a": 3, "b": 3})
    assert "neither test/ nor val/" in refusal("folder", tmp_path / "half", num_labeled=2)
    write_tree(tmp_path / "half" / "test", {"a": 3, "other": 3})
    assert "class 'other'" in refusal("folder", tmp_path / "half", num_labeled=2)
    write_tree(tmp_path / "rest" / "val", {"a": 3, "b": 3})
    assert "no train/" in refusal("folder", tmp_path / "rest", num_labeled=2)
    assert "no folder 'train'" in refusal("imagenet", tmp_path / "rest", num_labeled=2)
    write_tree(tmp_path / "gap" / "train", {"a": 3, "b": 3})
    write_tree(tmp_path / "gap" / "test", {"a": 3, "b": 3})
    (tmp_path / "gap" / "train" / "c").mkdir()
    assert "class 'c' has no training images" in refusal("folder", tmp_path / "gap", num_labeled=0.5)
    (tmp_path / "flat" / "train").mkdir(parents=True)
    (tmp_path / "flat" / "test").mkdir()
    picture(9, 9).save(tmp_path / "flat" / "train" / "image.png")
    assert "no class folders" in refusal("folder", tmp_path / "flat", num_labeled=2)


def test_mistakes_with_other_arguments_get_a_sentence(tmp_path):
    assert "'mnist' is not known" in refusal("mnist", num_labeled=10)
    assert "0 pixels" in refusal("digits", num_labeled=10, resize=0)
    assert "two moons" in refusal("twomoons", num_labeled=6, unlabeled_path=tmp_path)
    assert "no images" in refusal("digits", num_labeled=10, unlabeled_path=tmp_path)
    assert "no folder" in refusal("digits", num_labeled=10, unlabeled_path=tmp_path / "nothing")


# unreadable files


def damage(folder):
    """Three files that are no images, in the ways of the world; returns their paths."""
    paths = [folder / name for name in ("empty.jpg", "text.jpg", "torn.jpg")]
    paths[0].write_bytes(b"")
    paths[1].write_text("<html>404 not found</html>")
    picture(200, 200, seed=9).save(paths[2], quality=95)
    paths[2].write_bytes(paths[2].read_bytes()[:1500])
    return [str(path) for path in paths]


@pytest.mark.parametrize("kind", range(3))
@pytest.mark.parametrize("resize", [20, 80])
def test_an_unreadable_image_is_named(tmp_path, kind, resize):
    write_tree(tmp_path / "train", {"a": 3, "b": 3})
    write_tree(tmp_path / "test", {"a": 3, "b": 3})
    paths = damage(tmp_path)
    bad = tmp_path / "train" / "a" / "bad.jpg"
    shutil.copy(paths[kind], bad)
    text = refusal("folder", tmp_path, num_labeled=2, resize=resize)
    assert str(bad) in text and "--skip-unreadable" in text


def test_unreadable_small_images_are_skipped_and_counted_if_asked(tmp_path, capsys):
    write_tree(tmp_path / "train", {"a": 3, "b": 4})
    write_tree(tmp_path / "test", {"a": 3, "b": 3})
    bad = damage(tmp_path / "train" / "a")
    dataset = load_dataset("folder", tmp_path, num_labeled=2, resize=20, skip_unreadable=True)
    assert dataset.unlabeled.targets.tolist() == [0] * 3 + [1] * 4
    captured = capsys.readouterr()
    assert "skipped 3 of 10 images" in captured.err and captured.out == ""
    assert all(path in captured.err for path in bad)


def test_the_size_of_a_folder_is_that_of_its_first_readable_image(tmp_path):
    write_tree(tmp_path / "train", {"a": 3, "b": 3})
    write_tree(tmp_path / "test", {"a": 3, "b": 3})
    (tmp_path / "train" / "a" / "000.png").write_bytes(b"")
    dataset = load_dataset("folder", tmp_path, num_labeled=2, skip_unreadable=True)
    assert dataset.unlabeled.images.shape == (5, 3, 10, 10)


def test_a_folder_of_nothing_but_damage_is_refused_although_skipping(tmp_path):
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            damage(tmp_path / part / name)
    assert "none of the 6 images can be read" in refusal(
        "folder", tmp_path, num_labeled=2, skip_unreadable=True
    )


# the split

TARGETS = [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]


def test_a_split_never_changes():
    assert split_labels(TARGETS, 6, 3, 3, seed=0) == ([0, 1, 5, 6, 7, 11], [3, 4, 14])
    assert split_labels(TARGETS, 6, 3, 3, seed=1) == ([1, 3, 6, 7, 8, 11], [5, 12, 13])
    assert load_dataset("digits", num_labeled=40, seed=0).labeled_indices == [
        66,
        69,
        122,
        126,
        131,
        166,
        168,
        199,
        217,
        227,
        279,
        354,
        360,
        404,
        430,
        574,
        606,
        612,
        636,
        747,
        776,
        804,
        823,
        850,
        943,
        968,
        1000,
        1001,
        1049,
        1068,
        1106,
        1109,
        1117,
        1136,
        1143,
        1218,
        1245,
        1256,
        1275,
        1289,
    ]
    assert load_dataset("twomoons", num_labeled=6, seed=3).labeled_indices == [
        642,
        762,
        909,
        1565,
        1768,
        1987,
    ]


def test_a_split_is_even_over_the_classes_without_overlap_and_grows_with_the_count():
    targets = np.random.RandomState(5).randint(0, 4, 200)
    few, few_val = split_labels(targets, 8, 12, 4, seed=3)
    many, _ = split_labels(targets, 40, 12, 4, seed=3)
    assert np.bincount(targets[few]).tolist() == [2] * 4 and np.bincount(targets[few_val]).tolist() == [3] * 4
    assert not set(few) & set(few_val)
    assert set(few) < set(many)
    assert split_labels(targets, 8, 0, 4, seed=3) == (few, [])
    assert few == sorted(few) and split_labels(targets, 8, 0, 4, seed=4)[0] != few


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0.1, [10, 3, 1]),
        (1e-3, [1, 1, 1]),
        (0.25, [25, 8, 1]),
        (6, [2, 2, 2]),
        (133, [100, 30, 3]),
        (1.0, [100, 30, 3]),
    ],
)
def test_counts_and_fractions_with_classes_of_unequal_size(number, expected):
    targets = np.repeat([0, 1, 2], [100, 30, 3])
    assert np.bincount(targets[split_labels(targets, number, 0, 3, 0)[0]]).tolist() == expected


def test_all_labels_but_the_validation_images():
    labeled, val = split_labels(TARGETS, 1.0, 6, 3, 0)
    assert len(labeled) == 9 and len(val) == 6 and sorted(labeled + val) == list(range(15))


def test_counts_that_cannot_be_drawn_get_a_sentence():
    def refused(*args, **kwargs):
        with pytest.raises(UserError) as caught:
            split_labels(*args, **kwargs)
        return str(caught.value)

    assert "--num-labeled 7 cannot be divided evenly among the 3 classes (0, 1, 2): use 6 or 9" in refused(
        TARGETS, 7, 0, 3, 0
    )
    assert "use 3, or" in refused(TARGETS, 2, 0, 3, 0)
    assert "--num-val 4 cannot be divided evenly" in refused(TARGETS, 6, 4, 3, 0)
    text = refused([0, 0, 0, 1, 1, 1, 2], 6, 0, 3, 0, classes=["ant", "bee", "cat"])
    assert "class 'cat' has 1 training images, too few for 2 labelled and 0 validation" in text
    assert "class '0' has 5 training images, too few for 3 labelled and 4" in refused(TARGETS, 9, 12, 3, 0)
    assert "class '1' has no training images" in refused([0, 0, 2, 2], 0.5, 0, 3, 0)


def test_validation_images_are_neither_labelled_nor_unlabelled():
    dataset = load_dataset("digits", num_labeled=40, num_val=100)
    assert (len(dataset.labeled), len(dataset.val), len(dataset.unlabeled)) == (40, 100, 1197)
    assert dataset.val.targets.bincount().tolist() == [10] * 10
    known = {
        image.numpy().tobytes() for image in torch.cat([dataset.labeled.images, dataset.unlabeled.images])
    }
    held_out = {image.numpy().tobytes() for image in dataset.val.images}
    assert len(held_out) == 100 and not known & held_out
    assert {image.numpy().tobytes() for image in dataset.labeled.images} < known


def test_labelled_positions_can_be_written_and_given_back(tmp_path):
    path = tmp_path / "labeled_indices.txt"
    first = load_dataset("digits", num_labeled=40, num_val=100, seed=7)
    write_labeled(tmp_path, first)
    assert path.read_text().splitlines() == [str(i) for i in first.labeled_indices]
    again = load_dataset("digits", num_labeled=None, num_val=100, seed=7, labeled_indices=path)
    assert again.labeled_indices == first.labeled_indices
    assert torch.equal(again.labeled.images, first.labeled.images)
    assert torch.equal(again.val.images, first.val.images)
    other = load_dataset("digits", num_labeled=None, seed=8, labeled_indices=path)
    assert other.labeled_indices == first.labeled_indices


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("0\n1\n2\nx7\n", "line 4"),
        ("0\n1.5\n", "line 2"),
        ("-1\n", "line 1"),
        ("0\n2000\n", "0 to 1999"),
        ("5\n1500\n5\n", "position 5 twice"),
        ("5\n6\n", "no image of class 'lower moon'"),
        ("", "no image of class"),
    ],
)
def test_a_wrong_file_of_labelled_positions_gets_a_sentence(tmp_path, content, complaint):
    path = tmp_path / "indices.txt"
    path.write_text(content)
    text = refusal("twomoons", num_labeled=6, labeled_indices=path)
    assert complaint in text and str(path) in text


def test_a_missing_file_of_labelled_positions_gets_a_sentence(tmp_path):
    assert "No such file" in refusal("twomoons", num_labeled=6, labeled_indices=tmp_path / "none.txt")
