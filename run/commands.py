"""Which run a command is about: its flags beside what a checkpoint remembers, its name, what is refused.

A checkpoint knows its run: ``--resume CKPT`` needs no other flag, and what is given beside it overrides what
the checkpoint remembers. Continuing is refused where that would make another run of it; a name that was
trained before is refused unless ``--resume`` or ``--overwrite`` say what is meant.
"""

import argparse
import errno
import os
import re

import torch

from data import STATISTICS
from engine.runtime import Runtime, UserError
from methods import METHODS, network_name
from methods.feedback import ESTIMATORS
from models import TIMM, count_flops, count_parameters, timm_statistics
from utils import Parser, say, tell, well_formed, writing

# flags that belong to one command and are not taken from a checkpoint
OF_COMMAND = ("evaluate", "finetune", "resume", "overwrite", "local_rank", "start_step", "help")
PATHS = ("data_path", "save_path", "results_path", "unlabeled_path", "labeled_indices", "weights")
PATHS = (*PATHS, "labels", "teacher_checkpoint", "resume")
# flags that say what a run is about: it cannot go on with others
IDENTITY = (
    *("dataset", "num_labeled", "num_val", "seed", "resize", "test_fraction", "method", "model"),
    *("student_model", "optimizer", "weak_pass", "freeze_body", "body_lr_scale", "switch_every"),
    *("svhn_extra", "keep_test_copies", "value_range"),
)
# flags whose change is not worth a line
INCIDENTAL = (*OF_COMMAND, "name", "device", "workers", "keep", "pictures", "log_step", "expand_labels")
INCIDENTAL = (*INCIDENTAL, "max_megapixels")

# the default network of a data set, where it is not WRN-28-2
MODELS = {"twomoons": "mlp-2-8-8-2", "cifar100": "wrn-28-8", "stl10": "wrn-37-2", "imagenet": "resnet50"}

# ---------------------------------------------------------------- what a command says


def flag(name, value=None):
    """An argument as it stands on the command line."""
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return " ".join(["--" + name.replace("_", "-"), *map(str, values)])


def each_checkpoint(argv):
    """The command line once for each of its ``--resume``; UserError for several without ``--evaluate``."""
    parser = Parser(add_help=False)
    parser.add_argument("--resume", action="append", default=[])
    parser.add_argument("--evaluate", action="store_true")
    args, rest = parser.parse_known_args(argv)
    if len(args.resume) < 2:
        return [argv]
    if not args.evaluate:
        raise UserError(
            "--resume is given more than once: only --evaluate takes several checkpoints, as an ensemble"
        )
    return [[*rest, "--evaluate", "--resume", path] for path in args.resume]


