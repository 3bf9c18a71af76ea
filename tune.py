"""Search for good flags of main.py with Optuna, on validation images.

    python tune.py --trials 30 --search "temperature=0.5:3" --search "lambda-u=0.1:20:log" \\
        --search "pseudo-label=argmax,sample" --dataset digits --num-labeled 40 --num-val 200 …

Each trial is a run of main.py in a process of its own, named STUDY-trial-0000 and so on; the first has the
flags as given. The value of a trial is the best validation accuracy on its way, by which main.py chooses a
checkpoint; the test set plays no part. The same command continues a search that was stopped or killed, and
started twice it shares the trials between two processes. results/STUDY/ holds the trials (study.db), what
each run said (trial-0000.log), a picture, and the best command as a script.

For Linux and macOS, which lock files. The story in the order of time: ``--search``, the study, one trial,
what is left.
"""

import sys

from run import script

if __name__ == "__main__":
    script.begin("tune.py")

import argparse
import contextlib
import fcntl
import glob
import itertools
import math
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import optuna
import sqlalchemy
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

import main as program
from engine.files import write_atomically, writing
from engine.folders import find_folders
from pictures.drawing import BLUE, GREEN, GREY, TITLE, VERMILION, bare, grid, new_figure, save
from run import arguments, identity
from run.arguments import Parser, between
from run.record import read_run
from utils import Interrupt, UserError

POLL = 0.2  # seconds between two looks at a trial
# groups of flags that can be searched; the others say what a run is about
SEARCHED = ("augmentation", "networks", "optimisation", "method")
# flags among them that do not change how a run learns
MEASURES = ("eval_step", "log_step", "start_step")
# flags that a search gives itself
NAMING = ("name", "resume", "overwrite", "evaluate", "finetune", "start_step")

# ---------------------------------------------------------------- what is searched


class Search(NamedTuple):
    """A flag and the values that it may take."""

    text: str  # as on the command line, after the =
    action: argparse.Action
    distribution: optuna.distributions.BaseDistribution


def words_of(action, value):
    """A flag with a value of its search, as main.py is given it."""
    if action.nargs == 0:  # a switch, off by itself
        return action.option_strings[:1] if value == "yes" else []
    if action.nargs is not None:
        return [action.option_strings[0], *value.split()]
    return [f"{action.option_strings[0]}={value}"]


def read_search(parser, text):
    """(name of the flag's argument, ``Search``) of a --search, its limits tested by main.py's parser.

    Raises:
        UserError: an unknown flag, one that a search leaves alone, or values that it cannot take.
    """
    name, _, values = text.partition("=")
    name, values = name.strip().lstrip("-").replace("-", "_"), values.strip()
    flag = arguments.flag(name)
    groups = {action.dest: group.title for group in parser._action_groups for action in group._group_actions}
    if name not in groups:
        raise UserError(f"--search {text!r}: main.py has no flag {flag}")
    if groups[name] not in SEARCHED or name in MEASURES:
        raise UserError(
            f"--search {text!r}: {flag} does not change how a run learns: choose from the groups "
            f"{', '.join(SEARCHED[:-1])} and {SEARCHED[-1]} in main.py --help"
        )
    action = parser.flags[name]
    return name, Search(values, action, read_values(parser, action, text, values))


def read_values(parser, action, text, values):
    """The distribution that ``a:b``, ``a:b:log`` or ``a,b,…`` stands for."""

    def parsed(value):
        return getattr(parser.parse_given(words_of(action, value))[0], action.dest)

    kinds = {"int": IntDistribution, "float": FloatDistribution}
    kind = kinds.get(getattr(action.type, "__name__", None)) if action.nargs is None else None
    if kind and ":" in values:
        low, high, *scale = values.split(":")
        low, high = parsed(low), parsed(high)
        if scale not in ([], ["log"]) or not low < high:
            raise UserError(f"--search {text!r}: a range is a:b or a:b:log, with a below b")
        if scale and low <= 0:
            raise UserError(f"--search {text!r}: a logarithmic range begins above 0")
        return kind(low, high, log=bool(scale))
    choices = [choice.strip() for choice in values.split(",")]
    if action.nargs == 0 and not set(choices) <= {"yes", "no"}:
        raise UserError(f"--search {text!r}: {action.option_strings[0]} is searched with yes,no")
    if len(set(choices)) < max(2, len(choices)):
        ways = "give a range a:b or a:b:log, or a list a,b" if kind else "give a list a,b"
        raise UserError(f"--search {text!r} needs two or more values, none of them twice: {ways}")
    for choice in choices:
        parsed(choice)
    return CategoricalDistribution(choices)


