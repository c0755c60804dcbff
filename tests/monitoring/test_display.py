"""The progress display on a pseudo-terminal of three widths: what it shows first, and that nothing of it is left."""

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.terminal import on_terminal, screen
from trainer.monitoring.display import PhaseProgress, format_duration, format_status_line
from trainer.monitoring.health import FINISH, Health

ROOT = Path(__file__).parents[2]
FIGURES = ["loss 0.1234", "accuracy 0.9512", "120 images/s", "goodput 83%", "lr 1.00e-03", "waiting 0%"]
PROGRAM = """
import logging, sys
from rich.console import Console
from trainer.monitoring.display import Display, PhaseProgress
from trainer.monitoring.health import FINISH, health
from trainer.monitoring.log import configure, log
configure()
display = Display(Console(highlight=False))
draw = display._live.refresh  # as its thread does four times a second
health.enter_phase("fine_tune")
display.phase = PhaseProgress("fine_tune", 200, 400, 12, start_step=200)
display.metric_texts = sys.argv[1:]
for step in range(200, 601, 100):
    health.set_activity("training")
    health.record_steps(step, 7)
    draw()
    health.set_activity("validation")
    health.record_progress(0, 4)
    draw()
    health.record_progress(3, 4)
    draw()
log.info("fine_tune  epoch 7 done")
health.enter_phase(FINISH)
for stage in ("evaluation", "export", "report"):
    health.set_activity(stage)
    health.record_progress(0, 2)
    draw()
    health.record_progress(1, 2)
    draw()
display.stop()
print("the end")
"""


WIDTHS = {80: 1, 120: 3, 200: 6}  # columns of a terminal: the number of metrics that fit


@pytest.fixture(scope="module")
def outputs() -> dict[int, str]:
    """The output of the program on each terminal."""
    with ThreadPoolExecutor() as pool:
        written = pool.map(lambda width: on_terminal([sys.executable, "-c", PROGRAM, *FIGURES], width), WIDTHS)
        return dict(zip(WIDTHS, written, strict=True))


@pytest.mark.parametrize("width", WIDTHS)
def test_a_terminal_shows_phase_epoch_bar_and_time_first_and_nothing_is_left(
    width: int, outputs: dict[int, str]
) -> None:
    output = outputs[width]
    drawn = [part for part in re.split(r"[\r\n]|\x1b\[[\d;?]*[A-Za-z]", output) if part.strip()]
    assert max(map(len, drawn)) < width
    training = [line for line in drawn if line.startswith("fine_tune  epoch 7/12  ")]
    assert any(re.search(r"epoch 7/12  [━╌]+   50%  left 0:0\d  loss 0.1234", line) for line in training), training
    assert sum(figure in training[-1] for figure in FIGURES) >= WIDTHS[width]
    for stage in ("fine_tune  validation  ", "evaluation  ", "export  ", "report  "):
        assert any(line.startswith(stage) and "left 0:0" in line for line in drawn), stage
    assert [line for line in screen(output, width) if line] == ["fine_tune  epoch 7 done", "the end"]


def test_the_time_left_is_that_of_the_phase_or_of_the_activity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.monitoring.display.health", current := Health())
    phase = PhaseProgress("head", 0, 100, 5, start_step=20, started_at=1000.0)
    current.enter_phase("head")
    current.record_steps(20, 2)
    assert format_status_line(80, phase, [], now=1010.0) == "head  epoch 2/5  ━━╌╌╌╌╌╌╌╌   20%  left -:--"
    current.record_steps(60, 3)  # 40 steps in 20 s, 40 left
    assert format_status_line(80, phase, [], now=1020.0).endswith("60%  left 0:20")
    current.set_activity("saving a checkpoint")
    current.activity_started_at = 1000.0
    assert format_status_line(80, phase, FIGURES[:1], now=1007.0) == "head  saving a checkpoint  0:07  loss 0.1234"
    current.enter_phase(FINISH)
    current.set_activity("evaluation")
    current.activity_started_at = 1000.0
    current.record_progress(0, 4)
    assert format_status_line(80, phase, [], now=1009.0) == "evaluation  ╌╌╌╌╌╌╌╌╌╌    0%  left -:--"
    current.first_work_count = 0, 1000.0
    current.record_progress(3, 4)
    assert format_status_line(80, phase, [], now=1009.0) == "evaluation  ━━━━━━━╌╌╌   75%  left 0:03"
    assert len(format_status_line(30, phase, FIGURES, now=1009.0)) < 30


