"""Choose `training.batch_size=auto`: by the number of images, and on GPUs by what the network needs of their memory."""

from dataclasses import dataclass

from trainer.config.schema import Precision, RunConfig
from trainer.types import Device

BYTES_PER_VALUE: dict[Precision, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
IMAGE_BYTES_PER_VALUE = 11  # on a GPU: three batches of uint8 and two of float32

LARGEST_PER_GPU = 256  # images
MIN_STEPS_PER_EPOCH = 20  # with a batch that is larger than the rule for CPUs
MEMORY_FRACTION = 0.8  # of a GPU; the rest is for fragmentation and the error of the estimate
GPU_RESERVE = 1_500_000_000  # bytes for the CUDA context, cuDNN's workspaces and compiled programs; assumed
TRAINED_BYTES_PER_PARAMETER = 4 * 5  # the weight, its gradient, two values of the optimizer, its average


@dataclass(frozen=True)
class Footprint:
    """What the memory of a network depends on; values are counted per pixel of an image of `side` pixels.

    Activations are those that `planning.estimates` counts in the network (tests/planning/test_estimates.py).
    """

    side: int  # of the images for which it was counted, the default of the network
    trained: float  # values stored for the gradient, all layers thawed, normalization frozen
    trained_norm: float  # the same, normalization with batch statistics
    frozen: float  # values in memory at once, all layers frozen
    parameters: float  # millions


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


def count_bytes(config: RunConfig, footprint: Footprint) -> tuple[int, int]:
    """Count the bytes of one image in training, in the phase that needs most, and of what does not grow with a batch.

    A phase that thaws a part of the layers counts as if it thawed all.
    """
    thawed = [phase for phase in config.phases.values() if phase.thaw != "none"]
    values = footprint.frozen
    if thawed:
        values = footprint.trained_norm if any(p.batch_norm == "train" for p in thawed) else footprint.trained
    pixels, width = (config.model.image_size or footprint.side) ** 2, config.model.alpha or 1.0
    image = pixels * (values * width * BYTES_PER_VALUE[config.runtime.precision] + 3 * IMAGE_BYTES_PER_VALUE)
    per_parameter = TRAINED_BYTES_PER_PARAMETER if thawed else 4
    half = 0 if config.runtime.precision == "float32" else BYTES_PER_VALUE[config.runtime.precision]
    return int(image), int(footprint.parameters * 1e6 * width**2 * (per_parameter + half)) + GPU_RESERVE


def choose_batch_size(config: RunConfig, images: int, device: Device, replicas: int) -> tuple[int, str]:
    """Choose the global batch size for `replicas` devices; return it with the rest of its reason.

    On CPUs: 16 under 1,000 images, 64 from 50,000 on, else 32. On GPUs: per GPU the largest power of two up to
    `LARGEST_PER_GPU` that fits into `MEMORY_FRACTION` of its memory, and that leaves `MIN_STEPS_PER_EPOCH` or is not
    larger than the rule for CPUs.
    """
    by_images = 16 if images < 1_000 else 32 if images < 50_000 else 64
    footprint = find_footprint(config.model.backbone)
    if device.kind == "CPU" or not device.memory or not footprint:
        return by_images, " (16 under 1,000, 64 from 50,000 on, else 32)"
    image, fixed = count_bytes(config, footprint)
    fitting = int((MEMORY_FRACTION * device.memory - fixed) / image) * config.training.accumulate
    useful = max(by_images, images // MIN_STEPS_PER_EPOCH) // replicas
    per_gpu = 1 << max(min(LARGEST_PER_GPU, fitting, useful), 1).bit_length() - 1
    reason = f": {per_gpu} on each of {replicas} GPUs of {device.memory / 2**30:.1f} GiB, which hold about {fitting:,}"
    limits = (
        f"a power of two, at most {LARGEST_PER_GPU}, and {MIN_STEPS_PER_EPOCH} steps per epoch or {by_images} images"
    )
    return per_gpu * replicas, f"{reason} ({limits})"


def find_footprint(backbone: str) -> Footprint | None:
    """Return the footprint of a backbone, whose name may have other capitals and separators; None if it is unknown."""
    normalized = "".join(filter(str.isalnum, backbone)).lower()
    return next((value for name, value in FOOTPRINTS.items() if name.lower() == normalized), None)
