"""`make help` and what `make setup` says when it cannot go on."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TARGETS = ["setup", "train", "test", "test-all", "lint", "bench", "image", "pretrained", "manifests", "lock", "clean"]


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


def hashes_of(lock: str) -> dict[str, list[str]]:
    """The hashes of each `name==version` that a lock names."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / lock).read_text().splitlines():
        if pin := re.match(r"[\w.-]+==\S+", line):
            hashes = found.setdefault(pin[0], [])
        elif "--hash=sha256:" in line:
            hashes.append(line.strip(" \\"))
        else:
            assert line.lstrip().startswith("#"), line
    return found


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-image.lock"])
def test_a_lock_has_hashes_for_everything_and_no_address(name: str) -> None:
    lock = (ROOT / name).read_text()
    assert "://" not in lock
    assert "index-url" not in lock
    hashes = hashes_of(name)
    assert len(hashes) > 50
    assert all(hashes.values())


def test_the_image_has_what_runs_need_in_the_versions_that_are_tested() -> None:
    """requirements-image.lock is requirements.lock without what only development needs, and with NVIDIA's libraries."""
    everything, image = hashes_of("requirements.lock"), hashes_of("requirements-image.lock")
    nvidia = {pin for pin in image if pin.startswith("nvidia-")}
    assert len(nvidia) > 5
    assert {pin: image[pin] for pin in image.keys() - nvidia}.items() <= everything.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {pin.split("==")[0] for pin in image}
    for needed in project["dependencies"]:
        assert re.split(r"[^\w-]", needed)[0] in names
    for tool in project["optional-dependencies"]["dev"]:
        assert re.split(r"[^\w-]", tool)[0].lower() not in names
