"""What the fingerprint of a dataset follows: every byte or samples, whatever the times and paths of its files."""

import io
import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.test_open import open_folder, open_logged, write_records
from tests.errors import raises
from trainer.config.diff import may_change_on_resume
from trainer.data import fingerprint
from trainer.errors import DataError
from trainer.runs.folder import check_same_data
from trainer.types import Dataset, has_fingerprints


def encode_bitmap(number: int) -> bytes:
    """A BMP of 90 x 90 pixels, 24 KB, between equal edges: all of these have the same size, first and last bytes."""
    pixels = np.random.default_rng(number).integers(0, 256, (90, 90, 3), np.uint8)
    pixels[:2], pixels[-2:] = 255, 255
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "BMP")
    return out.getvalue()


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    root = tmp_path / "pets"
    for number, name in enumerate(["cat", "dog"] * 5):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / f"{number}.bmp").write_bytes(encode_bitmap(number))
        os.utime(root / name / f"{number}.bmp", (1e9, 1e9))
    return root


def replace_image(root: Path) -> None:
    """Another image, of the same size, ends and modification time."""
    file = root / "cat" / "4.bmp"
    before = file.read_bytes()
    file.write_bytes(encode_bitmap(77))
    os.utime(file, (1e9, 1e9))
    after = file.read_bytes()
    assert (before[:64], before[-64:], len(before)) == (after[:64], after[-64:], len(after))


@pytest.mark.parametrize(("whole_bytes", "kind"), [(1 << 30, "content"), (1000, "sample")])
def test_an_image_replaced_by_one_of_equal_size_and_ends_is_noticed(
    whole_bytes: int, kind: str, pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "MAX_FULL_READ_BYTES", whole_bytes)
    notes: list[str] = []
    before = open_logged(tmp_path, notes, source="image_folder", root=str(pets))
    replace_image(pets)
    after = open_folder(tmp_path, pets)
    assert before.fingerprint == before.fingerprints[kind] != after.fingerprint
    assert before.fingerprints["ends"] == after.fingerprints["ends"]
    assert any(n.startswith(f"data fingerprint: {before.fingerprint}, of the {kind}") for n in notes)
    with raises(DataError, key="output_dir", value="run", fix="the data of its first start", problem="other data"):
        check_same_data("run", {"data_fingerprint": dict(before.fingerprints)}, after)


def test_all_bytes_are_covered_on_request(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "MAX_FULL_READ_BYTES", 1000)
    monkeypatch.setattr(fingerprint, "_MAX_BLOCKS", 2)

    def both() -> tuple[Dataset, Dataset]:
        return open_folder(tmp_path, pets), open_folder(tmp_path, pets, fingerprint="content")

    sampled, whole = both()
    file = pets / "dog" / "3.bmp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    resampled, changed = both()
    assert list(whole.fingerprints) == ["ends", "content"]
    assert sampled.fingerprint == resampled.fingerprint
    assert whole.fingerprint != changed.fingerprint
    assert may_change_on_resume("data.fingerprint")


def test_moving_copying_and_touching_change_nothing(pets: Path, tmp_path: Path) -> None:
    first = open_folder(tmp_path, pets)
    shutil.copytree(pets, tmp_path / "copy", copy_function=shutil.copyfile)
    assert open_folder(tmp_path, tmp_path / "copy").fingerprints == first.fingerprints
    pets.rename(tmp_path / "moved")
    for file in (tmp_path / "moved").rglob("*.bmp"):
        os.utime(file)
    assert open_folder(tmp_path, tmp_path / "moved").fingerprints == first.fingerprints


def test_an_unchanged_file_is_read_once(pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, read = open_folder(tmp_path, pets), []
    read_whole = fingerprint._read_all_bytes
    monkeypatch.setattr(
        fingerprint, "_read_all_bytes", lambda handle, size: read.append(size) or read_whole(handle, size)
    )
    assert open_folder(tmp_path, pets).fingerprint == first.fingerprint
    assert read == []
    os.utime(pets / "dog" / "1.bmp", (1e9 + 1, 1e9 + 1))
    assert open_folder(tmp_path, pets).fingerprint == first.fingerprint
    assert len(read) == 1
    (table,) = (tmp_path / "checksums").iterdir()
    table.write_bytes(table.read_bytes()[:-30])
    assert open_folder(tmp_path, pets).fingerprint == first.fingerprint
    assert len(read) == 11
    just_now = time.time()
    os.utime(pets / "dog" / "1.bmp", (just_now, just_now))  # it may change again within the clock's resolution
    for count in (12, 13):
        open_folder(tmp_path, pets)
        assert len(read) == count


def test_a_file_that_cannot_be_read_is_left_to_decoding(
    pets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> list[bytes]:
        raise OSError(5, "Input/output error")

    first = open_folder(tmp_path / "a", pets)
    monkeypatch.setattr(fingerprint, "_read_all_bytes", fail)
    assert open_folder(tmp_path / "b", pets).fingerprint != first.fingerprint


def test_a_shard_replaced_under_its_manifest_is_noticed(tmp_path: Path) -> None:
    root = write_records(tmp_path / "pets", {"train": [0, 1, 2] * 10})
    other = write_records(tmp_path / "other", {"train": [0, 2, 1] * 10})
    first, streamed = (open_logged(tmp_path, source="tfds", root=str(root), streamed=s) for s in (False, True))
    assert first.fingerprints == streamed.fingerprints  # in a bucket the manifest is compared with the objects
    (shard,) = root.glob("*.tfrecord*")
    assert shard.stat().st_size == (other / shard.name).stat().st_size
    shutil.copyfile(other / shard.name, shard)
    assert open_logged(tmp_path, source="tfds", root=str(root)).fingerprint != first.fingerprint


def test_runs_compare_the_most_thorough_hash_that_both_have() -> None:
    def data(**hashes: str) -> Dataset:
        return Dataset("x", ("a", "b"), {}, "", fingerprints=hashes)

    now = data(ends="1", content="2")
    assert has_fingerprints(now, "1")  # of an older version
    assert not has_fingerprints(now, "2")
    assert has_fingerprints(now, {"ends": "9", "content": "2"})
    assert not has_fingerprints(now, {"ends": "1", "content": "9"})
    assert has_fingerprints(now, {"ends": "1", "sample": "9"})
    assert not has_fingerprints(now, {"sample": "2"})
    check_same_data("run", {}, now)
    check_same_data("run", json.loads('{"data_fingerprint": "1"}'), now)
    with raises(DataError, key="output_dir", value="run", problem=r"other data \(fingerprint 5, now 1 2\)"):
        check_same_data("run", {"data_fingerprint": "5"}, now)
