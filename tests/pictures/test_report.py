"""What a person looks at after a run: calibration, mistakes, the page, in which no name becomes markup."""

import base64
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_visualize import MOONS, assert_drawn, command

import data
import main
import visualize
from augmentation import ImageViews
from engine.runtime import Runtime
from pictures import drawing, report
from pictures.drawing import STUDENT, TEACHER
from run.record import read_run

CLASSES = ["\"quoted\" & 'single'", "<img src=x onerror=alert(1)>", "قطة", "$x_1$ $\\bad{"]
STEPS = "--model wrn-10-1 --resize 8 --num-labeled 8 --batch-size 4 --mu 1 --total-steps 4 --eval-step 2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run on images whose names hold markup, its evaluation, and a run on two moons."""
    folder, before = tmp_path_factory.mktemp("report"), os.getcwd()
    os.chdir(folder)
    random = np.random.RandomState(0)
    for name in CLASSES:
        Path("mine", name).mkdir(parents=True)
        for number in range(10):
            image = Image.fromarray(random.randint(0, 256, (9, 8, 3), dtype=np.uint8))
            image.save(Path("mine", name, f'{number}" onload="x.png'))
    plain = ["--finetune-epochs", "0", "--device", "cpu", "--workers", "0", "--no-pictures"]
    try:
        main.main(["--name", "run", "--dataset", "folder", "--data-path", "mine", *STEPS.split(), *plain])
        main.main(["--evaluate", "--resume", "checkpoint/run_last.pth.tar", "--device", "cpu"])
        main.main(["--name", "moons", "--mu", "2", *MOONS])
        yield folder
    finally:
        os.chdir(before)


@pytest.fixture
def here(trained, tmp_path, monkeypatch):
    """A copy of that folder, which a test may damage, as the working directory."""
    shutil.copytree(trained, tmp_path / "copy")
    for path in tmp_path.glob("copy/results/*/args.json"):
        path.write_text(path.read_text().replace(str(trained), str(tmp_path / "copy")))
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


class Page(HTMLParser):
    """The elements of a page with their attributes, its text, and that every element is closed in order."""

    VOID = ("meta", "img")

    def __init__(self, path):
        super().__init__()
        self.source, self.elements, self.text, self.opened = path.read_text(), [], "", []
        self.feed(self.source)
        self.close()
        assert not self.opened
        self.text = re.sub(r"\s+", " ", self.text)
        self.headings = re.findall(r"<h2>(.*?)</h2>", self.source)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.opened.append(tag)

    def handle_endtag(self, tag):
        assert self.opened.pop() == tag

    def handle_data(self, text):
        self.text += text

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


# --------------------------------------------------------------------------------------------- measurements


def test_calibration_is_the_sum_over_bins():
    probabilities = (4 * torch.randn(300, 4)).softmax(dim=1)
    probabilities[0] = torch.tensor([1.0, 0, 0, 0])
    probabilities[1] = torch.tensor([0.25, 0.25, 0.25, 0.25])
    targets = torch.randint(4, (300,))
    measured = report.calibration(probabilities, targets)
    error = 0
    for m in range(15):
        members = [i for i in range(300) if m / 15 < probabilities[i].max().item() <= (m + 1) / 15]
        assert measured.counts[m] == len(members)
        if members:
            right = np.mean([probabilities[i].argmax().item() == targets[i].item() for i in members])
            sure = np.mean([probabilities[i].max().item() for i in members])
            assert measured.accuracy[m].item() == pytest.approx(right)
            assert measured.confidence[m].item() == pytest.approx(sure)
            error += len(members) / 300 * abs(right - sure)
    assert measured.error == pytest.approx(error) and error > 0.05

    # ten images with 0.75, of which five are right: a quarter too sure
    probabilities = torch.tensor([[0.75, 0.25]]).expand(10, -1)
    measured = report.calibration(probabilities, torch.arange(10) % 2)
    assert measured.error == pytest.approx(0.25) and measured.counts[11] == 10
    axes, _ = drawing.draw_calibration(measured, "heading").axes
    accuracy, gap = axes.containers
    assert [bar.get_height() for bar in accuracy] == [0.5] and gap[0].get_height() == 0.25
    assert axes.get_title(loc="left") == "Expected calibration error 25.00 %"


