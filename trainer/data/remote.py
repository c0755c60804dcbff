"""What a configuration reads from buckets, on this machine's disk."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.config.schema import RunConfig
from trainer.data.tfds_folder import INFO, LABELS, MANIFEST, METADATA, ShardEntry, manifest_of
from trainer.errors import DataError
from trainer.storage.base import Entry
from trainer.storage.path import place
from trainer.storage.shard_cache import ShardCache
from trainer.storage.staging import fetch_missing, is_remote, prepared_folder, stage

Note = Callable[[str], None]


def local_copies(config: RunConfig, note: Note, check: Callable[[str], None]) -> tuple[RunConfig, dict[str, str]]:
    """The same configuration with local paths for the data and the weights; `check(address)` may raise to leave.

    Returns:
        it, and what is where: local path -> address.

    Raises:
        DataError, Interrupted: as `trainer.storage.staging.stage`.
    """
    runtime = config.runtime
    where: dict[str, str] = {}

    def local(address: str | None) -> str | None:
        if not address or not is_remote(address):
            return address
        path = stage(address, runtime.cache_folder, runtime.disk_budget, note, lambda: check(address))
        where[path] = address.rstrip("/")
        return path

    data: dict[str, str | None] = {key: local(getattr(config.data, key)) for key in ("root", "pattern")}
    if is_remote(config.data.data_dir) and config.data.name:
        data |= {"root": local(_dataset(config)), "data_dir": None}
    model = {"weights": local(config.model.weights)}
    local_config = config.model_copy(
        update={"data": config.data.model_copy(update=data), "model": config.model.model_copy(update=model)}
    )
    return local_config, where


def copies_ahead(
    config: RunConfig, note: Note, check: Callable[[str], None]
) -> tuple[RunConfig, dict[str, str], ShardCache | None]:
    """As `local_copies`, but the shards of a dataset that `python -m trainer.prepare` wrote stay in the bucket, except
    where groups are read: they stand in the records alone.

    Returns:
        the third is where they come from while they are read, None where everything is here.

    Raises:
        DataError: as `stage`; or a shard is no longer what the manifest says.
        Interrupted: as `stage`.
    """
    address, shards = _dataset(config), None
    if is_remote(address) and not config.data.group_field:
        address = str(address).rstrip("/")
        shards = _open_shards(address, config.runtime.cache_folder, config.runtime.disk_budget, note, check)
    if shards:
        here = {"root": str(shards.folder), "data_dir": None}
        config = config.model_copy(update={"data": config.data.model_copy(update=here)})
    local, where = local_copies(config, note, check)
    return local, where | ({str(shards.folder): address or ""} if shards else {}), shards


def _dataset(config: RunConfig) -> str | None:
    """The folder of a TFDS dataset that is named by folder, or by name in a bucket."""
    data = config.data
    if is_remote(data.data_dir) and data.name:
        return prepared_folder(str(data.data_dir), data.name)
    return data.root if data.source == "tfds" else None


@dataclass(frozen=True)
class Prepared:
    """A folder in a bucket that `python -m trainer.prepare` wrote: its shards, and what is known of them, by name."""

    shards: dict[str, Entry]
    beside: dict[str, Entry]


def prepared_at(address: str) -> Prepared | None:
    """What is in a folder; None where it has no labels file.

    Raises:
        DataError: a shard is no longer what the manifest says.
    """
    there = {entry.place.name: entry for entry in place(address).list(recursive=False)}
    if not {MANIFEST, LABELS, INFO} <= there.keys():
        return None
    manifest = manifest_of(there[MANIFEST].place.read())
    for shard in manifest.values():
        _compare(address, shard, there.get(shard.file))
    beside = {name: there[name] for name in (*METADATA, MANIFEST, LABELS) if name in there}
    return Prepared({name: there[name] for name in manifest}, beside)


def _open_shards(
    address: str, cache_dir: Path, budget: int, note: Note, check: Callable[[str], None]
) -> ShardCache | None:
    """A cache of the shards in a prepared folder, with its metadata beside them; None where it has no labels file."""
    found = prepared_at(address)
    if found is None:
        return None
    shards = ShardCache(address, found.shards, cache_dir, budget, note, lambda: check(address), found.beside)
    fetch_missing(address, found.beside, shards.folder, note, lambda: check(address))
    note(f"{address}: {coming(found, budget)}, to {shards.folder}")
    return shards


def coming(found: Prepared, budget: int) -> str:
    """The words for shards that come while they are used."""
    size = sum(entry.size for entry in found.shards.values())
    count = f"{len(found.shards):,} shard{'s' * (len(found.shards) != 1)}"
    return f"{count}, {size / 1e6:,.1f} MB, come while they are used, {min(size, budget) / 1e6:,.1f} MB at a time"


def _compare(address: str, shard: ShardEntry, there: Entry | None) -> None:
    if there is None:
        raise DataError(f"{address}/{shard.file} is gone; prepare the dataset again")
    if there.size != shard.bytes or (there.crc32c is not None and f"{there.crc32c:08x}" != shard.crc32c):
        raise DataError(f"{address}/{shard.file} is not what {MANIFEST} says any more; prepare the dataset again")
