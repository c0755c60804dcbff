"""Log lines about an activity that lasts."""

import logging
import re
import threading
from collections.abc import Iterator

import pytest

from tests.waiting import PATIENCE
from trainer.monitoring.log import log
from trainer.monitoring.progress import log_while_slow


class Lines(logging.Handler):
    """Collects messages, and sets an event at the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []
        self.second = threading.Event()

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())
        if len(self.messages) == 2:
            self.second.set()


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    log.addHandler(handler)
    yield handler
    log.removeHandler(handler)


def test_a_slow_activity_is_logged_while_it_lasts(lines: Lines) -> None:
    with log_while_slow("compiling the first step of phase head", first_log_seconds=0.01):
        assert lines.second.wait(PATIENCE)
    assert re.fullmatch(r"still compiling the first step of phase head, for \d+ s", lines.messages[0])
    count, threads = len(lines.messages), [thread.name for thread in threading.enumerate()]
    assert "log-while-slow" not in threads, "nothing is logged after the end"
    assert count == len(lines.messages)


def test_a_quick_activity_is_not_logged_even_if_it_fails(lines: Lines) -> None:
    with pytest.raises(ValueError, match="x"), log_while_slow("compiling", first_log_seconds=3600):
        raise ValueError("x")
    assert not lines.messages
    assert "log-while-slow" not in [thread.name for thread in threading.enumerate()]
