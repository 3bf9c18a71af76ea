"""The pictures show what the files of a run and its networks say."""

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba
from PIL import Image
from sklearn.metrics import confusion_matrix

import data
import main
import visualize
from augmentation import OPERATIONS, ImageViews
from data import load_dataset
from engine.runtime import Runtime
from models import build_model, head_of
from pictures import drawing
from run.record import read_run
from utils import UserError

PIXELS = round(drawing.WIDTH * drawing.PIXELS_PER_INCH)
PROGRAM = Path(visualize.__file__)
STEPS = ["--total-steps", "20", "--eval-step", "5", "--device", "cpu", "--finetune-epochs", "0"]
MOONS = ["--dataset", "twomoons", "--num-labeled", "6", "--batch-size", "6", *STEPS]
DIGITS = ["--dataset", "digits", "--num-labeled", "10", "--batch-size", "10", "--resize", "8", *STEPS]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder in which main.py trained four short runs: the working directory of this module."""
    folder, before = tmp_path_factory.mktemp("runs"), os.getcwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(folder)
    try:
        main.main(["--name", "sup", "--method", "supervised", *MOONS])
        teacher = ["--teacher-checkpoint", "checkpoint/sup_last.pth.tar"]
        main.main(["--name", "pl", "--method", "pseudo-label", "--mu", "2", *teacher, *MOONS])
        main.main(["--name", "mpl", "--mu", "2", *MOONS, "--finetune-epochs", "3"])
        as_recipes = ["--amp", "--channels-last"]
        main.main(["--name", "digits", "--mu", "1", "--model", "wrn-10-1", *as_recipes, *DIGITS])
        yield folder
    finally:
        os.chdir(before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def records(name, key):
    lines = [json.loads(line) for line in Path("results", name, "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if key in line], [line[key] for line in lines if key in line]


def summary(name):
    return json.loads(Path("results", name, "summary.json").read_text())


def pixels(path):
    image = Image.open(path)
    assert image.format == "PNG"
    return np.asarray(image.convert("RGB"))


def assert_drawn(path):
    """README width, something in every quarter, and more than one colour."""
    image = pixels(path)
    height, width, _ = image.shape
    assert width == PIXELS and 0.2 * width < height < 1.5 * width
    for quarter in (part for half in np.array_split(image, 2) for part in np.array_split(half, 2, axis=1)):
        assert (quarter < 200).any()
    assert len({tuple(pixel) for pixel in image[::5, ::5].reshape(-1, 3).tolist()}) > 20


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines() if not line.get_label().startswith("_")}


def command(monkeypatch, *words):
    """The exit status of ``python visualize.py …``, in this process, which goes on."""
    monkeypatch.setattr(sys, "argv", [str(PROGRAM), *map(str, words)])
    try:
        return visualize.run(sys.argv[1:])
    except SystemExit as stop:  # --help
        return stop.code


# ------------------------------------------------------------------------------------------- finished_run


@pytest.mark.parametrize(
    ("name", "second"), [("mpl", "regions.png"), ("sup", "regions.png"), ("digits", "confusion.png")]
)
def test_training_leaves_pictures(runs, name, second):
    assert_drawn(f"results/{name}/curves.png") if name != "sup" else pixels("results/sup/curves.png")
    assert_drawn(f"results/{name}/{second}")
    assert not list(Path("results", name).glob(".*"))  # no temporary files


def test_finished_run_prints_nothing_and_returns_the_paths(runs, capsys):
    paths = visualize.finished_run("results/sup")
    assert capsys.readouterr() == ("", "")
    assert [Path(path).name for path in paths] == ["curves.png", "regions.png"]
    assert all(os.path.isfile(path) for path in paths)


def test_importing_loads_no_drawing_library():
    code = "import sys, visualize; print([m for m in ('matplotlib', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr


# ------------------------------------------------------------------------------------------------- curves


def test_curves_plot_the_values_of_the_metrics(runs):
    figure = drawing.draw_curves([read_run("results/mpl")])
    losses, accuracies, labels, feedback = figure.axes
    assert set(lines(losses)) == {"labeled_loss", "uda_loss", "student_loss", "test_loss", "finetune_loss"}
    assert set(lines(accuracies)) == {"top1", "finetune_top1"}  # of two classes top-5 is 100 % and left out
    assert set(lines(labels)) == {"pseudo_label_accuracy", "uda_mask"}
    for axes in figure.axes:
        for key, line in lines(axes).items():
            steps, values = records("mpl", key)
            factor = 100 if axes is labels else 1
            np.testing.assert_allclose(line.get_xdata(), steps)
            np.testing.assert_allclose(line.get_ydata(), np.multiply(values, factor))
        assert axes.get_xlabel() == "training step" and axes.get_ylabel()

    (band,) = feedback.collections
    mean, std = (np.array(records("mpl", key)[1]) for key in ("feedback", "feedback_std"))
    corners = band.get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose([corners.min(), corners.max()], [(mean - std).min(), (mean + std).max()])


def test_line_ends_carry_names_that_do_not_overlap(runs):
    figure = drawing.draw_curves([read_run("results/mpl")])
    figure.draw_without_rendering()
    renderer = figure._get_renderer()
    last = summary("mpl")
    assert {text.get_text() for text in figure.axes[1].texts} == {
        f"test {last['top1']:.2f} %",
        f"finetuned {last['finetune_top1']:.2f} %",
    }
    for axes in figure.axes:
        heights = sorted(text.get_window_extent(renderer).intervaly.tolist() for text in axes.texts)
        assert all(low[1] <= high[0] + 4 for low, high in pairwise(heights))
        # as high above each other as the lines end, and each in the colour of its own
        last = sorted((line.get_ydata()[-1], line.get_color()) for line in lines(axes).values())
        texts = sorted(axes.texts, key=lambda text: text.get_window_extent(renderer).y0)
        assert [text.get_color() for text in texts] == [colour for _, colour in last][: len(texts)]


@pytest.mark.parametrize(("confidence", "words"), [("threshold", "above threshold"), ("soft", "mean weight")])
def test_the_mask_is_named_by_what_it_is(runs, confidence, words):
    run = read_run("results/mpl")
    labels = drawing.draw_curves([run._replace(args=run.args | {"confidence": confidence})]).axes[2]
    assert {text.get_text() for text in labels.texts} == {"correct", words}


def test_a_supervised_run_has_no_panels_of_pseudo_labels(runs):
    assert len(drawing.draw_curves([read_run("results/sup")]).axes) == 2


def test_several_runs_are_overlaid(runs):
    figure = drawing.draw_curves([read_run(f"results/{name}") for name in ("sup", "pl", "mpl")])
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    assert "Feedback to the teacher (nats)" in panels
    drawn = [line for line in panels["Test accuracy (top-1, %)"].get_lines() if line.get_label() == "top1"]
    for name, line in zip(("sup", "pl", "mpl"), drawn, strict=True):
        np.testing.assert_allclose(line.get_ydata(), records(name, "top1")[1])
    assert all(axes.get_lines() and axes.get_title(loc="left") for axes in figure.axes)  # no empty panel
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[0] == f"sup  (supervised, top-1 {summary('sup')['top1']:.2f} %)"
    assert records("sup", "top1")[1][-1] == summary("sup")["top1"] != records("sup", "top1")[1][0]
    assert len(words) == 3


def write_curve(folder, name, seed, values, **args):
    """A run with a test accuracy every 5 steps."""
    folder = Path(folder, name)
    folder.mkdir()
    args = json.loads(Path("results/mpl/args.json").read_text()) | {"name": name, "seed": seed, **args}
    (folder / "args.json").write_text(json.dumps(args))
    lines = (json.dumps({"step": 5 * i + 5, "top1": value}) for i, value in enumerate(values))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return read_run(folder)


def test_runs_that_differ_by_their_seed_alone_are_a_line_with_a_band(runs, tmp_path):
    shown = [
        write_curve(tmp_path, "a-0", 0, [10, 50, 90]),
        write_curve(tmp_path, "b-0", 0, [5, 6, 7], mu=7),
        write_curve(tmp_path, "a-1", 1, [20, 56]),  # still going: the mean ends where it does
        write_curve(tmp_path, "a-2", 2, [30, 53, 80]),
    ]
    (axes,) = (figure := visualize.curves_of(shown)).axes
    mean, single = axes.get_lines()
    np.testing.assert_allclose(mean.get_xydata(), [[5, 20], [10, 53]])
    np.testing.assert_allclose(single.get_xydata(), [[5, 5], [10, 6], [15, 7]])
    (band,) = axes.collections  # ± 10 and ± 3; a single run has none
    corners = {tuple(corner) for corner in band.get_paths()[0].vertices.tolist()}
    assert corners == {(5, 10), (5, 30), (10, 50), (10, 56)}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "a  (Meta Pseudo Labels, 3 seeds, top-1 53.00 ± 3.00 %)",
        "b  (Meta Pseudo Labels, top-1 7.00 %)",
    ]
    assert "± one standard deviation" in figure.legends[0].get_title().get_text()

    (axes,) = (figure := visualize.curves_of(shown, each=True)).axes
    assert len(axes.get_lines()) == 4 and not axes.collections
    assert figure.legends[0].get_title().get_text() == ""


def test_shares_that_hardly_change_look_so(runs):
    run = read_run("results/pl")
    for number, record in enumerate(run.records):
        record["pseudo_label_accuracy"] = 0.8455 + 1e-7 * (number % 2)
    (axes,) = (
        axes for axes in drawing.draw_curves([run]).axes if axes.get_title(loc="left") == "Pseudo labels"
    )
    bottom, top = axes.get_ylim()
    assert top - bottom > 1 and bottom < 84.55 < top
    assert [text.get_text() for text in axes.texts] == ["correct"]


def test_half_a_line_of_metrics_is_left_out(runs, tmp_path):
    for name in ("args.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes(Path("results/mpl", name).read_bytes())
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "top1": 9')
    assert read_run(tmp_path).records == read_run("results/mpl").records


# ------------------------------------------------------------------------------------------------ regions


def network_of(name, key):
    state = torch.load(f"checkpoint/{name}_last.pth.tar", weights_only=True)[key]
    network = build_model("mlp-2-8-8-2", 2, image_size=0)
    network.load_state_dict(state)
    return network.eval()


def test_regions_are_the_argmax_of_the_networks(runs):
    figure = visualize.regions_of([read_run("results/mpl")])
    last = summary("mpl")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        f"teacher\ntest accuracy {last['teacher_top1']:.2f} %",
        f"student (EMA)\ntest accuracy {last['top1']:.2f} %",
    ]
    for axes, key in zip(figure.axes, ("teacher_state_dict", "avg_state_dict"), strict=True):
        (image,) = axes.images
        drawn = np.asarray(image.get_array())
        left, right, bottom, top = image.get_extent()
        rows, columns = drawn.shape
        network = network_of("mpl", key)
        for row, column in np.random.RandomState(0).randint((0, 0), (rows, columns), size=(300, 2)):
            x = left + (column + 0.5) / columns * (right - left)
            y = bottom + (row + 0.5) / rows * (top - bottom)
            logits = network(torch.tensor([[x, y]], dtype=torch.float32))[0].detach()
            assert drawn[row, column] == logits.argmax() or (logits[0] - logits[1]).abs() < 1e-4
        assert image.origin == "lower"
        for k in range(2):  # the pale colour of the class's points
            assert image.to_rgba(np.array([[k]]))[0, 0].tolist() == pytest.approx(to_rgba(drawing.PALE[k]))


def test_regions_mark_the_labelled_points_of_the_run(runs):
    figure = visualize.regions_of([read_run("results/mpl")])
    dataset = load_dataset("twomoons", num_labeled=6, seed=0)
    unlabelled, upper, lower = figure.axes[0].get_lines()
    assert len(unlabelled.get_xdata()) == 2000
    for k, line in enumerate((upper, lower)):
        expected = dataset.labeled.images[dataset.labeled.targets == k].numpy()
        np.testing.assert_allclose(line.get_xydata(), expected)
    assert upper.get_color() != lower.get_color() and upper.get_marker() != lower.get_marker()


def test_regions_of_three_methods_side_by_side(runs, monkeypatch, capsys):
    figure = visualize.regions_of([read_run(f"results/{name}") for name in ("sup", "pl", "mpl")])
    names = {"sup": "supervised", "pl": "pseudo labels", "mpl": "Meta Pseudo Labels"}
    for axes, (name, method) in zip(figure.axes, names.items(), strict=True):
        assert axes.get_title() == f"{method}\ntest accuracy {summary(name)['top1']:.2f} %"
    folders = [f"results/{name}" for name in names]
    assert command(monkeypatch, "regions", *folders, "--out", "three/regions.png") == 0
    assert capsys.readouterr().out == "three/regions.png\n"
    assert_drawn("three/regions.png")


# ----------------------------------------------------------------------------------- confusion and features


def test_confusion_counts_the_test_images(runs):
    networks, dataset, views, runtime = visualize.load(read_run("results/digits"))
    _, truth, predicted = visualize.penultimate_features(
        networks["student (EMA)"], dataset.test, views, runtime
    )
    content = json.loads(Path("results/digits/confusion.json").read_text())
    assert content["classes"] == list("0123456789")
    assert content["counts"] == confusion_matrix(truth, predicted, labels=range(10)).tolist()

    counts, last = np.array(content["counts"]), summary("digits")
    assert counts.sum() == len(dataset.test) == last["test_images"] and counts.dtype == np.int64
    assert 100 * counts.trace() / counts.sum() == last["top1"]
    assert (counts.sum(axis=1) == dataset.test.targets.bincount().numpy()).all()


def test_confusion_needs_the_folder_of_the_run_alone(runs, tmp_path, monkeypatch, capsys):
    """Neither checkpoint nor data: the run says that both are where nothing is."""
    top1, folder = summary("digits")["top1"], tmp_path / "results/digits"
    folder.mkdir(parents=True)
    shutil.copy("results/digits/confusion.json", folder)
    args = json.loads(Path("results/digits/args.json").read_text())
    args |= {"save_path": str(tmp_path / "gone"), "data_path": str(tmp_path / "gone")}
    (folder / "args.json").write_text(json.dumps(args))
    monkeypatch.setattr(data, "load_dataset", None)
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, "confusion", "results/digits") == 0
    assert capsys.readouterr().out == "results/digits/confusion.png\n"
    assert_drawn("results/digits/confusion.png")

    axes = visualize.confusion_of([read_run(folder)]).axes[0]
    counts = np.array(json.loads((folder / "confusion.json").read_text())["counts"])
    shown = np.asarray(axes.images[0].get_array())
    np.testing.assert_allclose(shown, 100 * counts / counts.sum(axis=1, keepdims=True))
    words = {tuple(map(round, text.get_position()[::-1])): text.get_text() for text in axes.texts}
    assert words == {
        (i, j): f"{shown[i, j]:.0f} %\n{counts[i, j]}" for i in range(10) for j in range(10) if counts[i, j]
    }
    assert axes.get_title(loc="left") == f"digits (Meta Pseudo Labels): {top1:.2f} % of 500 test images right"
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("true class", "predicted class")
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == list("0123456789")


@pytest.mark.parametrize("k", [2, 20, 100])
def test_confusion_of_any_number_of_classes(k, tmp_path):
    counts = np.random.RandomState(0).randint(1, 9, (k, k))
    figure = drawing.draw_confusion([("title", counts)], [f"a long name {i}" for i in range(k)])
    assert len(figure.axes[0].texts) == (k * k if k <= 20 else 0)
    assert_drawn(drawing.save(figure, tmp_path / "confusion.png"))


def test_features_are_what_the_last_layer_reads(runs):
    networks, dataset, views, _ = visualize.load(read_run("results/digits"))
    network, float32 = networks["student (EMA)"], Runtime("cpu")
    features, truth, predicted = visualize.penultimate_features(network, dataset.test, views, float32)
    head = head_of(network)
    logits = torch.nn.functional.linear(features, head.weight, head.bias)
    assert torch.equal(logits.argmax(dim=1), predicted)
    assert torch.equal(truth, dataset.test.targets) and len(head._forward_pre_hooks) == 0


def test_features_picture(runs, monkeypatch, tmp_path):
    monkeypatch.setattr(visualize, "MOST_POINTS", {"test": 50, "unlabelled": 40, "labelled": 30})
    monkeypatch.setattr(visualize, "MOST_CLASSES", 8)
    figure = visualize.features_of(read_run("results/digits"))
    (axes,) = figure.axes
    counts = dict.fromkeys((2.5, 4.5, 9), 0)
    for line in axes.get_lines():
        if line.get_fillstyle() == "full":  # no ring
            counts[line.get_markersize()] += len(line.get_xdata())
    assert counts == {2.5: 40, 4.5: 50, 9: 8}  # unlabelled, test, one labelled image of each of 8 classes
    title = axes.get_title(loc="left")
    assert "50 test, 40 unlabelled, 8 labelled images, 8 of 10 classes" in title
    assert [text.get_text() for text in axes.texts] == list("01234567")

    # rings around those that the student takes for another class
    networks, dataset, views, runtime = visualize.load(read_run("results/digits"))
    shown = (dataset.test.targets < 8).nonzero()[:, 0]
    shown = dataset.test.subset(shown[np.linspace(0, len(shown) - 1, 50, dtype=np.int64)])
    _, truth, predicted = visualize.penultimate_features(networks["student (EMA)"], shown, views, runtime)
    wrong = int((truth != predicted).sum())
    (rings,) = [line for line in axes.get_lines() if line.get_fillstyle() == "none"]
    assert 0 < len(rings.get_xdata()) == wrong != 25
    assert axes.get_xlabel().endswith(f"predicted wrongly ({wrong})")
    assert_drawn(drawing.save(figure, tmp_path / "features.png"))


def test_principal_components_of_labelled_unlabelled_and_test_images(runs):
    """All of them, each set's features on the same two axes: those of an eigendecomposition in float64."""
    figure = visualize.features_of(read_run("results/mpl"), projection="pca")
    (axes,) = figure.axes
    networks, moons, views, runtime = visualize.load(read_run("results/mpl"), only_test=False)
    sets = [moons.test, moons.unlabeled.subset(np.linspace(0, 1999, 800, dtype=int)), moons.labeled]
    sets[0] = moons.test.subset(np.linspace(0, len(moons.test) - 1, 1000, dtype=int))
    network = networks["student (EMA)"]
    read = [visualize.penultimate_features(network, each, views, runtime) for each in sets]
    features = torch.cat([features for features, _, _ in read]).double()
    centred = features - features.mean(dim=0)
    variances, directions = torch.linalg.eigh(centred.T @ centred)
    expected = (centred @ directions[:, [-1, -2]]).numpy()
    labels = torch.cat([truth for _, truth, _ in read])[-6:]

    drawn = {line.get_label(): line for line in axes.get_lines()}
    unlabelled = drawn["unlabelled"].get_xydata()
    sign = np.sign((unlabelled * expected[1000:1800]).sum(axis=0))  # of an axis is arbitrary
    np.testing.assert_allclose(unlabelled, expected[1000:1800] * sign, atol=1e-4)
    for k, name in enumerate(moons.classes):
        np.testing.assert_allclose(
            drawn[name].get_xydata(), (expected * sign)[:1000][read[0][1] == k], atol=1e-4
        )
    marked = [line for line in axes.get_lines() if line.get_markersize() == 9 and len(line.get_xdata()) == 3]
    for k, line in enumerate(marked):
        np.testing.assert_allclose(line.get_xydata(), (expected * sign)[-6:][labels == k], atol=1e-4)
        assert line.get_color() == drawn[moons.classes[k]].get_color()
    assert len(marked) == 2
    share = 100 * variances / variances.sum()
    assert f"{share[-1]:.0f} % and {share[-2]:.0f} % of the variance" in axes.get_xlabel()


