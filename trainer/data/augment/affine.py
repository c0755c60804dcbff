"""Apply a random affine transform to each image of a batch, in one bilinear resampling that XLA compiles.

TensorFlow's ImageProjectiveTransformV3 computes each pixel's source position once per channel, and takes 2.6 ms of CPU
time per image of 224 x 224 pixels. This module takes 0.75 ms (docs/log.md). Packing, positions, gathering and
interpolation are separate compiled functions, because XLA would not vectorize a single loop, which gathers.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config.schema import Augmentation
from trainer.data.augment import draws as draw_ids
from trainer.data.augment.draws import NUM_LEVELS, RandomDraws, tabulate_levels

MAX_ASPECT = 4 / 3  # maximum aspect ratio of a crop, width : height; the minimum is 1 / MAX_ASPECT


def flip(images: tf.Tensor, settings: Augmentation, draws: RandomDraws) -> tf.Tensor:
    """Flip images, [b, S, S, 3] of any dtype, at random, by copying pixels.

    Each flip that `settings` enables is applied with probability 1/2.
    """
    horizontal_flip = settings.flip_horizontal, draw_ids.FLIP_HORIZONTAL, 2
    for is_enabled, draw, axis in (horizontal_flip, (settings.flip_vertical, draw_ids.FLIP_VERTICAL, 1)):
        if is_enabled:
            # One flag per image takes half the time of `tf.where` with a flag per pixel.
            images = tf.raw_ops.Select(condition=draws.coin(draw), x=tf.reverse(images, [axis]), y=images)
    return images


def _compute_matrix(
    settings: Augmentation, draws: RandomDraws, crop_matrix: list[list[tf.Tensor]]
) -> list[list[tf.Tensor]]:
    """Multiply `crop_matrix` by the inverses of flip, zoom, shear, rotation and stretch.

    The product is a 2 x 2 matrix, whose entries are Python numbers or float32 [b]. It maps output coordinates relative
    to the output's center to source coordinates relative to the crop's center.
    """

    def times(factor: list[list[tf.Tensor]]) -> list[list[tf.Tensor]]:
        """Return the matrix product of `matrix`, as it is so far, and `factor`."""
        return [[row[0] * factor[0][j] + row[1] * factor[1][j] for j in range(2)] for row in matrix]

    matrix = crop_matrix
    if settings.flip_horizontal:
        matrix = times([[tf.where(draws.coin(draw_ids.FLIP_HORIZONTAL), -1.0, 1.0), 0.0], [0.0, 1.0]])
    if settings.flip_vertical:
        matrix = times([[1.0, 0.0], [0.0, tf.where(draws.coin(draw_ids.FLIP_VERTICAL), -1.0, 1.0)]])
    if settings.zoom:
        scale = draws.select(draw_ids.ZOOM, 1 / tabulate_levels(1 - settings.zoom, 1 + settings.zoom))
        matrix = times([[scale, 0.0], [0.0, scale]])
    if settings.shear:
        tangents = np.tan(np.radians(tabulate_levels(-settings.shear, settings.shear)))
        matrix = times([[1.0, -draws.select(draw_ids.SHEAR, tangents)], [0.0, 1.0]])
    for draw, limit in zip((draw_ids.ROTATION, draw_ids.SECOND_ROTATION), settings.rotations, strict=False):
        angles = np.radians(tabulate_levels(-limit, limit))
        cos, sin = draws.select(draw, np.cos(angles)), draws.select(draw, np.sin(angles))
        matrix = times([[cos, sin], [-sin, cos]])
    if settings.stretch:
        scales = 1 / tabulate_levels(1 - settings.stretch, 1 + settings.stretch)
        scale_x, scale_y = (draws.select(draw, scales) for draw in (draw_ids.STRETCH_X, draw_ids.STRETCH_Y))
        matrix = times([[scale_x, 0.0], [0.0, scale_y]])
    return matrix


def warp(images: tf.Tensor, settings: Augmentation, draws: RandomDraws) -> tf.Tensor:
    """Crop, flip, zoom, shear, rotate, stretch and shift images, uint8 [b, S, S, 3], in one resampling.

    Operations that `settings` disables are not in the graph. `draws` has the random numbers that select the parameters.
    """
    batch_size, size = tf.shape(images)[0], images.shape[1]
    zeros, center, max_shift = tf.zeros([batch_size]), (size - 1) / 2, settings.shift * size
    crop_matrix, crop_center = [[1.0, 0.0], [0.0, 1.0]], (center, center)
    if settings.crop:
        (width, height), (left, top) = draw_crops(settings.crop, draws)
        crop_matrix = [[width, 0.0], [0.0, height]]
        crop_center = (left + width / 2) * (size - 1), (top + height / 2) * (size - 1)
    (xx, xy), (yx, yy) = _compute_matrix(settings, draws, crop_matrix)
    shifts = tabulate_levels(-max_shift, max_shift)
    center_x = center + (draws.select(draw_ids.SHIFT_X, shifts) if settings.shift else zeros)
    center_y = center + (draws.select(draw_ids.SHIFT_Y, shifts) if settings.shift else zeros)
    x, y = crop_center[0] - xx * center_x - xy * center_y, crop_center[1] - yx * center_x - yy * center_y
    return resample(
        images, tf.stack([zeros + coefficient for coefficient in (xx, xy, x, yx, yy, y)], axis=1), settings.fill
    )


def tabulate_aspects(min_area: float) -> tuple[np.ndarray, np.ndarray]:
    """Tabulate equally likely aspect ratios of a random crop, and the maximum area of a crop with each ratio.

    Crops are distributed as in torchvision's RandomResizedCrop (Szegedy et al. 2015) without its limit of ten attempts:
    the area is uniform in [min_area, 1], and the log of the aspect ratio (width : height) is uniform in +- log(4/3),
    conditional on the crop fitting into the image. For a ratio q >= 1, the density of log(q) is then proportional to
    1 / q - min_area, and the area is uniform in [min_area, 1 / q]. The ratios q and 1 / q are equally likely, and have
    the same distribution of areas.

    Args:
        min_area: minimum area of a crop as a fraction of the image, between 0 and 1 (both excluded).

    Returns:
        Square roots of the aspect ratios, and maximum areas as fractions of the image, both float64 [NUM_LEVELS].
    """
    max_log_aspect = min(np.log(MAX_ASPECT), -np.log(min_area))
    grid = np.linspace(0, max_log_aspect, 100_001)
    cumulative = 1 - np.exp(-grid) - min_area * grid  # distribution function of the log aspect, not normalized
    upper_half = np.interp((np.arange(NUM_LEVELS // 2) + 0.5) / (NUM_LEVELS // 2) * cumulative[-1], cumulative, grid)
    log_aspects = np.concatenate([-upper_half[::-1], upper_half])
    return np.exp(log_aspects / 2), np.exp(-np.abs(log_aspects))


def draw_crops(min_area: float, draws: RandomDraws) -> tuple[tuple[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor]]:
    """Draw one crop per image. Return its (width, height) and (left, top), as float32 [b] fractions of the image side.

    `min_area` is the minimum area of a crop as a fraction of the image.
    """
    sqrt_aspects, max_areas = tabulate_aspects(min_area)
    sqrt_aspect = draws.select(draw_ids.CROP_ASPECT, sqrt_aspects)
    max_area = draws.select(draw_ids.CROP_ASPECT, max_areas)
    area = min_area + (max_area - min_area) * draws.uniform(draw_ids.CROP_AREA)
    # In float64, because the last bit of a float32 square root can depend on the length of the vector.
    sqrt_area = tf.cast(tf.sqrt(tf.cast(area, tf.float64)), tf.float32)
    inverse_sqrt_aspect = draws.select(draw_ids.CROP_ASPECT, 1 / sqrt_aspects)
    width, height = tf.minimum(sqrt_area * sqrt_aspect, 1.0), tf.minimum(sqrt_area * inverse_sqrt_aspect, 1.0)
    left, top = (1 - width) * draws.uniform(draw_ids.CROP_X), (1 - height) * draws.uniform(draw_ids.CROP_Y)
    return (width, height), (left, top)


def compile_with_xla(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function with XLA, once per combination of argument shapes."""
    return tf.function(function, jit_compile=True, autograph=False)


