"""Meta Pseudo Labels: train, finetune and evaluate.

    python main.py --dataset digits --num-labeled 40 --resize 16 --model wrn-10-1 --total-steps 900 …
    python main.py --resume auto --name digits                          # go on where a run was stopped
    python main.py --evaluate --resume checkpoint/NAME_best.pth.tar     # a checkpoint knows its flags
    torchrun --nproc-per-node 4 main.py --dataset cifar10 …

The recipes are in run_*.sh. A run leaves checkpoint/NAME_*.pth.tar and results/NAME/.
"""

import os
import signal
import sys


def interrupted(*_):
    """Ctrl-C while the program is still being imported: nothing is there to be tidied up."""
    os.write(2, b"main.py: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, interrupted)

import argparse
import copy
import math
import time

import torch
import torch.nn.functional as F

import visualize
from augmentation import ImageViews, PointViews
from data import NAMES, STATISTICS, TrainLoader, batches, load_dataset, write_labeled
from learner import Learner, sgd
from methods import METHODS, build_network, predictor_state
from models import count_flops, count_parameters, head_of
from runtime import Runtime, UserError
from utils import (
    Interrupt,
    Meters,
    NonFiniteError,
    Progress,
    RunLog,
    check_name,
    checkpoint_path,
    checkpoints_of,
    commit,
    drop_checkpoints,
    load_state,
    lock,
    make_folder,
    network_name,
    new_run_id,
)

# ---------------------------------------------------------------- arguments

EVALUATION_BATCH = 256  # fixed, so that an accuracy does not depend on the command that asks for it

# run state saved in every checkpoint besides the networks
FRESH = {
    "run": None,
    "best_top1": None,
    "best_step": None,
    "best_val_top1": None,
    "oracle_top1": 0.0,
    "train_seconds": 0.0,
    "trained_images": 0,
}
MEASURED = ("top1", "top5", "mean_class_top1", "largest_class_top1", "never_predicted", "test_images")
POSITION = (*MEASURED, "meters", "loader")
SUMMARY = (
    *("name", "dataset", "method", "num_labeled", "seed", "steps", *MEASURED, "best_top1", "best_step"),
    *("selection", "oracle_top1", "teacher_top1", "finetune_top1", "train_seconds", "images_per_second"),
    *("device", "torch", "commit", "run"),
)

# flags that belong to one command and are not taken from a checkpoint
OF_COMMAND = ("evaluate", "finetune", "resume", "overwrite", "local_rank", "start_step", "help")
PATHS = ("data_path", "save_path", "results_path", "unlabeled_path", "labeled_indices", "weights")
PATHS = (*PATHS, "teacher_checkpoint", "resume")
# flags that say what a run is about: it cannot go on with others
IDENTITY = (
    *("dataset", "num_labeled", "num_val", "seed", "resize", "test_fraction", "method", "model"),
    *("student_model", "optimizer", "weak_pass", "freeze_body", "svhn_extra"),
)
# flags whose change is not worth a line
INCIDENTAL = (*OF_COMMAND, "name", "device", "workers", "keep", "log_step", "expand_labels")

# the default network of a data set, where it is not WRN-28-2
MODELS = {"twomoons": "mlp-2-8-8-2", "cifar100": "wrn-28-8", "stl10": "wrn-37-2", "imagenet": "resnet50"}

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
    **dict.fromkeys(("total_steps", "eval_step", "log_step", "accumulate", "num_classes"), (1, math.inf)),
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
    "bn_momentum": (0, 1),
    "bn_eps": (1e-12, 1),
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
    group.add_argument(
        "--name", help="name of the run and of its files (default: the data set's, or its folder's)"
    )
    group.add_argument("--save-path", default="checkpoint", help="folder of the checkpoints")
    group.add_argument("--results-path", default="results", help="folder of metrics, summary and pictures")
    group.add_argument(
        "--seed", type=int, default=0, help="of labels, initial weights, batches, augmentation"
    )
    group.add_argument(
        "--resume",
        metavar="CKPT",
        help="checkpoint to continue, finetune or evaluate; flags that are not given are taken from it. "
        "auto: the last of this --name, if there is one",
    )
    group.add_argument(
        "--keep", type=int, default=0, metavar="N", help="also keep the checkpoints of the last N evaluations"
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a run of the same --name, once the first checkpoint of this one is written",
    )
    group.add_argument(
        "--evaluate",
        action="store_true",
        help="only evaluate the checkpoint of --resume; the record goes to results/CKPT or results/NAME",
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
    group.add_argument(
        "--svhn-extra",
        action="store_true",
        help="SVHN: its 531,131 extra images are unlabelled ones too (the paper's SVHN-1K)",
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
        "--labeled-indices",
        metavar="FILE",
        help="take these labelled images: labeled_indices.txt of a run, labeled.txt of one on a folder",
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
        help="side of the images (default: digits 16, cifar10, cifar100 and svhn 32, stl10 96, imagenet 224; "
        "a folder: the one size of its images up to 64, else 224)",
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
        "such as resnet50 (default: wrn-28-2; two moons mlp-2-8-8-2, cifar100 wrn-28-8, stl10 wrn-37-2, "
        "imagenet resnet50)",
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
        "--normalize",
        default="auto",
        choices=("auto", "imagenet", "dataset"),
        help="mean and standard deviation of images: auto takes what --pretrained (ImageNet's) or --weights "
        "expects, else the data set's",
    )
    group.add_argument(
        "--bn-momentum",
        type=float,
        metavar="F",
        help="share of a batch in batch norm's running statistics (default: 0.01, as published; with "
        "--pretrained or --weights that of the network)",
    )
    group.add_argument(
        "--bn-eps",
        type=float,
        metavar="F",
        help="added to batch norm's variance (default: 1e-3, as published; with --pretrained or --weights "
        "that of the network)",
    )
    group.add_argument(
        "--freeze-body",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="only the last layer learns, the rest stays as --pretrained or --weights start it",
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
    group.add_argument(
        "--log-step",
        type=int,
        default=50,
        help="steps between lines of metrics.jsonl (losses, rates, images per second), each of which waits "
        "for the device",
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
    if not 0 < value < math.inf or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text} is neither a count nor a fraction below 1")
    return int(value) if value >= 1 else value


def given(parser, argv):
    """The names of the arguments that stand in ``argv``."""
    unset = object()
    names = {action.dest for action in parser._actions if action.dest != "help"}
    parsed = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, unset)))
    return {name for name in names if getattr(parsed, name) is not unset}


