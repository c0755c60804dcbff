"""`python -m trainer.evaluate run=OUTPUT_DIR [data=...]`: score a checkpoint of a run, and write the report on it.

    checkpoint=best|last|STEP   which weights; what the run exported where it is left out
    split=train|validation|test which examples; test where the data has it, else validation, else train
    output=FOLDER               where to; <output_dir>/evaluations/<checkpoint>-<data>-<split> where it is left out

The data is the run's own, or what `data=...` and `data.KEY=...` say; `runtime...`, `training.batch_size` and
`debug.max_examples` may be changed as well. Exit codes are those of a run.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.cluster.signals import StopFlag, end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

import numpy as np

from trainer.cli.compose import compose, exit_code_of, quiet_start, speak_as, speak_early
from trainer.cluster.control import Peers
from trainer.cluster.discovery import discover
from trainer.config.schema import RunConfig, load
from trainer.errors import ConfigError, DataError
from trainer.monitoring.health import signs
from trainer.monitoring.log import say
from trainer.runs.checkpoints import CheckpointFolder, read_checkpoint, weights_of
from trainer.runs.reader import FinishedRun, exported_checkpoint, find_checkpoint, read_run
from trainer.storage.path import Place, place
from trainer.training.state import RunState
from trainer.types import Dataset

if TYPE_CHECKING:
    from trainer.run import Run

OWN = ("run", "checkpoint", "split", "output")
FREE = re.compile(r"(data|runtime)(\..+)?|training\.batch_size|debug\.max_examples")
TRAIN_NOTE = "The model has learned from these very examples: the scores say how well it remembers them."
UNDIVIDED_NOTE = (
    "This data is not divided into splits, so all of it was scored; train is only its name here. The run learned from "
    "other data, but may have seen some of these pictures there."
)
DURING = "during the evaluation"


@dataclass(frozen=True)
class Checkpoint:
    """What is evaluated."""

    run: FinishedRun
    name: str  # best, last or step-420
    state: RunState
    values: dict[str, np.ndarray]  # of the model's variables
    phases: dict[str, Any]  # how those that had ended by then have ended


def split_arguments(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """What this command takes for itself, and what is left for Hydra.

    Raises:
        ConfigError: `run` is missing, or something was said twice.
    """
    pairs = [a.split("=", 1) for a in arguments if a.split("=", 1)[0] in OWN and "=" in a]
    own = dict(pairs)
    if not own.get("run") or len(own) != len(pairs) or not all(own.values()):
        raise ConfigError(
            "say once what to evaluate: python -m trainer.evaluate run=OUTPUT_DIR [checkpoint=best|last|STEP] "
            "[split=test] [output=FOLDER] [data=... data.root=...]"
        )
    return own, [a for a in arguments if a.split("=", 1)[0] not in OWN]


def configuration(told: dict[str, Any], arguments: list[str]) -> RunConfig | None:
    """The run's configuration with what the arguments change of it; None where Hydra itself answered (--help).

    Raises:
        ConfigError: an argument would change the model, or is wrong.
    """
    keys = [a.split("=", 1)[0].lstrip("+") for a in arguments if "=" in a]
    strange = [key for key in keys if not FREE.fullmatch(key)]
    if strange:
        raise ConfigError(
            f"{strange[0]}: an evaluation takes the model as it is; only data, runtime, training.batch_size and "
            "debug.max_examples can be changed"
        )
    composed = compose(arguments)
    if composed is None:
        return None
    for key in sorted(keys, key=lambda k: k.count(".")):  # a group before the values in it
        branch, new = told, composed
        *above, last = key.split(".")
        for part in above:
            branch, new = branch[part], new[part]
        branch[last] = new[last]
    return load(told)


def read_state(run: FinishedRun, which: str | None) -> Checkpoint:
    """State and weights, averaged where EMA is on; `which` is best, last, a step, or None: what the run exported.

    Raises:
        ConfigError: it is none of these.
        DataError: it is missing or damaged.
    """
    kept = which or exported_checkpoint(run)
    state, values = read_checkpoint(find_checkpoint(run, kept))
    found = RunState(step=state["step"], history=state.get("history", []), finished=state.get("finished", {}))
    name = kept if kept in ("best", "last") else f"step-{found.step}"
    return Checkpoint(run, name, found, weights_of(values), _phases(run.home, found))


def _phases(home: Place, state: RunState) -> dict[str, Any]:
    """The phases that the checkpoint has behind it; of one that the run ended with, those of its report."""
    report = (home / "report" / "report.json").fetch()
    phases: dict[str, Any] = json.loads(report[0])["phases"] if report else {}
    last = list(phases.values())[-1].get("kept_step") if phases else None
    return phases if last == state.step else state.finished


def check_classes(checkpoint: Checkpoint, dataset: Dataset) -> None:
    """Raise a DataError unless the data has the classes of the model, in the same order."""
    mine, theirs = checkpoint.run.class_names, dataset.class_names
    if mine == theirs:
        return
    strange = [repr(name) for name in theirs if name not in mine]
    missing = [repr(name) for name in mine if name not in theirs]
    parts = [f"{_some(strange)} unknown to it"] if strange else []
    parts += [f"{_some(missing)} missing in the data"] if missing else []
    if not parts:
        wanted, name = next((a, b) for a, b in zip(mine, theirs, strict=True) if a != b)
        parts = [f"the same in another order, {name!r} where it has {wanted!r}"]
    raise DataError(
        f"run={checkpoint.run.address} knows {len(mine)} classes and the data has {len(theirs)}: {'; '.join(parts)}; "
        "give data with the same classes in the same order"
    )


def _some(names: list[str], most: int = 3) -> str:
    """ "'a' is", "'a', 'b' are", "'a', 'b', 'c' and 7 more are"."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more} {'is' if len(names) == 1 else 'are'}"


