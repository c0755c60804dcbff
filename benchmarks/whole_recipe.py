"""The whole recipe R4, five epochs of the head and five from layer 100 up: plain Keras against ours, 3 seeds.

    python -m benchmarks.whole_recipe --data FOLDER --weights FILE --alpha 0.35

Each run is a process of its own. Both sides read the same {train,validation}/<class> folders of links; seed i validates
on the i-th of five disjoint folds.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.asking import arguments_of, command_of, data_in_words, folder_for, model_in_words, photos
from benchmarks.photos import count_of, link_fold
from benchmarks.processes import Ended, in_turns, run, train
from benchmarks.results import Comparison, Result, Table, keep, spread
from trainer.evaluation.intervals import wilson

PLAIN = "plain Keras"
LIVE = ["phases.head.features=live", "phases.fine_tune.features=live"]
AUGMENTATIONS = {"no augmentation": "none", "flip, rotation, zoom": "standard"}
OURS: dict[str, dict[str, list[str]]] = {  # augmentation -> side -> what the command line adds
    "no augmentation": {"ours": [], "ours, live": LIVE},
    "flip, rotation, zoom": {"ours, 2 fixed views in the head": ["phases.head.augmented_views=2"], "ours, live": LIVE},
}
PHASES = {"head": "head", "fine_tune": "from layer 100"}
HOW = """One process a run, {rounds} seeds, in turns. {data}; seed i validates on the i-th of five disjoint folds, the
same examples on both sides. {model}. The clock runs from opening the data (TensorFlow is imported) to the end of the
second phase: decoding, features, building, tracing, training, validation and checkpoints count; imports, the last
evaluation, exports and the report do not. An epoch is the time between the ends of two, its validation included and the
first of a phase, which compiles, left out. Accuracy is that of the last epoch of a phase, with `training.keep=last` on
our side. Plain Keras is `benchmarks/plain_keras.py`: `image_dataset_from_directory`, cache, shuffle, prefetch, the
augmentation and preprocessing layers in the graph, the backbone called with `training=False`."""


@dataclass(frozen=True)
class Outcome:
    """One run of either side."""

    seconds: float
    epochs: dict[str, list[float]]  # phase -> seconds of every epoch but its first
    accuracy: dict[str, float]  # phase -> validation accuracy after its last epoch
    places: dict[str, float]  # seconds by place of our ledger
    ended: Ended


def plain(split: Path, asked: argparse.Namespace, augmentation: str, seed: int) -> Outcome:
    flags = ["--augment"] if augmentation != "none" else []
    model = ["--weights", str(asked.weights), "--alpha", str(asked.alpha)]
    ended = run("-m", "benchmarks.plain_keras", str(split), *model, "--seed", str(seed), *flags)
    answer: dict[str, Any] = json.loads(ended.said.splitlines()[-1])
    last = {phase: values[-1] for phase, values in answer["val_accuracy"].items()}
    return Outcome(answer["seconds"], answer["epochs"], last, {}, ended)


def ours(
    split: Path, asked: argparse.Namespace, augmentation: str, seed: int, extra: Sequence[str], scratch: Path
) -> Outcome:
    done = train(
        [
            "experiment=flowers_mobilenet_v2",
            "data=image_folder",
            f"data.root={split}",
            f"model.weights={asked.weights}",
            f"model.alpha={asked.alpha}",
            f"augmentation={augmentation}",
            f"seed={seed}",
            "training.keep=last",
            *extra,
        ],
        scratch,
    )
    epochs, accuracy = {}, {}
    for phase in PHASES:
        own = [line for line in done.epochs if line["phase"] == phase]
        epochs[phase] = [b["at"] - a["at"] for a, b in pairwise(own)]
        accuracy[phase] = own[-1]["val_accuracy"]
    return Outcome(done.training, epochs, accuracy, done.places, done.ended)


def measure(asked: argparse.Namespace) -> list[Result]:
    """The recipe, and the memory that its runs took."""
    rounds = asked.rounds or 3
    found: dict[tuple[str, str], list[Outcome]] = {}
    with photos(asked) as root, tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        splits = [link_fold(root, scratch / f"fold-{turn}", turn) for turn in range(rounds)]
        examples = [count_of(split / "validation") for split in splits]
        for label, augmentation in AUGMENTATIONS.items():
            for turn, side in in_turns([PLAIN, *OURS[label]], rounds):
                outcome = (
                    plain(splits[turn], asked, augmentation, turn + 1)
                    if side == PLAIN
                    else ours(splits[turn], asked, augmentation, turn + 1, OURS[label][side], scratch)
                )
                found.setdefault((label, side), []).append(outcome)
                accuracy = outcome.accuracy["fine_tune"]
                print(f"{label}, {side}, seed {turn + 1}: {outcome.seconds:.1f} s, {accuracy:.3f}", flush=True)
        words = {"data": data_in_words(asked, root), "model": model_in_words(asked), "rounds": rounds}
    how, alpha = HOW.replace("\n", " ").format(**words), f"{asked.alpha:g}"
    recipe = Result(
        name=f"recipe-alpha-{alpha}",
        title=f"Whole recipe, MobileNetV2 of width {alpha}",
        how=how,
        command=command_of("recipe", asked, rounds),
        comparisons=[c for label in AUGMENTATIONS for side in OURS[label] for c in comparisons(found, label, side)],
        tables=[accuracies(found, examples), places(found)],
    )
    memory = Result(
        name=f"recipe-memory-alpha-{alpha}",
        title=f"Memory of the whole recipe, MobileNetV2 of width {alpha}",
        how="The most resident memory of the processes of the row above, imports and report included.",
        command=command_of("recipe", asked, rounds),
        comparisons=[
            Comparison(f"{label}, {side}", PLAIN, "MB", peaks(found[label, side]), peaks(found[label, PLAIN]))
            for label in AUGMENTATIONS
            for side in OURS[label]
        ],
    )
    return [recipe, memory]


def peaks(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.ended.peak_mb for outcome in outcomes]


def comparisons(found: dict[tuple[str, str], list[Outcome]], label: str, side: str) -> list[Comparison]:
    """All of it, and an epoch of each phase."""
    mine, other = found[label, side], found[label, PLAIN]
    rows = [
        Comparison(f"{label}, {side}: all of it", PLAIN, "s", [o.seconds for o in mine], [o.seconds for o in other])
    ]
    for phase, words in PHASES.items():
        each = [[statistics.median(o.epochs[phase]) for o in outcomes] for outcomes in (mine, other)]
        rows.append(Comparison(f"{label}, {side}: an epoch, {words}", PLAIN, "s", *each))
    return rows


def accuracies(found: dict[tuple[str, str], list[Outcome]], examples: Sequence[int]) -> Table:
    """Validation accuracy after each phase, over all seeds, with Wilson's interval: the folds are disjoint."""
    rows = []
    for (label, side), outcomes in found.items():
        for phase, words in PHASES.items():
            each = [outcome.accuracy[phase] for outcome in outcomes]
            n = sum(examples)
            right = round(sum(share * count for share, count in zip(each, examples, strict=True)))
            low, high = wilson(right, n)
            seeds = ", ".join(f"{value:.3f}" for value in each)
            rows.append([label, side, words, f"{right / n:.3f}", f"{low:.3f} to {high:.3f}", str(n), seeds])
    header = ["augmentation", "side", "after", "accuracy", "95 % interval", "n", "each seed"]
    return Table("Validation accuracy", header, rows)


def places(found: dict[tuple[str, str], list[Outcome]]) -> Table:
    """Where our seconds went, by the ledger of the runs; `start` has the imports, `evaluation` and `finish` the end."""
    rows = []
    for (label, side), outcomes in found.items():
        if side == PLAIN:
            continue
        spent = {place: [o.places[place] for o in outcomes] for place in outcomes[0].places}
        told = [f"{place} {spread(seconds, '{:.1f}')}" for place, seconds in spent.items() if max(seconds) >= 0.05]
        rows.append([label, side, ", ".join(told)])
    title = (
        "Seconds by place in our ledger (`start` also has the imports, `evaluation` and `finish` what follows training)"
    )
    return Table(title, ["augmentation", "side", "seconds: median (range)"], rows)


def main() -> None:
    asked = arguments_of(__doc__).parse_args()
    out = folder_for(asked)
    for result in measure(asked):
        keep(result, out)


if __name__ == "__main__":
    main()