def flag(name, value=None):
    """An argument as it stands on the command line."""
    return "--" + name.replace("_", "-") + ("" if value is None else f" {value}")


def remembered(saved, parser, path):
    """The arguments that a checkpoint takes along for the commands after it, ``{}`` if it has none.

    Raises:
        UserError: they are not arguments of this program.
    """
    arguments = saved.get("args") if isinstance(saved, dict) else None
    kept = {}
    for action in parser._actions if isinstance(arguments, dict) else ():
        if action.dest in OF_COMMAND or action.dest not in arguments:
            continue
        value, default = arguments[action.dest], action.default
        kinds = (str, int, float, type(None)) if default is None else (type(default), int, type(None))
        if not isinstance(value, kinds) or (action.choices and value not in action.choices):
            raise UserError(f"{path} remembers {flag(action.dest, value)}, which this program does not know")
        kept[action.dest] = value
    return kept


def parse_arguments(argv, saved=None, path=None):
    """The command line, checked; what it does not say is as in the checkpoint ``saved`` at ``path``, if any.

    A flag that the method has no use for is refused. In ``bash run_x.sh --method supervised`` the second
    ``--method`` overrides a recipe: what the recipe says for another method is then set aside, and said so.
    """
    parser = build_parser()
    of_command = given(parser, argv)
    args = parser.parse_args(argv)
    if args.resume == "auto":
        if args.overwrite:
            parser.error("--resume auto continues and --overwrite replaces: give one of them")
        of_command -= {"name"} if args.evaluate else set()
        args.resume = path
    before = remembered(saved, parser, args.resume)
    for name in before.keys() - of_command:
        setattr(args, name, before[name])
    if saved:
        take_places(args, of_command, before)
        args.finetune |= "finetune_step" in saved and not args.evaluate
        args.start_step = 0 if args.evaluate or args.finetune else saved["step"]
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
    useless |= {"svhn_extra"} if args.dataset != "svhn" else set()
    if refused := sorted(useless & of_user):
        flags = ", ".join(map(flag, refused))
        how = f"--method {args.method}" + f" --feedback {args.feedback}" * (args.method == "mpl")
        parser.error(f"{how} on {args.dataset} does not use {flags}: leave it out")
    if aside := sorted(useless & of_recipe):
        print(f"--method {args.method}: the recipe's {' '.join(map(flag, aside))} set aside", file=sys.stderr)
        for name in aside:
            setattr(args, name, parser.get_default(name))

    check_arguments(args, parser, of_command, before)
    if before.keys() & {"bn_momentum", "bn_eps"} != {"bn_momentum", "bn_eps"}:
        own = bool(args.pretrained or args.weights)
        earlier = bool(before)  # earlier versions left the epsilon to the network and set the momentum
        for name, value in (
            ("bn_momentum", None if own and not earlier else 0.01),
            ("bn_eps", None if own or earlier else 1e-3),
        ):
            if name not in of_command:
                setattr(args, name, value)
    args.model = args.model or MODELS.get(args.dataset, "wrn-28-2")
    for name in PATHS:
        value = getattr(args, name)
        if value is not None:
            setattr(args, name, os.path.abspath(value))
    name = default_name(args) if args.name is None else args.name
    args.name = check_name(name, trains=not args.evaluate and name != before.get("name"))
    if args.evaluate:
        args.compile = False  # nothing is trained
    elif saved:
        check_continuation(args, saved, of_command, before)
    return args


def default_name(args):
    """The name of the data set; of a folder, the folder's own; of an evaluation, its checkpoint's."""
    if args.evaluate and args.resume:
        return os.path.basename(args.resume).removesuffix(".pth.tar")
    if args.dataset == "folder":
        return os.path.basename(os.path.abspath(args.data_path)).lstrip(".") or "folder"
    return args.dataset


