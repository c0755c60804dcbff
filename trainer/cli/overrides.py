"""Translate arguments as they are typed into overrides in Hydra's grammar, and back.

The value of a text key is taken as it is typed: `data.root=~/photos (1)` needs no quotes but the shell's. Exceptions:
null, a value in quotes, `${...}`, and in a sweep a list of values or a function such as choice(a, b).
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.diff import flat
from trainer.config.keys import keys_of, kind_of, suggest_key, suggest_name
from trainer.config.schema import RequestedConfig
from trainer.config.typed import FUNCTION, INTERPOLATION, QUOTED, argument, quote, typed
from trainer.errors import ConfigError

GROUPS = {  # folder of conf/ -> its meaning in --help
    "data": "source of the images, and their splits",
    "model": "backbone, weights and image size",
    "augmentation": "random changes of the training images",
    "phases": "trainable layers, lengths and learning rates",
    "runtime": "devices, logs and caches",
    "debug": "trial runs",
    "experiment": "a whole recipe: data, model, augmentation and phases",
    "sweep": "a search over many runs",
}
_PHASES: dict[str, Any] = {"head": {}, "fine_tune": {}}  # the usual ones, for suggestions
_PATH_KEYS = {"data": "data=image_folder ", "model": ""}  # group -> what precedes the key that takes a path
_KEY_VALUE = re.compile(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", re.S)
# One of several values: quoted (in weights followed by a number), or text up to the next comma outside of brackets.
_ELEMENT = re.compile(rf"\s*(?:{QUOTED})\s*(?::[^,]*)?(?=,|\Z)|(?:\([^()]*\)|\[[^\[\]]*\]|\{{[^{{}}]*\}}|[^,])*", re.S)
# Options of Hydra, and the number of values that follow each.
_OPTIONS = {"--multirun": 0, "-m": 0, "--run": 0, "-r": 0, "--resolve": 0, "--hydra-help": 0, "--cfg": 1, "-c": 1,
            "--package": 1, "-p": 1, "--config-dir": 1, "-cd": 1, "--info": 0, "-i": 0, "--help": 0, "-h": 0,
            "--version": 0}  # fmt: skip
_SAME_OPTION = {"-m": "--multirun", "-r": "--run", "-c": "--cfg", "-i": "--info"}
_COMMANDS = ("--multirun", "--run", "--cfg", "--info")  # Hydra takes at most one of these


def typed_overrides(arguments: Sequence[str], sweep: bool = False) -> list[str]:
    """Translate arguments into overrides that Hydra parses; those that are overrides already are unchanged.

    Args:
        sweep: whether a value may be a list of values, one for each run.

    Raises:
        ConfigError: an argument is neither an option nor KEY=VALUE, its value cannot be parsed, or options exclude one
            another.
    """
    overrides: list[str] = []
    values, options = 0, {}
    for position, text in enumerate(arguments):
        if values:
            values -= 1
        elif text.startswith("-"):
            option, equals, _ = text.partition("=")
            if option not in _OPTIONS:
                raise _no_such_option(text)
            values = 0 if equals else _OPTIONS[option]
            options[_SAME_OPTION.get(option, option)] = option
            shown = text.partition("=")[2:] if equals else tuple(arguments)[position + 1 : position + 2]
            if option in ("--cfg", "-c") and not {*shown} & {"job", "hydra", "all"}:
                raise ConfigError("needs job, hydra or all", key=option, fix="write --cfg job")
        else:
            text = _override(text, sweep)
        overrides.append(text)
    commands = [options[name] for name in _COMMANDS if name in options]
    if len(commands) > 1:
        fix = f"leave out {' or '.join(commands)}"
        raise ConfigError(f"cannot be combined with {commands[0]}", key=commands[1], fix=fix)
    if "--resolve" in options and "--cfg" not in options:
        raise ConfigError("is only for --cfg", key="--resolve", fix="write --cfg job --resolve")
    return overrides


def options_first(arguments: Sequence[str]) -> list[str]:
    """Move the options before the overrides, since Hydra reads only overrides that are all in a row."""
    options: list[str] = []
    overrides: list[str] = []
    values = 0
    for text in arguments:
        is_option = not values and text.startswith("-")
        (options if is_option or values else overrides).append(text)
        values = values - 1 if values else _OPTIONS.get(text, 0) if is_option else 0
    # Hydra takes what follows a plain --info as its value.
    return ["--info=all" if text in ("--info", "-i") else text for text in options] + overrides


def parse(override: str) -> Override:
    """Parse one override; raises ConfigError if it is not in Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        key, _, value = override.lstrip("+").partition("=")
        fix = f"write {key}=VALUE, a text in quotes: {shlex.quote(f'{key}={quote(value)}')}"
        raise ConfigError("cannot be read as a value", key=key, value=value, fix=fix) from None


