"""Every format is written, loaded by its own library and scored; one that lost too much accuracy is deleted."""

import contextlib
import errno
import importlib.util
import io
import os
import re
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import pytest
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

from tests.errors import raises
from tests.exporting.subjects import (
    SIZE,
    bundle_for,
    held_out,
    largest_difference,
    predictions_of,
    small_model,
    some_images,
)
from trainer.config.schema import ExportFormat
from trainer.errors import ConfigError, Interrupted, ModelError
from trainer.evaluation.paired import compare_paired
from trainer.exporting.bundle import ParityExamples, as_plain_float32
from trainer.exporting.formats import FORMATS, check_formats, export_formats, export_keras, raise_if_refused
from trainer.exporting.tflite import export_tflite
from trainer.exporting.verify import judge_accuracy_drop, load_export, score
from trainer.models.batch_norm import PaddingAwareBatchNormalization
from trainer.monitoring.log import suppress_litert_output

# Largest difference of a probability by the precision of the format; 1e-4 for others.
TOLERANCE = {"tflite_float16": 0.01, "tflite_dynamic": 0.05, "tflite_int8": 0.1}
ALL = tuple(ExportFormat.__args__)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    model, images = small_model(), some_images(100)
    home = tmp_path_factory.mktemp("run") / "export"
    sample = held_out(predictions_of(model, images), images)
    return home, export_formats(home, ALL, bundle_for(model), sample, 0.05, lambda: None)


def test_the_configuration_has_all_formats() -> None:
    assert set(ALL) == set(FORMATS)


@pytest.mark.parametrize("name", ALL)
def test_a_format_predicts_as_the_model(name: str, exported: tuple[Path, dict[str, Any]]) -> None:
    home, outcomes = exported
    facts, path = outcomes[name], home / outcomes[name]["path"]
    assert facts["largest_difference"] <= TOLERANCE.get(name, 1e-4)
    assert facts["accuracy"] >= 0.95  # the labels are the model's own predictions
    assert (facts["examples"], facts["trainer_accuracy"], facts["refused"]) == (100, 1.0, False)
    assert facts["timing"]["milliseconds_per_image"] > 0
    if path.is_file():
        assert facts["bytes"] == path.stat().st_size
    other_batch = largest_difference(path, predictions_of(small_model(), some_images(7)), some_images(7))
    assert other_batch <= TOLERANCE.get(name, 1e-4)
    assert {file.name for file in home.iterdir()} == {FORMATS[name][0].split("/")[0] for name in ALL}


def test_smaller_formats_are_smaller(tmp_path: Path) -> None:
    """The weights of the network dominate the size of its files."""
    images = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Dense(400, "relu")(keras.layers.Flatten()(images / 255))
    bundle = bundle_for(keras.Model(images, keras.layers.Dense(3, "softmax")(x)))
    sizes = {}
    for precision in ("float32", "float16", "dynamic", "int8"):
        export_tflite(bundle, tmp_path / f"{precision}.tflite", precision)  # type: ignore[arg-type]
        sizes[precision] = (tmp_path / f"{precision}.tflite").stat().st_size
    expected = {"float32": 1, "float16": 1 / 2, "dynamic": 1 / 4, "int8": 1 / 4}
    assert {name: size / sizes["float32"] for name, size in sizes.items()} == pytest.approx(expected, rel=0.05)


def test_int8_takes_pixels_as_bytes_and_returns_256_steps(exported: tuple[Path, dict[str, Any]]) -> None:
    interpreter = Interpreter(model_path=str(exported[0] / "model_int8.tflite"))
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert (source["dtype"], target["dtype"]) == (np.uint8, np.uint8)
    assert source["quantization"] == (1.0, 0)  # a pixel is its own value
    assert target["quantization"] == (1 / 256, 0)
    assert np.float32 not in {detail["dtype"] for detail in interpreter.get_tensor_details()}


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("tflite")])
def test_a_tflite_file_contains_the_class_names(name: str, exported: tuple[Path, dict[str, Any]]) -> None:
    content = (exported[0] / FORMATS[name][0]).read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("labels.txt").decode() == "daisy\nlöwenzahn\nrose\\nred\n"
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    (entry,) = [entry for entry in model.metadata if entry.name == b"TFLITE_METADATA"]
    metadata = bytes(model.buffers[entry.buffer].data)
    assert metadata[4:8] == b"M001"
    assert b"labels.txt" in metadata
    details = Interpreter(model_content=content).get_input_details()[0]
    assert details["shape_signature"].tolist() == [-1, SIZE, SIZE, 3]


