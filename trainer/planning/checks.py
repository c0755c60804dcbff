"""Dry-run checks of a remote dataset, output_dir, warm start and teacher. They raise the errors that a run would."""

import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.distillation import Distillation
from trainer.config.model import Model
from trainer.config.schema import RequestedConfig, RunConfig
from trainer.data.open import get_display_names, get_ordered_display_names, reorder_classes, require_mapped_classes
from trainer.data.splits import RawData, compute_split_sizes
from trainer.data.tfds import resolve_splits, select_missing_fractions
from trainer.distillation import teacher_files
from trainer.distillation.own_teacher import locate_teacher
from trainer.distillation.teacher import load_saved_model_teacher
from trainer.errors import DataError, TrainerError
from trainer.models.classifier import Classifier, build_classifier, count_variable_bytes
from trainer.names import normalize_class_name
from trainer.planning.estimates import MemoryUses, count_model_parameters, estimate_teacher_memory
from trainer.runs.checkpoints import CheckpointFolder, read_pointer, select_inference_weights
from trainer.runs.initial_weights import open_local_checkpoints
from trainer.runs.restore import collect_shapes, match_warm_start, read_warm_start
from trainer.runs.stored_run import disable_pretrained_weights
from trainer.storage.disk import get_free_bytes, make_write_error
from trainer.storage.local import safe_join, temporary_file
from trainer.storage.path import ObjectInfo, storage_path
from trainer.storage.small_files import read_json, require_json_object
from trainer.storage.staging import describe_skipped_objects, is_remote, make_staging_plan, select_missing
from trainer.training import variables
from trainer.types import Dataset, Split


@contextmanager
def download_to_temporary_folder(address: str, files: Iterable[ObjectInfo]) -> Iterator[str]:
    """Context manager that downloads `files` to a temporary folder with the same base name as `address`.

    It yields the path of that folder. A plan downloads the metadata of a TFDS folder with it.
    """
    with tempfile.TemporaryDirectory() as temporary_dir:
        folder = Path(temporary_dir) / storage_path(address).name
        folder.mkdir()
        for file in files:
            file.path.download(safe_join(folder, file.path.name), expected=file)
        yield str(folder)


def build_dataset_from_metadata(config: RequestedConfig, root: str) -> Dataset:
    """Build the dataset of `root`, a TFDS folder in a bucket, from its metadata, without downloading examples.

    Class names and counts are correct, but all labels are 0 and the fingerprint is empty.

    Raises:
        DataError: `root` is not a TFDS folder, or lacks a configured split or class.
    """
    import tensorflow_datasets as tfds

    data = config.data
    infos = storage_path(root).list(recursive=False)
    metadata_files = [info for info in infos if str(info.path).endswith((".json", ".txt"))]
    with download_to_temporary_folder(root, metadata_files) as folder:
        try:
            info = tfds.builder_from_directory(folder).info
            source_class_names = tuple(map(normalize_class_name, info.features[data.label_field].names))
        except Exception as error:  # TFDS does not translate the exceptions of its parsers
            problem = f"is not a readable TFDS folder: {(str(error) or type(error).__name__).splitlines()[0]}"
            raise DataError(problem, key="data.root", value=root, fix="prepare it again, or set data.source") from None
    require_mapped_classes(source_class_names, data)
    raw_data = RawData(info.name, get_display_names(source_class_names, data), splits={}, identities={})
    class_names = reorder_classes(raw_data, get_ordered_display_names(data)).class_names
    shards = {name: tuple(ranges) for name, ranges in resolve_splits(info, data)[1].items()}
    counts = {name: sum(shard.stop - shard.start for shard in ranges) for name, ranges in shards.items()}
    split_off_counts = compute_split_sizes(counts["train"], select_missing_fractions(data, counts))
    counts |= split_off_counts | {"train": counts["train"] - sum(split_off_counts.values())}
    if config.debug.max_examples:
        counts = {name: min(count, config.debug.max_examples) for name, count in counts.items()}
    splits = {
        name: Split(name, labels=np.zeros(count, np.int32), shards=shards.get(name, shards["train"]))
        for name, count in counts.items()
    }
    return Dataset(info.name, class_names, splits, fingerprint="")


