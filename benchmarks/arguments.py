"""Command-line arguments that all benchmarks of docs/performance.md have in common, and the data that they select."""

import argparse
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers import PEERS
from benchmarks.photos import count_photos, list_photos, write_photos
from trainer.config.schema import Augmentation, Data

# The flowers recipe's image side in pixels, batch size, and augmentation
IMAGE_SIZE, BATCH_SIZE = 160, 32
FLIP_ROTATE_ZOOM = Augmentation(flip_horizontal=True, rotation=72, zoom=0.2, fill="reflect")
NUM_GENERATED_PHOTOS = 3600  # in five classes: about the number of flower photos of the recipe


def make_argument_parser(description: str | None) -> argparse.ArgumentParser:
    """Make a parser of the options --data, --weights, --alpha, --rounds, --peers and --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"class folders; default: {NUM_GENERATED_PHOTOS} generated photos")
    parser.add_argument(
        "--weights", default="none", type=_absolute_path, help="MobileNetV2 without its top; default: random"
    )
    parser.add_argument("--alpha", type=float, default=0.35, help="width of MobileNetV2")
    parser.add_argument("--rounds", type=int, help="of every row; default: each row's own number")
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=PEERS, help="of the whole recipe; default: all")
    parser.add_argument("--out", type=Path, help="folder for one JSON file per row; default: a new one")
    return parser


def _absolute_path(text: str) -> str:
    return text if text == "none" else str(Path(text).resolve())


def choose_output_folder(options: argparse.Namespace) -> Path:
    """Return the folder for the results: the option --out, or a new temporary folder."""
    return options.out or Path(tempfile.mkdtemp(prefix="kubetune-benchmarks-"))


@contextmanager
def open_photos(options: argparse.Namespace) -> Iterator[Path]:
    """Yield the folder of class folders: the option --data, or a temporary folder of generated photos."""
    if options.data:
        yield options.data.resolve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield write_photos(Path(scratch), NUM_GENERATED_PHOTOS, classes=5)


def select_all_for_training(root: Path) -> Data:
    """Configure a dataset in which all photos of the class folders are training images."""
    return Data(source="image_folder", root=str(root), validation_fraction=0.0)


def format_command(row: str, options: argparse.Namespace, rounds: int, has_model: bool = True) -> str:
    """Format the command that repeats a benchmark, with placeholders for paths.

    Args:
        row: name of the benchmark in `benchmarks.__main__.ROWS`.
        options: the command-line options.
        rounds: number of rounds.
        has_model: whether the benchmark depends on the model options --weights and --alpha.
    """
    words = ["python", "-m", "benchmarks", "--only", row, "--rounds", str(rounds)]
    words += ["--peers", *options.peers] if row == "recipe" and tuple(options.peers) != PEERS else []
    words += ["--data", "FOLDER"] if options.data else []
    words += ["--weights", "FILE"] if has_model and options.weights != "none" else []
    return shlex.join([*words, "--alpha", f"{options.alpha:g}"] if has_model else words)


def describe_data(options: argparse.Namespace, root: Path) -> str:
    """Describe the photos in `root`, such as "600 given photos in 5 classes"."""
    kind = "given photos" if options.data else "generated photos"
    return f"{count_photos(root):,} {kind} in {len(list_photos(root))} classes"


def describe_model(options: argparse.Namespace) -> str:
    """Describe the model, such as "MobileNetV2 of width 0.35 with random weights at 160 px, batch 32"."""
    weights = "random" if options.weights == "none" else "given"
    return f"MobileNetV2 of width {options.alpha:g} with {weights} weights at {IMAGE_SIZE} px, batch {BATCH_SIZE}"
