"""The whole flowers recipe, five epochs of the head and five from layer 100 on: three peers in plain Keras, and ours.

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

from benchmarks.arguments import argument_parser, command_of, describe_data, describe_model, output_folder, photos
from benchmarks.photos import count_of, link_fold
from benchmarks.processes import Completed, in_turns, run, train
from benchmarks.results import Comparison, Result, Table, save, spread
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
    """One run of either side."""

    seconds: float  # of training
    epochs: dict[str, list[float]]  # phase -> seconds of every epoch but its first
    accuracy: dict[str, float]  # phase -> validation accuracy after its last epoch
    breakdown: dict[str, float]  # our time breakdown, seconds per category
    process: Completed


def plain(split: Path, options: argparse.Namespace, augmentation: str, seed: int, peer: str) -> Outcome:
    flags = ["--augment"] if augmentation != "none" else []
    model = ["--weights", str(options.weights), "--alpha", str(options.alpha)]
    ended = run("-m", "benchmarks.plain_keras", str(split), "--peer", peer, *model, "--seed", str(seed), *flags)
    result: dict[str, Any] = json.loads(ended.output.splitlines()[-1])
    last = {phase: values[-1] for phase, values in result["val_accuracy"].items()}
    return Outcome(result["seconds"], result["epochs"], last, {}, ended)


def ours(
    split: Path, options: argparse.Namespace, augmentation: str, seed: int, extra: Sequence[str], scratch: Path
) -> Outcome:
    done = train(
        [
            "experiment=flowers_mobilenet_v2",
            "data=image_folder",
            f"data.root={split}",
            f"model.weights={options.weights}",
            f"model.alpha={options.alpha}",
            f"augmentation={augmentation}",
            f"seed={seed}",
            "training.keep=last",
            *extra,
        ],
        scratch,
        exports=True,
    )
    epochs, accuracy = {}, {}
    for phase in PHASES:
        own = [line for line in done.epochs if line["phase"] == phase]
        epochs[phase] = [b["at"] - a["at"] for a, b in pairwise(own)]
        accuracy[phase] = own[-1]["val_accuracy"]
    return Outcome(done.training, epochs, accuracy, done.breakdown, done.process)


def measure(options: argparse.Namespace) -> list[Result]:
    """Results of the recipe: time, and memory."""
    rounds = options.rounds or 3
    peers = [name for name, peer in PEERS.items() if peer in options.peers]
    runs_of: dict[tuple[str, str], list[Outcome]] = {}
    with photos(options) as root, tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        splits = [link_fold(root, scratch / f"fold-{turn}", turn) for turn in range(rounds)]
        examples = [count_of(split / "validation") for split in splits]
        for label, augmentation in AUGMENTATIONS.items():
            for turn, side in in_turns([*peers, *OURS[label]], rounds):
                outcome = (
                    plain(splits[turn], options, augmentation, turn + 1, PEERS[side])
                    if side in PEERS
                    else ours(splits[turn], options, augmentation, turn + 1, OURS[label][side], scratch)
                )
                runs_of.setdefault((label, side), []).append(outcome)
                accuracy = outcome.accuracy["fine_tune"]
                whole, training = outcome.process.seconds, outcome.seconds
                print(f"{label}, {side}, seed {turn + 1}: {whole:.1f} s, {training:.1f} s, {accuracy:.3f}", flush=True)
        values = {"data": describe_data(options, root), "model": describe_model(options), "rounds": rounds}
    how, alpha = HOW.replace("\n", " ").format(**values), f"{options.alpha:g}"
    recipe = Result(
        name=f"recipe-alpha-{alpha}",
        title=f"Whole recipe, MobileNetV2 of width {alpha}",
        how=how,
        command=command_of("recipe", options, rounds),
        comparisons=[
            c
            for label in AUGMENTATIONS
            for side in OURS[label]
            for peer in peers
            for c in comparisons(runs_of, label, side, peer)
        ],
        tables=[accuracies(runs_of, examples), time_breakdowns(runs_of)],
    )
    memory = Result(
        name=f"recipe-memory-alpha-{alpha}",
        title=f"Memory of the whole recipe, MobileNetV2 of width {alpha}",
        how="The peak resident memory of the processes of the row above, imports and report included.",
        command=command_of("recipe", options, rounds),
        comparisons=[
            Comparison(f"{label}, {side}", peer, "MB", peaks(runs_of[label, side]), peaks(runs_of[label, peer]))
            for label in AUGMENTATIONS
            for side in OURS[label]
            for peer in peers
        ],
    )
    return [recipe, memory]


def peaks(outcomes: Sequence[Outcome]) -> list[float]:
    return [outcome.process.peak_mb for outcome in outcomes]


def comparisons(runs_of: dict[tuple[str, str], list[Outcome]], label: str, side: str, peer: str) -> list[Comparison]:
    """Time of the whole process, of training, and per epoch of each phase, against one peer."""
    mine, other = runs_of[label, side], runs_of[label, peer]
    whole = [[o.process.seconds for o in outcomes] for outcomes in (mine, other)]
    training = [[o.seconds for o in outcomes] for outcomes in (mine, other)]
    rows = [
        Comparison(f"{label}, {side}: {WHOLE}", peer, "s", *whole),
        Comparison(f"{label}, {side}: training", peer, "s", *training),
    ]
    for phase, name in PHASES.items():
        each = [[statistics.median(o.epochs[phase]) for o in outcomes] for outcomes in (mine, other)]
        rows.append(Comparison(f"{label}, {side}: per epoch, {name}", peer, "s", *each))
    return rows


def accuracies(runs_of: dict[tuple[str, str], list[Outcome]], examples: Sequence[int]) -> Table:
    """Validation accuracy after each phase, over all seeds, with Wilson's interval: the folds are disjoint."""
    rows = []
    for (label, side), outcomes in runs_of.items():
        for phase, name in PHASES.items():
            each = [outcome.accuracy[phase] for outcome in outcomes]
            n = sum(examples)
            right = round(sum(accuracy * count for accuracy, count in zip(each, examples, strict=True)))
            low, high = compute_wilson_interval(right, n)
            seeds = ", ".join(f"{value:.3f}" for value in each)
            rows.append([label, side, name, f"{right / n:.3f}", f"{low:.3f} to {high:.3f}", str(n), seeds])
    header = ["augmentation", "side", "after", "accuracy", "95 % interval", "n", "each seed"]
    return Table("Validation accuracy", header, rows)


def time_breakdowns(runs_of: dict[tuple[str, str], list[Outcome]]) -> Table:
    """Time breakdown of our runs."""
    rows = []
    for (label, side), outcomes in runs_of.items():
        if side in PEERS:
            continue
        spent = {category: [o.breakdown[category] for o in outcomes] for category in outcomes[0].breakdown}
        cells = [f"{name} {spread(seconds, '{:.1f}')}" for name, seconds in spent.items() if max(seconds) >= 0.05]
        rows.append([label, side, ", ".join(cells)])
    title = "Time breakdown of our runs (`start` includes the imports; `evaluation` and `finish` follow training)"
    return Table(title, ["augmentation", "side", "seconds: median (range)"], rows)


def main() -> None:
    options = argument_parser(__doc__).parse_args()
    out = output_folder(options)
    for result in measure(options):
        save(result, out)


if __name__ == "__main__":
    main()