def take_places(args, of_command, before):
    """Where a command with a checkpoint writes: where its run did, if the checkpoint still lies there.

    One that was moved or copied starts new folders in the place where the command is given, as ever.
    """
    if args.evaluate and ("name" not in of_command or args.name == before.get("name")):
        args.name = None  # a recipe names its run, not this evaluation of it
    here = os.path.dirname(os.path.abspath(args.resume))
    if here != os.path.abspath(before.get("save_path", "checkpoint")):
        for name, default in (("save_path", "checkpoint"), ("results_path", "results")):
            if name not in of_command:
                setattr(args, name, default)


def check_arguments(args, parser, of_command, before):
    """Ranges, and flags that exclude each other; UserError for the first that does not fit."""
    if (args.evaluate or args.finetune) and not args.resume:
        parser.error("--evaluate and --finetune need --resume CKPT")
    if args.evaluate and args.finetune:
        parser.error("--evaluate and --finetune are two commands: give one of them")
    if args.method == "pseudo-label" and not args.teacher_checkpoint:
        parser.error("--method pseudo-label needs --teacher-checkpoint FILE")
    if args.unlabeled_mode == "only" and not args.unlabeled_path:
        parser.error("--unlabeled-mode only needs --unlabeled-path DIR")
    if args.freeze_body and not (args.pretrained or args.weights or args.resume):
        parser.error(
            "--freeze-body leaves all but the last layer as it starts, and here it starts at random: add "
            "--pretrained or --weights FILE, or give --no-freeze-body"
        )
    for name, (least, largest) in BOUNDS.items():
        value = getattr(args, name)
        if value is not None and not least <= value <= largest:
            limits = f"{least} or more" if largest == math.inf else f"{least} to {largest}"
            parser.error(f"{flag(name, value)} is out of range: {limits}")
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
    if before and args.start_step > args.total_steps:
        parser.error(f"{args.resume} is of step {args.start_step}: give a larger --total-steps")
    if not before and not 0 <= args.start_step < args.total_steps:
        parser.error(f"--start-step {args.start_step} is not below --total-steps {args.total_steps}")
    if args.method == "mpl" and args.student_wait_steps >= args.total_steps:
        parser.error(
            f"the student would never learn: --student-wait-steps {args.student_wait_steps} is not below "
            f"--total-steps {args.total_steps}"
        )
    trained = args.method == "mpl" and not (args.evaluate or args.finetune)
    if trained and args.pseudo_label == "soft" and args.feedback in ("taylor", "dot"):
        print(
            f"--pseudo-label soft gives --feedback {args.feedback} no gradient, as in the published code: "
            "--feedback exact has one",
            file=sys.stderr,
        )


def check_continuation(args, saved, of_command, before):
    """UserError where the command line makes another run of a checkpoint's; says what else it changes."""
    exempt = ("method", "optimizer", "weak_pass", "freeze_body") if args.finetune else ()
    size = saved["data"].get("size") if isinstance(saved.get("data"), dict) else None
    changed = []
    for name in sorted(of_command & before.keys()):
        was, now = before[name], getattr(args, name)
        if name == "resize" and was is None:
            was = size
        if name in PATHS and name not in ("data_path", "unlabeled_path"):
            continue
        if was == now or (name in PATHS and was and now and os.path.abspath(was) == now):
            continue
        if name in IDENTITY and name not in exempt:
            raise UserError(
                f"{args.resume} was trained with {flag(name, was)}: it cannot go on with {flag(name, now)}"
            )
        if name not in INCIDENTAL and not args.finetune:
            changed.append(f"{flag(name)} {was} → {now}")
    if changed:
        print(f"changed since {args.resume}: {', '.join(changed)}", file=sys.stderr)


# ---------------------------------------------------------------- setup


def read_data(args, record, labels_given):
    """The data set of the command line; ``record``: what a checkpoint knows of its own."""
    recorded = bool(record) and "labeled" in record
    return load_dataset(
        args.dataset,
        args.data_path,
        num_labeled=args.num_labeled,
        num_val=args.num_val,
        seed=args.seed,
        resize=args.resize or (record["size"] or None if record else None),
        labeled_indices=args.labeled_indices if labels_given or not recorded else None,
        unlabeled_path=args.unlabeled_path,
        unlabeled_mode=args.unlabeled_mode,
        test_fraction=args.test_fraction,
        workers=args.workers,
        skip_unreadable=args.skip_unreadable,
        svhn_extra=args.svhn_extra,
        record=record,
        only_test=args.evaluate,
    )


def expected_statistics(args):
    """(mean, std) that the weights expect which a run starts from; None for the data set's own."""
    if args.normalize == "dataset" or (args.normalize == "auto" and not (args.pretrained or args.weights)):
        return None
    if args.weights and args.normalize == "auto":
        saved = peek(args.weights)
        if "data" in saved:
            return saved["data"]["mean"], saved["data"]["std"]
    return STATISTICS["imagenet"]


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
        compile=runtime.compile,
    )


# ---------------------------------------------------------------- training


