"""Configure devices, precision, determinism and the distribution strategy before the first tensor is created."""

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
DTYPE_POLICIES = {"float32": "float32", "bfloat16": "mixed_bfloat16", "float16": "mixed_float16"}


def build_strategy(
    config: RunConfig, control: ControlChannel, log_message: Callable[[str], None], num_cpus: int
) -> tf.distribute.Strategy:
    """Configure thread pools, determinism, precision and devices, and build the distribution strategy.

    All workers must call this together, before the first tensor exists.

    Args:
        config: the run's configuration.
        control: the control channel, over which the workers compare their devices.
        log_message: logs the devices and the collectives.
        num_cpus: number of processors that this process may use, which becomes the number of threads per thread pool.

    Returns:
        The default strategy for one device, MirroredStrategy for several GPUs or logical CPU devices in one process,
        or MultiWorkerMirroredStrategy for several workers.

    Raises:
        ConfigError: runtime.replicas or a batch setting does not fit the devices (see `choose_devices` and
            `check_batch_size`), or the workers have different devices.
        Interrupted: TensorFlow cannot start its server, probably because another process uses this worker's port.
    """
    runtime = config.runtime
    set_thread_pools(num_cpus)
    if runtime.deterministic:
        tf.config.experimental.enable_op_determinism()
    keras.mixed_precision.set_global_policy(DTYPE_POLICIES[runtime.precision])
    gpus = tf.config.list_physical_devices("GPU")
    for gpu in gpus:
        tf.config.experimental.set_memory_growth(gpu, True)
    kind, num_devices = choose_devices(runtime, control.size)
    control.require_equal("devices", {"kind": kind, "replicas": num_devices})
    check_batch_size(config, num_devices * control.size)
    log_message(describe_devices(detect_device(), num_devices, control.cluster, config))
    if control.size > 1:
        tf.config.set_visible_devices(gpus[:num_devices], "GPU")
        return _build_multi_worker_strategy(runtime, control, log_message)
    if num_devices == 1:
        return tf.distribute.get_strategy()
    if not gpus:
        cpu = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * num_devices)
    return tf.distribute.MirroredStrategy([f"{kind}:{i}" for i in range(num_devices)])


def set_thread_pools(count: int) -> None:
    """Set the sizes of TensorFlow's intra-op and inter-op thread pools to `count`; `tf.data` uses the inter-op pool.

    If threads outnumber the processors of the container's CPU quota, the kernel throttles all threads in each period.
    """
    tf.config.threading.set_intra_op_parallelism_threads(count)
    tf.config.threading.set_inter_op_parallelism_threads(count)


@cache
def detect_device() -> Device:
    """Return the device on which one replica runs: a GPU, or the CPU if there are no GPUs.

    If the GPUs differ, the result has all their names, the lowest compute capability, and the smallest memory.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return CPU
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    names = dict.fromkeys(detail.get("device_name", "unknown") for detail in details)
    capabilities = [detail.get("compute_capability") for detail in details]
    lowest_capability = min(map(tuple, filter(None, capabilities))) if all(capabilities) else None
    return Device("GPU", ", ".join(names), lowest_capability, _query_memory_per_gpu())


def query_gpu_memory() -> int | None:
    """Return the smallest GPU's memory times the number of GPUs, in bytes; None if unknown or there are no GPUs."""
    return (_query_memory_per_gpu() or 0) * len(tf.config.list_physical_devices("GPU")) or None


def _query_memory_per_gpu() -> int | None:
    """Return the memory of the machine's smallest GPU in bytes; None if nvidia-smi lists no GPU or fails."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()
        sizes = [int(mebibytes) * 2**20 for mebibytes in output]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return min(sizes, default=0) or None


def choose_devices(runtime: Runtime, num_workers: int) -> tuple[str, int]:
    """Return the kind ("GPU" or "CPU") and the number of the devices on each worker; each device runs one replica.

    Args:
        runtime: `runtime.replicas` is the number of devices; null chooses all GPUs, or one CPU device.
        num_workers: number of workers in the run.

    Raises:
        ConfigError: `runtime.replicas` exceeds the number of GPUs, or exceeds 1 on several workers without GPUs.
    """
    gpus = tf.config.list_physical_devices("GPU")
    kind, count = "GPU" if gpus else "CPU", runtime.replicas or max(len(gpus), 1)
    if gpus and count > len(gpus):
        problem, fix = f"exceeds the {len(gpus)} GPUs of this machine", "set it to null to use all"
        raise ConfigError(problem, key="runtime.replicas", value=count, fix=fix)
    if num_workers > 1 and not gpus and count > 1:
        problem = "must be 1 on each of several workers without GPUs"
        raise ConfigError(problem, key="runtime.replicas", value=count, fix="set it to null")
    return kind, count


def describe_devices(device: Device, count: int, cluster: Cluster, config: RunConfig) -> str:
    """Describe each worker's `count` devices and the precision; with several replicas, also their batch size."""
    batch_size = config.training.batch_size
    precision = config.runtime.precision
    num_replicas = count * cluster.size
    if num_replicas == 1:
        return f"device: {device.describe()}, {precision}"
    description = device.describe(count)
    batch_note = f"; a batch of {batch_size} is {batch_size // num_replicas} for each"
    if cluster.size > 1:
        return f"devices: {cluster.size} workers ({cluster.source}) with {description} each, {precision}{batch_note}"
    reason = "runtime.replicas" if config.runtime.replicas else "all devices"
    return f"devices: {description} mirrored ({reason}), {precision}{batch_note}"


