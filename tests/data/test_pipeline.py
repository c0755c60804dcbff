"""Batches: exact positions, and the same bits from every cache and after every resume."""

import os
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.data.orders import Batches, assert_same, compute_epoch_order
from tests.data.products import make_combinations
from tests.data.splits_on_disk import COUNT, SIDE, make_labels, open_pixels, write_file_split, write_shard_split
from tests.processes import run_python
from trainer.config.schema import Augmentation
from trainer.data.images import Pixels
from trainer.data.order import Order
from trainer.data.pipeline import build_evaluation_batches, build_training_batches
from trainer.data.sharding import Sharding, ShardingMode, assign_shards, count_steps_per_epoch

BATCH, STEPS = 8, 5  # 37 examples: five batches, the last with three of padding
ORDER = Order(BATCH, seed=5, window=12)
PLAIN = Augmentation()
EVERYTHING = Augmentation(flip_horizontal=True, rotation=20, shift=0.1, zoom=0.2, shear=5, contrast=0.2, brightness=0.1)

# Few operations, so that many pipelines are built fast, but with draws for each example and epoch, or for each pair.
FEW = Augmentation(flip_horizontal=True, brightness=0.1)
PAIRS = Augmentation(mixup=0.3, cutmix=1.0)
MIXING = Augmentation(crop=0.5, mixup=0.3, cutmix=1.0)
THE_REST = Augmentation(saturation=0.3, hue=0.1, randaugment=1, cutout=0.2, cutmix=1.0)


def take_batches(
    pixels: Pixels, count: int, epoch: int = 0, step: int = 0, augmentation: Augmentation = PLAIN, replicas: int = 1,
    **changes: Any,
) -> Batches:  # fmt: skip
    order = replace(ORDER, first_epoch=epoch, first_step=step, **changes)
    batches = build_training_batches(pixels, order, num_replicas=replicas, augmentation=augmentation)
    return list(batches.dataset.take(count).as_numpy_iterator())


def take_global_batches(
    pixels: Pixels, count: int, workers: int, replicas: int, by: ShardingMode = "record", parts: int | None = None,
    **changes: Any,
) -> Batches:  # fmt: skip
    """Global batches, concatenated over workers and replicas."""
    shards = [
        take_batches(
            pixels, count * replicas, replicas=replicas, sharding=Sharding(worker, workers, by, parts), **changes
        )
        for worker in range(workers)
    ]
    steps = [[shard[i * replicas + r] for shard in shards for r in range(replicas)] for i in range(count)]
    return [{name: np.concatenate([part[name] for part in parts]) for name in parts[0]} for parts in steps]


class Sources:
    """The decoded images of both splits, each opened once, and the streams that several tests compare with.

    The name of a source is a split and its cache: `files-memory`, or `shards-alone` for one thread without a cache.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._splits = {"files": write_file_split(folder / "files"), "shards": write_shard_split(folder / "shards")}
        self.pixels, self.images, self.stream = cache(self._open), cache(self._read), cache(self._take)

    def _open(self, source: str) -> Pixels:
        kind, _, where = source.partition("-")
        if where == "alone":
            return open_pixels(self._splits[kind], "none", self._folder, threads=1)
        return open_pixels(self._splits[kind], where, self._folder)

    def _read(self, source: str) -> np.ndarray:
        """All images, in the order of their indices."""
        return self.pixels(source).read_images(np.arange(COUNT))

    def _take(self, source: str, augmentation: Augmentation) -> Batches:
        """Three epochs by one worker with one replica."""
        return take_batches(self.pixels(source), 3 * STEPS, augmentation=augmentation)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    return Sources(tmp_path_factory.mktemp("sources"))


def describe_source(value: object) -> str:
    """The part of a test's name for the value of a parameter."""
    names = [name for name, augmentation in globals().items() if augmentation is value]
    return names[0].lower() if isinstance(value, Augmentation) else str(value)


# A pipeline over cached files is built in a third of the time of one that reads shards: most quick cases are of files.
SOURCES = ["files-memory", "files-none", "shards-none"]
MIX_SPECS = {"other_label": tf.TensorSpec([4], tf.int32), "mix": tf.TensorSpec([4], tf.float32)}


