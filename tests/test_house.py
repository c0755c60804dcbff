"""`make help` and what `make setup` says when it cannot go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = ["setup", "train", "test", "test-all", "lint", "bench", "pretrained", "manifests", "lock", "clean"]


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        command, cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False, timeout=60
    )


@pytest.mark.parametrize("command", [("make",), ("make", "help")])
def test_make_lists_every_target(command: tuple[str, ...]) -> None:
    answer = run(*command)
    assert answer.returncode == 0
    told = re.findall(r"^  make (\S+) +\S", answer.stdout, re.MULTILINE)
    assert told == ["help", *TARGETS]


def python_that(folder: Path, first_does: str) -> str:
    """A real Python that runs a line of its own before what it is asked to."""
    program = folder / "python-under-test"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; {first_does}; exec(sys.argv[2])" "$@"\n')
    program.chmod(0o755)
    return str(program)


def copy_of_setup(folder: Path) -> Path:
    """The setup script in a folder without a .venv."""
    script = folder / "scripts" / "setup.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "scripts" / "setup.sh").read_text())
    (folder / "requirements.lock").write_text("")
    return script


@pytest.mark.parametrize(
    ("first_does", "message"),
    [
        (
            "sys.version_info = (3, 10, 13)",
            "is Python 3.10.13, and 3.11, 3.12 or 3.13 is needed: name one with PYTHON=",
        ),
        ("sys.version_info = (3, 14, 0)", "is Python 3.14.0, and 3.11, 3.12 or 3.13 is needed: name one with PYTHON="),
        ("sys.version_info = (2, 7, 18)", "is Python 2.7.18, and 3.11, 3.12 or 3.13 is needed: name one with PYTHON="),
        (
            "sys.version_info = (3, 11, 7); sys.modules['ensurepip'] = None",
            "has no ensurepip: install it (Debian, Ubuntu: apt-get install python3.11-venv) or name another Python",
        ),
        (
            "sys.version_info = (3, 12, 1); sys.modules['venv'] = None",
            "has no venv: install it (Debian, Ubuntu: apt-ge",
        ),
        ("sys.exit(127)", "is no Python that runs here: name Python 3.11, 3.12 or 3.13 with PYTHON="),
    ],
)
def test_setup_says_what_is_wrong_with_a_python(tmp_path: Path, first_does: str, message: str) -> None:
    script = copy_of_setup(tmp_path)
    python = python_that(tmp_path, first_does)
    answer = run("sh", str(script), PYTHON=python)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert re.fullmatch(rf"setup: {re.escape(python)} {re.escape(message)}.*\n", answer.stderr)
    assert not (tmp_path / ".venv").exists()


def test_setup_names_a_python_that_is_not_there(tmp_path: Path) -> None:
    answer = run("sh", str(copy_of_setup(tmp_path)), PYTHON="/no/such/python3")
    assert answer.returncode == 2
    assert answer.stderr.startswith("setup: /no/such/python3 is no Python that runs here")


def test_the_lock_has_hashes_for_everything_and_no_address() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert "://" not in lock
    assert "index-url" not in lock
    blocks = re.split(r"\n(?=\S)", lock.strip())
    assert len(blocks) > 50
    assert [block.splitlines()[0] for block in blocks if "--hash=sha256:" not in block] == []
