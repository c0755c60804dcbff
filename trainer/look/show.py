"""Open the data of a configuration, examine it, and write the page, the figures and look.json."""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from trainer.config.auto import resolve_auto
from trainer.config.schema import RequestedConfig, RunConfig
from trainer.data.open import OpenedData, open_run_dataset
from trainer.data.remote import fetch_local_copies, replace_local_paths, show_addresses_in_errors
from trainer.look.facts import Facts, gather_facts, open_pixels
from trainer.look.page import (
    AugmentedImage,
    Example,
    PageImages,
    draw_augmentation,
    draw_counts,
    draw_examples,
    render_page,
)  # fmt: skip
from trainer.look.sample import choose_examples
from trainer.look.suggestions import Suggestion, suggest
from trainer.look.summary import format_summary
from trainer.monitoring import termination
from trainer.monitoring.health import health
from trainer.monitoring.log import log
from trainer.monitoring.progress import log_while_slow
from trainer.report.build import augment_examples
from trainer.report.figures import save
from trainer.report.page import (
    INDEX,
    MAX_ENTRIES_WITH_IMAGES,
    MAX_IMAGES_PER_GROUP,
    require_replaceable_page,
    write_output,
)
from trainer.storage.base import encode_json
from trainer.storage.path import StoragePath, storage_path

FACTS = "look.json"
FIGURES = ("examples.png", "augmentation.png", "counts.png")
AUGMENTED = 4  # number of images that are shown next to their augmented views


@dataclass(frozen=True)
class PageContent:
    """The page's content: facts, suggestions, and images at the image size of training."""

    facts: Facts
    suggestions: list[Suggestion]
    images: PageImages


def open_data(config: RequestedConfig) -> tuple[RunConfig, OpenedData]:
    """Open the dataset as a run does, except that unreadable files are skipped.

    Returns:
        The configuration with all `auto` values resolved and the run's own data.on_error, and the dataset.

    Raises:
        DataError: the data cannot be opened, or exceeds the disk budget.
        Interrupted: a bucket does not respond.
    """

    def log_slow_work(text: str) -> None:
        if text.startswith("reading"):  # slow work begins; the page shows what the other messages report
            log.info(text)

    config_without_weights = config.model_copy(update={"model": config.model.model_copy(update={"weights": "none"})})
    local_config, addresses, shards = fetch_local_copies(
        config_without_weights, log.info, lambda _address: health.record_progress(), stream=True
    )
    data = local_config.data.model_copy(update={"on_error": "skip"})
    with show_addresses_in_errors(addresses):
        dataset = open_run_dataset(config, data, log_slow_work, shards is not None)
    resolved, _ = resolve_auto(config, dataset.splits["train"].count, len(dataset.class_names))
    skipped, notes = (
        tuple(replace_local_paths(line, addresses) for line in lines) for lines in (dataset.skipped, dataset.notes)
    )
    dataset = replace(dataset, skipped=skipped, notes=notes)
    return resolved, OpenedData(dataset, addresses, shards, "none")


def collect_images(config: RunConfig, data: OpenedData, facts: Facts, sample: Mapping[str, np.ndarray]) -> PageImages:
    """Decode the page's images as training does, and augment some of them as in the first epochs of training.

    `sample`: split -> indices of the examined images, int64 [k].
    """
    train, names = data.dataset.splits["train"], data.dataset.class_names
    selected = choose_examples(train.labels, sample["train"], config.seed, only_sample=data.shards is not None)
    pixels, starts = open_pixels(config, data, facts.settings.image_size)
    groups = [
        [starts[member["split"]] + member["index"] for member in group["members"][:MAX_IMAGES_PER_GROUP]]
        for group in facts.duplicates["groups"][:MAX_ENTRIES_WITH_IMAGES]
    ]
    first = starts["train"]
    positions = np.unique([*chain.from_iterable(groups), *(first + i for m in selected.values() for i in m.tolist())])
    decoded = zip(positions.tolist(), pixels.read_images(positions.astype(np.int64)), strict=True)
    rows = {position: image for position, image in decoded if position not in pixels.unreadable}
    readable = {k: [i for i in members.tolist() if first + i in rows] for k, members in selected.items()}
    examples = {
        k: [Example(replace_local_paths(train.name_of(i), data.addresses), rows[first + i]) for i in members]
        for k, members in readable.items()
    }
    augmented: list[AugmentedImage] = []
    if config.augmentation.active:
        classes = [k for k, members in readable.items() if members]
        originals = [examples[k][0] for k in classes]
        indices = np.array([readable[k][0] for k in classes], np.int64)
        count = min(len(classes), AUGMENTED)
        images = np.stack([example.pixels for example in originals])
        views = augment_examples(config.augmentation, config.seed, images, indices, count)
        augmented = [AugmentedImage(originals[n], names[classes[n]], int(indices[n]), views[n]) for n in range(count)]
    examples_by_class = {names[k]: members for k, members in examples.items()}
    return PageImages(
        examples_by_class, augmented, [[rows[position] for position in group if position in rows] for group in groups]
    )


def examine(config: RequestedConfig, limit: int) -> tuple[RunConfig, PageContent]:
    """Open the data and examine at most `limit` images. Return the resolved configuration, and the page's content."""
    resolved, data = open_data(config)
    try:
        with log_while_slow("examining the images"), show_addresses_in_errors(data.addresses):
            facts, sample = gather_facts(resolved, data, limit)
            images = collect_images(resolved, data, facts, sample)
    finally:
        if data.shards:
            data.shards.close()
    return resolved, PageContent(facts, suggest(facts), images)


def write_files(content: PageContent, config: RunConfig, output: StoragePath) -> None:
    """Write the figures, look.json and, last, the page, each atomically. Delete older figures that are not written."""
    figures = {"counts.png": draw_counts(content.facts), "examples.png": draw_examples(content.images.examples)}
    if content.images.augmented:
        figures["augmentation.png"] = draw_augmentation(content.images.augmented)
    suggestions = [{"title": s.title, "reason": s.reason, "arguments": s.arguments} for s in content.suggestions]
    facts: dict[str, Any] = asdict(content.facts) | {"suggestions": suggestions}
    files: dict[str, bytes | str] = {FACTS: encode_json(facts)}
    files[INDEX] = render_page(content.facts, content.suggestions, content.images, config)
    with tempfile.TemporaryDirectory() as folder:
        figure_files = {name: save(figure, Path(folder) / name).read_bytes() for name, figure in figures.items()}
    for name in FIGURES:
        if name not in figure_files:
            (output / name).delete()
    for name, data in (figure_files | files).items():
        write_output(output, name, data)


def show(config: RequestedConfig, output: str, limit: int) -> None:
    """Examine the data of a configuration, write the page to a folder, and log a summary.

    Args:
        output: local or gs:// folder.
        limit: maximum number of images to examine.

    Raises:
        ConfigError: the folder has an index.html that is not a page of this command.
        DataError: the data cannot be opened.
        Interrupted: a bucket does not respond.
    """
    folder = storage_path(output)
    require_replaceable_page(folder, "trainer.look", FACTS)
    tf.config.set_visible_devices([], "GPU")
    resolved, content = examine(config, limit)
    write_files(content, resolved, folder)
    log.info(format_summary(content.facts, content.suggestions, str(folder / INDEX)))
    termination.set_success_message(f"{folder / INDEX} is written")
