"""Rules for untrusted names: of files, folders, objects in a bucket, records and classes.

A file name is a string with surrogate escapes (PEP 383), from which Python restores the bytes of the file system.
`escape_unprintable` prepares it for display. A name from a listing, a record or a file becomes a local path only with
`storage.local.join_inside`, which rejects the faults of `find_path_fault`. Every source normalizes its class names with
`normalize_class_name`, and only normalized class names are written to files.
"""

import re
import unicodedata

MAX_COMPONENT_BYTES = 255  # per path component, on all common file systems
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # can reorder the text on the screen
_ENDS = re.compile("^[\\s\ufeff]+|[\\s\ufeff]+$")
# A cell that begins like a formula of a spreadsheet, in full width too, or with the mark that `encode_cell` adds.
_BEGIN = r"['=+@\-\uff1d\uff0b\uff20\uff0d]"
_FORMULA = re.compile(rf"[\s\ufeff]*{_BEGIN}")
# In countries with a decimal comma a cell ends at ";", in quotes too if they do not begin the line.
_FORMULA_IN_NAME = re.compile(rf"(;[\s\ufeff]*)(?={_BEGIN})")
_ESCAPED_IN_NAME = re.compile(rf"(;[\s\ufeff]*)'(?={_BEGIN})")
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are not UTF-8, line and paragraph separators


def _escape(character: str) -> str:
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def escape_unprintable(text: str) -> str:
    r"""Escape line breaks, control characters, bidirectional marks, and bytes that are not UTF-8 (as "\xe9").

    The result fits on one line and can be encoded as UTF-8. The function is idempotent.
    """
    if text.isprintable() and not _BIDI.search(text):
        return text
    return "".join(_escape(c) if unicodedata.category(c) in _UNPRINTABLE or _BIDI.match(c) else c for c in text)


def normalize_class_name(name: str) -> str:
    """Escape unprintable characters, normalize to NFC, and strip spaces at both ends, which TFDS strips too.

    A byte order mark at an end, as of the first cell of some CSV files, counts as a space.
    """
    return _ENDS.sub("", unicodedata.normalize("NFC", escape_unprintable(name))) or r"\x20"


def encode_cell(name: str) -> str:
    """Escape a name for a CSV cell, with a ' where a spreadsheet would begin to compute it as a formula."""
    text = _FORMULA_IN_NAME.sub(r"\1'", escape_unprintable(name))
    return f"'{text}" if _FORMULA.match(text) else text


def decode_cell(cell: str) -> str:
    """Return the printable name that `encode_cell` wrote."""
    return _ESCAPED_IN_NAME.sub(r"\1", cell.removeprefix("'"))


def make_file_stem(text: str) -> str:
    """Convert any text to a file stem of at most 100 bytes, of letters, digits, ".", "-" and "_"."""
    stem = re.sub(r"[^\w.-]+", "-", text)
    return stem.encode()[:100].decode(errors="ignore")


def is_utf8(text: str) -> bool:
    """Return whether a text has no surrogate escapes, which represent other bytes in arguments and file names."""
    return encode_utf8(text).decode() == text


def encode_file_name(text: str) -> bytes:
    """Restore the bytes that the file system has for a file name."""
    return text.encode("utf-8", "surrogateescape")


def encode_utf8(content: bytes | str) -> bytes:
    r"""Encode text as UTF-8 and return bytes unchanged. A surrogate escape, as in a file name, becomes "\udcXX"."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def find_path_fault(name: str) -> str | None:
    """Return why a "/"-separated name cannot be a file below a folder; None if it can."""
    components = name.split("/")
    if name.startswith("/"):
        return "it begins with a slash"
    if "" in components:
        return "a component of it is empty"
    if {".", ".."} & set(components):
        return "a component of it is . or .."
    if "\0" in name:
        return "it has a null character"
    try:
        longest = max(len(encode_file_name(component)) for component in components)
    except UnicodeEncodeError:
        return "it has half of a surrogate pair"
    return f"a component of it is longer than {MAX_COMPONENT_BYTES} bytes" if longest > MAX_COMPONENT_BYTES else None
