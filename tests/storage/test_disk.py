"""A full disk is named with its free space, whatever library writes to it."""

import errno
import os
import re
import subprocess
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
    translate_file_errors,
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
    for other in (ValueError("x"), FileNotFoundError(2, "No such file"), PermissionError(13, "Permission denied")):
        assert describe_failure(other) is None
        with pytest.raises(type(other)), translate_disk_errors():
            raise other
    with raises(DataError, problem="No space"), translate_disk_errors():  # an error for the user stays as it is
        raise DataError("No space left on device")


def test_a_path_with_a_space_is_named_whole(full: Path, tmp_path: Path) -> None:
    run = full / "my runs" / "a (1)"
    (full / "filler").unlink()
    (run / "logs").mkdir(parents=True)
    fill(full)
    for text in (f"{run}/logs/x; No space left on device", f"writing {run}/logs/x y: No space left on device"):
        for folders in ([run, tmp_path], [tmp_path, run]):
            error = translate_disk_error(RuntimeError(text), folders)
            assert error
            assert error.problem == f"{run}: cannot be written to (No space left on device, 0.0 MB free)"
    error = translate_disk_error(RuntimeError(f"{full}/my runs/x y No space left on device"))
    assert error
    assert error.problem.startswith(f"{full}/my runs: cannot")


@pytest.mark.parametrize("text", ["/" + "a" * 300, "/", "/nowhere/x", "//", "/proc/self/fd/0/x", ""])
def test_any_text_of_a_full_disk_is_a_sentence(text: str) -> None:
    for error in (RuntimeError(f"{text}; No space left on device"), OSError(errno.ENOSPC, "x", text or 5)):
        translated = translate_disk_error(error)
        assert translated
        assert "cannot be written to (No space left on device" in translated.problem
    assert get_free_bytes(text) >= 0


def test_a_missing_temporary_folder_is_a_full_disk_only_where_it_may_be_written(full: Path, tmp_path: Path) -> None:
    def error(*folders: Path) -> FileNotFoundError:  # as `tempfile` raises it
        return FileNotFoundError(errno.ENOENT, f"No usable temporary directory in {list(map(str, folders))}")

    with raises(Interrupted, fix="make space", problem=f"^{full}: cannot"), translate_file_errors():
        raise error(full, tmp_path / "nowhere")
    subprocess.run(["mount", "-o", "remount,ro", str(full)], check=True)
    with raises(ConfigError, fix="set TMPDIR", problem="temporary files"), translate_file_errors():
        raise error(full, tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["Read-only file system", "Input/output error"])
def test_a_disk_that_fails_while_tensorflow_writes_is_no_bug(tmp_path: Path, text: str) -> None:
    with raises(Interrupted, problem=f"^{tmp_path}: cannot be written to \\({text}"), translate_file_errors():
        raise RuntimeError(f"{tmp_path}/events; {text} [Op:FlushSummaryWriter]")


def test_a_path_that_may_not_be_accessed_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with small_disk(tmp_path / "ro", "256k") as read_only:
        subprocess.run(["mount", "-o", "remount,ro", str(read_only)], check=True)
        for path, problem in (
            (read_only / "a" / "b", f"{read_only}: cannot be written to (Read-only file system)"),
            (read_only / "c", f"{read_only}: cannot be written to (Read-only file system)"),
            (tmp_path / "file" / "x" / "y", f"{tmp_path}/file: cannot be written to (Not a directory)"),
            (tmp_path / "file" / "x", f"{tmp_path}/file: cannot be read or written (File exists)"),
            (tmp_path / ("a" * 300), f"{tmp_path}: cannot be written to (File name too long)"),
        ):
            with raises(ConfigError, fix="another path", problem=f"^{re.escape(problem)}$"), translate_file_errors():
                write_atomically(path, "x")
    for other in (FileNotFoundError(2, "No such file", "x"), PermissionError(13, "x"), ValueError("x")):
        with pytest.raises(type(other)), translate_file_errors():
            raise other


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
    history.add_start(0, 3)
    fill(full)
    history.record_failure(75, "the disk is full " * 1000)  # does not raise the error that it records
    assert len(RestartHistory(full / "attempts.json").entries) == 1
