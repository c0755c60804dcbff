"""Write a configured dataset as sharded TFRecords in TFDS's folder format, in one or several pods."""

import os
from collections.abc import Mapping, Sequence

import numpy as np

from trainer.config.schema import RequestedConfig
from trainer.config.typed import format_argument
from trainer.data.host import count_usable_cpus
from trainer.data.open import open_dataset
from trainer.data.records import SOURCE_FIELD, locate_records, read_source_name
from trainer.data.remote import fetch_local_copies, replace_local_paths, show_addresses_in_errors
from trainer.data.tfds_writer import ImageSource, LabeledImages, WriteOptions, write_dataset
from trainer.errors import ConfigError, format_count
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.monitoring.progress import show_image_progress
from trainer.names import escape_unprintable
from trainer.storage.path import storage_path
from trainer.types import Split


def prepare(config: RequestedConfig, output: str, part: tuple[int, int] = (0, 1)) -> None:
    """Write a configuration's dataset to a folder. A restart writes only the shards that are missing.

    Args:
        output: the folder, local or in a bucket.
        part: (i, n) to write shards i, i + n, i + 2n, ... The process that completes the dataset writes the metadata.

    Raises:
        ConfigError: data.group_field would overwrite the image or label of the records.
        DataError: the data cannot be read, an image cannot be decoded and data.on_error is "fail", or `output` contains
            other files or cannot be written to.
        Interrupted: a bucket does not respond, or the disk of `output` is full or fails.
        OSError: a shard cannot be written.
    """
    group_field = config.data.group_field
    if group_field in ("image", "label") and group_field != config.data.label_field:
        problem, fix = "is the name under which records store the image or the label", "set another field"
        raise ConfigError(problem, key="data.group_field", value=group_field, fix=fix)
    cache_dir, max_examples = config.runtime.cache_folder, config.debug.max_examples
    local_config, addresses, _ = fetch_local_copies(config, log.info, lambda _address: health.record_progress())
    data = local_config.data
    with show_addresses_in_errors(addresses):
        dataset = open_dataset(
            data, seed=config.seed, cache_dir=cache_dir, max_examples=max_examples, log_message=log.info,
            purpose="prepare",
        )  # fmt: skip
    splits: dict[str, list[tuple[ImageSource, int]]] = {}
    text_fields: dict[str, dict[str, list[str]]] = {}  # field -> split -> text of each example
    for name, split in dataset.splits.items():  # shuffled, so that each shard has examples of all classes
        order = np.random.default_rng([data.split_seed, split.count]).permutation(split.count)
        sources: Sequence[ImageSource] = split.files or locate_records(split)
        splits[name] = [(sources[i], int(split.labels[i])) for i in order]
        if split.groups and group_field and group_field != "label":  # records store the label in any case
            text_fields.setdefault(group_field, {})[name] = [split.groups[i] for i in order]
        root = os.path.dirname(data.root or "") if data.source == "csv" else data.root
        if group_field != SOURCE_FIELD and (source_names := list_source_names(split, root)):
            text_fields.setdefault(SOURCE_FIELD, {})[name] = [
                replace_local_paths(source_names[i], addresses) for i in order
            ]
    num_threads = config.runtime.data_threads or count_usable_cpus()
    options = WriteOptions(
        data.shards, num_threads, on_error=data.on_error, scratch=cache_dir / "prepared", part=part,
        orientation=data.orientation,
    )  # fmt: skip
    output_path = storage_path(output)
    images = LabeledImages(dataset.name, dataset.class_names, splits, text_fields)
    with show_image_progress(config.runtime.progress) as progress, show_addresses_in_errors(addresses):
        entries = write_dataset(output_path, images, options, progress)
    if entries is None:
        summary = f"part {part[0] + 1} of {part[1]} is written; the last part to end writes the metadata"
    else:
        for error in [*dataset.skipped, *(error for entry in entries for error in entry.skipped)]:
            log.info(f"skipped {replace_local_paths(error, addresses)}")
        # JPEG and PNG images are stored with their EXIF data, so training must ignore it too.
        orientation_argument = " data.orientation=ignore" if data.orientation == "ignore" else ""
        summary = (
            f"{output_path} holds {sum(e.count for e in entries)} images of {len(dataset.class_names)} classes in "
            f"{format_count(len(entries), 'shard')} ({sum(e.bytes for e in entries) / 2**20:.1f} MB); train on it: "
            f"python -m trainer data=tfds {format_argument('data.root', output_path)}{orientation_argument}"
        )
    log.info(summary)
    termination.set_success_message(summary)


def list_source_names(split: Split, root: str | None) -> list[str]:
    """Return the image file name of each example in a split, escaped for display.

    The name of an image file is its path, relative to `root` if the file is below it, else absolute. `root` defaults to
    the current folder. The name of a record is the file name that the record stores. If any record stores no name, the
    result is [].
    """
    if split.files:
        root_path = os.path.abspath(os.path.expanduser(root or ""))
        paths = [os.path.abspath(path) for path in split.files]
        relative_paths = [os.path.relpath(path, root_path) for path in paths]
        names = [
            path if relative.startswith(f"..{os.sep}") else relative
            for path, relative in zip(paths, relative_paths, strict=True)
        ]
        return list(map(escape_unprintable, names))
    names = [read_source_name(record) for record in locate_records(split)]
    return names if all(names) else []


def parse_job_part(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return this pod's index in a Kubernetes Indexed Job, and the number of pods.

    They are read from the variables JOB_COMPLETION_INDEX, which defaults to 0, and WORKER_COUNT, which defaults to 1.

    Raises:
        ConfigError: a variable is not a whole number, or the index is not less than the number of pods.
    """
    variables = {key: environment.get(key) or str(n) for key, n in (("JOB_COMPLETION_INDEX", 0), ("WORKER_COUNT", 1))}
    for key, value in variables.items():
        if not value.strip().isdecimal():
            raise ConfigError("is not a whole number", key=key, value=value, fix="set a whole number in the manifest")
    index, num_pods = map(int, variables.values())
    if index >= num_pods:
        problem, fix = f"is not in 0..{num_pods - 1}", "set WORKER_COUNT to the completions of the Job"
        raise ConfigError(problem, key="JOB_COMPLETION_INDEX", value=index, fix=fix)
    return index, num_pods