@pytest.mark.parametrize(
    ("source", "augmentation"),
    # Quick: all of them on cached images, and the operations that depend on the batch on live ones.
    make_combinations(
        lambda source, augmentation: source == "files-memory" or augmentation is MIXING,
        SOURCES, [PLAIN, EVERYTHING, MIXING],
    ),
    ids=describe_source,
)  # fmt: skip
def test_elements_are_batches_of_static_shape(sources: Sources, source: str, augmentation: Augmentation) -> None:
    batches = build_training_batches(sources.pixels(source), ORDER, num_replicas=2, augmentation=augmentation)
    assert batches.dataset.element_spec == {
        "image": tf.TensorSpec([4, SIDE, SIDE, 3], tf.uint8),
        "label": tf.TensorSpec([4], tf.int32),
        "weight": tf.TensorSpec([4], tf.float32),
        "index": tf.TensorSpec([4], tf.int64),
        "position": tf.TensorSpec([4], tf.int64),
        **(MIX_SPECS if augmentation.mixes else {}),
    }


@pytest.mark.parametrize("source", SOURCES)
def test_an_epoch_is_every_example_once_in_its_order(sources: Sources, source: str) -> None:
    batches = sources.stream(source, PLAIN)
    for epoch in range(3):
        mine = batches[epoch * STEPS : (epoch + 1) * STEPS]
        index, weight = (np.concatenate([b[name] for b in mine]) for name in ("index", "weight"))
        np.testing.assert_array_equal(weight, [1.0] * COUNT + [0.0] * 3)
        np.testing.assert_array_equal(index[:COUNT], compute_epoch_order(sources.pixels(source).split, 5, epoch, 12))
        np.testing.assert_array_equal(np.concatenate([b["label"] for b in mine])[:COUNT], make_labels()[index[:COUNT]])
        image = np.concatenate([b["image"] for b in mine])[:COUNT]
        np.testing.assert_array_equal(image, sources.images(source)[index[:COUNT]])
        for batch in mine:
            np.testing.assert_array_equal(batch["position"], np.arange(BATCH))


@pytest.mark.parametrize(
    ("source", "augmentation", "epoch", "step", "count"),
    # Quick: all steps with the cheapest source, and one with each other. `test_order` resumes the blocks at every step.
    [
        *make_combinations(
            lambda source, _augmentation, _epoch, step, _count: source == "files-memory"
            or (source, step) in {("files-none", 1), ("shards-none", STEPS - 1)},
            SOURCES, [PLAIN], [0], [1, STEPS - 1, STEPS], [STEPS],
        ),
        *make_combinations(lambda source, *_: source == "files-none", SOURCES, [EVERYTHING], [1], [3], [2 * STEPS - 3]),
    ],
    ids=describe_source,
)  # fmt: skip
def test_resumed_anywhere_the_bits_are_the_same(
    sources: Sources, source: str, augmentation: Augmentation, epoch: int, step: int, count: int
) -> None:
    resumed, done = take_batches(sources.pixels(source), count, epoch, step, augmentation), epoch * STEPS + step
    assert_same(resumed, sources.stream(source, augmentation)[done : done + count])


@pytest.mark.parametrize(
    ("source", "workers", "replicas", "first", "count"),
    # Quick: each division with the cheapest source. Pairs are mixed in a batch, wherever its images are from.
    [
        *make_combinations(lambda source, *_: source == "files-memory", SOURCES, [1], [1], [3], [STEPS]),
        *make_combinations(lambda source, *_: source == "files-memory", SOURCES, [1], [4], [0], [2 * STEPS]),
        *make_combinations(lambda source, *_: source == "files-memory", SOURCES, [2], [1], [0], [2 * STEPS]),
    ],
)
def test_mixing_partners_do_not_depend_on_workers_and_replicas(
    sources: Sources, source: str, workers: int, replicas: int, first: int, count: int
) -> None:
    whole = sources.stream(source, MIXING)
    for batch in whole:
        real = (batch["weight"] > 0) & (batch["weight"][np.arange(BATCH) ^ 1] > 0)
        assert set(batch) == {"image", "label", "weight", "index", "position", "other_label", "mix"}
        assert (batch["mix"][~real] == 1).all()
        assert (batch["mix"][real] < 1).any()
        np.testing.assert_array_equal(batch["other_label"], batch["label"][np.arange(BATCH) ^ 1])
    batches = take_global_batches(sources.pixels(source), count, workers, replicas, augmentation=MIXING, step=first)
    assert_same(batches, whole[first : first + count])