def plan_staging(address: str, cache: Path, budget: int) -> tuple[str | None, str, list[ObjectInfo]]:
    """Describe the local copy of an address in a bucket, without downloading anything.

    Args:
        address: a file, folder or pattern in a bucket.
        cache: cache folder of the copies.
        budget: maximum total size of the files in bytes.

    Returns:
        The local path that replaces the address, or None if a run would first fetch files; a one-line summary; and all
        files in the bucket that match the address.

    Raises:
        DataError: the address does not exist, cannot be read, or exceeds the budget.
    """
    local_copy = make_staging_plan(address, cache, budget)
    missing = select_missing(local_copy.folder, local_copy.infos)
    files = list(local_copy.infos.values())
    suffix = f"; {describe_skipped_objects(local_copy.skipped_objects)}" if local_copy.skipped_objects else ""
    if not missing:
        return local_copy.path, f"{address}: is in {local_copy.folder} already{suffix}", files
    size = sum(file.size for file in missing.values())
    line = f"{address}: would fetch {len(missing):,} files, {size / 1e6:,.1f} MB, to {local_copy.folder}{suffix}"
    return None, line, files


def read_newest_state(config: RequestedConfig) -> dict[str, Any] | None:
    """Return the state of the newest checkpoint in output_dir, or None if there is no checkpoint.

    In a local folder, corrupt checkpoints are skipped. In a bucket, only the newest checkpoint is read.

    Raises:
        DataError: in a bucket, LATEST or the state is corrupt.
    """
    folder = storage_path(config.output_dir or "")
    if folder.is_local:
        checkpoints = CheckpointFolder(Path(str(folder)) / "checkpoints", keep=1, log_message=lambda _: None)
        for step in reversed(checkpoints.list_steps()):
            with suppress(DataError):
                return checkpoints.read(step)[0]
        return None
    names = read_pointer(folder / "checkpoints" / "LATEST")
    if not names:
        return None
    return read_json(folder / "checkpoints" / names[0] / "state.json", require_json_object, fix="")


def check_output_writable(config: RequestedConfig) -> str:
    """Check that output_dir is writable by writing and deleting a small file; return a one-line summary.

    If a local output_dir does not exist, the file is written to its nearest existing ancestor.

    Raises:
        TrainerError: the file cannot be written.
    """
    name = f".probe-{uuid.uuid4().hex[:12]}"
    address = config.output_dir or "outputs"
    if is_remote(address):
        probe = storage_path(address) / name
        try:
            probe.write("probe", only_if=None)
            probe.delete()
        except TrainerError as error:
            error.problem = error.problem.replace(str(probe), address)
            raise
        return f"{address}: a probe was written and deleted"
    folder = Path(address).expanduser()
    ancestor = next(path for path in (folder, *folder.parents, Path()) if path.exists())
    try:
        with temporary_file(ancestor / "probe") as file:
            file.write_bytes(b"probe")
    except OSError as error:
        raise make_write_error(error, folder, "output_dir", "use a folder that this process may write to") from None
    free_bytes = get_free_bytes(ancestor)
    location_note = "" if ancestor == folder else f" in {ancestor.resolve()}, since the folder does not exist yet"
    return f"{folder}: a probe was written and deleted{location_note}; {free_bytes / 1e9:,.1f} GB free"


def describe_warm_start(address: str) -> str:
    """Describe in one line the checkpoints at an address, the value of `warm_start`.

    Raises DataError if there are none.
    """
    if is_remote(address):
        if not (storage_path(address) / "checkpoints" / "LATEST").exists():
            raise DataError(
                "there is no checkpoint", key="warm_start", value=address, fix="use the output_dir of a run"
            )
        return f"{address}: has a committed checkpoint"
    steps = open_local_checkpoints(address, Path(address).expanduser()).list_steps()
    return f"{address}: has checkpoints at steps {', '.join(f'{step:,}' for step in steps[-3:])}"


