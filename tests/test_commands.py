"""The commands of README.md and docs/ as they are written: each is split as a shell would, and its arguments are accepted."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

from tests.cli.verbs import exit_code_of
from tests.processes import ROOT
from trainer import __main__ as main
from trainer.cli.compose import compose, load_and_require_read, requests_sweep
from trainer.cli.overrides import translate_overrides
from trainer.cli.source import choose_source
from trainer.cli.sweep import _search_space_is_empty, _use_sweep_folder

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")),
         *sorted((ROOT / "conf").rglob("*.yaml"))]  # fmt: skip
_PLACEHOLDER = re.compile(r"\.\.\.|\b(RUN|ARGUMENTS|FILE|FOLDER|KEY|NAME|OUTPUT_DIR|BUCKET|TAG)\b")


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """The verb ("" for training) and the arguments of each command on a page that has no placeholder."""
    text = re.sub(r"\s*\\\n#?\s*", " ", page.read_text())
    if page.suffix == ".md":
        blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, flags=re.S | re.M)).replace("\\\n", " ")
        prose = re.sub(r"^```\w*\n.*?^```", "", text, flags=re.S | re.M)
        lines = blocks.splitlines() + [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]
    else:
        lines = [line.lstrip("# ") for line in text.splitlines() if line.startswith(("#", "        python"))]
    result = []
    for line in lines:
        match = re.match(r"\s*(?:[A-Z_]+=\S+ )?(?:\S*/)?python -m trainer(?:\.(\w+))?(?=\s|$)(.*)", line)
        if match and not _PLACEHOLDER.search(line) and "gs://b" not in line and "python -m trainer" in line:
            words = shlex.split(re.split(r"\s{4,}|\s#|\s[|&>]", match[2])[0])
            result.append((match[1] or "", words))
    return result


def list_commands() -> list[tuple[str, str, list[str]]]:
    """Every command once, with the pages that have it: its name, verb and arguments."""
    pages: dict[tuple[str, tuple[str, ...]], dict[str, None]] = {}
    for page in PAGES:
        for verb, words in commands(page):
            pages.setdefault((verb, tuple(words)), {})[str(page.relative_to(ROOT))] = None
    return [(f"{', '.join(of)}: {verb} {' '.join(words)}", verb, list(words)) for (verb, words), of in pages.items()]


COMMANDS = list_commands()


def test_the_pages_have_commands() -> None:
    assert len(COMMANDS) > 60
    assert {verb for _, verb, _ in COMMANDS} >= {
        "",
        "prepare",
        "look",
        "plan",
        "backbones",
        "rates",
        "evaluate",
        "export",
        "compare",
        "serve",
        "drift",
        "promote",
        "predict",
        "nightly",
        "relay",
    }


@pytest.mark.parametrize(("verb", "words"), [c[1:] for c in COMMANDS], ids=[c[0] for c in COMMANDS])
def test_a_command_of_the_pages_is_accepted(
    verb: str, words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the point where a run would open its data, or a verb the run that it is given."""
    monkeypatch.chdir(tmp_path)
    for name in ("photos", "new_photos", "flower_photos"):
        (tmp_path / name / "daisy").mkdir(parents=True)
    (tmp_path / "labels.csv").touch()
    if verb not in ("", "look", "plan", "prepare", "backbones", "rates"):
        module = import_module(f"trainer.{verb}")
        code = exit_code_of(module.main, *(words or ["--help"]))  # a verb alone is its name in a sentence
        error = capsys.readouterr().err
        assert code in (0, 2)
        assert not re.search("no such argument|key=value|is required|cannot be read|Traceback", error), error
        return
    own = ("output=", "images=", "--plot=", "--summary", "among=", "folds=", "phase=")
    arguments = [word for word in words if not word.startswith(own)]
    if {"--help", "--cfg"} & set(arguments):
        assert exit_code_of(main.main, *arguments) == 0
    elif requests_sweep(arguments):
        arguments = translate_overrides(arguments, is_sweep=True)
        assert not _search_space_is_empty(arguments)
        arguments, _ = _use_sweep_folder(arguments)
        jobs: list[list[str]] = []
        if "-m" in arguments:  # a search needs the score of each job
            compose(arguments, run_job=lambda _tree, task, _settings: jobs.append(task))
            assert len(jobs) > 1
    else:
        arguments, _ = choose_source(arguments)
        composed = compose(arguments)
        assert composed is not None
        load_and_require_read(composed, arguments)
