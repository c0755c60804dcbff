"""Features on disk and in memory: intact rows are read by a later start, others are computed again."""

import json
import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from tests.data import splits_on_disk
from tests.data.orders import compute_epoch_order
from tests.disks import small_disk
from tests.errors import raises
from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.order import Order
from trainer.data.pipeline import EpochAugmentation, build_indexed_batches, build_training_batches
from trainer.errors import DataError
from trainer.features.store import Features, count_feature_bytes, open_features
from trainer.runs.checkpoints import crc32c_hex
from trainer.types import Split

COUNT, SHAPE, VIEWS = 11, (2, 3), 2
NEEDED = VIEWS * COUNT * 6 * 4
SPLIT = Split("train", np.arange(COUNT, dtype=np.int32), files=tuple(f"{i}.jpg" for i in range(COUNT)))


def make_rows(view: int, index: np.ndarray | range) -> np.ndarray:
    """Float32 [n, *SHAPE], different for each view and example."""
    number = np.asarray(index)[:, None, None] * 10 + view * 1000
    return (number + np.arange(6).reshape(SHAPE)).astype(np.float32)


def open_store(folder: Path, notes: list[str] | None = None, **changes: Any) -> Any:
    options = {"shape": SHAPE, "dtype": "float32", "views": VIEWS, "indices": np.arange(COUNT), "threads": 2}
    where = {"file": folder / "f" / "x", "memory_budget": NEEDED, "disk_budget": 10 * NEEDED}
    where |= {name: changes.pop(name) for name in list(changes) if name in where}
    features = Features(SPLIT, **(options | changes), log_message=(notes if notes is not None else []).append)  # type: ignore[arg-type]
    return open_features(features, **where)  # type: ignore[arg-type]


def open_filled_store(folder: Path, **changes: Any) -> Features:
    features = open_store(folder, **changes)
    for view in range(features.views):
        index = np.flatnonzero(features.find_missing(view))
        features.write(view, index, features.encode(make_rows(view, index)), {})
    return features