def default_values(parser, args, space):
    """The values in ``args`` of the searched flags, for those that lie in their search."""
    found = {}
    for name, (_, action, distribution) in space.items():
        value = getattr(args, name)
        if isinstance(distribution, CategoricalDistribution):
            for choice in distribution.choices:
                if getattr(parser.parse_given(words_of(action, choice))[0], name) == value:
                    found[name] = choice
        elif value is not None and distribution.low <= value <= distribution.high:
            found[name] = value
    return found


def check_effect(parser, args, space):
    """UserError for a searched flag that has no effect, whatever the other searched flags are."""
    lists = [
        [words_of(action, choice) for choice in distribution.choices]
        for _, action, distribution in space.values()
        if isinstance(distribution, CategoricalDistribution)
    ]
    idle = set(space)
    for chosen in itertools.product(*lists):
        chosen, given = parser.parse_given([*itertools.chain(*chosen)])
        values = {name: getattr(chosen, name) for name in given}
        idle &= parser.without_effect(argparse.Namespace(**vars(args) | values))
        if not idle:
            return
    name = arguments.flag(min(idle))
    raise UserError(f"--search of {name} has no effect with the other flags on {args.dataset}: leave it out")


# ---------------------------------------------------------------- the study


class Tuning(NamedTuple):
    """A search, as all processes that share it see it."""

    name: str
    folder: Path  # results/STUDY
    flags: list  # of main.py
    space: dict  # {name of an argument: Search}
    args: argparse.Namespace  # what ``flags`` say
    storage: optuna.storages.RDBStorage
    study: optuna.Study

    def run(self, number):
        """The name of a trial's run."""
        return f"{self.name}-trial-{number:04}"

    def words(self, values):
        """The flags of main.py with these values of the searched ones; a switch that was given goes."""
        actions = [search.action for search in self.space.values()]
        switches = {word for action in actions if action.nargs == 0 for word in action.option_strings}
        chosen = (words_of(search.action, values[name]) for name, search in self.space.items())
        return [*(word for word in self.flags if word not in switches), *itertools.chain(*chosen)]

    def trials(self, *states):
        return self.study.get_trials(deepcopy=False, states=states or None)


@contextlib.contextmanager
def alone(folder):
    """Context in which no other process of the search is."""
    with writing(folder), open(folder / ".lock", "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def open_log(folder, number):
    """The log of a trial, locked; None where another process holds it.

    The lock is shared with the run whose output goes there: the system lifts it when both processes have
    ended, however they ended.
    """
    with writing(folder):
        file = open(folder / f"trial-{number:04}.log", "a")  # noqa: SIM115 (open as long as the trial runs)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return None
        return file


@contextlib.contextmanager
def using(path, *kinds):
    """Context in which what the study's file raises, and errors of these kinds, become a UserError."""
    try:
        yield
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.OptunaError, *kinds) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{path} cannot be read or written: {reason}") from error


def open_study(name, folder, flags, space, args, given):
    """The ``Tuning`` in results/STUDY/study.db; a new one has its first trial in the queue.

    Args:
        given: the names of the flags that stand in ``flags``.

    Raises:
        UserError: the study, or runs of its name, are of another search; its file is damaged.
    """
    identity.make_folder(folder)
    parser = program.build_parser()
    settings = {arguments.flag(key): getattr(args, key) for key in given if not parser.flags[key].quiet}
    settings |= {f"--search of {arguments.flag(key)}": search.text for key, search in space.items()}
    path = folder / "study.db"
    url = sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string()
    with alone(folder), using(path, ValueError, LookupError, RuntimeError):
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 100}})
        about = {"storage": storage, "study_name": "search", "direction": "maximize"}
        study = optuna.create_study(**about, load_if_exists=True)
        known = study.user_attrs.get("settings", {})
        if known != settings:
            put_back_lost(folder, storage, study)
            begun = [trial for trial in study.trials if trial.state != TrialState.WAITING]
            if begun or any(folder.parent.glob(f"{glob.escape(name)}-trial-*")):
                changed = [key for key in sorted(known | settings) if known.get(key) != settings.get(key)]
                how = f"with other flags ({', '.join(changed)})" if known else f"before, but {path} is empty"
                raise UserError(f"the study {name} was started {how}: give another --study")
            optuna.delete_study(study_name="search", storage=storage)
            study = optuna.create_study(**about)
            first = default_values(parser, args, space)
            if drawn := ", ".join(arguments.flag(key) for key in space if key not in first):
                print(f"the first trial draws {drawn}: the default is not in the search", file=sys.stderr)
            study.enqueue_trial(first)
            study.set_user_attr("settings", settings)
        study.get_trials()  # all that is there can be read
    steps = args.total_steps // 4  # where a student still waits and warms up, accuracies say little
    study.pruner = optuna.pruners.MedianPruner(n_warmup_steps=steps)
    return Tuning(name, folder, flags, space, args, storage, study)


