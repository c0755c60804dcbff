"""Compare the results of the same small runs on two commits bit by bit, to check a refactoring.

    python scripts/same_bits.py BASE [HEAD] [--only CASE,...] [--folder FOLDER] [--jobs N]

BASE and HEAD are commits; HEAD defaults to the working tree. Every case runs from the command line, in a separate
process, from a copy of the commit, in the environment of this interpreter. The results of a commit are saved below
FOLDER and reused. Compared are every checkpoint (variables and state), metrics.jsonl, predictions.csv, report.json,
config.yaml, and the exported files that are a function of the weights, without values that depend on machine and time.
Prints "same bits" and exits with 0, or lists the differences and exits with 1.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 1800  # maximum seconds per process
# Keys of JSON values that depend on the machine and the time
IGNORED = {"timing", "seconds", "bytes", "train_seconds", "validation_seconds", "starts"}

TINY = (
    "experiment=quickstart", "debug.max_examples=90", "training.batch_size=16", "phases.head.epochs=2",
    "phases.fine_tune.epochs=2", "phases.fine_tune.thaw=from_block:block_13", "runtime.checkpoint_every='4 steps'",
    "runtime.log_every='4 steps'", "runtime.steps_per_call=3", "runtime.keep_checkpoints=9",
    "export.formats=[saved_model,tflite]", "runtime.cache_dir=cache",
)  # fmt: skip
LIVE = ("phases.head.features=live", "phases.fine_tune.features=live")

# Case -> its commands, run in sequence: a module and its arguments, or a number of workers and the arguments of a run.
# NEEDS has the cases whose results a case reads.
Command = tuple[str, ...]
CASES: dict[str, list[Command]] = {
    "quickstart": [("trainer", "output_dir=runs/quickstart", "runtime.cache_dir=cache")],
    "features": [("trainer", *TINY, "augmentation=none", "model.dropout=0.2", "output_dir=runs/features")],
    "live": [("trainer", *TINY, *LIVE, "augmentation=standard", "augmentation.mixup=0.2", "training.ema=0.9",
              "training.clip_norm=1", "training.class_weights=balanced", "training.loss=focal",
              "phases.fine_tune.batch_norm=train", "phases.fine_tune.layer_decay=0.9", "output_dir=runs/live")],
    "views": [("trainer", *TINY, "augmentation=light", "phases.head.augmented_views=2", "phases.head.epochs=3",
               "phases.fine_tune.early_stopping.patience=1", "data.cache=disk", "output_dir=runs/views")],
    "taught": [("trainer", *TINY, "augmentation=none", "distillation.teacher=runs/features",
                "distillation.temperature=2", "training.accumulate=2", "output_dir=runs/taught")],
    "taught_live": [("trainer", *TINY, *LIVE, "augmentation=light", "training.keep=last", "debug.max_steps=4",
                     "distillation.teacher=runs/features/export/saved_model/1", "output_dir=runs/taught_live")],
    "warm": [("trainer", *TINY, "warm_start=runs/features", "debug.max_steps=3", "output_dir=runs/warm")],
    # Without debug.max_examples, which overfitting does not read.
    "overfit": [("trainer", *(text for text in TINY if "max_examples" not in text), "debug.overfit=true",
                 "output_dir=runs/overfit")],
    "workers": [("2", *TINY, "training.batch_size=12", "augmentation=light", "training.ema=0.9",
                 "output_dir=runs/workers")],
    "workers_features": [("2", *TINY, "training.batch_size=12", "augmentation=none",
                          "output_dir=runs/workers_features")],
    "shards": [
        ("trainer.prepare", "data=digits", "output=prepared", "data.shards=6", "runtime.cache_dir=cache"),
        ("2", *TINY, *LIVE, "data=tfds", "data.root=prepared", "data.cache=none", "training.batch_size=12",
         "data.shuffle_window=32", "training.validation_share=0.5", "output_dir=runs/shards"),
    ],
    "evaluate": [
        ("trainer.evaluate", "run=runs/features", "output=runs/evaluate/test", "runtime.cache_dir=cache"),
        ("trainer.evaluate", "run=runs/live", "checkpoint=last", "split=train", "output=runs/evaluate/train"),
    ],
    "export": [("trainer.export", "run=runs/features", "formats=[saved_model,keras,tflite,tflite_int8]",
                "output=runs/export/export")],
}  # fmt: skip
NEEDS = {"taught": ["features"], "taught_live": ["features"], "warm": ["features"], "evaluate": ["features", "live"],
         "export": ["features"]}  # fmt: skip


def write_source_tree(commit: str | None, target: Path) -> None:
    """Write the files of a commit, or of the working tree if `commit` is None, to the folder `target`."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    if commit is not None:
        archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
        subprocess.run(["tar", "x"], cwd=target, input=archive, check=True)
        return
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def free_ports(count: int) -> list[int]:
    """Return ports that are unused on this machine."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_command(folder: Path, command: Command, log: Path) -> None:
    """Run a command of a case in `folder`, whose subfolder `checkout` has the code, and append its output to `log`."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "checkout"), "PYTHONHASHSEED": "0"}
    verb, *arguments = command
    if not verb.isdigit():
        programs = [([sys.executable, "-m", verb, *arguments], environment)]
    else:
        addresses = [f"127.0.0.1:{port}" for port in free_ports(int(verb))]
        programs = []
        for index in range(int(verb)):
            task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
            worker_arguments = [f"runtime.cache_dir=cache-{index}"] if index else []
            programs.append(([sys.executable, "-m", "trainer", *arguments, *worker_arguments],
                             environment | {"TF_CONFIG": json.dumps(task)}))  # fmt: skip
    with open(log, "a") as output:
        started = [
            subprocess.Popen(program, cwd=folder, env=env, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            for program, env in programs
        ]
        codes = [process.wait(TIMEOUT) for process in started]
    if any(codes):
        raise SystemExit(
            f"{' '.join(command)} ended with {codes} in {folder}; the end of {log}:\n{log.read_text()[-3000:]}"
        )


def run_missing_cases(folder: Path, cases: Sequence[str], jobs: int) -> None:
    """Run the cases that have no results in `folder` yet, `jobs` at a time, each after the cases in `NEEDS`."""

    def run_case(case: str) -> None:
        """Run the commands of a case, unless it has results."""
        done_marker, log = folder / f"{case}.done", folder / f"{case}.log"
        if done_marker.exists():
            return
        for path in (folder / "runs" / case, log):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        started_at = time.monotonic()
        for command in CASES[case]:
            run_command(folder, command, log)
        done_marker.touch()
        print(f"  {folder.name[:12]}  {case}: {time.monotonic() - started_at:.0f} s", flush=True)

    for cases_to_run in ([c for c in cases if c not in NEEDS], [c for c in cases if c in NEEDS]):
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(run_case, cases_to_run))


