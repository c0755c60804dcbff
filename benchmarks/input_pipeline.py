"""Compare the input pipeline of a run with Keras' directory loader, PIL in a loop, and a minimal tf.data pipeline.

    python -m benchmarks.input_pipeline --data FOLDER

Each side runs in a separate process, which opens a folder of photos, reads one epoch ("cold"), then further epochs
("later", the median), and discards the batches. The files are in the page cache. Op determinism is on for this
package's sides only.
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
    BATCH_SIZE,
    FLIP_ROTATE_ZOOM,
    IMAGE_SIZE,
    choose_output_folder,
    describe_data,
    format_command,
    make_argument_parser,
    open_photos,
    select_all_for_training,
)
from benchmarks.photos import count_photos, link_repeatedly, list_photos
from benchmarks.processes import interleave, run_python
from benchmarks.results import Comparison, Result, save_result

NUM_LATER_EPOCHS = 3  # epochs after the first
MIN_PHOTOS = 2400  # minimum photos per epoch, by several links to each, so that opening takes little of the time
OURS, LIVE, AUGMENTED = "ours", "ours, not cached", "ours, augmented"
DIRECTORY, CACHED, PIL_LOOP = "directory loader", "directory loader, cache()", "PIL in a loop"
BARE, KERAS_LAYERS = "bare decode_jpeg", "Keras layers in map"
# Rows of the page: the measurement, this package's side, and the sides that it is compared with
ROWS: list[tuple[str, str, tuple[str, ...]]] = [
    ("cold", OURS, (DIRECTORY, CACHED, PIL_LOOP, BARE)),
    ("later", OURS, (DIRECTORY, CACHED, PIL_LOOP, BARE)),
    ("later", LIVE, (DIRECTORY, BARE)),
    ("later", AUGMENTED, (KERAS_LAYERS,)),
]
DESCRIPTIONS = {
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


def open_epochs(name: str, folder: Path) -> Callable[[], Iterator[Any]]:
    """Open a folder as the side `name` does. Each call of the returned function starts an epoch of batches."""
    if name == PIL_LOOP:
        return open_pil_epochs(folder)
    import tensorflow as tf

    if name in (OURS, LIVE, AUGMENTED):
        return open_our_epochs(name, folder)
    autotune = tf.data.AUTOTUNE
    if name == BARE:

        def pixels(path: tf.Tensor) -> tf.Tensor:
            image = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
            return tf.cast(tf.image.resize(image, [IMAGE_SIZE, IMAGE_SIZE]), tf.uint8)

        files = tf.data.Dataset.from_tensor_slices([str(p) for group in list_photos(folder).values() for p in group])
        batches = files.map(pixels, num_parallel_calls=autotune).batch(BATCH_SIZE).prefetch(autotune)
        return lambda: iter(batches)

    import keras

    batches = keras.utils.image_dataset_from_directory(
        folder, image_size=(IMAGE_SIZE, IMAGE_SIZE), batch_size=BATCH_SIZE, verbose=False
    )
    if name in (CACHED, KERAS_LAYERS):
        batches = batches.cache()
    if name == KERAS_LAYERS:
        layers = [keras.layers.RandomFlip("horizontal"), keras.layers.RandomRotation(0.2), keras.layers.RandomZoom(0.2)]
        augmentation_layers = keras.Sequential(layers)
        batches = batches.map(lambda x, y: (augmentation_layers(x, training=True), y), num_parallel_calls=autotune)
    batches = batches.prefetch(autotune)
    return lambda: iter(batches)


def open_our_epochs(name: str, folder: Path) -> Callable[[], Iterator[Any]]:
    """Open the input pipeline of a run, whose stream of batches is infinite."""
    import tensorflow as tf

    from benchmarks.pipelines import build_training_stream, open_training_images
    from trainer.config.schema import Augmentation

    tf.config.experimental.enable_op_determinism()
    dataset, pixels = open_training_images(
        select_all_for_training(folder), IMAGE_SIZE, "none" if name == LIVE else "memory"
    )
    batches = iter(build_training_stream(pixels, BATCH_SIZE, FLIP_ROTATE_ZOOM if name == AUGMENTED else Augmentation()))
    steps = -(-dataset.splits["train"].count // BATCH_SIZE)
    return lambda: (next(batches) for _ in range(steps))


def open_pil_epochs(folder: Path) -> Callable[[], Iterator[Any]]:
    """Open a Python generator of float32 batches that PIL decodes."""
    import numpy as np
    from PIL import Image

    files = [path for group in list_photos(folder).values() for path in group]

    def pixels(path: Path) -> Any:
        with Image.open(path) as image:
            return np.asarray(
                image.convert("RGB").resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR), np.float32
            )

    def epoch() -> Iterator[Any]:
        for first in range(0, len(files), BATCH_SIZE):
            yield np.stack([pixels(path) for path in files[first : first + BATCH_SIZE]])

    return epoch


def measure_side(name: str, folder: Path) -> dict[str, float]:
    """Measure the seconds to open the folder and read the first epoch ("cold"), and to read a later one ("later")."""
    if name != PIL_LOOP:
        import keras  # noqa: F401
        import tensorflow as tf

        import benchmarks.pipelines  # noqa: F401  imports are not measured

        tf.zeros([]).numpy()  # initializes the devices
    times = [time.perf_counter()]
    epoch = open_epochs(name, folder)
    for _ in range(1 + NUM_LATER_EPOCHS):
        for _ in epoch():
            pass
        times.append(time.perf_counter())
    seconds = [b - a for a, b in pairwise(times)]
    return {"cold": seconds[0], "later": statistics.median(seconds[1:])}


def measure(options: argparse.Namespace) -> Result:
    """Measure all sides in separate processes and interleaved rounds, and compare them as in `ROWS`."""
    rounds = options.rounds or 5
    sides = list(dict.fromkeys(side for _, our_side, other_sides in ROWS for side in (our_side, *other_sides)))
    speeds: dict[tuple[str, str], list[float]] = {}
    with open_photos(options) as root, tempfile.TemporaryDirectory() as scratch:
        copies = -(-MIN_PHOTOS // count_photos(root))
        folder = link_repeatedly(root, Path(scratch, "photos"), copies)
        images = count_photos(folder)
        for round_index, side in interleave(sides, rounds):
            seconds = json.loads(
                run_python("-m", "benchmarks.input_pipeline", "--side", side, str(folder)).output.splitlines()[-1]
            )
            for measurement, value in seconds.items():
                speeds.setdefault((measurement, side), []).append(images / value)
            print(
                f"round {round_index + 1}, {side}: {seconds['cold']:.2f} s, then {seconds['later']:.2f} s", flush=True
            )
        data = describe_data(options, root)
    values = {
        "later": NUM_LATER_EPOCHS,
        "data": data,
        "times": copies,
        "size": IMAGE_SIZE,
        "batch": BATCH_SIZE,
        "directory": DIRECTORY,
    }
    return Result(
        name="input",
        title="Input pipeline",
        how=HOW.replace("\n", " ").format(**values, bare=BARE, keras=KERAS_LAYERS),
        command=format_command("input", options, rounds, has_model=False),
        comparisons=[
            Comparison(
                DESCRIPTIONS[measurement, our_side],
                other_side,
                "images/s",
                speeds[measurement, our_side],
                speeds[measurement, other_side],
            )
            for measurement, our_side, other_sides in ROWS
            for other_side in other_sides
        ],
    )


def main() -> None:
    """Measure all sides and save the result, or measure a single side for the parent process."""
    parser = make_argument_parser(__doc__)
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        print(json.dumps(measure_side(options.side[0], Path(options.side[1]))))
    else:
        save_result(measure(options), choose_output_folder(options))


if __name__ == "__main__":
    main()
