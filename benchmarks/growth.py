"""What a run costs as its photos get more: 1x, 4x and 16x of them, by links, with nothing or the disk as cache.

    python -m benchmarks.growth --data FOLDER --weights FILE --alpha 0.35

One epoch of the head phase, a fifth of the photos validating. Time should be linear (the same seconds for an image) and
memory flat.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.asking import arguments_of, command_of, data_in_words, folder_for, model_in_words, photos
from benchmarks.photos import count_of, link_times
from benchmarks.processes import TrainerRun, in_turns, train
from benchmarks.results import Comparison, Result, Table, keep, spread

TIMES = (1, 4, 16)
CACHES = ("none", "disk")
HOW = """Runs of one head epoch, in turns: {data} (1x), and 4 and 16 links to each; a fifth validates. {model}. Seconds
run from opening the data to the end of training and count for each image. Memory is the most resident memory of the
process; pages of a mapped file (the cache on disk) count in it, though the kernel may take them back, and not in "of
its own"."""


def measure(asked: argparse.Namespace) -> Result:
    rounds = asked.rounds or 3
    found: dict[str, list[TrainerRun]] = {}
    with photos(asked) as root, tempfile.TemporaryDirectory() as name:
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
                f"model.weights={asked.weights}",
                f"model.alpha={asked.alpha}",
                "augmentation=none",
                "~phases.fine_tune",
                "phases.head.epochs=1",
            )
            done = train(overrides, scratch)
            found.setdefault(side, []).append(done)
            print(f"round {turn + 1}, {side}: {done.training:.1f} s, {done.ended.peak_mb:,.0f} MB", flush=True)
        how = HOW.replace("\n", " ").format(data=data_in_words(asked, root), model=model_in_words(asked))
    comparisons, sizes = grown(found, counts)
    return Result(
        name=f"growth-alpha-{asked.alpha:g}",
        title="More photos",
        how=how,
        command=command_of("growth", asked, rounds),
        comparisons=comparisons,
        tables=[sizes],
    )


def side_of(cache: str, times: int) -> str:
    return f"data.cache={cache}, {times}x"


def grown(found: dict[str, list[TrainerRun]], counts: dict[int, int]) -> tuple[list[Comparison], Table]:
    """Each size against the smallest with the same cache, and all of them in a table."""
    comparisons, rows = [], []
    for cache in CACHES:
        least = found[side_of(cache, TIMES[0])]
        base = [counts[TIMES[0]] / r.training for r in least]
        for times in TIMES:
            side = side_of(cache, times)
            runs = found[side]
            if times != TIMES[0]:
                speeds = [counts[times] / r.training for r in runs]
                comparisons += [
                    Comparison(f"{side}: images in a second", "1x", "images/s", speeds, base),
                    Comparison(f"{side}: memory", "1x", "MB", memory(runs), memory(least)),
                    Comparison(f"{side}: memory of its own", "1x", "MB", own_memory(runs), own_memory(least)),
                ]
            seconds = spread([r.training for r in runs], "{:.1f}")
            megabytes = [spread(each, "{:,.0f}") for each in (memory(runs), own_memory(runs))]
            rows.append([side, f"{counts[times]:,}", seconds, *megabytes])
    header = ["run", "images", "seconds", "most resident MB", "of its own"]
    return comparisons, Table("Each size: median (range)", header, rows)


def memory(runs: list[TrainerRun]) -> list[float]:
    return [r.ended.peak_mb for r in runs]


def own_memory(runs: list[TrainerRun]) -> list[float]:
    return [r.ended.own_mb for r in runs]


def main() -> None:
    asked = arguments_of(__doc__).parse_args()
    keep(measure(asked), folder_for(asked))


if __name__ == "__main__":
    main()
