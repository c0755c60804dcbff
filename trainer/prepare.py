"""`python -m trainer.prepare data=image_folder data.root=photos output=prepared`: write sharded TFRecords.

Takes the configuration of a run (`data.*`, `seed`, `debug.max_examples`, `runtime.cache_dir` and `.progress` matter)
and writes the splits in TFDS's folder format; read them with `data=tfds data.root=prepared`, or with
`tfds.builder_from_directory`.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.cluster.signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

import numpy as np

from trainer.cli.compose import compose
from trainer.cli.process import be_seen, exit_with_code, speak_as, speak_early
from trainer.config.schema import RunConfig, load
from trainer.data.host import usable_cpus
from trainer.data.open import open_dataset
from trainer.data.records import RecordAt, index_shard
from trainer.data.remote import local_copies
from trainer.data.tfds_writer import Groups, ImageSource, write_dataset
from trainer.errors import INTERRUPTED, ConfigError
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import last_words, say
from trainer.storage.path import place
from trainer.types import Dataset, Split

Progress = Callable[[int, int], None]


def prepare(config: RunConfig, output: str, part: tuple[int, int] = (0, 1)) -> None:
    """Write the dataset that the configuration names into `output`; started again it goes on where it stopped.

    Of `part` (i, n) only every n-th shard is written; who finds all shards there finishes the dataset.

    Raises:
        DataError: the data cannot be read, an image cannot be decoded (data.on_error=fail), or `output` is taken.
    """
    field = config.data.group_field
    if field in ("image", "label") and field != config.data.label_field:
        raise ConfigError(f"data.group_field={field}: prepared records call the image image and the class label")
    cache = Path(config.runtime.cache_dir).expanduser()
    dataset = open_dataset(
        local_copies(config, say, lambda _address: health.progress())[0].data,
        seed=config.seed,
        cache_dir=cache,
        max_examples=config.debug.max_examples,
        note=say,
        all_groups=field is not None,
    )
    orders = {name: _order(split, config.data.split_seed) for name, split in dataset.splits.items()}
    groups = None
    if field and field != "label":  # which every record has, and which can be grouped by
        groups = Groups(field, {name: _in(orders[name], split.groups) for name, split in dataset.splits.items()})
    target = place(output)
    with _progress(config.runtime.progress) as show:
        entries = write_dataset(
            target,
            dataset.name,
            dataset.class_names,
            {name: _examples(split, orders[name]) for name, split in dataset.splits.items()},
            groups=groups,
            shards=config.data.shards,
            workers=config.runtime.data_threads or usable_cpus(),
            progress=_noted(show),
            on_error=config.data.on_error,
            part=part,
            scratch=cache / "prepared",
        )
    if entries is None:
        _say_at_the_end(f"part {part[0] + 1} of {part[1]} is written; the part that ends last finishes the dataset")
        return
    skipped = [*dataset.skipped, *(fault for entry in entries for fault in entry.skipped)]
    for fault in skipped:
        say(f"skipped {fault}")
    _say_at_the_end(
        _summary(
            dataset, len(entries), sum(entry.count for entry in entries), sum(e.bytes for e in entries), str(target)
        )
    )


def _noted(show: Progress) -> Progress:
    """The same; images that are done are health of life."""
    before = -1

    def progress(done: int, total: int) -> None:
        nonlocal before
        if done != before:
            before = done
            health.progress()
        show(done, total)

    return progress


def _summary(dataset: Dataset, shards: int, images: int, size: int, output: str) -> str:
    return (
        f"{output} holds {images} images of {len(dataset.class_names)} classes in {shards} shards "
        f"({size / 2**20:.1f} MB); train on it: python -m trainer data=tfds data.root={output}"
    )


def _order(split: Split, seed: int) -> np.ndarray:
    """In which the examples are written: shuffled, so that each shard holds every class."""
    return np.random.default_rng([seed, split.count]).permutation(split.count)


def _in(order: np.ndarray, groups: Sequence[str] | None) -> list[str]:
    assert groups is not None
    return [groups[i] for i in order]


def _examples(split: Split, order: np.ndarray) -> list[tuple[ImageSource, int]]:
    """The examples in this order."""
    sources: list[ImageSource] = list(split.files)
    if not sources:
        index = {path: index_shard(path) for path in {shard.path for shard in split.shards}}
        sources = [
            RecordAt(s.path, n, int(index[s.path].offsets[n]), int(index[s.path].lengths[n]), split.image_field)
            for s in split.shards
            for n in range(s.start, s.stop)
        ]
    return [(sources[i], int(split.labels[i])) for i in order]


@contextmanager
def _progress(kind: str) -> Iterator[Progress]:
    """A live bar on a terminal, else a line every ten seconds and at the end."""
    if kind == "bar" or (kind == "auto" and sys.stdout.isatty()):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        with Bar(TextColumn("writing images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as bar:
            task = bar.add_task("writing", total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
        return
    start = last = time.monotonic()
    said = -1

    def line(done: int, total: int) -> None:
        nonlocal last, said
        now = time.monotonic()
        if done != said and (done == total or now - last >= 10):
            last, said = now, done
            say(f"wrote {done} of {total} images ({done / max(now - start, 1e-3):.0f}/s)", done=done, total=total)

    yield line


def _run(arguments: list[str]) -> None:
    outputs = [a.split("=", 1)[1] for a in arguments if a.startswith("output=")]
    composed = compose([a for a in arguments if not a.startswith("output=")])
    if composed is None:  # --help, --cfg
        return
    if len(outputs) != 1 or not outputs[0]:
        raise ConfigError("say once where to write: python -m trainer.prepare data=... output=FOLDER")
    config = load(composed)
    speak_as(config.runtime)
    part = _part(os.environ)
    be_seen(config, *part)
    signal.signal(signal.SIGTERM, _end)
    health.enter_phase("prepare")
    prepare(config, outputs[0], part)


def _end(number: int, _frame: object) -> None:
    """Told to stop: shards that are there stay, and the processes that write others end with this one."""
    reason = f"{signal.Signals(number).name}; start the same command again to write what is missing"
    last_words(f"interrupted: {reason}")
    termination.leave(INTERRUPTED, reason)
    os._exit(INTERRUPTED)


def _part(environment: Mapping[str, str]) -> tuple[int, int]:
    """Which of how many pods this is: JOB_COMPLETION_INDEX and WORKER_COUNT of an Indexed Job."""
    try:
        pods = int(environment.get("WORKER_COUNT") or 1)
        index = int(environment.get("JOB_COMPLETION_INDEX") or 0)
    except ValueError:
        raise ConfigError("JOB_COMPLETION_INDEX and WORKER_COUNT must be whole numbers") from None
    if not 0 <= index < pods:
        raise ConfigError(
            f"JOB_COMPLETION_INDEX={index} is none of 0..{pods - 1}: set WORKER_COUNT to the Job's completions"
        )
    return index, pods


def _say_at_the_end(text: str) -> None:
    say(text)
    termination.outcome(text)


def main() -> None:
    """Entry point of `python -m trainer.prepare`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        speak_early(sys.argv[1:])
        _run(sys.argv[1:])


if __name__ == "__main__":
    main()
