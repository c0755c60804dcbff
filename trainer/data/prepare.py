"""Any data that a run can read, written as sharded TFRecords in TFDS's folder format."""

from collections.abc import Mapping

import numpy as np

from trainer.config.schema import RequestedConfig
from trainer.data.host import usable_cpus
from trainer.data.open import open_dataset
from trainer.data.records import RecordAt, index_shard
from trainer.data.remote import local_copies
from trainer.data.tfds_writer import ImageSource, LabelledImages, WriteOptions, write_dataset
from trainer.errors import ConfigError
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.monitoring.progress import written_images
from trainer.storage.path import storage_path
from trainer.types import Split


def prepare(config: RequestedConfig, output: str, part: tuple[int, int] = (0, 1)) -> None:
    """Write the dataset that the configuration names into `output`; started again it goes on where it stopped.

    Of `part` (i, n) only every n-th shard is written; the part that finds all shards there finishes the dataset.

    Raises:
        DataError: the data cannot be read, an image cannot be decoded (data.on_error=fail), or `output` is taken.
    """
    field = config.data.group_field
    if field in ("image", "label") and field != config.data.label_field:
        raise ConfigError(f"data.group_field={field}: prepared records call the image image and the class label")
    dataset = open_dataset(
        local_copies(config, log.info, lambda _address: health.progress())[0].data,
        seed=config.seed,
        cache_dir=config.runtime.cache_folder,
        max_examples=config.debug.max_examples,
        note=log.info,
        all_groups=field is not None,
    )
    splits, groups = {}, {}
    for name, split in dataset.splits.items():  # shuffled, so that each shard holds every class
        order = np.random.default_rng([config.data.split_seed, split.count]).permutation(split.count)
        splits[name] = _examples(split, order)
        groups[name] = [split.groups[i] for i in order] if split.groups else []
    options = WriteOptions(
        shards=config.data.shards,
        workers=config.runtime.data_threads or usable_cpus(),
        on_error=config.data.on_error,
        scratch=config.runtime.cache_folder / "prepared",
    )
    target = storage_path(output)
    with written_images(config.runtime.progress) as progress:
        group_field = field if field != "label" else None  # every record has a label, and can be grouped by it
        images = LabelledImages(dataset.name, dataset.class_names, splits, group_field, groups)
        entries = write_dataset(target, images, options, progress=progress, part=part)
    if entries is None:
        _say_at_the_end(f"part {part[0] + 1} of {part[1]} is written; the part that ends last finishes the dataset")
        return
    for fault in [*dataset.skipped, *(fault for entry in entries for fault in entry.skipped)]:
        log.info(f"skipped {fault}")
    _say_at_the_end(
        f"{target} holds {sum(e.count for e in entries)} images of {len(dataset.class_names)} classes in "
        f"{len(entries)} shards ({sum(e.bytes for e in entries) / 2**20:.1f} MB); train on it: python -m trainer "
        f"data=tfds data.root={target}"
    )


def part_of_job(environment: Mapping[str, str]) -> tuple[int, int]:
    """The index of this pod and the number of pods: JOB_COMPLETION_INDEX and WORKER_COUNT of an Indexed Job."""
    try:
        pods = int(environment.get("WORKER_COUNT") or 1)
        index = int(environment.get("JOB_COMPLETION_INDEX") or 0)
    except ValueError:
        raise ConfigError("JOB_COMPLETION_INDEX and WORKER_COUNT must be whole numbers") from None
    if not 0 <= index < pods:
        raise ConfigError(
            f"JOB_COMPLETION_INDEX={index} is none of 0..{pods - 1}: set WORKER_COUNT to the Job's completions"
        )
    return index, pods


def _examples(split: Split, order: np.ndarray) -> list[tuple[ImageSource, int]]:
    sources: list[ImageSource] = list(split.files)
    if not sources:
        index = {path: index_shard(path) for path in {shard.path for shard in split.shards}}
        sources = [
            RecordAt(s.path, n, int(index[s.path].offsets[n]), int(index[s.path].lengths[n]), split.image_field)
            for s in split.shards
            for n in range(s.start, s.stop)
        ]
    return [(sources[i], int(split.labels[i])) for i in order]


def _say_at_the_end(text: str) -> None:
    log.info(text)
    termination.outcome(text)
