"""Prometheus metrics of requests and predictions, the prediction log, and drift."""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

import trainer
from trainer.errors import ConfigError
from trainer.evaluation.drift import Window, embedding_distance, merged, population_stability
from trainer.monitoring.log import log, timestamp
from trainer.serving.export_files import Answer, Export
from trainer.serving.settings import Settings, batch_sizes

RECENT = 5000  # predictions that drift is measured over
LEAST = 100  # below which drift is not reported
FEW = 5  # classes of a logged prediction
disable_created_metrics()  # a second number beside every counter, which nobody asks for

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)


class Observed(Collector):
    """Counts requests, batches and predictions; asked at each scrape how far the last predictions have moved."""

    def __init__(
        self, settings: Settings, export: Export, waiting: Callable[[], int], active: Callable[[], int]
    ) -> None:
        self.export, self._settings = export, settings
        registry = self.registry = CollectorRegistry()
        common: Any = {"namespace": "kubetune_serving", "registry": registry}
        sizes, twentieths = batch_sizes(settings.batch), [i / 20 for i in range(1, 21)]
        self.ready = Gauge("ready", "1 while requests are answered", **common)
        self.requests = Counter("requests", "Requests by route and status", ["route", "code"], **common)
        text = "From the head of a request to the end of its answer"
        self.seconds = Histogram("request_seconds", text, ["route"], buckets=SECONDS, **common)
        self.batches = Histogram("batch_images", "Images of a call of the model", buckets=sizes, **common)
        self.batch_seconds = Histogram("batch_seconds", "Length of a call of the model", buckets=SECONDS, **common)
        self._predictions = Counter("predictions", "Answers by the most probable class", ["class"], **common)
        self._confidence = Histogram("confidence", "Largest probability of an answer", buckets=twentieths, **common)
        Gauge("queue_images", "Images that wait for the model", **common).set_function(waiting)
        Gauge("active_requests", "Requests that are not answered yet", **common).set_function(active)
        ProcessCollector(registry=registry)
        registry.register(self)
        self._window = Window(len(export.classes), RECENT)
        reference = export.reference or {}
        self._names = reference.get("classes", export.classes)  # labels.txt has no line breaks in them
        embedding = reference.get("embedding", {})
        self._projection = np.asarray(embedding["projection"], np.float64) if embedding.get("projection") else None
        self._dimensions = len(embedding.get("mean", ()))
        self._counting = threading.Lock()
        self._seen = 0
        self._log = _open_log(settings.log)

    def predicted(self, answers: Sequence[Answer]) -> None:
        """Count and log what was answered; called by the thread that runs the model."""
        now, lines = timestamp(), ""
        for answer in answers:
            chosen = int(answer.probabilities.argmax())
            confidence = float(answer.probabilities[chosen])
            embedding = self._projected(answer.embedding)
            self._predictions.labels(self.export.classes[chosen]).inc()
            self._confidence.observe(confidence)
            with self._counting:
                self._window.add(chosen, confidence, embedding)
            self._seen += 1
            sample = self._settings.log_sample  # every n-th, so that no chance is in it
            if self._log is not None and int(self._seen * sample) > int((self._seen - 1) * sample):
                lines += json.dumps(self._line(now, answer.probabilities, embedding)) + "\n"
        if lines and self._log is not None:
            try:
                os.write(self._log, lines.encode())
            except OSError as error:  # answers matter more
                log.warning(f"log={self._settings.log} cannot be written ({error.strerror}); it ends here")
                self._log = None

    def _projected(self, embedding: np.ndarray | None) -> np.ndarray | None:
        """The dimensions of an embedding that the reference has; None without a reference."""
        if embedding is None or not self._dimensions:
            return None
        return embedding @ self._projection if self._projection is not None else embedding

    def _line(self, now: str, probabilities: np.ndarray, embedding: np.ndarray | None) -> dict[str, Any]:
        best = np.argsort(-probabilities, kind="stable")[:FEW]
        few = {self._names[i]: round(float(probabilities[i]), 6) for i in best}
        confidence = float(probabilities[best[0]])
        line = {"time": now, "class": self._names[best[0]], "confidence": confidence, "probabilities": few}
        return line | ({} if embedding is None else {"embedding": [round(float(x), 5) for x in embedding]})

    def collect(self) -> Iterator[Metric]:
        """Version of the model, and drift where there is a reference and enough was predicted."""
        facts = {"model": self._settings.name, "model_version": self.export.version, "version": trainer.__version__}
        yield InfoMetricFamily("kubetune_serving", "The model that is served, and the version of kubetune", facts)
        with self._counting:
            seen, classes, confidences = self._window.n, self._window.classes.copy(), self._window.confidences.copy()
            gaussian = self._window.gaussian() if self._window.embedded >= max(LEAST, 2) else None
        yield GaugeMetricFamily("kubetune_serving_drift_predictions", "Predictions that drift is measured over", seen)
        reference = self.export.reference
        if reference is None or seen < LEAST:
            return
        stability = GaugeMetricFamily(
            "kubetune_serving_population_stability_index",
            "Of the last predictions against the test split: 0.1 is moderate, 0.25 is drift",
            labels=["of"],
        )
        frequencies = np.asarray(reference["class_frequencies"]) * reference["n"]
        stability.add_metric(["classes"], population_stability(frequencies, classes))
        expected = np.asarray(reference["confidence_histogram"]["counts"], np.float64)
        stability.add_metric(["confidence"], population_stability(*merged(expected, confidences)))
        yield stability
        if gaussian is not None and self._dimensions:
            yield GaugeMetricFamily(
                "kubetune_serving_embedding_distance",
                "Frechet distance of the last embeddings from the test split's, over the variance of those",
                embedding_distance(reference["embedding"], *gaussian),
            )


def _open_log(file: str | None) -> int | None:
    if not file:
        return None
    path = Path(file).expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"log={file} cannot be written ({error.strerror}); give a file that can, or none") from None
