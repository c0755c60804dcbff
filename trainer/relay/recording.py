"""Log the predictions in TensorFlow Serving's responses, in a thread, so that no request waits for the log."""

from __future__ import annotations

import json
import queue
import threading
import time
from pathlib import Path

import numpy as np

from trainer.errors import DataError, TrainerError
from trainer.evaluation.drift import parse_reference
from trainer.monitoring.log import log
from trainer.serving.export_files import LABELS, REFERENCE, Export, Prediction
from trainer.serving.metrics import ServingMetrics, VersionMetrics
from trainer.serving.requests import EncodedImage
from trainer.storage.base import request_deadline
from trainer.storage.path import storage_path
from trainer.storage.small_files import CONTENT_ERRORS

MAX_BUFFERED_BYTES = 64 << 20  # maximum size of the responses that wait to be parsed
READ_SECONDS = 20.0  # timeout of each bucket request when a version's labels are read
RETRY_SECONDS = 30.0  # from a failure to read a version's labels until they may be read again


class Recorder:
    """Parses responses, counts their predictions, and logs a sample of them, in a thread. `put` is thread-safe.

    Up to `MAX_BUFFERED_BYTES` of responses wait in memory. Further responses are dropped and counted. `model` is the
    folder of the model's versions, local or in a bucket; `metrics` also has the prediction log.
    """

    def __init__(self, model: str, metrics: ServingMetrics) -> None:
        self._model, self._metrics = model, metrics
        self._versions: dict[str, VersionMetrics] = {}
        self._failures: dict[str, float] = {}  # version -> monotonic time from which its labels may be read again
        # Responses that wait, as (version, identifier of the request, body); None ends the thread.
        self._waiting: queue.SimpleQueue[tuple[str, str, bytes] | None] = queue.SimpleQueue()
        self._lock, self._buffered = threading.Lock(), 0  # size of the responses in `_waiting`, in bytes
        self._thread = threading.Thread(target=self._record_all, name="recording", daemon=True)
        self._thread.start()

    def put(self, version: str, request_id: str, response: bytes) -> None:
        """Queue a response's JSON body for recording; drop and count it if the queue is full.

        `request_id` is the request's identifier, for the log. Does not raise or wait.
        """
        with self._lock:
            has_room = self._buffered + len(response) <= MAX_BUFFERED_BYTES
            self._buffered += len(response) if has_room else 0
        if has_room:
            self._waiting.put((version, request_id, response))
        else:
            self._metrics.dropped.inc()

    def close(self, seconds: float) -> None:
        """Wait up to `seconds` until all responses are recorded. Must be called once, after the last `put`."""
        self._waiting.put(None)
        self._thread.join(seconds)

    def _record_all(self) -> None:
        """Record queued responses until `close` is called. Runs in a thread."""
        while (queued_response := self._waiting.get()) is not None:
            version, request_id, response = queued_response
            try:
                self._record(version, request_id, response)
            except Exception as error:  # a bug here must not end the log
                self._metrics.dropped.inc()
                log.warning(f"a response of version {version} is not logged ({type(error).__name__}: {error})")
            with self._lock:
                self._buffered -= len(response)

    def _record(self, version: str, request_id: str, response: bytes) -> None:
        """Count a response's predictions, and log a sample of them."""
        metrics = self._get_version_metrics(version)
        if metrics is None:
            self._metrics.dropped.inc()
            return
        try:
            predictions = parse_predictions(response, len(metrics.export.classes))
        except CONTENT_ERRORS:  # for example, a response from another signature
            self._metrics.dropped.inc()
            return
        images = [EncodedImage(b"", "", 0, request_id=request_id) for _ in predictions]
        self._metrics.current = metrics
        metrics.record(images, predictions)

    def _get_version_metrics(self, version: str) -> VersionMetrics | None:
        """Return a version's metrics; None if its labels cannot be read now.

        After a failure, the labels are not read again for `RETRY_SECONDS`.
        """
        if version not in self._versions and time.monotonic() >= self._failures.get(version, 0.0):
            try:
                with request_deadline(READ_SECONDS):
                    self._versions[version] = VersionMetrics(self._metrics, read_labels(self._model, version))
            except (TrainerError, OSError) as error:
                self._failures[version] = time.monotonic() + RETRY_SECONDS
                log.warning(f"predictions of version {version} are not logged: {error}")
        return self._versions.get(version)


def read_labels(model: str, version: str) -> Export:
    """Read a version's labels and drift reference, but not its graph and variables.

    Raises DataError if there are no labels, or if the labels or the reference are corrupt; and Interrupted if the
    bucket does not respond.
    """
    folder = storage_path(model) / version
    labels, content = (folder / LABELS).read(), (folder / REFERENCE).fetch()
    try:
        classes = tuple(labels.decode("utf-8-sig").splitlines())
    except UnicodeDecodeError as error:
        problem = f"{folder / LABELS}: is not UTF-8 text ({error.reason} at byte {error.start})"
        raise DataError(problem, fix="promote the run again") from None
    reference = None if content is None else parse_reference(content[0], classes)
    if content is not None and reference is None:
        raise DataError(f"{folder / REFERENCE}: is corrupt or of another model", fix="promote the run again")
    return Export(model, Path(str(folder)), version, classes, reference)  # nothing else of the folder is read


def parse_predictions(response: bytes, num_classes: int) -> list[Prediction]:
    """Parse TensorFlow Serving's predict response, in the row format (`predictions`) or column format (`outputs`).

    Args:
        response: JSON body of a response from the signature `image_bytes`, `images` or `explain`.
        num_classes: number of classes.

    Returns:
        One prediction per image, without its heatmap, and with its embedding if the response has embeddings.

    Raises:
        ValueError, or another of `CONTENT_ERRORS`: the response does not have finite probabilities of `num_classes`
            classes for each image.
    """
    tree = json.loads(response)
    if "predictions" in tree:
        rows = tree["predictions"]
        columns = {name: [row[name] for row in rows] for name in rows[0]} if isinstance(rows[0], dict) else rows
    else:
        columns = tree["outputs"]
    columns = columns if isinstance(columns, dict) else {"probabilities": columns}
    probabilities = np.asarray(columns["probabilities"], np.float32)  # [images, classes]
    if probabilities.ndim != 2 or probabilities.shape[1] != num_classes or not np.isfinite(probabilities).all():
        raise ValueError(f"no probabilities of {num_classes} classes")
    if "embedding" not in columns:
        return [Prediction(row) for row in probabilities]
    embeddings = np.asarray(columns["embedding"], np.float32)
    return [Prediction(row, embedding) for row, embedding in zip(probabilities, embeddings, strict=True)]