def test_features_of_an_evaluation_are_of_its_test_images(runs, monkeypatch):
    main.main(["--evaluate", "--resume", "checkpoint/digits_last.pth.tar", "--name", "measured"])
    monkeypatch.setattr(visualize, "MOST_POINTS", {"test": 20})
    title = visualize.features_of(read_run("results/measured")).axes[0].get_title(loc="left")
    assert "features of 20 test images" in title


# -------------------------------------------------------------------------------- several matrices, classes


def drawn_counts(axes):
    """The numbers that stand in a matrix."""
    words = {tuple(map(round, text.get_position()[::-1])): text.get_text() for text in axes.texts}
    return {place: int(text.split("\n")[1]) for place, text in words.items()}


def test_matrices_of_several_runs_side_by_side(runs, monkeypatch, capsys):
    names = ("sup", "mpl", "pl")
    figure = visualize.confusion_of([read_run(f"results/{name}") for name in names])
    for axes, name in zip(figure.axes[:3], names, strict=True):
        counts = json.loads(Path("results", name, "confusion.json").read_text())["counts"]
        assert drawn_counts(axes) == {
            (i, j): counts[i][j] for i in range(2) for j in range(2) if counts[i][j]
        }
        title = " ".join(axes.get_title(loc="left").split())
        assert title.startswith(f"{name} (") and f"{summary(name)['top1']:.2f} % of " in title
    assert command(monkeypatch, "confusion", "results/sup", "results/mpl") == 0
    assert capsys.readouterr().out == "results/confusion.png\n"
    assert_drawn("results/confusion.png")


