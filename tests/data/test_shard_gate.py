"""Every shard that a pipeline opens was required before, and the batches are those of local shards, bit for bit."""

import itertools
import shutil
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.data.images import encode_noise, serialize_record
from tests.data.orders import Batches, assert_same
from tests.data.products import make_combinations
from tests.data.splits_on_disk import COUNT, open_pixels, write_shard_split
from tests.errors import raises
from tests.waiting import wait_until
from trainer.config.schema import Augmentation
from trainer.data.images import Pixels
from trainer.data.order import Order, compute_block_shards, make_sequence_blocks, make_training_blocks
from trainer.data.pipeline import build_evaluation_batches, build_training_batches
from trainer.data.sharding import UNSHARDED, Sharding, count_steps_per_epoch
from trainer.errors import DataError
from trainer.storage.path import storage_path
from trainer.storage.shard_cache import ShardCache
from trainer.types import Shard, Split

SHARDS, RECORDS, SIDE = 50, 1990, 4
PLAIN, AUGMENTED = Augmentation(), Augmentation(flip_horizontal=True)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    """A split of fifty shards of 26 to 54 records, without the ends of some, and with two ranges of one."""
    folder = tmp_path_factory.mktemp("remote") / "data"
    folder.mkdir()
    counts = [26 + number * 7 % 29 for number in range(SHARDS - 1)]
    shards, images = [], itertools.count()
    for number, count in enumerate([*counts, RECORDS - sum(counts)]):
        path = folder / f"x-{number:02d}.tfrecord"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for image in itertools.islice(images, count):
                writer.write(serialize_record(image=encode_noise(image, "PNG", size=(SIDE, SIDE))))
        ranges = [(number % 3, count - number % 2)] if number < SHARDS - 1 else [(0, count)]
        ranges = [(0, 9), (12, count)] if number == 5 else ranges
        shards += [Shard(str(path), count, start, stop) for start, stop in ranges]
    used = sum(shard.stop - shard.start for shard in shards)
    return Split("train", (np.arange(used) % 3).astype(np.int32), shards=tuple(shards))


@pytest.fixture(scope="module")
def local(split: Split, tmp_path_factory: pytest.TempPathFactory) -> Pixels:
    """The images of the shards where they are, decoded once: `test_pipeline` shows that the cache changes no bits."""
    return open_pixels(split, "memory", tmp_path_factory.mktemp("local"), size=SIDE)


class Strict(ShardCache):
    """Replaces every shard that is not required by an empty file, so that a pipeline that opens it logs lost records."""

    largest = 0

    def nothing_else(self, pinned: set[str]) -> None:
        for name in self.infos.keys() - pinned:
            self._cached.pop(name, None)
            (self.folder / "empty").touch()
            (self.folder / "empty").rename(self.folder / name)  # an open shard can still be read

    def require(self, reader: str, names: Iterable[str], then: Iterable[str] = ()) -> float:
        names = tuple(names)
        assert not set(names) & set(then)
        waited = super().require(reader, names)
        with self._changed:
            pinned = self._get_required_names()
            self.largest = max(self.largest, sum(self.infos[name].size for name in pinned))
            self.nothing_else(pinned)
        return waited


def arriving(
    split: Split, folder: Path, part: float = 1.0, kind: type[ShardCache] = Strict, **changes: object
) -> Pixels:
    """The split with an empty folder and a cache that fetches into it, with room for the fraction `part` of the bytes."""
    home = Path(split.shards[0].path).parent
    entries = {entry.path.name: entry for entry in storage_path(home).list()}
    budget = int(part * sum(entry.size for entry in entries.values()))
    cache = kind(str(home), entries, folder, budget, print, lambda: None, ())
    assert not list(cache.folder.iterdir())
    if isinstance(cache, Strict):
        cache.nothing_else(set())
    shards = tuple(Shard(str(cache.folder / Path(s.path).name), s.count, s.start, s.stop) for s in split.shards)
    fetched = Split("train", split.labels, shards=shards)
    return open_pixels(fetched, "none", folder, size=SIDE, on_error="skip", shards=cache, **changes)


def taken(
    pixels: Pixels, order: Order, steps: int, call: int = 1, augmentation: Augmentation = PLAIN, replicas: int = 1
) -> Batches:
    """Training batches, `call` steps between two gates, as in the training loop."""
    training = build_training_batches(pixels, order, num_replicas=replicas, augmentation=augmentation)
    gate, stream = training.open_gate(), iter(training.dataset)
    batches: Batches = []
    for first in range(0, steps, call):
        now = min(call, steps - first)
        gate.wait_for(now * order.rows_per_worker)
        batches += [{k: v.numpy() for k, v in next(stream).items()} for _ in range(now * replicas)]
    time.sleep(0.05)  # reading ahead continues, and logs what it cannot read
    del stream
    gate.close()
    return batches


