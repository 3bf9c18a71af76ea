"""What a checkpoint holds."""

import torch

from utils import UserError


def well_formed(saved):
    """Whether a file's content has the parts that every checkpoint of this program has, as far as is read."""
    if not isinstance(saved, dict) or not isinstance(saved.get("step"), int):
        return False
    data = saved.get("data", {})
    needed = {"classes": list, "mean": list, "std": list, "size": int}
    described = isinstance(data, dict) and all(
        isinstance(data.get(key), kind) for key, kind in needed.items()
    )
    return isinstance(saved.get("args", {}), dict) and (described or "data" not in saved)


def load_state(module, state, path, advice="give the --model and --num-classes that it was trained with"):
    """``module.load_state_dict`` with a sentence instead of a list when the network is another one.

    Raises:
        UserError: names or shapes differ; the message ends with the advice.
    """
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"the network in {path} is not the one asked for: {advice}") from error


def predictor_state(state, path, role="student"):
    """The weights that predict in a checkpoint: of the student, or of the teacher, the EMA's, else its own.

    Raises:
        UserError: the checkpoint holds neither.
    """
    average = "avg_state_dict" if role == "student" else "teacher_avg_state_dict"
    names = (average, f"{role}_state_dict")
    states = [state.get(name) for name in names] if isinstance(state, dict) else []
    weights = next((each for each in states if isinstance(each, dict) and each), None)
    if not weights:
        raise UserError(f"{path} holds no {role}: it is not a checkpoint of this program and --method")
    return weights


def peek(path):
    """The content of a checkpoint, whose tensors stay in the file; ``{}`` for any other file.

    What is wrong with a file is said where all of it is read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch.load raises many kinds for a file that is not one of its own
        return {}
    return content if well_formed(content) else {}
