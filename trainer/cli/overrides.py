"""Translate command-line arguments into overrides in Hydra's grammar, and back.

If a key takes a string, its value is literal: `data.root=~/photos (1)` needs no quotes except for the shell.
Exceptions are null, a value in quotes, `${...}`, and in a sweep a list of values or a function such as choice(a, b).
"""

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString, Sweep
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.config.diff import flatten
from trainer.config.keys import accepts_list, classify_key, describe_syntax, list_keys, suggest_key, suggest_name
from trainer.config.schema import RequestedConfig
from trainer.config.typed import FUNCTION, INTERPOLATION, QUOTED, format_argument, quote, quote_if_needed
from trainer.errors import ConfigError

GROUPS = {  # config group, which is a folder of conf/ -> its description in --help
    "data": "source of the images, and their splits",
    "model": "backbone, weights and image size",
    "augmentation": "random changes of the training images",
    "phases": "trainable layers, lengths and learning rates",
    "runtime": "devices, logs and caches",
    "debug": "trial runs",
    "experiment": "a whole recipe: data, model, augmentation and phases",
    "sweep": "a search over many runs",
}
_COMMON_PHASES: dict[str, Any] = {"head": {}, "fine_tune": {}}  # users choose phase names; suggestions use these two
# Config group that users often set to a path -> the arguments to write before the key that takes the path.
_ARGUMENTS_BEFORE_PATH = {"data": "data=image_folder ", "model": ""}
_KEY_VALUE = re.compile(r"(\+{0,2})([A-Za-z_][\w.]*)=(.*)", re.S)
# List element: a quoted string (in class weights followed by `: NUMBER`), or all text up to a comma outside brackets.
_ELEMENT = re.compile(rf"\s*(?:{QUOTED})\s*(?::[^,]*)?(?=,|\Z)|(?:\([^()]*\)|\[[^\[\]]*\]|\{{[^{{}}]*\}}|[^,])*", re.S)
# CLASS: NAME in a mapping. A class with a comma or colon must be in quotes, and so must a name with a comma.
_PAIR = re.compile(rf"\s*({QUOTED}|[^,:]+?)\s*:\s*({QUOTED}|[^,]+?)\s*(?:,|\Z)", re.S)
# Hydra option -> number of following arguments that are its value.
_OPTIONS = {"--multirun": 0, "-m": 0, "--run": 0, "-r": 0, "--resolve": 0, "--hydra-help": 0, "--cfg": 1, "-c": 1,
            "--package": 1, "-p": 1, "--config-dir": 1, "-cd": 1, "--info": 0, "-i": 0, "--help": 0, "-h": 0,
            "--version": 0}  # fmt: skip
_LONG_OPTIONS = {"-m": "--multirun", "-r": "--run", "-c": "--cfg", "-i": "--info"}
_COMMANDS = ("--multirun", "--run", "--cfg", "--info")  # Hydra accepts at most one of these


def translate_overrides(arguments: Sequence[str], is_sweep: bool = False) -> list[str]:
    """Translate arguments into overrides that Hydra parses. The function is idempotent.

    Args:
        arguments: Hydra options, which are returned unchanged, and KEY=VALUE or GROUP=NAME.
        is_sweep: whether an argument can have several values, one for each run.

    Raises:
        ConfigError: an option is unknown or lacks its value, options are mutually exclusive, an argument is neither an
            option nor KEY=VALUE, its value cannot be parsed, or it has several values without `is_sweep`.
    """
    overrides: list[str] = []
    num_values_left = 0  # number of following arguments that are the last option's value
    options: dict[str, str] = {}  # long option -> option as the user wrote it
    for index, argument in enumerate(arguments):
        if num_values_left:
            num_values_left -= 1
        elif argument.startswith("-"):
            option, equals, _ = argument.partition("=")
            if option not in _OPTIONS:
                raise _make_unknown_option_error(argument)
            num_values_left = 0 if equals else _OPTIONS[option]
            options[_LONG_OPTIONS.get(option, option)] = option
            option_values = argument.partition("=")[2:] if equals else tuple(arguments)[index + 1 : index + 2]
            if option in ("--cfg", "-c") and not {*option_values} & {"job", "hydra", "all"}:
                raise ConfigError("needs job, hydra or all", key=option, fix="write --cfg job")
        else:
            argument = _translate_override(argument, is_sweep)
        overrides.append(argument)
    commands = [options[name] for name in _COMMANDS if name in options]
    if len(commands) > 1:
        fix = f"leave out {' or '.join(commands)}"
        raise ConfigError(f"cannot be combined with {commands[0]}", key=commands[1], fix=fix)
    if "--resolve" in options and "--cfg" not in options:
        raise ConfigError("is only for --cfg", key="--resolve", fix="write --cfg job --resolve")
    return overrides


