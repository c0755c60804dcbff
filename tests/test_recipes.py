"""Every preset has the values of its recipe, and no others."""

import json
import re
import shlex
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel

from scripts.recipes_page import read_commands, read_registry
from trainer.cli.compose import compose
from trainer.config.auto import resolve_auto
from trainer.config.base import Duration
from trainer.config.schema import Phase, RunConfig, validate_config, validate_resolved_config
from trainer.models.backbones import find_backbone
from trainer.models.classifier import build_classifier, count_parameters
from trainer.models.freezing import set_trainable_layers
from trainer.training.optimizers import build_schedule

ROOT = Path(__file__).parent.parent
PRESETS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
# Required arguments of presets.
GIVEN = {
    "photos": ("data.root=photos",),
    "flowers_efficientnet_b0": ("data.root=photos",),
    "flowers_efficientnet_b0_stepwise": ("data.root=photos",),
    "flowers_efficientnet_b0_distilled": ("data.root=photos", "distillation.teacher=outputs/teacher"),
    "xception_image_folder": ("data.root=dataset",),
    "xception_medical": ("data.root=dataset",),
}
RECIPES = read_registry()
EPOCH = 1000  # steps of an epoch, for schedules that count in epochs
SCHEMA = json.loads((ROOT / "conf" / "config.schema.json").read_text())
FLOWERS = ("daisy", "dandelion", "roses", "sunflowers", "tulips")
# Rates of a phase at steps, where they change: the decay of every recipe is continuous.
RATES: dict[tuple[str, str], dict[int, float]] = {
    ("flowers_efficientnet_b0", "head"): {0: 1e-3, 500: 1e-3 * 0.9**0.5, 1000: 9e-4, 3000: 7.29e-4},
    ("flowers_efficientnet_b0_stepwise", "thaw_2"): {0: 1e-5, 500: 1e-5 * 0.9**0.5, 1000: 9e-6},
    ("beans_xception", "head"): {0: 0.2, 100: 0.1, 300: 0.05},
    ("beans_xception", "fine_tune"): {0: 0.01, 1000: 0.005},
}
# Keys with which a preset names or describes its run; a recipe has no number for them.
UNPUBLISHED = ("experiment_name", "distillation.teacher", "runtime.", "debug.", "export.", "seed")


@cache
def composed(name: str, *changes: str) -> dict[str, Any]:
    return compose([f"experiment={name}", *GIVEN.get(name, ()), *changes]) or {}


def preset(name: str, *changes: str) -> RunConfig:
    return validate_resolved_config(composed(name, *changes))


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """The values of a configuration by key. A duration is one value, as it is written."""
    flat: dict[str, Any] = {}
    for name, value in dict(tree).items():
        if isinstance(value, Duration):
            flat[prefix + name] = f"{value.count:g} {value.unit}"
        elif isinstance(value, dict | BaseModel):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def values_of_preset(name: str) -> dict[str, Any]:
    config = preset(name)
    size = config.model.image_size or find_backbone(config.model.backbone).default_size
    return flatten(config) | {"model.image_size": size}


