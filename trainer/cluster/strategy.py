"""Devices, precision and determinism: everything TensorFlow must know before it creates anything."""

from __future__ import annotations

from collections.abc import Callable

import keras
import tensorflow as tf

from trainer.config import Runtime
from trainer.errors import ConfigError

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def build_strategy(runtime: Runtime, note: Callable[[str], None]) -> tf.distribute.Strategy:
    """Choose the devices and the strategy over them; must run before any tensor exists.

    Returns:
        The default strategy for one device, MirroredStrategy for several GPUs or logical CPU devices.

    Raises:
        ConfigError: more replicas are asked for than there are GPUs.
    """
    if runtime.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.mixed_precision.set_global_policy(POLICIES[runtime.precision])
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    wanted = runtime.replicas or max(len(gpus), 1)
    if gpus and wanted > len(gpus):
        raise ConfigError(f"runtime.replicas={wanted}, but this machine has {len(gpus)} GPUs; leave it null to use all")
    if wanted == 1:
        note(f"device: {'one GPU' if gpus else 'CPU'}, {runtime.precision}")
        return tf.distribute.get_strategy()
    kind = "GPU" if gpus else "CPU"
    if not gpus:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * wanted)
    note(f"devices: {wanted} {kind}s mirrored (runtime.replicas), {runtime.precision}")
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(wanted)])
