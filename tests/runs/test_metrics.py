"""Training metrics: each value once, cut back on resume, also after a kill while writing."""

import json
from pathlib import Path

import pytest
import tensorflow as tf
from tensorboard.compat.proto.event_pb2 import Event

from trainer.runs.metrics import MetricsWriter, count_steps_to_profile, truncate_metrics


def entry(step: int) -> dict[str, object]:
    return {"phase": "head", "epoch": 1, "step": step, "loss": 1 / step, "accuracy": 0.5, "learning_rate": 0.1}


def written(folder: Path, *steps: int) -> None:
    metrics = MetricsWriter(folder, "lines", batch_size=4)
    metrics.start(10)
    for step in steps:
        metrics.write_interval(entry(step), examples=8.0, seconds=2.0, waited=0.5, goodput=0.5)
    last = {**entry(steps[-1]), "val_loss": 1.0, "val_accuracy": 0.25}
    metrics.write_epoch(last, {"seconds": 1.0, "validation_seconds": 0.1}, best=True)
    metrics.close()


def logged_steps(folder: Path, tag: str = "train/loss") -> list[int]:
    steps = set()
    for file in (folder / "logs" / "head").glob("events*"):
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            event = Event.FromString(record)
            steps |= {event.step for value in event.summary.value if value.tag == tag}
    return sorted(steps)


def test_an_interval_is_one_json_line_and_one_step_in_tensorboard(tmp_path: Path) -> None:
    written(tmp_path, 2, 4)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["kind"], line["step"]) for line in lines] == [("train", 2), ("train", 4), ("epoch", 4)]
    assert lines[0]["loss"] == 0.5
    assert lines[0]["timing"]["images_per_second"] > 0
    assert logged_steps(tmp_path) == [2, 4]


def test_metrics_after_the_restored_step_are_deleted(tmp_path: Path) -> None:
    written(tmp_path, 2, 4, 6)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"kind": "train", "st')  # truncated by a kill
    events = next((tmp_path / "logs" / "head").glob("events*"))
    events.write_bytes(events.read_bytes()[:-5])  # a record too
    truncate_metrics(file, tmp_path / "logs", 4, 4)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2, 4]
    assert logged_steps(tmp_path) == [2, 4]


def test_a_validation_that_the_checkpoint_does_not_have_is_deleted(tmp_path: Path) -> None:
    """A signal after the last step of an epoch saves a checkpoint before the validation, which the next start repeats."""
    written(tmp_path, 2, 4)
    for epoch_step, expected in ((4, ["train", "train", "epoch"]), (0, ["train", "train"])):
        truncate_metrics(tmp_path / "metrics.jsonl", tmp_path / "logs", 4, epoch_step)
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["kind"] for line in lines] == expected
        assert logged_steps(tmp_path) == [2, 4]
        assert logged_steps(tmp_path, "validation/loss") == ([4] if epoch_step else [])


@pytest.mark.parametrize("line", [b"\xff", b"3", b'{"step": "x"}', b'{"step": NaN}', b"[]", b'{"kind": "tr'])
def test_damaged_lines_are_deleted_and_a_copy_remains(tmp_path: Path, line: bytes) -> None:
    written(tmp_path, 2, 4)
    file = tmp_path / "metrics.jsonl"
    first, *others = file.read_bytes().splitlines(keepends=True)
    content = first + line + b"\n" + b"".join(others)
    file.write_bytes(content)
    truncate_metrics(file, tmp_path / "logs", 4, 4)
    assert file.read_bytes() == first + b"".join(others)
    assert (tmp_path / "metrics.jsonl.damaged").read_bytes() == content


def test_nothing_but_event_files_remains_in_the_logs(tmp_path: Path) -> None:
    written(tmp_path, 2, 4)
    truncate_metrics(tmp_path / "metrics.jsonl", tmp_path / "logs", 2, 2)
    truncate_metrics(tmp_path / "metrics.jsonl", tmp_path / "logs", 2, 2)
    assert len(list((tmp_path / "logs" / "head").iterdir())) == 1
    assert not (tmp_path / "metrics.jsonl.damaged").exists()


@pytest.mark.parametrize("position", [20, -60])  # in the first record, and in one of the last ones
def test_of_a_damaged_event_file_a_copy_remains(tmp_path: Path, position: int) -> None:
    written(tmp_path, 2, 4, 6)
    (file,) = (tmp_path / "logs" / "head").iterdir()
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)
    truncate_metrics(tmp_path / "metrics.jsonl", tmp_path / "logs", 6, 6)
    copies = [path for path in file.parent.iterdir() if path != file]
    assert [path.read_bytes() for path in copies] == [bytes(content)]
    assert "tfevents" not in copies[0].name
    assert len(file.read_bytes()) < len(content)


def test_the_profiler_records_the_first_to_the_last_step_of_its_window(tmp_path: Path) -> None:
    """With ten steps in a device call, which would pass over the window."""
    metrics, step, recorded, window = MetricsWriter(tmp_path, "lines", batch_size=4), 0, [], (3, 5)
    while step < 20:
        metrics.profile(step, window)
        count = min(10, count_steps_to_profile(step, window))
        recorded += [step + 1 + n for n in range(count) if metrics._profiling]
        step += count
    assert recorded == [3, 4, 5]
    assert list((tmp_path / "logs" / "plugins" / "profile").iterdir())
