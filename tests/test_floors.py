"""The floors of the house: who may import whom, how long a module may be, and what must start without TensorFlow."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. A room imports only from rooms below its own floor; those of one floor do not know each other,
# but for the ground floor, whose modules may.
FLOORS = (
    {"errors", "contracts", "config", "config_parts", "config_phases", "config_differences", "config_faults", "advice",
     "randomness", "imaging", "drift_statistics"},
    {"watching"},
    {"storage", "cluster"},
    {"data", "models", "training", "evaluation", "exporting", "serving"},
    {"feature_choice"},
    {"run", "command_line", "hparams", "local_copies", "teacher_files", "subjects", "rebuilding"},
    {"feature_pass", "reporting"},
    {"start", "finish", "sweep", "planning", "teaching", "inputs", "handing_on", "finished_runs"},
    {"train"},
    {"__main__", "prepare", "plan", "evaluate", "compare", "export", "serve", "drift"},
)  # fmt: skip
MAX_LINES = 350
MAX_MAIN_LINES = 80  # of code: no blank lines, comments or docstrings

# Imported by every command line before the configuration is known to be right.
LIGHT = (
    "errors", "contracts", "config", "config_parts", "config_phases", "config_differences", "config_faults",
    "command_line", "hparams", "sweep", "__main__",
)  # fmt: skip


def floor_of(room: str) -> int | None:
    return next((level for level, rooms in enumerate(FLOORS) if room in rooms), None)


def imported_modules(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything a module of `package` imports, inside functions and TYPE_CHECKING too."""
    nodes = list(ast.walk(ast.parse(source)))
    whole = any(isinstance(node, ast.Import) and any(name.name == "trainer" for name in node.names) for node in nodes)
    for node in nodes:
        if isinstance(node, ast.Import):
            for name in node.names:
                yield node.lineno, name.name
        elif whole and isinstance(node, ast.Attribute) and ast.unparse(node.value) == "trainer":
            yield node.lineno, f"trainer.{node.attr}"
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for name in node.names:
                yield node.lineno, f"{base}.{name.name}"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value


def code_lines(source: str) -> int:
    """Lines that hold code."""
    tree = ast.parse(source)
    silent: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                silent.update(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    lines = enumerate(source.splitlines(), start=1)
    return sum(bool(line.strip()) and not line.strip().startswith("#") and n not in silent for n, line in lines)


def floor_faults(root: Path) -> list[str]:
    """What breaks the order of the house in `root/trainer`, one sentence each."""
    faults = []
    for path in sorted((root / "trainer").rglob("*.py")):
        where, parts = path.relative_to(root), path.relative_to(root).with_suffix("").parts
        source = path.read_text()
        if (length := len(source.splitlines())) > MAX_LINES:
            faults.append(f"{where} has {length} lines, at most {MAX_LINES}")
        if parts == ("trainer", "__main__") and (length := code_lines(source)) > MAX_MAIN_LINES:
            faults.append(f"{where} has {length} lines of code, at most {MAX_MAIN_LINES}")
        room = parts[1]
        floor = floor_of(room)
        if floor is None and room != "__init__":
            faults.append(f"{where}: no floor has {room}; name it in FLOORS")
            continue
        for line, name in imported_modules(source, parts[:-1]):
            other = name.split(".")[1] if name.startswith("trainer.") else ""
            level = floor_of(other)
            if other == room or (other.startswith("__") and other != "__main__"):  # its own, or trainer.__version__
                continue
            if name.startswith("trainer.") and level is None:
                faults.append(f"{where}:{line} imports {name}, which no floor has")
            elif level is not None and (floor is None or level > floor):
                faults.append(f"{where}:{line} imports {name}, which is above it")
            elif level is not None and level == floor and floor > 0:
                faults.append(f"{where}:{line} imports {name}, which stands beside it")
    return faults


def test_every_room_imports_only_from_below() -> None:
    assert floor_faults(ROOT) == []


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("data/folder.py", "from trainer.training import step", "imports trainer.training.step, which stands beside"),
        ("data/folder.py", "from ..models.head import build", "imports trainer.models.head.build, which stands beside"),
        ("data/folder.py", "def f():\n    import trainer.train", "trainer/data/folder.py:2 imports trainer.train, whi"),
        ("data/folder.py", "from trainer import train", "imports trainer.train, which is above it"),
        ("data/folder.py", "import importlib\nimportlib.import_module('trainer.plan')", "trainer.plan, which is above"),
        ("storage/path.py", "from trainer.cluster import find", "imports trainer.cluster.find, which stands beside it"),
        ("errors.py", "from .storage import path", "imports trainer.storage.path, which is above it"),
        ("__init__.py", "from trainer.config import load", "imports trainer.config.load, which is above it"),
        ("plan.py", "from trainer.__main__ import main", "imports trainer.__main__.main, which stands beside it"),
        ("train.py", "from trainer.helpers import f", "imports trainer.helpers.f, which no floor has"),
        (
            "data/folder.py",
            "import trainer\ntrainer.models.build()",
            "folder.py:2 imports trainer.models, which stands be",
        ),
        ("helpers.py", "", "trainer/helpers.py: no floor has helpers"),
        ("data/long.py", "x = 1\n" * 351, "trainer/data/long.py has 351 lines, at most 350"),
        ("__main__.py", "x = 1\n" * 81, "trainer/__main__.py has 81 lines of code, at most 80"),
    ],
)
def test_the_check_sees_a_fault(tmp_path: Path, path: str, source: str, fault: str) -> None:
    module = tmp_path / "trainer" / path
    module.parent.mkdir(parents=True)
    module.write_text(source)
    (found,) = floor_faults(tmp_path)
    assert fault in found


@pytest.mark.parametrize(
    ("path", "source"),
    [
        (
            "data/folder.py",
            "import numpy\nfrom trainer.data import shards\nfrom . import shards\nfrom ..config import Data",
        ),
        ("config.py", "from trainer.config_faults import nearest\nfrom trainer import __version__"),
        ("data/folder.py", "import trainer\nprint(trainer.__version__)"),
        ("train.py", "from trainer.data.folder import open_folder\nimport trainer.models.head as head"),
        ("__main__.py", '"""Long\n' + "\n" * 100 + 'words."""\n' + "# remark\n" * 100 + "from trainer import train"),
    ],
)
def test_the_check_lets_good_modules_pass(tmp_path: Path, path: str, source: str) -> None:
    module = tmp_path / "trainer" / path
    module.parent.mkdir(parents=True)
    module.write_text(source)
    assert floor_faults(tmp_path) == []


def test_the_command_line_starts_without_tensorflow() -> None:
    modules = [f"trainer.{name}" for name in LIGHT if (ROOT / "trainer" / f"{name}.py").exists()]
    heavy = "{'tensorflow', 'keras', 'tensorflow_datasets', 'sklearn', 'matplotlib', 'requests', 'google.auth'}"
    program = f"import sys, {', '.join(modules)}; print(sorted({heavy} & set(sys.modules)))"
    answer = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert answer.stderr == ""
    assert answer.stdout == "[]\n"
