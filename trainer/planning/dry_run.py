"""Dry run (`trainer.plan`): open the dataset, build the network, and plan phases, memory and bytes without training."""

from contextlib import suppress
from pathlib import Path

from rich.text import Text

from trainer.cluster.devices import check_batch_size, choose_devices, describe_devices, detect_device
from trainer.config.auto import limit_batch_size, resolve_auto
from trainer.config.distillation import prefix_teacher_key
from trainer.config.schema import Data, RunConfig, derive_teacher_config
from trainer.data.corrections import describe_corrections, read_corrections
from trainer.data.csv_source import plan_copies
from trainer.data.host import count_usable_cpus, get_default_memory_budget
from trainer.data.images import plan_image_caches
from trainer.data.open import open_run_dataset, require_validation
from trainer.data.remote import describe_shards, find_prepared_files, resolve_addresses, show_addresses_in_errors
from trainer.data.sharding import plan_sharding
from trainer.data.tfds import check_download
from trainer.distillation.own_teacher import must_train, rename_teacher_keys
from trainer.errors import ConfigError, DataError
from trainer.exporting.formats import check_formats
from trainer.features.plan import EngineChoice, divide_phases, plan_engines, plan_features, reads_images_only_once
from trainer.models.backbones import find_backbone
from trainer.models.classifier import Classifier, build_classifier, count_parameters, count_variable_bytes
from trainer.monitoring.console import get_width
from trainer.planning import checks, estimates, network_plot, sections
from trainer.planning.computation import plan_computations
from trainer.planning.gpu_memory import describe_gpu_memory
from trainer.planning.layers import PIPE_WIDTH, format_layers
from trainer.planning.sections import Plan, Rows, format_names
from trainer.planning.timing import estimate_time, has_gpus
from trainer.planning.warnings import find_dataset_warnings, find_device_warnings, find_settings_warnings
from trainer.runs.folder import check_same_data, describe_versions, inspect_folder
from trainer.runs.initial_weights import check_same_weights
from trainer.runs.stored_run import disable_pretrained_weights
from trainer.storage.disk import choose_disk_budget, format_bytes
from trainer.storage.staging import get_staged_and_source_folder, is_remote, select_missing
from trainer.training.losses import compute_class_weights
from trainer.types import Dataset


def show_run(plan: Plan, arguments: list[str], plot: Path | None, lists_layers: bool) -> None:
    """Print all sections of the plan, and collect its warnings and errors.

    If the run would first train its teacher, the plan of the teacher's run is printed first.

    Args:
        arguments: the run's command-line arguments, such as "data=digits".
        plot: PNG file to which the network is drawn; None to draw nothing.
        lists_layers: whether to list the layers of the network.
    """
    teacher = _show_teacher(plan, arguments, lists_layers)
    sections.show_configuration(plan, arguments)
    _show_cluster(plan)
    _show_data_and_network(plan, plot, lists_layers)
    plan.warnings += find_settings_warnings(plan.config)
    if teacher:
        plan.warnings += [f"teacher: {warning}" for warning in teacher.warnings if warning not in plan.warnings]


def _show_teacher(plan: Plan, arguments: list[str], lists_layers: bool) -> Plan | None:
    """Print the plan of the run that trains the teacher, and return it; None if the teacher need not be trained."""
    config = plan.config
    is_needed = False
    teacher = derive_teacher_config(config)
    if teacher:
        with suppress(ConfigError):  # `show_configuration` reports errors in output_dir
            is_needed = config.output_dir is None or must_train(config, teacher)
    if not teacher or not is_needed:
        return None
    teacher_plan = Plan(teacher, plan.cluster)
    plan.print(Text("the teacher, trained first", style="bold reverse"))
    with rename_teacher_keys():
        show_run(teacher_plan, arguments, plot=None, lists_layers=lists_layers)
    plan.errors += [prefix_teacher_key(error) for error in teacher_plan.errors]
    plan.untrained_teacher = teacher_plan.config
    plan.print(Text("\nthe student, trained after it", style="bold reverse"))
    return teacher_plan


