"""Limits on the length of modules and the size of RunContext, modules that must not import TensorFlow, duplicates."""

import dataclasses

import pytest

from tests.processes import ROOT, run_python
from trainer.context import RunContext

MAX_LINES = 600
MAX_AT_THE_TOP = 16  # modules of trainer/ itself

# Imported by every command line before the configuration is known to be right.
LIGHT = (
    "errors", "types", "config.schema", "config.diff", "config.auto", "cli.compose", "cli.process", "cli.arguments", "cli.sweep",
    "monitoring.log",
    "cluster.rendezvous", "runs.folder", "runs.stored_run", "__main__", "evaluate", "export", "plan", "prepare", "compare", "drift", "serve",
    "promote", "predict", "nightly", "look", "relay", "backbones", "rates", "api",
)  # fmt: skip


def test_no_module_is_too_long() -> None:
    assert not [p for p in (ROOT / "trainer").rglob("*.py") if len(p.read_text().splitlines()) > MAX_LINES]
    assert len(list((ROOT / "trainer").glob("*.py"))) <= MAX_AT_THE_TOP


# Imports each of its arguments in a process of its own. Those are forks, so that the libraries and the configuration,
# which take most of the time, are imported once.
PROGRAM = """
import os, sys
import google_crc32c, hydra, numpy, prometheus_client, trainer.config.schema
for module in sys.argv[1:]:
    if not os.fork():
        os.dup2(1, 2)
        __import__(f"trainer.{module}")
        heavy = {"tensorflow", "keras", "tensorflow_datasets", "sklearn", "matplotlib", "requests", "google.auth"}
        print(module, sorted(heavy & set(sys.modules)), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.fixture(scope="module")
def imports() -> list[str]:
    """The lines that the imports of all modules printed."""
    done = run_python(PROGRAM, *LIGHT)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("code", "module"),
    [
        ('"index.html"', "report/page.py"),  # INDEX
        ("indent=1,", "storage/base.py"),  # encode_json
        ("is not a phase of the configuration", "rates/range_test.py"),  # require_phase
    ],
)
def test_what_one_function_or_constant_defines_is_written_once(code: str, module: str) -> None:
    counts = {p: p.read_text().count(code) for p in (ROOT / "trainer").rglob("*.py")}
    assert {str(p.relative_to(ROOT / "trainer")): n for p, n in counts.items() if n} == {module: 1}


@pytest.mark.parametrize("module", LIGHT)
def test_modules_needed_before_the_configuration_is_known_do_not_import_tensorflow(
    imports: list[str], module: str
) -> None:
    assert f"{module} []" in imports


def test_these_imports_print_nothing(imports: list[str]) -> None:
    assert imports == [f"{module} []" for module in LIGHT]


def test_the_run_context_has_at_most_ten_fields() -> None:
    assert len(dataclasses.fields(RunContext)) <= 10
