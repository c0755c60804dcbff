"""Every format is written, loaded back by the library it is for, and scored; what is too far off is not kept."""

import io
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

from tests.exporting.subjects import (
    SIZE,
    held_out,
    largest_difference,
    said_by,
    small_model,
    some_images,
    subject_for,
)
from trainer.config import schema as config
from trainer.config.schema import ExportFormat
from trainer.errors import ConfigError, ModelError
from trainer.exporting.bundle import plain
from trainer.exporting.formats import FORMATS, check_formats, export_formats, export_keras, refuse
from trainer.exporting.tflite import export_tflite
from trainer.exporting.verify import drops_too_far, load_export
from trainer.models.batch_norm import ExampleNormalization

# How far a probability may be off: rounding alone, or what the format's precision costs.
NEAR = {"tflite_float16": 0.01, "tflite_dynamic": 0.05, "tflite_int8": 0.1}
ALL = tuple(ExportFormat.__args__)  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    model, images, asked = small_model(), some_images(100), []
    home = tmp_path_factory.mktemp("run") / "export"
    sample = held_out(said_by(model, images), images)
    return home, export_formats(home, ALL, subject_for(model), sample, 0.05, lambda: asked.append(1))


def test_the_configuration_names_the_formats_there_are() -> None:
    assert set(ALL) == set(FORMATS)


@pytest.mark.parametrize("name", ALL)
def test_a_format_answers_as_the_model_does(name: str, exported: tuple[Path, dict[str, Any]]) -> None:
    home, outcomes = exported
    facts = outcomes[name]
    path = home / facts["path"]
    assert facts["largest_difference"] <= NEAR.get(name, 1e-4)
    assert facts["accuracy"] >= 0.95  # the labels are what the model itself says
    assert (facts["examples"], facts["trainer_accuracy"], facts["refused"]) == (100, 1.0, False)
    assert facts["timing"]["milliseconds_per_image"] > 0
    if path.is_file():
        assert facts["bytes"] == path.stat().st_size
    again = largest_difference(path, said_by(small_model(), some_images(7)), some_images(7))
    assert again <= NEAR.get(name, 1e-4)


def test_nothing_is_left_beside(exported: tuple[Path, dict[str, Any]]) -> None:
    home, _ = exported
    assert {path.name for path in home.iterdir()} == {FORMATS[name][0].split("/")[0] for name in ALL}


def test_smaller_formats_are_smaller(tmp_path: Path) -> None:
    """Of a network whose weights outweigh everything else."""
    images = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Dense(400, "relu")(keras.layers.Flatten()(images / 255))
    subject = subject_for(keras.Model(images, keras.layers.Dense(3, "softmax")(x)))
    sizes = {}
    for precision in ("float32", "float16", "dynamic", "int8"):
        export_tflite(subject, tmp_path / f"{precision}.tflite", precision)  # type: ignore[arg-type]
        sizes[precision] = (tmp_path / f"{precision}.tflite").stat().st_size
    assert sizes["float16"] == pytest.approx(sizes["float32"] / 2, rel=0.05)
    assert sizes["dynamic"] == pytest.approx(sizes["float32"] / 4, rel=0.05)
    assert sizes["int8"] == pytest.approx(sizes["float32"] / 4, rel=0.05)


def test_int8_takes_bytes_of_pixels_and_answers_in_256_steps(exported: tuple[Path, dict[str, Any]]) -> None:
    interpreter = Interpreter(model_path=str(exported[0] / "model_int8.tflite"))
    (source,), (target,) = interpreter.get_input_details(), interpreter.get_output_details()
    assert (source["dtype"], target["dtype"]) == (np.uint8, np.uint8)
    assert source["quantization"] == (1.0, 0)  # a pixel is its own number
    assert target["quantization"] == (1 / 256, 0)
    kinds = {detail["dtype"] for detail in interpreter.get_tensor_details()}
    assert np.float32 not in kinds


