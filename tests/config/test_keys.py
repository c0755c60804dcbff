"""The keys of the configuration: their kinds, suggestions for mistyped ones, bounds, and those that are not read."""

import re
from contextlib import suppress
from typing import Annotated, Any, get_args, get_origin

import pytest
from annotated_types import Ge, Gt, Le, Lt

from tests.cli.verbs import exit_code_of
from tests.config.test_schema import tree
from tests.errors import raises
from trainer import prepare
from trainer.cli.compose import compose
from trainer.cli.overrides import list_argument_keys
from trainer.config.base import Duration
from trainer.config.keys import add_defaults, classify_key, is_section, list_keys, list_union_members, suggest_key
from trainer.config.schema import RequestedConfig, validate_config
from trainer.config.unread import _SOURCES, find_unread_keys, require_read
from trainer.errors import ConfigError
from trainer.serving.settings import Settings

TREE = {"phases": {"head": {}, "fine_tune": {}}}
KEYS = list_keys(RequestedConfig, TREE)
EXTREMES = ["-1", "0", "nan", "inf", "-inf", "1e308", "-1e308", "1e-308", "1e30", "true", "x", ""]


@pytest.mark.parametrize(
    ("key", "kind"),
    [("data.root", "text"), ("output_dir", "text"), ("phases.any.thaw", "text"), ("data.class_names", "names"),
     ("export.formats", "texts"), ("training.class_weights", "weights"), ("training.class_weights.cat", "other"),
     ("seed", "other"), ("training.batch_size", "other"), ("training.loss", "other"), ("nope.x", "other"),
     ("runtime.log_every", "other"), ("phases.auto.few_similar.head.thaw", "text"), ("data.root.x", "other")],
)  # fmt: skip
def test_each_key_has_a_kind(key: str, kind: str) -> None:
    assert classify_key(RequestedConfig, key) == kind


@pytest.mark.parametrize(
    ("key", "fix"),
    [
        ("epochs", "did you mean phases.head.epochs or phases.fine_tune.epochs?"),
        ("batch_size", "did you mean training.batch_size?"),
        ("phases.head.learning_rate", "did you mean phases.head.optimizer.learning_rate?"),
        ("phases.head.epoch", "did you mean phases.head.epochs?"),
        ("lr", "did you mean phases.head.optimizer.learning_rate or phases.fine_tune.optimizer.learning_rate?"),
        ("optimizer", "did you mean phases.head.optimizer.name or phases.fine_tune.optimizer.name?"),
        ("gpus", "did you mean runtime.replicas?"),
        ("image_size", "did you mean model.image_size?"),
        ("data.class_name", "did you mean data.class_names?"),
        ("trainin.batchsize", "did you mean training.batch_size?"),
        ("EPOCHS", "did you mean phases.head.epochs or phases.fine_tune.epochs?"),
        ("gpu", "did you mean runtime.replicas?"),
        ("out", "did you mean output_dir?"),
        ("data.folder", "did you mean data.root?"),
        ("scheduler", "did you mean phases.head.schedule.name or phases.fine_tune.schedule.name?"),
        ("model.name", "did you mean model.backbone?"),
        ("xyzzy", "known: data, model, phases"),
    ],
)  # fmt: skip
def test_a_mistyped_key_is_searched_in_the_whole_tree(key: str, fix: str) -> None:
    assert suggest_key(key, KEYS).startswith(fix)


@pytest.mark.parametrize(
    ("arguments", "key", "fix"),
    [
        (["head.epochs=3"], "head", "phases.head.epochs"),
        (["early_stopping.patience=3"], "early_stopping", "phases.head.early_stopping.patience"),
        (["phases.head.optimzer.learning_rate=1"], "phases.head.optimzer", "phases.head.optimizer"),
        (["phases.epochs=3"], "phases.epochs", "phases.head.epochs or phases.fine_tune.epochs"),
        (["training=3"], "training", "set a key in it, such as training.batch_size"),
        (["phases.head=3"], "phases.head", "set a key in it, such as phases.head."),
        (["phases.head.optimizer=sgd"], "phases.head.optimizer", "write phases.head.optimizer.name=sgd"),
        (["phases.head.schedule=cosine"], "phases.head.schedule", "write phases.head.schedule.name=cosine"),
        (["phases.head.early_stopping=3"], "phases.head.early_stopping", "such as phases.head.early_stopping.patience"),
        (["head.optimizer.lr=1"], "head", "did you mean phases.head.optimizer.learning_rate?"),
        (
            ["phases=auto", "phases.auto.fine_tune.epochs=3"],
            "phases.auto.fine_tune",
            "phases.auto.few_different.fine_tune.epochs",
        ),
        (
            ["experiment=photos", "data.root=x", "phases.fine_tune.epochs=3"],
            "phases.auto",
            "set phases.auto.few_similar.fine_tune.epochs (and of few_different, many_similar, many_different)",
        ),
    ],
)
def test_a_key_at_a_wrong_depth_is_searched_too(arguments: list[str], key: str, fix: str) -> None:
    with raises(ConfigError) as caught:
        validate_config(compose(["data=digits", *arguments]) or {})
    (error,) = [error for error in caught.value.errors if error.key == key]
    assert fix in str(error.fix)


