"""Compare backbones on one dataset: open the data, evaluate each backbone, print a table and write index.html."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainer.backbones.candidates import Choices, find_image_size
from trainer.backbones.folds import FoldPlan, plan_folds, pool_examples
from trainer.backbones.measure import ignore_retracing, measure, open_network, score_fold
from trainer.backbones.results import (
    RESULTS,
    FoldResult,
    Measurements,
    ResultFolder,
    make_folder_name,
    require_comparison_folder,
)
from trainer.backbones.table import ComparisonFacts, EvaluatedBackbone, rank, write_results
from trainer.cluster.control import ControlChannel
from trainer.cluster.devices import build_strategy, choose_devices, detect_device
from trainer.cluster.discovery import discover
from trainer.cluster.signals import StopFlag
from trainer.cluster.worker import Worker
from trainer.config.auto import limit_batch_size, resolve_auto
from trainer.config.schema import Data, Model, RequestedConfig, RunConfig
from trainer.data.host import count_usable_cpus
from trainer.data.images import ImageStore
from trainer.data.open import OpenedData, stage_and_open_run_dataset
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

FETCH_ACTIVITY = "while {} was fetched"  # completes the StopRequested message; {} is an address in a bucket


@dataclass(frozen=True)
class Comparison:
    """State that all backbones in a comparison have in common."""

    config: RunConfig  # with all `auto` values resolved; `model` is replaced for each backbone
    data: OpenedData  # its train split pools the train and validation examples
    folds: FoldPlan
    worker: Worker
    machine: str  # description of device and CPU cores; stored timings are reused only if it is equal
    output: StoragePath


def compare_backbones(choices: Choices, output: str, folds: int | None) -> None:
    """Evaluate the backbones, print a table, and write index.html and backbones.json to the folder `output`.

    The backbones are evaluated in ascending order of image size, so that backbones with equal image sizes use the same
    decoded images. The table is sorted by accuracy, best first.

    Args:
        choices: the backbones by label, and the configuration that they have in common.
        output: local or gs:// folder that is empty or contains the results of an earlier comparison.
        folds: the number of folds; None to derive it from the number of examples.

    Raises:
        TrainerError: an argument, the data or the weights of a backbone cannot be used.
        StopRequested: after a signal. The same command resumes from the stored results.
    """
    ignore_retracing()  # each fold trains a new head with a new tf.function, so the warning is noise
    folder = storage_path(output.rstrip("/"))
    require_comparison_folder(folder)
    stop = StopFlag()
    models = {label: _fetch_weights(choices.config, model, stop) for label, model in choices.models.items()}
    comparison = _open_comparison(choices, next(iter(models.values())), folder, folds, stop)
    measured, images = dict[str, EvaluatedBackbone](), None
    with show_addresses_in_errors(comparison.data.addresses):
        order = sorted(models, key=lambda label: find_image_size(models[label]))
        for position, label in enumerate(order, 1):
            log.info(f"{label} ({position} of {len(order)}), weights {choices.models[label].weights}")
            if images is None or images.size != find_image_size(models[label]):
                images = _open_images(comparison, find_image_size(models[label]))
                later_sizes = [find_image_size(models[other]) for other in order[position:]]
                images.train_images_read_once = images.size not in later_sizes
            measured[label] = _evaluate_backbone(comparison, label, models[label], images)
    facts = ComparisonFacts(
        dataset=comparison.data.dataset, folds=comparison.folds, machine=comparison.machine, phase=choices.phase,
        settings=comparison.config.phases[choices.phase],
        weights={label: model.weights for label, model in choices.models.items()},
    )  # fmt: skip
    write_results(folder, rank([measured[label] for label in models], facts), facts)


def _fetch_weights(config: RequestedConfig, model: Model, stop: StopFlag) -> Model:
    """Check the weights, and return `model` with their local path. Weights in a bucket are copied to the local disk."""
    if model.weights == "imagenet":
        describe_weights(model)  # raises a TrainerError if they cannot be downloaded
        return model
    # The packaged digits dataset is a placeholder, so that only the weights are fetched.
    weights_config = config.model_copy(update={"data": Data(source="digits"), "model": locate_weights(model)})
    local_config, addresses, _ = fetch_local_copies(
        weights_config, log.info, lambda address: stop.check(FETCH_ACTIVITY.format(address))
    )
    with show_addresses_in_errors(addresses):
        _find_local_weights(local_config.model)  # raises a ModelError if the file is missing or is not a weights file
    return local_config.model


def _find_local_weights(model: Model) -> Path | None:
    """Return the local weights file of a backbone, or None for "imagenet" and "none" (`find_weights_file`)."""
    return find_weights_file(find_backbone(model.backbone), find_image_size(model), model.alpha, model.weights)


def _open_comparison(
    choices: Choices, model: Model, output: StoragePath, folds: int | None, stop: StopFlag
) -> Comparison:
    """Open the data, assign the examples to folds, choose the devices, and resolve `auto` as a run of `model` does."""
    no_weights = choices.config.model_copy(update={"model": model.model_copy(update={"weights": "none"})})
    data = stage_and_open_run_dataset(no_weights, log.info, lambda address: stop.check(FETCH_ACTIVITY.format(address)))
    pool = pool_examples(data.dataset)
    split, field = pool.splits["train"], no_weights.data.group_field
    plan = plan_folds(data.dataset, folds, no_weights.data.split_seed, read_groups(split, field) if field else None)
    usage = "scored" if plan.num_folds == 1 else f"in {plan.num_folds} folds"
    log.info(f"data: {pool.name}, {len(pool.class_names)} classes, {split.count:,} examples {usage} ({plan.reason})")
    control, (_, num_replicas) = ControlChannel(discover({}), {}), choose_devices(no_weights.runtime, 1)
    num_train = len(plan.get_indices(0)[0])
    config, reasons = resolve_auto(no_weights, num_train, len(pool.class_names), detect_device(), replicas=num_replicas)
    for reason in reasons:
        log.info(reason)
    config, _ = limit_batch_size(config, num_train, num_replicas)
    worker = Worker(control, build_strategy(config, control, log.info, count_usable_cpus()), stop)
    stop.install()  # again: TensorFlow replaces the signal handlers
    machine = f"{detect_device().describe(num_replicas)}, {count_usable_cpus()} cores ({platform.machine()})"
    return Comparison(config, replace(data, dataset=pool), plan, worker, machine, output)


def _open_images(comparison: Comparison, size: int) -> ImageStore:
    """Open the pooled examples as images of `size` x `size` pixels."""
    return ImageStore(comparison.data, comparison.config, size, comparison.worker.stop.check)


def _evaluate_backbone(comparison: Comparison, label: str, model: Model, images: ImageStore) -> EvaluatedBackbone:
    """Read a backbone's stored results, and compute the missing ones. Times from another machine are measured again."""
    config, worker, dataset = comparison.config, comparison.worker, comparison.data.dataset
    config = config.model_copy(update={"model": model})
    folder = comparison.output / RESULTS / make_folder_name(model.backbone, _make_cache_key(comparison, config))
    result_folder = ResultFolder(folder, dataset.splits["train"].count, len(dataset.class_names))
    results_by_fold: dict[int, FoldResult | None] = {
        fold: result_folder.read_fold(fold) for fold in range(comparison.folds.num_folds)
    }
    measurements: Measurements | None = result_folder.read_measurements()
    if measurements is not None and measurements.machine != comparison.machine:
        measurements = None
    if measurements is not None and all(results_by_fold.values()):
        log.info(f"  read from {folder}, computed before")
        return EvaluatedBackbone(label, [result for result in results_by_fold.values() if result], measurements)
    with worker.strategy.scope():
        classifier = build_classifier(model, len(dataset.class_names), config.seed)
    network = open_network(config, worker, images, classifier)
    labels = dataset.splits["train"].labels
    for fold, result in results_by_fold.items():
        health.set_activity(f"{label}, fold {fold + 1} of {len(results_by_fold)}")
        if result is None:
            results_by_fold[fold] = result = score_fold(network, comparison.folds, fold)
            result_folder.write_fold(fold, result)
        accuracy = (result.predictions == labels[result.indices]).mean()
        log.info(f"  fold {fold + 1} of {len(results_by_fold)}: accuracy {accuracy:.4f}")
    if measurements is None:
        measurements = measure(network, comparison.machine)
        result_folder.write_measurements(measurements)
    return EvaluatedBackbone(label, [result for result in results_by_fold.values() if result], measurements)


def _make_cache_key(comparison: Comparison, config: RunConfig) -> Mapping[str, Any]:
    """Return everything that a backbone's predictions depend on. A weights file is represented by its checksum."""
    dataset, weights_file = comparison.data.dataset, _find_local_weights(config.model)
    weights = config.model.weights if weights_file is None else f"{compute_file_crc32c(weights_file):08x}"
    return {
        "data": dataset.fingerprint, "classes": list(dataset.class_names), "orientation": config.data.orientation,
        "folds": hashlib.sha256(comparison.folds.fold_of_example.tobytes()).hexdigest(),
        "window": config.data.shuffle_window,
        "model": config.model.model_dump(mode="json")
        | {"weights": weights, "image_size": find_image_size(config.model)},
        "phases": {name: phase.model_dump(mode="json") for name, phase in config.phases.items()},
        "training": config.training.model_dump(mode="json"), "seed": config.seed, "debug": config.debug.max_steps,
        "precision": config.runtime.precision, "deterministic": config.runtime.deterministic,
        "replicas": comparison.worker.replicas, "tensorflow": tf.__version__,
    }  # fmt: skip
