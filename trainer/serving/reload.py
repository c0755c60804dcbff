"""Load the server's model, and then newer versions while the current version is served."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.errors import DataError, Interrupted, TrainerError
from trainer.monitoring.log import log, log_traceback
from trainer.serving.app import Service
from trainer.serving.export_files import Export, list_export_versions, read_export
from trainer.storage.base import ObjectInfo, request_deadline
from trainer.storage.staging import is_remote

if TYPE_CHECKING:
    from trainer.serving.model import ServedModel

LoadModel = Callable[[Export], "ServedModel"]
POLL_SECONDS = 10.0  # timeout of each bucket request of a check for a newer version


async def load_first_version(service: Service, load_model: LoadModel) -> set[ObjectInfo | None]:
    """Load and serve `service.export`; if it cannot be loaded, load and serve the newest version that can be loaded.

    Returns:
        The `saved_model.pb` of each version that cannot be loaded.

    Raises:
        DataError: no version can be loaded; this is the error of `service.export`.
        Interrupted: the bucket does not respond, or the disk is full.
    """
    failed: set[ObjectInfo | None] = set()
    export = service.export
    try:
        model, sizes = await asyncio.to_thread(_load_and_warm_up, service, load_model, export)
    except DataError as error:
        failed.add(export.graph)
        export, model, sizes = await asyncio.to_thread(_load_earlier, service, load_model, failed, error)
    service.serve_version(export, model)
    log.info(f"ready: {len(export.classes)} classes, warm for batches of {', '.join(map(str, sizes))}")
    return failed


def _load_earlier(
    service: Service, load_model: LoadModel, failed: set[ObjectInfo | None], first_error: DataError
) -> tuple[Export, ServedModel, list[int]]:
    """Load the newest version that is not in `failed` and can be loaded; return it as `_load_version` does.

    Adds the versions that cannot be loaded to `failed`. Raises `first_error` if no version can be loaded.
    """
    error = first_error
    for graph in list_export_versions(service.settings.model):
        if graph not in failed:
            log.warning(f"trying version {graph.path.parent.name}, as a newer one is not served: {error}")
            service.metrics.failed_versions.inc()
            try:
                return _load_version(service, load_model, graph)
            except DataError as next_error:
                failed.add(graph)
                error = next_error
    raise first_error


async def follow_versions(service: Service, load_model: LoadModel, failed: set[ObjectInfo | None]) -> None:
    """Check for a newer version every `poll` seconds, and load and serve it, until the server stops.

    The newest version that has not failed is served, even if it is older than the current version, which may have been
    deleted. A version that cannot be loaded is logged, added to `failed`, and ignored until its `saved_model.pb`
    changes.
    """
    is_failing = False  # whether the last check has failed, so that the failure is already logged
    while not service.stopping:
        await asyncio.sleep(service.settings.poll)
        try:
            graph = await asyncio.to_thread(_find_newest, service, failed)
        except Exception as error:  # such as no version at the moment, or a bucket that does not respond
            if not isinstance(error, TrainerError | OSError):
                log_traceback(error)
            elif not is_failing:
                log.warning(f"no check for newer versions: {error}; serving version {service.export.version}")
            is_failing = True
            continue
        is_failing = False
        if graph is None or graph == service.export.graph:
            continue
        name, previous = graph.path.parent.name, service.export
        log.info(f"loading version {name}, while version {previous.version} is served")
        try:
            export, model, _ = await asyncio.to_thread(_load_version, service, load_model, graph)
        except Interrupted as error:  # the bucket does not respond, or the disk is full: try again at the next check
            log.warning(f"version {name} is not loaded yet: {error}")
            continue
        except Exception as error:
            if not isinstance(error, TrainerError):
                log_traceback(error)
            failed.add(graph)
            service.metrics.failed_versions.inc()
            log.warning(f"version {name} is not served: {error}; version {previous.version} still is")
            continue
        service.serve_version(export, model)
        log.info(f"serving version {name} ({len(export.classes)} classes) instead of version {previous.version}")
        if is_remote(service.settings.model):  # delete the local copy of the previous version, which is in memory
            await asyncio.to_thread(shutil.rmtree, previous.folder, ignore_errors=True)


def _find_newest(service: Service, failed: set[ObjectInfo | None]) -> ObjectInfo | None:
    """Return the `saved_model.pb` of the newest version that is not in `failed`; None if all versions are in it."""
    with request_deadline(POLL_SECONDS):
        graphs = list_export_versions(service.settings.model)
    return next((graph for graph in graphs if graph not in failed), None)


def _load_version(service: Service, load_model: LoadModel, graph: ObjectInfo) -> tuple[Export, ServedModel, list[int]]:
    """Copy a version to the local disk if it is in a bucket, load it, and warm it up.

    Returns the export, the model, and the warm batch sizes. Raises DataError if the version cannot be read or loaded,
    and Interrupted if the bucket does not respond, the disk is full, or the server stops.
    """

    def check_stopping() -> None:
        if service.stopping:
            raise Interrupted("the server stops")

    settings = service.settings
    export = read_export(settings.model, graph, Path(settings.cache_dir).expanduser(), log.info, check_stopping)
    check_stopping()
    return export, *_load_and_warm_up(service, load_model, export)


def _load_and_warm_up(service: Service, load_model: LoadModel, export: Export) -> tuple[ServedModel, list[int]]:
    """Load an export into memory and warm it up; return the model and the batch sizes with which it was called."""
    model = load_model(export)
    return model, model.warm_up(service.settings.batch)
