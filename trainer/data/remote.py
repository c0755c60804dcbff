"""Local copies of the data and weights that a configuration names in buckets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.config.schema import Data, RequestedConfig
from trainer.data.tfds_folder import INFO, LABELS, MANIFEST, METADATA, manifest_of
from trainer.errors import DataError
from trainer.storage.base import ObjectInfo
from trainer.storage.path import storage_path
from trainer.storage.shard_cache import Note, ShardCache
from trainer.storage.staging import fetch_missing, is_remote, prepared_folder, stage


def resolve_addresses(data: Data) -> tuple[Data, str | None]:
    """Where data lies, for a run and for its plan.

    Returns:
        `data` with a dataset that is named in a bucket given by its folder; and the folder of a bucket whose shards
        may come while they are used. None: all is copied before the start, as where groups are read, which stand in
        the records alone.
    """
    if is_remote(data.data_dir) and data.name:
        folder = prepared_folder(str(data.data_dir), data.name)
        data = data.model_copy(update={"root": folder, "data_dir": None})
    streams = data.source == "tfds" and is_remote(data.root) and not data.group_field
    return data, str(data.root).rstrip("/") if streams else None


def local_copies(
    config: RequestedConfig, note: Note, check: Callable[[str], None]
) -> tuple[RequestedConfig, dict[str, str]]:
    """The same configuration with local paths for the data and the weights; `check(address)` may raise to leave.

    Returns:
        it, and the address of each local path.

    Raises:
        DataError, Interrupted: as `trainer.storage.staging.stage`.
    """
    runtime = config.runtime
    addresses: dict[str, str] = {}

    def local(address: str | None) -> str | None:
        if not address or not is_remote(address):
            return address
        path = stage(address, runtime.cache_folder, runtime.disk_budget, note, lambda: check(address))
        addresses[path] = address.rstrip("/")
        return path

    data, _ = resolve_addresses(config.data)
    data = data.model_copy(update={key: local(getattr(data, key)) for key in ("root", "pattern")})
    model = config.model.model_copy(update={"weights": local(config.model.weights)})
    return config.model_copy(update={"data": data, "model": model}), addresses


def copies_ahead(
    config: RequestedConfig, note: Note, check: Callable[[str], None]
) -> tuple[RequestedConfig, dict[str, str], ShardCache | None]:
    """As `local_copies`, but the shards of a dataset that `python -m trainer.prepare` wrote stay in the bucket where
    `resolve_addresses` says so.

    Returns:
        the third is the cache that fetches them while they are read, None where everything is here.

    Raises:
        DataError: as `stage`; or a shard is no longer what the manifest says.
        Interrupted: as `stage`.
    """
    runtime, shards = config.runtime, None
    data, address = resolve_addresses(config.data)
    if address and (shards := _open_shards(address, runtime.cache_folder, runtime.disk_budget, note, check)):
        config = config.model_copy(update={"data": data.model_copy(update={"root": str(shards.folder)})})
    local, addresses = local_copies(config, note, check)
    return local, addresses | ({str(shards.folder): str(address)} if shards else {}), shards


@dataclass(frozen=True)
class Prepared:
    """A folder in a bucket that `python -m trainer.prepare` wrote: its shards, and the files beside them, by name."""

    shards: dict[str, ObjectInfo]
    beside: dict[str, ObjectInfo]


def prepared_at(address: str) -> Prepared | None:
    """The dataset in a folder of a bucket; None where it has no labels file.

    Raises:
        DataError: a shard is no longer what the manifest says.
    """
    there = {entry.path.name: entry for entry in storage_path(address).list(recursive=False)}
    if not {MANIFEST, LABELS, INFO} <= there.keys():
        return None
    manifest = manifest_of(there[MANIFEST].path.read())
    for shard in manifest.values():
        entry = there.get(shard.file)
        if entry is None:
            raise DataError(f"{address}/{shard.file} is gone; prepare the dataset again")
        if entry.size != shard.bytes or (entry.crc32c is not None and f"{entry.crc32c:08x}" != shard.crc32c):
            raise DataError(f"{address}/{shard.file} is not what {MANIFEST} says any more; prepare the dataset again")
    beside = {name: there[name] for name in (*METADATA, MANIFEST, LABELS) if name in there}
    return Prepared({name: there[name] for name in manifest}, beside)


def _open_shards(
    address: str, cache_dir: Path, budget: int, note: Note, check: Callable[[str], None]
) -> ShardCache | None:
    """A cache of the shards in a prepared folder, with its metadata beside them; None where it has no labels file."""
    prepared = prepared_at(address)
    if prepared is None:
        return None
    shards = ShardCache(address, prepared.shards, cache_dir, budget, note, lambda: check(address), prepared.beside)
    fetch_missing(address, prepared.beside, shards.folder, note, lambda: check(address))
    note(f"{address}: {coming(prepared, budget)}, to {shards.folder}")
    return shards


def coming(prepared: Prepared, budget: int) -> str:
    """Number and size of shards that come while they are used, as text."""
    size = sum(entry.size for entry in prepared.shards.values())
    count = f"{len(prepared.shards):,} shard{'s' * (len(prepared.shards) != 1)}"
    return f"{count}, {size / 1e6:,.1f} MB, come while they are used, {min(size, budget) / 1e6:,.1f} MB at a time"
