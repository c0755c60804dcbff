"""The rules for names from outside: printing, class names, and no path out of a folder."""

import os
import unicodedata
from pathlib import Path

import pytest

from tests.errors import raises
from tests.nasty import file_names, paths
from trainer.cli.arguments import parse_arguments
from trainer.config.schema import validate_config
from trainer.errors import ConfigError, DataError
from trainer.names import encode_utf8, escape_unprintable, find_path_error, make_file_stem, normalize_class_name
from trainer.storage.local import safe_join, temporary_file, write_json
from trainer.storage.path import storage_path


def test_what_does_not_print_is_escaped() -> None:
    texts = {
        "a\nb": r"a\nb", "caf\udce9": r"caf\xe9", "\x1b[31m": r"\x1b[31m", "\u2028": r"\u2028", "\u202etxt": r"\u202etxt",
        "\ud800": r"\ud800", "caf\u00e9 \u6f22": "caf\u00e9 \u6f22", "\U0001f469\u200d\U0001f467": "\U0001f469\u200d\U0001f467",
    }  # fmt: skip
    assert {text: escape_unprintable(text) for text in texts} == texts


def test_class_names_are_normalized() -> None:
    names = {"cafe\u0301": "caf\u00e9", " cat\n": r"cat\n", " ": r"\x20", "": r"\x20", "b\udce9": r"b\xe9", "12": "12",
             "\ufeffcat": "cat", "\ufeff cat \ufeff": "cat", "a\ufeffb": "a\ufeffb"}  # fmt: skip
    assert {name: normalize_class_name(name) for name in names} == names


@pytest.mark.parametrize("seed", range(5))
def test_names_fit_on_a_line_and_are_stable(seed: int) -> None:
    for name in [*file_names(seed, 300), *paths(seed, 300)]:
        for function in (escape_unprintable, normalize_class_name):
            text = function(name)
            assert len(text.splitlines()) <= 1, ascii(name)
            assert function(text) == text, ascii(name)
            assert encode_utf8(text) == text.encode(), ascii(name)
        assert normalize_class_name(unicodedata.normalize("NFD", name)) == normalize_class_name(name), ascii(name)
        stem = make_file_stem(name)
        assert (Path("f") / f"r-{stem}").parent == Path("f"), ascii(name)
        assert len(stem.encode()) <= 100


@pytest.mark.parametrize("seed", range(5))
def test_no_name_leaves_its_folder(tmp_path: Path, seed: int) -> None:
    refused = 0
    for name in paths(seed, 2000):
        for join in (safe_join, lambda folder, name: Path(str(storage_path(folder) / name))):
            try:
                path = join(tmp_path / "f", name)
            except DataError:
                refused += 1
                continue
            assert os.path.normpath(path) == str(path) != str(tmp_path / "f"), ascii(name)
            assert path.is_relative_to(tmp_path / "f"), ascii(name)
    assert 1000 < refused < 4000


REFUSED = {
    "/etc/passwd": "begins with a slash", "a//b": "is empty", "a/": "is empty", "": "is empty", "..": "is . or ..",
    "a/../../b": "is . or ..", "./a": "is . or ..", "a\0": "null character", "x" * 256: "longer than 255 bytes",
    "\u00e9" * 128: "longer than 255 bytes", "\ud800": "surrogate",
}  # fmt: skip


@pytest.mark.parametrize(("name", "problem"), REFUSED.items(), ids=range(len(REFUSED)))
def test_a_name_that_cannot_be_a_file_is_rejected(tmp_path: Path, name: str, problem: str) -> None:
    assert find_path_error(name)
    with raises(DataError, problem=problem, fix="rename or remove it"):
        safe_join(tmp_path, name)


@pytest.mark.parametrize("name", file_names(1, 120), ids=range(120))
def test_a_file_of_any_name_is_written(tmp_path: Path, name: str) -> None:
    path = storage_path(tmp_path / "out") / name
    path.write("x")
    assert [info.path.name for info in (storage_path(tmp_path / "out")).list()] == [name]
    assert os.listdir(os.fsencode(tmp_path / "out")) == [os.fsencode(name)]
    with temporary_file(tmp_path / name) as temporary:
        temporary.write_text("")
    write_json(tmp_path / "names.json", {"name": name})


def test_errors_print_their_value_on_one_line() -> None:
    assert str(DataError("is wrong", key="data.root", value="a\nb\udce9")) == r"data.root=a\nb\xe9: is wrong"


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", ".."])
def test_a_phase_is_no_path(name: str) -> None:
    tree = {
        "data": {"source": "digits"},
        "model": {"backbone": "MobileNetV2"},
        "phases": {name: {"thaw": "none", "epochs": 1}},
    }
    with raises(ConfigError, None) as caught:
        validate_config(tree)
    assert [error.fix for error in caught.value.errors] == ["name phases with letters, digits and _"]


@pytest.mark.parametrize("key", ["data.root", "output_dir", "experiment_name", "warm_start"])
def test_a_setting_that_is_not_utf8_is_rejected(key: str) -> None:
    tree = {"data": {"source": "image_folder", "root": "x"}, "model": {"backbone": "MobileNetV2"},
            "phases": {"head": {"thaw": "none", "epochs": 1}}}  # fmt: skip
    section, _, name = key.rpartition(".")
    (tree[section] if section else tree)[name] = "caf\udce9"  # type: ignore[index]
    with raises(ConfigError, None) as caught:
        validate_config(tree)
    assert (
        str(caught.value.errors[0]) == rf"{key}=caf\xe9: is not UTF-8; rename it, or give a link to it with such a name"
    )


def test_an_argument_that_is_not_utf8_is_rejected() -> None:
    with raises(ConfigError, "output", "caf\udce9", "rename it", "is not UTF-8"):
        parse_arguments(["output=caf\udce9"], "doc", {"output": ""})
