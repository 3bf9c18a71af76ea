"""The pixels of image files: turned upright, deep ones scaled, large ones reduced, empty ones filled."""

import csv
import io
import json
import math
import shutil
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import picture, write_tree

import main
import predict
from augmentation import GREY, OPERATIONS, Draws, ImageViews, RandAugment, fill_level
from data import load_dataset
from engine.checkpoint import upgrade
from engine.folders import image_tree
from engine.images import (
    ORIENTATION,
    Reading,
    dimensions,
    levels,
    opened,
    read_crop,
    read_image,
    read_whole,
    upright_rgb,
)
from engine.loader import TrainLoader, batches
from engine.runtime import Runtime
from run.record import read_run
from visualize import load as load_run

ROOT = Path(main.__file__).parent


# ---------------------------------------------------------------- turned upright

SHORT, LONG, ASCII, UNDEFINED = (3, "<H"), (4, "<I"), (2, None), (7, None)
RATIONAL, SIGNED_SHORT, SIGNED_RATIONAL, FLOAT = (5, "<II"), (8, "<h"), (10, "<ii"), (11, "<f")
ORIENTATIONS = {
    **{number: (ORIENTATION, *SHORT, number) for number in range(10)},
    65537: (ORIENTATION, *LONG, 65537),
    "text": (ORIENTATION, *ASCII, b"6\0"),
    "bytes": (ORIENTATION, *UNDEFINED, b"\6\0\0"),
}
ODD = (  # what cameras and programs write elsewhere in the EXIF block
    (0x011A, *SIGNED_RATIONAL, -1, 0),
    (0x011B, *SIGNED_RATIONAL, -72, 1),
    (0x0128, *SIGNED_SHORT, -2),
)


VALUE_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 7: 1, 8: 2, 10: 8, 11: 4}  # bytes, by TIFF's number of a type


def directory(*entries, offset=8):
    """A TIFF header and one directory of (tag, type, format or None for bytes, values …)."""
    table, more = b"", b""
    place = offset + 2 + 12 * len(entries) + 4
    for tag, kind, form, *values in sorted(entries, key=lambda entry: entry[0]):
        content = values[0] if form is None else struct.pack(form, *values)
        count = len(content) // VALUE_SIZES[kind]
        if len(content) > 4:
            content, more = struct.pack("<I", place + len(more)), more + content + b"\0" * (len(content) % 2)
        table += struct.pack("<HHI", tag, kind, count) + content.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<IH", offset, len(entries)) + table + struct.pack("<I", 0) + more


def write_tiff(path, pixels, *entries, tile=None):
    """(H, W, 3) uint8 pixels as an uncompressed TIFF of one strip, or of square tiles."""
    height, width = pixels.shape[:2]
    blocks = [pixels]
    if tile:
        full = np.zeros((-height % tile + height, -width % tile + width, 3), np.uint8)
        full[:height, :width] = pixels
        rows, columns = range(0, full.shape[0], tile), range(0, full.shape[1], tile)
        blocks = [full[y : y + tile, x : x + tile] for y in rows for x in columns]
    size, count = blocks[0].nbytes, len(blocks)

    def head(first):
        offsets, sizes = [first + size * k for k in range(count)], [size] * count
        placed = [(273, 4, f"<{count}I", *offsets), (278, *SHORT, height), (279, 4, f"<{count}I", *sizes)]
        if tile:
            placed = [(322, *SHORT, tile), (323, *SHORT, tile)]
            placed += [(324, 4, f"<{count}I", *offsets), (325, 4, f"<{count}I", *sizes)]
        about = [(256, *SHORT, width), (257, *SHORT, height), (258, 3, "<3H", 8, 8, 8), (259, *SHORT, 1)]
        return directory(*about, (262, *SHORT, 2), (277, *SHORT, 3), *placed, *entries)

    path.write_bytes(head(len(head(0))) + b"".join(block.tobytes() for block in blocks))


def write_stored(path, pixels, *entries):
    """The pixels in a file of the path's format, with these EXIF entries; returns what the file holds."""
    if path.suffix == ".tif":
        write_tiff(path, pixels, *entries)
        return pixels
    options = {"exif": b"Exif\0\0" + directory(*entries)}
    options |= {".jpg": {"quality": 95}, ".webp": {"lossless": True}}.get(path.suffix, {})
    Image.fromarray(pixels).save(path, **options)
    with Image.open(path) as file:
        return np.array(file.convert("RGB"))


