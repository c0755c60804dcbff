"""The folders of the jobs of a sweep, their hyperparameters, and the end of a sweep."""

import functools
from pathlib import Path

import pytest

from tests.errors import raises
from trainer.cli import sweep as module
from trainer.cli.compose import compose, requests_sweep
from trainer.cli.overrides import translate_overrides
from trainer.cli.sweep import (
    EVENT_FILE,
    Job,
    Sweep,
    _get_hyperparameter,
    _search_space_is_empty,
    _swept_keys,
    _use_sweep_folder,
    select_job,
)
from trainer.config.diff import may_change_on_resume
from trainer.errors import ConfigError, TrainerError


@pytest.mark.parametrize(
    ("given", "arguments", "folder"),
    [
        (["-m", "seed=1,2"], ["-m", "seed=1,2"], None),
        (["-m", "output_dir=out/a"], ["-m", 'hydra.sweep.dir="out/a"'], "out/a"),
        (["-m", "output_dir='out/a b'"], ["-m", 'hydra.sweep.dir="out/a b"'], "out/a b"),
        (["-m", "output_dir=~/a"], ["-m", f'hydra.sweep.dir="{Path.home()}/a"'], f"{Path.home()}/a"),
        (["-m", "output_dir=gs://bucket/a", "seed=1,2"], ["-m", "seed=1,2"], "gs://bucket/a"),
        (["-m", "output_dir=a,b"], ["-m", 'output_dir="a","b"'], None),
        (["-m", "output_dir=runs/${seed}"], ["-m", 'output_dir="runs/${seed}"'], None),
    ],
)
def test_output_dir_names_the_folder_of_the_sweep(given: list[str], arguments: list[str], folder: str | None) -> None:
    assert _use_sweep_folder(translate_overrides(given, is_sweep=True)) == (arguments, folder)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [(["-m"], True), (["--multirun"], True), (["sweep=learning_rates"], True), (["hydra/sweeper=optuna"], True),
     (["sweep=null"], False), (["seed=1"], False), ([], False)],
)  # fmt: skip
def test_a_sweep_is_recognised(arguments: list[str], expected: bool) -> None:
    assert requests_sweep(arguments) is expected


@pytest.mark.parametrize(
    ("arguments", "nothing"),
    [(["-m", "hydra/sweeper=optuna", "experiment=quickstart"], True), (["sweep=optuna", "seed=1"], True),
     (["hydra/sweeper=optuna", "seed=choice(1,2)"], False), (["hydra/sweeper=optuna", "seed=1,2"], False),
     (["hydra/sweeper=optuna", "sweep=learning_rates"], False), (["-m", "seed=1"], False),
     (["hydra/sweeper=optuna", "--cfg", "job"], False)],
)  # fmt: skip
def test_a_search_of_nothing_is_recognised(arguments: list[str], nothing: bool) -> None:
    assert _search_space_is_empty(arguments) is nothing


def test_the_table_shows_values_with_their_type_and_choices_as_typed() -> None:
    tree = {"training": {"batch_size": 8, "loss": "focal"}, "augmentation": {"flip": True}}
    assert _get_hyperparameter(tree, "training.batch_size", "8") == 8
    assert _get_hyperparameter(tree, "training.loss", "'focal'") == "focal"
    assert _get_hyperparameter(tree, "augmentation", "light") == "light"
    assert may_change_on_resume("runtime.progress")
    assert may_change_on_resume("export.formats")
    assert not may_change_on_resume("runtime.precision")
    assert not may_change_on_resume("seed")


def job(name: str, score: float | None, code: int = 0) -> Job:
    scores = {} if score is None else {"val_accuracy": score}
    return Job(name, f"out/{name}", [f"seed={name}", "debug=fast"], {"seed": name, "debug": "fast"}, code, scores)


