"""What a checkpoint holds: its keys, how it is read, written and brought up to date, the networks in it.

| key | content |
|---|---|
| `step` | int, steps of training that were taken |
| `args` | dict, the arguments of the run |
| `data` | dict, what the data were: `data.Dataset.record` |
| `networks` | {role: name for `models.build_model`}, of the networks that the run builds |
| `predicting` | list of roles: the mean of these networks predicts |
| `ROLE_state_dict` | weights of the student, and of the teacher or the perceptron where one learns |
| `ROLE_optimizer`, `ROLE_scaler` | what trains it |
| `avg_state_dict`, `avg_updates` | moving average of the student, and how often it was updated |
| `teacher_avg_state_dict`, `teacher_avg_updates` | the teacher's, where it has one |
| `align_bias`, `confidence_moments` | of the consistency loss |
| `feedback_baseline`, `switched` | of Meta Pseudo Labels |
| `loader`, `meters` | position in the data, figures since the last line of metrics.jsonl |
| `run` | str, the run's id |
| `best_top1`, `best_step`, `best_val_top1`, `oracle_top1` | what the run has reached |
| `top1`, … (`run.record.MEASURED`), `teacher_top1` | the last evaluation |
| `train_seconds`, `trained_images`, `pflop` | what the run has cost |
| `finetune_step`, `finetune_top1`, `optimizer`, `scaler` | of finetuning, whose network is `avg_state_dict` |

Random states are not among them: they follow from the seed and the step.

Which checkpoints a run has, and how their files are called, stands in ``KINDS``.
"""

import torch

from engine.images import SMALL
from models import build_model
from utils import UserError

# The checkpoints of a run, NAME_KIND.pth.tar: after the last step that was taken, and after the best
# evaluation. In the order in which --resume auto prefers them. --keep adds one after each evaluation, stepN.
KINDS = ("last", "finetune_last", "best", "finetune_best")
SUFFIX = ".pth.tar"


def file_name(name, kind):
    """The file of a run's checkpoint: kind is one of ``KINDS``, or stepN."""
    return f"{name}_{kind}{SUFFIX}"


class Checkpoint(dict):
    """The content of a checkpoint, up to date, and where it lies; empty for none."""

    def __init__(self, content=(), path=None):
        super().__init__(upgrade(dict(content)))
        self.path = path

    @classmethod
    def read(cls, path, runtime):
        """The checkpoint at a path, the same in all processes; UserError for a file that is none."""
        content = runtime.load(path)
        if not well_formed(content):
            raise UserError(
                f"{path} is not a checkpoint of this program: to start from weights use --weights"
            )
        return cls(content, path)

    @classmethod
    def peek(cls, path):
        """The same, whose tensors stay in the file; empty for any other file.

        What is wrong with a file is said where all of it is read.
        """
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except Exception:  # torch.load raises many kinds for a file that is not one of its own
            return cls()
        return cls(content, path) if well_formed(content) else cls()

    def write(self, runtime, *paths):
        """Write it to each path, one after the other, atomically; all processes return when it is there."""
        runtime.save(dict(self), *paths)

    def weights(self, role="student"):
        """The weights that predict: of the student or the teacher, those of its moving average where it has
        one; UserError without any."""
        for key in (average_key(role), role):
            weights = self.get(f"{key}_state_dict")
            if isinstance(weights, dict) and weights:
                return weights
        raise UserError(f"{self.path} holds no {role}: give a checkpoint of this program and --method")

    def network(self, role, num_classes, image_size, model=None, **options):
        """The network of a role with the weights that predict, on the CPU.

        Args:
            num_classes, image_size, options: as for ``models.build_model``; batch norm's ε is the run's.
            model: its name, where the checkpoint does not say it or is not to be asked.

        Raises:
            UserError: there is none, or it is another one.
        """
        weights, eps = self.weights(role), self.get("args", {}).get("bn_eps")
        model = model or self.get("networks", {}).get(role)
        if model is None:
            raise UserError(f"{self.path} does not name its network: give a checkpoint of main.py")
        try:
            network = build_model(model, num_classes, **{"image_size": image_size, "bn_eps": eps} | options)
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from error
        load_state(network, weights, self.path)
        return network

    def members(self, num_classes, image_size, **options):
        """{role: ``network``} of the networks whose mean probabilities are the prediction."""
        return {role: self.network(role, num_classes, image_size, **options) for role in self["predicting"]}


def average_key(role):
    """What the keys of a role's moving average start with."""
    return "avg" if role == "student" else f"{role}_avg"


# flags that came later, with the values that say what was done without them
LATER_FLAGS = {
    "value_range": None,
    "freeze_body": False,
    "body_lr_scale": 1.0,
    "bn_momentum": 0.01,
    "bn_eps": None,
}

# what ``data.Dataset.record`` did not say in earlier versions, which also learned from copies of test images.
EARLIER_DATA = {
    "labeled": None,  # the labelled images are to be drawn as those versions drew them
    "copies": (),  # none were left out
    "fingerprint": "pieces",  # the files' rule, see ``images.fingerprints``
    "value_range": None,  # deep images had no scale of their own, see ``images.Reading``
}


def upgrade(content):
    """The content of a checkpoint of an earlier version with the keys of today's."""
    known = content.get("args") if isinstance(content.get("args"), dict) else {}
    if known:
        known = content["args"] = LATER_FLAGS | known
    if "networks" not in content:
        names = {"teacher": known.get("model"), "student": known.get("student_model") or known.get("model")}
        content["networks"] = {role: name for role, name in names.items() if isinstance(name, str)}
    if "predicting" not in content:
        both = known.get("ensemble") and "teacher_state_dict" in content
        content["predicting"] = ["student", "teacher"] if both else ["student"]
    if isinstance(content.get("data"), dict):
        data = content["data"] = EARLIER_DATA | content["data"]
        if isinstance(data.get("size"), int):
            data.setdefault("crop", "none" if data["size"] > SMALL else "pad")
        if "trained" in data:
            data.setdefault("labeled_prints", data["trained"])
    return content


def well_formed(content):
    """Whether a file's content has the parts that every checkpoint of this program has, as far as is read."""
    if not isinstance(content, dict) or not isinstance(content.get("step"), int):
        return False
    data = content.get("data", {})
    needed = {"classes": list, "mean": list, "std": list, "size": int}
    described = isinstance(data, dict) and all(
        isinstance(data.get(key), kind) for key, kind in needed.items()
    )
    networks = content.get("networks", {})
    named = isinstance(networks, dict) and all(isinstance(name, str) for name in networks.values())
    named &= content.get("predicting", ["student"]) in (["student"], ["student", "teacher"])
    return named and isinstance(content.get("args", {}), dict) and (described or "data" not in content)


def load_state(module, state, path):
    """``module.load_state_dict``; UserError, a sentence instead of a list, where names or shapes differ."""
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the network in {path} does not fit: give the --model and --num-classes that it was trained with"
        ) from error
