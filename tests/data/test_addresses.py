"""Errors and log lines about data in a bucket name it by its address, not by the local copy."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.images import encode_noise, fill_folder
from tests.errors import raises
from tests.storage.emulator import BUCKET, running
from trainer.config.schema import RunConfig, validate_resolved_config
from trainer.data.images import ImageStore
from trainer.data.open import stage_and_open_run_dataset
from trainer.data.prepare import prepare
from trainer.data.records import frame_record, serialize_example
from trainer.data.remote import replace_local_paths, show_addresses_in_errors
from trainer.errors import DataError, ModelError
from trainer.planning.dry_run import _open_data
from trainer.planning.sections import Plan
from trainer.storage.path import storage_path
from trainer.storage.staging import get_staged_and_source_folder, stage

HOME = f"gs://{BUCKET}/data"


@pytest.fixture(autouse=True, scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A bucket with class folders and shards, each with an image that cannot be decoded, and one that is no image."""
    folder = tmp_path_factory.mktemp("bucket")
    root = fill_folder(folder / "photos", {"cat": 4, "dog": 4})
    fill_folder(folder / "broken", {"cat": 1, "dog": 1})
    (folder / "broken" / "dog" / "00.jpg").write_bytes(b"no image")
    (root / "cat" / "02.jpg").write_bytes(encode_noise(2)[:200])
    images = [encode_noise(i)[: 200 if i == 5 else None] for i in range(6)]
    with running(folder / "objects"):
        for file in folder.glob("*/*/*.jpg"):
            (storage_path(HOME) / str(file.relative_to(folder))).upload(file)
        records = b"".join(frame_record(serialize_example(image, i % 2)) for i, image in enumerate(images))
        (storage_path(HOME) / "shards" / "a-0.tfrec").write(records)
        yield


DATA: dict[str, dict[str, Any]] = {
    "photos/cat/02.jpg": {"source": "image_folder", "root": f"{HOME}/photos/"},
    "shards/a-0.tfrec#5": {"source": "tfrecords", "pattern": f"{HOME}/shards/a-*.tfrec", "class_names": ["cat", "dog"]},
}
KINDS = pytest.mark.parametrize("name", list(DATA))


def make_config(tmp_path: Path, **data: Any) -> RunConfig:
    return validate_resolved_config({
        "data": {"validation_fraction": 0, "cache": "none", **data},
        "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}},
        "runtime": {"cache_dir": str(tmp_path / "cache"), "progress": "lines"},
    })  # fmt: skip


def open_store(tmp_path: Path, **data: Any) -> ImageStore:
    config = make_config(tmp_path, **data)
    return ImageStore(stage_and_open_run_dataset(config, print, lambda _: None), config, 10, lambda _: None)


@KINDS
def test_an_image_that_cannot_be_decoded(tmp_path: Path, name: str) -> None:
    images = open_store(tmp_path, **DATA[name])
    everything = np.arange(images.dataset.splits["train"].count)
    with raises(DataError, problem=f"cannot decode {HOME}/{name}"), show_addresses_in_errors(images.addresses):
        images.read_images("train", everything)


@KINDS
def test_an_image_that_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    logging.getLogger("trainer").propagate = True
    images = open_store(tmp_path, on_error="skip", **DATA[name])
    images.read_images("train", np.arange(images.dataset.splits["train"].count))
    assert [line.partition(": ")[0] for line in images.list_undecodable()] == [f"{HOME}/{name}"]
    assert f"skipped {HOME}/{name}" in caplog.text
    assert str(tmp_path) not in caplog.text
    assert {images.name_of("train", i).partition("data/")[0] for i in range(6)} == {f"gs://{BUCKET}/"}


@KINDS
def test_an_image_that_cannot_be_prepared(tmp_path: Path, name: str) -> None:
    with raises(DataError, problem=f"{HOME}/{name}"):
        prepare(make_config(tmp_path, **DATA[name]), str(tmp_path / "out"))


def test_a_plan_of_staged_data(tmp_path: Path) -> None:
    config = make_config(tmp_path, source="image_folder", root=f"{HOME}/broken")
    stage(f"{HOME}/broken", config.runtime.cache_folder, 10**9, print, lambda: None)
    plan = Plan(config, cluster=None)  # type: ignore[arg-type]
    with raises(DataError, problem=f"{HOME}/broken/dog/00.jpg"):
        _open_data(plan)


@pytest.mark.parametrize(
    ("address", "folder"),
    [
        (f"{HOME}/photos/", f"{HOME}/photos"),
        (f"{HOME}/*/*.tfrec", HOME),
        (f"{HOME}/shards/a-0.tfrec", f"{HOME}/shards"),
        (f"gs://{BUCKET}", f"gs://{BUCKET}"),
    ],
)
def test_a_local_copy_is_replaced_in_texts(tmp_path: Path, address: str, folder: str) -> None:
    path = stage(address, tmp_path, 10**9, print, lambda: None)
    local, bucket_folder = get_staged_and_source_folder(path, address, tmp_path)
    assert (bucket_folder, Path(local).is_dir()) == (folder, True)
    assert replace_local_paths(f"damaged: {path}/x", {local: bucket_folder}) == f"damaged: {address.rstrip('/')}/x"


@pytest.mark.parametrize("value", ["/cache/staged/1/weights", Path("/cache/staged/1/weights")])
def test_the_value_of_an_error_is_an_address_too(value: str | Path) -> None:
    problem, fix = "^gs://bucket/weights is missing$", "^write gs://bucket/weights$"
    expected = raises(ModelError, key="model.weights", value="gs://bucket/weights", problem=problem, fix=fix)
    with expected, show_addresses_in_errors({"/cache/staged/1": "gs://bucket"}):
        raise ModelError(f"{value} is missing", key="model.weights", value=value, fix=f"write {value}")