def arguments(parser, argv, saved=None, path=None):
    """The command line, checked; what it does not say is as in the checkpoint ``saved`` of ``path``."""
    args, given = parser.parse_given(argv)

    # what the checkpoint remembers
    if args.resume == "auto":
        if args.overwrite:
            parser.error("--resume auto continues and --overwrite replaces: give one of them")
        given -= {"name"} if args.evaluate else set()
        args.resume = path
    before = remembered(saved, parser, args.resume)
    for name in before.keys() - given:
        setattr(args, name, before[name])
    if saved:
        take_places(args, given, before)
        args.finetune |= "finetune_step" in saved and not args.evaluate
        args.start_step = 0 if args.evaluate or args.finetune else saved["step"]
        take_table(args, given, before)
    elif args.labels and "dataset" not in given:
        args.dataset = "folder"

    # flags without effect
    unused = without_effect(args)
    if named := sorted(unused & given):
        method, how = METHODS[args.method], [flag("method", args.method)]
        if method.uses_feedback:
            how.append(flag("feedback", args.feedback))
        if args.optimizer != "sgd":
            how.append(flag("optimizer", args.optimizer))
        if "threshold" in named and "threshold" in method.flags:
            how.append("--confidence soft")
        flags = ", ".join(map(flag, named))
        say(f"{' '.join(how)} on {args.dataset}: {flags} without effect")

    # what has no effect excludes nothing
    defaults = {name: parser.get_default(name) for name in unused}
    check_arguments(argparse.Namespace(**vars(args) | defaults), parser, before)

    # defaults that depend on other flags
    own = bool(args.pretrained or args.weights)  # batch norm as the weights have it
    if before.keys() & {"bn_momentum", "bn_eps"} != {"bn_momentum", "bn_eps"}:
        earlier = bool(before)  # earlier versions left the epsilon to the network and set the momentum
        norms = {
            "bn_momentum": None if own and not earlier else 0.01,
            "bn_eps": None if own or earlier else 1e-3,
        }
        for name in norms.keys() - given:
            setattr(args, name, norms[name])
    args.model = args.model or MODELS.get(args.dataset, "wrn-28-2")

    # places and the name
    for name in PATHS:
        value = getattr(args, name)
        if value is not None:
            setattr(args, name, os.path.abspath(value))
    name = default_name(args) if args.name is None else args.name
    args.name = check_name(name, trains=not args.evaluate and name != before.get("name"))
    if args.evaluate:
        args.compile = args.cuda_graph = False  # nothing is trained
    elif saved:
        check_continuation(args, saved, given - unused, before)
    return args


def without_effect(args):
    """The names of the flags that the chosen method, feedback, optimiser and data set do not use."""
    method = METHODS[args.method]
    used = set(method.flags)
    if method.uses_feedback and args.feedback in ESTIMATORS:
        used |= set(ESTIMATORS[args.feedback].flags)
    unused = {name for each in (*METHODS.values(), *ESTIMATORS.values()) for name in each.flags} - used
    unused |= {"threshold"} if args.confidence == "soft" else set()
    if "pseudo_label_view" not in used:  # there is no other view to push
        unused |= {"feedback_view"}
    unused |= {"jitter"} if args.dataset != "twomoons" else {"randaug", "resize", "labeled_view"}
    unused |= {"randaug"} if not method.uses_strong_view and args.labeled_view == "weak" else set()
    unused |= {"milestones"} if args.schedule != "milestones" else set()
    unused |= {"test_fraction"} if args.dataset != "folder" else set()
    unused |= {"label_columns"} if not args.labels else set()
    if args.dataset not in ("folder", "imagenet") and not args.unlabeled_path:  # no image files are decoded
        unused |= {"value_range", "max_megapixels"}
    unused |= {"sgd": set(), "rmsprop": {"nesterov"}, "adamw": {"nesterov", "momentum"}}[args.optimizer]
    unused |= {"body_lr_scale"} if args.freeze_body else set()
    return unused | ({"svhn_extra"} if args.dataset != "svhn" else set())


