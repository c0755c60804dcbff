"""Predict and score a split on all replicas and workers, and compute the validation scores of an epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from trainer.cluster.worker import Worker
from trainer.data.images import BatchSource, convert_data_errors
from trainer.data.pipeline import Batches, build_evaluation_batches
from trainer.data.shard_gate import ShardGate, ShardGates
from trainer.data.sharding import UNSHARDED, Sharding
from trainer.errors import DataError, StopRequested
from trainer.evaluation.metrics import MIN_PROBABILITY, TOP_K, compute_macro_f1, count_top_k
from trainer.monitoring.health import health
from trainer.types import Batch, SplitPredictions

# Images per replica and device call in the feature pass, in `trainer.predict`, and in scoring with
# `training.virtual_replicas`. Constant, so that the results' bits do not depend on batch size and number of workers.
ROWS_PER_CALL = {"CPU": 32, "GPU": 128}


def get_images_per_call() -> int:
    """Return the value of `ROWS_PER_CALL` for this machine."""
    return ROWS_PER_CALL["GPU" if tf.config.list_physical_devices("GPU") else "CPU"]


class Network(Protocol):
    """A classifier, the tail of a classifier (its layers above cached features), or a teacher."""

    def logits(self, images: Any, *, training: bool = False) -> Any:
        """Return logits, float32 [b, classes], for images [b, S, S, 3] in 0..255, or for features if it is a tail."""


class EmbeddingNetwork(Network, Protocol):
    """A network that also computes embeddings, such as a classifier."""

    def logits_and_embeddings(self, images: Any) -> tuple[Any, Any]:
        """Return logits, float32 [b, classes], and pooled features, float32 [b, C], for images [b, S, S, 3]."""


@dataclass(frozen=True)
class Predictions:
    """Predictions for n examples, and embeddings of m of them, both ordered by example index."""

    probabilities: np.ndarray  # float32 [n, classes]
    labels: np.ndarray  # int32 [n]
    indices: np.ndarray  # int64 [n]: example indices
    losses: np.ndarray  # float32 [n]: cross-entropy of the logits
    embedded_indices: np.ndarray  # int64 [m]: indices of the examples with an embedding
    embeddings: np.ndarray  # float32 [m, C]


class Predictor:
    """Computes a network's predictions for the batches of a distributed dataset, on all replicas of a strategy."""

    def __init__(
        self, strategy: tf.distribute.Strategy, network: Network, embedder: EmbeddingNetwork | None = None
    ) -> None:
        """Create a predictor. `embedder`: the same network if it should compute embeddings too."""
        self.strategy, self.network, self.embedder = strategy, network, embedder
        self._predict = tf.function(lambda batch: strategy.run(self._replica, args=(batch,)), autograph=False)

    def _replica(self, batch: Batch) -> tuple[tf.Tensor, ...]:
        """Return probabilities, losses, labels, indices, weights and, with an embedder, embeddings of a batch.

        Called in replica context.
        """
        if self.embedder is not None:
            logits, embeddings = self.embedder.logits_and_embeddings(batch["image"])
        else:
            logits, embeddings = self.network.logits(batch["image"], training=False), None
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(batch["label"], logits)
        outputs = tf.nn.softmax(logits), losses, batch["label"], batch["index"], batch["weight"]
        return outputs if embeddings is None else (*outputs, embeddings)

    def predict(
        self,
        batches: Any,
        count: int,
        is_ready: Callable[[], bool] = lambda: True,
        embedded: np.ndarray | tuple[()] = (),
    ) -> Predictions:
        """Predict batches of a distributed dataset.

        Args:
            batches: iterable of distributed batches (`trainer.types.Batch`).
            count: number of batches to predict.
            is_ready: called before each batch; the prediction ends early if it returns False.
            embedded: indices of the examples whose embeddings are returned; requires an embedder.

        Returns:
            The predictions, without those for padding.
        """
        chunks: list[Predictions] = []
        stream = iter(batches)
        local_results = self.strategy.experimental_local_results
        for i in range(count):
            health.record_progress(i, count)
            if not is_ready():
                break
            columns = [local_results(column) for column in self._predict(next(stream))]
            for tensors in zip(*columns, strict=True):
                probabilities, losses, labels, indices, weights, *others = (tensor.numpy() for tensor in tensors)
                is_example = weights > 0  # padding has weight 0
                has_embedding = is_example & np.isin(indices, embedded)
                embeddings = others[0][has_embedding] if others else np.zeros((0, 0), np.float32)
                chunks.append(
                    Predictions(
                        probabilities[is_example], labels[is_example], indices[is_example], losses[is_example],
                        indices[has_embedding], embeddings,
                    )
                )  # fmt: skip
        return _join_by_index(chunks)


