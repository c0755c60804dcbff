"""The table of layers that `trainer.plan --summary` prints."""

import re

import keras
import pytest

from trainer.config.schema import validate_resolved_config
from trainer.models.classifier import build_classifier
from trainer.planning.estimates import plan_phases
from trainer.planning.layers import format_layers

MODEL = {"backbone": "MobileNetV2", "alpha": 0.35, "weights": "none", "image_size": 96, "hidden": [8]}
PHASES = {
    "head": {"thaw": "none", "epochs": 1},
    "top": {"thaw": "from_layer:150", "epochs": 1, "batch_norm": "train"},
    "all of it": {"thaw": "all", "epochs": 1, "batch_norm": "train"},
}


@pytest.fixture(scope="module")
def tables() -> dict[int, list[str]]:
    config = validate_resolved_config(
        {"data": {"source": "digits"}, "model": MODEL, "phases": PHASES, "runtime": {"precision": "bfloat16"}}
    )
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        classifier = build_classifier(config.model, 7, 0)
        phases = plan_phases(config, classifier, 10, 4)
        return {width: format_layers(classifier, phases, width) for width in (72, 80, 120)}
    finally:
        keras.config.set_dtype_policy(before)


@pytest.mark.parametrize("width", [72, 80, 120])
def test_the_table_fits_the_terminal(tables: dict[int, list[str]], width: int) -> None:
    lines = tables[width]
    assert max(map(len, lines)) <= width
    assert lines[0].split() == ["#", "layer", "type", "output", "dtype", "parameters", "trains", "in"]
    assert [re.match(r"\s+(\d+) ", line)[1] for line in lines[1:155]] == [str(i) for i in range(154)]  # type: ignore[index]
    assert len({line.index(" bfloat16") for line in lines[2:155]}) == 1  # a column


def test_a_row_has_index_output_dtype_parameters_and_phases(tables: dict[int, list[str]]) -> None:
    rows = {" ".join(line.split()) for line in tables[120]}
    for row in (
        "1 Conv1 Conv2D 48x48x16 bfloat16 432 3",
        "147 block_16_depthwise_BN BatchNormalization 3x3x336 bfloat16 1,344 3",
        "148 block_16_depthwise_relu ReLU 3x3x336 bfloat16",
        "150 block_16_project_BN BatchNormalization 3x3x112 bfloat16 448 2-3",
        "avg pooling GlobalAveragePooling2D 1280 float32",
        "head_hidden Dense 8 float32 10,248 1-3",
        "head_output Dense 7 float32 63 1-3",
    ):
        assert row in rows, sorted(rows)
    narrow = next(line for line in tables[80] if "block_16_depthwise_BN" in line)
    assert "…" in narrow  # of the type; the name is complete


def test_the_last_lines_are_the_totals(tables: dict[int, list[str]]) -> None:
    first = next(i for i, line in enumerate(tables[80]) if "by phase" in line)
    totals = " ".join(" ".join(tables[80][first:]).split())
    assert totals.endswith(" parameters; trainable ones by phase: 1 head 10,311, 2 top 156,455, 3 all of it 406,439")