def next_trial(tuning, count):
    """A trial to run or to continue, and its log; None where all ``count`` trials are taken.

    The sampler's seed follows the number of trials, so that two processes do not draw the same.
    """
    with alone(tuning.folder):
        put_back_lost(tuning.folder, tuning.storage, tuning.study)
        taken = len(tuning.trials())
        if taken >= count and not tuning.trials(TrialState.WAITING):
            return None
        tuning.study.sampler = optuna.samplers.TPESampler(seed=(tuning.args.seed + taken) % 2**32)
        space = {name: search.distribution for name, search in tuning.space.items()}
        trial = tuning.study.ask(space)
        return trial, open_log(tuning.folder, trial.number)


def put_back_lost(folder, storage, study):
    """Into the queue again, with their numbers and values: trials whose processes ended before they did."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if log := open_log(folder, trial.number):
            log.close()
            key = storage.get_study_id_from_name(study.study_name)
            key = storage.get_trial_id_from_study_id_trial_number(key, trial.number)
            storage.set_trial_state_values(key, TrialState.WAITING)


# ---------------------------------------------------------------- one trial


def run_trial(tuning, trial, log, interrupt):
    """Train, report each validation accuracy, stop where the pruner or a signal says so; tell the study.

    Returns:
        What became of it, in words. After a signal that is left open: see ``put_back_lost``.

    Raises:
        UserError: main.py refuses the first trial, whose flags are those of the command.
    """
    run = tuning.run(trial.number)
    words = [*tuning.words(trial.params), "--finetune-epochs", "0", "--name", run, "--resume", "auto"]
    # a session of its own: Ctrl-C reaches this process alone, which passes it on once
    process = subprocess.Popen(
        [sys.executable, program.__file__, *words],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    folder, size, sent = tuning.folder.parent / run, 0, 0
    reported = dict(tuning.trials()[trial.number].intermediate_values)
    status = None
    try:
        while status is None:
            time.sleep(POLL)
            status = process.poll()
            pruned = False
            if (now := size_of(folder / "metrics.jsonl")) != size:
                size = now
                accuracies = validation_accuracies(folder)
                for step in accuracies.keys() - reported.keys():
                    trial.report(accuracies[step], step)
                reported |= accuracies
                # never the first: the result is no worse than the flags as given; nor one that is finished
                running = max(reported, default=0) < tuning.args.total_steps
                pruned = trial.number > 0 and running and trial.should_prune()
            if status is None and not sent and (pruned or interrupt.signal):
                sent = interrupt.signal or signal.SIGTERM  # the run saves
                process.send_signal(sent)
    finally:
        if status is None:  # an error: nobody would look after the run
            process.terminate()
    if status == 0:
        value = max(validation_accuracies(folder).values())
        tuning.study.tell(trial, value)
        return f"{value:.2f} %"
    if sent and sent == interrupt.signal:
        return "stopped"
    if sent:
        tuning.study.tell(trial, state=TrialState.PRUNED)
        return f"pruned after step {max(reported)}, {max(reported.values()):.2f} %"
    said = Path(log.name).read_text(errors="replace").split("\n")
    last = next((line for line in reversed(said) if line.strip()), "")
    if status == 2 and trial.number == 0:
        raise UserError(last.removeprefix("main.py: "))
    tuning.study.tell(trial, state=TrialState.FAIL)
    return f"failed with status {status}: {last}"


def size_of(path):
    """Bytes; 0 for a file that is not there."""
    return path.stat().st_size if path.exists() else 0


def has_validation_images(args):
    """Whether the data is a folder with validation images of its own."""
    if args.dataset != "folder" or not os.path.isdir(args.data_path):
        return False
    taken = (args.save_path, args.results_path)
    return find_folders(args.data_path, unlabeled_path=args.unlabeled_path, taken=taken).val is not None


def validation_accuracies(folder):
    """{step: validation accuracy in percent} of a run, as far as it is recorded."""
    return {record["step"]: record["val_top1"] for record in read_run(folder).records if "val_top1" in record}


# ---------------------------------------------------------------- what is left


def best_trial(tuning):
    """The finished trial with the highest value, the first of equals; None if none is finished."""
    return max(tuning.trials(TrialState.COMPLETE), key=lambda trial: trial.value, default=None)


def in_words(trial):
    """The searched values, for people."""
    shown = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in trial.params.items()}
    return "  ".join(f"{name.replace('_', '-')} {value}" for name, value in shown.items())


def write_script(tuning, best):
    """results/STUDY/run_STUDY.sh: a recipe with the best values; returns its path and its command."""
    words = ["python", os.path.relpath(program.__file__), *tuning.words(best.params)]
    command = shlex.join([*words, "--name", f"{tuning.name}-best"])
    about = f"# Validation accuracy {best.value:.2f} %, the best of {len(tuning.trials())} trials."
    path = tuning.folder / f"run_{tuning.name}.sh"
    text = f'#!/usr/bin/env bash\n{about}\n{command} "$@"\n'
    write_atomically(path, lambda file: file.write(text.encode()))
    path.chmod(0o755)
    return path, command


def accuracy_of(trial):
    """The value of a finished trial, the highest so far of another; per cent."""
    if trial.state == TrialState.COMPLETE:
        return trial.value
    return max(trial.intermediate_values.values())


def position(trial, name, search):
    """Where a trial stands on the horizontal axis of its value of a flag."""
    value = trial.params[name]
    if isinstance(search.distribution, CategoricalDistribution):
        return search.distribution.choices.index(value)
    return value


def draw_search(tuning):
    """The figure: validation accuracies in the order of the trials, then against each searched flag."""
    from matplotlib.ticker import FuncFormatter

    best, complete = best_trial(tuning), tuning.trials(TrialState.COMPLETE)
    pruned = [trial for trial in tuning.trials(TrialState.PRUNED) if trial.intermediate_values]
    kinds = {
        "pruned": (pruned, {"marker": "o", "color": GREY, "markerfacecolor": "none"}),
        "finished": (complete, {"marker": "o", "color": BLUE}),
        "first trial": (complete[: complete[0].number == 0], {"marker": "s", "color": GREEN}),
        "best": ([best], {"marker": "D", "color": VERMILION}),
    }
    heading = f"{tuning.name}: {len(tuning.trials())} trials, best {best.value:.2f} % on validation data"
    figure = new_figure(0.6 + 2.7 * math.ceil((1 + len(tuning.space)) / 2), heading)
    cells = grid(figure, 1 + len(tuning.space), 2, sharey=True)
    for axes, name in zip(cells, [None, *tuning.space], strict=True):
        for label, (trials, look) in kinds.items():
            places = [position(trial, name, tuning.space[name]) if name else trial.number for trial in trials]
            if trials:
                axes.plot(places, [*map(accuracy_of, trials)], label=label, linestyle="none", **look)
        bare(axes)
        axes.margins(0.06)
    for axes in cells[::2]:
        axes.set_ylabel("validation accuracy (%)")

    # the order of the trials, with the best so far
    numbers = [trial.number for trial in complete]
    running = [*itertools.accumulate(map(accuracy_of, complete), max)]
    options = {"where": "post", "color": VERMILION, "linewidth": 1.2, "zorder": 1}
    cells[0].step(numbers, running, label="best so far", **options)
    cells[0].set_title("In the order of the trials", **TITLE)
    cells[0].xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*cells[0].get_legend_handles_labels(), loc="outside lower left", ncols=5)

    # each flag
    for axes, (name, search) in zip(cells[1:], tuning.space.items(), strict=True):
        axes.set_title(arguments.flag(name), **TITLE)
        if isinstance(search.distribution, CategoricalDistribution):
            choices = search.distribution.choices
            axes.set_xticks(range(len(choices)), choices)
            axes.set_xlim(-0.5, len(choices) - 0.5)
        elif search.distribution.log:
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    return figure


def finish(tuning):
    """The best command, on standard output and as a script, and the picture of the search."""
    best = best_trial(tuning)
    if best is None:
        raise UserError(f"no trial has finished: the output of the trials is in {tuning.folder}/trial-*.log")
    with alone(tuning.folder):
        path, command = write_script(tuning, best)
        figure = draw_search(tuning)
        for name in ("search.png", "search.svg"):
            save(figure, tuning.folder / name)
    first = tuning.trials()[0]
    default = f", the first trial {first.value:.2f} %" if first.state == TrialState.COMPLETE else ""
    print(f"best: trial {best.number}, validation accuracy {best.value:.2f} %{default}; it is in {path}")
    print(command)


# ---------------------------------------------------------------- around it


def build_parser():
    parser = Parser(
        description="Search for good values of main.py's flags with Optuna. Flags that are not listed here "
        "go to main.py. Trials are compared on validation images: give --num-val N, unless the folder "
        "of images has val/ and test/.",
        epilog="Example:\n"
        "  python tune.py --trials 12 --search temperature=0.5:1 --search lambda-u=1:10:log \\\n"
        "      --dataset digits --num-labeled 40 --num-val 200 --resize 16 --model wrn-10-1 \\\n"
        "      --batch-size 16 --mu 4 --total-steps 300 --eval-step 50 --uda-steps 100",
        usage="tune.py --search FLAG=VALUES [--trials N] [--study NAME] [flags of main.py]",
    )
    add = parser.add_argument
    values = (
        "a flag of main.py and its values: a range a:b, a range on a logarithmic scale a:b:log, or a list "
        "a,b,c; for a switch: yes,no; give --search once for each flag"
    )
    add("--search", action="append", required=True, metavar="FLAG=VALUES", help=values)
    words = "number of runs, counted over all tune.py processes with this --study"
    add("--trials", type=between(int, 1), default=20, metavar="N", help=words)
    add("--study", metavar="NAME", help="name of the search (default: DATASET-search)")
    return parser


def main(argv):
    """From a command line to the best command; UserError for invalid input."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    own, flags = build_parser().parse_known_args(argv)
    parser = program.build_parser()
    _, given = parser.parse_given(flags)
    if naming := sorted(given & set(NAMING)):
        raise UserError(f"leave out {arguments.flag(naming[0])}: a search names and starts its runs itself")
    args = program.parse_arguments(flags)
    if not args.num_val and not has_validation_images(args):
        raise UserError("a search chooses on validation images, never on the test images: give --num-val N")
    space = dict(read_search(parser, text) for text in own.search)
    if len(space) < len(own.search):
        raise UserError("a flag is searched twice: give each --search once")
    check_effect(parser, args, space)
    name = own.study or f"{args.name}-search"
    identity.check_name(f"{name}-trial-0000")
    folder = Path(args.results_path, name)
    if (folder / "args.json").exists():
        raise UserError(f"{folder} has the results of a run: give another --study")
    tuning = open_study(name, folder, flags, space, args, given)
    with using(folder / "study.db"), Interrupt() as interrupt:
        search(tuning, own.trials, interrupt)


def search(tuning, count, interrupt):
    """Run trials until there are ``count``, with those of other processes, and sum up.

    After a signal it exits with 128 + its number.
    """
    waits = False
    while not interrupt.signal:
        if taken := next_trial(tuning, count):
            trial, log = taken
            with log:
                end = run_trial(tuning, trial, log, interrupt)
            best = best_trial(tuning)
            best = f"; best {best.value:.2f} % (trial {best.number})" if best else ""
            print(f"trial {trial.number}: {end}  {in_words(trial)}{best}", file=sys.stderr)
        elif running := tuning.trials(TrialState.RUNNING):
            if not waits:
                numbers = ", ".join(str(trial.number) for trial in running)
                print(f"waiting for trial {numbers} of another process", file=sys.stderr)
            waits = True
            time.sleep(POLL)
        else:
            finish(tuning)
            return
    print("stopped: the same command continues the search", file=sys.stderr)
    sys.exit(128 + interrupt.signal)


def run(argv):
    """``main``, with errors as one sentence; returns the exit status."""
    return script.run("tune.py", main, argv)


if __name__ == "__main__":
    script.execute(run, sys.argv[1:])