def typed_value(override: str) -> Any:
    """Return the value of one argument as Python: text, number, bool, list, dict or None."""
    (translated,) = typed_overrides([override])
    return value_of(translated)


def value_of(override: str) -> Any:
    """Return the value of an override in Hydra's grammar as Python; raises ConfigError if it refers to another key."""
    parsed = parse(override)
    try:
        value = OmegaConf.to_container(OmegaConf.create([parsed.value()]), resolve=True)[0]  # type: ignore[index]
    except OmegaConfBaseException:
        fix = "give the value itself; a reference to another key is for runs only"
        raise ConfigError("cannot be resolved", key=parsed.key_or_group, value=parsed.value(), fix=fix) from None
    return read_weights(value) if kind_of(RequestedConfig, parsed.key_or_group) == "weights" else value


def shown(override: str) -> str:
    """Return an override as a user would type it, without the quotes that `typed_overrides` adds."""
    match = _KEY_VALUE.fullmatch(override)
    if not match:
        return override
    _, key, value = match.groups()
    if kind_of(RequestedConfig, key) in ("text", "weights") and re.fullmatch(QUOTED, value, re.S):
        value = _shown_text(key, value)
    elif kind_of(RequestedConfig, key) in ("text", "texts"):
        value = re.sub(r'"([\w./~ -]+)"', lambda m: m[1] if m[1].strip() == m[1] and m[1] != "null" else m[0], value)
    return f"{key}={value}"


def _shown_text(key: str, value: str) -> str:
    if INTERPOLATION.search(value):
        return value[1:-1] if value == _text(value[1:-1]) else value
    text = OmegaConf.create({"x": parse(f"{key}={value}").value()})["x"]
    return str(text) if _text(str(text)) == value else typed(text)


def given_keys(arguments: Sequence[str]) -> set[str]:
    """Return the keys that arguments set: {"seed", "data.root"}; groups and Hydra's keys are left out.

    Of a section that is given as `{name: sgd, momentum: 0.9}`, these are the keys in it.
    """
    keys: set[str] = set()
    for text in arguments:
        if match := _KEY_VALUE.fullmatch(text):
            is_section = re.fullmatch(r"\s*\{.*\}\s*", match[3], re.S) and kind_of(RequestedConfig, match[2]) == "other"
            tree = parse(text).value() if is_section else {}
            keys.update(flat({match[2]: tree}) if isinstance(tree, dict) and tree else [match[2]])
    return {key for key in keys - GROUPS.keys() if not key.startswith("hydra")}


def given_values(arguments: Sequence[str]) -> dict[str, str]:
    """Return the raw values of arguments by key, the last of each: {"data.root": "photos"}."""
    return {match[2]: match[3] for text in arguments if (match := _KEY_VALUE.fullmatch(text))}


def elements(text: str) -> list[str]:
    """Split a list of values at its commas, except in quotes and brackets."""
    parts, start = [], 0
    while True:
        match = _ELEMENT.match(text, start)
        assert match, "the pattern matches nothing as well"
        parts.append(match[0])
        if match.end() == len(text):
            return parts
        start = match.end() + 1


def read_weights(value: Any) -> Any:
    """Parse "{a b: 1, c: 2}", whose names are as they are typed; any other value is returned unchanged."""
    if not isinstance(value, str) or not re.fullmatch(r"\{.*\}", value, re.S):
        return value
    pairs = [part.rpartition(":") for part in elements(value[1:-1])]
    return {_unquoted(name.strip()): number.strip() for name, _, number in pairs if name or number.strip()}


def _unquoted(text: str) -> str:
    return str(parse(f"x={text}").value()) if re.fullmatch(QUOTED, text, re.S) else text


