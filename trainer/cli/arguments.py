"""Read the `key=value` arguments of the commands other than training: `python -m trainer.evaluate` and the like."""

import re
from collections.abc import Mapping, Sequence

import trainer
from trainer.config.keys import suggest_name
from trainer.errors import ConfigError
from trainer.names import is_utf8

NOTHING = "(?!)"  # a regular expression that matches no text
ALL = "(?s:.*)"  # one that matches every text


def usage(doc: str | None) -> str:
    """Return the usage line of a command: its module docstring up to the first colon."""
    return " ".join(re.split(r":\s", doc or "")[0].replace("`", "").split())


def read_arguments(
    arguments: Sequence[str], doc: str | None, keys: Mapping[str, str], *, more: str = NOTHING, rest: str = NOTHING
) -> tuple[dict[str, str], list[str]]:
    """Return the values by key, and the arguments that match `rest`; `--help` prints `doc`,
    `--version` the version, and both exit.

    Args:
        doc: the module docstring of the command, which begins with its usage.
        keys: the keys of the command, each with the problem to report if it is missing, or "" if it is optional.
        more: regular expression of additional keys.
        rest: regular expression of the arguments that are returned unchanged.

    Raises:
        ConfigError: an argument is not `key=value`, unknown, empty or given twice, or a required one is missing.
        SystemExit: `doc` was printed.
    """
    if {"-h", "--help"} & set(arguments):
        print(doc)
        raise SystemExit
    if "--version" in arguments:
        print(f"kubetune {trainer.__version__}")
        raise SystemExit
    values: dict[str, str] = {}
    unchanged: list[str] = []
    fix = f"write {usage(doc)}"
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not is_utf8(argument):
            key, value, rename = key if equals else "argument", value or argument, "rename it, or give a link to it"
            raise ConfigError("is not UTF-8", key=key, value=value, fix=f"{rename} with such a name")
        if equals and (key in keys or re.fullmatch(more, key)):
            if key in values or not value:
                raise ConfigError("is given twice" if key in values else "is empty", key=key, value=value, fix=fix)
            values[key] = value
        elif re.fullmatch(rest, argument):
            unchanged.append(argument)
        elif equals:
            near = suggest_name(key, list(keys))
            fix = f"{near} {fix}" if near.endswith("?") else f"{near}; {fix}"
            raise ConfigError("there is no such argument", key=key, fix=fix)
        else:
            raise ConfigError("is not key=value", key=argument, fix=f"{fix}; known: {', '.join(keys)}")
    if missing := next((key for key, problem in keys.items() if problem and key not in values), None):
        raise ConfigError(keys[missing], key=missing, fix=fix)
    return values, unchanged
