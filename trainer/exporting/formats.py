"""Write each export format, load it with the format's own library, score it, and delete it if it is too inaccurate."""

import contextlib
import importlib.util
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import tensorflow as tf

from trainer.errors import ConfigError, ModelError
from trainer.exporting.bundle import ExportBundle, ParityExamples, as_plain_float32, sample_examples
from trainer.exporting.model_card import format_labels
from trainer.exporting.saved_model import export_saved_model
from trainer.exporting.tflite import export_tflite
from trainer.exporting.verify import judge_accuracy_drop, load_export, score
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.storage.local import delete_temporary_files, sync, temporary_folder, write_atomically

ONNX_OPSET = 18  # operator set version; introduced by ONNX 1.13 (2022) and supported by TensorRT 10


def export_keras(bundle: ExportBundle, path: Path) -> None:
    """Write a Keras model atomically: float32 [n, S, S, 3] RGB in 0..255 -> float32 probabilities [n, classes].

    S is `bundle.image_size`, here and in `export_onnx`.
    `keras.saving.load_model(path)` loads the file in safe mode, without this package.
    """
    model = bundle.build_model()
    with temporary_folder(path) as folder, as_plain_float32(model):
        model.save(f"{folder}/{path.name}")
        sync(folder / path.name)
        os.replace(folder / path.name, path)


def export_onnx(bundle: ExportBundle, path: Path) -> None:
    """Write an ONNX model atomically: `images` [n, S, S, 3] RGB in 0..255 -> `probabilities` [n, classes], in float32.

    The file is for ONNX Runtime, TensorRT and OpenVINO. Its metadata entry `labels` has one class name per line.
    Requires the packages of the extra `onnx`.
    """
    import onnx
    import tf2onnx

    logging.getLogger("tf2onnx").setLevel(logging.WARNING)
    signature = [tf.TensorSpec([None, bundle.image_size, bundle.image_size, 3], tf.float32, "images")]
    converted, _ = tf2onnx.convert.from_function(bundle.predict_in_float32, signature, opset=ONNX_OPSET)
    onnx.helper.set_model_props(converted, {"labels": format_labels(bundle.class_names)})
    write_atomically(path, converted.SerializeToString())


# Format -> (path below the export folder, function that writes it)
FORMATS: dict[str, tuple[str, Callable[[ExportBundle, Path], None]]] = {
    "saved_model": ("saved_model/1", export_saved_model),
    "keras": ("model.keras", export_keras),
    "tflite": ("model.tflite", partial(export_tflite, precision="float32")),
    "tflite_float16": ("model_float16.tflite", partial(export_tflite, precision="float16")),
    "tflite_dynamic": ("model_dynamic.tflite", partial(export_tflite, precision="dynamic")),
    "tflite_int8": ("model_int8.tflite", partial(export_tflite, precision="int8")),
    "onnx": ("model.onnx", export_onnx),
}
# Formats that compute in the run's precision, and are compared with its probabilities. All others are converted from
# the float32 model, and are compared with float32 probabilities.
RUN_PRECISION_FORMATS = frozenset({"saved_model"})
# Examples with which these are checked. They contain the trainer's own functions, which round as in the trainer, and an
# error in writing or reading would change all predictions.
MAX_UNCONVERTED_EXAMPLES = 256
_ONNX_PACKAGES = ("onnx", "onnxruntime", "tf2onnx")  # packages of the extra `onnx`


def check_formats(formats: Iterable[str], backbone: str) -> None:
    """Check before training that the export formats can be written. Only ONNX has requirements.

    Raises:
        ConfigError: a package of the extra `onnx` is not installed, or the backbone is a ConvNeXt: tf2onnx 1.17 cannot
            convert the operation Erfc in its GELU activations.
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
    if missing := [name for name in _ONNX_PACKAGES if not importlib.util.find_spec(name)]:
        raise ConfigError(
            f"requires packages that are not installed: {', '.join(missing)}",
            key="export.formats",
            value="onnx",
            fix="run pip install 'kubetune[onnx]' or leave onnx out",
        )


def export_formats(
    folder: Path,
    formats: Iterable[str],
    bundle: ExportBundle,
    held_out: ParityExamples,
    max_accuracy_drop: float,
    check: Callable[[], None],
) -> dict[str, dict[str, Any]]:
    """Write each format below `folder`, score it, and delete it if it is refused (`verify.judge_accuracy_drop`).

    A warning is logged if a format is refused, or if its accuracy drop exceeds the limit but is not statistically
    significant.

    Args:
        formats: keys of `FORMATS`.
        held_out: examples on which the formats are scored, with the probabilities of the trained model.
        max_accuracy_drop: largest acceptable net loss of correct predictions, as a fraction of the examples.
        check: called before each format and each batch; may raise an exception to stop the export.

    Returns:
        A dict from format to its scores (`verify.score`), `path` relative to `folder`, `bytes`, and `refused` (True if
        it was deleted).

    Raises:
        ModelError: a written file cannot be loaded.
        Interrupted: the disk is full or fails while a file is loaded.
        Exception: any error of `check`, or of the library that writes a format.
    """
    exports: dict[str, dict[str, Any]] = {}
    delete_temporary_files(folder)
    for i, name in enumerate(names := list(formats)):
        check()
        health.record_progress(i, len(names))
        relative_path, write = FORMATS[name]
        path = folder / relative_path
        write(bundle, path)
        expected = (
            sample_examples(held_out, MAX_UNCONVERTED_EXAMPLES)
            if name in RUN_PRECISION_FORMATS
            else replace(held_out, probabilities=held_out.float32_probabilities)
        )
        scores = score(load_export(path), expected, check)
        size = sum(item.stat().st_size for item in (path, *path.rglob("*")) if item.is_file())
        refused, reason = judge_accuracy_drop(scores, max_accuracy_drop)
        if reason:
            log.warning(f"warning: {relative_path} {reason}{'; it is deleted' if refused else ''}")
        if refused:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
            with contextlib.suppress(OSError):
                # A model server would wait for a version in an empty saved_model/. Other formats are directly in
                # `folder`, which is not empty: `rmdir` fails.
                path.parent.rmdir()
        exports[name] = {"path": relative_path, "bytes": size, **scores, "refused": refused}
    return exports


def raise_if_refused(
    exports: Mapping[str, Mapping[str, Any]], max_accuracy_drop: float, section: str = "export."
) -> None:
    """Raise a ModelError if a format was refused.

    Args:
        exports: scores by format, from `export_formats`.
        max_accuracy_drop: the limit, for the message.
        section: prefix of the keys in the message; "" for the arguments of the command `trainer.export`.
    """
    refused = [
        f"{name} ({scores['trainer_accuracy']:.4f} -> {scores['accuracy']:.4f} on {scores['examples']:,} examples)"
        for name, scores in exports.items()
        if scores["refused"]
    ]
    if refused:
        others = "; the other formats were written" if len(refused) < len(exports) else ""
        raise ModelError(
            f"is exceeded by {', '.join(refused)}, which {'was' if len(refused) == 1 else 'were'} deleted{others}",
            key=f"{section}max_accuracy_drop",
            value=f"{max_accuracy_drop:g}",
            fix=f"raise the limit or leave out the format in {section}formats, then start the same command again",
        )