class Scorer:
    """Computes a network's predictions for a split; each worker predicts its own shard of the examples.

    The workers do not wait for each other between batches. At the end the chief gathers all workers' predictions.
    """

    def __init__(
        self,
        worker: Worker,
        network: Network,
        sharding: Sharding = UNSHARDED,
        on_wait: Callable[[float], None] = lambda _: None,
        rows_per_call: int | None = None,
        embedder: EmbeddingNetwork | None = None,
    ) -> None:
        """Create a scorer.

        Args:
            worker: this worker.
            network: the network, built in the scope of the worker's strategy.
            sharding: which examples this worker predicts.
            on_wait: called with the seconds of each wait for shards from a bucket.
            rows_per_call: images per replica and device call; defaults to the batch size per replica.
            embedder: the same network if it should compute embeddings too.
        """
        self.worker, self.sharding = worker, sharding
        self.on_wait, self.rows_per_call = on_wait, rows_per_call
        self.predictor = Predictor(worker.strategy, network, embedder)
        self._opened: list[tuple[BatchSource, tuple[int, float], Batches, Any]] = []

    def with_embeddings(self, network: EmbeddingNetwork) -> "Scorer":
        """Return a scorer with the settings of this one that also computes the embeddings of `network`."""
        return Scorer(self.worker, network, self.sharding, self.on_wait, self.rows_per_call, embedder=network)

    def score(
        self,
        source: BatchSource,
        batch_size: int,
        topic: str,
        fraction: float = 1.0,
        embedded: np.ndarray | tuple[()] = (),
    ) -> SplitPredictions:
        """Predict the examples of `source`. All workers must call this.

        A stop request ends the call early, with incomplete predictions and without an exception, so call
        `Worker.should_stop` before you use the result.

        Args:
            source: the images or features of a split.
            batch_size: the global batch size.
            topic: name under which the predictions are gathered on the control channel, the same on all workers.
            fraction: fraction of the batches to predict; every call predicts the same examples.
            embedded: indices of the examples whose embeddings are returned; requires an embedder.

        Returns:
            On the chief, the predictions for all these examples; on any other worker, only for the examples in its
            shard. Examples that cannot be read are omitted.

        Raises:
            DataError: an example cannot be read and data.on_error is "fail", or (on the chief) no example can be read.
            Interrupted: the bucket with the shards does not respond.
        """
        batches, stream = self._open(source, batch_size, fraction)
        rows_per_batch = batch_size // self.sharding.num_workers
        if self.rows_per_call:
            rows_per_batch = self.rows_per_call * self.worker.replicas
        gate = batches.open_gate()
        with convert_data_errors(source):
            ready = partial(self._wait_for_shards, gate, rows_per_batch)
            predictions = self.predictor.predict(stream, batches.count or 0, ready, embedded)
        gate.close()
        if self.worker.size > 1:
            shards = self.worker.control.gather_arrays(topic, vars(predictions))
            if shards:
                predictions = _join_by_index([Predictions(**shard) for shard in shards if len(shard["labels"])])
        if self.worker.is_chief and not len(predictions.labels) and self.worker.stop.reason is None:
            reasons = [
                f"{source.split.name_of(index)}: {reason}" for index, reason in sorted(source.unreadable.items())
            ]
            first = f", the first: {reasons[0]}" if reasons else ""
            problem = f"no example of {source.split.name} could be read{first}"
            raise DataError(problem, fix="repair the images, or use another split")
        return SplitPredictions(source.split.name, **vars(predictions))

    def _open(self, source: BatchSource, batch_size: int, fraction: float) -> tuple[Batches, Any]:
        """Return the batches of a source and their distributed dataset, which are built once and reused later."""
        for opened_source, settings, batches, stream in self._opened:
            if opened_source is source and settings == (batch_size, fraction):
                return batches, stream
        batches = build_evaluation_batches(
            source, batch_size=batch_size, num_replicas=self.worker.replicas, fraction=fraction, sharding=self.sharding,
            rows_per_element=self.rows_per_call,
        )  # fmt: skip
        stream = self.worker.strategy.distribute_datasets_from_function(lambda _: batches.dataset)
        self._opened.append((source, (batch_size, fraction), batches, stream))
        return batches, stream

    def _wait_for_shards(self, gate: ShardGate | ShardGates, count: int) -> bool:
        """Wait until the next `count` examples can be read; return False after a stop request."""
        try:
            seconds = gate.wait_for(count)
        except StopRequested:
            return False
        if seconds > 0:
            self.on_wait(seconds)
        health.record_progress()
        return self.worker.stop.reason is None


