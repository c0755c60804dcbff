"""The terminal of a whole run: what it showed, what is left, and the figures of the report."""

import json
import re
import sys
from pathlib import Path

import pytest

from tests.e2e.running import SMALL
from tests.terminal import on_terminal, screen
from trainer.monitoring.display import format_duration


@pytest.mark.slow
@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_run_shows_each_stage_and_ends_with_the_figures_of_its_page(tmp_path: Path, width: int) -> None:
    output = on_terminal([sys.executable, "-m", "trainer", *SMALL, f"output_dir={tmp_path / 'run'}"], width)
    drawn = [part for part in re.split(r"[\r\n]|\x1b\[[\d;?]*[A-Za-z]", output) if "  left " in part or "0:0" in part]
    for phase, last in (("head", 2), ("fine_tune", 4)):  # a short epoch can fall between two refreshes
        assert any(re.match(rf"{phase}  epoch \d/{last}  ", line) for line in drawn), phase
    for stage in ("compiling the first step", "export", "report"):
        assert any(stage in line for line in drawn), stage
    left = [line for line in screen(output, width) if line]
    assert not [line for line in left if "━" in line or "╌" in line]
    timing = json.loads((tmp_path / "run" / "report" / "report.json").read_text())["timing"]
    in_all, rate = format_duration(sum(timing["seconds"].values())), f"{timing['images_per_second']:,.0f} images/s"
    summary = "".join(left).partition("test accuracy")[2]  # in one line, as the terminal wraps lines
    assert summary.endswith(f"--logdir {tmp_path / 'run' / 'logs'}")
    for figure in (f"{in_all} in all", rate, f"goodput {timing['goodput']:.0%}"):
        assert figure in summary
