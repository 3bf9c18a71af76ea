"""Meta Pseudo Labels: train, finetune and evaluate.

    python main.py --dataset digits --num-labeled 40 --resize 16 --model wrn-10-1 --total-steps 900 …
    python main.py --evaluate --resume checkpoint/NAME_best.pth.tar --dataset digits …
    torchrun --nproc-per-node 4 main.py --dataset cifar10 …

The recipes are in run_*.sh. A run leaves checkpoint/NAME_*.pth.tar and results/NAME/.
"""

import argparse
import copy
import math
import os
import re
import signal
import sys
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

import visualize
from augmentation import ImageViews, PointViews
from data import NAMES, TrainLoader, batches, load_dataset, write_labeled_indices
from methods import METHODS, Learner, build_network, predictor_state, sgd
from models import count_flops, count_parameters, head_of
from runtime import Runtime, UserError
from utils import Meters, NonFiniteError, RunLog, commit, load_state, network_name, topk_correct

# ---------------------------------------------------------------- arguments

READ_EVERY = 50  # steps between two looks at the meters, each of which waits for the device
EVALUATION_BATCH = 256  # fixed, so that an accuracy does not depend on the command that asks for it

# what a run knows of itself besides its networks: saved with every checkpoint
FRESH = {
    "best_top1": None,
    "best_step": None,
    "best_val_top1": None,
    "oracle_top1": 0.0,
    "train_seconds": 0.0,
    "trained_images": 0,
}
POSITION = ("top1", "top5", "meters", "loader")
SUMMARY = (
    *("name", "dataset", "method", "num_labeled", "seed", "steps", "top1", "top5", "best_top1", "best_step"),
    *("selection", "oracle_top1", "teacher_top1", "finetune_top1", "train_seconds", "images_per_second"),
    *("device", "torch", "commit"),
)

# flags that only some methods use; the others refuse them
ONLY_FOR = {
    "mu": ("uda", "pseudo-label", "mpl"),
    "threshold": ("uda", "mpl"),
    "temperature": ("uda", "mpl"),
    "lambda_u": ("uda", "mpl"),
    "uda_steps": ("uda", "mpl"),
    "align": ("uda", "mpl"),
    "weak_pass": ("uda", "mpl"),
    "teacher_lr": ("mpl",),
    "teacher_dropout": ("mpl",),
    "student_wait_steps": ("mpl",),
    "pseudo_label": ("pseudo-label", "mpl"),
    "pseudo_label_view": ("pseudo-label", "mpl"),
    "feedback": ("mpl",),
    "feedback_weight": ("mpl",),
    "feedback_reduction": ("mpl",),
    "feedback_view": ("mpl",),
    "feedback_momentum": ("mpl",),
    "flip_feedback": ("mpl",),
    "feedback_jvp": ("mpl",),
    "teacher_checkpoint": ("pseudo-label",),
    "student_model": ("pseudo-label", "mpl"),
}
# and those that only some feedbacks use
ONLY_FOR_FEEDBACK = {
    "feedback_weight": ("taylor", "dot", "exact"),
    "flip_feedback": ("taylor", "dot", "exact"),
    "feedback_reduction": ("taylor", "dot"),
    "feedback_view": ("taylor", "dot"),
    "feedback_momentum": ("taylor", "dot"),
    "feedback_jvp": ("exact",),
}

