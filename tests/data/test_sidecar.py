"""A prepared dataset is opened from manifest and labels alone, and is the same dataset as with its shards."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.images import encode_noise
from tests.data.test_open import CLASSES, open_logged
from tests.errors import raises
from trainer.data.tfds_folder import LABELS_FILE, MANIFEST_FILE, read_manifest_and_labels
from trainer.data.tfds_writer import LabeledImages, WriteOptions, write_dataset
from trainer.errors import DataError
from trainer.types import Dataset


def write(folder: Path, *, broken: int | None = None) -> Path:
    train = [(b"no image" if i == broken else encode_noise(i), i % 3) for i in range(40)]
    splits = {"train": train, "test": [(encode_noise(100 + i), i % 3) for i in range(12)]}
    write_dataset(folder, LabeledImages("pets", CLASSES, splits), WriteOptions(shards=4, on_error="skip"))
    return folder


def open_again(tmp_path: Path, name: str = "pets", **options: Any) -> Dataset:
    return open_logged(tmp_path / "cache", source="tfds", root=str(tmp_path / name), **options)


@pytest.mark.parametrize("broken", [None, 13])
def test_the_labels_file_has_the_labels_of_every_shard(tmp_path: Path, broken: int | None) -> None:
    entries, labels = read_manifest_and_labels(write(tmp_path / "pets", broken=broken))
    expected = {"train": [i % 3 for i in range(40) if i != broken], "test": [i % 3 for i in range(12)]}
    for split, values in expected.items():
        arrays = [labels[name] for name in sorted(entries) if split in name]
        assert {array.dtype for array in arrays} == {np.dtype(np.int32)}
        assert np.concatenate(arrays).tolist() == values


def test_without_a_shard_it_is_the_same_dataset(tmp_path: Path) -> None:
    write(tmp_path / "pets", broken=5)
    (tmp_path / "bare").mkdir()
    for file in (tmp_path / "pets").iterdir():
        if ".tfrecord" not in file.name:
            (tmp_path / "bare" / file.name).write_bytes(file.read_bytes())
    whole, bare = open_again(tmp_path), open_again(tmp_path, "bare", streamed=True)
    assert whole.fingerprint == bare.fingerprint
    for name, split in whole.splits.items():
        np.testing.assert_array_equal(split.labels, bare.splits[name].labels)
        ranges = [(Path(s.path).name, s.count, s.start, s.stop) for s in split.shards]
        assert ranges == [(Path(s.path).name, s.count, s.start, s.stop) for s in bare.splits[name].shards]


def test_preparing_again_writes_the_same_labels_and_no_shard(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets")
    labels, times = (folder / LABELS_FILE).read_bytes(), {f: f.stat().st_mtime_ns for f in folder.glob("*.tfrecord*")}
    assert (write(tmp_path / "other") / LABELS_FILE).read_bytes() == labels
    (folder / LABELS_FILE).unlink()
    assert read_manifest_and_labels(folder) == ({}, {})
    write(folder)
    assert (folder / LABELS_FILE).read_bytes() == labels
    assert {f: f.stat().st_mtime_ns for f in times} == times


def test_a_local_shard_that_is_missing_or_changed_is_not_replaced_by_the_manifest(tmp_path: Path) -> None:
    shard = sorted(write(tmp_path / "pets").glob("*train*"))[1]
    before = open_again(tmp_path).fingerprint
    content = shard.read_bytes()
    shard.write_bytes(content[:-3])
    with raises(DataError, problem="is truncated"):
        open_again(tmp_path)
    shard.unlink()
    with raises(DataError, problem="cannot be read: No such file"):
        open_again(tmp_path)
    shard.write_bytes(content)
    assert open_again(tmp_path).fingerprint == before


def test_labels_that_contradict_the_manifest_are_not_used(tmp_path: Path) -> None:
    folder, other = write(tmp_path / "pets"), write(tmp_path / "other", broken=3)
    for name, content in (
        (LABELS_FILE, (folder / LABELS_FILE).read_bytes()[:-20]),
        (LABELS_FILE, (other / LABELS_FILE).read_bytes()),
        (MANIFEST_FILE, b"{"),
    ):
        (folder / name).write_bytes(content)
        assert read_manifest_and_labels(folder) == ({}, {})
    with raises(DataError, fix="prepare the dataset again", problem="is not in the manifest"):
        open_again(tmp_path, streamed=True)
