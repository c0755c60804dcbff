"""`python -m trainer.evaluate run=OUTPUT_DIR [checkpoint=best|last|STEP] [split=test] [output=FOLDER] [data=...]`:
score a checkpoint of a run, and write the report on it.

    checkpoint=best|last|STEP   which weights; what the run exported where it is left out
    split=train|validation|test which examples; test where the data has it, else validation, else train
    output=FOLDER               where to; <output_dir>/evaluations/<checkpoint>-<data>-<split> where it is left out

The data is the run's own, or what `data=...` and `data.KEY=...` say; `runtime...`, `training.batch_size` and
`debug.max_examples` may be changed as well. Exit codes are those of a run.
"""

from __future__ import annotations

import re
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.cluster.signals import StopFlag, end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

from trainer.cli.arguments import read_arguments
from trainer.cli.compose import compose
from trainer.cli.process import exit_with_code, quiet_start, speak_as, speak_early
from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.config.schema import RunConfig, load
from trainer.errors import ConfigError
from trainer.monitoring.health import health
from trainer.monitoring.log import say
from trainer.runs.reader import (
    FinishedRun,
    LoadedCheckpoint,
    check_classes,
    load_checkpoint,
    read_run,
    rebuild_classifier,
    without_weights,
)
from trainer.storage.path import Place, place
from trainer.types import Dataset

OWN = {"run": "say once what to evaluate", "checkpoint": "", "split": "", "output": ""}
FREE = re.compile(r"(data|runtime)(\..+)?|training\.batch_size|debug\.max_examples")
TRAIN_NOTE = "The model has learned from these very examples: the scores say how well it remembers them."
UNDIVIDED_NOTE = (
    "This data is not divided into splits, so all of it was scored; train is only its name here. The run learned from "
    "other data, but may have seen some of these pictures there."
)
DURING = "during the evaluation"


def configuration(tree: dict[str, Any], arguments: list[str]) -> RunConfig:
    """The run's configuration with what the arguments change of it.

    Raises:
        ConfigError: an argument would change the model, or is wrong.
    """
    keys = [a.split("=", 1)[0].lstrip("+") for a in arguments if "=" in a]
    refused = [key for key in keys if not FREE.fullmatch(key)]
    if refused:
        raise ConfigError(
            f"{refused[0]}: an evaluation takes the model as it is; only data, runtime, training.batch_size and "
            "debug.max_examples can be changed"
        )
    composed = compose(arguments)
    assert composed is not None, "no argument asks Hydra itself"
    if any(key.split(".")[0] == "data" for key in keys):
        tree["debug"]["overfit"] = False  # of the data that was overfitted
    for key in sorted(keys, key=lambda k: k.count(".")):  # a group before the values in it
        branch, new = tree, composed
        *above, last = key.split(".")
        for part in above:
            branch, new = branch[part], new[part]
        branch[last] = new[last]
    return load(tree)


def choose_split(wanted: str | None, dataset: Dataset) -> str:
    """The split to score."""
    if wanted is None:
        return next(name for name in ("test", "validation", "train") if name in dataset.splits)
    if wanted not in dataset.splits:
        raise ConfigError(f"split={wanted}: the data has {', '.join(dataset.splits)}")
    return wanted


def target(output: str | None, run: FinishedRun, checkpoint: str, data: str, split: str) -> Place:
    """The folder of the report."""
    return (
        place(output) if output else run.home / "evaluations" / re.sub(r"[^\w.-]+", "-", f"{checkpoint}-{data}-{split}")
    )


def evaluate(run: FinishedRun, checkpoint: LoadedCheckpoint, own: dict[str, str]) -> Mapping[str, Any]:
    """Score and report; returns what report.json holds.

    Args:
        own: the arguments `split` and `output`, where they are given.
    """
    from trainer.cluster.devices import build_strategy
    from trainer.cluster.worker import Worker
    from trainer.data.host import usable_cpus
    from trainer.data.images import ImageStore
    from trainer.data.open import open_run_data
    from trainer.evaluation.scoring import Scorer
    from trainer.models.grad_cam import make_explainer
    from trainer.report.build import build_report

    config, stop, control = run.config, StopFlag(), ControlChannel(discover({}), {})
    bare = config.model_copy(update={"model": without_weights(config.model)})
    data = open_run_data(bare, say, lambda address: stop.check(f"while {address} was fetched"))
    dataset = data.dataset
    check_classes(run, dataset)
    worker = Worker(control, build_strategy(config, control, say, usable_cpus()), stop)
    stop.install()
    with worker.strategy.scope():
        classes, source = len(dataset.class_names), f"checkpoint step {checkpoint.step}"
        classifier = rebuild_classifier(config.model, classes, config.seed, checkpoint.values, source)
    say(f"model: {config.model.backbone}, {checkpoint.name} (step {checkpoint.step}) of {run.address}")
    images = ImageStore(data, config, classifier.image_size, stop.check)

    split = choose_split(own.get("split"), dataset)
    own_data = dataset.fingerprint == run.fingerprint
    undivided = not own_data and list(dataset.splits) == ["train"]
    what = "" if undivided else f"{split} "
    say(f"evaluating {dataset.splits[split].count:,} {what}examples of {dataset.name}")
    scored = Scorer(worker, classifier).score(images.split(split), config.training.batch_size, split)
    stop.check(DURING)
    facts: dict[str, Any] = {
        "title": f"{config.experiment_name or dataset.name}, {checkpoint.name} on {dataset.name}",
        "history": checkpoint.history,
        "phases": checkpoint.phases,
        "timing": {
            "command": shlex.join(["python", "-m", "trainer.evaluate", *sys.argv[1:]]),
            "run": run.address,
            "checkpoint_step": checkpoint.step,
        },
    }
    if not own_data:
        facts["note"] = UNDIVIDED_NOTE if undivided else None
    elif split == "train" or config.debug.overfit:
        facts["note"] = TRAIN_NOTE
    home = target(own.get("output"), run, checkpoint.name, dataset.name, split)
    splits = list(dataset.splits) if own_data else [split]
    with tempfile.TemporaryDirectory(prefix="kubetune-report-") as beside:
        local = Path(str(home)) if home.is_local else Path(beside)
        explainer = make_explainer(classifier)
        report = build_report(local, scored, images, explainer, facts, splits, lambda: stop.check(DURING))
        if not home.is_local:
            for file in sorted(local.iterdir()):
                (home / file.name).upload(file)
    images.close()
    test = report["test"]
    say(f"{what}accuracy {test['accuracy']:.4f} (95 % interval {test['interval'][0]:.4f} to {test['interval'][1]:.4f}, "
        f"n = {test['n']}); macro F1 {test['macro_f1']:.4f}\n  report   {home}/index.html")  # fmt: skip
    return report


def main() -> None:
    """Entry point of `python -m trainer.evaluate`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        speak_early(sys.argv[1:])
        own, rest = read_arguments(sys.argv[1:], __doc__, OWN, rest=r"[^-~].*=(?s:.*)")
        home, tree, facts = read_run(own["run"])
        config = configuration(tree, rest)
        speak_as(config.runtime)
        run = FinishedRun(own["run"], home, config, tuple(facts["classes"]), facts["data_fingerprint"])
        checkpoint = load_checkpoint(run, own.get("checkpoint"))
        health.enter_phase("evaluate")
        with quiet_start():
            import trainer.report.build  # noqa: F401  TensorFlow is imported only now: mistakes must answer at once
        evaluate(run, checkpoint, own)


if __name__ == "__main__":
    main()
