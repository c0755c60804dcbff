"""Stall detection, and the exceptions from it."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest

from trainer.monitoring.health import Health


@pytest.fixture
def advance(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Advance the time that the health reads, so that a busy machine does not."""
    now = [1000.0]
    monkeypatch.setattr("trainer.monitoring.health.time", SimpleNamespace(monotonic=lambda: now[0]))

    def advance(seconds: float) -> None:
        now[0] += seconds

    return advance


def test_the_stall_reason_names_activity_and_step(advance: Callable[[float], None]) -> None:
    health = Health()
    health.stuck_after = 20
    health.enter_phase("head")
    health.record_steps(40, 2)
    health.set_activity("training")
    advance(20)
    assert health.describe_stall() is None
    advance(10)
    stall = "stalled: no progress for 30 s (runtime.stuck_after=20) in: training after step 40"
    assert health.describe_stall() == stall
    health.record_progress()
    assert health.describe_stall() is None


def test_without_a_limit_there_is_no_stall(advance: Callable[[float], None]) -> None:
    health = Health()
    advance(1e6)
    assert health.describe_stall() is None


def test_waiting_for_another_worker_is_no_stall(advance: Callable[[float], None]) -> None:
    health = Health()
    health.stuck_after = 20
    with health.waiting_for("worker 1"):
        advance(30)
        assert health.describe_stall() is None
        assert health.describe() == "starting, waiting for worker 1"
    assert health.describe_stall() is None
    assert health.describe() == "starting"
    advance(30)
    assert health.describe_stall() is not None


def test_ages(advance: Callable[[float], None]) -> None:
    health = Health()
    assert (health.step_age, health.checkpoint_age) == (None, None)
    health.record_steps(1, 1)
    health.record_checkpoint(seconds_ago=5)
    advance(3)
    assert (health.step_age, health.checkpoint_age) == (3, 8)