def numbers(root: Any, prefix: str = "") -> list[tuple[str, list[Any]]]:
    """Each number of a section and those below it, with its constraints."""
    result = []
    for name, field in root.model_fields.items():
        annotations = [(prefix + name, field.annotation, list(field.metadata))]
        while annotations:
            key, annotation, constraints = annotations.pop()
            if get_origin(annotation) is Annotated:
                kind, *more = get_args(annotation)
                more = [m for item in more for m in (getattr(item, "metadata", None) or [item])]
                annotations.append((key, kind, constraints + more))
            elif annotation in (int, float):
                result.append((key, constraints))
            elif is_section(annotation) and annotation is not Duration:
                result += numbers(annotation, f"{key}.")
            elif get_origin(annotation) is not None and not isinstance(annotation, str):
                inner = [a for a in get_args(annotation) if a is not str and not isinstance(a, str)]
                annotations += [(key, a, constraints) for a in inner if a is not type(None)]
    return result


def test_every_number_has_a_lower_and_an_upper_bound() -> None:
    every = [*numbers(RequestedConfig), *numbers(Settings, "serve."), *numbers(Duration, "duration.")]
    assert len(every) > 70
    checked_by_a_function = {"augmentation.rotation"}
    for key, constraints in every:
        bounded = [any(isinstance(c, kinds) for c in constraints) for kinds in ((Ge, Gt), (Le, Lt))]
        assert all(bounded) or key in checked_by_a_function, key


def list_errors(key: str, value: Any) -> list[str]:
    """List the errors of a configuration with this value; [] if it is valid. Any other exception fails the test."""
    whole = tree(phases__fine_tune={"thaw": "all", "epochs": 1})
    *path, last = key.split(".")
    branch = whole
    for name in path:
        branch = branch.setdefault(name, {})
    branch[last] = value
    try:
        config = validate_config(whole)
    except ConfigError as error:
        return [f"{listed}" if listed.fix else f"no fix: {listed}" for listed in error.errors]
    assert config.runtime.log_every.steps(10, 4) > 0
    return []


@pytest.mark.parametrize("key", KEYS)
def test_an_extreme_value_is_valid_or_an_error_in_plain_words(key: str) -> None:
    for text in EXTREMES:
        values: list[Any] = [text, [text], {"a": text}]
        with suppress(ValueError):
            values.append(float(text))
        for error in [error for value in values for error in list_errors(key, value)]:
            assert not re.search("no fix|instance of|unable|valid tuple|Input", error), error


