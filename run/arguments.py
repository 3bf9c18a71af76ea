"""A command line, parsed once: flags with their properties, what a checkpoint adds, what is refused."""

import argparse
import copy
import difflib
import math
import os
import re
import sys

from data import POINTS, STATISTICS
from engine.checkpoint import Checkpoint, file_name
from engine.files import being_replaced
from engine.runtime import Runtime
from methods import METHODS
from methods.feedback import ESTIMATORS
from models import TIMM, timm_statistics
from run.identity import candidates, check_name, default_name
from utils import UserError, first_process, say, tell


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds the default to the help of a flag, where there is one: ``(default: 0.0; CIFAR-10 recipe: 0.2)``.

    Commands in a parser's epilog stand on lines of their own, which begin with two spaces.
    """

    def _fill_text(self, text, width, indent):
        fill = super()._fill_text
        return "\n".join(
            line if line.startswith("  ") else fill(line, width, indent) for line in text.split("\n")
        )

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "(default:" in action.help:
            return action.help
        text, found = re.subn(r" \(([^()]+: [^()]+)\)$", r" (default: %(default)s; \1)", action.help)
        return text if found else super()._get_help_string(action)

    def _get_default_metavar_for_optional(self, action):
        kind = getattr(action.type, "__name__", None)
        return {"int": "N", "float": "F"}.get(kind) or super()._get_default_metavar_for_optional(action)


class Parser(argparse.ArgumentParser):
    """argparse, with errors of one sentence instead of the whole usage, and the defaults in the help."""

    def __init__(self, **options):
        super().__init__(formatter_class=HelpFormatter, allow_abbrev=False, **options)

    def error(self, message):
        if not first_process():  # which has the same command line, and says it
            sys.exit(2)
        hint = "--help lists all flags"
        unknown = message.removeprefix("unrecognized arguments: ").split()[0]
        if unknown != message.split()[0]:
            near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, 1)
            hint = f"did you mean {near[0]}?" if near else hint
        raise UserError(f"{message} ({hint})")

    def group(self, title):
        """The function that adds a flag to a group of the help: ``add_argument`` with the flag's properties.

        identity: a run cannot continue with another value of it.
        quiet: its change is not worth a line.
        command: it belongs to one command and is not taken from a checkpoint.
        path: a place on disk, which is made absolute.
        only: a function of the arguments: whether the flag has an effect there. None: always.
        """
        group = self.add_argument_group(title)

        def add(*names, identity=False, quiet=False, command=False, path=False, only=None, **options):
            action = group.add_argument(*names, **options)
            action.identity, action.quiet, action.command = identity, quiet or command, command
            action.path, action.only = path, only
            action.many = options.get("action") == "append"

        return add

    @property
    def flags(self):
        """{name: action} of all flags but --help."""
        return {action.dest: action for action in self._actions if action.dest != "help"}

    def without_effect(self, args):
        """The names of the flags that the chosen method, feedback, optimiser and data set do not use."""
        return {name for name, action in self.flags.items() if action.only and not action.only(args)}

    def parse_given(self, argv):
        """The arguments of ``argv``, and the names of those that stand there."""
        unset = object()
        # a flag that may be given several times adds to a list, which begins as None
        names = {name: None if action.many else unset for name, action in self.flags.items()}
        args = self.parse_args(argv, argparse.Namespace(**names))
        given = {name for name, before in names.items() if getattr(args, name) is not before}
        for name in names.keys() - given:
            setattr(args, name, copy.copy(self.get_default(name)))
        return args, given


def between(kind, least, largest=math.inf):
    """The type of a flag: a number of a kind, int or float, from ``least`` to ``largest``."""

    def number(text):
        value = kind(text)
        if not least <= value <= largest:
            limits = f"{least} or more" if largest == math.inf else f"{least} to {largest}"
            raise argparse.ArgumentTypeError(f"{text} is out of range: {limits}")
        return value

    number.__name__ = kind.__name__  # argparse: invalid int value
    return number


def count_or_fraction(text):
    """A count, a fraction below 1, or ``all``, the fraction 1.0."""
    if text == "all":
        return 1.0
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (value >= 1 and value != int(value)):
        raise argparse.ArgumentTypeError(f"{text} must be a count, a fraction such as 0.05, or all")
    return int(value) if value >= 1 else value


def steps_or_fraction(least):
    """The type of a flag: a number of steps or, below 1, a fraction of --total-steps (``resolve``)."""
    count = between(int, least)

    def number(text):
        try:
            fraction = float(text)
        except ValueError:
            fraction = 0.0
        return fraction if 0 < fraction < 1 else count(text)

    number.__name__, number.fraction = "int", True
    return number


# ---------------------------------------------------------------- where a flag has an effect


def uses(*attributes, where=lambda args: True):
    """Whether the method has one of these attributes, and ``where`` holds; or it does not say all that it
    uses, as a new method: then it may read any flag."""

    def has_effect(args):
        method = METHODS[args.method]
        return not method.says_all or (any(getattr(method, name) for name in attributes) and where(args))

    return has_effect


def is_scalar(args):
    """Whether the value of the feedback is a scalar."""
    return args.feedback in ESTIMATORS and not ESTIMATORS[args.feedback].per_class


def on(*datasets):
    return lambda args: args.dataset in datasets


def on_images(args):
    return args.dataset not in POINTS


def decodes_files(args):
    return args.dataset in ("folder", "imagenet") or bool(args.unlabeled_path)


sharpens = uses("uses_consistency", where=lambda args: not METHODS[args.method].hard_targets)
has_feedback = uses("uses_feedback", where=lambda args: args.feedback != "none")
has_scalar_feedback = uses("uses_feedback", where=is_scalar)
has_exact_feedback = uses("uses_feedback", where=lambda args: args.feedback == "exact")


# ---------------------------------------------------------------- from a command line to arguments

# the default network of a data set, where it is not WRN-28-2
MODELS = {"twomoons": "mlp-2-8-8-2", "cifar100": "wrn-28-8", "stl10": "wrn-37-2", "imagenet": "resnet50"}


PUBLISHED_NORMS = {"bn_momentum": 0.01, "bn_eps": 1e-3}


def flag(name, value=None):
    """An argument as it stands on the command line."""
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return " ".join(["--" + name.replace("_", "-"), *map(str, values)])


def resolve(parser, args, given, saved=None, path=None):
    """The arguments of one run, checked: what the command line does not say is as in its checkpoint.

    Args:
        args, given: of ``Parser.parse_given``; ``args.resume`` is a list of checkpoints or None.
        saved, path: the content of one of these checkpoints, and its path; None to start a run.

    Raises:
        UserError: the arguments exclude each other, or make another run of the checkpoint's.
    """
    args, given = argparse.Namespace(**vars(args)), set(given)

    # the checkpoint, and what it remembers
    if args.resume == ["auto"]:
        if args.overwrite:
            parser.error("--resume auto continues a run and --overwrite replaces it: give one of the two")
        if args.evaluate:
            given -= {"name"}
        args.resume = path
    elif args.resume:
        args.resume = path or args.resume[0]
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

    # fractions of the run
    for name, action in parser.flags.items():
        if getattr(action.type, "fraction", False):
            setattr(args, name, in_steps(getattr(args, name), args.total_steps))

    # flags without effect, which exclude nothing
    unused = parser.without_effect(args)
    say_without_effect(args, given, unused)
    defaults = {name: parser.get_default(name) for name in unused}
    used = argparse.Namespace(**vars(args) | defaults)
    check_arguments(used, parser, before)
    if not (args.evaluate or args.finetune):
        say_remarks(used)

    # defaults that depend on other flags
    if not before and not (args.pretrained or args.weights):  # else batch norm as the weights have it
        for name in PUBLISHED_NORMS.keys() - given:
            setattr(args, name, PUBLISHED_NORMS[name])
    args.model = args.model or MODELS.get(args.dataset, "wrn-28-2")

    # places and the name
    for name, action in parser.flags.items():
        if action.path and getattr(args, name) is not None:
            setattr(args, name, os.path.abspath(getattr(args, name)))
    name = default_name(args) if args.name is None else args.name
    args.name = check_name(name, trains=not args.evaluate and name != before.get("name"))
    if args.evaluate:
        args.compile = args.cuda_graph = False  # nothing is trained
    elif saved:
        check_continuation(args, saved, given - unused, before, parser)
    return args


def in_steps(value, total_steps):
    """A number of steps, given as such or as a fraction of all, or a list of such numbers."""
    if isinstance(value, list):
        return [in_steps(each, total_steps) for each in value]
    return max(1, round(value * total_steps)) if 0 < value < 1 else value


def say_without_effect(args, given, unused):
    """Name the given flags that are not used in one line, with what makes them so."""
    named = sorted(unused & given)
    if not named:
        return
    how = [flag("method", args.method)]
    if METHODS[args.method].uses_feedback:
        how.append(flag("feedback", args.feedback))
    if args.optimizer != "sgd":
        how.append(flag("optimizer", args.optimizer))
    if "threshold" in named and "confidence" not in unused:
        how.append("--confidence soft")
    flags = ", ".join(map(flag, named))
    say(f"with {' '.join(how)} on {args.dataset}, main.py ignores {flags}")


def remembered(saved, parser, path):
    """The arguments that a checkpoint takes along for the commands after it, ``{}`` if it has none.

    Raises:
        UserError: a value is none that this program's command line could have given.
    """
    recorded, flags = (saved or {}).get("args", {}), parser.flags
    kept = {name: recorded[name] for name in flags if name in recorded and not flags[name].command}
    if not can_be_given(parser, kept):
        name = next(name for name in kept if not can_be_given(parser, {name: kept[name]}))
        raise UserError(
            f"{path} was written with {flag(name, kept[name])}, which this version of the program does not "
            "know: use the version that wrote it"
        )
    return kept


def can_be_given(parser, values):
    """Whether a command line can give flags these values, {name: value}: they are written out and parsed."""
    words = [word for name, value in values.items() for word in as_words(parser.flags[name], value)]
    try:
        parsed = parser.parse_args(words)
    except UserError:
        return False
    return all(getattr(parsed, name) == value for name, value in values.items())


def as_words(action, value):
    """A flag with this value as it stands on a command line; nothing where it was not given."""
    name = action.option_strings[0]
    if value is None or value is action.default:
        return []
    if action.nargs == 0:  # a switch
        return [name] if value is True else [f"--no-{name[2:]}"]
    if isinstance(value, (list, tuple)):
        return [name, *map(str, value)]
    if value == 1.0 and isinstance(value, float) and action.type is count_or_fraction:
        return [name, "all"]
    return [f"{name}={value}"]


def check_arguments(args, parser, before):
    """Flags that exclude each other or need another one; UserError for the first that does not fit."""
    method = METHODS[args.method]

    # the command
    if (args.evaluate or args.finetune) and not args.resume:
        parser.error("--evaluate and --finetune need --resume CKPT")
    if args.evaluate and args.finetune:
        parser.error("--evaluate and --finetune are two commands: give one of the two")
    if args.finetune and not args.finetune_epochs:
        parser.error("--finetune with --finetune-epochs 0 has nothing to do: give --finetune-epochs N")
    if args.cuda_graph and (obstacle := no_graph(args)):
        parser.error(
            f"--cuda-graph does not work with {obstacle}: add --no-cuda-graph, or change the other flags"
        )

    # the data
    if args.value_range and not args.value_range[0] < args.value_range[1]:
        parser.error(f"{flag('value_range', args.value_range)}: the first value must be below the second")
    if args.unlabeled_mode == "only" and not args.unlabeled_path and args.dataset != "folder":
        parser.error("--unlabeled-mode only needs --unlabeled-path DIR")

    # batches and steps
    if args.batch_size % args.accumulate:
        parser.error(
            f"--batch-size {args.batch_size} cannot be divided into --accumulate {args.accumulate} equal "
            f"parts: give a multiple of {args.accumulate}"
        )
    if args.mixup_alpha and not method.mixes_unlabeled and args.batch_size // args.accumulate % 2:
        parser.error(
            "--mixup-alpha mixes pairs of labelled images: give a --batch-size that is a multiple of "
            f"{2 * args.accumulate}"
        )
    if before and args.start_step > args.total_steps:
        parser.error(f"{args.resume} is already at step {args.start_step}: give a larger --total-steps")
    if not before and not 0 <= args.start_step < args.total_steps:
        parser.error(f"--start-step {args.start_step} must be below --total-steps {args.total_steps}")
    for name in ("student_wait_steps", "teacher_warmup_steps"):
        if method.trains_teacher and getattr(args, name) >= args.total_steps:
            parser.error(
                f"{flag(name, getattr(args, name))} must be below --total-steps {args.total_steps}: "
                "otherwise the student never learns"
            )

    # the networks
    if args.freeze_body and not (args.pretrained or args.weights or args.resume):
        parser.error(
            "--freeze-body trains only the last layer, but the other layers start at random: add "
            "--pretrained or --weights FILE, or give --no-freeze-body"
        )
    if args.switch_every and args.student_model:
        parser.error("--switch-every needs two networks of the same kind: leave out --student-model")

    # the method
    if method.uses_teacher_checkpoint and not args.teacher_checkpoint:
        parser.error(f"--method {args.method} needs --teacher-checkpoint FILE")
    if method.uses_feedback and method.uses_teacher_checkpoint and args.feedback == "none":
        parser.error(
            f"with --feedback none, nothing trains the perceptron of --method {args.method}: give another "
            "--feedback, or --method pseudo-label"
        )
    if args.align_to == "labeled" and not args.align:
        parser.error("--align-to labeled needs --align RATE, such as 0.2")
    pushed = args.feedback_view if args.feedback_view == "strong" else args.pseudo_label_view
    through_weak = method.uses_feedback and args.feedback != "none" and pushed == "weak"
    if method.uses_consistency and args.weak_pass != "joint" and through_weak:
        parser.error(
            f"--weak-pass {args.weak_pass} has no gradient on the weak view, which --feedback needs: "
            "add --pseudo-label-view strong, --feedback none or, for taylor and dot, --feedback-view strong"
        )


def say_remarks(args):
    """Name the flags with which a part of the training never happens, or has no gradient."""
    late = {
        "warmup_steps": "the learning rate does not reach its peak",
        "switch_every": "teacher and student never change places",
    }
    for name, outcome in late.items():
        if getattr(args, name) >= args.total_steps:
            told = f"{flag(name, getattr(args, name))} is not below --total-steps {args.total_steps}"
            say(f"{told}: {outcome}")
    if METHODS[args.method].uses_feedback and args.pseudo_label == "soft" and is_scalar(args):
        say(
            f"with --pseudo-label soft, --feedback {args.feedback} has no gradient, as in the published "
            "code: --feedback exact has one"
        )


def no_graph(args):
    """The flag that makes a step more than kernels repeated on the device (``StepGraph``), or None."""
    exact, sampled = args.feedback == "exact", args.pseudo_label == "sample"
    obstacles = {
        "--feedback exact and --student-dropout": exact and args.student_dropout,  # drawn twice
        "--accumulate and dropout": args.accumulate > 1 and (args.teacher_dropout or args.student_dropout),
        "--accumulate and --pseudo-label sample": args.accumulate > 1 and sampled,  # drawn between two passes
        f"--method {args.method}": METHODS[args.method].works_on_host,
        "--mixup-alpha": args.mixup_alpha,  # drawn on the host
        "--switch-every": args.switch_every,
        f"--optimizer {args.optimizer}": args.optimizer != "sgd",
        "--amp-dtype fp16": args.amp and args.amp_dtype == "fp16",
    }
    return next((obstacle for obstacle, present in obstacles.items() if present), None)


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


def check_continuation(args, saved, given, before, parser):
    """UserError where the command line makes another run of a checkpoint's; says what else it changes."""
    begins = args.finetune and "finetune_step" not in saved  # finetuning has an optimiser of its own
    own = ("method", "optimizer", "weak_pass", "freeze_body", "body_lr_scale", "switch_every")
    exempt, flags = own if begins else (), parser.flags
    data = saved["data"] if isinstance(saved.get("data"), dict) else {}
    changed = []
    for name in sorted(given & before.keys()):
        was, now = before[name], getattr(args, name)
        if was is None and name in ("resize", "value_range"):  # what the data set itself said
            was = data.get({"resize": "size"}.get(name, name))
        path = flags[name].path
        if path and name not in ("data_path", "unlabeled_path", "labels"):
            continue
        if was == now or (path and was and now and os.path.abspath(was) == now):
            continue
        if flags[name].identity and name not in exempt:
            trained = f"without {flag(name)}" if was is None else f"with {flag(name, was)}"
            raise UserError(f"{args.resume} was trained {trained}: it cannot continue with {flag(name, now)}")
        if not flags[name].quiet and not args.finetune:
            changed.append(f"{flag(name)} {was} → {now}")
    if changed:
        say(f"changed since {args.resume}: {', '.join(changed)}")


