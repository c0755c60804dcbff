"""Seconds from the start of the process to the end of the first step, compared with TensorFlow's import and tracing.

    python -m benchmarks.start_up --data FOLDER --weights FILE --alpha 0.35

The run is that of the recipe, with a head phase of one step. Times are read from the log lines of the run; tracing is
the category `compile` of the time breakdown, the first call of the step: tracing, and one step.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.arguments import argument_parser, command_of, describe_data, describe_model, output_folder, photos
from benchmarks.processes import TrainerRun, run, train
from benchmarks.results import Comparison, Result, Table, save, spread

IMPORT = "import time, tensorflow; print(time.time())"
# Beginnings of the two lines between which the time is measured, in the order of the log
STRETCHES = {
    "interpreter, configuration, imports": ("", "run: "),
    "opening the data": ("run: ", "data: "),
    "building the model": ("data: ", "model: "),
    "decoding the training images, the first weights": ("model: ", "phase head"),
    "tracing, the first step": ("phase head", "head  epoch 1  step 1"),
}
HOW = """Interleaved processes: `import tensorflow` alone, and a run of the recipe up to the end of its first step,
whose training images are decoded before it. {data}; {model}. The lower bound is the import of the same round and the
run's own first call (tracing and one step); the rest is everything else: other imports, configuration, opening and
decoding the photos, building the network, loading its weights."""


def stretches(done: TrainerRun) -> dict[str, float]:
    """Seconds of each stretch."""
    ends = {"": 0.0} | {start: done.at(start) for pair in STRETCHES.values() for start in pair if start}
    return {name: ends[end] - ends[start] for name, (start, end) in STRETCHES.items()}


def measure(options: argparse.Namespace) -> Result:
    rounds = options.rounds or 5
    alone, whole, first_call, parts = [], [], [], []
    with photos(options) as root, tempfile.TemporaryDirectory() as scratch:
        overrides = (
            "experiment=flowers_mobilenet_v2",
            "data=image_folder",
            f"data.root={root}",
            f"model.weights={options.weights}",
            f"model.alpha={options.alpha}",
            "augmentation=none",
            "~phases.fine_tune",
            "phases.head.epochs=null",
            "phases.head.steps=1",
            "runtime.log_every=1 steps",
        )
        for turn in range(rounds):
            imported = run("-c", IMPORT)
            alone.append(float(imported.output) - imported.began)
            done = train(overrides, Path(scratch))
            parts.append(stretches(done))
            whole.append(sum(parts[-1].values()))
            first_call.append(done.breakdown["compile"])
            print(f"round {turn + 1}: {whole[-1]:.2f} s, of them import of TensorFlow {alone[-1]:.2f}, "
                  f"first call {first_call[-1]:.2f}", flush=True)  # fmt: skip
        how = HOW.replace("\n", " ").format(data=describe_data(options, root), model=describe_model(options))
    floor = [a + b for a, b in zip(alone, first_call, strict=True)]
    rest = [a - b for a, b in zip(whole, floor, strict=True)]
    rows = [["`import tensorflow` alone", spread(alone)], ["first call, tracing and one step", spread(first_call)],
            ["the rest", spread(rest)]]  # fmt: skip
    rows += [[f"in the run: {name}", spread([part[name] for part in parts])] for name in STRETCHES]
    return Result(
        name=f"start-alpha-{options.alpha:g}",
        title=f"Start to first step, MobileNetV2 of width {options.alpha:g}",
        how=how,
        command=command_of("start", options, rounds),
        comparisons=[
            Comparison("process start to the end of step 1", "importing TensorFlow and tracing", "s", whole, floor)
        ],
        tables=[Table("Time breakdown", ["", "seconds: median (range)"], rows)],
    )


def main() -> None:
    options = argument_parser(__doc__).parse_args()
    save(measure(options), output_folder(options))


if __name__ == "__main__":
    main()
