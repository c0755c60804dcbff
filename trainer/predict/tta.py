"""Measure the effect of test-time augmentation: the accuracy on a run's held-out examples with and without flips."""

from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.data.remote import show_addresses_in_errors
from trainer.errors import Interrupted, TrainerError
from trainer.evaluation.intervals import compute_wilson_interval
from trainer.evaluation.paired import compare_paired
from trainer.exporting.export import open_images
from trainer.predict.model import Predict, predict_padded
from trainer.report.compare import describe_outcome
from trainer.runs.stored_run import StoredRun
from trainer.types import choose_scored_split

MAX_EXAMPLES = 10_000  # maximum number of examples, to limit the time; a larger split is sampled at random
BATCH_SIZE = 256  # images that are read at a time


def measure_flip(run: StoredRun, predict: Predict, image_size: int, check: Callable[[], None]) -> dict[str, Any]:
    """Predict a run's held-out examples with and without their mirror images, and compare the accuracies.

    The examples are from the test split, or from the validation split if there is no test split.

    Args:
        predict: the run's model: images uint8 [n, image_size, image_size, 3] -> probabilities and embeddings.
        image_size: height and width of the images in pixels.
        check: called before each batch; can raise to stop.

    Returns:
        A dictionary: `accuracy_without` and `accuracy_with` flips, and their Wilson intervals `interval_without` and
        `interval_with`; `difference`, its `interval`, `won`, `lost` and `p` of the paired comparison; `split`, and the
        number `n` of examples; `outcome`, a sentence. If the run's data cannot be read, the only key is `problem`.

    Raises:
        Interrupted: a bucket does not respond.
    """
    try:
        images = open_images(run, image_size)
        split = choose_scored_split(images.dataset.splits)
        labels = images.dataset.splits[split].labels
        indices = np.sort(np.random.default_rng(len(labels)).permutation(len(labels))[:MAX_EXAMPLES])
        plain_predictions, flip_predictions = [], []
        with show_addresses_in_errors(images.addresses):
            for start in range(0, len(indices), BATCH_SIZE):
                check()
                rows = images.read_images(split, indices[start : start + BATCH_SIZE])
                plain_predictions.append(predict_padded(predict, rows, flip=False)[0].argmax(axis=1))
                flip_predictions.append(predict_padded(predict, rows, flip=True)[0].argmax(axis=1))
            images.require_readable()
            readable = ~np.isin(indices, list(images.open_split(split).unreadable))
    except Interrupted:
        raise
    except TrainerError as error:
        return {"problem": f"the data of the run cannot be opened ({error})"}
    are_correct = [(np.concatenate(p) == labels[indices])[readable] for p in (plain_predictions, flip_predictions)]
    pair = compare_paired(*are_correct)
    n = int(readable.sum())
    return {
        "split": split,
        "n": n,
        "accuracy_without": float(are_correct[0].mean()),
        "interval_without": list(compute_wilson_interval(int(are_correct[0].sum()), n)),
        "accuracy_with": float(are_correct[1].mean()),
        "interval_with": list(compute_wilson_interval(int(are_correct[1].sum()), n)),
        "difference": pair.difference,
        "interval": list(pair.interval),
        "won": pair.won,
        "lost": pair.lost,
        "p": pair.p,
        "outcome": describe_outcome(pair, pair.p),
    }