@pytest.mark.parametrize(
    ("kind", "cache"),
    # Quick: each cache of files. `test_images` fills caches from both kinds, and virtual replicas, below, read both the
    # cache of shards and the shards.
    make_combinations(
        lambda kind, _cache: kind == "files",
        ["files", "shards"], ["memory", "disk", "alone"],
    ),
)  # fmt: skip
def test_every_cache_gives_the_same_bits(sources: Sources, kind: str, cache: str) -> None:
    assert_same(sources.stream(f"{kind}-{cache}", EVERYTHING), sources.stream(f"{kind}-none", EVERYTHING))


@pytest.mark.parametrize("source", make_combinations(lambda source: source != "files-none", SOURCES))
def test_a_batch_larger_than_the_split_is_padded(sources: Sources, source: str) -> None:
    for batch in take_batches(sources.pixels(source), 2, batch_size=50):
        assert batch["weight"].sum() == COUNT
        assert sorted(batch["index"][:COUNT]) == list(range(COUNT))


@pytest.mark.parametrize(
    ("source", "divided", "first"),
    # Quick: each division from one of the steps, most of them with the cheapest source.
    make_combinations(
        lambda *case: case in {
            ("files-memory", (1, 4), 0), ("files-memory", (2, 2), 3), ("files-memory", (4, 1), 0),
            ("files-none", (1, 4), 3), ("shards-none", (2, 1), 3),
        },
        SOURCES, [(1, 4), (2, 1), (2, 2), (4, 1)], [0, 3],
    ),
    ids=describe_source,
)  # fmt: skip
def test_global_batches_do_not_depend_on_workers_by_record(
    sources: Sources, source: str, divided: tuple[int, int], first: int
) -> None:
    workers, replicas = divided
    batches = take_global_batches(sources.pixels(source), 2 * STEPS, workers, replicas, step=first, augmentation=FEW)
    assert_same(batches, sources.stream(source, FEW)[first : first + 2 * STEPS])


def test_windows_can_be_empty_on_a_worker_by_record(sources: Sources, tmp_path: Path) -> None:
    pixels = open_pixels(sources.pixels("shards-none").split, "none", tmp_path, on_error="skip")
    cached = sources.pixels("shards-memory")
    assert_same(take_global_batches(pixels, 2 * STEPS, 2, 1, window=1), take_batches(cached, 2 * STEPS, window=1))


@pytest.mark.slow
def test_workers_by_file_read_shards_of_their_own(sources: Sources) -> None:
    pixels = sources.pixels("shards-none")  # 9, 10, 1 and 17 records
    own = assign_shards(pixels.split, 2)
    steps = count_steps_per_epoch(pixels.split, BATCH, Sharding(0, 2, "file"))
    assert [list(shards) for shards in own] == [[2, 3], [0, 1]]
    assert steps == 5  # 19 records in rows of 4
    for epoch in range(2):
        seen = []
        for worker in range(2):
            sharding = Sharding(worker, 2, "file")
            batches = take_batches(pixels, steps, epoch=epoch, sharding=sharding)
            index, weight, position = (np.concatenate([b[k] for b in batches]) for k in ("index", "weight", "position"))
            assert set(np.repeat(range(4), [9, 10, 1, 17])[index[weight > 0]]) == set(own[worker])
            np.testing.assert_array_equal(position, np.tile(np.arange(4) + worker * 4, steps))
            for batch in batches:
                np.testing.assert_array_equal(batch["label"], make_labels()[batch["index"]])
                image = np.where(
                    batch["weight"][:, None, None, None] > 0, sources.images("shards-none")[batch["index"]], 0
                )
                np.testing.assert_array_equal(batch["image"], image)
            for step in range(steps):
                assert_same(
                    take_batches(pixels, 2, epoch=epoch, step=step, sharding=sharding)[:1], batches[step : step + 1]
                )
            seen += list(index[weight > 0])
        assert sorted(seen) == list(range(COUNT))


