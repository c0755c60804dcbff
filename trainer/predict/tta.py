"""Measure what the average over mirror images adds to the accuracy on a run's own held-out examples."""

from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.data.remote import addresses_in_errors
from trainer.errors import Interrupted, TrainerError
from trainer.evaluation.intervals import wilson_interval
from trainer.evaluation.paired import compare_paired
from trainer.exporting.export import open_images
from trainer.predict.model import Predict, predict_padded
from trainer.report.compare import describe_outcome
from trainer.runs.stored_run import StoredRun
from trainer.types import choose_scored_split

MAX_EXAMPLES = 10_000  # of the split, drawn at random; they are predicted with and without
BATCH_SIZE = 256  # images that are read at a time


def measure_flip(run: StoredRun, predict: Predict, image_size: int, check: Callable[[], None]) -> dict[str, Any]:
    """Predict the test split of a run (validation without one) with and without mirror images, and compare.

    `check` is called for each batch, and can raise to stop.

    Returns:
        `split`, `n`; `accuracy_without`, `accuracy_with` and their Wilson intervals; `difference` with its `interval`,
        `won`, `lost` and `p` of McNemar's exact test as in `trainer.compare`; `outcome` in words. If the data of the
        run cannot be opened or read: only `problem`.
    """
    try:
        images = open_images(run, image_size)
        split = choose_scored_split(images.dataset.splits)
        labels = images.dataset.splits[split].labels
        chosen = np.sort(np.random.default_rng(len(labels)).permutation(len(labels))[:MAX_EXAMPLES])
        plain, flipped = [], []
        with addresses_in_errors(images.addresses):
            for start in range(0, len(chosen), BATCH_SIZE):
                check()
                rows = images.rows(split, chosen[start : start + BATCH_SIZE])
                plain.append(predict_padded(predict, rows, flip=False)[0].argmax(axis=1))
                flipped.append(predict_padded(predict, rows, flip=True)[0].argmax(axis=1))
            images.require_readable()
            readable = ~np.isin(chosen, list(images.split(split).bad))
    except Interrupted:
        raise
    except TrainerError as error:
        return {"problem": f"the data of the run cannot be opened ({error})"}
    correct = [(np.concatenate(p) == labels[chosen])[readable] for p in (plain, flipped)]
    pair, n = compare_paired(*correct), int(readable.sum())
    return {
        "split": split,
        "n": n,
        "accuracy_without": float(correct[0].mean()),
        "interval_without": list(wilson_interval(int(correct[0].sum()), n)),
        "accuracy_with": float(correct[1].mean()),
        "interval_with": list(wilson_interval(int(correct[1].sum()), n)),
        "difference": pair.difference,
        "interval": list(pair.interval),
        "won": pair.won,
        "lost": pair.lost,
        "p": pair.p,
        "outcome": describe_outcome(pair, pair.p),
    }
