"""Two processes with half the batch each against one process with the whole (gloo); what three agree on."""

import distributed_worker
import forked
import pytest
import torch
import torch.nn.functional as F
from distributed_worker import CASES, LOCAL, MPL, NUMBERED, STEPS, numbered

from models import build_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of one process, and of each of the two."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(1)
    for network, model in (("mlp", "mlp-2-16-3"), ("sync-bn", "wrn-10-1")):
        state = build_model(model, 3, image_size=8).state_dict()
        torch.save({"step": 0, "student_state_dict": state}, folder / f"{network}.pt")
    pair = forked.run(distributed_worker.save, str(folder), processes=2)
    assert pair.returncode == 0, pair.stderr
    alone = distributed_worker.run(str(folder))
    return alone, [torch.load(folder / f"2-{rank}.pt", weights_only=True) for rank in (0, 1)]


def distance(one, other):
    """The largest absolute difference of two states of the same networks."""
    return max(
        (one[role][name] - other[role][name]).double().abs().max().item()
        for role in one
        for name in one[role]
    )


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(runs, case):
    alone, pair = runs
    assert distance(alone[case]["networks"], pair[0][case]["networks"]) < 1e-8
    assert distance(pair[0][case]["networks"], pair[1][case]["networks"]) == 0


def test_two_processes_predict_as_one(runs):
    """Parts of three and four images, put together in the order of the set."""
    whole, first, second = (each["predictions"] for each in (runs[0], *runs[1]))
    assert whole.shape == (7, 3) and len(whole[:, 1].unique()) == 7 and whole[:, 2].all()
    torch.testing.assert_close(first, whole)
    assert torch.equal(first, second)


@pytest.mark.parametrize("name", LOCAL)
def test_it_does_not_matter_when_processes_agree(runs, name):
    """With batch norm of their own, on running statistics: at every evaluation, wherever these are."""
    for each in runs[1]:
        assert distance(each[f"{name} seldom"]["networks"], each[f"{name} often"]["networks"]) < 1e-12
    first, second = (each[f"{name} seldom"]["networks"] for each in runs[1])
    assert distance(first, second) < 1e-12  # then they have the same


@pytest.mark.parametrize("case", [f"mlp mpl {name}" for name in MPL if not name.startswith("none")])
def test_two_processes_form_the_same_feedback(runs, case):
    """The scalar forms are the global value in both; exact is a mean over processes, as its gradient is."""
    alone, pair = runs
    for step in range(STEPS):
        whole = alone[case]["scalars"][step]
        halves = [half[case]["scalars"][step] for half in pair]
        mean = (halves[0]["feedback"] + halves[1]["feedback"]) / 2
        torch.testing.assert_close(mean, whole["feedback"], rtol=1e-6, atol=1e-9)
        if "exact" not in case:
            assert torch.equal(halves[0]["feedback"], halves[1]["feedback"])
        torch.testing.assert_close(
            halves[0]["feedback_cosine"], whole["feedback_cosine"], rtol=1e-5, atol=1e-6
        )


# ---------------------------------------------------------------- what processes tell each other


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    """What each of three processes came to know."""
    folder = tmp_path_factory.mktemp("agreements")
    done = forked.run(distributed_worker.save_agreements, str(folder), processes=3)
    assert done.returncode == 0, done.stderr
    return [torch.load(folder / f"agreements-{rank}.pt", weights_only=True) for rank in range(3)]


def test_sums_means_and_maxima_are_over_all_processes(agreed):
    """Process r has the number r + 1."""
    for found in agreed:
        assert found["sum"].tolist() == [6, 60]
        assert [mean.tolist() for mean in found["means"]] == [[2], [[4], [0]]]
        assert found["max"].tolist() == [3, -1] and found["max_int"] == 3
        assert found["rows"].tolist() == [[1, 0], [1, 1], [2, 0], [2, 1], [3, 0], [3, 1]]
        assert found["meters"]["loss"] == 2.5  # of 1 and 2, 2 and 3, 3 and 4


def test_what_the_main_process_finds_or_refuses_all_know(agreed):
    for found in agreed:
        assert found["main"] == "process 0"
    refused = ["the main process alone knows this", "status 2", "status 2"]  # the others end silently
    assert [found["error"] for found in agreed] == refused


def test_each_process_draws_its_own_dropout(agreed):
    drawn = {tuple(found["drawn"].tolist()) for found in agreed}
    assert len(drawn) == 3


def test_an_accuracy_is_over_the_parts_of_all_processes(agreed):
    """Seven points, of which two are of class 2, for which all are taken."""
    loss = F.cross_entropy(torch.tensor([[0.0, 1.0, 2.0]]).expand(7, 3), torch.arange(7) % 3).item()
    for figures, confusion in (found["accuracy"] for found in agreed):
        assert confusion.tolist() == [[0, 0, 3], [0, 0, 2], [0, 0, 2]]
        assert figures["top1"] == pytest.approx(100 * 2 / 7)
        assert figures["mean_class_top1"] == pytest.approx(100 / 3)
        assert figures["test_loss"] == pytest.approx(loss, rel=1e-6)


@pytest.mark.parametrize("n", NUMBERED)
def test_several_padded_batches_of_each_process_are_put_in_order(agreed, n):
    for found in agreed:
        assert torch.equal(found[n], numbered(n).images)
