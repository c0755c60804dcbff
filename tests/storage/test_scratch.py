"""The folder for temporary files of a process, and those that killed processes left."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from trainer.storage.local import delete_stale_temporary_files, make_temporary_suffix
from trainer.storage.scratch import open_scratch_file, scratch_folder

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, sys, tempfile
from trainer.storage.scratch import open_scratch_file, scratch_folder
with scratch_folder():
    file, folder = open_scratch_file("failures"), tempfile.mkdtemp()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files of the machine."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@contextmanager
def process(temporary: Path) -> Iterator[tuple["subprocess.Popen[str]", Path]]:
    """A process that has made temporary files, and its folder of them."""
    environment = {**os.environ, "TMPDIR": str(temporary)}
    pipe = subprocess.PIPE
    child = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, text=True, stdin=pipe, stdout=pipe)
    assert child.stdout
    folder = Path(child.stdout.readline().strip()).parent
    assert folder.parent == temporary
    try:
        yield child, folder
    finally:
        child.kill()
        child.communicate()


def test_a_process_deletes_its_temporary_files(temporary: Path) -> None:
    with scratch_folder():
        open_scratch_file("failures")
        Path(tempfile.mkdtemp(), "x").touch()
        assert len(list(temporary.iterdir())) == 1
    assert list(temporary.iterdir()) == []
    assert tempfile.gettempdir() == str(temporary)
    with process(temporary) as (child, folder):
        child.communicate("")
        assert (child.returncode, folder.exists()) == (0, False)


def test_the_next_process_deletes_those_of_a_killed_one(temporary: Path) -> None:
    with process(temporary) as (running, folder), process(temporary) as (killed, left):
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        assert left.exists()
        os.utime(folder, (0, 0))  # an old one that is in use
        with scratch_folder():
            assert (left.exists(), folder.exists(), running.poll()) == (False, True, None)


def test_without_a_folder_for_temporary_files_its_user_reports_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with scratch_folder(), pytest.raises(FileNotFoundError, match="none"):
        tempfile.mkdtemp()


def test_temporary_files_of_ended_processes_are_deleted_at_once_and_those_of_others_when_old(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    running, left = os.getppid(), make_temporary_suffix(ended.pid)
    old, other = f".page.html{make_temporary_suffix(running)}", f".other.html{left}"
    names = {
        f".page.html{left}": False,
        f".page.html{make_temporary_suffix(running)}": True,
        old: False,
        other: True,
        "page.html": True,
        ".page.html": True,
    }
    for name in names:
        (tmp_path / name).touch()
    os.utime(tmp_path / old, (0, 0))
    delete_stale_temporary_files(tmp_path, "page.html")
    assert {name: (tmp_path / name).exists() for name in names} == names
    delete_stale_temporary_files(tmp_path)
    assert not (tmp_path / other).exists()
    delete_stale_temporary_files(tmp_path / "none")


@pytest.mark.skipif(os.geteuid() != 0, reason="a container is simulated with namespaces, which needs root")
@pytest.mark.parametrize("namespace", ["--uts", "--pid"], ids=["host", "container"])
def test_temporary_files_of_another_machine_are_not_deleted_before_they_are_old(tmp_path: Path, namespace: str) -> None:
    """The writer runs in a namespace of its own. The process with the same ID on this machine has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    program = f"""
import socket
from pathlib import Path
from trainer.storage.local import make_temporary_suffix
{"socket.sethostname('another-machine')" if namespace == "--uts" else ""}
Path(".page.html" + make_temporary_suffix({ended.pid})).touch()
"""
    command = ["unshare", namespace, "--fork", sys.executable, "-c", program]
    subprocess.run(command, cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    (file,) = tmp_path.iterdir()
    delete_stale_temporary_files(tmp_path)
    assert file.exists()
    os.utime(file, (0, 0))
    delete_stale_temporary_files(tmp_path)
    assert not file.exists()
