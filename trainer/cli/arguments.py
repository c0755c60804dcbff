"""The `key=value` arguments of the verbs of the command line."""

import re
from collections.abc import Mapping, Sequence

from trainer.config.base import closest
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
        keys: the arguments of the verb, each with the problem where it is missing, or "" if it is optional.
        more: regular expression of further keys.
        rest: regular expression of whole arguments that are returned unchanged.

    Raises:
        ConfigError: an argument is no `key=value`, unknown, empty or given twice, or a required one is missing.
        SystemExit: `doc` was printed.
    """
    if {"-h", "--help"} & set(arguments):
        print(doc)
        raise SystemExit
    values: dict[str, str] = {}
    others: list[str] = []
    fix = f"write {usage(doc)}"
    for argument in arguments:
        key, sign, value = argument.partition("=")
        if sign and (key in keys or re.fullmatch(more, key)):
            if key in values or not value:
                raise ConfigError("is given twice" if key in values else "is empty", key=key, value=value, fix=fix)
            values[key] = value
        elif re.fullmatch(rest, argument):
            others.append(argument)
        elif sign:
            raise ConfigError("there is no such argument", key=key, fix=f"{closest(key, list(keys))} {fix}")
        else:
            raise ConfigError("is not key=value", key=argument, fix=f"{fix}; known: {', '.join(keys)}")
    if missing := next((key for key, problem in keys.items() if problem and key not in values), None):
        raise ConfigError(keys[missing], key=missing, fix=fix)
    return values, others
