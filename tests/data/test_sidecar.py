"""A prepared dataset is opened from manifest and labels alone, and is the same dataset as with its shards."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.config.schema import Data
from trainer.data.open import open_dataset
from trainer.data.tfds_folder import LABELS, MANIFEST, known_shards
from trainer.data.tfds_writer import LabelledImages, WriteOptions, write_dataset
from trainer.errors import DataError
from trainer.types import Dataset

CLASSES = ("cat", "dog", "owl")


def png(number: int) -> bytes:
    out = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def write(folder: Path, *, broken: int | None = None) -> Path:
    train = [(b"no image" if i == broken else png(i), i % 3) for i in range(40)]
    splits = {"train": train, "test": [(png(100 + i), i % 3) for i in range(12)]}
    write_dataset(folder, LabelledImages("pets", CLASSES, splits), WriteOptions(shards=4, on_error="skip"))
    return folder


def opened(root: Path, cache: Path, **changes: bool) -> Dataset:
    data = Data(source="tfds", root=str(root), validation_fraction=0.2)
    return open_dataset(data, seed=1, cache_dir=cache, max_examples=None, note=lambda _: None, **changes)


def without_shards(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        if ".tfrecord" not in file.name:
            (to / file.name).write_bytes(file.read_bytes())
    return to


@pytest.mark.parametrize("broken", [None, 13])
def test_the_labels_of_every_shard_stand_beside_it(tmp_path: Path, broken: int | None) -> None:
    entries, labels = known_shards(write(tmp_path / "pets", broken=broken))
    expected = [i % 3 for i in range(40) if i != broken]
    train = [labels[name] for name in sorted(entries) if "train" in name]
    assert {array.dtype for array in train} == {np.dtype(np.int32)}
    assert np.concatenate(train).tolist() == expected
    test = [labels[name] for name in sorted(entries) if "test" in name]
    assert np.concatenate(test).tolist() == [i % 3 for i in range(12)]


def test_without_a_shard_it_is_the_same_dataset(tmp_path: Path) -> None:
    whole = opened(write(tmp_path / "pets", broken=5), tmp_path / "cache")
    bare = opened(without_shards(tmp_path / "pets", tmp_path / "bare"), tmp_path / "cache", arriving=True)
    assert whole.fingerprint == bare.fingerprint
    for name, split in whole.splits.items():
        np.testing.assert_array_equal(split.labels, bare.splits[name].labels)
        ranges = [(Path(s.path).name, s.count, s.start, s.stop) for s in split.shards]
        assert ranges == [(Path(s.path).name, s.count, s.start, s.stop) for s in bare.splits[name].shards]


def test_written_twice_the_labels_are_the_same_bytes(tmp_path: Path) -> None:
    one, two = (write(tmp_path / name) for name in ("one", "two"))
    assert (one / LABELS).read_bytes() == (two / LABELS).read_bytes()


def test_a_folder_that_was_prepared_before_gets_its_labels_when_it_is_prepared_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets")
    labels, times = (folder / LABELS).read_bytes(), {f: f.stat().st_mtime_ns for f in folder.glob("*.tfrecord*")}
    (folder / LABELS).unlink()
    assert known_shards(folder) == ({}, {})
    write(folder)
    assert (folder / LABELS).read_bytes() == labels
    assert {f: f.stat().st_mtime_ns for f in times} == times  # no shard was written again


def test_a_local_shard_that_is_gone_or_changed_is_not_taken_from_the_manifest(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets")
    before = opened(folder, tmp_path / "cache").fingerprint
    shard = sorted(folder.glob("*train*"))[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-3])
    with pytest.raises(DataError, match="is truncated"):
        opened(folder, tmp_path / "cache")
    shard.unlink()
    with pytest.raises(DataError, match="cannot be read: No such file"):
        opened(folder, tmp_path / "cache")
    shard.write_bytes(content)
    assert opened(folder, tmp_path / "cache").fingerprint == before


def test_labels_that_do_not_fit_the_manifest_are_not_used(tmp_path: Path) -> None:
    folder = write(tmp_path / "pets")
    (folder / LABELS).write_bytes((folder / LABELS).read_bytes()[:-20])
    assert known_shards(folder) == ({}, {})
    other = write(tmp_path / "other", broken=3)
    (folder / LABELS).write_bytes((other / LABELS).read_bytes())
    assert known_shards(folder) == ({}, {})
    (folder / MANIFEST).write_text("{")
    assert known_shards(folder) == ({}, {})
    with pytest.raises(DataError, match="does not name it; prepare the dataset again"):
        opened(folder, tmp_path / "cache", arriving=True)
