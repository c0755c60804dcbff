"""The arguments of a verb: what it accepts, returns and refuses."""

import pytest

from tests.config.test_schema import tree
from tests.errors import raises
from trainer import compare, drift, evaluate, export, plan, prepare, serve
from trainer.cli.arguments import MATCH_ALL, format_usage, parse_arguments, require_address
from trainer.config.schema import validate_config
from trainer.errors import ConfigError

DOC = """`python -m trainer.paint what=IMAGE [colour=red] [output=FILE]`:
paint an image.

    colour=red  note: any
"""
USAGE = "python -m trainer.paint what=IMAGE [colour=red] [output=FILE]"
KEYS = {"what": "an image is required", "colour": "", "output": ""}


def test_a_verb_reads_its_own_arguments_and_returns_the_rest() -> None:
    arguments = ["seed=1", "what=a=b", "--cfg", "job", "output=x", "data.root=", "brush.size=3", "~a\nb"]
    own, rest = parse_arguments(arguments, DOC, KEYS, other_keys=r"brush\..+", other_arguments=MATCH_ALL)
    assert own == {"what": "a=b", "output": "x", "brush.size": "3"}
    assert rest == ["seed=1", "--cfg", "job", "data.root=", "~a\nb"]


@pytest.mark.parametrize(
    ("arguments", "key", "value", "problem"),
    [
        ([], "what", None, "^an image is required$"),
        (["what="], "what", "", "^is empty$"),
        (["what=a", "what=b"], "what", "b", "^is given twice$"),
        (["what=a", "colour=red", "colour="], "colour", "", "^is given twice$"),
        (["what=a", "brush.size=3", "brush.size=3"], "brush.size", "3", "^is given twice$"),
        (["what=a", "color=red"], "color", None, "no such argument"),
        (["what=a", "=red"], "", None, "no such argument"),
        (["what=a", "red"], "red", None, "is not key=value"),
        (["what=a", "what"], "what", None, "is not key=value"),
        (["what=a", ""], "", None, "is not key=value"),
    ],
)
def test_each_error_has_its_key_and_the_usage(arguments: list[str], key: str, value: str | None, problem: str) -> None:
    with raises(ConfigError, key=key, value=value, problem=problem, fix=USAGE.replace("[", r"\[")) as caught:
        parse_arguments(arguments, DOC, KEYS, other_keys=r"brush\..+")
    assert ("did you mean colour?" in str(caught.value.fix)) == (key == "color")


ADDRESSES = [
    ("abfss://b/x", "is at abfss://, and only local paths, gs:// and s3://", "copy it to a local disk, gs:// or s3://"),
    ("S3://b/x", "is not the address of a bucket", "write s3://b/x"),
    ("s3a://b/x", "is not the address of a bucket", "write s3://b/x"),
    ("s3:///x", "is not the address of a bucket", "write s3://x"),
    ("gs:/b/x", "is not the address of a bucket", "write gs://b/x"),
    ("GS://b/x", "is not the address of a bucket", "write gs://b/x"),
    (" gs://b/x", "is not the address of a bucket", "write gs://b/x"),
    ("gs:b/x", "is not the address of a bucket", "write gs://b/x"),
    ("gs:///x", "is not the address of a bucket", "write gs://x"),
    ("gs://", "is not the address of a bucket", "write gs://bucket/folder"),
    ("file:///a/b", "is a URL", "write the path: /a/b"),
]


@pytest.mark.parametrize(("address", "problem", "fix"), ADDRESSES)
def test_an_address_of_another_scheme_has_its_key_and_the_right_spelling(address: str, problem: str, fix: str) -> None:
    for key in ("run", "output", "model"):
        with raises(ConfigError, key=key, value=address, problem=problem, fix=fix):
            parse_arguments([f"{key}={address}"], DOC, {key: ""})
    with raises(ConfigError, key=address, value=None, problem=problem, fix=fix):
        require_address(address)
    with raises(ConfigError, problem=f"output_dir=.*{problem}.*{fix}"):  # lists all errors
        validate_config(tree(output_dir=address))


@pytest.mark.parametrize(
    "address", ["gs://b", "gs://b/x", "s3://b/x", "C:/x", "photos: new", "a:b/c", " x", "./abfss://b"]
)
def test_other_addresses_are_unchanged(address: str) -> None:
    assert parse_arguments([f"run={address}"], DOC, {"run": ""})[0] == {"run": address}


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_the_docstring(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_arguments(["red", option], DOC, KEYS)
    assert not stop.value.code
    assert capsys.readouterr().out == f"{DOC}\n"


@pytest.mark.parametrize("verb", [compare, drift, evaluate, export, plan, prepare, serve])
def test_the_docstring_of_each_verb_begins_with_its_usage(verb: object) -> None:
    assert format_usage(verb.__doc__).startswith(f"python -m {verb.__name__} ")  # type: ignore[attr-defined]
    assert len(format_usage(verb.__doc__)) < 130
