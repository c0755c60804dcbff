"""Devices, precision, determinism and the distribution strategy, which must be configured before the first tensor."""

import os
import subprocess
import threading
from collections.abc import Callable
from functools import cache

import keras
import tensorflow as tf

from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import Cluster
from trainer.config.auto import compute_batch_size_multiple
from trainer.config.schema import RunConfig, Runtime
from trainer.errors import ConfigError, Interrupted
from trainer.monitoring.health import health
from trainer.types import CPU, Device

# runtime.precision -> name of the Keras dtype policy
POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def build_strategy(
    config: RunConfig, control: ControlChannel, log_message: Callable[[str], None], cpus: int
) -> tf.distribute.Strategy:
    """Configure thread pools, determinism, precision and devices, and build the distribution strategy.

    All workers must call this together, before the first tensor exists.

    Args:
        control: compares the devices of the workers.
        log_message: logs the devices and the collectives.
        cpus: number of threads per thread pool, the processors that this process may use.

    Returns:
        The default strategy for one device. MirroredStrategy for several GPUs, or several logical CPU devices, in one
        process. MultiWorkerMirroredStrategy for several workers.

    Raises:
        ConfigError: the errors of `choose_devices` and `check_batch_size`, or the workers have different devices.
        Interrupted: TensorFlow cannot start its server, probably because another process uses the port of this worker.
    """
    runtime = config.runtime
    set_thread_pools(cpus)
    if runtime.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.mixed_precision.set_global_policy(POLICIES[runtime.precision])
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    kind, count = choose_devices(runtime, control.size)
    control.require_equal("devices", {"kind": kind, "replicas": count})
    check_batch_size(config, count * control.size)
    log_message(describe_devices(detect_device(), count, control.cluster, config))
    if control.size > 1:
        tf.config.set_visible_devices(gpus[:count], "GPU")
        return _multi_worker_strategy(runtime, control, log_message)
    if count == 1:
        return tf.distribute.get_strategy()
    if not gpus:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(count)])


def set_thread_pools(count: int) -> None:
    """Set the sizes of TensorFlow's intra-op and inter-op thread pools; `tf.data` uses the inter-op pool.

    With more threads than the container's CPU quota has processors, the kernel throttles all of them in each period.
    """
    tf.config.threading.set_intra_op_parallelism_threads(count)
    tf.config.threading.set_inter_op_parallelism_threads(count)


@cache
def detect_device() -> Device:
    """Detect the device that computes a replica.

    If the GPUs differ, the result has all their names, the lowest compute capability, and the smallest memory.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return CPU
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    names = dict.fromkeys(detail.get("device_name", "unknown") for detail in details)
    capabilities = [detail.get("compute_capability") for detail in details]
    lowest = min(map(tuple, filter(None, capabilities))) if all(capabilities) else None
    return Device("GPU", ", ".join(names), lowest, _query_memory_per_gpu())


def query_gpu_memory() -> int | None:
    """Return the memory of the smallest GPU times the number of GPUs, in bytes; None without GPUs or if unknown."""
    return (_query_memory_per_gpu() or 0) * len(tf.config.list_physical_devices("GPU")) or None


def _query_memory_per_gpu() -> int | None:
    """Query nvidia-smi for the memory of the machine's smallest GPU in bytes; None if it lists none or fails."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        sizes = [int(mebibytes) * 2**20 for mebibytes in output]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return min(sizes, default=0) or None


def choose_devices(runtime: Runtime, workers: int) -> tuple[str, int]:
    """Choose the kind ("GPU" or "CPU") and the number of devices of each worker; each device computes one replica.

    Args:
        runtime: `runtime.replicas` is the number of devices; null chooses all GPUs, or one CPU device.
        workers: number of workers of the run.

    Raises:
        ConfigError: `runtime.replicas` exceeds the number of GPUs, or it is more than 1 with several workers that have
            no GPU.
    """
    gpus = tf.config.list_physical_devices("GPU")
    kind, count = "GPU" if gpus else "CPU", runtime.replicas or max(len(gpus), 1)
    if gpus and count > len(gpus):
        problem, fix = f"exceeds the {len(gpus)} GPUs of this machine", "set it to null to use all"
        raise ConfigError(problem, key="runtime.replicas", value=count, fix=fix)
    if workers > 1 and not gpus and count > 1:
        problem = "must be 1 on each of several workers without GPUs"
        raise ConfigError(problem, key="runtime.replicas", value=count, fix="set it to null")
    return kind, count


