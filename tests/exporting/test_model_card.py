"""The model card: training data, scores and use."""

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tests.nasty import file_names
from trainer.config import schema as config
from trainer.exporting.model_card import escape_markdown, format_code_span, write_model_card
from trainer.names import escape_unprintable, normalize_class_name

SCORED: dict[str, Any] = {
    "examples": 512, "accuracy": 0.91, "trainer_accuracy": 0.912, "lost": 2, "gained": 1,
    "timing": {"milliseconds_per_image": 12.34}, "refused": False,
}  # fmt: skip

REPORT: dict[str, Any] = {
    "title": "flowers",
    "seed": 7,
    "test": {
        "split": "validation",
        "note": "These are the validation examples.",
        "n": 1234,
        "accuracy": 0.91234,
        "interval": [0.9, 0.925],
        "macro_f1": 0.9,
        "majority": 0.25,
        "loss": 0.3,
        "per_class": [
            {"name": "daisy", "f1": 0.95, "support": 900},
            {"name": "rose|red", "f1": 0.8, "support": 334},
            {"name": "unseen", "f1": 0.0, "support": 0},
        ],
    },
    "phases": {
        "head": {"val_accuracy": 0.85, "val_interval": [0.83, 0.87]},
        "middle": {"val_accuracy": 0.85, "kept_from": "head", "own_val_accuracy": 0.8},
        "fine_tune": {"val_accuracy": None},
    },
    "data": {
        "name": "tf_flowers",
        "fingerprint": "abc",
        "class_names": ["daisy", "rose|red", "unseen"],
        "counts": {"train": 2936, "validation": 1234},
        "notes": ["daisy is 3 times as frequent as rose|red"],
        "skipped": ["x.jpg: truncated"],
    },
    "export": {
        "saved_model": {"path": "export/saved_model/1", "bytes": 14_200_000, **SCORED, "largest_difference": 2.4e-7},
        "tflite": {"path": "export/model.tflite", "bytes": 9_000_000, **SCORED, "largest_difference": 3.1e-6},
    },
    "versions": {"tensorflow": "2.21.0"},
}


def a_config() -> dict[str, Any]:
    tune = {"thaw": "from_layer:100", "steps": 500, "optimizer": {"learning_rate": 1e-5}}
    return config.validate_config({
        "data": {"source": "digits"}, "augmentation": {"rotation": 10},
        "model": {"backbone": "MobileNetV2", "weights": "imagenet", "alpha": 0.35, "resize": "crop"},
        "phases": {"head": {"thaw": "none", "epochs": 3}, "fine_tune": tune},
    }).model_dump(mode="json")  # fmt: skip


def test_the_lines_of_a_card(tmp_path: Path) -> None:
    write_model_card(tmp_path / "model_card.md", REPORT, a_config())
    lines = (
        "# flowers",
        "An image classifier with 3 classes: MobileNetV2 (alpha 0.35), initial weights `imagenet`, ",
        "fine-tuned on tf_flowers.",
        "On 1,234 examples of the validation split.",
        "| accuracy | 0.9123 (95 % interval 0.9000 to 0.9250) |",
        "| accuracy of always predicting the most frequent class | 0.2500 |",
        "| validation accuracy after `head` | 0.8500 (95 % interval 0.8300 to 0.8700) |",
        "| validation accuracy after `middle`, which retained the weights of `head` | 0.8500 |",
        "| validation accuracy after `fine_tune` | not measured |",
        "These are the validation examples.",
        "tf_flowers: 2,936 train, 1,234 validation. Fingerprint `abc`.",
        "Classes, in the order of the probabilities: `daisy`, `rose|red`, `unseen`.",
        "1 files could not be read and were left out.",
        "| head | none | frozen | 3 epochs | adam, 0.001 | constant |",
        "| fine_tune | from_layer:100 | frozen | 500 steps | adam, 1e-05 | constant |",
        "batch size 32; dropout 0; precision float32; seed 7; augmentation: rotation 10.0.",
        "Made with tensorflow 2.21.0.",
        'probabilities = served.signatures["image_bytes"](',
        "resizes them as in the evaluation (`crop`)",
        "| `saved_model` | 14.20 MB | 0.9100 (0.9120) | 512 | 2.4e-07 | 12.3 |",
        "load them with `ai_edge_litert.interpreter.Interpreter`",
        "- Weakest class: `rose|red` (F1 0.800 over 334 examples).",
        "- There was no test split: the scores are optimistically biased.",
    )
    text = (tmp_path / "model_card.md").read_text("utf-8")
    assert [line for line in lines if line not in text] == []


