"""Choose the number of folds of a cross-validation, and assign the examples to the folds."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.errors import ConfigError, DataError
from trainer.types import Dataset, Split

# (Largest number of examples, number of folds). With more examples, the validation split is scored instead. Ten-fold
# stratified cross-validation has a small bias and variance (Kohavi 1995). Five folds cost half as much, and with many
# examples it matters little that a fifth of them is not trained on.
FOLDS_BY_EXAMPLES = ((500, 10), (10_000, 5))
HOLD_OUT = 1  # `FoldPlan.num_folds` if the validation split is scored once, without cross-validation


@dataclass(frozen=True)
class FoldPlan:
    """The fold in which each example is scored, and the reason for the number of folds."""

    # Fold in which each example is scored, int64 [n]; -1 for examples that are always trained on and never scored.
    fold_of_example: np.ndarray
    num_folds: int
    reason: str

    def get_indices(self, fold: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the indices of the examples to train on and of the examples to score, both int64 [k], increasing."""
        return np.flatnonzero(self.fold_of_example != fold), np.flatnonzero(self.fold_of_example == fold)


def pool_examples(dataset: Dataset) -> Dataset:
    """Return the dataset with a single split, train: the train examples, followed by the validation examples."""
    splits = [dataset.splits[name] for name in ("train", "validation") if name in dataset.splits]
    pooled = Split(
        "train",
        np.concatenate([split.labels for split in splits]),
        files=tuple(file for split in splits for file in split.files),
        shards=tuple(shard for split in splits for shard in split.shards),
        image_field=splits[0].image_field,
        orientation=splits[0].orientation,
    )
    return replace(dataset, splits={"train": pooled})


def plan_folds(
    dataset: Dataset, requested: int | None, seed: int, groups: Sequence[str] | None = None
) -> FoldPlan:  # fmt: skip
    """Assign the train and validation examples of a dataset to folds, stratified by class.

    If `requested` is None, the number of folds depends on the number of examples (`FOLDS_BY_EXAMPLES`), and is limited
    to the number of examples of the rarest class and to the number of groups.

    Args:
        requested: the number of folds; None to choose it. 1 means that the validation split is scored.
        seed: determines which examples are in which fold.
        groups: group of each train and validation example, [n]. All examples of a group are in the same fold.

    Raises:
        ConfigError: more folds are requested than the rarest class has examples, or than there are groups.
        DataError: a class has fewer than two examples, all examples are in a single group, all examples of a class are
            in one fold, or the validation split is needed and missing.
    """
    pool = pool_examples(dataset).splits["train"]
    n, num_train = pool.count, dataset.splits["train"].count
    default_num_folds = next((folds for limit, folds in FOLDS_BY_EXAMPLES if n <= limit), HOLD_OUT)
    num_folds, reason = requested or default_num_folds, "as given" if requested else f"for {n:,} examples"
    if num_folds == HOLD_OUT:
        if num_train == n:
            fix = "set data.validation_fraction above 0, or folds=5"
            raise DataError("there are no validation examples to score", key="folds", value=HOLD_OUT, fix=fix)
        return FoldPlan(np.where(np.arange(n) < num_train, -1, 0), HOLD_OUT, f"{reason}: the validation split")
    counts = np.bincount(pool.labels, minlength=len(dataset.class_names))
    limits = {f"the {counts.min()} examples of {dataset.class_names[counts.argmin()]}": int(counts.min())}
    if groups is not None:
        limits[f"the {len(set(groups))} groups"] = len(set(groups))
    limit_reason, limit = min(limits.items(), key=lambda item: item[1])
    if limit < 2:
        raise DataError(f"{limit_reason} cannot be divided into folds", fix="add examples, or set folds=1")
    if num_folds > limit:
        if requested:
            raise ConfigError(f"is more than {limit_reason}", key="folds", value=num_folds, fix=f"use at most {limit}")
        num_folds, reason = limit, f"as many as {limit_reason}"
    fold_of = _assign_folds(pool.labels, num_folds, seed, groups)
    for fold in range(num_folds):
        missing_classes = np.flatnonzero(np.bincount(pool.labels[fold_of != fold], minlength=len(counts)) == 0)
        if missing_classes.size:
            name = dataset.class_names[missing_classes[0]]
            problem = f"all examples of {name} are of groups in one fold, which leaves none to train on"
            raise DataError(problem, fix="use fewer folds, or data.group_field=null")
    if groups is not None:
        reason += ", grouped"
    return FoldPlan(fold_of, num_folds, reason)


def _assign_folds(labels: np.ndarray, num_folds: int, seed: int, groups: Sequence[str] | None) -> np.ndarray:
    """Return the fold of each example, int64 [n]. The same arguments always result in the same folds."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold  # takes a second to import

    splitter_class = StratifiedKFold if groups is None else StratifiedGroupKFold
    splitter = splitter_class(num_folds, shuffle=True, random_state=seed % 2**32)
    fold_of = np.zeros(len(labels), np.int64)
    with warnings.catch_warnings():  # groups can prevent exact stratification; the caller checks that a head can learn
        warnings.simplefilter("ignore", UserWarning)
        for fold, (_, held_out_indices) in enumerate(splitter.split(np.zeros(len(labels)), labels, groups)):
            fold_of[held_out_indices] = fold
    return fold_of
