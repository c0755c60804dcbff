"""Batches: exact positions, and the same bits from every cache and after every resume."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.data.orders import Batches, assert_same, epoch_order
from tests.data.splits_on_disk import COUNT, SIDE, file_split, labels, opened, shard_split
from tests.processes import run_python
from trainer.config.schema import Augmentation
from trainer.data.images import Pixels
from trainer.data.order import Order
from trainer.data.pipeline import build_evaluation_batches, build_training_batches
from trainer.data.sharding import Sharding, ShardingMode, assign_shards, steps_per_epoch
from trainer.types import Split

BATCH, STEPS = 8, 5  # 37 examples: five batches, the last with three of padding
ORDER = Order(BATCH, seed=5, window=12)
PLAIN = Augmentation()
EVERYTHING = Augmentation(flip_horizontal=True, rotation=20, shift=0.1, zoom=0.2, shear=5, contrast=0.2, brightness=0.1)

# Few operations, so that many pipelines are built fast, but with draws for each example and epoch, or for each pair.
FEW = Augmentation(flip_horizontal=True, brightness=0.1)
PAIRS = Augmentation(mixup=0.3, cutmix=1.0)
MIXING = Augmentation(crop=0.5, mixup=0.3, cutmix=1.0)
THE_REST = Augmentation(saturation=0.3, hue=0.1, randaugment=1, cutout=0.2, cutmix=1.0)


def take(
    pixels: Pixels, count: int, epoch: int = 0, step: int = 0, augmentation: Augmentation = PLAIN, replicas: int = 1,
    **changes: Any,
) -> Batches:  # fmt: skip
    order = replace(ORDER, first_epoch=epoch, first_step=step, **changes)
    batches = build_training_batches(pixels, order, replicas=replicas, augmentation=augmentation)
    return list(batches.dataset.take(count).as_numpy_iterator())


def take_global(
    pixels: Pixels, count: int, workers: int, replicas: int, by: ShardingMode = "record", parts: int | None = None,
    **changes: Any,
) -> Batches:  # fmt: skip
    """Global batches, concatenated over workers and replicas."""
    shards = [
        take(pixels, count * replicas, replicas=replicas, sharding=Sharding(worker, workers, by, parts), **changes)
        for worker in range(workers)
    ]
    steps = [[shard[i * replicas + r] for shard in shards for r in range(replicas)] for i in range(count)]
    return [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in steps]


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Split]:
    folder = tmp_path_factory.mktemp("splits")
    return {"files": file_split(folder / "files"), "shards": shard_split(folder / "shards")}


@pytest.fixture(params=[("files", "memory"), ("files", "none"), ("shards", "none")], ids="-".join)
def pixels(request: pytest.FixtureRequest, splits: dict[str, Split], tmp_path: Path) -> Pixels:
    kind, cache = request.param
    return opened(splits[kind], cache, tmp_path)


def test_elements_are_batches_of_static_shape(pixels: Pixels) -> None:
    mixing = {"other_label": tf.TensorSpec([4], tf.int32), "mix": tf.TensorSpec([4], tf.float32)}
    for augmentation, more in ((Augmentation(), {}), (EVERYTHING, {}), (MIXING, mixing)):
        batches = build_training_batches(pixels, ORDER, replicas=2, augmentation=augmentation)
        assert batches.dataset.element_spec == {
            "image": tf.TensorSpec([4, SIDE, SIDE, 3], tf.uint8),
            "label": tf.TensorSpec([4], tf.int32),
            "weight": tf.TensorSpec([4], tf.float32),
            "index": tf.TensorSpec([4], tf.int64),
            "position": tf.TensorSpec([4], tf.int64),
            **more,
        }


def test_an_epoch_is_every_example_once_in_its_order(pixels: Pixels) -> None:
    batches = take(pixels, 3 * STEPS)
    for epoch in range(3):
        mine = batches[epoch * STEPS : (epoch + 1) * STEPS]
        index, weight = (np.concatenate([b[name] for b in mine]) for name in ("index", "weight"))
        np.testing.assert_array_equal(weight, [1.0] * COUNT + [0.0] * 3)
        np.testing.assert_array_equal(index[:COUNT], epoch_order(pixels.split, 5, epoch, 12))
        np.testing.assert_array_equal(np.concatenate([b["label"] for b in mine])[:COUNT], labels()[index[:COUNT]])
        np.testing.assert_array_equal(np.concatenate([b["image"] for b in mine])[:COUNT], pixels.rows(index[:COUNT]))
        for batch in mine:
            np.testing.assert_array_equal(batch["position"], np.arange(BATCH))


def test_resumed_anywhere_the_bits_are_the_same(pixels: Pixels) -> None:
    whole = take(pixels, 3 * STEPS, augmentation=EVERYTHING)
    assert_same(take(pixels, 2 * STEPS - 3, 1, 3, augmentation=EVERYTHING), whole[STEPS + 3 :])
    plain = take(pixels, 2 * STEPS)
    for done in (1, STEPS - 1, STEPS):
        assert_same(take(pixels, STEPS, 0, done), plain[done : done + STEPS])


def test_mixing_partners_do_not_depend_on_workers_and_replicas(pixels: Pixels) -> None:
    whole = take(pixels, 2 * STEPS, augmentation=MIXING)
    for batch in whole:
        real = (batch["weight"] > 0) & (batch["weight"][np.arange(BATCH) ^ 1] > 0)
        assert set(batch) == {"image", "label", "weight", "index", "position", "other_label", "mix"}
        assert (batch["mix"][~real] == 1).all()
        assert (batch["mix"][real] < 1).any()
        np.testing.assert_array_equal(batch["other_label"], batch["label"][np.arange(BATCH) ^ 1])
    assert_same(take(pixels, STEPS, 0, 3, augmentation=MIXING), whole[3 : STEPS + 3])
    for workers, replicas in ((1, 4), (2, 1)):
        assert_same(take_global(pixels, 2 * STEPS, workers, replicas, augmentation=MIXING), whole)


@pytest.mark.parametrize("kind", ["files", "shards"])
def test_every_cache_gives_the_same_bits(kind: str, splits: dict[str, Split], tmp_path: Path) -> None:
    live, memory, disk = (opened(splits[kind], cache, tmp_path) for cache in ("none", "memory", "disk"))
    alone = opened(splits[kind], "none", tmp_path, threads=1)
    expected = take(live, 2 * STEPS, augmentation=EVERYTHING)
    for pixels in (memory, disk, alone):
        assert_same(take(pixels, 2 * STEPS, augmentation=EVERYTHING), expected)


def test_a_batch_larger_than_the_split_is_padded(pixels: Pixels) -> None:
    for batch in take(pixels, 2, batch_size=50):
        assert batch["weight"].sum() == COUNT
        assert sorted(batch["index"][:COUNT]) == list(range(COUNT))


@pytest.mark.parametrize(("workers", "replicas"), [(1, 4), (2, 1), (2, 2), (4, 1)])
@pytest.mark.parametrize("first", [0, 3])
def test_global_batches_do_not_depend_on_workers_by_record(
    pixels: Pixels, workers: int, replicas: int, first: int
) -> None:
    whole = take(pixels, 2 * STEPS, step=first, augmentation=FEW)
    assert_same(take_global(pixels, 2 * STEPS, workers, replicas, step=first, augmentation=FEW), whole)


def test_windows_can_be_empty_on_a_worker_by_record(splits: dict[str, Split], tmp_path: Path) -> None:
    pixels = opened(splits["shards"], "none", tmp_path, on_error="skip")
    assert_same(take_global(pixels, 2 * STEPS, 2, 1, window=1), take(pixels, 2 * STEPS, window=1))


@pytest.mark.slow
def test_workers_by_file_read_shards_of_their_own(splits: dict[str, Split], tmp_path: Path) -> None:
    split = splits["shards"]  # 9, 10, 1 and 17 records
    pixels = opened(split, "none", tmp_path)
    own = assign_shards(split, 2)
    steps = steps_per_epoch(split, BATCH, Sharding(0, 2, "file"))
    assert [list(shards) for shards in own] == [[2, 3], [0, 1]]
    assert steps == 5  # 19 records in rows of 4
    for epoch in range(2):
        seen = []
        for worker in range(2):
            sharding = Sharding(worker, 2, "file")
            batches = take(pixels, steps, epoch=epoch, sharding=sharding)
            index, weight, position = (np.concatenate([b[k] for b in batches]) for k in ("index", "weight", "position"))
            assert set(np.repeat(range(4), [9, 10, 1, 17])[index[weight > 0]]) == set(own[worker])
            np.testing.assert_array_equal(position, np.tile(np.arange(4) + worker * 4, steps))
            for batch in batches:
                np.testing.assert_array_equal(batch["label"], labels()[batch["index"]])
                image = np.where(batch["weight"][:, None, None, None] > 0, pixels.rows(batch["index"]), 0)
                np.testing.assert_array_equal(batch["image"], image)
            for step in range(steps):
                assert_same(take(pixels, 2, epoch=epoch, step=step, sharding=sharding)[:1], batches[step : step + 1])
            seen += list(index[weight > 0])
        assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize("cache", ["none", "memory"])
def test_virtual_replicas_by_file_have_the_same_batches_on_any_number_of_workers(
    splits: dict[str, Split], tmp_path: Path, cache: str
) -> None:
    pixels = opened(splits["shards"], cache, tmp_path)
    steps = steps_per_epoch(pixels.split, BATCH, Sharding(0, 1, "file", 4))
    assert steps == 9  # 17 records in rows of 2
    four = take_global(pixels, 2 * steps, 4, 1, "file", augmentation=PAIRS)  # one worker for each part
    index, weight = (np.concatenate([batch[name] for batch in four[:steps]]) for name in ("index", "weight"))
    assert sorted(index[weight > 0]) == list(range(COUNT))
    for workers, replicas in ((1, 1), (1, 4), (2, 2)):
        assert_same(take_global(pixels, 2 * steps, workers, replicas, "file", 4, augmentation=PAIRS), four)
    resumed = take_global(pixels, steps, 2, 1, "file", 4, augmentation=PAIRS, epoch=0, step=4)
    assert_same(resumed, four[4 : steps + 4])


@pytest.mark.parametrize("workers", [2, 3, 5, pytest.param(40, marks=pytest.mark.slow)])
def test_evaluation_by_several_workers_counts_every_example_once(pixels: Pixels, workers: int) -> None:
    seen = []
    for worker in range(workers):
        sharding = Sharding(worker, workers)
        batches = build_evaluation_batches(pixels, batch_size=workers * 4, replicas=2, sharding=sharding)
        for batch in batches.dataset.take(batches.count * 2).as_numpy_iterator():
            assert len(batch["index"]) == 2
            seen += list(batch["index"][batch["weight"] > 0])
    assert sorted(seen) == list(range(COUNT))


def test_evaluation_counts_every_example_once(pixels: Pixels) -> None:
    scoring = build_evaluation_batches(pixels, batch_size=BATCH, replicas=2)
    assert scoring.count == STEPS
    batches = list(scoring.dataset.take(STEPS * 2).as_numpy_iterator())
    weight, index = (np.concatenate([b[name] for b in batches]) for name in ("weight", "index"))
    np.testing.assert_array_equal(index[weight > 0], np.arange(COUNT))
    image = np.concatenate([b["image"] for b in batches])
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[weight > 0], pixels.rows(np.arange(COUNT)))
    np.testing.assert_array_equal(np.concatenate([b["position"] for b in batches]), np.arange(STEPS * BATCH) % BATCH)


def test_evaluation_of_a_fraction(pixels: Pixels) -> None:
    scoring = build_evaluation_batches(pixels, batch_size=BATCH, replicas=1, fraction=0.5)
    assert scoring.count == 3
    batches = list(scoring.dataset.take(3).as_numpy_iterator())
    index = np.concatenate([b["index"] for b in batches])
    assert (np.diff(index) > 0).all()
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in batches]), pixels.rows(index))


UNSHARDED = """
import sys
from pathlib import Path
import numpy as np
import tensorflow as tf
from tests.data.splits_on_disk import file_split, opened, shard_split
from tests.data.test_pipeline import EVERYTHING, THE_REST, take
tf.keras.utils.set_random_seed(1)
tf.config.experimental.enable_op_determinism()
folder = Path(sys.argv[1])
batches = take(opened(file_split(folder / "files"), "none", folder), 5, augmentation=EVERYTHING)
np.save(sys.argv[2], np.concatenate([batch["image"] for batch in batches]))
for cache in ("memory", "none"):
    take(opened(shard_split(folder / "shards"), cache, folder, on_error="skip"), 5, augmentation=THE_REST)