def test_outputs_are_of_the_images_that_could_be_read(tmp_path):
    files = [tmp_path / f"{number}.png" for number in range(4)]
    pixels = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    files[1].write_text("no image")
    test = data.ImageSet([0, 1, 2, 1], files=files, size=8, crop="pad", skip_unreadable=True)
    views = ImageViews(8, [0.5] * 3, [0.5] * 3)
    networks = {
        title: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
        for title in (TEACHER, STUDENT)
    }
    dataset = data.Dataset("folder", list("abc"), [], [], False, 8, "pad", None, None, None, test, [])
    outputs = report.outputs_of(networks, dataset, views, Runtime("cpu"))
    assert outputs.positions.tolist() == [0, 2, 3] and outputs.targets.tolist() == [0, 2, 1]
    assert list(outputs.probabilities) == [TEACHER, STUDENT]
    for title, network in networks.items():
        expected = network(views.evaluation(pixels[[0, 2, 3]])).softmax(dim=1)
        torch.testing.assert_close(outputs.probabilities[title], expected)

    (disagreed, _) = report.mistakes(outputs, dataset, 1).values()
    teacher, student = outputs.probabilities.values()
    distances = [0.5 * sum(abs(p[k] - q[k]) for k in range(3)) for p, q in zip(teacher, student, strict=True)]
    assert disagreed[0].distance == pytest.approx(max(distances).item())
    worst = [0, 2, 3][int(np.argmax([each.item() for each in distances]))]
    assert torch.equal(disagreed[0].image, pixels[worst]) and disagreed[0].name == str(files[worst])


def test_the_surest_mistakes_come_first():
    student = torch.tensor([[0.9, 0.1, 0], [0.6, 0.4, 0], [0.1, 0.8, 0.1], [0, 0.3, 0.7]])
    test = data.ImageSet(
        [0, 1, 2, 0], images=torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 2, 2)
    )
    dataset = data.Dataset("digits", list("abc"), [], [], False, 2, "pad", None, None, None, test, [])
    outputs = report.Outputs(torch.arange(4), test.targets, {STUDENT: student})
    rows = report.mistakes(outputs, dataset, 2)
    assert list(rows) == ["Most confidently wrong"]
    shown = [
        (each.name, each.true, each.guesses["student"], each.distance)
        for each in rows["Most confidently wrong"]
    ]
    expected = [("2", "c", ("b", 0.8, 0.1), None), ("3", "a", ("c", 0.7, 0.0), None)]
    assert [
        (*each[:2], (each[2][0], *map(pytest.approx, each[2][1:])), each[3]) for each in expected
    ] == shown
    axes = drawing.draw_mistakes(rows, list("abc"), "heading").axes[0]
    assert axes.xaxis.label.get_text() == "true: c\nstudent: b\n   80.0 %, true 10.0 %"
    right = report.Outputs(outputs.positions, student.argmax(dim=1), {STUDENT: student})
    assert report.mistakes(right, dataset, 2) == {"Most confidently wrong": []}


def test_probabilities_in_words():
    shares = (0, 1e-4, 0.0005, 0.5, 0.9994, 0.9996, 1)
    words = ["0.0", "< 0.1", "0.1", "50.0", "99.9", "> 99.9", "100.0"]
    assert [report.percent(share) for share in shares] == [
        f"{each} %".replace(" ", "\N{NO-BREAK SPACE}") for each in words
    ]


def page_of(**values):
    """The page with these values alone, its spaces and line breaks as single spaces."""
    shown = {"name": "run", "method": "mpl", "dataset": "digits", "model": "wrn", "things": "images"}
    shown |= {"command": "", "result": [], "classes": [], "pictures": {}, "missing": None}
    shown |= {"predictor": "student", "mistakes": {}}
    shown["calibration"] = {
        "predictor": "student",
        "checkpoint": "",
        "accuracy": 0,
        "confidence": 0,
        "error": 0,
    }
    return " ".join(report.render(shown | {"pictures": {"calibration": ""}} | values).split())


def test_what_stands_below_an_image():
    image = torch.zeros(3, 8, 8, dtype=torch.uint8)
    guesses = {"teacher": report.Guess("owl", 0.75, 0.2), "student": report.Guess("dog", 0.6, 0.25)}
    item = page_of(mistakes={"Wrong": [report.Example(image, "a.png", "cat", guesses, 0.125)]})
    lines = [re.sub("<.*?>", "", line) for line in re.findall("<span.*?>.*?</span>", item)]
    for line in (
        "true: cat",
        "teacher: owl 75.0 %, true class 20.0 %",
        "student: dog 60.0 %, true class 25.0 %",
        "distance 0.125",
    ):
        assert line in lines
    assert "Test image a.png: cat, which the student takes for dog" in item
    right = {"student": report.Guess("cat", 0.6, 0.6)}
    item = page_of(mistakes={"Right": [report.Example(image, "a.png", "cat", right, None)]})
    assert ">student: <bdi>cat</bdi> 60.0 %</span>" in item and "distance 0" not in item


