"""The folds: how many, and which examples are in which."""

import numpy as np
import pytest

from tests.errors import raises
from trainer.backbones.folds import FoldPlan, plan_folds, pool_examples
from trainer.errors import ConfigError, DataError
from trainer.types import Dataset, Shard, Split


def make_dataset(counts: list[int], validation: list[int] | None = None) -> Dataset:
    """Classes with these numbers of training examples, and of validation examples."""

    def split(name: str, numbers: list[int]) -> Split:
        labels = np.repeat(np.arange(len(numbers)), numbers).astype(np.int32)
        return Split(name, labels, files=tuple(f"{name}-{i}" for i in range(len(labels))))

    splits = {"train": split("train", counts)} | ({"validation": split("validation", validation)} if validation else {})
    return Dataset("any", tuple("abcdef"[: len(counts)]), splits, "1")


@pytest.mark.parametrize(
    ("per_class", "expected"), [([250, 250], 10), ([250, 251], 5), ([5000, 5000], 5), ([5, 400], 5), ([2, 90], 2)]
)
def test_the_number_of_folds_follows_the_number_of_examples_and_the_rarest_class(
    per_class: list[int], expected: int
) -> None:
    plan = plan_folds(make_dataset(per_class), None, 1)
    assert plan.num_folds == expected
    counts = np.array(
        [np.bincount(plan.fold_of_example[make_dataset(per_class).splits["train"].labels == c]) for c in (0, 1)]
    )
    assert (np.ptp(counts, axis=1) <= 1).all()  # stratified
    train, scored = plan.get_indices(0)
    assert sorted([*train, *scored]) == list(range(sum(per_class)))


def test_above_ten_thousand_examples_or_with_one_fold_the_validation_split_is_scored() -> None:
    for plan in (
        plan_folds(make_dataset([6000, 4000], [10, 20]), None, 1),
        plan_folds(make_dataset([4, 4], [2, 1]), 1, 1),
    ):
        assert plan.num_folds == 1
        train, scored = plan.get_indices(0)
        assert len(scored) == (30 if len(plan.fold_of_example) > 10_000 else 3)
        assert train[-1] + 1 == scored[0]
    with raises(DataError, key="folds", value=1, fix="validation_fraction"):
        plan_folds(make_dataset([4, 4]), 1, 1)


def test_folds_are_a_function_of_the_seed_and_the_examples() -> None:
    first, again, other = (plan_folds(make_dataset([50, 70]), 5, seed).fold_of_example for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_the_examples_of_a_group_are_in_one_fold() -> None:
    groups = [f"patient {i // 4}" for i in range(80)]
    plan = plan_folds(make_dataset([40, 40]), 5, 1, groups)
    folds_of = {group: set(plan.fold_of_example[np.array(groups) == group]) for group in groups}
    assert {len(folds) for folds in folds_of.values()} == {1}
    assert "grouped" in plan.reason
    few = plan_folds(make_dataset([40, 40]), None, 1, [f"{i % 3}" for i in range(80)])
    assert few.num_folds == 3
    with raises(ConfigError, key="folds", value=4, problem="the 3 groups"):
        plan_folds(make_dataset([40, 40]), 4, 1, [f"{i % 3}" for i in range(80)])


def test_data_that_cannot_be_divided_is_rejected() -> None:
    with raises(DataError, problem="1 examples of a"):
        plan_folds(make_dataset([1, 30]), None, 1)
    with raises(DataError, problem="1 groups"):
        plan_folds(make_dataset([30, 30]), None, 1, ["one"] * 60)
    with raises(DataError, problem="all examples of a"):  # a class of its own group
        plan_folds(make_dataset([4, 30]), 2, 1, [*["first"] * 4, *[f"{i}" for i in range(30)]])
    with raises(ConfigError, key="folds", value=7, fix="use at most 5"):
        plan_folds(make_dataset([5, 90]), 7, 1)


def test_the_pool_has_train_and_validation_but_no_test_examples() -> None:
    dataset = make_dataset([3, 2], [1, 1])
    dataset.splits["test"] = dataset.splits["train"]
    pool = pool_examples(dataset)
    assert list(pool.splits) == ["train"]
    assert pool.splits["train"].files[:6] == (*(f"train-{i}" for i in range(5)), "validation-0")
    labels = np.array([0, 1], np.int32)
    shards = {
        n: Split(n, labels, shards=(Shard("a", 4, start, start + 2),)) for n, start in (("train", 2), ("validation", 0))
    }
    records = pool_examples(Dataset("any", ("a", "b"), shards, "1")).splits["train"]
    assert [records.record_of(i) for i in range(4)] == [("a", 2), ("a", 3), ("a", 0), ("a", 1)]


def test_an_example_that_every_fold_trains_on_is_never_scored() -> None:
    plan = FoldPlan(np.array([-1, 0, -1]), 1, "")
    assert [part.tolist() for part in plan.get_indices(0)] == [[0, 2], [1]]
