"""The wheel: what is in it, and that it works where there is no checkout."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)], check=True
    )
    (built,) = folder.glob("kubetune-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel; the packages it needs are seen where they are now."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    # A path named in a .pth file is searched, but the .pth files in it are not read: the checkout stays out of sight.
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "seen.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def ask(installed: Path, elsewhere: Path, *arguments: str) -> str:
    """Run the wheel's Python in a folder that has nothing to do with the project."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    answer = subprocess.run(
        [str(installed / "bin" / arguments[0]), *arguments[1:]],
        cwd=elsewhere,
        env=clean,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def test_the_wheel_holds_the_package_the_configuration_and_the_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.startswith("kubetune-")}
        license_text = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("licenses/LICENSE"))
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer").rglob("*.py")}
    weights = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer").rglob("*.h5")}
    conf = {f"trainer/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer/report/templates").iterdir()}
    assert code
    assert conf
    assert {path.rpartition(".")[2] for path in templates} == {"j2", "css", "js"}
    assert code | weights | conf | templates | {"trainer/serving/page.html"} <= held
    assert not [name for name in held if not name.startswith("trainer/") or "__pycache__" in name]
    assert "Apache License" in license_text


def test_the_installed_package_is_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    where = ask(installed, tmp_path, "python", "-c", "import trainer; print(trainer.__file__)")
    assert Path(where.strip()).is_relative_to(installed)


def test_help_names_the_groups(installed: Path, tmp_path: Path) -> None:
    text = ask(installed, tmp_path, "python", "-m", "trainer", "--help")
    for group in ("data", "model", "augmentation", "phases", "runtime", "experiment", "debug"):
        assert group in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", [("python", "-m", "trainer"), ("kubetune",)])
def test_the_configuration_is_found_anywhere(installed: Path, tmp_path: Path, program: tuple[str, ...]) -> None:
    text = ask(installed, tmp_path, *program, "--cfg", "job", "data=digits", "debug=fast")
    for section in ("data:", "model:", "phases:", "debug:"):
        assert f"\n{section}" in f"\n{text}"
    assert list(tmp_path.iterdir()) == []