def resample(images: tf.Tensor, transforms: tf.Tensor, fill: str) -> tf.Tensor:
    """Resample images bilinearly: output pixel (x, y) is read from the source at (t0 x + t1 y + t2, t3 x + t4 y + t5).

    Args:
        images: uint8 [b, S, S, 3] with b * (S + 2)^2 < 2^31, the limit of an int32 index.
        transforms: t0 to t5 of each image, in pixels, float32 [b, 6].
        fill: values outside the source: "nearest" (the nearest source pixel), "constant" (black) or "reflect".

    Returns:
        uint8 [b, S, S, 3]. Each image's result is bit-for-bit independent of the other images.
    """
    source = tf.pad(images, [[0, 0], [1, 1], [1, 1], [0, 0]]) if fill == "constant" else images
    upper_left, right, down = _make_position_function(images.shape[1], fill)(transforms)
    neighbors = _gather_neighbors(_pack_images(source), upper_left)
    return unpack(_interpolate(*neighbors, right, down), images.shape)


def pack(planes: list[tf.Tensor]) -> tf.Tensor:
    """Pack a red, a green and a blue plane, int32 in 0..255, into one int32 tensor of the same shape."""
    return planes[0] + planes[1] * 2**8 + planes[2] * 2**16


def unpack(pixels: tf.Tensor, shape: tf.TensorShape) -> tf.Tensor:
    """Unpack pixels, int32 [b, S, S], into images, uint8 [b, S, S, 3]. `shape` is the static shape of the images."""
    return tf.ensure_shape(tf.bitcast(pixels, tf.uint8)[..., :3], shape)


