"""Rendered glyphs: the training images of the packaged backbone.

Letters and symbols (no digits: the quickstart's digits must be new to the backbone) are drawn with the fonts of
matplotlib, then distorted, thickened, blurred and recoloured, so that they resemble scanned handwriting.
"""

import unicodedata
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

SIZE = 48  # pixels, the input size of the packaged backbone
CANVAS = 72  # pixels, drawn larger so that a rotation cuts nothing off

# Upper and lower case that differ only in size cannot be distinguished after random scaling: they are one class.
SAME_SHAPE = set("COSVWXZUPK")
LATIN = [
    c for c in "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz" if c.upper() not in SAME_SHAPE or c.isupper()
]
GREEK = list("ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφχψω")
SYMBOLS = list("!?#$%&@*+=<>/()[]{}~§¶±÷€£¥©")
CLASSES = [*LATIN, *GREEK, *SYMBOLS]


def font_files() -> list[Path]:
    """Every text font in matplotlib's own folder (DejaVu and STIX families, upright and slanted)."""
    import matplotlib

    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    fonts = [p for p in sorted(folder.glob("*.ttf")) if p.name.startswith(("DejaVu", "STIXGeneral"))]
    return [p for p in fonts if "Display" not in p.name]


def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    missing = font.getmask("\uffff").getbbox(), bytes(font.getmask("\uffff"))
    mask = font.getmask(character)
    return mask.getbbox() is not None and (mask.getbbox(), bytes(mask)) != missing


def glyph_bank() -> tuple[np.ndarray, np.ndarray]:
    """Draw every class in every font that has it.

    Returns:
        masks: uint8 [n, CANVAS, CANVAS], 255 = ink, the glyph's longer side 40 pixels, centred.
        labels: int64 [n], index into `CLASSES`.
    """
    masks, labels = [], []
    for path in font_files():
        font = ImageFont.truetype(str(path), 60)
        for label, character in enumerate(CLASSES):
            if not _has(font, character):
                continue
            left, top, right, bottom = font.getbbox(character)
            width, height = right - left, bottom - top
            image = Image.new("L", (width + 8, height + 8), 0)
            ImageDraw.Draw(image).text((4 - left, 4 - top), character, fill=255, font=font)
            scale = 40 / max(width, height)
            image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            canvas = Image.new("L", (CANVAS, CANVAS), 0)
            canvas.paste(image, ((CANVAS - image.width) // 2, (CANVAS - image.height) // 2))
            masks.append(np.asarray(canvas))
            labels.append(label)
    return np.stack(masks), np.asarray(labels, np.int64)


def _bend(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One random affine map plus a smooth elastic field (Simard et al. 2003), sampled once: [SIZE, SIZE] in 0..1."""
    angle = np.deg2rad(rng.normal(0, 9))
    shear = rng.normal(0, 0.18)
    size = rng.uniform(0.65, 1.05)  # of the image's side that the glyph's longer side takes
    aspect = np.exp(rng.normal(0, 0.14))
    rotate = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = rotate @ np.array([[1, 0], [shear, 1]]) @ np.diag([aspect, 1 / aspect]) * (40 / SIZE / size)
    grid = np.stack(np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")).reshape(2, -1) - (SIZE - 1) / 2
    where = matrix @ grid + (CANVAS - 1) / 2 + rng.normal(0, 1.6, (2, 1))
    strength, smooth = rng.uniform(0, 1) ** 1.5 * 7, rng.uniform(5, 9)
    coarse = ndimage.gaussian_filter(rng.normal(0, 1, (2, SIZE, SIZE)), (0, smooth, smooth), mode="reflect")
    where = where + (coarse / coarse.std() * strength * 0.4).reshape(2, -1)
    return ndimage.map_coordinates(mask, where, order=1, mode="constant").reshape(SIZE, SIZE)


def _stroke(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Make the pen thicker or thinner."""
    kind = rng.integers(0, 4)
    if kind == 0:
        return ndimage.grey_dilation(mask, size=(rng.integers(2, 5),) * 2)
    if kind == 1 and mask.sum() > 90_000:  # only what has ink to lose
        return ndimage.grey_erosion(mask, size=(2, 2))
    return mask


def _bottleneck(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shrink to 8-20 pixels and back: scans are small, the quickstart's digits are 8x8."""
    side = int(rng.choice([8, 8, 9, 10, 12, 14, 16, 20]))
    image = Image.fromarray((image * 255).astype(np.uint8))
    small = image.resize((side, side), Image.Resampling.BOX)
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BILINEAR), np.float32) / 255


def draw(mask: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One training image, uint8 [SIZE, SIZE], from one bank mask (uint8 [CANVAS, CANVAS])."""
    image = _bend(_stroke(mask, rng).astype(np.float32) / 255, rng).astype(np.float32)
    if rng.random() < 0.65:
        image = _bottleneck(np.clip(image, 0, 1), rng)
    elif rng.random() < 0.5:
        image = ndimage.gaussian_filter(image, rng.uniform(0.3, 1.5))
    image = np.clip(image * rng.uniform(0.8, 1.3), 0, 1)
    ink, paper = rng.uniform(0.55, 1.0), 0.0
    if rng.random() < 0.5:  # a background that is not flat
        paper = rng.uniform(0, 0.3)
        slope = np.linspace(-1, 1, SIZE) * rng.uniform(-0.15, 0.15)
        paper = np.clip(paper + slope[None, :] + slope[::-1, None] * rng.uniform(-1, 1), 0, 0.5)
    image = paper + (ink - paper) * image
    if rng.random() < 0.5:
        image = image + rng.normal(0, rng.uniform(0, 0.08), image.shape)
    if rng.random() < 0.3:  # dark ink on light paper
        image = 1 - image
    return (np.clip(image, 0, 1) * 255).astype(np.uint8)


def _draw_many(job: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    seed, count = job
    rng = np.random.default_rng([20, seed])
    masks, labels = glyph_bank()
    classes = rng.integers(0, len(CLASSES), count)
    picks = np.array([rng.choice(np.flatnonzero(labels == c)) for c in classes])
    return np.stack([draw(masks[p], rng) for p in picks]), labels[picks]


def draw_dataset(count: int, workers: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` images, classes uniform: uint8 [count, SIZE, SIZE] and int64 [count]. Same bits for any `workers`."""
    chunk = 2_000
    jobs = [(i, min(chunk, count - i * chunk)) for i in range(-(-count // chunk))]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_draw_many, jobs))
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def describe() -> str:
    """One line on what the bank holds."""
    named = sum(unicodedata.category(c).startswith("L") for c in CLASSES)
    return f"{len(CLASSES)} classes ({named} letters, {len(CLASSES) - named} symbols) in {len(font_files())} fonts"