def test_the_teacher_is_its_moving_average_where_it_has_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main.main(["--name", "roles", "--mu", "2", *MOONS, "--switch-every", "2", "--ensemble"])
    networks, *rest = visualize.load(read_run("results/roles"))
    state = torch.load("checkpoint/roles_last.pth.tar", weights_only=True)
    for title, key in ((visualize.TEACHER, "teacher_avg_state_dict"), (visualize.STUDENT, "avg_state_dict")):
        assert all(
            torch.equal(value, state[key][name]) for name, value in networks[title].state_dict().items()
        )
    headings = [axes.get_title(loc="left") for axes in visualize.roles_of(read_run("results/roles")).axes]
    assert f"{summary('roles')['teacher_top1']:.2f} %" in headings[0]
    assert f"{summary('roles')['ensemble_top1']:.2f} %" in headings[2]
    outputs = visualize.report.outputs_of(networks, *rest)
    who, mean = outputs.prediction(read_run("results/roles"))
    assert who == "ensemble of teacher and student"
    right = (mean.argmax(dim=1) == outputs.targets).double().mean()
    assert 100 * right.item() == pytest.approx(summary("roles")["top1"])
    heading = visualize.calibration_of(read_run("results/roles"), outputs).get_suptitle()
    assert heading == "roles (Meta Pseudo Labels), ensemble of teacher and student, test points"


