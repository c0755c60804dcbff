"""The `key=value` arguments that every verb of the command line is told."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from trainer.config.base import nearest
from trainer.errors import ConfigError

NONE = "(?!)"  # matches nothing
ALL = "(?s:.*)"


def usage(doc: str | None) -> str:
    """How a verb is called: what its module docstring says before its first colon."""
    return " ".join(re.split(r":\s", doc or "")[0].replace("`", "").split())


def read_arguments(
    arguments: Sequence[str], doc: str | None, keys: Mapping[str, str], *, more: str = NONE, rest: str = NONE
) -> tuple[dict[str, str], list[str]]:
    """What a verb is told by key, and the arguments that it hands on; `-h` or `--help` prints `doc` and ends.

    Args:
        doc: the module docstring of the verb, which begins with how it is called.
        keys: its own keys, each with the request to give it once; "" where it can be left out.
        more: regular expression of further keys that it takes.
        rest: regular expression of whole arguments that are handed on as they are.

    Raises:
        ConfigError: an argument is no `key=value`, unknown, empty or given twice, or a required one is missing.
        SystemExit: `doc` was printed.
    """
    if {"-h", "--help"} & set(arguments):
        print(doc)
        raise SystemExit
    told: dict[str, str] = {}
    handed_on: list[str] = []
    write = f"Write {usage(doc)}"
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if sign and (key in keys or re.fullmatch(more, key)):
            if key in told or not value:
                fault = f"{key} is given twice" if key in told else f"{key}= is empty"
                raise ConfigError(f"{keys[key]}: {usage(doc)}" if keys.get(key) else f"{fault}. {write}")
            told[key] = value
        elif re.fullmatch(rest, argument):
            handed_on.append(argument)
        elif sign:
            raise ConfigError(f"{key}: there is no such key.{nearest(key, list(keys))} {write}")
        else:
            raise ConfigError(f"{argument}: arguments are key=value; known: {', '.join(keys)}. {write}")
    for key, request in keys.items():
        if request and key not in told:
            raise ConfigError(f"{request}: {usage(doc)}")
    return told, handed_on