def _join_by_index(chunks: Sequence[Predictions]) -> Predictions:
    """Concatenate predictions, and sort the rows by index."""
    if not chunks:
        no_rows, no_indices = np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
        return Predictions(no_rows, np.zeros(0, np.int32), no_indices, np.zeros(0, np.float32), no_indices, no_rows)

    def join(column: str, order: np.ndarray, chunks: Sequence[Predictions] = chunks) -> np.ndarray:
        return np.concatenate([getattr(chunk, column) for chunk in chunks])[order]

    order = np.argsort(np.concatenate([chunk.indices for chunk in chunks]), kind="stable")
    embedded_order = np.argsort(np.concatenate([chunk.embedded_indices for chunk in chunks]), kind="stable")
    # The embeddings of a chunk that has none have no width.
    with_embeddings = [chunk for chunk in chunks if len(chunk.embedded_indices)] or list(chunks[:1])
    return Predictions(
        join("probabilities", order),
        join("labels", order),
        join("indices", order),
        join("losses", order),
        join("embedded_indices", embedded_order),
        join("embeddings", embedded_order, with_embeddings),
    )


def compute_validation_scores(
    probabilities: np.ndarray, labels: np.ndarray, losses: np.ndarray | tuple[()]
) -> dict[str, float]:
    """Compute the scores of the validation split after an epoch, in float64.

    Args:
        probabilities: float32 [n, classes] with n >= 1.
        labels: class indices, int32 [n].
        losses: cross-entropy of the logits, float32 [n]. It is used for examples whose label has a probability below
            `MIN_PROBABILITY`, as this may have underflowed; all other losses are computed from the probability.

    Returns:
        val_loss, the mean cross-entropy; val_accuracy; val_macro_f1; val_n, the number of examples; and val_top_5, the
        top-5 accuracy, if there are more than five classes.
    """
    label_probabilities = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    predictions = probabilities.argmax(-1)
    losses_from_probabilities = -np.log(np.maximum(label_probabilities, MIN_PROBABILITY))
    scores = {
        "val_loss": float(np.where(label_probabilities < MIN_PROBABILITY, losses, losses_from_probabilities).mean()),
        "val_accuracy": float((predictions == labels).mean()),
        "val_macro_f1": compute_macro_f1(predictions, labels),
        "val_n": len(labels),
    }
    if probabilities.shape[1] > TOP_K:
        scores["val_top_5"] = count_top_k(probabilities, labels) / len(labels)
    return scores
