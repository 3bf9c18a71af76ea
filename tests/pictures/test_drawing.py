"""Pictures of ensembles, and of images that are no squares."""

import base64
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import main
import visualize
from pictures import drawing, report
from pictures.drawing import STUDENT, TEACHER
from run.record import Run, read_run
from utils import UserError

ENSEMBLE = {"name": "run", "method": "mpl", "dataset": "digits", "ensemble": True}


def dataset_of(test, path=""):
    return data.Dataset("folder", list("abc"), [], [], False, 8, "pad", None, None, None, test, [], path=path)


def texts(axes):
    return {text.get_text() for text in axes.texts}


def test_the_surest_mistakes_of_an_ensemble_are_the_mean_of_its_networks():
    student = torch.tensor([[0.1, 0.9, 0], [0.4, 0.6, 0], [0.6, 0.4, 0], [0.2, 0.8, 0]])
    teacher = torch.tensor([[0.9, 0.1, 0], [0.2, 0.8, 0], [0.2, 0.8, 0], [0.3, 0.7, 0]])
    test = data.ImageSet([0, 0, 0, 1], images=torch.zeros(4, 3, 8, 8, dtype=torch.uint8))
    outputs = report.Outputs(torch.arange(4), test.targets, {TEACHER: teacher, STUDENT: student})

    def wrong(*prediction):
        (_, examples) = report.mistakes(outputs, dataset_of(test), 4, *prediction).values()
        return examples

    assert [example.name for example in wrong()] == ["0", "1"]  # of the student alone
    examples = wrong(outputs.prediction(Run(Path("run"), ENSEMBLE, [])))
    assert [example.name for example in examples] == ["1", "2"]
    assert list(examples[0].guesses) == ["teacher", "student", "ensemble"]
    assert examples[0].guesses["ensemble"] == ("b", *map(pytest.approx, (0.7, 0.3)))
    assert examples[1].guesses["student"] == ("a", *map(pytest.approx, (0.6, 0.6)))


@pytest.mark.parametrize(
    ("size", "shape"), [((40, 20), (8, 16)), ((20, 40), (16, 8)), ((30, 30), (8, 8)), ((2000, 25), (2, 160))]
)
def test_an_image_keeps_the_proportions_of_its_file(size, shape, tmp_path):
    """The networks see it stretched to a square; its left half is black and its right half white."""
    picture = np.zeros((*size[::-1], 3), np.uint8)
    picture[:, size[0] // 2 :] = 255
    Image.fromarray(picture).save(tmp_path / "a.png")
    stretched = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    stretched[..., 4:] = 255
    test = data.ImageSet([0], images=stretched, names=["a.png"])
    outputs = report.Outputs(torch.arange(1), test.targets, {STUDENT: torch.tensor([[0.0, 1, 0]])})
    dataset = dataset_of(test, str(tmp_path))
    (example,) = report.mistakes(outputs, dataset, 1)["Most confidently wrong"]
    assert example.image.shape == (3, *shape) and example.image.dtype == torch.uint8
    quarter = shape[1] // 4
    assert example.image[..., :quarter].max() < 30 and example.image[..., -quarter:].min() > 225

    dataset.crop = "none"  # a square that was cut out of the image
    (example,) = report.mistakes(outputs, dataset, 1)["Most confidently wrong"]
    assert torch.equal(example.image, stretched[0])


def test_curves_of_an_ensemble_say_whose_they_are(tmp_path):
    accuracies = {"top1": 91, "ensemble_top1": 91, "student_top1": 90, "teacher_top1": 89, "val_top1": 88}
    records = [{"step": step, "labeled_loss": 1.0, "test_loss": 0.5, **accuracies} for step in (5, 10)]
    run = Run(tmp_path / "run", ENSEMBLE, records)
    losses, panel = drawing.draw_curves([run]).axes
    assert texts(losses) == {"labelled", "test, ensemble"}
    names = {"test, ensemble 91.00 %", "test, student 90.00 %", "test, teacher 89.00 %"}
    assert texts(panel) == {*names, "validation, ensemble 88.00 %"}
    alone = [{"step": record["step"], "top1": 90} for record in records]
    figure = drawing.draw_curves([run, Run(tmp_path / "other", ENSEMBLE | {"ensemble": False}, alone)])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "run  (Meta Pseudo Labels, ensemble, top-1 91.00 %)",
        "other  (Meta Pseudo Labels, top-1 90.00 %)",
    ]


def test_curves_over_the_cost(tmp_path):
    """Two runs whose steps cost differently, compared by their operations; finetuning has no such records."""
    runs = []
    for name, cost in (("cheap", 0.25), ("dear", 2.0)):
        records = [{"step": step, "pflop": step * cost, "top1": 80 + step} for step in (1, 2)]
        records.append({"step": 3, "finetune_top1": 90})
        runs.append(Run(tmp_path / name, ENSEMBLE | {"name": name, "ensemble": False}, records))
    (axes,) = drawing.draw_curves(runs, over="pflop").axes
    assert [line.get_xdata().tolist() for line in axes.get_lines()] == [[0.25, 0.5], [2.0, 4.0]]
    assert "PFLOP" in axes.get_xlabel()
    (axes,) = drawing.draw_curves(runs[:1], over="pflop").axes
    assert list(axes.get_lines()[0].get_xdata()) == [0.25, 0.5]
    early = runs[0]._replace(records=[{"step": 1, "top1": 80}])
    with pytest.raises(UserError, match="trained without counting its pflop"):
        drawing.draw_curves([early], over="pflop")


def test_the_page_and_the_picture_show_the_mistakes_of_the_ensemble(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    random = np.random.RandomState(0)
    for name in "abc":
        Path("mine", name).mkdir(parents=True)
        for number in range(12):
            image = Image.fromarray(random.randint(0, 256, (20, 40, 3), dtype=np.uint8))
            image.save(Path("mine", name, f"{number}.png"))
    words = (
        "--name run --ensemble --dataset folder --data-path mine --model wrn-10-1 --resize 8 --num-labeled 6"
    )
    words += (
        " --batch-size 4 --mu 1 --total-steps 2 --eval-step 2 --finetune-epochs 0 --device cpu --workers 0"
    )
    main.main([*words.split(), "--test-fraction", "0.5", "--no-pictures"])

    run = read_run("results/run")
    networks, dataset, views, _ = visualize.load(run)
    with torch.no_grad():
        images = views.evaluation(dataset.test.images)
        mean = sum(network(images).softmax(dim=1) for network in networks.values()) / 2
    confidence, predicted = mean.max(dim=1)
    wrong = [i for i in range(len(images)) if predicted[i] != dataset.test.targets[i]]
    wrong.sort(key=lambda i: -confidence[i])
    expected = [(dataset.test.names[i], dataset.classes[predicted[i]]) for i in wrong]
    assert len(networks) == 2 and len(expected) > 2

    page = Path(visualize.report_of(run)).read_text()
    page = page[page.index("<h3>Most confidently wrong</h3>") :]
    shown = re.findall(r'alt="Test image (\S+): ., which the ensemble takes for (.)"', page)
    assert shown == expected[:12]
    assert page.count("<span>ensemble: ") == len(shown)
    for content in re.findall(r'src="data:image/png;base64,(.*?)"', page):
        assert Image.open(io.BytesIO(base64.b64decode(content))).size == (16, 8)

    figure = visualize.mistakes_of(run, 2)
    for axes, (_, taken) in zip(figure.subfigs[1].axes, expected[:2], strict=False):
        assert f"ensemble: {taken}\n" in axes.xaxis.label.get_text()
        assert axes.images[0].get_array().shape == (8, 16, 3)
