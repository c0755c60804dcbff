"""Devices, precision, determinism and the strategy: everything TensorFlow must know before it creates anything."""

import os
import threading
from collections.abc import Callable

import keras
import tensorflow as tf

from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import Cluster
from trainer.config.schema import RunConfig, Runtime
from trainer.errors import ConfigError, Interrupted

POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def build_strategy(
    config: RunConfig, peers: ControlChannel, note: Callable[[str], None], processors: int
) -> tf.distribute.Strategy:
    """Choose the devices and the strategy over them; must run before any tensor exists.

    Args:
        processors: that TensorFlow may keep busy. By itself it would take all that the host lets this process run on,
            and not know of a container's quota.

    Returns:
        The default strategy for one device; MirroredStrategy for several GPUs, or logical CPU devices, of one process;
        MultiWorkerMirroredStrategy for several workers.

    Raises:
        ConfigError: more replicas are asked for than there are GPUs, the workers have different numbers of devices, or
            the global batch cannot be shared evenly, or not in pairs where examples are mixed.
    """
    runtime = config.runtime
    use_processors(processors)
    if runtime.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.mixed_precision.set_global_policy(POLICIES[runtime.precision])
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    kind, wanted = devices_of(runtime, peers.size)
    peers.require_equal("devices", {"kind": kind, "replicas": wanted})
    note(described(kind, wanted, peers.cluster, config))
    if peers.size > 1:
        tf.config.set_visible_devices(gpus[:wanted], "GPU")
        return _several_workers(runtime, peers, note)
    if wanted == 1:
        return tf.distribute.get_strategy()
    if not gpus:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * wanted)
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(wanted)])


def use_processors(count: int) -> None:
    """Threads of TensorFlow's two pools: inside an operation, and for operations (those of `tf.data` too) side by side.

    A pool larger than a container's quota spends the quota of a period at once, and then stands still until the next.
    """
    tf.config.threading.set_intra_op_parallelism_threads(count)
    tf.config.threading.set_inter_op_parallelism_threads(count)


def devices_of(runtime: Runtime, workers: int) -> tuple[str, int]:
    """The kind ("GPU" or "CPU") and number of the devices that one of these workers trains on.

    Raises:
        ConfigError: more are asked for than there are.
    """
    gpus = tf.config.list_physical_devices("GPU")
    kind, wanted = "GPU" if gpus else "CPU", runtime.replicas or max(len(gpus), 1)
    if gpus and wanted > len(gpus):
        raise ConfigError(f"runtime.replicas={wanted}, but this machine has {len(gpus)} GPUs; leave it null to use all")
    if workers > 1 and not gpus and wanted > 1:
        raise ConfigError(
            f"runtime.replicas={wanted}: each of several workers without GPUs is one replica; set it null"
        )
    return kind, wanted


def described(kind: str, wanted: int, cluster: Cluster, config: RunConfig) -> str:
    """The line that describes the devices of all workers and each one's part of a batch.

    Raises:
        ConfigError: the global batch cannot be shared evenly, or not in pairs where examples are mixed.
    """
    batch_size, precision, replicas = config.training.batch_size, config.runtime.precision, wanted * cluster.size
    _check_batch_size(config, replicas)
    if replicas == 1:
        return f"device: one {kind}, {precision}"
    count = f"{wanted} {kind}{'s' if wanted > 1 else ''}"
    part = f"; a batch of {batch_size} is {batch_size // replicas} for each"
    if cluster.size > 1:
        return f"devices: {cluster.size} workers ({cluster.source}) with {count} each, {precision}{part}"
    why = "runtime.replicas" if config.runtime.replicas else "all there are"
    return f"devices: {count} mirrored ({why}), {precision}{part}"


def _check_batch_size(config: RunConfig, replicas: int) -> None:
    batch_size, pieces = config.training.batch_size, config.training.accumulate
    parts, rows, pairs = replicas * pieces, batch_size // replicas, 2 * replicas
    if batch_size % parts:
        of = f" in {pieces} pieces each (training.accumulate)" if pieces > 1 else ""
        raise ConfigError(
            f"training.batch_size: {batch_size} cannot be shared evenly by {replicas} replicas{of}; "
            f"take {max(batch_size // parts, 1) * parts} or {-(-batch_size // parts) * parts}"
        )
    if config.augmentation.mixes and rows % 2:
        each = f"{rows} for each of {replicas} replicas are" if replicas > 1 else f"{rows} is"
        smaller = f"{batch_size // pairs * pairs} or " if batch_size > pairs else ""
        raise ConfigError(
            f"training.batch_size: augmentation.mixup and cutmix mix pairs of neighbours, and {each} odd; "
            f"take {smaller}{-(-batch_size // pairs) * pairs}, or set both to 0"
        )


def _several_workers(runtime: Runtime, peers: ControlChannel, note: Callable[[str], None]) -> tf.distribute.Strategy:
    """Start TensorFlow's servers, whose rendezvous has no deadline of its own: ours ends the process."""
    os.environ["TF_CONFIG"] = peers.cluster.tf_config()
    implementation = tf.distribute.experimental.CommunicationImplementation[runtime.collectives.upper()]
    pack_bytes = int((runtime.pack_mb or 0) * 2**20)
    options = tf.distribute.experimental.CommunicationOptions(pack_bytes, implementation=implementation)
    packs = f"packs of {runtime.pack_mb:g} MB" if runtime.pack_mb else "one pack"
    note(f"collectives: {runtime.collectives}, gradients in {packs}; starting TensorFlow's servers")
    late = Interrupted(
        f"TensorFlow's servers did not find each other in {runtime.start_timeout:g} s, though the workers did; "
        "start all workers again"
    )
    watch = threading.Timer(runtime.start_timeout, peers.end, args=(late.exit_code, str(late)))
    watch.daemon = True
    watch.start()
    strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    watch.cancel()
    return strategy
