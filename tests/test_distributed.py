"""Two processes with half the batch each against one process with the whole (gloo)."""

import distributed_worker
import forked
import pytest
import torch
from distributed_worker import CASES, LOCAL, MPL, STEPS

from models import build_model


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Results of one process, and of each of the two."""
    folder = tmp_path_factory.mktemp("distributed")
    torch.manual_seed(1)
    for network, model in (("mlp", "mlp-2-16-3"), ("sync-bn", "wrn-10-1")):
        state = build_model(model, 3, image_size=8).state_dict()
        torch.save({"student_state_dict": state}, folder / f"{network}.pt")
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