def move_options_first(arguments: Sequence[str]) -> list[str]:
    """Move the options before the overrides, since Hydra requires that all overrides are consecutive."""
    options: list[str] = []
    overrides: list[str] = []
    num_values_left = 0
    for argument in arguments:
        is_option = not num_values_left and argument.startswith("-")
        (options if is_option or num_values_left else overrides).append(argument)
        num_values_left = num_values_left - 1 if num_values_left else _OPTIONS.get(argument, 0) if is_option else 0
    # Hydra would read the argument after --info as its value.
    return ["--info=all" if argument in ("--info", "-i") else argument for argument in options] + overrides


def parse_override(override: str) -> Override:
    """Parse an override with Hydra's parser. Raises ConfigError if the override does not follow Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException:
        key, _, value = override.lstrip("+").partition("=")
        fix = f"write {key}=VALUE, a text in quotes: {shlex.quote(f'{key}={quote(value)}')}"
        raise ConfigError("cannot be read as a value", key=key, value=value, fix=fix) from None


def parse_value(override: str) -> Any:
    """Return the value of a KEY=VALUE argument: a string, number, bool, list, dict or None.

    Raises ConfigError if the value cannot be parsed, or refers to another key.
    """
    (translated,) = translate_overrides([override])
    return evaluate_override(translated)


def evaluate_override(override: str) -> Any:
    """Return the value of an override in Hydra's grammar: a string, number, bool, list, dict or None.

    Raises ConfigError if the value cannot be parsed, or refers to another key.
    """
    parsed = parse_override(override)
    try:
        value = OmegaConf.to_container(OmegaConf.create([parsed.value()]), resolve=True)[0]  # type: ignore[index]
    except OmegaConfBaseException:
        fix = "give the value itself; a reference to another key is for runs only"
        raise ConfigError("cannot be resolved", key=parsed.key_or_group, value=parsed.value(), fix=fix) from None
    key = parsed.key_or_group
    value_type = classify_key(RequestedConfig, key)
    parsers: dict[str, Callable[[Any, str], Any]] = {"weights": parse_weights, "names": parse_names}
    return parsers[value_type](value, key) if value_type in parsers else value


def format_override(override: str) -> str:
    """Format an override as a user would type it: without `+` and the quotes that `translate_overrides` adds."""
    match = _KEY_VALUE.fullmatch(override)
    if not match:  # trainer.cli.compose turns distillation.model=NAME into +model@distillation.model=NAME
        return re.sub(r"^\+(\w+)@(distillation\.\1=)", r"\2", override)
    _, key, value = match.groups()
    value_type = classify_key(RequestedConfig, key)
    if value_type in ("text", "weights", "names") and re.fullmatch(QUOTED, value, re.S):
        value = _format_text(key, value)
    elif value_type in ("text", "texts", "names"):
        value = re.sub(r'"([\w./~ -]+)"', lambda m: m[1] if m[1].strip() == m[1] and m[1] != "null" else m[0], value)
    return f"{key}={value}"


def _format_text(key: str, value: str) -> str:
    if INTERPOLATION.search(value):
        return value[1:-1] if value == _quote_text(value[1:-1]) else value
    text = OmegaConf.create({"x": parse_override(f"{key}={value}").value()})["x"]
    return str(text) if _quote_text(str(text)) == value else quote_if_needed(text)


def list_argument_keys(arguments: Sequence[str]) -> set[str]:
    """Return the keys that arguments set, such as {"seed", "data.root"}, except config groups and Hydra's own keys.

    If a value is a section, as in `optimizer={name: sgd, momentum: 0.9}`, the section's keys are returned:
    {"optimizer.name", "optimizer.momentum"}.
    """
    keys: set[str] = set()
    for argument in arguments:
        if match := _KEY_VALUE.fullmatch(argument):
            is_section = (
                re.fullmatch(r"\s*\{.*\}\s*", match[3], re.S) and classify_key(RequestedConfig, match[2]) == "other"
            )
            section = parse_override(argument).value() if is_section else {}
            keys.update(flatten({match[2]: section}) if isinstance(section, dict) and section else [match[2]])
    return {key for key in keys - GROUPS.keys() if not key.startswith("hydra")}


def map_argument_values(arguments: Sequence[str]) -> dict[str, str]:
    """Map each key and group in the arguments to its last value, unparsed: {"data.root": "photos"}."""
    return {match[2]: match[3] for argument in arguments if (match := _KEY_VALUE.fullmatch(argument))}


def split_elements(text: str) -> list[str]:
    """Split a list in text form at its commas, except those in quotes or brackets: `a, "b,c"` -> ["a", ' "b,c"']."""
    elements = []
    start = 0
    while True:
        match = _ELEMENT.match(text, start)
        assert match, "the pattern matches nothing as well"
        elements.append(match[0])
        if match.end() == len(text):
            return elements
        start = match.end() + 1


def parse_weights(value: Any, key: str) -> Any:
    """Parse class weights, in which names need no quotes: "{a b: 1, c: 2}" -> {"a b": "1", "c": "2"}.

    Any other value is returned unchanged. Raises ConfigError about `key` if a class has no number or several numbers.
    """
    if not isinstance(value, str) or not re.fullmatch(r"\{.*\}", value, re.S):
        return value
    weights: dict[str, str] = {}
    for item in filter(str.strip, split_elements(value[1:-1])):
        name, colon, number = item.rpartition(":")
        name = _unquote(name.strip())
        if not colon:
            fix = f"write it as NAME: NUMBER, as in {{{item.strip()}: 2}}"
            raise ConfigError(f"has no number for {item.strip()}", key=key, value=value, fix=fix)
        if name in weights:
            raise ConfigError(f"has several numbers for {name}", key=key, value=value, fix="give each class one number")
        weights[name] = number.strip()
    return weights


def parse_names(value: Any, key: str) -> Any:
    """Parse display names of classes: "{n01: red rose, n02: daisy}" -> {"n01": "red rose", "n02": "daisy"}.

    Names need no quotes. Any other value is returned unchanged. Raises ConfigError about `key` if an item is not
    CLASS: NAME, or a class occurs twice.
    """
    if not isinstance(value, str) or not re.fullmatch(r"\{.*\}", value, re.S):
        return value
    display_names: dict[str, str] = {}
    items = value[1:-1]
    position = 0
    while remaining_items := items[position:].strip():
        pair = _PAIR.match(items, position)
        if not pair:
            fix = "write it as CLASS: NAME, as in {n01: cat}, in quotes if it has a comma or a colon"
            raise ConfigError(f"has no class and name at {remaining_items[:40]}", key=key, value=value, fix=fix)
        class_name, display_name = map(_unquote, pair.groups())
        if class_name in display_names:
            raise ConfigError(
                f"has several names for {class_name}", key=key, value=value, fix="give each class one name"
            )
        display_names[class_name], position = display_name, pair.end()
    return display_names


def _unquote(text: str) -> str:
    return str(parse_override(f"x={text}").value()) if re.fullmatch(QUOTED, text, re.S) else text


def _translate_override(text: str, is_sweep: bool) -> str:
    """Translate one KEY=VALUE, GROUP=NAME or other Hydra override, such as ~KEY, to Hydra's grammar."""
    match = _KEY_VALUE.fullmatch(text)
    if not match:
        if not re.match(r"~|\+{0,2}[\w/]+@?[\w./]*=", text):
            raise _make_missing_key_error(text)
        group, _, value = text.partition("=")
        if not text.startswith("~"):
            _check_choice_is_string(group.lstrip("+"), value)
        parse_override(text)  # ~key, group@package=name, ...
        return text
    plus, key, value = match.groups()
    value_type = "other" if key in GROUPS or key.startswith("hydra") else classify_key(RequestedConfig, key)
    if value_type == "names":
        value_type = "weights" if re.match(r"\s*(choice\s*\(\s*)?\{", value) else "texts"
    if key in GROUPS:
        _check_group(key, value, is_sweep)
    elif value_type == "text":
        if FUNCTION.fullmatch(value) and not is_sweep:
            raise _make_several_values_error(text)
        value = ",".join(_quote_sweep_values(value, _quote_text)) if is_sweep else _quote_text(value)
    elif value_type == "texts":
        # Without a sweep, `a, b` is one list in which the brackets may be omitted.
        is_bare = not is_sweep and value and not re.fullmatch(r"\s*(\[.*\]|(?i:null)|\$\{.*\})\s*", value, re.S)
        if is_bare:
            lists = [f"[{value}]"]
        else:
            lists = split_elements(value) if is_sweep and not FUNCTION.fullmatch(value) else [value]
        value = ",".join(_quote_list(item.strip()) for item in lists)
    elif value_type == "weights":
        values = _quote_sweep_values(value, _quote_weights)
        if not is_sweep and len(values) > 1:
            raise _make_several_values_error(text)
        value = ",".join(values) if is_sweep else _quote_weights(value)
    try:
        parsed = parse_override(f"{plus}{key}={value}")
    except ConfigError as error:
        raise _make_unreadable_value_error(text, error) from None
    if not is_sweep and parsed.is_sweep_override():
        raise _make_several_values_error(text)
    return f"{plus}{key}={value}"


