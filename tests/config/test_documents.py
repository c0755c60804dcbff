"""docs/configuration.md and conf/config.schema.json: complete, current, and valid for every experiment."""

import json

import jsonschema
import pytest

from scripts import configuration_page
from trainer.cli.compose import compose
from trainer.config.schema import validate_config

SCHEMA = json.loads(configuration_page.SCHEMA.read_text())


def test_every_key_has_a_meaning() -> None:
    fields = {key: field for _, _, fields in configuration_page.list_sections() for key, field in fields.items()}
    assert len(fields) > 120
    assert [key for key, field in fields.items() if not field.description] == []


def test_the_schema_is_current() -> None:  # the page: tests/test_pages.py
    assert configuration_page.SCHEMA.read_text() == configuration_page.format_schema(), (
        "run scripts/configuration_page.py"
    )


def test_auto_fits_the_schema() -> None:  # the experiments: tests/test_recipes.py
    tree = compose(["data=digits", "phases=auto", "model=auto"]) or {}
    jsonschema.validate(tree, SCHEMA)
    jsonschema.validate(validate_config(tree).model_dump(mode="json"), SCHEMA)


@pytest.mark.parametrize(
    "tree",
    [
        {"seeds": 1},
        {"training": {"batch_size": "many"}},
        {"runtime": {"log_every": "2 days"}},
        {"phases": {"head": {"thaw": "none", "epoch": 3}}},
    ],
)
def test_the_schema_rejects_an_error(tree: dict[str, object]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, SCHEMA)
