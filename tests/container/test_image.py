"""The image: contents, layers, execution and termination as in a pod, and CUDA."""

import json
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import trainer
from tests.container import images
from tests.container.images import DEPENDENCIES, MEGABYTE, ROOT, USER, run, started
from tests.e2e.running import catches, has_loaded
from tests.k8s.rendered import list_pods
from tests.waiting import wait_until
from trainer.cli.sweep import EVENT_FILE, serialize_job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

REVISION = "0123456789ab"
BUILD_ARGUMENTS = (f"--build-arg=VERSION={trainer.__version__}", f"--build-arg=REVISION={REVISION}")
SMALL = ("output_dir=/outputs", "debug.max_examples=200", "phases.head.epochs=1", "phases.fine_tune.epochs=1")
LIST_GPUS = """
import ctypes, tensorflow as tf
ctypes.CDLL("libnccl.so.2")
print(tf.config.list_physical_devices("GPU"))
"""


@pytest.fixture(scope="module", autouse=True)
def _supported() -> None:
    """A fixture and no mark: the sources of apt take seconds to read, also where these tests are not selected."""
    if reason := images.unsupported():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def base() -> Iterator[None]:
    """The base image, in the store, which is locked once for all images: a second lock would wait for the first."""
    with images.store():
        with timed("\nbase"):
            images.make_base()
        yield


@pytest.fixture(scope="module")
def image(base: None) -> Iterator[str]:  # noqa: ARG001 - its fixture
    """The image of this checkout, for CPUs."""
    tag = f"localhost/kubetune-test:{uuid.uuid4().hex[:12]}"
    with timed("dependencies"):
        images.build(ROOT, DEPENDENCIES, "--target=dependencies")
    with timed("image"):
        images.build(ROOT, tag, *BUILD_ARGUMENTS)
    print(f"{images.inspect(tag)['Size'] / MEGABYTE:,.0f} MB")
    yield tag
    images.remove(tag)


@pytest.fixture(scope="module")
def tensorboard(base: None) -> Iterator[str]:  # noqa: ARG001 - its fixture
    """The image of TensorBoard."""
    tag = f"localhost/kubetune-test-tensorboard:{uuid.uuid4().hex[:12]}"
    with timed("tensorboard"):
        images.build(ROOT, tag, "--target=tensorboard")
    yield tag
    images.remove(tag)


