"""The order of an epoch, and the position of every step in it."""

import numpy as np
import pytest
import tensorflow as tf

from tests.data.orders import compute_epoch_order
from trainer.data.order import Order, make_sequence_blocks, make_training_blocks, select_examples_to_score
from trainer.data.sharding import count_steps_per_epoch
from trainer.types import Shard, Split


def make_file_split(count: int) -> Split:
    return Split("train", np.zeros(count, np.int32), files=tuple(f"{i}.jpg" for i in range(count)))


def make_shard_split(*ranges: tuple[int, int]) -> Split:
    parts = tuple(Shard(f"{n}.tfrec", stop + 3, start, stop) for n, (start, stop) in enumerate(ranges))
    return Split("train", np.zeros(sum(b - a for a, b in ranges), np.int32), shards=parts)


def to_arrays(block: dict[str, tf.Tensor]) -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in block.items()}


MANY = make_shard_split((0, 7), (2, 11), (0, 0), (1, 6), (0, 20), (5, 17))


@pytest.mark.parametrize("split", [make_file_split(50), MANY])
@pytest.mark.parametrize("window", [1, 8, 1000])
def test_an_epoch_holds_every_example_once(split: Split, window: int) -> None:
    order = compute_epoch_order(split, 3, 5, window)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(split.count))


@pytest.mark.parametrize("split", [make_file_split(50), MANY])
def test_order_depends_on_seed_and_epoch_alone(split: Split) -> None:
    first = compute_epoch_order(split, 3, 5, 16)
    np.testing.assert_array_equal(first, compute_epoch_order(split, 3, 5, 16))
    assert not np.array_equal(first, compute_epoch_order(split, 3, 6, 16))
    assert not np.array_equal(first, compute_epoch_order(split, 4, 5, 16))


def test_records_are_shuffled_within_windows_over_permuted_shards() -> None:
    split = make_shard_split(*[(0, 10)] * 12)
    order = compute_epoch_order(split, 1, 0, 20)
    shard_of = [sorted(set(order[i : i + 20] // 10)) for i in range(0, 120, 20)]
    assert all(len(pair) == 2 for pair in shard_of)  # a window is two whole shards ...
    assert [p[0] for p in shard_of] != sorted(p[0] for p in shard_of)  # ... which do not come in the order of names
    assert not np.array_equal(order[:20], np.sort(order[:20]))


def test_image_files_are_shuffled_whole_whatever_the_window() -> None:
    order = compute_epoch_order(make_file_split(10_000), 1, 0, 16)
    # A uniform shuffle moves an index by a third of the count.
    assert np.abs(order - np.arange(10_000)).mean() == pytest.approx(10_000 / 3, rel=0.05)


@pytest.mark.parametrize("split", [make_file_split(53), MANY])
@pytest.mark.parametrize("shuffle", [True, False])
def test_blocks_from_any_step_continue_the_stream(split: Split, shuffle: bool) -> None:
    steps = count_steps_per_epoch(split, 8)

    def rows(epoch: int, step: int, count: int) -> np.ndarray:
        order = Order(batch_size=8, seed=7, window=10, first_epoch=epoch, first_step=step, shuffle=shuffle)
        block = make_training_blocks(split, order)
        parts, number = [], 0
        while sum(len(p) for p in parts) < count:
            b = to_arrays(block(number))
            parts.append(np.stack([b["epoch"], b["index"], b["weight"].astype(np.int64), b["position"]], axis=1))
            number += 1
        return np.concatenate(parts)[:count]

    whole = rows(0, 0, 3 * steps * 8)
    for epoch in range(3):
        mine = whole[epoch * steps * 8 : (epoch + 1) * steps * 8]
        expected = compute_epoch_order(split, 7, epoch, 10) if shuffle else np.arange(split.count)
        np.testing.assert_array_equal(mine[mine[:, 2] == 1, 1], expected)
        assert (mine[:, 0] == epoch).all()
    np.testing.assert_array_equal(whole[:, 3], np.arange(len(whole)) % 8)
    for step in range(3 * steps):
        resumed = rows(step // steps, step % steps, 24)
        np.testing.assert_array_equal(resumed[: len(whole) - step * 8], whole[step * 8 : step * 8 + 24])


def test_a_block_reads_the_records_of_its_rows() -> None:
    block = make_training_blocks(MANY, Order(batch_size=8, seed=7, window=10, first_epoch=2, first_step=3))
    first_index = np.cumsum([0] + [s.stop - s.start for s in MANY.shards])
    for number in range(12):
        b = to_arrays(block(number))
        records = [(int(s), int(first + i)) for s, first, count in b["ranges"] for i in range(count)]
        assert len(records) <= 10
        for offset, index in zip(b["offset"][b["weight"] > 0], b["index"][b["weight"] > 0], strict=True):
            shard, record = records[offset]
            assert index == first_index[shard] + record - MANY.shards[shard].start


def test_a_resume_reads_no_window_but_its_own() -> None:
    split = make_shard_split(*[(0, 100)] * 10)
    block = make_training_blocks(split, Order(batch_size=10, seed=0, window=200, first_step=71))
    assert block(0)["ranges"].numpy()[:, 2].sum() == 200
    assert len(block(0)["index"]) == 90  # rows 710 to 799


def test_a_sequence_holds_the_chosen_once_and_pads() -> None:
    split = make_shard_split((0, 1500), (10, 1700))
    chosen = np.array([3, 1023, 1024, 1499, 1500, 2048, 3189])
    count, block = make_sequence_blocks(split, chosen, 4)
    blocks = [to_arrays(block(i)) for i in range(count)]
    weight = np.concatenate([b["weight"] for b in blocks])
    np.testing.assert_array_equal(np.concatenate([b["index"] for b in blocks])[weight > 0], chosen)
    assert len(weight) == 8
    assert all(b["ranges"][:, 2].sum() <= 1024 for b in blocks)


def test_a_fraction_to_score_is_fixed_and_shuffled() -> None:
    split = make_file_split(1000)  # as if class by class
    chosen = select_examples_to_score(split, 10, 0.301)
    assert len(chosen) == 310  # 31 batches
    assert (np.diff(chosen) > 0).all()
    assert (np.bincount(chosen // 100, minlength=10) > 15).all()
    np.testing.assert_array_equal(chosen, select_examples_to_score(split, 10, 0.301))
    np.testing.assert_array_equal(select_examples_to_score(split, 10, 1.0), np.arange(1000))