def test_every_preset_is_in_the_registry() -> None:
    others = ("quickstart", "photos")
    assert set(RECIPES) == {name for name in PRESETS if name not in others and not name.endswith("_strong")}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes_fits_the_schema_and_opens_with_its_command(name: str) -> None:
    config = validate_config(composed(name))
    assert config.experiment_name == (None if name == "photos" else name)  # the report has the name of the folder
    text = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text()
    for tree in (composed(name), config.model_dump(mode="json"), yaml.safe_load(text)):
        jsonschema.validate(tree, SCHEMA)
    head = text.split("defaults:")[0]
    if name != "quickstart":
        assert f"python -m trainer experiment={name}" in head
    assert re.search(r"ublished|easured|aim", head), "name the source of its score"


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_has_every_value_of_its_recipe(name: str) -> None:
    actual, recipe = values_of_preset(name), RECIPES[name]
    assert {key: actual.get(key) for key in recipe["values"]} == recipe["values"]
    for departure in recipe["departures"]:
        assert departure["why"]
        assert departure["recipe"] != departure["here"]
        if key := departure.get("key"):
            assert key not in recipe["values"]
            assert actual[key] == departure["here"], key


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_changes_nothing_that_its_recipe_does_not_have(name: str) -> None:
    """Every value other than the default is published, or a departure with a reason."""
    actual, recipe = values_of_preset(name), RECIPES[name]
    explained = {*recipe["values"], *(departure.get("key") for departure in recipe["departures"])}
    defaults = flatten(
        preset("quickstart", "data=image_folder", "data.root=photos", "model=vgg16", "augmentation=none")
    )
    phases = preset(name).phases
    defaults |= {f"phases.{phase}.{key}": value for phase in phases
                 for key, value in flatten(Phase(thaw="none", epochs=1)).items()}  # fmt: skip
    changed = {key for key, value in actual.items() if value != defaults.get(key) and not key.startswith(UNPUBLISHED)}
    assert changed - explained - {"data.root"} == set()


@pytest.mark.parametrize(("name", "phase"), RATES)
def test_a_rate_decays_as_in_the_recipe(name: str, phase: str) -> None:
    config = preset(name)
    actual = config.phases[phase]
    rate = build_schedule(actual.schedule, actual.optimizer.learning_rate, total_steps=20 * EPOCH,
                          steps_per_epoch=EPOCH, batch_size=32)  # fmt: skip
    for step, value in RATES[name, phase].items():
        assert float(rate(step)) == pytest.approx(value, rel=1e-5), step


@pytest.mark.parametrize(
    ("name", "overrides", "size"),
    [
        ("flowers_efficientnet_b0", ("model=efficientnet_b4",), None),
        ("beans_xception", ("model=inception_v3",), None),
        ("beans_xception", ("model=resnet50", "model.image_size=192"), 192),
        ("stanford_dogs_mobilenet_v2", ("model=mobilenet_v2",), 160),
        ("stanford_dogs_mobilenet_v2", ("model.backbone=MobileNet",), 224),
    ],
)
def test_another_model_has_its_own_size_unless_one_is_given(
    name: str, overrides: tuple[str, ...], size: int | None
) -> None:
    before, after = preset(name).model, preset(name, *overrides).model
    assert after.image_size == size
    assert (after.hidden, after.dropout) == (before.hidden, before.dropout)


@pytest.mark.parametrize("name", RECIPES)
def test_a_preset_that_scores_its_last_weights_names_the_setting_for_the_best(name: str) -> None:
    assert preset(name).training.keep == "last"
    header = (ROOT / "conf" / "experiment" / f"{name}.yaml").read_text().split("defaults:")[0]
    assert f"training.keep=best output_dir=outputs/{name}_best" in header
    assert preset(name, "training.keep=best", f"output_dir=outputs/{name}_best").training.keep == "best"


@pytest.mark.parametrize("name", RECIPES)
def test_the_commands_of_a_preset_compose(name: str) -> None:
    """Those in its header, which docs/recipes.md repeats."""
    commands = "\n".join(read_commands(name)).replace("\\\n", " ").splitlines()
    own = [shlex.split(command)[3:] for command in commands if f"experiment={name} " in f"{command} "]
    assert own
    for arguments in own:
        config = validate_config(compose(arguments) or {})
        assert config.data.source == preset(name).data.source or "data=image_folder" in arguments


def test_the_page_has_the_command_of_every_preset() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text().splitlines()
    for name in (name for name in PRESETS if name not in ("quickstart", "photos")):
        assert read_commands(name)
        assert [line for line in read_commands(name) if line not in page] == []