def train_loop(args, runtime, dataset, views, method, log, state, interrupt):
    """Train from ``args.start_step`` to ``args.total_steps``; evaluate and save every ``--eval-step`` steps.

    Args:
        state: the run's state (``FRESH``), updated in place; with the ``POSITION`` of a checkpoint where a
            run is continued.
        interrupt: an entered ``Interrupt``; after a signal the loop saves and exits with 128 + its number.
    """
    mu = 0 if args.method == "supervised" else args.mu
    loader = TrainLoader(dataset, args.batch_size, mu, args.seed, runtime, args.workers)
    meters = Meters(runtime)
    loader.load_state_dict(state.get("loader", {"position": args.start_step}))
    if "meters" in state:
        meters.load_state_dict(state["meters"], runtime.device)

    record_of_data = dataset.record()
    images_per_step = args.batch_size * (1 + mu) * runtime.world_size
    progress = Progress(args.name, args.total_steps, args.start_step, runtime.is_main)
    started, counted = time.perf_counter(), args.start_step

    def count():
        """Adds what was trained since the last look to the run's totals; returns images per second."""
        images, seconds = (step + 1 - counted) * images_per_step, time.perf_counter() - started
        state["trained_images"] += images
        state["train_seconds"] += seconds
        return images / seconds

    def checkpoint(*kinds):
        state.update(meters=meters.state_dict(), loader=loader.state_dict())
        content = method.state_dict() | state
        save(
            args,
            runtime,
            log,
            content | {"step": step + 1, "args": vars(args), "data": record_of_data},
            kinds,
        )

    for step in range(args.start_step, args.total_steps):
        batch = next(loader)
        runtime.seed(args.seed, step)
        batch_views = runtime.shard(views(batch.images_l, batch.targets, batch.images_u, loader.generator))
        evaluating = (step + 1) % args.eval_step == 0 or step + 1 == args.total_steps
        meters.update(method.step(batch_views, step, batch.targets_u, diagnose=evaluating), step)
        runtime.finish_step()

        figures = None
        if evaluating or (step + 1) % args.log_step == 0:  # the only places that wait for the device
            record = meters.read()  # raises where a loss was not finite
            meters.reset()
            record |= {"images_per_second": count()}
            record |= {f"{role}_rate": learner.rate(step) for role, learner in method.learners.items()}
            started, counted = time.perf_counter(), step + 1
            loss = next(iter(record.values()))
            figures = f"loss {loss:.3f}, {record['images_per_second']:.0f} images/s"
            if not evaluating:
                log.record(step + 1, record)
        progress.step(figures)

        if evaluating:
            record |= {name: value.item() for name, value in method.diagnostics.items()}
            method.sync_statistics()
            test, confusion = evaluate(runtime, method.predictor, dataset.test, views)
            record |= test
            if dataset.val is not None:
                record["val_top1"] = evaluate(runtime, method.predictor, dataset.val, views)[0]["top1"]
            best = state["best_val_top1"]
            better = dataset.val is None or best is None or record["val_top1"] > best
            if better:
                state["best_top1"], state["best_step"] = test["top1"], step + 1
                state["best_val_top1"] = record.get("val_top1")
            state.update(measured(test, confusion, dataset.classes))
            state["oracle_top1"] = max(state["oracle_top1"], test["top1"])
            log.record(step + 1, record)
            # the last one last: a run that is killed in between does this step again
            checkpoint(*["best"] * better, *[f"step{step + 1:08}"] * (args.keep > 0), "last")
            if args.keep and runtime.is_main:
                drop_checkpoints(args, step + 1)
            shown = {name: value for name, value in record.items() if not name.endswith("_std")}
            shown = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
            progress.line(f"step {step + 1}/{args.total_steps}  {shown}")
            started, counted = time.perf_counter(), step + 1

        if number := interrupt.stops(runtime):
            meters.read()
            if step + 1 > counted:
                count()
            method.sync_statistics()
            checkpoint("last")
            progress.line(
                f"stopped after step {step + 1}; go on with --resume {checkpoint_path(args, 'last')}"
            )
            progress.close()
            sys.exit(128 + number)
    progress.close()


