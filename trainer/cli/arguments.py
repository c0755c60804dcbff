"""Parse the `key=value` arguments of the commands other than training, such as `python -m trainer.evaluate`."""

import re
from collections.abc import Mapping, Sequence

import trainer
from trainer.config.base import InvalidValue, check_address
from trainer.config.keys import suggest_name
from trainer.errors import ConfigError
from trainer.names import is_utf8

NOTHING = "(?!)"  # regular expression that matches no text
ALL = "(?s:.*)"  # regular expression that matches any text
ADDRESSES = (
    "run",
    "model",
    "export",
    "images",
    "output",
    "reference",
    "log",
    "to",
    "runs",
)  # keys of commands other than training


def require_address(address: str, key: str | None = None) -> str:
    """Return an address of a local file or in a bucket; raise a ConfigError about `key` if it is neither."""
    try:
        return check_address(address)
    except InvalidValue as error:
        subject = (key, address) if key else (address, None)
        raise ConfigError(error.problem, key=subject[0], value=subject[1], fix=error.fix) from None


def format_usage(doc: str | None) -> str:
    """Format the usage line of a command, which is its module docstring up to the first colon."""
    return " ".join(re.split(r":\s", doc or "")[0].replace("`", "").split())


def parse_arguments(
    arguments: Sequence[str], doc: str | None, keys: Mapping[str, str], *, more: str = NOTHING, rest: str = NOTHING
) -> tuple[dict[str, str], list[str]]:
    """Parse the arguments of a command. `--help` prints `doc`, `--version` prints the version, and both exit.

    Args:
        doc: module docstring of the command, which begins with its usage.
        keys: key -> problem to report if it is missing, or "" if it is optional.
        more: regular expression for additional keys.
        rest: regular expression for arguments that are returned unchanged.

    Returns:
        The values by key, and the arguments that match `rest`.

    Raises:
        ConfigError: an argument is not `key=value`, unknown, empty or given twice, or a required one is missing.
        SystemExit: after `--help` or `--version`.
    """
    if {"-h", "--help"} & set(arguments):
        print(doc)
        raise SystemExit
    if "--version" in arguments:
        print(f"kubetune {trainer.__version__}")
        raise SystemExit
    values: dict[str, str] = {}
    unchanged: list[str] = []
    fix = f"write {format_usage(doc)}"
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not is_utf8(argument):
            key, value, rename = key if equals else "argument", value or argument, "rename it, or give a link to it"
            raise ConfigError("is not UTF-8", key=key, value=value, fix=f"{rename} with such a name")
        if equals and (key in keys or re.fullmatch(more, key)):
            if key in values or not value:
                raise ConfigError("is given twice" if key in values else "is empty", key=key, value=value, fix=fix)
            values[key] = require_address(value, key) if key in ADDRESSES else value
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
