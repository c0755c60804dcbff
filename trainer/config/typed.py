"""Quote values for the command line: for Hydra, if its grammar would not read them literally, and for the shell."""

import re
import shlex

# Regular expressions for what Hydra does not read literally: a quoted string, an interpolation, a sweep function, null.
QUOTED = r'"(?:[^"\\]|\\.)*"|' + r"'(?:[^'\\]|\\.)*'"
INTERPOLATION = re.compile(r"(?<!\\)(?:\\\\)*\$\{[^{}]+\}")
FUNCTION = re.compile(r"\s*(choice|range|interval|glob|tag|shuffle|sort)\s*\((.*)\)\s*", re.S)
_SPECIAL = re.compile(rf"(?i:null)|{QUOTED}", re.S)


def quote(text: str, interpolate: bool = False) -> str:
    r"""Quote a string for Hydra: `it's` -> `"it's"`, `a\` -> `"a\\"`.

    With `interpolate`, OmegaConf resolves `${...}` in the string; otherwise, `${` is escaped and remains literal.
    """
    if not interpolate:
        text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    return '"' + re.sub(r'(\\*)("|\Z)', lambda match: match[1] * 2 + (r"\"" if match[2] else ""), text) + '"'


def is_literal(text: str) -> bool:
    """Return whether KEY=TEXT sets a key that takes a string to `text` itself."""
    return not (_SPECIAL.fullmatch(text) or INTERPOLATION.search(text) or FUNCTION.fullmatch(text))


def quote_if_needed(text: object) -> str:
    """Return a value as users write it after `KEY=`: in quotes if Hydra requires them, otherwise unchanged."""
    return str(text) if is_literal(str(text)) else quote(str(text))


def format_argument(key: str, value: object) -> str:
    """Format `KEY=VALUE`, quoted for Hydra and the shell, so that it can be pasted into a command."""
    return shlex.quote(f"{key}={quote_if_needed(value)}")