@pytest.fixture(scope="module")
def four_parts(sources: Sources) -> Batches:
    """Two epochs by four workers that have shards of their own."""
    steps = count_steps_per_epoch(sources.pixels("shards-memory").split, BATCH, Sharding(0, 1, "file", 4))
    assert steps == 9  # 17 records in rows of 2
    batches = take_global_batches(sources.pixels("shards-memory"), 2 * steps, 4, 1, "file", augmentation=PAIRS)
    index, weight = (np.concatenate([batch[name] for batch in batches[:steps]]) for name in ("index", "weight"))
    assert sorted(index[weight > 0]) == list(range(COUNT))
    return batches


@pytest.mark.parametrize(
    ("cache", "workers", "replicas", "first", "count"),
    # Quick: all parts in one pipeline, from shards; several workers with several replicas; and a resumed stream.
    [
        ("none", 1, 1, 0, 18),
        ("memory", 2, 2, 0, 18),
        ("memory", 2, 1, 4, 9),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("memory", 1, 1, 0, 18),
                ("memory", 1, 4, 0, 18), ("none", 1, 4, 0, 18), ("none", 2, 2, 0, 18), ("none", 4, 1, 0, 18),
                ("none", 2, 1, 4, 9),
            )
        ),
    ],
)  # fmt: skip
def test_virtual_replicas_by_file_have_the_same_batches_on_any_number_of_workers(
    sources: Sources, four_parts: Batches, cache: str, workers: int, replicas: int, first: int, count: int
) -> None:
    pixels = sources.pixels(f"shards-{cache}")
    batches = take_global_batches(pixels, count, workers, replicas, "file", 4, augmentation=PAIRS, step=first)
    assert_same(batches, four_parts[first : first + count])


@pytest.mark.parametrize(
    ("source", "workers"),
    # Quick: each number of workers with one source, and most with the cheapest.
    make_combinations(
        lambda *case: case in {("shards-none", 2), ("files-memory", 3), ("files-memory", 5)}, SOURCES, [2, 3, 5, 40]
    ),
)
def test_evaluation_by_several_workers_counts_every_example_once(sources: Sources, source: str, workers: int) -> None:
    seen = []
    for worker in range(workers):
        sharding, pixels = Sharding(worker, workers), sources.pixels(source)
        batches = build_evaluation_batches(pixels, batch_size=workers * 4, num_replicas=2, sharding=sharding)
        for batch in batches.dataset.take(batches.count * 2).as_numpy_iterator():
            assert len(batch["index"]) == 2
            seen += list(batch["index"][batch["weight"] > 0])
    assert sorted(seen) == list(range(COUNT))


@pytest.mark.parametrize("source", SOURCES)
def test_evaluation_counts_every_example_once(sources: Sources, source: str) -> None:
    scoring = build_evaluation_batches(sources.pixels(source), batch_size=BATCH, num_replicas=2)
    assert scoring.count == STEPS
    batches = list(scoring.dataset.take(STEPS * 2).as_numpy_iterator())
    weight, index = (np.concatenate([b[name] for b in batches]) for name in ("weight", "index"))
    np.testing.assert_array_equal(index[weight > 0], np.arange(COUNT))
    image = np.concatenate([b["image"] for b in batches])
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image[weight > 0], sources.images(source))
    np.testing.assert_array_equal(np.concatenate([b["position"] for b in batches]), np.arange(STEPS * BATCH) % BATCH)


@pytest.mark.parametrize("source", make_combinations(lambda source: source != "files-none", SOURCES))
def test_evaluation_of_a_fraction(sources: Sources, source: str) -> None:
    scoring = build_evaluation_batches(sources.pixels(source), batch_size=BATCH, num_replicas=1, fraction=0.5)
    assert scoring.count == 3
    batches = list(scoring.dataset.take(3).as_numpy_iterator())
    index = np.concatenate([b["index"] for b in batches])
    assert (np.diff(index) > 0).all()
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in batches]), sources.images(source)[index])


