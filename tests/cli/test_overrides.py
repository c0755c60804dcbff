"""Arguments as they are typed: text without quotes, lists, weights, sweeps, and the commands that are printed."""

import random
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.errors import ANY, raises
from trainer.cli.compose import compose
from trainer.cli.overrides import (
    evaluate_override,
    format_override,
    list_argument_keys,
    parse_override,
    parse_value,
    split_elements,
    translate_overrides,
)
from trainer.cli.sweep import _use_sweep_folder
from trainer.config.diff import flatten
from trainer.config.schema import validate_config
from trainer.config.typed import format_argument, quote, quote_if_needed
from trainer.errors import ConfigError

TEXTS = [
    "~/photos", "train[:80%]", "photos (1)", "photos [2024]", "o/lr=1", "a,b", "it's", 'the "x"', "C:\\photos\\new\\",
    "a=b=c", "-x", "=x", "{a: 1}", "[a", "a]", "#1", "a;b", "*?", "100%", "2024", "0012", "1e5", "true", "nan", "é 猫 🐈",
    "a\nb", "a\tb", " a ", "a${b", "$HOME", "a\\${b}", "!x", "pattern:block_(1|2)_.*", "~", "@", "str(1)", "\\", "\\'",
    "a'b,c'd", "x\udce9",
]  # fmt: skip
TEXT_KEYS = [
    "data.root", "data.pattern", "data.image_field", "data.label_field", "data.class_prefix", "data.train_split",
    "data.validation_split", "data.test_split", "data.group_field", "output_dir", "warm_start", "experiment_name",
]  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_as_it_is_typed(text: str) -> None:
    if "\\$" not in text:
        assert parse_value(f"data.root={text}") == text
    (translated,) = translate_overrides([f"data.root={text}"])
    assert translate_overrides([translated]) == [translated]  # jobs of a sweep translate again


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""),
        ("null", None),
        ("NULL", None),
        ("'a b'", "a b"),
        ('"null"', "null"),
        ("runs/${seed} (1)", "runs/42 (1)"),
    ],
)
def test_exceptions_are_null_quotes_and_references(text: str, value: str | None) -> None:
    tree = compose(["data=digits", f"experiment_name={text}"])
    assert tree
    assert tree["experiment_name"] == value


def test_what_is_printed_for_the_user_reads_back_as_the_same_value() -> None:
    """Any text, quoted by `quote_if_needed` for Hydra and by `format_argument` for the shell, through both parsers."""
    draw = random.Random(0)
    alphabet = [*"ab/.~=,:;#!&|<>*?%@ \t\n'\"\\$()[]{}-_0é猫", "null", "${", "}", "choice(", "..", "//", "🐈", "\udce9"]
    texts = [*TEXTS, *("".join(draw.choices(alphabet, k=draw.randint(1, 9))) for _ in range(40))]
    for start in range(0, len(texts), len(TEXT_KEYS)):  # several at once, as a composition takes half a second
        given = dict(zip(TEXT_KEYS, texts[start : start + len(TEXT_KEYS)], strict=False))
        words = shlex.split(" ".join(format_argument(key, text) for key, text in given.items()))
        tree = flatten(compose(["data=image_folder", *words]) or {})
        assert {key: tree[key] for key in given} == given
        for key, text in given.items():
            assert parse_value(f"{key}={quote(text)}") == text
    assert quote_if_needed("photos (1)") == "photos (1)"
    assert format_argument("output_dir", "o/lr=1, a b") == "'output_dir=o/lr=1, a b'"


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[daisy,roses]", ["daisy", "roses"]),
        ("daisy,roses", ["daisy", "roses"]),
        ("[1, 02, 1e3, true, null]", ["1", "02", "1e3", "true", "null"]),
        ("[a b, it's, é (x), 'c,d']", ["a b", "it's", "é (x)", "c,d"]),
        ("null", None),
    ],
)
def test_a_list_of_texts_is_taken_as_it_is_typed(text: str, names: list[str] | None) -> None:
    assert parse_value(f"data.class_names={text}") == names


