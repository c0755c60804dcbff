"""Compare whole runs of the flowers recipe (five epochs each of head and fine-tuning) with three peers in plain Keras.

    python -m benchmarks.whole_recipe --data FOLDER --weights FILE --alpha 1.0

The three peers are described in `benchmarks/plain_keras.py`. `make bench`, or `python -m benchmarks.page FOLDER` after
it, writes the table of README.md from the results of the widest network, if they have three seeds.

Each run is a separate process. All sides read the same {train,validation}/<class> folders of links; seed i validates
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

from benchmarks.arguments import (
    choose_output_folder,
    describe_data,
    describe_model,
    format_command,
    make_argument_parser,
    open_photos,
)
from benchmarks.photos import count_photos, link_fold
from benchmarks.processes import FinishedProcess, interleave, run_python, run_trainer
from benchmarks.results import Comparison, Result, Table, format_median_and_range, save_result
from trainer.evaluation.intervals import compute_wilson_interval

PEERS = {"Keras as in the notebook": "notebook", "Keras corrected": "corrected", "best plain Keras": "best"}
AUGMENTATIONS = {"no augmentation": "none", "flip, rotation, zoom": "standard"}
OURS: dict[str, dict[str, list[str]]] = {  # augmentation -> side -> additional arguments
    "no augmentation": {"ours": []},
    "flip, rotation, zoom": {"ours": [], "ours, 2 fixed views in the head": ["phases.head.augmented_views=2"]},
}
WHOLE = "whole process"
PHASES = {"head": "head", "fine_tune": "from layer 100"}
HOW = """One process per run, {rounds} seeds, interleaved. {data}; seed i validates on the i-th of five disjoint
folds, the same examples on both sides. {model}. The time of the whole process is from its start to its end. Ours
includes what the peers do not do: the score of the best weights, the report, SavedModel and TFLite, each loaded back
and scored; the peers end after their second `fit`. The time of training is from opening the data (TensorFlow is
imported) to the end of the second phase: decoding, features, building, tracing, training, validation and checkpoints.
The time per epoch is between the ends of two epochs, with validation and without the first epoch of a phase, which
compiles. Accuracy is that of the last epoch of a phase, with `training.keep=last` on our side. The peers are those of
`benchmarks/plain_keras.py`: `image_dataset_from_directory`, cache, shuffle, prefetch, the augmentation and
preprocessing layers in the graph, the backbone called with `training=False`. As in the notebook, Keras trains thawed
normalization nevertheless, another training than ours; in the two others the statistics are frozen, and gamma and
beta train, as in ours. The best one has no XLA and one call per epoch."""


@dataclass(frozen=True)
class Outcome:
    """The measurements of one run, of this package or of a peer."""

    seconds: float  # duration of the training
    epochs: dict[str, list[float]]  # phase -> seconds of each epoch except the first one
    accuracy: dict[str, float]  # phase -> validation accuracy after its last epoch
    breakdown: dict[str, float]  # this package's time breakdown, seconds by category; empty for a peer
    process: FinishedProcess


def run_keras(split: Path, options: argparse.Namespace, augmentation: str, seed: int, peer: str) -> Outcome:
    """Run a peer in plain Keras on the class folders in `split`."""
    flags = ["--augment"] if augmentation != "none" else []
    model = ["--weights", str(options.weights), "--alpha", str(options.alpha)]
    process = run_python(
        "-m", "benchmarks.plain_keras", str(split), "--peer", peer, *model, "--seed", str(seed), *flags
    )
    result: dict[str, Any] = json.loads(process.output.splitlines()[-1])
    last_accuracies = {phase: values[-1] for phase, values in result["val_accuracy"].items()}
    return Outcome(result["seconds"], result["epochs"], last_accuracies, {}, process)


def run_ours(
    split: Path,
    options: argparse.Namespace,
    augmentation: str,
    seed: int,
    extra_arguments: Sequence[str],
    scratch: Path,
) -> Outcome:
    """Run this package on the class folders in `split`, with `extra_arguments` arguments."""
    finished_run = run_trainer(
        [
            "experiment=flowers_mobilenet_v2",
            "data=image_folder",
            f"data.root={split}",
            f"model.weights={options.weights}",
            f"model.alpha={options.alpha}",
            f"augmentation={augmentation}",
            f"seed={seed}",
            "training.keep=last",
            *extra_arguments,
        ],
        scratch,
        exports=True,
    )
    epochs, accuracy = {}, {}
    for phase in PHASES:
        epoch_lines = [line for line in finished_run.epoch_lines if line["phase"] == phase]
        epochs[phase] = [b["at"] - a["at"] for a, b in pairwise(epoch_lines)]
        accuracy[phase] = epoch_lines[-1]["val_accuracy"]
    return Outcome(finished_run.training_seconds, epochs, accuracy, finished_run.breakdown, finished_run.process)


def measure(options: argparse.Namespace) -> list[Result]:
    """Run all sides in interleaved rounds. Return two results: the time, and the memory."""
    rounds = options.rounds or 3
    peers = [name for name, peer in PEERS.items() if peer in options.peers]
    outcomes_by_side: dict[tuple[str, str], list[Outcome]] = {}
    with open_photos(options) as root, tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        splits = [link_fold(root, scratch / f"fold-{round_index}", round_index) for round_index in range(rounds)]
        examples = [count_photos(split / "validation") for split in splits]
        for label, augmentation in AUGMENTATIONS.items():
            for round_index, side in interleave([*peers, *OURS[label]], rounds):
                outcome = (
                    run_keras(splits[round_index], options, augmentation, round_index + 1, PEERS[side])
                    if side in PEERS
                    else run_ours(
                        splits[round_index], options, augmentation, round_index + 1, OURS[label][side], scratch
                    )
                )
                outcomes_by_side.setdefault((label, side), []).append(outcome)
                accuracy = outcome.accuracy["fine_tune"]
                whole, training = outcome.process.seconds, outcome.seconds
                print(
                    f"{label}, {side}, seed {round_index + 1}: {whole:.1f} s, {training:.1f} s, {accuracy:.3f}",
                    flush=True,
                )
        values = {"data": describe_data(options, root), "model": describe_model(options), "rounds": rounds}
    how, alpha = HOW.replace("\n", " ").format(**values), f"{options.alpha:g}"
    recipe = Result(
        name=f"recipe-alpha-{alpha}",
        title=f"Whole recipe, MobileNetV2 of width {alpha}",
        how=how,
        command=format_command("recipe", options, rounds),
        comparisons=[
            comparison
            for label in AUGMENTATIONS
            for side in OURS[label]
            for peer in peers
            for comparison in compare_with_peer(outcomes_by_side, label, side, peer)
        ],
        tables=[tabulate_accuracies(outcomes_by_side, examples), tabulate_time_breakdowns(outcomes_by_side)],
    )
    memory = Result(
        name=f"recipe-memory-alpha-{alpha}",
        title=f"Memory of the whole recipe, MobileNetV2 of width {alpha}",
        how="The peak resident memory of the processes of the row above, imports and report included.",
        command=format_command("recipe", options, rounds),
        comparisons=[
            Comparison(
                f"{label}, {side}",
                peer,
                "MB",
                list_peak_mb(outcomes_by_side[label, side]),
                list_peak_mb(outcomes_by_side[label, peer]),
            )
            for label in AUGMENTATIONS
            for side in OURS[label]
            for peer in peers
        ],
    )
    return [recipe, memory]


def list_peak_mb(outcomes: Sequence[Outcome]) -> list[float]:
    """Return the peak resident memory of each run."""
    return [outcome.process.peak_mb for outcome in outcomes]


def compare_with_peer(
    outcomes_by_side: dict[tuple[str, str], list[Outcome]], label: str, side: str, peer: str
) -> list[Comparison]:
    """Compare the times of the whole process, of training, and per epoch of each phase with those of a peer."""
    our_outcomes, peer_outcomes = outcomes_by_side[label, side], outcomes_by_side[label, peer]
    whole = [[outcome.process.seconds for outcome in outcomes] for outcomes in (our_outcomes, peer_outcomes)]
    training = [[outcome.seconds for outcome in outcomes] for outcomes in (our_outcomes, peer_outcomes)]
    rows = [
        Comparison(f"{label}, {side}: {WHOLE}", peer, "s", *whole),
        Comparison(f"{label}, {side}: training", peer, "s", *training),
    ]
    for phase, name in PHASES.items():
        values = [
            [statistics.median(outcome.epochs[phase]) for outcome in outcomes]
            for outcomes in (our_outcomes, peer_outcomes)
        ]
        rows.append(Comparison(f"{label}, {side}: per epoch, {name}", peer, "s", *values))
    return rows


def tabulate_accuracies(outcomes_by_side: dict[tuple[str, str], list[Outcome]], examples: Sequence[int]) -> Table:
    """Tabulate the validation accuracy after each phase over all seeds, whose folds are disjoint, with its interval."""
    rows = []
    for (label, side), outcomes in outcomes_by_side.items():
        for phase, name in PHASES.items():
            values = [outcome.accuracy[phase] for outcome in outcomes]
            n = sum(examples)
            num_correct = round(sum(accuracy * count for accuracy, count in zip(values, examples, strict=True)))
            low, high = compute_wilson_interval(num_correct, n)
            seeds = ", ".join(f"{value:.3f}" for value in values)
            rows.append([label, side, name, f"{num_correct / n:.3f}", f"{low:.3f} to {high:.3f}", str(n), seeds])
    header = ["augmentation", "side", "after", "accuracy", "95 % interval", "n", "each seed"]
    return Table("Validation accuracy", header, rows)


def tabulate_time_breakdowns(outcomes_by_side: dict[tuple[str, str], list[Outcome]]) -> Table:
    """Tabulate the time breakdown of this package's runs."""
    rows = []
    for (label, side), outcomes in outcomes_by_side.items():
        if side in PEERS:
            continue
        seconds_by_category = {
            category: [outcome.breakdown[category] for outcome in outcomes] for category in outcomes[0].breakdown
        }
        cells = [
            f"{name} {format_median_and_range(seconds, '{:.1f}')}"
            for name, seconds in seconds_by_category.items()
            if max(seconds) >= 0.05
        ]
        rows.append([label, side, ", ".join(cells)])
    title = "Time breakdown of our runs (`start` includes the imports; `evaluation` and `finish` follow training)"
    return Table(title, ["augmentation", "side", "seconds: median (range)"], rows)


def main() -> None:
    """Measure the recipe, and save its two results."""
    options = make_argument_parser(__doc__).parse_args()
    out = choose_output_folder(options)
    for result in measure(options):
        save_result(result, out)


if __name__ == "__main__":
    main()
