"""Kill a command at each first write, flush, rename and deletion of each of its files; then the same command continues.

Each start is a fork of a process that has imported TensorFlow, and is killed at the next point that none before it was
killed at. So one chain of starts covers all points of a run, and the last one has to end as if there were no kills.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.running import ROOT, SMALL, assert_same_run
from tests.report.test_compare import make_run
from tests.test_drift import NAMES, log_lines, predictions
from trainer.exporting.reference import compute_reference

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3000)]

# Runs `main` of a module in forks; prints the exit code and the point of the kill for each, until one ends by itself.
CHAIN = r"""
import importlib, json, os, re, signal, sys
module, preload, folders, *arguments = sys.argv[1:]
for name in preload.split(","):
    importlib.import_module(name)
main = importlib.import_module(module).main
folders, done = folders.split(","), []

def point(operation, path):
    # The kind of a write: the operation and the path without process ids, times and other numbers.
    name = os.path.abspath(os.fsdecode(path))
    below = next((name[len(f):] for f in folders if name.startswith(f)), None)
    return None if below is None else f"{operation} {re.sub(r'[0-9a-f]{12,}|[0-9]+|[a-z_0-9]+(?=.png)', 'N', below)}"

def kill_at_new_points(report):
    def wrap(operation, path_of):
        original = getattr(os, operation)
        def wrapped(*given, **named):
            path = path_of(*given, **named) if "dir_fd" not in named else given[0]
            where = point(operation, path)
            if where and where not in done:
                os.write(report, where.encode())
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*given, **named)
        setattr(os, operation, wrapped)
    wrap("fsync", lambda handle: os.readlink(f"/proc/self/fd/{handle}"))
    for operation in ("replace", "rename"):
        wrap(operation, lambda source, target, **_: target)
    for operation in ("mkdir", "unlink", "rmdir"):
        wrap(operation, lambda path, *_, **__: path)

for start in range(400):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        kill_at_new_points(write)
        sys.argv = [module, *arguments]
        code = 1
        try:
            main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    where = os.read(read, 4096).decode()
    os.close(read)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    print(f"START {code} {where}", flush=True)
    if not where:
        sys.exit(code)
    done.append(where)
