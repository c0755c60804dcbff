"""Measure training on one GPU within ten minutes, and write gpu.json and gpu.md.

    python -m benchmarks.gpu --out FOLDER
    python -m benchmarks.gpu --only MobileNetV2 resume --budget 300
    python -m benchmarks.gpu --small                                    # on a CPU, to see that it runs

Each measurement runs in a separate process, the most important one first. A measurement that has not ended after
--budget seconds is reported as not measured. "ours" is the training step of a run with `runtime=gpu`; "keras" is `fit`
with the same network, layers, precision and batch size, with `jit_compile=True`, and without determinism.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu_step import Settings
from benchmarks.photos import write_photos
from benchmarks.processes import ROOT
from benchmarks.results import describe_machine

IMAGE_SIZES = {"MobileNetV2": 224, "EfficientNetB0": 224, "ResNet50": 224, "Xception": 299}
RESUME = "resume"  # name of the measurement of a run that is killed and resumed
LIMIT_SECONDS = 200.0  # maximum duration of a measurement
KILL_AT, CHECKPOINT_EVERY, STEPS = 6, 4, 12  # steps of the run that is killed: at the kill, per checkpoint, in all
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "TF_CPP_MIN_LOG_LEVEL": "2"}


def list_step_settings(options: argparse.Namespace, photos: Path) -> list[Settings]:
    """List the measurements of training steps, the most important ones first."""
    side = {name: 96 if options.small else size for name, size in IMAGE_SIZES.items()}
    batch, seconds = (4, 0.1) if options.small else (options.batch, 4.0)
    chosen = [name for name in IMAGE_SIZES if name in options.only]
    settings = [
        Settings(implementation, name, side[name], batch, "all", seconds,
                 str(photos) if implementation == "ours" and name == chosen[0] else None)
        for name in chosen for implementation in ("ours", "keras")
    ]  # fmt: skip
    return settings + [
        Settings(implementation, name, side[name], batch, "none", seconds)
        for name in chosen for implementation in ("ours", "keras")
    ]  # fmt: skip


def measure_step(settings: Settings, limit: float) -> dict[str, Any]:
    """Run one measurement. If it fails or takes more than `limit` seconds, the result has the key `not_measured`."""
    command = [sys.executable, "-m", "benchmarks.gpu_step", json.dumps(asdict(settings))]
    try:
        process = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"not_measured": f"did not end within {limit:.0f} s"}
    if process.returncode:
        return {"not_measured": (process.stderr.strip().splitlines() or ["no output"])[-1][:300]}
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return result


def run_trainer_until(overrides: Sequence[str], deadline: float, kill_at: int | None = None) -> float:
    """Run `python -m trainer`, and return the seconds to its first step. Kill it with SIGKILL at step `kill_at`.

    Raises TimeoutError if the process is still running at the time.time() `deadline`, and RuntimeError if it fails.
    """
    started_at, first_step_seconds, last_line = time.time(), None, ""
    command = [sys.executable, "-m", "trainer", *overrides]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=errors, text=True)
        timer = threading.Timer(max(deadline - started_at, 1), process.kill)
        timer.start()
        try:
            for line in process.stdout or ():
                last_line, entry = line, json.loads(line)
                if "loss" not in entry:
                    continue
                first_step_seconds = first_step_seconds or time.time() - started_at
                if kill_at and entry["step"] >= kill_at:
                    process.kill()
                    break
            process.wait()
            if time.time() >= deadline:
                raise TimeoutError
            if first_step_seconds is None or (process.returncode and not kill_at):
                errors.seek(0)
                raise RuntimeError((errors.read().strip() or last_line)[-300:])
        finally:
            process.kill()
            process.wait()
            timer.cancel()
    return first_step_seconds


def read_checkpoint(run: Path) -> dict[str, np.ndarray]:
    """Read the variables of a run's newest checkpoint, by name."""
    name = (run / "checkpoints" / "LATEST").read_text().split()[0]
    with np.load(run / "checkpoints" / name / "variables.npz") as arrays:
        return {key: arrays[key] for key in arrays.files}


