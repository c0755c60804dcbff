"""`make bench`: every row of docs/performance.md, one after the other, then the page.

    make bench ARGS="--data FOLDER --weights FILE --alpha 0.35"
    make bench ARGS="--only step --rounds 3"       one row, printed and kept; the page stays
    python -m benchmarks.page FOLDER               the page out of what was kept with --out FOLDER

Each row is a process of its own, so that none inherits another's memory. Beside these rows stand modules with pages of
their own: quickstart, workers, scaling, storage, augmentation, recipes.
"""

import subprocess
import sys

from benchmarks import page
from benchmarks.asking import arguments_of, folder_for

ROWS = {
    "recipe": "whole_recipe",
    "input": "input_pipeline",
    "step": "step",
    "features": "feature_pass",
    "start": "start_up",
    "growth": "growth",
}


def main() -> None:
    arguments = arguments_of(__doc__)
    arguments.add_argument("--only", nargs="+", choices=ROWS, help="rows to measure; the page is not written")
    asked = arguments.parse_args()
    out = folder_for(asked)
    told = ["--weights", asked.weights, "--alpha", str(asked.alpha), "--out", str(out)]
    told += ["--data", str(asked.data)] if asked.data else []
    told += ["--rounds", str(asked.rounds)] if asked.rounds else []
    for row in asked.only or ROWS:
        print(f"== benchmarks.{ROWS[row]}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{ROWS[row]}", *told], check=True)
    if asked.only:
        print(f"the page out of all that is in {out}: python -m benchmarks.page {out}")
    else:
        page.write(out)


if __name__ == "__main__":
    main()
