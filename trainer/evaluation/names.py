"""Names as a report can show them."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text without what cannot be encoded or shown on one line (file names may hold any bytes)."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