def test_weights_are_given_by_names_as_they_are_typed() -> None:
    tree = compose(["data=digits", "training.class_weights={a b: 2, it's: 0.5, x:y: 1, é: 3, 7: 1, 'c,d': 4}"])
    assert tree
    assert tree["training"]["class_weights"] == {
        "a b": "2", "it's": "0.5", "x:y": "1", "é": "3", "7": "1", "c,d": "4",
    }  # fmt: skip
    assert compose(["data=digits", "training.class_weights=balanced"])["training"]["class_weights"] == "balanced"  # type: ignore[index]


def test_shown_names_are_given_by_class_as_they_are_typed() -> None:
    typed = """{n01: red rose, "b:c": it's, 3: "a, b", é (x): 4 é,  'd"': e/f, <b>: null,}"""
    names = {"n01": "red rose", "b:c": "it's", "3": "a, b", "é (x)": "4 é", 'd"': "e/f", "<b>": "null"}
    tree = compose(["data=image_folder", "data.root=x", f"data.class_names={typed}"])
    assert tree
    assert tree["data"]["class_names"] == names
    assert validate_config(tree).data.class_names == names
    assert parse_value("data.class_names={a: b}") == {"a": "b"}
    (translated,) = translate_overrides(["data.class_names={a: b c},{a: d}"], is_sweep=True)
    jobs = [format_override(f"data.class_names={t}") for t in parse_override(translated).sweep_string_iterator()]
    assert jobs == ["data.class_names={a: b c}", "data.class_names={a: d}"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("data.root=~/a,~/b (1)", ["~/a", "~/b (1)"]),
        ("data.root=choice(~/a, x=1)", ["~/a", "x=1"]),
        ("data.train_split=train[:80%],train[:50%]", ["train[:80%]", "train[:50%]"]),
        ("data.root='a,b',c", ["a,b", "c"]),
        ("data.class_names=[a b,c],[c,d e]", [["a b", "c"], ["c", "d e"]]),
        ("seed=1,2", [1, 2]),
    ],
)
def test_a_sweep_takes_each_value_as_it_is_typed(given: str, expected: list[Any]) -> None:
    (translated,) = translate_overrides([given], is_sweep=True)
    parsed = parse_override(translated)
    assert parsed.is_sweep_override()
    values = [parse_override(f"x={text}").value() for text in parsed.sweep_string_iterator()]
    assert values == expected
    for text in parsed.sweep_string_iterator():  # what a job of the sweep gets, and is printed with
        key = given.partition("=")[0]
        assert parse_value(format_override(f"++{key}={text}")) in expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{1:1,2:2},{1:2,2:1}", [{"1": "1", "2": "2"}, {"1": "2", "2": "1"}]),
        ("{a b: 1, 'c,d': 2}, balanced, none", [{"a b": "1", "c,d": "2"}, "balanced", "none"]),
        ("choice({it's: 1, a's: 2}, {é: 3}, balanced)", [{"it's": "1", "a's": "2"}, {"é": "3"}, "balanced"]),
        ("balanced,none", ["balanced", "none"]),
        ("{'a}b': 1},{'{': 2}", [{"a}b": "1"}, {"{": "2"}]),
    ],
)
def test_a_sweep_over_weights_has_a_job_for_each(given: str, expected: list[Any]) -> None:
    (translated,) = translate_overrides([f"training.class_weights={given}"], is_sweep=True)
    jobs = [
        format_override(f"training.class_weights={text}") for text in parse_override(translated).sweep_string_iterator()
    ]
    assert [parse_value(job) for job in jobs] == expected
    with raises(ConfigError, "training.class_weights", given, "add -m for a run with each", "has several values"):
        translate_overrides([f"training.class_weights={given}"])