def check_arguments(args, parser, before):
    """Flags that exclude each other or need another one; UserError for the first that does not fit."""
    if (args.evaluate or args.finetune) and not args.resume:
        parser.error("--evaluate and --finetune need --resume CKPT")
    if args.finetune and not args.finetune_epochs:
        parser.error("--finetune with --finetune-epochs 0 has nothing to do: give --finetune-epochs N")
    if args.evaluate and args.finetune:
        parser.error("--evaluate and --finetune are two commands: give one of them")
    if args.cuda_graph and (obstacle := no_graph(args)):
        parser.error(
            f"--cuda-graph repeats a step as it was captured and does not go with {obstacle}: leave out one "
            "of them (--no-cuda-graph)"
        )
    method = METHODS[args.method]
    if method.uses_teacher_checkpoint and not args.teacher_checkpoint:
        parser.error(f"--method {args.method} needs --teacher-checkpoint FILE")
    if args.method == "reduced-mpl" and args.feedback == "none":
        parser.error(
            "--feedback none leaves --method reduced-mpl nothing that trains its perceptron: give another "
            "--feedback, or --method pseudo-label"
        )
    if args.value_range and not args.value_range[0] < args.value_range[1]:
        parser.error(f"{flag('value_range', args.value_range)}: the first value must be below the second")
    if args.unlabeled_mode == "only" and not args.unlabeled_path and args.dataset != "folder":
        parser.error("--unlabeled-mode only needs --unlabeled-path DIR")
    if args.freeze_body and not (args.pretrained or args.weights or args.resume):
        parser.error(
            "--freeze-body leaves all but the last layer as it starts, and here it starts at random: add "
            "--pretrained or --weights FILE, or give --no-freeze-body"
        )
    if args.align_to == "labeled" and not args.align:
        parser.error("--align-to labeled needs --align RATE, such as 0.2")
    if args.switch_every and args.student_model:
        parser.error("--switch-every exchanges two networks of one kind: leave out --student-model")
    if args.batch_size % args.accumulate:
        parser.error(
            f"--batch-size {args.batch_size} cannot be taken in --accumulate {args.accumulate} parts"
        )
    if args.mixup_alpha and args.method != "semimeta" and args.batch_size // args.accumulate % 2:
        parser.error(
            "--mixup-alpha mixes labelled images in pairs: give a --batch-size of pairs in each part"
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
    for name in ("student_wait_steps", "teacher_warmup_steps"):
        if args.method == "mpl" and getattr(args, name) >= args.total_steps:
            parser.error(
                f"the student would never learn: {flag(name, getattr(args, name))} is not below "
                f"--total-steps {args.total_steps}"
            )
    training = not (args.evaluate or args.finetune)
    late = {
        "warmup_steps": "the learning rate does not reach its peak",
        "switch_every": "teacher and student never change places",
    }
    for name, outcome in late.items() if training else ():
        if getattr(args, name) >= args.total_steps:
            told = f"{flag(name, getattr(args, name))} is not below --total-steps {args.total_steps}"
            say(f"{told}: {outcome}")
    trained = method.uses_feedback and training
    scalar = args.feedback in ESTIMATORS and not ESTIMATORS[args.feedback].per_class
    if trained and args.pseudo_label == "soft" and scalar:
        say(
            f"--pseudo-label soft gives --feedback {args.feedback} no gradient, as in the published code: "
            "--feedback exact has one"
        )


def no_graph(args):
    """The flag that makes a step more than kernels repeated on the device (``StepGraph``), or None."""
    exact = METHODS[args.method].uses_feedback and args.feedback == "exact"
    sampled = "pseudo_label" in METHODS[args.method].flags and args.pseudo_label == "sample"
    obstacles = {
        "--feedback exact and --student-dropout": exact and args.student_dropout,  # drawn twice
        "--accumulate and dropout": args.accumulate > 1 and (args.teacher_dropout or args.student_dropout),
        "--accumulate and --pseudo-label sample": args.accumulate > 1 and sampled,  # drawn between two passes
        "--method reduced-mpl": args.method == "reduced-mpl",  # looks labels up on the host
        "--mixup-alpha": args.mixup_alpha,  # drawn on the host
        "--switch-every": args.switch_every,
        f"--optimizer {args.optimizer}": args.optimizer != "sgd",
        "--amp-dtype fp16": args.amp and args.amp_dtype == "fp16",
    }
    return next((obstacle for obstacle, present in obstacles.items() if present), None)


def describe_run(args, runtime, dataset, method, folder, step):
    """What is about to be trained on what, in a few lines; ``method`` is None before finetuning alone."""
    shape = (3, dataset.size, dataset.size) if dataset.size else (2,)
    things = f"images, {dataset.size} pixels" if dataset.size else "points"
    lines = [
        f"{args.dataset}: {len(dataset.labeled):,} labelled, {len(dataset.unlabeled):,} unlabelled, "
        f"{len(dataset.test):,} test {things}; {args.method} on {runtime.describe()}",
        *dataset.notes,
    ]
    for role, learner in method.learners.items() if method else ():
        if role == "perceptron":
            name, inputs = "five layers on class distributions", (dataset.num_classes,)
        else:
            name, inputs = network_name(vars(args), role), shape
        learning = sum(p.numel() for p in learner.parameters.values())
        total, operations = count_parameters(learner.network), count_flops(learner.network, inputs)
        frozen = f" ({learning:,} learn)" if learning < total else ""
        lines.append(f"{role}: {name}, {total:,} parameters{frozen}, {operations:,} multiply-adds an image")
    lines.append(f"results go to {folder}, checkpoints to {args.save_path}")
    if args.resume:
        doing = "finetuning" if args.finetune else "continuing"
        lines.append(f"{doing} (as {args.name}) from step {step} of {args.resume}")
        if not args.finetune and step == args.total_steps:
            lines.append(f"--total-steps {step} is reached: nothing is left to train")
    tell(runtime, *lines)


def class_shares(args, runtime, dataset):
    """Share of each class among the labelled images, K floats; warns where --align assumes other ones."""
    counts = torch.bincount(dataset.labeled.targets, minlength=dataset.num_classes).tolist()
    most, least = max(counts), min(counts)
    # a fraction of labels is rounded in each class, so that one image more says nothing
    aligned = args.align and "align" in METHODS[args.method].flags
    if aligned and args.align_to == "uniform" and most > max(1.5 * least, least + 1):
        classes = [dataset.classes[counts.index(count)] for count in (most, least)]
        tell(
            runtime,
            f"--align assumes equal classes, but {most} labelled images are of class '{classes[0]}' and "
            f"{least} of '{classes[1]}': if the unlabelled images are as unequal, add --align-to labeled",
        )
    return [count / len(dataset.labeled) for count in counts]


# ---------------------------------------------------------------- a run's name and files


def default_name(args):
    """The name of the data set; of a folder, the folder's own; of an evaluation, its checkpoint's."""
    if args.evaluate and args.resume:
        return os.path.basename(args.resume).removesuffix(".pth.tar")
    if args.dataset == "folder":
        return os.path.basename(os.path.abspath(args.data_path)).lstrip(".") or "folder"
    return args.dataset


def check_name(name, trains=False):
    """Returns the name of a run, which is also that of its files; UserError if it cannot be one.

    ``trains``: not the record of an evaluation. Then its checkpoints must not be taken for another run's.
    """
    if trains and (match := re.search(r"_(last|best|finetune|step\d+)$", name)):
        raise UserError(
            f"'{name}' ends in {match[0]}, as the checkpoints of a run named '{name[: match.start()]}' do: "
            "choose another --name"
        )
    if not name or name.startswith(".") or len(os.fsencode(name)) > 200 or set(name) & set("/\\\0\n"):
        raise UserError(
            f"{name!r} cannot be the name of a run: use 1 to 200 letters without path separators, the first "
            "of them no dot"
        )
    return name


def checkpoint_path(args, kind):
    """``checkpoint/NAME_KIND.pth.tar``."""
    return os.path.join(args.save_path, f"{args.name}_{kind}.pth.tar")


def checkpoints_of(args):
    """All checkpoints of the run's name that there are: {path: step in the name, None without one}."""
    pattern = re.compile(
        re.escape(args.name) + r"_(?:last|best|finetune_last|finetune_best|step(\d{8,}))\.pth\.tar"
    )
    names = os.listdir(args.save_path) if os.path.isdir(args.save_path) else []
    found = filter(None, map(pattern.fullmatch, names))
    return {os.path.join(args.save_path, match[0]): match[1] and int(match[1]) for match in found}


def drop_checkpoints(args, step):
    """Of the checkpoints that are named after their step, keep the last ``--keep`` up to this one.

    Those of later steps predate this run.
    """
    numbered = {number: path for path, number in checkpoints_of(args).items() if number is not None}
    kept = sorted(number for number in numbered if number <= step)[-args.keep :]
    for number in numbered.keys() - set(kept):
        os.remove(numbered[number])


def make_folder(path):
    """Make a folder, and see that it can be written to; UserError if not."""
    with writing(path):
        os.makedirs(path, exist_ok=True)
        probe = os.path.join(path, f".probe-{os.getpid()}")
        with open(probe, "w"):
            pass
        os.remove(probe)


HELD = []  # open files whose locks last as long as this process


def lock(args, make=True):
    """Only one process trains a run of a name: the system lifts the lock when it ends, however it ends.

    Args:
        make: make the file that is locked, ``checkpoint/.NAME.lock``, if it is not there; it stays.

    Raises:
        UserError: another process holds the lock, or the file cannot be written.
    """
    path = os.path.join(args.save_path, f".{args.name}.lock")
    try:
        import fcntl
    except ImportError:  # no such locks on Windows
        return
    if not make and not os.path.exists(path):
        return
    with writing(path):
        HELD.append(open(path, "a"))  # noqa: SIM115 (open until the process ends)
    try:
        fcntl.lockf(HELD[-1], fcntl.LOCK_EX | fcntl.LOCK_NB)  # decoding workers do not inherit it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise UserError(
                f"{args.name} is being trained by another process: wait for its end, or give another --name"
            ) from error
        # else a file system without locks: nothing can be known