def _show_cluster(plan: Plan) -> None:
    """Print the workers, their devices and the batch size. Check that the export formats can be written."""
    config, cluster = plan.config, plan.cluster
    device, plan.replicas = detect_device(), choose_devices(config.runtime, cluster.size)[1]
    devices = f": {device.describe(plan.replicas)}"
    if isinstance(config, RunConfig):
        devices = describe_devices(device, plan.replicas, cluster, config)
    with plan.collect_errors():
        check_formats(config.export.formats, config.model.backbone)
    origin = f"detected from {cluster.source}; this is worker {cluster.index}" if cluster.size > 1 else cluster.source
    rows: Rows = [("workers", f"{cluster.size}, {origin}")]
    if cluster.addresses:
        rows.append(("addresses", format_names(cluster.addresses)))
    accumulate = config.training.accumulate
    micro_batches = f", in {accumulate} micro-batches per replica" if accumulate > 1 else ""
    rows += [("devices", devices.partition(": ")[2]), ("batch", f"{config.training.batch_size} images{micro_batches}")]
    plan.print_section("cluster", rows)


_NOT_STAGED = ("not opened", "a plan downloads no data: classes and counts are known once it is staged")


def _open_data(plan: Plan) -> Rows:
    """Open the dataset if its files are on this machine, and return rows for the section `data`.

    Otherwise set `plan.to_stage` to the files that a run would fetch first. Of a TFDS folder in a bucket, the metadata
    is downloaded to a temporary folder, so that class names and counts are known.
    """
    config = plan.config
    data, streamed_folder = resolve_addresses(config.data)
    cache = config.runtime.cache_folder
    budget, reason = choose_disk_budget(config.runtime.disk_budget, cache)
    rows: Rows = [("disk budget", f"{budget / 1e9:,.1f} GB per cache, {reason}")]
    corrections: Rows = []
    if data.corrections:
        summary = describe_corrections(read_corrections(data.corrections))
        corrections = [("corrections", f"{data.corrections} lists: {summary}; applied once the data is staged")]
    if streamed_folder and (prepared := find_prepared_files(streamed_folder)):
        plan.to_stage = list(prepared.shards.values())
        rows.append(("bucket", f"{streamed_folder}: {describe_shards(prepared, budget)}"))
        with (
            checks.download_to_temporary_folder(streamed_folder, prepared.metadata.values()) as folder,
            show_addresses_in_errors({folder: streamed_folder}),
        ):
            _open(plan, data.model_copy(update={"root": folder}), streamed=True)
        return rows
    unstaged_address, addresses = None, dict[str, str]()  # address of the files to fetch; local folder -> bucket folder
    if data.source == "csv":
        data, copies = plan_copies(data, cache, budget)
        addresses = {str(copy.folder): copy.bucket for copy in copies}
        for copy in copies:
            if missing := select_missing(copy.folder, copy.objects):
                size = sum(info.size for info in missing.values())
                rows.append(("bucket", f"{copy.bucket}: would fetch {len(missing):,} files, {size / 1e6:,.1f} MB"))
                plan.to_stage += copy.objects.values()
        if plan.to_stage:
            return [*rows, *corrections, _NOT_STAGED]
    local_paths = {"root": data.root, "pattern": data.pattern}
    for key, address in local_paths.items():
        if address and is_remote(address):
            local_paths[key], line, files = checks.plan_staging(address, cache, budget)
            rows.append(("bucket", line))
            if path := local_paths[key]:
                addresses |= [get_staged_and_source_folder(path, address, cache)]
            else:
                unstaged_address, plan.to_stage = address, files
    if unstaged_address:
        if data.source != "tfds":
            return [*rows, *corrections, _NOT_STAGED]
        plan.dataset, plan.labels_known = checks.build_dataset_from_metadata(config, unstaged_address), False
        rows += corrections
        return [*rows, ("not opened", "names and counts are from its metadata; labels are known once it is staged")]
    with show_addresses_in_errors(addresses):
        is_open = _open(plan, data.model_copy(update=local_paths))
    if not is_open:
        with plan.collect_errors():
            check_download(data)
        return [*rows, ("not opened", f"{data.name} is not prepared here; the run would download and prepare it")]
    return rows


def _open(plan: Plan, data: Data, streamed: bool = False) -> bool:
    """Open the dataset as a run does, and check it. Return False if a run would first download it with TFDS.

    Args:
        data: the data settings, with local paths.
        streamed: whether the files of `data` are only the metadata of shards in a bucket.
    """
    config = plan.config

    def log_message(text: str) -> None:
        if text.startswith("reading"):  # reading may take long; the sections of the plan contain the other messages
            print(text, flush=True)

    try:
        dataset = open_run_dataset(config, data.model_copy(update={"download": False}), log_message, streamed=streamed)
    except DataError as error:
        if data.download and "is not prepared in" in str(error):
            return False
        raise
    plan.dataset = dataset
    if config.output_dir and not plan.errors:
        _, run_json = inspect_folder(config)
        check_same_data(config.output_dir, run_json, dataset)
        check_same_weights(config.output_dir, run_json.get("initial_weights", {}), config)
        plan.warnings += filter(None, [describe_versions(run_json)])
    # Only for its errors.
    compute_class_weights(config.training.class_weights, dataset.class_names, dataset.splits["train"].labels)
    return True


