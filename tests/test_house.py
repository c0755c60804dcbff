"""`make help`, the errors of `make setup`, and the locks."""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import trainer
from tests.waiting import PATIENCE

ROOT = Path(__file__).parent.parent
TARGETS = ["setup", "train", "test", "test-all", "lint", "bench", "image", "pretrained", "manifests", "pin",
           "lock", "clean"]  # fmt: skip


def run(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHON", "MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        command, cwd=ROOT, env=clean | environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )


@pytest.mark.parametrize("command", [("make",), ("make", "help")])
def test_make_lists_every_target(command: tuple[str, ...]) -> None:
    done = run(*command)
    assert done.returncode == 0
    assert re.findall(r"^  make (\S+) +\S", done.stdout, re.MULTILINE) == ["help", *TARGETS]


def python_with(folder: Path, prelude: str) -> str:
    """A real Python that runs a line of code before its `-c` argument."""
    program = folder / "python-under-test"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "import sys; {prelude}; exec(sys.argv[2])" "$@"\n')
    program.chmod(0o755)
    return str(program)


def copy_of_setup(folder: Path) -> Path:
    script = folder / "scripts" / "setup.sh"
    script.parent.mkdir()
    script.write_text((ROOT / "scripts" / "setup.sh").read_text())
    (folder / "requirements.lock").write_text("")
    return script


@pytest.mark.parametrize(
    ("prelude", "problem", "fix"),
    [
        ("sys.version_info = (3, 10, 13)", "3.10.13", "PYTHON="),
        ("sys.version_info = (3, 14, 0)", "3.14.0", "PYTHON="),
        ("sys.version_info = (2, 7, 18)", "2.7.18", "PYTHON="),
        ("sys.version_info = (3, 11, 7); sys.modules['ensurepip'] = None", "ensurepip", "python3.11-venv"),
        ("sys.version_info = (3, 12, 1); sys.modules['venv'] = None", "venv", "python3.12-venv"),
        ("sys.exit(127)", "cannot be run", "PYTHON="),
        (None, "cannot be run", "PYTHON="),  # no such file
    ],
)
def test_setup_reports_an_unsuitable_python(tmp_path: Path, prelude: str | None, problem: str, fix: str) -> None:
    script = copy_of_setup(tmp_path)
    python = "/no/such/python3" if prelude is None else python_with(tmp_path, prelude)
    done = run("sh", str(script), PYTHON=python)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"setup: {re.escape(python)}: .*{problem}.*; .*{fix}.*\n", done.stderr)
    assert not (tmp_path / ".venv").exists()


def hashes_of(lock: str) -> dict[str, list[str]]:
    pins: dict[str, list[str]] = {}
    for line in (ROOT / lock).read_text().splitlines():
        if pin := re.match(r"[\w.-]+==\S+", line):
            hashes = pins.setdefault(pin[0], [])
        elif "--hash=sha256:" in line:
            hashes.append(line.strip(" \\"))
        else:
            assert line.lstrip().startswith("#"), line
    return pins


@pytest.mark.parametrize("name", ["requirements.lock", "requirements-image.lock", "requirements-tensorboard.lock"])
def test_a_lock_has_hashes_for_all_packages_and_no_address(name: str) -> None:
    lock = (ROOT / name).read_text()
    assert "://" not in lock
    assert "index-url" not in lock
    hashes = hashes_of(name)
    assert len(hashes) > 40
    assert all(hashes.values())


def test_the_image_has_the_tested_versions_without_development_tools_and_with_nvidias_libraries() -> None:
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


def test_the_image_describes_itself_as_the_package_does() -> None:
    description = re.search(r'image\.description="(.*)"', (ROOT / "Dockerfile").read_text())
    assert description
    assert trainer.__doc__
    assert f"kubetune: {description[1].lower()}" == trainer.__doc__.lower()


def test_the_parts_of_the_slow_tests_have_each_test_once() -> None:
    """`make test-all SHARD=K/N`, on a file of tests."""

    def collect(*arguments: str) -> list[str]:
        command = shlex.split(run("make", "-n", "test-all", *arguments).stdout.splitlines()[-1])
        assert command[:3] == [".venv/bin/python", "-m", "pytest"]
        file = "tests/cluster/test_watchdog.py"
        done = run(sys.executable, *command[1:], "--collect-only", "-q", "-n", "0", file)
        return [line for line in done.stdout.splitlines() if "::" in line]

    parts = [collect(f"SHARD={number}/2") for number in (1, 2)]
    assert all(parts)
    assert sorted(parts[0] + parts[1]) == sorted(collect("SHARD=1/1"))
    assert set(parts[0] + parts[1]) < set(collect())  # which has the quick ones too
