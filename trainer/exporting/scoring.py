"""Whether an exported file answers as the trainer did, how fast, and whether it may be kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from trainer.exporting.loading import Classify
from trainer.exporting.subject import HeldOut

BATCH = 32
TIMED = 20  # images, one at a time
UNTIMED = 3  # before them: the first ones allocate
SURE = 1.645  # standard deviations: 1 in 20, on one side


def score(classify: Classify, held_out: HeldOut, check: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Send the examples through an export; `check` is called before each batch and may raise to leave.

    Returns:
        `examples` n, `accuracy` and `trainer_accuracy` on them, `lost` and `gained`: how many only the trainer or only
        the export gets right; `largest_difference` of any probability; `timing`: `milliseconds_per_image`, the median
        of single images on this machine.
    """
    images, parts = held_out.images, []
    for at in range(0, len(images), BATCH):
        check()
        parts.append(classify(images[at : at + BATCH]))
    answers = np.concatenate(parts)
    differences = np.abs(answers - held_out.probabilities).max() if np.isfinite(answers).all() else np.inf
    right, was_right = (p.argmax(-1) == held_out.labels for p in (answers, held_out.probabilities))
    return {
        "examples": len(images),
        "accuracy": float(right.mean()),
        "trainer_accuracy": float(was_right.mean()),
        "lost": int((was_right & ~right).sum()),
        "gained": int((right & ~was_right).sum()),
        "largest_difference": float(differences),
        "timing": {"milliseconds_per_image": round(milliseconds(classify, images), 3)},
    }


def milliseconds(classify: Classify, images: np.ndarray) -> float:
    """The median time of one image alone."""
    spent = []
    for at in range(UNTIMED + TIMED):
        one = images[at % len(images)][None]
        began = time.perf_counter()
        classify(one)
        spent.append(time.perf_counter() - began)
    return float(np.median(spent[UNTIMED:])) * 1000


def drops_too_far(facts: dict[str, Any], most: float) -> bool:
    """Whether an export is worse than its trainer by more than the share `most` of the examples, and than chance.

    Examples that only one of the two gets right go either way by chance where rounding alone decides them, so that the
    net loss has a standard deviation of sqrt(lost + gained) (McNemar 1947): 2 lost of 60 say little, 6 say much. An
    answer that is no number is a drop.
    """
    if not np.isfinite(facts["largest_difference"]):
        return True
    net = facts["lost"] - facts["gained"]
    return net > most * facts["examples"] and net > SURE * (facts["lost"] + facts["gained"]) ** 0.5
