"""Scores of the recipes on given photos, with three seeds each, as a table for docs/recipes.md.

    python -m benchmarks.recipes --flowers photos --beans leaves --weights wide.h5 --small narrow.h5

`flowers` has class folders, `beans` {train,validation,test}/<class>; the weights are MobileNetV2's without its top, of
alpha 1.0 and 0.35. Accuracy is of the validation split for the flowers (a fifth, on which the weights are chosen) and
of the test split for the beans, over all seeds, with Wilson's 95 % interval for the number of examples of one seed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from trainer.evaluation.intervals import compute_wilson_interval

SEEDS = (1, 2, 3)


def score(output: Path, *overrides: str) -> tuple[int, int, float]:
    """Correct predictions, examples, and seconds of training of one run."""
    command = [sys.executable, "-m", "trainer", *overrides, f"output_dir={output}", "export.formats=[]"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = json.loads((output / "report" / "report.json").read_text())
    n = report["test"]["n"]
    return round(report["test"]["accuracy"] * n), n, report["timing"]["seconds"]["train"]


def unbalanced(flowers: Path, to: Path) -> Path:
    """Link the flowers with all but two classes reduced to a tenth for training; a fifth is for validation."""
    for number, folder in enumerate(sorted(path for path in flowers.iterdir() if path.is_dir())):
        files = sorted(folder.iterdir())
        fifth = len(files) // 5
        train = files[fifth:]
        train = train if number < 2 else train[: max(len(train) // 10, 1)]
        for split, chosen in (("validation", files[:fifth]), ("train", train)):
            (to / split / folder.name).mkdir(parents=True)
            for file in chosen:
                os.symlink(file.resolve(), to / split / folder.name / file.name)
    return to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("flowers", "beans", "weights", "small"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    wide, narrow = (f"model.weights={options.weights}",), (f"model.weights={options.small}", "model.alpha=0.35")
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        few = unbalanced(options.flowers.resolve(), scratch / "unbalanced")
        photos = ("experiment=flowers_mobilenet_v2", "data=image_folder", f"data.root={options.flowers}")
        leaves = ("data=image_folder", f"data.root={options.beans}", "model=mobilenet_v2", "model.image_size=224")
        skewed = (*photos[:2], f"data.root={few}", *narrow, "augmentation=none")
        teacher = scratch / "teacher"
        rows: dict[str, tuple[str, ...]] = {
            "flowers_mobilenet_v2, alpha 0.35, augmentation=none": (*photos, *narrow, "augmentation=none"),
            "flowers_mobilenet_v2, alpha 0.35": (*photos, *narrow),
            "flowers_mobilenet_v2, augmentation=none": (*photos, *wide, "augmentation=none"),
            "flowers_mobilenet_v2": (*photos, *wide),
            "flowers_mobilenet_v2_strong, alpha 0.35": ("experiment=flowers_mobilenet_v2_strong", *photos[1:], *narrow),
            "beans_xception with MobileNetV2 alpha 0.35": ("experiment=beans_xception", *leaves, *narrow),
            "beans_xception with MobileNetV2 alpha 0.35, phases.fine_tune.batch_norm=frozen": (
                "experiment=beans_xception", *leaves, *narrow, "phases.fine_tune.batch_norm=frozen"),
            "beans_inception_v3 with MobileNetV2 alpha 0.35": ("experiment=beans_inception_v3", *leaves, *narrow),
            "unbalanced flowers, alpha 0.35": skewed,
            "unbalanced flowers, alpha 0.35, training.class_weights=balanced": (
                *skewed, "training.class_weights=balanced"),
            "alpha 0.35 taught by 1.0, augmentation=none": (
                *photos, *narrow, "augmentation=none", f"distillation.teacher={teacher}", "distillation.alpha=0.1"),
        }  # fmt: skip
        print("| run | accuracy | n | 95 % interval | each seed | seconds of training |")
        print("| --- | --- | --- | --- | --- | --- |")
        for name, overrides in rows.items():
            if options.only not in name:
                continue
            scores = []
            for seed in SEEDS:
                if str(teacher) in " ".join(overrides):
                    shutil.rmtree(teacher, ignore_errors=True)
                    score(teacher, *photos, *wide, "augmentation=none", f"seed={seed}")
                scores.append(score(scratch / f"{len(name)}-{seed}-{abs(hash(name))}", *overrides, f"seed={seed}"))
            right, n = sum(f[0] for f in scores), sum(f[1] for f in scores)
            low, high = compute_wilson_interval(round(right / len(SEEDS)), n // len(SEEDS))
            each = ", ".join(f"{f[0] / f[1]:.3f}" for f in scores)
            print(f"| {name} | {right / n:.3f} | {n // len(SEEDS)} | {low:.3f} to {high:.3f} | {each} | "
                  f"{sum(f[2] for f in scores) / len(scores):.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
