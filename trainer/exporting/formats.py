"""Export formats: each is written, loaded by its own library, scored, and deleted if it lost too much accuracy."""

import contextlib
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainer.errors import ConfigError, ModelError
from trainer.exporting.bundle import ExportBundle, ParityExamples, plain_float32
from trainer.exporting.model_card import label_lines
from trainer.exporting.saved_model import export_saved_model
from trainer.exporting.tflite import export_tflite
from trainer.exporting.verify import drops_too_far, load_export, score
from trainer.storage.local import write_whole

OPSET = 18  # ONNX 1.13, 2022; supported by TensorRT 10


def export_keras(bundle: ExportBundle, path: Path) -> None:
    """Write `path` atomically: float32 [n, S, S, 3] RGB in 0..255 -> probabilities, in float32.

    `keras.saving.load_model(path)` reads it in safe mode, without this package.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".keras-", dir=path.parent) as folder, plain_float32(bundle.model):
        bundle.model.save(f"{folder}/{path.name}")
        os.replace(f"{folder}/{path.name}", path)


def export_onnx(bundle: ExportBundle, path: Path) -> None:
    """Write `path` atomically: `images` float32 [n, S, S, 3] RGB in 0..255 -> `probabilities` [n, classes].

    For ONNX Runtime, TensorRT and OpenVINO; requires the extra `onnx`. The metadata `labels` has one class per line.
    """
    import onnx
    import tf2onnx

    logging.getLogger("tf2onnx").setLevel(logging.WARNING)
    model, size = bundle.model, bundle.image_size
    spec = [tf.TensorSpec([None, size, size, 3], tf.float32, "images")]
    with plain_float32(model):
        predict = tf.function(lambda images: {"probabilities": model(images, training=False)}, input_signature=spec)
        converted, _ = tf2onnx.convert.from_function(predict, input_signature=spec, opset=OPSET)
    onnx.helper.set_model_props(converted, {"labels": label_lines(bundle.class_names)})
    write_whole(path, converted.SerializeToString())


# Name -> (file below export/, writer)
FORMATS: dict[str, tuple[str, Callable[[ExportBundle, Path], None]]] = {
    "saved_model": ("saved_model/1", export_saved_model),
    "keras": ("model.keras", export_keras),
    "tflite": ("model.tflite", partial(export_tflite, precision="float32")),
    "tflite_float16": ("model_float16.tflite", partial(export_tflite, precision="float16")),
    "tflite_dynamic": ("model_dynamic.tflite", partial(export_tflite, precision="dynamic")),
    "tflite_int8": ("model_int8.tflite", partial(export_tflite, precision="int8")),
    "onnx": ("model.onnx", export_onnx),
}
_ONNX_MODULES = ("onnx", "onnxruntime", "tf2onnx")  # of the extra `onnx`


def check_formats(formats: Iterable[str], backbone: str) -> None:
    """Check before training that the formats can be written.

    Raises:
        ConfigError: the extra `onnx` is not installed, or tf2onnx cannot convert the backbone (1.17 has no Erfc, which
            the GELU of ConvNeXt uses).
    """
    if "onnx" not in formats:
        return
    if backbone.lower().startswith("convnext"):
        raise ConfigError(
            f"tf2onnx cannot convert {backbone}",
            key="export.formats",
            value="onnx",
            fix="leave onnx out or use another backbone",
        )
    if missing := [module for module in _ONNX_MODULES if not importlib.util.find_spec(module)]:
        raise ConfigError(
            f"not installed: {', '.join(missing)}",
            key="export.formats",
            value="onnx",
            fix="run pip install 'kubetune[onnx]' or leave onnx out",
        )


def export_formats(
    home: Path,
    formats: Iterable[str],
    bundle: ExportBundle,
    held_out: ParityExamples,
    max_accuracy_drop: float,
    check: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """Write each format below `home` and score it; a format that lost too much accuracy is deleted.

    Args:
        max_accuracy_drop: fraction of the examples; see `verify.drops_too_far`.
        check: called before each format and each batch; may raise to abort.

    Returns:
        facts by format: those of `verify.score`, `path` below `home`, `bytes`, and `refused` (it was deleted).
    """
    outcomes: dict[str, dict[str, Any]] = {}
    for name in formats:
        check()
        file, write = FORMATS[name]
        path = home / file
        write(bundle, path)
        facts = score(load_export(path), held_out, check)
        size = sum(part.stat().st_size for part in (path, *path.rglob("*")) if part.is_file())
        refused = drops_too_far(facts, max_accuracy_drop)
        if refused:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # an empty saved_model/ would keep a model server waiting
        outcomes[name] = {"path": file, "bytes": size, **facts, "refused": refused}
    return outcomes


def raise_if_refused(
    exports: Mapping[str, Mapping[str, Any]], max_accuracy_drop: float, section: str = "export."
) -> None:
    """Raise a ModelError that names each deleted format; `section` is the prefix of the user's keys."""
    bad = [
        f"{name} ({facts['trainer_accuracy']:.4f} -> {facts['accuracy']:.4f} on {facts['examples']:,} examples)"
        for name, facts in exports.items()
        if facts["refused"]
    ]
    if bad:
        raise ModelError(
            f"more accuracy was lost by {', '.join(bad)}, now deleted; everything else was written",
            key=f"{section}max_accuracy_drop",
            value=f"{max_accuracy_drop:g}",
            fix=f"raise the limit or leave out the format in {section}formats, then start the same command again",
        )
