"""When a process counts as stuck, and when its silence means nothing."""

import time

from trainer.monitoring.health import Health


def patient(seconds: float) -> Health:
    health = Health()
    health.stuck_after = seconds
    return health


def test_silence_beyond_the_limit_is_one_sentence_that_says_where() -> None:
    health = patient(0.2)
    health.enter_phase("head")
    health.steps_taken(40, 2)
    health.set_activity("training")
    assert health.stall_reason() is None
    time.sleep(0.3)
    assert (
        health.stall_reason() == "stuck: nothing has moved for 0 s (runtime.stuck_after=0.2) in: training after step 40"
    )
    health.progress()
    assert health.stall_reason() is None


def test_without_a_limit_nothing_is_stuck() -> None:
    health = Health()
    time.sleep(0.05)
    assert health.stall_reason() is None


def test_who_waits_for_another_worker_is_not_stuck_and_begins_anew_after_it() -> None:
    health = patient(0.2)
    with health.waiting_for("worker 1"):
        time.sleep(0.3)
        assert health.stall_reason() is None
        assert health.describe() == "starting, waiting for worker 1"
    assert health.stall_reason() is None
    assert health.describe() == "starting"
    time.sleep(0.3)
    assert health.stall_reason() is not None


def test_ages() -> None:
    health = Health()
    assert health.step_age is None
    assert health.checkpoint_age is None
    health.steps_taken(1, 1)
    health.checkpoint_saved(seconds_ago=5)
    time.sleep(0.05)
    assert health.step_age is not None
    assert 0.05 <= health.step_age < 1
    assert health.checkpoint_age is not None
    assert 5.05 <= health.checkpoint_age < 6
