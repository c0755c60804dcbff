"""A full disk is named with its free space, whatever library writes to it."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import fill, small_disk
from tests.errors import raises
from trainer.errors import ConfigError, DataError, Interrupted
from trainer.runs.restarts import RestartHistory
from trainer.storage.disk import (
    describe_failure,
    get_free_bytes,
    make_write_error,
    translate_disk_error,
    translate_disk_errors,
)
from trainer.storage.local import write_atomically, write_json
from trainer.storage.path import storage_path


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "full", "256k") as folder:
        fill(folder)
        yield folder


def test_a_write_to_a_full_disk_names_the_folder_and_its_space(full: Path) -> None:
    for write in (
        lambda: write_json(full / "a" / "run.json", {"a": "b" * 5000}),
        lambda: storage_path(full / "a" / "b").write(b"x" * 5000),
        lambda: write_atomically(full / "a" / "c", "x" * 5000),
    ):
        problem = f"^{full}/a: cannot be written to \\(No space left on device, 0.0 MB free\\)$"
        with raises(Interrupted, fix="make space there", problem=problem), translate_disk_errors():
            write()
    assert [path.name for path in (full / "a").iterdir()] == []


def test_free_space_is_that_of_the_file_system_of_the_folder(full: Path) -> None:
    assert get_free_bytes(full / "not" / "there" / "yet") == 0
    assert get_free_bytes(full.parent) > 0


def test_the_fullest_of_the_candidates_is_named(full: Path, tmp_path: Path) -> None:
    error = translate_disk_error(
        OSError(errno.ENOSPC, "No space left on device"), [tmp_path, full, "/"], "nothing is lost"
    )
    assert error
    assert error.problem == f"{full}: cannot be written to (No space left on device, 0.0 MB free); nothing is lost"


def test_the_errors_of_other_libraries_are_recognized_by_their_text(tmp_path: Path) -> None:
    tensorflow = f"{tmp_path}/logs/events.out.tfevents.1; No space left on device [Op:FlushSummaryWriter]"
    for error in (RuntimeError(tensorflow), OSError(f"Can't write data (errno = 28, '{os.strerror(errno.ENOSPC)}')")):
        assert describe_failure(error) == "No space left on device"
    named = translate_disk_error(RuntimeError(tensorflow))
    assert named
    assert named.problem.startswith(f"{tmp_path}: ")
    assert describe_failure(FileNotFoundError(2, "No usable temporary directory"))
    for other in (ValueError("x"), FileNotFoundError(2, "No such file"), PermissionError(13, "Permission denied")):
        assert describe_failure(other) is None
        with pytest.raises(type(other)), translate_disk_errors():
            raise other
    with raises(DataError, problem="No space"), translate_disk_errors():  # an error for the user stays as it is
        raise DataError("No space left on device")


def test_a_folder_that_cannot_be_written_is_the_mistake_of_the_user_unless_its_disk_is_full(tmp_path: Path) -> None:
    denied = make_write_error(PermissionError(13, "Permission denied"), tmp_path, "output_dir", "give another one")
    with raises(ConfigError, "output_dir", tmp_path, "another", r"written to \(Permission denied\)"):
        raise denied
    full = make_write_error(
        OSError(errno.ENOSPC, "No space left on device"), tmp_path, "output_dir", "give another one"
    )
    with raises(Interrupted, fix="make space", problem=str(tmp_path)):
        raise full


def test_the_end_of_a_start_is_recorded_if_the_disk_permits(full: Path) -> None:
    (full / "filler").unlink()
    history = RestartHistory(full / "attempts.json")
    history.begin(0, 3)
    fill(full)
    history.record_failure(75, "the disk is full " * 1000)  # does not raise the error that it records
    assert len(RestartHistory(full / "attempts.json").entries) == 1