def choose_split(wanted: str | None, dataset: Dataset) -> str:
    """The split to score."""
    if wanted is None:
        return next(name for name in ("test", "validation", "train") if name in dataset.splits)
    if wanted not in dataset.splits:
        raise ConfigError(f"split={wanted}: the data has {', '.join(dataset.splits)}")
    return wanted


def evaluate(own: dict[str, str], checkpoint: Checkpoint, began: float) -> Mapping[str, Any]:
    """Score and report; returns what report.json holds."""
    from trainer.report.build import evaluated, report_on
    from trainer.run import score

    stop, config = StopFlag(), checkpoint.run.config
    job = open_job(checkpoint, stop, began)
    split = choose_split(own.get("split"), job.dataset)
    own_data = job.dataset.fingerprint == checkpoint.run.fingerprint
    undivided = not own_data and list(job.dataset.splits) == ["train"]
    what = "" if undivided else f"{split} "
    say(f"evaluating {job.dataset.splits[split].count:,} {what}examples of {job.dataset.name}")
    answers = score(job, job.evaluator, job.pixels(split), config.training.batch_size, split)
    stop.check(DURING)
    job.ledger.mark("evaluation")
    result = evaluated(job, split, *answers)
    facts: dict[str, Any] = {
        "title": f"{config.experiment_name or job.dataset.name}, {checkpoint.name} on {job.dataset.name}",
        "history": checkpoint.state.history,
        "phases": checkpoint.phases,
        "timing": {
            "command": shlex.join(["python", "-m", "trainer.evaluate", *sys.argv[1:]]),
            "run": checkpoint.run.address,
            "checkpoint_step": checkpoint.state.step,
        },
    }
    if not own_data:
        facts["note"] = UNDIVIDED_NOTE if undivided else None
    elif split == "train":
        facts["note"] = TRAIN_NOTE
    home = target(own.get("output"), checkpoint, job.dataset.name, split)
    splits = list(job.dataset.splits) if own_data else [split]
    with tempfile.TemporaryDirectory(prefix="kubetune-report-") as beside:
        local = Path(str(home)) if home.is_local else Path(beside)
        report = report_on(job, local, result, answers[2], facts, splits, lambda: stop.check(DURING))
        if not home.is_local:
            for file in sorted(local.iterdir()):
                (home / file.name).upload(file)
    low, high = report["test"]["interval"]
    n = report["test"]["n"]
    say(f"{what}accuracy {report['test']['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}, n = {n}); macro F1 "
        f"{report['test']['macro_f1']:.4f}\n  report   {home}/index.html")  # fmt: skip
    return report