def _show_data_and_network(plan: Plan, plot: Path | None, lists_layers: bool) -> None:
    """Print the sections about data and storage, and the sections about the network if the dataset can be opened."""
    rows: Rows = []
    num_errors = len(plan.errors)
    with plan.collect_errors():
        rows = _open_data(plan)
    problem = f"✗ {plan.errors[-1]}" if len(plan.errors) > num_errors else ""
    if plan.dataset:
        with plan.collect_errors():
            require_validation(plan.dataset, plan.config.data.validation_fraction)
        sections.show_data(plan, plan.dataset, rows)
    elif rows:
        plan.print_section("data", rows)
    sections.show_storage(plan, problem)
    with plan.collect_errors():
        if plan.dataset:
            _show_training(plan, plan.dataset, plot, lists_layers)
        elif isinstance(config := plan.config, RunConfig):
            check_batch_size(config, plan.replicas * plan.cluster.size)


def _show_training(plan: Plan, dataset: Dataset, plot: Path | None, lists_layers: bool) -> None:
    """Resolve `auto` values as a run does, build the network, and print the sections about the network and training."""
    num_classes = len(dataset.class_names)
    device, replicas = detect_device(), plan.replicas * plan.cluster.size
    num_train = dataset.splits["train"].count
    config, reasons = resolve_auto(plan.config, num_train, num_classes, device, num_replicas=replicas)
    if reasons := reasons or plan.reasons:
        plan.print_section("advice", [("auto", reason) for reason in reasons])
    config, limit_warning = limit_batch_size(config, num_train, replicas)
    if limit_warning:
        plan.warnings.append(limit_warning)
    check_batch_size(config, replicas)
    is_auto_backbone = plan.config.model.backbone == "auto"
    plan.config = config
    weights_rows = sections.show_weights(plan) if is_auto_backbone else []  # otherwise `show_storage` has printed them
    backbone = find_backbone(config.model.backbone)
    workers = plan.cluster.size
    batch_size = config.training.batch_size
    image_size = config.model.image_size or backbone.default_size
    baseline_bytes = estimates.measure_resident_bytes()
    skips_weights = plan.resuming or config.model.weights == "imagenet" or is_remote(config.model.weights)
    model = disable_pretrained_weights(config.model) if skips_weights else config.model  # a plan downloads no weights
    classifier = build_classifier(model, num_classes, config.seed)
    disk_budget, _ = choose_disk_budget(config.runtime.disk_budget, config.runtime.cache_folder)
    budget = max(config.runtime.memory_budget or get_default_memory_budget(), disk_budget)
    divisions = divide_phases(config, classifier)
    choices = plan_features(config, divisions, dataset, budget)
    input_kinds = {name: choice.input_kind for name, choice in choices.items()}
    read_once = reads_images_only_once(config, input_kinds)
    caches = plan_image_caches(config, dataset, image_size, train_images_read_once=read_once)
    image_cache = "features" if read_once else caches["train"].where
    sharding = plan_sharding(
        config.data.shard_by, dataset.splits["train"], workers, batch_size, image_cache, checkpoint={},
        virtual_replicas=config.training.virtual_replicas,
    )  # fmt: skip
    steps_per_epoch = sharding.steps_per_epoch
    replica_batch = max(batch_size // replicas, 1)  # a replica's examples of a global batch
    micro_batch = max(replica_batch // config.training.count_micro_batches(replicas), 1)  # examples per forward pass
    phases = estimates.plan_phases(config, classifier, steps_per_epoch, micro_batch)
    sections.show_phases(
        plan, config, phases, estimates.count_model_parameters(classifier), steps_per_epoch, sharding.mode
    )
    computations = {}
    with plan.collect_errors():
        computations = plan_computations(config, device, replicas, classifier, dataset, divisions)
    compiled = {name: computations[name].xla if name in computations else False for name in config.phases}
    engines: dict[str, EngineChoice] = {}
    with plan.collect_errors():
        engines = plan_engines(config, device, dataset, image_size, divisions, compiled, input_kinds)
    computation_rows = []
    for name, computation in computations.items():
        computation_rows.append((name, computation.describe(name, config).partition(": ")[2]))
        if name in engines and engines[name].engine == "litert":
            computation_rows.append(("", f"frozen layers: {engines[name].describe(name).partition(': ')[2]}"))
    plan.print_section("computation", computation_rows)
    cache_texts = {"memory": "in memory", "disk": f"in {config.runtime.cache_dir}", "none": "not cached"}
    rows = [(name, choice.describe(name).partition(": ")[2]) for name, choice in choices.items()]
    for name, cache in caches.items():
        reason = "; read once, for features" if read_once and name == "train" else ""
        text = f"{name}: {format_bytes(cache.bytes)}, {cache_texts[cache.where]}{reason}"
        rows.append(("decoded" if name == "train" else "", text))
    plan.print_section("caches", rows)
    memory = estimates.estimate_memory(
        classifier, phases, caches, num_examples=replica_batch, num_replicas=plan.replicas,
        baseline_bytes=baseline_bytes,
    )  # fmt: skip
    plan.warnings += find_device_warnings(config, device, count_usable_cpus(), plan.replicas, caches["train"].where)
    model_rows = [*_describe_model(config, classifier, num_classes), *weights_rows]
    with plan.collect_errors():
        if not plan.resuming:
            plan.warnings += filter(None, [checks.match_local_warm_start(config, classifier)])
    with plan.collect_errors():
        if config.distillation:
            text, uses = checks.check_and_estimate_teacher(
                config, config.distillation, dataset, micro_batch_size=micro_batch, num_replicas=plan.replicas,
                untrained_model=plan.untrained_teacher.model if plan.untrained_teacher else None,
            )  # fmt: skip
            model_rows.append(("teacher", text))
            memory += uses
    if plot:
        model_rows.append(("drawing", str(network_plot.draw_network(classifier, phases, num_classes, plot))))
    plan.print_section("model", model_rows)
    if lists_layers:
        plan.print(Text("\nlayers", style="bold"))
        print("\n".join(format_layers(classifier, phases, get_width(PIPE_WIDTH))), flush=True)
    sections.show_memory(plan, memory)
    variable_bytes = count_variable_bytes(classifier.variables.values())
    num_image_values = replica_batch * classifier.image_size**2 * 3
    if rows := describe_gpu_memory(device, phases, variable_bytes, num_image_values):
        plan.print_section("GPU memory (estimate, per GPU)", rows)
    with plan.collect_errors():
        plan.warnings += estimates.check_worker_memory(config, memory, replicas)
    plan.warnings += find_dataset_warnings(config, dataset, steps_per_epoch, plan.labels_known)
    if not plan.errors and not any(value for _, value in config.debug):  # a trial run needs no estimate of its time
        inputs = {name: (choice, divisions[name]) for name, choice in choices.items()}
        libraries = {name: choice.engine for name, choice in engines.items()}
        seconds = estimate_time(config, classifier, dataset, inputs, libraries, compiled, steps_per_epoch)
        sections.show_time(plan, seconds, workers * (plan.replicas if has_gpus() else 1))
    max_training_bytes = max(phase.optimizer_bytes + phase.ema_bytes for phase in phases)
    checkpoint_bytes = count_variable_bytes(classifier.variables.values()) + max_training_bytes
    sections.show_bytes(plan, phases, caches, checkpoint_bytes, 4 * estimates.count_model_parameters(classifier))


def _describe_model(config: RunConfig, classifier: Classifier, num_classes: int) -> Rows:
    """Return rows about the backbone, the image size and the head."""
    backbone = classifier.backbone
    head_size = count_parameters(classifier.head_variables.values())
    widths = " -> ".join(f"{n:,}" for n in (backbone.output_shape[-1], *config.model.hidden_units, num_classes))
    norm = " with batch normalization" if classifier.head_normalizations else ""
    size = f"{estimates.count_model_parameters(classifier) - head_size:,} parameters in {len(backbone.layers)} layers"
    return [("backbone", f"{classifier.spec.name}, weights {config.model.weights}, {size}"),
            ("images", f"{classifier.image_size} x {classifier.image_size} pixels, {config.model.resize}"),
            ("head", f"{config.model.pooling} pooling, {widths}{norm}, {head_size:,} parameters")]  # fmt: skip
