"""`python -m trainer.plan`: it prints the plan of a run, and changes nothing."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.cli.verbs import exit_code_of
from tests.data.images import fill_folder
from tests.storage.emulator import BUCKET, running
from trainer import plan
from trainer.cli.compose import compose
from trainer.config.model import Model
from trainer.config.schema import derive_teacher_config, validate_config
from trainer.data.digits import prepare_digits
from trainer.data.tfds_folder import LABELS_FILE
from trainer.models.classifier import Classifier, build_classifier
from trainer.planning import checks, dry_run, estimates, timing
from trainer.runs.checkpoints import CheckpointFolder
from trainer.storage.path import storage_path
from trainer.training import variables
from trainer.training.state import RunState
from trainer.types import Device

Planned = Callable[..., tuple[str, str]]
ROOT = Path(__file__).parent.parent
# Determinism is for the whole process, and this one has other tests to run.
HERE = ("runtime.deterministic=false",)


def build_each_once() -> Callable[..., Classifier]:
    """`build_classifier`, which here returns the same network for equal arguments.

    A plan reads its network, sets anew which layers are trainable, and changes no weights without measured steps.
    """
    networks: dict[tuple[str, int, int], Classifier] = {}

    def build(model: Model, class_count: int, seed: int) -> Classifier:
        key = (model.model_dump_json(), class_count, seed)
        if key not in networks:
            networks[key] = build_classifier(model, class_count, seed)
        return networks[key]

    return build


NETWORKS = {module: build_each_once() for module in (dry_run, checks)}  # of the run, and of its teacher


@pytest.fixture
def planned(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Run a plan in this process and check its exit code: stdout with blanks and line ends as one blank each, stderr.

    Steps are not measured, because each network would be compiled, and a network is built once for all plans.
    """
    monkeypatch.setattr(timing, "BUDGET_SECONDS", 0.0)
    for module, build in NETWORKS.items():
        monkeypatch.setattr(module, "build_classifier", build)

    def call(*arguments: str, code: int = 0) -> tuple[str, str]:
        capsys.readouterr()
        ended = exit_code_of(plan.main, *arguments, *HERE)
        out, err = capsys.readouterr()
        assert (ended, err == "") == (code, code == 0), err
        return " ".join(out.split()), err

    return call


def everything_in(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_size) for p in [folder, *folder.rglob("*")]}