def test_a_run_that_only_finetuned_selected_its_finetuned_network(runs):
    last = "checkpoint/mpl_last.pth.tar"
    main.main(["--finetune", "--resume", last, "--name", "tuned-alone", "--finetune-epochs", "2"])
    path = visualize.checkpoint_path(read_run("results/tuned-alone"))
    assert Path(path).name == "tuned-alone_finetune_best.pth.tar" and os.path.isfile(path)
    path = visualize.checkpoint_path(read_run("results/mpl"))  # trained, then finetuned
    assert Path(path).name == "mpl_best.pth.tar"


def test_roles_are_teacher_student_and_the_mean_of_their_probabilities(runs, monkeypatch, capsys):
    figure = visualize.roles_of(read_run("results/mpl"))
    moons = load_dataset("twomoons", num_labeled=6)
    images, truth = moons.test.images, moons.test.targets.numpy()
    keys = ("teacher_state_dict", "avg_state_dict")
    with torch.no_grad():
        first, second = (network_of("mpl", key)(images).double().softmax(dim=1) for key in keys)
    for axes, each in zip(figure.axes[:3], (first, second, (first + second) / 2), strict=True):
        expected = confusion_matrix(truth, each.argmax(dim=1))
        assert drawn_counts(axes) == {
            (i, j): expected[i, j] for i in range(2) for j in range(2) if expected[i, j]
        }
    titles = [axes.get_title(loc="left").split("\n")[0] for axes in figure.axes[:3]]
    assert titles == ["mpl, teacher", "mpl, student (EMA)", "mpl, ensemble of both"]
    assert f"{summary('mpl')['teacher_top1']:.2f} %" in figure.axes[0].get_title(loc="left")
    before = Path("results/mpl/args.json").stat().st_mtime
    assert command(monkeypatch, "confusion", "results/mpl", "--roles") == 0
    assert capsys.readouterr().out == "results/mpl/confusion_roles.png\n"
    assert Path("results/mpl/args.json").stat().st_mtime == before


