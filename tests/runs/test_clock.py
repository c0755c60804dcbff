"""The time breakdown of a run: every second is in one category, across restarts."""

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.monitoring.health import health
from trainer.runs.clock import CATEGORIES, Clock


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advance the time that the clock reads, so that a busy machine does not."""
    now = [time.time()]
    monkeypatch.setattr("trainer.runs.clock.time", SimpleNamespace(time=lambda: now[0]))

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_categories_add_up_to_the_wall_time(tmp_path: Path, advance: Callable[[float], None]) -> None:
    began = time.time() - 2
    clock = Clock(tmp_path / "ledger.json", began)
    with clock.span("train", "training"):
        assert health.activity == "training"
        advance(0.2)
        clock.add_wait(0.05)
        with clock.span("checkpoint"):
            advance(0.1)
        advance(0.05)
    clock.update()
    clock.write()
    assert sum(clock.seconds.values()) == pytest.approx(2.35, abs=0.01)
    assert clock.seconds["start"] == pytest.approx(2, abs=0.01)
    assert clock.seconds["train"] == pytest.approx(0.2, abs=0.01)
    assert clock.seconds["checkpoint"] == pytest.approx(0.1, abs=0.01)
    assert clock.seconds["wait"] == pytest.approx(0.05)
    assert clock.goodput == pytest.approx(0.2 / 2.35, abs=0.01)
    assert json.loads((tmp_path / "ledger.json").read_text())["seconds"]["wait"] == 0.05


def test_a_span_that_fails_is_counted_and_restores_the_outer_one(advance: Callable[[float], None]) -> None:
    clock = Clock(None, time.time())
    with clock.span("train", "training"):
        with contextlib.suppress(ValueError), clock.span("evaluation", "validation"):
            advance(0.05)
            raise ValueError
        assert health.activity == "training"
        advance(0.05)
    assert clock.seconds["evaluation"] == pytest.approx(0.05, abs=0.01)
    assert clock.seconds["train"] == pytest.approx(0.05, abs=0.01)


def test_a_restart_counts_lost_steps_and_the_time_without_a_process(tmp_path: Path) -> None:
    file, now = tmp_path / "ledger.json", time.time()
    first = Clock(file, now - 100)
    first._last = now - 40
    first.seconds |= {"start": 10.0, "train": 50.0}
    first.write()
    second = Clock(file, now - 5)  # 35 seconds later
    second.update()
    second.move_lost_time(train_seconds=30.0)
    assert {name: round(second.seconds[name]) for name in CATEGORIES if second.seconds[name]} == {
        "start": 15, "train": 30, "lost": 20, "down": 35,
    }  # fmt: skip
    assert sum(second.seconds.values()) == pytest.approx(100, abs=1)
    assert second.goodput == pytest.approx(0.3, abs=0.01)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"seconds": {}}'])
def test_a_damaged_breakdown_is_replaced(tmp_path: Path, content: str) -> None:
    (tmp_path / "ledger.json").write_text(content)
    assert sum(Clock(tmp_path / "ledger.json", time.time()).seconds.values()) == 0
