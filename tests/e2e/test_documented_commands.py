"""The commands of README.md and docs/ that need neither a cluster nor a network, run in a shell as they are written.

Only settings that make them small are appended, and port numbers are replaced by free ones.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from tests.data.images import fill_folder
from tests.processes import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SMALL = "model.weights=none model.image_size=32 debug=fast training.batch_size=4"
TRIAL = "debug=fast 'export.formats=[]'"
FLOWERS = "experiment=photos data.root=photos output_dir=outputs/flowers"


def read(page: str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text()


class Shell:
    """A folder of a user, with the environment of this interpreter as `.venv`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / ".venv").symlink_to(sys.prefix)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}

    def run(self, page: str, command: str, append: str = "", replace: dict[str, str] | None = None) -> str:
        """Run a command that is on the page; return its output. The exit code must be 0."""
        assert command in read(page), f"{page} does not have: {command}"
        for old, new in (replace or {}).items():
            command = command.replace(old, new)
        result = subprocess.run(
            ["bash", "-ec", f"{command} {append}"], cwd=self.folder, env=self.environment, capture_output=True,
            text=True, check=False,
        )  # fmt: skip
        assert result.returncode == 0, f"{page}: {command} {append}\n{result.stdout}\n{result.stderr}"
        return result.stdout


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Shell:
    """A folder with photos, and the run of README's first command for them."""
    shell = Shell(tmp_path_factory.mktemp("user"))
    fill_folder(shell.folder / "photos", {"daisy": 24, "rose": 24})
    fill_folder(shell.folder / "new_photos", {"daisy": 3}, 100)
    for number, name in enumerate(("photo.jpg", "rose.jpg", "tulip.png")):
        (shell.folder / name).write_bytes((shell.folder / "photos" / "rose" / f"{number:02d}.jpg").read_bytes())
    shell.run("README.md", f".venv/bin/python -m trainer {FLOWERS}", SMALL)
    assert (shell.folder / "outputs/flowers/DONE").exists()
    return shell


def test_plan_and_resume(shell: Shell) -> None:
    # The same command again exits with 0; a plan has the same arguments.
    shell.run("README.md", f".venv/bin/python -m trainer {FLOWERS}", SMALL)
    out = shell.run("README.md", "python -m trainer.plan", f"{FLOWERS} {SMALL}")
    assert "daisy" in out
    assert "steps" in out
    shell.run("README.md", "python -m trainer.plan", f"{FLOWERS} {SMALL} --plot=model.png --summary")
    assert (shell.folder / "model.png").read_bytes().startswith(b"\x89PNG")
    assert "seed" in shell.run("docs/configuration.md", "python -m trainer --cfg job")
    assert "experiment" in shell.run("README.md", "python -m trainer --help")


def test_prepare_and_train_on_records(shell: Shell) -> None:
    folder = {"/data/photos": "prepared"}
    prepare = ".venv/bin/python -m trainer.prepare data=image_folder data.root=photos output=/data/photos"
    shell.run("README.md", prepare, replace=folder)
    train = ".venv/bin/python -m trainer data=tfds data.root=/data/photos model=mobilenet_v2"
    shell.run("README.md", train, f"{SMALL} 'export.formats=[]' model.alpha=0.35", replace=folder)


def test_evaluate_and_compare(shell: Shell) -> None:
    shell.run("docs/report.md", "python -m trainer.evaluate run=outputs/flowers")
    shell.run("docs/report.md", "python -m trainer.evaluate run=outputs/flowers checkpoint=last split=validation")
    new = "python -m trainer.evaluate run=outputs/flowers data=image_folder data.root=new_photos"
    shell.run("docs/report.md", new)
    report = json.loads((shell.folder / "outputs/flowers/evaluations/best-new_photos-train/report.json").read_text())
    assert report["test"]["n"] == 3
    subprocess.run(["cp", "-r", "outputs/flowers", "outputs/a"], cwd=shell.folder, check=True)
    subprocess.run(["cp", "-r", "outputs/flowers", "outputs/b"], cwd=shell.folder, check=True)
    shell.run("docs/report.md", "python -m trainer.evaluate", "run=outputs/b checkpoint=last")
    shell.run("README.md", "python -m trainer.compare outputs/a outputs/b")
    runs = "outputs/a outputs/b outputs/b/evaluations/last-photos-test"
    shell.run("docs/report.md", f"python -m trainer.compare {runs} output=compare.html")
    assert (shell.folder / "compare.html").exists()


def test_export_and_load(shell: Shell) -> None:
    shell.run("docs/exports.md", "python -m trainer.export run=outputs/flowers formats=[keras,onnx]")
    shell.run("README.md", "python -m trainer.export run=outputs/flowers formats=[keras,tflite_int8,onnx]")
    (snippet,) = re.findall(r"^```python\n(import tensorflow.*?)^```", read("README.md"), flags=re.S | re.M)
    done = subprocess.run([sys.executable, "-c", snippet], cwd=shell.folder, capture_output=True, text=True, check=True)
    assert "tf.Tensor" in done.stdout


def test_serve_and_drift(shell: Shell) -> None:
    (port,) = free_ports(1)
    serve = ".venv/bin/python -m trainer.serve model=outputs/flowers"
    assert serve in read("README.md")
    server = subprocess.Popen(
        ["bash", "-c", f"exec {serve} port={port} log=predictions.jsonl linger=0"], cwd=shell.folder,
        env=shell.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/readyz"):
                    break
            except (URLError, ConnectionError):
                assert server.poll() is None, "the server has ended"
                time.sleep(0.5)
        replaced = {"8501": str(port)}
        lines = [("README.md", "curl -F file=@photo.jpg http://127.0.0.1:8501/predict")]
        (block,) = re.findall(r"^```sh\n(curl -F.*?)^```", read("docs/serving.md"), flags=re.S | re.M)
        lines += [("docs/serving.md", line) for line in re.split(r"(?<![|\\])\n(?!\s)", block.strip())]
        assert len(lines) == 4
        for page, line in lines:
            response = json.loads(shell.run(page, line, replace=replaced))
            assert response["predictions"], line
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
    drift = "python -m trainer.drift reference=outputs/flowers log=predictions.jsonl hours=24 output=drift.png"
    shell.run("docs/drift.md", drift, "|| [ $? = 4 ]")  # 4: shifted, which five predictions can be
    assert (shell.folder / "drift.png").exists()


def test_sweep_and_quickstart(shell: Shell) -> None:
    shell.run("README.md", "python -m trainer -m seed=1,2,3", TRIAL)
    (quickstart,) = re.findall(
        r"python -m trainer experiment=quickstart model.weights=glyphs seed=1(?=[ \n`])(?! ~| data)",
        read("docs/quickstart.md"),
    )[:1]
    shell.run("docs/quickstart.md", quickstart, TRIAL)


def test_two_workers_on_one_machine(shell: Shell) -> None:
    (loop,) = re.findall(r"^```\n(for i in 0 1; do.*?done; wait)\n```", read("docs/distributed.md"), flags=re.S | re.M)
    first, second = map(str, free_ports(2))
    replaced = {"2222": first, "2223": second, "output_dir=outputs/two": f"output_dir=outputs/two {TRIAL}"}
    shell.run("docs/distributed.md", loop, replace=replaced)
    assert (shell.folder / "outputs/two/DONE").exists()