@pytest.mark.parametrize("name", ["short", "name-" * 8, "name-" * 12, "name-" * 99])
def test_a_legend_is_no_wider_than_its_picture(name):
    rows = {name: np.array([10.0, 90.0]), f"{name}2": np.array([20.0, 80.0])}
    figure = drawing.draw_classes(rows, ["cat", "dog"], "Accuracy")
    figure.draw_without_rendering()
    extent = figure.legends[0].get_window_extent()
    assert extent.x0 >= 0 and extent.x1 <= figure.bbox.x1
    entries = [text.get_window_extent() for text in figure.legends[0].get_texts()]
    assert (entries[0].y0 == entries[1].y0) == (len(name) <= 40)  # beside each other


def write_counts(folder, name, counts, classes):
    folder = Path(folder, name)
    folder.mkdir(parents=True)
    shutil.copy("results/digits/args.json", folder)
    (folder / "confusion.json").write_text(json.dumps({"classes": classes, "counts": counts}))
    return read_run(folder)


def test_accuracies_of_classes_are_sorted_by_their_mean(runs, tmp_path):
    classes = ["a", "b", "c", "d"]
    first = [[8, 2, 0, 0], [0, 9, 1, 0], [1, 1, 2, 0], [0, 0, 0, 0]]  # 80, 90, 50 %; no image of d
    second = [[5, 5, 0, 0], [0, 10, 0, 0], [0, 0, 4, 0], [0, 0, 0, 0]]  # 50, 100, 100 %
    shown = [write_counts(tmp_path, *each, classes) for each in (("one", first), ("two", second))]
    figure = visualize.classes_of(shown)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "c", "b"]
    for line, expected in zip(axes.get_lines(), ([80, 50, 90], [50, 100, 100]), strict=True):
        np.testing.assert_allclose(line.get_xdata(), expected)
        np.testing.assert_allclose(line.get_ydata(), range(3))
    bottom, top = axes.get_ylim()
    assert bottom > top  # the lowest stands on top
    one, two = axes.get_lines()
    assert one.get_color() != two.get_color() and one.get_marker() != two.get_marker()
    words = [text.get_text() for text in figure.legends[0].get_texts()]
    assert words[0] == "one (Meta Pseudo Labels): 79.17 % of 24 test images right"
    assert "without 1 classes that have no test images" in figure.get_suptitle()


