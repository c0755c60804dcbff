"""`make bench`: every measurement, one after the other; the arguments go to benchmarks.step."""

from __future__ import annotations

import subprocess
import sys


def main() -> None:
    """Each in a process of its own, so that none inherits another's memory."""
    for name, arguments in (("step", sys.argv[1:]), ("quickstart", []), ("workers", []), ("scaling", [])):
        print(f"== benchmarks.{name}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *arguments], check=True)


if __name__ == "__main__":
    main()
