"""Warn about settings that are valid but probably unintended. A plan prints these warnings, and a run logs them."""

from collections.abc import Mapping

import numpy as np

from trainer.cluster.devices import detect_device
from trainer.cluster.worker import Worker
from trainer.config.auto import choose_precision
from trainer.config.phases import Phase
from trainer.config.schema import RequestedConfig, RunConfig
from trainer.data.host import count_usable_cpus
from trainer.data.images import ImageStore, plan_image_caches
from trainer.data.sharding import count_steps_per_epoch
from trainer.distillation.teacher import ConfiguredTeacher
from trainer.errors import format_count
from trainer.models.classifier import Classifier
from trainer.planning.estimates import check_worker_memory, estimate_memory, estimate_teacher_memory, plan_phases
from trainer.types import Dataset, Device

MIN_RATE_RATIO = 5  # thawed layers should start with at most the head's learning rate divided by this
ADAPTIVE_OPTIMIZERS = frozenset(
    {"adam", "adamw", "adamax", "nadam", "rmsprop"}
)  # optimizers with comparable learning rates
DOMINANT_FRACTION = 0.6  # a class with a larger fraction of the training examples causes a warning
# Speed of one CPU in images per second, measured with two CPUs at 160 px (docs/performance.md); larger photos take
# longer.
DECODED_IMAGES_PER_SECOND_PER_CPU = 945
AUGMENTED_IMAGES_PER_SECOND_PER_CPU = 2_950  # cached images, with flip, rotation and zoom
# Assumed training speed of one GPU in images per second. An H200 trains ResNet50 at 2,871 and MobileNetV2 at 9,423
# (docs/speed.md).
TRAINED_IMAGES_PER_SECOND_PER_GPU = 4_000


