"""The warning about learning rates of thawed layers, and the presets that it is about."""

from typing import Any

import pytest

from trainer.cli.compose import compose, list_choices
from trainer.config.phases import Phase
from trainer.config.schema import validate_resolved_config
from trainer.planning.warnings import find_rate_warnings, find_settings_warnings


def make_phases(head: dict[str, Any], *thawed: dict[str, Any]) -> dict[str, Phase]:
    trees = [{"thaw": "none", "epochs": 1, **head}, *({"thaw": "all", "epochs": 1, **tree} for tree in thawed)]
    return {f"p{i}": Phase.model_validate(tree) for i, tree in enumerate(trees)}


def make_adam(rate: float, name: str = "adam") -> dict[str, Any]:
    return {"optimizer": {"name": name, "learning_rate": rate}}


@pytest.mark.parametrize(
    ("phases", "warned"),
    [
        (make_phases(make_adam(1e-3), make_adam(2e-4)), []),
        (make_phases(make_adam(1e-3), make_adam(2.1e-4)), ["p1"]),
        (make_phases(make_adam(1e-3), make_adam(1e-3)), ["p1"]),
        (make_phases(make_adam(1e-3), make_adam(1e-3) | {"backbone_rate": 0.2}), []),
        (make_phases(make_adam(1e-3), make_adam(1e-3) | {"backbone_rate": 0.5}), ["p1"]),
        (make_phases(make_adam(1e-3), make_adam(1e-3) | {"schedule": {"warmup": "1 epochs"}}), []),
        (make_phases(make_adam(1e-3), make_adam(1e-3, "rmsprop")), ["p1"]),
        (make_phases(make_adam(1e-3), make_adam(1e-2, "sgd")), []),  # rates of another meaning
        (make_phases(make_adam(1e-3, "lion"), make_adam(1e-3, "lion")), ["p1"]),
        (make_phases(make_adam(1e-3), make_adam(1e-4), make_adam(5e-4)), ["p2"]),
        ({"all": Phase.model_validate({"thaw": "all", "epochs": 1, **make_adam(1e-2)})}, []),
    ],
)
def test_a_rate_of_thawed_layers_above_a_fifth_of_that_of_the_head(phases: dict[str, Phase], warned: list[str]) -> None:
    warnings = find_rate_warnings(phases)
    assert [warning.split()[1] for warning in warnings] == warned
    for warning, name in zip(warnings, warned, strict=True):
        assert f"phases.{name}.optimizer.learning_rate=" in warning


def test_the_rate_that_a_warning_advises_has_no_warning() -> None:
    (warning,) = find_rate_warnings(make_phases(make_adam(1e-3), make_adam(1e-3) | {"backbone_rate": 0.5}))
    advised = float(warning.split("learning_rate=")[1].split(",")[0])
    assert not find_rate_warnings(make_phases(make_adam(1e-3), make_adam(advised) | {"backbone_rate": 0.5}))


@pytest.mark.parametrize("choice", [name for name in list_choices("phases") if name != "auto"])
def test_no_group_of_phases_has_the_warning(choice: str) -> None:
    config = validate_resolved_config(compose(["data=digits", f"phases={choice}"]) or {})
    assert not [warning for warning in find_settings_warnings(config) if "thawed layers" in warning]
