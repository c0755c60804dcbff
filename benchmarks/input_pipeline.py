"""Batches from a folder of photos: ours against the directory loader of Keras, PIL, and bare tf.data.

    python -m benchmarks.input_pipeline --data FOLDER

Every side is a separate process, which opens the folder, reads one epoch (cold), then more (later ones, the median),
and discards the batches. The files are in the page cache. Op determinism is on for our sides only.
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

from benchmarks.arguments import (
    BATCH,
    FLIP_ROTATE_ZOOM,
    SIZE,
    all_to_train,
    argument_parser,
    command_of,
    describe_data,
    output_folder,
    photos,
)
from benchmarks.photos import count_of, link_times, photos_of
from benchmarks.processes import in_turns, run
from benchmarks.results import Comparison, Result, save

LATER = 3  # epochs after the first
AT_LEAST = 2400  # photos per epoch, by several links to each, so that opening is not most of the time
OURS, LIVE, AUGMENTED = "ours", "ours, not cached", "ours, augmented"
DIRECTORY, CACHED, PIL_LOOP = "directory loader", "directory loader, cache()", "PIL in a loop"
BARE, KERAS_LAYERS = "bare decode_jpeg", "Keras layers in map"
# Figure, our side, other sides
ROWS: list[tuple[str, str, tuple[str, ...]]] = [
    ("cold", OURS, (DIRECTORY, CACHED, PIL_LOOP, BARE)),
    ("later", OURS, (DIRECTORY, CACHED, PIL_LOOP, BARE)),
    ("later", LIVE, (DIRECTORY, BARE)),
    ("later", AUGMENTED, (KERAS_LAYERS,)),
]
WORDS = {
    ("cold", OURS): "first epoch with opening, decoded images cached in memory",
    ("later", OURS): "later epochs, decoded images cached in memory",
    ("later", LIVE): "later epochs, decoded again (data.cache=none)",
    ("later", AUGMENTED): "later epochs with flip, rotation and zoom, decoded images cached",
}
HOW = """One process per side and round, interleaved, on the same cores: open the folder, read one epoch, then {later}
more (their median), and discard the batches; imports are not measured. {data}, linked {times} times, to {size} x {size}
pixels in batches of {batch}; the files are in the page cache. Ours is the pipeline of a run, op determinism included.
"{directory}" is `image_dataset_from_directory` and `prefetch`, with and without `cache()`; "{bare}" is
`tf.io.read_file`, `decode_jpeg`, `tf.image.resize` to uint8 in one parallel `map`; "{keras}" is `RandomFlip`,
`RandomRotation(0.2)` and `RandomZoom(0.2)` on batches in a parallel `map` behind `cache()`."""


def passes(name: str, folder: Path) -> Callable[[], Iterator[Any]]:
    """Open the folder; each call of the result starts another epoch."""
    if name == PIL_LOOP:
        return pil_batches(folder)
    import tensorflow as tf

    if name in (OURS, LIVE, AUGMENTED):
        return our_batches(name, folder)
    autotune = tf.data.AUTOTUNE
    if name == BARE:

        def pixels(path: tf.Tensor) -> tf.Tensor:
            image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
            return tf.cast(tf.image.resize(image, [SIZE, SIZE]), tf.uint8)

        files = tf.data.Dataset.from_tensor_slices([str(p) for group in photos_of(folder).values() for p in group])
        batches = files.map(pixels, num_parallel_calls=autotune).batch(BATCH).prefetch(autotune)
        return lambda: iter(batches)

    import keras

    batches = keras.utils.image_dataset_from_directory(folder, image_size=(SIZE, SIZE), batch_size=BATCH, verbose=False)
    if name in (CACHED, KERAS_LAYERS):
        batches = batches.cache()
    if name == KERAS_LAYERS:
        layers = [keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.2), keras.layers.RandomZoom(0.2)]
        changed = keras.Sequential(layers)
        batches = batches.map(lambda x, y: (changed(x, training=True), y), num_parallel_calls=autotune)
    batches = batches.prefetch(autotune)
    return lambda: iter(batches)


def our_batches(name: str, folder: Path) -> Callable[[], Iterator[Any]]:
    """Epochs of an infinite stream."""
    import tensorflow as tf

    from benchmarks.pipelines import open_training, stream
    from trainer.config.schema import Augmentation

    tf.config.experimental.enable_op_determinism()
    dataset, pixels = open_training(all_to_train(folder), SIZE, "none" if name == LIVE else "memory")
    batches = iter(stream(pixels, BATCH, FLIP_ROTATE_ZOOM if name == AUGMENTED else Augmentation()))
    steps = -(-dataset.splits["train"].count // BATCH)
    return lambda: (next(batches) for _ in range(steps))


def pil_batches(folder: Path) -> Callable[[], Iterator[Any]]:
    """Float32 batches from a plain Python generator."""
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
    """Seconds of the first epoch, with opening the folder, and of a later one."""
    if name != PIL_LOOP:
        import keras  # noqa: F401
        import tensorflow as tf

        import benchmarks.pipelines  # noqa: F401  imports are not measured

        tf.zeros([]).numpy()  # initializes the devices
    ends = [time.perf_counter()]
    epoch = passes(name, folder)
    for _ in range(1 + LATER):
        for _ in epoch():
            pass
        ends.append(time.perf_counter())
    seconds = [b - a for a, b in pairwise(ends)]
    return {"cold": seconds[0], "later": statistics.median(seconds[1:])}


def measure(options: argparse.Namespace) -> Result:
    rounds = options.rounds or 5
    sides = list(dict.fromkeys(side for _, mine, others in ROWS for side in (mine, *others)))
    speeds: dict[tuple[str, str], list[float]] = {}
    with photos(options) as root, tempfile.TemporaryDirectory() as scratch:
        times = -(-AT_LEAST // count_of(root))
        folder = link_times(root, Path(scratch, "photos"), times)
        images = count_of(folder)
        for turn, side in in_turns(sides, rounds):
            seconds = json.loads(
                run("-m", "benchmarks.input_pipeline", "--side", side, str(folder)).output.splitlines()[-1]
            )
            for figure, value in seconds.items():
                speeds.setdefault((figure, side), []).append(images / value)
            print(f"round {turn + 1}, {side}: {seconds['cold']:.2f} s, then {seconds['later']:.2f} s", flush=True)
        data = describe_data(options, root)
    values = {"later": LATER, "data": data, "times": times, "size": SIZE, "batch": BATCH, "directory": DIRECTORY}
    return Result(
        name="input",
        title="Input pipeline",
        how=HOW.replace("\n", " ").format(**values, bare=BARE, keras=KERAS_LAYERS),
        command=command_of("input", options, rounds, model=False),
        comparisons=[
            Comparison(WORDS[figure, mine], other, "images/s", speeds[figure, mine], speeds[figure, other])
            for figure, mine, others in ROWS
            for other in others
        ],
    )


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(read_all(options.side[0], Path(options.side[1]))))
    else:
        save(measure(options), output_folder(options))


if __name__ == "__main__":
    main()
