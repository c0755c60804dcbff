"""Handle untrusted names of files, folders, objects in buckets, records and classes: escape, normalize, validate.

A file name is a string with surrogate escapes (PEP 383), from which Python restores the bytes of the file system.
`escape_unprintable` prepares a name for display. `storage.local.safe_join` converts a name from a listing, a record
or a file to a local path, and rejects names for which `find_path_error` returns a reason. Every dataset source
normalizes its class names with `normalize_class_name`. Only normalized class names are written to files.
"""

import re
import unicodedata

MAX_COMPONENT_BYTES = 255  # limit of common file systems for a component of a path
_BIDI = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")  # bidirectional marks, which can reorder text
_SURROUNDING_SPACES = re.compile("^[\\s\ufeff]+|[\\s\ufeff]+$")
# First character of a cell that a spreadsheet would take for a formula (full-width characters included), or the quote
# that `encode_cell` adds.
_FORMULA_START = r"['=+@\-\uff1d\uff0b\uff20\uff0d]"
_FORMULA = re.compile(rf"[\s\ufeff]*{_FORMULA_START}")
# Where the decimal separator is a comma, spreadsheets separate cells at ";", even in quotes that do not begin the line.
_FORMULA_IN_NAME = re.compile(rf"(;[\s\ufeff]*)(?={_FORMULA_START})")
_ESCAPED_IN_NAME = re.compile(rf"(;[\s\ufeff]*)'(?={_FORMULA_START})")
_UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, bytes that are not UTF-8, line and paragraph separators


def _escape(character: str) -> str:
    """Return the escape sequence of one unprintable character."""
    if 0xDC80 <= ord(character) <= 0xDCFF:  # a byte that is not UTF-8
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def escape_unprintable(text: str) -> str:
    r"""Escape line breaks, control characters, bidirectional marks, and bytes that are not UTF-8 (as "\xe9").

    The result is a single line that can be encoded as UTF-8. Escaping it again does not change it.
    """
    if text.isprintable() and not _BIDI.search(text):
        return text
    return "".join(_escape(c) if unicodedata.category(c) in _UNPRINTABLE or _BIDI.match(c) else c for c in text)


def normalize_class_name(name: str) -> str:
    r"""Return a class name with unprintable characters escaped, in Unicode NFC, without spaces at its ends.

    TFDS strips these spaces too. A byte order mark, with which some CSV files begin, counts as a space. A name without
    any other character becomes "\x20".
    """
    return _SURROUNDING_SPACES.sub("", unicodedata.normalize("NFC", escape_unprintable(name))) or r"\x20"


def encode_cell(name: str) -> str:
    """Escape a name for a CSV cell: unprintable characters, and a ' before anything that would be a formula."""
    text = _FORMULA_IN_NAME.sub(r"\1'", escape_unprintable(name))
    return f"'{text}" if _FORMULA.match(text) else text


def decode_cell(cell: str) -> str:
    """Return the escaped name from a cell that `encode_cell` wrote, without the quotes against formulas."""
    return _ESCAPED_IN_NAME.sub(r"\1", cell.removeprefix("'"))


def make_file_stem(text: str) -> str:
    """Convert any text to a file stem of at most 100 bytes: letters and digits of any language, ".", "-" and "_"."""
    stem = re.sub(r"[^\w.-]+", "-", text)
    return stem.encode()[:100].decode(errors="ignore")


def is_utf8(text: str) -> bool:
    """Return whether a text can be encoded as UTF-8: it has no surrogates, with which Python represents other bytes."""
    return encode_utf8(text).decode() == text


def encode_file_name(text: str) -> bytes:
    """Return the bytes of a file name in the file system. Raise a UnicodeEncodeError for half of a surrogate pair."""
    return text.encode("utf-8", "surrogateescape")


def encode_utf8(content: bytes | str) -> bytes:
    r"""Encode text as UTF-8 and return bytes unchanged. A surrogate escape, as in a file name, becomes "\udcXX"."""
    return content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content


def find_path_error(name: str) -> str | None:
    """Return the reason why a relative name such as "a/b.jpg" cannot be a file in a folder, or None if it can."""
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
        max_bytes = max(len(encode_file_name(component)) for component in components)
    except UnicodeEncodeError:
        return "it has half of a surrogate pair"
    return f"a component of it is longer than {MAX_COMPONENT_BYTES} bytes" if max_bytes > MAX_COMPONENT_BYTES else None