@contextmanager
def timed(what: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    print(f"{what}: {time.monotonic() - began:.1f} s")


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A folder to mount that is owned by the image's user, as a volume with `fsGroup`."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    shutil.chown(folder, USER, USER)
    return folder


def test_its_labels_entry_point_and_unprivileged_user(image: str) -> None:
    config = images.inspect(image)["Config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["Entrypoint"] == ["python", "-m", "trainer"]
    assert not config.get("Cmd")
    labels = {name.removeprefix("org.opencontainers.image."): text for name, text in config["Labels"].items()}
    assert labels.pop("io.buildah.version")
    assert labels == {
        "title": "kubetune",
        "description": trainer.__doc__.removeprefix("kubetune: ").capitalize() if trainer.__doc__ else "",
        "licenses": "Apache-2.0",
        "version": trainer.__version__,
        "revision": REVISION,
    }


def test_a_change_of_code_rebuilds_one_small_layer(image: str, tmp_path: Path) -> None:
    context = tmp_path / "checkout"
    context.mkdir()
    for name in ("Dockerfile", ".dockerignore", "requirements-image.lock"):
        shutil.copy2(ROOT / name, context)
    for name in ("conf", "trainer"):
        shutil.copytree(ROOT / name, context / name)
    with open(context / "trainer" / "errors.py", "a") as file:
        file.write("\n# changed\n")
    changed = f"{image}-changed"
    with timed("\nrebuilt after a change of code"):
        images.build(context, changed, *BUILD_ARGUMENTS)
    try:
        before, after = images.layers(image), images.layers(changed)
    finally:
        images.remove(changed)
    print_layers(after)
    assert [digest for digest, *_ in before[:-1]] == [digest for digest, *_ in after[:-1]]
    assert before[-1][0] != after[-1][0]
    assert after[-1][1] < 10 * MEGABYTE


def print_layers(layers: list[tuple[str, int, str]]) -> None:
    for _, size, instruction in layers:
        print(f"{size / MEGABYTE:10,.2f} MB  {instruction[:120]}")


def test_it_contains_no_files_of_the_build(image: str) -> None:
    listing = ["git", "-C", str(ROOT), "ls-files", "trainer", "conf"]
    ours = subprocess.run(listing, capture_output=True, text=True, check=True).stdout.split()
    with images.tree_of(image) as tree:
        code = {str(path.relative_to(tree / "app")) for path in (tree / "app").rglob("*") if path.is_file()}
        assert {path for path in code if "__pycache__" not in path} == set(ours)
        programs = {p.name for d in ("bin", "usr/bin", "usr/local/bin", "opt/venv/bin") for p in (tree / d).glob("*")}
        assert "python" in programs
        assert not programs & {"cc", "gcc", "g++", "c++", "clang", "make", "ld", "as", "git", "uv", "ruff", "pytest"}
        assert not [p.name for p in (tree / "opt/venv/bin").glob("pip*")]
        for folder in ("root/.cache", "cache", "outputs", "tmp", "build", "var/cache/ldconfig"):
            assert [p for p in (tree / folder).rglob("*") if p.is_file()] == [], folder
        assert not (tree / "etc/pip.conf").exists() or (tree / "etc/pip.conf").stat().st_size == 0
        for folder in ("app", "opt/venv/lib"):
            sources = [p for p in (tree / folder).rglob("*.py") if not (p.parent / "__pycache__").is_dir()]
            assert sources == [], "not compiled"
        stats = {path: path.stat() for path in (tree / "app").rglob("*")}
        assert [p for p, stat in stats.items() if stat.st_uid != 0 or not stat.st_mode & 0o004] == []


def test_its_packages_are_those_of_the_lock(image: str) -> None:
    program = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    code, text = run(image, "-c", program, seconds=60, options=["--entrypoint=python"])
    assert code == 0, text
    installed = {re.sub(r"[._]", "-", name).lower(): version for name, version in map(str.split, text.splitlines())}
    locked = (ROOT / "requirements-image.lock").read_text()
    assert "tensorflow" in installed
    assert not [name for name in installed if name.startswith("nvidia-")]
    for name, version in installed.items():
        assert re.search(rf"^{name}=={re.escape(version)}\s", locked, re.MULTILINE), name


def test_the_quickstart_is_interrupted_and_resumed(image: str, outputs: Path) -> None:
    """The unchanged quickstart without network, writable root or privileges."""
    volumes = {outputs: "/outputs"}
    arguments = ("output_dir=/outputs", "runtime.progress=lines")
    with started(image, *arguments, volumes=volumes) as container:
        with timed("\nuntil the first phase"):
            container.wait_for("phase head", 300)
        metrics = outputs / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and metrics.read_text(), container.logs, 300)
        code, seconds = container.stop()
        text = container.logs()
    print(f"SIGTERM in training: exit code {code} after {seconds:.1f} s")
    assert code == 75, text
    assert seconds < 30
    assert "SIGTERM: " in text
    assert (outputs / "checkpoints" / "LATEST").exists()
    with timed("from the checkpoint to the end"):
        code, text = run(image, *arguments, volumes=volumes, seconds=1200)
    assert code == 0, text
    assert "resuming" in text
    assert (outputs / "DONE").exists()
    starts = json.loads((outputs / "run.json").read_text())["attempts"]
    assert [start["git"] for start in starts] == [REVISION, REVISION]
    assert run(image, *arguments, volumes=volumes, seconds=60)[0] == 0  # it is complete


@pytest.mark.parametrize("importing", ["", "libtensorflow"], ids=["at once", "while TensorFlow is imported"])
def test_sigterm_is_handled_from_the_start(image: str, outputs: Path, importing: str) -> None:
    with started(image, *SMALL, volumes={outputs: "/outputs"}) as container:
        pid = int(container.state("Pid"))
        while not catches(pid, signal.SIGTERM) or not has_loaded(pid, importing):
            assert container.running(), container.logs()
            time.sleep(0.005)
        code, seconds = container.stop()
        text = container.logs()
    print(f"\nexit code {code} after {seconds:.1f} s: {text.strip()}")
    assert code == 75, text
    assert seconds < 15
    assert "interrupted" in text


def test_the_other_commands(image: str, outputs: Path) -> None:
    def command(verb: str, *arguments: str) -> str:
        entrypoint = f'--entrypoint=["python", "-m", "trainer.{verb}"]'
        code, text = run(image, *arguments, seconds=300, volumes={outputs: "/outputs"}, options=[entrypoint])
        assert code == 0, text
        return text

    assert "/outputs/prepared holds 1797 images of 10 classes" in command("prepare", "output=/outputs/prepared")
    assert "glyphs" in command("plan", "data=tfds", "data.root=/outputs/prepared", "model=glyphs_mobilenet_v2")


def test_a_missing_output_dir_is_reported(image: str) -> None:
    code, text = run(image, seconds=120)
    assert code == 2
    assert re.search(r"error: .*outputs/.*output_dir=", text), text


@pytest.fixture(scope="module")
def gpu_image(image: str) -> Iterator[str]:
    tag = f"{image}-gpu"
    with timed("\nimage for GPUs"):
        images.build(ROOT, tag, "--build-arg=DEVICE=gpu")
    print_layers(images.layers(tag))
    yield tag
    images.remove(tag)


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A folder with a stub driver, as GKE nodes mount it at /usr/local/nvidia/lib64."""
    source = Path(__file__).with_name("driver.c")
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / name), str(source)], check=True)
    tmp_path.chmod(0o755)
    return tmp_path


def test_tensorflow_loads_cuda_and_lists_the_gpu(gpu_image: str, driver: Path) -> None:
    options, volumes = ["--entrypoint=python", "--env=TF_CPP_MAX_VLOG_LEVEL=1"], {driver: "/usr/local/nvidia/lib64"}
    code, text = run(gpu_image, "-c", LIST_GPUS, seconds=120, volumes=volumes, options=options)
    assert code == 0, text
    assert "Could not load dynamic library" not in text
    for library in ("cudart", "cublas", "cufft", "cusolver", "cusparse", "cudnn"):
        assert f"Successfully opened dynamic library lib{library}.so" in text, text
    assert "PhysicalDevice(name='/physical_device:GPU:0', device_type='GPU')" in text


def test_without_a_driver_it_trains_on_the_cpu(gpu_image: str) -> None:
    code, text = run(gpu_image, "debug=fast", "output_dir=/tmp/run", seconds=300)
    assert code == 0, text


def test_another_device_is_rejected(image: str) -> None:
    with pytest.raises(AssertionError, match=r"DEVICE=tpu: .*cpu or gpu"):
        images.build(ROOT, f"{image}-tpu", "--target=cuda", "--build-arg=DEVICE=tpu")


LIST_RUNS = """
import gcsfs, urllib.request
print(urllib.request.urlopen("http://127.0.0.1:6006/data/runs").read().decode())
"""


def test_the_image_of_tensorboard_is_small_and_shows_a_run(tensorboard: str, outputs: Path) -> None:
    """The command of the manifest, on a folder instead of a bucket; both are read through fsspec."""
    (pods,) = list_pods("overlays/tensorboard")
    own = images.layers(tensorboard)[len(images.layers(images.BASE)) :]
    print_layers(own)
    assert sum(size for _, size, _ in own) < 300 * MEGABYTE
    assert images.inspect(tensorboard)["Config"]["User"] == f"{USER}:{USER}"
    folder = outputs / "a" / "logs"
    folder.mkdir(parents=True)
    (folder / EVENT_FILE).write_bytes(serialize_job("a", {"seed": 1}, {"val_accuracy": 0.5}, succeeded=True))
    arguments = [re.sub("gs://BUCKET/runs", "/outputs", argument) for argument in pods.arguments()]
    entrypoint = f"--entrypoint={json.dumps(pods.container['command'])}"
    with started(tensorboard, *arguments, volumes={outputs: "/outputs"}, options=[entrypoint]) as container:
        program = ["podman", *images.OWN_STORE, "exec", container.name, pods.container["command"][0], "-c", LIST_RUNS]
        listed = lambda: subprocess.run(program, capture_output=True, text=True, check=False).stdout  # noqa: E731
        wait_until(lambda: "a/logs" in listed(), lambda: f"{listed()}\n{container.logs()}")
