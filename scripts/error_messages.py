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
The configuration lists all its faults, one per line (in JSON: `faults`); the key of an `InvalidValue` is relative to
the section that is validated.
"""


def template(node: ast.expr | None, names: dict[str, list[ast.expr]] | None = None) -> str:
    """The text of an expression, with `{...}` for each value in it; `names` are the values of local variables."""
    if (
        isinstance(node, ast.Name)
        and names
        and (before := [v for v in names.get(node.id, ()) if v.lineno <= node.lineno])
    ):
        return template(max(before, key=lambda value: value.lineno))
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
    tree = ast.parse(path.read_text())
    functions: list[ast.AST] = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]
    inside = {node: function for function in functions for node in ast.walk(function)}  # the innermost one
    for node, function in inside.items():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CODES:
            names = _assigned(function)
            given = {word.arg: word.value for word in node.keywords}
            problem = template(node.args[0] if node.args else None, names)
            key = template(given.get("key"), names)
            key += "={...}" if key and "value" in given else ""
            yield node.func.id, key, problem, template(given.get("fix"), names)


def _assigned(function: ast.AST) -> dict[str, list[ast.expr]]:
    """Values that a function assigns to names."""
    names: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            both = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for name, part in zip(target.elts, value.elts, strict=False) if both else [(target, value)]:
                if isinstance(name, ast.Name):
                    names.setdefault(name.id, []).append(part)
    return names


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
