"""Evaluation of a finished run: a checkpoint on a split of its own or other data."""

import re
import shlex
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.cluster.control import ControlChannel
from trainer.cluster.devices import build_strategy
from trainer.cluster.discovery import discover
from trainer.cluster.signals import StopFlag
from trainer.cluster.worker import Worker
from trainer.data.host import usable_cpus
from trainer.data.images import ImageStore
from trainer.data.open import open_run_data
from trainer.errors import ConfigError
from trainer.evaluation.scoring import Scorer
from trainer.models.grad_cam import make_explainer
from trainer.monitoring.log import log
from trainer.report.build import build_report
from trainer.runs.finished_run import FinishedRun, LoadedCheckpoint, check_classes, rebuild_classifier, without_weights
from trainer.storage.path import storage_path

TRAIN_NOTE = "The model was trained on these examples: the scores measure how well it fits them."
UNDIVIDED_NOTE = (
    "This data is not divided into splits, so all of it was scored as the split train. The run was trained on other "
    "data, which may contain some of these images."
)
DURING = "during the evaluation"


def evaluate(run: FinishedRun, checkpoint: LoadedCheckpoint, own: dict[str, str]) -> Mapping[str, Any]:
    """Score a checkpoint of a run and write the report; returns the content of report.json.

    Args:
        own: the arguments `split` (default: the first of test, validation and train that the data has) and `output`
            (default: a folder below the run).

    Raises:
        ConfigError: the data has no such split.
    """
    config, stop, control = run.config, StopFlag(), ControlChannel(discover({}), {})
    bare = config.model_copy(update={"model": without_weights(config.model)})
    data = open_run_data(bare, log.info, lambda address: stop.check(f"while {address} was fetched"))
    dataset = data.dataset
    check_classes(run, dataset)
    worker = Worker(control, build_strategy(config, control, log.info, usable_cpus()), stop)
    stop.install()
    with worker.strategy.scope():
        classes, source = len(dataset.class_names), f"checkpoint step {checkpoint.step}"
        classifier = rebuild_classifier(config.model, classes, config.seed, checkpoint.values, source)
    log.info(f"model: {config.model.backbone}, {checkpoint.name} (step {checkpoint.step}) of {run.address}")
    images = ImageStore(data, config, classifier.image_size, stop.check)

    split = own.get("split")
    if split is None:
        split = next(name for name in ("test", "validation", "train") if name in dataset.splits)
    if split not in dataset.splits:
        raise ConfigError("no such split in the data", key="split", value=split, fix=f"use {', '.join(dataset.splits)}")
    own_data = dataset.fingerprint == run.fingerprint
    undivided = not own_data and list(dataset.splits) == ["train"]
    prefix = "" if undivided else f"{split} "
    log.info(f"evaluating {dataset.splits[split].count:,} {prefix}examples of {dataset.name}")
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
    name = re.sub(r"[^\w.-]+", "-", f"{checkpoint.name}-{dataset.name}-{split}")
    home = storage_path(own["output"]) if own.get("output") else run.home / "evaluations" / name
    splits = list(dataset.splits) if own_data else [split]
    with tempfile.TemporaryDirectory(prefix="kubetune-report-") as temporary:
        local = Path(str(home)) if home.is_local else Path(temporary)
        explainer = make_explainer(classifier)
        report = build_report(local, scored, images, explainer, facts, splits, lambda: stop.check(DURING))
        if not home.is_local:
            for file in sorted(local.iterdir()):
                (home / file.name).upload(file)
    images.close()
    test, (low, high) = report["test"], report["test"]["interval"]
    log.info(
        f"{prefix}accuracy {test['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}, n = {test['n']}); macro F1 "
        f"{test['macro_f1']:.4f}\n  report   {home}/index.html"
    )
    return report
