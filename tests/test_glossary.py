"""No text of the project uses a word that docs/glossary.md rules out."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOSSARY = ROOT / "docs" / "glossary.md"
EXEMPT = {GLOSSARY, ROOT / "docs" / "log.md", Path(__file__)}  # the log is history
# Names in files that users have.
ALLOWED = re.compile(r"kept_(step|from)|max_fruitless_restarts|validation_share|found_by|lost\+found")
# The command and its files.
LOOK = re.compile(
    r"\bprepare \| look \| plan\b|\b(trainer|tests|outputs)[./]look\b|\blook\.(json|html)|\blook/|\"look\"|\bverb look\b"
)
ROWS = GLOSSARY.read_text().split("## Words that are not used")[1]
BANNED = [pattern.replace("\\|", "|") for pattern in re.findall(r"^\| `(.+?)`[^|]*\|", ROWS, re.MULTILINE)]
PATTERN = re.compile("|".join(rf"(?<![a-zA-Z])(?:{pattern})(?![a-zA-Z])" for pattern in BANNED), re.IGNORECASE)
FOLDERS = ("trainer", "tests", "docs", "conf", "k8s", "benchmarks", "scripts", "pretraining")
KINDS = {".py", ".md", ".yaml", ".j2", ".html", ".css", ".js", ".sh", ".json"}


def texts() -> list[Path]:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in KINDS]
    files += [*ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "Dockerfile", ROOT / "pyproject.toml"]
    return sorted(set(files) - EXEMPT)


def uses(text: str) -> list[str]:
    return [match[0] for match in PATTERN.finditer(LOOK.sub("", ALLOWED.sub("", text)))]


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_text_uses_the_words_of_the_glossary(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    lines = enumerate([name, *path.read_text().splitlines()])
    assert not [f"{name}:{number}: {', '.join(words)}" for number, line in lines if (words := uses(line))]


@pytest.mark.parametrize("text", ["it was told", "def test_what_is_kept", "the Place", "it goes on", "we found it"])
def test_the_check_sees_a_word(text: str) -> None:
    assert uses(text)


@pytest.mark.parametrize("text", ["not found", "kept_step", "replace", "shared", "enough", "assigns"])
def test_the_check_leaves_other_words_alone(text: str) -> None:
    assert not uses(text)
