"""Every preset runs on a small dataset with its classes, fields and splits: small images, no weights, two steps per phase."""

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml

from scripts.recipes_page import list_values
from tests.data.images import encode_noise, serialize_record
from tests.data.test_open import read_encoded_images
from tests.e2e.running import train, variables_of
from tests.test_recipes import FLOWERS, PRESETS, RECIPES, preset
from trainer.data.open import stage_and_open_run_dataset
from trainer.data.tfds_writer import LabeledImages, write_dataset

BEANS = ("angular_leaf_spot", "bean_rust", "healthy")
HANDS = ("rock", "paper", "scissors")
SMALLEST = {"Xception": 71, "InceptionV3": 75}  # pixels; 48 for the others
# preset: its classes, and the number of examples per class of each split
TFDS = {
    "food101_efficientnet_b0": (101, {"train": 1, "validation": 1}),
    "food101_efficientnet_b0_strong": (101, {"train": 2, "validation": 1}),
    "food101_mobilenet_v2_strong": (101, {"train": 2, "validation": 1}),
    "flowers_mobilenet_v2": (FLOWERS, {"train": 20}),
    "flowers_mobilenet_v2_strong": (FLOWERS, {"train": 20}),
    "beans_xception": (BEANS, {"train": 20, "validation": 5, "test": 5}),
    "beans_inception_v3": (BEANS, {"train": 20, "validation": 5, "test": 5}),
    "stanford_dogs_mobilenet_v2": (120, {"train": 1, "test": 2}),
    "rock_paper_scissors_xception": (HANDS, {"train": 40, "test": 4}),
}
# preset: the number of examples of its test split, else of its validation split
SCORED = {
    "food101_efficientnet_b0": 101, "food101_efficientnet_b0_strong": 101, "food101_mobilenet_v2_strong": 101,
    "flowers_mobilenet_v2": 20, "flowers_mobilenet_v2_strong": 20, "beans_xception": 15, "beans_inception_v3": 15,
    "stanford_dogs_mobilenet_v2": 120, "rock_paper_scissors_xception": 12, "flowers_efficientnet_b0": 20,
    "flowers_efficientnet_b0_stepwise": 20, "flowers_efficientnet_b0_distilled": 20, "xception_image_folder": 20, "xception_medical": 20,
    "flowers_tfrecords_xception": 20,
}  # fmt: skip
# Variables per weight of each Keras optimizer.
SLOTS = {"adam": {"momentum", "velocity"}, "adamax": {"momentum", "norm"}, "sgd": {"momentum"}, "rmsprop": {"velocity"}}
# Learning rate after a number of steps, relative to the first; 1 for the others.
DECAYS: dict[tuple[str, str], Callable[[int], float]] = {
    **{(f"flowers_efficientnet_b0{kind}", phase): lambda step: 0.9 ** (step / 1000)
       for kind in ("", "_stepwise", "_distilled") for phase in ("head", "thaw_1", "thaw_2")},
    ("beans_xception", "head"): lambda step: 1 / (1 + 0.01 * step),
    ("beans_xception", "fine_tune"): lambda step: 1 / (1 + 0.001 * step),
}  # fmt: skip
FOLDERS = ("flowers_efficientnet_b0", "flowers_efficientnet_b0_stepwise", "xception_image_folder", "xception_medical")
CHOSEN_BY_DATA = ("photos",)  # tests/e2e/test_documented_commands.py runs it
RECORDS = ("flowers_tfrecords_xception",)
# One preset of records with splits and one of records without, with the network of the fewest layers and parameters.
SMALLER = {"beans_xception": "mobilenet", "flowers_tfrecords_xception": "mobilenet"}


def jpeg(number: int) -> bytes:
    return encode_noise(number, size=(40, 40))


def tfds_folder(root: Path, name: str) -> tuple[str, ...]:
    classes, splits = TFDS[name]
    names = classes if isinstance(classes, tuple) else tuple(f"class_{i:03d}" for i in range(classes))
    examples = {
        split: [(jpeg(100 * at + label), label) for at in range(each) for label in range(len(names))]
        for split, each in splits.items()
    }
    write_dataset(root / "set", LabeledImages(name, names, examples))
    return ("data.name=null", f"data.root={root / 'set'}")


