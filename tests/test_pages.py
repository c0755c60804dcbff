"""Generated pages are current, and the pages of docs/ are indexed and linked correctly."""

import re
import subprocess

import pytest

from tests.processes import ROOT, run_python


@pytest.mark.parametrize(
    ("script", "function", "page"),
    [
        ("configuration_page", "format_page", "configuration.md"),
        ("recipes_page", "format_page", "recipes.md"),
        ("report_schema", "format_schema", "report.schema.json"),
    ],
)
def test_a_generated_page_is_current(script: str, function: str, page: str) -> None:
    program = f"import sys; sys.path.insert(0, 'scripts'); import {script} as c; sys.stdout.write(c.{function}())"
    assert run_python(program).stdout == (ROOT / "docs" / page).read_text(), f"run: python scripts/{script}.py"


def test_the_paths_of_the_kubernetes_page_exist_and_its_commands_parse() -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text()
    named = set(re.findall(r"(?<![\w/-])k8s/[\w./*-]*\w", text)) - {"k8s/overlays/NAME"}
    assert named >= {"k8s/job.yaml", "k8s/multiworker.yaml", "k8s/overlays/serving"}
    assert [path for path in sorted(named) if not list(ROOT.glob(path))] == []
    assert [f.name for f in (ROOT / "k8s" / "overlays").iterdir() if f"k8s/overlays/{f.name}" not in text] == []
    for block in re.findall(r"```sh\n(.*?)```", text, flags=re.S):
        read = subprocess.run(["sh", "-n"], input=block, capture_output=True, text=True, check=False)
        assert (read.returncode, read.stderr) == (0, ""), block


def test_every_page_is_in_the_index_and_every_link_target_exists() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or page.name in index, page.name
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.S)  # code can contain the syntax of a link
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
            assert link.startswith("http") or (page.parent / link).exists(), f"{page.name} links to {link}"
