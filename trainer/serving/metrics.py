"""Prometheus metrics of requests, predictions and drift, and the lines of the prediction log."""

import json
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

import trainer
from trainer.evaluation.drift import Window, embedding_distance, merge_bins, population_stability_index
from trainer.monitoring.log import format_utc_now
from trainer.serving.export_files import Export, Prediction
from trainer.serving.prediction_log import PredictionLog
from trainer.serving.requests import EncodedImage
from trainer.serving.settings import Settings, batch_sizes

WINDOW_PREDICTIONS = 5000  # maximum number of latest predictions over which drift is measured
MIN_PREDICTIONS = 100  # drift is not reported for fewer predictions
LOGGED_CLASSES = 5  # number of probabilities per line of the prediction log
MAX_LOGGED_NAME_CHARACTERS = 200  # maximum characters of a file name in the prediction log
LATENCY_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)  # seconds
disable_created_metrics()  # no metrics `kubetune_serving_..._created` with the time of creation


class ServingMetrics(Collector):
    """The metrics of a server, and the drift of the served version, which is computed at each scrape."""

    def __init__(self, settings: Settings, predictions: PredictionLog | None = None) -> None:
        self.settings, self.predictions = settings, predictions
        self.current: VersionMetrics | None = None  # metrics of the served version; None until it is loaded
        registry = self.registry = CollectorRegistry()
        common: Any = {"namespace": "kubetune_serving", "registry": registry}
        sizes, twentieths = batch_sizes(settings.batch), [i / 20 for i in range(1, 21)]
        self.ready = Gauge("ready", "1 while the server is ready", **common)
        self.requests = Counter("requests", "Requests by route and status", ["route", "code"], **common)
        self.seconds = Histogram("request_seconds", "Latency of requests", ["route"], buckets=LATENCY_BUCKETS, **common)
        self.batches = Histogram("batch_images", "Images per call of the model", buckets=sizes, **common)
        self.batch_seconds = Histogram("batch_seconds", "Duration of model calls", buckets=LATENCY_BUCKETS, **common)
        self.by_class = Counter("predictions", "Predictions by the most probable class", ["class"], **common)
        self.confidence = Histogram("confidence", "Largest probability per prediction", buckets=twentieths, **common)
        self.queued = Gauge("queue_images", "Images in the queue", **common)
        self.active = Gauge("active_requests", "Requests in progress", **common)
        self.dropped = Counter("log_dropped", "Predictions that the log had no room for", **common)
        self.failed_versions = Counter("failed_versions", "Versions of the model that could not be loaded", **common)
        ProcessCollector(registry=registry)
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics of the served version: its name and version, and its drift."""
        if self.current is not None:
            yield from self.current.collect()


class VersionMetrics:
    """The predictions of one version of the model: their metrics, their drift, and a logged sample of them."""

    def __init__(self, metrics: ServingMetrics, export: Export) -> None:
        self.export, self._metrics = export, metrics
        self._window = Window(len(export.classes), WINDOW_PREDICTIONS)
        reference = export.reference or {}
        self._class_names = reference.get("classes", export.classes)  # labels.txt has spaces instead of line breaks
        embedding = reference.get("embedding", {})
        # Float64 [C, C'], from the pooled features to the embeddings of the reference; None if these are the features.
        self._projection = np.asarray(embedding["projection"], np.float64) if embedding.get("projection") else None
        self._embedding_width = len(embedding.get("mean", ()))  # C'; 0 if the reference has no embeddings
        self._lock = threading.Lock()  # of the window
        self._recorded = 0  # number of predictions so far

    def record(self, images: Sequence[EncodedImage], predictions: Sequence[Prediction | str]) -> None:
        """Count predictions, add them to the window of drift, and log a sample of them.

        Only one thread may call this, but `collect` may run at the same time.

        Args:
            images: the images of a batch; name and identifier of the request are logged.
            predictions: prediction of each image, or the reason why it cannot be decoded, which is not counted.
        """
        timestamp, lines, metrics = format_utc_now(), [], self._metrics
        for image, prediction in zip(images, predictions, strict=True):
            if isinstance(prediction, str):
                continue
            predicted = int(prediction.probabilities.argmax())
            confidence = float(prediction.probabilities[predicted])
            embedding = self._project(prediction.embedding)
            metrics.by_class.labels(self.export.classes[predicted]).inc()
            metrics.confidence.observe(confidence)
            with self._lock:
                self._window.add(predicted, confidence, embedding)
            self._recorded += 1
            fraction = metrics.settings.log_sample  # the logged predictions are evenly spaced, not random
            if metrics.predictions and int(self._recorded * fraction) > int((self._recorded - 1) * fraction):
                lines.append(self._format_log_line(timestamp, image, prediction.probabilities, embedding))
        if lines and metrics.predictions:
            metrics.dropped.inc(metrics.predictions.append(lines))

    def _project(self, embedding: np.ndarray | None) -> np.ndarray | None:
        """Project an embedding [C] to the space of the reference [C']; None if one of the two has no embedding."""
        if embedding is None or not self._embedding_width:
            return None
        return embedding @ self._projection if self._projection is not None else embedding

    def _format_log_line(
        self, time: str, image: EncodedImage, probabilities: np.ndarray, embedding: np.ndarray | None
    ) -> str:
        """Format a line of the prediction log: JSON with the most probable classes and the projected embedding [C']."""
        top = np.argsort(-probabilities, kind="stable")[:LOGGED_CLASSES]
        line: dict[str, Any] = {
            "time": time,
            "request": image.request,
            "name": image.name[:MAX_LOGGED_NAME_CHARACTERS],
            "model_version": self.export.version,
        }
        line |= {"class": self._class_names[top[0]], "confidence": float(probabilities[top[0]])}
        line |= {"probabilities": {self._class_names[i]: round(float(probabilities[i]), 6) for i in top}}
        line |= {} if embedding is None else {"embedding": [round(float(x), 5) for x in embedding]}
        return json.dumps(line) + "\n"

    def collect(self) -> Iterator[Metric]:
        """Yield the version of the model and the number of predictions in the window, and the drift.

        Drift is omitted if the export has no reference, or for fewer than `MIN_PREDICTIONS` predictions.
        """
        labels = {
            "model": self._metrics.settings.name,
            "model_version": self.export.version,
            "version": trainer.__version__,
        }
        yield InfoMetricFamily("kubetune_serving", "Name and version of the model, and version of kubetune", labels)
        with self._lock:
            n, classes, confidences = self._window.n, self._window.classes.copy(), self._window.confidences.copy()
            gaussian = self._window.fit_gaussian() if self._window.embedding_count >= MIN_PREDICTIONS else None
        yield GaugeMetricFamily("kubetune_serving_drift_predictions", "Predictions that drift is measured over", n)
        reference = self.export.reference
        if reference is None or n < MIN_PREDICTIONS:
            return
        help_text = "Latest predictions compared with the reference: 0.1 is moderate, 0.25 is shifted"
        stability = GaugeMetricFamily("kubetune_serving_population_stability_index", help_text, labels=["of"])
        reference_counts = np.asarray(reference["class_frequencies"]) * reference["n"]
        stability.add_metric(["classes"], population_stability_index(reference_counts, classes))
        reference_histogram = np.asarray(reference["confidence_histogram"]["counts"], np.float64)
        stability.add_metric(["confidence"], population_stability_index(*merge_bins(reference_histogram, confidences)))
        yield stability
        if gaussian is not None and self._embedding_width:
            help_text = "Frechet distance of the latest embeddings from the reference over its variance: 0.1 is shifted"
            distance = embedding_distance(reference["embedding"], *gaussian)
            yield GaugeMetricFamily("kubetune_serving_embedding_distance", help_text, distance)
