"""Measure how time and memory of a run grow with the number of photos: 1, 4 and 16 links to each photo.

    python -m benchmarks.growth --data FOLDER --weights FILE --alpha 0.35

The run trains one epoch of the head phase, without an image cache or with a cache on disk; a fifth of the photos is for
validation. Time should be proportional to the number of photos, and memory constant.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.arguments import (
    choose_output_folder,
    describe_data,
    describe_model,
    format_command,
    make_argument_parser,
    open_photos,
)
from benchmarks.photos import count_photos, link_repeatedly
from benchmarks.processes import FinishedRun, interleave, run_trainer
from benchmarks.results import Comparison, Result, Table, format_median_and_range, save_result

COPIES = (1, 4, 16)  # numbers of links to each photo
CACHES = ("none", "disk")
HOW = """Runs of one head epoch, interleaved: {data} (1x), and 4 and 16 links to each; a fifth is for validation.
{model}. Seconds are from opening the data to the end of training. Memory is the peak resident memory of the process,
which includes pages of mapped files (the cache on disk), though the kernel may reclaim them; anonymous memory does
not."""


def measure(options: argparse.Namespace) -> Result:
    """Run the trainer for each number of copies and each cache, in interleaved rounds."""
    rounds = options.rounds or 3
    runs_by_name: dict[str, list[FinishedRun]] = {}
    with open_photos(options) as root, tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folders = {copies: link_repeatedly(root, scratch / f"photos-{copies}", copies) for copies in COPIES}
        counts = {copies: count_photos(folder) for copies, folder in folders.items()}
        sides = {name_run(cache, copies): (cache, copies) for cache in CACHES for copies in COPIES}
        for round_index, side in interleave(list(sides), rounds):
            cache, copies = sides[side]
            overrides = (
                "experiment=flowers_mobilenet_v2",
                "data=image_folder",
                f"data.root={folders[copies]}",
                f"data.cache={cache}",
                f"model.weights={options.weights}",
                f"model.alpha={options.alpha}",
                "augmentation=none",
                "~phases.fine_tune",
                "phases.head.epochs=1",
            )
            finished_run = run_trainer(overrides, scratch)
            runs_by_name.setdefault(side, []).append(finished_run)
            print(
                f"round {round_index + 1}, {side}: {finished_run.training_seconds:.1f} s, "
                f"{finished_run.process.peak_mb:,.0f} MB",
                flush=True,
            )
        how = HOW.replace("\n", " ").format(data=describe_data(options, root), model=describe_model(options))
    comparisons, sizes = compare_sizes(runs_by_name, counts)
    return Result(
        name=f"growth-alpha-{options.alpha:g}",
        title="More photos",
        how=how,
        command=format_command("growth", options, rounds),
        comparisons=comparisons,
        tables=[sizes],
    )


def name_run(cache: str, copies: int) -> str:
    """Return the name of a run in the results."""
    return f"data.cache={cache}, {copies}x"


def compare_sizes(runs_by_name: dict[str, list[FinishedRun]], counts: dict[int, int]) -> tuple[list[Comparison], Table]:
    """Compare each size with the smallest size with the same cache. Return the comparisons, and a table of all sizes.

    Args:
        runs_by_name: the runs in all rounds, by `name_run`.
        counts: number of photos by number of copies.
    """
    comparisons, rows = [], []
    for cache in CACHES:
        smallest_runs = runs_by_name[name_run(cache, COPIES[0])]
        smallest_speeds = [counts[COPIES[0]] / run.training_seconds for run in smallest_runs]
        for copies in COPIES:
            side = name_run(cache, copies)
            runs = runs_by_name[side]
            if copies != COPIES[0]:
                speeds = [counts[copies] / run.training_seconds for run in runs]
                comparisons += [
                    Comparison(f"{side}: images/s", "1x", "images/s", speeds, smallest_speeds),
                    Comparison(f"{side}: memory", "1x", "MB", list_peak_mb(runs), list_peak_mb(smallest_runs)),
                    Comparison(
                        f"{side}: anonymous memory",
                        "1x",
                        "MB",
                        list_anonymous_mb(runs),
                        list_anonymous_mb(smallest_runs),
                    ),
                ]
            seconds = format_median_and_range([run.training_seconds for run in runs], "{:.1f}")
            megabytes = [
                format_median_and_range(values, "{:,.0f}") for values in (list_peak_mb(runs), list_anonymous_mb(runs))
            ]
            rows.append([side, f"{counts[copies]:,}", seconds, *megabytes])
    header = ["run", "images", "seconds", "peak resident MB", "anonymous MB"]
    return comparisons, Table("Each size: median (range)", header, rows)


def list_peak_mb(runs: list[FinishedRun]) -> list[float]:
    """Return the peak resident memory of each run."""
    return [run.process.peak_mb for run in runs]


def list_anonymous_mb(runs: list[FinishedRun]) -> list[float]:
    """Return the peak anonymous memory of each run."""
    return [run.process.anonymous_mb for run in runs]


def main() -> None:
    """Measure the growth, and save the result."""
    options = make_argument_parser(__doc__).parse_args()
    save_result(measure(options), choose_output_folder(options))


if __name__ == "__main__":
    main()
