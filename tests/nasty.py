"""Names of files, folders, classes, objects and runs that often break programs, drawn at random from difficult parts."""

import os
import random

PIECES = (
    "a", "b7", " ", ".", "..", "...", "-", "--help", "~", "=", "=1+1", "+", "@", "'", '"', "`", "$", "$(x)", "\\", "|", "*",
    "?", "[2024]", "{a,b}", "<b>", "&amp;", "#", "%2F", "%", ",", ";", ":", "!", "\n", "\r", "\t", "\x1b[31m", "\x7f", "\x85",
    "\u2028", "\u202e", "\ufeff", "\u00e9", "e\u0301", "\u0130", "\u6f22", "\U0001f469\u200d\U0001f467", "\udce9", "\udcff", "con",
    "x" * 90,
)  # fmt: skip
FIXED = (
    "=cmd|' /C calc'!A0".replace("/", ""), "-rf", "~", "~root", "a\nb", "caf\udce9", "x" * 255, "\u00e9" * 127, "NUL",
    "a`b|c<script>", "'; DROP", "$HOME", "%s", "{}", "[x]", "a//b".replace("/", ":"), "\u202etxt", "train ", " a",
)  # fmt: skip


def file_names(seed: int, count: int) -> list[str]:
    """Draw different names that a file or folder can have, as Python decodes them. None begins with a dot."""
    draw, names = random.Random(seed), dict.fromkeys(FIXED[:count])
    while len(names) < count:
        name = "".join(draw.choices(PIECES, k=draw.randint(1, 6)))
        name = os.fsdecode(os.fsencode(name)[:255])
        if not name.startswith("."):
            names[name] = None
    return list(names)


def mixed_names(seed: int, count: int) -> list[str]:
    """Draw different names of files, of which half are from `FIXED`."""
    drawn = file_names(seed, len(FIXED) + count)[len(FIXED) :]
    return [*random.Random(seed).sample(FIXED, count // 2), *drawn[: count - count // 2]]


def paths(seed: int, count: int) -> list[str]:
    """Draw names with slashes, dots and null characters, as a listing or a record could have them."""
    draw = random.Random(seed)
    pieces = (*PIECES, "/", "/", "/", "//", "../", "/..", "./", "\0", "\ud800", "x" * 256)
    return ["".join(draw.choices(pieces, k=draw.randint(1, 7))) for _ in range(count)]