@compile_with_xla
def _pack_images(images: tf.Tensor) -> tf.Tensor:
    """Pack the channels of images, uint8 [b, S, S, 3], into int32 [b, S, S]."""
    return pack(tf.unstack(tf.cast(images, tf.int32), axis=-1))


@cache
def _make_position_function(size: int, fill: str) -> Callable[[tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor]]:
    """Make a compiled function that maps transforms, float32 [b, 6], to the source position of each output pixel.

    The function returns three tensors [b, S, S]: the index in the flattened batch, int32, of the source pixel at or to
    the upper left of the position, and the distances right and down from this pixel to the position, float32.
    """

    def apply_fill(x: tf.Tensor) -> tf.Tensor:
        """Map a coordinate to 0..size - 1, or to 0..size + 1 of the bordered source if `fill` is "constant"."""
        if fill == "constant":
            return tf.clip_by_value(x + 1.0, 0.0, size + 1.0)
        if fill == "reflect":  # about the outer edges of the outermost pixels
            periods = (x + 0.5) * (0.5 / size)
            x = (periods - tf.floor(periods)) * (2.0 * size)
            x = tf.minimum(x, 2.0 * size - x) - 0.5
        return tf.clip_by_value(x, 0.0, size - 1.0)

    def positions(transforms: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        xx, xy, x, yx, yy, y = (transforms[:, k, None, None] for k in range(6))
        columns, rows = tf.range(size, dtype=tf.float32), tf.range(size, dtype=tf.float32)[:, None]
        x, y = apply_fill(xx * columns + (xy * rows + x)), apply_fill(yx * columns + (yy * rows + y))
        left, top = tf.cast(x, tf.int32), tf.cast(y, tf.int32)
        row_length = size + 2 if fill == "constant" else size
        image_index = tf.range(tf.shape(transforms)[0])[:, None, None]
        upper_left = (image_index * row_length + top) * row_length + left
        return upper_left, x - tf.cast(left, tf.float32), y - tf.cast(top, tf.float32)

    return compile_with_xla(positions)


@compile_with_xla
def _gather_neighbors(pixels: tf.Tensor, upper_left: tf.Tensor) -> tuple[tf.Tensor, ...]:
    """Gather the pixels at the indices `upper_left`, to the right of them, below them, and below right of them.

    At the right or lower edge, a neighbor is an unrelated pixel, which gets weight 0 in the interpolation.
    """
    row_length, flat_pixels = pixels.shape[2], tf.reshape(pixels, [-1])
    offsets = (0, 1, row_length, row_length + 1)
    return tuple(tf.gather(flat_pixels, tf.minimum(upper_left + k, tf.size(flat_pixels) - 1)) for k in offsets)


@compile_with_xla
def _interpolate(
    upper_left: tf.Tensor, upper_right: tf.Tensor, lower_left: tf.Tensor, lower_right: tf.Tensor,
    right: tf.Tensor, down: tf.Tensor,
) -> tf.Tensor:  # fmt: skip
    """Interpolate each channel bilinearly between four packed pixels, int32 [b, S, S]. Round and pack again.

    `right` and `down` are the distances of the position from the upper left pixel, float32 in [0, 1).
    """

    def channel(packed: tf.Tensor, shift: int) -> tf.Tensor:
        return tf.cast(tf.bitwise.bitwise_and(tf.bitwise.right_shift(packed, shift), 255), tf.float32)

    planes = []
    for shift in (0, 8, 16):
        upper, lower = channel(upper_left, shift), channel(lower_left, shift)
        upper += right * (channel(upper_right, shift) - upper)
        lower += right * (channel(lower_right, shift) - lower)
        planes.append(tf.cast(upper + down * (lower - upper) + 0.5, tf.int32))
    return pack(planes)
