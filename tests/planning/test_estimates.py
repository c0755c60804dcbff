"""Memory estimates: what is counted, what is rejected, and the advice."""

import gc
import weakref
from pathlib import Path

import pytest
import tensorflow as tf

from tests.config.test_schema import tree
from tests.errors import raises
from tests.test_plan import leave_teacher
from trainer.cli.compose import compose
from trainer.cluster.control import ControlChannel
from trainer.cluster.discovery import Cluster
from trainer.cluster.signals import StopFlag
from trainer.cluster.worker import Worker
from trainer.config.schema import RunConfig, validate_config, validate_resolved_config
from trainer.data.images import ImageStore
from trainer.data.open import stage_and_open_run_dataset
from trainer.data.sharding import UNSHARDED
from trainer.distillation.teacher import load_teacher, open_teacher
from trainer.errors import ConfigError
from trainer.models.classifier import Classifier, build_classifier
from trainer.planning import estimates
from trainer.planning.estimates import ACTIVATIONS, DECODED, check_device_memory
from trainer.planning.warnings import find_run_warnings

GB = 10**9


@pytest.mark.parametrize(
    ("decoded", "activations", "cache", "key", "value", "fix"),
    [
        (14 * GB, GB, "memory", "data.cache", "memory", "use auto or disk: decoded images in memory are 14.00 GB"),
        (14 * GB, GB, "auto", "data.cache", "auto", "use disk"),
        (3 * GB, 12 * GB, "auto", "training.batch_size", 32, "use 10 or less"),
        (3 * GB, 12 * GB, "memory", "training.batch_size", 32, "use 10 or less"),
        (0, 12 * GB, "auto", "training.batch_size", 32, "use 18 or less"),
    ],
)
def test_the_advice_is_about_what_does_not_fit(
    decoded: int, activations: int, cache: str, key: str, value: object, fix: str
) -> None:
    config = validate_resolved_config(tree(data={"source": "digits", "cache": cache}))
    uses = [("variables", GB), (ACTIVATIONS, activations), (DECODED, decoded)]
    with raises(ConfigError, key=key, value=value, problem="needs about .* has 8.00 GB", fix=fix):
        check_device_memory(config, uses, 8 * GB, 1)


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return leave_teacher(tmp_path_factory.mktemp("runs") / "teacher")


def open_student(folder: Path, teacher: Path, *overrides: str) -> ImageStore:
    """Open the digits for a student, with a cache below `folder`."""
    config = validate_config(compose([
        "data=digits", "model=glyphs_mobilenet_v2", "model.image_size=32", "debug.max_examples=60",
        f"distillation.teacher={teacher}", f"runtime.cache_dir={folder / 'cache'}", *overrides,
    ]) or {})  # fmt: skip
    assert isinstance(config, RunConfig)
    return ImageStore(stage_and_open_run_dataset(config, print, lambda _: None), config, 32, lambda _: None)


def get_rejection(images: ImageStore, classifier: Classifier, worker: Worker, with_teacher: bool) -> str:
    """Return the message of a run that does not fit into this machine's memory."""
    teacher = load_teacher(worker, images, "x", None) if with_teacher else None
    with pytest.raises(ConfigError) as rejected:
        find_run_warnings(images, classifier, teacher, worker, 0)
    return str(rejected.value)


@pytest.fixture
def worker() -> Worker:
    return Worker(ControlChannel(Cluster(0, (), "alone", ""), {}), tf.distribute.get_strategy(), StopFlag())


def parse_needed_bytes(message: str) -> float:
    return float(message.partition("about ")[2].split()[0])


def test_a_teacher_counts_while_it_predicts_in_every_step(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, worker: Worker
) -> None:
    monkeypatch.setattr(estimates, "get_memory_limit_bytes", lambda: 100_000_000)
    live = open_student(tmp_path, teacher_folder, "augmentation=light")
    classifier = build_classifier(live.config.model, 10, 1)
    alone, taught = (
        parse_needed_bytes(get_rejection(live, classifier, worker, with_teacher)) for with_teacher in (False, True)
    )
    assert 8 < taught - alone < 11  # MB: variables 1.7 and activations 7.4
    before = open_student(tmp_path, teacher_folder, "augmentation=none")
    alone, taught = (
        parse_needed_bytes(get_rejection(before, classifier, worker, with_teacher)) for with_teacher in (False, True)
    )
    assert taught - alone < 0.2  # its logits


def test_images_that_are_read_once_do_not_count(
    tmp_path: Path, teacher_folder: Path, monkeypatch: pytest.MonkeyPatch, worker: Worker
) -> None:
    monkeypatch.setattr(estimates, "get_memory_limit_bytes", lambda: 50_000_000)
    images = open_student(tmp_path, teacher_folder, "augmentation=none", "debug.max_examples=1000")
    classifier = build_classifier(images.config.model, 10, 1)
    again = parse_needed_bytes(get_rejection(images, classifier, worker, with_teacher=False))
    images.train_images_read_once = True
    once = parse_needed_bytes(get_rejection(images, classifier, worker, with_teacher=False))
    assert again - once == pytest.approx(1001 * 32 * 32 * 3 / 1e6, abs=1)


def test_the_network_of_a_teacher_is_released_once_its_logits_are_computed(
    tmp_path: Path, teacher_folder: Path, worker: Worker
) -> None:
    images = open_student(tmp_path, teacher_folder, "augmentation=none")
    configured = load_teacher(worker, images, "x", None)
    assert configured.network
    assert configured.network.classifier
    backbone = weakref.ref(configured.network.classifier.backbone)
    opened = open_teacher(worker, images, UNSHARDED, configured)
    gc.collect()
    assert opened.soft_labels is not None
    assert backbone() is None
