"""Compare backbones on one dataset: open the data, evaluate each backbone, print a table and write index.html."""

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainer.backbones.candidates import ComparisonConfig, find_image_size
from trainer.backbones.folds import HOLD_OUT, FoldPlan, plan_folds, pool_examples
from trainer.backbones.measure import ignore_retracing, measure_size_and_speed, open_backbone, train_and_score_fold
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

    # With all `auto` values resolved. `model` is replaced for each backbone. Until then, it is that of the first one,
    # with weights "none".
    config: RunConfig
    data: OpenedData  # its train split pools the train and validation examples
    fold_plan: FoldPlan
    worker: Worker
    machine: str  # description of device and CPU cores; stored timings are reused only if it is equal
    output: StoragePath


def compare_backbones(comparison_config: ComparisonConfig, output: str, num_folds: int | None) -> None:
    """Evaluate the backbones, print a table, and write index.html and backbones.json to the folder `output`.

    The backbones are evaluated in ascending order of image size, so that backbones with equal image sizes use the same
    decoded images. The table is sorted by accuracy, best first.

    Args:
        comparison_config: the backbones by label, and the configuration that they have in common.
        output: local or gs:// folder that is empty or contains the results of an earlier comparison.
        num_folds: the number of folds; None to derive it from the number of examples.

    Raises:
        TrainerError: an argument, the data or the weights of a backbone cannot be used.
        StopRequested: after a signal. The same command resumes from the stored results.
    """
    ignore_retracing()  # each fold trains a new head with a new tf.function, so the warning is noise
    output_folder = storage_path(output.rstrip("/"))
    require_comparison_folder(output_folder)
    stop = StopFlag()
    weights = {label: model.weights for label, model in comparison_config.models.items()}  # as the user wrote them
    models = {
        label: _fetch_weights(comparison_config.common, model, stop)
        for label, model in comparison_config.models.items()
    }
    first_model = next(iter(models.values()))
    comparison = _open_comparison(comparison_config.common, first_model, output_folder, num_folds, stop)
    image_sizes = {label: find_image_size(model) for label, model in models.items()}
    labels_by_size = sorted(models, key=lambda label: image_sizes[label])
    evaluated: dict[str, EvaluatedBackbone] = {}
    images: ImageStore | None = None
    with show_addresses_in_errors(comparison.data.addresses):
        for position, label in enumerate(labels_by_size, 1):
            log.info(f"{label} ({position} of {len(labels_by_size)}), weights {weights[label]}")
            if images is None or images.size != image_sizes[label]:
                images = _open_images(comparison, image_sizes[label])
                # Each backbone reads the images once, to compute its features. Decoded images need to be cached only if
                # a later backbone has the same image size.
                later_sizes = [image_sizes[other] for other in labels_by_size[position:]]
                images.train_images_read_once = images.size not in later_sizes
            evaluated[label] = _evaluate_backbone(comparison, label, models[label], images)
    facts = ComparisonFacts(
        dataset=comparison.data.dataset, fold_plan=comparison.fold_plan, machine=comparison.machine,
        phase=comparison_config.head_phase, settings=comparison.config.phases[comparison_config.head_phase],
        weights=weights,
    )  # fmt: skip
    write_results(output_folder, rank([evaluated[label] for label in models], facts), facts)


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
    common_config: RequestedConfig, first_model: Model, output: StoragePath, num_folds: int | None, stop: StopFlag
) -> Comparison:
    """Open the data, assign the examples to folds, choose the devices, and resolve `auto`.

    The `auto` values are those of a run of the first backbone, and apply to all backbones, so that their heads are
    trained with the same settings.

    Args:
        common_config: the configuration that all backbones have in common.
        first_model: `model` section of the first backbone.
        output: folder of the results.
        num_folds: the number of folds; None to derive it from the number of examples.
        stop: stop flag of this process.
    """
    # Its weights are not used here, and are fetched already.
    no_weights = common_config.model_copy(update={"model": first_model.model_copy(update={"weights": "none"})})
    data = stage_and_open_run_dataset(no_weights, log.info, lambda address: stop.check(FETCH_ACTIVITY.format(address)))
    pool = pool_examples(data.dataset)
    split = pool.splits["train"]
    group_field = no_weights.data.group_field
    groups = read_groups(split, group_field) if group_field else None
    fold_plan = plan_folds(data.dataset, num_folds, no_weights.data.split_seed, groups)
    usage = "scored" if fold_plan.num_folds == HOLD_OUT else f"in {fold_plan.num_folds} folds"
    num_classes = len(pool.class_names)
    log.info(f"data: {pool.name}, {num_classes} classes, {split.count:,} examples {usage} ({fold_plan.reason})")
    # The cluster of an empty environment is a single worker, which has no connections.
    control = ControlChannel(discover(environment={}), connections={})
    _, num_replicas = choose_devices(no_weights.runtime, num_workers=1)
    num_train = len(fold_plan.get_indices(0)[0])
    config, reasons = resolve_auto(no_weights, num_train, num_classes, detect_device(), num_replicas=num_replicas)
    for reason in reasons:
        log.info(reason)
    config, _ = limit_batch_size(config, num_train, num_replicas)
    worker = Worker(control, build_strategy(config, control, log.info, count_usable_cpus()), stop)
    stop.install()  # a second time after its constructor, because TensorFlow replaces the signal handlers
    machine = f"{detect_device().describe(num_replicas)}, {count_usable_cpus()} cores ({platform.machine()})"
    return Comparison(config, replace(data, dataset=pool), fold_plan, worker, machine, output)


