"""Every preset says what its recipe says, and nothing that it does not."""

import re
from pathlib import Path
from typing import Any

import pytest

from trainer.cli.compose import compose
from trainer.config.schema import RunConfig, load
from trainer.training.optimizers import build_schedule

ROOT = Path(__file__).parent.parent
PRESETS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
# What a preset leaves to its user.
GIVEN = {
    "flowers_efficientnet_b0": ("data.root=photos",),
    "flowers_efficientnet_b0_distilled": ("data.root=photos", "distillation.teacher=outputs/teacher"),
    "xception_image_folder": ("data.root=dataset",),
    "xception_medical": ("data.root=dataset",),
}
EPOCH = 1000  # steps of an epoch, for schedules that count in epochs
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


def preset(name: str, *more: str) -> RunConfig:
    return load(compose([f"experiment={name}", *GIVEN.get(name, ()), *more]) or {})


def test_every_preset_of_the_list_is_there() -> None:
    assert set(TABLE) <= set(PRESETS)
    assert [
        name for name in PRESETS if name not in TABLE and name != "quickstart" and not name.endswith("_strong")
    ] == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes_and_opens_with_its_command(name: str) -> None:
    config = preset(name)
    assert config.experiment_name == name
    head = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    if name != "quickstart":
        assert f"python -m trainer experiment={name}" in head
    assert re.search(r"ublished|easured|aim", head), "say where its score comes from"


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_is_its_recipe(name: str) -> None:
    backbone, pixels, batch, dropout, hidden, phases = TABLE[name]
    config = preset(name)
    model, training = config.model, config.training
    assert (model.backbone, model.image_size, training.batch_size) == (backbone, pixels, batch)
    assert (model.dropout, model.hidden, model.weights) == (dropout, hidden, "imagenet")
    assert list(config.phases) == list(phases)
    for phase, (thaw, norm, epochs, (optimizer, options), rates) in phases.items():
        said = config.phases[phase]
        assert (said.thaw, said.batch_norm, said.epochs) == (thaw, norm, epochs)
        assert (said.optimizer.name, said.optimizer.options) == (optimizer, options)
        rate = build_schedule(said.schedule, said.optimizer.learning_rate, total_steps=EPOCH * epochs,
                              steps_per_epoch=EPOCH, batch_size=batch)  # fmt: skip
        for step, value in rates.items():
            assert float(rate(step)) == pytest.approx(value, rel=1e-5), (phase, step)
    for key, value in DATA.get(name, {"source": "image_folder"}).items():
        assert getattr(config.data, key) == value, key


@pytest.mark.parametrize("name", TABLE)
def test_a_preset_changes_its_images_as_its_recipe_does(name: str) -> None:
    said = preset(name).augmentation
    if name in CHANGES:
        assert {key: getattr(said, key) for key in CHANGES[name]} == CHANGES[name]
    else:
        assert not said.active


def test_what_only_one_recipe_does() -> None:
    food, distilled = preset("food101_efficientnet_b0"), preset("flowers_efficientnet_b0_distilled")
    assert (food.runtime.precision, food.training.validation_share, food.training.keep) == ("float16", 0.1, "last")
    assert distilled.distillation is not None
    assert (distilled.distillation.alpha, distilled.distillation.temperature) == (0.1, 1.0)
    for phase in preset("flowers_efficientnet_b0").phases.values():
        assert phase.early_stopping.patience == 3


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize(
    "change",
    [
        "augmentation=strong",
        "phases=progressive",
        "phases=head_only",
        "model=vgg16",
        "debug=fast",
        "runtime=pod",
        "runtime=gpu",
        "runtime=gpu_pod",
    ],
)
def test_switches_compose_with_every_preset(name: str, change: str) -> None:
    preset(name, change)