@pytest.mark.parametrize("name", [n for n in ALL if n.startswith("tflite")])
def test_the_class_names_travel_inside_a_tflite_file(name: str, exported: tuple[Path, dict[str, Any]]) -> None:
    content = (exported[0] / FORMATS[name][0]).read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        assert archive.read("labels.txt").decode() == "daisy\nlöwenzahn\nrose red\n"
    model = schema.ModelT.InitFromPackedBuf(content, 0)
    (entry,) = [entry for entry in model.metadata if entry.name == b"TFLITE_METADATA"]
    described = bytes(model.buffers[entry.buffer].data)
    assert described[4:8] == b"M001"
    assert b"labels.txt" in described
    details = Interpreter(model_content=content).get_input_details()[0]
    assert details["shape_signature"].tolist() == [-1, SIZE, SIZE, 3]


def test_the_class_names_travel_inside_an_onnx_file(exported: tuple[Path, dict[str, Any]]) -> None:
    model = onnx.load(exported[0] / "model.onnx")
    onnx.checker.check_model(model)
    assert {p.key: p.value for p in model.metadata_props}["labels"] == "daisy\nlöwenzahn\nrose red\n"


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
@pytest.mark.parametrize("name", ["keras", "tflite", "onnx"])
def test_a_model_of_half_precision_is_written_in_float32(name: str, precision: str, tmp_path: Path) -> None:
    model, images = small_model(precision), some_images(40)
    path = tmp_path / FORMATS[name][0]
    FORMATS[name][1](subject_for(model), path)
    assert largest_difference(path, said_by(model, images), images) < 0.05
    full = small_model()
    full.set_weights(model.get_weights())
    assert largest_difference(path, said_by(full, images), images) <= 1e-5
    (inner,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    assert inner.layers[1].compute_dtype == precision.removeprefix("mixed_")  # only the file is in float32


@pytest.mark.slow
def test_a_keras_file_needs_nothing_of_this_package(tmp_path: Path) -> None:
    """In a process that cannot import it; the batch normalization is one that trained."""
    model, images = small_model(), some_images(4)
    (inner,) = (layer for layer in model.layers if isinstance(layer, keras.Model))
    norm = next(layer for layer in inner.layers if isinstance(layer, keras.layers.BatchNormalization))
    norm.__class__ = ExampleNormalization
    export_keras(subject_for(model), tmp_path / "model.keras")
    assert type(norm) is ExampleNormalization
    np.save(tmp_path / "images.npy", images.astype("float32"))
    program = """
        import sys, keras, numpy as np
        model = keras.saving.load_model(sys.argv[1] + "/model.keras", safe_mode=True)
        np.save(sys.argv[1] + "/answers.npy", model.predict(np.load(sys.argv[1] + "/images.npy"), verbose=0))
        assert not any(name.split(".")[0] == "trainer" for name in sys.modules)
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], check=True, cwd=tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "answers.npy"), said_by(model, images), atol=1e-6)


def test_what_was_plain_is_as_it_was_after_an_error() -> None:
    model = small_model("mixed_bfloat16")
    before = [layer.dtype_policy.name for layer in model.layers]
    with pytest.raises(KeyError), plain(model):
        raise KeyError
    assert [layer.dtype_policy.name for layer in model.layers] == before


# ---- accuracy that is lost ----


def a_score(lost: int, gained: int, examples: int, difference: float = 0.1) -> dict[str, Any]:
    return {"lost": lost, "gained": gained, "examples": examples, "largest_difference": difference}


@pytest.mark.parametrize(
    ("lost", "gained", "examples", "too_far"),
    [
        (0, 0, 100, False),
        (2, 0, 60, False),  # 3 %, but two flips are chance
        (6, 0, 60, True),
        (9, 6, 60, False),  # 5 % net, out of fifteen flips
        (10, 0, 1000, False),  # exactly the limit
        (11, 0, 1000, True),
        (40, 25, 1000, True),
        (0, 30, 60, False),  # better
    ],
)
def test_a_drop_counts_when_it_is_more_than_the_limit_and_more_than_chance(
    lost: int, gained: int, examples: int, too_far: bool
) -> None:
    assert drops_too_far(a_score(lost, gained, examples), 0.01) is too_far


def test_answers_that_are_no_numbers_are_too_far_off() -> None:
    assert drops_too_far(a_score(0, 0, 10, float("inf")), 1.0)


def far_from_zero() -> keras.Model:
    """The same answers from logits around 5,000: 256 steps from 0 to there cannot tell them apart."""
    model = small_model()
    (dense,) = (layer for layer in model.layers if isinstance(layer, keras.layers.Dense))
    dense.bias.assign(dense.bias + 5000.0)
    return model


def test_a_file_that_lost_its_accuracy_is_not_kept_and_said_in_one_sentence(tmp_path: Path) -> None:
    model, images = far_from_zero(), some_images(100)
    sample = held_out(said_by(model, images), images)
    outcomes = export_formats(tmp_path, ("tflite_int8", "tflite"), subject_for(model), sample, 0.01, lambda: None)
    assert outcomes["tflite_int8"]["refused"]
    assert not outcomes["tflite"]["refused"]
    assert [path.name for path in tmp_path.iterdir()] == ["model.tflite"]
    sentence = (
        r"^too much accuracy is lost in tflite_int8 \(1.0000 -> 0\.\d{4} on 100 examples\), more than "
        r"export.max_accuracy_drop=0.01: it was not kept; all else is written. Raise the limit or leave it out of "
        r"export.formats, and start the same command again$"
    )
    with pytest.raises(ModelError, match=sentence) as caught:
        refuse(outcomes, 0.01)
    assert caught.value.exit_code == 2
    refuse({"tflite": outcomes["tflite"]}, 0.01)


def test_a_saved_model_that_is_not_kept_leaves_no_folder_for_a_server_to_wait_at(tmp_path: Path) -> None:
    model, images = small_model(), some_images(60)
    others = held_out(said_by(model, images)[::-1], images)  # what other images would be called
    outcomes = export_formats(tmp_path, ("saved_model",), subject_for(model), others, 0.01, lambda: None)
    assert outcomes["saved_model"]["refused"]
    assert list(tmp_path.iterdir()) == []


# ---- mistakes ----


@pytest.mark.parametrize("file", ["model.keras", "model.tflite", "model.onnx", "saved_model/1"])
def test_a_damaged_file_is_one_sentence(file: str, exported: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    source, path = exported[0] / file, tmp_path / file
    if source.is_dir():
        path.mkdir(parents=True)
        (path / "saved_model.pb").write_bytes(b"\xff" * 100)
    else:
        path.write_bytes(source.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"cannot be loaded: .*; export it again$") as caught:
        load_export(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match=r"nowhere.* cannot be loaded"):
        load_export(tmp_path / "nowhere" / file)


def test_a_format_that_does_not_exist_is_refused_with_those_that_do() -> None:
    tree = {
        "data": {"source": "digits"},
        "model": {"backbone": "MobileNetV2"},
        "phases": {"head": {"thaw": "none", "epochs": 1}},
    }
    with pytest.raises(ConfigError, match=r"export.formats.1: .*'tflite_int8' or 'onnx' \(is 'tflite_int4'\)"):
        config.load(tree | {"export": {"formats": ["saved_model", "tflite_int4"]}})


def test_what_tf2onnx_cannot_convert_is_said_before_anything_is_trained() -> None:
    with pytest.raises(ConfigError, match=r"tf2onnx cannot convert ConvNeXtTiny; leave onnx out") as caught:
        check_formats(["saved_model", "onnx"], "ConvNeXtTiny")
    assert caught.value.exit_code == 2
    check_formats(["saved_model", "keras", "tflite"], "ConvNeXtTiny")


def test_an_extra_that_is_not_installed_is_named_before_anything_is_trained() -> None:
    """In a process whose Python finds no tf2onnx."""
    program = """
        from trainer.exporting.formats import check_formats
        import importlib.machinery
        before = importlib.machinery.PathFinder.find_spec
        importlib.machinery.PathFinder.find_spec = lambda name, *rest: None if name == "tf2onnx" else before(name, *rest)
        check_formats(["tflite", "onnx"], "MobileNetV2")
        """
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False
    )
    assert (
        "trainer.errors.ConfigError: export.formats: onnx needs tf2onnx, which is not installed; pip install "
        "'kubetune[onnx]', or leave onnx out\n"
    ) in ended.stderr