def turned(pixels, orientation):
    """The pixels as somebody sees them who heeds the orientation."""
    return {
        2: lambda: pixels[:, ::-1],
        3: lambda: pixels[::-1, ::-1],
        4: lambda: pixels[::-1],
        5: lambda: pixels.swapaxes(0, 1),
        6: lambda: np.rot90(pixels, -1),
        7: lambda: pixels[::-1, ::-1].swapaxes(0, 1),
        8: lambda: np.rot90(pixels),
    }.get(orientation, lambda: pixels)()


def noise(width=90, height=70, seed=0):
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def check_same_pixels(path, expected):
    """Every way to read the file gives what it gives for an upright PNG of the expected pixels."""
    upright = path.with_name("upright.png")
    Image.fromarray(np.ascontiguousarray(expected)).save(upright)
    assert dimensions(path) == expected.shape[1::-1] == dimensions(upright)
    for crop in ("pad", "none"):
        assert torch.equal(read_image(path, 48, crop), read_image(upright, 48, crop))
    for seed in range(4):
        crops = (read_crop(each, 48, np.random.default_rng(seed)) for each in (path, upright))
        assert torch.equal(*crops)
    whole = read_whole(path, 90, expected=expected.shape[1::-1])
    assert np.array_equal(whole, read_whole(upright, 90))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_an_image_is_read_as_its_orientation_says_or_as_it_is(tmp_path, suffix, orientation):
    stored = write_stored(tmp_path / f"a.{suffix}", noise(), ORIENTATIONS[orientation])
    check_same_pixels(tmp_path / f"a.{suffix}", turned(stored, orientation))


@pytest.mark.parametrize("orientation", [3, 6, 7, 9])
def test_tiffs_in_tiles_pages_and_compressed_are_turned_too(tmp_path, orientation):
    pixels = noise()
    write_tiff(tmp_path / "tiles.tif", pixels, ORIENTATIONS[orientation], tile=32)
    check_same_pixels(tmp_path / "tiles.tif", turned(pixels, orientation))
    for compression in ("raw", "tiff_lzw")[: 2 if orientation < 9 else 1]:  # libtiff writes no 9
        exif, path = Image.Exif(), tmp_path / f"{compression}.tif"
        exif[ORIENTATION] = orientation
        more = {"save_all": True, "append_images": [Image.fromarray(noise(20, 20, seed=1))]}
        Image.fromarray(pixels).save(path, compression=compression, exif=exif, **more)
        with Image.open(path) as file:
            assert file.n_frames == 2
        check_same_pixels(path, turned(pixels, orientation))


@pytest.mark.parametrize("suffix", ["png", "webp", "tif"])
def test_an_orientation_in_xmp_alone_counts_too(tmp_path, suffix):
    pixels, path = noise(), tmp_path / f"a.{suffix}"
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    if suffix == "tif":
        write_tiff(path, pixels, (700, 1, None, xmp))
    elif suffix == "png":
        from PIL.PngImagePlugin import PngInfo

        text = PngInfo()
        text.add_itxt("XML:com.adobe.xmp", xmp.decode())
        Image.fromarray(pixels).save(path, pnginfo=text)
    else:
        Image.fromarray(pixels).save(path, lossless=True, xmp=xmp)
    check_same_pixels(path, turned(pixels, 6))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_odd_numbers_in_the_metadata_do_not_make_a_photograph_unreadable(tmp_path, suffix, orientation):
    path = tmp_path / f"a.{suffix}"
    stored = write_stored(path, noise(), *ODD, ORIENTATIONS[orientation])
    check_same_pixels(path, turned(stored, orientation))


@pytest.mark.parametrize(
    "entry", [(ORIENTATION, *FLOAT, 6.0), (ORIENTATION, *RATIONAL, 6, 1), (ORIENTATION, *RATIONAL, 6, 0)]
)
def test_an_orientation_that_is_no_whole_number_turns_nothing(tmp_path, entry):
    for suffix in ("jpg", "png", "webp"):
        path = tmp_path / f"a.{suffix}"
        check_same_pixels(path, write_stored(path, noise(), entry))


