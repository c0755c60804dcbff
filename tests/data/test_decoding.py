"""Decoding against Pillow, formats and sizes of all kinds, and in a SavedModel."""

import io
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from trainer.data.decoding import ANTIALIAS_ABOVE, decode_image


def make_smooth_image(height: int, width: int, channels: int = 3) -> np.ndarray:
    """An image without sharp edges, uint8 [H, W, C]."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [127 + 100 * np.sin(x / (9 + 3 * c) + c) * np.cos(y / (11 + c)) for c in range(channels)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def encode_image(pixels: np.ndarray, kind: str, mode: str = "RGB") -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, kind, **({"quality": 95} if kind == "JPEG" else {}))
    return out.getvalue()


KINDS = [("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK"), ("PNG", "RGB"), ("PNG", "L"), ("PNG", "RGBA"), ("PNG", "P")]
KINDS += [("PNG", "1"), ("BMP", "RGB"), ("BMP", "L"), ("BMP", "P"), ("BMP", "RGBA"), ("GIF", "P"), ("GIF", "L")]


@pytest.mark.parametrize(("kind", "mode"), KINDS)
@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_every_format_becomes_rgb(kind: str, mode: str, resize: str) -> None:
    data = encode_image(make_smooth_image(24, 24), kind, mode)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    pixels = decode_image(tf.constant(data), 24, resize)
    assert pixels.dtype == tf.uint8
    assert pixels.shape == (24, 24, 3)
    assert np.abs(pixels.numpy() - expected).max() <= (8 if kind == "JPEG" else 0)


def test_transparency_is_dropped() -> None:
    pixels = make_smooth_image(16, 16, 4)
    pixels[..., 3] = 0
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA").save(out, "PNG")
    np.testing.assert_array_equal(decode_image(tf.constant(out.getvalue()), 16, "stretch"), pixels[..., :3])


def test_first_frame_of_an_animation() -> None:
    out = io.BytesIO()
    frames = [Image.fromarray(np.full((9, 9, 3), value, np.uint8)) for value in (10, 200)]
    frames[0].save(out, "GIF", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decode_image(tf.constant(out.getvalue()), 9, "stretch"), np.full((9, 9, 3), 10))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize(("height", "width"), [(60, 101), (101, 60)])
def test_crop_takes_the_centre_square(kind: str, height: int, width: int) -> None:
    data = encode_image(make_smooth_image(height, width), kind)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    top, left = (height - 60) // 2, (width - 60) // 2
    decoded = decode_image(tf.constant(data), 60, "crop").numpy()
    # Fused decoding sees no chroma beyond the cut: only the outermost pixels of a JPEG may differ.
    assert np.abs(decoded - whole[top : top + 60, left : left + 60])[2:-2, 2:-2].max() <= (8 if kind == "JPEG" else 0)


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 48), (100, 140, 60), (333, 500, 224)])
def test_resizing_is_bilinear_in_half_pixel_coordinates(height: int, width: int, size: int) -> None:
    pixels = make_smooth_image(height, width)

    def at(length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = np.clip((np.arange(size) + 0.5) * length / size - 0.5, 0, length - 1)
        low = np.floor(position).astype(int)
        return low, np.minimum(low + 1, length - 1), position - low

    (y0, y1, fy), (x0, x1, fx) = at(height), at(width)
    fx, fy, source = fx[None, :, None], fy[:, None, None], pixels.astype(float)
    top = source[y0][:, x0] * (1 - fx) + source[y0][:, x1] * fx
    bottom = source[y1][:, x0] * (1 - fx) + source[y1][:, x1] * fx
    decoded = decode_image(tf.constant(encode_image(pixels, "PNG")), size, "stretch").numpy()
    assert np.abs(decoded - (top * (1 - fy) + bottom * fy)).max() <= 0.51


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(("size", "ratio"), [(96, 1), (48, 2), (24, 4), (12, 8)])
def test_a_jpeg_is_decoded_at_a_fraction_of_its_size(size: int, ratio: int, mode: str) -> None:
    data = encode_image(make_smooth_image(96, 96), "JPEG", mode)
    draft = Image.open(io.BytesIO(data))
    draft.draft(None, (size, size))
    assert draft.size == (96 // ratio, 96 // ratio)
    decoded = decode_image(tf.constant(data), size, "stretch").numpy()
    # Pillow's build of the decoder upsamples the chroma of a whole image in another way.
    limit = 8 if ratio == 1 or mode == "CMYK" else 2
    assert np.abs(decoded - np.asarray(draft.convert("RGB")).astype(int)).max() <= limit


@pytest.mark.parametrize("resize", ["stretch", "crop"])
@pytest.mark.parametrize(("height", "width"), [(95, 130), (130, 95), (95, 400)])
def test_a_jpeg_is_decoded_at_least_at_the_requested_size(resize: str, height: int, width: int) -> None:
    data = tf.constant(encode_image(make_smooth_image(height, width), "JPEG"))
    for size, ratio in ((48, 1), (47, 2), (24, 2), (23, 4), (12, 4), (11, 8), (3, 8)):
        whole = tf.io.decode_jpeg(data, channels=3, ratio=ratio)
        assert min(whole.shape[:2]) >= size
        if resize == "crop":
            side = min(whole.shape[:2])
            top, left = (whole.shape[0] - side) // 2, (whole.shape[1] - side) // 2
            whole = whole[top : top + side, left : left + side]
        shrinking = max(whole.shape[:2]) / size
        expected = tf.round(tf.image.resize(whole, [size, size], antialias=shrinking > ANTIALIAS_ABOVE))
        far = np.abs(decode_image(data, size, resize).numpy() - expected.numpy())
        assert (far[1:-1, 1:-1] if resize == "crop" else far).max() == 0  # a crop ends without neighbouring chroma


def test_a_large_photo_is_averaged_not_sampled() -> None:
    chequered = np.repeat((np.indices((400, 400)).sum(0) % 2 * 255).astype(np.uint8)[..., None], 3, axis=2)
    decoded = decode_image(tf.constant(encode_image(chequered, "PNG")), 40, "stretch").numpy()
    assert np.abs(decoded[2:-2, 2:-2].astype(int) - 127).max() <= 2


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"hello",
        encode_image(make_smooth_image(60, 80), "JPEG")[:900],
        encode_image(make_smooth_image(9, 9), "PNG")[:-8],
    ],
)
@pytest.mark.parametrize("resize", ["stretch", "crop"])
def test_damage_raises(data: bytes, resize: str) -> None:
    with pytest.raises(tf.errors.InvalidArgumentError):
        decode_image(tf.constant(data), 32, resize)


def assert_saved_decodes_as_mapped(images: list[bytes], folder: Path) -> None:
    """A SavedModel and a pipeline decode these images to the same pixels."""

    class Decoder(tf.Module):
        @tf.function(input_signature=[tf.TensorSpec([], tf.string)])
        def decode(self, data: tf.Tensor) -> tf.Tensor:
            return decode_image(data, 40, "crop")

    tf.saved_model.save(Decoder(), str(folder))
    loaded = tf.saved_model.load(str(folder))
    mapped = tf.data.Dataset.from_tensor_slices(images).map(lambda data: decode_image(data, 40, "crop"))
    for data, pixels in zip(images, mapped, strict=True):
        np.testing.assert_array_equal(loaded.decode(tf.constant(data)), pixels)


def test_saved_model_decodes_the_same(tmp_path: Path) -> None:
    assert_saved_decodes_as_mapped(
        [encode_image(make_smooth_image(50, 70), kind, mode) for kind, mode in KINDS], tmp_path
    )
