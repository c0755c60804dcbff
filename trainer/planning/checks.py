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
def fetch_metadata(address: str, files: Iterable[ObjectInfo]) -> Iterator[str]:
    """Context manager that downloads `files` to a temporary folder with the same base name as `address`.

    It yields the path of the temporary folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / storage_path(address).name
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
    files = [f for f in storage_path(root).list(recursive=False) if str(f.path).endswith((".json", ".txt"))]
    with fetch_metadata(root, files) as folder:
        try:
            info = tfds.builder_from_directory(folder).info
            source_class_names = tuple(map(normalize_class_name, info.features[data.label_field].names))
        except Exception as error:  # TFDS does not translate the exceptions of its parsers
            problem = f"is not a readable TFDS folder: {(str(error) or type(error).__name__).splitlines()[0]}"
            raise DataError(problem, key="data.root", value=root, fix="prepare it again, or set data.source") from None
    require_mapped_classes(source_class_names, data)
    raw_data = RawData(info.name, get_display_names(source_class_names, data), {}, {})
    class_names = reorder_classes(raw_data, get_ordered_display_names(data)).class_names
    shards = {name: tuple(ranges) for name, ranges in resolve_splits(info, data)[1].items()}
    counts = {name: sum(s.stop - s.start for s in ranges) for name, ranges in shards.items()}
    split_off_counts = compute_split_sizes(counts["train"], select_missing_fractions(data, counts))
    counts |= split_off_counts | {"train": counts["train"] - sum(split_off_counts.values())}
    if config.debug.max_examples:
        counts = {name: min(count, config.debug.max_examples) for name, count in counts.items()}
    splits = {n: Split(n, np.zeros(c, np.int32), shards=shards.get(n, shards["train"])) for n, c in counts.items()}
    return Dataset(info.name, class_names, splits, fingerprint="")


def plan_staging(address: str, cache: Path, budget: int) -> tuple[str | None, str, list[ObjectInfo]]:
    """Describe the local copy of an address in a bucket, without downloading anything.

    Args:
        cache: cache folder of the copies.
        budget: maximum total size of the files in bytes.

    Returns:
        The local path that replaces the address, or None if a run would first fetch files; a one-line summary; and all
        files in the bucket that match the address.

    Raises:
        DataError: the address does not exist, cannot be read, or exceeds the budget.
    """
    local_copy = make_staging_plan(address, cache, budget)
    missing, files = select_missing(local_copy.folder, local_copy.infos), list(local_copy.infos.values())
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
        checkpoints = CheckpointFolder(Path(str(folder)) / "checkpoints", 1, lambda _: None)
        for step in reversed(checkpoints.list_steps()):
            with suppress(DataError):
                return checkpoints.read(step)[0]
        return None
    names = read_pointer(folder / "checkpoints" / "LATEST")
    return read_json(folder / "checkpoints" / names[0] / "state.json", require_json_object, "") if names else None


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


def describe_warm_start(run: str) -> str:
    """Describe in one line the checkpoints of `run`, the value of `warm_start`; raise a DataError if there are none."""
    if is_remote(run):
        if not (storage_path(run) / "checkpoints" / "LATEST").exists():
            raise DataError("there is no checkpoint", key="warm_start", value=run, fix="use the output_dir of a run")
        return f"{run}: has a committed checkpoint"
    steps = open_local_checkpoints(run, Path(run).expanduser()).list_steps()
    return f"{run}: has checkpoints at steps {', '.join(f'{step:,}' for step in steps[-3:])}"


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


def check_teacher(address: str, classes: tuple[str, ...] | None) -> teacher_files.TeacherFiles:
    """Return the description of a teacher's files, and check its classes.

    Args:
        classes: the dataset's class names; None if they are unknown, so that the classes are not checked.

    Raises:
        DataError: there is no usable teacher at the address, or it has other classes than the dataset.
        ConfigError: the config.yaml of the teacher's run is not valid in this version.
    """
    files = teacher_files.describe_teacher(address)
    if classes is not None:
        teacher_files.check_classes(address, files.classes, classes)
    return files


def plan_teacher(
    config: RunConfig, distillation: Distillation, dataset: Dataset, num_examples: int, replicas: int,
    trained_first: Model | None = None,
) -> tuple[str, MemoryUses]:  # fmt: skip
    """Check the teacher as a run does, but without downloading weights, and estimate its memory.

    Args:
        num_examples: number of examples that a replica processes in one forward pass.
        replicas: number of replicas on this worker.
        trained_first: model configuration of a teacher that the run trains first, so that it has no files yet; None
            for an existing teacher.

    Returns:
        A one-line description, and the teacher's memory usage on this worker, as (label, bytes) pairs.

    Raises:
        DataError: the teacher is missing or corrupt, has other classes, or is not the teacher of the run's first start.
        ConfigError: the config.yaml of the teacher's run is not valid in this version.
        ModelError: the teacher's network cannot be built.
    """
    address, files = locate_teacher(distillation.teacher, str(config.output_dir)), None
    if trained_first is None:
        files = check_teacher(address, dataset.class_names)
        state = read_newest_state(config) if config.output_dir else None
        teacher_files.check_same_teacher(
            str(config.output_dir), state.get("teacher") if state else None, files.fingerprint
        )
    predicts_every_step, count = config.augmentation.active, dataset.splits["train"].count
    estimate = partial(
        estimate_teacher_memory,
        every_step=predicts_every_step,
        num_examples=num_examples,
        replicas=replicas,
        num_label_values=count * len(dataset.class_names),
        precision=config.runtime.precision,
    )
    usage = "predicts in every step" if predicts_every_step else f"predicts once, for {count:,} training images"
    if files and files.model is None:
        if not is_remote(address):
            load_saved_model_teacher(Path(str(files.home)), address)  # checks its signature
        size = sum(size for name, size in files.files.items() if name.startswith("variables/"))
        return f"a SavedModel, {size / 1e6:,.1f} MB of weights; {usage}", estimate(size, None)
    network = files.model if files else trained_first
    assert network is not None, "a teacher with files is a checkpoint here"
    model = disable_pretrained_weights(network)
    classifier = build_classifier(model, len(dataset.class_names), config.seed)
    if files and not is_remote(address):
        variables.assign_values(
            classifier.variables, teacher_files.read_weights(files), f"distillation.teacher={address}"
        )
    text = f"{model.backbone} at {classifier.image_size} px, {count_model_parameters(classifier):,} parameters; {usage}"
    return text, estimate(count_variable_bytes(classifier.variables.values()), classifier)