def test_an_onnx_file_contains_the_class_names(exported: tuple[Path, dict[str, Any]]) -> None:
    model = onnx.load(exported[0] / "model.onnx")
    onnx.checker.check_model(model)
    assert {p.key: p.value for p in model.metadata_props}["labels"] == "daisy\nlöwenzahn\nrose\\nred\n"


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", ["keras", "tflite", "onnx"])
def test_a_model_of_half_precision_is_written_in_float32(name: str, precision: str, tmp_path: Path) -> None:
    model, images = small_model(precision), some_images(40)
    path = tmp_path / FORMATS[name][0]
    FORMATS[name][1](bundle_for(model), path)
    assert largest_difference(path, predictions_of(model, images), images) < 0.05
    full = small_model()
    full.set_weights(model.get_weights())
    assert largest_difference(path, predictions_of(full, images), images) <= 1e-5
    (inner,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    assert inner.layers[1].compute_dtype == precision.removeprefix("mixed_")  # only the file is in float32


@pytest.mark.slow
def test_a_keras_file_needs_nothing_of_this_package(tmp_path: Path) -> None:
    """It loads in a process without this package, from a model with this package's BatchNormalization."""
    model, images = small_model(), some_images(4)
    (inner,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    norm = next(layer for layer in inner.layers if isinstance(layer, keras.layers.BatchNormalization))
    norm.__class__ = PaddingAwareBatchNormalization
    export_keras(bundle_for(model), tmp_path / "model.keras")
    assert type(norm) is PaddingAwareBatchNormalization
    np.save(tmp_path / "images.npy", images.astype("float32"))
    program = """
        import sys, keras, numpy as np
        model = keras.saving.load_model(sys.argv[1] + "/model.keras", safe_mode=True)
        np.save(sys.argv[1] + "/predictions.npy", model.predict(np.load(sys.argv[1] + "/images.npy"), verbose=0))
        assert not any(name.split(".")[0] == "trainer" for name in sys.modules)
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "predictions.npy"), predictions_of(model, images), atol=1e-6)


def test_the_precision_is_restored_after_an_error() -> None:
    model = small_model("mixed_bfloat16")
    before = [layer.dtype_policy.name for layer in model.layers]
    with pytest.raises(KeyError), as_plain_float32(model):
        raise KeyError
    assert [layer.dtype_policy.name for layer in model.layers] == before


def test_only_routine_lines_are_suppressed(capfd: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(ValueError), suppress_litert_output():
        os.write(2, b"fully_quantize: 0, inference_type: 6\nERROR: the model is empty\n")
        os.write(2, b"INFO: Created TensorFlow Lite XNNPACK delegate for CPU.\n")
        raise ValueError
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "ERROR: the model is empty\nafter\n"


# ---- lost accuracy ----


def classify_as(labels: np.ndarray) -> Any:
    """Return a classifier that predicts `labels` of the images numbered in their first pixel, and ignores the rest."""
    return lambda images: np.eye(2, dtype=np.float32)[labels[images[:, 0, 0, 0]]]


def score_of(lost: int, gained: int, examples: int) -> dict[str, Any]:
    """Score an export that predicts `lost` of the examples worse and `gained` better than the trainer."""
    labels, trainer, export = (np.zeros(examples, int) for _ in range(3))
    export[:lost], trainer[lost : lost + gained] = 1, 1
    images = np.zeros((examples, 1, 1, 3), np.uint16)
    images[..., 0] = np.arange(examples)[:, None, None]
    expected = np.eye(2, dtype=np.float32)[trainer]
    return score(classify_as(export), ParityExamples(images, labels, expected, expected))


@pytest.mark.parametrize(
    ("lost", "gained", "examples", "refused", "text"),
    [
        (0, 0, 100, False, ""),
        (2, 0, 60, False, "not significant"),  # 3 %
        (3, 0, 120, False, "not significant"),  # 2.5 %
        (5, 0, 5, False, "not significant"),  # every one of too few
        (6, 0, 60, True, "and significant"),
        (9, 6, 60, False, "not significant"),  # 5 % net
        (10, 0, 1000, False, ""),  # exactly the limit
        (11, 0, 1000, True, "and significant"),
        (40, 25, 1000, False, "not significant"),
        (45, 25, 1000, True, "and significant"),
        (0, 30, 60, False, ""),  # better
    ],
)
def test_a_drop_exceeds_the_limit_and_chance(lost: int, gained: int, examples: int, refused: bool, text: str) -> None:
    scores = score_of(lost, gained, examples)
    outcomes = np.zeros((2, examples), bool)
    outcomes[0, lost + gained :], outcomes[1, lost + gained :], outcomes[0, :lost] = True, True, True
    outcomes[1, lost : lost + gained] = True
    assert scores["p"] == compare_paired(*outcomes).p  # the test of trainer.compare
    too_large, reason = judge_accuracy_drop(scores, 0.01)
    assert (too_large, bool(reason)) == (refused, bool(text))
    assert text in reason


def test_probabilities_that_are_not_finite_are_a_drop() -> None:
    scores = score_of(0, 0, 10) | {"largest_difference": float("inf")}
    assert judge_accuracy_drop(scores, 1.0) == (True, "has probabilities that are not finite")


def far_from_zero() -> keras.Model:
    """Return a model with logits around 5,000, which 8 bits cannot resolve."""
    model = small_model()
    (dense,) = (layer for layer in model.layers if isinstance(layer, keras.layers.Dense))
    dense.bias.assign(dense.bias + 5000.0)
    return model


def test_a_file_that_lost_its_accuracy_is_deleted_and_an_error(tmp_path: Path) -> None:
    model, images = far_from_zero(), some_images(100)
    sample = held_out(predictions_of(model, images), images)
    outcomes = export_formats(tmp_path, ("tflite_int8", "tflite"), bundle_for(model), sample, 0.01, lambda: None)
    assert outcomes["tflite_int8"]["refused"]
    assert not outcomes["tflite"]["refused"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.tflite"]
    lost = r"is exceeded by tflite_int8 \(1\.0000 -> 0\.\d{4} on 100 examples\)"
    problem = f"{lost}, which was deleted; the other formats were written$"
    with raises(ModelError, "export.max_accuracy_drop", "0.01", "raise the limit or .* in export.formats", problem):
        raise_if_refused(outcomes, 0.01)
    with raises(ModelError, "export.max_accuracy_drop", problem=f"{lost}, which was deleted$"):
        raise_if_refused({"tflite_int8": outcomes["tflite_int8"]}, 0.01)
    both = {"tflite_int8": outcomes["tflite_int8"], "keras": outcomes["tflite_int8"]}
    with raises(ModelError, "export.max_accuracy_drop", problem=r"by tflite_int8 .*, keras .*, which were deleted$"):
        raise_if_refused(both, 0.01)
    raise_if_refused({"tflite": outcomes["tflite"]}, 0.01)


def test_a_drop_on_few_examples_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run in bfloat16, of whose 120 test photos an export predicts 3 worse, does not end with 2, which fails a Job."""
    model, images = small_model("mixed_bfloat16"), some_images(120)
    probabilities = predictions_of(model, images)
    labels = probabilities.argmax(-1)
    other = probabilities.copy()
    other[:3] = np.roll(other[:3], 1, axis=1)
    labels[:3] = other[:3].argmax(-1)
    sample = ParityExamples(images, labels, other, probabilities)  # 3 lost in the precision of the run, 0 in float32
    outcomes = export_formats(tmp_path, ("saved_model", "keras"), bundle_for(model), sample, 0.01, lambda: None)
    assert [(o["lost"], o["gained"], o["refused"]) for o in outcomes.values()] == [(3, 0, False), (0, 0, False)]
    assert (tmp_path / "saved_model" / "1").is_dir()
    raise_if_refused(outcomes, 0.01)
    drop = "warning: saved_model/1 predicts 3 examples worse and 0 better than the trainer, of 120"
    chance = "above the limit of 0.01, but not significant (McNemar's p = 0.25)"
    assert capsys.readouterr().err == f"{drop}: {chance}\n"


def test_a_deleted_saved_model_leaves_no_folder_for_a_model_server(tmp_path: Path) -> None:
    model, images = small_model(), some_images(60)
    others = held_out(predictions_of(model, images)[::-1], images)  # those of other images
    outcomes = export_formats(tmp_path, ("saved_model",), bundle_for(model), others, 0.01, lambda: None)
    assert outcomes["saved_model"]["refused"]
    assert list(tmp_path.iterdir()) == []


# ---- mistakes ----


@pytest.mark.parametrize("file", ["model.keras", "model.tflite", "model.onnx", "saved_model/1"])
def test_a_damaged_or_missing_file_is_an_error(
    file: str, exported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    source, path = exported[0] / file, tmp_path / file
    if source.is_dir():
        path.mkdir(parents=True)
        (path / "saved_model.pb").write_bytes(b"\xff" * 100)
    else:
        path.write_bytes(source.read_bytes()[:100])
    for wrong in (path, tmp_path / "nowhere" / file):
        with raises(ModelError, problem=rf"^{re.escape(str(wrong))} cannot be loaded: .+$", fix="export it again"):
            load_export(wrong)


def test_a_full_disk_is_no_damaged_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(_: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("trainer.exporting.verify._load_keras", load)
    with raises(Interrupted, problem=r"cannot be written to \(No space", fix="make space"):
        load_export(tmp_path / "model.keras")


def test_a_missing_onnxruntime_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    problem = "model.onnx cannot be loaded: .*onnxruntime"
    with raises(ModelError, problem=problem, fix=r"pip install 'kubetune\[onnx\]'"):
        load_export(tmp_path / "model.onnx")


def test_a_backbone_that_tf2onnx_cannot_convert_is_refused() -> None:
    with raises(ConfigError, "export.formats", "onnx", "leave onnx out", "cannot convert ConvNeXtTiny"):
        check_formats(["saved_model", "onnx"], "ConvNeXtTiny")
    check_formats(["saved_model", "keras", "tflite"], "ConvNeXtTiny")


def test_an_extra_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tf2onnx" else find_spec(name))
    with raises(ConfigError, "export.formats", "onnx", r"pip install 'kubetune\[onnx\]'", "not installed: tf2onnx$"):
        check_formats(["tflite", "onnx"], "MobileNetV2")
    check_formats(["tflite"], "MobileNetV2")
