"""Stall detection, and the exceptions from it."""

import time

from trainer.monitoring.health import Health


def test_the_stall_reason_names_activity_and_step() -> None:
    health = Health()
    health.stuck_after = 0.2
    health.enter_phase("head")
    health.record_steps(40, 2)
    health.set_activity("training")
    assert health.describe_stall() is None
    time.sleep(0.3)
    stall = "stalled: no progress for 0 s (runtime.stuck_after=0.2) in: training after step 40"
    assert health.describe_stall() == stall
    health.record_progress()
    assert health.describe_stall() is None


def test_without_a_limit_there_is_no_stall() -> None:
    health = Health()
    time.sleep(0.05)
    assert health.describe_stall() is None


def test_waiting_for_another_worker_is_no_stall() -> None:
    health = Health()
    health.stuck_after = 0.2
    with health.waiting_for("worker 1"):
        time.sleep(0.3)
        assert health.describe_stall() is None
        assert health.describe() == "starting, waiting for worker 1"
    assert health.describe_stall() is None
    assert health.describe() == "starting"
    time.sleep(0.3)
    assert health.describe_stall() is not None


def test_ages() -> None:
    health = Health()
    assert (health.step_age, health.checkpoint_age) == (None, None)
    health.record_steps(1, 1)
    health.record_checkpoint(seconds_ago=5)
    time.sleep(0.05)
    assert 0.05 <= (health.step_age or 0) < 1
    assert 5.05 <= (health.checkpoint_age or 0) < 6