@pytest.mark.parametrize("block", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff", b"Exif\0\0no TIFF at all", b"\xff"])
def test_a_broken_exif_block_turns_nothing(tmp_path, block):
    for suffix, options in (("png", {}), ("webp", {"lossless": True}), ("jpg", {"quality": 95})):
        Image.fromarray(noise()).save(tmp_path / f"a.{suffix}", exif=block, **options)
        with Image.open(tmp_path / f"a.{suffix}") as file:
            stored = np.array(file)
        check_same_pixels(tmp_path / f"a.{suffix}", stored)


def test_jfif_and_jpe_are_images(tmp_path):
    for name in ("a.jfif", "b.jpe", "c.JFIF"):
        picture(20, 20).save(tmp_path / name, format="JPEG")
    files, notes = image_tree(str(tmp_path), "FOLDER")
    assert [Path(file).name for file in files] == ["a.jfif", "b.jpe", "c.JFIF"] and not notes
    assert all(read_image(file, 20, "pad").float().std() > 10 for file in files)


# ---------------------------------------------------------------- deep images

WRITERS = {  # how 8-bit grey levels are stored, and the range of values in which they must be found
    "12 bits": ("png", lambda x: np.rint(x * (4095 / 255)).astype(np.uint16), [0, 4095]),
    "16 bits": ("png", lambda x: x.astype(np.uint16) * 257, [0, 65535]),
    "16 bits, big-endian": ("tif", lambda x: (x.astype(np.uint16) * 257).astype(">u2"), [0, 65535]),
    "8 bits in 16": ("tif", lambda x: x.astype(np.uint16), [0, 255]),
    "8 bits in 32": ("tiff", lambda x: x.astype(np.int32), [0, 255]),
    "24 bits in 32": ("tif", lambda x: x.astype(np.int32) * (2**16 + 2**8 + 1), [0, 2**24 - 1]),
    "floats to 1": ("tif", lambda x: (x / 255).astype(np.float32), [0, 1]),
    "floats to 65535": ("tif", lambda x: x.astype(np.float32) * 257, [0, 65535]),
    "floats from -1": ("tif", lambda x: (x / 127.5 - 1).astype(np.float32), [-1, 1]),
}


def grey(seed, size=(80, 70)):
    """(H, W) uint8, a smooth picture with black and white in it."""
    values = np.asarray(picture(*size, seed=seed).convert("L"), np.float32)
    return np.rint((values - values.min()) * (255 / np.ptp(values))).astype(np.uint8)


def deep_folder(root, kind="8 bits", size=(80, 70), counts=(("train", 6), ("test", 3))):
    """``root/<part>/<class>/<n>``: the same pictures for every kind."""
    suffix, store, _ = WRITERS.get(kind, ("png", lambda x: x, None))
    for part, count in counts:
        for k, name in enumerate(("dark", "light")):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = grey(100 * (part == "test") + number, size) // 2 + 127 * k
                pixels[0, 0], pixels[-1, -1] = 0, 255
                Image.fromarray(store(pixels)).save(root / part / name / f"{number}.{suffix}")
    return root


@pytest.mark.parametrize("kind", WRITERS)
def test_deep_images_are_read_as_their_8_bit_picture(tmp_path, kind):
    low, high = WRITERS[kind][2]
    plain, deep = deep_folder(tmp_path / "plain"), deep_folder(tmp_path / "deep", kind)
    for resize in (40, 80):  # held in memory; decoded when they are needed
        sets = [
            load_dataset("folder", str(root), num_labeled=1.0, workers=0, resize=resize)
            for root in (plain, deep)
        ]
        assert [each.record()["value_range"] for each in sets] == [None, [low, high]]
        for part in ("labeled", "test"):
            images = [next(batches(getattr(each, part), 12, "cpu"))[0].int() for each in sets]
            assert torch.equal(*images)
        loaders = [TrainLoader(each, 4, 1, 0, Runtime("cpu"), workers=0) for each in sets]
        seen = [next(loader).images_l.float() for loader in loaders]
        assert torch.equal(*seen)
        line = f"deep images: values {low} to {high} are scaled to 0 to 255 ("
        assert [sum(line in note for note in each.notes) for each in sets] == [0, 1]
        assert not any("nearly constant" in note for each in sets for note in each.notes)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16"])
def test_uncompressed_tiffs_are_turned_like_any_other(tmp_path, mode, orientation):
    """Pillow maps them into memory, of which it once turned the shape before the pixels."""
    pixels = noise(90, 40)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    image.save(tmp_path / "raw.tif", tiffinfo={ORIENTATION: orientation})
    image.save(tmp_path / "upright.png" if mode != "CMYK" else tmp_path / "upright.tif", compression=None)
    (upright,) = tmp_path.glob("upright.*")
    reading = Reading((0, 65535))
    with opened(upright, reading) as file:
        expected = turned(np.asarray(upright_rgb(file, reading.value_range)), orientation)
    with opened(tmp_path / "raw.tif", reading) as file:
        assert np.array_equal(np.asarray(upright_rgb(file, reading.value_range)), expected)


@pytest.mark.parametrize(
    ("largest", "bound"),
    [
        *[(0.3, 1), (1, 1), (1.5, 255), (255, 255), (256, 1023), (4000, 4095), (4096, 16383)],
        *[(65535, 65535), (65536, 2**24 - 1), (2**24, 2**32 - 1), (1e12, 999999995904)],
    ],
)
def test_the_largest_value_is_rounded_up(tmp_path, largest, bound):
    values = np.linspace(0, largest, 100, dtype=np.float32).reshape(10, 10)
    for number, folder in enumerate(("train/a", "train/b", "test/a", "test/b")):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.roll(values, number)).save(tmp_path / folder / "0.tif")
    dataset = load_dataset("folder", str(tmp_path), num_labeled=1.0, workers=0)
    assert dataset.record()["value_range"] == [0, bound]


