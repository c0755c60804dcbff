"""Prometheus metrics of requests and predictions, the prediction log, and drift."""

import json
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

import trainer
from trainer.errors import ConfigError
from trainer.evaluation.drift import Window, embedding_distance, merge_bins, population_stability
from trainer.monitoring.log import log, timestamp
from trainer.serving.export_files import Export, Prediction
from trainer.serving.settings import Settings, batch_sizes

WINDOW = 5000  # latest predictions, over which drift is measured
MIN_PREDICTIONS = 100  # below which drift is not reported
LOGGED_CLASSES = 5  # per prediction
disable_created_metrics()

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class ServingMetrics(Collector):
    """Counters of requests, batches and predictions; drift of the latest predictions, computed at each scrape."""

    def __init__(self, settings: Settings, export: Export) -> None:
        self.export, self._settings = export, settings
        registry = self.registry = CollectorRegistry()
        common: Any = {"namespace": "kubetune_serving", "registry": registry}
        sizes, twentieths = batch_sizes(settings.batch), [i / 20 for i in range(1, 21)]
        self.ready = Gauge("ready", "1 while the server is ready", **common)
        self.requests = Counter("requests", "Requests by route and status", ["route", "code"], **common)
        self.seconds = Histogram("request_seconds", "Latency of requests", ["route"], buckets=SECONDS, **common)
        self.batches = Histogram("batch_images", "Images per call of the model", buckets=sizes, **common)
        self.batch_seconds = Histogram("batch_seconds", "Duration of model calls", buckets=SECONDS, **common)
        self._predictions = Counter("predictions", "Predictions by the most probable class", ["class"], **common)
        self._confidence = Histogram("confidence", "Largest probability per prediction", buckets=twentieths, **common)
        self.queued = Gauge("queue_images", "Images in the queue", **common)
        self.active = Gauge("active_requests", "Requests in progress", **common)
        ProcessCollector(registry=registry)
        registry.register(self)
        self._window = Window(len(export.classes), WINDOW)
        reference = export.reference or {}
        self._names = reference.get("classes", export.classes)  # in labels.txt line breaks are spaces
        embedding = reference.get("embedding", {})
        self._projection = np.asarray(embedding["projection"], np.float64) if embedding.get("projection") else None
        self._dimensions = len(embedding.get("mean", ()))
        self._lock = threading.Lock()
        self._seen = 0
        self._log = _open_log(settings.log)

    def record(self, predictions: Sequence[Prediction]) -> None:
        """Count and log predictions; called by the thread that runs the model."""
        now, lines = timestamp(), ""
        for prediction in predictions:
            chosen = int(prediction.probabilities.argmax())
            confidence = float(prediction.probabilities[chosen])
            embedding = self._projected(prediction.embedding)
            self._predictions.labels(self.export.classes[chosen]).inc()
            self._confidence.observe(confidence)
            with self._lock:
                self._window.add(chosen, confidence, embedding)
            self._seen += 1
            sample = self._settings.log_sample  # every n-th, not a random sample
            if self._log is not None and int(self._seen * sample) > int((self._seen - 1) * sample):
                lines += self._line(now, prediction.probabilities, embedding)
        if lines and self._log is not None:
            try:
                os.write(self._log, lines.encode())
            except OSError as error:
                log.warning(f"log={self._settings.log}: cannot be written ({error.strerror}); logging has stopped")
                self._log = None

    def _projected(self, embedding: np.ndarray | None) -> np.ndarray | None:
        """Project an embedding [C] as the reference does; None without a reference."""
        if embedding is None or not self._dimensions:
            return None
        return embedding @ self._projection if self._projection is not None else embedding

    def _line(self, now: str, probabilities: np.ndarray, embedding: np.ndarray | None) -> str:
        best = np.argsort(-probabilities, kind="stable")[:LOGGED_CLASSES]
        top = {self._names[i]: round(float(probabilities[i]), 6) for i in best}
        line = {"time": now, "class": self._names[best[0]], "confidence": float(probabilities[best[0]])}
        line |= {"probabilities": top}
        line |= {} if embedding is None else {"embedding": [round(float(x), 5) for x in embedding]}
        return json.dumps(line) + "\n"

    def collect(self) -> Iterator[Metric]:
        """Yield the version of the model, and drift given a reference and enough predictions."""
        facts = {"model": self._settings.name, "model_version": self.export.version, "version": trainer.__version__}
        yield InfoMetricFamily("kubetune_serving", "Name and version of the model, and version of kubetune", facts)
        with self._lock:
            seen, classes, confidences = self._window.n, self._window.classes.copy(), self._window.confidences.copy()
            gaussian = self._window.gaussian() if self._window.embedded >= MIN_PREDICTIONS else None
        yield GaugeMetricFamily("kubetune_serving_drift_predictions", "Predictions that drift is measured over", seen)
        reference = self.export.reference
        if reference is None or seen < MIN_PREDICTIONS:
            return
        text = "Latest predictions compared with the test split: 0.1 is moderate, 0.25 is drift"
        stability = GaugeMetricFamily("kubetune_serving_population_stability_index", text, labels=["of"])
        frequencies = np.asarray(reference["class_frequencies"]) * reference["n"]
        stability.add_metric(["classes"], population_stability(frequencies, classes))
        expected = np.asarray(reference["confidence_histogram"]["counts"], np.float64)
        stability.add_metric(["confidence"], population_stability(*merge_bins(expected, confidences)))
        yield stability
        if gaussian is not None and self._dimensions:
            text = "Frechet distance of the latest embeddings from the test split's, over the variance of those"
            distance = embedding_distance(reference["embedding"], *gaussian)
            yield GaugeMetricFamily("kubetune_serving_embedding_distance", text, distance)


def _open_log(file: str | None) -> int | None:
    if not file:
        return None
    path = Path(file).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(
            f"cannot be written ({error.strerror})", key="log", value=file, fix="give a writable file, or none"
        ) from None