# the least and the largest value of numbers
BOUNDS = {
    **dict.fromkeys(("total_steps", "eval_step", "accumulate", "num_classes"), (1, math.inf)),
    **dict.fromkeys(("batch_size", "finetune_batch_size"), (1, 2**20)),
    "mu": (1, 2**10),
    "resize": (1, 2**12),
    "seed": (0, 2**63 - 1),
    **dict.fromkeys(("num_val", "workers", "keep", "start_step", "warmup_steps"), (0, math.inf)),
    **dict.fromkeys(("student_wait_steps", "uda_steps", "finetune_epochs"), (0, math.inf)),
    **dict.fromkeys(("teacher_lr", "student_lr", "finetune_lr", "weight_decay"), (0, 1e3)),
    **dict.fromkeys(("finetune_weight_decay", "grad_clip", "lambda_u"), (0, 1e6)),
    **dict.fromkeys(("momentum", "finetune_momentum", "feedback_momentum", "label_smoothing"), (0, 0.999999)),
    **dict.fromkeys(("teacher_dropout", "student_dropout", "test_fraction"), (0, 0.999999)),
    **dict.fromkeys(("ema", "threshold", "align"), (0, 1)),
    "temperature": (1e-3, 1e3),
    "feedback_weight": (-1e6, 1e6),
}


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of a flag, where there is one to add."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "(default:" in action.help:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one sentence instead of the whole usage."""

    def error(self, message):
        raise UserError(f"{message} (--help lists all flags)")


def build_parser():
    parser = Parser(
        description="Meta Pseudo Labels in PyTorch. The recipes in run_*.sh are complete command lines.",
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )

    group = parser.add_argument_group("run")
    group.add_argument("--name", help="name of the run and of its files (default: the data set's)")
    group.add_argument("--save-path", default="checkpoint", help="folder of the checkpoints")
    group.add_argument("--results-path", default="results", help="folder of metrics, summary and pictures")
    group.add_argument(
        "--seed", type=int, default=0, help="of labels, initial weights, batches, augmentation"
    )
    group.add_argument(
        "--resume",
        metavar="CKPT",
        help="checkpoint to continue, finetune or evaluate; auto: the last of this --name, if there is one",
    )
    group.add_argument(
        "--keep", type=int, default=0, metavar="N", help="also keep the checkpoints of the last N evaluations"
    )
    group.add_argument(
        "--evaluate", action="store_true", help="only evaluate the checkpoint of --resume, into results/CKPT"
    )
    group.add_argument("--finetune", action="store_true", help="only finetune the checkpoint of --resume")
    group.add_argument("--device", default="auto", choices=Runtime.KINDS, help="where to run")
    group.add_argument(
        "--local-rank", "--local_rank", help="accepted from older launchers: the environment says it, too"
    )
    group.add_argument("--amp", action="store_true", help="mixed precision")
    group.add_argument("--amp-dtype", default="bf16", choices=("bf16", "fp16"), help="fp16 needs CUDA")
    group.add_argument(
        "--channels-last",
        action="store_true",
        help="memory order in which convolutions are faster (recipes for images)",
    )
    group.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile of training passes: a slow first step, then faster ones; needs a C++ compiler",
    )
    group.add_argument(
        "--sync-bn", action="store_true", help="batch statistics over the batches of all processes"
    )

    group = parser.add_argument_group("data")
    group.add_argument(
        "--dataset",
        default="cifar10",
        choices=NAMES,
        help="twomoons and digits need no download; folder: your own",
    )
    group.add_argument("--data-path", default="data", help="folder of the data set")
    group.add_argument(
        "--num-labeled",
        type=count_or_fraction,
        default=4000,
        metavar="N",
        help="labelled images, drawn per class with --seed; below 1: a fraction of the training images",
    )
    group.add_argument(
        "--labeled-indices", metavar="FILE", help="take these labelled images: labeled_indices.txt of a run"
    )
    group.add_argument(
        "--num-val",
        type=int,
        default=0,
        metavar="N",
        help="training images with labels held out to choose the best checkpoint; 0: the last is taken",
    )
    group.add_argument(
        "--test-fraction",
        type=float,
        default=0.2,
        metavar="F",
        help="folder without a test or val folder: part of every class that is set aside for testing",
    )
    group.add_argument(
        "--unlabeled-path", metavar="DIR", help="any tree of images without classes, for the unlabelled set"
    )
    group.add_argument(
        "--unlabeled-mode",
        default="add",
        choices=("add", "only"),
        help="these images beside the training images, or in their place",
    )
    group.add_argument(
        "--skip-unreadable",
        action="store_true",
        help="name and leave out images that cannot be read, instead of stopping",
    )
    group.add_argument("--num-classes", type=int, metavar="K", help="checked against the data set")
    group.add_argument(
        "--resize",
        type=int,
        metavar="PIXELS",
        help="side of the images (default: digits 16, cifar10, cifar100 and svhn 32, imagenet 224; a folder: "
        "the one size of its images up to 64, else 224)",
    )
    group.add_argument("--workers", type=int, default=2, help="threads or processes that read images")
    group.add_argument(
        "--expand-labels",
        action="store_true",
        help="accepted for published commands: labelled batches are always drawn without end here",
    )

    group = parser.add_argument_group("augmentation")
    group.add_argument(
        "--randaug",
        type=int,
        nargs=2,
        default=[2, 16],
        metavar=("LAYERS", "MAGNITUDE"),
        help="RandAugment of the strong view (CIFAR-10 recipe: 2 16)",
    )
    group.add_argument(
        "--labeled-view",
        default="weak",
        choices=("weak", "strong"),
        help="augmentation of the labelled images (strong: RandAugment, as in the paper's Table 10)",
    )
    group.add_argument(
        "--jitter",
        type=float,
        nargs=2,
        default=[0.0, 0.3],
        metavar=("WEAK", "STRONG"),
        help="two moons: standard deviation of the noise of each view",
    )

    group = parser.add_argument_group("networks")
    group.add_argument(
        "--model",
        help="wrn-DEPTH-WIDTH, mlp-2-8-8-2, convlarge, efficientnet-b0 to -l2, any classifier of torchvision "
        "such as resnet50 (default: wrn-28-2; two moons: mlp-2-8-8-2)",
    )
    group.add_argument("--student-model", metavar="MODEL", help="mpl, pseudo-label: another for the student")
    group.add_argument(
        "--pretrained",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="start from torchvision's ImageNet weights, downloaded on first use",
    )
    group.add_argument("--weights", metavar="FILE", help="start from the weights in this file instead")
    group.add_argument(
        "--freeze-body", action="store_true", help="only the last layer learns; the rest stays as it starts"
    )
    group.add_argument(
        "--teacher-dropout", type=float, default=0.0, help="before the classifier (CIFAR-10 recipe: 0.2)"
    )
    group.add_argument(
        "--student-dropout", type=float, default=0.0, help="before the classifier (CIFAR-10 recipe: 0.2)"
    )
    group.add_argument("--ema", type=float, default=0.995, help="decay of the moving averages of weights")

    group = parser.add_argument_group("optimisation")
    group.add_argument(
        "--total-steps", type=int, default=300_000, help="steps of training; the cosine ends here"
    )
    group.add_argument(
        "--eval-step", type=int, default=1000, help="steps between evaluations, with a checkpoint each"
    )
    group.add_argument("--start-step", type=int, default=0, help="first step (set by --resume)")
    group.add_argument("--batch-size", type=int, default=64, help="labelled images per step and process")
    group.add_argument("--mu", type=int, default=7, help="unlabelled images per labelled image")
    group.add_argument("--teacher-lr", "--teacher_lr", type=float, default=0.05, help="peak learning rate")
    group.add_argument(
        "--student-lr",
        "--student_lr",
        type=float,
        default=0.05,
        help="peak learning rate; of the only network too",
    )
    group.add_argument(
        "--accumulate",
        type=int,
        default=1,
        metavar="N",
        help="take a step's batch in N parts, one after the other, for less memory; batch norm sees a part",
    )
    group.add_argument("--optimizer", default="sgd", choices=("sgd", "adamw"), help="transfer recipe: adamw")
    group.add_argument(
        "--schedule",
        default="cosine",
        choices=("cosine", "one-cycle", "constant"),
        help="of the learning rate, after the warm-up; transfer recipe: one-cycle",
    )
    group.add_argument("--momentum", type=float, default=0.9, help="of SGD (published: 0.9)")
    group.add_argument("--nesterov", action="store_true", help="Nesterov momentum of SGD (recipes with SGD)")
    group.add_argument("--weight-decay", type=float, default=5e-4, help="none on batch norm")
    group.add_argument(
        "--warmup-steps", type=int, default=0, help="steps of linear warm-up, before the cosine"
    )
    group.add_argument("--grad-clip", type=float, default=0.0, help="bound of the gradient's norm; 0: none")
    group.add_argument("--label-smoothing", type=float, default=0.0, help="CIFAR-10 recipe: 0.15")

    group = parser.add_argument_group("method")
    group.add_argument("--method", default="mpl", choices=sorted(METHODS), help="how the student is trained")
    group.add_argument(
        "--student-wait-steps", type=int, default=0, help="mpl: steps before the student's warm-up begins"
    )
    group.add_argument(
        "--temperature", type=float, default=0.7, help="uda, mpl: below 1 sharpens the weak view"
    )
    group.add_argument("--threshold", type=float, default=0.6, help="uda, mpl: least probability that counts")
    group.add_argument(
        "--lambda-u", type=float, default=8.0, help="uda, mpl: weight of the UDA loss; 0: none"
    )
    group.add_argument(
        "--uda-steps", type=int, default=5000, help="uda, mpl: steps over which that weight grows"
    )
    group.add_argument(
        "--align",
        type=float,
        default=0.0,
        metavar="RATE",
        help="uda, mpl: distribution alignment: rate at which a bias per class evens out the mean prediction "
        "on unlabelled images; for few labels, classes of equal size and about ten unlabelled images per "
        "class in a batch: 0.2; off, as published: 0",
    )
    group.add_argument(
        "--weak-pass",
        default="joint",
        choices=("joint", "apart", "ema"),
        help="uda, mpl: joint: weak views pass with the other images, as published; apart: by themselves and "
        "without gradient, faster; ema: likewise, through the moving average of the weights (--ema), whose "
        "labels are better in a long run, worse in its first few hundred steps. Without a gradient, "
        "feedback needs --pseudo-label-view strong, or for taylor and dot --feedback-view strong",
    )
    group.add_argument(
        "--pseudo-label",
        default="argmax",
        choices=("argmax", "sample", "soft"),
        help="pseudo-label, mpl: most probable class, a class drawn, or the distribution",
    )
    group.add_argument(
        "--pseudo-label-view",
        default="weak",
        choices=("weak", "strong"),
        help="the view that the teacher labels",
    )
    group.add_argument(
        "--feedback",
        default="taylor",
        choices=("none", "taylor", "dot", "exact"),
        help="mpl: how the student's labelled loss reaches the teacher: not at all, by the change of the "
        "loss, by the product of two gradients, or by the exact gradient in the pseudo labels",
    )
    group.add_argument("--feedback-weight", type=float, default=1.0, help="mpl: factor of the feedback term")
    group.add_argument(
        "--feedback-reduction",
        default="mean",
        choices=("mean", "sum"),
        help="mpl: of the scalar feedbacks (taylor, dot) over the unlabelled images; sum is unbiased, mean "
        "is what the published code does",
    )
    group.add_argument(
        "--feedback-view",
        default="same",
        choices=("same", "strong"),
        help="mpl: the view whose labels taylor and dot push: the one that was labelled, or the strong one "
        "with labels of its own, as MPL-pytorch does",
    )
    group.add_argument(
        "--feedback-momentum",
        type=float,
        default=0.0,
        help="mpl: decay of the moving average that is subtracted from a scalar feedback (published: 0.99)",
    )
    group.add_argument(
        "--flip-feedback", action="store_true", help="mpl: new minus old loss, the sign of published code"
    )
    group.add_argument(
        "--feedback-jvp",
        default="auto",
        choices=("auto", "forward", "difference"),
        help="mpl: product of exact by forward mode or central difference",
    )
    group.add_argument("--teacher-checkpoint", metavar="FILE", help="pseudo-label: the fixed teacher")

    group = parser.add_argument_group("finetuning on the labelled images, after training")
    group.add_argument("--finetune-epochs", type=int, default=625, help="0: none")
    group.add_argument("--finetune-batch-size", type=int, default=512, help="at most all labelled images")
    group.add_argument("--finetune-lr", type=float, default=3e-5, help="constant learning rate")
    group.add_argument("--finetune-weight-decay", type=float, default=0.0, help="none on batch norm")
    group.add_argument("--finetune-momentum", type=float, default=0.9, help="of SGD, with Nesterov")
    return parser


