"""`make pin` against a registry (Debian's `docker-registry`) to which a mirror directs Docker Hub and nvcr.io."""

import hashlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.processes import ROOT
from tests.waiting import PATIENCE, wait_until

SERVING = "docker.io/tensorflow/serving:2.21.0"
IMAGES = ("docker.io/library/python:3.12-slim", SERVING, "nvcr.io/nvidia/tensorrt:25.06-py3")
OWN = "nvcr.io/project/kubetune:1a2b3c"  # as a user writes it at an EDIT line
MIRRORS = ".config/containers/registries.conf"  # in HOME
MISSING = [program for program in ("docker-registry", "skopeo") if shutil.which(program) is None]

pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"apt-get install {' '.join(MISSING)}")


@dataclass(frozen=True)
class Registry:
    """A running registry; `environment` makes skopeo use it instead of docker.io and nvcr.io."""

    port: int
    folder: Path
    environment: dict[str, str]

    def push(self, image: str, content: str) -> str:
        """Push an image of two architectures; returns the digest of its index."""
        layout = self.folder / hashlib.sha256(content.encode()).hexdigest()
        digest = write_layout(layout, content)
        source, target = f"oci:{layout}", f"docker://localhost:{self.port}/{image}"
        command = [
            "skopeo",
            "copy",
            "--all",
            "--preserve-digests",
            "--quiet",
            "--dest-tls-verify=false",
            source,
            target,
        ]
        subprocess.run(command, check=True, timeout=PATIENCE)
        return digest


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    """An empty registry on a free port."""
    folder = tmp_path / "registry"
    folder.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "config.yml").write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {folder}/data}}}}\nhttp: {{addr: 'localhost:{port}'}}\n"
    )
    mirrors = folder / MIRRORS
    mirrors.parent.mkdir(parents=True)
    mirrors.write_text(
        "".join(
            f'[[registry]]\nprefix = "{name}"\nlocation = "localhost:{port}/{name}"\ninsecure = true\n'
            for name in ("docker.io", "nvcr.io")
        )
    )
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(["docker-registry", "serve", folder / "config.yml"], stdout=log, stderr=log)
    try:
        wait_until(lambda: answers(port), (folder / "log").read_text, process=server)
        yield Registry(port, folder, os.environ | {"HOME": str(folder)})
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the files that name images, and of the script."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "k8s", folder / "k8s")
    (folder / "scripts").mkdir()
    for name in ("Dockerfile", "scripts/pin_images.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_every_image_is_pinned_and_a_moved_tag_is_pinned_again(registry: Registry, checkout: Path) -> None:
    """The digest is that of the index of all architectures; the pinned image is pulled after its tag has moved."""
    edited = checkout / "k8s/components/image/image.yaml"
    edited.write_text(edited.read_text().replace('image: ""', f'image: "{OWN}"'))
    before = contents(checkout)
    digests = {image: registry.push(image, f"first {image}") for image in (OWN, *IMAGES)}

    first = pin(checkout, registry)
    assert first.returncode == 0, first.stderr
    after = contents(checkout)
    assert {name for name in after if after[name] != before[name]} == {
        "Dockerfile", "k8s/components/image/image.yaml", "k8s/overlays/serving/deployment.yaml", "k8s/tensorrt.yaml",
    }  # fmt: skip
    assert {name: re.sub("@sha256:[0-9a-f]{64}", "", text) for name, text in after.items()} == before
    for image, digest in digests.items():
        assert any(f"{short(image)}@{digest}" in text for text in after.values()), image
    assert f'image: "{OWN}@{digests[OWN]}" # EDIT' in edited.read_text()
    assert first.stdout.count("(pinned)") == len(digests)

    again = pin(checkout, registry)
    assert again.stdout.count("(unchanged)") == len(digests)
    assert contents(checkout) == after

    moved = registry.push(SERVING, "second")
    assert f"{short(SERVING)}@{moved} (was {digests[SERVING]})" in pin(checkout, registry).stdout
    assert f"{short(SERVING)}@{moved} #" in (checkout / "k8s/overlays/serving/deployment.yaml").read_text()
    assert pulled(registry, digests[SERVING]) == f"first {SERVING}"


def test_the_rendered_manifest_has_the_digest(registry: Registry, checkout: Path) -> None:
    """Kustomize keeps the digest, in the overlay that includes the pinned one too."""
    digests = {image: registry.push(image, image) for image in IMAGES}
    assert pin(checkout, registry).returncode == 0
    kubectl = Path(sys.executable).parent / "kubectl"
    for overlay in ("serving", "serving-log"):
        command = [kubectl, "kustomize", checkout / "k8s/overlays" / overlay]
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=PATIENCE).stdout
        assert f"image: {short(SERVING)}@{digests[SERVING]}\n" in text