@pytest.mark.parametrize("activity", ["evaluation", "report"])
def test_the_time_left_is_that_of_the_loop_which_counts(activity: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It begins 100 s into the activity, and is the second one of it."""
    monkeypatch.setattr("trainer.monitoring.display.health", current := Health())
    monkeypatch.setattr("trainer.monitoring.health.time.monotonic", lambda: now)
    now = 1000.0
    current.enter_phase(FINISH)
    current.set_activity(activity)
    phase = PhaseProgress(activity, 0, 100, 5, start_step=20, started_at=1000.0)  # a phase may have any name
    for start, first, parts in ((1100.0, 0, 63), (1200.0, 30, 63), (1300.0, 2, 9)):
        now = start
        current.record_progress(first, parts)
        now += 2.0
        current.record_progress(first + 1, parts)
        left = format_duration(2.0 * (parts - first - 1))
        assert format_status_line(80, phase, [], now).endswith(f"  left {left}")
        current.record_progress(parts, parts)


@pytest.mark.parametrize("program", [
    "with show_image_progress('bar') as show:\n    for k in range(9): show(k, 9); print(k, flush=True); time.sleep(0.1)",
    "shown = Display(PatientConsole())\nfor k in range(9): shown.console.print(k); log.info('x'); time.sleep(0.1)\nshown.stop()",
])  # fmt: skip
def test_a_reader_that_ends_does_not_end_the_process(program: str) -> None:
    program = f"""
import sys, time
from trainer.cli.process import exit_with_code
from trainer.monitoring.console import PatientConsole
from trainer.monitoring.display import Display
from trainer.monitoring.log import log
from trainer.monitoring.progress import show_image_progress
with exit_with_code():
    exec({program!r})
    sys.stderr.write("done")
"""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1"}  # rich then draws on a pipe too
    done = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=-1, env=environment, text=True, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "done")


INTERRUPTED_PROGRAM = """
import os, signal, sys, threading, time
from rich.live import Live
from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import discover
from trainer.cluster.signals import StopFlag
from trainer.monitoring.console import PatientConsole
from trainer.monitoring.display import Display
from trainer.monitoring.health import health
from trainer.monitoring.log import configure
from trainer.monitoring.progress import show_image_progress
from trainer.prepare import _exit_on_signal
configure()
drawn, handled, refresh = threading.Event(), threading.Event(), Live.refresh
def refresh_and_notify(live):
    refresh(live)
    drawn.set()
Live.refresh = refresh_and_notify
how = sys.argv[1]
if how == "prepare":
    signal.signal(signal.SIGTERM, _exit_on_signal)
    with show_image_progress("bar") as show:
        show(3, 9)
        drawn.clear()
        drawn.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(99)
stop = StopFlag()
stop.on_signal = lambda name: handled.set()
display = Display(PatientConsole(highlight=False))
health.set_activity("training")
health.record_progress(3, 9)
drawn.clear()
drawn.wait()
os.write(1, b"^C")
if how == "control":
    control = ControlChannel(discover({}), {})
    control.on_end = lambda code, message: time.sleep(0.6)
    control.end(75, "stalled")
os.kill(os.getpid(), signal.SIGINT)
handled.wait()
time.sleep(0.6)
if how == "twice":
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(99)
display.stop()
sys.exit(75)
"""
SAVING = "SIGINT: saving at the next step, then stopping (again to stop at once)"
AT_ONCE = "SIGINT: stopping at once"
WRITING = "interrupted: SIGTERM; start the same command again to write what is missing"


@pytest.mark.parametrize(
    ("how", "lines"),
    [("once", [SAVING]), ("twice", [SAVING, AT_ONCE]), ("control", ["interrupted: stalled"]), ("prepare", [WRITING])],
)
def test_an_interrupted_process_leaves_no_progress_and_shows_the_cursor(how: str, lines: list[str]) -> None:
    output = on_terminal([sys.executable, "-c", INTERRUPTED_PROGRAM, how], 120, code=75)
    assert "left" in output or "writing images" in output  # it was shown
    assert [line for line in screen(output, 120) if line] == lines
    assert re.findall(r"\x1b\[\?25[hl]", output)[-1].endswith("h")


def test_format_duration() -> None:
    assert [format_duration(s) for s in (5, 75, 3700)] == ["0:05", "1:15", "1:01:40"]


def test_an_activity_has_its_own_progress() -> None:
    own = Health()
    own.set_activity("export")
    own.record_progress(1, 3)
    own.record_progress()
    assert own.work == (1, 3)
    own.set_activity("export")
    assert own.work == (1, 3)
    own.set_activity("report")
    assert own.work == (0, 0)