@pytest.mark.parametrize("k", [2, 30, 200, 300])
def test_names_of_classes_do_not_overlap(k, tmp_path):
    random = np.random.RandomState(0)
    rows = {name: 100 * random.rand(k) for name in "ab"}
    figure = drawing.draw_classes(rows, [f"a long name of class {i}" for i in range(k)], "title")
    path = drawing.save(figure, tmp_path / "classes.png")
    assert pixels(path).shape[1] == PIXELS
    renderer, shown = figure._get_renderer(), 0
    for axes in figure.axes:
        boxes = [label.get_window_extent(renderer) for label in axes.get_yticklabels()]
        shown += len(boxes)
        assert all(upper.y0 >= lower.y1 - 1 for upper, lower in pairwise(boxes))
        assert all(box.x0 >= 0 and box.height >= 9 for box in boxes)
    assert shown == min(k, 200)
    assert ("the lowest 200 of 300" in figure.get_suptitle()) == (k == 300)
    means = np.mean(list(rows.values()), axis=0)
    drawn = np.mean(
        [np.concatenate([axes.get_lines()[i].get_xdata() for axes in figure.axes]) for i in (0, 1)], 0
    )
    np.testing.assert_allclose(drawn, np.sort(means)[:200])


# ------------------------------------------------------------------------------------- SVG, letters and fonts


def test_every_picture_can_be_an_svg(runs, monkeypatch, capsys):
    moons, digits = "results/mpl", "results/digits"
    for number, words in enumerate(
        (["curves", moons], ["regions", moons], ["confusion", digits], ["classes", digits], ["augment"])
    ):
        path = f"svg/{number}.svg"
        assert command(monkeypatch, *words, "--out", path) == 0
        root = ElementTree.parse(path).getroot()
        assert root.tag.endswith("svg") and root.get("width") == f"{72 * drawing.WIDTH:g}pt"
        assert len(list(root.iter("{http://www.w3.org/2000/svg}use"))) > 20  # letters, as outlines
        assert not list(root.iter("{http://www.w3.org/2000/svg}text"))


DOG, CAT, COW = "\U0010abc0", "\U0010abc1", "\U0010abc2"  # letters for private use