def _open_images(comparison: Comparison, size: int) -> ImageStore:
    """Open the pooled examples as images of `size` x `size` pixels."""
    return ImageStore(comparison.data, comparison.config, size, comparison.worker.stop.check)


def _evaluate_backbone(comparison: Comparison, label: str, model: Model, images: ImageStore) -> EvaluatedBackbone:
    """Read a backbone's stored results, and compute the missing ones. Times from another machine are measured again."""
    worker, dataset, fold_plan = comparison.worker, comparison.data.dataset, comparison.fold_plan
    config = comparison.config.model_copy(update={"model": model})
    folder = comparison.output / RESULTS / make_folder_name(model.backbone, _make_cache_key(comparison, config))
    result_folder = ResultFolder(folder, dataset.splits["train"].count, len(dataset.class_names))
    stored_results = [result_folder.read_fold(fold) for fold in range(fold_plan.num_folds)]
    measurements: Measurements | None = result_folder.read_measurements()
    if measurements is not None and measurements.machine != comparison.machine:
        measurements = None
    if measurements is not None and all(stored_results):
        log.info(f"  read from {folder}, computed before")
        return EvaluatedBackbone(label, [result for result in stored_results if result], measurements)
    with worker.strategy.scope():
        classifier = build_classifier(model, len(dataset.class_names), config.seed)
    backbone = open_backbone(config, worker, images, classifier)
    labels = dataset.splits["train"].labels
    results: list[FoldResult] = []
    for fold, stored_result in enumerate(stored_results):
        health.set_activity(f"{label}, fold {fold + 1} of {fold_plan.num_folds}")
        result = stored_result
        if result is None:
            result = train_and_score_fold(backbone, fold_plan, fold)
            result_folder.write_fold(fold, result)
        accuracy = (result.predictions == labels[result.indices]).mean()
        log.info(f"  fold {fold + 1} of {fold_plan.num_folds}: accuracy {accuracy:.4f}")
        results.append(result)
    if measurements is None:
        measurements = measure_size_and_speed(backbone, comparison.machine)
        result_folder.write_measurements(measurements)
    return EvaluatedBackbone(label, results, measurements)


def _make_cache_key(comparison: Comparison, config: RunConfig) -> Mapping[str, Any]:
    """Return everything that a backbone's predictions depend on. A weights file is represented by its checksum.

    The names of the entries are part of the hash in the name of the backbone's folder, so that they must not change.
    """
    dataset = comparison.data.dataset
    weights_file = _find_local_weights(config.model)
    weights = config.model.weights if weights_file is None else f"{compute_file_crc32c(weights_file):08x}"
    return {
        "data": dataset.fingerprint, "classes": list(dataset.class_names), "orientation": config.data.orientation,
        "folds": hashlib.sha256(comparison.fold_plan.fold_of_example.tobytes()).hexdigest(),
        "window": config.data.shuffle_window,
        "model": config.model.model_dump(mode="json")
        | {"weights": weights, "image_size": find_image_size(config.model)},
        "phases": {name: phase.model_dump(mode="json") for name, phase in config.phases.items()},
        "training": config.training.model_dump(mode="json"), "seed": config.seed, "debug": config.debug.max_steps,
        "precision": config.runtime.precision, "deterministic": config.runtime.deterministic,
        "replicas": comparison.worker.replicas, "tensorflow": tf.__version__,
    }  # fmt: skip