def count_or_fraction(text):
    value = float(text)
    if value <= 0 or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text} is neither a count nor a fraction below 1")
    return int(value) if value >= 1 else value


def given(parser, argv):
    """The names of the arguments that stand in ``argv``."""
    unset = object()
    names = {action.dest for action in parser._actions if action.dest != "help"}
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name for name in names if getattr(parsed, name) is not unset}


def parse_arguments(argv):
    """The command line, checked.

    A flag that the method has no use for is refused. In ``bash run_x.sh --method supervised`` the second
    ``--method`` overrides a recipe: what the recipe says for another method is then set aside, and said so.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    last = max((i for i, word in enumerate(argv) if word.split("=")[0] == "--method"), default=0)
    of_recipe = given(parser, argv[:last])
    if "method" not in of_recipe:  # nothing is overridden: all flags are the user's
        last, of_recipe = 0, set()
    of_user = given(parser, argv[last:])

    useless = {name for name, methods in ONLY_FOR.items() if args.method not in methods}
    useless |= {name for name, kinds in ONLY_FOR_FEEDBACK.items() if args.feedback not in kinds}
    useless |= {"jitter"} if args.dataset != "twomoons" else {"randaug", "resize", "labeled_view"}
    if args.method == "supervised" and args.labeled_view == "weak":
        useless |= {"randaug"}
    useless |= {"test_fraction"} if args.dataset != "folder" else set()
    if refused := sorted(useless & of_user):
        flags = ", ".join("--" + name.replace("_", "-") for name in refused)
        how = f"--method {args.method}" + f" --feedback {args.feedback}" * (args.method == "mpl")
        parser.error(f"{how} on {args.dataset} does not use {flags}: leave it out")
    if aside := sorted(useless & of_recipe):
        flags = " ".join("--" + name.replace("_", "-") for name in aside)
        print(f"--method {args.method}: the recipe's {flags} set aside", file=sys.stderr)
        for name in aside:
            setattr(args, name, parser.get_default(name))

    if (args.evaluate or args.finetune) and not args.resume:
        parser.error("--evaluate and --finetune need --resume CKPT")
    if args.method == "pseudo-label" and not args.teacher_checkpoint:
        parser.error("--method pseudo-label needs --teacher-checkpoint FILE")
    for name, (least, largest) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= largest:
            limits = f"{least} or more" if largest == math.inf else f"{least} to {largest}"
            parser.error(f"--{name.replace('_', '-')} {value} is out of range: {limits}")
    if (
        min(args.randaug) < 0
        or max(args.randaug) > 100
        or not 0 <= min(args.jitter) <= max(args.jitter) < 1e3
    ):
        parser.error("--randaug and --jitter take two numbers that are not negative, and not beyond reason")
    if args.batch_size % args.accumulate:
        parser.error(
            f"--batch-size {args.batch_size} cannot be taken in --accumulate {args.accumulate} parts"
        )
    pushed = args.feedback_view if args.feedback_view == "strong" else args.pseudo_label_view
    if args.method == "mpl" and args.weak_pass != "joint" and args.feedback != "none" and pushed == "weak":
        parser.error(
            f"--weak-pass {args.weak_pass} leaves the weak view no gradient, and --feedback needs one there: "
            "add --pseudo-label-view strong, --feedback none or, for taylor and dot, --feedback-view strong"
        )
    if not 0 <= args.start_step < args.total_steps:
        parser.error(f"--start-step {args.start_step} is not below --total-steps {args.total_steps}")
    if args.method == "mpl" and args.student_wait_steps >= args.total_steps:
        parser.error(
            f"the student would never learn: --student-wait-steps {args.student_wait_steps} is not below "
            f"--total-steps {args.total_steps}"
        )
    if args.method == "mpl" and args.pseudo_label == "soft" and args.feedback in ("taylor", "dot"):
        print(
            f"--pseudo-label soft gives --feedback {args.feedback} no gradient, as in the published code: "
            "--feedback exact has one",
            file=sys.stderr,
        )
    args.model = args.model or ("mlp-2-8-8-2" if args.dataset == "twomoons" else "wrn-28-2")
    args.name = args.name or args.dataset
    return args


# ---------------------------------------------------------------- setup


def read_data(args):
    return load_dataset(
        args.dataset,
        args.data_path,
        num_labeled=args.num_labeled,
        num_val=args.num_val,
        seed=args.seed,
        resize=args.resize,
        labeled_indices=args.labeled_indices,
        unlabeled_path=args.unlabeled_path,
        unlabeled_mode=args.unlabeled_mode,
        test_fraction=args.test_fraction,
        workers=args.workers,
        skip_unreadable=args.skip_unreadable,
    )


def build_views(args, dataset, runtime):
    if dataset.size == 0:
        return PointViews(*args.jitter)
    return ImageViews(
        dataset.size,
        dataset.mean,
        dataset.std,
        flip=dataset.flip,
        crop=dataset.crop,
        randaug=tuple(args.randaug),
        labeled_view=args.labeled_view,
        static=runtime.static,
    )


def checkpoint_path(args, kind):
    return os.path.join(args.save_path, f"{args.name}_{kind}.pth.tar")


def make_folder(path):
    try:
        os.makedirs(path, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {path}: {error.strerror or error}") from error


def drop_checkpoints(args, step):
    """Of the checkpoints that are named after their step, keep the last ``--keep`` up to this one.

    Those of later steps are of an earlier run.
    """
    pattern = re.compile(re.escape(args.name) + r"_step(\d{8,})\.pth\.tar")
    found = filter(None, map(pattern.fullmatch, os.listdir(args.save_path)))
    names = {int(match[1]): match[0] for match in found}
    kept = sorted(number for number in names if number <= step)[-args.keep :]
    for number in names.keys() - set(kept):
        os.remove(os.path.join(args.save_path, names[number]))


class Interrupt:
    """Context that remembers SIGTERM or SIGINT, so that the loop can stop between two steps."""

    def __enter__(self):
        self.signal, self.asked = 0, None
        self.before = {
            number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def _note(self, number, frame):
        self.signal = number
        if number == signal.SIGINT:  # a second Ctrl-C ends the process at once; launchers repeat SIGTERM
            signal.signal(number, signal.SIG_DFL)

    def stops(self, runtime):
        """The signal that ends the run after this step, 0 for none: the same answer in all processes.

        Several processes ask each other at every step and read the answer at the next, so that none waits.
        """
        if runtime.processes == 1:
            return self.signal
        answer = int(self.asked) if self.asked is not None else 0
        self.asked = runtime.largest(self.signal)
        return answer

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------- training


def train_loop(args, runtime, dataset, views, method, log, state, interrupt):
    """Train from ``args.start_step`` to ``args.total_steps``; evaluate and save every ``--eval-step`` steps.

    Args:
        state: what the run knows of itself (``FRESH``), updated in place; with the ``POSITION`` of a
            checkpoint where a run is continued.
        interrupt: an entered ``Interrupt``; after a signal the loop saves and exits with 128 + its number.
    """
    mu = 0 if args.method == "supervised" else args.mu
    loader = TrainLoader(dataset, args.batch_size, mu, args.seed, runtime, args.workers)
    meters = Meters(runtime)
    loader.load_state_dict(state.get("loader", {"position": args.start_step}))
    if "meters" in state:
        meters.load_state_dict(state["meters"], runtime.device)

    images_per_step = args.batch_size * (1 + mu) * runtime.world_size
    progress = tqdm(
        total=args.total_steps,
        initial=args.start_step,
        desc=args.name,
        unit="step",
        disable=not (runtime.is_main and sys.stderr.isatty()),
    )
    started, counted = time.perf_counter(), args.start_step

    def count():
        """Adds what was trained since the last evaluation to the run's totals; returns images per second."""
        images, seconds = (step + 1 - counted) * images_per_step, time.perf_counter() - started
        state["trained_images"] += images
        state["train_seconds"] += seconds
        return images / seconds

    def checkpoint(*kinds):
        state.update(meters=meters.state_dict(), loader=loader.state_dict())
        content = method.state_dict() | state
        content |= {"step": step + 1, "args": vars(args), "data": about(dataset)}
        runtime.save(content, *(checkpoint_path(args, kind) for kind in kinds))

    for step in range(args.start_step, args.total_steps):
        batch = next(loader)
        runtime.seed(args.seed, step)
        batch_views = runtime.shard(views(batch.images_l, batch.targets, batch.images_u, loader.generator))
        evaluating = (step + 1) % args.eval_step == 0 or step + 1 == args.total_steps
        meters.update(method.step(batch_views, step, batch.targets_u, diagnose=evaluating), step)
        runtime.finish_step()
        progress.update()

        if (step + 1) % READ_EVERY == 0:
            loss = next(iter(meters.read().values()))  # raises where a loss was not finite
            rate = (step + 1 - counted) * images_per_step / (time.perf_counter() - started)
            progress.set_postfix_str(f"loss {loss:.3f}, {rate:.0f} images/s")

        if evaluating:
            record = meters.read() | {name: value.item() for name, value in method.diagnostics.items()}
            record |= {"images_per_second": count(), "student_rate": method.student.rate(step)}
            method.agree()
            test = evaluate(runtime, method.predictor, dataset.test, views)
            record |= test
            if dataset.val is not None:
                record["val_top1"] = evaluate(runtime, method.predictor, dataset.val, views)["top1"]
            best = state["best_val_top1"]
            better = dataset.val is None or best is None or record["val_top1"] > best
            if better:
                state["best_top1"], state["best_step"] = test["top1"], step + 1
                state["best_val_top1"] = record.get("val_top1")
            state["top1"], state["top5"] = test["top1"], test["top5"]
            state["oracle_top1"] = max(state["oracle_top1"], test["top1"])
            meters.reset()
            log.evaluation(step + 1, record)
            # the last one last: a run that is killed in between does this step again
            checkpoint(*["best"] * better, *[f"step{step + 1:08}"] * (args.keep > 0), "last")
            if args.keep and runtime.is_main:
                drop_checkpoints(args, step + 1)
            if runtime.is_main:
                shown = {name: value for name, value in record.items() if not name.endswith("_std")}
                figures = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
                progress.write(f"step {step + 1}/{args.total_steps}  {figures}", file=sys.stderr)
            started, counted = time.perf_counter(), step + 1

        if number := interrupt.stops(runtime):
            meters.read()
            count()
            method.agree()
            checkpoint("last")
            progress.close()
            if runtime.is_main:
                path = checkpoint_path(args, "last")
                print(f"stopped after step {step + 1}; continue with --resume {path}", file=sys.stderr)
            sys.exit(128 + number)
    progress.close()