@pytest.mark.parametrize(
    ("changes", "key", "value", "fix"),
    [
        ({"training__class_weights": {"cat": -1, "dog": 1}}, "training.class_weights.cat", -1, "greater than or equal to 0"),
        ({"training__class_weights": {"cat": float("nan")}}, "training.class_weights.cat", None, "finite number"),
        ({"training__class_weights": {"cat": 1e-60, "dog": 1}}, "training.class_weights.cat", 1e-60, "use 0, or a weight of"),
        ({"phases__head__optimizer": {"learning_rate": 1e-300}}, "phases.head.optimizer.learning_rate", 1e-300, "or equal to 0.000000000001"),
        ({"phases__head__optimizer": {"epsilon": 1e-300}}, "phases.head.optimizer.epsilon", 1e-300, "or equal to 0.000000000001"),
        ({"phases__head__backbone_rate": 1e-300}, "phases.head.backbone_rate", 1e-300, "or equal to 0.000001"),
        ({"phases__head__layer_decay": 1e-300}, "phases.head.layer_decay", 1e-300, "or equal to 0.000001"),
        ({"training__clip_norm": 1e-300}, "training.clip_norm", 1e-300, "or equal to 0.000000000001"),
        ({"distillation": {"teacher": "t", "temperature": 1e-300}}, "distillation.temperature", 1e-300, "or equal to 0.01"),
        ({"data__root": "a\0b"}, "data.root", "a\0b", "without that character"),
        ({"experiment_name": "a\0b"}, "experiment_name", "a\0b", "without that character"),
        ({"seed": True}, "seed", "true", "use a number"),
        ({"training__batch_size": False}, "training.batch_size", "false", "use a number"),
        ({"runtime__log_every": "0 steps"}, "runtime.log_every", "0 steps", "above 0"),
        ({"runtime__log_every": "1.2.3 steps"}, "runtime.log_every", "1.2.3 steps", "500 steps"),
        ({"runtime__log_every": "1e999 epochs"}, "runtime.log_every.count", None, ""),
        ({"runtime__start_timeout": 1e300}, "runtime.start_timeout", 1e300, "less than or equal to"),
        ({"debug__profile_steps": [25, 15]}, "debug.profile_steps", [25, 15], "first, last"),
        ({"debug__profile_steps": [-1, 5]}, "debug.profile_steps.0", -1, "greater than or equal to 1"),
        ({"model__hidden": 10**9}, "model.hidden", 10**9, "less than or equal to"),
        ({"distillation": {"teacher": "t", "temperature": 1e300}}, "distillation.temperature", 1e300, "less than"),
        ({"phases__head__schedule": {"name": "step", "decay": 0.1, "at": ["9 steps", "3 steps"]}}, "phases.head.schedule.at", None, "sort"),
        ({"data__root": "abfss://b/x"}, "data.root", "abfss://b/x", "gs:// or s3://"),
        ({"output_dir": "GS://b/x"}, "output_dir", "GS://b/x", "^write gs://b/x$"),
        ({"warm_start": "gs:/b/x"}, "warm_start", "gs:/b/x", "^write gs://b/x$"),
        ({"model__weights": "https://h/x.h5"}, "model.weights", "https://h/x.h5", "copy it"),
        ({"distillation": {"teacher": "file:///x/y"}}, "distillation.teacher", "file:///x/y", "^write the path: /x/y$"),
        ({"experiment_name": True}, "experiment_name", True, "^use a text$"),
        ({"data__class_names": "cat"}, "data.class_names", "cat", r"^use a list, such as \[a,b\]$"),
    ],
)  # fmt: skip
def test_bounds_addresses_and_types(changes: dict[str, Any], key: str, value: object, fix: str) -> None:
    with raises(ConfigError) as caught:
        validate_config(tree(**changes))
    (error,) = caught.value.errors
    assert error.key == key
    assert value is None or error.value == value
    assert fix.strip("^$").replace("\\", "") in str(error.fix)


def test_classes_and_runs_may_be_called_by_numbers() -> None:
    changes = {"experiment_name": 2024, "data": {"source": "tfrecords", "pattern": "x", "class_names": [0, 1.5, "x"]}}
    config = validate_config(tree(**changes, training__class_weights={0: 2}))
    assert config.experiment_name == "2024"
    assert config.data.class_names == ("0", "1.5", "x")
    assert config.training.class_weights == {"0": 2.0}


