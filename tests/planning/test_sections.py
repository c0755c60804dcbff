"""The sections that `trainer.plan` prints."""

import pytest

from trainer.cli.compose import compose
from trainer.cluster.discovery import discover
from trainer.config.schema import validate_config
from trainer.planning.sections import WIDTH, Plan


@pytest.mark.parametrize(("columns", "width"), [("72", 72), ("140", 140), ("wide", WIDTH), ("0", WIDTH)])
def test_lines_in_a_pipe_have_the_width_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: str, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    Plan(validate_config(compose(["data=digits"]) or {}), discover({})).print_section("data", [("classes", "a " * 200)])
    longest = max(map(len, capsys.readouterr().out.splitlines()))
    assert width - 3 < longest <= width
