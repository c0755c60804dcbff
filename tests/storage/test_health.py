"""Transfers count as progress, and a checkpoint in a bucket counts once it is committed."""

import time
from pathlib import Path

import pytest

from trainer.monitoring.health import Health
from trainer.runs import publisher
from trainer.runs.publisher import Publisher
from trainer.storage import bucket, gcs, s3
from trainer.storage.base import StoragePath
from trainer.storage.lease import acquire_lease


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch) -> Health:
    fresh = Health()
    for module in (bucket, gcs, s3, publisher):
        monkeypatch.setattr(module, "health", fresh)
    return fresh


def checkpoint_in(folder: Path) -> None:
    step = folder / "checkpoints" / "step-00000001"
    step.mkdir(parents=True)
    for name in ("variables.npz", "state.json", "manifest.json"):
        (step / name).write_bytes(b"x" * 1000)


def test_the_age_of_a_committed_checkpoint_in_a_bucket_begins_when_it_is_written(
    in_bucket: StoragePath, tmp_path: Path, health: Health
) -> None:
    checkpoint_in(tmp_path)
    lease = acquire_lease(in_bucket, "a test", None)
    publishing = Publisher(tmp_path, lease)
    began = time.monotonic()
    publishing.publish_checkpoints()
    written = time.monotonic()
    publishing.wait()
    assert (in_bucket / "checkpoints" / "LATEST").exists()
    now, age = time.monotonic(), health.checkpoint_age
    assert age is not None
    assert now - written <= age + 1e-3
    assert age <= time.monotonic() - began
    publishing.close()


def test_a_checkpoint_on_disk_counts_at_once(tmp_path: Path, health: Health) -> None:
    assert health.checkpoint_age is None
    Publisher(tmp_path, None).publish_checkpoints()
    assert health.checkpoint_age is not None


def test_parts_of_a_large_file_are_progress(in_bucket: StoragePath, tmp_path: Path, health: Health) -> None:
    whole = tmp_path / "large"
    whole.write_bytes(bytes(40 << 20))
    moments: list[float] = []
    health.record_progress = lambda: moments.append(time.monotonic())  # type: ignore[method-assign]
    (in_bucket / "large").upload(whole)
    sent = len(moments)
    (in_bucket / "large").download(tmp_path / "again")
    assert sent == (6 if str(in_bucket).startswith("gs://") else 5)  # parts of 8 MB; GCS then gets the final name
    assert len(moments) - sent == 3  # chunks of 16 MB
