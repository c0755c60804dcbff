"""Prometheus metrics of requests, predictions and drift, and the format of the prediction log's lines."""

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

import trainer
from trainer.evaluation.drift import PredictionWindow, compute_embedding_distance, compute_psi, merge_bins
from trainer.monitoring.log import format_utc_now
from trainer.serving.export_files import Export, Prediction
from trainer.serving.prediction_log import PredictionLog
from trainer.serving.requests import EncodedImage
from trainer.serving.settings import Settings, list_batch_sizes

WINDOW_PREDICTIONS = 5000  # drift is measured over at most this many of the latest predictions
MIN_PREDICTIONS = 100  # drift is not reported for fewer predictions
NUM_LOGGED_CLASSES = 5  # number of probabilities per line of the prediction log
MAX_LOGGED_NAME_CHARACTERS = 200  # longer file names are truncated in the prediction log
LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)  # upper limits, in seconds
disable_created_metrics()  # prometheus_client would add a metric `..._created`, the creation time, to each counter


class ServingMetrics(Collector):
    """Server metrics, and the served version's drift, which is computed at each scrape.

    `prediction_log` is the log to which `VersionMetrics` writes a sample of the predictions; None if there is none.
    """

    def __init__(self, settings: Settings, prediction_log: PredictionLog | None = None) -> None:
        self.settings, self.prediction_log = settings, prediction_log
        self.current: VersionMetrics | None = None  # metrics of the served version; None until it is loaded
        registry = self.registry = CollectorRegistry()
        kwargs: Any = {"namespace": "kubetune_serving", "registry": registry}
        sizes = list_batch_sizes(settings.batch)
        twentieths = [i / 20 for i in range(1, 21)]
        self.ready = Gauge("ready", "1 while the server is ready", **kwargs)
        self.requests = Counter("requests", "Requests by route and status", ["route", "code"], **kwargs)
        self.seconds = Histogram("request_seconds", "Latency of requests", ["route"], buckets=LATENCY_BUCKETS, **kwargs)
        self.batches = Histogram("batch_images", "Images per call of the model", buckets=sizes, **kwargs)
        self.batch_seconds = Histogram("batch_seconds", "Duration of model calls", buckets=LATENCY_BUCKETS, **kwargs)
        self.by_class = Counter("predictions", "Predictions by the most probable class", ["class"], **kwargs)
        self.confidence = Histogram("confidence", "Largest probability per prediction", buckets=twentieths, **kwargs)
        self.queued = Gauge("queue_images", "Images in the queue", **kwargs)
        self.active = Gauge("active_requests", "Requests in progress", **kwargs)
        self.dropped = Counter("log_dropped", "Predictions that the log had no room for", **kwargs)
        self.failed_versions = Counter("failed_versions", "Versions of the model that could not be loaded", **kwargs)
        ProcessCollector(registry=registry)
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the served version's metrics: its name, its number and its drift."""
        if self.current is not None:
            yield from self.current.collect()