def _quote_text(text: str) -> str:
    """Quote a string for Hydra, unless it is null, empty or already quoted."""
    if not text or re.fullmatch(rf"(?i:null)|{QUOTED}", text, re.S):
        return text
    return quote(text, interpolate=bool(INTERPOLATION.search(text)))


def _quote_sweep_values(value: str, quote_one: Callable[[str], str]) -> list[str]:
    """Split a sweep's values, such as `a (1),b` or choice(a, b), and quote each with `quote_one`.

    Any other function, such as range(1, 4), is returned as one value, unchanged.
    """
    function = FUNCTION.fullmatch(value)
    if function and function[1] != "choice":
        return [value]
    # `choice(...)` becomes a plain list, since Hydra passes the values of choice(...) to the jobs without their quotes.
    return [quote_one(element.strip()) for element in split_elements(function[2] if function else value)]


def _quote_weights(text: str) -> str:
    """Quote a mapping such as `{a b: 1}`, which Hydra would parse as a dict; return any other value unchanged."""
    return quote(text.strip()) if re.fullmatch(r"\s*\{.*\}\s*", text, re.S) else text


def _quote_list(text: str) -> str:
    """Quote the elements of a list such as `[a b, c]`; return any other value unchanged."""
    if not re.fullmatch(r"\[.*\]", text, re.S) or not text[1:-1].strip():
        return text
    elements = [element.strip() for element in split_elements(text[1:-1])]
    return "[" + ",".join(quote(e) if e.lower() == "null" else _quote_text(e) for e in elements) + "]"


