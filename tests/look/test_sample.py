"""The choice of examined and shown images."""

import numpy as np
import pytest

from trainer.look.sample import MAX_SHOWN, PER_CLASS, choose_examples, choose_sample
from trainer.types import Shard, Split


def make_split(count: int, shards: int = 0) -> Split:
    labels = (np.arange(count) % 3).astype(np.int32)
    if not shards:
        return Split("train", labels, files=tuple(f"{i}.jpg" for i in range(count)))
    each = count // shards
    return Split("train", labels, shards=tuple(Shard(f"{i}.tfrec", each, 0, each) for i in range(shards)))


@pytest.mark.parametrize("shards", [0, 10])
def test_a_small_split_is_examined_completely_and_a_large_one_evenly(shards: int) -> None:
    split = make_split(1000, shards)
    np.testing.assert_array_equal(choose_sample(split, 1000, 1), np.arange(1000))
    chosen = choose_sample(split, 100, 1)
    assert len(np.unique(chosen)) == len(chosen) == 100
    np.testing.assert_array_equal(chosen, np.sort(chosen))
    np.testing.assert_array_equal(chosen, choose_sample(split, 100, 1))
    if shards:
        assert len({split.record_of(i)[0] for i in chosen.tolist()}) == 1  # of 10 shards only one is read
        assert {split.record_of(int(choose_sample(split, 100, seed)[0]))[0] for seed in range(20)} != {"0.tfrec"}
    else:
        assert np.diff(chosen).max() <= 11


def test_examples_of_each_class_prefer_the_sample_and_depend_on_the_seed() -> None:
    labels = np.repeat([0, 1, 2], [500, 40, 2]).astype(np.int32)
    sample = np.arange(0, 542, 10)
    chosen = choose_examples(labels, sample, 7)
    assert {k: len(members) for k, members in chosen.items()} == {0: PER_CLASS, 1: 4 + 2, 2: 2}
    assert all((labels[members] == k).all() for k, members in chosen.items())
    assert set(chosen[0]) <= set(sample)
    assert len(set(chosen[1]) & set(sample)) == 4  # all that the sample has of this class
    assert all(np.array_equal(members, choose_examples(labels, sample, 7)[k]) for k, members in chosen.items())
    assert not np.array_equal(chosen[0], choose_examples(labels, sample, 8)[0])


def test_many_classes_have_one_example_each_and_at_most_so_many_are_shown() -> None:
    labels = np.concatenate([np.repeat(np.arange(MAX_SHOWN), 2), np.full(9, MAX_SHOWN)]).astype(np.int32)
    chosen = choose_examples(labels, np.arange(0), 1)
    assert {len(members) for members in chosen.values()} == {1}
    assert chosen.keys() == set(range(MAX_SHOWN))  # without the most frequent class