def target(output: str | None, checkpoint: Checkpoint, data: str, split: str) -> Place:
    """The folder of the report."""
    if output:
        return place(output)
    name = re.sub(r"[^\w.-]+", "-", f"{checkpoint.name}-{data}-{split}")
    return checkpoint.run.home / "evaluations" / name


def open_job(checkpoint: Checkpoint, stop: StopFlag, began: float) -> Run:
    """All that scoring needs of a run, with nothing that would write to its folder."""
    from trainer.cluster.devices import build_strategy
    from trainer.data.host import usable_cpus
    from trainer.data.open import open_dataset
    from trainer.data.remote import copies_ahead
    from trainer.evaluation.scoring import EvaluationPass
    from trainer.rebuilding import rebuild_classifier
    from trainer.run import Run
    from trainer.runs.clock import Ledger
    from trainer.runs.metrics import Telemetry
    from trainer.runs.publisher import Publisher
    from trainer.runs.restarts import Attempts

    config = checkpoint.run.config
    peers, cache = Peers(discover({}), {}), Path(config.runtime.cache_dir).expanduser()
    model = config.model.model_copy(update={"weights": "none"})  # all of them come from the checkpoint
    bare = config.model_copy(update={"model": model})
    local, where, shards = copies_ahead(bare, cache, say, lambda address: stop.check(f"while {address} was fetched"))
    dataset = open_dataset(
        local.data,
        seed=config.seed,
        cache_dir=cache,
        max_examples=config.debug.max_examples,
        note=say,
        arriving=shards is not None,
    )
    check_classes(checkpoint, dataset)
    strategy = build_strategy(config, peers, say, usable_cpus())
    stop.install()
    classes, source = len(dataset.class_names), f"checkpoint step {checkpoint.state.step}"
    classifier = rebuild_classifier(config.model, classes, config.seed, checkpoint.values, source, strategy.scope())
    say(f"model: {config.model.backbone}, {checkpoint.name} (step {checkpoint.state.step}) of {checkpoint.run.address}")
    folder = cache / "evaluated"
    return Run(
        config=config,
        folder=folder,
        address=checkpoint.run.address,
        publisher=Publisher(folder, None, None),
        peers=peers,
        strategy=strategy,
        dataset=dataset,
        classifier=classifier,
        evaluator=EvaluationPass(strategy, classifier),
        checkpoints=CheckpointFolder(folder, 1, say),
        telemetry=Telemetry(None, "lines", config.training.batch_size),
        ledger=Ledger(None, began),
        attempts=Attempts(None),
        stop=stop,
        state=checkpoint.state,
        where=where,
        shards=shards,
    )


def _run(arguments: list[str]) -> None:
    began = time.time()
    if any(a.startswith("-") for a in arguments):
        print(__doc__)
        return
    own, rest = split_arguments(arguments)
    home, told, facts = read_run(own["run"])
    config = configuration(told, rest)
    if config is None:
        return
    speak_as(config.runtime)
    run = FinishedRun(own["run"], home, config, tuple(facts["classes"]), facts["data_fingerprint"])
    checkpoint = read_state(run, own.get("checkpoint"))
    signs.enter("evaluate")
    with quiet_start():
        import trainer.report.build  # noqa: F401  TensorFlow is imported only now: mistakes must answer at once
    evaluate(own, checkpoint, began)


def main() -> None:
    """Entry point of `python -m trainer.evaluate`; exits with a documented code (`trainer.errors`)."""
    speak_early(sys.argv[1:])
    sys.exit(exit_code_of(_run, sys.argv[1:]))


if __name__ == "__main__":
    main()
