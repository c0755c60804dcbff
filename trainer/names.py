"""The rules for names from outside: of files, folders, objects in a bucket, records and classes.

A name of a file is the bytes of the file system, as Python decodes them (PEP 383). It is shown `printable`. A name that
comes from a listing, a record or a file becomes a local path only through `storage.local.inside`, which refuses what
`path_fault` names. The name of a class is its `class_name`, in every source and in every file that is written.
"""

import re
import unicodedata

MAX_PART_BYTES = 255  # of one component of a path, on all usual file systems
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # can show a text in another order
_ENDS = re.compile("^[\\s\ufeff]+|[\\s\ufeff]+$")
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are not UTF-8, line and paragraph separators


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def printable(text: str) -> str:
    r"""Escape line breaks, control characters, marks of bidirectional text, and bytes that are not UTF-8 (as "\xe9").

    The result fits on one line and can be encoded as UTF-8; escaping it again does not change it.
    """
    if text.isprintable() and not _BIDI.search(text):
        return text
    return "".join(_escape(c) if unicodedata.category(c) in _UNPRINTABLE or _BIDI.match(c) else c for c in text)


def class_name(name: str) -> str:
    """Return the name of a class: `printable`, normalized to NFC, and without spaces at its ends, which TFDS drops.

    A byte order mark at an end, as of the first cell of some CSV files, counts as a space.
    """
    return _ENDS.sub("", unicodedata.normalize("NFC", printable(name))) or r"\x20"


def file_stem(text: str) -> str:
    """Return a part of a file name for any text: letters, digits, ".", "-" and "_", at most 100 bytes."""
    stem = re.sub(r"[^\w.-]+", "-", text)
    return stem.encode()[:100].decode(errors="ignore")


def is_utf8(text: str) -> bool:
    """Return whether a text is UTF-8; an argument of the command line may be other bytes, as names of files may."""
    return encoded(text).decode() == text


def to_bytes(text: str) -> bytes:
    """Encode the name of a file as the bytes that the file system has."""
    return text.encode("utf-8", "surrogateescape")


def encoded(content: bytes | str) -> bytes:
    r"""Encode a text to be written as UTF-8; a byte that is not UTF-8, in the name of a file, becomes "\udcXX"."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def path_fault(name: str) -> str | None:
    """Return why a name, with "/" between its parts, cannot be that of a file below a folder; None if it can."""
    parts = name.split("/")
    if name.startswith("/"):
        return "it begins with a slash"
    if "" in parts:
        return "a part of it is empty"
    if {".", ".."} & set(parts):
        return "a part of it is . or .."
    if "\0" in name:
        return "it has a null character"
    try:
        longest = max(len(to_bytes(part)) for part in parts)
    except UnicodeEncodeError:
        return "it has half of a surrogate pair"
    return f"a part of it is longer than {MAX_PART_BYTES} bytes" if longest > MAX_PART_BYTES else None
