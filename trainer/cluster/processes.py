"""Start a module of this package as another process."""

import os
import sys
from pathlib import Path


def module_command(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return command and environment of a process that runs a module of this package, in any working directory.

    `python -m` alone searches the working directory first, where a folder `trainer` or a file `json.py` may be.
    """
    package = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    return [sys.executable, "-P", "-m", module, *arguments], {**os.environ, "PYTHONPATH": path}
