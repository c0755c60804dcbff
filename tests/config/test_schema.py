"""The configuration: its errors, durations, differences, defaults and saved files."""

import re
from typing import Any

import pytest
import yaml

from tests.errors import raises
from trainer.cli.compose import compose, find_conf_folder
from trainer.config.base import RENAMED_KEYS, Duration
from trainer.config.diff import flatten, list_forbidden_changes, select_common_settings
from trainer.config.schema import RunConfig, parse_config, validate_config, validate_resolved_config
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


ROWS = {
    row: {"all": {"thaw": "all", "epochs": 2}}
    for row in ("few_similar", "few_different", "many_similar", "many_different")
}
CACHED = {"thaw": "none", "epochs": 3, "features": "cached", "augmented_views": 2}


@pytest.mark.parametrize(
    ("changes", "key", "value", "fix"),
    [
        ({"modle": {}}, "modle", None, r"^did you mean model\?$"),
        ({"model__backbon": "X"}, "model.backbon", None, r"^did you mean model.backbone\?$"),
        ({"phases__head__optimizer": {"lr": 1}}, "phases.head.optimizer.lr", None, "^did you mean phases.head.optimizer.learning_rate"),
        ({"phases__haed": {"epochs": 2}}, "phases.haed.thaw", None, r"^did you mean head\?$"),
        ({"seed": -1}, "seed", -1, "^use a value greater than or equal to 0$"),
        ({"phases__head__epochs": "many"}, "phases.head.epochs", "many", "^use a number$"),
        ({"phases__head__steps": 5}, "phases.head", None, "exactly one of epochs, steps, examples"),
        ({"phases__head__thaw": "half"}, "phases.head.thaw", "half", "^use none, all, from_layer:N"),
        ({"phases__head__features": "cached", "augmentation__zoom": 0.1}, "phases.head.features", "cached", "phases.head.augmented_views=4"),
        ({"phases__head": CACHED, "augmentation__mixup": 0.1}, "phases.head.features", "cached", "^use auto or live$"),
        ({"phases__head": CACHED, "augmentation__zoom": 0.1, "distillation": {"teacher": "x"}}, "phases.head.features", "cached", "^use auto or live$"),
        ({"phases__head__augmented_views": 2}, "phases.head.augmented_views", 2, "set it to null"),
        ({"phases__head__optimizer": {"momentum": 0.9}}, "phases.head.optimizer.name", "adam", "set momentum to null"),
        ({"phases__head__schedule": {"name": "step"}}, "phases.head.schedule.name", "step", "set decay and at"),
        ({"phases__head__schedule": {"warmup": "2 days"}}, "phases.head.schedule.warmup", "2 days", '"500 steps", "2 epochs"'),
        ({"data": {"source": "image_folder"}}, "data.source", "image_folder", "set data.root"),
        ({"data": {"source": "csv"}}, "data.source", "csv", "set data.root"),
        ({"data": {"source": "image_folder", "root": "x", "class_prefix": "n("}}, "data.class_prefix", "n(", "a backslash"),
        ({"data": {"source": "image_folder", "root": "x", "class_names": {"a": " "}}}, "data.class_names", None, "^write one, or leave"),
        ({"data": {"source": "image_folder", "root": "x", "class_names": {"a": True}}}, "data.class_names.a", True, "^use a text$"),
        ({"data": {"source": "image_folder", "root": "x", "class_names": ["a", None]}}, "data.class_names.1", None, "^use a text$"),
        ({"data": {"source": "image_folder", "root": "x", "class_names": 3}}, "data.class_names", 3, "^use a list, .* or a value for each name"),
        ({"data": {"source": "tfds"}}, "data.source", "tfds", r"set data.name \(or data.root\)"),
        ({"data": {"source": "tfrecords"}}, "data.source", "tfrecords", "set data.pattern and data.class_names"),
        ({"data__validation_fraction": 0.6, "data__test_fraction": 0.4}, "data", None, "less than 1"),
        ({"phases": {}}, "phases", None, "^use at least 1 item$"),
        ({"augmentation": {"rotation": "far"}}, "augmentation.rotation", "far", r"degrees from 0 to 180, or \[40, 108\]"),
        ({"augmentation": {"rotation": [40, 200]}}, "augmentation.rotation", [40, 200], "degrees from 0 to 180"),
        ({"augmentation": {"randaugment": 2.5}}, "augmentation.randaugment", 2.5, "^use a whole number$"),
        ({"training": {"loss": "hinge"}}, "training.loss", "hinge", "^use 'cross_entropy' or 'focal'$"),
        ({"training": {"class_weights": "even"}}, "training.class_weights", "even", "^use 'none' or 'balanced' or a value for each name"),
        ({"training": {"focal_gamma": 1}}, "training.focal_gamma", "1", "set training.loss=focal"),
        ({"training": {"batch_size": "many"}}, "training.batch_size", "many", "^use a whole number or 'auto'$"),
        ({"training": {"batch_size": 0}}, "training.batch_size", 0, "^use a value greater than or equal to 1 or 'auto'$"),
        ({"export": {"formats": ["saved_model", "tflite_int4"]}}, "export.formats.1", "tflite_int4", "'tflite_int8' or 'onnx'"),
        ({"distillation": {}}, "distillation.teacher", None, "set distillation.teacher"),
        ({"distillation": {"teacher": "x", "alhpa": 0.5}}, "distillation.alhpa", None, r"did you mean distillation.alpha\?"),
        ({"data__group_field": "site"}, "data.group_field", "site", "data.source=csv, tfds or tfrecords"),
        ({"runtime": {"max_fruitless_restarts": 2}}, "runtime.max_fruitless_restarts", None, "^use runtime.max_restarts_without_progress$"),
        ({"runtime": {"log_format": "json", "progress": "bar"}}, "runtime.progress", "bar", "runtime.progress=lines or runtime.log_format=text"),
        ({"model": {"backbone": "auto", "weights": "glyphs"}}, "model.backbone", "auto", "set model.backbone"),
        ({"model": {"backbone": "auto", "alpha": 0.35}}, "model.backbone", "auto", "set model.alpha=null"),
        ({"phases": {"auto": ROWS, "head": {"epochs": 5}}}, "phases.auto", None, "^unset head, or choose a group such as phases=two_phase$"),
        ({"phases": {"auto": {**ROWS, "domain": "near"}}}, "phases.auto.domain", "near", "^use 'similar' or 'different'$"),
        ({"phases": {"auto": {**ROWS, "few_similar": {"all": {"thaw": "half", "epochs": 2}}}}}, "phases.auto.few_similar.all.thaw", "half", "use none"),
        ({"phases": {"auto": {**ROWS, "epochs": 3}}}, "phases.auto.epochs", None, "^did you mean phases.auto.few_similar.all.epochs"),
        ({"phases": {"auto": {k: ROWS[k] for k in list(ROWS)[1:]}}}, "phases.auto.few_similar", None, "set phases.auto.few_similar"),
    ],
)  # fmt: skip
def test_an_error_has_key_value_and_fix(changes: dict[str, Any], key: str, value: object, fix: str) -> None:
    with raises(ConfigError, problem=rf"^the configuration has 1 error:\n  {re.escape(key)}") as caught:
        validate_config(tree(**changes))
    (error,) = caught.value.errors
    assert (error.key, error.value) == (key, value)
    assert error.problem
    assert re.search(fix, error.fix or "")
    assert str(error) in caught.value.problem


