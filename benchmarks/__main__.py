"""Measure all rows of docs/performance.md in sequence, and write the page: `make bench`.

    make bench ARGS="--data FOLDER --weights FILE --alpha 0.35"
    make bench ARGS="--only step --rounds 3"       one row, printed and saved; the page is not written
    python -m benchmarks.page FOLDER               the page from the results of --out FOLDER

Each row runs in a separate process, so that none inherits another's memory. Other benchmarks, whose results are on
other pages: quickstart, workers, scaling, storage, augmentation, recipes, serving, gpu.
"""

import subprocess
import sys

from benchmarks import page
from benchmarks.arguments import choose_output_folder, make_argument_parser

ROWS = {
    "recipe": "whole_recipe",
    "input": "input_pipeline",
    "step": "step",
    "features": "feature_pass",
    "start": "start_up",
    "growth": "growth",
}


def main() -> None:
    """Measure the selected rows in separate processes, and write the page."""
    parser = make_argument_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=ROWS, help="rows to measure; the page is not written")
    options = parser.parse_args()
    out = choose_output_folder(options)
    common = ["--weights", options.weights, "--alpha", str(options.alpha), "--out", str(out)]
    common += ["--data", str(options.data)] if options.data else []
    common += ["--rounds", str(options.rounds)] if options.rounds else []
    common += ["--peers", *options.peers]
    for row in options.only or ROWS:
        print(f"== benchmarks.{ROWS[row]}", flush=True)
        subprocess.run([sys.executable, "-m", f"benchmarks.{ROWS[row]}", *common], check=True)
    if options.only:
        print(f"write the page from all results in {out}: python -m benchmarks.page {out}")
    else:
        page.write_pages(out)


if __name__ == "__main__":
    main()