ORDER = Order(batch_size=8, seed=5, window=100)


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


# Quick: each kind of sharding, a window smaller and larger than a batch and than a shard, and no shuffling. The slow ones
# differ from a quick one in the window, the worker or the number of steps.
@pytest.mark.parametrize(
    ("order", "call", "part", "augmentation", "replicas"),
    [
        slow(replace(ORDER, first_step=200), 1, 0.4, PLAIN, 1),
        slow(ORDER, 7, 0.4, PLAIN, 1),
        slow(replace(ORDER, window=7), 3, 0.4, PLAIN, 1),
        slow(replace(ORDER, window=300, first_epoch=2, first_step=150), 5, 0.6, PLAIN, 1),
        (replace(ORDER, batch_size=20, window=60), 2, 0.5, AUGMENTED, 2),
        (replace(ORDER, shuffle=False, first_step=200), 4, 1.0, PLAIN, 1),
        (replace(ORDER, sharding=Sharding(1, 2), window=3, first_step=200), 3, 0.4, PLAIN, 1),
        slow(replace(ORDER, sharding=Sharding(0, 2), window=90), 3, 0.4, PLAIN, 1),
        (replace(ORDER, sharding=Sharding(1, 3, "file"), batch_size=12, window=50, first_step=40), 4, 0.4, PLAIN, 1),
        slow(replace(ORDER, sharding=Sharding(0, 2, "file"), window=64), 5, 0.5, AUGMENTED, 1),
        (replace(ORDER, sharding=Sharding(1, 2, "file", 4), batch_size=12, window=64), 5, 0.6, PLAIN, 2),
        slow(replace(ORDER, sharding=Sharding(0, 1, "file", 2), window=64), 5, 0.6, AUGMENTED, 1),
    ],
)
def test_a_pipeline_opens_only_what_was_required(
    split: Split, local: Pixels, tmp_path: Path, order: Order, call: int, part: float, augmentation: Augmentation,
    replicas: int,
) -> None:  # fmt: skip
    steps = count_steps_per_epoch(split, order.batch_size, order.sharding)
    if call == 7:
        steps = 3 * steps - 5
    else:  # across the end of an epoch
        order, steps = replace(order, first_step=order.first_step or steps - 60), 120
    strict = arriving(split, tmp_path, part)
    batches = taken(strict, order, steps, call, augmentation, replicas)
    assert strict.unreadable == {}
    assert_same(batches, taken(local, order, steps, call, augmentation, replicas))
    assert strict.shards.largest <= strict.shards.budget