def find_run_warnings(
    images: ImageStore, classifier: Classifier, teacher: ConfiguredTeacher | None, worker: Worker, baseline_bytes: int
) -> list[str]:
    """Return a run's warnings, the same that `trainer.plan` prints; [] on workers other than the chief.

    Args:
        teacher: the configured teacher; None without distillation.
        baseline_bytes: resident bytes of the process before the network was built.

    Raises:
        ConfigError: the run does not fit into the memory of this worker.
    """
    config = images.config
    dataset = images.dataset
    replicas = worker.replicas
    train = dataset.splits["train"]
    read_once = images.train_images_read_once
    replica_batch = max(config.training.batch_size // (worker.size * replicas), 1)
    micro_batch = max(replica_batch // config.training.count_micro_batches(worker.size * replicas), 1)
    steps_per_epoch = count_steps_per_epoch(train, config.training.batch_size)
    caches = plan_image_caches(config, dataset, classifier.image_size, train_images_read_once=read_once)
    phases = plan_phases(config, classifier, steps_per_epoch, micro_batch)
    uses = estimate_memory(
        classifier, phases, caches, num_examples=replica_batch, num_replicas=replicas, baseline_bytes=baseline_bytes
    )
    if teacher:
        network = teacher.network
        uses += estimate_teacher_memory(
            network.variable_bytes if network else 0, network.classifier if network else None,
            every_step=config.augmentation.active, num_examples=micro_batch, num_replicas=replicas,
            num_label_values=train.count * len(dataset.class_names), precision=config.runtime.precision,
        )  # fmt: skip
    memory = check_worker_memory(config, uses, worker.size * replicas)
    if not worker.is_chief:
        return []
    device = find_device_warnings(config, detect_device(), count_usable_cpus(), replicas, caches["train"].where)
    return [*memory, *device, *find_dataset_warnings(config, dataset, steps_per_epoch), *find_settings_warnings(config)]


def find_settings_warnings(config: RequestedConfig) -> list[str]:
    """Return the warnings that follow from the configuration alone.

    Phases are checked only in a `RunConfig`, in which all `auto` values are resolved.
    """
    warnings = []
    phases = config.phases if isinstance(config, RunConfig) else {}
    phase_names = [name for name, phase in phases.items() if phase.batch_norm != "train"]
    if config.model.weights == "none" and not config.warm_start and phase_names:
        warnings.append(
            f"model.weights=none without batch_norm=train in {', '.join(phase_names)}: the statistics of normalization "
            f"stay as initialized, scores stay near chance; set phases.{phase_names[0]}.batch_norm=train and .thaw=all"
        )
    warnings += find_rate_warnings(phases)
    if limits := [f"debug.{key}={value}" for key, value in config.debug if value]:
        warnings.append(f"{', '.join(limits)}: this is a trial run")
    return warnings


def find_rate_warnings(phases: Mapping[str, Phase]) -> list[str]:
    """Return a warning for each phase that begins to train thawed layers at too high a learning rate.

    Large steps destroy what the backbone has learned in pretraining (Howard & Ruder 2018). The limit is a fifth of the
    learning rate in the last earlier phase that trained only the head. There is no warning for a phase with a warm-up,
    which begins with small steps, or with an optimizer whose learning rate cannot be compared with the earlier one's.
    """
    warnings, head_phase = [], ("", 0.0, frozenset[str]())  # last phase with thaw=none: name, rate, optimizers
    for name, phase in phases.items():
        optimizer = phase.optimizer
        if phase.thaw == "none":
            comparable_optimizers = (
                ADAPTIVE_OPTIMIZERS if optimizer.name in ADAPTIVE_OPTIMIZERS else frozenset({optimizer.name})
            )
            head_phase = (name, optimizer.learning_rate, comparable_optimizers)
        elif optimizer.name in head_phase[2] and not phase.schedule.warmup.count:
            rate, limit = optimizer.learning_rate * phase.backbone_rate, head_phase[1] / MIN_RATE_RATIO
            if rate > limit * (1 + 1e-6):
                warnings.append(
                    f"phase {name} trains thawed layers at a learning rate of {rate:g}, more than a fifth of the "
                    f"{head_phase[1]:g} of {head_phase[0]}, which can destroy what they have learned; try "
                    f"phases.{name}.optimizer.learning_rate={limit / phase.backbone_rate:g}, or a schedule.warmup"
                )
    return warnings


def find_dataset_warnings(
    config: RunConfig, dataset: Dataset, steps_per_epoch: int, labels_known: bool = True
) -> list[str]:
    """Return the warnings about class balance, the sizes of the splits, and the interval between checkpoints.

    Args:
        steps_per_epoch: number of steps per epoch.
        labels_known: False if only the metadata of the dataset was read, so that all labels are 0.
    """
    warnings = []
    train = dataset.splits["train"]
    counts = np.bincount(train.labels, minlength=len(dataset.class_names))
    largest = int(counts.argmax())
    if labels_known and counts[largest] > DOMINANT_FRACTION * counts.sum() and len(counts) > 1:
        fraction, name = f"{counts[largest] / counts.sum():.0%}", dataset.class_names[largest]
        warnings.append(f"{fraction} of the training examples are {name}: a constant prediction is right {fraction} of "
                        "the time; try training.class_weights=balanced")  # fmt: skip
    period = config.runtime.checkpoint_every.steps(steps_per_epoch, config.training.batch_size)
    steps = {name: config.count_phase_steps(phase, steps_per_epoch) for name, phase in config.phases.items()}
    if names := ", ".join(name for name, count in steps.items() if period > count):
        warnings.append(f"runtime.checkpoint_every={period:,} steps is longer than {names}: a stop costs up to all of "
                        "it")  # fmt: skip
    if "test" not in dataset.splits and not config.debug.overfit:
        ratio = config.data.test_fraction
        fix = f"data.test_fraction={ratio:g} leaves none, add images" if ratio else "set data.test_fraction"
        warnings.append(f"there is no test split: the score is of the split that chose the checkpoint; {fix}")
    num_validation = dataset.splits["validation"].count if "validation" in dataset.splits else 0
    if 0 < num_validation < 100 and not any("validation has only" in note for note in dataset.notes):
        warnings.append(f"validation has only {num_validation:,} examples: each is {100 / num_validation:.1f} points "
                        "of accuracy")  # fmt: skip
    return warnings


def find_device_warnings(config: RunConfig, device: Device, num_cpus: int, num_gpus: int, cached_in: str) -> list[str]:
    """Return warnings about settings that make training slow on this worker's GPUs; [] on CPUs.

    Args:
        num_cpus: number of CPUs on this worker.
        num_gpus: number of GPUs on this worker.
        cached_in: where the decoded training images are cached: "memory", "disk" or "none".
    """
    if device.kind == "CPU":
        return []
    warnings = []
    precision = config.runtime.precision
    fastest, _ = choose_precision(device)
    # Half precisions that are not the fastest are accepted, except if the GPU lacks tensor cores for bfloat16.
    if precision != fastest and (precision == "float32" or fastest == "float16"):
        warnings.append(
            f"runtime.precision={precision} is slow on {device.name}: its tensor cores compute faster in {fastest}; "
            "set runtime.precision=auto"
        )
    decodes = cached_in == "none"  # images that are not cached are decoded in every epoch
    if not decodes and not config.augmentation.active:
        return warnings  # the CPUs only copy images
    task, per_cpu = "augment", AUGMENTED_IMAGES_PER_SECOND_PER_CPU
    if decodes:
        task, per_cpu = "decode", DECODED_IMAGES_PER_SECOND_PER_CPU
    required_rate = num_gpus * TRAINED_IMAGES_PER_SECOND_PER_GPU  # images per second
    if num_cpus * per_cpu < required_rate:
        min_cpus = -(-required_rate // per_cpu)  # rounded up
        fix = f"request {format_count(min_cpus, 'CPU')}"
        if decodes:
            fix += ", or raise runtime.memory_budget_gb"
        warnings.append(
            f"{format_count(num_cpus, 'CPU')} can {task} about {num_cpus * per_cpu:,} small images per second, and "
            f"{format_count(num_gpus, 'GPU')} may train on {required_rate:,}: {fix} (docs/speed.md)"
        )
    return warnings
