"""Command-line arguments that all rows have in common, and the data that they select."""

import argparse
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.peers import PEERS
from benchmarks.photos import count_of, photos_of, write_photos
from trainer.config.schema import Augmentation, Data

SIZE, BATCH = 160, 32  # of the recipe, as is the augmentation; rotation in degrees
FLIP_ROTATE_ZOOM = Augmentation(flip_horizontal=True, rotation=72, zoom=0.2, fill="reflect")
SYNTHETIC = 3600  # photos, in five classes: about the number of flower photos of the recipe


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """--data, --weights, --alpha, --rounds, --peers, --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"class folders; default: {SYNTHETIC} generated photos")
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


def output_folder(options: argparse.Namespace) -> Path:
    """The folder of the results, by default a new one."""
    return options.out or Path(tempfile.mkdtemp(prefix="kubetune-benchmarks-"))


@contextmanager
def photos(options: argparse.Namespace) -> Iterator[Path]:
    """The given class folders, or temporary ones."""
    if options.data:
        yield options.data.resolve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield write_photos(Path(scratch), SYNTHETIC, classes=5)


def all_to_train(root: Path) -> Data:
    """Every photo of the class folders is a training image."""
    return Data(source="image_folder", root=str(root), validation_fraction=0.0)


def command_of(row: str, options: argparse.Namespace, rounds: int, model: bool = True) -> str:
    """The command that measures a row again, without its paths."""
    words = ["python", "-m", "benchmarks", "--only", row, "--rounds", str(rounds)]
    words += ["--peers", *options.peers] if row == "recipe" and tuple(options.peers) != PEERS else []
    words += ["--data", "FOLDER"] if options.data else []
    words += ["--weights", "FILE"] if model and options.weights != "none" else []
    return shlex.join([*words, "--alpha", f"{options.alpha:g}"] if model else words)


def describe_data(options: argparse.Namespace, root: Path) -> str:
    """Text such as "600 given photos in 5 classes"."""
    kind = "given photos" if options.data else "generated photos"
    return f"{count_of(root):,} {kind} in {len(photos_of(root))} classes"


def describe_model(options: argparse.Namespace) -> str:
    weights = "random" if options.weights == "none" else "given"
    return f"MobileNetV2 of width {options.alpha:g} with {weights} weights at {SIZE} px, batch {BATCH}"
