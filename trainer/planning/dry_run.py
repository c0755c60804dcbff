"""The dry run: opens the data, builds the network and plans phases, memory and bytes without training."""

from pathlib import Path

from trainer.cluster.devices import choose_devices, describe_devices
from trainer.config.auto import resolve_auto
from trainer.config.schema import Data, RunConfig
from trainer.data.host import memory_budget_default
from trainer.data.images import plan_image_caches
from trainer.data.open import open_run_dataset, require_validation
from trainer.data.remote import describe_shards, prepared_at, resolve_addresses
from trainer.data.sharding import plan_sharding
from trainer.errors import DataError
from trainer.exporting.formats import check_formats
from trainer.features.plan import divide, plan_features, train_images_read_once
from trainer.models.backbones import find_backbone
from trainer.models.classifier import Classifier, build_classifier
from trainer.planning import checks, estimates, network_plot, sections
from trainer.planning.estimates import PhasePlan
from trainer.planning.sections import FEW, WIDTH, Plan, Rows, size
from trainer.runs.finished_run import without_weights
from trainer.runs.folder import check_fingerprint, inspect_folder
from trainer.storage.staging import is_remote
from trainer.training.losses import class_weights
from trainer.types import Dataset


def show_run(plan: Plan, arguments: list[str], plot: Path | None, summary: bool) -> None:
    """Print all sections, and collect warnings and errors."""
    sections.show_configuration(plan, arguments)
    _show_cluster(plan)
    phases = _show_data_and_network(plan, plot, summary)
    sections.add_warnings(plan, phases)


def _show_cluster(plan: Plan) -> None:
    """Print workers, devices, and each replica's part of a batch.

    Raises:
        ConfigError: the batch cannot be divided or there are too few devices.
    """
    config, cluster, some = plan.config, plan.cluster, plan.cluster.addresses[:FEW]
    kind, plan.replicas = choose_devices(config.runtime, cluster.size)
    text = describe_devices(kind, plan.replicas, cluster, config) if isinstance(config, RunConfig) else f": {kind}"
    with plan.fault():
        check_formats(config.export.formats, config.model.backbone)
    source = f"detected from {cluster.source}; this is number {cluster.index}" if cluster.size > 1 else cluster.source
    rows: Rows = [("workers", f"{cluster.size}, {source}")]
    if some:
        rows.append(("addresses", ", ".join(some) + (f" and {cluster.size - FEW} more" if cluster.size > FEW else "")))
    accumulate = config.training.accumulate
    parts = f", each replica's part in {accumulate} parts" if accumulate > 1 else ""
    rows += [("devices", text.partition(": ")[2]), ("batch", f"{config.training.batch_size} images{parts}")]
    plan.section("cluster", rows)


def find_data(plan: Plan) -> Rows:
    """Open the data if that takes no download; files that would be staged are only listed."""
    config = plan.config
    data, streamed = resolve_addresses(config.data)
    cache, budget = config.runtime.cache_folder, config.runtime.disk_budget
    rows: Rows = []
    if streamed and (prepared := prepared_at(streamed)):
        plan.to_stage = list(prepared.shards.values())
        rows.append(("bucket", f"{streamed}: {describe_shards(prepared, budget)}"))
        with checks.metadata(streamed, prepared.metadata.values()) as folder:
            _open(plan, data.model_copy(update={"root": folder}), streamed=True)
        return rows
    missing, changes = None, {"root": data.root, "pattern": data.pattern}
    for key, address in changes.items():
        if address and is_remote(address):
            changes[key], line, entries = checks.staged(address, cache, budget)
            rows.append(("bucket", line))
            if changes[key] is None:
                missing, plan.to_stage = address, entries
    if missing:
        if data.source != "tfds":
            return [*rows, ("not opened", "no plan downloads data: classes and counts show once it is staged")]
        plan.dataset, plan.labels_known = checks.outline_of_bucket(config, missing), False
        return [*rows, ("not opened", "names and counts are from its metadata; labels show once it is staged")]
    if not _open(plan, data.model_copy(update=changes)):
        return [("not opened", f"{data.name} is not prepared here; the run would download and prepare it")]
    return rows


def _open(plan: Plan, data: Data, streamed: bool = False) -> bool:
    """Open data on this machine, as a run would; False where the run would download it first."""
    config = plan.config

    def note(text: str) -> None:
        if text.startswith("reading"):
            print(text, flush=True)

    try:
        dataset = open_run_dataset(config, data.model_copy(update={"download": False}), note, streamed=streamed)
    except DataError as error:
        if data.download and "is not prepared in" in str(error):
            return False
        raise
    plan.dataset = dataset
    if config.output_dir and not plan.faults:
        _, facts = inspect_folder(config)
        check_fingerprint(config.output_dir, facts, dataset.fingerprint)
    class_weights(config.training.class_weights, dataset.class_names, dataset.splits["train"].labels)
    return True