# ---------------------------------------------------------------------------------------------------------------
# Comparison


def remove_ignored_keys(value: Any) -> Any:
    """Return a JSON value without the keys in `IGNORED`."""
    if isinstance(value, dict):
        return {k: remove_ignored_keys(v) for k, v in value.items() if k not in IGNORED}
    return [remove_ignored_keys(v) for v in value] if isinstance(value, list) else value


def read_npz(path: Path) -> dict[str, bytes]:
    with np.load(path) as arrays:
        return {
            name: f"{arrays[name].dtype} {arrays[name].shape} ".encode() + arrays[name].tobytes() for name in arrays
        }


def read_json(path: Path) -> Any:
    return remove_ignored_keys(json.loads(path.read_text()))


def read_state(path: Path) -> Any:
    """A checkpoint's state without the digest of its teacher's files: a SavedModel's graph file is not reproducible."""
    return {key: value for key, value in read_json(path).items() if key != "teacher"}


def read_lines(path: Path) -> Any:
    return [remove_ignored_keys(json.loads(line)) for line in path.read_text().splitlines()]


READERS: dict[str, Callable[[Path], Any]] = {
    "checkpoints/*/variables.npz": read_npz,
    "checkpoints/*/state.json": read_state,
    "checkpoints/LATEST": Path.read_bytes,
    "checkpoints/BEST": Path.read_bytes,
    "config.yaml": Path.read_bytes,
    "metrics.jsonl": read_lines,
    "**/predictions.csv": Path.read_bytes,
    "**/report.json": read_json,
    "**/export.json": read_json,
    "**/reference.json": read_json,
    "**/labels.txt": Path.read_bytes,
    "**/*.tflite": Path.read_bytes,
    "**/variables/variables.data-*": Path.read_bytes,
}