def class_folders(root: Path) -> tuple[str, ...]:
    number = 0
    for split, each in (("train", 16), ("validation", 4), ("test", 4)):
        for name in FLOWERS:
            folder = root / "dataset" / split / name
            folder.mkdir(parents=True)
            for at in range(each):
                (folder / f"{at}.jpg").write_bytes(jpeg(number := number + 1))
    return (f"data.root={root / 'dataset'}",)


def record_files(root: Path) -> tuple[str, ...]:
    (root / "records").mkdir()
    for file in range(6):
        with tf.io.TFRecordWriter(str(root / "records" / f"{file}.tfrec")) as writer:
            for at in range(20):
                writer.write(serialize_record(image=jpeg(100 * file + at), **{"class": at % 5}))
    return (f"data.pattern={root / 'records'}/*.tfrec",)


def images_of(root: Path, name: str) -> tuple[str, ...]:
    if name in TFDS:
        return tfds_folder(root, name)
    return record_files(root) if name in RECORDS else class_folders(root)


def small(name: str, model: str | None = None) -> tuple[str, ...]:
    """Overrides for a preset: two steps per phase, small images, random weights."""
    config = preset(name, *((f"model={model}",) if model else ()))
    phases = [f"phases.{p}.{key}" for p in config.phases for key in ("epochs=null", "steps=2")]
    return (
        f"experiment={name}", *((f"model={model}",) if model else ()), "model.weights=none", "training.batch_size=16",
        f"model.image_size={SMALLEST.get(config.model.backbone, 48)}", *phases, "export.formats=[saved_model]",
        "runtime.precision=float32", "runtime.progress=lines", "runtime.deterministic=false",
    )  # fmt: skip


def trained_parameters(thaw: str, norm: str, network: keras.Model, hidden: int | None, classes: int) -> int:
    """Count the trainable parameters of a phase by its rule in the recipe, on Keras' network."""
    layers = network.layers
    first = {"none": len(layers), "all": 0}.get(thaw)
    kind, _, value = thaw.partition(":")
    if kind == "from_layer":
        first = int(value)
    elif kind == "percent":
        first = int(len(layers) * (1 - int(value) / 100))
    assert first is not None, thaw
    free = [x for x in layers[first:] if norm != "frozen" or not isinstance(x, keras.layers.BatchNormalization)]
    width = network.output_shape[-1]
    units = [width, *([hidden] if hidden else []), classes]
    head = sum((before + 1) * after for before, after in itertools.pairwise(units))
    return head + sum(int(np.prod(w.shape)) for layer in free for w in layer.trainable_weights)