def test_calibration_in_words():
    """Ten images with 0.75 of which five are right, and ten with 0.95 of which nine are."""
    probabilities = torch.tensor([[0.75, 0.25]] * 10 + [[0.95, 0.05]] * 10)
    targets = torch.tensor([0] * 5 + [1] * 5 + [0] * 9 + [1])
    measured = report.calibration(probabilities, targets)
    about = {"predictor": "student", "checkpoint": "b.pth.tar", "accuracy": 0.7, "confidence": 0.85}
    words = page_of(calibration=about | {"error": measured.error}, pictures={"calibration": ""})
    assert "The student in b.pth.tar is right on 70.0 % of the test images" in words
    assert "the largest of its probabilities is 85.0 % on average" in words
    assert "calibration error is 15.0 %" in words
    left, right = drawing.draw_calibration(measured, "heading").axes
    bars = [bar for bar in right.containers[0] if bar.get_height()]
    assert [bar.get_height() for bar in bars] == [50, 50]
    assert [bar.get_x() + bar.get_width() / 2 for bar in bars] == pytest.approx([11.5 / 15, 14.5 / 15])
    assert [bar.get_height() for bar in left.containers[0]] == pytest.approx([0.5, 0.9])


# ----------------------------------------------------------------------------------------------------- page


def test_the_table_of_the_classes():
    counts = np.array([[50, 1200, 7, 0], [3, 9, 0, 0], [20, 1, 4, 0], [0, 0, 0, 0]])
    assert report.class_rows(counts, ["ant", "bee", "cow", "dog"]) == [
        {"name": "ant", "accuracy": "4.0 %", "right": "50 of 1,257", "other": "bee", "times": "1,200"},
        {"name": "bee", "accuracy": "75.0 %", "right": "9 of 12", "other": "ant", "times": "3"},
        {"name": "cow", "accuracy": "16.0 %", "right": "4 of 25", "other": "ant", "times": "20"},
        {"name": "dog", "accuracy": "–", "right": "0 of 0", "other": None},
    ]


def test_the_table_of_the_result():
    summary = {"top1": 81.234, "mean_class_top1": 70, "top5": None, "best_top1": 83, "finetune_top1": 84.5}
    summary |= {"largest_class_top1": 12.345, "test_images": 1234, "num_labeled": 4000, "steps": 300000}
    summary |= {"train_seconds": 3661.4, "never_predicted": ["bee", "cow"], "selection": "last"}
    expected = {
        "Test accuracy": "81.23 %",
        "Mean of the accuracies of the classes": "70.00 %",
        "Test accuracy after finetuning on the labelled images": "84.50 %",
        "To compare: always naming the largest class": "12.35 %",
        "Test images": "1,234",
        "Labelled images": "4,000",
        "Training steps": "300,000",
        "Time of training (hours:minutes:seconds)": "1:01:01",
        "Classes that nothing was taken for": "bee, cow",
    }
    assert dict(report.result_rows(json.dumps(summary), "images")) == expected
    chosen = {"Test accuracy of the network that the validation images chose": "83.00 %"}
    assert dict(report.result_rows(json.dumps(summary | {"selection": "val"}), "images")) == expected | chosen
    both = {"student_top1": 80, "teacher_top1": 79, "ensemble_top1": 81.234, "never_predicted": []}
    rows = dict(report.result_rows(json.dumps(summary | both), "points"))
    assert rows["Test accuracy of the ensemble"] == "81.23 %" and "Test accuracy" not in rows
    assert rows["Test accuracy of the student alone"] == "80.00 %" and rows["Test points"] == "1,234"
    assert rows["Test accuracy of the teacher"] == "79.00 %"
    assert "Classes that nothing was taken for" not in rows


def test_the_page_of_a_run(here, monkeypatch, capsys):
    assert command(monkeypatch, "report", "results/run") == 0
    assert capsys.readouterr().out == "results/run/report.html\n"
    page = Page(here / "results/run/report.html")
    assert page.all("html") == [{"lang": "en"}] and "run: report of a run" in page.text
    parts = [
        "Result",
        "Command",
        "Training",
        "Confusion",
        "Accuracy of each class",
        "Calibration",
        "Mistakes",
    ]
    assert page.headings == parts

    # nothing that a name holds became markup; nothing is loaded; every picture is there and is described
    assert {tag for tag, _ in page.elements}.isdisjoint(
        {"script", "link", "iframe", "object", "base", "form"}
    )
    attributes = {name for _, each in page.elements for name in each}
    assert not any(name.startswith("on") for name in attributes) and "href" not in attributes
    for name in CLASSES:
        assert name in page.text
    pictures = page.all("img")
    assert len(pictures) > 5 and all(each["alt"] for each in pictures)
    for each in pictures:
        kind, content = each["src"].split(",")
        assert kind == "data:image/png;base64"
        Image.open(io.BytesIO(base64.b64decode(content))).verify()
    assert any('" onload="x.png' in each["alt"] for each in pictures)

    # figures
    summary = json.loads(Path("results/run/summary.json").read_text())
    assert f"Test accuracy{summary['top1']:.2f} %" in page.text
    counts = np.array(json.loads(Path("results/run/confusion.json").read_text())["counts"])
    for k in range(4):
        assert f"{100 * counts[k, k] / counts[k].sum():.1f} %{counts[k, k]} of {counts[k].sum()}" in page.text