def test_the_teacher_of_the_distilled_preset_trains_at_its_own_380_pixels() -> None:
    command = "\n".join(read_commands("flowers_efficientnet_b0_distilled")).replace("\\\n", " ").splitlines()[0]
    model = validate_resolved_config(compose(shlex.split(command)[3:]) or {}).model
    assert (model.backbone, model.image_size) == ("EfficientNetB4", None)
    assert find_backbone(model.backbone).default_size == 380


def test_the_two_augmentations_of_the_flower_folders_are_alternatives() -> None:
    one = preset("flowers_efficientnet_b0").augmentation
    other = preset("flowers_efficientnet_b0", "augmentation=flowers_in_graph").augmentation
    assert (one.rotation, one.shift, one.shear, one.stretch, one.contrast) == (40, 0.2, 0.2, 0.2, 0)
    assert (other.rotation, other.shift, other.contrast, other.zoom, other.flip_horizontal) == (108, 0, 0.2, 0.2, False)


def count_trainable(name: str, phase: str) -> int:
    model, recipe = preset(name).model, RECIPES[name]
    size = {"Xception": 71, "InceptionV3": 75}.get(model.backbone, 32)
    network = build_classifier(model.model_copy(update={"weights": "none", "image_size": size}), recipe["classes"], 1)
    settings = preset(name).phases[phase]
    return count_parameters(set_trainable_layers(network, settings.thaw, settings.batch_norm).trainable.values())


def test_the_flowers_of_the_notebook_train_as_many_parameters_as_it_prints() -> None:
    assert count_trainable("flowers_mobilenet_v2", "fine_tune") == 1_867_845
    assert RECIPES["flowers_mobilenet_v2"]["trainable"]["fine_tune"] == 1_867_845


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_every_preset_trains_the_parameters_in_the_registry(name: str) -> None:
    assert {phase: count_trainable(name, phase) for phase in preset(name).phases} == RECIPES[name]["trainable"]


@pytest.mark.parametrize(
    ("images", "backbone", "epochs", "batch"), [(400, "MobileNetV2", 30, 16), (60_000, "EfficientNetB0", 15, 64)]
)
def test_the_preset_for_photos_is_strong_and_chooses_the_rest(
    images: int, backbone: str, epochs: int, batch: int
) -> None:
    requested = validate_config(composed("photos"))
    assert requested.auto_keys == ["phases", "model.backbone", "training.batch_size"]
    config, reasons = resolve_auto(requested, images, 5)
    assert len(reasons) == 3
    assert (config.model.backbone, config.training.batch_size, config.model.weights) == (backbone, batch, "imagenet")
    head, fine_tune = config.phases.values()
    assert (head.thaw, fine_tune.thaw, fine_tune.epochs) == ("none", "all", epochs)
    strong = preset("flowers_mobilenet_v2_strong")
    assert (config.augmentation, config.phases["head"]) == (strong.augmentation, strong.phases["head"])
    assert (config.training.ema, config.training.label_smoothing) == (0.99, 0.1)
    assert (config.data.validation_fraction, config.data.test_fraction) == (0.15, 0.15)


def test_the_strong_presets_score_the_best_epoch_of_the_whole_validation_split() -> None:
    for name in (name for name in PRESETS if name.endswith("_strong")):
        training = preset(name).training
        assert (training.keep, training.validation_share) == ("best", 1.0)


SWITCHES = [
    ("augmentation=strong", "phases=progressive", "model=vgg16", "debug=fast", "runtime=pod"),
    ("phases=head_only", "runtime=gpu"),
    ("runtime=gpu_pod",),
]


@pytest.mark.parametrize(
    ("name", "changes"),  # the quick ones have each preset once, and the switches in turn
    [
        pytest.param(name, changes, marks=() if (i + k) % len(SWITCHES) == 0 else pytest.mark.slow)
        for i, name in enumerate(PRESETS)
        for k, changes in enumerate(SWITCHES)
    ],
)
def test_switches_compose_with_every_preset(name: str, changes: tuple[str, ...]) -> None:
    validate_config(compose([f"experiment={name}", *GIVEN.get(name, ()), *changes]) or {})
