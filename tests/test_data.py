"""The data sets of data.py on files that the tests write, the split, the loaders, and the error sentences."""

import hashlib
import math
import pickle
import shutil
import struct
import tarfile
import threading
import urllib.error
import urllib.request
import zlib

import numpy as np
import pytest
import scipy.io
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_digits

import data
from data import (
    TrainLoader,
    batches,
    load_dataset,
    read_crop,
    read_image,
    split_labels,
    write_labeled,
)
from runtime import Runtime, UserError


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def process(rank=0, world_size=1):
    """A CPU runtime that believes to be one of several processes."""
    runtime = Runtime("cpu")
    runtime.rank, runtime.world_size = rank, world_size
    return runtime


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
    assert dataset.classes == [f"class {k}" for k in range(classes)]
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
    assert not dataset.flip and dataset.classes[3] == "3"


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
    assert dataset.size == 96 and dataset.crop == "pad" and dataset.flip
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
    entered = threading.Event()

    def other():
        with data._alone(tmp_path):
            entered.set()

    thread = threading.Thread(target=other)
    with data._alone(tmp_path):
        thread.start()
        assert not entered.wait(0.2)
    thread.join(timeout=30)
    assert entered.is_set()


# image files


@pytest.mark.parametrize(
    ("mode", "suffix", "value", "colour"),
    [
        ("L", "png", 77, (77, 77, 77)),
        ("1", "png", 1, (255, 255, 255)),
        ("P", "png", (10, 200, 30), (10, 200, 30)),
        ("RGBA", "png", (10, 200, 30, 255), (10, 200, 30)),
        ("RGBA", "png", (10, 200, 30, 0), (255, 255, 255)),
        ("RGBA", "png", (0, 0, 0, 51), (204, 204, 204)),
        ("LA", "png", (77, 255), (77, 77, 77)),
        ("CMYK", "tiff", (255, 0, 0, 0), (0, 255, 255)),
        ("CMYK", "jpg", (0, 255, 255, 0), (255, 0, 0)),
        ("I;16", "png", 200 * 257, (200, 200, 200)),
        ("I;16", "tiff", 200 * 257, (200, 200, 200)),
        ("RGB", "bmp", (10, 200, 30), (10, 200, 30)),
        ("RGB", "ppm", (10, 200, 30), (10, 200, 30)),
    ],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix, value, colour):
    path = tmp_path / f"image.{suffix}"
    image = Image.new("RGB", (8, 8), value).quantize(4) if mode == "P" else Image.new(mode, (8, 8), value)
    image.save(path)
    with Image.open(path) as file:
        assert file.mode == mode
    for crop in ("pad", "none"):
        read = read_image(path, 8, crop)
        assert read.shape == (3, 8, 8) and read.dtype == torch.uint8
        assert (read.int() - torch.tensor(colour)[:, None, None]).abs().max() <= (2 if suffix == "jpg" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_their_exif_orientation_says(tmp_path, orientation):
    upright = ramp(48, 32)
    stored = {  # how a camera stores the upright image for each value of the tag
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[data.ORIENTATION] = orientation
    upright.save(tmp_path / "upright.jpg", quality=95)
    stored.save(tmp_path / "stored.jpg", quality=95, exif=exif)
    for read in (
        lambda path: read_image(path, 32, "pad"),
        lambda path: read_image(path, 24, "none"),
        lambda path: read_crop(path, 24, np.random.default_rng(3)),
    ):
        difference = read(tmp_path / "stored.jpg").int() - read(tmp_path / "upright.jpg").int()
        assert difference.abs().max() <= 6


@pytest.mark.parametrize("size", [(300, 200), (1200, 900)])  # decoded whole, and at reduced scale
@pytest.mark.parametrize("turned", [False, True])
def test_a_training_crop_shows_its_box(tmp_path, size, turned):
    width, height = size
    image, exif = ramp(width, height), Image.Exif()
    exif[data.ORIENTATION] = 6 if turned else 1
    (image.transpose(Image.Transpose.ROTATE_90) if turned else image).save(tmp_path / "a.jpg", exif=exif)
    for seed in range(8):
        left, top, w, h = data.random_crop_box(width, height, np.random.default_rng(seed))
        crop = read_crop(tmp_path / "a.jpg", 32, np.random.default_rng(seed)).float()
        x = (left + (torch.arange(32) + 0.5) * w / 32) / width * 255
        y = (top + (torch.arange(32) + 0.5) * h / 32) / height * 255
        assert (crop[0].mean(dim=0) - x).abs().mean() < 3
        assert (crop[1].mean(dim=1) - y).abs().mean() < 3


def test_jpegs_are_decoded_at_reduced_scale_where_the_crop_allows_it(tmp_path, monkeypatch):
    picture(1600, 1200).save(tmp_path / "large.jpg")
    exif = Image.Exif()
    exif[data.ORIENTATION] = 6
    picture(1600, 400).save(tmp_path / "turned.jpg", exif=exif)
    decoded = []
    original = data.upright_rgb
    monkeypatch.setattr(data, "upright_rgb", lambda image: decoded.append(image.size) or original(image))
    read_image(tmp_path / "large.jpg", 64, "none")  # its box of 1050 pixels becomes 131 at 1/8
    read_image(tmp_path / "large.jpg", 224, "none")  # and 262 at 1/4
    read_image(tmp_path / "large.jpg", 600, "none")
    read_image(tmp_path / "large.jpg", 64, "pad")
    read_image(tmp_path / "turned.jpg", 64, "none")  # its box of 350 pixels becomes 87 at 1/4
    assert decoded == [(200, 150), (400, 300), (1600, 1200), (200, 150), (400, 100)]


@pytest.mark.parametrize("size", [(500, 375), (231, 333), (1400, 1000), (40, 30)])
def test_evaluation_resizes_the_short_side_to_256_and_crops_224(tmp_path, size):
    transforms = torchvision.transforms
    picture(*size).save(tmp_path / "a.jpg", quality=95)
    with Image.open(tmp_path / "a.jpg") as image:
        bicubic = transforms.InterpolationMode.BICUBIC
        reference = transforms.CenterCrop(224)(transforms.Resize(256, bicubic)(image))
    difference = read_image(tmp_path / "a.jpg", 224, "none").permute(1, 2, 0).int().numpy() - np.asarray(
        reference
    )
    assert abs(difference).mean() < 2


def test_random_crops_have_the_usual_areas_and_ratios():
    random = np.random.default_rng(0)
    boxes = np.array([data.random_crop_box(400, 300, random) for _ in range(2000)])
    left, top, w, h = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= 400).all() and (top + h <= 300).all()
    area, ratio = w * h / 120000, w / h
    assert area.min() > 0.075 and area.min() < 0.1 and area.max() > 0.95
    assert ratio.min() > 0.73 and ratio.min() < 0.77 and ratio.max() > 1.3 and ratio.max() < 1.36
    assert left.min() == 0 and (left + w).max() == 400
    for extreme in ((1, 1), (1000, 3), (3, 1000)):
        left, top, w, h = data.random_crop_box(*extreme, random)
        assert min(left, top) >= 0 and min(w, h) >= 1
        assert left + w <= extreme[0] and top + h <= extreme[1]


# folders of images


def test_a_folder_of_small_images_is_held_in_memory(tmp_path):
    written = write_tree(tmp_path / "train", {"cat": 6, "ant": 4})
    tested = write_tree(tmp_path / "test", {"ant": 2, "cat": 3})
    dataset = load_dataset("folder", tmp_path, num_labeled=4)
    assert dataset.classes == ["ant", "cat"] and dataset.size == 10 and dataset.crop == "pad" and dataset.flip
    assert dataset.unlabeled.targets.tolist() == [0] * 4 + [1] * 6
    assert np.array_equal(dataset.unlabeled.images.numpy(), [written[path] for path in sorted(written)])
    assert dataset.test.targets.tolist() == [0] * 2 + [1] * 3
    assert np.array_equal(dataset.test.images.numpy(), [tested[path] for path in sorted(tested)])
    pixels = dataset.unlabeled.images.double() / 255
    assert dataset.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist())
    assert dataset.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist())


