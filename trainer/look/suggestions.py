"""Suggest changes to a run's configuration or data, each with its reason, from the facts about the data."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from trainer.config.typed import format_argument
from trainer.data.open import MAX_CLASS_RATIO, MIN_SPLIT_EXAMPLES
from trainer.errors import format_count
from trainer.look.facts import Facts

MIN_SCORED_EXAMPLES = 100  # validation or test examples; with fewer, one example is more than 1 point of accuracy
ENOUGH_PER_CLASS = 100  # training examples per class; with fewer, each image is repeated too often
MAX_FRACTION = 0.3  # largest data.validation_fraction or data.test_fraction that is suggested
MIN_EXAMPLES_TO_DIVIDE = 10  # number of examples from which some are set aside for another split
LARGE_RATIO = 2.0  # minimum of (shorter side / model.image_size) to suggest a larger size
SMALL_RATIO = 2.0  # minimum of (model.image_size / shorter side) to suggest a smaller size
GOOD_SIZE = 224  # pixels; the image size of most ImageNet weights
STRETCHED = 1.7  # longer / shorter side from which a stretched image is hard to recognize; 16:9 is 1.78
# Data is mixed if at least this fraction are portraits, and at least this fraction landscapes: stretching distorts them
# in opposite directions. This matters if (longer / shorter side) is at least `MIXED_STRETCH`.
MIXED_FRACTION = 0.2
MIXED_STRETCH = 1.3
MAX_CROPPED = 0.5  # fraction of an image outside its centered square from which stretching is suggested


@dataclass(frozen=True)
class Suggestion:
    """A change to the configuration or to the data, with its reason."""

    title: str
    reason: str
    settings: tuple[tuple[str, object], ...] = ()  # configuration keys and values; () if the data has to change

    @property
    def arguments(self) -> str:
        """The settings as command-line arguments, quoted for the shell; "" if there are none."""
        return " ".join(format_argument(key, value) for key, value in self.settings)


def suggest(facts: Facts) -> list[Suggestion]:
    """Return the suggestions, the most important first. Their arguments can be added to the run's command."""
    topics = (
        _suggest_repairs, _suggest_removing_copies, _suggest_correcting_labels, _suggest_splits, _suggest_class_weights,
        _suggest_image_size, _suggest_resize, _suggest_augmentation, _suggest_groups,
    )  # fmt: skip
    return [suggestion for topic in topics for suggestion in topic(facts)]


def _suggest_repairs(facts: Facts) -> Iterator[Suggestion]:
    """Suggest to skip unreadable files if a run would fail at them, and to use ignored EXIF orientations."""
    count = len(facts.skipped) + len(facts.undecodable)
    settings = facts.settings
    if count and settings.on_error == "fail":
        reason = f"{format_count(count, 'file or record', 'files or records')} cannot be read, and a run ends with exit"
        yield Suggestion(
            "Repair or remove unreadable files, or skip them",
            f"{reason} code 2 at the first one; they are listed with their reasons",
            (("data.on_error", "skip"),),
        )
    num_rotated = sum(count for orientation, count in facts.orientations.items() if orientation > 1)
    if num_rotated and settings.orientation == "ignore":
        reason = f"{format_count(num_rotated, 'examined image')} of {sum(facts.examined.values()):,} have an EXIF"
        yield Suggestion(
            "Turn photos upright",
            f"{reason} orientation, which is ignored; right if the marks are wrong",
            (("data.orientation", "exif"),),
        )


def _suggest_removing_copies(facts: Facts) -> Iterator[Suggestion]:
    """Suggest to remove images that are in several splits."""
    if count := facts.duplicates["across_splits"]:
        reason = f"{format_count(count, 'image')} {'is' if count == 1 else 'are'} in several splits: the network is"
        fix = "Remove copies from one of the splits"
        yield Suggestion(fix, f"{reason} scored on images that it was trained on, so the scores are too high")


def _suggest_correcting_labels(facts: Facts) -> Iterator[Suggestion]:
    """Suggest to correct the labels of copies whose labels differ."""
    if count := facts.duplicates["different_labels"]:
        reason = f"{format_count(count, 'image')} {'has' if count == 1 else 'have'} copies with another label"
        yield Suggestion("Correct contradicting labels", f"{reason}; at most one of them is right")


def _suggest_splits(facts: Facts) -> Iterator[Suggestion]:
    """Suggest a fraction for a missing or small split, or more images for a small split that cannot be enlarged."""
    settings = facts.settings
    totals = {name: sum(counts) for name, counts in facts.counts.items()}
    if settings.source == "digits" or settings.is_trial:
        return
    num_divisible = totals["train"] + sum(totals[name] for name in facts.from_train)
    fractions = {"validation": settings.validation_fraction, "test": settings.test_fraction}
    proposals: dict[str, tuple[float, str]] = {}
    if num_divisible >= MIN_EXAMPLES_TO_DIVIDE:
        if "validation" not in totals and fractions["validation"] == 0:
            proposals["validation"] = 0.2, "there is no validation split, and a run needs one to choose its checkpoint"
        if "test" not in totals and fractions["test"] == 0 and _can_divide(facts):
            proposals["test"] = 0.15, "there is no test split: the score is of the split that chose the checkpoint"
    for name in facts.from_train:
        fraction = min(MAX_FRACTION, math.ceil(100 * MIN_SCORED_EXAMPLES / num_divisible) / 100)
        if totals[name] < MIN_SCORED_EXAMPLES and fraction >= 1.2 * fractions[name] > 0:
            proposals[name] = fraction, _describe_small_split(name, totals[name])
    for name, (fraction, reason) in proposals.items():
        title = f"Set {'more' if name in totals else 'some'} images aside for {name}"
        yield Suggestion(title, reason, ((f"data.{name}_fraction", f"{fraction:g}"),))
    for name, total in totals.items():
        if name not in ("train", *proposals) and total < MIN_SPLIT_EXAMPLES:
            yield Suggestion(f"Add {name} images", _describe_small_split(name, total))


