"""The configuration of a teacher that the run trains itself: its run, its errors, and its files of a group."""

from typing import Any

import pytest
import yaml

from tests.config.test_schema import CACHED, ROWS, tree
from tests.errors import raises
from trainer.cli.compose import compose, load_and_require_read
from trainer.config.diff import list_forbidden_changes
from trainer.config.phases import AutoPhases
from trainer.config.schema import (
    RunConfig,
    derive_teacher_config,
    parse_config,
    validate_config,
    validate_resolved_config,
)
from trainer.config.unread import find_unread_keys
from trainer.errors import ConfigError

TEACHER = {"backbone": "ResNet50", "image_size": 64}
ONE = {"only": {"thaw": "all", "epochs": 2}}


def student(distillation: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return tree(distillation={"teacher": "train", "model": TEACHER} | distillation, **changes)


def test_the_run_of_the_teacher_differs_in_its_model_phases_and_results() -> None:
    config = validate_config(
        student({"phases": ONE}, output_dir="runs/1/", warm_start="w", experiment_name="n", seed=7)
    )
    teacher = derive_teacher_config(config)
    assert isinstance(teacher, RunConfig)
    assert (teacher.model.backbone, teacher.model.image_size, list(teacher.phases)) == ("ResNet50", 64, ["only"])
    assert (teacher.output_dir, teacher.experiment_name) == ("runs/1/teacher", "n teacher")
    assert (teacher.distillation, teacher.warm_start, teacher.export.formats) == (None, None, ())
    changed = {"model", "phases", "distillation", "output_dir", "experiment_name", "warm_start", "export"}
    assert {key for key, value in teacher if value != getattr(config, key)} == changed
    assert validate_resolved_config(yaml.safe_load(yaml.safe_dump(teacher.model_dump(mode="json")))) == teacher


def test_without_phases_of_its_own_the_teacher_has_those_of_the_run() -> None:
    config = validate_config(student({}))
    teacher = derive_teacher_config(config)
    assert teacher
    assert (teacher.phases, teacher.output_dir) == (config.phases, None)
    whole = student({"model": {"backbone": "auto"}}) | {"phases": {"auto": ROWS}}
    teacher = derive_teacher_config(validate_config(whole))
    assert teacher
    assert isinstance(teacher.phases, AutoPhases)
    assert teacher.auto_keys == ["phases", "model.backbone"]


def test_other_teachers_have_no_run() -> None:
    for distillation in (None, {"teacher": "outputs/earlier"}, {"teacher": "./train"}):
        assert derive_teacher_config(validate_config(tree(distillation=distillation))) is None


@pytest.mark.parametrize(
    ("distillation", "key", "value", "fix"),
    [
        ({"model": None}, "distillation.teacher", "train", "^set distillation.model"),
        ({"teacher": "outputs/t"}, "distillation.teacher", "outputs/t", "^remove them"),
        ({"teacher": "outputs/t", "model": None, "phases": ONE}, "distillation.teacher", "outputs/t", "^remove them"),
        ({"model": {}}, "distillation.model.backbone", None, "^set distillation.model.backbone"),
        ({"model": {"backbone": "x", "alhpa": 1}}, "distillation.model.alhpa", None, r"^did you mean distillation.model.alpha\?$"),
        ({"model": "resnet50"}, "distillation.model", "resnet50", "distillation.model.backbone"),
        ({"phases": {"a": {"thaw": "top", "epochs": 1}}}, "distillation.phases.a.thaw", "top", "from_layer:N"),
        ({"phases": {"a": {"thaw": "all", "epochs": -1}}}, "distillation.phases.a.epochs", -1, "greater than 0"),
        ({"phases": {"a": {"thaw": "all"}}}, "distillation.phases.a", None, "exactly one of epochs"),
        ({"phases": {"a/b": ONE["only"]}}, "distillation.phases.a/b.[key]", "a/b", "name phases with"),
        ({"phases": {"a": CACHED | {"augmented_views": None}}}, "distillation.phases.a.features", "cached", "augmented_views=4"),
    ],
)  # fmt: skip
def test_an_error_names_the_key_of_the_teacher(distillation: dict[str, Any], key: str, value: Any, fix: str) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_config(student(distillation, augmentation__zoom=0.1))
    (error,) = caught.value.errors

    def fail() -> None:
        raise error

    with raises(type(error), key, value if value is not None else error.value, fix):
        fail()


def test_a_student_is_a_second_start_so_resume_is_not_never() -> None:
    with pytest.raises(ConfigError, match=r"resume=never: forbids the second start.*; use auto"):
        validate_config(student({}, resume="never"))
    validate_config(tree(distillation={"teacher": "outputs/t"}, resume="never"))


def test_files_of_the_groups_can_be_chosen_and_changed() -> None:
    given = ["distillation.teacher=train", "distillation.model=glyphs_mobilenet_v2", "distillation.model.dropout=0.5",
             "distillation.phases=head_only", "distillation.phases.head.epochs=2"]  # fmt: skip
    config = load_and_require_read(compose(given) or {}, given)
    teacher = derive_teacher_config(config)
    assert teacher
    assert teacher.model == config.model.model_copy(update={"dropout": 0.5})
    assert isinstance(teacher.phases, dict)
    assert [(name, phase.epochs) for name, phase in teacher.phases.items()] == [("head", 2)]
    for key, value, fix in (
        ("model", "glyphs_mobilenet", "did you mean glyphs_mobilenet_v2?"),
        ("phases", "auto", "leave it out"),
    ):
        with raises(ConfigError, f"distillation.{key}", value, fix):
            compose([*given, f"distillation.{key}={value}"])


def test_keys_of_the_teacher_that_are_not_read() -> None:
    phases = {"a": {"thaw": "none", "epochs": 1, "layer_decay": 0.5, "augmented_views": 1}}
    config = validate_config(student({"phases": phases, "model": TEACHER | {"hidden_batch_norm": True}}))
    of_teacher = {key for key in find_unread_keys(config) if key.startswith("distillation")}
    assert of_teacher == {"distillation.model.hidden_batch_norm", "distillation.phases.a.layer_decay",
                          "distillation.phases.a.augmented_views"}  # fmt: skip


def test_a_run_that_has_begun_accepts_no_other_teacher() -> None:
    def changes(distillation: dict[str, Any]) -> list[str]:
        before, now = (validate_resolved_config(student(values)) for values in ({"phases": ONE}, distillation))
        return list_forbidden_changes(before, now)

    assert changes({"phases": ONE}) == []
    assert "distillation.model.image_size: 64 -> None" in changes({"phases": ONE, "model": {"backbone": "ResNet50"}})
    assert "distillation.phases.only.epochs: 2.0 -> 3.0" in changes({"phases": {"only": {"thaw": "all", "epochs": 3}}})
    trained = validate_resolved_config(tree(distillation={"teacher": "outputs/t"}))
    assert "distillation.teacher: train -> outputs/t" in list_forbidden_changes(
        validate_resolved_config(student({})), trained
    )


def test_the_configuration_of_an_earlier_version_loads() -> None:
    saved = yaml.safe_dump(tree(distillation={"teacher": "outputs/t", "alpha": 0.2, "temperature": 2.0}))
    config = validate_resolved_config(parse_config(saved))
    assert config.distillation
    assert (config.distillation.model, config.distillation.phases) == (None, None)