def test_statistics_are_taken_from_evenly_spaced_images():
    images = torch.zeros(30000, 3, 1, 1, dtype=torch.uint8)
    images[::6] = 255  # every second one of the 10,000 that are looked at
    mean, std = data.channel_statistics(images)
    assert mean == pytest.approx([0.5] * 3) and std == pytest.approx([0.5] * 3)
    images[:] = 255
    mean, std = data.channel_statistics(images)
    assert mean == pytest.approx([1] * 3) and std == pytest.approx([1 / 255] * 3)  # never a division by zero


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
    batch = next(TrainLoader(added, 1, 13, 0, process(), workers=0))
    assert sorted(batch.targets_u.tolist()) == [-1] * 5 + [0] * 4 + [1] * 4
    batch = next(TrainLoader(only, 1, 5, 0, process(), workers=0))
    assert batch.images_u.shape[0] == 5 and batch.targets_u is None


def test_mistakes_with_folders_get_a_sentence(tmp_path):
    assert "no folder" in refusal("folder", tmp_path / "nothing", num_labeled=2)
    (tmp_path / "empty").mkdir()
    assert "no class folders" in refusal("folder", tmp_path / "empty", num_labeled=2)
    (tmp_path / "bare" / "a").mkdir(parents=True)
    assert "only one class folder, 'a'" in refusal("folder", tmp_path / "bare", num_labeled=2)
    (tmp_path / "bare" / "b").mkdir()
    assert "no images" in refusal("folder", tmp_path / "bare", num_labeled=2)
    write_tree(tmp_path / "single", {"a": 3, "b": 1})
    assert "no training images" in refusal("folder", tmp_path / "single", num_labeled=2, test_fraction=0.999)
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
    assert "seed -1" in refusal("digits", num_labeled=10, seed=-1)
    assert "0 pixels" in refusal("digits", num_labeled=10, resize=0)
    assert "'replace'" in refusal("digits", num_labeled=10, unlabeled_mode="replace")
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
    assert "skipped 3 unreadable of 10 images" in captured.err and captured.out == ""
    assert all(path in captured.err for path in bad)