@pytest.mark.parametrize("search", [False, True])
def test_the_last_lines_name_the_best_job(search: bool, capsys: pytest.CaptureFixture[str]) -> None:
    Sweep("out", [job("0", 0.5), job("1", 0.75), job("2", 0.75)], is_search=search).log_results()
    assert capsys.readouterr().out.splitlines() == [
        "",
        "job   0  val_accuracy 0.5000  seed=0",
        "job   1  val_accuracy 0.7500  seed=1",
        "job   2  val_accuracy 0.7500  seed=2",
        "best: job 1, val_accuracy 0.7500, out/1",
        "  again    python -m trainer seed=1 debug=fast output_dir=out/1",
        "next:  tensorboard --logdir out    (HPARAMS shows the jobs side by side)",
    ]


@pytest.mark.parametrize(
    ("search", "jobs", "code"),
    [
        (False, [job("0", None, 3), job("1", 0.5), job("2", None, 2)], 3),
        (True, [job("0", None, 2), job("1", 0.5)], None),
        (True, [job("0", None, 2), job("1", None, 1)], 2),
    ],
)
def test_a_grid_is_whole_or_not_and_a_search_needs_one_score(search: bool, jobs: list[Job], code: int | None) -> None:
    sweep = Sweep("out", jobs, is_search=search)
    if code is None:
        return sweep.log_results()
    with pytest.raises(TrainerError, match=rf"of {len(jobs)} jobs failed \(0, ") as failed:
        sweep.log_results()
    assert failed.value.exit_code == code


def test_runs_over_seeds_have_a_mean_and_a_standard_deviation(capsys: pytest.CaptureFixture[str]) -> None:
    def run(name: str, seed: int, augmentation: str, scores: dict[str, float]) -> Job:
        overrides = {"seed": str(seed), "augmentation": augmentation, "debug": "fast"}
        return Job(name, f"out/{name}", [], overrides, 0 if scores else 2, scores)

    jobs = [run("0", 1, "none", {"val_accuracy": 0.5, "test_accuracy": 0.25}),
            run("1", 2, "none", {"val_accuracy": 0.7, "test_accuracy": 0.75}),
            run("2", 1, "light", {"val_accuracy": 0.625}), run("3", 2, "light", {})]  # fmt: skip
    sweep = Sweep("out", jobs, swept={"seed", "augmentation"}, is_search=True)
    sweep.log_results()
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "seeds" in line] == [
        "2 seeds  val_accuracy 0.6000 ± 0.1414, test_accuracy 0.5000 ± 0.3536  augmentation=none"
    ]
    sweep.swept = {"augmentation"}
    sweep.log_results()
    assert "seeds" not in capsys.readouterr().out


def test_event_files_that_a_killed_process_left_are_deleted(tmp_path: Path) -> None:
    job, sweep = tmp_path / "sweep" / "0", Sweep(str(tmp_path / "sweep"), swept={"training.batch_size"})
    left = [folder / f".{EVENT_FILE}.17-000000000004711" for folder in (job, tmp_path / "sweep")]
    running = tmp_path / "sweep" / "1" / ".config.yaml.17-000000000004711"
    for file in [*left, running, job / "config.yaml"]:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    tree = {"training": {"batch_size": 8}}
    sweep._write_events(Job("0", str(job), [], {"training.batch_size": "8"}, scores={"val_accuracy": 0.5}), tree)  # type: ignore[arg-type]
    assert not any(file.exists() for file in left)
    assert running.exists()
    assert (job / EVENT_FILE).exists()
    assert (tmp_path / "sweep" / EVENT_FILE).exists()


def test_swept_keys_are_those_with_several_values() -> None:
    arguments = ["-m", "seed=1,2", "debug=fast", "++a.b=choice(1, 2)", "augmentation=none,light", "x=[1,2]"]
    assert _swept_keys(arguments) == {"seed", "a.b", "augmentation"}


