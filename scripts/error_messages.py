"""Write docs/errors.md, the list of all error messages of `trainer/`: `python scripts/error_messages.py`.

The messages are read from the source code: from the arguments of each exception that is constructed. A value that is
inserted at run time becomes `{...}`.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from trainer import errors

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "errors.md"
EXIT_CODES = {name: kind.exit_code for name, kind in vars(errors).items() if hasattr(kind, "exit_code")}
# Raised by the validators of the configuration; its key is relative to their section
EXIT_CODES["InvalidValue"] = errors.WRONG_INPUT
INTRODUCTION = """# Errors

Made by `python scripts/error_messages.py` from `trainer/`; a test fails when it is stale. An error is printed as
`KEY=VALUE: problem; fix`;
with `runtime.log_format=json` the log entry has the fields `key`, `value`, `fix` and `exit_code`. `{...}` is filled in.
The error of a configuration lists all its errors, one per line (in JSON: `faults`); the key of an `InvalidValue` is
relative to the section that is validated.
"""


def format_template(node: ast.expr | None, assigned_values: dict[str, list[ast.expr]] | None = None) -> str:
    """Return the text of a string expression, with `{...}` for each inserted value.

    `assigned_values` are the expressions that local variables are assigned to, by name. The last assignment before the
    expression is used.
    """
    if (
        isinstance(node, ast.Name)
        and assigned_values
        and (earlier_values := [v for v in assigned_values.get(node.id, ()) if v.lineno <= node.lineno])
    ):
        return format_template(max(earlier_values, key=lambda value: value.lineno))
    if node is None or (isinstance(node, ast.Constant) and node.value is None):
        return ""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(format_template(part) if isinstance(part, ast.Constant) else "{...}" for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return format_template(node.left) + format_template(node.right)
    return "{...}"


def list_raised_errors(path: Path) -> Iterator[tuple[str, str, str, str]]:
    """List the class, key, problem and fix of each error that a module constructs."""
    tree = ast.parse(path.read_text())
    functions: list[ast.AST] = [tree, *(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))]
    # Node -> innermost function that contains it, since inner functions are visited after outer ones
    innermost_function = {node: function for function in functions for node in ast.walk(function)}
    for node, function in innermost_function.items():
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in EXIT_CODES:
            assigned_values = _collect_assignments(function)
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            problem = format_template(node.args[0] if node.args else None, assigned_values)
            key = format_template(keywords.get("key"), assigned_values)
            key += "={...}" if key and "value" in keywords else ""
            yield node.func.id, key, problem, format_template(keywords.get("fix"), assigned_values)


def _collect_assignments(function: ast.AST) -> dict[str, list[ast.expr]]:
    """Collect the expressions that a function assigns to local variables, by name."""
    assigned_values: dict[str, list[ast.expr]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target, value = node.targets[0], node.value
            is_unpacked = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
            for name, part in zip(target.elts, value.elts, strict=False) if is_unpacked else [(target, value)]:
                if isinstance(name, ast.Name):
                    assigned_values.setdefault(name.id, []).append(part)
    return assigned_values


def format_page() -> str:
    """Format the content of docs/errors.md."""
    lines = [INTRODUCTION]
    for path in sorted((ROOT / "trainer").rglob("*.py")):
        rows = sorted(set(list_raised_errors(path)))
        if rows and path.name != "errors.py":
            lines.append(f"\n## {path.relative_to(ROOT)}\n\n| exit code | key | problem | fix |\n")
            lines.append("| --- | --- | --- | --- |\n")
            for kind, *texts in rows:
                cells = [re.sub(r"\s+", " ", text).replace("|", "\\|") for text in texts]
                lines.append(f"| {EXIT_CODES[kind]} {kind} | {' | '.join(cells)} |\n")
    return "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(format_page())
