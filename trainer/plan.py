"""`python -m trainer.plan <what a run would be given> [--plot=FILE.png] [--summary]`:
what that run would do, without doing it.

Exit code 0, or what the run would end with at its start, with the same message. Nothing is written to output_dir but a
probe that is deleted again. `--plot=FILE.png` draws the network, `--summary` prints its layers.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from trainer.cluster.signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # what is imported below takes seconds

import numpy as np
from rich.console import Console

from trainer.cli.arguments import read_arguments
from trainer.cli.compose import asks_for_sweep, compose
from trainer.cli.process import exit_with_code, quiet_start
from trainer.cluster.discovery import discover
from trainer.config.auto import advise
from trainer.config.schema import Data, RunConfig, load, without_regularisation
from trainer.errors import ConfigError, DataError
from trainer.planning.sections import (
    WIDTH,
    Plan,
    Rows,
    show_bytes,
    show_cluster,
    show_configuration,
    show_data,
    show_memory,
    show_phases,
    show_storage,
)
from trainer.storage.base import within
from trainer.storage.staging import is_remote, prepared_folder
from trainer.types import Dataset

if TYPE_CHECKING:
    from trainer.planning.estimates import PhasePlan

PATIENCE = 30.0  # seconds for each request to a bucket; a run waits longer


def find_data(plan: Plan) -> Rows:
    """Open the data where that takes no download; what would be staged is only listed."""
    from trainer.data.remote import coming, prepared_at
    from trainer.planning import checks as rehearsal
    from trainer.run import GIGABYTE

    config, data = plan.config, plan.config.data
    cache = Path(config.runtime.cache_dir).expanduser()
    changes: dict[str, Any] = {"root": data.root, "pattern": data.pattern}
    if is_remote(data.data_dir) and data.name:
        changes |= {"root": prepared_folder(str(data.data_dir), data.name), "data_dir": None}
    rows: Rows = []
    missing = None
    budget = int(config.runtime.disk_budget_gb * GIGABYTE)
    ahead = data.source == "tfds" and is_remote(changes["root"]) and not data.group_field
    if ahead and (prepared := prepared_at(changes["root"])):
        plan.to_stage = list(prepared.shards.values())
        rows.append(("bucket", f"{changes['root']}: {coming(prepared, budget)}"))
        with rehearsal.metadata(prepared, changes["root"]) as folder:
            _open(plan, data.model_copy(update={**changes, "root": folder}), arriving=True)
        return rows
    for key in ("root", "pattern"):
        if is_remote(changes[key]):
            address = changes[key]
            path, said = rehearsal.staged(address, cache, budget)
            rows.append(("bucket", said))
            changes[key], missing = path, missing if path else address
    if missing:
        plan.to_stage = rehearsal.listed(missing)
        if data.source != "tfds":
            return [*rows, ("not opened", "no plan downloads data: classes and counts show once it is staged")]
        plan.dataset, plan.labels_known = rehearsal.outline_of_bucket(config, missing), False
        return [*rows, ("not opened", "names and counts are from its metadata; labels show once it is staged")]
    if not _open(plan, data.model_copy(update=changes)):
        return [("not opened", f"{data.name} is not prepared here; the run would download and prepare it")]
    return rows


def _open(plan: Plan, data: Data, arriving: bool = False) -> bool:
    """Open what is on this machine, as a run would; False where the run would download it first."""
    from trainer.data.open import open_dataset
    from trainer.planning import checks as rehearsal
    from trainer.run import weights_of_classes

    config = plan.config
    limit = config.training.batch_size if config.debug.overfit else config.debug.max_examples
    closed, cache = data.model_copy(update={"download": False}), Path(config.runtime.cache_dir).expanduser()

    def note(text: str) -> None:
        if text.startswith("reading"):
            print(text, flush=True)

    try:
        found = open_dataset(
            closed, seed=config.seed, cache_dir=cache, max_examples=limit, note=note, arriving=arriving
        )
    except DataError as error:
        if data.download and "is not prepared in" in str(error):
            return False
        raise
    if config.debug.overfit:
        only = found.splits["train"]
        found = Dataset(found.name, found.class_names, {"train": only, "validation": only}, found.fingerprint)
    plan.dataset = found
    if config.output_dir and not plan.faults:
        rehearsal.take_folder(config, found.fingerprint)
    weights_of_classes(cast(Any, SimpleNamespace(config=config, dataset=found)))
    return True


def advised(plan: Plan, found: Dataset) -> RunConfig:
    """The configuration with what is `auto` chosen as the run would choose it."""
    from trainer.planning import checks as rehearsal

    if plan.config.auto:
        plan.config, plan.reasons = advise(plan.config, found.splits["train"].count, len(found.class_names))
        rehearsal.devices(plan.config, plan.cluster)  # another batch may be one that cannot be shared
    if plan.reasons:
        plan.section("advice", [("auto", reason) for reason in plan.reasons])
    return plan.config


def show_network(plan: Plan, replicas: int, plot: Path | None, summary: bool) -> list[PhasePlan]:
    """Data, storage, phases, network, memory and bytes; all that needs the network."""
    from trainer.models.backbones import find_backbone
    from trainer.models.classifier import build_classifier
    from trainer.planning import estimates as sizes
    from trainer.planning import network_plot as picture
    from trainer.planning import teacher as teachers

    rows: Rows = []
    before = len(plan.faults)
    with plan.fault():
        rows = find_data(plan)
    problem = f"✗ {plan.faults[-1]}" if len(plan.faults) > before else ""
    found = plan.dataset
    if found is None:
        if rows:
            plan.section("data", rows)
        show_storage(plan, problem)
        return []
    if "validation" not in found.splits:
        plan.faults.append(
            DataError("there is nothing to validate on: set data.validation_fraction or data.validation_split")
        )
    config = advised(plan, found)
    kind = find_backbone(config.model.backbone)
    pixels = config.model.image_size or kind.default_size
    kept = sizes.kept_pixels(config, found, pixels)
    show_data(plan, rows, kept)
    show_storage(plan, problem)
    resident = sizes.resident()
    fetched = config.model.weights == "imagenet" or is_remote(config.model.weights)
    model = config.model.model_copy(update={"weights": "none"}) if fetched else config.model  # nothing is downloaded
    classifier = build_classifier(model, len(found.class_names), config.seed)
    features, kept = sizes.choose_features(config, found, classifier, kept)
    share, epoch = sizes.share_of_worker(config, found.splits["train"], plan.cluster, kept["train"].where)
    per_replica = config.training.batch_size // (replicas * plan.cluster.size * config.training.accumulate)
    phases = sizes.plan_phases(config, classifier, epoch, max(per_replica, 1))
    show_phases(plan, phases, sizes.parameters(classifier), epoch, share.by)
    plan.section("features", features)
    widths = " -> ".join(
        f"{n:,}" for n in [classifier.backbone.output_shape[-1], config.model.hidden, len(found.class_names)] if n
    )
    teacher = None
    with plan.fault():
        teacher = teachers.plan_teacher(config, found, max(per_replica, 1))
    taught = [("teacher", teacher.words)] if teacher else []
    drawn = [("drawing", str(picture.draw(classifier, phases, len(found.class_names), plot)))] if plot else []
    head = sum(int(np.prod(v.shape)) for v in classifier.head_variables.values())
    plan.section("model", [
        ("backbone", f"{kind.name}, weights {config.model.weights}, {sizes.parameters(classifier) - head:,} parameters "
                     f"in {len(classifier.backbone.layers)} layers"),
        ("images", f"{pixels} x {pixels} pixels, {config.model.resize}"),
        ("head", f"{config.model.pooling} pooling, {widths}, {head:,} parameters"), *taught, *drawn])  # fmt: skip
    if summary:
        classifier.keras_model().summary(line_length=WIDTH, expand_nested=True, show_trainable=True)
    rest = teacher.memory_rows(replicas) if teacher else []
    show_memory(plan, sizes.memory_rows(classifier, phases, kept, replicas, resident) + rest)
    weights = sizes.checkpoint_bytes(classifier, phases)
    show_bytes(plan, phases, kept, weights, 4 * sizes.parameters(classifier))
    return phases


def _run(arguments: list[str]) -> None:
    summary = "--summary" in arguments
    arguments = [a for a in arguments if a != "--summary"]
    own, rest = read_arguments(arguments, __doc__, {"--plot": ""}, rest=r"(?!--plot)(?s:.*)")
    plot = Path(own["--plot"]).expanduser() if "--plot" in own else None
    if plot and plot.suffix != ".png":
        raise ConfigError("say once where to draw the network: --plot=FILE.png")
    if asks_for_sweep(arguments):
        raise ConfigError("a plan is of one run: leave --multirun and sweep=... out")
    composed = compose(rest)
    if composed is None:  # --cfg
        return
    config = load(composed)
    config = without_regularisation(config) if config.debug.overfit else config
    cluster = discover(os.environ)
    with quiet_start():
        from trainer.exporting.formats import check_formats
        from trainer.planning import checks as rehearsal
        from trainer.planning.trouble import look_for_trouble
    devices, replicas = rehearsal.devices(config, cluster)
    terminal = sys.stdout.isatty()
    plan = Plan(config, cluster, Console(width=None if terminal else WIDTH, highlight=False))
    phases: list[PhasePlan] = []
    with plan.fault():
        check_formats(config.export.formats, config.model.backbone)
    with within(PATIENCE):
        show_configuration(plan, rest)
        show_cluster(plan, devices)
        with plan.fault():  # said at the end, beside what else was found
            phases = show_network(plan, replicas, plot, summary)
    look_for_trouble(plan, phases)
    if plan.warnings:
        plan.section("warnings", [("!", warning) for warning in plan.warnings], width=1)
    if len(plan.faults) == 1:
        raise plan.faults[0]
    if plan.faults:
        raise ConfigError("\n".join(map(str, plan.faults)))


def main() -> None:
    """Entry point of `python -m trainer.plan`; exits with a documented code (`trainer.errors`)."""
    with exit_with_code():
        _run(sys.argv[1:])


if __name__ == "__main__":
    main()
