"""Two workers with one core each against one worker with two cores, virtual replicas, and goodput under preemption.

    python -m benchmarks.workers                 all
    python -m benchmarks.workers --rounds 3 --minutes 5
    python -m benchmarks.workers --only virtual --rounds 3

Runs of the command line on the built-in digits. Workers are processes with CPU affinity, connected by loopback: the
cost of a network between hosts is not included (`python -m benchmarks.scaling` estimates it).
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.same_bits import free_ports

BATCH = 64
PREEMPTION_SECONDS = 60.0
SIZES = {"glyphs, 48 px": ["model=glyphs_mobilenet_v2"], "alpha 0.35, 128 px": [
    "model=mobilenet_v2", "model.alpha=0.35", "model.image_size=128", "model.weights=none"]}  # fmt: skip
NETWORKS = {"MobileNetV2, 96 px": ["model=mobilenet_v2", "model.image_size=96"],
            "ResNet50, 64 px": ["model=resnet50", "model.image_size=64"]}  # fmt: skip
PARTS, BATCH_OF_PARTS = 4, 16


def start(folder: Path, workers: int, cores: list[set[int]], overrides: list[str]) -> list[subprocess.Popen[bytes]]:
    """Start the workers of one run, each on its cores."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    processes = []
    for index in range(workers):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, **({"TF_CONFIG": json.dumps(task)} if workers > 1 else {})}
        command = [sys.executable, "-m", "trainer", "data=digits", f"training.batch_size={BATCH}",
                   "augmentation=none", "phases=end_to_end", "runtime.progress=lines", "export.formats=[]",
                   f"output_dir={folder}", *overrides]  # fmt: skip
        with open(folder.parent / f"{folder.name}-{index}.log", "a") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        os.sched_setaffinity(process.pid, cores[index])
        processes.append(process)
    return processes


def images_per_second(folder: Path) -> float:
    """Images/s of the steps alone, from the report."""
    return json.loads((folder / "report" / "report.json").read_text())["timing"]["images_per_second"]


def compare(scratch: Path, rounds: int) -> None:
    """Print the ratio of images/s, paired by round."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    for name, model in SIZES.items():
        ratios = []
        for turn in range(rounds):
            rates = []
            for workers in (1, 2):
                folder = scratch / f"{name[:5]}-{turn}-{workers}"
                own = [set(cores)] if workers == 1 else [{cores[0]}, {cores[1]}]
                overrides = [*model, "phases.all.epochs=null", "phases.all.steps=120"]
                if any(p.wait() for p in start(folder, workers, own, overrides)):
                    sys.exit((scratch / f"{folder.name}-0.log").read_text())
                rates.append(images_per_second(folder))
            ratios.append(rates[1] / rates[0])
            print(
                f"{name}: 1 worker x 2 cores {rates[0]:,.0f} images/s, 2 workers x 1 core {rates[1]:,.0f}", flush=True
            )
        print(f"{name}: ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
              f"{rounds} rounds, batch {BATCH})", flush=True)  # fmt: skip


def divide(scratch: Path, rounds: int) -> None:
    """Print the ratio of images/s with virtual replicas to that without, on 1, 2 and 4 workers, paired by round."""
    cores = set(sorted(os.sched_getaffinity(0))[:2])
    steps = [
        "phases.all.epochs=null",
        "phases.all.steps=20",
        "model.weights=none",
        f"training.batch_size={BATCH_OF_PARTS}",
    ]
    for (name, model), workers in itertools.product(NETWORKS.items(), (1, 2, 4)):
        ratios, rates = [], [0.0, 0.0]
        for turn in range(rounds):
            for parts in (0, PARTS):
                folder = scratch / f"{name[:5]}-{turn}-{workers}-{parts}"
                overrides = [*model, *steps, *([f"training.virtual_replicas={parts}"] if parts else [])]
                if any(p.wait() for p in start(folder, workers, [cores] * workers, overrides)):
                    sys.exit((scratch / f"{folder.name}-0.log").read_text())
                rates[bool(parts)] = images_per_second(folder)
            ratios.append(rates[1] / rates[0])
        print(f"{name}, {workers} workers: {rates[1]:.1f} images/s with {PARTS} virtual replicas, {rates[0]:.1f} "
              f"without; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, {rounds} "
              f"rounds, batch {BATCH_OF_PARTS})", flush=True)  # fmt: skip


def preempt(scratch: Path, minutes: float) -> None:
    """Print the goodput of a run of two workers with a SIGTERM to one of them every minute."""
    folder, cores, turns = scratch / "preempted", sorted(os.sched_getaffinity(0)), 0
    overrides = [*SIZES["alpha 0.35, 128 px"], "phases.all.epochs=10000"]
    deadline = time.monotonic() + minutes * 60
    while time.monotonic() < deadline:
        workers = start(folder, 2, [set(cores)] * 2, overrides)
        time.sleep(PREEMPTION_SECONDS)
        workers[turns % 2].send_signal(signal.SIGTERM)
        turns += 1
        codes = [w.wait() for w in workers]
        if codes != [75, 75]:
            sys.exit(f"exit codes {codes}: {(scratch / 'preempted-0.log').read_text()[-2000:]}")
    seconds = json.loads((folder / "ledger.json").read_text())["seconds"]
    whole = sum(seconds.values())
    rest = ", ".join(f"{name} {spent / whole:.0%}" for name, spent in seconds.items() if name != "train")
    goodput = f"{seconds['train'] / whole:.0%}"
    print(f"goodput with a SIGTERM per minute ({turns} of them, {whole:.0f} s): {goodput}; the rest: {rest}")


def main() -> None:
    """Run the measurements; the first lines may be slower, while caches are empty."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--only", choices=["cores", "virtual", "preemption"], help="one measurement, by default all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.only in (None, "cores"):
            compare(Path(scratch), options.rounds)
        if options.only in (None, "virtual"):
            divide(Path(scratch), options.rounds)
        if options.only in (None, "preemption"):
            preempt(Path(scratch), options.minutes)


if __name__ == "__main__":
    main()
