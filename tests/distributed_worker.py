"""Some steps of every method on given batches: what test_distributed.py runs in one process and in two.

Each process takes its part of every batch.
"""

from pathlib import Path

import torch

import main
from augmentation import ImageViews, PointViews, Views
from data import Dataset
from engine.evaluation import gathered, measure_accuracy, predictions, score
from engine.images import ImageSet
from engine.runtime import Runtime
from methods import METHODS
from models import build_model
from utils import Meters, UserError

STEPS, BATCH, MU, UNLABELED = 5, 8, 2, 37
STEPS_OF_IMAGES = 3  # two processes wait for each other in every batch norm
COMMON = (
    f"--method mpl --total-steps 20 --batch-size {BATCH} --mu {MU} --warmup-steps 2 --uda-steps 4 --nesterov "
    "--threshold 0.3 --label-smoothing 0.1 --teacher-lr 0.02 --student-lr 0.02 --lambda-u 1 "
)
MPL = {
    "none": "--feedback none --align 0.2",
    "taylor": "--feedback taylor --feedback-momentum 0.9",
    "taylor-sum": "--feedback taylor --feedback-reduction sum --grad-clip 1",
    "dot": "--feedback dot",
    "dot-sum": "--feedback dot --feedback-reduction sum --feedback-weight 0.1",
    "exact": "--feedback exact --feedback-jvp forward --pseudo-label soft",
    "exact-difference": "--feedback exact --feedback-jvp difference --pseudo-label soft",
    "exact-weak-apart": "--feedback exact --pseudo-label soft --pseudo-label-view strong --weak-pass apart",
    "none-soft": "--feedback none --confidence soft",
    "none-weak-ema": "--feedback none --weak-pass ema",
    "dot-mixup": "--feedback dot --mixup-alpha 0.5 --student-labeled-weight 0.5 --teacher-warmup-steps 3",
    "taylor-switch": "--feedback taylor --feedback-momentum 0.9 --align 0.2 --switch-every 2",
}
FLAGS_OF = {
    "supervised": "--method supervised --grad-clip 0.5",
    "supervised mixup": "--method supervised --mixup-alpha 0.5",
    "semimeta": "--method semimeta --mixup-alpha 0.5",
    "uda": "--method uda --align 0.2",
    "uda ema": "--method uda --weak-pass ema",
    "uda relative": "--method uda --confidence relative --threshold 0.9",
    "fixmatch soft": "--method fixmatch --confidence soft --align 0.2",
    "pseudo-label": "--method pseudo-label",
    "reduced-mpl taylor": "--method reduced-mpl --feedback taylor --teacher-lr 1",
    "reduced-mpl exact": "--method reduced-mpl --feedback exact --pseudo-label soft --teacher-lr 100",
    **{f"mpl {name}": f"--method mpl {flags}" for name, flags in MPL.items()},
}
NETWORKS = {"mlp": "--dataset twomoons --model mlp-2-16-3", "sync-bn": "--model wrn-10-1 --sync-bn"}
# these differ from another case by arithmetic on losses alone: the small network has to show it
SMALL_ALONE = (
    "supervised mixup",
    "uda relative",
    "fixmatch soft",
    "mpl taylor-sum",
    "mpl dot-sum",
    "mpl none-soft",
)
CASES = {
    f"{network} {method}": f"{common} {flags}"
    for network, common in NETWORKS.items()
    for method, flags in FLAGS_OF.items()
    if network == "mlp" or method not in SMALL_ALONE
}
LOCAL = {
    "local-bn none": "--feedback none",
    "local-bn none-weak-ema": "--feedback none --weak-pass ema",
    "local-bn uda-weak-ema": "--weak-pass ema --method uda",
    "local-bn none-weak-ema-switch": "--feedback none --weak-pass ema --switch-every 2",
    "local-bn semimeta": "--method semimeta",
}


def cases(folder):
    """The flags of every case by its name."""
    for name, flags in CASES.items():
        teacher = f" --teacher-checkpoint {folder}/{name.split()[0]}.pt"
        yield name, flags + (teacher if "pseudo-label" in name or "reduced-mpl" in name else "")
    for name, flags in LOCAL.items():
        for when in ("seldom", "often"):
            yield f"{name} {when}", f"--model wrn-10-1 {flags}"


def random_views(network, step, rank, world_size):
    """This process's part of the batch of a step; the whole batch does not depend on the processes."""
    generator = torch.Generator().manual_seed(step)
    shape = (2,) if network == "mlp" else (3, 8, 8)
    labeled = torch.randn(BATCH, *shape, generator=generator)
    targets = torch.randint(3, (BATCH,), generator=generator)
    weak, noise = torch.randn(2, BATCH * MU, *shape, generator=generator)
    indices = torch.randint(UNLABELED, (BATCH * MU,), generator=generator)
    whole = (labeled, targets, weak, weak + 0.3 * noise, indices)
    return Views(*(tensor.chunk(world_size)[rank] for tensor in whole))


def prepare(method, network, folder):
    """What a fixed teacher says of some images, computed by all processes together."""
    generator = torch.Generator().manual_seed(0)
    if network == "mlp":
        views, images = PointViews(0, 0), torch.randn(UNLABELED, 2, generator=generator)
    else:
        views = ImageViews(8, (0.5,) * 3, (0.25,) * 3)
        images = torch.randint(256, (UNLABELED, 3, 8, 8), generator=generator, dtype=torch.uint8)
    everything = ImageSet(torch.zeros(UNLABELED), images)
    dataset = Dataset("given", ["a", "b", "c"], [], [], False, 8, "pad", None, everything, None, None, [])
    method.large_teacher.to(views.evaluation(images).dtype)
    method.prepare(dataset, views, folder)