def match_local_warm_start(config: RunConfig, classifier: Classifier) -> str:
    """Match a local warm start against the model; return the warning that a run would log, or "" if there is none.

    A warm start in a bucket is not checked, because that would download the checkpoint.

    Raises:
        DataError: the checkpoint cannot be read, or does not fit the backbone.
    """
    address = config.warm_start
    if not address or is_remote(address):
        return ""
    checkpoint_weights = select_inference_weights(read_warm_start(address, config.runtime.cache_folder)[1])
    return match_warm_start(collect_shapes(classifier.variables), collect_shapes(checkpoint_weights), address)[1]


def check_teacher(address: str, class_names: tuple[str, ...] | None) -> teacher_files.TeacherFiles:
    """Return the description of a teacher's files, and check its classes.

    Args:
        address: the teacher's address, the value of `distillation.teacher`.
        class_names: the dataset's class names; None if they are unknown, so that the classes are not checked.

    Raises:
        DataError: there is no usable teacher at the address, or it has other classes than the dataset.
        ConfigError: the config.yaml of the teacher's run is not valid in this version.
    """
    teacher = teacher_files.describe_teacher(address)
    if class_names is not None:
        teacher_files.check_classes(address, teacher.classes, class_names)
    return teacher


def check_and_estimate_teacher(
    config: RunConfig, distillation: Distillation, dataset: Dataset, *, micro_batch_size: int, num_replicas: int,
    untrained_model: Model | None = None,
) -> tuple[str, MemoryUses]:  # fmt: skip
    """Check the teacher as a run does, but without downloading weights, and estimate its memory.

    Args:
        config: configuration of the student's run.
        distillation: its section `distillation`.
        dataset: the dataset that the student is trained on.
        micro_batch_size: number of examples that a replica processes in one forward pass.
        num_replicas: number of replicas on this worker.
        untrained_model: section `model` of a teacher that would be trained first, so that it has no files yet; None for
            an existing teacher.

    Returns:
        A one-line description of the teacher, and its uses of memory on this worker, as (label, bytes) pairs.

    Raises:
        DataError: the teacher is missing or corrupt, has other classes than the dataset, or is a different one than
            the resumed run began with.
        ConfigError: the config.yaml of the teacher's run is not valid in this version.
        ModelError: the teacher's network cannot be built.
    """
    address = locate_teacher(distillation.teacher, str(config.output_dir))
    teacher: teacher_files.TeacherFiles | None = None
    if untrained_model is None:
        teacher = check_teacher(address, dataset.class_names)
        state = read_newest_state(config) if config.output_dir else None
        recorded_fingerprint = state.get("teacher") if state else None
        teacher_files.check_same_teacher(str(config.output_dir), recorded_fingerprint, teacher.fingerprint)
    predicts_every_step = config.augmentation.active
    num_train = dataset.splits["train"].count
    estimate = partial(
        estimate_teacher_memory,
        every_step=predicts_every_step,
        num_examples=micro_batch_size,
        num_replicas=num_replicas,
        num_label_values=num_train * len(dataset.class_names),
        precision=config.runtime.precision,
    )
    usage = "predicts in every step" if predicts_every_step else f"predicts once, for {num_train:,} training images"
    if teacher and teacher.model is None:
        if not is_remote(address):
            load_saved_model_teacher(Path(str(teacher.home)), address)  # checks its signature
        weights_bytes = sum(size for name, size in teacher.bytes_by_file.items() if name.startswith("variables/"))
        return f"a SavedModel, {weights_bytes / 1e6:,.1f} MB of weights; {usage}", estimate(weights_bytes, None)
    model = teacher.model if teacher else untrained_model
    assert model is not None, "an untrained teacher, or one with a checkpoint, has a section `model`"
    model = disable_pretrained_weights(model)
    classifier = build_classifier(model, len(dataset.class_names), config.seed)
    if teacher and not is_remote(address):  # the weights of a teacher in a bucket would have to be downloaded
        weights = teacher_files.read_weights(teacher)
        variables.assign_values(classifier.variables, weights, f"distillation.teacher={address}")
    text = f"{model.backbone} at {classifier.image_size} px, {count_model_parameters(classifier):,} parameters; {usage}"
    return text, estimate(count_variable_bytes(classifier.variables.values()), classifier)