def expected_statistics(args):
    """(mean, std) that the weights expect which a run starts from; None for the data set's own.

    Raises:
        UserError: teacher and student, who see the same images, start from weights that differ in this.
    """
    if args.normalize == "dataset" or (args.normalize == "auto" and not (args.pretrained or args.weights)):
        return None
    if args.weights and args.normalize == "auto":
        saved = Checkpoint.peek(args.weights)
        if "data" in saved:
            return saved["data"]["mean"], saved["data"]["std"]
    if args.normalize == "imagenet":
        return STATISTICS["imagenet"]
    names = set(METHODS[args.method].networks(args).values())
    try:
        expected = {
            timm_statistics(name) if name.startswith(TIMM) else STATISTICS["imagenet"] for name in names
        }
    except ValueError as error:
        raise UserError(str(error)) from error
    if len(expected) > 1:
        raise UserError(
            f"the weights of {' and '.join(sorted(names))} expect differently normalised images: give "
            "--normalize imagenet, --normalize dataset or another --student-model"
        )
    return expected.pop()


def check_resumed(args):
    """UserError for several checkpoints of ``--resume`` without ``--evaluate``."""
    if len(args.resume or ()) > 1 and not args.evaluate:
        raise UserError(
            "--resume is given more than once: only --evaluate takes several checkpoints, as an ensemble"
        )