# ---------------------------------------------------------------- writing and reading


def save(args, runtime, log, content, kinds):
    """Write a checkpoint of each kind, in this order; with the first, a run that is replaced goes."""
    paths = [checkpoint_path(args, kind) for kind in kinds]
    runtime.save(content, *paths)
    if runtime.is_main and log.replacing:
        for path in checkpoints_of(args).keys() - set(paths):
            os.remove(path)
        log.settle()


def peek(path):
    """The content of a checkpoint, whose tensors stay in the file; ``{}`` for any other file.

    What is wrong with a file is said where all of it is read.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception:  # torch.load raises many kinds for a file that is not one of its own
        return {}
    return content if well_formed(content) else {}


def device_of(args, given):
    """The device of the command, else that of the checkpoint where this machine has it, else ``auto``."""
    path = next(filter(os.path.isfile, candidates(args)), None)
    if "device" in given or path is None:
        return args.device
    device = str(peek(path).get("args", {}).get("device", args.device))
    return device if Runtime.available(device) else "auto"


def candidates(args):
    """The files that ``--resume`` may mean, the first that is there; for ``auto`` those of the run's name.

    The best is written before the last: a run that was killed between its first two files has the best alone.
    Beside it may be files of the run that it was about to replace: those of the newest file's run count.
    """
    if args.resume != "auto":
        return [args.resume] if args.resume else []
    name = args.name or default_name(argparse.Namespace(**vars(args) | {"resume": None}))
    kinds = ("last", "finetune_last", "best", "finetune_best")
    paths = [os.path.join(args.save_path, f"{check_name(name)}_{kind}.pth.tar") for kind in kinds]
    left = of_other_runs(paths)
    return [path for path in paths if path not in left]


def of_other_runs(paths):
    """Those of a name's checkpoints that are not of the run of the newest file.

    There are some where a run was killed while it replaced another one: behind its first file. Damaged files
    and those of earlier versions do not say which run they are of.
    """
    runs = {path: run for path in paths if (run := peek(path).get("run"))}
    newest = max(runs, key=os.path.getmtime, default=None)
    return {path for path, run in runs.items() if run != runs[newest]}


def read_checkpoint(args, runtime, starts):
    """The path of ``--resume`` and what is there; (None, None) without one.

    Args:
        starts: whether the command says enough to start a run where ``--resume auto`` finds none.

    Raises:
        UserError: no such file, a damaged one, or none of this program.
    """
    if not args.resume:
        return None, None
    path = args.resume
    if path == "auto":
        paths = candidates(args)
        path = runtime.on_main(lambda: next(filter(os.path.isfile, paths), None))
        if path is None:
            if args.evaluate or args.finetune:
                raise UserError(
                    f"there is no checkpoint {paths[0]} to evaluate or finetune: give its run's --name"
                )
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


def check_same_test(one, other, path, other_path):
    """UserError unless two checkpoints, evaluated as an ensemble, have the same classes and test images.

    Args:
        one, other: the ``Dataset`` of each.
        path, other_path: of the checkpoints.
    """
    if one.classes != other.classes:
        raise UserError(f"{other_path} has other classes than {path}: evaluate each by itself")
    tests, prints = (one.test.targets, other.test.targets), (one.test.fingerprints, other.test.fingerprints)
    if (
        one.name != other.name
        or not torch.equal(*tests)
        or (prints[0] is not None and not torch.equal(*prints))
    ):
        raise UserError(
            f"{other_path} has other test images than {path}: give --data-path, or evaluate each by itself"
        )


def expected_statistics(args):
    """(mean, std) that the weights expect which a run starts from; None for the data set's own.

    Raises:
        UserError: teacher and student, who see the same images, start from weights that differ in this.
    """
    if args.normalize == "dataset" or (args.normalize == "auto" and not (args.pretrained or args.weights)):
        return None
    if args.weights and args.normalize == "auto":
        saved = peek(args.weights)
        if "data" in saved:
            return saved["data"]["mean"], saved["data"]["std"]
    if args.normalize == "imagenet":
        return STATISTICS["imagenet"]
    names = {network_name(vars(args), role) for role in ("teacher", "student")}
    try:
        expected = {
            timm_statistics(name) if name.startswith(TIMM) else STATISTICS["imagenet"] for name in names
        }
    except ValueError as error:
        raise UserError(str(error)) from error
    if len(expected) > 1:
        raise UserError(
            f"the weights of {' and '.join(sorted(names))} expect images normalised differently: choose with "
            "--normalize imagenet or dataset, or take another --student-model"
        )
    return expected.pop()


# ---------------------------------------------------------------- what a checkpoint remembers


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
        # --num-labeled is a count or a fraction; what a number must be else, its type says below
        kinds = (str, float) if default is None else (float,) if type(default) is int else (type(default),)
        known = isinstance(value, (*kinds, int, type(None)))
        if action.nargs == 2:
            known = value is None or (isinstance(value, list) and len(value) == 2)
        if action.dest == "label_columns" and value is not None:
            known = known and all(isinstance(each, str) for each in value)
        known = known and (not action.choices or value in action.choices)
        for number in value if isinstance(value, list) else [value]:
            if known and action.type and number is not None:
                try:
                    action.type(str(number))
                except (ValueError, argparse.ArgumentTypeError):
                    known = False
        if not known:
            raise UserError(f"{path} remembers {flag(action.dest, value)}, which this program does not know")
        kept[action.dest] = value
    return kept


def take_places(args, given, before):
    """Where a command with a checkpoint writes: where its run did, if the checkpoint still lies there.

    One that was moved or copied starts new folders in the place where the command is given, as ever.
    """
    if args.evaluate and ("name" not in given or args.name == before.get("name")):
        args.name = None  # a recipe names its run, not this evaluation of it
    here = os.path.dirname(os.path.abspath(args.resume))
    if here != os.path.abspath(before.get("save_path", "checkpoint")):
        for name, default in (("save_path", "checkpoint"), ("results_path", "results")):
            if name not in given:
                setattr(args, name, default)


def take_table(args, given, before):
    """A table of labels belongs to its folder of images: an evaluation on others does not take it along."""
    place = os.path.abspath(args.data_path)
    same = (args.dataset, place) == (before.get("dataset"), before.get("data_path"))
    if args.evaluate and "labels" not in given and not same:
        args.labels = args.label_columns = None


def check_continuation(args, saved, given, before):
    """UserError where the command line makes another run of a checkpoint's; says what else it changes."""
    begins = args.finetune and "finetune_step" not in saved  # finetuning has an optimiser of its own
    own = ("method", "optimizer", "weak_pass", "freeze_body", "body_lr_scale", "switch_every")
    exempt = own if begins else ()
    data = saved["data"] if isinstance(saved.get("data"), dict) else {}
    before = {"value_range": None} | before  # a flag that came later
    changed = []
    for name in sorted(given & before.keys()):
        was, now = before[name], getattr(args, name)
        if was is None and name in ("resize", "value_range"):  # what the data set itself said
            was = data.get({"resize": "size"}.get(name, name))
        if name in PATHS and name not in ("data_path", "unlabeled_path", "labels"):
            continue
        if was == now or (name in PATHS and was and now and os.path.abspath(was) == now):
            continue
        if name in IDENTITY and name not in exempt:
            trained = f"without {flag(name)}" if was is None else f"with {flag(name, was)}"
            raise UserError(f"{args.resume} was trained {trained}: it cannot go on with {flag(name, now)}")
        if name not in INCIDENTAL and not args.finetune:
            changed.append(f"{flag(name)} {was} → {now}")
    if changed:
        say(f"changed since {args.resume}: {', '.join(changed)}")


