"""Compare a run whose data and output are in a bucket with the same run on the local disk.

    python -m benchmarks.storage

The bucket is a fake-gcs-server on loopback, so that the client is measured and not a network. Prints the ratios per
round of the time until the first step, per epoch, and of the whole run. It also prints the seconds that checkpoints
stall training if each response of the bucket is delayed by a tenth of a second, with asynchronous uploads (as in runs)
and with synchronous ones.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.storage.emulator import environment, running
from tests.storage.faulty import faults
from trainer.storage.path import storage_path

RUN = ("experiment=quickstart", "data=tfds", "phases.head.epochs=1", "phases.fine_tune.epochs=6", "export.formats=[]",
       "runtime.checkpoint_every='10 steps'", "runtime.progress=lines")  # fmt: skip


TRAINER = ["-m", "trainer"]
SYNCHRONOUS_TRAINER = ["-c", """
from trainer.runs.publisher import Publisher
from trainer.__main__ import main
begin = Publisher.publish_checkpoints
Publisher.publish_checkpoints = lambda self: (begin(self), self.wait())
main()
"""]  # fmt: skip


def measure_run(data: str, output: str, cache: Path, program: list[str] = TRAINER) -> dict[str, float]:
    """Run the trainer. Return its time breakdown, and the seconds per epoch ("epoch") and in all ("whole")."""
    started_at = time.monotonic()
    command = [sys.executable, *program, *RUN, f"data.root={data}", f"output_dir={output}"]
    subprocess.run(command, check=True, env={**os.environ, "KUBETUNE_CACHE": str(cache)}, stdout=subprocess.DEVNULL)
    report = json.loads((storage_path(output) / "report" / "report.json").read_text())
    steps = sum(phase["epochs"] for phase in report["phases"].values())
    return {**report["timing"]["seconds"], "epoch": report["timing"]["seconds"]["train"] / steps,
            "whole": time.monotonic() - started_at}  # fmt: skip


def main() -> None:
    """Compare local files, a bucket with an empty cache, and a bucket with the cache of the first run; interleaved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        prepare = [sys.executable, "-m", "trainer.prepare", "data=digits", f"output={scratch}/digits", "data.shards=8"]
        subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
        runs: dict[str, list[dict[str, float]]] = {"local": [], "bucket, first": [], "bucket, again": []}
        stalls: dict[str, list[float]] = {"behind": [], "waited for": []}
        with running(scratch / "objects") as server:
            for file in (scratch / "digits").glob("[!.]*"):
                (storage_path("gs://bucket/digits") / file.name).upload(file)
            for round_index in range(rounds):
                bucket_cache = scratch / f"cache-{round_index}"
                runs["local"].append(
                    measure_run(f"{scratch}/digits", f"{scratch}/run-{round_index}", scratch / "local")
                )
                for name in ("bucket, first", "bucket, again"):
                    output = f"gs://bucket/runs/{round_index}-{name[8:]}"
                    runs[name].append(measure_run("gs://bucket/digits", output, bucket_cache))
                with faults(server.url, {"slow": 1.0}) as proxy, environment(proxy.url):
                    proxy.slow_seconds, proxy.instead = 0.1, "passed"
                    for name, program in (("behind", TRAINER), ("waited for", SYNCHRONOUS_TRAINER)):
                        output = f"gs://bucket/stalls/{round_index}-{name[:6]}"
                        stalls[name].append(
                            measure_run(f"{scratch}/digits", output, bucket_cache, program)["checkpoint"]
                        )
    for category in ("start", "epoch", "whole"):
        local = [run[category] for run in runs["local"]]
        for name in ("bucket, first", "bucket, again"):
            ratios = [run[category] / base for run, base in zip(runs[name], local, strict=True)]
            print(f"{category}: {name} / local {statistics.median(ratios):.2f} ({min(ratios):.2f} to "
                  f"{max(ratios):.2f}); local {statistics.median(local):.2f} s", flush=True)  # fmt: skip
    for name, seconds in stalls.items():
        print(f"checkpoints, uploaded {name}: {statistics.median(seconds):.2f} s of stall "
              f"({min(seconds):.2f} to {max(seconds):.2f})", flush=True)  # fmt: skip
    ratios = [a / b for a, b in zip(stalls["waited for"], stalls["behind"], strict=True)]
    print(f"stall waited for / behind: {statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
