"""Batches out of a folder of photos: ours against the directory loader of Keras, PIL, and bare tf.data.

    python -m benchmarks.input_pipeline --data FOLDER

Every side is a process of its own, which opens the folder, reads one epoch (cold), then more (later ones, the median),
and does nothing else with the batches. The files are in the page cache. Op determinism is on for our sides alone.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.asking import (
    BATCH,
    FLIP_ROTATE_ZOOM,
    SIZE,
    all_to_train,
    arguments_of,
    command_of,
    data_in_words,
    folder_for,
    photos,
)
from benchmarks.photos import count_of, link_times, photos_of
from benchmarks.processes import in_turns, run
from benchmarks.results import Comparison, Result, keep

LATER = 3  # epochs after the first
AT_LEAST = 2400  # photos: fewer are read several times an epoch, so that opening does not weigh most
OURS, LIVE, AUGMENTED = "ours", "ours, nothing kept", "ours, augmented"
DIRECTORY, CACHED, PIL_LOOP = "directory loader", "directory loader, cache()", "PIL in a loop"
BARE, KERAS_LAYERS = "bare decode_jpeg", "Keras layers in map"
# What is compared: figure, ours, others
ROWS: list[tuple[str, str, tuple[str, ...]]] = [
    ("cold", OURS, (DIRECTORY, CACHED, PIL_LOOP, BARE)),
    ("later", OURS, (DIRECTORY, CACHED, PIL_LOOP, BARE)),
    ("later", LIVE, (DIRECTORY, BARE)),
    ("later", AUGMENTED, (KERAS_LAYERS,)),
]
WORDS = {
    ("cold", OURS): "first epoch with opening, decoded images kept in memory",
    ("later", OURS): "later epochs, decoded images kept in memory",
    ("later", LIVE): "later epochs, decoded anew (data.cache=none)",
    ("later", AUGMENTED): "later epochs with flip, rotation and zoom, decoded images kept",
}
HOW = """One process a side and round, in turns, on the same cores: open the folder, read one epoch, then {later} more
(their median), and do nothing with the batches; imports come before. {data}, linked {times} times, to {size} x {size}
pixels in batches of {batch}; the files are in the page cache. Ours is the pipeline of a run, op determinism included.
"{directory}" is `image_dataset_from_directory` and `prefetch`, with and without `cache()`; "{bare}" is
`tf.io.read_file`, `decode_jpeg`, `tf.image.resize` to uint8 in one parallel `map`; "{keras}" is `RandomFlip`,
`RandomRotation(0.2)` and `RandomZoom(0.2)` on batches in a parallel `map` behind `cache()`."""


def passes(name: str, folder: Path) -> Callable[[], Iterator[Any]]:
    """Open the folder; every call of the answer begins another epoch."""
    if name == PIL_LOOP:
        return pil_batches(folder)
    import tensorflow as tf

    if name in (OURS, LIVE, AUGMENTED):
        return our_batches(name, folder)
    ahead = tf.data.AUTOTUNE
    if name == BARE:

        def pixels(path: tf.Tensor) -> tf.Tensor:
            image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
            return tf.cast(tf.image.resize(image, [SIZE, SIZE]), tf.uint8)

        files = tf.data.Dataset.from_tensor_slices([str(p) for group in photos_of(folder).values() for p in group])
        batches = files.map(pixels, num_parallel_calls=ahead).batch(BATCH).prefetch(ahead)
        return lambda: iter(batches)

    import keras

    batches = keras.utils.image_dataset_from_directory(folder, image_size=(SIZE, SIZE), batch_size=BATCH, verbose=False)
    if name in (CACHED, KERAS_LAYERS):
        batches = batches.cache()
    if name == KERAS_LAYERS:
        layers = [keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.2), keras.layers.RandomZoom(0.2)]
        changed = keras.Sequential(layers)
        batches = batches.map(lambda x, y: (changed(x, training=True), y), num_parallel_calls=ahead)
    batches = batches.prefetch(ahead)
    return lambda: iter(batches)


def our_batches(name: str, folder: Path) -> Callable[[], Iterator[Any]]:
    """An endless stream, cut into epochs."""
    import tensorflow as tf

    from benchmarks.pipelines import open_training, stream
    from trainer.config.schema import Augmentation

    tf.config.experimental.enable_op_determinism()
    dataset, pixels = open_training(all_to_train(folder), SIZE, "none" if name == LIVE else "memory")
    batches = iter(stream(pixels, BATCH, FLIP_ROTATE_ZOOM if name == AUGMENTED else Augmentation()))
    steps = -(-dataset.splits["train"].count // BATCH)
    return lambda: (next(batches) for _ in range(steps))


def pil_batches(folder: Path) -> Callable[[], Iterator[Any]]:
    """Float32 batches, one image after the other, as a generator that one writes by hand."""
    import numpy as np
    from PIL import Image

    files = [path for group in photos_of(folder).values() for path in group]

    def pixels(path: Path) -> Any:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32)

    def epoch() -> Iterator[Any]:
        for first in range(0, len(files), BATCH):
            yield np.stack([pixels(path) for path in files[first : first + BATCH]])

    return epoch


def read_all(name: str, folder: Path) -> dict[str, float]:
    """Seconds of the first epoch, the folder not yet opened, and of a later one."""
    if name != PIL_LOOP:
        import keras  # noqa: F401
        import tensorflow as tf

        import benchmarks.pipelines  # noqa: F401  what each side imports is not what is compared

        tf.zeros([]).numpy()  # the devices are there
    ends = [time.perf_counter()]
    epoch = passes(name, folder)
    for _ in range(1 + LATER):
        for _ in epoch():
            pass
        ends.append(time.perf_counter())
    seconds = [b - a for a, b in pairwise(ends)]
    return {"cold": seconds[0], "later": statistics.median(seconds[1:])}


def measure(asked: argparse.Namespace) -> Result:
    rounds = asked.rounds or 5
    sides = list(dict.fromkeys(side for _, mine, others in ROWS for side in (mine, *others)))
    speeds: dict[tuple[str, str], list[float]] = {}
    with photos(asked) as root, tempfile.TemporaryDirectory() as scratch:
        times = -(-AT_LEAST // count_of(root))
        folder = link_times(root, Path(scratch, "photos"), times)
        images = count_of(folder)
        for turn, side in in_turns(sides, rounds):
            seconds = json.loads(
                run("-m", "benchmarks.input_pipeline", "--side", side, str(folder)).said.splitlines()[-1]
            )
            for figure, value in seconds.items():
                speeds.setdefault((figure, side), []).append(images / value)
            print(f"round {turn + 1}, {side}: {seconds['cold']:.2f} s, then {seconds['later']:.2f} s", flush=True)
        data = data_in_words(asked, root)
    words = {"later": LATER, "data": data, "times": times, "size": SIZE, "batch": BATCH, "directory": DIRECTORY}
    return Result(
        name="input",
        title="Input pipeline",
        how=HOW.replace("\n", " ").format(**words, bare=BARE, keras=KERAS_LAYERS),
        command=command_of("input", asked, rounds, model=False),
        comparisons=[
            Comparison(WORDS[figure, mine], other, "images/s", speeds[figure, mine], speeds[figure, other])
            for figure, mine, others in ROWS
            for other in others
        ],
    )


def main() -> None:
    arguments = arguments_of(__doc__)
    arguments.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    asked = arguments.parse_args()
    if asked.side:
        print(json.dumps(read_all(asked.side[0], Path(asked.side[1]))))
    else:
        keep(measure(asked), folder_for(asked))


if __name__ == "__main__":
    main()
