"""Sweeps: grids and searches, failed jobs, stopping and resuming."""

import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.e2e.running import start, train
from tests.processes import run_python
from tests.storage.emulator import running
from tests.tensorboard import post
from trainer.storage.path import storage_path

TINY = ("debug=fast", "phases=head_only", "phases.head.epochs=1", "export.formats=[]")
RATE = "phases.head.optimizer.learning_rate"


def without_the_extra(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line in a Python that can import neither Optuna nor plugins of Hydra, as without the extra."""
    program = "import sys; sys.modules |= dict.fromkeys(['hydra_plugins', 'optuna']); from trainer.__main__ import main; main()"
    return run_python(program, *arguments, code=code)


@pytest.mark.parametrize("arguments", [["-m", "hydra/sweeper=optuna", "seed=1,2"], ["sweep=learning_rates"]])
def test_a_search_without_the_extra_names_it(arguments: list[str]) -> None:
    result = without_the_extra(*arguments, code=2)
    assert result.stderr.startswith("error: a search by Optuna needs the extra `sweep`")
    assert result.stderr.endswith("; pip install 'kubetune[sweep]'\n")


def test_everything_else_works_without_the_extra() -> None:
    assert "learning_rates, optuna" in without_the_extra("--help").stdout
    assert "seed: 42" in without_the_extra("--cfg", "job").stdout


@pytest.mark.parametrize("choice", ["hydra/sweeper=optuna", "sweep=learning_rates"])
def test_a_search_maximizes_from_a_seed(choice: str) -> None:
    tree = yaml.safe_load(train(choice, "--cfg", "hydra").stdout)["hydra"]
    assert tree["mode"] == "MULTIRUN"
    sweeper = tree["sweeper"]
    assert (sweeper["direction"], sweeper["n_trials"], sweeper["n_jobs"]) == ("maximize", 20, 1)
    assert (sweeper["sampler"]["_target_"], sweeper["sampler"]["seed"]) == ("optuna.samplers.TPESampler", 42)
    assert sweeper["max_failure_rate"] == 1.0


@pytest.mark.parametrize("sweep", [("-m", "seed=1,2"), ("hydra/sweeper=optuna", "seed=choice(1,2)")])
def test_a_wrong_configuration_ends_the_sweep_before_its_first_job(sweep: tuple[str, ...], tmp_path: Path) -> None:
    result = train(*sweep, "phases.haed.epochs=3", f"output_dir={tmp_path / 'sweep'}", code=2)
    assert result.stdout == ""
    assert result.stderr.count("did you mean head?") == 1
    assert "Traceback" not in result.stderr


def test_a_search_of_nothing_is_rejected() -> None:
    result = train("-m", "hydra/sweeper=optuna", "experiment=quickstart", code=2)
    assert re.match(r"error: hydra/sweeper=optuna: .*KEY=interval\(low, high\) or KEY=choice\(", result.stderr)


@pytest.mark.slow
def test_a_grid_continues_after_a_job_that_fails(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    result = train("-m", *TINY, "phases.head.optimizer.name=sgd", f"{RATE}=1e38,0.01", f"output_dir={sweep}", code=2)
    assert f"job   0  failed (exit code 2)  {RATE}=1e+38\n" in result.stdout
    assert re.search(rf"job   1  val_accuracy 0\.\d{{4}}  {RATE}=0.01\nbest: job 1, ", result.stdout)
    assert f"{RATE}=0.01" in result.stdout.split("  again ")[1]
    assert "error: 1 of 2 jobs failed (0); " in result.stderr
    assert not (sweep / "0" / "DONE").exists()
    tree = yaml.safe_load((sweep / "1" / "config.yaml").read_text())
    assert tree["phases"]["head"]["optimizer"]["learning_rate"] == 0.01


@pytest.mark.slow
def test_jobs_get_their_values_and_folders_as_they_were_typed(tmp_path: Path) -> None:
    weights = "training.class_weights={1:2,2:1},balanced"
    result = train("-m", *TINY, weights, 'output_dir="o/lr=1, a"', "experiment_name=it's (1)", cwd=tmp_path)
    home = tmp_path / "o" / "lr=1, a"
    trees = [yaml.safe_load((home / job / "config.yaml").read_text()) for job in ("0", "1")]
    assert [tree["training"]["class_weights"] for tree in trees] == [{"1": 2.0, "2": 1.0}, "balanced"]
    assert [(tree["output_dir"], tree["experiment_name"]) for tree in trees] == [
        (f"o/lr=1, a/{job}", "it's (1)") for job in ("0", "1")
    ]
    assert all((home / job / "DONE").exists() for job in ("0", "1"))
    assert "training.class_weights={1:2,2:1}\n" in result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["o"]


@pytest.mark.slow
def test_a_search_outlives_a_job_that_diverges_and_resumes(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    search = (*TINY, "hydra/sweeper=optuna", "phases.head.optimizer.name=sgd", f"{RATE}=choice(0.01,1e38)")
    search += ("hydra.sweeper.n_trials=2", "hydra.sweeper.sampler.seed=0", f"output_dir={sweep}")
    first = train(*search)
    assert f"job   0  failed (exit code 2)  {RATE}=1e+38\n" in first.stdout
    (score,) = re.findall(rf"job   1  val_accuracy (0\.\d{{4}})  {RATE}=0.01\n", first.stdout)
    results = yaml.safe_load((sweep / "optimization_results.yaml").read_text())
    assert f"{results['best_value']:.4f}" == score
    statuses = ["STATUS_SUCCESS", "STATUS_FAILURE"]
    query = {"experimentName": "", "startIndex": 0, "sliceSize": 9, "allowedStatuses": statuses, "colParams": []}
    rows = {g["name"]: g for g in post(sweep, "hparams/session_groups", query)["sessionGroups"]}
    assert {name: row["sessions"][0]["status"] for name, row in rows.items()} == {"0": statuses[1], "1": statuses[0]}
    assert [rows[name]["hparams"][RATE] for name in ("0", "1")] == [1e38, 0.01]
    assert {m["name"]["tag"] for m in rows["1"]["metricValues"]} == {"val_accuracy", "test_accuracy"}

    again = train(*search)  # runs the same trials, and has the score of one of them
    assert f"{sweep / '1'} is finished already\n" in again.stdout
    assert again.stdout.split("\njob   0")[1] == first.stdout.split("\njob   0")[1]

    other = train(*search, "seed=7", code=2)  # the job that diverged has no checkpoint, and may begin anew
    assert f"output_dir={sweep / '1'}: holds a run with another configuration" in other.stderr
    assert "seed: 42 -> 7" in other.stderr


@pytest.mark.slow
def test_a_sweep_that_is_stopped_stops_its_job_and_resumes(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    grid = ("-m", "seed=1,2", "debug.max_examples=64", "phases=head_only", "phases.head.epochs=40", "export.formats=[]")
    grid += ("runtime.log_every='2 steps'", f"output_dir={sweep}")
    child = start(*grid)
    story = sweep / "0" / "metrics.jsonl"
    while not story.exists() or len(story.read_text().splitlines()) < 6:  # pytest's own limit ends this
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)  # to the sweep alone
    out, err = child.communicate()
    assert child.returncode == 75
    assert (
        f"the sweep has stopped, nothing is lost; start the same command again with output_dir={sweep} to resume" in err
    )
    assert "SIGTERM: saving" in err
    assert (sweep / "0" / "checkpoints" / "LATEST").exists()
    assert not (sweep / "1").exists() or not any((sweep / "1").iterdir())
    assert "job 1" not in out

    rest = train(*grid)
    assert f"run: {sweep / '0'} (resuming)" in rest.stdout
    assert all((sweep / name / "DONE").exists() for name in ("0", "1"))
    assert "best: job " in rest.stdout


@pytest.mark.slow
def test_a_sweep_into_a_bucket_resumes_from_another_disk(tmp_path: Path) -> None:
    sweep = ("-m", "seed=1,2", *TINY, "output_dir=gs://bucket/sweep")
    with running(tmp_path / "objects"):
        first = train(*sweep, f"runtime.cache_dir={tmp_path / 'one'}")
        assert "-> gs://bucket/sweep/1" in first.stdout
        assert (storage_path("gs://bucket/sweep/0") / "DONE").exists()
        assert (storage_path("gs://bucket/sweep/1") / "DONE").exists()
        again = train(*sweep, f"runtime.cache_dir={tmp_path / 'other'}")
    assert again.stdout.count("is finished already") == 2
    assert again.stdout.splitlines()[-1] == first.stdout.splitlines()[-1]