def begin_run(folder: Path, *arguments: str) -> None:
    """Write the files of a run that was stopped in its second phase, at step 240."""
    folder.mkdir()
    config = validate_config(compose([*arguments, f"output_dir={folder}", *HERE]) or {})
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    state = RunState(phase=1, epoch=6, step=240, phase_step=40)
    CheckpointFolder(folder / "checkpoints", 2, print).save(state.to_json(), {"w": np.zeros(2, np.float32)}, None)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which a new process planned the default run with measured steps, and its stdout."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "trainer.plan", "--plot=net.png", "--summary", "output_dir=new", "seed=7"]
    environment = {k: v for k, v in os.environ.items() if k not in ("TF_CPP_MIN_LOG_LEVEL", "COLUMNS")}
    environment |= {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return folder, done.stdout


def test_the_quickstart(quickstart: tuple[Path, str]) -> None:
    folder, stdout = quickstart
    lines = [" ".join(line.split()) for line in stdout.splitlines()]
    for expected in (
        "changed seed = 7 (was 42)",
        "output_dir new: new",
        "workers 1, this process alone",
        "devices one CPU, float32",
        "classes 10: 0, 1, 2, 3, 4 and 5 more",
        "decoded train: 8.7 MB, in memory",
        "head 200 5 12,810 0/154 none adam 0.001 constant",
        "fine_tune 1,000 25 394,858 154/154 all adam 0.001 cosine, warm-up 80",
        "1,200 steps at most, 40 per epoch; 423,018 parameters, the head included",
        "head avg pooling, 1,280 -> 10, 12,810 parameters",
    ):
        assert expected in lines
    for name, count in (("train", "1,257"), ("validation", "180"), ("test", "360")):
        assert any(line.startswith(f"{name} {count} examples in 1 shard, ") for line in lines)
    plain = stdout.splitlines()
    assert max(map(len, plain)) <= 100
    layers = plain[plain.index("layers") + 1 : plain.index("memory (estimate)") - 1]  # of --summary
    assert max(map(len, layers)) <= 80
    assert "  150 block_16_project_BN" in "\n".join(layers)
    totals = " ".join(map(str.strip, layers[-2:]))
    assert totals == "423,018 parameters; trainable ones by phase: 1 head 12,810, 2 fine_tune 394,858"
    assert [line for line in plain if line != line.rstrip()] == []
    assert sorted(p.name for p in folder.iterdir()) == ["net.png"]
    with Image.open(folder / "net.png") as image:
        assert image.format == "PNG"
        assert 800 <= image.width <= 2000
        assert 800 <= image.height <= 2000
        colours = {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}
    assert {(0x25, 0x63, 0xEB), (0xD8, 0xDE, 0xE6)} <= colours  # something trains, something is frozen


@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        (("training.batch_size=30", "training.accumulate=4"), "training.batch_size.*1 replicas.* 28 or 32"),
        (("training.batch_size=31", "augmentation.mixup=0.2"), "training.batch_size.*mixup.* 30 or 32"),
        (("training.batch_size=6", "runtime.replicas=2", "augmentation.cutmix=1"), "training.batch_size.*3 for each of 2 replicas.* 4 or 8"),
        (("training.batch=30",), "training.batch: .*batch_size"),
        (("model.backbone=MobileNetV7",), "model.backbone=MobileNetV7.*MobileNetV"),
        (("phases.head.thaw=from_block:block_99",), "from_block:block_99|is not a block of"),
        (("data=image_folder", "data.root=gone"), "data.root=gone"),
        (("model.weights=gone.weights.h5",), "model.weights=gone.weights.h5"),
        (("warm_start=gone",), "warm_start=gone"),
        (("training.class_weights={eleven: 2.0}",), "training.class_weights.*eleven"),
        (("--plot=",), "--plot=: is empty; write python -m trainer.plan "),
        (("--plot=net.jpg",), "--plot=net.jpg: .*--plot=FILE.png"),
        (("-m", "seed=1,2"), "a sweep has no plan.*remove --multirun"),
    ],
)  # fmt: skip
def test_an_error_of_the_run_is_exit_2(planned: Planned, arguments: tuple[str, ...], pattern: str) -> None:
    _, err = planned(*arguments, code=2)
    assert re.match(rf"error: (?s:.*){pattern}", err)


