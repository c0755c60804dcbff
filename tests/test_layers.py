"""What the layers of pyproject.toml do not say: how long a module may be, and what must start without TensorFlow."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAX_LINES = 600
MAX_AT_THE_TOP = 16  # modules of trainer/ itself

# Imported by every command line before the configuration is known to be right.
LIGHT = (
    "errors", "types", "config.schema", "config.diff", "config.auto", "cli.compose", "cli.process", "cli.arguments", "cli.sweep",
    "monitoring.log",
    "cluster.rendezvous", "runs.folder", "runs.finished_run", "__main__", "evaluate", "export", "plan", "prepare", "compare", "drift", "serve",
)  # fmt: skip


def test_no_module_is_longer_than_can_be_read() -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / "trainer").rglob("*.py")}
    assert {str(path): length for path, length in lengths.items() if length > MAX_LINES} == {}
    assert len(list((ROOT / "trainer").glob("*.py"))) <= MAX_AT_THE_TOP


@pytest.mark.parametrize("module", LIGHT)
def test_what_comes_before_the_configuration_is_known_starts_without_tensorflow(module: str) -> None:
    heavy = "{'tensorflow', 'keras', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'requests', 'google.auth'}"
    program = f"import sys, trainer.{module}; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert answer.stderr == ""
    assert answer.stdout == "[]\n"


def test_a_run_is_no_bag() -> None:
    program = "import dataclasses; from trainer.context import RunContext; print(len(dataclasses.fields(RunContext)))"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert int(answer.stdout) <= 10