@pytest.fixture
def small_files() -> Iterator[Any]:
    """Limits the size of files, so that writing fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("memory", [NEEDED, NEEDED - 1])
def test_batches_hold_the_rows_of_the_epochs_view(tmp_path: Path, memory: int) -> None:
    features = open_filled_store(tmp_path, memory_budget=memory)
    features.finish_writing()
    features.unreadable[3] = "damaged"
    assert features.cached_in == ("memory" if memory == NEEDED else "disk")
    batches = build_training_batches(
        features, Order(4, seed=5, window=COUNT), num_replicas=1, augmentation=Augmentation()
    )
    stream = batches.dataset.as_numpy_iterator()
    for epoch in range(3):
        parts = [next(stream) for _ in range(3)]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        np.testing.assert_array_equal(batch["index"][:COUNT], compute_epoch_order(SPLIT, 5, epoch, COUNT))
        np.testing.assert_array_equal(batch["label"][:COUNT], batch["index"][:COUNT])
        np.testing.assert_array_equal(batch["weight"], [*(batch["index"][:COUNT] != 3), 0])
        real = batch["weight"] > 0
        np.testing.assert_array_equal(batch["image"][real], make_rows(epoch % VIEWS, batch["index"][real]))
        assert not batch["image"][~real].any()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_come_out_as_they_went_in(tmp_path: Path, dtype: str) -> None:
    features = open_filled_store(tmp_path, dtype=dtype, memory_budget=NEEDED // 2)
    features.finish_writing()
    rows = features.gather_rows(features.tensor(), tf.constant([4, 10], tf.int64), tf.constant([1, 0], tf.int64))
    assert rows.dtype == dtype
    np.testing.assert_array_equal(rows, tf.cast(np.stack([make_rows(1, [4])[0], make_rows(0, [10])[0]]), dtype))


def test_values_beyond_float16_are_an_error(tmp_path: Path) -> None:
    features = open_store(tmp_path, dtype="float16")
    with raises(DataError, "features_dtype", "float16", fix="bfloat16", problem="65,504"):
        features.encode(np.full((1, *SHAPE), 7e4, np.float32))


@pytest.mark.parametrize("memory", [NEEDED, 0])
def test_a_later_start_reads_intact_rows(tmp_path: Path, memory: int) -> None:
    first = open_store(tmp_path)
    first.write(0, np.array([0, 1, 2, 7]), make_rows(0, [0, 1, 2, 7]), {2: "no JPEG"})
    first.write(1, np.array([5]), make_rows(1, [5]), {})
    with open(tmp_path / "f" / "x.list", "a") as listed:
        listed.write('{"view": 0, "first": 9, "cou')  # killed here
    second = open_store(tmp_path, memory_budget=memory)
    assert np.flatnonzero(~second.find_missing(0)).tolist() == [0, 1, 2, 7]
    assert np.flatnonzero(~second.find_missing(1)).tolist() == [5]
    assert second.unreadable == {2: "no JPEG"}
    for view in range(VIEWS):
        index = np.flatnonzero(second.find_missing(view))
        second.write(view, index, make_rows(view, index), {})
    second.finish_writing()
    rows = np.asarray(second.tensor()).reshape(VIEWS, COUNT + 1, *SHAPE)
    for view in range(VIEWS):
        np.testing.assert_array_equal(rows[view, :COUNT], make_rows(view, range(COUNT)))
        assert not rows[view, COUNT].any()


def test_only_damaged_rows_are_missing(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    for part in (range(4), range(4, COUNT)):
        first.write(0, np.asarray(part), make_rows(0, part), {})
    rows = tmp_path / "f" / "x.rows"
    content = bytearray(rows.read_bytes())
    content[5 * 24] ^= 1
    rows.write_bytes(content)
    notes: list[str] = []
    second = open_store(tmp_path, notes)
    assert np.flatnonzero(second.find_missing(0)).tolist() == list(range(4, COUNT))
    assert notes == [f"1 block of {tmp_path}/f/x.rows corrupt; computing the features again"]
    # Computed again with other values, as on another processor: the block is intact from then on.
    second.write(0, np.arange(4, COUNT), make_rows(1, range(4, COUNT)), {})
    third = open_store(tmp_path, notes)
    assert not third.find_missing(0).any()
    assert len(notes) == 1


def test_a_block_after_a_truncated_line_is_read(tmp_path: Path) -> None:
    first = open_store(tmp_path)
    first.write(0, np.arange(4), make_rows(0, range(4)), {})
    with open(tmp_path / "f" / "x.list", "a") as listed:
        listed.write('{"view": 0, "first": 9, "cou')  # killed here
    second = open_store(tmp_path)
    second.write(0, np.arange(4, COUNT), make_rows(0, range(4, COUNT)), {})
    assert not open_store(tmp_path).find_missing(0).any()


@pytest.mark.parametrize("damage", ["truncated", "gone", "other"])
def test_no_rows_are_read_from_a_damaged_file(tmp_path: Path, damage: str) -> None:
    open_filled_store(tmp_path)
    rows, listed = tmp_path / "f" / "x.rows", tmp_path / "f" / "x.list"
    if damage == "truncated":
        os.truncate(rows, 24)
    elif damage == "gone":
        rows.unlink()
    else:
        block = {"view": 0, "first": 0, "count": 1, "crc32c": crc32c_hex(rows.read_bytes()[:24]), "bad": {"99": ""}}
        lines = (
            [],
            {"view": 9},
            {"view": 0, "first": -1, "count": 3},
            {"view": 9, "first": 0, "count": 3, "bad": {}},
            block,
        )
        listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert open_store(tmp_path).find_missing(0).all()


def test_a_worker_stores_and_counts_only_its_own_rows(tmp_path: Path) -> None:
    indices = np.array([1, 2, 9])
    features = open_filled_store(tmp_path, indices=indices, memory_budget=0)
    assert features.num_bytes == VIEWS * 3 * 24 == count_feature_bytes(SHAPE, "float32", VIEWS, 3)
    features.finish_writing()
    assert not any(features.find_missing(view).any() for view in range(VIEWS))
    assert np.flatnonzero(~open_store(tmp_path).find_missing(1)).tolist() == [1, 2, 9]


def test_with_a_full_disk_features_stay_in_memory(tmp_path: Path, small_files: Any) -> None:
    notes: list[str] = []
    features = open_store(tmp_path, notes)
    small_files(3 * 24)
    for view in range(VIEWS):
        features.write(view, np.arange(COUNT), make_rows(view, range(COUNT)), {})
    assert notes == [f"features cannot be stored in {tmp_path}/f (File too large); using memory only"]
    assert list((tmp_path / "f").iterdir()) == []
    features.finish_writing()
    np.testing.assert_array_equal(features.tensor()[:COUNT], make_rows(0, range(COUNT)))


def test_with_a_disk_that_has_become_read_only_features_stay_in_memory(tmp_path: Path) -> None:
    notes: list[str] = []
    with small_disk(tmp_path / "disk", "1m") as disk:
        features = open_store(disk, notes)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        features.write(0, np.arange(COUNT), make_rows(0, range(COUNT)), {})
        assert notes == [f"features cannot be stored in {disk}/f (Read-only file system); using memory only"]
        assert not features.find_missing(0).any()


def test_a_full_disk_is_an_error_without_room_in_memory(tmp_path: Path, small_files: Any) -> None:
    features = open_store(tmp_path, memory_budget=0)
    small_files(3 * 24)
    with pytest.raises(OSError, match="File too large"):
        features.write(0, np.arange(COUNT), make_rows(0, range(COUNT)), {})


@pytest.mark.parametrize(
    ("memory", "disk", "where", "on_disk"),
    [(NEEDED, NEEDED, "memory", True), (NEEDED, NEEDED - 1, "memory", False), (NEEDED - 1, NEEDED, "disk", True)],
)
def test_features_are_stored_within_the_budgets(
    tmp_path: Path, memory: int, disk: int, where: str, on_disk: bool
) -> None:
    features = open_store(tmp_path, memory_budget=memory, disk_budget=disk)
    assert (features.cached_in, (tmp_path / "f" / "x.rows").exists()) == (where, on_disk)


def test_without_room_there_are_no_features(tmp_path: Path, small_files: Any) -> None:
    assert open_store(tmp_path, memory_budget=NEEDED - 1, disk_budget=NEEDED - 1) is None
    notes: list[str] = []
    small_files(3)
    assert open_store(tmp_path, notes, memory_budget=NEEDED - 1) is None
    assert notes == [f"features cannot be stored in {tmp_path}/f (File too large)"]


def test_the_least_recently_used_features_are_deleted(tmp_path: Path) -> None:
    big = (64, 64)  # some pages of a file
    size = count_feature_bytes(big, "float32", 1, COUNT)

    def open_on_disk(name: str, budget: int) -> Features:
        return open_store(tmp_path, shape=big, views=1, file=tmp_path / "f" / name, memory_budget=0, disk_budget=budget)

    for age, name in enumerate(("old", "used", "new")):
        features = open_on_disk(name, 4 * size)
        features.write(0, np.arange(COUNT), np.ones((COUNT, *big), np.float32), {})
        os.utime(tmp_path / "f" / f"{name}.list", (age, age))
    open_on_disk("used", 4 * size)  # which is now the newest
    open_on_disk("more", 3 * size + 3 * 8192)
    assert sorted(path.stem for path in (tmp_path / "f").glob("*.list")) == ["more", "new", "used"]


def test_a_view_is_the_augmentation_of_the_epoch_of_its_number(tmp_path: Path) -> None:
    """In the feature pass and in live training."""
    pixels = splits_on_disk.open_pixels(splits_on_disk.write_file_split(tmp_path / "data"), "none", tmp_path)
    augmentation = Augmentation(flip_horizontal=True, rotation=20, contrast=0.2)
    chosen = np.array([2, 3, 11, 30])
    seen = []
    for view in (0, 1):
        batches = build_indexed_batches(
            pixels, chosen, rows_per_batch=4, num_replicas=1, view=EpochAugmentation(augmentation, 5, view)
        )
        (batch,) = batches.dataset.take(1).as_numpy_iterator()
        expected = augment(pixels.read_images(chosen), augmentation, 5, np.full(4, view), chosen)
        np.testing.assert_array_equal(batch["image"], expected)
        np.testing.assert_array_equal(batch["index"], chosen)
        seen.append(batch["image"])
    assert (seen[0] != seen[1]).any()
    count = splits_on_disk.COUNT
    order = Order(count, seed=5, window=count, first_epoch=2)
    batches = build_training_batches(pixels, order, num_replicas=1, augmentation=augmentation, num_views=2)
    third, fourth = batches.dataset.take(2).as_numpy_iterator()
    for view, batch in enumerate((third, fourth)):
        rows = np.argsort(batch["index"])[chosen]
        np.testing.assert_array_equal(batch["image"][rows], seen[view])
    assert (third["index"] != fourth["index"]).any()