def finetune(args, runtime, dataset, views, network, log, steps_before, run, before, interrupt):
    """Train a copy of ``network`` on the labelled images alone; returns its top-1 accuracy in percent.

    Without dropout, as in the published code. SGD at a constant rate, up to ten evaluations on the way, with
    a checkpoint each. With ``--num-val`` the one with the best validation accuracy is taken, else the last.

    Args:
        steps_before: the step of the checkpoint that is finetuned; figures are logged after it.
        run: the run's id.
        before: what an earlier process saved in ``NAME_finetune_last``, to go on from; {} to begin.
        interrupt: as in ``train_loop``.
    """
    network = copy.deepcopy(network).requires_grad_(not args.freeze_body)
    head_of(network).requires_grad_(True)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
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
    done, state = 0, {"best_val_top1": None, "finetune_top1": None}
    if before:
        done = before["finetune_step"]
        load_state(network, before["avg_state_dict"], checkpoint_path(args, "finetune_last"))
        learner.optimizer.load_state_dict(before["optimizer"])
        learner.scaler.load_state_dict(before["scaler"])
        meters.load_state_dict(before["meters"], runtime.device)
        loader.load_state_dict(before["loader"])
        state = {key: before[key] for key in state}
    record_of_data = dataset.record()
    progress = Progress(f"{args.name}, finetuning", steps, done, runtime.is_main)

    def checkpoint(*kinds):
        content = {
            "avg_state_dict": network.state_dict(),
            "optimizer": learner.optimizer.state_dict(),
            "scaler": learner.scaler.state_dict(),
            "meters": meters.state_dict(),
            "loader": loader.state_dict(),
            "run": run,
            "step": steps_before,
            "finetune_step": step + 1,
            "args": vars(args),
            "data": record_of_data,
        }
        save(args, runtime, log, content | state, kinds)

    for step in range(done, steps):
        batch = next(loader)
        runtime.seed(args.seed + 1, step)
        labeled, targets, *_ = runtime.shard(views(batch.images_l, batch.targets, None, loader.generator))

        def loss_of(part):
            loss = F.cross_entropy(learner(part[0]), part[1])
            return loss, {"finetune_loss": loss}

        meters.update(learner.learn(loss_of, [(labeled, targets)], step), steps_before + step)
        runtime.finish_step()
        progress.step()

        if (step + 1) % max(50, steps // 10) == 0 or step + 1 == steps:
            learner.sync_statistics()
            record = {"finetune_loss": meters.read()["finetune_loss"]}
            test, _ = evaluate(runtime, network, dataset.test, views)
            record["finetune_top1"] = test["top1"]
            if dataset.val is not None:
                record["finetune_val_top1"] = evaluate(runtime, network, dataset.val, views)[0]["top1"]
            meters.reset()
            log.record(steps_before + step + 1, record)
            val_top1, best = record.get("finetune_val_top1"), state["best_val_top1"]
            better = val_top1 is None or best is None or val_top1 > best
            if better:
                state = {"best_val_top1": val_top1, "finetune_top1": test["top1"]}
            checkpoint(*["finetune_best"] * better, "finetune_last")  # as in training, the last one last
            progress.line(f"step {step + 1}/{steps}  finetuned to {test['top1']:.2f} %")

        if number := interrupt.stops(runtime):
            meters.read()
            learner.sync_statistics()
            checkpoint("finetune_last")
            path = checkpoint_path(args, "finetune_last")
            progress.line(f"stopped after step {step + 1} of finetuning; go on with --resume {path}")
            progress.close()
            sys.exit(128 + number)
    progress.close()
    return state["finetune_top1"]


def save(args, runtime, log, content, kinds):
    """Write a checkpoint of each kind, in this order; with the first, a run that is replaced goes."""
    paths = [checkpoint_path(args, kind) for kind in kinds]
    runtime.save(content, *paths)
    if runtime.is_main and log.replacing:
        for path in checkpoints_of(args).keys() - set(paths):
            os.remove(path)
        log.settle()


@torch.no_grad()
def evaluate(runtime, network, image_set, views):
    """Accuracy of ``network`` on a set of K classes, each image once over all processes.

    Returns:
        {"top1", "mean_class_top1": percent, "top5": percent, with more than five classes, "test_loss": mean
        cross-entropy}, and (K, K) float64, how many images of class i (row) were taken for class j (column).
    """
    network.eval()
    total, confusion = torch.zeros(3, device=runtime.device), None
    size = min(EVALUATION_BATCH, len(image_set))
    for images, targets, mask in batches(image_set, size, runtime.device, runtime.rank, runtime.world_size):
        with runtime.autocast():
            logits = network(*runtime.shard((views.evaluation(images),))).float()
        num_classes = logits.shape[1]
        if confusion is None:
            confusion = torch.zeros(num_classes**2, device=runtime.device)
        ranked = logits.topk(min(5, num_classes), dim=1).indices
        among = ranked.eq(targets[:, None]).any(dim=1).float()
        losses = F.cross_entropy(logits, targets, reduction="none")
        confusion.index_add_(0, targets * num_classes + ranked[:, 0], mask)
        total += (torch.stack([among, losses, torch.ones_like(losses)]) * mask).sum(dim=1)
        runtime.finish_step()
    top5, loss, count = runtime.all_reduce_sum(total).tolist()
    confusion = runtime.all_reduce_sum(confusion).view(num_classes, num_classes).cpu().double()
    sizes = confusion.sum(dim=1)
    right = (confusion.diagonal() / sizes)[sizes > 0]
    figures = {"top1": 100 * confusion.diagonal().sum().item() / count}
    figures |= {"mean_class_top1": 100 * right.mean().item()}
    figures |= {"top5": 100 * top5 / count} if num_classes > 5 else {}
    return figures | {"test_loss": loss / count}, confusion


def measured(test, confusion, classes):
    """What ``evaluate`` has found, for people: the keys of ``MEASURED``.

    "test_images" counts those that could be read. "largest_class_top1" is what always naming the largest
    class of the test set would score, in percent; "never_predicted" names the classes that no image was
    taken for.
    """
    found = {name: test.get(name) for name in MEASURED}
    found["test_images"] = int(confusion.sum())
    found["largest_class_top1"] = 100 * (confusion.sum(dim=1).max() / confusion.sum()).item()
    predicted = confusion.sum(dim=0) > 0
    found["never_predicted"] = [
        name for name, seen in zip(classes, predicted.tolist(), strict=True) if not seen
    ]
    return found


# ---------------------------------------------------------------- main


def result_lines(summary):
    """What standard output ends with: two lines, the last one the result."""
    lines, parts = [], [f"top-1 {summary['top1']:.2f} %"]
    if summary["mean_class_top1"] is not None:
        parts.append(f"mean over classes {summary['mean_class_top1']:.2f} %")
    if summary["top5"] is not None:
        parts.append(f"top-5 {summary['top5']:.2f} %")
    if summary["selection"] == "val" and summary["best_top1"] is not None:
        parts.append(f"chosen by validation {summary['best_top1']:.2f} %")
    if summary["finetune_top1"] is not None:
        parts.append(f"finetuned {summary['finetune_top1']:.2f} %")
    if summary["teacher_top1"] is not None:
        parts.append(f"teacher {summary['teacher_top1']:.2f} %")
    about = [summary["dataset"], f"{summary['num_labeled']} labels", summary["method"]]
    if summary["largest_class_top1"] is not None:
        never = summary["never_predicted"]
        never = f"; never predicted: {', '.join(never[:20])}{', …' * (len(never) > 20)}" if never else ""
        images = f"{summary['test_images']:,} test images"
        lines.append(
            f"{images}; always naming the largest class: {summary['largest_class_top1']:.2f} %{never}"
        )
    return [*lines, "  ".join(parts) + f"  ({', '.join(about)}, seed {summary['seed']})"]


def describe_run(args, runtime, dataset, method, folder, step):
    """What is about to be trained on what, in a few lines; ``method`` is None before finetuning alone."""
    shape = (3, dataset.size, dataset.size) if dataset.size else (2,)
    things = f"images, {dataset.size} pixels" if dataset.size else "points"
    lines = [
        f"{args.dataset}: {len(dataset.labeled)} labelled, {len(dataset.unlabeled)} unlabelled, "
        f"{len(dataset.test)} test {things}; {args.method} on {runtime.describe()}",
        *dataset.notes,
    ]
    for role, learner in method.learners.items() if method else ():
        name = network_name(vars(args), role)
        learning = sum(p.numel() for p in learner.parameters.values())
        total, operations = count_parameters(learner.network), count_flops(learner.network, shape)
        frozen = f" ({learning:,} learn)" if learning < total else ""
        lines.append(f"{role}: {name}, {total:,} parameters{frozen}, {operations:,} multiply-adds an image")
    lines.append(f"results go to {folder}, checkpoints to {args.save_path}")
    if args.resume:
        doing = "finetuning" if args.finetune else "continuing"
        lines.append(f"{doing} {args.name} at step {step}, from {args.resume}")
        if not args.finetune and step == args.total_steps:
            lines.append(f"--total-steps {step} is reached: nothing is left to train")
    tell(runtime, *lines)


def train(args, runtime, dataset, views, method, saved, run, log, interrupt):
    """Train the method from ``args.start_step`` on.

    Returns:
        the network that was selected, and the figures of the run for summary.json.
    """
    state = FRESH | {"run": run}
    state |= {key: saved[key] for key in (*FRESH, *POSITION) if saved.get(key) is not None and key != "run"}
    try:
        train_loop(args, runtime, dataset, views, method, log, state, interrupt)
    except NonFiniteError as error:
        last = checkpoint_path(args, "last")
        good = f"the checkpoint {last} predates it" if os.path.exists(last) else "no checkpoint was written"
        raise NonFiniteError(f"{error}; {good}") from error

    network = method.predictor
    if dataset.val is not None:  # the checkpoint that validation chose
        network = copy.deepcopy(network)
        best = checkpoint_path(args, "best")
        load_state(network, predictor_state(runtime.load(best), best), best)
    figures = {name: state.get(name) for name in SUMMARY if name in (*FRESH, *MEASURED)}
    figures["steps"] = args.total_steps
    figures["images_per_second"] = state["trained_images"] / state["train_seconds"]
    if method.teacher_network is not None:
        figures["teacher_top1"] = evaluate(runtime, method.teacher_network, dataset.test, views)[0]["top1"]
    return network, figures


def main(argv):
    raw, of_command = build_parser().parse_args(argv), given(build_parser(), argv)
    args = None if raw.resume else parse_arguments(argv)
    runtime = Runtime(device_of(raw, argv))
    try:
        path, saved = read_checkpoint(raw, runtime, "dataset" in of_command)
        args = args or parse_arguments(argv, saved, path)
        if args.evaluate and args.amp and args.amp_dtype == "fp16" and runtime.kind != "cuda":
            tell(runtime, f"fp16 needs CUDA: evaluating in float32 on {runtime.kind}")
            args.amp = False
        runtime.configure(args.amp, args.amp_dtype, args.channels_last, args.sync_bn, args.compile)
        if args.evaluate:
            evaluate_checkpoint(args, runtime, saved)
        else:
            start(args, runtime, saved, "labeled_indices" in of_command)
    finally:
        runtime.close()


def device_of(raw, argv):
    """The device of the command, else that of the checkpoint where this machine has it, else ``auto``."""
    path = next(filter(os.path.isfile, candidates(raw)), None)
    if "device" in given(build_parser(), argv) or path is None:
        return raw.device
    device = str(peek(path).get("args", {}).get("device", raw.device))
    return device if Runtime.available(device) else "auto"


def peek(path):
    """The content of a checkpoint, whose tensors stay in the file; ``{}`` for any other file.

    What is wrong with a file is said where all of it is read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch.load raises many kinds for a file that is not one of its own
        return {}
    return content if well_formed(content) else {}


def candidates(raw):
    """The files that ``--resume`` may mean, the first that is there; for ``auto`` those of the run's name."""
    if raw.resume != "auto":
        return [raw.resume] if raw.resume else []
    name = raw.name or default_name(argparse.Namespace(**vars(raw) | {"resume": None}))
    kinds = ("last", "finetune_last")
    return [os.path.join(raw.save_path, f"{check_name(name)}_{kind}.pth.tar") for kind in kinds]


def read_checkpoint(raw, runtime, starts):
    """The path of ``--resume`` and what is there; (None, None) without one.

    Args:
        starts: whether the command says enough to start a run where ``--resume auto`` finds none.

    Raises:
        UserError: no such file, a damaged one, or none of this program.
    """
    if not raw.resume:
        return None, None
    path = raw.resume
    if path == "auto":
        paths = candidates(raw)
        path = runtime.on_main(lambda: next(filter(os.path.isfile, paths), None))
        if path is None:
            if raw.evaluate or raw.finetune:
                raise UserError(f"there is no checkpoint {paths[0]} to evaluate or finetune")
            if not starts:
                raise UserError(
                    f"there is no checkpoint {paths[0]} to go on from, and no --dataset to start a run with"
                )
            name = os.path.basename(paths[0]).removesuffix("_last.pth.tar")
            tell(runtime, f"no checkpoint of {name}: starting at step 0")
            return None, None
    saved = runtime.load(path)
    if not well_formed(saved):
        raise UserError(f"{path} is not a checkpoint of this program: to start from weights use --weights")
    return path, saved


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


def start(args, runtime, saved, labels_given):
    """Read the data, build the networks, then train and finetune; write the summary and the pictures.

    All that can be refused is refused before anything is written.
    """
    saved = saved or {}
    runtime.on_main(lambda: replaces(args, saved))
    with runtime.local_main_first():
        dataset = read_data(args, saved.get("data"), labels_given)
    check_classes(args, dataset)
    if not saved and dataset.size:
        dataset.mean, dataset.std = map(list, expected_statistics(args) or (dataset.mean, dataset.std))
    views = build_views(args, dataset, runtime)
    torch.manual_seed(args.seed)  # the same initial weights in every process
    method = network = None
    if args.finetune:
        network = build_network(args, dataset.num_classes, dataset.size, "student")
        load_state(network, predictor_state(saved, args.resume), args.resume)
        runtime.place(network)
    else:
        method = METHODS[args.method](args, dataset.num_classes, dataset.size, runtime)
        if saved:
            method.load_state_dict(saved, args.resume)
    base = saved["step"] if args.finetune else args.total_steps  # the step that finetuning follows
    run = saved.get("run") if is_own(args, saved) else runtime.on_main(new_run_id)
    tuned = finetuned_before(args, runtime, saved, run, base)
    folder = os.path.join(args.results_path, args.name)
    replace = runtime.on_main(lambda: claim(args, saved))
    log = RunLog(
        folder,
        args,
        run_id=run,
        start_step=None if args.finetune else args.start_step,
        finetune_from=base + tuned.get("finetune_step", 0) if args.finetune or tuned else None,
        active=runtime.is_main,
        replace=replace,
    )
    try:
        runtime.on_main(lambda: write_labeled(log.folder, dataset))
        describe_run(args, runtime, dataset, method, folder, saved.get("step"))
        with Interrupt() as interrupt:
            if args.finetune:
                figures = {"steps": base}
                if "finetune_step" not in saved:
                    figures |= measured(*evaluate(runtime, network, dataset.test, views), dataset.classes)
            else:
                network, figures = train(args, runtime, dataset, views, method, saved, run, log, interrupt)
            summary = summarize(args, runtime, log, figures, len(dataset.labeled), run)
            log.summary(summary)
            if args.finetune_epochs:
                summary["finetune_top1"] = finetune(
                    args, runtime, dataset, views, network, log, base, run, tuned, interrupt
                )
                log.summary(summary)
    finally:
        log.close()
    if runtime.is_main:
        print("\n".join(result_lines(summary)), flush=True)
        draw_pictures(folder, dataset)


def is_own(args, saved):
    """Whether the checkpoint is one of the run that this command goes on with, not of one that it leaves."""
    same_place = bool(args.resume) and os.path.dirname(args.resume) == args.save_path
    return same_place and args.name == saved.get("args", {}).get("name")


def claim(args, saved):
    """Take the run's name: its folders can be written, no other process has it, and it is still free."""
    make_folder(args.results_path)
    make_folder(args.save_path)
    lock(args)
    return replaces(args, saved)


def replaces(args, saved):
    """Whether the run replaces another one of its name; UserError without ``--overwrite``."""
    lock(args, make=False)
    last, folder = checkpoint_path(args, "last"), os.path.join(args.results_path, args.name)
    ways = "--overwrite replaces it, another --name keeps it"
    if is_own(args, saved):
        if not args.overwrite and not args.finetune and args.resume != last and os.path.isfile(last):
            step = peek(last).get("step", 0)
            if step > saved["step"]:
                raise UserError(
                    f"{args.name} has come to step {step}, and {args.resume} is of step {saved['step']}: "
                    f"--resume auto continues the former, {ways}"
                )
        return False
    checkpoints = checkpoints_of(args)  # without any, a run that was killed early may start again
    if not args.overwrite and checkpoints:
        raise UserError(f"{args.name} was trained before: --resume auto continues it, {ways}")
    if not args.overwrite and os.path.exists(os.path.join(folder, "summary.json")):
        raise UserError(f"there is a record of {args.name} in {folder} already: {ways}")
    if saved and not args.finetune and saved["step"] == args.total_steps:
        raise UserError(
            f"{args.resume} is trained to its end, step {saved['step']}: nothing is left for {args.name} to "
            "train; give a larger --total-steps, or --finetune"
        )
    return bool(checkpoints) or os.path.exists(os.path.join(folder, "args.json"))


def finetuned_before(args, runtime, saved, run, base):
    """What an earlier process has saved of the same finetuning, ``{}`` if nothing.

    Raises:
        UserError: the run was finetuned otherwise before.
    """
    if "finetune_step" in saved:
        return saved
    path = checkpoint_path(args, "finetune_last")
    if not is_own(args, saved) or saved["step"] != base:
        return {}
    if not runtime.on_main(lambda: os.path.isfile(path)):
        return {}
    found = runtime.load(path)
    names = [name for name in vars(args) if name.startswith("finetune_")]
    same = all(found["args"].get(name) == getattr(args, name) for name in names)
    if found.get("run") == run and found["step"] == base and same and "loader" in found:
        return found
    if args.finetune and not args.overwrite:
        raise UserError(
            f"{args.name} was finetuned before, with other flags or from another checkpoint: --overwrite "
            "replaces that, another --name keeps it"
        )
    return {}


def draw_pictures(folder, dataset):
    try:
        visualize.finished_run(folder, dataset)
    except Exception as error:  # the run is finished and saved: a picture that cannot be drawn is a warning
        print(f"a picture could not be drawn: {error}", file=sys.stderr)


def summarize(args, runtime, log, figures, num_labeled, run):
    """The content of summary.json; finetuning alone adds to what training has written there."""
    summary = dict.fromkeys(SUMMARY) | (log.read_summary() if args.finetune else {}) | figures
    return summary | {
        "name": args.name,
        "dataset": args.dataset,
        "method": args.method,
        "num_labeled": num_labeled,
        "seed": args.seed,
        "selection": "val" if args.num_val else "last",
        "device": runtime.describe(),
        "torch": torch.__version__,
        "commit": commit(),
        "run": run,
    }


def evaluate_checkpoint(args, runtime, saved):
    """``--evaluate``: measure the predictor of a checkpoint on the test images; needs no labels."""
    record = saved.get("data")
    runtime.on_main(lambda: make_folder(args.results_path))
    with runtime.local_main_first():
        dataset = read_data(args, record, labels_given=False)
    check_classes(args, dataset)
    size = record["size"] if record else dataset.size
    network = build_network(args, dataset.num_classes, size, "student")
    load_state(network, predictor_state(saved, args.resume), args.resume)
    runtime.place(network)
    tell(runtime, *dataset.notes)
    where = f" in {args.data_path}" if dataset.path else ""
    tell(runtime, f"evaluating {args.resume} on the {len(dataset.test)} test images of {args.dataset}{where}")
    if dataset.size != size:
        tell(runtime, f"evaluating at {dataset.size} pixels; the run was trained at {size}")
    test, confusion = evaluate(runtime, network, dataset.test, build_views(args, dataset, runtime))

    folder = runtime.on_main(lambda: free_folder(args.results_path, args.name))
    args.name = os.path.basename(folder)
    log = RunLog(folder, args, start_step=None, tensorboard=False, active=runtime.is_main)
    labeled = (record or {}).get("labeled")
    figures = {"steps": saved["step"]} | measured(test, confusion, dataset.classes)
    num_labeled = args.num_labeled if labeled is None else len(labeled)
    summary = summarize(args, runtime, log, figures, num_labeled, saved.get("run"))
    log.record(saved["step"], test)
    log.summary(summary)
    tell(runtime, f"the record of this evaluation is in {folder}")
    if runtime.is_main:
        print("\n".join(result_lines(summary)))


def free_folder(path, name):
    """``path/name``, or with the first number behind it that is not taken: no record is ever replaced."""
    number, folder = 1, os.path.join(path, name)
    while os.path.exists(folder):
        number += 1
        folder = os.path.join(path, f"{name}-{number}")
    return folder


def check_classes(args, dataset):
    if args.num_classes not in (None, dataset.num_classes):
        raise UserError(
            f"--num-classes {args.num_classes}, but {args.dataset} has {dataset.num_classes} classes"
        )


def tell(runtime, *lines):
    """Lines on standard error, once for all processes."""
    if runtime.is_main and lines:
        print("\n".join(lines), file=sys.stderr)


def run(argv):
    """``main``, with what a user can get wrong as one sentence on standard error; returns the exit status."""
    try:
        main(argv)
    except UserError as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 2
    except NonFiniteError as error:
        print(f"main.py: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("main.py: interrupted", file=sys.stderr)
        return 130
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
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.exit(run(sys.argv[1:]))
