"""Pin the images of other projects to their digests: `make pin`.

The Dockerfile and the manifests in k8s/ name the images by version, `NAME:TAG`. This script appends the digest that the
tag currently has in its registry, `NAME:TAG@sha256:...`, or replaces an older digest. Empty images, which users edit,
and `kubetune:local`, which is in no registry, are not changed.

skopeo reads the digests, with its credentials and mirrors (`skopeo login`, registries.conf). No file is written before
all digests have been read.
"""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 120  # maximum seconds to read a digest
REFERENCE = re.compile(
    r"""^(?P<before> ARG[ ]BASE= | [ ]*(?:-[ ])?image:[ ]+["']? )
        (?P<image> [\w.-]+ (?: :\d+ (?=/) )? (?: /[\w.-]+ )* : [\w.-]+ )
        (?: @(?P<digest> sha256:[0-9a-f]{64} ) )?""",
    re.MULTILINE | re.VERBOSE,
)
LOCAL = "kubetune:local"  # image that is built on this machine


class PinError(Exception):
    """The images cannot be pinned; the message is one sentence."""


def list_files(root: Path) -> list[Path]:
    """List the files that name images: the Dockerfile and all manifests."""
    return [root / "Dockerfile", *sorted((root / "k8s").rglob("*.yaml"))]


def find_images(text: str) -> dict[str, str | None]:
    """Find the images (`NAME:TAG`) in a Dockerfile or manifest. Return the digest (`sha256:...`) of each, or None."""
    return {match["image"]: match["digest"] for match in REFERENCE.finditer(text) if match["image"] != LOCAL}


def pin_images(text: str, digests: dict[str, str]) -> str:
    """Return the text with the digest in `digests` (`NAME:TAG` -> `sha256:...`) after each of these images."""

    def pin(match: re.Match[str]) -> str:
        digest = digests.get(match["image"])
        return f"{match['before']}{match['image']}@{digest}" if digest else match[0]

    return REFERENCE.sub(pin, text)


def read_digest(image: str) -> str:
    """Read an image's digest, that of the index of all architectures, from its registry. `image` is `NAME:TAG`."""
    command = ["skopeo", "inspect", "--no-tags", "--format={{.Digest}}", f"docker://{image}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=TIMEOUT_S)
    except FileNotFoundError:
        raise PinError("skopeo, which reads the digests, is not installed; apt-get or brew install skopeo") from None
    except subprocess.TimeoutExpired:
        raise PinError(f"{image}: its registry did not answer for {TIMEOUT_S} s; no file was changed") from None
    digest = done.stdout.strip()
    if done.returncode or not re.fullmatch("sha256:[0-9a-f]{64}", digest):
        reason = (done.stderr.strip() or f"it printed {digest!r}").splitlines()[-1]
        reason = re.sub(r'time=.* level=fatal msg="(.*)"', r"\1", reason).replace('\\"', '"')
        raise PinError(f"{image}: skopeo cannot read its digest: {reason}; no file was changed")
    return digest


def main() -> None:
    """Pin all images; exit with a message if a digest cannot be read."""
    texts = {path: path.read_text() for path in list_files(ROOT)}
    present = {image: digest for text in texts.values() for image, digest in find_images(text).items()}
    try:
        digests = {image: read_digest(image) for image in present}
    except PinError as error:
        sys.exit(f"pin: {error}")
    for path, text in texts.items():
        if (pinned := pin_images(text, digests)) != text:
            path.write_text(pinned)
    for image, digest in digests.items():
        state = "unchanged" if digest == present[image] else f"was {present[image]}" if present[image] else "pinned"
        print(f"pin: {image}@{digest} ({state})")


if __name__ == "__main__":
    main()
