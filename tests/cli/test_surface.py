"""The surface of the command line changes only together with surface.txt, and --help shows it."""

import pytest

from tests.cli import surface
from tests.cli.verbs import exit_code_of
from trainer import plan, prepare
from trainer.cli.compose import GROUPS, find_conf_folder, format_help, list_choices


def test_the_surface_is_the_recorded_one() -> None:
    assert surface.text() == surface.FILE.read_text(), "run python -m tests.cli.surface, and see its diff"


def test_help_shows_each_group_with_its_meaning_and_choices() -> None:
    assert set(GROUPS) == {path.name for path in find_conf_folder().iterdir() if path.is_dir()}
    text = " ".join(format_help().split())
    for group, meaning in GROUPS.items():
        assert f"{group} {meaning} {', '.join(list_choices(group))} " in text
    assert not set(list_choices("phases")) & set(list_choices("experiment"))  # those are in a folder of their own


@pytest.mark.parametrize(("verb", "shown"), [(plan, ("--plot=FILE.png", "--summary")), (prepare, ("output=FOLDER",))])
def test_help_of_a_verb_shows_its_own_arguments(
    verb: object, shown: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code_of(verb.main, "--help") == 0  # type: ignore[attr-defined]
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("    ")]
    assert set(shown) <= set(rows)
