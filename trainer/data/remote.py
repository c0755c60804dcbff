"""Local copies of the data and weights that a configuration names in buckets."""

from collections.abc import Callable
from dataclasses import dataclass

from trainer.config.schema import Data, RequestedConfig, Runtime
from trainer.data.tfds_folder import INFO, LABELS, MANIFEST, METADATA, manifest_of
from trainer.errors import DataError
from trainer.storage.base import ObjectInfo
from trainer.storage.path import storage_path
from trainer.storage.shard_cache import Note, ShardCache
from trainer.storage.staging import fetch_missing, is_remote, prepared_folder, stage


def resolve_addresses(data: Data) -> tuple[Data, str | None]:
    """Resolve the addresses of the data, for a run and for its plan.

    Returns:
        `data`, with data.root set to the folder of a dataset that is named in a bucket; and the bucket folder whose
        shards may be fetched while they are used, None with data.group_field: groups are stored in the records only.
    """
    if is_remote(data.data_dir) and data.name:
        folder = prepared_folder(str(data.data_dir), data.name)
        data = data.model_copy(update={"root": folder, "data_dir": None})
    streams = data.source == "tfds" and is_remote(data.root) and not data.group_field
    return data, str(data.root).rstrip("/") if streams else None


def local_copies(
    config: RequestedConfig, note: Note, check: Callable[[str], None], stream: bool = False
) -> tuple[RequestedConfig, dict[str, str], ShardCache | None]:
    """Copy the data and weights of a configuration from buckets to the local disk.

    Args:
        check: called with an address while it is copied; may raise to stop.
        stream: leave the shards of a prepared dataset in the bucket, if `resolve_addresses` allows it.

    Returns:
        The configuration with local paths; the address of each local path; and the cache that fetches the shards
        while they are read, None if all is copied.

    Raises:
        DataError, Interrupted: as `trainer.storage.staging.stage`; or a shard differs from the manifest.
    """
    runtime = config.runtime
    addresses: dict[str, str] = {}

    def local(address: str | None) -> str | None:
        if not address or not is_remote(address):
            return address
        path = stage(address, runtime.cache_folder, runtime.disk_budget, note, lambda: check(address))
        addresses[path] = address.rstrip("/")
        return path

    data, address = resolve_addresses(config.data)
    shards = _open_shards(address, runtime, note, check) if stream and address else None
    if address and shards:
        addresses[str(shards.folder)] = address
        data = data.model_copy(update={"root": str(shards.folder)})
    data = data.model_copy(update={key: local(getattr(data, key)) for key in ("root", "pattern")})
    model = config.model.model_copy(update={"weights": local(config.model.weights)})
    return config.model_copy(update={"data": data, "model": model}), addresses, shards


@dataclass(frozen=True)
class Prepared:
    """A bucket folder that `python -m trainer.prepare` wrote: its shards, and its other files, by name."""

    shards: dict[str, ObjectInfo]
    metadata: dict[str, ObjectInfo]


def prepared_at(address: str) -> Prepared | None:
    """The prepared dataset in a bucket folder; None if the folder has no labels file.

    Raises:
        DataError: a shard is missing, or differs from the manifest.
    """
    files = {info.path.name: info for info in storage_path(address).list(recursive=False)}
    if not {MANIFEST, LABELS, INFO} <= files.keys():
        return None
    manifest = manifest_of(files[MANIFEST].path.read())
    for shard in manifest.values():
        info = files.get(shard.file)
        if info is None:
            raise DataError(f"{address}/{shard.file} is missing", fix="prepare the dataset again")
        if info.size != shard.bytes or (info.crc32c is not None and f"{info.crc32c:08x}" != shard.crc32c):
            raise DataError(f"{address}/{shard.file} differs from {MANIFEST}", fix="prepare the dataset again")
    metadata = {name: files[name] for name in (*METADATA, MANIFEST, LABELS) if name in files}
    return Prepared({name: files[name] for name in manifest}, metadata)


def _open_shards(address: str, runtime: Runtime, note: Note, check: Callable[[str], None]) -> ShardCache | None:
    """A cache of the shards of a prepared folder, after its metadata is fetched; None if it has no labels file."""
    prepared = prepared_at(address)
    if prepared is None:
        return None
    budget, metadata = runtime.disk_budget, prepared.metadata
    shards = ShardCache(address, prepared.shards, runtime.cache_folder, budget, note, lambda: check(address), metadata)
    fetch_missing(address, metadata, shards.folder, note, lambda: check(address))
    note(f"{address}: {describe_shards(prepared, budget)}, to {shards.folder}")
    return shards


def describe_shards(prepared: Prepared, budget: int) -> str:
    """Number and size of the shards that are fetched while they are used, as text."""
    size = sum(info.size for info in prepared.shards.values())
    count = f"{len(prepared.shards):,} shard{'s' * (len(prepared.shards) != 1)}"
    return f"{count}, {size / 1e6:,.1f} MB, come while they are used, {min(size, budget) / 1e6:,.1f} MB at a time"