def test_the_size_of_a_folder_is_that_of_its_first_readable_image(tmp_path):
    write_tree(tmp_path / "train", {"a": 3, "b": 3})
    write_tree(tmp_path / "test", {"a": 3, "b": 3})
    (tmp_path / "train" / "a" / "000.png").write_bytes(b"")
    dataset = load_dataset("folder", tmp_path, num_labeled=2, skip_unreadable=True)
    assert dataset.unlabeled.images.shape == (5, 3, 10, 10)


def large_tree_with_damage(tmp_path):
    """A tree of larger images whose damaged files are not looked at before they are drawn."""
    write_tree(tmp_path / "train", {"a": 3, "b": 3}, size=(70, 70), suffix="jpg")
    write_tree(tmp_path / "val", {"a": 3, "b": 3}, size=(70, 70), suffix="jpg")
    return damage(tmp_path / "train" / "a"), damage(tmp_path / "val" / "b")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_that_meets_an_unreadable_image_stops_the_run_with_its_name(tmp_path, workers):
    in_train, in_val = large_tree_with_damage(tmp_path)
    dataset = load_dataset("imagenet", tmp_path, num_labeled=2, resize=16, workers=workers)
    with pytest.raises(UserError) as caught:
        next(TrainLoader(dataset, 1, 9, 0, process(), workers=workers))
    assert any(path in str(caught.value) for path in in_train) and "\n" not in str(caught.value)
    with pytest.raises(UserError) as caught:
        list(batches(dataset.test, 4, "cpu"))
    assert in_val[0] in str(caught.value)


def test_unreadable_large_images_are_replaced_in_training_and_masked_in_evaluation(tmp_path, capsys):
    bad_train, bad_val = large_tree_with_damage(tmp_path)
    dataset = load_dataset("imagenet", tmp_path, num_labeled=9, resize=16, workers=0, skip_unreadable=True)
    loader = TrainLoader(dataset, 9, 1, 0, process(), workers=0)
    for _ in range(4):
        batch = next(loader)
        assert batch.images_l.shape == batch.images_u.shape == (9, 3, 16, 16)
        for images, targets in (batch[:2], batch[2:]):
            assert (images.flatten(1).float().std(dim=1) > 0).all()  # no empty image among them
            assert targets.bincount().sum() == 9 and targets.tolist().count(1) >= 3
    lines = capsys.readouterr().err.splitlines()
    assert sum(any(path in line for path in bad_train) for line in lines) == 3 == len(lines)  # once per file
    assert "3 so far" in lines[-1]
    images, _, mask = (torch.cat(parts) for parts in zip(*batches(dataset.test, 4, "cpu"), strict=True))
    listed = [path in bad_val for path in dataset.test.files]
    assert mask.tolist()[:9] == [0.0 if bad else 1.0 for bad in listed] and sum(listed) == 3
    assert (images[mask == 0] == 0).all()


