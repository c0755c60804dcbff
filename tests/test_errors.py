"""docs/errors.md holds every error message, and each has a fix."""

from pathlib import Path

import pytest

from scripts.error_messages import EXIT_CODES, PAGE, format_page, list_raised_errors
from trainer.errors import INTERRUPTED, WRONG_INPUT, ConfigError

ROOT = Path(__file__).parents[1]
MODULES = sorted((ROOT / "trainer").rglob("*.py"))


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == format_page(), "run python scripts/error_messages.py"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: str(path.relative_to(ROOT / "trainer")))
def test_every_error_of_the_user_has_a_fix(module: Path) -> None:
    without = [
        (kind, problem)
        for kind, _, problem, fix in list_raised_errors(module)
        if EXIT_CODES[kind] == WRONG_INPUT and not fix
    ]
    assert not without


def test_an_error_is_its_key_its_value_its_problem_and_its_fix() -> None:
    error = ConfigError("is odd", key="training.batch_size", value=31, fix="use 30 or 32")
    assert str(error) == "training.batch_size=31: is odd; use 30 or 32"
    assert str(ConfigError("is odd", key="seed")) == "seed: is odd"
    assert EXIT_CODES["Interrupted"] == INTERRUPTED