def measure_resume(options: argparse.Namespace, photos: Path, scratch: Path, deadline: float) -> dict[str, Any]:
    """Compare an uninterrupted run with one that is killed and resumed: time to the first step, and final variables."""
    side, batch = (96, 4) if options.small else (224, 32)
    overrides = (
        "data=image_folder", f"data.root={photos}", "data.validation_fraction=0.2", "model.weights=none",
        f"model.image_size={side}", "phases=end_to_end", "phases.all.epochs=null", f"phases.all.steps={STEPS}",
        f"training.batch_size={batch}", "runtime=gpu", f"runtime.xla={str(not options.small).lower()}",
        "runtime.log_every=1 steps", f"runtime.checkpoint_every={CHECKPOINT_EVERY} steps",
        "runtime.log_format=json", "runtime.progress=lines", "export.formats=[]",
    )  # fmt: skip

    def run_in(name: str, kill_at: int | None = None) -> float:
        folders = (
            f"output_dir={scratch / name}",
            f"runtime.cache_dir={scratch / f'cache of {name}'.replace(' ', '_')}",
        )
        return run_trainer_until((*overrides, *folders), deadline, kill_at)

    try:
        cold = run_in("whole")
        run_in("killed", KILL_AT)
        restarted = run_in("killed")
    except TimeoutError:
        return {"not_measured": "the runs did not end in time"}
    except (RuntimeError, ValueError) as error:
        return {"not_measured": str(error)}
    uninterrupted, resumed = read_checkpoint(scratch / "whole"), read_checkpoint(scratch / "killed")
    equal = uninterrupted.keys() == resumed.keys() and all(
        np.array_equal(uninterrupted[key], resumed[key]) for key in uninterrupted
    )
    return {"first_step_cold": cold, "first_step_restarted": restarted, "bit_equal": equal}


def format_table(results: dict[str, Any]) -> str:
    """Format the results as a page of Markdown."""
    steps = [(Settings(**row["settings"]), row["result"]) for row in results["steps"]]
    devices = [result["device"] for _, result in steps if "device" in result]
    lines = [f"# {devices[0]['name'] or 'CPU' if devices else 'no device'}", "", results["machine"], ""]
    lines += ["| network | trained | by | images/s | first call, s | peak memory, GB | XLA | precision |",
              "| --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for settings, result in steps:
        name = f"| {settings.backbone}, {settings.side} px, batch {settings.batch} | {settings.thaw} "
        name += f"| {settings.implementation} "
        if "not_measured" in result:
            lines.append(f"{name}| not measured: {result['not_measured']} | | | | |")
            continue
        peak = f"{result['peak_memory'] / 1e9:.1f}" if result["peak_memory"] else ""
        xla = "on" if result["xla"] else "off"
        lines.append(f"{name}| {result['images_per_second']:,.0f} | {result['first_call']:.1f} | {peak} | {xla} "
                     f"| {result['precision']} |")  # fmt: skip
    lines += ["", "| fed by the pipeline | fraction of the bare step |", "| --- | --- |"]
    lines += [f"| {s.backbone}, {kind} | {value:.2f} |" for s, r in steps for kind, value in r.get("fed", {}).items()]
    if resume := results[RESUME]:
        lines += ["", "| a run killed with SIGKILL and resumed | |", "| --- | --- |"]
        lines += [f"| {name.replace('_', ' ')} | {value if isinstance(value, bool | str) else f'{value:.1f} s'} |"
                  for name, value in resume.items()]  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run all measurements within the budget, and write gpu.json and gpu.md after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = (*IMAGE_SIZES, RESUME)
    parser.add_argument(
        "--only", nargs="+", choices=choices, default=choices, help="networks, and the run that is resumed"
    )
    parser.add_argument("--batch", type=int, default=256, help="images per step")
    parser.add_argument("--budget", type=float, default=570.0, help="seconds of all measurements")
    parser.add_argument("--small", action="store_true", help="small images and batches, without XLA")
    parser.add_argument("--out", type=Path, help="folder of gpu.json and gpu.md; default: a new one")
    options = parser.parse_args()
    out, deadline = options.out or Path(tempfile.mkdtemp(prefix="kubetune-benchmarks-")), time.time() + options.budget
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": describe_machine(), "steps": [], RESUME: {}}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        photos = write_photos(scratch / "photos", 80 if options.small else 1_000, classes=5)

        def save(what: str, result: dict[str, Any]) -> None:
            print(f"{what}: {json.dumps(result)}", flush=True)
            (out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
            (out / "gpu.md").write_text(format_table(results))

        for number, settings in enumerate(list_step_settings(options, photos)):
            if number == 2 and RESUME in options.only:  # after the first network
                results[RESUME] = measure_resume(options, photos, scratch, deadline)
                save(RESUME, results[RESUME])
            left = deadline - time.time()
            result = measure_step(settings, min(left, LIMIT_SECONDS)) if left > 1 else {"not_measured": "no time left"}
            results["steps"].append({"settings": asdict(settings), "result": result})
            save(f"{settings.backbone} {settings.thaw} {settings.implementation}", result)
        if not results["steps"]:
            results[RESUME] = measure_resume(options, photos, scratch, deadline)
            save(RESUME, results[RESUME])
    print(f"\n{(out / 'gpu.md').read_text()}\n{out}")


if __name__ == "__main__":
    main()
