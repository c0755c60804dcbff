"""Evaluate a checkpoint of a run, which need not be finished, on a split of its dataset or of another one."""

import shlex
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trainer.cluster.control import ControlChannel
from trainer.cluster.devices import build_strategy, choose_devices
from trainer.cluster.discovery import discover
from trainer.cluster.signals import StopFlag
from trainer.cluster.worker import Worker
from trainer.config.auto import limit_batch_size
from trainer.config.schema import RunConfig
from trainer.data.host import count_usable_cpus
from trainer.data.images import ImageStore
from trainer.data.open import OpenedData, stage_and_open_run_dataset
from trainer.data.remote import show_addresses_in_errors
from trainer.errors import ConfigError, DataError
from trainer.evaluation.scoring import Scorer
from trainer.models.grad_cam import make_explainer
from trainer.monitoring.log import log
from trainer.names import make_file_stem
from trainer.report.build import build_report
from trainer.runs.stored_run import (
    LoadedCheckpoint,
    StoredRun,
    disable_pretrained_weights,
    map_to_run_classes,
    rebuild_classifier,
)
from trainer.storage.local import delete_stale_temporary_files
from trainer.storage.path import storage_path
from trainer.types import LogMessage, has_fingerprints

TRAINED_ON_NOTE = "The model was trained on these examples: the scores measure how well it fits them."
UNSPLIT_NOTE = (
    "This data is not divided into splits, so all of it was scored as the split train. The run was trained on other "
    "data, which may contain some of these images."
)
DURING_EVALUATION = "during the evaluation"  # end of the message of a stop request


def evaluate(
    run: StoredRun, checkpoint: LoadedCheckpoint, options: dict[str, str], moved: RunConfig | None = None
) -> Mapping[str, Any]:
    """Score a checkpoint of a run and write the report; return the content of report.json.

    Args:
        run: the run; the dataset in `run.config`, which is scored, need not be the one that it was trained on.
        checkpoint: the checkpoint to score.
        options: optional arguments of the command. `split` defaults to the first of test, validation and train that the
            dataset has, and `output`, the folder of the report, to RUN/evaluations/CHECKPOINT-DATA-SPLIT.
        moved: `run.config` with the run's splits, limits and corrections if `run.config` uses all examples of a
            different dataset, else None. The data is read with it if that dataset is a moved copy of the run's dataset.

    Raises:
        ConfigError: the data has no such split.
        DataError: the data has a class that the run does not know, or cannot be read.
        ModelError: the backbone cannot be loaded.
        StopRequested: a signal was received; the evaluation has to be started again.
    """
    config, stop, control = run.config, StopFlag(), ControlChannel(discover(environment={}), connections={})

    def open_data(config: RunConfig, log_message: LogMessage) -> OpenedData:
        data_config = config.model_copy(
            update={"model": disable_pretrained_weights(config.model)}
        )  # no weights are fetched
        return stage_and_open_run_dataset(
            data_config, log_message, lambda address: stop.check(f"while {address} was fetched"), purpose="evaluate"
        )

    data = open_data(config, log.info)
    if moved and (list(data.dataset.splits) == ["train"] or moved.data.corrections):
        with suppress(DataError):  # another dataset may be too small to be divided
            divided_data = open_data(moved, log_message=lambda _: None)
            data = divided_data if has_fingerprints(divided_data.dataset, run.fingerprint) else data
    dataset = map_to_run_classes(run, data.dataset)
    data = replace(data, dataset=dataset)
    max_size = max(split.count for split in dataset.splits.values())
    num_replicas = choose_devices(config.runtime, num_workers=1)[1]
    config, _ = limit_batch_size(config, max_size, num_replicas)  # as in training
    worker = Worker(control, build_strategy(config, control, log.info, count_usable_cpus()), stop)
    stop.install()
    with worker.strategy.scope():
        num_classes = len(dataset.class_names)
        checkpoint_label = f"checkpoint step {checkpoint.step}"
        classifier = rebuild_classifier(config.model, num_classes, config.seed, checkpoint.values, checkpoint_label)
    log.info(f"model: {config.model.backbone}, {checkpoint.name} (step {checkpoint.step}) of {run.address}")
    images = ImageStore(data, config, classifier.image_size, stop.check)

    split = options.get("split", next(name for name in ("test", "validation", "train") if name in dataset.splits))
    if split not in dataset.splits:
        fix = f"use {', '.join(dataset.splits)}"
        raise ConfigError("is not a split of the data", key="split", value=split, fix=fix)
    is_run_data = has_fingerprints(dataset, run.fingerprint)
    is_unsplit = not is_run_data and list(dataset.splits) == ["train"]
    prefix = "" if is_unsplit else f"{split} "
    quantifier = "all " if is_unsplit else ""
    log.info(f"evaluating {quantifier}{dataset.splits[split].count:,} {prefix}examples of {dataset.name}")
    with show_addresses_in_errors(images.addresses):
        scored = Scorer(worker, classifier).score(images.open_split(split), config.training.batch_size, split)
    stop.check(DURING_EVALUATION)
    trained_on = is_run_data and (split == "train" or config.debug.overfit)
    report_fields: dict[str, Any] = {
        "title": f"{config.experiment_name or dataset.name}, {checkpoint.name} on {dataset.name}",
        "history": checkpoint.history,
        "phases": checkpoint.phases,
        "trained_on": trained_on,
        "timing": {
            "command": shlex.join(["python", "-m", "trainer.evaluate", *sys.argv[1:]]),
            "run": run.address,
            "checkpoint_step": checkpoint.step,
        },
    }
    if not is_run_data:
        report_fields["note"] = UNSPLIT_NOTE if is_unsplit else None
    elif trained_on:
        report_fields["note"] = TRAINED_ON_NOTE
    name = f"{checkpoint.name}-{make_file_stem(dataset.name)}-{split}"
    output = storage_path(options["output"]) if options.get("output") else run.folder / "evaluations" / name
    splits = list(dataset.splits) if is_run_data else [split]
    with tempfile.TemporaryDirectory(prefix="kubetune-report-") as temporary_folder:
        folder = Path(str(output)) if output.is_local else Path(temporary_folder)
        delete_stale_temporary_files(folder)
        explain = make_explainer(classifier)
        check = partial(stop.check, DURING_EVALUATION)
        with show_addresses_in_errors(images.addresses):
            report = build_report(folder, scored, images, explain, report_fields, splits=splits, check=check)
        if not output.is_local:
            for file in sorted(folder.iterdir()):
                (output / file.name).upload(file)
    images.close()
    test, (low, high) = report["test"], report["test"]["interval"]
    log.info(
        f"{prefix}accuracy {test['accuracy']:.4f} (95 % interval {low:.4f} to {high:.4f}, n = {test['n']}); macro F1 "
        f"{test['macro_f1']:.4f}\n  report   {output}/index.html"
    )
    return report
