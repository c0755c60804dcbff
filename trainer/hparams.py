"""What TensorBoard's HParams page reads: a table of the jobs of a sweep, what each was told and how it scored.

One event file in the folder of the sweep names the columns, one in the folder of each job is its row, beside `logs/`
with its curves. https://www.tensorflow.org/tensorboard/hyperparameter_tuning_with_hparams
"""

from __future__ import annotations

import io
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

METRICS = {"val_accuracy": "validation accuracy", "test_accuracy": "test accuracy"}
FILE = "events.out.tfevents.hparams"  # TensorBoard looks for "tfevents" in a name
Value = bool | int | float | str


def columns(names: list[str]) -> bytes:
    """The event file of the whole sweep: the columns are these hyperparameters, and `METRICS`."""
    from tensorboard.plugins.hparams import summary_v2

    hparams = [summary_v2.HParam(name) for name in names]
    metrics = [summary_v2.Metric(tag, display_name=name) for tag, name in METRICS.items()]
    return _events([summary_v2.hparams_config_pb(hparams, metrics)])


def row(name: str, hparams: dict[str, Value], scores: dict[str, float], succeeded: bool) -> bytes:
    """The event file of one job; `scores` by the keys of `METRICS`, none of a job that failed."""
    from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2, summary_v2
    from tensorboard.plugins.scalar.summary_v2 import scalar_pb

    status = api_pb2.STATUS_SUCCESS if succeeded else api_pb2.STATUS_FAILURE
    now = time.time()
    ended = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=now)
    end = summary_v2._summary_pb(
        metadata.SESSION_END_INFO_TAG, plugin_data_pb2.HParamsPluginData(session_end_info=ended)
    )
    start = summary_v2.hparams_pb(hparams, trial_id=name, start_time_secs=now)
    return _events([start, *(scalar_pb(tag, score) for tag, score in scores.items()), end])


def _events(summaries: list[Summary]) -> bytes:
    """An event file, written without TensorFlow, which takes seconds to import."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.summary.writer.record_writer import RecordWriter

    file, now = io.BytesIO(), time.time()
    writer = RecordWriter(file)
    for event in [Event(file_version="brain.Event:2"), *(Event(summary=summary) for summary in summaries)]:
        event.wall_time = now
        writer.write(event.SerializeToString())
    return file.getvalue()
