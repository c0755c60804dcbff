"""All export formats by name: each is written, loaded back by the library that it is for, scored, and kept or not."""

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
from trainer.exporting.bundle import ExportBundle, ParityExamples, plain
from trainer.exporting.model_card import label_lines
from trainer.exporting.saved_model import export_saved_model
from trainer.exporting.tflite import export_tflite
from trainer.exporting.verify import drops_too_far, load_export, score
from trainer.storage.local import write_whole

OPSET = 18  # of ONNX 1.13, 2022: what TensorRT 10 reads


def export_keras(subject: ExportBundle, path: Path) -> None:
    """Write `path` whole or not at all: float32 [n, S, S, 3] RGB in 0..255 -> probabilities, in float32.

    `keras.saving.load_model(path)` reads it in its safe mode, without a line of this package.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".keras-", dir=path.parent) as beside, plain(subject.model):
        subject.model.save(f"{beside}/{path.name}")
        os.replace(f"{beside}/{path.name}", path)


def export_onnx(subject: ExportBundle, path: Path) -> None:
    """Write `path` whole or not at all: `images` float32 [n, S, S, 3] RGB in 0..255 -> `probabilities` [n, classes].

    For ONNX Runtime, TensorRT and OpenVINO; needs the extra `onnx`. The class names are its metadata `labels`, one a
    line.
    """
    import onnx
    import tf2onnx

    logging.getLogger("tf2onnx").setLevel(logging.WARNING)
    model, size = subject.model, subject.image_size
    spec = [tf.TensorSpec([None, size, size, 3], tf.float32, "images")]
    with plain(model):
        answer = tf.function(lambda images: {"probabilities": model(images, training=False)}, input_signature=spec)
        converted, _ = tf2onnx.convert.from_function(answer, input_signature=spec, opset=OPSET)
    onnx.helper.set_model_props(converted, {"labels": label_lines(subject.class_names)})
    write_whole(path, converted.SerializeToString())


# Name -> (file below export/, its writer)
FORMATS: dict[str, tuple[str, Callable[[ExportBundle, Path], None]]] = {
    "saved_model": ("saved_model/1", export_saved_model),
    "keras": ("model.keras", export_keras),
    "tflite": ("model.tflite", partial(export_tflite, precision="float32")),
    "tflite_float16": ("model_float16.tflite", partial(export_tflite, precision="float16")),
    "tflite_dynamic": ("model_dynamic.tflite", partial(export_tflite, precision="dynamic")),
    "tflite_int8": ("model_int8.tflite", partial(export_tflite, precision="int8")),
    "onnx": ("model.onnx", export_onnx),
}
_NEEDS = {"onnx": ("onnx", "onnxruntime", "tf2onnx")}  # modules of the extra of that name


def check_formats(formats: Iterable[str], backbone: str) -> None:
    """Raise a ConfigError for a format that cannot be written here: at the start, not when all is trained.

    Its extra is not installed, or its converter lacks operations of the backbone (tf2onnx 1.17 has no Erfc, which is in
    the GELU of ConvNeXt).
    """
    for name in formats:
        if name == "onnx" and backbone.lower().startswith("convnext"):
            raise ConfigError(
                f"export.formats: tf2onnx cannot convert {backbone}; leave onnx out, or take another backbone"
            )
        missing = [module for module in _NEEDS.get(name, ()) if not importlib.util.find_spec(module)]
        if missing:
            raise ConfigError(
                f"export.formats: {name} needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
                f"installed; pip install 'kubetune[{name}]', or leave {name} out"
            )


def export_formats(
    home: Path,
    formats: Iterable[str],
    subject: ExportBundle,
    held_out: ParityExamples,
    max_accuracy_drop: float,
    check: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """Write each format below `home`, and score it; one that is too far off is deleted again.

    Args:
        max_accuracy_drop: fraction of the examples; see `verify.drops_too_far`.
        check: called before each format, and each batch that it is sent; raises to leave.

    Returns:
        facts by format: those of `verify.score`, `path` below `home`, `bytes`, and `refused`: it is too far off.
    """
    outcomes: dict[str, dict[str, Any]] = {}
    for name in formats:
        check()
        file, write = FORMATS[name]
        path = home / file
        write(subject, path)
        facts = score(load_export(path), held_out, check)
        size = sum(part.stat().st_size for part in (path, *path.rglob("*")) if part.is_file())
        refused = drops_too_far(facts, max_accuracy_drop)
        if refused:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            with contextlib.suppress(OSError):
                path.parent.rmdir()  # an empty saved_model/ would keep a model server waiting
        outcomes[name] = {"path": file, "bytes": size, **facts, "refused": refused}
    return outcomes


def refuse(exports: Mapping[str, Mapping[str, Any]], max_accuracy_drop: float) -> None:
    """Raise a ModelError that names each format whose accuracy dropped too far; call it when all else is written."""
    bad = [
        f"{name} ({facts['trainer_accuracy']:.4f} -> {facts['accuracy']:.4f} on {facts['examples']:,} examples)"
        for name, facts in exports.items()
        if facts["refused"]
    ]
    if bad:
        raise ModelError(
            f"too much accuracy is lost in {', '.join(bad)}, more than export.max_accuracy_drop={max_accuracy_drop:g}: "
            f"{'it was' if len(bad) == 1 else 'they were'} not kept; all else is written. Raise the limit or leave "
            f"{'it' if len(bad) == 1 else 'them'} out of export.formats, and start the same command again"
        )