class VersionMetrics:
    """Records the predictions of one version of the model: counts them, measures their drift, and logs a sample."""

    def __init__(self, metrics: ServingMetrics, export: Export) -> None:
        self.export, self._metrics = export, metrics
        self._window = PredictionWindow(len(export.classes), WINDOW_PREDICTIONS)
        reference = export.reference or {}
        self._class_names = reference.get("classes", export.classes)  # labels.txt has spaces instead of line breaks
        embedding = reference.get("embedding", {})
        # Projects C pooled features to the reference's C' dimensions, float64 [C, C']; None if the reference has all C.
        self._projection = np.asarray(embedding["projection"], np.float64) if embedding.get("projection") else None
        self._embedding_width = len(embedding.get("mean", ()))  # C'; 0 if the reference has no embeddings
        self._lock = threading.Lock()  # protects the window
        self._recorded = 0  # number of predictions so far

    def record(self, images: Sequence[EncodedImage], predictions: Sequence[Prediction | str]) -> None:
        """Count predictions, add them to the drift window, and log a sample of them.

        Only one thread may call this, but `collect` may run at the same time.

        Args:
            images: the images of a batch, whose names and request identifiers are logged.
            predictions: each image's prediction; a string, the reason why the image cannot be decoded, is ignored.
        """
        timestamp = format_utc_now()
        lines = []
        metrics = self._metrics
        for image, prediction in zip(images, predictions, strict=True):
            if isinstance(prediction, str):
                continue
            class_index = int(prediction.probabilities.argmax())
            confidence = float(prediction.probabilities[class_index])
            embedding = self._project(prediction.embedding)
            metrics.by_class.labels(self.export.classes[class_index]).inc()
            metrics.confidence.observe(confidence)
            with self._lock:
                self._window.add(class_index, confidence, embedding)
            self._recorded += 1
            fraction = metrics.settings.log_sample  # the logged predictions are evenly spaced, not random
            if metrics.prediction_log and int(self._recorded * fraction) > int((self._recorded - 1) * fraction):
                lines.append(self._format_log_line(timestamp, image, prediction.probabilities, embedding))
        if lines and metrics.prediction_log:
            metrics.dropped.inc(metrics.prediction_log.append(lines))

    def _project(self, embedding: np.ndarray | None) -> np.ndarray | None:
        """Project pooled features [C] to the reference's embedding space [C']; None if either has no embedding."""
        if embedding is None or not self._embedding_width:
            return None
        return embedding @ self._projection if self._projection is not None else embedding

    def _format_log_line(
        self, time: str, image: EncodedImage, probabilities: np.ndarray, embedding: np.ndarray | None
    ) -> str:
        """Format a line of the prediction log: JSON with the most probable classes and the projected embedding [C']."""
        top_indices = np.argsort(-probabilities, kind="stable")[:NUM_LOGGED_CLASSES]
        line: dict[str, Any] = {
            "time": time,
            "request": image.request_id,
            "name": image.name[:MAX_LOGGED_NAME_CHARACTERS],
            "model_version": self.export.version,
        }
        line |= {"class": self._class_names[top_indices[0]], "confidence": float(probabilities[top_indices[0]])}
        line |= {"probabilities": {self._class_names[i]: round(float(probabilities[i]), 6) for i in top_indices}}
        line |= {} if embedding is None else {"embedding": [round(float(x), 5) for x in embedding]}
        return json.dumps(line) + "\n"

    def collect(self) -> Iterator[Metric]:
        """Yield the model's name and version, the number of predictions in the drift window, and the drift.

        Drift is omitted if the export has no reference, or if there are fewer than `MIN_PREDICTIONS` predictions.
        """
        labels = {
            "model": self._metrics.settings.name,
            "model_version": self.export.version,
            "version": trainer.__version__,
        }
        yield InfoMetricFamily("kubetune_serving", "Name and version of the model, and version of kubetune", labels)
        with self._lock:
            n = self._window.n
            counts = self._window.classes.copy()
            confidences = self._window.confidences.copy()
            gaussian = self._window.fit_gaussian() if self._window.embedding_count >= MIN_PREDICTIONS else None
        yield GaugeMetricFamily("kubetune_serving_drift_predictions", "Predictions that drift is measured over", n)
        reference = self.export.reference
        if reference is None or n < MIN_PREDICTIONS:
            return
        help_text = "Latest predictions compared with the reference: 0.1 is moderate, 0.25 is shifted"
        stability = GaugeMetricFamily("kubetune_serving_population_stability_index", help_text, labels=["of"])
        reference_counts = np.asarray(reference["class_frequencies"]) * reference["n"]
        stability.add_metric(["classes"], compute_psi(reference_counts, counts))
        reference_histogram = np.asarray(reference["confidence_histogram"]["counts"], np.float64)
        stability.add_metric(["confidence"], compute_psi(*merge_bins(reference_histogram, confidences)))
        yield stability
        if gaussian is not None and self._embedding_width:
            help_text = "Frechet distance of the latest embeddings from the reference over its variance: 0.1 is shifted"
            distance = compute_embedding_distance(reference["embedding"], *gaussian)
            yield GaugeMetricFamily("kubetune_serving_embedding_distance", help_text, distance)