def check_batch_size(config: RunConfig, num_replicas: int) -> None:
    """Raise a ConfigError if the global batch cannot be divided among the `num_replicas` replicas on all workers.

    The number of replicas must divide `training.virtual_replicas`, if it is set. The batch size must be divisible by
    the number of replicas times the micro-batches per replica. With mixup or cutmix, which mix pairs, the batch size
    per replica (or virtual replica) must be even. With `model.hidden_batch_norm`, each virtual replica, or each
    micro-batch over all replicas, must have at least two examples.
    """
    batch_size, num_virtual = config.training.batch_size, config.training.virtual_replicas
    if num_virtual and num_virtual % num_replicas:
        problem = f"is not divisible by {num_replicas} replicas"
        fix = f"start {', '.join(str(1 << i) for i in range(num_virtual.bit_length()))} replicas"
        raise ConfigError(problem, key="training.virtual_replicas", value=num_virtual, fix=fix)
    num_micro_batches = config.training.count_micro_batches(num_replicas)
    per_replica = batch_size // (num_virtual or num_replicas)
    divisor = compute_batch_size_multiple(config, num_replicas)
    smaller_size = f"{batch_size // divisor * divisor} or " if batch_size > divisor else ""
    sizes = f"{smaller_size}{-(-batch_size // divisor) * divisor}"
    if batch_size % (num_replicas * num_micro_batches):
        key = "training.virtual_replicas" if num_virtual else "training.accumulate"
        detail = f" with {num_micro_batches} micro-batches each ({key})" if num_micro_batches > 1 else ""
        problem = f"is not divisible by {num_replicas} replicas{detail}"
        raise ConfigError(problem, key="training.batch_size", value=batch_size, fix=f"use {sizes}")
    statistics_size = batch_size // (num_virtual or config.training.accumulate)
    if config.model.hidden_units and config.model.hidden_batch_norm and statistics_size < 2:
        detail = "a part of the batch" if num_virtual or config.training.accumulate > 1 else "the batch"
        problem = f"normalizes {detail} by its own mean, and of a single example nothing would be left"
        fix = "use a larger training.batch_size, fewer parts, or set it to false"
        raise ConfigError(problem, key="model.hidden_batch_norm", value="true", fix=fix)
    if config.augmentation.mixes and per_replica % 2:
        kind, count = ("virtual replicas", num_virtual) if num_virtual else ("replicas", num_replicas)
        detail = f"{per_replica} for each of {count} {kind} are" if count > 1 else f"{per_replica} is"
        problem = f"augmentation.mixup and cutmix mix pairs of neighbours, and {detail} odd"
        raise ConfigError(problem, key="training.batch_size", value=batch_size, fix=f"use {sizes}, or set both to 0")


def _build_multi_worker_strategy(
    runtime: Runtime, control: ControlChannel, log_message: Callable[[str], None]
) -> tf.distribute.Strategy:
    """Start this worker's TensorFlow server, and build a `MultiWorkerMirroredStrategy` for the devices of all workers.

    The servers wait for each other without a timeout. A timer, or the watchdog, exits this process with code 75 after
    `runtime.start_timeout` seconds. Raises Interrupted if TensorFlow cannot start its server at the worker's address.
    """
    os.environ["TF_CONFIG"] = control.cluster.tf_config()
    implementation = tf.distribute.experimental.CommunicationImplementation[runtime.collectives.upper()]
    pack_bytes = int((runtime.pack_mb or 0) * 2**20)
    options = tf.distribute.experimental.CommunicationOptions(pack_bytes, implementation=implementation)
    packing = f"packs of {runtime.pack_mb:g} MB" if runtime.pack_mb else "one pack"
    log_message(f"collectives: {runtime.collectives}, gradients in {packing}; starting TensorFlow's servers")
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
