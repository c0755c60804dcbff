"""Every preset has the values of its recipe, and no others."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from trainer.cli.compose import compose
from trainer.config.auto import resolve_auto
from trainer.config.schema import RunConfig, load, load_resolved
from trainer.training.optimizers import build_schedule

ROOT = Path(__file__).parent.parent
PRESETS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
# Required arguments of presets.
GIVEN = {
    "photos": ("data.root=photos",),
    "flowers_efficientnet_b0": ("data.root=photos",),
    "flowers_efficientnet_b0_distilled": ("data.root=photos", "distillation.teacher=outputs/teacher"),
    "xception_image_folder": ("data.root=dataset",),
    "xception_medical": ("data.root=dataset",),
}
EPOCH = 1000  # steps of an epoch, for schedules that count in epochs
SCHEMA = json.loads((ROOT / "conf" / "config.schema.json").read_text())
FLOWERS = ("daisy", "dandelion", "roses", "sunflowers", "tulips")

# preset: (backbone, pixels, batch, dropout, hidden, phases); a phase: (thaw, batch norm, epochs, optimizer, rates at steps)
TABLE: dict[str, tuple[Any, ...]] = {
    "flowers_efficientnet_b0": (
        "EfficientNetB0", 224, 32, 0.0, 256,
        {"head": ("none", "frozen", 20, ("adam", {}), {0: 1e-3, 500: 1e-3 * 0.9**0.5, 1000: 9e-4, 3000: 7.29e-4}),
         "fine_tune": ("percent:20", "frozen", 20, ("adam", {}), {0: 1e-3, 500: 1e-3 * 0.9**0.5, 1000: 9e-4})},
    ),
    "flowers_efficientnet_b0_distilled": (
        "EfficientNetB0", 224, 32, 0.0, 256,
        {"head": ("none", "frozen", 20, ("adam", {}), {0: 1e-3, 1000: 9e-4}),
         "fine_tune": ("percent:20", "frozen", 20, ("adam", {}), {0: 1e-3, 1000: 9e-4})},
    ),
    "xception_image_folder": (
        "Xception", 299, 32, 0.5, 1024,
        {"head": ("none", "frozen", 10, ("adam", {}), {0: 1e-3, 9000: 1e-3}),
         "fine_tune": ("from_layer:100", "frozen", 11, ("adam", {}), {0: 1e-4, 9000: 1e-4})},
    ),
    "xception_medical": (
        "Xception", 299, 32, 0.5, 1024,
        {"head": ("none", "frozen", 10, ("adam", {}), {0: 1e-3}),
         "fine_tune": ("from_layer:100", "frozen", 11, ("adam", {}), {0: 1e-4})},
    ),
    "food101_efficientnet_b0": (
        "EfficientNetB0", 224, 32, 0.0, None,
        {"head": ("none", "frozen", 3, ("adam", {}), {0: 1e-3, 2999: 1e-3}),
         "fine_tune": ("all", "frozen", 3, ("adam", {}), {0: 1e-4, 2999: 1e-4})},
    ),
    "flowers_mobilenet_v2": (
        "MobileNetV2", 160, 32, 0.2, None,
        {"head": ("none", "frozen", 5, ("adam", {}), {0: 1e-3, 4999: 1e-3}),
         "fine_tune": ("from_layer:100", "frozen", 5, ("adam", {}), {0: 1e-5, 4999: 1e-5})},
    ),
    "beans_xception": (
        "Xception", 224, 32, 0.5, None,
        {"head": ("none", "frozen", 10, ("sgd", {"momentum": 0.9}), {0: 0.2, 100: 0.1, 300: 0.05}),
         "fine_tune": ("all", "train", 10, ("sgd", {"momentum": 0.9, "nesterov": True}), {0: 0.01, 1000: 0.005})},
    ),
    "beans_inception_v3": (
        "InceptionV3", 224, 32, 0.5, None,
        {"head": ("none", "frozen", 10, ("rmsprop", {}), {0: 0.1, 9999: 0.1}),
         "fine_tune": ("all", "train", 10, ("rmsprop", {}), {0: 1e-4, 9999: 1e-4})},
    ),
    "stanford_dogs_mobilenet_v2": (
        "MobileNetV2", 224, 32, 0.5, None,
        {"head": ("none", "frozen", 5, ("adamax", {}), {0: 0.005, 4999: 0.005}),
         "fine_tune": ("all", "train", 3, ("adamax", {}), {0: 1e-5, 2999: 1e-5})},
    ),
    "flowers_tfrecords_xception": (
        "Xception", 192, 64, 0.0, None,
        {"all": ("all", "train", 5, ("adam", {}), {0: 1e-4, 4999: 1e-4})},
    ),
    "rock_paper_scissors_xception": (
        "Xception", 224, 64, 0.0, None,
        {"all": ("all", "train", 10, ("adam", {}), {0: 1e-5, 9999: 1e-5})},
    ),
}  # fmt: skip
# preset: where its images come from and how they are split and changed
DATA: dict[str, dict[str, Any]] = {
    "food101_efficientnet_b0": {"source": "tfds", "name": "food101", "train_split": "train",
                                "validation_split": "validation"},
    "flowers_mobilenet_v2": {"source": "tfds", "name": "tf_flowers", "train_split": "train[:80%]",
                             "validation_split": "train[80%:]"},
    "beans_xception": {"source": "tfds", "name": "beans", "shuffle_window": 250},
    "beans_inception_v3": {"source": "tfds", "name": "beans", "shuffle_window": 250},
    "stanford_dogs_mobilenet_v2": {"source": "tfds", "name": "stanford_dogs", "train_split": "train",
                                   "validation_split": "test[:50%]", "test_split": "test[50%:]"},
    "flowers_tfrecords_xception": {"source": "tfrecords", "validation_fraction": 0.19, "class_names": FLOWERS,
                                   "image_field": "image", "label_field": "class", "shuffle_window": 100,
                                   "pattern": "gs://flowers-public/tfrecords-jpeg-192x192-2/*.tfrec"},
    "rock_paper_scissors_xception": {"source": "tfds", "name": "rock_paper_scissors", "train_split": "train",
                                     "validation_split": "test"},
}  # fmt: skip
FOLDER = {"flip_horizontal": True, "shift": 0.2, "shear": 0.2, "stretch": 0.2}
TWICE = {**FOLDER, "rotation": (40, 108), "zoom": 0.2, "contrast": 0.2}
CHANGES: dict[str, dict[str, Any]] = {
    "flowers_efficientnet_b0": TWICE,
    "flowers_efficientnet_b0_distilled": TWICE,
    "xception_image_folder": {**FOLDER, "rotation": 20, "fill": "nearest"},
    "xception_medical": {"rotation": 10, "shift": 0.1, "stretch": 0.1, "flip_horizontal": False, "fill": "constant"},
    "flowers_mobilenet_v2": {"flip_horizontal": True, "rotation": 72, "zoom": 0.2, "fill": "reflect"},
}


@cache
def composed(name: str, *changes: str) -> dict[str, Any]:
    return compose([f"experiment={name}", *GIVEN.get(name, ()), *changes]) or {}


def preset(name: str, *changes: str) -> RunConfig:
    return load_resolved(composed(name, *changes))


def test_every_preset_is_in_the_table() -> None:
    others = ("quickstart", "photos")
    assert set(TABLE) == {name for name in PRESETS if name not in others and not name.endswith("_strong")}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes_fits_the_schema_and_opens_with_its_command(name: str) -> None:
    config = load(composed(name))
    assert config.experiment_name == (None if name == "photos" else name)  # the report has the name of the folder
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    for tree in (composed(name), config.model_dump(mode="json"), yaml.safe_load(text)):
        jsonschema.validate(tree, SCHEMA)
    head = text.split("defaults:")[0]
    if name != "quickstart":
        assert f"python -m trainer experiment={name}" in head
    assert re.search(r"ublished|easured|aim", head), "name the source of its score"


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_its_recipe(name: str) -> None:
    backbone, pixels, batch, dropout, hidden, phases = TABLE[name]
    config = preset(name)
    model, training = config.model, config.training
    assert (model.backbone, model.image_size, training.batch_size) == (backbone, pixels, batch)
    assert (model.dropout, model.hidden, model.weights) == (dropout, hidden, "imagenet")
    assert list(config.phases) == list(phases)
    for phase, (thaw, norm, epochs, (optimizer, options), rates) in phases.items():
        actual = config.phases[phase]
        assert (actual.thaw, actual.batch_norm, actual.epochs) == (thaw, norm, epochs)
        assert (actual.optimizer.name, actual.optimizer.options) == (optimizer, options)
        rate = build_schedule(actual.schedule, actual.optimizer.learning_rate, total_steps=EPOCH * epochs,
                              steps_per_epoch=EPOCH, batch_size=batch)  # fmt: skip
        for step, value in rates.items():
            assert float(rate(step)) == pytest.approx(value, rel=1e-5), (phase, step)
    for key, value in DATA.get(name, {"source": "image_folder"}).items():
        assert getattr(config.data, key) == value, key


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_augments_as_its_recipe_does(name: str) -> None:
    actual = preset(name).augmentation
    if name in CHANGES:
        assert {key: getattr(actual, key) for key in CHANGES[name]} == CHANGES[name]
    else:
        assert not actual.active


@pytest.mark.parametrize(
    ("images", "backbone", "epochs", "batch"), [(400, "MobileNetV2", 30, 16), (60_000, "EfficientNetB0", 15, 64)]
)
def test_the_preset_for_photos_is_strong_and_chooses_the_rest(
    images: int, backbone: str, epochs: int, batch: int
) -> None:
    requested = load(composed("photos"))
    assert requested.autos == ["phases", "model.backbone", "training.batch_size"]
    config, reasons = resolve_auto(requested, images, 5)
    assert len(reasons) == 3
    assert (config.model.backbone, config.training.batch_size, config.model.weights) == (backbone, batch, "imagenet")
    head, fine_tune = config.phases.values()
    assert (head.thaw, fine_tune.thaw, fine_tune.epochs) == ("none", "all", epochs)
    strong = preset("flowers_mobilenet_v2_strong")
    assert (config.augmentation, config.phases["head"]) == (strong.augmentation, strong.phases["head"])
    assert (config.training.ema, config.training.label_smoothing) == (0.99, 0.1)
    assert (config.data.validation_fraction, config.data.test_fraction) == (0.15, 0.15)


def test_settings_of_single_recipes() -> None:
    food, distilled = preset("food101_efficientnet_b0"), preset("flowers_efficientnet_b0_distilled")
    assert (food.runtime.precision, food.training.validation_share, food.training.keep) == ("float16", 0.1, "last")
    assert distilled.distillation is not None
    assert (distilled.distillation.alpha, distilled.distillation.temperature) == (0.1, 1.0)
    for phase in preset("flowers_efficientnet_b0").phases.values():
        assert phase.early_stopping.patience == 3


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "changes",
    [
        ("augmentation=strong", "phases=progressive", "model=vgg16", "debug=fast", "runtime=pod"),
        ("phases=head_only", "runtime=gpu"),
        ("runtime=gpu_pod",),
    ],
)
def test_switches_compose_with_every_preset(name: str, changes: tuple[str, ...]) -> None:
    load(compose([f"experiment={name}", *GIVEN.get(name, ()), *changes]) or {})
