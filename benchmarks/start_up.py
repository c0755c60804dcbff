"""Compare the time from a run's start to the end of its first step with the time to import TensorFlow and to trace.

    python -m benchmarks.start_up --data FOLDER --weights FILE --alpha 0.35

The run trains one step of the flowers recipe's head phase. Times are read from its log lines. The time to trace is the
category `compile` of the time breakdown: the first call of the step, which traces and runs it.
"""

import argparse
import tempfile
from pathlib import Path

from benchmarks.arguments import (
    choose_output_folder,
    describe_data,
    describe_model,
    format_command,
    make_argument_parser,
    open_photos,
)
from benchmarks.processes import FinishedRun, run_python, run_trainer
from benchmarks.results import Comparison, Result, Table, format_median_and_range, save_result

IMPORT = "import time, tensorflow; print(time.time())"
# Span of the start-up -> beginnings of the two log lines between which its time is measured, in the order of the log
SPANS = {
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


def measure_spans(finished_run: FinishedRun) -> dict[str, float]:
    """Return the seconds of each span in `SPANS`."""
    times = {"": 0.0} | {
        prefix: finished_run.get_time_of(prefix) for pair in SPANS.values() for prefix in pair if prefix
    }
    return {name: times[end] - times[prefix] for name, (prefix, end) in SPANS.items()}


def measure(options: argparse.Namespace) -> Result:
    """Measure the import of TensorFlow and the start-up of a run in interleaved rounds."""
    rounds = options.rounds or 5
    import_seconds, total_seconds, first_call, spans = [], [], [], []
    with open_photos(options) as root, tempfile.TemporaryDirectory() as scratch:
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
        for round_index in range(rounds):
            import_process = run_python("-c", IMPORT)
            import_seconds.append(float(import_process.output) - import_process.started_at)
            finished_run = run_trainer(overrides, Path(scratch))
            spans.append(measure_spans(finished_run))
            total_seconds.append(sum(spans[-1].values()))
            first_call.append(finished_run.breakdown["compile"])
            print(f"round {round_index + 1}: {total_seconds[-1]:.2f} s, of them import of TensorFlow "
                  f"{import_seconds[-1]:.2f}, first call {first_call[-1]:.2f}", flush=True)  # fmt: skip
        how = HOW.replace("\n", " ").format(data=describe_data(options, root), model=describe_model(options))
    lower_bounds = [a + b for a, b in zip(import_seconds, first_call, strict=True)]
    rest = [a - b for a, b in zip(total_seconds, lower_bounds, strict=True)]
    rows = [
        ["`import tensorflow` alone", format_median_and_range(import_seconds)],
        ["first call, tracing and one step", format_median_and_range(first_call)],
        ["the rest", format_median_and_range(rest)],
    ]
    rows += [[f"in the run: {name}", format_median_and_range([span[name] for span in spans])] for name in SPANS]
    return Result(
        name=f"start-alpha-{options.alpha:g}",
        title=f"Start to first step, MobileNetV2 of width {options.alpha:g}",
        how=how,
        command=format_command("start", options, rounds),
        comparisons=[
            Comparison(
                "process start to the end of step 1",
                "importing TensorFlow and tracing",
                "s",
                total_seconds,
                lower_bounds,
            )
        ],
        tables=[Table("Time breakdown", ["", "seconds: median (range)"], rows)],
    )


def main() -> None:
    """Measure the start-up, and save the result."""
    options = make_argument_parser(__doc__).parse_args()
    save_result(measure(options), choose_output_folder(options))


if __name__ == "__main__":
    main()