def describe_devices(device: Device, count: int, cluster: Cluster, config: RunConfig) -> str:
    """Describe the `count` devices of each worker and the precision; with several replicas, also the batch of each."""
    batch_size, precision, replicas = config.training.batch_size, config.runtime.precision, count * cluster.size
    if replicas == 1:
        return f"device: {device.describe()}, {precision}"
    devices = device.describe(count)
    batch = f"; a batch of {batch_size} is {batch_size // replicas} for each"
    if cluster.size > 1:
        return f"devices: {cluster.size} workers ({cluster.source}) with {devices} each, {precision}{batch}"
    why = "runtime.replicas" if config.runtime.replicas else "all devices"
    return f"devices: {devices} mirrored ({why}), {precision}{batch}"


def check_batch_size(config: RunConfig, replicas: int) -> None:
    """Raise a ConfigError if the global batch cannot be divided among the replicas of all workers.

    `replicas` must divide `training.virtual_replicas`, if it is set. The batch must be divisible by the replicas times
    the micro-batches of each. The part for one replica or virtual replica must be even with mixup or cutmix, which mix
    pairs. With `model.hidden_batch_norm`, a virtual replica or a micro-batch of all replicas must have two examples.
    """
    batch_size, parts = config.training.batch_size, config.training.virtual_replicas
    if parts and parts % replicas:
        problem = f"is not divisible by {replicas} replicas"
        fix = f"start {', '.join(str(1 << i) for i in range(parts.bit_length()))} replicas"
        raise ConfigError(problem, key="training.virtual_replicas", value=parts, fix=fix)
    micro_batches = config.training.micro_batches(replicas)
    per_replica, divisor = batch_size // (parts or replicas), compute_batch_size_multiple(config, replicas)
    smaller = f"{batch_size // divisor * divisor} or " if batch_size > divisor else ""
    valid = f"{smaller}{-(-batch_size // divisor) * divisor}"
    if batch_size % (replicas * micro_batches):
        key = "training.virtual_replicas" if parts else "training.accumulate"
        detail = f" with {micro_batches} micro-batches each ({key})" if micro_batches > 1 else ""
        problem = f"is not divisible by {replicas} replicas{detail}"
        raise ConfigError(problem, key="training.batch_size", value=batch_size, fix=f"use {valid}")
    statistics_size = batch_size // (parts or config.training.accumulate)
    if config.model.hidden_units and config.model.hidden_batch_norm and statistics_size < 2:
        detail = "a part of the batch" if parts or config.training.accumulate > 1 else "the batch"
        problem = f"normalizes {detail} by its own mean, and of a single example nothing would be left"
        fix = "use a larger training.batch_size, fewer parts, or set it to false"
        raise ConfigError(problem, key="model.hidden_batch_norm", value="true", fix=fix)
    if config.augmentation.mixes and per_replica % 2:
        kind, count = ("virtual replicas", parts) if parts else ("replicas", replicas)
        detail = f"{per_replica} for each of {count} {kind} are" if count > 1 else f"{per_replica} is"
        problem = f"augmentation.mixup and cutmix mix pairs of neighbours, and {detail} odd"
        raise ConfigError(problem, key="training.batch_size", value=batch_size, fix=f"use {valid}, or set both to 0")


def _multi_worker_strategy(
    runtime: Runtime, control: ControlChannel, log_message: Callable[[str], None]
) -> tf.distribute.Strategy:
    """Start TensorFlow's servers, and build a `MultiWorkerMirroredStrategy` for the GPUs or the CPU of each worker.

    The servers wait for each other without a timeout. A timer, or the watchdog, exits this process with code 75 after
    `runtime.start_timeout` seconds. Raises Interrupted if TensorFlow cannot start its server at the worker's address.
    """
    os.environ["TF_CONFIG"] = control.cluster.tf_config()
    implementation = tf.distribute.experimental.CommunicationImplementation[runtime.collectives.upper()]
    pack_bytes = int((runtime.pack_mb or 0) * 2**20)
    options = tf.distribute.experimental.CommunicationOptions(pack_bytes, implementation=implementation)
    packs = f"packs of {runtime.pack_mb:g} MB" if runtime.pack_mb else "one pack"
    log_message(f"collectives: {runtime.collectives}, gradients in {packs}; starting TensorFlow's servers")
    problem, fix = "TensorFlow's servers did not connect in time, though the workers did", "start all workers again"
    error = Interrupted(problem, key="runtime.start_timeout", value=f"{runtime.start_timeout:g}", fix=fix)
    timer = threading.Timer(runtime.start_timeout, control.end, args=(error.exit_code, str(error)))
    timer.daemon = True
    timer.start()
    try:
        # The call holds the GIL, so neither this timer nor the control channel can run: the watchdog ends the process.
        with health.blocked_in("starting TensorFlow's servers", runtime.start_timeout):
            return tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
    except tf.errors.UnknownError as error:
        address = control.cluster.addresses[control.index]
        problem = f"TensorFlow cannot start its server at {address} ({error.message.partition(chr(10))[0]})"
        fix = f"end the other process that uses the port, perhaps a second one with the index {control.index}"
        raise Interrupted(problem, fix=fix) from error
    finally:
        timer.cancel()
