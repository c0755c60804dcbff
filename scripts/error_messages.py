"""Writes docs/errors.md, every error message of `trainer/`: `python scripts/error_messages.py`.

A message is read from the source: the arguments of each exception that is raised, `{...}` where a value is put in.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from trainer import errors

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
CODES = {name: kind.exit_code for name, kind in vars(errors).items() if hasattr(kind, "exit_code")}
CODES["InvalidValue"] = errors.WRONG_INPUT  # raised by the validators of the configuration, relative to their section
HEAD = """# Errors

Made by `python scripts/error_messages.py` from `trainer/`; a test fails when it is stale. An error is printed as
`KEY=VALUE: problem; fix`;
with `runtime.log_format=json` the log entry has the fields `key`, `value`, `fix` and `exit_code`. `{...}` is filled in.
The configuration lists all its faults, one per line (in JSON: `faults`); the key of an `InvalidValue` is relative to the
section that is validated.
"""


def template(node: ast.expr | None) -> str:
    """The text of an expression, with `{...}` for each value in it."""
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part) if isinstance(part, ast.Constant) else "{...}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left) + template(node.right)
    return "{...}"


def raised(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """Class, key, problem and fix of each error that a module constructs."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODES:
            given = {word.arg: word.value for word in node.keywords}
            problem = template(node.args[0] if node.args else None)
            key = template(given.get("key"))
            key += "={...}" if key and "value" in given else ""
            yield node.func.id, key, problem, template(given.get("fix"))


def page() -> str:
    """The text of docs/errors.md."""
    lines = [HEAD]
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        rows = sorted(set(raised(path)))
        if rows and path.name != "errors.py":
            lines.append(f"\n## {path.relative_to(ROOT)}\n\n| exit code | key | problem | fix |\n")
            lines.append("| --- | --- | --- | --- |\n")
            for kind, *texts in rows:
                cells = [re.sub(r"\s+", " ", text).replace("|", "\\|") for text in texts]
                lines.append(f"| {CODES[kind]} {kind} | {' | '.join(cells)} |\n")
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