def test_values_that_are_no_numbers_are_black_and_infinite_ones_clipped(tmp_path):
    values = np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10)
    values[0, :3] = np.nan, np.inf, -np.inf
    for number, folder in enumerate(("test/a", "test/b", "train/a", "train/b")):
        (tmp_path / folder).mkdir(parents=True)
        Image.fromarray(np.roll(values, number)).save(tmp_path / folder / "0.tif")
    dataset = load_dataset("folder", str(tmp_path), num_labeled=1.0, workers=0)
    assert dataset.record()["value_range"] == [0, 1]
    assert dataset.test.images[0, 0, 0, :4].tolist() == [0, 255, 0, round(255 * 3 / 99)]


def test_16_bits_are_scaled_as_by_earlier_versions():
    values = np.arange(65536, dtype=np.uint16)
    assert np.array_equal(levels(values, (0, 65535)), (values / 257).round())


def test_a_record_of_an_earlier_version_reads_as_that_version_did(tmp_path):
    root = deep_folder(tmp_path, "12 bits", size=(20, 20))
    Image.fromarray(np.full((20, 20), 77.9, np.float32)).save(root / "test/dark/float.tif")
    record = load_dataset("folder", str(root), num_labeled=1.0, workers=0).record()
    del record["value_range"]
    record = upgrade({"data": record})["data"]
    dataset = load_dataset("folder", str(root), num_labeled=1.0, workers=0, record=record)
    with Image.open(root / "test/dark/0.png") as file:
        wanted = (np.asarray(file) / 257).round()
    assert np.array_equal(dataset.test.images[0, 0], wanted)
    assert (dataset.test.images[3] == 77).all()
    assert dataset.record()["value_range"] is None


def test_test_images_are_read_with_the_scale_of_the_training_images(tmp_path):
    root = deep_folder(tmp_path, "12 bits", size=(20, 20))
    Image.fromarray(np.full((20, 20), 2048, np.uint16)).save(root / "test/dark/0.png")
    Image.fromarray(np.full((20, 20), 65535, np.uint16)).save(root / "test/dark/1.png")
    dataset = load_dataset("folder", str(root), num_labeled=1.0, workers=0)
    assert dataset.record()["value_range"] == [0, 4095]
    assert (dataset.test.images[0] == 128).all() and (dataset.test.images[1] == 255).all()
    Image.fromarray(np.full((20, 20), 65535, np.uint16)).save(root / "train/dark/0.png")
    dataset = load_dataset("folder", str(root), num_labeled=1.0, workers=0)
    assert dataset.record()["value_range"] == [0, 65535]
    again = load_dataset(
        "folder", str(root), num_labeled=1.0, record=dataset.record() | {"value_range": [0, 9]}
    )
    assert again.record()["value_range"] == [0, 9]