def list_differences(first: Any, other: Any, location: str) -> list[str]:
    """List the differences between two JSON values. `location` names the values, such as a file name."""
    if isinstance(first, dict) and isinstance(other, dict):
        missing = [f"{location}: {key} is only in one" for key in sorted(first.keys() ^ other.keys())]
        common = first.keys() & other.keys()
        return missing + [d for key in common for d in list_differences(first[key], other[key], f"{location}: {key}")]
    if isinstance(first, list) and isinstance(other, list) and len(first) == len(other):
        return [
            d
            for i, pair in enumerate(zip(first, other, strict=True))
            for d in list_differences(*pair, f"{location}[{i}]")
        ]
    excerpts = [repr(value)[:60] for value in (first, other)]
    return [] if first == other else [f"{location}: {excerpts[0]} and {excerpts[1]}"]


def compare(base: Path, head: Path, case: str) -> tuple[int, list[str]]:
    """Compare the results of a case in two folders. Return the number of compared files, and the differences."""
    count, different = 0, []
    for pattern, read in READERS.items():
        names = [
            {p.relative_to(folder).as_posix() for p in (folder / "runs" / case).glob(pattern)}
            for folder in (base, head)
        ]
        different += [f"{name} is only in one of the two" for name in sorted(names[0] ^ names[1])]
        for name in sorted(names[0] & names[1]):
            count += 1
            different += list_differences(read(base / name), read(head / name), name)
    return count, different if count else [f"runs/{case}: has no files to compare"]


def main() -> None:
    """Parse the arguments, run the cases on both commits, and print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("head", nargs="?")
    parser.add_argument("--only", help=f"cases, separated by commas: {', '.join(CASES)}", default=",".join(CASES))
    parser.add_argument("--folder", type=Path, default=ROOT / "outputs" / "same_bits")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    selected = options.only.split(",")
    if unknown := [case for case in selected if case not in CASES]:
        parser.error(f"--only={unknown[0]}: is no case; use {', '.join(CASES)}")
    cases = [case for case in CASES if case in selected or any(case in NEEDS.get(s, ()) for s in selected)]
    folders = []
    for name in (options.base, options.head):
        commit = None
        if name is not None:
            command = ["git", "rev-parse", "--verify", f"{name}^{{commit}}"]
            commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        folder = options.folder.resolve() / (commit or "working-tree")
        if commit is None:
            shutil.rmtree(folder, ignore_errors=True)
        if not (folder / "checkout").is_dir():
            write_source_tree(commit, folder / "checkout")
        run_missing_cases(folder, cases, options.jobs)
        folders.append(folder)
    total, differing = 0, 0
    for case in cases:
        count, different = compare(*folders, case)
        total, differing = total + count, differing + len(different)
        print(f"{case}: {count} files, {'same bits' if not different else f'{len(different)} differences'}")
        for line in different[:20]:
            print(f"  {line}")
    print(f"not the same: {differing} differences" if differing else f"same bits: {total} files of {len(cases)} cases")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
