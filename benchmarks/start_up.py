"""From the start of the process to the end of the first step, and what of it is TensorFlow's import and tracing.

    python -m benchmarks.start_up --data FOLDER --weights FILE --alpha 0.35

The run is that of the recipe, its head phase cut to one step. What happened when is read from the run's own log lines;
tracing is the ledger's `compile`, which is the first call of the step: tracing, and one step.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.asking import arguments_of, command_of, data_in_words, folder_for, model_in_words, photos
from benchmarks.processes import TrainerRun, run, train
from benchmarks.results import Comparison, Result, Table, keep, spread

IMPORT = "import time, tensorflow; print(time.time())"
# From the line that starts with the first to the one that starts with the second, in the order of the log
STRETCHES = {
    "interpreter, configuration, imports": ("", "run: "),
    "opening the data": ("run: ", "data: "),
    "building the model": ("data: ", "model: "),
    "decoding the training images, the first weights": ("model: ", "phase head"),
    "tracing, the first step": ("phase head", "head  epoch 1  step 1"),
}
HOW = """Processes in turns: `import tensorflow` alone, and a run of the recipe up to the end of its first step, whose
training images are decoded before it. {data}; {model}. The floor is the import of the same round and the run's own
first call (tracing and one step); the rest is everything else: other imports, configuration, opening and decoding the
photos, building the network, loading its weights."""


def stretches(done: TrainerRun) -> dict[str, float]:
    """Seconds between the lines."""
    ends = {"": 0.0} | {start: done.at(start) for pair in STRETCHES.values() for start in pair if start}
    return {name: ends[end] - ends[start] for name, (start, end) in STRETCHES.items()}


def measure(asked: argparse.Namespace) -> Result:
    rounds = asked.rounds or 5
    alone, whole, first_call, parts = [], [], [], []
    with photos(asked) as root, tempfile.TemporaryDirectory() as scratch:
        overrides = (
            "experiment=flowers_mobilenet_v2",
            "data=image_folder",
            f"data.root={root}",
            f"model.weights={asked.weights}",
            f"model.alpha={asked.alpha}",
            "augmentation=none",
            "~phases.fine_tune",
            "phases.head.epochs=null",
            "phases.head.steps=1",
            "runtime.log_every=1 steps",
        )
        for turn in range(rounds):
            imported = run("-c", IMPORT)
            alone.append(float(imported.said) - imported.began)
            done = train(overrides, Path(scratch))
            parts.append(stretches(done))
            whole.append(sum(parts[-1].values()))
            first_call.append(done.places["compile"])
            print(f"round {turn + 1}: {whole[-1]:.2f} s, of them import of TensorFlow {alone[-1]:.2f}, "
                  f"first call {first_call[-1]:.2f}", flush=True)  # fmt: skip
        how = HOW.replace("\n", " ").format(data=data_in_words(asked, root), model=model_in_words(asked))
    floor = [a + b for a, b in zip(alone, first_call, strict=True)]
    rest = [a - b for a, b in zip(whole, floor, strict=True)]
    rows = [["`import tensorflow` alone", spread(alone)], ["first call, tracing and one step", spread(first_call)],
            ["the rest", spread(rest)]]  # fmt: skip
    rows += [[f"in the run: {name}", spread([part[name] for part in parts])] for name in STRETCHES]
    return Result(
        name=f"start-alpha-{asked.alpha:g}",
        title=f"Start to first step, MobileNetV2 of width {asked.alpha:g}",
        how=how,
        command=command_of("start", asked, rounds),
        comparisons=[
            Comparison("process start to the end of step 1", "importing TensorFlow and tracing", "s", whole, floor)
        ],
        tables=[Table("Where the seconds go", ["", "seconds: median (range)"], rows)],
    )


def main() -> None:
    asked = arguments_of(__doc__).parse_args()
    keep(measure(asked), folder_for(asked))


if __name__ == "__main__":
    main()
