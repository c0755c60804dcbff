"""Scoring a split, and the few numbers that an epoch is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import tensorflow as tf

from trainer.types import Batch

TOP = 5  # what top-k counts; shown only where there are more classes


class Answers(Protocol):
    """What scoring needs of a classifier or a teacher."""

    def logits(self, images: Any, *, training: bool = False) -> Any:
        """Float32 [b, classes] for images in 0..255, [b, S, S, 3]."""


class EvaluationPass:
    """Scores the examples of this worker's batches, each exactly once; workers do not wait for each other."""

    def __init__(self, strategy: tf.distribute.Strategy, network: Answers) -> None:
        self.strategy, self.network = strategy, network
        self._predict = tf.function(self._run, autograph=False)
        self._streams: list[tuple[Any, Any, Any]] = []

    def _run(self, batch: Batch) -> tuple[Any, Any]:
        return self.strategy.run(self._replica, args=(batch,))

    def _replica(self, batch: Batch) -> tuple[tf.Tensor, Batch]:
        return tf.nn.softmax(self.network.logits(batch["image"], training=False)), batch

    def opened(self, source: Any, how: Any, batches: Callable[[], Any]) -> Any:
        """What `batches()` is, the same for the same object `source`, read in the same way: it is built once, and not
        for each epoch.
        """
        for known, way, stream in self._streams:
            if known is source and way == how:
                return stream
        self._streams.append((source, how, batches()))
        return self._streams[-1][-1]

    def probabilities(
        self, batches: Any, count: int, ready: Callable[[], bool] = lambda: True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Float32 [n, classes], int32 labels [n] and int64 indices [n] of `count` batches, ordered by index; padding
        left out.

        `ready()` is asked before each batch; once it is false, what has been scored so far.
        """
        parts: list[tuple[np.ndarray, ...]] = []
        stream = iter(batches)
        for _ in range(count):
            if not ready():
                break
            outcome, seen = self._predict(next(stream))
            local = self.strategy.experimental_local_results
            keys = ("label", "index", "weight")
            for p, *rest in zip(local(outcome), *(local(seen[k]) for k in keys), strict=True):
                label, index, weight = (r.numpy() for r in rest)
                real = weight > 0
                parts.append((p.numpy()[real], label[real], index[real]))
        return by_index(parts)


def by_index(parts: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Join parts of (probabilities, labels, indices), ordered by index."""
    if not parts:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int32), np.zeros(0, np.int64)
    probabilities, labels, indices = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.argsort(indices, kind="stable")
    return probabilities[order], labels[order], indices[order]


def top_k(probabilities: np.ndarray, labels: np.ndarray, k: int = TOP) -> int:
    """How many labels are among the k most probable classes; of equal ones the first counts, as argmax has it."""
    of_truth = probabilities[np.arange(len(labels)), labels][:, None]
    earlier = np.arange(probabilities.shape[1])[None, :] < labels[:, None]
    ahead = (probabilities > of_truth) | ((probabilities == of_truth) & earlier)
    return int((ahead.sum(axis=1) < k).sum())


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The mean F1 of the classes that occur or are predicted (as scikit-learn has it)."""
    size = int(max(predictions.max(), labels.max())) + 1
    found = np.bincount(labels[predictions == labels], minlength=size)
    both = np.bincount(labels, minlength=size) + np.bincount(predictions, minlength=size)
    return float((2.0 * found[both > 0] / both[both > 0]).mean())


def validation_scores(probabilities: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What is told of validation after each epoch, in float64.

    Returns:
        val_loss (mean cross-entropy, probabilities floored at 1e-7 as in Keras), val_accuracy, val_macro_f1, val_n; and
        val_top_5 where there are more than five classes.
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
