"""Cost of a run with 1x, 4x and 16x the photos, by links, without a cache and with one on disk.

    python -m benchmarks.growth --data FOLDER --weights FILE --alpha 0.35

One epoch of the head phase, with a fifth of the photos for validation. Time should be linear (the same seconds per
image) and memory constant.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.arguments import argument_parser, command_of, describe_data, describe_model, output_folder, photos
from benchmarks.photos import count_of, link_times
from benchmarks.processes import TrainerRun, in_turns, train
from benchmarks.results import Comparison, Result, Table, save, spread

TIMES = (1, 4, 16)
CACHES = ("none", "disk")
HOW = """Runs of one head epoch, interleaved: {data} (1x), and 4 and 16 links to each; a fifth is for validation.
{model}. Seconds are from opening the data to the end of training. Memory is the peak resident memory of the process,
which includes pages of mapped files (the cache on disk), though the kernel may reclaim them; anonymous memory does
not."""


def measure(options: argparse.Namespace) -> Result:
    rounds = options.rounds or 3
    runs_of: dict[str, list[TrainerRun]] = {}
    with photos(options) as root, tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folders = {times: link_times(root, scratch / f"photos-{times}", times) for times in TIMES}
        counts = {times: count_of(folder) for times, folder in folders.items()}
        sides = {side_of(cache, times): (cache, times) for cache in CACHES for times in TIMES}
        for turn, side in in_turns(list(sides), rounds):
            cache, times = sides[side]
            overrides = (
                "experiment=flowers_mobilenet_v2",
                "data=image_folder",
                f"data.root={folders[times]}",
                f"data.cache={cache}",
                f"model.weights={options.weights}",
                f"model.alpha={options.alpha}",
                "augmentation=none",
                "~phases.fine_tune",
                "phases.head.epochs=1",
            )
            done = train(overrides, scratch)
            runs_of.setdefault(side, []).append(done)
            print(f"round {turn + 1}, {side}: {done.training:.1f} s, {done.process.peak_mb:,.0f} MB", flush=True)
        how = HOW.replace("\n", " ").format(data=describe_data(options, root), model=describe_model(options))
    comparisons, sizes = grown(runs_of, counts)
    return Result(
        name=f"growth-alpha-{options.alpha:g}",
        title="More photos",
        how=how,
        command=command_of("growth", options, rounds),
        comparisons=comparisons,
        tables=[sizes],
    )


def side_of(cache: str, times: int) -> str:
    return f"data.cache={cache}, {times}x"


def grown(runs_of: dict[str, list[TrainerRun]], counts: dict[int, int]) -> tuple[list[Comparison], Table]:
    """Compare each size with the smallest one with the same cache; and a table of all sizes."""
    comparisons, rows = [], []
    for cache in CACHES:
        smallest = runs_of[side_of(cache, TIMES[0])]
        base = [counts[TIMES[0]] / r.training for r in smallest]
        for times in TIMES:
            side = side_of(cache, times)
            runs = runs_of[side]
            if times != TIMES[0]:
                speeds = [counts[times] / r.training for r in runs]
                comparisons += [
                    Comparison(f"{side}: images/s", "1x", "images/s", speeds, base),
                    Comparison(f"{side}: memory", "1x", "MB", memory(runs), memory(smallest)),
                    Comparison(f"{side}: anonymous memory", "1x", "MB", own_memory(runs), own_memory(smallest)),
                ]
            seconds = spread([r.training for r in runs], "{:.1f}")
            megabytes = [spread(each, "{:,.0f}") for each in (memory(runs), own_memory(runs))]
            rows.append([side, f"{counts[times]:,}", seconds, *megabytes])
    header = ["run", "images", "seconds", "peak resident MB", "anonymous MB"]
    return comparisons, Table("Each size: median (range)", header, rows)


def memory(runs: list[TrainerRun]) -> list[float]:
    return [r.process.peak_mb for r in runs]


def own_memory(runs: list[TrainerRun]) -> list[float]:
    return [r.process.own_mb for r in runs]


def main() -> None:
    options = argument_parser(__doc__).parse_args()
    save(measure(options), output_folder(options))


if __name__ == "__main__":
    main()