def _check_group(group: str, value: str, is_sweep: bool) -> None:
    """Raise a ConfigError if the value cannot be a choice of the config group, for example because it is a path."""
    if re.fullmatch(r"[\w-]+(/[\w-]+)*", value) or (is_sweep and value):
        function = FUNCTION.fullmatch(value)
        for name in split_elements(function[2] if function else value) if is_sweep else [value]:
            _check_choice_is_string(group, name)
        return
    if "," in value and not is_sweep and value[:1] not in "[{(":
        raise _make_several_values_error(f"{group}={value}")
    raise ConfigError(f"there is no such {group}", key=group, value=value, fix=suggest_choice_fix(group, value))


def suggest_choice_fix(group: str, value: str) -> str:
    """Return the fix for a value that is not a choice of a config group. For a path, it names the key for paths."""
    is_folder = group == "data" and value and Path(value).expanduser().is_dir()
    if group in _ARGUMENTS_BEFORE_PATH and (is_folder or re.search(r"[/~\\]", value)):
        key = f"{group}.{'root' if group == 'data' else 'weights'}"
        return f"write {_ARGUMENTS_BEFORE_PATH[group]}{format_argument(key, value.rstrip('/'))}"
    return "leave it out" if value.lower() == "null" else "choose one by its name: --help lists them"


