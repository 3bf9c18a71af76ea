"""The search: nothing is lost and nothing is run twice, however its processes end; what is refused."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import forked
import optuna
import pytest
from optuna.trial import TrialState
from test_data import write_tree
from test_run_state import everything

import main
import tune
from utils import UserError

FLAGS = (
    "--dataset twomoons --num-labeled 6 --num-val 100 --batch-size 6 --mu 4 --device cpu --workers 0 "
    "--total-steps 60 --eval-step 20 --student-lr 0.2 --no-pictures"
).split()
SEARCHES = [
    *("--search", "temperature=0.3:3", "--search", "lambda-u=0.1:20:log"),
    *("--search", "pseudo-label=argmax,sample", "--search", "nesterov=yes,no"),
]
WORDS = [*SEARCHES, "--study", "study", *FLAGS]


def start(folder, *words):
    """tune.py in its own process."""
    return forked.Started(forked.script, "tune", words, str(folder))


def trials_of(folder, name="study"):
    url = f"sqlite:///{folder}/results/{name}/study.db"
    return optuna.load_study(study_name="search", storage=url).trials


def validation(folder, run):
    lines = (folder / "results" / run / "metrics.jsonl").read_text().splitlines()
    return [line["val_top1"] for line in map(json.loads, lines) if "val_top1" in line]


def runs_of(folder):
    return sorted(path.name for path in (folder / "results").glob("*-trial-*"))


def refused(capsys, *words):
    """The sentence that the command ends with."""
    capsys.readouterr()
    assert tune.run([*map(str, words)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tune.py: ")]
    assert len(lines) == 1
    return lines[0]


def prepared(folder, *words, searches, values):
    """A study without runs: its first trial has ``values[0]``, and so on."""
    flags = [*FLAGS, *words]
    parser = main.build_parser()
    space = dict(tune.read_search(parser, text) for text in searches)
    given = parser.parse_given(flags)[1]
    tuning = tune.open_study(
        "study", folder / "results/study", flags, space, main.parse_arguments(flags), given
    )
    distributions = {name: search.distribution for name, search in space.items()}
    for value in values:
        trial = tuning.study.ask(distributions)
        trial.report(value, 100)  # in the first quarter of 2,000 steps, where it counts for nothing
        trial.report(value, 500)
        tuning.study.tell(trial, value)
    return tuning


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """A search of four trials that two processes have shared from the same moment on, and what they said."""
    folder = tmp_path_factory.mktemp("shared")
    processes = [start(folder, "--trials", "4", *WORDS) for _ in range(2)]
    said = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    return folder, said


@pytest.fixture
def copied(shared, here):
    shutil.copytree(shared[0], here, dirs_exist_ok=True)
    return here


def test_two_processes_share_one_search(shared):
    folder, said = shared
    trials = trials_of(folder)
    assert [trial.state for trial in trials] == [TrialState.COMPLETE] * 4
    assert runs_of(folder) == [f"study-trial-000{number}" for number in range(4)]
    done = [[line for line in errors.splitlines() if line.startswith("trial ")] for _, errors in said]
    assert all(done)  # each has run some
    assert sorted(line.split(":")[0] for lines in done for line in lines) == [f"trial {i}" for i in range(4)]
    assert said[0][0] == said[1][0]  # and both end with the same result
    assert len({json.dumps(trial.params) for trial in trials}) == 4


def test_a_value_is_the_best_validation_accuracy_of_its_run(shared):
    folder, _ = shared
    for trial in trials_of(folder):
        accuracies = validation(folder, f"study-trial-{trial.number:04}")
        assert len(accuracies) == 3 and trial.value == max(accuracies)
        assert trial.intermediate_values == dict(zip((20, 40, 60), accuracies, strict=True))


def test_each_run_has_the_values_of_its_trial(shared):
    folder, _ = shared
    for trial in trials_of(folder):
        args = json.loads((folder / f"results/study-trial-{trial.number:04}/args.json").read_text())
        expected = {**trial.params, "nesterov": trial.params["nesterov"] == "yes"}
        assert {name: args[name] for name in expected} == expected
        assert args["finetune_epochs"] == 0 and args["student_lr"] == 0.2


def test_the_first_trial_has_the_flags_as_given(shared):
    folder, _ = shared
    trials = trials_of(folder)
    assert trials[0].params == {
        "temperature": 0.7,
        "lambda_u": 8,
        "pseudo_label": "argmax",
        "nesterov": "no",
    }
    assert max(trial.value for trial in trials) >= trials[0].value


def test_the_best_command_is_a_recipe(shared):
    folder, said = shared
    best = max(trials_of(folder), key=lambda trial: trial.value)
    script = folder / "results/study/run_study.sh"
    assert os.access(script, os.X_OK) and script.read_text().endswith('"$@"\n')
    args = main.parse_arguments([*flags_of(script), "--seed", "7"])
    assert args.name == "study-best" and args.temperature == best.params["temperature"]
    assert args.nesterov == (best.params["nesterov"] == "yes") and args.finetune_epochs == 625
    told, command = said[0][0].splitlines()
    first = f", the first trial {trials_of(folder)[0].value:.2f} %"
    assert f"trial {best.number}, validation accuracy {best.value:.2f} %{first}; it is in " in told
    assert command in script.read_text()


def flags_of(script):
    """The words behind main.py, as the shell hands them to it."""
    stand_in = 'python() { printf "%s\\0" "$@"; }; . "$0"'
    told = subprocess.run(["bash", "-c", stand_in, script], capture_output=True, text=True, check=True).stdout
    program, *words = told.split("\0")[:-1]
    assert program.endswith("main.py")
    return words


def test_a_finished_search_is_only_summed_up(copied, capsys):
    before = everything("results")
    assert tune.run(["--trials", "4", *WORDS]) == 0
    assert "best: trial" in capsys.readouterr().out
    after = everything("results")
    pictures = {path for path in before if path.suffix in (".png", ".svg") and path.parent.name == "study"}
    assert len(pictures) == 2
    assert {path: after[path] for path in before.keys() - pictures} == {
        path: before[path] for path in before.keys() - pictures
    }


# ---------------------------------------------------------------- stopped, killed


def child(process):
    told = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
    return int(told.stdout.split()[0])


def test_stopped_and_killed(tmp_path):
    """In the first trial Ctrl-C, then the search alone is killed; in the second one the run alone."""
    words = ["--trials", "2", *WORDS, "--total-steps", "500", "--eval-step", "50"]
    log = tmp_path / "results/study/trial-0000.log"
    saved = [tmp_path / f"checkpoint/study-trial-000{number}_last.pth.tar" for number in range(2)]
    search = start(tmp_path, *words)
    search.wait_for(saved[0].exists)
    search.send_signal(signal.SIGINT)
    errors = search.communicate(timeout=100)[1]
    assert search.returncode == 130 and "stopped: the same command continues the search" in errors, errors
    assert "stopped after step" in log.read_text()

    search = start(tmp_path, *words)
    search.wait_for(lambda: "continuing (as study-trial-0000)" in log.read_text())
    search.kill()
    search.communicate()

    search = start(tmp_path, *words)
    search.wait_for(saved[1].exists)
    os.kill(child(search), signal.SIGKILL)
    errors = search.communicate(timeout=100)[1]
    assert search.returncode == 0, errors
    assert "trial 1: failed with status -9" in errors
    assert [trial.state.name for trial in trials_of(tmp_path)] == ["COMPLETE", "FAIL"]
    assert runs_of(tmp_path) == ["study-trial-0000", "study-trial-0001"]
    accuracies = validation(tmp_path, "study-trial-0000")
    assert len(accuracies) == 10 and trials_of(tmp_path)[0].value == max(accuracies)


def test_a_trial_is_taken_up_when_its_last_process_has_ended(here):
    """A run whose search was killed holds the lock on its log."""
    tuning = prepared(here, searches=SEARCHES[1::2], values=[])
    trial, log = tune.next_trial(tuning, 1)
    assert trial.params == {"temperature": 0.7, "lambda_u": 8, "pseudo_label": "argmax", "nesterov": "no"}
    with log, subprocess.Popen(["sleep", "100"], stdout=log) as run:
        assert tune.next_trial(tuning, 1) is None  # this process has it, and its run
        log.close()
        assert tune.next_trial(tuning, 1) is None  # its run has it
        assert tuning.trials()[0].state == TrialState.RUNNING
        run.kill()
        run.wait()
        again, log = tune.next_trial(tuning, 1)
        log.close()
    assert (again.number, again.params) == (trial.number, trial.params)
    assert len(tuning.trials()) == 1


def test_a_bad_trial_is_pruned_and_a_refused_one_fails(here, capsys):
    """Five trials with more than 100 % are the median that the sixth stays below."""
    words = "--total-steps 2000 --eval-step 100 --accumulate 2".split()
    tuning = prepared(here, *words, searches=["batch-size=6,9"], values=[101.0] * 5)
    tuning.study.enqueue_trial({"batch_size": "6"})
    tuning.study.enqueue_trial({"batch_size": "9"})
    command = ["--search", "batch-size=6,9", "--study", "study", *FLAGS, *words]
    assert tune.run(["--trials", "7", *command]) == 0
    said = capsys.readouterr().err
    *_, pruned, failed = trials_of(here)
    assert pruned.state == TrialState.PRUNED and list(pruned.intermediate_values) == [100, 200, 300, 400, 500]
    assert "trial 5: pruned after step 500" in said
    assert failed.state == TrialState.FAIL
    assert "trial 6: failed with status 2: main.py: --batch-size 9 cannot be divided" in said


def test_the_first_trial_is_never_pruned(here):
    """It is taken up again after better ones have ended: the search has its value to compare."""
    words = "--total-steps 500 --eval-step 100".split()
    tuning = prepared(here, *words, searches=["batch-size=6,8"], values=[])
    distributions = {name: search.distribution for name, search in tuning.space.items()}
    tuning.study.ask(distributions)  # by a process that is lost
    for _ in range(5):
        better = tuning.study.ask(distributions)
        better.report(101.0, 200)
        tuning.study.tell(better, 101.0)
    command = ["--search", "batch-size=6,8", "--study", "study", *FLAGS, *words]
    assert tune.run(["--trials", "6", *command]) == 0
    first = trials_of(here)[0]
    assert first.state == TrialState.COMPLETE
    assert list(first.intermediate_values) == [100, 200, 300, 400, 500]


def test_a_finished_trial_is_not_pruned(here):
    words = "--total-steps 500 --eval-step 500".split()
    tuning = prepared(here, *words, searches=["batch-size=6,8"], values=[101.0] * 5)
    command = ["--search", "batch-size=6,8", "--study", "study", *FLAGS, *words]
    assert tune.run(["--trials", "6", *command]) == 0
    assert trials_of(here)[-1].state == TrialState.COMPLETE and tuning.args.total_steps == 500


def test_the_seed_decides_what_is_drawn(here):
    drawn = []
    for number, seed in enumerate(("0", "1", "0")):
        tuning = prepared(here / str(number), "--seed", seed, searches=SEARCHES[1::2], values=[50.0])
        trial, log = tune.next_trial(tuning, 2)
        log.close()
        drawn.append(trial.params)
    assert drawn[0] == drawn[2] != drawn[1]


def test_the_best_trial_is_one_that_came_to_its_end(here):
    tuning = prepared(here, searches=SEARCHES[1::2], values=[50.0, 70.0, 60.0])
    pruned = tuning.study.ask({name: search.distribution for name, search in tuning.space.items()})
    pruned.report(90.0, 500)
    tuning.study.tell(pruned, state=TrialState.PRUNED)
    assert tune.best_trial(tuning).number == 1


def test_the_value_is_the_best_on_the_way(here):
    """Not the last: by it main.py chooses among the checkpoints of the run."""
    (here / "run").mkdir()
    args = dict.fromkeys(("name", "method", "dataset", "model", "save_path", "data_path"), "x")
    (here / "run/args.json").write_text(json.dumps(args))
    records = (
        {"step": step, "top1": 99.0 - step, "val_top1": value} for step, value in ((2, 40.0), (4, 60.0))
    )
    records = [*records, {"step": 5, "uda_loss": 1.0}, {"step": 6, "top1": 99.0, "val_top1": 50.0}]
    (here / "run/metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    assert tune.validation_accuracies(here / "run") == {2: 40.0, 4: 60.0, 6: 50.0}


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("search", "sentence"),
    [
        ("lamda-u=1:2", "no flag --lamda-u"),
        ("lambda-u", "needs two or more values"),
        ("lambda-u=", "needs two or more values"),
        ("lambda-u=1", "needs two or more values"),
        ("lambda-u=1,1", "none of them twice"),
        ("lambda-u=3:1", "a range is a:b or a:b:log"),
        ("lambda-u=1:2:3", "a range is a:b or a:b:log"),
        ("lambda-u=0:2:log", "begins above 0"),
        ("lambda-u=-1:2", "-1 is out of range: 0 to 1000000.0"),
        ("lambda-u=1:nan", "nan is out of range"),
        ("temperature=1:2000", "2000 is out of range: 0.001 to 1000.0"),
        ("mu=1:2.5", "invalid int value: '2.5'"),
        ("pseudo-label=argmax:soft", "needs two or more values"),
        ("pseudo-label=argmax,best", "invalid choice: 'best'"),
        ("nesterov=1,0", "searched with yes,no"),
        ("jitter=0 0.1,0", "--jitter: expected 2 arguments"),
        ("randaug=2 8,2 16", "--randaug has no effect with the other flags on twomoons"),
        ("teacher-checkpoint=a,b", "has no effect"),
        ("seed=0:9", "does not change how a run learns"),
        ("num-val=100,200", "does not change how a run learns"),
        ("eval-step=1:9", "does not change how a run learns"),
        ("finetune-lr=0.1:1", "does not change how a run learns"),
        ("name=a,b", "does not change how a run learns"),
    ],
)
def test_searches_that_are_refused(search, sentence, here, capsys):
    assert sentence in refused(capsys, "--search", search, *FLAGS)
    assert not list(here.iterdir())


def test_a_search_may_choose_on_the_validation_images_of_a_folder(tmp_path):
    places = [f"{part}/{name}" for part in ("train", "test", "valid") for name in ("cat", "dog")]
    write_tree(tmp_path, dict.fromkeys(places, 2))
    words = ["--dataset", "folder", "--data-path", str(tmp_path)]
    assert tune.has_validation_images(main.parse_arguments(words))
    (tmp_path / "valid").rename(tmp_path / "more")
    assert not tune.has_validation_images(main.parse_arguments(words))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--num-val", "0"], "give --num-val N"),
        (["--bogus", "1"], "unrecognized arguments: --bogus"),
        (["--trials", "0"], "0 is out of range: 1 or more"),
        (["--name", "mine"], "leave out --name"),
        (["--resume", "auto"], "leave out --resume"),
        (["--method", "supervised"], "--lambda-u has no effect"),
        (["--search", "lambda-u=1,2"], "searched twice"),
        (["--study", "a/b"], "cannot be the name of a run"),
        (["--accumulate", "5"], "cannot be divided into --accumulate 5 equal parts"),
        (["--results-path", "/proc/nowhere"], "cannot write to /proc/nowhere"),
    ],
)
def test_commands_that_are_refused(words, sentence, here, capsys):
    assert sentence in refused(capsys, "--search", "lambda-u=0.1:20", *FLAGS, *words)
    assert not list(here.iterdir())


def test_effect_depends_on_what_else_is_searched(here):
    parser = main.build_parser()
    args = main.parse_arguments([*FLAGS, "--method", "supervised"])
    space = dict(tune.read_search(parser, text) for text in ("lambda-u=1:2", "method=supervised,uda"))
    tune.check_effect(parser, args, space)
    with pytest.raises(UserError, match="--lambda-u has no effect"):
        tune.check_effect(parser, args, {"lambda_u": space["lambda_u"]})


def test_a_first_trial_that_is_refused_leaves_the_name_free(here, capsys):
    """The sentence is main.py's own, and the corrected command starts the search."""
    wrong = ["--num-labeled", "7"]
    assert "7" in refused(capsys, "--trials", "1", *WORDS, *wrong)
    assert not runs_of(here)
    tuning = prepared(here, searches=SEARCHES[1::2], values=[50.0])
    assert [trial.number for trial in tuning.trials()] == [0]