@pytest.mark.parametrize("pushed", [0, 2])
def test_no_file_is_changed_if_an_image_cannot_be_read(registry: Registry, checkout: Path, pushed: int) -> None:
    """One missing image, or all of them: one sentence with the image, and the files as they were."""
    before = contents(checkout)
    for image in IMAGES[:pushed]:
        registry.push(image, image)
    done = pin(checkout, registry)
    assert done.returncode == 1
    assert re.fullmatch(r"pin: \S+: skopeo cannot read its digest: .*; no file was changed\n", done.stderr), done.stderr
    assert short(IMAGES[pushed]) in done.stderr
    assert contents(checkout) == before


def test_a_registry_that_does_not_answer_is_one_sentence(registry: Registry, checkout: Path) -> None:
    """A port without a server behind it."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        mirrors = registry.folder / MIRRORS
        mirrors.write_text(mirrors.read_text().replace(f":{registry.port}/", f":{unused.getsockname()[1]}/"))
        done = pin(checkout, registry)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "connection refused; no file was changed" in done.stderr


def test_without_skopeo(registry: Registry, checkout: Path, tmp_path: Path) -> None:
    """The error names the program and how to install it."""
    done = pin(checkout, registry, PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (1, "")
    assert "skopeo, which reads the digests, is not installed" in done.stderr


def pin(checkout: Path, registry: Registry, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "scripts/pin_images.py"], cwd=checkout, env=registry.environment | environment,
        capture_output=True, text=True, check=False, timeout=PATIENCE,
    )  # fmt: skip


def pulled(registry: Registry, digest: str) -> str:
    """The content of the image of this architecture with which a pinned reference is pulled."""
    target = registry.folder / "pulled"
    name = SERVING.rpartition(":")[0]
    subprocess.run(
        ["skopeo", "--override-arch=arm64", "copy", f"docker://{name}@{digest}", f"dir:{target}"],
        env=registry.environment, check=True, timeout=PATIENCE,
    )  # fmt: skip
    manifest = json.loads((target / "manifest.json").read_text())
    layer = target / manifest["layers"][0]["digest"].partition(":")[2]
    with tarfile.open(layer) as archive:
        file = archive.extractfile("content")
        assert file is not None
        return file.read().decode()


def write_layout(folder: Path, content: str) -> str:
    """An OCI image layout of one layer for two architectures; returns the digest of its index."""
    blobs = folder / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def add(data: bytes, kind: str, **more: object) -> dict[str, object]:
        digest = hashlib.sha256(data).hexdigest()
        (blobs / digest).write_bytes(data)
        return {
            "mediaType": f"application/vnd.oci.image.{kind}",
            "digest": f"sha256:{digest}",
            "size": len(data),
            **more,
        }

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo("content")
        info.size = len(content.encode())
        archive.addfile(info, io.BytesIO(content.encode()))
    layer = add(buffer.getvalue(), "layer.v1.tar")
    manifests = []
    for architecture in ("amd64", "arm64"):
        platform = {"architecture": architecture, "os": "linux"}
        diff_ids = [layer["digest"]]
        config = add(
            json.dumps(platform | {"rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode(), "config.v1+json"
        )
        manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config,
                    "layers": [layer]}  # fmt: skip
        manifests.append(add(json.dumps(manifest).encode(), "manifest.v1+json", platform=platform))
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
    entry = add(json.dumps(index).encode(), "index.v1+json")
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return str(entry["digest"])


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/v2/", timeout=PATIENCE) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def contents(checkout: Path) -> dict[str, str]:
    """The texts of the files that name images."""
    files = [checkout / "Dockerfile", *(checkout / "k8s").rglob("*.yaml")]
    return {str(path.relative_to(checkout)): path.read_text() for path in files}


def short(image: str) -> str:
    """An image as the project's files name it: Docker Hub's projects without the registry, Dockerfile's base with it."""
    return image if "/library/" in image else image.removeprefix("docker.io/")