def test_a_folder_of_nothing_but_damage_is_refused_although_skipping(tmp_path):
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            damage(tmp_path / part / name)
    assert "none of 6 images" in refusal("folder", tmp_path, num_labeled=2, skip_unreadable=True)


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
        ("0.1", [10, 3, 1]),
        (0.1, [10, 3, 1]),
        ("1e-3", [1, 1, 1]),
        ("0.25", [25, 8, 1]),
        ("6", [2, 2, 2]),
        (133, [100, 30, 3]),
        ("1.0", [100, 30, 3]),
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

    assert "--num-labeled 7 does not divide by the 3 classes (0, 1, 2): use 6 or 9" in refused(
        TARGETS, 7, 0, 3, 0
    )
    assert "use 3, or" in refused(TARGETS, 2, 0, 3, 0)
    assert "--num-val 4 does not divide" in refused(TARGETS, 6, 4, 3, 0)
    text = refused([0, 0, 0, 1, 1, 1, 2], 6, 0, 3, 0, classes=["ant", "bee", "cat"])
    assert "class 'cat' has 1 training images, too few for 2 labelled and 0 validation" in text
    assert "class '0' has 5 training images, too few for 3 labelled and 4" in refused(TARGETS, 9, 12, 3, 0)
    assert "class '1' has no training images" in refused([0, 0, 2, 2], 0.5, 0, 3, 0)
    for number in ("many", "-3", -3, "1.5", 1.5, "0.0", None, "nan"):
        assert f"--num-labeled {number} is neither" in refused(TARGETS, number, 0, 3, 0)
    assert "leaves no labels" in refused(TARGETS, 0, 0, 3, 0)


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


# loaders in memory


