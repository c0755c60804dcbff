"""The SavedModel at an address."""

import json
from pathlib import Path

import pytest

from tests.errors import raises
from tests.storage.emulator import BUCKET, running
from trainer.errors import DataError
from trainer.serving.export_files import Export, find_export
from trainer.storage.path import storage_path


def saved_model(folder: Path, labels: str = "cat\ndog\n") -> Path:
    (folder / "assets").mkdir(parents=True)
    (folder / "saved_model.pb").write_bytes(b"")
    (folder / "assets" / "labels.txt").write_text(labels)
    return folder


def find(address: Path | str, cache: Path) -> Export:
    return find_export(str(address), cache, lambda _text: None)


def test_a_run_its_export_its_versions_and_one_of_them_are_the_same(tmp_path: Path) -> None:
    base = tmp_path / "run" / "export" / "saved_model"
    saved_model(base / "2")
    newest = saved_model(base / "10")
    (base / "11").mkdir()  # empty
    saved_model(base / ".12-x")  # being written
    for address in (tmp_path / "run", tmp_path / "run" / "export", base, newest, f"{base}/"):
        assert find(address, tmp_path) == Export(str(address), newest, "10", ("cat", "dog"), None)
    assert find(base / "2", tmp_path).version == "2"
    assert find(saved_model(tmp_path / "mine"), tmp_path).version == "1"


@pytest.mark.parametrize(
    ("address", "problem", "fix"),
    [
        ("gone", "does not exist in {cwd}$", "output_dir of a run"),
        ("run", "a run without export/saved_model", "saved_model in export.formats"),
        ("empty", "no saved_model.pb", "output_dir of a run"),
        ("model.keras", "is a file", "folder of a SavedModel"),
        ("foreign", "foreign has no assets/labels.txt", "export it with kubetune"),
    ],
)
def test_what_is_no_export_is_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str, problem: str, fix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in ("run/config.yaml", "empty/x", "model.keras", "foreign/saved_model.pb"):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    with raises(DataError, key="model", value=address, fix=fix, problem=problem.replace("{cwd}", str(tmp_path))):
        find(address, tmp_path)


def test_a_reference_of_another_model_is_an_error(tmp_path: Path) -> None:
    folder = saved_model(tmp_path / "1")
    file = folder / "assets" / "reference.json"
    valid = {"n": 3, "class_frequencies": [0.5, 0.5], "confidence_histogram": {"counts": [0] * 19 + [3]}}
    file.write_text(json.dumps(valid))
    assert find(folder, tmp_path).reference == valid
    for content in (
        {},
        [],
        valid | {"class_frequencies": [1]},
        valid | {"n": 0},
        valid | {"confidence_histogram": {"counts": [0] * 20}},
        valid | {"confidence_histogram": 1},
    ):
        file.write_text(json.dumps(content))
        with raises(DataError, key="model", value=str(folder), problem="reference.json is corrupt or of another model"):
            find(folder, tmp_path)


@pytest.mark.parametrize(
    ("asset", "content", "problem"),
    [
        ("labels.txt", b"caf\xe9\ndog\n", "labels.txt is not UTF-8 text \\(invalid continuation byte at byte 3\\)"),
        (
            "labels.txt",
            "cat\ndog\n".encode("utf-16"),
            "labels.txt is not UTF-8 text \\(invalid start byte at byte 0\\)",
        ),
        ("labels.txt", None, "labels.txt cannot be read \\(Is a directory\\)"),
        ("reference.json", b"\xff", "reference.json is corrupt or of another model"),
        ("reference.json", b"[" * 100_000, "reference.json is corrupt or of another model"),
        ("reference.json", None, "reference.json cannot be read"),
    ],
)
def test_a_damaged_asset_is_an_error(tmp_path: Path, asset: str, content: bytes | None, problem: str) -> None:
    folder = saved_model(tmp_path / "1")
    file = folder / "assets" / asset
    file.unlink(missing_ok=True)
    if content is None:
        file.mkdir()
    else:
        file.write_bytes(content)
    with raises(DataError, key="model", value=str(folder), fix="export it again", problem=problem):
        find(folder, tmp_path)


def test_labels_that_an_editor_has_given_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    assert find(saved_model(tmp_path / "1", "\ufeffcat\ndog\n"), tmp_path).classes == ("cat", "dog")


@pytest.mark.parametrize(
    "embedding",
    [[], 7, {}, {"mean": [1], "covariance": [[1, 2]]}, {"mean": ["x"], "covariance": [[1]]},
     {"mean": [float("nan")], "covariance": [[1]]}, {"mean": [1], "covariance": [[1]], "projection": [[1, 2]]}],
)  # fmt: skip
def test_a_reference_whose_embedding_is_damaged_is_an_error(tmp_path: Path, embedding: object) -> None:
    folder = saved_model(tmp_path / "1")
    valid = {"n": 3, "class_frequencies": [0.5, 0.5], "confidence_histogram": {"counts": [0] * 19 + [3]}}
    (folder / "assets" / "reference.json").write_text(json.dumps(valid | {"embedding": embedding}))
    with raises(DataError, key="model", value=str(folder), problem="reference.json is corrupt or of another model"):
        find(folder, tmp_path)


def test_an_export_in_a_bucket_is_copied(tmp_path: Path) -> None:
    with running(tmp_path / "buckets"):
        run = f"gs://{BUCKET}/runs/1"
        for name, content in (("saved_model.pb", "graph"), ("assets/labels.txt", "cat\ndog\n")):
            (storage_path(run) / f"export/saved_model/3/{name}").write(content)
        export = find(run, tmp_path / "cache")
        assert (export.version, export.classes) == ("3", ("cat", "dog"))
        assert (export.folder / "saved_model.pb").read_text() == "graph"
        assert export.folder.is_relative_to(tmp_path / "cache")
        missing = f"gs://{BUCKET}/none"
        with raises(DataError, key="model", value=missing, problem="^does not exist$"):
            find(missing, tmp_path / "cache")
