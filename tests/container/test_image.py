"""The image: what is in it, what a change of code rebuilds, that it runs and stops as a pod must, and finds CUDA."""

import json
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

import trainer
from tests.container import images
from tests.container.images import BASE, DEPENDENCIES, MEGABYTE, ROOT, USER, run, started
from tests.e2e.running import catches, has_loaded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(images.why_not() != "", reason=images.why_not()),
    pytest.mark.timeout(1800),
]

REVISION = "0123456789ab"
SMALL = (
    "experiment=quickstart",
    "output_dir=/outputs",
    "debug.max_examples=200",
    "phases.head.epochs=1",
    "phases.fine_tune.epochs=1",
)
LIST_GPUS = """
import ctypes, tensorflow as tf
ctypes.CDLL("libnccl.so.2")
print(tf.config.list_physical_devices("GPU"))
"""


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """The image of this checkout, for CPUs."""
    with images.store():
        yield from built()


def built() -> Iterator[str]:
    began = time.monotonic()
    images.make_base()
    print(f"\nbase {BASE}: {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    images.build(ROOT, DEPENDENCIES, "--target=dependencies")
    print(f"dependencies: {time.monotonic() - began:.0f} s")
    began = time.monotonic()
    tag = f"localhost/kubetune-test:{uuid.uuid4().hex[:12]}"
    images.build(ROOT, tag, f"--build-arg=VERSION={trainer.__version__}", f"--build-arg=REVISION={REVISION}")
    print(f"image: {time.monotonic() - began:.0f} s, {images.inspect(tag)['Size'] / MEGABYTE:,.0f} MB")
    yield tag
    images.remove(tag)


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A folder to mount that belongs to the image's user, as a volume with `fsGroup` would."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    shutil.chown(folder, USER, USER)
    return folder


def test_it_says_what_it_is_and_runs_as_nobody_in_particular(image: str) -> None:
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


def test_a_change_of_code_rebuilds_one_thin_layer(image: str, tmp_path: Path) -> None:
    context = tmp_path / "checkout"
    context.mkdir()
    for name in ("Dockerfile", ".dockerignore", "requirements-image.lock"):
        shutil.copy2(ROOT / name, context)
    for name in ("conf", "trainer"):
        shutil.copytree(ROOT / name, context / name)
    with open(context / "trainer" / "errors.py", "a") as file:
        file.write("\n# changed\n")
    began = time.monotonic()
    changed = f"{image}-changed"
    images.build(context, changed, f"--build-arg=VERSION={trainer.__version__}", f"--build-arg=REVISION={REVISION}")
    print(f"\nrebuilt after a change of code: {time.monotonic() - began:.1f} s")
    try:
        before, after = images.layers(image), images.layers(changed)
    finally:
        images.remove(changed)
    for _, size, made_by in after:
        print(f"{size / MEGABYTE:10,.2f} MB  {made_by[:120]}")
    assert [digest for digest, *_ in before[:-1]] == [digest for digest, *_ in after[:-1]]
    assert before[-1][0] != after[-1][0]
    assert after[-1][1] < 10 * MEGABYTE


def test_nothing_of_the_build_is_left(image: str) -> None:
    ours = subprocess.run(
        ["git", "ls-files", "trainer", "conf"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
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
        strange = [p for p in (tree / "app").rglob("*") if p.stat().st_uid != 0 or not p.stat().st_mode & 0o004]
        assert strange == []


def test_its_packages_are_those_of_the_lock(image: str) -> None:
    program = "import importlib.metadata as m; [print(d.name, d.version) for d in m.distributions()]"
    code, text = run(image, "-c", program, seconds=60, options=["--entrypoint=python"])
    assert code == 0, text
    found = {re.sub(r"[._]", "-", name).lower(): version for name, version in map(str.split, text.splitlines())}
    locked = (ROOT / "requirements-image.lock").read_text()
    assert "tensorflow" in found
    assert not [name for name in found if name.startswith("nvidia-")]
    for name, version in found.items():
        assert re.search(rf"^{name}=={re.escape(version)}\s", locked, re.MULTILINE), name


def test_the_quickstart_is_interrupted_goes_on_and_ends_well(image: str, outputs: Path) -> None:
    """The real quickstart, as `docker run` of the image: no network, no writable root, no privileges."""
    volumes = {outputs: "/outputs"}
    arguments = ("output_dir=/outputs", "runtime.progress=lines")
    began = time.monotonic()
    with started(image, *arguments, volumes=volumes) as container:
        container.wait_for("phase head", 300)
        print(f"\nfirst phase after {time.monotonic() - began:.1f} s")
        while not (outputs / "metrics.jsonl").exists() or not (outputs / "metrics.jsonl").read_text():
            assert container.running(), container.logs()
            time.sleep(0.1)
        code, seconds = container.stop()
        text = container.logs()
    print(f"SIGTERM in training: exit code {code} after {seconds:.1f} s")
    assert code == 75, text
    assert seconds < 30
    assert "SIGTERM: saving at the next step, then stopping" in text
    assert (outputs / "checkpoints" / "LATEST").exists()
    began = time.monotonic()
    code, text = run(image, *arguments, volumes=volumes, seconds=1200)
    print(f"from there to the end: {time.monotonic() - began:.0f} s")
    assert code == 0, text
    assert "resuming" in text
    assert (outputs / "DONE").exists()
    attempts = json.loads((outputs / "run.json").read_text())["attempts"]
    assert [attempt["git"] for attempt in attempts] == [REVISION, REVISION]
    assert run(image, *arguments, volumes=volumes, seconds=60)[0] == 0  # finished already


@pytest.mark.parametrize("moment", ["at once", "while TensorFlow is imported"])
def test_sigterm_reaches_python_from_its_first_moments(image: str, outputs: Path, moment: str) -> None:
    with started(image, *SMALL, volumes={outputs: "/outputs"}) as container:
        pid = container.pid
        while not catches(pid, signal.SIGTERM) or (moment != "at once" and not has_loaded(pid, "libtensorflow")):
            assert container.running(), container.logs()
            time.sleep(0.005)
        early = not has_loaded(pid, "pydantic_core")
        code, seconds = container.stop()
        text = container.logs()
    print(f"\n{moment}{' (before pydantic)' if early else ''}: exit code {code} after {seconds:.1f} s: {text.strip()}")
    assert code == 75, text
    assert seconds < 15
    assert "nothing is lost" in text


def test_the_other_commands(image: str, outputs: Path) -> None:
    def command(verb: str, *arguments: str) -> str:
        entrypoint = f'--entrypoint=["python", "-m", "trainer.{verb}"]'
        code, text = run(image, *arguments, seconds=300, volumes={outputs: "/outputs"}, options=[entrypoint])
        assert code == 0, text
        return text

    assert "/outputs/prepared holds 1797 images of 10 classes" in command("prepare", "output=/outputs/prepared")
    assert "glyphs" in command("plan", "data=tfds", "data.root=/outputs/prepared", "model=glyphs_mobilenet_v2")


def test_without_an_output_dir_it_says_what_is_missing(image: str) -> None:
    code, text = run(image, seconds=120)
    assert code == 2
    assert re.search(r"error: cannot create /?outputs/\S+: .*; give output_dir=FOLDER", text), text


@pytest.fixture(scope="module")
def gpu_image(image: str) -> Iterator[str]:
    """The image for GPUs: the other one and NVIDIA's libraries."""
    tag = f"{image}-gpu"
    began = time.monotonic()
    images.build(ROOT, tag, "--build-arg=DEVICE=gpu")
    print(f"\nimage for GPUs: {time.monotonic() - began:.0f} s, {images.inspect(tag)['Size'] / MEGABYTE:,.0f} MB")
    for _, size, made_by in images.layers(tag):
        print(f"{size / MEGABYTE:10,.2f} MB  {made_by[:120]}")
    yield tag
    images.remove(tag)


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """What a GKE node mounts at /usr/local/nvidia/lib64; nothing else is missing here."""
    source = Path(__file__).with_name("driver.c")
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        subprocess.run(["cc", "-shared", "-fPIC", "-o", str(tmp_path / name), str(source)], check=True)
    tmp_path.chmod(0o755)
    return tmp_path


def test_tensorflow_finds_cuda_and_takes_the_gpu(gpu_image: str, driver: Path) -> None:
    options = ["--entrypoint=python", "--env=TF_CPP_MAX_VLOG_LEVEL=1"]
    code, text = run(
        gpu_image, "-c", LIST_GPUS, seconds=120, volumes={driver: "/usr/local/nvidia/lib64"}, options=options
    )
    assert code == 0, text
    assert "Could not load dynamic library" not in text
    for library in ("cudart", "cublas", "cufft", "cusolver", "cusparse", "cudnn"):
        assert f"Successfully opened dynamic library lib{library}.so" in text, text
    assert "PhysicalDevice(name='/physical_device:GPU:0', device_type='GPU')" in text


def test_without_a_driver_it_trains_on_the_cpu(gpu_image: str) -> None:
    code, text = run(gpu_image, "debug=fast", "output_dir=/tmp/run", seconds=300)
    assert code == 0, text


def test_another_device_is_refused(image: str) -> None:
    with pytest.raises(AssertionError, match="DEVICE=tpu: say cpu or gpu"):
        images.build(ROOT, f"{image}-tpu", "--target=cuda", "--build-arg=DEVICE=tpu")