def test_another_search_of_the_name(copied, capsys):
    before = everything("results")
    sentence = refused(capsys, *WORDS, "--search", "threshold=0.1:0.9", "--total-steps", "80")
    assert "other flags (--search of --threshold, --total-steps)" in sentence
    assert everything("results") == before
    os.remove("results/study/study.db")
    assert "study.db is empty" in refused(capsys, *WORDS)
    assert "has the results of a run" in refused(capsys, *WORDS, "--study", "study-trial-0000")


# ---------------------------------------------------------------- damage


DAMAGES = {
    "text": lambda content: b"no database" * 100,
    "half": lambda content: content[: len(content) // 2],
    "a wrong state": lambda content: content.replace(b"COMPLETE", b"COMPLICE"),
    "a wrong value": lambda content: content.replace(b'"--total-steps": 60', b'"--total-steps: 600'),
    "a wrong date": lambda content: content.replace(b"-", b"\xff"),
    "another version": lambda content: content.replace(b"v3.2.0.a", b"v9.9.9.a"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_study(damage, copied, capsys):
    path = Path("results/study/study.db")
    content = path.read_bytes()
    damaged = DAMAGES[damage](content)
    assert damaged != content
    path.write_bytes(damaged)
    assert "results/study/study.db cannot be read or written: " in refused(capsys, *WORDS)
    assert path.read_bytes() == damaged


def test_a_full_disk(copied, capsys, monkeypatch):
    Path("results/study/run_study.sh.tmp").symlink_to("/dev/full")
    assert "run_study.sh: No space left" in refused(capsys, "--trials", "4", *WORDS)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        sentence = refused(capsys, "--trials", "9", *WORDS)
        fresh = refused(capsys, *WORDS, "--study", "other")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "study.db cannot be read or written: " in sentence and "study.db cannot" in fresh
    assert len(trials_of(copied)) == 4


def test_shell_markup_is_quoted(here):
    values = ["mlp-2-8-2;touch hacked", "$(touch hacked)", "`touch hacked`"]
    tuning = prepared(here, searches=[f"model={','.join(values)}"], values=[1.0, 2.0, 3.0, 4.0])
    for trial in tuning.trials():
        words = flags_of(tune.write_script(tuning, trial)[0])
        assert words == [*FLAGS, f"--model={trial.params['model']}", "--name", "study-best"]
    assert not Path("hacked").exists()
    name = "a 'b' $(touch hacked)"
    words = flags_of(tune.write_script(tuning._replace(name=name), trial)[0])
    assert words[-1] == f"{name}-best" and not Path("hacked").exists()


def test_words_that_main_reads(here):
    """A switch that was given is taken away where the search says no; numbers below zero are values."""
    parser = main.build_parser()
    searches = ("nesterov=yes,no", "pretrained=yes,no", "feedback-weight=-1:1", "jitter=0 0.1,0.2 0.3")
    space = dict(tune.read_search(parser, text) for text in searches)
    flags = [*FLAGS, "--nesterov", "--pretrained"]
    tuning = tune.Tuning("study", here, flags, space, None, None, None)
    for chosen, value in (("yes", -1e-5), ("no", 0.25)):
        values = {"nesterov": chosen, "pretrained": chosen, "feedback_weight": value, "jitter": "0.2 0.3"}
        args, _ = parser.parse_given(tuning.words(values))
        assert (args.nesterov, args.pretrained) == (chosen == "yes",) * 2
        assert args.feedback_weight == value and args.jitter == [0.2, 0.3]


# ---------------------------------------------------------------- the picture


def test_the_picture_shows_every_trial(shared, here):
    values = [50.0, 40.0, 70.0, 60.0, 80.0, 75.0]
    tuning = prepared(here, searches=SEARCHES[1::2], values=values)
    pruned = tuning.study.ask({name: search.distribution for name, search in tuning.space.items()})
    pruned.report(66.0, 500)
    pruned.report(20.0, 600)
    tuning.study.tell(pruned, state=TrialState.PRUNED)
    figure = tune.draw_search(tuning)
    history, temperature, weight, label, nesterov = figure.axes
    lines = {line.get_label(): line for line in history.get_lines()}
    assert lines["finished"].get_xydata().tolist() == [[i, value] for i, value in enumerate(values)]
    assert lines["pruned"].get_xydata().tolist() == [[6, 66.0]]
    assert lines["best so far"].get_ydata().tolist() == [50, 50, 70, 70, 80, 80]
    assert lines["best"].get_xydata().tolist() == [[4, 80.0]]
    assert lines["first trial"].get_xydata().tolist() == [[0, 50.0]]
    finished = {line.get_label(): line for line in temperature.get_lines()}["finished"]
    assert finished.get_xdata().tolist() == [trial.params["temperature"] for trial in tuning.trials()[:6]]
    assert (weight.get_xscale(), temperature.get_xscale()) == ("log", "linear")
    assert [text.get_text() for text in label.get_xticklabels()] == ["argmax", "sample"]
    labels = [("argmax", "sample").index(trial.params["pseudo_label"]) for trial in tuning.trials()[:6]]
    finished = {line.get_label(): line for line in label.get_lines()}["finished"]
    assert finished.get_xdata().tolist() == labels
    assert nesterov.get_title(loc="left") == "--nesterov"
    figure.savefig(io.BytesIO(), format="svg")
    for kind, start_of in (("png", b"\x89PNG"), ("svg", b"<?xml")):
        assert (shared[0] / f"results/study/search.{kind}").read_bytes().startswith(start_of)
