"""Values as they are typed on the command line: quoted for Hydra only where that is necessary, and for the shell."""

import re
import shlex

# A text that is not taken as it is typed: null, quoted, an interpolation, or a function of a sweep.
QUOTED = r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^'\\]|\\.)*'"
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{[^{}]+\}")
FUNCTION = re.compile(r"\s*(choice|range|interval|glob|tag|shuffle|sort)\s*\((.*)\)\s*", re.S)
_SPECIAL = re.compile(rf"(?i:null)|{QUOTED}", re.S)


def quote(text: str, interpolate: bool = False) -> str:
    r"""Quote a text for Hydra: `it's` -> `"it's"`, `a\` -> `"a\\"`; `interpolate` leaves `${...}` to OmegaConf."""
    if not interpolate:
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return '"' + re.sub(r'(\\*)("|\Z)', lambda match: match[1] * 2 + (r"\"" if match[2] else ""), text) + '"'


def is_taken_as_typed(text: str) -> bool:
    """Return whether the value of a text key means these characters themselves."""
    return not (_SPECIAL.fullmatch(text) or INTERPOLATION.search(text) or FUNCTION.fullmatch(text))


def quote_if_needed(text: object) -> str:
    """Return a text as it is to be typed after `KEY=`: unchanged, or quoted for Hydra where it needs that."""
    return str(text) if is_taken_as_typed(str(text)) else quote(str(text))


def format_argument(key: str, value: object) -> str:
    """Return `KEY=VALUE` quoted for the shell, so that it can be pasted into a command."""
    return shlex.quote(f"{key}={quote_if_needed(value)}")
