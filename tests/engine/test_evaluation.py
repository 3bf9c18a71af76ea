"""Accuracies of a whole set, and the predictions of a fixed teacher in a file."""

import pytest
import torch
from test_data import picture
from torch import nn

from augmentation import ImageViews, PointViews
from data import Dataset
from engine.evaluation import measure_accuracy, measure_splits, ranked, stored_predictions
from engine.images import ImageSet, fingerprints, read_image
from engine.runtime import Runtime

# ---------------------------------------------------------------- accuracies


def named(truth, answers):
    """A set of points that hold the logits that ``nn.Identity`` gives them: those of ``answers``, of four
    classes."""
    return ImageSet(truth, 5.0 * nn.functional.one_hot(torch.tensor(answers), 4))


def test_classes_without_images_are_no_part_of_the_mean_over_classes():
    """Recalls of 2/3, 1 and 0; class 2 has no images, though one is taken for it."""
    points = named([0, 0, 0, 1, 3], [0, 0, 2, 1, 1])
    members = {"student": nn.Identity()}
    figures, confusion = measure_accuracy(Runtime("cpu"), members, points, PointViews(0, 0))
    assert confusion.tolist() == [[2, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 0]]
    assert figures["top1"] == pytest.approx(100 * 3 / 5)
    assert figures["mean_class_top1"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)


def test_of_equal_classes_the_first_is_named():
    """So that a network that has learned nothing has the same accuracy on every device."""
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0]])
    assert ranked(logits, 3).tolist() == [[1, 2, 0], [0, 1, 2]]


def test_validation_and_test_images_are_measured_apart():
    test, val = named([0, 1, 2, 3], [0, 0, 0, 0]), named([0, 1, 2, 3], [0, 1, 2, 0])
    points = Dataset("given", list("abcd"), [], [], False, 0, "pad", test, test, val, test, [])
    members, views = {"student": nn.Identity()}, PointViews(0, 0)
    figures, confusion, val_top1 = measure_splits(Runtime("cpu"), members, points, views)
    assert (figures["top1"], val_top1) == (25, 75) and confusion[:, 0].sum() == 4
    points.val = None
    assert measure_splits(Runtime("cpu"), members, points, views)[2] is None


# ---------------------------------------------------------------- stored predictions


@pytest.fixture
def files(tmp_path):
    """A data set of five image files, as of a folder of photographs."""
    paths = [str(tmp_path / f"{number}.png") for number in range(5)]
    for number, path in enumerate(paths):
        picture(12, 12, seed=number).save(path)
    unlabeled = ImageSet([0, 1, 0, 1, 0], files=paths, names=paths, size=8, crop="pad")
    return Dataset(
        "folder", ["a", "b"], (0.5,) * 3, (0.25,) * 3, False, 8, "pad", None, unlabeled, None, None, []
    )


def told(dataset, folder, network):
    """The stored predictions of the unlabelled files, and the predictions that they should be."""
    views = ImageViews(dataset.size, dataset.mean, dataset.std)
    table = stored_predictions(f"{folder}/stored/a.pt", network, dataset, views, Runtime("cpu")).float()
    images = [read_image(path, dataset.size, dataset.crop) for path in dataset.unlabeled.files]
    return table, network(views.evaluation(torch.stack(images))).softmax(dim=1).detach()


def reordered(dataset):
    """As where another --seed or a new version lists the same files otherwise."""
    dataset.unlabeled = dataset.unlabeled.subset([4, 2, 0, 1, 3])


def other_content(dataset):
    """The file of the first name is another picture now."""
    picture(12, 12, seed=9).save(dataset.unlabeled.files[0])
    dataset.unlabeled.fingerprints = fingerprints(dataset.unlabeled.files)


def other_mean(dataset):
    dataset.mean = (0.1, 0.5, 0.9)


def other_deviation(dataset):
    dataset.std = (0.25, 0.25, 0.5)


def other_crop(dataset):
    dataset.crop = dataset.unlabeled.crop = "none"


def other_size(dataset):
    dataset.size = dataset.unlabeled.size = 5


CHANGES = [reordered, other_content, other_mean, other_deviation, other_crop, other_size]


@pytest.mark.parametrize("change", CHANGES)
def test_stored_predictions_are_of_these_files_as_they_are_shown(files, tmp_path, change):
    if change is other_content:  # the files of a data set with fingerprints
        files.unlabeled.fingerprints = fingerprints(files.unlabeled.files)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(5), nn.Flatten(), nn.Linear(3 * 5 * 5, 2))
    nn.init.normal_(network[2].weight, std=0.3)
    before, expected = told(files, tmp_path, network)
    torch.testing.assert_close(before, expected, rtol=2e-3, atol=1e-4)
    before = before.clone()  # not of the file, which is written again
    change(files)
    after, expected = told(files, tmp_path, network)
    assert (before - expected).abs().max() > 0.01  # what was stored would be wrong
    torch.testing.assert_close(after, expected, rtol=2e-3, atol=1e-4)