"""


def test_under_op_determinism_the_bits_are_the_same_and_nothing_becomes_serial(tmp_path: Path) -> None:
    """TensorFlow removes parallelism and prefetching from a pipeline with stateful ops, and logs it."""
    expected = take(opened(file_split(tmp_path), "none", tmp_path), STEPS, augmentation=EVERYTHING)
    out = tmp_path / "images.npy"
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "make_deterministic=2"}
    ran = run_python(UNSHARDED, tmp_path, out, env=environment)
    np.testing.assert_array_equal(np.load(out), np.concatenate([batch["image"] for batch in expected]))
    assert "Rewriting node" not in ran.stderr
    assert "Will rewrite" not in ran.stderr


MANY = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import tensorflow as tf
from tests.data.splits_on_disk import file_split, opened
from trainer.config.schema import Augmentation
from trainer.features.store import Features
from trainer.data.order import Order
from trainer.data.pipeline import build_evaluation_batches, build_training_batches
tf.config.experimental.enable_op_determinism()
many, side, folder = 6000, 160, Path(sys.argv[1])

def own_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024

def mapped(name, dtype, shape):
    with open(folder / name, "wb") as file:  # a hole: no block of the disk
        file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.memmap(folder / name, dtype, "c", shape=shape)

pixels = opened(file_split(folder / "few"), "memory", folder)
split = replace(pixels.split, labels=np.arange(many, dtype=np.int32) % 3, files=("x",) * many)
pixels = replace(pixels, split=split, size=side, array=mapped("images", np.uint8, (many + 1, side, side, 3)))
features = Features(split, (5, 5, 512), "float32", 1, np.arange(many), 2, print, "disk")
features.array = mapped("features", np.float32, (many + 1, 5, 5, 512))
before, running = own_mb(), []
for source in (pixels, features):
    assert source.array.nbytes > 300e6
    running.append(iter(build_training_batches(source, Order(32, seed=5, window=12), replicas=1, augmentation=Augmentation()).dataset))
    running.append(iter(build_evaluation_batches(source, batch_size=32, replicas=1).dataset))
for batches in running:
    next(batches)
print(own_mb() - before)
"""


def test_no_pipeline_copies_the_cache(tmp_path: Path) -> None:
    """Four pipelines over 460 MB of images and 307 MB of features in mapped files."""
    assert float(run_python(MANY, tmp_path).stdout.split()[-1]) < 150