# Every cached and live pipeline under op determinism, in one process. It prints the MB that the pipelines over
# mapped files allocate, and saves the images of the first epoch.
DETERMINISTIC = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import tensorflow as tf
from tests.data.splits_on_disk import write_file_split, open_pixels, write_shard_split
from tests.data.test_pipeline import EVERYTHING, THE_REST, take_batches
from trainer.config.schema import Augmentation
from trainer.features.store import Features
from trainer.data.order import Order
from trainer.data.pipeline import build_evaluation_batches, build_training_batches
tf.keras.utils.set_random_seed(1)
tf.config.experimental.enable_op_determinism()
many, side, folder = 6000, 160, Path(sys.argv[1])

def own_mb():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024

def mapped(name, dtype, shape):
    with open(folder / name, "wb") as file:  # a hole: no block of the disk
        file.truncate(int(np.prod(shape)) * np.dtype(dtype).itemsize)
    return np.memmap(folder / name, dtype, "c", shape=shape)

few = write_file_split(folder / "few")
pixels = open_pixels(few, "memory", folder)
split = replace(few, labels=np.arange(many, dtype=np.int32) % 3, files=("x",) * many)
pixels = replace(pixels, split=split, size=side, array=mapped("images", np.uint8, (many + 1, side, side, 3)))
features = Features(split, (5, 5, 512), "float32", 1, np.arange(many), 2, print, "disk")
features.array = mapped("features", np.float32, (many + 1, 5, 5, 512))
before, running = own_mb(), []
for source in (pixels, features):
    assert source.array.nbytes > 300e6
    running.append(iter(build_training_batches(source, Order(32, seed=5, window=12), num_replicas=1, augmentation=Augmentation()).dataset))
    running.append(iter(build_evaluation_batches(source, batch_size=32, num_replicas=1).dataset))
for batches in running:
    next(batches)
print("MB", own_mb() - before)
del running

batches = take_batches(open_pixels(few, "none", folder), 5, augmentation=EVERYTHING)
np.save(folder / "images.npy", np.concatenate([batch["image"] for batch in batches]))
for cache in sys.argv[2:]:
    take_batches(open_pixels(write_shard_split(folder / "shards"), cache, folder, on_error="skip"), 5, augmentation=THE_REST)
"""


def run_deterministic(folder: Path, *caches: str) -> subprocess.CompletedProcess[str]:
    """Run the program, also with the rest of the augmentations on records in these caches, with TensorFlow's log."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "0", "TF_CPP_VMODULE": "make_deterministic=2"}
    return run_python(DETERMINISTIC, folder, *caches, env=environment)


@pytest.fixture(scope="module")
def deterministic(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("deterministic")
    return run_deterministic(folder, "none"), folder


def test_under_op_determinism_the_bits_are_the_same_and_nothing_becomes_serial(
    sources: Sources, deterministic: tuple[subprocess.CompletedProcess[str], Path]
) -> None:
    """TensorFlow removes parallelism and prefetching from a pipeline with stateful ops, and logs it."""
    ran, folder = deterministic
    expected = sources.stream("files-none", EVERYTHING)[:STEPS]
    np.testing.assert_array_equal(
        np.load(folder / "images.npy"), np.concatenate([batch["image"] for batch in expected])
    )
    assert "Rewriting node" not in ran.stderr
    assert "Will rewrite" not in ran.stderr


@pytest.mark.slow  # the quick test has each operation on live images, and cached batches without augmentation
def test_under_op_determinism_no_augmentation_of_cached_images_becomes_serial(tmp_path: Path) -> None:
    ran = run_deterministic(tmp_path, "memory")
    assert "Rewriting node" not in ran.stderr
    assert "Will rewrite" not in ran.stderr


def test_no_pipeline_copies_the_cache(deterministic: tuple[subprocess.CompletedProcess[str], Path]) -> None:
    """Four pipelines over 460 MB of images and 307 MB of features in mapped files."""
    assert float(deterministic[0].stdout.split()[-1]) < 150