@pytest.mark.parametrize(
    ("arguments", "reasons"),
    [
        (["data=digits", "data.root=photos"], {"data.root": "data.source=digits, only with image_folder or csv or tfds"}),
        (["data=image_folder", "data.root=x", "data.name=beans", "data.shuffle_window=9"],
         {"data.name": "only with tfds", "data.shuffle_window": "data.source=image_folder"}),
        (["data=tfds", "data.root=x", "data.name=beans"], {"data.name": "when data.root is set"}),
        (["data=tfds", "data.name=x", "data.test_split=test", "data.test_fraction=0.1"],
         {"data.test_fraction": "when data.test_split is set"}),
        (["data=digits", "phases.head.schedule.final=0.1"], {"phases.head.schedule.final": "schedule.name=constant"}),
        (["data=digits", "phases.head.backbone_rate=0.1"], {"phases.head.backbone_rate": "thaw=none"}),
        (["data=digits", "phases.head.optimizer.name=sgd", "phases.head.optimizer.nesterov=true"],
         {"phases.head.optimizer.nesterov": "without momentum"}),
        (["data=digits", "augmentation.magnitude=3", "augmentation.fill=reflect"],
         {"augmentation.magnitude": "without augmentation.randaugment", "augmentation.fill": "without one of rotation"}),
        (["data=image_folder", "data.root=x", "data.label_kind=text", "data.shards=5", "data.shard_by=file"],
         {"data.label_kind": "only with tfds or tfrecords", "data.shards": "trainer.prepare", "data.shard_by": "only with"}),
        (["data=digits", "phases.head.augmented_views=1"], {"phases.head.augmented_views": "without augmentation"}),
        (["data=digits", "phases.fine_tune.thaw=all", "phases.fine_tune.features_dtype=float16"],
         {"phases.fine_tune.features_dtype": "thaw=all"}),
        (["data=digits", "export.formats=[]", "export.max_accuracy_drop=0.1"],
         {"export.max_accuracy_drop": r"export.formats=[]"}),
        (["data=digits", "resume=must"], {"resume": "without output_dir"}),
        (["data=digits", "debug=overfit", "debug.max_examples=9", "model.dropout=0.1", "augmentation.zoom=0.1"],
         {"debug.max_examples": "debug.overfit", "model.dropout": "debug.overfit", "augmentation.zoom": "debug.overfit"}),
        (["data=digits", "debug=overfit", "distillation.teacher=runs/1", "distillation.alpha=0.1",
          "distillation.temperature=2"],  # 0.1 is the default
         {"distillation.teacher": "debug.overfit", "distillation.temperature": "debug.overfit"}),
        (["data=digits", "debug=overfit", "distillation.teacher=train", "distillation.model.backbone=ResNet50",
          "distillation.phases.head.thaw=none", "distillation.phases.head.steps=2"],
         dict.fromkeys(["distillation.teacher", "distillation.model.backbone", "distillation.phases.head.thaw",
                        "distillation.phases.head.steps"], "debug.overfit")),
        (["data=digits", "phases.head.schedule={name:constant,final:0.1}"],
         {"phases.head.schedule.final": "schedule.name=constant"}),
        (["data=digits", "phases.head.optimizer={name:sgd,learning_rate:.1,nesterov:true}"],
         {"phases.head.optimizer.nesterov": "without momentum"}),
        (["data=digits", "phases=auto", "phases.auto.few_similar.head.schedule.final=.1"],
         {"phases.auto.few_similar.head.schedule.final": "schedule.name=constant"}),
    ],
)  # fmt: skip
def test_a_key_that_is_not_read_is_rejected_by_name(arguments: list[str], reasons: dict[str, str]) -> None:
    config = validate_config(compose(arguments) or {})
    with raises(ConfigError) as caught:
        require_read(config, list_argument_keys(arguments))
    assert {error.key for error in caught.value.errors} == set(reasons)
    for error in caught.value.errors:
        assert reasons[str(error.key)] in error.problem


@pytest.mark.parametrize("split", ["null", "none"])
def test_a_fraction_is_read_where_the_split_of_the_dataset_is_not_named(split: str) -> None:
    arguments = ["data=tfds", "data.name=x", f"data.test_split={split}", "data.test_fraction=0.1"]
    require_read(validate_config(compose(arguments) or {}), ["data.test_fraction"])


@pytest.mark.parametrize(
    "key", ["model.image_size=64", "training.batch_size=8", "phases.head.epochs=3", "output_dir=x"]
)
def test_prepare_rejects_what_only_a_run_reads(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code_of(prepare.main, "data=digits", "output=x", key) == 2
    assert f"{key.partition('=')[0]}: is not read by trainer.prepare; remove it" in capsys.readouterr().err


def test_a_value_that_an_experiment_brings_is_not_rejected() -> None:
    config = validate_config(compose(["experiment=beans_xception", "data=image_folder", "data.root=x"]) or {})
    assert "data.name" in find_unread_keys(config)
    require_read(config, ["data.root"])


def test_the_table_of_sources_has_keys_and_sources_that_exist() -> None:
    fields = RequestedConfig.model_fields["data"].annotation.model_fields  # type: ignore[union-attr]
    assert set(_SOURCES) <= fields.keys()
    assert {source for sources in _SOURCES.values() for source in sources} <= set(get_args(fields["source"].annotation))


def test_the_printed_configuration_has_every_key() -> None:
    composed: Any = compose(["data=digits"])
    whole = add_defaults(RequestedConfig, composed)
    printed = set(list_keys(RequestedConfig, composed))

    def has(branch: Any, key: str) -> bool:
        for part in key.split("."):
            if branch is None:  # distillation is off
                return True
            if part not in branch:
                return False
            branch = branch[part]
        return True

    assert [key for key in sorted(printed) if not has(whole, key)] == []
    assert validate_config(whole) == validate_config(composed)
    assert whole["runtime"]["checkpoint_every"] == "1 epochs"
    assert list_union_members(int | None) == [int]