def check_against_registry(name: str, out: Path, model: str | None, classes: int) -> None:
    """Compare parameters, optimizer and learning rates with the registry of recipes, not with the preset."""
    values = list_values(RECIPES[name])
    backbone, hidden = values["model.backbone"], values.get("model.hidden")
    report = json.loads((out / "report" / "report.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    side = SMALLEST.get(backbone, 48)
    make = getattr(keras.applications, "MobileNet" if model else backbone)
    narrow = {"alpha": 0.25} if model else {}
    network = make(weights=None, include_top=False, input_shape=(side, side, 3), **narrow)
    phases = list(RECIPES[name]["trainable"])
    for phase in phases:
        thaw, norm = (values.get(f"phases.{phase}.{key}", "frozen") for key in ("thaw", "batch_norm"))
        expected = trained_parameters(thaw, norm, network, hidden, classes)
        assert report["phases"][phase]["trainable_parameters"] == expected, (phase, thaw)
        decay = DECAYS.get((name, phase), lambda _: 1.0)
        for kind, step in (("train", 1), ("epoch", 2)):  # of the last step taken, and of the next one
            (rate,) = {line["learning_rate"] for line in lines if (line["kind"], line["phase"]) == (kind, phase)}
            assert rate == pytest.approx(values[f"phases.{phase}.optimizer.learning_rate"] * decay(step), rel=1e-6)
    slots = {key.rsplit("_", 1)[-1] for key in variables_of(out, "LATEST") if key.startswith("optimizer/")}
    assert {key for key in slots if "/" not in key} == SLOTS[values[f"phases.{phases[-1]}.optimizer.name"]]


def check(name: str, out: Path, model: str | None = None) -> None:
    config = preset(name, *((f"model={model}",) if model else ()))
    report = json.loads((out / "report" / "report.json").read_text())
    assert list(report["phases"]) == list(config.phases)
    for file in ("run.json", "ledger.json", "report/index.html", "report/predictions.csv", "export/model_card.md",
                 "checkpoints/LATEST", "checkpoints/BEST"):  # fmt: skip
        assert (out / file).stat().st_size, file
    assert yaml.safe_load((out / "config.yaml").read_text())["experiment_name"] == name
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert {line["phase"] for line in lines if line["kind"] == "epoch"} == set(config.phases)
    assert all(np.isfinite(line["loss"]) for line in lines if line["kind"] == "epoch")
    assert (out / "export" / "saved_model" / "1" / "saved_model.pb").exists()
    labels = (out / "export" / "labels.txt").read_text().split()
    classes = TFDS[name][0] if name in TFDS else FLOWERS
    names = [f"class_{i:03d}" for i in range(classes)] if isinstance(classes, int) else list(classes)
    assert labels == names
    with open(out / "report" / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["truth"] for row in rows} <= set(names)  # a label is a class, never a one-hot row
    assert len(rows) == report["test"]["n"] == SCORED[name]
    assert ("top_5" in report["test"]) == (len(names) > 5)
    if name in RECIPES:
        check_against_registry(name, out, model, len(names))
    assert (out / "DONE").exists()


@pytest.mark.parametrize("name", RECORDS)
def test_the_record_files_of_a_preset_are_opened(name: str, tmp_path: Path) -> None:
    """A run then reads them as it reads the records of a TFDS folder, which the next test has."""
    config = preset(name, *images_of(tmp_path, name), f"runtime.cache_dir={tmp_path / 'cache'}")
    dataset = stage_and_open_run_dataset(config, print, lambda _: None).dataset
    assert dataset.class_names == FLOWERS
    assert {split: len(opened.shards) for split, opened in dataset.splits.items()} == {"train": 5, "validation": 1}
    assert dataset.splits["validation"].count == SCORED[name]
    np.testing.assert_array_equal(dataset.splits["train"].labels, np.arange(100) % 5)
    numbers = {"validation": range(20), "train": [100 * file + at for file in range(1, 6) for at in range(20)]}
    for split, expected in numbers.items():
        assert read_encoded_images(dataset.splits[split]) == [jpeg(number) for number in expected]


@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["beans_xception", pytest.param("flowers_tfrecords_xception", marks=pytest.mark.slow)])
def test_a_preset_of_folders_and_one_of_records_run(name: str, tmp_path: Path) -> None:
    overrides = (*small(name, SMALLER[name]), "model.alpha=0.25", *images_of(tmp_path, name))
    train(*overrides, f"output_dir={tmp_path / 'run'}")
    check(name, tmp_path / "run", SMALLER[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [*TFDS, *FOLDERS, *RECORDS])
def test_every_preset_runs(name: str, tmp_path: Path) -> None:
    train(*small(name), *images_of(tmp_path, name), f"output_dir={tmp_path / 'run'}")
    check(name, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_distilled_preset_learns_from_the_run_before(tmp_path: Path) -> None:
    images = class_folders(tmp_path)
    train(*small("flowers_efficientnet_b0", "efficientnet_b4"), *images, f"output_dir={tmp_path / 'teacher'}")
    name = "flowers_efficientnet_b0_distilled"
    train(*small(name), *images, f"distillation.teacher={tmp_path / 'teacher'}", f"output_dir={tmp_path / 'run'}")
    check(name, tmp_path / "run")


def test_all_presets_are_tested() -> None:
    tested = {*TFDS, *FOLDERS, *RECORDS, *CHOSEN_BY_DATA, "flowers_efficientnet_b0_distilled", "quickstart"}
    assert tested == set(PRESETS)