def test_a_run_that_would_resume_is_detected_and_not_changed(planned: Planned, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    begin_run(folder)
    before = everything_in(folder)
    out, _ = planned(f"output_dir={folder}")
    assert f"{folder}: has this run, which would resume at step 240, phase fine_tune" in out
    assert f"write output ✓ {folder}: a probe was written and deleted" in out

    out, err = planned(f"output_dir={folder}", "seed=43", code=2)
    assert err.startswith(f"error: output_dir={folder}")
    assert "seed: 42 -> 43" in err
    assert "1,200 steps at most" in out  # the rest of the plan all the same

    assert "resume=never" in planned(f"output_dir={folder}", "resume=never", code=2)[1]
    now = everything_in(folder)
    assert now.keys() == before.keys()
    assert {k: v for k, v in now.items() if k != "."} == {k: v for k, v in before.items() if k != "."}

    (folder / "DONE").write_text("")
    out, _ = planned(f"output_dir={folder}")
    assert "already finished (has DONE): the run would exit at once" in out


def test_what_is_auto_is_chosen_with_its_reason_and_once(planned: Planned, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = ("data=digits", "model=auto", "model.weights=none", "model.image_size=32", f"output_dir={folder}")
    out, _ = planned(*arguments, "phases=auto", "phases.auto.domain=different")
    assert "auto model.backbone=auto: MobileNetV2, for 1,257 training images of 10 classes (small" in out
    assert "auto phases=auto: few_different, that is head (none), fine_tune (percent:35), for 1,257" in out
    assert "auto training.batch_size=auto: 32, for 1,257 training images" in out
    assert "fine_tune 200 5 " in out
    assert "54/154 percent:35 adam 1e-05 constant" in out
    assert not folder.exists()

    begin_run(folder, *arguments[:-1], "model.backbone=MobileNetV2", "phases=two_phase", "training.batch_size=16")
    out, _ = planned(*arguments, "phases=auto")
    assert "has this run, which would resume at step 240, phase fine_tune" in out
    assert "training.batch_size=auto: 16, as this run began" in out
    assert "79 per epoch" in out  # of 1,257 images in batches of 16


def test_rates_of_their_own_are_in_the_plan(planned: Planned) -> None:
    out, _ = planned("phases.fine_tune.layer_decay=0.9", "phases.fine_tune.backbone_rate=0.5")
    assert "adam 0.001 cosine, warm-up 80, backbone x 0.5, x 0.9 per block" in out


def test_what_trains_on_cached_features_is_in_the_plan(planned: Planned) -> None:
    out, _ = planned("augmentation=none", "phases.fine_tune.thaw=last_blocks:2")
    views = "cached, 1 view of 1,437 images at"
    assert f"head {views} the backbone's end, pooled to 1280, 7.4 MB, computed once for 5" in out
    assert f"fine_tune {views} layer 133 (block_14_add), 2 x 2 x 56, 1.3 MB, computed once" in out
    assert re.search("decoded train: .* MB, not cached; read once, for features", out)
    out, err = planned("augmentation=none", "phases.fine_tune.features=cached", code=2)
    assert "phases.fine_tune.features=cached: " in err


def test_a_bucket_that_is_not_there_is_named(planned: Planned, tmp_path: Path) -> None:
    with running(tmp_path / "buckets"):
        out, err = planned("output_dir=gs://missing/run", code=2)
        assert "write output ✗ gs://missing/run" in out
        assert "no such bucket" in err


def test_data_in_a_bucket_is_listed_and_not_fetched(planned: Planned, tmp_path: Path) -> None:
    local = prepare_digits(tmp_path / "made")
    with running(tmp_path / "buckets"):
        there = storage_path(f"gs://{BUCKET}/digits")
        for file in local.iterdir():
            (there / file.name).upload(file)
        cache, output = tmp_path / "cache", f"gs://{BUCKET}/runs/1"
        arguments = ("data=tfds", f"data.root={there}", "model=glyphs_mobilenet_v2", f"output_dir={output}")
        out, _ = planned(*arguments, f"runtime.cache_dir={cache}")
        size = f"{sum(file.stat().st_size for file in local.glob('*.tfrecord*')) / 1e6:.1f} MB"
        assert f"bucket {there}: 3 shards, {size}, are fetched while they are used, {size} at most on disk" in out
        assert "train 1,257 examples in 1 shard" in out
        assert "test 360 examples in 1 shard" in out
        assert "balance most training examples" in out
        assert f"write output ✓ {output}: a probe was written and deleted" in out

        (there / LABELS_FILE).delete()  # as TFDS and older versions write it
        out, _ = planned(*arguments, f"runtime.cache_dir={cache}")
        size = sum(file.stat().st_size for file in local.iterdir() if file.name != LABELS_FILE) / 1e6
        assert f"bucket {there}: would fetch {len(list(local.iterdir())) - 1} files, {size:.1f} MB, to {cache}" in out
        assert "train 1,257 examples in 1 shard" in out
        assert "names and counts are from its metadata" in out
        assert not list(cache.rglob("*tfrecord*"))
        assert storage_path(f"gs://{BUCKET}/runs").list() == []


def test_trouble_ahead_is_warned_of(planned: Planned, tmp_path: Path) -> None:
    photos = fill_folder(tmp_path / "photos", {"cat": 40, "dog": 10})
    out, _ = planned(
        "data=image_folder", f"data.root={photos}", "model=glyphs_mobilenet_v2", "model.weights=none",
        "training.batch_size=64", "phases=head_only", "phases.head.epochs=2", "runtime.checkpoint_every=50 steps",
        "runtime.precision=float32", "data.cache=none",
    )  # fmt: skip
    assert "most training examples 32 (cat), fewest 8 (dog)" in out
    assert "train: 0.3 MB, not cached" in out
    for warning in (
        "80% of the training examples are cat: a constant prediction is right 80% of the time",
        "model.weights=none without batch_norm=train in head: the statistics of normalization stay as initialized, scores stay near chance",
        "runtime.checkpoint_every=50 steps is longer than head",
        "training.batch_size=64 is more than the 40 examples: a batch has 40",
        "there is no test split",
    ):
        assert f"! {warning}" in out
    assert "note validation has only 10 examples" in out


def test_a_batch_that_no_memory_holds_is_rejected_with_the_largest_that_fits(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimates, "get_memory_limit_bytes", lambda: 2_000_000_000)
    monkeypatch.setattr(estimates, "measure_resident_bytes", lambda: 700_000_000)
    arguments = ("data=digits", "model=mobilenet_v2", "model.weights=none", "phases=end_to_end")
    out, err = planned(*arguments, "training.batch_size=1000", code=2)
    assert "batch 1000 images" in out
    refused = re.match(
        r"error: training.batch_size=1000: needs about ([\d.]+) GB .* has 2.00 GB; use (\d+) or less", err
    )
    assert refused, err
    assert 20 < int(refused[2]) < 200
    assert "of memory" not in planned(*arguments, f"training.batch_size={refused[2]}")[0]


def test_the_plan_of_a_gpu_has_its_memory_by_phase_and_what_would_be_slow(
    planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dry_run, "detect_device", lambda: Device("GPU", "NVIDIA L4", (8, 9), 22 * 2**30))
    monkeypatch.setattr(dry_run, "count_usable_cpus", lambda: 1)
    arguments = ("data=digits", "model=mobilenet_v2", "model.weights=none", "phases=two_phase")
    out, _ = planned(*arguments, "training.batch_size=auto", "augmentation=light")
    assert "devices one GPU (NVIDIA L4, compute capability 8.9, 22.0 GiB)" in out
    assert re.search(r"training.batch_size=auto: 32, for [\d,]+ training images: 32 on each of 1 GPUs of 22.0 GiB", out)
    assert re.search(
        r"GPU memory \(estimate, per GPU\) head [\d.]+ GB: weights .* fine_tune [\d.]+ GB: weights .* activations of "
        r"trained layers .* GPU NVIDIA L4, memory 23.62 GB",
        out,
    )
    assert "! runtime.precision=float32 is slow on NVIDIA L4: its tensor cores compute faster in bfloat16" in out
    assert "! 1 CPU can augment about 2,950 small images per second" in out


def test_the_time_of_a_run_is_estimated_from_measured_steps(quickstart: tuple[Path, str], planned: Planned) -> None:
    measured = re.search(
        r"estimated from a few steps on this machine. head about (\d+ \w+) fine_tune about (\d+ \w+) "
        r"scoring about \d+ \w+ in total about ",
        " ".join(quickstart[1].split()),
    )
    assert measured, quickstart[1]
    head, fine_tune = (
        int(number) * {"s": 1, "min": 60}[unit] for number, unit in (text.split() for text in measured.groups())
    )
    assert fine_tune > head  # 25 epochs of all layers, and 5 of the head
    assert "estimated from a few steps" not in planned("seed=7")[0]  # without time for a measurement


def test_times_are_rough() -> None:
    assert [timing.format_time(s) for s in (0.1, 40, 99.6, 720, 5399, 5400, 12_600)] == [
        "1 s", "40 s", "2 min", "12 min", "90 min", "1.5 h", "3.5 h"]  # fmt: skip


def test_another_width_of_a_warm_start_is_rejected(planned: Planned, tmp_path: Path) -> None:
    leave_teacher(tmp_path / "earlier")
    arguments = ("data=digits", "model=glyphs_mobilenet_v2", "model.weights=none", f"warm_start={tmp_path / 'earlier'}")
    planned(*arguments)
    _, err = planned(*arguments, "model.alpha=0.5", code=2)
    assert re.match(r"error: warm_start=.*: is of another backbone: \d+ of 260 variables .* model.alpha", err)


@cache
def teacher_values() -> dict[str, np.ndarray]:
    """The variables of a teacher."""
    model = validate_config(compose(["model=glyphs_mobilenet_v2"]) or {}).model
    return variables.copy_values(build_classifier(model, 10, 1).variables)


def leave_teacher(home: Path) -> Path:
    """Write the files of a finished run that a student reads."""
    home.parent.mkdir(exist_ok=True)
    begin_run(home, "data=digits", "model=glyphs_mobilenet_v2")
    (home / "run.json").write_text(json.dumps({"classes": list("0123456789")}))
    CheckpointFolder(home / "checkpoints", 2, print).save(RunState(step=240).to_json(), teacher_values(), 240)
    return home


def test_a_teacher_that_cannot_be_read_or_is_another_is_exit_2(tmp_path: Path, planned: Planned) -> None:
    home, run = leave_teacher(tmp_path / "teacher"), tmp_path / "run"
    arguments = (f"distillation.teacher={home}", f"output_dir={run}")
    begin_run(run, *arguments[:1])
    planned(*arguments)
    state = RunState(phase=1, epoch=6, step=250, phase_step=50, teacher="0123456789abcdef").to_json()
    CheckpointFolder(run / "checkpoints", 2, print).save(state, {"w": np.zeros(2, np.float32)}, None)
    _, err = planned(*arguments, code=2)
    assert re.match("error: (?s:.*)0123456789abcdef, now ", err)

    weights = home / "checkpoints" / "step-00000240" / "variables.npz"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    _, err = planned(arguments[0], code=2)
    assert f"distillation.teacher={home}: " in err
    assert f"{weights} does not match its size or checksum" in err
    CheckpointFolder(home / "checkpoints", 2, print).save(RunState(step=241).to_json(), {"w": np.zeros(2)}, 241)
    _, err = planned(arguments[0], code=2)
    assert f"distillation.teacher={home}" in err
    assert "backbone/" in err


def test_a_teacher_of_the_same_run_has_a_plan_of_its_own(tmp_path: Path, planned: Planned) -> None:
    run = tmp_path / "run"
    model = ("distillation.model=glyphs_mobilenet_v2", "distillation.model.image_size=40")
    arguments = ("distillation.teacher=train", *model, f"output_dir={run}", "augmentation=none")
    out, _ = planned(*arguments, "distillation.phases=head_only", "distillation.phases.head.steps=7",
                     "distillation.phases.head.epochs=null")  # fmt: skip
    first, second = out.split("the student, trained after it")
    assert first.startswith("the teacher, trained first")
    assert f"output_dir {run}/teacher: new" in first
    assert "40 x 40 pixels" in first
    assert "7 steps at most" in first
    assert f"output_dir {run}: new" in second
    assert "48 x 48 pixels" in second
    assert "teacher trained first, as above" in second
    assert "teacher MobileNetV2 at 40 px, 423,018 parameters; predicts once, for 1,257 training images" in second
    assert "its logits 50.3 kB in total" in second
    assert not run.exists()
    _, err = planned(*arguments, "distillation.phases.head.thaw=from_block:nothing", "distillation.phases.head.epochs=1",
                     code=2)  # fmt: skip
    assert "distillation.phases.head.thaw=from_block:nothing: " in err
    leave_teacher(run / "teacher")
    teacher = derive_teacher_config(validate_config(compose([*arguments, *HERE]) or {}))
    assert teacher
    (run / "teacher" / "config.yaml").write_text(yaml.safe_dump(teacher.model_dump(mode="json")))
    (run / "teacher" / "DONE").write_text("{}\n")
    out, _ = planned(*arguments)
    assert "trained first" not in out
    assert f"teacher ✓ {run}/teacher (MobileNetV2, checkpoint step-00000240, 10 classes" in out


def test_the_classes_of_a_teacher_are_compared_with_the_data(tmp_path: Path, planned: Planned) -> None:
    home = leave_teacher(tmp_path / "teacher")
    out, _ = planned(f"distillation.teacher={home}", "augmentation=none")
    assert f"teacher ✓ {home} (MobileNetV2, checkpoint step-00000240, 10 classes" in out
    assert "teacher MobileNetV2 at 48 px, 423,018 parameters; predicts once, for 1,257 training images" in out
    assert ("the teacher's variables" in out, "its logits 50.3 kB in total" in out) == (False, True)
    out, _ = planned(f"distillation.teacher={home}", "augmentation=light")
    assert ("423,018 parameters; predicts in every step" in out, "its logits" in out) == (True, False)
    assert "the teacher's variables 1.7 MB its activations 7.4 MB in total" in out
    (tmp_path / "teacher" / "run.json").write_text(json.dumps({"classes": ["cat", "dog"]}))
    out, err = planned(f"distillation.teacher={tmp_path / 'teacher'}", code=2)
    assert "teacher ✗" in out
    assert re.search("2 classes.* 10.*cat, dog.* 0, 1, 2, 3, 4", err)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_an_empty_split_is_an_error_of_the_plan(planned: Planned, tmp_path: Path, name: str) -> None:
    for number, split in enumerate(("train", "validation", "test")):
        fill_folder(tmp_path / "pets" / split, {"cat": 3, "dog": 3}, 10 * number)
    for file in (tmp_path / "pets" / name).glob("*/*"):
        file.write_bytes(b"no image")
    command = ("data=image_folder", f"data.root={tmp_path / 'pets'}", "model=mobilenet_v2", "model.weights=none")
    _, err = planned(*command, "data.on_error=skip", code=2)
    assert f"the {name} split has no example" in err