def test_all_errors_are_listed_one_per_line() -> None:
    with raises(ConfigError, problem=r"^the configuration has 4 errors:\n") as caught:
        validate_config(tree(seed=-1, modle=1, model__alpha=-2, phases__head__epochs=0))
    lines = str(caught.value).splitlines()[1:]
    assert lines == [f"  {error}" for error in caught.value.errors]
    assert len(lines) == 4


def test_auto_is_a_value_until_the_data_is_open() -> None:
    config = validate_config({**tree(model__backbone="auto", training__batch_size="auto"), "phases": {"auto": ROWS}})
    assert not isinstance(config, RunConfig)
    assert config.auto_keys == ["phases", "model.backbone", "training.batch_size"]
    assert select_common_settings(config)["training.batch_size"] == "auto"  # two workers must request the same
    assert validate_config(config.model_dump(mode="json")) == config
    assert isinstance(validate_config(tree()), RunConfig)
    with raises(ConfigError, key="training.batch_size", value="auto"):
        validate_resolved_config(tree(training__batch_size="auto"))


def test_the_tree_is_frozen() -> None:
    config = validate_config(tree())
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "steps"),
    [("2 epochs", 20), ("7 steps", 7), ("64 examples", 16), ("0.25 epochs", 2), ("1 examples", 1), (5, 5)],
)
def test_durations(text: Any, steps: int) -> None:
    config = validate_config(tree(runtime__log_every=text))
    assert config.runtime.log_every.steps(steps_per_epoch=10, batch_size=4) == steps
    assert Duration(count=0, unit="steps").steps(10, 4) == 0


