"""data=csv with the CSV file, its files, or both in a bucket; data.corrections in a bucket."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.images import encode_noise, fill_folder
from tests.data.test_open import count_classes
from tests.errors import raises
from tests.storage.emulator import BUCKET, running
from trainer.config.schema import RunConfig, validate_resolved_config
from trainer.data.images import ImageStore
from trainer.data.open import OpenedData, stage_and_open_run_dataset
from trainer.data.prepare import prepare
from trainer.data.records import read_source_names
from trainer.errors import DataError
from trainer.planning.dry_run import _open_data
from trainer.planning.sections import Plan
from trainer.storage.path import storage_path

HOME = f"gs://{BUCKET}/data"


@pytest.fixture(autouse=True, scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("bucket")
    root = fill_folder(folder / "photos", {"cat": 4, "dog": 4})
    with running(folder / "objects"):
        for file in root.rglob("*.jpg"):
            (storage_path(HOME) / str(file.relative_to(folder))).upload(file)
        yield


def make_config(tmp_path: Path, root: str, **data: Any) -> RunConfig:
    return validate_resolved_config({
        "data": {"source": "csv", "root": root, "validation_fraction": 0, **data},
        "model": {"backbone": "MobileNetV2"}, "phases": {"head": {"thaw": "none", "epochs": 1}},
        "runtime": {"cache_dir": str(tmp_path / "cache"), "progress": "lines"},
    })  # fmt: skip


def open_data(config: RunConfig, lines: list[str] | None = None) -> OpenedData:
    return stage_and_open_run_dataset(config, (lines if lines is not None else []).append, lambda _: None)


def list_names(config: RunConfig, data: OpenedData) -> list[str]:
    images = ImageStore(data, config, 10, lambda _: None)
    everything = np.arange(data.dataset.splits["train"].count)
    assert images.read_images("train", everything).std() > 10
    return sorted(images.name_of("train", i) for i in everything)


def test_a_list_in_a_bucket_names_files_relative_to_it(tmp_path: Path) -> None:
    rows = ["cat/00.jpg,cat", "./cat/01.jpg,cat", "../photos/dog/00.jpg,dog", f"{HOME}/photos/dog/01.jpg,dog"]
    (storage_path(HOME) / "photos" / "labels.csv").write("\n".join(["file,label", *rows]))
    config = make_config(tmp_path, f"{HOME}/photos/labels.csv")
    lines: list[str] = []
    data = open_data(config, lines)
    assert count_classes(data.dataset) == {"train": 4}
    shown = [f"{HOME}/photos/{name}" for name in ("../photos/dog/00.jpg", "./cat/01.jpg", "cat/00.jpg", "dog/01.jpg")]
    assert list_names(config, data) == shown
    assert any("fetching 5 files" in line for line in lines)  # with the list, but without the other photos
    again: list[str] = []
    open_data(config, again)
    assert any("all files are already in" in line for line in again)


def test_a_local_list_names_files_in_a_bucket(tmp_path: Path) -> None:
    rows = [f"{HOME}/photos/{c}/{i:02d}.jpg;{c}" for c in ("cat", "dog") for i in range(4)]
    (tmp_path / "labels.csv").write_text("\n".join(["file;label", *rows]))
    config = make_config(tmp_path, str(tmp_path / "labels.csv"))
    assert list_names(config, open_data(config)) == [row.partition(";")[0] for row in rows]


def test_objects_that_are_missing_are_named_with_their_row(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"file,label\n{HOME}/photos/cat/00.jpg,cat\n{HOME}/photos/gone.jpg,dog\n")
    problem = rf"{HOME}/photos/gone.jpg \(row 3\): cannot be read \(No such file"
    with raises(DataError, fix="data.on_error=skip", problem=problem):
        open_data(make_config(tmp_path, str(tmp_path / "labels.csv")))
    gone = storage_path(HOME) / "photos" / "gone.jpg"
    gone.upload(tmp_path / "labels.csv")
    with raises(DataError, problem="gone.jpg .row 3.: does not begin like"):
        open_data(make_config(tmp_path, str(tmp_path / "labels.csv")))
    gone.delete()
    with raises(DataError, fix="data.on_error=skip", problem=problem):  # its copy is deleted as well
        open_data(make_config(tmp_path, str(tmp_path / "labels.csv")))


def test_errors_of_a_list_in_a_bucket_name_its_address(tmp_path: Path) -> None:
    address = f"{HOME}/bad.csv"
    for content, problem in (
        ("file,label\na.jpg,\n", "row 2 has no label: a.jpg"),
        ("file,label\n../../a.jpg,cat\n", f"row 2 names gs://{BUCKET}/../a.jpg, which cannot be a file"),
        ("file\n", "has no column label"),
    ):
        storage_path(address).write(content)
        with raises(DataError, "data.root", address, problem=problem):
            open_data(make_config(tmp_path, address))
    with raises(DataError, "data.root", f"{HOME}/none.csv", problem="does not exist"):
        open_data(make_config(tmp_path, f"{HOME}/none.csv"))
    storage_path(address).write(f"file,label\n{HOME}/photos/cat/00.jpg,cat\n")
    config = make_config(tmp_path, address)
    small = config.model_copy(update={"runtime": config.runtime.model_copy(update={"disk_budget_gb": 1e-9})})
    with raises(DataError, "runtime.disk_budget_gb", problem=f"{address} of .* does not fit"):
        open_data(small)


def test_a_plan_lists_the_files_and_fetches_none(tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text(f"file,label\n{HOME}/photos/cat/00.jpg,cat\n{HOME}/photos/dog/00.jpg,dog\n")
    (storage_path(HOME) / "corrections.csv").write("file,action,class\ndog/00.jpg,exclude,\ncat/00.jpg,relabel,dog\n")
    config = make_config(tmp_path, str(tmp_path / "labels.csv"), corrections=f"{HOME}/corrections.csv")
    plan = Plan(config, cluster=None)  # type: ignore[arg-type]
    rows = dict(_open_data(plan))
    assert rows["bucket"].startswith(f"gs://{BUCKET}: would fetch 2 files, ")
    assert (
        rows["corrections"]
        == f"{HOME}/corrections.csv lists: 1 excluded, 1 relabelled; applied once the data is staged"
    )
    assert not (tmp_path / "cache" / "staged").exists()
    plain = make_config(tmp_path, str(tmp_path / "labels.csv"))
    open_data(plain)
    plan = Plan(plain, cluster=None)  # type: ignore[arg-type]
    _open_data(plan)
    assert plan.dataset
    assert count_classes(plan.dataset) == {"train": 2}


def test_corrections_in_a_bucket_name_its_objects(tmp_path: Path) -> None:
    address = f"{HOME}/corrections.csv"
    rows = [f"{HOME}/photos/cat/01.jpg,relabel,dog", f"{HOME}/photos/dog/03.jpg,exclude,"]
    storage_path(address).write("\n".join(["file,action,class", *rows]))
    config = make_config(tmp_path, f"{HOME}/photos", source="image_folder", corrections=address)
    data = open_data(config)
    assert count_classes(data.dataset) == {"train": 7}
    assert f"corrections: 1 excluded, 1 relabelled ({address})" in data.dataset.notes


def test_prepared_records_name_the_objects(tmp_path: Path) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "a.jpg").write_bytes(encode_noise(70))
    (tmp_path / "b.jpg").write_bytes(encode_noise(71))
    rows = ["a.jpg,cat", "../b.jpg,dog", f"{HOME}/photos/cat/00.jpg,cat"]
    (tmp_path / "lists" / "labels.csv").write_text("\n".join(["file,label", *rows]))
    prepare(make_config(tmp_path, str(tmp_path / "lists" / "labels.csv")), str(tmp_path / "out"))
    config = make_config(tmp_path, str(tmp_path / "out"), source="tfds")
    stored = sorted(read_source_names(open_data(config).dataset.splits["train"]))
    assert stored == [f"{tmp_path}/b.jpg", "a.jpg", f"{HOME}/photos/cat/00.jpg"]