def device_of(args, given):
    """The device of the command, else the one of its checkpoint where this machine has it, else ``auto``."""
    paths = candidates(args, args.resume[0]) if args.resume else []
    path = next(filter(os.path.isfile, paths), None)
    if "device" in given or path is None:
        return args.device
    device = str(Checkpoint.peek(path).get("args", {}).get("device", args.device))
    return device if Runtime.available(device) else "auto"


def read_checkpoint(args, path, runtime, starts):
    """The path of a checkpoint and its content; (None, None) without one.

    Args:
        path: as ``--resume`` names it; ``auto``: the last of the run's name.
        starts: whether the command says enough to start a run where ``--resume auto`` finds none.

    Raises:
        UserError: no such file, a damaged one, or none of this program.
    """
    if path is None:
        return None, None
    if path == "auto":
        paths = candidates(args, path)
        path = runtime.on_main(lambda: next(filter(os.path.isfile, paths), None))
        if path is None:
            if args.evaluate or args.finetune:
                raise UserError(
                    being_replaced(paths[0])
                    or f"there is no checkpoint {paths[0]} to evaluate or finetune: give its --name"
                )
            if not starts:
                raise UserError(
                    f"there is no checkpoint {paths[0]} to continue from, and no --dataset to start a "
                    "run with"
                )
            name = os.path.basename(paths[0]).removesuffix(file_name("", "last"))
            tell(runtime, f"no checkpoint of {name}: starting at step 0")
            return None, None
    return path, Checkpoint.read(path, runtime)