"""


def chain(module: str, preload: str, folders: list[Path], *arguments: str) -> list[str]:
    """Run the chain of starts; return the points of its kills. No start is refused, and the last one succeeds."""
    command = [sys.executable, "-c", CHAIN, module, preload, ",".join(map(str, folders)), *arguments]
    temporary = folders[0].parent / "tmp"
    temporary.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    starts = re.findall(r"^START (-?\d+) (.*)$", ended.stdout, re.MULTILINE)
    assert ended.returncode == 0, (starts, ended.stderr[-3000:])
    assert all(code == "-9" for code, where in starts if where), starts
    assert list(temporary.glob("kubetune-*")) == []
    return [where for _, where in starts if where]


PATIENT = ("runtime.max_restarts_without_progress=1000",)
QUICK = (
    *SMALL, *PATIENT, "model=mobilenet_v2", "model.weights=none", "model.alpha=0.35", "model.image_size=32",
    "debug.max_examples=40", "phases.head.epochs=1", "phases.fine_tune.epochs=1", "export.formats=[keras,saved_model]",
)  # fmt: skip


def unfinished(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if re.fullmatch(r"\..*\.\d+-\d+|.*\.tmp", path.name)]


@pytest.mark.timeout(5000)
def test_a_run(tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    run = ("trainer.__main__", "keras,trainer.train,trainer.report.build,trainer.exporting.export")
    assert chain(*run, [tmp_path / "nowhere"], *QUICK, f"output_dir={calm}") == []
    points = chain(*run, [killed], *QUICK, f"output_dir={killed}")
    for operation in (
        "fsync /.config.yaml.N-N", "replace /config.yaml", "replace /run.json", "replace /checkpoints/attempts.json",
        "fsync /checkpoints/.step-N.N-N/.variables.npz.N-N", "rename /checkpoints/step-N", "replace /checkpoints/LATEST",
        "replace /export/labels.txt", "replace /report/report.json",
    ):  # fmt: skip
        assert operation in points
    assert_same_run(calm, killed)
    assert (killed / "DONE").exists()
    assert unfinished(killed) == []


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    rng = np.random.default_rng(1)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(8):
            image = Image.fromarray(rng.integers(0, 255, (20, 20, 3)).astype(np.uint8))
            image.save(tmp_path / "images" / name / f"{number}.png")
    return tmp_path / "images"


def test_a_preparation(tmp_path: Path, photos: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    arguments = ("data=image_folder", f"data.root={photos}", "data.shards=2", "runtime.data_threads=1")
    prepare = ("trainer.prepare", "trainer.data.prepare,tensorflow_datasets")
    assert chain(*prepare, [tmp_path / "nowhere"], *arguments, f"output={calm}") == []
    points = chain(*prepare, [killed], *arguments, f"output={killed}")
    assert "replace /kubetune_shards.json" in points
    names = sorted(path.name for path in calm.iterdir())
    assert sorted(path.name for path in killed.iterdir()) == names
    for name in names:
        assert (killed / name).read_bytes() == (calm / name).read_bytes(), name


def test_an_export(tmp_path: Path) -> None:
    run = ("trainer.__main__", "keras,trainer.train,trainer.report.build,trainer.exporting.export")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        assert chain(*run, [tmp_path / "nowhere"], *QUICK, f"output_dir={folder}", "export.formats=[]") == []
    export = ("trainer.export", "keras,trainer.exporting.export")
    formats = "formats=[keras,saved_model,tflite]"
    assert chain(*export, [tmp_path / "nowhere"], f"run={calm}", formats) == []
    points = chain(*export, [killed], f"run={killed}", formats)
    assert "replace /export/saved_model/N" in points
    names = [sorted(str(p.relative_to(f)) for p in (f / "export").rglob("*")) for f in (calm, killed)]
    assert names[0] == names[1]
    reports = [json.loads((folder / "report" / "report.json").read_text())["export"] for folder in (calm, killed)]
    for name, scores in reports[0].items():
        assert scores["accuracy"] == reports[1][name]["accuracy"]
    assert unfinished(killed) == []


def test_a_sweep(tmp_path: Path) -> None:
    """The process of the sweep is killed; its jobs are not, and end by themselves."""
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    arguments = ("-m", *QUICK, "seed=1,2", "phases.fine_tune.epochs=0.1", "export.formats=[]")
    sweep = ("trainer.__main__", "keras,tensorboard.plugins.hparams.summary_v2")
    assert chain(*sweep, [tmp_path / "nowhere"], *arguments, f"output_dir={calm}") == []
    points = chain(*sweep, [killed], *arguments, f"output_dir={killed}")
    assert any("events.out.tfevents.hparams" in where for where in points)
    for job in ("0", "1"):
        assert_same_run(calm / job, killed / job)
    assert unfinished(killed) == []


def test_a_comparison(tmp_path: Path) -> None:
    runs = [str(make_run(tmp_path / name, accuracy)) for name, accuracy in (("a", 0.8), ("b", 0.7))]
    (tmp_path / "pages").mkdir()
    compare = ("trainer.compare", "trainer.report.compare", [tmp_path / "pages"])
    points = chain(*compare, *runs, f"output={tmp_path / 'pages' / 'c.html'}")
    assert {"fsync /.c.html.N-N", "replace /c.html"} <= set(points), points
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["c.html"]


def test_a_measurement_of_drift(tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text(
        json.dumps(compute_reference("test", NAMES, *predictions(400, 1), 96, "crop"))
    )
    (tmp_path / "log.jsonl").write_text(log_lines(*predictions(400, 2)))
    (tmp_path / "pages").mkdir()
    drift = ("trainer.drift", "trainer.report.drift", [tmp_path / "pages"])
    arguments = (f"reference={tmp_path / 'reference.json'}", f"log={tmp_path / 'log.jsonl'}")
    points = chain(*drift, *arguments, f"output={tmp_path / 'pages' / 'd.png'}")
    assert any(point.startswith("replace") for point in points)
    assert [path.name for path in (tmp_path / "pages").iterdir()] == ["d.png"]


def test_an_evaluation(tmp_path: Path) -> None:
    run = ("trainer.__main__", "keras,trainer.train,trainer.report.build,trainer.exporting.export")
    home, nowhere = tmp_path / "run", tmp_path / "nowhere"
    assert chain(*run, [nowhere], *QUICK, f"output_dir={home}", "export.formats=[]") == []
    evaluate, output = ("trainer.evaluate", "keras,trainer.report.evaluate_run"), home / "evaluations"
    assert chain(*evaluate, [nowhere], f"run={home}", f"output={tmp_path / 'calm'}") == []
    points = chain(*evaluate, [output], f"run={home}")
    (killed,) = output.iterdir()
    assert any(point.endswith("/predictions.csv") for point in points)
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in (tmp_path / "calm").iterdir())
    assert (killed / "predictions.csv").read_bytes() == (tmp_path / "calm" / "predictions.csv").read_bytes()