def _override(text: str, sweep: bool) -> str:
    """Translate one KEY=VALUE."""
    match = _KEY_VALUE.fullmatch(text)
    if not match:
        if not re.match(r"~|\+{0,2}[\w/]+@?[\w./]*=", text):
            raise _no_key(text)
        group, _, value = text.partition("=")
        if not text.startswith("~"):
            _check_text(group.lstrip("+"), value)
        parse(text)  # ~key, group@package=name, ...
        return text
    plus, key, value = match.groups()
    kind = "other" if key in GROUPS or key.startswith("hydra") else kind_of(RequestedConfig, key)
    if key in GROUPS:
        _check_group(key, value, sweep)
    elif kind == "text":
        if FUNCTION.fullmatch(value) and not sweep:
            raise _several_values(text)
        value = _texts(value) if sweep else _text(value)
    elif kind == "texts":
        plain = not sweep and value and not re.fullmatch(r"\s*(\[.*\]|(?i:null)|\$\{.*\})\s*", value, re.S)
        parts = [f"[{value}]"] if plain else elements(value) if sweep and not FUNCTION.fullmatch(value) else [value]
        value = ",".join(_list(part.strip()) for part in parts)
    elif kind == "weights" and re.fullmatch(r"\s*\{.*\}\s*", value, re.S):
        value = quote(value.strip())
    if not sweep and parse(f"{plus}{key}={value}").is_sweep_override():
        raise _several_values(text)
    if sweep:
        parse(f"{plus}{key}={value}")
    return f"{plus}{key}={value}"


def _text(text: str) -> str:
    """Quote a text for Hydra, unless it is null, empty, or quoted already."""
    if not text or re.fullmatch(rf"(?i:null)|{QUOTED}", text, re.S):
        return text
    return quote(text, interpolate=bool(INTERPOLATION.search(text)))


def _texts(value: str) -> str:
    """Quote each of the values of a sweep: `a (1),b` or choice(a, b)."""
    function = FUNCTION.fullmatch(value)
    if function and function[1] != "choice":
        return value
    # As a plain list, since Hydra passes the values of choice(...) to the jobs without their quotes.
    return ",".join(_text(part.strip()) for part in elements(function[2] if function else value))


def _list(text: str) -> str:
    """Quote the elements of `[a b, c]`."""
    if not re.fullmatch(r"\[.*\]", text, re.S) or not text[1:-1].strip():
        return text
    parts = [part.strip() for part in elements(text[1:-1])]
    return "[" + ",".join(quote(part) if part.lower() == "null" else _text(part) for part in parts) + "]"


def _check_group(group: str, value: str, sweep: bool) -> None:
    """Raise a ConfigError if the value cannot be the name of a file of a group, such as a path."""
    if re.fullmatch(r"[\w-]+(/[\w-]+)*", value) or (sweep and value):
        function = FUNCTION.fullmatch(value)
        for name in elements(function[2] if function else value) if sweep else [value]:
            _check_text(group, name)
        return
    if "," in value and not sweep and value[:1] not in "[{(":
        raise _several_values(f"{group}={value}")
    raise ConfigError(f"there is no such {group}", key=group, value=value, fix=fix_of_choice(group, value))


def fix_of_choice(group: str, value: str) -> str:
    """Return the fix for a value that is no file of a group: the key that takes a path, if it is one."""
    is_folder = group == "data" and value and Path(value).expanduser().is_dir()
    if group in _PATH_KEYS and (is_folder or re.search(r"[/~\\]", value)):
        key = f"{group}.{'root' if group == 'data' else 'weights'}"
        return f"write {_PATH_KEYS[group]}{argument(key, value.rstrip('/'))}"
    return "leave it out" if value.lower() == "null" else "choose one by its name: --help lists them"


def _check_text(group: str, value: str) -> None:
    """Raise a ConfigError if Hydra reads the name of a file of a group as a number, a truth value or null."""
    if not isinstance(parse(f"x={value}").value(), str | list | QuotedString | Sweep):
        raise ConfigError(f"there is no such {group}", key=group, value=value, fix=fix_of_choice(group, value))


def _several_values(text: str) -> ConfigError:
    key, _, value = text.lstrip("+").partition("=")
    kind = kind_of(RequestedConfig, key)
    fix = "add -m for a run with each of them"
    if key not in GROUPS:
        single, how = (quote(value), "in quotes") if kind == "text" else (f"[{value}]", "as a list")
        fix += f", or write it {how}: {shlex.quote(f'{key}={single}')}"
    return ConfigError("has several values", key=key, value=value, fix=fix)


def _no_key(text: str) -> ConfigError:
    if Path(text).expanduser().is_dir():
        fix = f"write {argument('data.root', text)}"
    else:
        fix = "write KEY=VALUE, such as training.batch_size=16, or GROUP=NAME, such as model=xception"
    return ConfigError("is not KEY=VALUE", key=text, fix=fix)


def _no_such_option(text: str) -> ConfigError:
    name = text.partition("=")[0].lstrip("-").replace("-", "_")
    known = keys_of(RequestedConfig, {"phases": _PHASES})
    near = suggest_key(name, [*GROUPS, *known])
    if near.startswith("did you mean"):
        return ConfigError("there is no such option", key=text, fix=f"keys have no dashes: {near}")
    return ConfigError("there is no such option", key=text, fix=suggest_name(text, list(_OPTIONS)))
