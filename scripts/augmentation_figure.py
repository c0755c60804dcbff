"""Write docs/images/augmentation.jpg, a row per augmentation: `PYTHONPATH=. python scripts/augmentation_figure.py`.

The images are scikit-learn's sample images.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf
import yaml
from matplotlib.figure import Figure
from PIL import Image
from sklearn.datasets import load_sample_image

from trainer.config.schema import Augmentation
from trainer.data.augment.apply import augment
from trainer.data.augment.mixing import mix_pairs

ROOT = Path(__file__).parent.parent
SIDE, VIEWS = 112, 7  # side of an image in pixels; number of images per row
ROWS: dict[str, dict[str, object]] = {
    "rotation=40": {"rotation": 40},
    "rotation=[40,108] fill=reflect": {"rotation": (40, 108), "fill": "reflect"},
    "shift=0.2 fill=constant": {"shift": 0.2, "fill": "constant"},
    "shear=20": {"shear": 20},
    "zoom=0.3": {"zoom": 0.3},
    "stretch=0.3": {"stretch": 0.3},
    "crop=0.08 flip_horizontal=true": {"crop": 0.08, "flip_horizontal": True},
    "contrast=0.5": {"contrast": 0.5},
    "brightness=0.3": {"brightness": 0.3},
    "saturation=0.8": {"saturation": 0.8},
    "hue=0.2": {"hue": 0.2},
    "randaugment=2": {"randaugment": 2},
    "cutout=0.4": {"cutout": 0.4},
    "mixup=0.8": {"mixup": 0.8},
    "cutmix=1": {"cutmix": 1.0},
}


def read_square_photo(name: str) -> np.ndarray:
    """Return the centre of a sample image, uint8 [SIDE, SIDE, 3]."""
    image = Image.fromarray(load_sample_image(name))
    left = (image.width - image.height) // 2
    square = image.crop((left, 0, left + image.height, image.height))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def make_views(augmentation: Augmentation) -> np.ndarray:
    """Augment an image as in `VIEWS` epochs, with another image for mixup and CutMix: uint8 [VIEWS, SIDE, SIDE, 3]."""
    images = np.stack([read_square_photo("china.jpg"), read_square_photo("flower.jpg")] * VIEWS)
    index, epoch = np.arange(2 * VIEWS) % 2, np.arange(2 * VIEWS) // 2
    changed = augment(tf.constant(images), augmentation, 3, epoch, index)
    if augmentation.mixes:
        batch = {"image": changed, "label": tf.zeros(2 * VIEWS, tf.int32), "weight": tf.ones(2 * VIEWS)}
        changed = mix_pairs({**batch, "index": tf.constant(index)}, augmentation, 3, epoch)["image"]
    return np.asarray(changed[::2])


def main() -> None:
    """Write the figure."""
    strong = ("standard", "medical", "strong", "inception")
    groups = {name: yaml.safe_load((ROOT / "conf" / "augmentation" / f"{name}.yaml").read_text()) for name in strong}
    rows = ROWS | {f"augmentation={name}": options for name, options in groups.items()}
    figure = Figure(figsize=(VIEWS * 1.0, len(rows) * 1.16), layout="constrained")
    for panel, (title, options) in zip(figure.subfigures(len(rows), 1), rows.items(), strict=True):
        panel.suptitle(title, x=0.01, ha="left", fontsize=8, family="monospace")
        for axes, view in zip(panel.subplots(1, VIEWS), make_views(Augmentation(**options)), strict=True):
            axes.imshow(view)
            axes.set_axis_off()
    target = ROOT / "docs" / "images" / "augmentation.jpg"
    figure.savefig(target, dpi=90, pil_kwargs={"quality": 85})


if __name__ == "__main__":
    main()
