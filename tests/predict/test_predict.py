"""Predictions of exports: tables, page, unreadable images, and parts that are used again. In this process."""

import csv
import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.cli.verbs import exit_code_of
from tests.exporting.subjects import NAMES, bundle_for, predictions_of, small_model, some_images
from tests.storage.emulator import BUCKET, running
from trainer import predict
from trainer.errors import DONE, UNREADABLE, WRONG_INPUT
from trainer.exporting.model_card import format_labels
from trainer.exporting.reference import write_reference
from trainer.exporting.saved_model import export_saved_model
from trainer.exporting.tflite import export_tflite
from trainer.names import decode_cell
from trainer.predict import command, parts
from trainer.predict.images import ImageFile, list_images
from trainer.predict.model import Model, open_export_model
from trainer.predict.parts import ImagePredictions, Parts, decode_part
from trainer.predict.results import (
    WIDTH,
    find_top_classes,
    format_summary,
    make_header,
    make_row,
    summarize,
    write_tables,
)
from trainer.storage.path import storage_path

CLASSES = ("daisy", "löwenzahn", "rose\\nred")


@pytest.fixture(scope="module", autouse=True)
def _tensorflow_as_it_is() -> Iterator[None]:
    """The set-up of a new process is not for this one, which has used TensorFlow; tests/e2e/test_predict.py has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "configure_reproducible_predictions", lambda *_args, **_named: None)
        yield


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export with a SavedModel and a LiteRT file of a network with random weights."""
    folder, model = tmp_path_factory.mktemp("export"), small_model()
    bundle = bundle_for(model)
    export_saved_model(bundle, folder / "saved_model" / "1")
    export_tflite(bundle, folder / "model.tflite", "float32")
    (folder / "labels.txt").write_text(format_labels(NAMES))
    write_reference(folder / "reference.json", dict(bundle.reference) | {"orientation": "exif"})
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 images and three files that are none, one of them in the middle of a batch."""
    folder = tmp_path_factory.mktemp("photos") / "all"
    folder.mkdir()
    for i, pixels in enumerate(some_images(70, seed=3)):
        Image.fromarray(pixels).save(folder / f"{i:02d}.png")
    (folder / "20 corrupt.jpg").write_bytes(b"\xff\xd8\xff<script>alert(1)</script>")
    (folder / "40 <script>alert('x')</script>.png".replace("/", "∕")).write_bytes(b"")
    (folder / "60 text.gif").write_text("=1+2")
    return folder


def read_rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "predictions.csv").open(encoding="utf-8", newline="")))


def run(*arguments: str) -> int:
    return exit_code_of(predict.main, *arguments)


@functools.cache
def expected() -> np.ndarray:
    """The probabilities of the photos; the tests do not change them."""
    return predictions_of(small_model(), some_images(70, seed=3))


@pytest.fixture(scope="module")
def done(export: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The predictions of the SavedModel, in parts of 32 images."""
    folder = tmp_path_factory.mktemp("done") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "PART_IMAGES", 32)
        assert run(f"export={export}", f"images={photos}", f"output={folder}") == UNREADABLE
    return folder


def test_the_table_has_a_row_per_image(done: Path, photos: Path) -> None:
    rows, wanted = read_rows(done), expected()
    assert len(rows) == 73
    assert list(rows[0]) == make_header(CLASSES, 3)
    readable = [row for row in rows if not row["error"]]
    unreadable = [row for row in rows if row["error"]]
    assert [decode_cell(row["file"]) for row in readable] == [f"{photos}/{i:02d}.png" for i in range(70)]
    corrupt, empty, unknown = (row["error"] for row in unreadable)
    assert (corrupt, empty) == ("Invalid JPEG data, size 28", "is empty")
    assert unknown.startswith("Unknown image file format")
    assert {
        row["prediction"] + row["confidence"] + row["distance"] + row["probability_daisy"] for row in unreadable
    } == {""}
    for row, probabilities in zip(readable, wanted, strict=True):
        written = [float(row[f"probability_{name}"]) for name in CLASSES]
        np.testing.assert_allclose(written, probabilities, atol=2e-6)
        assert row["prediction"] == CLASSES[int(probabilities.argmax())]
        assert float(row["confidence"]) == max(written)
        assert float(row["confidence_2"]) >= float(row["confidence_3"])
    matrix = np.load(done / "probabilities.npy", allow_pickle=False)
    assert matrix.dtype == np.float32
    assert np.isnan(matrix).all(axis=1).tolist() == [bool(row["error"]) for row in rows]
    np.testing.assert_allclose(matrix[~np.isnan(matrix[:, 0])], wanted, atol=2e-6)
    assert all(float(row["distance"]) >= 0 for row in readable)


