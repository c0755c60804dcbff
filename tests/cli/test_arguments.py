"""The arguments of a verb: what it takes, what it hands on, and what it refuses."""

import pytest

from trainer import compare, drift, evaluate, export, plan, prepare, serve
from trainer.cli.arguments import ALL, read_arguments, usage
from trainer.errors import ConfigError

DOC = """`python -m trainer.paint what=IMAGE [colour=red] [output=FILE]`:
paint an image.

    colour=red  note: any
"""
USAGE = "python -m trainer.paint what=IMAGE [colour=red] [output=FILE]"
KEYS = {"what": "say once what to paint", "colour": "", "output": ""}


def test_a_verb_takes_its_own_and_hands_on_the_rest() -> None:
    arguments = ["seed=1", "what=a=b", "--cfg", "job", "output=x", "data.root=", "brush.size=3", "~a\nb"]
    told, rest = read_arguments(arguments, DOC, KEYS, more=r"brush\..+", rest=ALL)
    assert told == {"what": "a=b", "output": "x", "brush.size": "3"}
    assert rest == ["seed=1", "--cfg", "job", "data.root=", "~a\nb"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], f"say once what to paint: {USAGE}"),
        (["what="], f"say once what to paint: {USAGE}"),
        (["what=a", "what=a"], f"say once what to paint: {USAGE}"),
        (["what=a", "colour="], f"colour= is empty. Write {USAGE}"),
        (["what=a", "colour=red", "colour=blue"], f"colour is given twice. Write {USAGE}"),
        (["what=a", "brush.size=3", "brush.size=3"], f"brush.size is given twice. Write {USAGE}"),
        (["what=a", "color=red"], f"color: there is no such key. Did you mean colour? Write {USAGE}"),
        (["what=a", "=red"], f": there is no such key. Write {USAGE}"),
        (["what=a", "red"], f"red: arguments are key=value; known: what, colour, output. Write {USAGE}"),
        (["what=a", "what"], f"what: arguments are key=value; known: what, colour, output. Write {USAGE}"),
        (["what=a", ""], f": arguments are key=value; known: what, colour, output. Write {USAGE}"),
    ],
)
def test_each_mistake_is_one_sentence_and_how_to_write_it(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_arguments(arguments, DOC, KEYS, more=r"brush\..+")
    assert str(refused.value) == sentence


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_the_docstring(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        read_arguments(["red", option], DOC, KEYS)
    assert not stop.value.code
    assert capsys.readouterr().out == f"{DOC}\n"


@pytest.mark.parametrize("verb", [compare, drift, evaluate, export, plan, prepare, serve])
def test_the_docstring_of_each_verb_begins_with_how_it_is_called(verb: object) -> None:
    assert usage(verb.__doc__).startswith(f"python -m {verb.__name__} ")  # type: ignore[attr-defined]
    assert len(usage(verb.__doc__)) < 130