def test_some_differences_make_another_run() -> None:
    def changed(**changes: Any) -> list[str]:
        return list_forbidden_changes(validate_resolved_config(tree()), validate_resolved_config(tree(**changes)))

    assert changed(seed=3) == ["seed: 42 -> 3"]
    assert changed(training__batch_size=64) == ["training.batch_size: 32 -> 64"]
    assert "phases.more.thaw: None -> all" in changed(phases__more={"thaw": "all", "epochs": 1})
    assert changed(runtime__log_every="3 steps", runtime__cache_dir="/x", resume="must", output_dir="/y") == []
    assert "distillation.teacher: None -> t" in changed(distillation={"teacher": "t"})
    assert changed(runtime__precision="bfloat16") == ["runtime.precision: float32 -> bfloat16"]
    assert changed(phases__head__epochs=5) == []  # a longer last phase extends the run
    assert changed(phases__head__epochs=2) == ["phases.head.epochs: 3.0 -> 2.0"]


def test_a_saved_configuration_loads_again_and_renamed_keys_in_it_too() -> None:
    config = validate_config(tree(phases__head__schedule={"name": "step", "decay": 0.1, "at": ["3 epochs", "9 steps"]}))
    saved = yaml.safe_dump(config.model_dump(mode="json"))
    assert RunConfig.model_validate(parse_config(saved)) == config
    for old, new in RENAMED_KEYS.items():
        assert (
            validate_config(parse_config(saved.replace(f" {new.split('.')[1]}:", f" {old.split('.')[1]}:"))) == config
        )


def test_the_values_in_conf_are_the_defaults_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBETUNE_CACHE")
    files = {"": "config.yaml", "runtime.": "runtime/default.yaml", "debug.": "debug/none.yaml"}
    written = {prefix + key: value for prefix, file in files.items()
               for key, value in flatten(yaml.safe_load((find_conf_folder() / file).read_text())).items()}  # fmt: skip
    composed, default = flatten(compose(["data=digits"])), validate_config(tree())
    keys = [key for key in written if not key.startswith(("hydra", "defaults"))]
    assert len(keys) > 30
    for key in keys:
        assert validate_config(tree(**{key.replace(".", "__"): composed[key]})) == default, key


@pytest.mark.parametrize(
    "text",
    [
        'a: !!bool "x"', 'a: !!int ""', 'a: !!timestamp "x"', "a: &x {b: *x}", "a: &x [*x]", "phases: {1: {}}",
        "data: {null: 1}", "data: [{1.5: 2}]", "a: {" * 200 + "}" * 200, "a: " + "[" * 200 + "]" * 200, "{[1]: 2}",
    ],
)  # fmt: skip
def test_a_damaged_configuration_is_a_sentence(text: str) -> None:
    with raises(ConfigError, problem="^(is not YAML|has a (key|loop))", fix="restore the file"):
        parse_config(text)


def test_a_key_that_is_a_number_is_rejected() -> None:
    with raises(ConfigError, problem="the configuration has a key that is not a string, phases.1", fix="quotes"):
        validate_config({"phases": {1: {}}})