def test_elements_are_split_at_commas_outside_of_quotes_and_brackets() -> None:
    assert split_elements("a, 'b,c' ,d(e,f),g[h,i],j(k") == ["a", " 'b,c' ", "d(e,f)", "g[h,i]", "j(k"]
    assert split_elements("") == [""]


@pytest.mark.parametrize(
    ("argument", "key", "value", "problem", "fix"),
    [
        ("seed=[1", "seed", "[1", "cannot be read", "^use a whole number$"),
        ("training.batch_size=1,000", "training.batch_size", "1,000", "several", "each of them, or use a whole number$"),
        ("training.ema=0,9", "training.ema", "0,9", "several values", "each of them, or use a number$"),
        ("runtime.log_every=[1", "runtime.log_every", "[1", "cannot be read", "500 steps"),
        ("debug.profile_steps=[1", "debug.profile_steps", "[1", "cannot be read", r"^write a list, such as \[1,2\]$"),
        ("debug.profile_steps=[1,,2]", "debug.profile_steps", "[1,,2]", "an empty element", "remove"),
        ("data.class_names=[a,,b]", "data.class_names", "[a,,b]", "an empty element", "^remove the empty element$"),
        ("data.class_names=a,,b", "data.class_names", "a,,b", "an empty element", "^remove the empty element$"),
        ("training.class_weights={cat: 1", "training.class_weights", "{cat: 1", "cannot", "^write {cat: 1, dog: 2}$"),
        ("training.class_weights={a}", "training.class_weights", "{a}", "no number for a$", "as in {a: 2}"),
        ("training.class_weights={a: 1, a: 2}", "training.class_weights", "{a: 1, a: 2}", "several .* for a", "one"),
        ("data.class_names={a}", "data.class_names", "{a}", "no class and name at a$", "as in {n01: cat}"),
        ("data.class_names={a: b, c}", "data.class_names", "{a: b, c}", "no class and name at c$", "as in {n01: cat}"),
        ("data.class_names={a: b, a: c}", "data.class_names", "{a: b, a: c}", "several names for a$", "one name"),
        ("data.class_names={a: b", "data.class_names", "{a: b", "cannot be read", "shown, such as {a: cat, b: dog}$"),
        ("hydra.x=[1", "hydra.x", "[1", "cannot be read", r"'hydra.x=\"\[1\"'"),
        ("training.loss=focal,cross_entropy", "training.loss", "focal,cross_entropy", "several values", "add -m"),
        ("debug.profile_steps=15,25", "debug.profile_steps", "15,25", "several", r"'?debug.profile_steps=\[15,25\]"),
        ("data=digits,tfds", "data", "digits,tfds", "several values", "add -m"),
        ("output_dir=choice(a,b)", "output_dir", "choice(a,b)", "several values", r"'output_dir=\"choice\(a,b\)\"'"),
        ("data=/my photos", "data", "/my photos", "no such data", "data=image_folder 'data.root=/my photos'"),
        ("data=~/p/", "data", "~/p/", "no such data", "data=image_folder data.root=~/p|'data.root=~/p'"),
        ("model=x/y.h5", "model", "x/y.h5", "no such model", "model.weights=x/y.h5"),
        ("data=", "data", "", "no such data", "--help"),
        ("data=[digits]", "data", "[digits]", "no such data", "--help"),
        ("phases=3", "phases", "3", "no such phases", "--help"),
        ("model=null", "model", "null", "no such model", "leave it out"),
        ("sweep=null", "sweep", "null", "no such sweep", "leave it out"),
        ("debug=true", "debug", "true", "no such debug", "--help"),
        ("experiment=1e3", "experiment", "1e3", "no such experiment", "--help"),
        ("data@x=3", "data@x", "3", "no such data@x", "--help"),
        ("hydra/launcher=3", "hydra/launcher", "3", "no such hydra/launcher", "--help"),
        ("--resolve", "--resolve", None, "only for --cfg", "--cfg job"),
        ("photos", "photos", None, "is not KEY=VALUE", "training.batch_size=16"),
        ("=3", "=3", None, "is not KEY=VALUE", "KEY=VALUE"),
        ("a b=3", "a b=3", None, "is not KEY=VALUE", "KEY=VALUE"),
        ("--epochs=3", "--epochs=3", None, "no such option", "phases.head.epochs or phases.fine_tune.epochs"),
        ("--batch-size", "--batch-size", None, "no such option", "training.batch_size"),
        ("--frobnicate", "--frobnicate", None, "no such option", "--help"),
        ("--cfg", "--cfg", None, "needs job", "--cfg job"),
        ("output_dir=${nope}", "output_dir", None, "'nope' not found", r"\$\{seed\}"),
        ("data@x=digits", "data@x", None, "no such key", "did you mean data"),
        ("hydra.nope=1", "hydra.nope", None, "no such key", "known"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_has_its_key_and_what_to_type(
    argument: str, key: str, value: str | None, problem: str, fix: str
) -> None:
    with raises(ConfigError, key=key, value=value, problem=problem, fix=fix):
        compose([argument])


@pytest.mark.parametrize(
    ("arguments", "key"),
    [("-m phases=1,two_phase", "phases"), ("-m phases=choice(two_phase,1)", "phases"), ("-m seed=1,2 --cfg job", "--cfg"),
     ("--cfg=job --multirun seed=1", "--cfg"), ("-r -m seed=1", "-r"), ("--info -m", "--info")],
)  # fmt: skip
def test_a_sweep_has_one_error_too(arguments: str, key: str) -> None:
    with raises(ConfigError, key=key, value=ANY, problem="no such phases|cannot be combined"):
        compose(["data=digits", *arguments.split()])


@pytest.mark.parametrize(
    "arguments",
    [("data=digits", "-m", "seed=1,2"), ("-m", "data=digits", "seed=1,2"), ("data=digits", "seed=1,2", "--multirun"),
     ("data=digits", "--config-dir", "conf", "seed=1,2", "-m")],
)  # fmt: skip
def test_options_may_be_anywhere(arguments: tuple[str, ...]) -> None:
    jobs: list[str] = []
    compose(list(arguments), lambda _tree, overrides, _settings: jobs.append(overrides[-1]))  # type: ignore[arg-type]
    assert jobs == ["++seed=1", "++seed=2"]


@pytest.mark.parametrize("name", ["photos", "my photos", "2024", "photos/2024"])
def test_a_folder_as_data_is_the_root(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with raises(ConfigError, key="data", value=name, fix=f"data=image_folder {format_argument('data.root', name)}"):
        compose([f"data={name}"])


def test_a_folder_alone_is_the_root(tmp_path: Any) -> None:
    with raises(ConfigError, key=str(tmp_path), fix=rf"write data.root={tmp_path}"):
        compose([str(tmp_path)])


@pytest.mark.parametrize(
    ("given", "folder"),
    [("output_dir=o/lr=1", "o/lr=1"), ('output_dir="o/lr=1"', "o/lr=1"), ("output_dir=o (1)", "o (1)"),
     ("output_dir=null", None), ("output_dir='a,b'", "a,b"), ("output_dir=a${b", "a${b")],
)  # fmt: skip
def test_the_folder_of_a_sweep_may_have_any_name(given: str, folder: str | None) -> None:
    arguments, name = _use_sweep_folder(translate_overrides(["-m", "seed=1", given], is_sweep=True))
    assert name == folder
    assert arguments[:2] == ["-m", "seed=1"]
    if folder:
        assert evaluate_override(arguments[2]) == folder


def test_the_keys_of_a_command_line() -> None:
    assert list_argument_keys(["seed=1", "++data.root=x=y", "model=xception", "-m", "hydra.job.name=x", "~sweep"]) == {
        "seed", "data.root",
    }  # fmt: skip