def numbered(n, num_classes=2):
    """A data set whose image i has the value i in every pixel: batches tell what was drawn."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 2, 2).contiguous()
    everything = data.ImageSet(torch.arange(n) % num_classes, images)
    labeled = list(range(min(6, n)))
    return data.Dataset(
        *("numbered", ["a", "b"], [0.5] * 3, [0.2] * 3, False, 2, "pad"),
        labeled=everything.subset(labeled),
        unlabeled=everything,
        val=None,
        test=everything,
        labeled_indices=labeled,
    )


def drawn(images):
    return images[:, 0, 0, 0].tolist()


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_batch_holds_images_with_their_targets():
    batch = next(TrainLoader(numbered(50), 4, 3, 0, process()))
    assert batch.images_l.shape == (4, 3, 2, 2) and batch.images_u.shape == (12, 3, 2, 2)
    assert batch.images_l.dtype == batch.images_u.dtype == torch.uint8
    assert batch.targets.dtype == batch.targets_u.dtype == torch.int64
    assert [i % 2 for i in drawn(batch.images_l)] == batch.targets.tolist()
    assert [i % 2 for i in drawn(batch.images_u)] == batch.targets_u.tolist()
    assert max(drawn(batch.images_l)) < 6


def test_without_unlabelled_images_there_are_none():
    batch = next(TrainLoader(numbered(50), 4, 0, 0, process()))
    assert batch.images_u is None and batch.targets_u is None and len(batch.images_l) == 4


@pytest.mark.parametrize("n", [40, 50, 7])
def test_an_epoch_draws_each_image_once_and_epochs_differ(n):
    loader = TrainLoader(numbered(n), 2, 5, 0, process())
    stream = [i for _ in range(3 * n) for i in drawn(next(loader).images_u)]
    epochs = [stream[start : start + n] for start in range(0, 30 * n, n)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 30
    loader = TrainLoader(numbered(n), 2, 5, 0, process())
    labelled = [i for _ in range(9) for i in drawn(next(loader).images_l)]
    assert len(labelled) == 18
    assert all(sorted(labelled[start : start + 6]) == list(range(6)) for start in (0, 6, 12))


def test_labelled_batches_larger_than_the_labelled_set_are_drawn_without_end():
    batch = next(TrainLoader(numbered(50), 64, 1, 0, process()))
    counts = np.bincount(drawn(batch.images_l), minlength=6)
    assert counts.sum() == 64 and counts.min() >= 10 and counts.max() <= 11


def test_labelled_and_unlabelled_images_are_shuffled_independently():
    loader = TrainLoader(numbered(6), 6, 1, 0, process())
    orders = [(drawn(batch.images_l), drawn(batch.images_u)) for batch in (next(loader) for _ in range(10))]
    assert sum(first == second for first, second in orders) <= 1


def test_the_seed_decides_the_order():
    first, again, other = (next(TrainLoader(numbered(50), 4, 7, seed, process())) for seed in (0, 0, 1))
    assert same(first, again) and drawn(first.images_u) != drawn(other.images_u)


def test_a_loader_continues_exactly_where_another_stopped():
    unbroken = TrainLoader(numbered(50), 4, 3, 0, process())
    for _ in range(23):
        next(unbroken)
    state = unbroken.state_dict()
    resumed = TrainLoader(numbered(50), 4, 3, 0, process())
    resumed.load_state_dict(state)
    assert resumed.position == unbroken.position == 23
    for _ in range(30):
        assert same(next(unbroken), next(resumed))
        noise = [torch.rand(5, generator=loader.generator) for loader in (unbroken, resumed)]
        assert torch.equal(*noise)


def test_the_generator_is_seeded_anew_for_every_step_and_process():
    numbers = []
    for rank in (0, 1):
        loader = TrainLoader(numbered(50), 4, 3, 0, process(rank, 2))
        for _ in range(2):
            next(loader)
            numbers.append(torch.rand(1, generator=loader.generator).item())
            torch.rand(1 + rank, generator=loader.generator)  # more or fewer draws do not move the next step
    loader = TrainLoader(numbered(50), 4, 3, 0, process(1, 2))
    next(loader)
    next(loader)
    assert len(set(numbers)) == 4
    assert torch.rand(1, generator=loader.generator).item() == numbers[3]


def test_two_processes_draw_what_one_with_twice_the_batch_draws():
    whole = TrainLoader(numbered(50), 8, 3, 0, process())
    halves = [TrainLoader(numbered(50), 4, 3, 0, process(rank, 2)) for rank in (0, 1)]
    for _ in range(20):
        expected, first, second = next(whole), next(halves[0]), next(halves[1])
        assert same(expected, [torch.cat(pair) for pair in zip(first, second, strict=True)])


# loaders from disk


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """An ImageNet tree of 20 JPEGs: odd sizes, grey and CMYK images, a turned one."""
    root = tmp_path_factory.mktemp("imagenet")
    random = np.random.RandomState(0)
    for i in range(20):
        folder = root / ("train" if i < 14 else "val") / ("n01440764", "n01443537")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        image, exif = picture(random.randint(30, 400), random.randint(30, 300), seed=i), Image.Exif()
        if i in (3, 15):
            image = image.convert("L")
        if i in (4, 16):
            image = image.convert("CMYK")
        exif[data.ORIENTATION] = 6 if i == 5 else 1
        image.save(folder / f"ILSVRC_{i:02d}.JPEG", exif=exif)
    return root


def test_imagenet_keeps_files_and_its_layout(photographs):
    dataset = load_dataset("imagenet", photographs, num_labeled="0.3", resize=48, workers=0)
    assert dataset.classes == ["n01440764", "n01443537"]
    assert (len(dataset.unlabeled), len(dataset.test), dataset.size) == (14, 6, 48)
    assert dataset.labeled.targets.tolist() == [0, 0, 1, 1]  # 0.3 of 7 images of each class
    assert dataset.mean == pytest.approx([0.485, 0.456, 0.406]) and dataset.crop == "none" and dataset.flip
    for path, target in zip(dataset.unlabeled.files, dataset.unlabeled.targets.tolist(), strict=True):
        assert dataset.classes[target] in path and "train" in path
    assert dataset.labeled.files == [dataset.unlabeled.files[i] for i in dataset.labeled_indices]
    assert load_dataset("imagenet", photographs, num_labeled=2).size == 224


def test_any_number_of_workers_gives_the_same_batches_and_resuming_continues(photographs):
    dataset = load_dataset("imagenet", photographs, num_labeled=4, resize=32)
    expected = TrainLoader(dataset, 3, 12, 0, process(), workers=0)
    expected = [next(expected) for _ in range(4)]
    assert expected[0].images_l.shape == (3, 3, 32, 32) and expected[0].images_u.shape == (36, 3, 32, 32)
    assert expected[0].images_u.dtype == torch.uint8 and expected[0].images_u.is_contiguous()
    for workers in (1, 2):
        loader = TrainLoader(dataset, 3, 12, 0, process(), workers=workers)
        assert all(same(batch, next(loader)) for batch in expected)
    resumed = TrainLoader(dataset, 3, 12, 0, process(), workers=1)
    next(resumed)
    resumed.load_state_dict({"position": 2})
    assert all(same(batch, next(resumed)) for batch in expected[2:])
    other = TrainLoader(dataset, 3, 12, 1, process(), workers=0)
    assert not torch.equal(next(other).images_u, expected[0].images_u)


def test_each_time_an_image_is_drawn_its_crop_is_another(photographs):
    dataset = load_dataset("imagenet", photographs, num_labeled=2, resize=16)
    batch = next(TrainLoader(dataset, 8, 0, 0, process(), workers=0))
    assert batch.targets.bincount().tolist() == [4, 4]
    assert len({image.numpy().tobytes() for image in batch.images_l}) == 8


def test_processes_share_one_shuffle_of_files(photographs):
    dataset = load_dataset("imagenet", photographs, num_labeled=4, resize=16)
    whole = TrainLoader(dataset, 2, 7, 0, process(), workers=0)
    halves = [TrainLoader(dataset, 1, 7, 0, process(rank, 2), workers=0) for rank in (0, 1)]
    for _ in range(3):
        parts = [torch.cat(pair) for pair in zip(*(next(half) for half in halves), strict=True)]
        assert same(next(whole), parts)


def test_loading_leaves_the_networks_random_numbers_alone(photographs):
    dataset = load_dataset("imagenet", photographs, num_labeled=4, resize=16)
    before = torch.get_rng_state()
    next(TrainLoader(dataset, 2, 1, 0, process(), workers=1))
    list(batches(dataset.test, 4, "cpu"))
    next(TrainLoader(numbered(50), 4, 3, 0, process()))
    assert torch.equal(torch.get_rng_state(), before)


# evaluation


@pytest.mark.parametrize(
    ("n", "size", "world_size"), [(10, 4, 1), (8, 4, 1), (3, 8, 1), (10, 4, 2), (9, 2, 4)]
)
def test_evaluation_sees_each_image_once_in_batches_of_one_shape(n, size, world_size):
    image_set = numbered(n).test
    seen, lengths = [], set()
    for rank in range(world_size):
        drawn_here = list(batches(image_set, size, "cpu", rank, world_size))
        lengths.add(len(drawn_here))
        for images, targets, mask in drawn_here:
            assert images.shape == (size, 3, 2, 2) and targets.shape == mask.shape == (size,)
            assert (images.dtype, targets.dtype, mask.dtype) == (torch.uint8, torch.int64, torch.float32)
            assert (images[mask == 0] == 0).all() and (targets[mask == 0] == 0).all()
            seen += [(i, t) for i, t, m in zip(drawn(images), targets.tolist(), mask, strict=True) if m == 1]
    assert seen == [(i, i % 2) for i in range(n)]
    assert len(lengths) == 1  # every process takes as many steps


def test_evaluation_of_points_pads_too():
    dataset = load_dataset("twomoons", num_labeled=6)
    *_, (points, _, mask) = batches(dataset.test, 300, "cpu")
    assert points.shape == (300, 2) and points.dtype == torch.float32
    assert mask.sum() == 2000 - 6 * 300 and torch.equal(points[:200], dataset.test.images[1800:])


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_evaluation_from_disk_sees_each_file_once(photographs, world_size):
    test = load_dataset("imagenet", photographs, num_labeled=4, resize=40, workers=world_size % 2).test
    seen, truth = [], []
    for rank in range(world_size):
        for images, targets, mask in batches(test, 4, "cpu", rank, world_size):
            assert images.shape == (4, 3, 40, 40) and images.is_contiguous()
            seen += images[mask == 1]
            truth += targets[mask == 1].tolist()
    assert truth == test.targets.tolist()
    expected = [read_image(path, 40, "none") for path in test.files]
    assert len(seen) == 6 and all(torch.equal(a, b) for a, b in zip(seen, expected, strict=True))


def test_a_subset_keeps_the_order_it_is_given(photographs):
    files = load_dataset("imagenet", photographs, num_labeled=4, resize=40).unlabeled
    for whole in (numbered(50).test, files):
        part = whole.subset([5, 1, 9])
        assert len(part) == 3 and part.targets.tolist() == whole.targets[[5, 1, 9]].tolist()
    assert part.files == [files.files[i] for i in (5, 1, 9)]
    assert drawn(numbered(50).test.subset([5, 1, 9]).images) == [5, 1, 9]
