"""Remake the packaged backbone: MobileNetV2 (alpha 0.35) trained on rendered glyphs. `make pretrained` runs this.

One process, plain Keras: the recipe is here to be read and repeated, not to be fast. BatchNormalization learns with
momentum 0.9 (Keras gives MobileNetV2 0.999, which never catches up in a short training) and its statistics are
estimated once more at the end over the clean training images.
"""

import argparse
import os
from pathlib import Path

import glyphs
import h5py
import keras
import numpy as np
import tensorflow as tf

BATCH = 128
OUT = Path(__file__).parent.parent / "trainer" / "models" / "weights" / "glyphs_mobilenet_v2_0.35.weights.h5"


def backbone() -> keras.Model:
    """MobileNetV2 without its top, 48x48x3 in [-1, 1] in, 2x2x1280 out."""
    model = keras.applications.MobileNetV2(
        input_shape=(glyphs.SIZE, glyphs.SIZE, 3), alpha=0.35, include_top=False, weights=None
    )
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.momentum = 0.9
    return model


def to_model_input(images: tf.Tensor) -> tf.Tensor:
    """uint8 [b, s, s] -> float32 [b, s, s, 3] in [-1, 1]."""
    return tf.repeat(tf.cast(images, tf.float32)[..., None] / 127.5 - 1, 3, axis=-1)


def batches(images: np.ndarray, labels: np.ndarray, training: bool) -> tf.data.Dataset:
    """Batches of (images, labels); in training shuffled, shifted by up to 3 pixels and randomly inverted."""

    def vary(x: tf.Tensor, y: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        x = to_model_input(x)
        x = tf.image.random_crop(tf.pad(x, [[0, 0], [3, 3], [3, 3], [0, 0]], "SYMMETRIC"), tf.shape(x))
        return x * tf.where(tf.random.uniform([tf.shape(x)[0], 1, 1, 1]) < 0.15, -1.0, 1.0), y

    data = tf.data.Dataset.from_tensor_slices((images, labels))
    if training:
        data = data.shuffle(len(images), seed=1).batch(BATCH, drop_remainder=True).map(vary, tf.data.AUTOTUNE)
    else:
        data = data.batch(BATCH).map(lambda x, y: (to_model_input(x), y), tf.data.AUTOTUNE)
    return data.prefetch(4)


def reestimate_batch_norm(model: keras.Model, images: np.ndarray) -> None:
    """Replace the moving statistics by the mean over many batches of the batch statistics."""
    norms = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    sums = [np.zeros((2, layer.moving_mean.shape[0])) for layer in norms]
    for layer in norms:
        layer.momentum = 0.0  # the moving statistics become those of the last batch
    starts = range(0, len(images) - BATCH + 1, BATCH)
    run = tf.function(lambda x: model(x, training=True))
    for start in starts:
        run(to_model_input(images[start : start + BATCH]))
        for total, layer in zip(sums, norms, strict=True):
            total += np.stack([layer.moving_mean.numpy(), layer.moving_variance.numpy()])
    for total, layer in zip(sums, norms, strict=True):
        layer.moving_mean.assign(total[0] / len(starts))
        layer.moving_variance.assign(total[1] / len(starts))


def save_as_float16(model: keras.Model, path: Path) -> None:
    """Keras' own weights file, with every array stored as compressed float16."""
    full = path.with_name("full.weights.h5")
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save_weights(full)
    with h5py.File(full) as source, h5py.File(path, "w") as target:

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            made = (
                target.create_dataset(name, data=item[()].astype(np.float16))
                if isinstance(item, h5py.Dataset)
                else target.require_group(name)
            )
            made.attrs.update(item.attrs)

        source.visititems(copy)
        target.attrs.update(source.attrs)
    full.unlink()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--glyphs", type=int, default=200_000)
    arguments.add_argument("--epochs", type=int, default=5)
    arguments.add_argument("--out", type=Path, default=OUT)
    options = arguments.parse_args()

    keras.utils.set_random_seed(7)
    print(f"drawing {options.glyphs:,} images: {glyphs.describe()}")
    images, labels = glyphs.draw_dataset(options.glyphs, os.cpu_count() or 1)
    held_out = 4_000
    base = backbone()
    model = keras.Sequential(
        [
            base,
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dropout(0.1),
            keras.layers.Dense(len(glyphs.CLASSES)),
        ]
    )
    steps = (len(images) - held_out) // BATCH * options.epochs
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps, warmup_target=4e-3, warmup_steps=steps // 20)
    model.compile(
        keras.optimizers.AdamW(rate, weight_decay=0.02),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    model.fit(
        batches(images[held_out:], labels[held_out:], training=True),
        validation_data=batches(images[:held_out], labels[:held_out], training=False),
        epochs=options.epochs,
        verbose=2,
    )
    reestimate_batch_norm(base, images[-40_000:])
    _, accuracy = model.evaluate(batches(images[:held_out], labels[:held_out], training=False), verbose=0)
    print(f"held-out accuracy after re-estimating BatchNorm: {accuracy:.4f} (n={held_out})")
    save_as_float16(base, options.out)
    print(f"{options.out}: {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