def _check_choice_is_string(group: str, value: str) -> None:
    """Raise a ConfigError if Hydra would read the choice of a config group as a number, a bool or null."""
    if not isinstance(parse_override(f"x={value}").value(), str | list | QuotedString | Sweep):
        raise ConfigError(f"there is no such {group}", key=group, value=value, fix=suggest_choice_fix(group, value))


def _make_several_values_error(text: str) -> ConfigError:
    """Make the error for an argument with several values outside of a sweep, such as `seed=1,2`."""
    key, _, value = text.lstrip("+").partition("=")
    fix = "add -m for a run with each of them"
    if key not in GROUPS:
        if classify_key(RequestedConfig, key) == "text":
            fix += f", or write it in quotes: {shlex.quote(f'{key}={quote(value)}')}"
        elif accepts_list(RequestedConfig, key):
            fix += f", or write it as a list: {shlex.quote(f'{key}=[{value}]')}"
        elif syntax_hint := describe_syntax(RequestedConfig, key):
            fix += f", or {syntax_hint}"
    return ConfigError("has several values", key=key, value=value, fix=fix)


def _make_unreadable_value_error(text: str, error: ConfigError) -> ConfigError:
    """Return the error for a value that Hydra cannot parse, with the value as the user typed it."""
    key, _, value = text.lstrip("+").partition("=")
    list_match = re.fullmatch(r"\s*\[(.*)\]\s*", value, re.S)
    elements = split_elements(list_match[1] if list_match else value)
    if accepts_list(RequestedConfig, key) and len(elements) > 1 and not all(map(str.strip, elements)):
        return ConfigError("has an empty element", key=key, value=value, fix="remove the empty element")
    return ConfigError(error.problem, key=key, value=value, fix=describe_syntax(RequestedConfig, key) or error.fix)


def _make_missing_key_error(text: str) -> ConfigError:
    """Make the error for an argument that is not KEY=VALUE, such as the path of a folder."""
    if Path(text).expanduser().is_dir():
        fix = f"write {format_argument('data.root', text)}"
    else:
        fix = "write KEY=VALUE, such as training.batch_size=16, or GROUP=NAME, such as model=xception"
    return ConfigError("is not KEY=VALUE", key=text, fix=fix)


def _make_unknown_option_error(text: str) -> ConfigError:
    """Make the error for an unknown option, which may be a key with dashes, such as `--batch-size=8`."""
    name = text.partition("=")[0].lstrip("-").replace("-", "_")
    known_keys = list_keys(RequestedConfig, {"phases": _COMMON_PHASES})
    suggestion = suggest_key(name, [*GROUPS, *known_keys])
    if suggestion.startswith("did you mean"):
        return ConfigError("there is no such option", key=text, fix=f"keys have no dashes: {suggestion}")
    return ConfigError("there is no such option", key=text, fix=suggest_name(text, list(_OPTIONS)))
