"""The compiled resampling against TensorFlow's own op, which does the same in floating point."""

import numpy as np
import pytest
import tensorflow as tf

from tests.data.augmented import COUNT, IMAGES, SIDE, assert_rounded
from trainer.data.augment.affine import resampled


def maps() -> np.ndarray:
    """Turned, mirrored, magnified and moved far beyond the edges: float32 [COUNT, 6]."""
    rng = np.random.default_rng(1)
    return np.concatenate([
        rng.uniform(-2, 2, (COUNT, 2)), rng.uniform(-40, 40, (COUNT, 1)),
        rng.uniform(-2, 2, (COUNT, 2)), rng.uniform(-40, 40, (COUNT, 1)),
    ], axis=1).astype(np.float32)  # fmt: skip


@pytest.mark.parametrize("fill", ["nearest", "constant", "reflect"])
def test_it_is_tensorflows_resampling_in_bytes(fill: str) -> None:
    found = resampled(tf.constant(IMAGES), tf.constant(maps()), fill)
    expected = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.constant(IMAGES, tf.float32),
        transforms=np.pad(maps(), [(0, 0), (0, 2)]),
        output_shape=[SIDE, SIDE],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode=fill.upper(),
    )
    assert found.dtype == tf.uint8
    assert 0.02 < np.mean(expected == 0) < 0.98 or fill != "constant"
    assert_rounded(found.numpy(), expected.numpy())


@pytest.mark.parametrize("fill", ["nearest", "constant", "reflect"])
def test_whole_pixels_are_only_moved(fill: str) -> None:
    move = np.tile(np.float32([1, 0, 3, 0, 1, -2]), (COUNT, 1))
    padded = np.pad(IMAGES, [(0, 0), (2, 0), (0, 3), (0, 0)],
                    mode={"nearest": "edge", "constant": "constant", "reflect": "symmetric"}[fill])  # fmt: skip
    expected = padded[:, :SIDE, 3:]
    np.testing.assert_array_equal(resampled(tf.constant(IMAGES), tf.constant(move), fill), expected)
