"""Export LiteRT (formerly TFLite) models in four precisions, for phones and embedded devices."""

import contextlib
import io
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import flatbuffers
import numpy as np
import tensorflow as tf
from ai_edge_litert import schema_py_generated as schema

from trainer.exporting.bundle import ExportBundle
from trainer.exporting.model_card import format_labels
from trainer.monitoring.log import suppress_litert_output
from trainer.storage.local import write_atomically

# ---------------------------------------------------------------------------------------------------------------
# Metadata: input and output descriptions, and the class names in a zip archive at the end of the file

# Name of the metadata buffer, and the FlatBuffers file identifiers of metadata and model.
METADATA_NAME, METADATA_IDENTIFIER, MODEL_IDENTIFIER = b"TFLITE_METADATA", b"M001", b"TFL3"
LABELS = "labels.txt"
# Values of TENSOR_AXIS_LABELS, ColorSpaceType.RGB, ImageProperties and NormalizationOptions in metadata_schema.fbs
_AXIS_LABELS, _RGB, _IMAGE, _NORMALIZATION = 2, 1, 2, 1


def add_metadata(model: bytes, class_names: Sequence[str]) -> bytes:
    """Return the content of a .tflite file, with descriptions of its input and output and the class names added."""
    model_table = schema.ModelT.InitFromPackedBuf(model, 0)
    model_table.metadata = [entry for entry in model_table.metadata or [] if entry.name != METADATA_NAME]
    buffer = schema.BufferT()
    entry = schema.MetadataT()
    buffer.data = list(_build_metadata())
    entry.name, entry.buffer = METADATA_NAME, len(model_table.buffers)
    model_table.buffers.append(buffer)
    model_table.metadata.append(entry)
    builder = flatbuffers.Builder(len(model) + 4096)
    builder.Finish(model_table.Pack(builder), MODEL_IDENTIFIER)
    file = io.BytesIO(bytes(builder.Output()))
    with zipfile.ZipFile(file, "a") as archive:  # the date is fixed, so that equal models give identical files
        archive.writestr(zipfile.ZipInfo(LABELS, (1980, 1, 1, 0, 0, 0)), format_labels(class_names))
    return file.getvalue()


def _build_metadata() -> bytes:
    """Build a ModelMetadata table of metadata_schema.fbs: one image as input, one probability per class as output.

    Inner tables are built first, because a table stores the offsets of the tables that it contains.
    """
    builder = flatbuffers.Builder(1024)

    def table(*fields: tuple[str, int, int], slots: int) -> int:  # fields: (type, slot, value or offset)
        builder.StartObject(slots)
        for kind, slot, value in fields:
            prepend = builder.PrependUOffsetTRelativeSlot if kind == "offset" else builder.PrependInt8Slot
            prepend(slot, value, 0)
        return builder.EndObject()

    def vector(value: float, prepend: Callable[[float], None] = builder.PrependUOffsetTRelative) -> int:  # length 1
        builder.StartVector(4, 1, 4)
        prepend(value)
        return builder.EndVector()

    def text(slot: int, value: str) -> tuple[str, int, int]:
        return "offset", slot, builder.CreateString(value)

    mean, deviation = (vector(value, builder.PrependFloat32) for value in (0.0, 1.0))  # the model normalizes
    normalization = table(("offset", 0, mean), ("offset", 1, deviation), slots=2)
    process_unit = table(("byte", 0, _NORMALIZATION), ("offset", 1, normalization), slots=2)
    colors = table(("byte", 0, _RGB), slots=2)
    content = table(("byte", 0, _IMAGE), ("offset", 1, colors), slots=3)
    process_units = vector(process_unit)
    strings = [text(0, "image"), text(1, "RGB in 0..255, resized as in training; the model normalises it itself")]
    image = table(*strings, ("offset", 3, content), ("offset", 4, process_units), slots=7)
    strings = [text(0, LABELS), text(1, "class names, one a line")]
    labels = vector(table(*strings, ("byte", 2, _AXIS_LABELS), slots=5))
    strings = [text(0, "probability"), text(1, "of each class, summing to 1")]
    output = table(*strings, ("offset", 6, labels), slots=7)
    inputs, outputs = vector(image), vector(output)
    graphs = vector(table(("offset", 2, inputs), ("offset", 3, outputs), slots=8))
    strings = [text(0, "image classifier"), text(7, "1.0.0")]
    root = table(*strings, ("offset", 3, graphs), slots=8)
    builder.Finish(root, METADATA_IDENTIFIER)
    return bytes(builder.Output())


# ---------------------------------------------------------------------------------------------------------------
# Conversion

Precision = Literal["float32", "float16", "dynamic", "int8"]


def export_tflite(bundle: ExportBundle, path: Path, precision: Precision) -> None:
    """Write a LiteRT model atomically: images [n, S, S, 3] RGB in 0..255 -> probabilities [n, classes].

    Args:
        precision: "float32"; "float16": weights of half the size; "dynamic": 8-bit weights, and computation in 8 bits
            if there is a kernel, otherwise in float32; "int8": 8-bit weights and computation, with ranges calibrated
            on training images. Input and output are float32, or uint8 for "int8" (probabilities in steps of 1/256).
    """
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        # The converter warns of missing input statistics, but it measures them on the calibration images.
        warnings.filterwarnings("ignore", message="Statistics for quantized inputs were expected")
        predict = bundle.predict_in_float32
        converter = tf.lite.TFLiteConverter.from_concrete_functions([predict.get_concrete_function()], predict)
        converter.experimental_lower_to_saved_model = False  # weights stay constants, which is faster; int8 needs it
        if precision != "float32":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if precision == "float16":
            converter.target_spec.supported_types = [tf.float16]
        if precision == "int8":
            converter.representative_dataset = partial(_calibration_inputs, bundle.calibration_images())
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.uint8
        with suppress_litert_output():
            content = converter.convert()
    write_atomically(path, add_metadata(content, bundle.class_names))


def _calibration_inputs(images: np.ndarray) -> Iterator[list[np.ndarray]]:
    """Yield the model's inputs for calibration, each a list with one image, float32 [1, S, S, 3]."""
    images = images.astype(np.float32)
    images[0, 0, :2] = [[0], [255]]  # a black and a white pixel make the input range 0..255, and so its scale 1
    yield from ([image[None]] for image in images)