@pytest.mark.parametrize("resize", [20, 80])
def test_unlabelled_images_have_the_same_scale(tmp_path, resize):
    root = deep_folder(tmp_path / "deep", "12 bits", size=(90, 90))
    (tmp_path / "more").mkdir()
    values = np.full((90, 90), 2048, np.uint16)
    values[:45] = 600
    Image.fromarray(values).save(tmp_path / "more/a.png")
    options = {"unlabeled_path": str(tmp_path / "more"), "unlabeled_mode": "only", "num_labeled": 1.0}
    options["workers"] = 0
    dataset = load_dataset("folder", str(root), resize=resize, **options)
    image = next(batches(dataset.unlabeled, 1, "cpu"))[0][0]
    assert (image[:, -5:] == 128).all() and (image[:, :5] == 37).all()
    # without a deep image among the training images their own range is found
    digits = load_dataset("digits", **options)
    assert digits.record()["value_range"] == [0, 4095] and (digits.unlabeled.images[0, :, -4:] == 128).all()


FLAGS = (
    "--dataset folder --num-labeled all --model wrn-10-1 --batch-size 4 --mu 1 --method supervised "
    "--device cpu --workers 0 --finetune-epochs 0 --eval-step 3 --total-steps 3 --student-lr 0.001 "
    "--no-pictures"
).split()
PLAIN = ("--device", "cpu", "--workers", "0", "--no-amp")


def weights(name):
    return torch.load(f"checkpoint/{name}_last.pth.tar", weights_only=True)["student_state_dict"]


