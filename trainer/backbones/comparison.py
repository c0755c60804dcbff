"""Compare backbones on one dataset: open the data, measure each backbone, print the table and write the page."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainer.backbones.candidates import Choices, find_size
from trainer.backbones.folds import FoldPlan, plan_folds, pool_examples
from trainer.backbones.measure import ignore_retracing, measure, open_network, score_fold
from trainer.backbones.results import (
    RESULTS,
    FoldResult,
    Measurements,
    ResultFolder,
    name_folder,
    require_comparison_folder,
)
from trainer.backbones.table import Facts, MeasuredNetwork, rank, write_results
from trainer.cluster.control import ControlChannel
from trainer.cluster.devices import build_strategy, choose_devices, detect_device
from trainer.cluster.discovery import discover
from trainer.cluster.signals import StopFlag
from trainer.cluster.worker import Worker
from trainer.config.auto import limit_batch_size, resolve_auto
from trainer.config.schema import Data, Model, RequestedConfig, RunConfig
from trainer.data.host import count_usable_cpus
from trainer.data.images import ImageStore
from trainer.data.open import OpenedData, open_run_data
from trainer.data.records import read_groups
from trainer.data.remote import fetch_local_copies, show_addresses_in_errors
from trainer.models.backbones import find_backbone
from trainer.models.classifier import build_classifier
from trainer.models.weights import find_weights_file
from trainer.models.weights_folder import describe_weights, locate_weights
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.storage.local import compute_file_crc32c
from trainer.storage.path import StoragePath, storage_path

WHILE_FETCHING = "while {} was fetched"  # completes the message of a StopRequested; {} is the address in the bucket


@dataclass(frozen=True)
class Comparison:
    """What all backbones of a comparison have in common."""

    config: RunConfig  # without auto values; `model` is replaced for each backbone
    data: OpenedData  # its split train is the pool of train and validation examples
    folds: FoldPlan
    worker: Worker
    machine: str  # the device and the number of CPU cores, for the table
    output: StoragePath


def compare_backbones(choices: Choices, output: str, folds: int | None) -> None:
    """Measure the backbones, print the table, and write index.html and backbones.json to the folder `output`.

    The backbones are measured in ascending order of image size, so that those of the same size use the same decoded
    images. The table has the order of accuracy.

    Args:
        output: local or gs:// folder, which is empty or has the results of an earlier comparison.
        folds: the number of folds; None to choose it by the number of examples.

    Raises:
        TrainerError: an argument, the data or the weights of a backbone cannot be used.
        StopRequested: after a signal. The same command continues with the results that are stored.
    """
    ignore_retracing()
    folder = storage_path(output.rstrip("/"))
    require_comparison_folder(folder)
    stop = StopFlag()
    models = {label: _fetch_weights(choices.config, model, stop) for label, model in choices.models.items()}
    comparison = _open(choices, next(iter(models.values())), folder, folds, stop)
    measured, images = dict[str, MeasuredNetwork](), None
    with show_addresses_in_errors(comparison.data.addresses):
        order = sorted(models, key=lambda label: find_size(models[label]))
        for number, label in enumerate(order, 1):
            log.info(f"{label} ({number} of {len(order)}), weights {choices.models[label].weights}")
            if images is None or images.size != find_size(models[label]):
                images = _open_images(comparison, find_size(models[label]))
                later_sizes = [find_size(models[other]) for other in order[number:]]
                images.train_images_read_once = images.size not in later_sizes
            measured[label] = _measure_network(comparison, label, models[label], images)
    facts = Facts(
        dataset=comparison.data.dataset, folds=comparison.folds, machine=comparison.machine, phase=choices.phase,
        settings=comparison.config.phases[choices.phase],
        weights={label: model.weights for label, model in choices.models.items()},
    )  # fmt: skip
    write_results(folder, rank([measured[label] for label in models], facts), facts)


def _fetch_weights(config: RequestedConfig, model: Model, stop: StopFlag) -> Model:
    """Copy the weights from a bucket; return `model` with their local path. Raise its errors before any computation."""
    if model.weights == "imagenet":
        describe_weights(model)
        return model
    # The packaged digits substitute the dataset, which is not fetched here.
    only_weights = config.model_copy(update={"data": Data(source="digits"), "model": locate_weights(model)})
    local, addresses, _ = fetch_local_copies(
        only_weights, log.info, lambda address: stop.check(WHILE_FETCHING.format(address))
    )
    with show_addresses_in_errors(addresses):
        _find_local_weights(local.model)  # raises a ModelError if the file is missing or is not a weights file
    return local.model


def _find_local_weights(model: Model) -> Path | None:
    return find_weights_file(find_backbone(model.backbone), find_size(model), model.alpha, model.weights)


def _open(choices: Choices, model: Model, output: StoragePath, folds: int | None, stop: StopFlag) -> Comparison:
    """Open the data, assign the examples to folds, choose the devices, and resolve the auto values as a run does."""
    unweighted = choices.config.model_copy(update={"model": model.model_copy(update={"weights": "none"})})
    data = open_run_data(unweighted, log.info, lambda address: stop.check(WHILE_FETCHING.format(address)))
    pool = pool_examples(data.dataset)
    split, field = pool.splits["train"], unweighted.data.group_field
    plan = plan_folds(data.dataset, folds, unweighted.data.split_seed, read_groups(split, field) if field else None)
    usage = "scored" if plan.count == 1 else f"in {plan.count} folds"
    log.info(f"data: {pool.name}, {len(pool.class_names)} classes, {split.count:,} examples {usage} ({plan.reason})")
    control, (_, replicas) = ControlChannel(discover({}), {}), choose_devices(unweighted.runtime, 1)
    num_trained = len(plan.split(0)[0])
    config, reasons = resolve_auto(unweighted, num_trained, len(pool.class_names), detect_device(), replicas=replicas)
    for reason in reasons:
        log.info(reason)
    config, _ = limit_batch_size(config, num_trained, replicas)
    worker = Worker(control, build_strategy(config, control, log.info, count_usable_cpus()), stop)
    stop.install()  # again: TensorFlow replaces the signal handlers
    machine = f"{detect_device().describe(replicas)}, {count_usable_cpus()} cores ({platform.machine()})"
    return Comparison(config, replace(data, dataset=pool), plan, worker, machine, output)


def _open_images(comparison: Comparison, size: int) -> ImageStore:
    return ImageStore(comparison.data, comparison.config, size, comparison.worker.stop.check)


def _measure_network(comparison: Comparison, label: str, model: Model, images: ImageStore) -> MeasuredNetwork:
    """Read the stored results of a backbone, and compute the missing ones. Times of another machine are not used."""
    config, worker, dataset = comparison.config, comparison.worker, comparison.data.dataset
    config = config.model_copy(update={"model": model})
    folder = comparison.output / RESULTS / name_folder(model.backbone, _identify(comparison, config))
    stored = ResultFolder(folder, dataset.splits["train"].count, len(dataset.class_names))
    folds: dict[int, FoldResult | None] = {fold: stored.read_fold(fold) for fold in range(comparison.folds.count)}
    measurements: Measurements | None = stored.read_measurements()
    if measurements is not None and measurements.machine != comparison.machine:
        measurements = None
    if measurements is not None and all(folds.values()):
        log.info(f"  read from {folder}, computed before")
        return MeasuredNetwork(label, [result for result in folds.values() if result], measurements)
    with worker.strategy.scope():
        classifier = build_classifier(model, len(dataset.class_names), config.seed)
    network = open_network(config, worker, images, classifier)
    labels = dataset.splits["train"].labels
    for fold, result in folds.items():
        health.set_activity(f"{label}, fold {fold + 1} of {len(folds)}")
        if result is None:
            folds[fold] = result = score_fold(network, comparison.folds, fold)
            stored.write_fold(fold, result)
        accuracy = (result.predictions == labels[result.indices]).mean()
        log.info(f"  fold {fold + 1} of {len(folds)}: accuracy {accuracy:.4f}")
    if measurements is None:
        measurements = measure(network, comparison.machine)
        stored.write_measurements(measurements)
    return MeasuredNetwork(label, [result for result in folds.values() if result], measurements)


def _identify(comparison: Comparison, config: RunConfig) -> Mapping[str, Any]:
    """Return everything that the predictions of a backbone depend on. A weights file is identified by its checksum."""
    dataset, weights_file = comparison.data.dataset, _find_local_weights(config.model)
    weights = config.model.weights if weights_file is None else f"{compute_file_crc32c(weights_file):08x}"
    return {
        "data": dataset.fingerprint, "classes": list(dataset.class_names), "orientation": config.data.orientation,
        "folds": hashlib.sha256(comparison.folds.of.tobytes()).hexdigest(), "window": config.data.shuffle_window,
        "model": config.model.model_dump(mode="json") | {"weights": weights, "image_size": find_size(config.model)},
        "phases": {name: phase.model_dump(mode="json") for name, phase in config.phases.items()},
        "training": config.training.model_dump(mode="json"), "seed": config.seed, "debug": config.debug.max_steps,
        "precision": config.runtime.precision, "deterministic": config.runtime.deterministic,
        "replicas": comparison.worker.replicas, "tensorflow": tf.__version__,
    }  # fmt: skip
