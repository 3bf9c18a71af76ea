"""Steps that are captured once and replayed, recorded operator by operator on a CPU."""

import pytest
import torch
from recorded import RecordedStep
from steps import CAPTURED, captured_training

from augmentation import Views
from engine.runtime import Runtime


@pytest.mark.parametrize("name", CAPTURED)
def test_replayed_steps_are_the_steps(name):
    """What a step needs to know of its number comes by ``Runtime.number``, all else lies where it lay."""
    rows, learned = captured_training(name, Runtime("cpu"), 5, RecordedStep)
    expected_rows, expected = captured_training(name, Runtime("cpu"), 5)
    torch.testing.assert_close(rows, expected_rows, rtol=1e-5, atol=1e-7)
    for key, value in expected.items():
        torch.testing.assert_close(learned[key], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (RuntimeError("operation not permitted when stream is capturing"), "Does it wait for the device"),
        (torch.OutOfMemoryError("CUDA out of memory"), "a smaller --batch-size"),
    ],
)
def test_a_step_that_cannot_be_captured(error, advice, capsys):
    """The error as it is, behind a line that says what to do."""

    def step_of(batch, step):
        if step:
            raise error

    repeated = RecordedStep(Runtime("cpu"), step_of, [])
    repeated(Views(*[None] * 5), 0)
    with pytest.raises(type(error), match=str(error)):
        repeated(Views(*[None] * 5), 1)
    said = capsys.readouterr().err
    assert advice in said and "--no-cuda-graph" in said and repeated.runtime.capturing is None