def finetune(args, runtime, dataset, views, network, log, steps_before):
    """Train a copy of ``network`` on the labelled images alone; returns its top-1 accuracy in percent.

    SGD at a constant rate, up to ten evaluations on the way. With ``--num-val`` the one with the best
    validation accuracy is taken, else the last. ``steps_before`` is the step that figures are logged after.
    """
    network = copy.deepcopy(network).requires_grad_(not args.freeze_body)
    head_of(network).requires_grad_(True)
    batch_size = min(args.finetune_batch_size, len(dataset.labeled))
    steps = max(1, args.finetune_epochs * len(dataset.labeled) // (batch_size * runtime.world_size))
    loader = TrainLoader(dataset, batch_size, 0, args.seed + 1, runtime, args.workers)
    learner = Learner(
        network,
        runtime,
        optimizer=lambda network: sgd(
            network, args.finetune_lr, args.finetune_momentum, True, args.finetune_weight_decay
        ),
        rate=lambda step: args.finetune_lr,
    )
    network, meters = learner.network, Meters(runtime)
    best_val_top1, selected = -1.0, None
    for step in range(steps):
        batch = next(loader)
        runtime.seed(args.seed + 1, step)
        labeled, targets, *_ = runtime.shard(views(batch.images_l, batch.targets, None, loader.generator))

        def loss_of(part):
            loss = F.cross_entropy(learner(part[0]), part[1])
            return loss, {"finetune_loss": loss}

        meters.update(learner.learn(loss_of, [(labeled, targets)], step), steps_before + step)
        runtime.finish_step()

        if (step + 1) % max(50, steps // 10) == 0 or step + 1 == steps:
            learner.agree()
            record = {"finetune_loss": meters.read()["finetune_loss"]}
            test = evaluate(runtime, network, dataset.test, views)
            record["finetune_top1"] = test["top1"]
            if dataset.val is not None:
                record["finetune_val_top1"] = evaluate(runtime, network, dataset.val, views)["top1"]
            meters.reset()
            log.evaluation(steps_before + step + 1, record)
            content = {
                "avg_state_dict": network.state_dict(),
                "optimizer": learner.optimizer.state_dict(),
            } | test
            content |= {"step": steps_before, "finetune_step": step + 1}
            content |= {"args": vars(args), "data": about(dataset)}
            runtime.save(content, checkpoint_path(args, "finetune_last"))
            val_top1 = record.get("finetune_val_top1")
            if val_top1 is None or val_top1 > best_val_top1:
                best_val_top1, selected = val_top1, test["top1"]
                runtime.save(content, checkpoint_path(args, "finetune_best"))
    return selected


@torch.no_grad()
def evaluate(runtime, network, image_set, views):
    """Accuracy of ``network`` on a set, each image once over all processes.

    Returns:
        {"top1", "top5": percent, "test_loss": mean cross-entropy}; 5 is clipped to the number of classes.
    """
    network.eval()
    total = torch.zeros(4, device=runtime.device)
    size = min(EVALUATION_BATCH, len(image_set))
    for images, targets, mask in batches(image_set, size, runtime.device, runtime.rank, runtime.world_size):
        with runtime.autocast():
            logits = network(*runtime.shard((views.evaluation(images),))).float()
        hits = topk_correct(logits, targets, (1, 5))
        losses = F.cross_entropy(logits, targets, reduction="none")
        total += (torch.stack([*hits, losses, torch.ones_like(losses)]) * mask).sum(dim=1)
        runtime.finish_step()
    top1, top5, loss, count = runtime.sum_(total).tolist()
    return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, "test_loss": loss / count}


# ---------------------------------------------------------------- main


def about(dataset):
    """What a checkpoint must know of its data to predict with it."""
    return {
        "name": dataset.name,
        "classes": list(dataset.classes),
        "mean": list(dataset.mean),
        "std": list(dataset.std),
        "size": dataset.size,
        "crop": dataset.crop,
    }


def result_line(summary):
    parts = [f"top-1 {summary['top1']:.2f} %", f"top-5 {summary['top5']:.2f} %"]
    if summary["selection"] == "val" and summary["best_top1"] is not None:
        parts.append(f"chosen by validation {summary['best_top1']:.2f} %")
    if summary["finetune_top1"] is not None:
        parts.append(f"finetuned {summary['finetune_top1']:.2f} %")
    if summary["teacher_top1"] is not None:
        parts.append(f"teacher {summary['teacher_top1']:.2f} %")
    about = [
        summary["dataset"],
        f"{summary['num_labeled']} labels",
        summary["method"],
        f"seed {summary['seed']}",
    ]
    return "  ".join(parts) + f"  ({', '.join(about)})"


def describe_run(args, runtime, dataset, method):
    """What is about to be trained on what, in a few lines."""
    shape = (3, dataset.size, dataset.size) if dataset.size else (2,)
    lines = [
        f"{args.dataset}: {len(dataset.labeled)} labelled, {len(dataset.unlabeled)} unlabelled, "
        f"{len(dataset.test)} test images; {args.method} on {runtime.describe()}"
    ]
    for role, learner in method.learners.items():
        name = network_name(vars(args), role)
        learning = sum(p.numel() for p in learner.parameters.values())
        total, operations = count_parameters(learner.network), count_flops(learner.network, shape)
        frozen = f" ({learning:,} learn)" if learning < total else ""
        lines.append(f"{role}: {name}, {total:,} parameters{frozen}, {operations:,} multiply-adds an image")
    print("\n".join(lines), file=sys.stderr)


def build_method(args, runtime, dataset, saved):
    """The method with its networks, and what the run knows of itself; both continued from ``saved``."""
    torch.manual_seed(args.seed)  # the same initial weights in every process
    method = METHODS[args.method](args, dataset.num_classes, dataset.size, runtime)
    state = dict(FRESH)
    if saved:
        method.load_state_dict(saved, args.resume)
        state |= {key: saved[key] for key in (*FRESH, *POSITION) if key in saved}
    return method, state


def train(args, runtime, dataset, views, method, state, log):
    """Train the method from ``args.start_step`` on.

    Returns:
        the network that was selected, and the figures of the run for summary.json.
    """
    if runtime.is_main:
        describe_run(args, runtime, dataset, method)
    with Interrupt() as interrupt:
        train_loop(args, runtime, dataset, views, method, log, state, interrupt)

    network = method.predictor
    if dataset.val is not None:  # the checkpoint that validation chose
        network = copy.deepcopy(network)
        best = checkpoint_path(args, "best")
        load_state(network, predictor_state(runtime.load(best), best), best)
    figures = {name: state[name] for name in SUMMARY if name in state}
    figures["steps"] = args.total_steps
    figures["images_per_second"] = state["trained_images"] / state["train_seconds"]
    if method.teacher_network is not None:
        figures["teacher_top1"] = evaluate(runtime, method.teacher_network, dataset.test, views)["top1"]
    return network, figures


def main(argv):
    args = parse_arguments(argv)
    runtime = Runtime(
        args.device, args.amp, args.amp_dtype, args.channels_last, args.sync_bn, compiled=args.compile
    )
    try:
        start(args, runtime)
    finally:
        runtime.close()


def start(args, runtime):
    """Read the data, build the networks, then train, finetune or evaluate; write the summary."""
    if args.resume == "auto":
        last = checkpoint_path(args, "last")
        args.resume = last if runtime.exists(last) else None
        if not args.resume and (args.evaluate or args.finetune):
            raise UserError(f"there is no checkpoint {last} to evaluate or finetune")
    if args.evaluate:  # a folder of its own: the record of the training run stays as it is
        args.name = os.path.basename(args.resume).removesuffix(".pth.tar")
    with runtime.first_here():
        dataset = read_data(args)
    if args.num_classes not in (None, dataset.num_classes):
        raise UserError(
            f"--num-classes {args.num_classes}, but {args.dataset} has {dataset.num_classes} classes"
        )
    views = build_views(args, dataset, runtime)
    saved = runtime.load(args.resume) if args.resume else None
    only = args.evaluate or args.finetune
    check_checkpoint(args, saved, only)
    # all that can be refused is refused before anything is written
    if only:
        network = build_network(args, dataset.num_classes, dataset.size, "student")
        load_state(network, predictor_state(saved, args.resume), args.resume)
        runtime.place(network)
    else:
        method, state = build_method(args, runtime, dataset, saved)
    folder = os.path.join(args.results_path, args.name)
    log = RunLog(folder, args, start_step=None if only else args.start_step, active=runtime.is_main)
    try:
        if runtime.is_main:
            if not args.resume and os.path.exists(checkpoint_path(args, "last")):
                print(
                    f"{args.name} was trained before: its checkpoints and record are replaced "
                    "(another --name keeps them, --resume auto continues them)",
                    file=sys.stderr,
                )
            write_labeled_indices(os.path.join(folder, "labeled_indices.txt"), dataset.labeled_indices)
            make_folder(args.save_path)
        if only:
            measured = evaluate(runtime, network, dataset.test, views)
            figures = {"steps": saved["step"], "top1": measured["top1"], "top5": measured["top5"]}
        else:
            network, figures = train(args, runtime, dataset, views, method, state, log)
        if args.finetune_epochs and not args.evaluate:
            steps = figures["steps"]
            figures["finetune_top1"] = finetune(args, runtime, dataset, views, network, log, steps)
        summary = dict.fromkeys(SUMMARY) | (log.read_summary() if args.finetune else {}) | figures
        summary |= {
            "name": args.name,
            "dataset": args.dataset,
            "method": args.method,
            "num_labeled": len(dataset.labeled),
            "seed": args.seed,
            "selection": "last" if dataset.val is None else "val",
            "device": runtime.describe(),
            "torch": torch.__version__,
            "commit": commit(),
        }
        log.summary(summary)
    finally:
        log.close()
    if runtime.is_main:
        if not only:
            visualize.finished_run(folder, dataset)
        print(result_line(summary))


def check_checkpoint(args, saved, only):
    """Whether the checkpoint of --resume can be continued by these arguments; sets the step to start at."""
    if not args.resume:
        return
    if not isinstance(saved, dict) or "step" not in saved:
        raise UserError(
            f"{args.resume} is not a checkpoint of this program: to start from weights use --weights"
        )
    if only:
        return
    for name in ("method", "optimizer"):
        before, now = saved.get("args", {}).get(name), getattr(args, name)
        if before != now:
            raise UserError(f"{args.resume} was trained with --{name} {before}: it cannot go on with {now}")
    args.start_step = saved["step"]
    if args.start_step > args.total_steps:
        raise UserError(f"{args.resume} is of step {args.start_step}: give a larger --total-steps")


def run(argv):
    """``main``, with what a user can get wrong as one sentence on standard error; returns the exit status."""
    try:
        main(argv)
    except UserError as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"main.py: {error}; the last checkpoint is of before", file=sys.stderr)
        return 3
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # raised wherever the program is when a worker ends
            raise
        print(
            f"main.py: a process that decodes images has ended ({str(error).splitlines()[0]}): it may have "
            "run out of memory, use fewer --workers and continue with --resume auto",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
