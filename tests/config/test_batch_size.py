"""`training.batch_size=auto`: by the images, and by the memory of a GPU."""

import json
from functools import cache
from typing import Any

import pytest

from trainer.cli.compose import compose
from trainer.config.auto import resolve_auto
from trainer.config.batch_size import FOOTPRINTS, GPU_RESERVE, MEMORY_FRACTION, estimate_gpu_bytes, find_footprint
from trainer.config.schema import RunConfig, validate_config, validate_resolved_config
from trainer.models.backbones import get_backbones
from trainer.types import CPU, Device

H100, L4, T4 = (
    Device("GPU", name, capability, gib * 2**30)
    for name, capability, gib in [("NVIDIA H100", (9, 0), 80), ("NVIDIA L4", (8, 9), 22), ("Tesla T4", (7, 5), 15)]
)
FINE_TUNED = ("data=digits", "phases=end_to_end", "training.batch_size=auto", "runtime=gpu")


@cache
def composed(*arguments: str) -> dict[str, Any]:
    return compose([*FINE_TUNED, *arguments]) or {}


def resolve(*arguments: str, images: int = 100_000, device: Device = H100, replicas: int = 1) -> tuple[RunConfig, str]:
    """Return the configuration, and the reason for the batch size."""
    requested = validate_config(composed(*arguments))
    config, reasons = resolve_auto(requested, images, 10, device, num_replicas=replicas)
    return config, next(reason for reason in reasons if reason.startswith("training.batch_size=auto"))


@pytest.mark.parametrize(
    ("arguments", "facts", "batch"),
    [
        (("model=mobilenet_v2",), {}, 256),
        (("model=mobilenet_v2",), {"device": T4}, 256),
        (("model=efficientnet_b7",), {}, 32),
        (("model=efficientnet_b7",), {"device": L4}, 8),
        (("model=efficientnet_b7",), {"device": T4}, 4),
        (("model=efficientnet_b7", "runtime.precision=float32"), {}, 16),
        (("model=efficientnet_b7", "model.image_size=300"), {}, 128),
        (("model=efficientnet_b7", "phases.all.batch_norm=train"), {}, 16),
        (("model=efficientnet_b7", "phases=head_only"), {}, 256),
        (("model=efficientnet_b7", "training.accumulate=4"), {"device": T4}, 16),
        (("model=resnet50",), {"device": L4}, 256),
        # Enough steps in an epoch, or the rule for CPUs.
        (("model=mobilenet_v2",), {"images": 480}, 16),
        (("model=mobilenet_v2",), {"images": 2_000}, 64),
        (("model=mobilenet_v2",), {"images": 5_119}, 128),
        (("model=mobilenet_v2",), {"images": 5_120}, 256),
        # Several GPUs.
        (("model=mobilenet_v2",), {"replicas": 3}, 768),
        (("model=mobilenet_v2",), {"replicas": 8, "images": 480}, 16),
        (("model=efficientnet_b7",), {"replicas": 2, "device": T4}, 8),
        # Without the memory, and on CPUs, the images alone.
        (("model=mobilenet_v2",), {"device": Device("GPU", "unknown", (9, 0))}, 64),
        (("model=mobilenet_v2",), {"device": CPU}, 64),
        (("model=mobilenet_v2",), {"device": CPU, "images": 20_000}, 32),
    ],
)
def test_the_batch_is_what_memory_and_images_allow(
    arguments: tuple[str, ...], facts: dict[str, Any], batch: int
) -> None:
    assert resolve(*arguments, **facts)[0].training.batch_size == batch


def test_the_reason_has_the_memory_the_images_that_fit_and_the_bounds() -> None:
    reason = resolve("model=efficientnet_b7", device=L4)[1]
    assert reason.startswith(
        "training.batch_size=auto: 8, for 100,000 training images: 8 on each of 1 GPUs of 22.0 GiB"
    )
    assert "which hold about 10 (a power of two, at most 256, and 20 steps per epoch or 64 images)" in reason


@pytest.mark.parametrize("name", ["EfficientNetB7", "MobileNetV2", "VGG16"])
def test_twice_the_chosen_batch_would_not_fit_or_exceeds_the_limit(name: str) -> None:
    config, _ = resolve(f"model.backbone={name}", "model.image_size=600", device=L4)
    footprint = find_footprint(name)
    assert footprint
    image, fixed = estimate_gpu_bytes(config, footprint)
    limit, batch = MEMORY_FRACTION * L4.memory, config.training.batch_size  # type: ignore[operator]
    assert fixed > GPU_RESERVE
    assert batch * image + fixed <= limit
    assert batch == 256 or 2 * batch * image + fixed > limit


def test_mixed_pairs_on_each_gpu_need_an_even_batch() -> None:
    config, _ = resolve(
        "model=efficientnet_b7", "augmentation.mixup=0.2", "training.accumulate=3", device=T4, replicas=2
    )
    assert config.training.batch_size % (2 * 3) == config.training.batch_size // 2 % 2 == 0


def test_a_resumed_run_keeps_its_batch_on_another_gpu() -> None:
    began, _ = resolve("model=efficientnet_b7", device=L4)
    stored = validate_resolved_config(json.loads(json.dumps(began.model_dump(mode="json"))))
    requested = validate_config(composed("model=efficientnet_b7"))
    config, reasons = resolve_auto(requested, 100_000, 10, H100, stored_config=stored, num_replicas=4)
    assert config.training.batch_size == 8
    assert "training.batch_size=auto: 8, as this run began" in reasons


def test_every_backbone_has_its_footprint() -> None:
    assert {name: footprint.side for name, footprint in FOOTPRINTS.items()} == {
        spec.name: spec.default_size for spec in get_backbones().values()
    }
    assert find_footprint("efficientnet-b7") is FOOTPRINTS["EfficientNetB7"]
    assert find_footprint("of my own") is None
