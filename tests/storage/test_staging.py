"""Staging of files in a bucket: complete, current, within the budget; fetched once."""

import os
import time
from pathlib import Path

import pytest

from tests.errors import raises
from trainer.errors import DataError, StopRequested
from trainer.storage.base import StoragePath
from trainer.storage.staging import VERSIONS, find_prepared_folder, stage


def staged(address: str, cache: Path, budget: int = 10**9) -> tuple[Path, list[str]]:
    notes: list[str] = []
    return Path(stage(address, cache, budget, notes.append, lambda: None)), notes


def contents(folder: Path) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file() and file.name != VERSIONS]
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def test_a_local_address_is_unchanged(tmp_path: Path) -> None:
    assert stage("some/folder", tmp_path, 0, pytest.fail, lambda: None) == "some/folder"


def test_a_folder_is_fetched_once_and_follows_the_bucket(in_bucket: StoragePath, tmp_path: Path) -> None:
    photos = in_bucket / "photos"
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg"):
        (photos / name).write(name)
    folder, notes = staged(str(photos), tmp_path)
    assert folder.name == "photos"
    assert contents(folder) == {n: n.encode() for n in ("a/1.jpg", "a/2.jpg", "b/3.jpg")}
    assert notes == [f"{photos}: fetching 3 files, 0.0 MB, to {folder}"]
    assert staged(str(photos), tmp_path)[1] == [f"{photos}: all files are already in {folder}"]
    (photos / "a/1.jpg").write("another")
    (photos / "b/3.jpg").delete()
    (folder / "a" / "2.jpg").write_bytes(b"cut")
    left, others = folder / "a" / ".2.jpg.17-000000000000042", folder / "a" / ".2.jpg.18-000000000000042"
    for file in (left, others):
        file.write_bytes(b"half")
    os.utime(left, (time.time() - 7200,) * 2)
    assert staged(str(photos), tmp_path)[1] == [f"{photos}: fetching 2 files, 0.0 MB, to {folder}"]
    assert others.exists()  # another process may be writing it
    others.unlink()
    assert contents(folder) == {"a/1.jpg": b"another", "a/2.jpg": b"a/2.jpg"}


def test_a_pattern_and_a_single_file(in_bucket: StoragePath, tmp_path: Path) -> None:
    for name in ("x-0.tfrec", "x-1.tfrec", "y.txt"):
        (in_bucket / "data" / name).write(name)
    path, _ = staged(f"{in_bucket}/data/x-*.tfrec", tmp_path)
    assert path.name == "x-*.tfrec"
    assert set(contents(path.parent)) == {"x-0.tfrec", "x-1.tfrec"}
    file, _ = staged(f"{in_bucket}/data/y.txt", tmp_path)
    assert file.read_text() == "y.txt"
    assert (file.parent / "x-0.tfrec").exists()


def test_missing_and_too_large_addresses_are_named(in_bucket: StoragePath, tmp_path: Path) -> None:
    with raises(DataError, problem=f"{in_bucket}/no is empty or does not exist", fix="check the address"):
        staged(f"{in_bucket}/no", tmp_path)
    with raises(DataError, problem=r"nothing matches .*/no-\*", fix="check the address"):
        staged(f"{in_bucket}/no-*", tmp_path)
    (in_bucket / "d" / "f").write(b"x" * 1000)
    with raises(DataError, key="runtime.disk_budget_gb", value="0.0", problem="does not fit", fix="runtime.cache_dir"):
        staged(f"{in_bucket}/d", tmp_path, budget=999)


def test_staging_stops_on_request_and_resumes_later(in_bucket: StoragePath, tmp_path: Path) -> None:
    for i in range(40):
        (in_bucket / "d" / f"{i:02d}").write(str(i))

    def check() -> None:
        raise StopRequested("SIGTERM")

    with pytest.raises(StopRequested):
        stage(f"{in_bucket}/d", tmp_path, 10**9, lambda _: None, check)
    folder, notes = staged(f"{in_bucket}/d", tmp_path)
    assert len(contents(folder)) == 40
    assert "fetching 40 files" not in notes[0]


def test_versions_of_a_prepared_dataset(in_bucket: StoragePath) -> None:
    for version in ("1.0.0", "2.9.0", "2.10.0", "not-a-version"):
        (in_bucket / "datasets" / "beans" / version / "dataset_info.json").write("{}")
    assert find_prepared_folder(f"{in_bucket}/datasets", "beans") == f"{in_bucket}/datasets/beans/2.10.0"
    assert find_prepared_folder(f"{in_bucket}/datasets", "beans:1.0.0") == f"{in_bucket}/datasets/beans/1.0.0"
    with raises(DataError, key="data.name", value="beans:3.0.0", problem="no version 3.0.0", fix="gs://tfds-data"):
        find_prepared_folder(f"{in_bucket}/datasets", "beans:3.0.0")
    with raises(DataError, key="data.name", value="cats", problem="no prepared dataset in .*/cats", fix="prepare it"):
        find_prepared_folder(f"{in_bucket}/datasets", "cats")