def test_the_page_shows_images_and_escapes_names(done: Path) -> None:
    page = (done / "index.html").read_text(encoding="utf-8")
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert" in page
    assert page.count("<figure") > 20
    assert "Farthest from training" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    summary = json.loads((done / "predictions.json").read_text())
    assert (summary["images"], summary["predicted"], summary["unreadable"]) == (73, 70, 3)
    assert sum(row["count"] for row in summary["classes"]) == 70
    assert summary["distance_rms"] > 0
    assert sorted(path.name for path in done.iterdir()) == [
        "index.html",
        "predictions.csv",
        "predictions.json",
        "probabilities.npy",
    ]


def test_parts_are_used_again_and_corrupt_ones_are_not(done: Path, export: Path, photos: Path, tmp_path: Path,
                                                       monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    monkeypatch.setattr(parts, "PART_IMAGES", 32)
    arguments = (f"export={export}", f"images={photos}", f"output={tmp_path / 'out'}")
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_tables", lambda *_: exit(75))  # ends after the last part
        assert run(*arguments) == 75
    (folder,) = (tmp_path / "out").iterdir()
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["000000.npz", "000001.npz", "000002.npz"]
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[2].unlink()
    capsys.readouterr()
    assert run(*arguments) == UNREADABLE
    assert "resuming after 32 of 73 images" in capsys.readouterr().out
    for name in ("predictions.csv", "probabilities.npy"):
        assert (tmp_path / "out" / name).read_bytes() == (done / name).read_bytes()
    assert not folder.exists()


@pytest.fixture(scope="module")
def everything(export: Path, photos: Path) -> ImagePredictions:
    """The predictions of the LiteRT file for all images."""
    return open_predictions(export / "model.tflite", str(photos))


def test_a_prediction_does_not_depend_on_the_other_images(
    export: Path, photos: Path, everything: ImagePredictions, tmp_path: Path
) -> None:
    names = ["05.png", "69.png", "31.png"]
    (tmp_path / "list.csv").write_text("file\n" + "".join(f"{photos}/{name}\n" for name in names))
    some = open_predictions(export / "model.tflite", str(tmp_path / "list.csv"))
    images = [Path(image.name).name for image in list_images(str(photos))]
    rows = [images.index(name) for name in names]
    assert some.probabilities.tobytes() == everything.probabilities[rows].tobytes()


def open_predictions(file: Path, address: str, flip: bool = False) -> ImagePredictions:
    model = open_export_model(str(file), "export", Path("/nowhere"), flip, print)
    return parts.predict_images(model, list_images(address), flip)


def test_a_litert_file_predicts_the_same_and_has_no_distance(
    export: Path, photos: Path, done: Path, everything: ImagePredictions, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out = tmp_path / "lite"
    assert run(f"run={export / 'model.tflite'}", f"images={photos}/0*.png", f"output={out}", "top=1") == DONE
    written = capsys.readouterr().out
    assert "distance: none; a Keras, ONNX or LiteRT file has no embedding" in written
    assert all(len(line) <= WIDTH for line in written.splitlines() if "/" not in line)
    rows = read_rows(out)
    assert list(rows[0])[:5] == ["file", "prediction", "confidence", "distance", "error"]
    assert {row["distance"] for row in rows} == {""}
    np.testing.assert_allclose(np.load(out / "probabilities.npy"), expected()[:10], atol=1e-5)
    reasons = [error for error in everything.errors if error]
    assert reasons == [row["error"] for row in read_rows(done) if row["error"]]
    assert "No distance from the training distribution" in (out / "index.html").read_text()


def test_export_images_and_output_in_a_bucket(
    export: Path, photos: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "PART_IMAGES", 32)
    monkeypatch.setenv("KUBETUNE_CACHE", str(tmp_path / "cache"))
    with running(tmp_path / "buckets"):
        there = storage_path(f"gs://{BUCKET}/work")
        for file in (path for path in export.rglob("*") if path.is_file()):
            (there / f"export/{file.relative_to(export).as_posix()}").upload(file)
        for file in photos.iterdir():
            (there / f"photos/{file.name}").upload(file)
        (there / "photos/notes.txt").write("no image")
        arguments = (f"export={there}/export", f"output={there}/out")
        assert run(*arguments, f"images={there}/photos") == UNREADABLE
        table = (there / "out/predictions.csv").read().decode().replace(f"{there}/photos/", f"{photos}/")
        reference = (done / "predictions.csv").read_text(encoding="utf-8")
        assert table == reference
        assert (there / "out/probabilities.npy").read() == (done / "probabilities.npy").read_bytes()
        names = {str(info.path).removeprefix(f"{there}/out/") for info in (there / "out").list()}
        assert names == {path.name for path in done.iterdir()}
        (there / "photos/list.csv").write("file\n05.png\ngone.png\n../x.png\n/etc/passwd\n")
        assert run(*arguments, f"images={there}/photos/list.csv") == UNREADABLE
        rows = list(csv.DictReader((there / "out/predictions.csv").read().decode().splitlines()))
        assert [row["error"] for row in rows] == [
            "", "there is no such object", "a component of it is . or ..", "it begins with a slash",
        ]  # fmt: skip


@pytest.mark.parametrize("kind", ["saved_model/1", "model.tflite"])
def test_mirror_images_are_averaged(kind: str, export: Path, photos: Path) -> None:
    images = some_images(70, seed=3)[:10]
    model = small_model()
    expected = (predictions_of(model, images) + predictions_of(model, images[:, :, ::-1])) / 2
    predicted = open_predictions(export / kind, f"{photos}/0*.png", flip=True)
    np.testing.assert_allclose(predicted.probabilities, expected, atol=1e-5)
    assert np.abs(expected - predictions_of(model, images)).max() > 1e-3


def test_json_lines_and_nothing_else_on_stdout(
    export: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(f"export={export}", f"images={photos}/2*", f"output={tmp_path}", "tta=flip", "--json")
    captured = capsys.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert (code, len(lines)) == (UNREADABLE, 12)
    assert lines[0]["file"].endswith("20 corrupt.jpg")
    assert set(lines[0]) == {"file", "error"}
    assert lines[1]["prediction"] == lines[1]["top"][0]["class"]
    assert lines[-1]["summary"]["unreadable"] == 1
    assert "no data" in lines[-1]["summary"]["tta"]["problem"]
    assert captured.err.startswith("unreadable: images=")


def test_none_readable(export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "1.png").write_text("no image")
    (tmp_path / "2.png").write_text("=cmd")
    assert run(f"export={export}", f"images={tmp_path}", f"output={tmp_path / 'out'}") == WRONG_INPUT
    assert "none of the 2 images can be read, the first" in capsys.readouterr().err
    assert all(row["error"] for row in read_rows(tmp_path / "out"))
    assert (tmp_path / "out" / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("images=x",), "run: is required, unless there is export"),
        (("run=a", "export=b", "images=x"), "export: cannot be used with run"),
        (("export=e",), "images: is required"),
        (("export=e", "images=x", "checkpoint=last"), "checkpoint=last: belongs to a run"),
        (("export=e", "images=x", "tta=turn"), "tta=turn: is not a test-time augmentation"),
        (("export=e", "images=x", "top=0"), "top=0: is not a positive integer"),
        (("export=e", "images=abfss://b/x"), "images=abfss://b/x"),
        (("export=e", "images=nowhere"), "images=nowhere: matches no file"),
        (("export=e", "images=x", "--josn"), "--josn"),
        (("export=e", "images=x", "datta.root=y"), "datta.root: there is no such argument"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == WRONG_INPUT
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


# A file alone lacks both labels and reference: once is enough for the quick tests.
@pytest.mark.parametrize("what", ["nothing", "labels", pytest.param("reference", marks=pytest.mark.slow), "corrupt"])
def test_exports_that_are_incomplete(
    what: str, export: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "e"
    folder.mkdir()
    if what != "nothing":
        content = (export / "model.tflite").read_bytes()
        (folder / "model.tflite").write_bytes(b"junk" if what == "corrupt" else content)
    if what == "corrupt":
        (folder / "labels.txt").write_text("a\nb\nc\n")
    code = run(f"export={folder}", f"images={photos}/0*.png", f"output={tmp_path / 'out'}")
    captured = capsys.readouterr()
    if what in ("labels", "reference"):  # the class names are inside a LiteRT file
        assert code == DONE
        assert "no reference.json: images are turned upright and stretched" in captured.err
        assert read_rows(tmp_path / "out")[0]["prediction"] in CLASSES
    else:
        assert code == WRONG_INPUT
        assert captured.err.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "out").exists()


def test_hostile_cells() -> None:
    names = ('=HYPERLINK("x")', "a;=1", "b\nc")
    header = make_header(names, 1)
    assert header[-3:] == ['probability_=HYPERLINK("x")', "probability_a;'=1", "probability_b\\nc"]
    part = ImagePredictions(
        np.array([[0.5, 0.25, 0.25], [np.nan] * 3], np.float32), np.array([1.0, np.nan]), ("", "-bad")
    )
    row = make_row(ImageFile("=1+2.png", ""), names, part, 0, 1)
    assert row == ["'=1+2.png", '\'=HYPERLINK("x")', "0.500000", "1.0000", "", "0.500000", "0.250000", "0.250000"]
    assert make_row(ImageFile("@x.png", ""), names, part, 1, 1) == ["'@x.png", "", "", "", "'-bad", "", "", ""]
    assert find_top_classes(np.array([0.25, 0.5, 0.25], np.float32), 3) == [1, 0, 2]


def test_a_part_is_read_as_it_was_written_or_not_at_all(tmp_path: Path) -> None:
    part = ImagePredictions(
        np.eye(3, dtype=np.float32),
        np.array([0.1, np.nan, 2.0]),
        ("", "é\udcff".encode("ascii", "backslashreplace").decode(), ""),
    )
    stored = Parts(storage_path(str(tmp_path)), "0" * 16, 3, 3)
    stored.write(0, part)
    read = stored.read(0)
    assert read is not None
    assert (read.probabilities.tobytes(), read.distances.tobytes(), read.errors) == (
        part.probabilities.tobytes(),
        part.distances.tobytes(),
        part.errors,
    )
    content = part.encode()
    assert decode_part(content, 3, 4) is None
    assert decode_part(content, 2, 3) is None
    assert decode_part(content[:-20], 3, 3) is None
    assert decode_part(b"", 3, 3) is None


def test_the_summary_has_80_columns_for_any_names(tmp_path: Path) -> None:
    names = tuple(f"{i} " + "花のなまえ<b>" * 9 for i in range(30))
    images = [ImageFile(f"{'x' * 200}/{i}.png", "") for i in range(60)]
    probabilities = np.random.default_rng(1).dirichlet(np.ones(30) / 9, 60).astype(np.float32)
    probabilities[:9] = np.nan
    errors = ("broken " * 30,) * 9 + ("",) * 51
    overview = write_tables(tmp_path, images, names, [ImagePredictions(probabilities, np.full(60, np.nan), errors)], 2)
    summary = summarize(overview, names)
    measured = {"split": "test", "n": 10, "accuracy_without": 0.5, "accuracy_with": 0.6, "interval": [-0.1, 0.3],
                "difference": 0.1, "won": 1, "lost": 0, "p": 1.0, "outcome": "no significant difference"}  # fmt: skip
    lines = format_summary(summary | {"tta": measured, "no_distance": "because " * 20}, images, overview.errors)
    assert lines[0] == "60 images: 51 predicted, 9 could not be read"
    from rich.cells import cell_len

    assert max(map(cell_len, lines)) <= WIDTH
    assert sum("more" in line for line in lines) >= 1


def test_the_input_of_a_saved_model_is_known(export: Path) -> None:
    model: Model = open_export_model(str(export), "export", Path("/nowhere"), False, print)
    assert model.decode is not None
    assert model.class_names == CLASSES
    assert isinstance(model.decode(b"junk"), str)
