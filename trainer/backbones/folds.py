"""The folds of a cross-validation: their number, and the fold of each example."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.errors import ConfigError, DataError
from trainer.types import Dataset, Split

# Largest number of examples -> number of folds; above the last one the validation split is scored instead. Ten-fold
# stratified cross-validation has a small bias and variance (Kohavi 1995); five folds cost half as much, and with more
# examples the part that is left out matters less.
FOLDS_BY_EXAMPLES = ((500, 10), (10_000, 5))
HOLD_OUT = 1  # the number of folds with which the validation split is scored once


@dataclass(frozen=True)
class FoldPlan:
    """The fold in which each example is scored, and the reason for their number."""

    of: np.ndarray  # int64 [n]: fold, from 0; -1 for an example that every fold trains on
    count: int
    reason: str

    def split(self, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the examples to train on and to score, int64, increasing."""
        return np.flatnonzero(self.of != fold), np.flatnonzero(self.of == fold)


def pool_examples(dataset: Dataset) -> Dataset:
    """Return the dataset with one split, train, of the train and validation examples, in this order."""
    parts = [dataset.splits[name] for name in ("train", "validation") if name in dataset.splits]
    pooled = Split(
        "train",
        np.concatenate([part.labels for part in parts]),
        files=tuple(file for part in parts for file in part.files),
        shards=tuple(shard for part in parts for shard in part.shards),
        image_field=parts[0].image_field,
        orientation=parts[0].orientation,
    )
    return replace(dataset, splits={"train": pooled})


def plan_folds(
    dataset: Dataset, requested: int | None, seed: int, groups: Sequence[str] | None = None
) -> FoldPlan:  # fmt: skip
    """Assign the train and validation examples of a dataset to folds, stratified by class.

    The number of folds is `requested`, or else that of `FOLDS_BY_EXAMPLES`, and at most that of the examples of the
    rarest class. The examples of a group, if there are `groups` [n], are in one fold.

    Raises:
        ConfigError: more folds are requested than there are groups, or examples of a class.
        DataError: a class has one example, the examples are of a single group, a fold would leave no example of a class
            to train on, or the validation split is needed and missing.
    """
    pool = pool_examples(dataset).splits["train"]
    n, train_count = pool.count, dataset.splits["train"].count
    rule = next((folds for limit, folds in FOLDS_BY_EXAMPLES if n <= limit), HOLD_OUT)
    count, reason = requested or rule, "as given" if requested else f"for {n:,} examples"
    if count == HOLD_OUT:
        if train_count == n:
            fix = "set data.validation_fraction above 0, or folds=5"
            raise DataError("there are no validation examples to score", key="folds", value=HOLD_OUT, fix=fix)
        return FoldPlan(np.where(np.arange(n) < train_count, -1, 0), HOLD_OUT, f"{reason}: the validation split")
    counts = np.bincount(pool.labels, minlength=len(dataset.class_names))
    limits = {f"the {counts.min()} examples of {dataset.class_names[counts.argmin()]}": int(counts.min())}
    if groups is not None:
        limits[f"the {len(set(groups))} groups"] = len(set(groups))
    what, limit = min(limits.items(), key=lambda item: item[1])
    if limit < 2:
        raise DataError(f"{what} cannot be divided into folds", fix="add examples, or set folds=1")
    if count > limit:
        if requested:
            raise ConfigError(f"is more than {what}", key="folds", value=count, fix=f"use at most {limit}")
        count, reason = limit, f"as many as {what}"
    of = _assign(pool.labels, count, seed, groups)
    for fold in range(count):
        missing = np.flatnonzero(np.bincount(pool.labels[of != fold], minlength=len(counts)) == 0)
        if missing.size:
            name = dataset.class_names[missing[0]]
            problem = f"all examples of {name} are of groups in one fold, which leaves none to train on"
            raise DataError(problem, fix="use fewer folds, or data.group_field=null")
    return FoldPlan(of, count, reason + ", grouped" * (groups is not None))


def _assign(labels: np.ndarray, count: int, seed: int, groups: Sequence[str] | None) -> np.ndarray:
    """Return the fold of each example, int64 [n], a function of the arguments alone."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # takes a second to import

    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = kind(count, shuffle=True, random_state=seed % 2**32)
    of = np.zeros(len(labels), np.int64)
    with warnings.catch_warnings():  # of groups that cannot be stratified; the caller checks what matters
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, scored) in enumerate(folds.split(np.zeros(len(labels)), labels, groups)):
            of[scored] = fold
    return of