def test_with_one_block_less_a_shard_would_be_missing(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bound of the test above is tight."""
    monkeypatch.setattr("trainer.data.shard_gate.BLOCKS_AHEAD", 0)
    monkeypatch.setattr("trainer.data.pipeline.compute_max_rows_ahead", lambda *_: 0)
    strict = arriving(split, tmp_path)
    taken(strict, ORDER, 100, 10)
    assert len(Path(strict.failures.name).read_text().splitlines()) > 50


@pytest.mark.parametrize(("part", "sharding"), [slow(1.0, UNSHARDED), (0.3, UNSHARDED), (1.0, Sharding(1, 3))])
def test_an_evaluation_opens_only_what_was_required(
    split: Split, local: Pixels, tmp_path: Path, part: float, sharding: Sharding, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.order.MAX_BLOCK_RECORDS", 64)
    options = {"batch_size": 12, "num_replicas": 2, "fraction": part, "sharding": sharding}

    def scored(pixels: Pixels) -> Batches:
        scoring = build_evaluation_batches(pixels, **options)  # type: ignore[arg-type]
        gate, stream, seen = scoring.open_gate(), iter(scoring.dataset), []
        for _ in range(scoring.count or 0):
            gate.wait_for(12 // sharding.num_workers)
            seen += [{k: v.numpy() for k, v in next(stream).items()} for _ in range(2)]
        time.sleep(0.05)
        del stream
        gate.close()
        return seen

    strict = arriving(split, tmp_path, 0.4)
    assert_same(scored(strict), scored(local))
    assert strict.unreadable == {}


def test_random_access_requires_what_it_reads(
    split: Split, local: Pixels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.order.MAX_BLOCK_RECORDS", 64)
    strict = arriving(split, tmp_path, 0.35)
    indices = np.random.default_rng(1).integers(0, split.count, 60)
    np.testing.assert_array_equal(strict.read_images(indices), local.read_images(indices))
    assert strict.unreadable == {}


def test_a_shard_that_vanishes_is_named_at_the_gate(tmp_path: Path) -> None:
    pixels = open_pixels(write_shard_split(tmp_path), "none", tmp_path, on_error="skip")
    order = Order(batch_size=4, seed=1, window=8)
    taken(pixels, order, 9, augmentation=AUGMENTED)
    (gone,) = (shard.path for shard in pixels.split.shards if shard.count == 17)
    Path(gone).unlink()
    expected = {"problem": f"{gone}: No such file or directory", "fix": "restore the file"}
    with raises(DataError, **expected):  # type: ignore[arg-type]
        taken(pixels, order, 9, augmentation=AUGMENTED)
    with raises(DataError, **expected):  # type: ignore[arg-type]
        pixels.read_images(np.arange(COUNT))


# Both are filled by the same batches.
@pytest.mark.parametrize("cache", [slow("memory"), "disk"])
def test_caches_are_filled_from_shards_that_come_and_go(
    split: Split, local: Pixels, tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.data.order.MAX_BLOCK_RECORDS", 64)
    strict = arriving(split, tmp_path / "remote", 0.5)
    fetched = open_pixels(strict.split, cache, tmp_path / "remote", size=SIDE, on_error="fail", shards=strict.shards)
    np.testing.assert_array_equal(fetched.array, local.array)


def test_the_cache_reads_ahead_in_the_order_of_need_and_a_second_epoch_from_disk(split: Split, tmp_path: Path) -> None:
    pixels = arriving(split, tmp_path, 1.0, ShardCache)
    taken(pixels, ORDER, 1)
    cache = pixels.shards
    assert cache
    wait_until(lambda: len(cache._cached) == SHARDS, lambda: f"{len(cache._cached)} shards are on disk")
    shutil.move(Path(split.shards[0].path).parent, tmp_path / "gone")
    try:
        steps = count_steps_per_epoch(split, 8)
        assert len(taken(pixels, ORDER, 2 * steps, 10)) == 2 * steps
    finally:
        shutil.move(tmp_path / "gone", Path(split.shards[0].path).parent)
    assert pixels.unreadable == {}


SHARDINGS = [UNSHARDED, Sharding(0, 2), Sharding(2, 3), Sharding(1, 2, "file"), Sharding(2, 3, "file")]
# Window, and rows of a batch.
WINDOWS = [(1, 6), (13, 60), (400, 6), (9999, 60)]
# Where a stream begins: the epoch, the step as a fraction of an epoch, and whether it is shuffled.
BEGINNINGS = [(0, 0.0, True), (3, 0.999, False), (1, 0.5, True), (0, 1.0, True)]


@pytest.mark.parametrize(
    ("windows", "sharding", "beginning"),
    # Quick: windows of one record with each sharding, because they are empty on most workers, and the others in turn.
    make_combinations(
        lambda windows, sharding, beginning: BEGINNINGS.index(beginning)
        == (SHARDINGS.index(sharding) + WINDOWS.index(windows)) % 4
        and (windows == WINDOWS[0] or SHARDINGS.index(sharding) % 3 + 1 == WINDOWS.index(windows)),
        WINDOWS, SHARDINGS, BEGINNINGS,
    ),
    ids=str,
)  # fmt: skip
def test_reads_are_those_of_the_blocks_that_have_rows(
    split: Split, windows: tuple[int, int], sharding: Sharding, beginning: tuple[int, float, bool]
) -> None:
    (window, batch), (epoch, fraction, shuffle) = windows, beginning
    first = int(count_steps_per_epoch(split, batch, sharding) * fraction)
    order = Order(batch, 3, window, first_epoch=epoch, first_step=first, shuffle=shuffle, sharding=sharding)
    block, number = make_training_blocks(split, order), 0
    for rows, shards in itertools.islice(compute_block_shards(block, None), 6):
        made = block(tf.constant(number, tf.int64))
        while not len(made["index"]):
            number += 1
            made = block(tf.constant(number, tf.int64))
        assert rows == len(made["index"])
        np.testing.assert_array_equal(shards, made["ranges"][:, 0])
        number += 1


def test_reads_of_a_sequence_end_with_it(split: Split) -> None:
    for chosen in (np.arange(split.count), np.arange(7, split.count, 31), np.array([3]), np.arange(0)):
        count, block = make_sequence_blocks(split, chosen, 16)
        reads = list(compute_block_shards(block, count))
        assert len(reads) == count
        assert sum(rows for rows, _ in reads) == -(-len(chosen) // 16) * 16
