"""Damaged files are a sentence with their name; temporary files have one pattern."""

import os
from pathlib import Path

import numpy as np
import pytest

from tests.errors import raises
from trainer.errors import DataError
from trainer.storage.arrays import pack, unpack
from trainer.storage.base import is_temporary_name
from trainer.storage.local import delete_temporary_files, temporary_file, temporary_folder, write_atomically
from trainer.storage.path import storage_path
from trainer.storage.small_files import (
    read_json,
    read_json_or_default,
    rename_corrupt_file,
    require_json_object,
    require_json_objects,
    require_nonnegative,
)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'"a"', b"\xff", b"[" * 100_000, b"NaN"])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with raises(DataError, fix="restore it", problem=f"^{file} is corrupt"):
        read_json(file, require_json_object, "restore it")
    assert read_json_or_default(file, require_json_object, None) is None
    assert rename_corrupt_file(file).read_bytes() == content
    assert not file.exists()
    assert read_json(file, require_json_object, "") is None


def test_the_shapes_of_values() -> None:
    assert require_json_objects([{"a": 1}]) == [{"a": 1}]
    assert require_nonnegative(3) == 3.0
    for wrong in (None, {"a": 1}, [1], "a"):
        with pytest.raises(ValueError, match="not a JSON"):
            require_json_objects(wrong)
    for wrong in (float("nan"), float("inf"), -1, True, "1", None):
        with pytest.raises(ValueError, match="finite"):
            require_nonnegative(wrong)


def test_temporary_files_and_folders_have_one_pattern_and_are_deleted(tmp_path: Path) -> None:
    for path in (tmp_path / "config.yaml", tmp_path / ".hidden.json", tmp_path / "step-00000001"):
        with temporary_file(path) as file, temporary_folder(path) as folder:
            file.write_text("x")
            (folder / "y").write_text("y")
            assert is_temporary_name(file.name)
            assert is_temporary_name(folder.name)
            assert storage_path(tmp_path).list() == []
            for path in (file, folder):  # as if this process were killed
                path.rename(str(path).replace(f".{os.getpid()}-", ".1-"))
    write_atomically(tmp_path / "sub" / "a.txt", "mine")
    delete_temporary_files(tmp_path, age=3600.0)  # they may be in use
    assert len(list(tmp_path.iterdir())) == 7
    delete_temporary_files(tmp_path)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["a.txt"]


def test_only_a_folder_itself_is_swept(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    for folder in (tmp_path, tmp_path / "job"):
        (folder / ".a.1-000000000000001").touch()
    delete_temporary_files(tmp_path, recursive=False)
    assert [path.name for path in tmp_path.rglob(".*")] == [".a.1-000000000000001"]


@pytest.mark.parametrize(
    "name",
    [".snapshot.20240101-1200", ".backup.2024-11", ".b.1-20240101120000", ".v.20240101-000000000000001", ".a.1-2"],
)
def test_hidden_files_of_a_user_are_no_temporary_files(tmp_path: Path, name: str) -> None:
    write_atomically(tmp_path / name / "thesis", "x")
    write_atomically(tmp_path / "sub" / name, "x")
    delete_temporary_files(tmp_path)
    assert (tmp_path / name / "thesis").exists()
    assert (tmp_path / "sub" / name).exists()


@pytest.mark.parametrize("content", [b"", b"{", b"PK\x03\x04", b"\x93NUMPY", pack({"a": np.zeros(9)})[:60]])
def test_what_is_not_a_file_of_arrays_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        unpack(content)
