"""The surface of the command line, recorded in surface.txt: `python -m tests.cli.surface` writes it.

A change of a key, type, bound, default, group, choice, verb or argument is one line of its diff.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

import pytest
from pydantic.fields import FieldInfo

from scripts.configuration_page import describe_type, format_bounds, format_default, list_sections
from tests.cli.verbs import exit_code_of
from trainer.cli.arguments import format_usage
from trainer.cli.compose import GROUPS, find_conf_folder
from trainer.relay.settings import RelaySettings
from trainer.serving.settings import Settings

FILE = Path(__file__).with_name("surface.txt")
VERBS = (
    "prepare", "look", "plan", "backbones", "rates", "evaluate", "predict", "export", "compare", "serve", "drift", "promote",
    "nightly", "relay",
)  # fmt: skip


def arguments(verb: ModuleType) -> list[str]:
    """List the keys that a command passes to `parse_arguments`; required ones are marked."""
    keys: dict[str, str] = {}

    def read(_arguments: Any, _doc: Any, keys_of_verb: dict[str, str], **_: Any) -> NoReturn:
        keys.update(keys_of_verb)
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verb, "parse_arguments", read)
        assert exit_code_of(verb.main) == 0
    return [key + " (required)" * bool(problem) for key, problem in keys.items()]


def _line(source: str, key: str, field: FieldInfo) -> str:
    return f"{source} {key}: {describe_type(field.annotation)}{format_bounds(field.metadata)} = {format_default(field.default)}"


def text() -> str:
    """Format each key with its type, bounds and default, each group with its choices, each command with its arguments."""
    lines = [_line("key", key, field) for _, _, fields in list_sections() for key, field in fields.items()]
    lines += [f"group {path.parent.relative_to(find_conf_folder())}: {path.stem}" for group in GROUPS
              for path in sorted((find_conf_folder() / group).rglob("*.yaml"))]  # fmt: skip
    for name in VERBS:
        verb = import_module(f"trainer.{name}")
        lines += [f"verb {name}: {format_usage(verb.__doc__)}", *(f"verb {name}: {key}" for key in arguments(verb))]
    lines += [_line("serve", key, field) for key, field in Settings.model_fields.items()]
    lines += [_line("relay", key, field) for key, field in RelaySettings.model_fields.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.write_text(text())
    print(f"{FILE} written", file=sys.stderr)