def test_a_deleted_format_is_listed_without_its_use(tmp_path: Path) -> None:
    facts = REPORT["export"]["tflite"] | {"refused": True, "accuracy": 0.5}
    write_model_card(tmp_path / "model_card.md", REPORT | {"export": {"tflite_int8": facts}}, a_config())
    text = (tmp_path / "model_card.md").read_text("utf-8")
    assert "| `tflite_int8` | deleted: it lost too much accuracy | 0.5000 (0.9120) | 512 |" in text
    assert "model_int8.tflite" not in text


def test_a_card_without_exports(tmp_path: Path) -> None:
    write_model_card(tmp_path / "model_card.md", REPORT | {"export": {}}, a_config())
    text = (tmp_path / "model_card.md").read_text("utf-8")
    assert "tf.saved_model.load" not in text
    assert "tflite" not in text


def test_a_card_of_many_classes_stays_short(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(1000)]
    report = REPORT | {"data": REPORT["data"] | {"class_names": names}}
    write_model_card(tmp_path / "model_card.md", report, a_config())
    text = (tmp_path / "model_card.md").read_text("utf-8")
    assert "`class 49` and 950 more (`labels.txt` has all)" in text
    assert "class 50`" not in text


@pytest.mark.parametrize("seed", range(3))
def test_names_cannot_leave_their_position(tmp_path: Path, seed: int) -> None:
    """A renderer of Markdown gets every name back, in the structure that the card has with plain names."""
    names = [*{normalize_class_name(name): None for name in file_names(seed, 40)}, "`", "``a", "b|c", "<script>"]
    renderer = MarkdownIt().enable("table")

    def kinds(title: str, classes: list[str]) -> list[tuple[str, str]]:
        rows = [{"name": name, "f1": 0.5, "support": 3} for name in classes]
        groups = {
            "field": title,
            "rows": [{"name": name, "n": 1, "accuracy": 1.0, "interval": [0, 1]} for name in classes],
        }
        data = REPORT["data"] | {"name": title, "class_names": classes, "notes": classes}
        test = REPORT["test"] | {"per_class": rows, "groups": groups}
        write_model_card(tmp_path / "card.md", REPORT | {"title": title, "test": test, "data": data}, a_config())
        text = (tmp_path / "card.md").read_text("utf-8")
        return [(token.type, token.tag) for token in renderer.parse(text)]

    plain = kinds("plain", [f"n{i}" for i in range(len(names))])
    for name in names:
        assert kinds(name, names) == plain, ascii(name)


@pytest.mark.parametrize(
    "name", [*file_names(7, 100), "1. a", "- a", "# a", "=", "a_b _c_", "&lt;", "!a", "*a*", "> a"]
)
def test_a_name_is_rendered_as_it_is(name: str) -> None:
    renderer, shown = MarkdownIt().enable("table"), escape_unprintable(name)
    (code,) = renderer.parseInline(format_code_span(shown))[0].children or ()
    assert (code.type, code.content) == ("code_inline", shown)
    tokens = renderer.parse(escape_markdown(shown.strip() or "x"))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    texts = tokens[1].children or ()
    assert {token.type for token in texts} <= {"text", "text_special"}
    assert "".join(token.content for token in texts) == (shown.strip() or "x")
