"""The files beside the exported model for people: the class names and the model card."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.storage.local import write_whole

MANY_CLASSES = 50  # a card lists this many at most


def label_lines(class_names: Sequence[str]) -> str:
    """One class name a line, in the order of the probabilities; a line break inside a name becomes a space."""
    return "".join(" ".join(name.splitlines()) + "\n" for name in class_names)


def write_labels(path: Path, class_names: Sequence[str]) -> None:
    """Write labels.txt, UTF-8."""
    write_whole(path, label_lines(class_names))


def write_model_card(path: Path, report: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write a Markdown card (after Mitchell et al. 2019, "Model Cards for Model Reporting").

    Args:
        path: ".../model_card.md".
        report: the content of report.json: title, seed, test, phases, data, export, versions.
        config: the resolved configuration.
    """
    model, data = config["model"], report["data"]
    width = f" (alpha {model['alpha']:g})" if model.get("alpha") else ""
    title = (
        f"# {report['title']}\n\nAn image classifier with {len(data['class_names'])} classes: "
        f"{model['backbone']}{width}, first weights `{model['weights']}`, fine-tuned on {data['name']}."
    )
    uses, limits = _use(report, model["resize"]), _limits(report["test"])
    sections = [title, *_scores(report), *_data(data), *_training(report, config), *uses, limits]
    write_whole(path, "\n\n".join(sections) + "\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _value(value: float | None, interval: Sequence[float] | None = None) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4f}" + (f" (95 % interval {interval[0]:.4f} to {interval[1]:.4f})" if interval else "")


def _scores(report: Mapping[str, Any]) -> list[str]:
    test = report["test"]
    rows = [("accuracy", _value(test["accuracy"], test.get("interval")))]
    for name in ("top_5", "macro_f1", "calibration_error", "loss", "majority"):
        if isinstance(test.get(name), float | int):
            words = "accuracy of always answering the commonest class" if name == "majority" else name.replace("_", " ")
            rows.append((words, _value(test[name], test.get(f"{name}_interval"))))
    for name, phase in report["phases"].items():
        kept = f", which kept the weights of `{phase['kept_from']}`" if "kept_from" in phase else ""
        accuracy = _value(phase.get("val_accuracy"), phase.get("val_interval"))
        rows.append((f"validation accuracy after `{name}`{kept}", accuracy))
    lines = ["## Scores", f"On {test['n']:,} examples of the {test['split']} split.", _table(("score", "value"), rows)]
    if groups := test.get("groups"):
        by_group = [(row["name"], f"{row['n']:,}", _value(row["accuracy"], row["interval"])) for row in groups["rows"]]
        lines.append(_table((groups["field"], "examples", "accuracy"), by_group))
    return [*lines, test["note"]] if test.get("note") else lines


def _data(data: Mapping[str, Any]) -> list[str]:
    counts = ", ".join(f"{count:,} {name}" for name, count in data["counts"].items())
    names = data["class_names"]
    shown = ", ".join(f"`{name}`" for name in names[:MANY_CLASSES])
    rest = f" and {len(names) - MANY_CLASSES} more (`labels.txt` has all)" if len(names) > MANY_CLASSES else ""
    lines = [
        "## Data",
        f"{data['name']}: {counts}. Fingerprint `{data['fingerprint']}`.",
        f"Classes, in the order of the probabilities: {shown}{rest}.",
        *(f"- {note}" for note in data.get("notes", ())),
    ]
    skipped = len(data.get("skipped", ())) + len(data.get("undecodable", ()))
    if skipped:
        lines.append(f"{skipped:,} files could not be read and were left out.")
    return lines


def _training(report: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    rows = []
    for name, phase in config["phases"].items():
        optimizer = phase["optimizer"]
        length = next(f"{phase[unit]:g} {unit}" for unit in ("epochs", "steps", "examples") if phase.get(unit))
        rate = f"{optimizer['name']}, {optimizer['learning_rate']:g}"
        rows.append((name, phase["thaw"], phase["batch_norm"], length, rate, phase["schedule"]["name"]))
    head = ("phase", "what was thawed", "batch norm", "at most", "optimizer, learning rate", "schedule")
    augmentation = config["augmentation"]
    silent = {"fill"} if augmentation.get("randaugment") else {"fill", "magnitude"}
    changes = [f"{k} {v}" for k, v in augmentation.items() if v and k not in silent]
    facts = [
        f"batch size {config['training']['batch_size']}",
        f"dropout {config['model']['dropout']:g}",
        f"precision {config['runtime']['precision']}",
        f"seed {report['seed']}",
        "augmentation: " + (", ".join(changes) if changes else "none"),
    ]
    versions = ", ".join(f"{name} {number}" for name, number in report.get("versions", {}).items())
    lines = ["## Training", _table(head, rows), "; ".join(facts) + "."]
    return [*lines, f"Made with {versions}."] if versions else lines


def _use(report: Mapping[str, Any], resize: str) -> list[str]:
    exports = report.get("export", {})
    kept = {name for name, facts in exports.items() if not facts["refused"]}
    lines = ["## Use", "Class names are in `labels.txt`, one a line, in the order of the probabilities."]
    lines += [words.replace("{resize}", resize) for names, words in _USES if kept & names]
    if exports:
        lines.append(export_table(exports))
        lines.append(
            "Each file was loaded back and sent held-out examples; in brackets is the trainer's own accuracy on them. "
            "Times are of single images on the CPU that exported."
        )
    return lines


# Formats, and the paragraph on them if one of them was exported
_USES = (
    (
        {"saved_model"},
        "```python\n"
        "import tensorflow as tf\n\n"
        'served = tf.saved_model.load("saved_model/1")\n'
        'names = tf.io.gfile.GFile("labels.txt").read().splitlines()\n'
        'image = tf.io.read_file("photo.jpg")\n'
        'answer = served.signatures["image_bytes"](image_bytes=tf.stack([image]))["probabilities"][0]\n'
        "print(names[int(tf.argmax(answer))], float(tf.reduce_max(answer)))\n"
        "```\n\n"
        "The signature `image_bytes` takes encoded JPEG or PNG files and decodes and resizes them as in the "
        "evaluation (`{resize}`); `images` takes float32 RGB in 0..255 of the size it was trained at; `explain` takes "
        "files and answers an embedding and a Grad-CAM heatmap, too.",
    ),
    ({"keras"}, "`model.keras` takes float32 RGB in 0..255, already resized; `keras.saving.load_model` reads it."),
    (
        {"tflite", "tflite_float16", "tflite_dynamic"},
        "`.tflite` files take float32 RGB in 0..255, already resized, and answer probabilities; load them with "
        "`ai_edge_litert.interpreter.Interpreter`. The class names are inside (`unzip -p model.tflite labels.txt`).",
    ),
    ({"tflite_int8"}, "`model_int8.tflite` takes uint8 RGB and answers uint8: probabilities in steps of 1/256."),
    (
        {"onnx"},
        "`model.onnx` takes `images`, float32 RGB in 0..255, already resized, and answers `probabilities`; its "
        "metadata `labels` are the class names.",
    ),
)


def export_table(exports: Mapping[str, Mapping[str, Any]]) -> str:
    """A Markdown table of the facts by format (`formats.export_formats`)."""
    rows = [
        (
            f"`{kind}`",
            "not kept: it lost too much accuracy" if facts["refused"] else f"{facts['bytes'] / 1e6:,.2f} MB",
            f"{facts['accuracy']:.4f} ({facts['trainer_accuracy']:.4f})",
            f"{facts['examples']:,}",
            "not finite" if facts["largest_difference"] is None else f"{facts['largest_difference']:.1e}",
            f"{facts['timing']['milliseconds_per_image']:,.1f}",
        )
        for kind, facts in exports.items()
    ]
    head = ("format", "size", "accuracy", "examples", "largest difference of a probability", "ms an image")
    return _table(head, rows)


def _limits(test: Mapping[str, Any]) -> str:
    lines = [
        "It answers one of its classes for any picture, also for one that shows none of them.",
        "The scores hold for pictures like those it was scored on; another camera, place or time may differ.",
    ]
    seen = [row for row in test.get("per_class", ()) if row["support"]]
    if seen:
        worst = min(seen, key=lambda row: row["f1"])
        lines.append(f"Weakest class: `{worst['name']}` (F1 {worst['f1']:.3f} over {worst['support']:,} examples).")
    if test["split"] != "test":
        lines.append("There was no test split: the scores lean to the good side.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines)