@pytest.fixture
def _listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """List the jobs of the same arguments once for all pods of a test: it takes a second each time."""
    list_jobs = module._list_jobs
    listed = functools.cache(lambda arguments: list_jobs(list(arguments)))
    monkeypatch.setattr(module, "_list_jobs", lambda arguments: listed(tuple(arguments)))


GRID = ["-m", "seed=1,2", "augmentation=none,light", "phases=head_only", "output_dir=gs://bucket/grid"]
POD = {"JOB_COMPLETION_INDEX": "2", "JOB_NAME": "kubetune-sweep"}


@pytest.mark.usefixtures("_listed_once")
def test_each_pod_of_an_indexed_job_trains_its_job_of_the_grid() -> None:
    """The same jobs and folders as those of the sweep on one machine, which can then list their scores."""
    selected = [select_job(GRID, {**POD, "SWEEP_JOB": str(index)}) for index in range(4)]
    assert [[a for a in arguments if a.startswith(("seed", "augm"))] for arguments, _ in selected] == [
        ["seed=1", "augmentation=none"], ["seed=1", "augmentation=light"],
        ["seed=2", "augmentation=none"], ["seed=2", "augmentation=light"],
    ]  # fmt: skip
    for number, (arguments, environment) in enumerate(selected):
        assert not requests_sweep(arguments)
        assert {"phases=head_only", f"output_dir=gs://bucket/grid/{number}"} <= set(arguments)
        assert environment == {"JOB_NAME": "kubetune-sweep", "SWEEP_JOB": str(number)}  # it is no worker


def test_a_process_without_a_number_is_left_alone() -> None:
    for environment in (POD, {**POD, "SWEEP_JOB": ""}):
        assert select_job(GRID, environment) == (GRID, environment)


@pytest.mark.parametrize(
    ("arguments", "number", "key", "problem", "fix"),
    [
        (GRID, "4", "SWEEP_JOB", "the sweep has 4 jobs", "set the completions of the Job to 4"),
        (GRID, "-1", "SWEEP_JOB", "is not the number of a job", "job-completion-index"),
        (GRID[2:], "0", "SWEEP_JOB", "are not a sweep", "add -m"),
        (GRID[:-1], "0", "output_dir", "must be given", "folder of the sweep"),
        (["hydra/sweeper=optuna", *GRID[1:]], "0", "SWEEP_JOB", "by earlier ones", "use a grid"),
        ([*GRID, "hydra.sweep.subdir=../a"], "0", "hydra.sweep.subdir", "leads out of the folder", "without .."),
        ([*GRID, "phases.haed.epochs=3"], "0", None, "there is no phase 'haed'", ""),
    ],
)
def test_what_a_pod_cannot_train_is_rejected(
    arguments: list[str], number: str, key: str | None, problem: str, fix: str
) -> None:
    with raises(ConfigError, key=key, problem=problem, fix=fix):
        select_job(arguments, {**POD, "SWEEP_JOB": number})


def test_the_jobs_are_listed_without_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra writes folders and a file for a sweep; the root file system of a pod is read-only."""
    monkeypatch.chdir(tmp_path)
    select_job([*GRID[:-1], f"output_dir={tmp_path / 'grid'}"], {"SWEEP_JOB": "0"})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("_listed_once")
def test_models_of_a_teacher_can_be_swept() -> None:
    given = ["-m", "seed=1,2", "distillation.teacher=train", "distillation.model=glyphs_mobilenet_v2,resnet50",
             "output_dir=runs/s"]  # fmt: skip
    chosen = [select_job(given, {"SWEEP_JOB": str(job)})[0] for job in range(4)]
    models = [argument for job in chosen for argument in job if "model" in argument]
    assert models == [f"distillation.model={name}" for name in ("glyphs_mobilenet_v2", "resnet50") * 2]
    tree = compose(chosen[3])
    assert tree
    assert (tree["distillation"]["model"]["backbone"], tree["seed"], tree["output_dir"]) == ("ResNet50", 2, "runs/s/3")
