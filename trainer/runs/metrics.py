"""Write a run's training metrics to metrics.jsonl, TensorBoard, and the log or a progress display."""

import json
import shutil
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import compress
from pathlib import Path
from typing import Any

import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorboard.compat.proto.event_pb2 import Event

from trainer.data.records import FOOTER_BYTES, HEADER_BYTES, is_truncated_at
from trainer.monitoring.console import PatientConsole
from trainer.monitoring.display import Display, PhaseProgress, format_duration
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.storage.disk import describe_failure
from trainer.storage.local import add_path_to_errors, temporary_file, write_atomically
from trainer.storage.small_files import CONTENT_ERRORS, require_nonnegative

TENSORBOARD_SCORES = ("val_loss", "val_accuracy", "val_macro_f1", "val_top_5")  # scores written after each epoch
SCORE_PREFIX = "validation/"  # prefix of these scores' names in TensorBoard


def truncate_metrics(metrics: Path, logs: Path, step: int, epoch_step: int) -> None:
    """In metrics.jsonl and the TensorBoard files, delete all metrics newer than a resumed run's checkpoint.

    A checkpoint at the last step of an epoch can be older than the epoch's validation, which is then repeated.

    A last line or record that a kill has truncated is also deleted. If a file is corrupt elsewhere, a copy of it is
    retained (NAME.damaged).

    Args:
        metrics: path of metrics.jsonl, which need not exist.
        logs: folder with one folder of TensorBoard files per phase.
        step: step of the newest checkpoint, from which the run resumes.
        epoch_step: step at the end of the last epoch whose validation the checkpoint has; 0 if there is none.
    """
    if metrics.exists():
        content = metrics.read_bytes()
        retain_flags = [_is_retained(line, step, epoch_step) for line in content.splitlines()]
        # A kill can truncate only the last line, which then has no line break.
        if num_corrupt := retain_flags[: len(retain_flags) - (not content.endswith(b"\n"))].count(None):
            shutil.copyfile(metrics, backup := metrics.with_name(f"{metrics.name}.damaged"))
            subject = "1 line is" if num_corrupt == 1 else f"{num_corrupt} lines are"
            log.info(f"{metrics}: {subject} corrupt and deleted; {backup.name} is a copy of the file")
        write_atomically(metrics, b"".join(compress(content.splitlines(keepends=True), retain_flags)))
    for file in list(logs.glob("*/events.out.tfevents.*")):
        with temporary_file(file) as new_file:
            size, is_intact = 0, True  # size: length of the intact records, in bytes
            with tf.io.TFRecordWriter(str(new_file)) as writer, suppress(tf.errors.DataLossError):
                for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
                    try:
                        event = Event.FromString(record)
                    except DecodeError:
                        is_intact = False
                        break
                    size += HEADER_BYTES + len(record) + FOOTER_BYTES
                    is_score = any(value.tag.startswith(SCORE_PREFIX) for value in event.summary.value)
                    if event.step <= (epoch_step if is_score else step):
                        writer.write(record)
            if not (is_intact and is_truncated_at(file, size)):
                # TensorBoard reads any file with "tfevents" in its name.
                backup = file.with_name(f"{file.name.replace('tfevents', 'events')}.damaged")
                shutil.copyfile(file, backup)
                log.info(f"{file}: is corrupt, and ends before byte {size:,} now; {backup.name} is a copy of the file")
            new_file.replace(file)


def _is_retained(line: bytes, step: int, epoch_step: int) -> bool | None:
    """Return whether a line of metrics.jsonl is not newer than the checkpoint; None if the line is corrupt."""
    try:
        entry = json.loads(line)
        return require_nonnegative(entry["step"]) <= (epoch_step if entry["kind"] == "epoch" else step)
    except CONTENT_ERRORS:
        return None


def count_steps_to_profile(step: int, window: tuple[int, int] | None) -> int:
    """Return the number of steps from `step` until the profiler next starts or stops; `sys.maxsize` if it does neither.

    `window` is the first and the last step to profile, counted from 1; None to profile no steps. All workers call this,
    so that they run the same number of steps in a device call.
    """
    profiled = _list_profiled_steps(window)
    boundaries = (profiled.start, profiled.stop) if profiled else ()
    return next((boundary - step for boundary in boundaries if boundary > step), sys.maxsize)


