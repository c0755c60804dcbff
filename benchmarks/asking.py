"""What every row can be asked: the same arguments for all of them, and the data they mean."""

import argparse
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.photos import count_of, photos_of, write_photos
from trainer.config.schema import Augmentation, Data

SIZE, BATCH = 160, 32  # of the recipe
# Of the recipe too; rotation in degrees
FLIP_ROTATE_ZOOM = Augmentation(flip_horizontal=True, rotation=72, zoom=0.2, fill="reflect")
SYNTHETIC = 600  # photos, in five classes


def arguments_of(description: str | None) -> argparse.ArgumentParser:
    """--data, --weights, --alpha, --rounds, --out."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help=f"class folders; without it {SYNTHETIC} photos of noise are made")
    parser.add_argument(
        "--weights", default="none", type=_whole_path, help="MobileNetV2 without its top; without it random"
    )
    parser.add_argument("--alpha", type=float, default=0.35, help="width of MobileNetV2")
    parser.add_argument("--rounds", type=int, help="of every row; without it each row's own number")
    parser.add_argument("--out", type=Path, help="folder for a JSON file a row; without it a new one")
    return parser


def _whole_path(text: str) -> str:
    """Runs have another working directory."""
    return text if text == "none" else str(Path(text).resolve())


def folder_for(asked: argparse.Namespace) -> Path:
    """Where results go."""
    return asked.out or Path(tempfile.mkdtemp(prefix="kubetune-benchmarks-"))


@contextmanager
def photos(asked: argparse.Namespace) -> Iterator[Path]:
    """The class folders asked for, or made now and gone afterwards."""
    if asked.data:
        yield asked.data.resolve()
        return
    with tempfile.TemporaryDirectory() as scratch:
        yield write_photos(Path(scratch), SYNTHETIC, classes=5)


def all_to_train(root: Path) -> Data:
    """Every photo of the class folders is a training image."""
    return Data(source="image_folder", root=str(root), validation_fraction=0.0)


def command_of(row: str, asked: argparse.Namespace, rounds: int, model: bool = True) -> str:
    """What one types to measure a row again; paths are named, not shown."""
    words = ["python", "-m", "benchmarks", "--only", row, "--rounds", str(rounds)]
    words += ["--data", "FOLDER"] if asked.data else []
    words += ["--weights", "FILE"] if model and asked.weights != "none" else []
    return shlex.join([*words, "--alpha", f"{asked.alpha:g}"] if model else words)


def data_in_words(asked: argparse.Namespace, root: Path) -> str:
    """ "600 photos in 5 classes"."""
    kind = "given photos" if asked.data else "photos of noise"
    return f"{count_of(root):,} {kind} in {len(photos_of(root))} classes"


def model_in_words(asked: argparse.Namespace) -> str:
    weights = "random" if asked.weights == "none" else "given"
    return f"MobileNetV2 of width {asked.alpha:g} with {weights} weights at {SIZE} px, batch {BATCH}"
