"""Open the data of a configuration, examine it, and write the page, the figures and look.json."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config.auto import resolve_auto
from trainer.config.schema import RequestedConfig, RunConfig
from trainer.data.open import OpenedData, open_run_dataset
from trainer.data.remote import addresses_in_errors, fetch_local_copies, with_addresses
from trainer.errors import ConfigError
from trainer.look.facts import Facts, gather_facts, open_pixels
from trainer.look.page import (
    AugmentedImage, Example, PageImages, draw_augmentation, draw_counts, draw_examples, render_page,
)  # fmt: skip
from trainer.look.sample import choose_examples
from trainer.look.suggestions import Suggestion, suggest
from trainer.look.summary import format_summary
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.monitoring.progress import log_while_slow
from trainer.report.build import augment_views
from trainer.report.figures import save
from trainer.report.page import MAX_IMAGES_PER_GROUP, MAX_WITH_IMAGES
from trainer.storage.local import delete_abandoned
from trainer.storage.path import StoragePath, storage_path

PAGE, FACTS = "index.html", "look.json"
FIGURES = ("examples.png", "augmentation.png", "counts.png")
AUGMENTED = 4  # images that are shown next to their augmented views


@dataclass(frozen=True)
class Look:
    """What the page shows: the facts, the suggestions, and images at the size of training."""

    facts: Facts
    suggestions: list[Suggestion]
    images: PageImages


def require_own_folder(folder: StoragePath) -> None:
    """Raise a ConfigError if the folder has a page of something else, such as a report, which would be replaced."""
    if (folder / PAGE).exists() and not (folder / FACTS).exists():
        problem, fix = f"has an {PAGE} that trainer.look did not write", "choose another folder"
        raise ConfigError(problem, key="output", value=str(folder), fix=fix)


def open_data(config: RequestedConfig) -> tuple[RunConfig, OpenedData]:
    """Open the dataset as a run does, but skip files that cannot be read; resolve `auto`.

    Raises the errors of `trainer.data.open.open_dataset`.
    """

    def log_slow_work(text: str) -> None:
        if text.startswith("reading"):  # it may take long; the page has what the other messages report
            log.info(text)

    weightless = config.model_copy(update={"model": config.model.model_copy(update={"weights": "none"})})
    local, addresses, shards = fetch_local_copies(
        weightless, log.info, lambda _address: health.record_progress(), stream=True
    )
    data = local.data.model_copy(update={"on_error": "skip"})
    with addresses_in_errors(addresses):
        dataset = open_run_dataset(config, data, log_slow_work, shards is not None)
    resolved, _ = resolve_auto(config, dataset.splits["train"].count, len(dataset.class_names))
    skipped, notes = (tuple(with_addresses(line, addresses) for line in lines) for lines in (dataset.skipped, dataset.notes))
    dataset = replace(dataset, skipped=skipped, notes=notes)
    return resolved, OpenedData(dataset, addresses, shards, "none")


def collect_images(config: RunConfig, data: OpenedData, facts: Facts, sample: Mapping[str, np.ndarray]) -> PageImages:
    """Decode the images of the page as training does, and augment some as in the first epochs."""
    train, names = data.dataset.splits["train"], data.dataset.class_names
    chosen = choose_examples(train.labels, sample["train"], config.seed)
    pixels = open_pixels(config, data, "train", facts.settings.image_size)
    indices = np.unique(np.concatenate([*chosen.values(), np.zeros(0, np.int64)]))
    rows = dict(zip(indices.tolist(), pixels.rows(indices), strict=True))
    name_of = partial(_name_of, data, "train")
    examples = {
        names[k]: [Example(name_of(i), rows[i]) for i in members.tolist() if i not in pixels.bad]
        for k, members in chosen.items()
    }
    augmented = []
    if config.augmentation.active:
        first = [next((i for i in members.tolist() if i not in pixels.bad), None) for members in chosen.values()]
        shown = np.array([i for i in first if i is not None], np.int64)
        for k, index in enumerate(shown[:AUGMENTED].tolist()):
            order = np.roll(shown, -k)  # mixup and CutMix mix the first image with the others
            views = augment_views(config.augmentation, config.seed, np.stack([rows[i] for i in order.tolist()]), order)
            label = names[int(train.labels[index])]
            augmented.append(AugmentedImage(Example(name_of(index), rows[index]), label, index, views))
    groups = []
    opened = {name: open_pixels(config, data, name, facts.settings.image_size) for name in data.dataset.splits}
    for group in facts.duplicates["groups"][:MAX_WITH_IMAGES]:
        members = group["members"][:MAX_IMAGES_PER_GROUP]
        groups.append([opened[m["split"]].rows(np.array([m["index"]]))[0] for m in members])
    return PageImages(examples, augmented, groups)


def _name_of(data: OpenedData, split: str, index: int) -> str:
    return with_addresses(data.dataset.splits[split].name_of(index), data.addresses)


def examine(config: RequestedConfig, limit: int) -> tuple[RunConfig, Look]:
    """Open the data, and examine at most `limit` images of it."""
    resolved, data = open_data(config)
    try:
        with log_while_slow("examining the images"), addresses_in_errors(data.addresses):
            facts, sample = gather_facts(resolved, data, limit)
            images = collect_images(resolved, data, facts, sample)
    finally:
        if data.shards:
            data.shards.close()
    return resolved, Look(facts, suggest(facts), images)


def write_files(look: Look, config: RunConfig, output: StoragePath) -> None:
    """Write the figures, look.json and, last, the page. Each file appears as a whole; an older one is replaced."""
    figures = {"counts.png": draw_counts(look.facts), "examples.png": draw_examples(look.images.examples)}
    if look.images.augmented:
        figures["augmentation.png"] = draw_augmentation(look.images.augmented)
    suggestions = [{"title": s.title, "reason": s.reason, "arguments": s.arguments} for s in look.suggestions]
    facts: dict[str, Any] = asdict(look.facts) | {"suggestions": suggestions}
    files: dict[str, bytes | str] = {FACTS: json.dumps(facts, indent=1, ensure_ascii=False) + "\n"}
    files[PAGE] = render_page(look.facts, look.suggestions, look.images, config)
    with tempfile.TemporaryDirectory() as folder:
        drawn = {name: save(figure, Path(folder) / name).read_bytes() for name, figure in figures.items()}
    for name in FIGURES:
        if name not in drawn:
            (output / name).delete()
    for name, content in (drawn | files).items():
        if output.is_local:
            delete_abandoned(Path(str(output)), name)
        (output / name).write(content)


def show(config: RequestedConfig, output: str, limit: int) -> None:
    """Write the page of a configuration to a folder, and log a summary.

    Raises:
        ConfigError: the folder has a page of something else.
        DataError: the data cannot be opened.
        Interrupted: a bucket does not respond.
    """
    folder = storage_path(output)
    require_own_folder(folder)
    tf.config.set_visible_devices([], "GPU")
    resolved, look = examine(config, limit)
    write_files(look, resolved, folder)
    log.info(format_summary(look.facts, look.suggestions, str(folder / PAGE)))
    termination.set_success_message(f"{folder / PAGE} is written")
