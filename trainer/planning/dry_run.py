"""The dry run: opens the data, builds the network and plans phases, memory and bytes without training."""

from pathlib import Path

from trainer.config.auto import advise
from trainer.config.schema import Data, RunConfig
from trainer.data.host import memory_budget_default
from trainer.data.images import plan_image_caches
from trainer.data.open import open_run_dataset, require_validation
from trainer.data.remote import describe_shards, prepared_at, resolve_addresses
from trainer.data.sharding import plan_sharding
from trainer.errors import DataError
from trainer.features.plan import divide, plan_features, train_images_read_once
from trainer.models.backbones import find_backbone
from trainer.models.classifier import build_classifier
from trainer.planning import checks, estimates, network_plot
from trainer.planning.estimates import PhasePlan
from trainer.planning.sections import WIDTH, Plan, Rows, show_bytes, show_data, show_memory, show_phases, show_storage
from trainer.runs.finished_run import without_weights
from trainer.runs.folder import check_fingerprint, inspect_folder
from trainer.storage.staging import is_remote
from trainer.training.losses import class_weights
from trainer.types import Dataset


def find_data(plan: Plan) -> Rows:
    """Open the data where that takes no download; files that would be staged are only listed."""
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


def resolve_auto(plan: Plan, dataset: Dataset) -> RunConfig:
    """The configuration with `auto` values resolved as the run would resolve them."""
    if plan.config.auto:
        plan.config, plan.reasons = advise(plan.config, dataset.splits["train"].count, len(dataset.class_names))
        checks.devices(plan.config, plan.cluster)  # another batch may be one that cannot be shared
    if plan.reasons:
        plan.section("advice", [("auto", reason) for reason in plan.reasons])
    return plan.config


def show_network(plan: Plan, replicas: int, plot: Path | None, summary: bool) -> list[PhasePlan]:
    """Data, storage, phases, network, memory and bytes: the sections that need data or network."""
    rows: Rows = []
    before = len(plan.faults)
    with plan.fault():
        rows = find_data(plan)
    problem = f"✗ {plan.faults[-1]}" if len(plan.faults) > before else ""
    dataset = plan.dataset
    if dataset is None:
        if rows:
            plan.section("data", rows)
        show_storage(plan, problem)
        return []
    with plan.fault():
        require_validation(dataset)
    config = resolve_auto(plan, dataset)
    classes, workers = len(dataset.class_names), plan.cluster.size
    kind = find_backbone(config.model.backbone)
    pixels = config.model.image_size or kind.default_size
    caches = plan_image_caches(config, dataset, pixels, train_once=False)
    show_data(plan, rows, caches)
    show_storage(plan, problem)
    resident = estimates.resident()
    fetched = config.model.weights == "imagenet" or is_remote(config.model.weights)
    model = without_weights(config.model) if fetched else config.model  # nothing is downloaded
    classifier = build_classifier(model, classes, config.seed)
    budget = max(config.runtime.memory_budget or memory_budget_default(), config.runtime.disk_budget)
    choices = plan_features(config, divide(config, classifier), dataset, budget)
    features = [(name, choice.describe(name).partition(": ")[2]) for name, choice in choices.items()]
    reads = {name: choice.reads for name, choice in choices.items()}
    once = train_images_read_once(config, reads)
    if once and config.data.cache == "auto":
        features.append(("", "the training images are read once, and not kept"))
    caches = plan_image_caches(config, dataset, pixels, train_once=once)
    images_kept, batch = "features" if once else caches["train"].where, config.training.batch_size
    sharding = plan_sharding(config.data.shard_by, dataset.splits["train"], workers, batch, images_kept, {})
    epoch = sharding.steps_per_epoch
    per_replica = max(batch // (replicas * workers * config.training.accumulate), 1)
    phases = estimates.plan_phases(config, classifier, epoch, per_replica)
    show_phases(plan, phases, estimates.parameters(classifier), epoch, sharding.by)
    plan.section("features", features)
    units = [classifier.backbone.output_shape[-1], config.model.hidden, classes]
    widths = " -> ".join(f"{n:,}" for n in units if n)
    teacher = None
    with plan.fault():
        teacher = checks.plan_teacher(config, dataset, per_replica)
    taught = [("teacher", teacher.words)] if teacher else []
    drawn = [("drawing", str(network_plot.draw(classifier, phases, classes, plot)))] if plot else []
    head = estimates.count(classifier.head_variables.values())
    plan.section("model", [
        ("backbone", f"{kind.name}, weights {config.model.weights}, "
                     f"{estimates.parameters(classifier) - head:,} parameters "
                     f"in {len(classifier.backbone.layers)} layers"),
        ("images", f"{pixels} x {pixels} pixels, {config.model.resize}"),
        ("head", f"{config.model.pooling} pooling, {widths}, {head:,} parameters"), *taught, *drawn])  # fmt: skip
    if summary:
        classifier.keras_model().summary(line_length=WIDTH, expand_nested=True, show_trainable=True)
    memory = estimates.memory_rows(classifier, phases, caches, replicas, resident)
    show_memory(plan, memory + (teacher.memory_rows(replicas) if teacher else []))
    checkpoint = estimates.bytes_of(classifier.variables.values()) + max(p.optimizer + p.averages for p in phases)
    show_bytes(plan, phases, caches, checkpoint, 4 * estimates.parameters(classifier))
    return phases