def _show_data_and_network(plan: Plan, plot: Path | None, summary: bool) -> list[PhasePlan]:
    rows: Rows = []
    before = len(plan.faults)
    with plan.fault():
        rows = find_data(plan)
    problem = f"✗ {plan.faults[-1]}" if len(plan.faults) > before else ""
    dataset = plan.dataset
    if dataset is None:
        if rows:
            plan.section("data", rows)
        sections.show_storage(plan, problem)
        return []
    with plan.fault():
        require_validation(dataset)
    sections.show_data(plan, rows)
    sections.show_storage(plan, problem)
    with plan.fault():  # raised by `conclude`, with all others
        return _show_training(plan, dataset, plot, summary)
    return []


def _show_training(plan: Plan, dataset: Dataset, plot: Path | None, summary: bool) -> list[PhasePlan]:
    """Resolve `auto` as the run would, build the network and print the sections that follow from it."""
    classes = len(dataset.class_names)
    config, reasons = resolve_auto(plan.config, dataset.splits["train"].count, classes)
    if reasons := reasons or plan.reasons:
        plan.section("advice", [("auto", reason) for reason in reasons])
    if config is not plan.config:
        describe_devices("", plan.replicas, plan.cluster, config)  # checks the batch size
        plan.config = config
    kind, workers, batch = find_backbone(config.model.backbone), plan.cluster.size, config.training.batch_size
    pixels = config.model.image_size or kind.default_size
    resident = estimates.resident()
    fetched = config.model.weights == "imagenet" or is_remote(config.model.weights)
    model = without_weights(config.model) if fetched else config.model  # nothing is downloaded
    classifier = build_classifier(model, classes, config.seed)
    budget = max(config.runtime.memory_budget or memory_budget_default(), config.runtime.disk_budget)
    choices = plan_features(config, divide(config, classifier), dataset, budget)
    once = train_images_read_once(config, {name: choice.reads for name, choice in choices.items()})
    caches = plan_image_caches(config, dataset, pixels, train_once=once)
    decoded = "features" if once else caches["train"].where
    sharding = plan_sharding(config.data.shard_by, dataset.splits["train"], workers, batch, decoded, {})
    epoch = sharding.steps_per_epoch
    per_replica = max(batch // (plan.replicas * workers * config.training.accumulate), 1)
    phases = estimates.plan_phases(config, classifier, epoch, per_replica)
    sections.show_phases(plan, config, phases, estimates.parameters(classifier), epoch, sharding.by)
    texts = {"memory": "in memory", "disk": f"in {config.runtime.cache_dir}", "none": "not cached"}
    rows = [(name, choice.describe(name).partition(": ")[2]) for name, choice in choices.items()]
    for name, cache in caches.items():
        why = "; read once, for features" if once and name == "train" else ""
        rows.append(("decoded" if name == "train" else "", f"{name}: {size(cache.bytes)}, {texts[cache.where]}{why}"))
    plan.section("caches", rows)
    teacher = None
    with plan.fault():
        teacher = checks.plan_teacher(config, dataset, per_replica)
    more = [("teacher", teacher.text)] if teacher else []
    more += [("drawing", str(network_plot.draw(classifier, phases, classes, plot)))] if plot else []
    plan.section("model", [*_model_rows(config, classifier, classes), *more])
    if summary:
        classifier.keras_model().summary(line_length=WIDTH, expand_nested=True, show_trainable=True)
    memory = estimates.memory_rows(classifier, phases, caches, plan.replicas, resident)
    sections.show_memory(plan, memory + (teacher.memory_rows(plan.replicas) if teacher else []))
    checkpoint = estimates.bytes_of(classifier.variables.values()) + max(p.optimizer + p.averages for p in phases)
    sections.show_bytes(plan, phases, caches, checkpoint, 4 * estimates.parameters(classifier))
    return phases


def _model_rows(config: RunConfig, classifier: Classifier, classes: int) -> Rows:
    """Backbone, images and head."""
    backbone, head = classifier.backbone, estimates.count(classifier.head_variables.values())
    units = [backbone.output_shape[-1], config.model.hidden, classes]
    widths = " -> ".join(f"{n:,}" for n in units if n)
    body = f"{estimates.parameters(classifier) - head:,} parameters in {len(backbone.layers)} layers"
    return [("backbone", f"{classifier.kind.name}, weights {config.model.weights}, {body}"),
            ("images", f"{classifier.image_size} x {classifier.image_size} pixels, {config.model.resize}"),
            ("head", f"{config.model.pooling} pooling, {widths}, {head:,} parameters")]  # fmt: skip
