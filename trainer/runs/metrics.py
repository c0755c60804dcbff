"""Training metrics of a run: log lines or a progress bar, metrics.jsonl, TensorBoard."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import tensorflow as tf
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboard.compat.proto.event_pb2 import Event

from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.storage.local import write_whole

TENSORBOARD_SCORES = ("val_loss", "val_accuracy", "val_macro_f1", "val_top_5")  # one point per epoch


def format_duration(seconds: float) -> str:
    """Format seconds: 75 as "1:15", 3700 as "1:01:40"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def truncate_metrics(metrics: Path, logs: Path, step: int) -> None:
    """Delete the lines of metrics.jsonl and the TensorBoard records after `step`, from which the run resumes."""
    if metrics.exists():
        lines = [line for line in metrics.read_text().splitlines() if _step_of(line) <= step]
        write_whole(metrics, "".join(line + "\n" for line in lines))
    for file in logs.glob("*/events.out.tfevents.*"):
        shortened = Path(f"{file}.cut")
        # Data loss: the last record was truncated by a kill.
        with tf.io.TFRecordWriter(str(shortened)) as writer, suppress(tf.errors.DataLossError):
            for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
                if Event.FromString(record).step <= step:
                    writer.write(record)
        shortened.replace(file)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line truncated by a kill
        return float("inf")


class MetricsWriter:
    """Writes the metrics of a run on the chief; on other workers every method does nothing.

    A line of metrics.jsonl is a logging interval ("kind": "train") or an epoch ("kind": "epoch"). Values that depend on
    the machine and the time are under "timing"; everything else is reproducible.
    """

    def __init__(self, folder: Path | None, style: str, batch_size: int) -> None:
        """`folder`: None on workers other than the chief. `style`: bar, lines, or auto (a bar in a terminal)."""
        self.folder, self.style, self.batch_size, self.total_steps = folder, style, batch_size, 1
        self.bar: Progress | None = None
        self._writers: dict[str, tf.summary.SummaryWriter] = {}
        self._profiling = False

    def start(self, total_steps: int) -> None:
        """Set the number of steps of all phases, and start the progress bar if there is one."""
        self.total_steps = total_steps
        if self.folder and (self.style == "bar" or (self.style == "auto" and sys.stdout.isatty())):
            text = TextColumn("{task.percentage:>3.0f} %  {task.fields[line]}")
            console = Console(highlight=False)
            self.bar = Progress(TextColumn("{task.description}"), BarColumn(), text, console=console)
            self._task = self.bar.add_task("", total=total_steps, line="")
            self.bar.start()

    def log(self, text: str, **fields: Any) -> None:
        """Log a line, above the progress bar if there is one; `fields` are its values in a JSON log."""
        if self.bar:
            self.bar.console.print(text, markup=False, soft_wrap=True)
        elif self.folder:
            log.info(text, extra={"fields": fields})

    def write_interval(
        self, entry: dict[str, Any], examples: float, seconds: float, waited: float, goodput: float
    ) -> None:
        """Write and log a logging interval of training.

        `entry` has phase, epoch, step, loss, accuracy and learning_rate. `waited` are the seconds without data for the
        device; `goodput`, in 0..1, is that of the run so far.
        """
        seconds = max(seconds, 1e-9)
        rate, wait = examples / seconds, min(waited / seconds, 1.0)
        left = format_duration((self.total_steps - entry["step"]) * self.batch_size / rate)
        timing = {"images_per_second": round(rate, 1), "data_wait": round(wait, 4), "goodput": round(goodput, 4)}
        phase, epoch, step = entry["phase"], entry["epoch"], entry["step"]
        self._write({"kind": "train", **entry, "timing": timing | {"time": time.time()}})
        health.set_gauges(loss=entry["loss"], images_per_second=rate, data_wait_ratio=wait, goodput_ratio=goodput)
        scalars = {f"train/{key}": entry[key] for key in ("loss", "accuracy", "learning_rate")}
        scalars |= {"speed/images_per_second": rate, "speed/data_wait": wait, "speed/goodput": goodput}
        self._scalars(phase, step, scalars)
        line = (
            f"loss {entry['loss']:.4g}  accuracy {entry['accuracy']:.4f}  lr {entry['learning_rate']:.2e}  "
            f"{rate:,.0f} images/s  waiting {wait:.0%}  goodput {goodput:.0%}  left {left}"
        )
        if self.bar:
            self.bar.update(self._task, completed=step, description=f"{phase} epoch {epoch}", line=line)
        else:
            progress = f"step {step}/{self.total_steps} ({step / self.total_steps:.0%})"
            self.log(f"{phase}  epoch {epoch}  {progress}  {line}", **entry, **timing)

    def write_epoch(self, entry: dict[str, Any], timing: dict[str, float], best: bool) -> None:
        """Write and log an epoch: training means and validation scores; `best`: it is the best one so far."""
        self._write({"kind": "epoch", **entry, "timing": timing})
        scores = {f"validation/{key.removeprefix('val_')}": entry[key] for key in TENSORBOARD_SCORES if key in entry}
        self._scalars(entry["phase"], entry["step"], scores)
        self.flush()
        top_5 = f"  val_top_5 {entry['val_top_5']:.4f}" if "val_top_5" in entry else ""
        text = (
            f"{entry['phase']}  epoch {entry['epoch']} done in {timing['seconds']:.1f} s: loss {entry['loss']:.4g}  "
            f"accuracy {entry['accuracy']:.4f}  val_loss {entry['val_loss']:.4g}  "
            f"val_accuracy {entry['val_accuracy']:.4f}{top_5}{'  (best)' if best else ''}"
        )
        self.log(text, **entry, **timing)

    def _write(self, entry: dict[str, Any]) -> None:
        if self.folder:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def _scalars(self, phase: str, step: int, values: dict[str, float]) -> None:
        if self.folder is None:
            return
        if phase not in self._writers:
            self._writers[phase] = tf.summary.create_file_writer(str(self.folder / "logs" / phase))
        with self._writers[phase].as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)

    def flush(self) -> None:
        """Flush the TensorBoard files, so that a kill does not lose records before the next checkpoint."""
        for writer in self._writers.values():
            writer.flush()

    def profile(self, step: int, window: tuple[int, int] | None) -> None:
        """Start or stop TensorBoard's profiler before `step`: it records the steps [first, last) of `window`."""
        if self.folder is None:
            return
        if window and not self._profiling and window[0] <= step < window[1]:
            tf.profiler.experimental.start(str(self.folder / "logs"))
            self._profiling = True
        elif self._profiling and not (window and step < window[1]):
            tf.profiler.experimental.stop()
            self._profiling = False

    def close(self) -> None:
        """Stop the progress bar and the profiler, and close the TensorBoard files."""
        self.profile(0, None)
        if self.bar:
            self.bar.stop()
        for writer in self._writers.values():
            writer.close()
