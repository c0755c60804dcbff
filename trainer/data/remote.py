"""Copy the dataset and weights of a configuration from buckets to the local disk."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

from trainer.config.schema import Data, RequestedConfig, Runtime
from trainer.data.csv_source import plan_copies
from trainer.data.tfds_folder import INFO, LABELS, MANIFEST, METADATA, parse_manifest
from trainer.errors import DataError, TrainerError
from trainer.names import escape_unprintable
from trainer.storage.base import ObjectInfo
from trainer.storage.disk import choose_disk_budget
from trainer.storage.path import storage_path
from trainer.storage.shard_cache import ShardCache
from trainer.storage.staging import copied_folder, fetch_missing, find_prepared_folder, has_wildcard, is_remote, stage
from trainer.types import LogMessage


def resolve_addresses(data: Data) -> tuple[Data, str | None]:
    """If data.data_dir is in a bucket, set data.root to the prepared folder of data.name there.

    Return also the bucket folder whose shards can be fetched while they are used. It is None for a local dataset, for
    sources other than tfds, and with data.group_field or data.corrections, since only the records store the groups and
    the names of files.
    """
    if is_remote(data.data_dir) and data.name:
        folder = find_prepared_folder(str(data.data_dir), data.name)
        data = data.model_copy(update={"root": folder, "data_dir": None})
    streams = data.source == "tfds" and is_remote(data.root) and not (data.group_field or data.corrections)
    return data, str(data.root).rstrip("/") if streams else None


def fetch_local_copies(
    config: RequestedConfig, log_message: LogMessage, check: Callable[[str], None], stream: bool = False
) -> tuple[RequestedConfig, dict[str, str], ShardCache | None]:
    """Copy the dataset and weights of a configuration from buckets to the local disk.

    Args:
        check: called with an address while it is copied; can raise to stop.
        stream: leave the shards of a prepared dataset in the bucket, where `resolve_addresses` allows it.

    Returns:
        The configuration with local paths; the address of each local folder; and the cache that fetches the shards
        while they are read, None if everything is copied.

    Raises:
        DataError: an address is missing, exceeds the disk budget, or has a shard that differs from its manifest.
        Interrupted: a bucket does not respond.
    """
    runtime = config.runtime
    addresses: dict[str, str] = {}

    def copy_to_disk(address: str | None) -> str | None:
        if not address or not is_remote(address):
            return address
        budget, _ = choose_disk_budget(runtime.disk_budget, runtime.cache_folder)
        path = stage(address, runtime.cache_folder, budget, log_message, partial(check, address))
        folder, bucket_folder = copied_folder(path, address, runtime.cache_folder)
        addresses[folder] = bucket_folder
        return path

    data, address = resolve_addresses(config.data)
    shards = _open_shards(address, runtime, log_message, check) if stream and address else None
    if address and shards:
        addresses[str(shards.folder)] = address
        data = data.model_copy(update={"root": str(shards.folder)})
    if data.source == "csv":
        budget, _ = choose_disk_budget(runtime.disk_budget, runtime.cache_folder)
        data, copies = plan_copies(data, runtime.cache_folder, budget)
        for copy in copies:
            copy.delete_absent()
            fetch_missing(copy.bucket, copy.entries, copy.folder, log_message, partial(check, copy.bucket))
            addresses[str(copy.folder)] = copy.bucket
    data = data.model_copy(update={key: copy_to_disk(getattr(data, key)) for key in ("root", "pattern")})
    if names := _stored_class_names(config.data):
        copy_to_disk(names)
    model = config.model.model_copy(update={"weights": copy_to_disk(config.model.weights)})
    return config.model_copy(update={"data": data, "model": model}), addresses, shards


def _stored_class_names(data: Data) -> str | None:
    """Return the address of the class names next to record files in a bucket; None if there are none."""
    if data.source != "tfrecords" or data.label_kind != "index" or not is_remote(data.pattern):
        return None
    folder = str(data.pattern).rpartition("/")[0]
    names = storage_path(f"{folder}/{data.label_field}.labels.txt")
    return str(names) if not has_wildcard(folder) and names.exists() else None


def with_addresses(text: str, addresses: Mapping[str, str]) -> str:
    """Replace the paths of local copies in a text by the addresses that they are copies of."""
    for path, address in addresses.items():
        text = text.replace(path, address).replace(escape_unprintable(path), escape_unprintable(address))
    return text


@contextmanager
def addresses_in_errors(addresses: Mapping[str, str]) -> Iterator[None]:
    """In errors raised within this context, replace the paths of local copies by their addresses in buckets."""
    try:
        yield
    except TrainerError as error:
        error.problem = with_addresses(error.problem, addresses)
        error.value = with_addresses(error.value, addresses) if isinstance(error.value, str) else error.value
        error.fix = with_addresses(error.fix, addresses) if error.fix else None
        raise


@dataclass(frozen=True)
class Prepared:
    """Shards and metadata files, by name, of a bucket folder that `python -m trainer.prepare` wrote."""

    shards: dict[str, ObjectInfo]
    metadata: dict[str, ObjectInfo]


def find_prepared(address: str) -> Prepared | None:
    """Return the prepared dataset in a bucket folder. None if the manifest, the labels or dataset_info.json is missing.

    Raises:
        DataError: a shard is missing or differs from the manifest.
    """
    files = {info.path.name: info for info in storage_path(address).list(recursive=False)}
    if not {MANIFEST, LABELS, INFO} <= files.keys():
        return None
    manifest = parse_manifest(files[MANIFEST].path.read())
    for shard in manifest.values():
        info = files.get(shard.file)
        if info is None:
            raise DataError(f"{address}/{escape_unprintable(shard.file)} is missing", fix="prepare the dataset again")
        if info.size != shard.bytes or (info.crc32c is not None and f"{info.crc32c:08x}" != shard.crc32c):
            raise DataError(
                f"{address}/{escape_unprintable(shard.file)} differs from {MANIFEST}", fix="prepare the dataset again"
            )
    metadata = {name: files[name] for name in (*METADATA, MANIFEST, LABELS) if name in files}
    return Prepared({name: files[name] for name in manifest}, metadata)


def _open_shards(
    address: str, runtime: Runtime, log_message: LogMessage, check: Callable[[str], None]
) -> ShardCache | None:
    """Fetch the metadata of a prepared folder, and return the cache that fetches its shards. None if not prepared."""
    prepared = find_prepared(address)
    if prepared is None:
        return None
    folder, check_address = runtime.cache_folder, partial(check, address)
    budget, _ = choose_disk_budget(runtime.disk_budget, folder)
    shards = ShardCache(address, prepared.shards, folder, budget, log_message, check_address, prepared.metadata)
    fetch_missing(address, prepared.metadata, shards.folder, log_message, check_address)
    log_message(f"{address}: {describe_shards(prepared, budget)}, to {shards.folder}")
    return shards


def describe_shards(prepared: Prepared, budget: int) -> str:
    """Describe the count and size of the shards, and the size of the disk cache."""
    size = sum(info.size for info in prepared.shards.values())
    count = f"{len(prepared.shards):,} shard{'s' * (len(prepared.shards) != 1)}"
    at_most = f"{min(size, budget) / 1e6:,.1f} MB at most on disk"
    return f"{count}, {size / 1e6:,.1f} MB, are fetched while they are used, {at_most}"
