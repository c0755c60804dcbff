"""Compare two workers on one core each with one worker on two cores, and measure virtual replicas and preemption.

    python -m benchmarks.workers                 all three measurements
    python -m benchmarks.workers --rounds 3 --minutes 5
    python -m benchmarks.workers --only virtual --rounds 3

The runs train on the built-in digits. Workers are processes with CPU affinity, connected by loopback, so the cost of a
network between hosts is not included (`python -m benchmarks.scaling` estimates it).
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

BATCH_SIZE = 64
PREEMPTION_SECONDS = 60.0
SIZES = {"glyphs, 48 px": ["model=glyphs_mobilenet_v2"], "alpha 0.35, 128 px": [
    "model=mobilenet_v2", "model.alpha=0.35", "model.image_size=128", "model.weights=none"]}  # fmt: skip
NETWORKS = {"MobileNetV2, 96 px": ["model=mobilenet_v2", "model.image_size=96"],
            "ResNet50, 64 px": ["model=resnet50", "model.image_size=64"]}  # fmt: skip
NUM_VIRTUAL_REPLICAS, VIRTUAL_REPLICAS_BATCH_SIZE = 4, 16


def start_workers(
    folder: Path, workers: int, cores: list[set[int]], overrides: list[str]
) -> list[subprocess.Popen[bytes]]:
    """Start the workers of a run in `folder`, worker i on the cores `cores[i]`."""
    addresses = [f"127.0.0.1:{port}" for port in free_ports(workers)]
    processes = []
    for index in range(workers):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        environment = {**os.environ, **({"TF_CONFIG": json.dumps(task)} if workers > 1 else {})}
        command = [sys.executable, "-m", "trainer", "data=digits", f"training.batch_size={BATCH_SIZE}",
                   "augmentation=none", "phases=end_to_end", "runtime.progress=lines", "export.formats=[]",
                   f"output_dir={folder}", *overrides]  # fmt: skip
        with open(folder.parent / f"{folder.name}-{index}.log", "a") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        os.sched_setaffinity(process.pid, cores[index])
        processes.append(process)
    return processes


def read_images_per_second(folder: Path) -> float:
    """Read a run's images/s in training steps from its report."""
    return json.loads((folder / "report" / "report.json").read_text())["timing"]["images_per_second"]


def compare_worker_counts(scratch: Path, rounds: int) -> None:
    """Print the ratio of the images/s of two workers to those of one worker, per round."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    for name, model in SIZES.items():
        ratios = []
        for round_index in range(rounds):
            rates = []
            for workers in (1, 2):
                folder = scratch / f"{name[:5]}-{round_index}-{workers}"
                cores_by_worker = [set(cores)] if workers == 1 else [{cores[0]}, {cores[1]}]
                overrides = [*model, "phases.all.epochs=null", "phases.all.steps=120"]
                if any(p.wait() for p in start_workers(folder, workers, cores_by_worker, overrides)):
                    sys.exit((scratch / f"{folder.name}-0.log").read_text())
                rates.append(read_images_per_second(folder))
            ratios.append(rates[1] / rates[0])
            print(
                f"{name}: 1 worker x 2 cores {rates[0]:,.0f} images/s, 2 workers x 1 core {rates[1]:,.0f}", flush=True
            )
        print(f"{name}: ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
              f"{rounds} rounds, batch {BATCH_SIZE})", flush=True)  # fmt: skip


def compare_virtual_replicas(scratch: Path, rounds: int) -> None:
    """Print the ratio of the images/s with virtual replicas to those without, per round, on 1, 2 and 4 workers."""
    cores = set(sorted(os.sched_getaffinity(0))[:2])
    steps = [
        "phases.all.epochs=null",
        "phases.all.steps=20",
        "model.weights=none",
        f"training.batch_size={VIRTUAL_REPLICAS_BATCH_SIZE}",
    ]
    for (name, model), workers in itertools.product(NETWORKS.items(), (1, 2, 4)):
        ratios, rates = [], [0.0, 0.0]
        for round_index in range(rounds):
            for num_virtual in (0, NUM_VIRTUAL_REPLICAS):
                folder = scratch / f"{name[:5]}-{round_index}-{workers}-{num_virtual}"
                overrides = [*model, *steps, *([f"training.virtual_replicas={num_virtual}"] if num_virtual else [])]
                if any(p.wait() for p in start_workers(folder, workers, [cores] * workers, overrides)):
                    sys.exit((scratch / f"{folder.name}-0.log").read_text())
                rates[bool(num_virtual)] = read_images_per_second(folder)
            ratios.append(rates[1] / rates[0])
        print(f"{name}, {workers} workers: {rates[1]:.1f} images/s with {NUM_VIRTUAL_REPLICAS} virtual replicas, "
              f"{rates[0]:.1f} without; ratio {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}, "
              f"{rounds} rounds, batch {VIRTUAL_REPLICAS_BATCH_SIZE})", flush=True)  # fmt: skip


def measure_goodput(scratch: Path, minutes: float) -> None:
    """Print the goodput of a run of two workers with a SIGTERM to one of them every minute."""
    folder, cores, num_preemptions = scratch / "preempted", sorted(os.sched_getaffinity(0)), 0
    overrides = [*SIZES["alpha 0.35, 128 px"], "phases.all.epochs=10000"]
    deadline = time.monotonic() + minutes * 60
    while time.monotonic() < deadline:
        workers = start_workers(folder, 2, [set(cores)] * 2, overrides)
        time.sleep(PREEMPTION_SECONDS)
        workers[num_preemptions % 2].send_signal(signal.SIGTERM)
        num_preemptions += 1
        codes = [w.wait() for w in workers]
        if codes != [75, 75]:
            sys.exit(f"exit codes {codes}: {(scratch / 'preempted-0.log').read_text()[-2000:]}")
    seconds = json.loads((folder / "ledger.json").read_text())["seconds"]
    total_seconds = sum(seconds.values())
    other_categories = ", ".join(
        f"{name} {spent / total_seconds:.0%}" for name, spent in seconds.items() if name != "train"
    )
    goodput = f"{seconds['train'] / total_seconds:.0%}"
    print(
        f"goodput with a SIGTERM per minute ({num_preemptions} of them, {total_seconds:.0f} s): {goodput}; "
        f"the rest: {other_categories}"
    )


def main() -> None:
    """Run the measurements. The first ones may be slower, because caches are empty."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--only", choices=["cores", "virtual", "preemption"], help="one measurement, by default all")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if options.only in (None, "cores"):
            compare_worker_counts(Path(scratch), options.rounds)
        if options.only in (None, "virtual"):
            compare_virtual_replicas(Path(scratch), options.rounds)
        if options.only in (None, "preemption"):
            measure_goodput(Path(scratch), options.minutes)


if __name__ == "__main__":
    main()
