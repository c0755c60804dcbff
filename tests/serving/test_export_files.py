"""Which SavedModel an address means; what the SavedModel holds does not matter here."""

import json
from pathlib import Path

import pytest

from tests.storage.emulator import BUCKET, running
from trainer.errors import DataError
from trainer.serving.export_files import find_export
from trainer.storage.path import storage_path


def saved_model(folder: Path, labels: str = "cat\ndog\n") -> Path:
    (folder / "assets").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"")
    (folder / "assets" / "labels.txt").write_text(labels)
    return folder


def found(address: Path | str, cache: Path) -> tuple[Path, str, tuple[str, ...]]:
    export = find_export(str(address), cache, lambda _text: None)
    assert export.reference is None
    return export.folder, export.version, export.classes


def test_a_run_its_export_its_versions_and_one_of_them_are_the_same(tmp_path: Path) -> None:
    base = tmp_path / "run" / "export" / "saved_model"
    saved_model(base / "2")
    newest = saved_model(base / "10")
    (base / "11").mkdir()  # nothing in it
    saved_model(base / ".12-x")  # being written
    for address in (tmp_path / "run", tmp_path / "run" / "export", base, newest, f"{base}/"):
        assert found(address, tmp_path) == (newest, "10", ("cat", "dog"))
    assert found(base / "2", tmp_path) == (base / "2", "2", ("cat", "dog"))
    assert found(saved_model(tmp_path / "mine"), tmp_path)[1] == "1"


def test_what_is_no_export_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "x").touch()
    (tmp_path / "model.keras").touch()
    strange = saved_model(tmp_path / "strange")
    (strange / "assets" / "labels.txt").unlink()
    cases = {
        "gone": f"model=gone does not exist (seen from {tmp_path})",
        "run": "model=run is a run without a SavedModel (nothing in run/export/saved_model)",
        "empty": "model=empty holds no SavedModel",
        "model.keras": "model=model.keras is a file; serving takes the folder of a SavedModel, which holds no Python",
        "strange": "model=strange: strange has no assets/labels.txt, so kubetune did not export it",
    }
    for address, message in cases.items():
        with pytest.raises(DataError) as caught:
            find_export(address, tmp_path, lambda _text: None)
        assert str(caught.value).startswith(message)


def test_a_reference_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "1")
    file = folder / "assets" / "reference.json"
    right = {"n": 3, "class_frequencies": [0.5, 0.5], "confidence_histogram": {"counts": [0] * 20}}
    file.write_text(json.dumps(right))
    assert find_export(str(folder), tmp_path, lambda _text: None).reference == right
    for content in ({}, [], right | {"class_frequencies": [1]}, right | {"n": 0}, right | {"confidence_histogram": 1}):
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match="is damaged or of another model"):
            find_export(str(folder), tmp_path, lambda _text: None)


def test_an_export_in_a_bucket_is_fetched(tmp_path: Path) -> None:
    with running(tmp_path / "buckets"):
        run = f"gs://{BUCKET}/runs/1"
        for name, content in (("saved_model.pb", "graph"), ("assets/labels.txt", "cat\ndog\n")):
            (storage_path(run) / f"export/saved_model/3/{name}").write(content)
        folder, version, classes = found(run, tmp_path / "cache")
        assert (version, classes) == ("3", ("cat", "dog"))
        assert (folder / "saved_model.pb").read_text() == "graph"
        assert folder.is_relative_to(tmp_path / "cache")
        with pytest.raises(DataError, match="model=gs://bucket/none does not exist; give"):
            found(f"gs://{BUCKET}/none", tmp_path / "cache")