def _list_profiled_steps(window: tuple[int, int] | None) -> range:
    """Return the steps to profile, counted from 0. `window` is as in `count_steps_to_profile`."""
    return range(window[0] - 1, window[1]) if window else range(0)


class MetricsWriter:
    """Writes a run's metrics on the chief. On other workers, only sets the gauges for `/metrics`.

    A line of metrics.jsonl has the metrics of a logging interval ("kind": "train") or an epoch ("kind": "epoch").
    Values that depend on the machine and the time are under "timing"; everything else is reproducible.
    """

    def __init__(self, folder: Path | None, style: str, batch_size: int) -> None:
        """Create a writer, which writes nothing yet.

        Args:
            folder: the run's local folder; None on workers other than the chief.
            style: `runtime.progress`: "bar", "lines", or "auto", which is a bar if stdout is a terminal.
            batch_size: global batch size, from which the remaining time is estimated.
        """
        self.folder, self.style, self.batch_size, self.total_steps = folder, style, batch_size, 1
        self.display: Display | None = None
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._profiling = False

    def start(self, total_steps: int) -> None:
        """Set the number of steps of all phases, and start the progress display unless `style` selects log lines."""
        self.total_steps = total_steps
        if self.folder and (self.style == "bar" or (self.style == "auto" and sys.stdout.isatty())):
            self.display = Display(PatientConsole(highlight=False))

    def enter_phase(self, name: str, *, step: int, phase_step: int, steps: int, last_epoch: int) -> None:
        """Show a phase in the progress display.

        At step `step` of the run, `phase_step` of the phase's `steps` steps are done. The phase ends in epoch
        `last_epoch` of the run, counted from 1. Call this again after the first device call, which compiles the step:
        the remaining time is estimated from the speed since the last call of this method.
        """
        if self.display:
            self.display.phase = PhaseProgress(name, step - phase_step, steps, last_epoch, start_step=step)

    def log(self, text: str, **fields: Any) -> None:
        """Print `text` above the chief's progress display. Without a display, log it with `fields` for a JSON log."""
        if self.display:
            self.display.console.print(text, markup=False, soft_wrap=True)
        elif self.folder:
            log.info(text, extra={"fields": fields})

    def write_interval(
        self, entry: dict[str, Any], examples: float, seconds: float, waited: float, goodput: float,
        mean_rate: float = 0.0,
    ) -> None:  # fmt: skip
        """Write, log and show the metrics of a logging interval.

        Args:
            entry: phase, epoch, step, loss, accuracy and learning_rate.
            examples: number of examples that all workers trained on in the interval.
            seconds: duration of the interval.
            waited: seconds of the interval in which this worker waited for data.
            goodput: fraction of the time since the first start that was spent on training steps or features, 0..1.
            mean_rate: the run's mean throughput so far, in images per second, for the progress display.
        """
        seconds = max(seconds, 1e-9)
        rate, wait_ratio = examples / seconds, min(waited / seconds, 1.0)
        time_left = format_duration((self.total_steps - entry["step"]) * self.batch_size / rate)
        timing = {"images_per_second": round(rate, 1), "data_wait": round(wait_ratio, 4), "goodput": round(goodput, 4)}
        phase, epoch, step = entry["phase"], entry["epoch"], entry["step"]
        self._write({"kind": "train", **entry, "timing": timing | {"time": time.time()}})
        health.set_gauges(loss=entry["loss"], images_per_second=rate, data_wait_ratio=wait_ratio, goodput_ratio=goodput)
        scalars = {f"train/{key}": entry[key] for key in ("loss", "accuracy", "learning_rate")}
        scalars |= {"speed/images_per_second": rate, "speed/data_wait": wait_ratio, "speed/goodput": goodput}
        self._write_scalars(phase, step, scalars)
        loss_text, accuracy_text, lr = (f"loss {entry['loss']:.4g}", f"accuracy {entry['accuracy']:.4f}",
                                        entry["learning_rate"])  # fmt: skip
        lr_and_wait_texts = [f"lr {lr:.2e}", f"waiting {wait_ratio:.0%}"]
        if self.display:
            speed = [f"{mean_rate:,.0f} images/s", f"goodput {goodput:.0%}"]
            self.display.metric_texts = [loss_text, accuracy_text, *speed, *lr_and_wait_texts]
            return
        progress = f"step {step}/{self.total_steps} ({step / self.total_steps:.0%})"
        line = "  ".join([loss_text, accuracy_text, lr_and_wait_texts[0], f"{rate:,.0f} images/s",
                          lr_and_wait_texts[1], f"goodput {goodput:.0%}"])  # fmt: skip
        self.log(f"{phase}  epoch {epoch}  {progress}  {line}  left {time_left}", **entry, **timing)

    def write_epoch(self, entry: dict[str, Any], timing: dict[str, float], best: bool) -> None:
        """Write and log the metrics of an epoch: training means and validation scores.

        Args:
            entry: phase, epoch, step, loss, accuracy, learning_rate and the validation scores (`val_...`).
            timing: `seconds` of training and `validation_seconds`.
            best: whether this is the best epoch of the phase so far.
        """
        self._write({"kind": "epoch", **entry, "timing": timing})
        scores = {f"{SCORE_PREFIX}{key.removeprefix('val_')}": entry[key] for key in TENSORBOARD_SCORES if key in entry}
        self._write_scalars(entry["phase"], entry["step"], scores)
        self.flush()
        top_5_text = f"  val_top_5 {entry['val_top_5']:.4f}" if "val_top_5" in entry else ""
        text = (
            f"{entry['phase']}  epoch {entry['epoch']} done in {timing['seconds']:.1f} s: loss {entry['loss']:.4g}  "
            f"accuracy {entry['accuracy']:.4f}  val_loss {entry['val_loss']:.4g}  "
            f"val_accuracy {entry['val_accuracy']:.4f}{top_5_text}{'  (best)' if best else ''}"
        )
        self.log(text, **entry, **timing)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.folder:
            path = self.folder / "metrics.jsonl"
            with add_path_to_errors(path), open(path, "a") as file:
                file.write(json.dumps(entry) + "\n")

    def _write_scalars(self, phase: str, step: int, values: dict[str, float]) -> None:
        """Write scalars to the phase's TensorBoard file, on the chief only."""
        if self.folder is None:
            return
        if phase not in self._writers:
            self._writers[phase] = tf.summary.create_file_writer(str(self.folder / "logs" / phase))
        with self._writers[phase].as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)

    def flush(self) -> None:
        """Flush the TensorBoard files, so that a kill loses no records that are older than the next checkpoint."""
        for writer in self._writers.values():
            writer.flush()

    def profile(self, step: int, window: tuple[int, int] | None) -> None:
        """Start or stop TensorBoard's profiler before a device call, so that it records the steps in `window`.

        Args:
            step: steps of the run before the device call, which must not run more than `count_steps_to_profile` steps.
            window: the first and the last step to record, counted from 1; None to stop the profiler.
        """
        if self.folder is None:
            return
        is_profiled = step in _list_profiled_steps(window)
        if is_profiled and not self._profiling:
            tf.profiler.experimental.start(str(self.folder / "logs"))
        elif self._profiling and not is_profiled:
            tf.profiler.experimental.stop()
        self._profiling = is_profiled

    def stop_display(self) -> None:
        """Erase the progress display, if there is one. Later lines are written to the log."""
        if self.display:
            self.display.stop()
            self.display = None

    def close(self) -> None:
        """Erase the display, stop the profiler and close the TensorBoard files. Disk errors are only logged."""
        self.stop_display()
        for close_resource in (partial(self.profile, 0, None), *(writer.close for writer in self._writers.values())):
            try:
                close_resource()
            except Exception as error:  # must not hide the error that ends the run
                if (reason := describe_failure(error)) is None:
                    raise
                log.info(f"{self.folder}/logs is not complete ({reason})")
