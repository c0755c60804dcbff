"""Every second of a run is in one place of the ledger, across restarts."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from trainer.runs.clock import PLACES, Ledger


def test_places_add_up_to_the_wall_time(tmp_path: Path) -> None:
    began = time.time() - 2
    ledger = Ledger(tmp_path / "ledger.json", began)
    ledger.mark("start")
    time.sleep(0.2)
    ledger.mark("train", waited=0.05)
    time.sleep(0.1)
    ledger.mark("checkpoint")
    assert sum(ledger.seconds.values()) == pytest.approx(time.time() - began, abs=0.02)
    assert ledger.seconds["start"] == pytest.approx(2, abs=0.05)
    assert ledger.seconds["train"] == pytest.approx(0.15, abs=0.05)
    assert ledger.seconds["wait"] == 0.05
    assert ledger.goodput == pytest.approx(0.15 / 2.3, abs=0.03)


def test_a_restart_knows_what_was_lost_and_how_long_nobody_was_there(tmp_path: Path) -> None:
    file, now = tmp_path / "ledger.json", time.time()
    first = Ledger(file, now - 100)
    first._last = now - 40
    first.seconds |= {"start": 10.0, "train": 50.0}
    first.write()
    second = Ledger(file, now - 5)  # 35 seconds later
    second.mark("start")
    second.resumed(kept=30.0)
    assert {place: round(second.seconds[place]) for place in PLACES if second.seconds[place]} == {
        "start": 15, "train": 30, "lost": 20, "down": 35,
    }  # fmt: skip
    assert sum(second.seconds.values()) == pytest.approx(100, abs=1)
    assert second.goodput == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seconds": {}}'])
def test_a_damaged_account_begins_anew(tmp_path: Path, content: str) -> None:
    (tmp_path / "ledger.json").write_text(content)
    assert sum(Ledger(tmp_path / "ledger.json", time.time()).seconds.values()) == 0