# ---------------------------------------------------------------- whose name it is


def is_own(args, saved):
    """Whether the checkpoint is one of the run that this command goes on with, not of one that it leaves."""
    same_place = bool(args.resume) and os.path.dirname(args.resume) == args.save_path
    return same_place and args.name == saved.get("args", {}).get("name")


def claim(args, saved):
    """Take the run's name: its folders can be written, no other process has it, and it is still free."""
    make_folder(args.results_path)
    make_folder(args.save_path)
    lock(args)
    replacing = replaces(args, saved)
    if is_own(args, saved) and (left := of_other_runs(checkpoints_of(args))):
        for path in left:
            os.remove(path)
        say(f"removed {len(left)} checkpoints of the run that {args.name} replaces")
    return replacing


def replaces(args, saved):
    """Whether the run replaces another one of its name; UserError without ``--overwrite``."""
    lock(args, make=False)
    last, folder = checkpoint_path(args, "last"), os.path.join(args.results_path, args.name)
    ways = "--overwrite replaces it, another --name leaves it untouched"
    checkpoints = checkpoints_of(args)
    if is_own(args, saved):
        of_others = of_other_runs(checkpoints)
        if args.resume in of_others:
            raise UserError(
                f"{args.resume} is of a run that another one was replacing when it was killed: --resume auto "
                "goes on with that one, another --name with this one"
            )
        if not args.overwrite and not args.finetune and args.resume != last and os.path.isfile(last):
            step = peek(last).get("step", 0)
            if step > saved["step"] and last not in of_others:
                raise UserError(
                    f"{args.name} has come to step {step}, and {args.resume} is of step {saved['step']}: "
                    f"--resume auto continues the former, {ways}"
                )
        return False
    if not args.overwrite and checkpoints:  # without any, a run that was killed early may start again
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
    names = ["freeze_body", "body_lr_scale", *(name for name in vars(args) if name.startswith("finetune_"))]
    theirs = {"freeze_body": False, "body_lr_scale": 1.0} | found["args"]  # flags that came later
    same = all(theirs.get(name) == getattr(args, name) for name in names)
    if found.get("run") == run and found["step"] == base and same and "loader" in found:
        return found
    if args.finetune and not args.overwrite:
        raise UserError(
            f"{args.name} was finetuned before, with other flags or from another checkpoint: --overwrite "
            "replaces that, another --name leaves it untouched"
        )
    return {}


def free_folder(path, name):
    """``path/name``, or with the first number behind it that is not taken: no record is ever replaced."""
    number, folder = 1, os.path.join(path, name)
    while os.path.exists(folder):
        number += 1
        folder = os.path.join(path, f"{name}-{number}")
    return folder
