"""When a process counts as stuck, and when its silence means nothing."""

from __future__ import annotations

import time

from trainer.monitoring.health import LifeSigns


def patient(seconds: float) -> LifeSigns:
    signs = LifeSigns()
    signs.stuck_after = seconds
    return signs


def test_silence_beyond_the_limit_is_one_sentence_that_says_where() -> None:
    signs = patient(0.2)
    signs.enter("head")
    signs.stepped(40, 2)
    signs.at("training")
    assert signs.stuck() is None
    time.sleep(0.3)
    assert signs.stuck() == "stuck: nothing has moved for 0 s (runtime.stuck_after=0.2) in: training after step 40"
    signs.moved()
    assert signs.stuck() is None


def test_without_a_limit_nothing_is_stuck() -> None:
    signs = LifeSigns()
    time.sleep(0.05)
    assert signs.stuck() is None


def test_who_waits_for_another_worker_is_not_stuck_and_begins_anew_after_it() -> None:
    signs = patient(0.2)
    with signs.waiting("worker 1"):
        time.sleep(0.3)
        assert signs.stuck() is None
        assert signs.now() == "starting, waiting for worker 1"
    assert signs.stuck() is None
    assert signs.now() == "starting"
    time.sleep(0.3)
    assert signs.stuck() is not None


def test_ages() -> None:
    signs = LifeSigns()
    assert signs.step_age is None
    assert signs.checkpoint_age is None
    signs.stepped(1, 1)
    signs.saved(seconds_ago=5)
    time.sleep(0.05)
    assert signs.step_age is not None
    assert 0.05 <= signs.step_age < 1
    assert signs.checkpoint_age is not None
    assert 5.05 <= signs.checkpoint_age < 6
