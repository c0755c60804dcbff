"""Score the recipes on given photos with three seeds each, and print a table for docs/recipes.md.

    python -m benchmarks.recipes --flowers photos --beans leaves --weights wide.h5 --small narrow.h5

--flowers has class folders, and --beans the folders {train,validation,test}/<class>. --weights and --small are weights
of MobileNetV2 without its top, with alpha 1.0 and 0.35. The accuracy over all seeds is that of the validation split for
the flowers (a fifth, on which the best epoch is chosen) and of the test split for the beans. Its interval is Wilson's
95 % interval for the number of examples of one seed.
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


def train_and_score(output: Path, *overrides: str) -> tuple[int, int, float]:
    """Run the trainer. Return the number of correct predictions, the number of examples, and the training seconds."""
    command = [sys.executable, "-m", "trainer", *overrides, f"output_dir={output}", "export.formats=[]"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    report = json.loads((output / "report" / "report.json").read_text())
    n = report["test"]["n"]
    return round(report["test"]["accuracy"] * n), n, report["timing"]["seconds"]["train"]


def link_unbalanced(flowers: Path, to: Path) -> Path:
    """Link the flowers as {train,validation}/<class>, with a tenth of the training photos for all but two classes.

    A fifth of each class is for validation. Return `to`.
    """
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
    """Train all recipes with all seeds, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("flowers", "beans", "weights", "small"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    options = parser.parse_args()
    wide, narrow = (f"model.weights={options.weights}",), (f"model.weights={options.small}", "model.alpha=0.35")
    with tempfile.TemporaryDirectory() as scratch_name:
        scratch = Path(scratch_name)
        unbalanced_folder = link_unbalanced(options.flowers.resolve(), scratch / "unbalanced")
        photos = ("experiment=flowers_mobilenet_v2", "data=image_folder", f"data.root={options.flowers}")
        leaves = ("data=image_folder", f"data.root={options.beans}", "model=mobilenet_v2", "model.image_size=224")
        unbalanced = (*photos[:2], f"data.root={unbalanced_folder}", *narrow, "augmentation=none")
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
            "unbalanced flowers, alpha 0.35": unbalanced,
            "unbalanced flowers, alpha 0.35, training.class_weights=balanced": (
                *unbalanced, "training.class_weights=balanced"),
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
                    train_and_score(teacher, *photos, *wide, "augmentation=none", f"seed={seed}")
                scores.append(
                    train_and_score(scratch / f"{len(name)}-{seed}-{abs(hash(name))}", *overrides, f"seed={seed}")
                )
            num_correct, n = sum(result[0] for result in scores), sum(result[1] for result in scores)
            low, high = compute_wilson_interval(round(num_correct / len(SEEDS)), n // len(SEEDS))
            accuracies = ", ".join(f"{result[0] / result[1]:.3f}" for result in scores)
            print(f"| {name} | {num_correct / n:.3f} | {n // len(SEEDS)} | {low:.3f} to {high:.3f} | {accuracies} | "
                  f"{sum(result[2] for result in scores) / len(scores):.0f} |", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