def run(folder):
    """{case: {"networks": states after its steps, "scalars": those of the meters of each step}}.

    "predictions" are those for seven points, gathered from all processes.
    Where batch norm is each process's own, "often" agrees on running statistics after every step.
    In float64: the steps amplify what rounding adds, and a pseudo label near a tie may change sides.
    """
    torch.set_default_dtype(torch.float64)
    results = {}
    for name, flags in cases(folder):
        args = main.parse_arguments((COMMON + flags).split())
        runtime = Runtime("cpu", sync_bn=args.sync_bn)
        torch.manual_seed(0)
        method = METHODS[args.method](args, 3, 8 if "wrn" in flags else 0, runtime)
        if method.uses_consistency:  # as if after many steps: some images count less than others
            method.consistency.moments = torch.tensor([0.7, 0.02])
        if args.method == "reduced-mpl":
            prepare(method, name.split()[0], f"{folder}/{runtime.world_size}/{name}")
        scalars = []
        for step in range(STEPS_OF_IMAGES if "wrn" in flags else STEPS):
            views = random_views(name.split()[0], step, runtime.rank, runtime.world_size)
            values = method.step(views, step, diagnose=True)
            scalars.append({key: value.detach() for key, value in (values | method.diagnostics).items()})
            if name.endswith("often"):
                method.sync_statistics()
        method.sync_statistics()
        networks = {role: learner.network.state_dict() for role, learner in method.learners.items()}
        networks["average"] = method.predictor.state_dict()
        if method.uses_consistency:
            networks["consistency"] = method.consistency.state_dict()
        if args.method == "reduced-mpl":
            networks["predictions"] = {"all": method.predictions.clone()}
        results[name] = {"networks": networks, "scalars": scalars}
    torch.set_default_dtype(torch.float32)
    generator, seen = torch.Generator().manual_seed(0), []
    points = ImageSet([0, 1, 2, 0, 1, 2, 0], torch.randn(7, 2, generator=generator))
    torch.manual_seed(0)
    walk = predictions(build_model("mlp-2-16-3", 3), points, PointViews(0, 0), runtime)
    score(runtime, {"student": walk}, seen)
    return results | {"predictions": gathered(seen, points, runtime)}


def save(folder):
    """What ``run`` returns, into FOLDER/WORLD_SIZE-RANK.pt."""
    runtime = Runtime("cpu")
    results = run(folder)
    torch.save(results, Path(folder) / f"{runtime.world_size}-{runtime.rank}.pt")
    runtime.close()


NUMBERED = [*range(1, 10), 11, 13]  # how many points the sets have that are walked through in batches of two


def numbered(n):
    """A set of points of three classes; point i is (i, i + 1/2)."""
    return ImageSet(torch.arange(n) % 3, torch.arange(n)[:, None] + torch.tensor([0.0, 0.5]))


def only_here(runtime):
    """A sentence that only the main process says; the others have nothing to say."""
    if not runtime.is_main:
        raise AssertionError("called by another process")
    raise UserError("the main process alone knows this")


def agreements(runtime):
    """What processes tell each other, {name: tensor or text}: the number of process r is r + 1."""
    number = runtime.rank + 1.0
    found = {
        "sum": runtime.all_reduce_sum(torch.tensor([number, 10 * number])),
        "max": runtime.all_reduce_max(torch.tensor([number, -number])),
        "max_int": runtime.all_reduce_max_int(runtime.rank + 1),
        "rows": runtime.all_gather(torch.tensor([[number, 0.0], [number, 1.0]])),
        "main": runtime.on_main(lambda: f"process {runtime.rank}"),
    }
    found["means"] = runtime.all_reduce_mean([torch.tensor([number]), torch.tensor([[2 * number], [0.0]])])
    try:
        runtime.on_main(lambda: only_here(runtime))
    except UserError as error:
        found["error"] = str(error)
    except SystemExit as end:  # the others have nothing to say, and end with the same status
        found["error"] = f"status {end.code}"
    runtime.seed(3, 7)
    found["drawn"] = torch.rand(4)
    meters = Meters(runtime, "")
    for step in range(2):
        meters.update({"loss": torch.tensor(number + step)}, step)
    found["meters"] = meters.read()
    # three classes; all of them are taken for class 2
    network = torch.nn.Linear(2, 3)
    torch.nn.init.zeros_(network.weight)
    network.bias.data = torch.tensor([0.0, 1.0, 2.0])
    found["accuracy"] = measure_accuracy(runtime, {"student": network}, numbered(7), PointViews(0, 0))
    for n in NUMBERED:
        walk = predictions(torch.nn.Identity(), numbered(n), PointViews(0, 0), runtime, batch_size=2)
        found[n] = gathered((logits for logits, *_ in walk), numbered(n), runtime)
    return found


def save_agreements(folder):
    """``agreements`` into FOLDER/agreements-RANK.pt."""
    runtime = Runtime("cpu")
    torch.save(agreements(runtime), Path(folder) / f"agreements-{runtime.rank}.pt")
    runtime.close()
