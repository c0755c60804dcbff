"""What the configuration refuses, and how it says so."""

from typing import Any

import pytest

from trainer.config.base import Duration
from trainer.config.diff import differences, in_common
from trainer.config.schema import RunConfig, load
from trainer.errors import ConfigError


def tree(**changes: Any) -> dict[str, Any]:
    whole: dict[str, Any] = {
        "data": {"source": "digits"},
        "model": {"backbone": "MobileNetV2"},
        "phases": {"head": {"thaw": "none", "epochs": 3}},
    }
    for key, value in changes.items():
        branch = whole
        *path, last = key.split("__")
        for name in path:
            branch = branch.setdefault(name, {})
        branch[last] = value
    return whole


def fault(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tree(**changes))
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"modle": {}}, "modle: there is no such key. Did you mean model?"),
        ({"model__backbon": "X"}, "model.backbon: there is no such key. Did you mean backbone?"),
        ({"phases__head__optimizer": {"lr": 1}}, "phases.head.optimizer.lr: there is no such key. Known: name, learning_rate"),
        ({"phases__haed": {"epochs": 2}}, "phases.haed.thaw: the phase 'haed' does not say what trains. Did you mean head?"),
        ({"seed": -1}, "seed: input should be greater than or equal to 0 (is -1)"),
        ({"phases__head__epochs": "many"}, "phases.head.epochs: input should be a valid number"),
        ({"phases__head__steps": 5}, "phases.head: set exactly one of epochs, steps, examples (epochs and steps are set"),
        ({"phases__head__thaw": "half"}, "phases.head: thaw='half' is not none, all, from_layer:N"),
        ({"phases__head__thaw": "last_blocks:few"}, "phases.head: thaw='last_blocks:few' is not none, all"),
        ({"phases__head__layer_decay": 1.1}, "phases.head.layer_decay: input should be less than or equal to 1 (is 1.1)"),
        ({"phases__head__backbone_rate": 0}, "phases.head.backbone_rate: input should be greater than 0 (is 0)"),
        ({"phases__head__features": "cached", "augmentation__zoom": 0.1},
         "phases.head.features=cached: with augmentation, say how many fixed views of each image, augmented_views=4"),
        ({"phases__head": {"thaw": "none", "epochs": 3, "features": "cached", "augmented_views": 2}, "augmentation__mixup": 0.1},
         "phases.head.features=cached: augmentation.mixup and cutmix mix other images in every epoch; say features=auto or live"),
        ({"phases__head": {"thaw": "none", "epochs": 3, "features": "cached", "augmented_views": 2}, "augmentation__zoom": 0.1,
          "distillation": {"teacher": "x"}},
         "phases.head.features=cached: the teacher answers in every step, for what augmentation made of the images"),
        ({"phases__head__augmented_views": 2},
         "phases.head.augmented_views=2: nothing augments, every view would be the same; leave it null"),
        ({"phases__head__augmented_views": 0}, "phases.head.augmented_views: input should be greater than or equal to 1"),
        ({"phases__head__optimizer": {"momentum": 0.9}}, "optimizer adam has no momentum; it takes beta_1, beta_2, epsilon"),
        ({"phases__head__schedule": {"name": "step"}}, "phases.head.schedule: schedule step needs decay and at"),
        ({"phases__head__schedule": {"warmup": "2 days"}}, 'write it as "500 steps", "2 epochs" or "10000 examples"'),
        ({"data": {"source": "image_folder"}}, "data: data.source=image_folder needs data.root"),
        ({"data": {"source": "tfds"}}, "data.source=tfds needs data.name (or data.root)"),
        ({"data": {"source": "tfrecords"}}, "data.source=tfrecords needs data.pattern and data.class_names"),
        ({"data": {"source": "web"}}, "data.source: input should be 'digits', 'image_folder', 'tfds' or 'tfrecords' (is 'web')"),
        ({"data__validation_fraction": 0.6, "data__test_fraction": 0.4}, "must leave something to train on"),
        ({"phases": {}}, "phases: dictionary should have at least 1 item"),
        ({"augmentation": {"rotation": "far"}}, "augmentation.rotation: degrees from 0 to 180, or two of them: [40, 108]"),
        ({"augmentation": {"rotation": [40, 200]}}, "or two of them: [40, 108] draws from each range and adds up (is [40, 200])"),
        ({"augmentation": {"rotation": 181}}, "augmentation.rotation: degrees from 0 to 180"),
        ({"augmentation": {"crop": 1}}, "augmentation.crop: input should be less than 1 (is 1)"),
        ({"augmentation": {"hue": 0.6}}, "augmentation.hue: input should be less than or equal to 0.5 (is 0.6)"),
        ({"augmentation": {"randaugment": 2.5}}, "augmentation.randaugment: input should be a valid integer"),
        ({"augmentation": {"magnitude": 31}}, "augmentation.magnitude: input should be less than or equal to 30 (is 31)"),
        ({"augmentation": {"mixup": -1}}, "augmentation.mixup: input should be greater than or equal to 0 (is -1)"),
        ({"augmentation": {"cut_mix": 1}}, "augmentation.cut_mix: there is no such key. Did you mean cutmix?"),
        ({"training": {"loss": "hinge"}}, "training.loss: input should be 'cross_entropy' or 'focal' (is 'hinge')"),
        ({"training": {"focal_gamma": 1}}, "training: focal_gamma=1 needs training.loss=focal"),
        ({"training": {"loss": "focal", "focal_gamma": -1}}, "training.focal_gamma: input should be greater than or equal to 0"),
        ({"distillation": {}}, "distillation.teacher: must be given"),
        ({"distillation": {"teacher": "x", "alhpa": 0.5}}, "distillation.alhpa: there is no such key. Did you mean alpha?"),
        ({"distillation": {"teacher": "x", "alpha": 1}}, "distillation.alpha: input should be less than 1 (is 1)"),
        ({"distillation": {"teacher": "x", "temperature": 0}}, "distillation.temperature: input should be greater than 0"),
        ({"data__group_field": "site"}, "data.group_field=site: data.source=digits has no fields beside image and label; only tfds"),
        ({"training": {"ema": 1.5}}, "training.ema: input should be less than 1 (is 1.5)"),
    ],
)  # fmt: skip
def test_each_fault_is_one_clear_sentence(changes: dict[str, Any], sentence: str) -> None:
    text = fault(**changes)
    assert text.startswith("the configuration has 1 fault:\n")
    assert sentence in text