@pytest.fixture
def font(tmp_path):
    """A font that has two letters alone, which no other one has, installed for one test."""
    import matplotlib
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen
    from matplotlib.font_manager import fontManager

    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    names, box = [".notdef", "dog", "cat"], pen.glyph()
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(names)
    builder.setupCharacterMap({ord(DOG): "dog", ord(CAT): "cat"})
    builder.setupGlyf(dict.fromkeys(names, box))
    builder.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupNameTable({"familyName": "Animals", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "animals.ttf")
    fonts, families = list(fontManager.ttflist), matplotlib.rcParams["font.family"]
    fontManager.addfont(tmp_path / "animals.ttf")
    yield
    fontManager.ttflist[:] = fonts
    matplotlib.rcParams["font.family"] = families


@pytest.mark.filterwarnings("error")  # of a glyph that is missing
def test_class_names_of_any_script_are_taken_from_an_installed_font(font, capsys, tmp_path):
    counts = np.eye(6, dtype=np.int64)
    classes = [DOG, CAT + DOG, "قطة", "😀", "$a$ ö", DOG + COW]
    figure = drawing.draw_confusion([(f"{CAT} and {COW}", counts)], classes)
    drawing.save(figure, tmp_path / "confusion.png")
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [DOG, CAT + DOG, "قطة", "😀", r"\$a\$ ö", "class 5"]
    assert axes.get_title(loc="left") == f"{CAT} and U+10ABC2"
    assert "Animals" in axes.title.get_fontfamily()
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "no installed font can write 1 of 6 class names" in err and f"{DOG}{COW} is class 5" in err


@pytest.mark.filterwarnings("error")
def test_names_that_no_font_can_write_are_numbers(capsys, tmp_path):
    figure = drawing.draw_classes({COW: np.array([1.0, 2.0])}, [DOG, "cat"], "title")
    drawing.save(figure, tmp_path / "classes.png")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["class 0", "cat"]
    assert "1 of 2 class names" in capsys.readouterr().err


def test_long_names_are_shortened_by_their_width():
    assert drawing.shortened("a name of 16 let") == "a name of 16 let"
    assert drawing.shortened("a name of 17 lett") == "a name of 17 le…"
    assert drawing.shortened("犬" * 8) == "犬" * 8 and drawing.shortened("犬" * 9) == "犬" * 7 + "…"


# ------------------------------------------------------------------------------------------- augmentation


def test_each_operation_is_shown_with_its_argument():
    images = torch.randint(
        0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    views = ImageViews(32, (0.5,) * 3, (0.25,) * 3)
    figure = visualize.augmentation_picture(images, views, seed=1, heading="images")
    grid, operations = figure.axes[:24], figure.axes[24:]
    assert len(operations) == 16

    titles = [axes.get_title().split("\n") for axes in operations[1:]]
    assert [name for name, _ in titles] == list(OPERATIONS)
    arguments = dict(titles)
    assert arguments["Invert"] == "no argument" and arguments["Rotate"] == "48°"
    assert arguments["Solarize"] == "from level 153" and arguments["TranslateX"] == "6.4 px"

    shown = {axes.get_title().split("\n")[0]: np.asarray(axes.images[0].get_array()) for axes in operations}
    original = images[0].permute(1, 2, 0).numpy()
    assert (shown["original"] == original).all() and (shown["Invert"] == 255 - original).all()
    assert (shown["Cutout"][10:22, 10:22] == 128).all() and (shown["Cutout"][:10] == original[:10]).all()
    assert (shown["TranslateX"][:, 27:] == 128).all()

    generator = torch.Generator().manual_seed(1)
    rows = [images, views.weak(images, generator), *(views.strong(images, generator) for _ in range(4))]
    for axes, image in zip(grid, torch.cat(rows), strict=True):
        assert (np.asarray(axes.images[0].get_array()) == image.permute(1, 2, 0).numpy()).all()


def test_picked_images_are_of_as_many_classes_as_there_are():
    targets = np.repeat([0, 1, 2], [50, 30, 2])
    for seed in range(5):
        picked = visualize.pick(targets, 8, seed)
        assert len(set(picked)) == 8
        assert np.bincount(targets[picked]).tolist() == [3, 3, 2]
        assert set(targets[picked[:3]]) == {0, 1, 2}
    assert visualize.pick(targets, 8, 0) != visualize.pick(targets, 8, 1)


def test_real_images_have_the_views_of_their_data_set():
    """Digits are never mirrored; the flags of RandAugment are those of the picture."""
    figure = visualize.augmentation_of("digits", "data", randaug=(1, 9), seed=2, resize=8, count=5)
    dataset = load_dataset("digits", num_labeled=1.0, resize=8)
    images = dataset.labeled.images[visualize.pick(dataset.labeled.targets, 5, 2)]
    views = ImageViews(8, dataset.mean, dataset.std, flip=False, crop="pad", randaug=(1, 9))
    generator = torch.Generator().manual_seed(2)
    rows = [images, views.weak(images, generator), views.strong(images, generator)]
    for axes, image in zip(figure.axes, torch.cat(rows), strict=False):
        assert (np.asarray(axes.images[0].get_array()) == image.permute(1, 2, 0).numpy()).all()


def test_augment_command(runs, monkeypatch, capsys):
    assert command(monkeypatch, "augment", "--dataset", "digits", "--randaug", "1", "9") == 0
    assert capsys.readouterr().out == "results/augment_digits.png\n"
    assert_drawn("results/augment_digits.png")


# ------------------------------------------------------------------------------------------------- tables


def write_run(folder, name, seed, top1, best_top1=None, finetune_top1=None, **args):
    """A record of a run, with the arguments of a real one."""
    folder = Path(folder, name)
    folder.mkdir(parents=True)
    args = json.loads(Path("results/mpl/args.json").read_text()) | {"name": name, "seed": seed, **args}
    found = {"seed": seed, "top1": top1, "best_top1": best_top1, "finetune_top1": finetune_top1}
    found["selection"] = "last" if best_top1 is None else "val"
    (folder / "args.json").write_text(json.dumps(args))
    (folder / "summary.json").write_text(json.dumps(summary("mpl") | found))
    return folder


def cells(table):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_a_table_of_real_runs(runs, monkeypatch, capsys):
    assert command(monkeypatch, "table", "results/sup", "results/mpl") == 0
    head, rule, *rows = cells(capsys.readouterr().out)
    assert head == ["run", "seeds", "top-1 (%), mean ± s.d.", "finetuned (%), mean ± s.d."]
    assert rule == ["---"] * 4
    tuned = f"{summary('mpl')['finetune_top1']:.2f}"
    assert rows == [
        ["sup", "1", f"{summary('sup')['top1']:.2f}", "–"],
        ["mpl", "1", f"{summary('mpl')['top1']:.2f}", tuned],
    ]


def test_runs_that_differ_by_their_seed_alone_are_a_row(runs, tmp_path):
    """Whatever they are called and wherever they ran: mean, s.d., paired difference, standard error."""
    teacher = {"method": "pseudo-label", "teacher_checkpoint": "/there/uda_2_last.pth.tar"}
    folders = [
        write_run(tmp_path, "a-0", 0, 90.0, 91.0, device="cpu", save_path="/here"),
        write_run(tmp_path, "a-1", 1, 92.0, 91.0, 95.0, device="cuda", save_path="/there"),
        write_run(tmp_path, "other-name", 2, 94.0, 94.0, resume="/there/a_last.pth.tar", start_step=9),
        write_run(tmp_path, "b-1", 1, 92.5, threshold=0.9),
        write_run(tmp_path, "b-2", 2, 95.5, threshold=0.9),
        write_run(tmp_path, "b-3", 3, 70.0, threshold=0.9),
        write_run(tmp_path, "c.s2", 2, 99.0, **teacher),
        write_run(tmp_path, "c.s3", 3, 97.0, **teacher | {"teacher_checkpoint": "uda_3_last.pth.tar"}),
        write_run(tmp_path, "d-4", 4, 80.0, threshold=0.8),
    ]
    table = visualize.table_of([read_run(folder) for folder in folders], "a")
    head, _, *rows = cells(table)
    units = [f"{name} (%), mean ± s.d." for name in ("top-1", "chosen by validation", "finetuned")]
    minus = "minus a, mean ± s.e."
    assert head == ["run", "seeds", units[0], minus, units[1], minus, units[2], minus]
    assert rows == [
        ["a", "3", "92.00 ± 2.00", "–", "92.00 ± 1.73", "–", "95.00 (1 of 3)", "–"],
        # seeds 1 and 2: 0.5 and 1.5, s.d. 0.7071, by the square root of two 0.5
        ["b", "3", "86.00 ± 13.94", "+1.00 ± 0.50 (2 of 3)", "–", "–", "–", "–"],
        ["c", "2", "98.00 ± 1.41", "+5.00 (1 of 2)", "–", "–", "–", "–"],
        ["d", "1", "80.00", "–", "–", "–", "–", "–"],
    ]


def test_rows_of_one_name_are_told_apart(runs, tmp_path):
    """Other arguments are another configuration; so is the evaluation of a run."""
    folders = [
        write_run(tmp_path / "first", "a-0", 0, 90.0),
        write_run(tmp_path / "second", "a-0", 0, 91.0, mu=3),
        write_run(tmp_path / "first", "a-0_last", 0, 90.0, evaluate=True),
    ]
    names = list(visualize.rows_of([read_run(folder) for folder in folders]))
    assert names == ["a", os.path.relpath(folders[1]), "a_last"]


# ------------------------------------------------------------------------------------------------- errors


@pytest.fixture
def broken(runs):
    """Folders of runs that something is wrong with."""
    damage = {"confusion.json": '{"classes": ["a", "b"], "counts": [[1, 2]]}', "summary.json": '{"seed": 0'}
    worded = {"summary.json": json.dumps(summary("mpl") | {"top1": "high"})}
    kinds = {"empty": {}, "young": {}, "lost": {}, "damaged": {}, "uncounted": damage, "worded": worded}
    kinds |= {"stopped": {}}
    Path("checkpoint/stopped_last.pth.tar").touch()
    for name, files in kinds.items():
        folder = Path("broken", name)
        folder.mkdir(parents=True, exist_ok=True)
        if name != "empty":
            args = json.loads(Path("results/mpl/args.json").read_text()) | {"name": name}
            files["args.json"] = json.dumps(args)
        if name == "damaged":
            files["metrics.jsonl"] = "not json}\n"
        for file, text in files.items():
            (folder / file).write_text(text)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["curves", "nowhere"], "nowhere is not the folder of a run"),
        (["curves", "broken/empty"], "not the folder of a run"),
        (["curves", "broken/young"], "no metrics yet"),
        (["curves", "broken/damaged"], "cannot be read"),
        (["curves", "results/mpl", "--out", "curves.jpg"], "curves.jpg does not end in .png or .svg"),
        (["curves", "results/mpl", "results/mpl"], "and seed: leave out one of the two, or give --each"),
        (["regions", "results/sup", "results/digits"], "not a two-moons run"),
        (["regions", "broken/lost"], "there is no checkpoint"),
        (["features", "results/digits", "--save-path", "nowhere"], "there is no checkpoint nowhere"),
        (["confusion", "broken/lost"], "python main.py --evaluate --resume "),
        (["confusion", "broken/stopped"], "stopped was stopped before its first evaluation"),
        (["calibration", "broken/stopped"], "--resume auto continues it"),
        (["confusion", "broken/uncounted"], "2 classes, but counts of shape (1, 2)"),
        (
            ["confusion", "results/digits", "--save-path", "nowhere"],
            "--data-path and --save-path have an effect only with --roles",
        ),
        (["confusion", "results/digits", "results/mpl"], "have different classes"),
        (["classes", "results/digits", "results/mpl"], "have different classes"),
        (["confusion", "results/sup", "--roles"], "the checkpoint of sup has no teacher"),
        (["confusion", "results/sup", "results/mpl", "--roles"], "the networks of one run"),
        (["features", "results/mpl", "--projection", "umap"], "invalid choice: 'umap'"),
        (["table", "results/mpl", "broken/empty"], "not the folder of a run"),
        (["table", "results/mpl", "broken/young"], "a run writes it when its training ends"),
        (["table", "results/mpl", "broken/uncounted"], "summary.json cannot be read"),
        (["table", "results/mpl", "broken/worded"], "top1 is no number"),
        (
            ["table", "results/mpl", "results/mpl"],
            "have the same arguments and seed: leave out one of the two",
        ),
        (
            ["table", "results/mpl", "--baseline", "nothing"],
            "there is no row nothing: give --baseline one of mpl",
        ),
        (["augment", "--dataset", "folder", "--data-path", "nowhere"], "there is no folder 'nowhere'"),
        (["augment", "--randaug", "-1", "3"], "-1 is out of range"),
    ],
)
def test_a_mistake_gets_one_sentence_and_status_2(broken, monkeypatch, capsys, words, message):
    assert command(monkeypatch, *words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("visualize.py: ") and err.count("\n") == 1
    assert message in err


def test_runs_without_an_accuracy_are_left_out_of_curves_with_a_line(runs, monkeypatch, capsys):
    Path("results/tuned").mkdir(exist_ok=True)
    args = json.loads(Path("results/mpl/args.json").read_text()) | {"name": "tuned", "seed": 5}
    Path("results/tuned/args.json").write_text(json.dumps(args))
    Path("results/tuned/metrics.jsonl").write_text('{"step": 9, "finetune_loss": 0.1, "finetune_top1": 90}\n')
    assert command(monkeypatch, "curves", "results/mpl", "results/tuned", "--out", "both.png") == 0
    assert "results/tuned has no accuracies to draw: it is left out" in capsys.readouterr().err


def test_two_moons_have_no_images_to_augment(monkeypatch, capsys):
    assert command(monkeypatch, "augment", "--dataset", "twomoons") == 2
    assert "twomoons" in capsys.readouterr().err


def test_a_checkpoint_of_another_network_is_refused(runs):
    run, path = read_run("results/mpl"), Path("checkpoint/mpl_best.pth.tar")
    before = path.read_bytes()
    content = torch.load(path, weights_only=True)
    torch.save(content | {"networks": {"teacher": "mlp-2-4-2", "student": "mlp-2-4-2"}}, path)
    try:
        with pytest.raises(UserError, match="network"):
            visualize.regions_of([run])
    finally:
        path.write_bytes(before)
