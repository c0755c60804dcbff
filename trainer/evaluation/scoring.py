"""Scoring of a split over all replicas and workers, and the validation scores of an epoch."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from trainer.cluster.worker import Worker
from trainer.data.images import BatchSource, data_errors
from trainer.data.pipeline import Batches, evaluation_batches
from trainer.data.shard_gate import ShardGate
from trainer.data.sharding import UNSHARDED, Sharding
from trainer.errors import StopRequested
from trainer.evaluation.metrics import TOP, macro_f1, top_k
from trainer.monitoring.health import health
from trainer.types import Batch, Scored


class Network(Protocol):
    """A classifier, the tail of one, or a teacher."""

    def logits(self, images: Any, *, training: bool = False) -> Any:
        """Return float32 [b, classes] for images in 0..255, [b, S, S, 3], or for features of the trunk."""


class Predictor:
    """Compiled prediction of a network for batches over the replicas of a strategy."""

    def __init__(self, strategy: tf.distribute.Strategy, network: Network) -> None:
        self.strategy, self.network = strategy, network
        self._predict = tf.function(lambda batch: strategy.run(self._replica, args=(batch,)), autograph=False)

    def _replica(self, batch: Batch) -> tuple[tf.Tensor, Batch]:
        return tf.nn.softmax(self.network.logits(batch["image"], training=False)), batch

    def probabilities(
        self, batches: Any, count: int, ready: Callable[[], bool] = lambda: True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return float32 [n, classes], int32 labels [n] and int64 indices [n] of `count` batches, ordered by index.

        Padding is left out. `ready()` is called before each batch; when it returns False, scoring ends early.
        """
        parts: list[tuple[np.ndarray, ...]] = []
        stream, local = iter(batches), self.strategy.experimental_local_results
        for _ in range(count):
            if not ready():
                break
            outputs, batch = self._predict(next(stream))
            for p, *rest in zip(local(outputs), *(local(batch[k]) for k in ("label", "index", "weight")), strict=True):
                label, index, weight = (r.numpy() for r in rest)
                real = weight > 0
                parts.append((p.numpy()[real], label[real], index[real]))
        return by_index(parts)


class Scorer:
    """Scoring of splits with a network: each example exactly once over all workers, without a barrier."""

    def __init__(
        self,
        worker: Worker,
        network: Network,
        sharding: Sharding = UNSHARDED,
        waited: Callable[[float], None] = lambda _: None,
    ) -> None:
        """`waited` is called with the seconds that this worker waited for shards."""
        self.worker, self.sharding, self.waited = worker, sharding, waited
        self.predictor = Predictor(worker.strategy, network)
        self._opened: list[tuple[BatchSource, tuple[int, float], Batches, Any]] = []

    def score(self, source: BatchSource, batch_size: int, topic: str, part: float = 1.0) -> Scored:
        """Predict every example of `source`, or the fraction `part` that validation uses.

        Each worker scores its own shard. The chief returns all examples, the other workers their shard; after a stop
        request every worker returns what it has, so call `Worker.should_stop` afterwards.

        Args:
            batch_size: the global batch size.
            topic: name of the gather between the workers.

        Raises:
            DataError: an example cannot be read.
        """
        batches, stream = self._open(source, batch_size, part)
        gate, rows = batches.gate(), batch_size // self.sharding.workers
        with data_errors(source):
            own = self.predictor.probabilities(stream, batches.count or 0, lambda: self._ready(gate, rows))
        gate.close()
        if self.worker.size > 1:
            names = ("probabilities", "labels", "indices")
            shards = self.worker.control.gather_arrays(topic, dict(zip(names, own, strict=True)))
            if shards:
                own = by_index([tuple(shard[name] for name in names) for shard in shards if len(shard["labels"])])
        probabilities, labels, indices = own
        return Scored(source.split.name, indices, labels, probabilities)

    def _open(self, source: BatchSource, batch_size: int, part: float) -> tuple[Batches, Any]:
        """Return the batches of a source and their iterable, built once and not per epoch."""
        for known, settings, batches, stream in self._opened:
            if known is source and settings == (batch_size, part):
                return batches, stream
        batches = evaluation_batches(
            source, batch_size=batch_size, replicas=self.worker.replicas, part=part, sharding=self.sharding
        )
        stream = self.worker.strategy.distribute_datasets_from_function(lambda _: batches.dataset)
        self._opened.append((source, (batch_size, part), batches, stream))
        return batches, stream

    def _ready(self, gate: ShardGate, rows: int) -> bool:
        """Wait for the shards of the next batch; False after a stop request."""
        try:
            seconds = gate.wait_for(rows)
        except StopRequested:
            return False
        if seconds > 0:
            self.waited(seconds)
        health.progress()
        return self.worker.stop.reason is None


def by_index(parts: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join parts of (probabilities, labels, indices), ordered by index."""
    if not parts:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int32), np.zeros(0, np.int64)
    probabilities, labels, indices = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(indices, kind="stable")
    return probabilities[order], labels[order], indices[order]


def validation_scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return the scores of the validation split after an epoch, in float64.

    Returns:
        val_loss (mean cross-entropy; probabilities are at least 1e-7, as in Keras), val_accuracy, val_macro_f1, val_n,
        and with more than five classes val_top_5.
    """
    of_truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    predictions = probabilities.argmax(-1)
    scores = {
        "val_loss": float(-np.log(np.maximum(of_truth, 1e-7)).mean()),
        "val_accuracy": float((predictions == labels).mean()),
        "val_macro_f1": macro_f1(predictions, labels),
        "val_n": len(labels),
    }
    if probabilities.shape[1] > TOP:
        scores["val_top_5"] = top_k(probabilities, labels) / len(labels)
    return scores