ROWS = {
    row: {"all": {"thaw": "all", "epochs": 2}}
    for row in ("few_similar", "few_different", "many_similar", "many_different")
}


def auto(**changes: Any) -> dict[str, Any]:
    """A tree in which everything is `auto` that can be."""
    whole = tree(model__backbone="auto", training__batch_size="auto", **changes)
    return {**whole, "phases": {"auto": ROWS}}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": {"backbone": "auto", "weights": "glyphs"}}, "model: backbone=auto may choose any network, weights=glyphs fits one: say which"),
        ({"model": {"backbone": "auto", "alpha": 0.35}}, "model: backbone=auto may choose a network without alpha: unset alpha=0.35"),
        ({"phases": {"auto": ROWS, "head": {"epochs": 5}}}, "phases.auto: chooses all phases, but head is said beside it; leave that out, or choose a group such as phases=two_phase"),
        ({"phases": {"auto": {**ROWS, "domain": "near"}}}, "phases.auto.domain: input should be 'similar' or 'different' (is 'near')"),
        ({"phases": {"auto": {**ROWS, "few_similar": {"all": {"thaw": "half", "epochs": 2}}}}}, "phases.auto.few_similar.all: thaw='half' is not none"),
        ({"phases": {"auto": {**ROWS, "epochs": 3}}}, "phases.auto.epochs: there is no such key. Known: domain, few_similar"),
        ({"phases": {"auto": {"domain": "similar"} | {k: v for k, v in ROWS.items() if k != "few_similar"}}}, "phases.auto.few_similar: must be given"),
        ({"auto": {"backbone": True}}, "auto: there is no such key."),
        ({"training": {"batch_size": "many"}}, "training.batch_size: input should be a valid integer"),
    ],
)  # fmt: skip
def test_what_is_auto_is_checked_before_anything_is_chosen(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({**tree(), **changes})
    assert str(caught.value).startswith("the configuration has 1 fault:\n")
    assert sentence in str(caught.value)


def test_what_is_auto_waits_for_the_data_and_never_reaches_a_saved_configuration() -> None:
    config = load(auto())
    assert config.auto is not None
    assert (config.auto.backbone, config.auto.batch_size, list(config.auto.phases.few_similar)) == (True, True, ["all"])  # type: ignore[union-attr]
    assert load(tree()).auto is None
    assert "auto" not in config.model_dump()
    assert in_common(config)["auto.backbone"] is True  # two workers must leave the same things open


def test_every_fault_is_listed_at_once() -> None:
    text = fault(seed=-1, modle=1, model__alpha=-2, phases__head__epochs=0)
    assert text.startswith("the configuration has 4 faults:\n")
    assert len(text.splitlines()) == 5


def test_the_tree_is_frozen() -> None:
    config = load(tree())
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "steps"),
    [("2 epochs", 20), ("7 steps", 7), ("64 examples", 16), ("0.25 epochs", 2), ("1 examples", 1), (5, 5)],
)
def test_durations(text: Any, steps: int) -> None:
    config = load(tree(runtime__log_every=text))
    assert config.runtime.log_every.steps(steps_per_epoch=10, batch_size=4) == steps
    assert Duration(count=0, unit="steps").steps(10, 4) == 0


def changed(**changes: Any) -> list[str]:
    return differences(load(tree()), load(tree(**changes)))


def test_what_makes_another_run_is_told_apart_from_what_does_not() -> None:
    assert changed(seed=3) == ["seed: 42 -> 3"]
    assert changed(training__batch_size=64) == ["training.batch_size: 32 -> 64"]
    assert "phases.more.thaw: None -> all" in changed(phases__more={"thaw": "all", "epochs": 1})
    assert changed(runtime__log_every="3 steps", runtime__cache_dir="/x", resume="must", output_dir="/y") == []
    assert "distillation.teacher: None -> t" in changed(distillation={"teacher": "t"})
    assert changed(runtime__precision="bfloat16") == ["runtime.precision: float32 -> bfloat16"]
    assert changed(phases__head__epochs=5) == []  # a longer last phase extends the run
    assert changed(phases__head__epochs=2) == ["phases.head.epochs: 3.0 -> 2.0"]


def test_a_saved_configuration_loads_again() -> None:
    config = load(tree(phases__head__schedule={"name": "step", "decay": 0.1, "at": ["3 epochs", "9 steps"]}))
    assert RunConfig.model_validate(config.model_dump(mode="json")) == config
