"""The wheel: its contents, and that it works without a checkout."""

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
    """A new virtual environment with the wheel, and with access to this environment's packages."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)],
        check=True,
    )
    # The folder of a .pth file is searched for modules, but its own .pth files, such as the checkout's, are not read.
    (site,) = folder.glob("lib/python3*/site-packages")
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder


def run(installed: Path, folder: Path, program: str, *arguments: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    command = [str(installed / "bin" / program), *arguments]
    done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_contains_the_package_the_configuration_and_the_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith("kubetune-")}
        license_text = next(archive.read(n).decode() for n in archive.namelist() if n.endswith("licenses/LICENSE"))
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer").rglob("*.py")}
    weights = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer").rglob("*.h5")}
    conf = {f"trainer/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "conf").rglob("*.yaml")}
    templates = {path.relative_to(ROOT).as_posix() for path in (ROOT / "trainer/report/templates").iterdir()}
    assert code
    assert conf
    assert {path.rpartition(".")[2] for path in templates} == {"j2", "css", "js"}
    assert code | weights | conf | templates | {"trainer/serving/page.html"} <= names
    assert not [name for name in names if not name.startswith("trainer/") or "__pycache__" in name]
    assert "Apache License" in license_text


def test_the_installed_package_is_not_the_checkout(installed: Path, tmp_path: Path) -> None:
    file = run(installed, tmp_path, "python", "-c", "import trainer; print(trainer.__file__)")
    assert Path(file.strip()).is_relative_to(installed)


def test_help_lists_the_groups(installed: Path, tmp_path: Path) -> None:
    text = run(installed, tmp_path, "python", "-m", "trainer", "--help")
    for group in ("data", "model", "augmentation", "phases", "runtime", "experiment", "debug"):
        assert group in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("program", [("python", "-m", "trainer"), ("kubetune",)])
def test_the_configuration_is_read_from_the_package(installed: Path, tmp_path: Path, program: tuple[str, ...]) -> None:
    text = run(installed, tmp_path, *program, "--cfg", "job", "data=digits", "debug=fast")
    for section in ("data:", "model:", "phases:", "debug:"):
        assert f"\n{section}" in f"\n{text}"
    assert list(tmp_path.iterdir()) == []


def test_the_command_trains_and_evaluates_without_the_checkout(installed: Path, tmp_path: Path) -> None:
    arguments = ("experiment=quickstart", "debug=fast", "export.formats=[]", "output_dir=run")
    out = run(installed, tmp_path, "kubetune", *arguments, f"runtime.cache_dir={tmp_path / 'cache'}")
    assert "DONE" in {path.name for path in (tmp_path / "run").iterdir()}, out
    run(installed, tmp_path, "python", "-m", "trainer.evaluate", "run=run", "split=validation")
    assert (tmp_path / "run" / "evaluations" / "best-digits-validation" / "index.html").is_file()
