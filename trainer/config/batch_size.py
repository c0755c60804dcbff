"""Choose the batch size for `training.batch_size=auto` from the number of images and, on GPUs, the memory needed."""

from dataclasses import dataclass

from trainer.config.schema import Precision, RunConfig
from trainer.types import Device

BYTES_PER_VALUE: dict[Precision, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
IMAGE_BYTES_PER_VALUE = 11  # bytes per value of an input image on a GPU: three batches in uint8 and two in float32

MAX_BATCH_SIZE_PER_GPU = 256  # maximum per-replica batch size, in images
MIN_STEPS_PER_EPOCH = 20  # a batch size above the one for CPUs must leave this many steps per epoch
MEMORY_FRACTION = 0.8  # fraction of a GPU's memory to use; the rest is for fragmentation and estimation errors
GPU_RESERVE = 1_500_000_000  # bytes for the CUDA context, cuDNN's workspaces and compiled programs; an assumption
TRAINED_BYTES_PER_PARAMETER = 4 * 5  # float32: the weight, its gradient, two optimizer variables, its moving average


@dataclass(frozen=True)
class Footprint:
    """A backbone's sizes, from which the GPU memory of its training is estimated.

    Activations are values per image, divided by the image's number of pixels (side^2). They must equal the values that
    `trainer.planning.estimates` counts in the network, which tests/planning/test_gpu_memory.py checks.
    """

    side: int  # side of the images for which the activations were counted, in pixels: the backbone's default
    trained: float  # activations stored for the gradient, all layers thawed, normalization layers frozen
    trained_norm: float  # the same, if the normalization layers use batch statistics
    frozen: float  # activations in memory at the same time, all layers frozen
    parameters: float  # millions of weights


FOOTPRINTS = {
    "MobileNet": Footprint(224, 235, 537, 32, 3.2),
    "MobileNetV2": Footprint(224, 302, 701, 48, 2.3),
    "Xception": Footprint(299, 468, 1177, 62, 20.9),
    "InceptionV3": Footprint(299, 264, 565, 31, 21.8),
    "InceptionResNetV2": Footprint(299, 757, 1211, 31, 54.3),
    "MobileNetV3Small": Footprint(224, 79, 163, 9, 0.9),
    "MobileNetV3Large": Footprint(224, 220, 483, 32, 3.0),
    "NASNetMobile": Footprint(224, 464, 733, 17, 4.3),
    "NASNetLarge": Footprint(331, 2195, 3587, 51, 84.9),
    "VGG16": Footprint(224, 304, 304, 128, 14.7),
    "VGG19": Footprint(224, 330, 330, 128, 20.0),
    "ResNet50": Footprint(224, 529, 1162, 33, 23.6),
    "ResNet101": Footprint(224, 801, 1740, 33, 42.7),
    "ResNet152": Footprint(224, 1137, 2454, 33, 58.4),
    "ResNet50V2": Footprint(224, 576, 911, 33, 23.6),
    "ResNet101V2": Footprint(224, 938, 1511, 33, 42.6),
    "ResNet152V2": Footprint(224, 1384, 2251, 33, 58.3),
    "DenseNet121": Footprint(224, 893, 1619, 33, 7.0),
    "DenseNet169": Footprint(224, 1090, 1956, 33, 12.6),
    "DenseNet201": Footprint(224, 1424, 2525, 33, 18.3),
    "EfficientNetB0": Footprint(224, 360, 763, 48, 4.1),
    "EfficientNetB1": Footprint(240, 502, 1068, 48, 6.6),
    "EfficientNetB2": Footprint(260, 543, 1156, 48, 7.8),
    "EfficientNetB3": Footprint(300, 702, 1495, 72, 10.8),
    "EfficientNetB4": Footprint(380, 899, 1926, 72, 17.7),
    "EfficientNetB5": Footprint(456, 1242, 2668, 72, 28.5),
    "EfficientNetB6": Footprint(528, 1566, 3367, 96, 41.0),
    "EfficientNetB7": Footprint(600, 2095, 4510, 96, 64.1),
    "EfficientNetV2B0": Footprint(224, 224, 509, 16, 5.9),
    "EfficientNetV2B1": Footprint(240, 307, 689, 16, 6.9),
    "EfficientNetV2B2": Footprint(260, 352, 787, 16, 8.8),
    "EfficientNetV2B3": Footprint(300, 422, 946, 20, 12.9),
    "EfficientNetV2S": Footprint(384, 593, 1320, 24, 20.3),
    "EfficientNetV2M": Footprint(480, 965, 2134, 24, 53.2),
    "EfficientNetV2L": Footprint(480, 1702, 3757, 32, 117.7),
    "ConvNeXtTiny": Footprint(224, 574, 574, 48, 27.8),
    "ConvNeXtSmall": Footprint(224, 925, 925, 48, 49.5),
    "ConvNeXtBase": Footprint(224, 1231, 1231, 64, 87.6),
    "ConvNeXtLarge": Footprint(224, 1844, 1844, 96, 196.2),
    "ConvNeXtXLarge": Footprint(224, 2456, 2456, 128, 348.2),
}


def estimate_gpu_bytes(config: RunConfig, footprint: Footprint) -> tuple[int, int]:
    """Estimate the GPU memory that training needs in its largest phase.

    A phase that thaws some layers counts as if it thawed all of them.

    Returns:
        Bytes per image in the per-replica batch, and bytes that do not depend on the batch size.
    """
    thawed_phases = [phase for phase in config.phases.values() if phase.thaw != "none"]
    values_per_pixel = footprint.frozen
    if thawed_phases:
        values_per_pixel = (
            footprint.trained_norm if any(phase.batch_norm == "train" for phase in thawed_phases) else footprint.trained
        )
    pixels = (config.model.image_size or footprint.side) ** 2
    width = config.model.alpha or 1.0
    bytes_per_image = pixels * (
        values_per_pixel * width * BYTES_PER_VALUE[config.runtime.precision] + 3 * IMAGE_BYTES_PER_VALUE
    )
    bytes_per_parameter = TRAINED_BYTES_PER_PARAMETER if thawed_phases else 4
    # The variables are float32. In half precision, a step also stores a copy of the weights in half precision.
    copy_bytes = 0 if config.runtime.precision == "float32" else BYTES_PER_VALUE[config.runtime.precision]
    return int(bytes_per_image), int(
        footprint.parameters * 1e6 * width**2 * (bytes_per_parameter + copy_bytes)
    ) + GPU_RESERVE


def choose_batch_size(config: RunConfig, num_images: int, device: Device, num_replicas: int) -> tuple[int, str]:
    """Choose the global batch size. Returns it, and its reason as the end of a log line.

    On CPUs, the size is 16 below 1,000 images, 32 below 50,000, and 64 otherwise, also if the GPU's memory or the
    backbone is unknown. On GPUs, the size per GPU is the largest power of two, up to `MAX_BATCH_SIZE_PER_GPU`, that
    fits into `MEMORY_FRACTION` of its memory. The global size must also leave `MIN_STEPS_PER_EPOCH` steps, or not
    exceed the size for CPUs.

    Args:
        config: configuration with the phases, the precision and the backbone resolved.
        num_images: number of training images.
        device: device on which the run trains.
        num_replicas: number of replicas on all workers.
    """
    cpu_size = 16 if num_images < 1_000 else 32 if num_images < 50_000 else 64
    footprint = find_footprint(config.model.backbone)
    if device.kind == "CPU" or not device.memory or not footprint:
        return cpu_size, " (16 under 1,000, 64 from 50,000 on, else 32)"
    bytes_per_image, fixed_bytes = estimate_gpu_bytes(config, footprint)
    num_fitting = int((MEMORY_FRACTION * device.memory - fixed_bytes) / bytes_per_image) * config.training.accumulate
    max_useful_size = max(cpu_size, num_images // MIN_STEPS_PER_EPOCH) // num_replicas
    gpu_batch = 1 << max(min(MAX_BATCH_SIZE_PER_GPU, num_fitting, max_useful_size), 1).bit_length() - 1
    memory_text = f"{device.memory / 2**30:.1f} GiB"
    reason = f": {gpu_batch} on each of {num_replicas} GPUs of {memory_text}, which hold about {num_fitting:,}"
    limits = f"at most {MAX_BATCH_SIZE_PER_GPU}, and {MIN_STEPS_PER_EPOCH} steps per epoch or {cpu_size} images"
    return gpu_batch * num_replicas, f"{reason} (a power of two, {limits})"


def find_footprint(backbone: str) -> Footprint | None:
    """Return a backbone's footprint; None if it is unknown. Case and separators in `backbone` do not matter."""
    normalized_name = "".join(filter(str.isalnum, backbone)).lower()
    return next((footprint for name, footprint in FOOTPRINTS.items() if name.lower() == normalized_name), None)
