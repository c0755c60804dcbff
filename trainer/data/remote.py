"""Copy the dataset and weights of a configuration from buckets to the local disk.

Messages to the user show the addresses in the buckets instead of the paths of the local copies.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from trainer.config.schema import Data, RequestedConfig, Runtime
from trainer.data.csv_source import plan_copies
from trainer.data.tfds_folder import INFO_FILE, LABELS_FILE, MANIFEST_FILE, METADATA_FILES, parse_manifest
from trainer.errors import DataError, TrainerError, format_count
from trainer.names import escape_unprintable
from trainer.storage.base import ObjectInfo
from trainer.storage.disk import choose_disk_budget
from trainer.storage.path import storage_path
from trainer.storage.shard_cache import ShardCache
from trainer.storage.staging import (
    download_missing_files,
    find_prepared_folder,
    get_staged_and_source_folder,
    has_wildcard,
    is_remote,
    stage,
)
from trainer.types import LogMessage


def resolve_addresses(data: Data) -> tuple[Data, str | None]:
    """Locate the dataset data.name if data.data_dir is in a bucket, and decide whether shards can be streamed.

    Returns:
        The settings, with data.root instead of data.data_dir if data.data_dir is in a bucket; and the bucket folder
        whose shards can be fetched while they are read. The folder is None for a local dataset and for sources other
        than tfds. It is also None with data.group_field or data.corrections, because these need groups or file names
        before training, and only the records store them.

    Raises:
        DataError: data.data_dir does not contain the dataset data.name or its version, or the bucket denies access.
    """
    if is_remote(data.data_dir) and data.name:
        folder = find_prepared_folder(str(data.data_dir), data.name)
        data = data.model_copy(update={"root": folder, "data_dir": None})
    can_stream = data.source == "tfds" and is_remote(data.root) and not (data.group_field or data.corrections)
    return data, str(data.root).rstrip("/") if can_stream else None


def fetch_local_copies(
    config: RequestedConfig, log_message: LogMessage, check_stop: Callable[[str], None], stream: bool = False
) -> tuple[RequestedConfig, dict[str, str], ShardCache | None]:
    """Copy the dataset and weights of a configuration from buckets to the local disk.

    Args:
        check_stop: called repeatedly with an address while its files are fetched; can raise an exception to cancel.
        stream: whether to leave the shards of a prepared dataset in the bucket, if `resolve_addresses` permits it.

    Returns:
        The configuration with local paths; local folder -> the bucket folder that it is a copy of; and the cache that
        fetches shards while they are read, or None if all files are local.

    Raises:
        DataError: nothing exists at an address, its files exceed the disk budget or cannot be local files, a shard
            differs from its manifest, or the CSV file of data.source=csv is invalid.
        Interrupted: a bucket does not respond.
        OSError: a local copy cannot be written.
    """
    runtime = config.runtime
    addresses: dict[str, str] = {}

    def copy_to_disk(address: str | None) -> str | None:
        """Copy the files at a bucket address, and return their local path. Return any other path unchanged."""
        if not address or not is_remote(address):
            return address
        budget, _ = choose_disk_budget(runtime.disk_budget, runtime.cache_folder)
        path = stage(address, runtime.cache_folder, budget, log_message, partial(check_stop, address))
        folder, bucket_folder = get_staged_and_source_folder(path, address, runtime.cache_folder)
        addresses[folder] = bucket_folder
        return path

    data, streamed_folder = resolve_addresses(config.data)
    cache = _open_shard_cache(streamed_folder, runtime, log_message, check_stop) if stream and streamed_folder else None
    if streamed_folder and cache:
        addresses[str(cache.folder)] = streamed_folder
        data = data.model_copy(update={"root": str(cache.folder)})
    if data.source == "csv":
        budget, _ = choose_disk_budget(runtime.disk_budget, runtime.cache_folder)
        data, copies = plan_copies(data, runtime.cache_folder, budget)
        for copy in copies:
            copy.delete_stale_copies()
            download_missing_files(
                copy.bucket, copy.objects, copy.folder, log_message, partial(check_stop, copy.bucket)
            )
            addresses[str(copy.folder)] = copy.bucket
    data = data.model_copy(update={key: copy_to_disk(getattr(data, key)) for key in ("root", "pattern")})
    if class_names_address := _find_class_names_file(config.data):
        copy_to_disk(class_names_address)
    model = config.model.model_copy(update={"weights": copy_to_disk(config.model.weights)})
    return config.model_copy(update={"data": data, "model": model}), addresses, cache


def _find_class_names_file(data: Data) -> str | None:
    """Return the address of the file with class names in data.pattern's bucket folder.

    Return None if this file does not exist, data.pattern is not in a bucket, or labels are not indices from 0.
    """
    if data.source != "tfrecords" or data.label_kind != "index" or not is_remote(data.pattern):
        return None
    folder = str(data.pattern).rpartition("/")[0]
    names_file = storage_path(f"{folder}/{data.label_field}.labels.txt")
    return str(names_file) if not has_wildcard(folder) and names_file.exists() else None


def replace_local_paths(text: str, addresses: Mapping[str, str]) -> str:
    """Replace the paths of local copies in a text by bucket addresses, whether or not they are escaped for display.

    `addresses` maps each local folder to the bucket folder that it is a copy of.
    """
    for path, address in addresses.items():
        text = text.replace(path, address).replace(escape_unprintable(path), escape_unprintable(address))
    return text


@contextmanager
def show_addresses_in_errors(addresses: Mapping[str, str]) -> Iterator[None]:
    """Context manager that replaces the paths of local copies by bucket addresses in a `TrainerError` that it raises.

    `addresses` maps each local folder to the bucket folder that it is a copy of.
    """
    try:
        yield
    except TrainerError as error:
        error.problem = replace_local_paths(error.problem, addresses)
        if isinstance(error.value, str | Path):
            error.value = replace_local_paths(str(error.value), addresses)
        error.fix = replace_local_paths(error.fix, addresses) if error.fix else None
        raise


@dataclass(frozen=True)
class PreparedFiles:
    """The shards and metadata files in a bucket folder that `python -m trainer.prepare` wrote, by file name."""

    shards: dict[str, ObjectInfo]
    metadata: dict[str, ObjectInfo]


def find_prepared_files(address: str) -> PreparedFiles | None:
    """Return the files of the dataset that `python -m trainer.prepare` wrote to a bucket folder.

    Return None if the manifest, the labels file or dataset_info.json is missing.

    Raises:
        DataError: a shard is missing, or its size or checksum differs from the manifest.
        Interrupted: the bucket does not respond.
    """
    files = {info.path.name: info for info in storage_path(address).list(recursive=False)}
    if not {MANIFEST_FILE, LABELS_FILE, INFO_FILE} <= files.keys():
        return None
    manifest = parse_manifest(files[MANIFEST_FILE].path.read())
    for shard in manifest.values():
        info = files.get(shard.file)
        if info is None:
            raise DataError(f"{address}/{escape_unprintable(shard.file)} is missing", fix="prepare the dataset again")
        if info.size != shard.bytes or (info.crc32c is not None and f"{info.crc32c:08x}" != shard.crc32c):
            raise DataError(
                f"{address}/{escape_unprintable(shard.file)} differs from {MANIFEST_FILE}",
                fix="prepare the dataset again",
            )
    metadata = {name: files[name] for name in (*METADATA_FILES, MANIFEST_FILE, LABELS_FILE) if name in files}
    return PreparedFiles({name: files[name] for name in manifest}, metadata)


def _open_shard_cache(
    address: str, runtime: Runtime, log_message: LogMessage, check_stop: Callable[[str], None]
) -> ShardCache | None:
    """Fetch the metadata of a prepared bucket folder, and return a cache for its shards; None if it is not prepared."""
    prepared = find_prepared_files(address)
    if prepared is None:
        return None
    cache_folder = runtime.cache_folder
    check_address = partial(check_stop, address)
    budget, _ = choose_disk_budget(runtime.disk_budget, cache_folder)
    cache = ShardCache(address, prepared.shards, cache_folder, budget, log_message, check_address, prepared.metadata)
    download_missing_files(address, prepared.metadata, cache.folder, log_message, check_address)
    log_message(f"{address}: {describe_shards(prepared, budget)}, to {cache.folder}")
    return cache


def describe_shards(prepared: PreparedFiles, budget: int) -> str:
    """Describe the number and size of the shards, and their maximum size on disk, which is at most `budget` bytes."""
    num_bytes = sum(info.size for info in prepared.shards.values())
    subject = format_count(len(prepared.shards), "shard")
    disk_limit = f"{min(num_bytes, budget) / 1e6:,.1f} MB at most on disk"
    return f"{subject}, {num_bytes / 1e6:,.1f} MB, are fetched while they are used, {disk_limit}"