def _describe_small_split(name: str, count: int) -> str:
    """State how much one of `count` examples changes the accuracy of a split."""
    return f"{name} has only {format_count(count, 'example')}: each is {100 / count:.1f} points of accuracy"


def _can_divide(facts: Facts) -> bool:
    """Return whether there are enough record files for another split: data.source=tfrecords assigns complete files."""
    return facts.settings.source != "tfrecords" or facts.files > len(facts.counts)


def _suggest_class_weights(facts: Facts) -> Iterator[Suggestion]:
    """Suggest balanced class weights if the numbers of training examples per class differ strongly."""
    counts = facts.counts["train"]
    low, high = min(counts), max(counts)
    if high > MAX_CLASS_RATIO * low and low and not facts.settings.class_weights:
        rare, frequent = (facts.class_names[counts.index(count)] for count in (low, high))
        reason = f"{frequent} has {high:,} training examples, {rare} {low:,}: without weights rare classes count little"
        yield Suggestion("Weight the classes", reason, (("training.class_weights", "balanced"),))


def _suggest_image_size(facts: Facts) -> Iterator[Suggestion]:
    """Suggest a larger image size if most images are larger, or a smaller one if most images are smaller."""
    settings = facts.settings
    shorter = facts.shorter_side.get("median", 0)
    size = settings.image_size
    if not shorter:
        return
    larger = [side for side in settings.sizes or (96, 128, 160, 192, 224) if size < side <= min(shorter, GOOD_SIZE)]
    if size < GOOD_SIZE and shorter >= LARGE_RATIO * size and larger:
        side = next((side for side in larger if side >= 1.5 * size), larger[-1])
        reason = f"half of the images have {shorter:.0f} px or more on the shorter side, and are reduced to {size} px;"
        cost = f"{(side / size) ** 2:.1f} times the time per image"
        full_reason = f"{reason} small details need more, at {cost}"
        yield Suggestion("Train on larger images", full_reason, (("model.image_size", side),))
    if size >= SMALL_RATIO * shorter:
        smaller = [s for s in settings.sizes or range(32, size, 32) if max(shorter, settings.min_size) <= s < size]
        if smaller and (side := smaller[0]) <= 0.75 * size:
            reason = f"half of the images have at most {shorter:.0f} px on the shorter side, and are enlarged to {size}"
            cost = f"{100 * (side / size) ** 2:.0f} % of the time; compare both, since the ImageNet weights expect"
            full_reason = f"{reason} px without new details. It takes {cost} large images"
            yield Suggestion("Try smaller images", full_reason, (("model.image_size", side),))


def _suggest_resize(facts: Facts) -> Iterator[Suggestion]:
    """Suggest to crop if stretching distorts the images much, or to stretch if cropping discards much of them."""
    if not facts.elongation:
        return
    elongation = facts.elongation["median"]
    total = max(sum(facts.aspects.values()), 1)
    names = list(facts.aspects)
    square_index = names.index("square")
    tall = sum(facts.aspects[name] for name in names[:square_index]) / total
    wide = sum(facts.aspects[name] for name in names[square_index + 1 :]) / total
    if facts.settings.resize == "stretch":
        reason = ""
        if elongation >= STRETCHED:
            reason = (
                f"the longer side of half of the images is {elongation:.2g} times the shorter one or more, and they"
            )
            reason += " are stretched to a square"
        elif min(tall, wide) >= MIXED_FRACTION and elongation >= MIXED_STRETCH:
            reason = f"{100 * tall:.0f} % of the images are portraits and {100 * wide:.0f} % landscapes, which are"
            reason += " stretched in opposite directions"
        if reason:
            text = f"{reason}; the centered square has natural proportions, if the objects are not at the edges"
            yield Suggestion("Crop instead of stretching", text, (("model.resize", "crop"),))
    elif 1 - 1 / elongation >= MAX_CROPPED:
        reason = f"half of the images lose {100 * (1 - 1 / elongation):.0f} % or more of their area outside the square"
        yield Suggestion("Stretch instead of cropping", reason, (("model.resize", "stretch"),))


def _suggest_augmentation(facts: Facts) -> Iterator[Suggestion]:
    """Suggest augmentation if there are few training examples per class."""
    counts = facts.counts["train"]
    per_class = sum(counts) / max(len(counts), 1)
    if per_class < ENOUGH_PER_CLASS and not facts.settings.augmented and not facts.settings.is_trial:
        reason = f"there are {per_class:.0f} training examples per class, and without augmentation each epoch repeats"
        text = f"{reason} them; light has no flips, standard has"
        yield Suggestion("Augment the training images", text, (("augmentation", "light"),))


def _suggest_groups(facts: Facts) -> Iterator[Suggestion]:
    """Suggest the field of the records with the fewest values as data.group_field, if there is a suitable one."""
    if facts.group_fields and not facts.settings.group_field:
        name, count = min(facts.group_fields.items(), key=lambda item: (item[1], item[0]))
        others = f"; other such fields: {', '.join(n for n in facts.group_fields if n != name)}"
        reason = f"the field {name} of the records has {count} different values in the examined ones, and the report"
        text = f"{reason} can show scores for each{others if len(facts.group_fields) > 1 else ''}"
        yield Suggestion("Score groups", text, (("data.group_field", name),))
