"""The loaders of loader.py: decoding and crops, training batches in memory and from disk, evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from test_data import damage, picture, ramp, write_tree

from augmentation import ImageViews, PointViews
from data import Dataset, load_dataset
from engine.evaluation import EVALUATION_BATCH, predictions, stored_predictions
from engine.images import ORIENTATION, ImageSet, random_crop_box, read_crop, read_image, upright_rgb
from engine.loader import TrainLoader, batches
from engine.runtime import Runtime
from models import build_model
from utils import UserError


def process(rank=0, world_size=1):
    """A CPU runtime that believes to be one of several processes."""
    runtime = Runtime("cpu")
    runtime.rank, runtime.world_size = rank, world_size
    return runtime


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
    exif[ORIENTATION] = orientation
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
    exif[ORIENTATION] = 6 if turned else 1
    (image.transpose(Image.Transpose.ROTATE_90) if turned else image).save(tmp_path / "a.jpg", exif=exif)
    for seed in range(8):
        left, top, w, h = random_crop_box(width, height, np.random.default_rng(seed))
        crop = read_crop(tmp_path / "a.jpg", 32, np.random.default_rng(seed)).float()
        x = (left + (torch.arange(32) + 0.5) * w / 32) / width * 255
        y = (top + (torch.arange(32) + 0.5) * h / 32) / height * 255
        assert (crop[0].mean(dim=0) - x).abs().mean() < 3
        assert (crop[1].mean(dim=1) - y).abs().mean() < 3


def test_jpegs_are_decoded_at_reduced_scale_where_the_crop_allows_it(tmp_path, monkeypatch):
    picture(1600, 1200).save(tmp_path / "large.jpg")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture(1600, 400).save(tmp_path / "turned.jpg", exif=exif)
    decoded = []
    monkeypatch.setattr(
        "engine.images.upright_rgb",
        lambda image, *rest: decoded.append(image.size) or upright_rgb(image, *rest),
    )
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


@pytest.mark.parametrize("size", [(40, 30), (9, 50)])
def test_a_whole_image_is_stretched_with_pillows_filter(tmp_path, size):
    picture(*size).save(tmp_path / "a.png")
    expected = picture(*size).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(read_image(tmp_path / "a.png", 16, "pad").permute(1, 2, 0), np.asarray(expected))


def test_random_crops_have_the_usual_areas_and_ratios():
    random = np.random.default_rng(0)
    boxes = np.array([random_crop_box(400, 300, random) for _ in range(2000)])
    left, top, w, h = boxes.T
    assert (left >= 0).all() and (top >= 0).all() and (left + w <= 400).all() and (top + h <= 300).all()
    area, ratio = w * h / 120000, w / h
    assert area.min() > 0.075 and area.min() < 0.1 and area.max() > 0.95
    assert ratio.min() > 0.73 and ratio.min() < 0.77 and ratio.max() > 1.3 and ratio.max() < 1.36
    assert left.min() == 0 and (left + w).max() == 400


@pytest.mark.parametrize(
    ("size", "box"),
    [((1, 1), (0, 0, 1, 1)), ((1000, 30), (480, 0, 40, 30)), ((30, 1000), (0, 480, 30, 40))],
)
def test_a_crop_that_never_fits_is_the_largest_centred_box_of_an_allowed_ratio(size, box):
    random = np.random.default_rng(0)
    assert {random_crop_box(*size, random) for _ in range(20)} == {box}


# loaders in memory


def numbered(n, num_classes=2):
    """A data set whose image i has the value i in every pixel: batches tell what was drawn."""
    images = torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 2, 2).contiguous()
    everything = ImageSet(torch.arange(n) % num_classes, images)
    labeled = list(range(min(6, n)))
    return Dataset(
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
    assert drawn(batch.images_u) == batch.indices_u.tolist()


def test_without_unlabelled_images_there_are_none():
    batch = next(TrainLoader(numbered(50), 4, 0, 0, process()))
    assert batch[2:] == (None, None, None) and len(batch.images_l) == 4


def test_classes_of_unlabelled_images_are_handed_on_where_any_is_known():
    dataset = numbered(13)
    dataset.unlabeled.targets[8:] = -1
    batch = next(TrainLoader(dataset, 1, 13, 0, process()))
    assert sorted(batch.targets_u.tolist()) == [-1] * 5 + [0] * 4 + [1] * 4
    dataset.unlabeled.targets[:] = -1
    batch = next(TrainLoader(dataset, 1, 5, 0, process()))
    assert batch.images_u.shape[0] == 5 and batch.targets_u is None


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
    for seed in (0, 1):
        loader = TrainLoader(numbered(50), 4, 3, seed, process(1, 2))
        next(loader)
        next(loader)
        numbers.append(torch.rand(1, generator=loader.generator).item())
    assert len(set(numbers)) == 5 and numbers[4] == numbers[3]


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
        exif[ORIENTATION] = 6 if i == 5 else 1
        image.save(folder / f"ILSVRC_{i:02d}.JPEG", exif=exif)
    return root


def test_imagenet_keeps_files_and_its_layout(photographs):
    dataset = load_dataset("imagenet", photographs, num_labeled=0.3, resize=48, workers=0)
    assert dataset.classes == ["n01440764", "n01443537"]
    assert (len(dataset.unlabeled), len(dataset.test), dataset.size) == (14, 6, 48)
    assert dataset.labeled.targets.tolist() == [0, 0, 1, 1]  # 0.3 of 7 images of each class
    assert dataset.mean == pytest.approx([0.485, 0.456, 0.406]) and dataset.crop == "none" and dataset.flip
    assert dataset.std == pytest.approx([0.229, 0.224, 0.225])
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
    for batch in expected:
        assert torch.equal(dataset.unlabeled.targets[batch.indices_u], batch.targets_u)
    other = TrainLoader(dataset, 3, 12, 1, process(), workers=0)
    assert not torch.equal(next(other).images_u, expected[0].images_u)


def test_each_time_an_image_is_drawn_its_crop_is_another(photographs):
    dataset = load_dataset("imagenet", photographs, num_labeled=2, resize=16)
    batch = next(TrainLoader(dataset, 8, 0, 0, process(), workers=0))
    assert batch.targets.bincount().tolist() == [4, 4]
    assert len({image.numpy().tobytes() for image in batch.images_l}) == 8


def test_crops_are_decided_by_the_seed_the_set_and_the_number_of_the_draw(photographs):
    """Of one file, so that the order of files says nothing."""
    dataset = load_dataset("imagenet", photographs, num_labeled=2, resize=16)
    dataset.labeled = dataset.unlabeled = dataset.unlabeled.subset([0])

    def crops(seed):
        loader = TrainLoader(dataset, 4, 1, seed, process(), workers=0)
        batches = [next(loader) for _ in range(2)]
        images = torch.cat([part for batch in batches for part in (batch.images_l, batch.images_u)])
        return [image.numpy().tobytes() for image in images]

    assert crops(0) == crops(0)
    assert len({*crops(0), *crops(1)}) == 32


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


@pytest.mark.parametrize("world_size", [1, 3])
def test_predictions_of_every_image_once(world_size):
    test = load_dataset("twomoons", num_labeled=6).test.subset(range(700))
    network = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.9))
    seen, truth = [], []
    for rank in range(world_size):
        network.train()
        for logits, targets, mask in predictions(
            network, test, PointViews(1.0, 1.0), process(rank, world_size)
        ):
            assert len(logits) == len(targets) == len(mask) == EVALUATION_BATCH
            assert logits.dtype == torch.float32 and not logits.requires_grad and not network.training
            seen.append(logits[mask > 0])
            truth.append(targets[mask > 0])
    assert torch.equal(torch.cat(truth), test.targets)
    torch.testing.assert_close(torch.cat(seen), network[0](test.images).detach())


def stored(path, dataset, network):
    """The stored predictions, and how many passes of the network they took."""
    passes = []
    handle = network.register_forward_hook(lambda *_: passes.append(None))
    views = ImageViews(dataset.size, dataset.mean, dataset.std)
    table = stored_predictions(str(path), network, dataset, views, process())
    handle.remove()
    return table, len(passes)


def test_stored_predictions_are_the_networks_and_computed_once(tmp_path, capsys):
    """Of the plain images, to float16; again for another network, other images, and a damaged file."""
    dataset = load_dataset("digits", num_labeled=10, resize=8)
    dataset.unlabeled = dataset.unlabeled.subset(range(600))
    network, other = (build_model("wrn-10-1", 10, image_size=8) for _ in range(2))
    table, passes = stored(tmp_path / "new" / "a.pt", dataset, network)
    plain = ImageViews(8, dataset.mean, dataset.std).evaluation(dataset.unlabeled.images)
    with torch.no_grad():
        expected = network.eval()(plain).softmax(dim=1)
    assert table.dtype == torch.float16 and table.shape == (600, 10) and passes == 3
    torch.testing.assert_close(table.float(), expected, rtol=2**-10, atol=2**-24)
    path = tmp_path / "new" / "a.pt"
    assert path.stat().st_size < 600 * 10 * 2 + 4096 and not list(tmp_path.rglob("*.tmp"))

    table = table.clone()  # not of the file, which is damaged now
    again, passes = stored(path, dataset, network)
    assert passes == 0 and torch.equal(again, table)
    assert capsys.readouterr().err.count("600 images, once") == 1
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    again, passes = stored(path, dataset, network)
    assert passes == 3 and torch.equal(again, table)

    dataset.unlabeled = dataset.unlabeled.subset(range(599, -1, -1))
    turned, passes = stored(path, dataset, network)
    assert passes == 3
    torch.testing.assert_close(turned.flip(0), table, rtol=2**-9, atol=2**-23)
    dataset.mean = [0.5] * 3
    assert stored(path, dataset, network)[1] == 3
    assert stored(path, dataset, other)[1] == 3
    assert stored(path, dataset, other)[1] == 0


def test_stored_predictions_of_files_are_mapped(photographs, tmp_path):
    dataset = load_dataset("imagenet", photographs, num_labeled=4, resize=40)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 40 * 40, 2))
    table, _ = stored(tmp_path / "a.pt", dataset, network)
    views = ImageViews(40, dataset.mean, dataset.std)
    images = views.evaluation(torch.stack([read_image(path, 40, "none") for path in dataset.unlabeled.files]))
    torch.testing.assert_close(table.float(), network(images).softmax(dim=1), rtol=2**-10, atol=2**-24)
    assert str(tmp_path / "a.pt") in Path("/proc/self/maps").read_text()


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


# unreadable files


def large_tree_with_damage(tmp_path):
    """A tree of larger images whose damaged files are not looked at before they are drawn."""
    write_tree(tmp_path / "train", {"a": 3, "b": 3}, size=(70, 70), suffix="jpg")
    write_tree(tmp_path / "val", {"a": 3, "b": 3}, size=(70, 70), suffix="jpg")
    in_train, in_val = damage(tmp_path / "train" / "a"), damage(tmp_path / "val" / "b")
    for path in in_val:  # no copies of the others
        with open(path, "ab") as file:
            file.write(b" ")
    return in_train, in_val


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
        assert not {dataset.unlabeled.files[i] for i in batch.indices_u} & set(bad_train)
        assert torch.equal(dataset.unlabeled.targets[batch.indices_u], batch.targets_u)
        for images, targets in (batch[:2], batch[2:4]):
            assert (images.flatten(1).float().std(dim=1) > 0).all()  # no empty image among them
            assert targets.bincount().sum() == 9 and targets.tolist().count(1) >= 3
    lines = capsys.readouterr().err.splitlines()
    assert sum(any(path in line for path in bad_train) for line in lines) == 3 == len(lines)  # once per file
    assert "3 so far" in lines[-1]
    images, _, mask = (torch.cat(parts) for parts in zip(*batches(dataset.test, 4, "cpu"), strict=True))
    listed = [path in bad_val for path in dataset.test.files]
    assert mask.tolist()[:9] == [0.0 if bad else 1.0 for bad in listed] and sum(listed) == 3
    assert (images[mask == 0] == 0).all()


def test_an_unreadable_file_behind_the_first_chunk_is_known_by_its_place(tmp_path):
    """Workers decode a batch in chunks of 32; file 33 is no image."""
    files = [str(tmp_path / f"{number}.png") for number in range(36)]
    for number, path in enumerate(files):
        picture(9, 9, seed=number).save(path)
    Path(files[33]).write_bytes(b"no image")
    dataset = numbered(50)
    dataset.labeled = dataset.unlabeled = ImageSet(range(36), files=files, size=8, skip_unreadable=True)
    ((images, targets, mask),) = batches(dataset.labeled, 36, "cpu")
    assert (mask == 0).nonzero().flatten().tolist() == [33] and targets.tolist() == [*range(36)]
    assert not images[33].any() and images[mask == 1].flatten(1).any(dim=1).all()
    for seed in range(3):  # it is drawn into either chunk
        batch = next(TrainLoader(dataset, 36, 0, seed, process(), workers=0))
        assert batch.images_l.flatten(1).any(dim=1).all()
        assert set(batch.targets.tolist()) == {*range(36)} - {33}


def test_a_batch_of_unreadable_files_alone_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    dataset = numbered(50)
    files = [str(tmp_path / "a.png")]
    dataset.labeled = dataset.unlabeled = ImageSet([0], files=files, size=8, skip_unreadable=True)
    with pytest.raises(UserError, match=r"^no image of a batch can be read: the image .*a\.png"):
        next(TrainLoader(dataset, 3, 0, 0, process(), workers=0))