@pytest.mark.parametrize("kind", ["moons", "evaluated", "no checkpoint", "young"])
def test_runs_of_every_kind(kind, here, monkeypatch):
    folder = Path("results", {"moons": "moons", "evaluated": "run_last"}.get(kind, "run"))
    words = ["--save-path", "nowhere"] if kind == "no checkpoint" else []
    if kind == "young":  # nothing was evaluated or saved yet
        for path in [*Path("checkpoint").iterdir(), *folder.glob("*.jsonl"), *folder.glob("[sc]*.json")]:
            path.unlink()
    assert command(monkeypatch, "report", folder, *words) == 0
    page = Page(folder / "report.html")
    assert ("Decision regions" in page.headings) == (kind == "moons")
    assert bool(page.all("li")) == (kind == "evaluated")
    assert ("there is no checkpoint" in page.text) == (kind in ("no checkpoint", "young"))
    assert ("there are no curves" in page.text) == (kind in ("evaluated", "young"))
    assert ("training has not ended" in page.text) == (kind == "young")


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("results/run/args.json", b'{"name": 1', "args.json cannot be read"),
        ("results/run/args.json", {"command": [1, 2]}, "args.json cannot be read"),
        ("results/run/summary.json", b"[]", "summary.json cannot be read"),
        ("results/run/summary.json", {"top1": "high"}, "summary.json cannot be read"),
        ("results/run/metrics.jsonl", b"damage}\n", "metrics.jsonl cannot be read"),
        (
            "results/run/confusion.json",
            b'{"classes": ["a"], "counts": [[1, 2]]}',
            "confusion.json cannot be read",
        ),
        ("checkpoint/run_best.pth.tar", b"damage", "is damaged"),
        ("mine", None, "mine"),
        ("results/run/report.html.tmp", "/dev/full", "cannot write"),
    ],
)
def test_what_is_damaged_is_a_sentence_and_leaves_the_old_page(
    path, content, message, here, monkeypatch, capsys
):
    old, path = Path("results/run/report.html"), Path(path)
    old.write_text("old")
    if content is None:
        shutil.rmtree(path)
    elif isinstance(content, str):
        path.symlink_to(content)
    elif isinstance(content, dict):
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    else:
        path.write_bytes(content)
    assert command(monkeypatch, "report", "results/run") == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("visualize.py: ") and err.count("\n") == 1 and message in err
    assert old.read_text() == "old"


def test_names_that_are_no_utf8_and_that_are_no_text(here):
    run = read_run("results/run")
    args = run.args | {"command": ["main.py", "--name", "caf\udce9 <b>"], "model": "</title><script>"}
    (run.folder / "args.json").write_text(json.dumps(args))
    report.write(read_run(run.folder), {}, None, None, "gone", "there is no <checkpoint>")
    page = Page(run.folder / "report.html")
    assert "python main.py --name 'caf? <b>'" in page.text and "there is no <checkpoint>." in page.text
    assert not page.all("b") and not page.all("script")


def test_pictures_by_their_commands(here, monkeypatch, capsys):
    assert command(monkeypatch, "calibration", "results/run") == 0
    assert command(monkeypatch, "mistakes", "results/run", "--count", "7") == 0
    assert capsys.readouterr().out == "results/run/calibration.png\nresults/run/mistakes.png\n"
    assert_drawn("results/run/calibration.png")
    networks, dataset, views, runtime = visualize.load(read_run("results/run"))
    student = report.outputs_of(networks, dataset, views, runtime).probabilities[STUDENT]
    accuracy = 100 * (student.argmax(dim=1) == dataset.test.targets).double().mean().item()
    assert accuracy == pytest.approx(json.loads(Path("results/run/summary.json").read_text())["top1"])
    assert command(monkeypatch, "mistakes", "results/moons") == 2
    assert "draw its regions" in capsys.readouterr().err
