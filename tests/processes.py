"""Run programs in new Python processes."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def run_python(program: str, *arguments: object, code: int = 0, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program with this repository's modules to its end, and check its exit code.

    `options` are keyword arguments of `subprocess.run`.
    """
    command = [sys.executable, "-c", textwrap.dedent(program), *map(str, arguments)]
    options = {"cwd": ROOT, "timeout": 300, **options}
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == code, result.stderr[-3000:]
    return result


def result_of(program: str, *arguments: object) -> Any:
    """Run a program, which can configure logical devices, and return the JSON that it prints after RESULT."""
    return json.loads(run_python(program, *arguments).stdout.split("RESULT")[1])
