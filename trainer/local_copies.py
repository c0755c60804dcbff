"""What a configuration reads from buckets, on this machine's disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from trainer.config import RunConfig
from trainer.storage.staging import is_remote, prepared_folder, stage

GIGABYTE = 1024**3


def local_copies(
    config: RunConfig, cache_dir: Path, note: Callable[[str], None], check: Callable[[str], None]
) -> tuple[RunConfig, dict[str, str]]:
    """The same configuration with local paths for the data and the weights; `check(address)` may raise to leave.

    Returns:
        it, and what is where: local path -> address.

    Raises:
        DataError, Interrupted: as `trainer.storage.staging.stage`.
    """
    budget = int(config.runtime.disk_budget_gb * GIGABYTE)
    where: dict[str, str] = {}

    def local(address: str | None) -> str | None:
        if not address or not is_remote(address):
            return address
        path = stage(address, cache_dir, budget, note, lambda: check(address))
        where[path] = address.rstrip("/")
        return path

    data: dict[str, str | None] = {key: local(getattr(config.data, key)) for key in ("root", "pattern")}
    if is_remote(config.data.data_dir) and config.data.name:
        data |= {"root": local(prepared_folder(str(config.data.data_dir), config.data.name)), "data_dir": None}
    model = {"weights": local(config.model.weights)}
    local_config = config.model_copy(
        update={"data": config.data.model_copy(update=data), "model": config.model.model_copy(update=model)}
    )
    return local_config, where