def rows_of(text):
    return list(csv.DictReader(io.StringIO(text, newline="")))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs on the same pictures in 8 bits and in 12, whole and as crops."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, kind in (("plain", "8 bits"), ("deep", "12 bits")):
            deep_folder(folder / name, kind)
            for size in ("24", "65"):
                data = ["--data-path", name, "--resize", size, "--name", f"{name}{size}"]
                assert main.run([*FLAGS, *data]) == 0
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch, runs):
    """A folder with copies of these runs and pictures."""
    monkeypatch.chdir(tmp_path)
    for name in ("plain", "deep", "checkpoint", "results"):
        shutil.copytree(runs / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("size", [24, 65])
def test_a_run_on_deep_images_is_that_on_their_8_bit_pictures(here, capsys, size):
    plain, deep = weights(f"plain{size}"), weights(f"deep{size}")
    assert all(torch.equal(tensor, deep[name]) for name, tensor in plain.items())

    path = f"checkpoint/deep{size}_last.pth.tar"
    tops = []
    for run in ("plain", "deep"):
        name = f"checkpoint/{run}{size}_last.pth.tar"
        assert main.run(["--evaluate", "--resume", name, "--workers", "0", "--name", f"e-{run}"]) == 0
        tops.append(json.loads((here / f"results/e-{run}/summary.json").read_text())["top1"])
    assert tops[0] == tops[1]

    found = []
    for folder in ("plain/test", "deep/test"):
        capsys.readouterr()
        assert predict.run([path, folder, *PLAIN]) == 0
        said = capsys.readouterr()
        found.append(rows_of(said.out))
        assert "deep images: values 0 to 4095 are scaled to 0 to 255\n" in said.err
    assert found[0] == found[1] and len({row["probability"] for row in found[0]}) > 2

    _, dataset, _, _ = load_run(read_run(Path(f"results/deep{size}")))  # as pictures read it
    assert dataset.reading.value_range == (0, 4095)


def test_an_exported_network_names_the_value_range(here, capsys):
    path = "checkpoint/deep65_last.pth.tar"
    assert predict.run([path, "--export", "deep.pt2"]) == 0
    extra = {"classes.json": "", "value_range.json": ""}
    network = torch.export.load("deep.pt2", extra_files=extra).module()
    assert json.loads(extra["classes.json"]) == ["dark", "light"]
    value_range = json.loads(extra["value_range.json"])
    assert value_range == [0, 4095]
    image = read_image("deep/test/dark/0.png", 65, "none", reading=Reading(tuple(value_range)))
    capsys.readouterr()
    assert predict.run([path, "deep/test", *PLAIN]) == 0
    row = rows_of(capsys.readouterr().out)[0]
    shares = network(image[None])[0]
    assert shares.max().item() == pytest.approx(float(row["probability"]), abs=2e-6)

    assert predict.run(["checkpoint/plain24_last.pth.tar", "--export", "plain.pt2"]) == 0
    torch.export.load("plain.pt2", extra_files=extra)
    assert json.loads(extra["value_range.json"]) is None


def test_onnx_names_the_value_range(here):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    assert predict.run(["checkpoint/deep24_last.pth.tar", "--export", "deep.onnx"]) == 0
    facts = {each.key: json.loads(each.value) for each in onnx.load("deep.onnx").metadata_props}
    assert facts["value_range"] == [0, 4095] and facts["classes"] == ["dark", "light"]


def test_a_given_value_range_is_that_of_the_run(here, capsys):
    data = ["--data-path", "deep", "--resize", "24", "--name", "given", "--value-range", "-1000", "3095.5"]
    assert main.run([*FLAGS, *data]) == 0
    path = "checkpoint/given_last.pth.tar"
    saved = torch.load(path, weights_only=True)
    assert saved["data"]["value_range"] == saved["args"]["value_range"] == [-1000, 3095.5]
    assert "deep images: values -1000 to 3095.5 are scaled to 0 to 255\n" in capsys.readouterr().err
    with Image.open("deep/train/dark/0.png") as file:
        values = np.asarray(file, np.float64)
    dataset = main.read_data(main.parse_arguments([*FLAGS, *data]), None, False)
    wanted = ((values.clip(-1000, 3095.5) + 1000) * (255 / 4095.5)).round()
    first = read_image("deep/train/dark/0.png", 80, "none", reading=dataset.reading)
    box = np.stack([wanted] * 3, 2).astype(np.uint8)
    Image.fromarray(box).save("wanted.png")
    assert torch.equal(first, read_image("wanted.png", 80, "none"))

    assert predict.run([path, "deep/test", *PLAIN]) == 0
    assert "values -1000 to 3095.5" in capsys.readouterr().err
    saved = torch.load("checkpoint/plain24_last.pth.tar", weights_only=True)
    del saved["data"]["value_range"], saved["args"]["value_range"], saved["args"]["max_megapixels"]
    torch.save(saved, "checkpoint/plain24_last.pth.tar")  # as of a version without these flags
    for run, given, refused in (
        ("given", ("-1000", "3095.5"), None),
        ("given", ("0", "4095"), "was trained with --value-range -1000.0 3095.5: it cannot continue with "),
        ("deep24", ("0", "4095"), None),  # as was found
        ("deep24", ("0", "4096"), "was trained with --value-range 0.0 4095.0: it cannot continue with "),
        ("plain24", ("0", "4096"), "was trained without --value-range: it cannot continue with "),
        ("plain24", (), None),
    ):
        command = ["--resume", f"checkpoint/{run}_last.pth.tar", "--total-steps", "4", "--no-pictures"]
        command += ["--value-range", *given] if given else []
        status = main.run(command)
        said = capsys.readouterr().err
        assert status == (2 if refused else 0) and (refused or "") in said
        assert "Traceback" not in said


@pytest.mark.parametrize("text", ["1 0", "5 5", "0 nan", "0 inf", "0", "a b"])
def test_an_impossible_value_range_is_refused(capsys, tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    assert main.run([*FLAGS, "--data-path", ".", "--value-range", *text.split()]) == 2
    assert "--value-range" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("value", [5, "ab", [0], [1, 0], [0, math.nan], ["a", "b"]])
def test_a_strangers_value_range_is_refused(here, capsys, value):
    saved = torch.load("checkpoint/deep24_last.pth.tar", weights_only=True)
    saved["data"]["value_range"] = value
    torch.save(saved, "strange.pth.tar")
    assert predict.run(["strange.pth.tar", "deep", *PLAIN]) == 2
    assert "has no network for images" in capsys.readouterr().err


# ---------------------------------------------------------------- images with nothing to see


@pytest.mark.parametrize("resize", [20, 80])
def test_nearly_constant_images_get_a_warning(tmp_path, resize):
    warning = "are nearly constant, all pixels have about the same level: look at some of the files"
    root = deep_folder(tmp_path / "deep", "12 bits")
    (tmp_path / "more").mkdir()
    Image.fromarray(noise()).save(tmp_path / "more/a.png")

    def warned(**options):
        dataset = load_dataset("folder", str(root), num_labeled=1.0, workers=0, resize=resize, **options)
        return [
            note.split(" are ")[0] for note in dataset.notes if warning in note and "--value-range" in note
        ]

    assert warned() == []
    assert warned(value_range=(0, 1e6)) == ["the training images", "the test images"]
    assert warned(value_range=(-1e4, -5e3)) == ["the training images", "the test images"]  # all white
    for path in (root / "test").glob("*/*.png"):
        Image.fromarray(np.random.RandomState(0).randint(100, 103, (80, 80)).astype(np.uint8)).save(path)
    assert warned() == ["the test images"]
    more = {"unlabeled_path": str(tmp_path / "more")}
    assert warned(**more) == ["the test images"]
    Image.new("RGB", (80, 80), (10, 20, 30)).save(tmp_path / "more/a.png")
    assert warned(**more) == ["the test images", f"the images in '{tmp_path / 'more'}'"]


def test_evaluation_and_predict_warn_of_constant_images(here, capsys):
    path = "checkpoint/plain24_last.pth.tar"
    for file in (here / "deep").glob("test/*/*.png"):
        Image.fromarray(np.full((80, 80), 200, np.uint16)).save(file)  # read as 16 bits: black
    assert predict.run([path, "deep/test", *PLAIN]) == 0
    assert "the images in 'deep/test' are nearly constant" in capsys.readouterr().err
    assert main.run(["--evaluate", "--resume", path, "--data-path", "deep", "--workers", "0"]) == 0
    assert "the test images are nearly constant" in capsys.readouterr().err
    assert predict.run([path, "plain/test", *PLAIN]) == 0
    assert "nearly constant" not in capsys.readouterr().err


# ---------------------------------------------------------------- empty pixels


def test_empty_pixels_are_grey_unless_that_is_far_from_the_data():
    assert fill_level((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)) == GREY == 128
    assert fill_level((0.02,) * 3, (0.0965,) * 3) == 128  # 4.98 standard deviations away
    assert fill_level((0.02,) * 3, (0.0955,) * 3) == 5  # 5.05
    assert fill_level((0.98,) * 3, (0.05,) * 3) == 250
    assert fill_level((0.5, 0.5, 0.02), (0.2, 0.2, 0.01)) == 87  # the mean of all channels


@pytest.mark.parametrize("static", [False, True])
def test_the_views_of_nearly_black_images_hold_no_grey(static):
    views = ImageViews(16, (3 / 255,) * 3, (1 / 255,) * 3, randaug=None, static=static)
    images = torch.full((20, 3, 16, 16), 3, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    assert (views.weak(images, generator) == 3).all() and (views.strong(images, generator) == 3).all()
    layers = ImageViews(16, (3 / 255,) * 3, (1 / 255,) * 3, static=static).randaug
    for name in ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY", "Cutout"):
        draws = Draws(
            torch.full((1, 20), OPERATIONS.index(name)),
            torch.zeros(1, 20, dtype=torch.bool),
            torch.full((1, 20, 2), 8),
        )
        assert (layers.apply(images, draws) == 3).all()
        grey = RandAugment(2, 16, static=static).apply(images, draws)
        assert (grey == GREY).any() and ((grey == GREY) | (grey == 3)).all()


# ---------------------------------------------------------------- many pixels


def test_a_scan_of_210_megapixels_is_reduced_while_it_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "scan.jpg"
    Image.linear_gradient("L").resize((15000, 14000), Image.Resampling.BILINEAR).save(path, quality=90)
    decoded = []

    def decode(image, *rest):
        decoded.append(upright_rgb(image, *rest))
        return decoded[-1]

    monkeypatch.setattr("engine.images.upright_rgb", decode)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        centre, whole = read_image(path, 224, "none"), read_image(path, 64, "pad")
        crop = read_image(path, 224, "none", np.random.default_rng(0))
    assert [image.size for image in decoded] == [(1875, 1750)] * 3
    # rows of the middle 224/256, and of all
    rows = 256 * (16 + (torch.arange(224) + 0.5)) / 256
    assert (centre[0].float().mean(dim=1) + 0.5 - rows).abs().max() < 1.5
    assert (whole[0].float().mean(dim=1) + 0.5 - 4 * (torch.arange(64) + 0.5)).abs().max() < 1.5
    assert crop.float().std(dim=2).max() < 1.5 and crop.float().mean(dim=2).diff(dim=1).min() >= -0.01


def header(path, width, height):
    """A PNG that ends behind a header with this size."""
    Image.new("L", (8, 8)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)


def test_more_than_500_megapixels_are_not_read_unless_allowed(tmp_path):
    header(tmp_path / "a.png", 30000, 20000)
    for read in (
        lambda: read_image(tmp_path / "a.png", 8, "none"),
        lambda: read_whole(tmp_path / "a.png", 8),
    ):
        with pytest.raises(
            Image.DecompressionBombError, match="600 megapixels, more than --max-megapixels 500"
        ):
            read()
    assert dimensions(tmp_path / "a.png") == (30000, 20000)
    assert Reading().max_megapixels == 500 == main.build_parser().get_default("max_megapixels")
    assert predict.build_parser().get_default("max_megapixels") == 500


def test_the_bound_on_megapixels_is_a_flag(here, capsys):
    write_tree(here / "mine", {"a": 4, "b": 4}, size=(80, 80))
    picture(200, 100).save(here / "mine/b/large.png")  # 0.02 megapixels
    for resize in ("24", "65"):
        data = ["--data-path", "mine", "--resize", resize, "--name", "large", "--overwrite"]
        assert main.run([*FLAGS, *data, "--max-megapixels", "0.01"]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert (
            "mine/b/large.png cannot be read (it has 0.02 megapixels, more than --max-megapixels 0.01" in said
        )
        assert main.run([*FLAGS, *data, "--max-megapixels", "0.02"]) == 0
    flags = [*PLAIN, "--max-megapixels"]
    capsys.readouterr()
    assert predict.run(["checkpoint/plain65_last.pth.tar", "mine", *flags, "0.01"]) == 0
    said = capsys.readouterr()
    assert len(rows_of(said.out)) == 8 and "large.png cannot be read (it has 0.02 megapixels" in said.err
    assert predict.run(["checkpoint/plain65_last.pth.tar", "mine", *flags, "0.02"]) == 0
    assert len(rows_of(capsys.readouterr().out)) == 9


# ---------------------------------------------------------------- predict.py on strange photographs


def test_predict_with_workers_gives_turned_images_the_rows_of_upright_ones(here):
    (here / "mine").mkdir()
    for suffix in ("jpg", "png", "webp", "tif"):
        for number, orientation in enumerate((6, 9, 65537, "text", "bytes")):
            entry = ORIENTATIONS[orientation]
            name = f"{suffix}-{number}"
            stored = write_stored(here / f"mine/{name}-stored.{suffix}", noise(seed=number), entry, *ODD)
            upright = np.ascontiguousarray(turned(stored, orientation))
            Image.fromarray(upright).save(here / f"mine/{name}-upright.png")
    command = [sys.executable, ROOT / "predict.py", "checkpoint/plain65_last.pth.tar", "mine", "--no-amp"]
    command += ["--device", "cpu", "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "cannot be read" not in done.stderr and "Traceback" not in done.stderr
    rows = {row.pop("image").split(".")[0]: row for row in rows_of(done.stdout)}
    assert len(rows) == 2 * 4 * 5
    names = [name.removesuffix("-stored") for name in rows if name.endswith("-stored")]
    assert all(rows[f"{name}-stored"] == rows[f"{name}-upright"] for name in names)
    assert len({row["probability"] for row in rows.values()}) == 10  # five pictures, lossless and as JPEG
