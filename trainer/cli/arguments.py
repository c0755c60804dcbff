"""Parse the `key=value` arguments of all commands except training, such as those of `python -m trainer.evaluate`."""

import re
from collections.abc import Mapping, Sequence

import trainer
from trainer.config.base import InvalidValue, check_address
from trainer.config.keys import suggest_name
from trainer.errors import ConfigError
from trainer.names import is_utf8

MATCH_NOTHING = "(?!)"  # regular expression that matches no string
MATCH_ALL = "(?s:.*)"  # regular expression that matches any string, line breaks included
# Keys whose value is an address: a local path or the URL of an object or folder in a bucket.
ADDRESS_KEYS = ("run", "model", "export", "images", "output", "reference", "log", "to", "runs")


def require_address(address: str, key: str | None = None) -> str:
    """Return `address` unchanged if it is a local path or a gs:// or s3:// address.

    Raises ConfigError if it is neither. The error's key is `key`, or `address` itself if `key` is None.
    """
    try:
        return check_address(address)
    except InvalidValue as error:
        key_and_value = (key, address) if key else (address, None)
        raise ConfigError(error.problem, key=key_and_value[0], value=key_and_value[1], fix=error.fix) from None


def format_usage(doc: str | None) -> str:
    """Return a command's usage in one line: its module docstring up to the first colon, without backticks."""
    return " ".join(re.split(r":\s", doc or "")[0].replace("`", "").split())


def parse_arguments(
    arguments: Sequence[str],
    doc: str | None,
    keys: Mapping[str, str],
    *,
    other_keys: str = MATCH_NOTHING,
    other_arguments: str = MATCH_NOTHING,
) -> tuple[dict[str, str], list[str]]:
    """Parse a command's arguments. `--help` prints `doc`, `--version` prints the version, and both exit.

    Args:
        arguments: command-line arguments, without the command.
        doc: the command's module docstring, which begins with its usage.
        keys: key -> problem to report if the argument is missing, or "" if the argument is optional.
        other_keys: regular expression that matches valid keys that are not in `keys`.
        other_arguments: regular expression that matches all other valid arguments. They are returned unparsed.

    Returns:
        The values by key, and the unparsed arguments.

    Raises:
        ConfigError: an argument is unknown, not `key=value`, not UTF-8, empty or given twice, the value of a key in
            `ADDRESS_KEYS` is not an address, or a required argument is missing.
        SystemExit: after `--help` or `--version`.
    """
    if {"-h", "--help"} & set(arguments):
        print(doc)
        raise SystemExit
    if "--version" in arguments:
        print(f"kubetune {trainer.__version__}")
        raise SystemExit
    values: dict[str, str] = {}
    unparsed_arguments: list[str] = []
    fix = f"write {format_usage(doc)}"
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not is_utf8(argument):
            key, value, name_fix = key if equals else "argument", value or argument, "rename it, or give a link to it"
            raise ConfigError("is not UTF-8", key=key, value=value, fix=f"{name_fix} with such a name")
        if equals and (key in keys or re.fullmatch(other_keys, key)):
            if key in values or not value:
                raise ConfigError("is given twice" if key in values else "is empty", key=key, value=value, fix=fix)
            values[key] = require_address(value, key) if key in ADDRESS_KEYS else value
        elif re.fullmatch(other_arguments, argument):
            unparsed_arguments.append(argument)
        elif equals:
            suggestion = suggest_name(key, list(keys))
            fix = f"{suggestion} {fix}" if suggestion.endswith("?") else f"{suggestion}; {fix}"
            raise ConfigError("there is no such argument", key=key, fix=fix)
        else:
            raise ConfigError("is not key=value", key=argument, fix=f"{fix}; known: {', '.join(keys)}")
    if missing_key := next((key for key, problem in keys.items() if problem and key not in values), None):
        raise ConfigError(keys[missing_key], key=missing_key, fix=fix)
    return values, unparsed_arguments
