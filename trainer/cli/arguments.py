"""The `key=value` arguments of the verbs of the command line."""

import re
from collections.abc import Mapping, Sequence

from trainer.config.base import nearest
from trainer.errors import ConfigError

NONE = "(?!)"  # matches nothing
ALL = "(?s:.*)"


def usage(doc: str | None) -> str:
    """The usage line of a verb: its module docstring up to the first colon."""
    return " ".join(re.split(r":\s", doc or "")[0].replace("`", "").split())


def read_arguments(
    arguments: Sequence[str], doc: str | None, keys: Mapping[str, str], *, more: str = NONE, rest: str = NONE
) -> tuple[dict[str, str], list[str]]:
    """The values by key, and the arguments that match `rest`; `-h` or `--help` prints `doc` and ends.

    Args:
        doc: the module docstring of the verb, which begins with its usage.
        keys: its own keys, each with the request to give it once; "" where it can be left out.
        more: regular expression of further keys that it takes.
        rest: regular expression of whole arguments that are returned as they are.

    Raises:
        ConfigError: an argument is no `key=value`, unknown, empty or given twice, or a required one is missing.
        SystemExit: `doc` was printed.
    """
    if {"-h", "--help"} & set(arguments):
        print(doc)
        raise SystemExit
    values: dict[str, str] = {}
    others: list[str] = []
    write = f"Write {usage(doc)}"
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if sign and (key in keys or re.fullmatch(more, key)):
            if key in values or not value:
                fault = f"{key} is given twice" if key in values else f"{key}= is empty"
                raise ConfigError(f"{keys[key]}: {usage(doc)}" if keys.get(key) else f"{fault}. {write}")
            values[key] = value
        elif re.fullmatch(rest, argument):
            others.append(argument)
        elif sign:
            raise ConfigError(f"{key}: there is no such key.{nearest(key, list(keys))} {write}")
        else:
            raise ConfigError(f"{argument}: arguments are key=value; known: {', '.join(keys)}. {write}")
    for key, request in keys.items():
        if request and key not in values:
            raise ConfigError(f"{request}: {usage(doc)}")
    return values, others
