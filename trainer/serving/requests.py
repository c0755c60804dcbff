"""Requests: bodies are read and parsed within limits, and the headers of their images checked."""

import asyncio
import base64
import binascii
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from trainer.serving.settings import Settings

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # what trainer.data.decoding decodes
SCANS = 100  # of a JPEG, each as much work as the whole picture; cameras and the web write at most about ten

Image.MAX_IMAGE_PIXELS = None  # PIL's own guard warns, or raises while the header is read; ours has a number


class Refused(Exception):
    """A request that is refused: the HTTP status, and a sentence for the client."""

    def __init__(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers or {}


@dataclass(frozen=True)
class Picture:
    """An encoded image whose header is valid; `pixels` is width x height."""

    data: bytes
    name: str
    pixels: int


def examined(data: bytes, name: str, max_pixels: int) -> Picture:
    """Check the header of an image; nothing is decoded.

    Raises:
        Refused: 400 no image; 413 too many pixels; 415 an animation.
    """
    if not data:
        raise Refused(400, f"{name} is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height, kind = *image.size, image.format
            if width * height <= max_pixels and kind in ("GIF", "WEBP") and getattr(image, "is_animated", False):
                raise Refused(415, f"{name} is an animation; send one picture of it")
    except Refused:
        raise
    except Exception as error:  # of whatever kind: the bytes are not trusted
        raise Refused(400, f"{name} is not an image that can be read: {', '.join(FORMATS)} can") from error
    if width * height > max_pixels:
        raise Refused(413, f"{name} has {width} x {height} pixels, at most {max_pixels:,} are decoded; send it smaller")
    if kind == "JPEG" and data.count(b"\xff\xda") > SCANS:
        raise Refused(400, f"{name} is a JPEG of more than {SCANS} scans; save it as a usual one")
    return Picture(data, name, width * height)


SECONDS = 30.0  # in which a body must have come
LEAST_RATE = 100_000  # bytes a second; a large body may take longer by this
TOGETHER = 8  # bodies of the largest size that may be on their way at once
UNREAD = 4  # bodies of the largest size that are read and dropped, so that the sender hears the answer
FIELDS = 16  # of a form, beside the files


@dataclass
class Room:
    """At most `limit` bytes of bodies in memory: requests that find none left are refused (503)."""

    limit: int
    taken: int = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[Callable[[int], None]]:
        """A function that reserves so many bytes more; all are given back at the end."""
        size = 0

        def reserve(by: int) -> None:
            nonlocal size
            if self.taken + by > self.limit:
                raise busy("too many large requests at once")
            self.taken += by
            size += by

        try:
            yield reserve
        finally:
            self.taken -= size


def busy(why: str) -> Refused:
    """503: come again in a second."""
    return Refused(503, f"{why}; try again", {"Retry-After": "1"})


async def read_body(request: Request, reserve: Callable[[int], None], limit: int) -> bytes:
    """The whole body; `reserve` is called with the size of each chunk before that is stored.

    Raises:
        Refused: 408 it came too slowly; 413 it is too long; 503 others have taken the memory.
    """
    header = request.headers.get("content-length", "")
    declared = int(header) if header.isdigit() else 0
    too_long = Refused(413, f"the request is longer than {limit:,} bytes; send fewer or smaller images", CLOSE)
    if declared > limit and request.headers.get("expect", "").lower() == "100-continue":
        raise too_long  # before it is sent
    body = bytearray()
    dropped = 0
    try:
        async with asyncio.timeout(SECONDS + min(declared or limit, UNREAD * limit) / LEAST_RATE):
            async for chunk in request.stream():
                if dropped or declared > limit or len(body) + len(chunk) > limit:
                    dropped += len(chunk)
                    if dropped > UNREAD * limit:
                        raise too_long
                    continue
                reserve(len(chunk))
                body += chunk
    except TimeoutError:
        raise Refused(408, "the request came too slowly", CLOSE) from None
    except ClientDisconnect:
        raise Refused(400, "the request ended before it was whole", CLOSE) from None
    if dropped:
        raise too_long
    return bytes(body)


CLOSE = {"Connection": "close"}


@dataclass(frozen=True)
class Asked:
    """The images of a request, and the answer that it asks for."""

    pictures: list[Picture]
    top_k: int = 5
    explain: bool = False
    columns: bool = False  # the answer as TensorFlow Serving gives it to `inputs`


def read_predict(body: bytes, content_type: str, query: dict[str, str], settings: Settings) -> Asked:
    """`POST /predict`: a form with files, or JSON `{"images": [base64, ...], "top_k": 5, "explain": false}`.

    Raises:
        Refused: 400, 413, 415.
    """
    kind, options = parse_options_header(content_type)
    if kind == b"multipart/form-data":
        said, files = _form(body, options.get(b"boundary", b""), settings.max_images)
    elif kind == b"application/json":
        tree = _object(body)
        said = {key: value for key, value in tree.items() if key != "images"}
        files = _listed(tree.get("images"), "images", settings.max_images)
    else:
        raise Refused(415, "send images as multipart/form-data (curl -F file=@photo.jpg), or as base64 in JSON: "
                           '{"images": ["..."]}')  # fmt: skip
    said = query | said
    unknown = sorted(set(said) - {"top_k", "explain"})
    if unknown:
        raise Refused(400, f"{unknown[0]!a} means nothing here; known: images, top_k, explain")
    pictures = _pictures(files, settings)
    return Asked(pictures, _whole(said.get("top_k", 5)), _flag(said.get("explain", False)))


def read_instances(body: bytes, settings: Settings, explain: bool = False) -> Asked:
    """`POST /v1/models/NAME:predict`: `{"instances": [{"b64": "..."}]}`, or `inputs` for the answer in columns.

    Both forms that TensorFlow Serving's REST API knows are taken, with the name of the input (`image_bytes`) or
    without: https://www.tensorflow.org/tfx/serving/api_rest. The content type does not matter, as there.

    Raises:
        Refused: 400, 413, 415.
    """
    tree = _object(body)
    if ("instances" in tree) == ("inputs" in tree):
        raise Refused(400, 'the request needs "instances": [{"b64": "..."}], or "inputs" in its place')
    signature = tree.get("signature_name", "serving_default")
    if signature not in ("", "serving_default", "image_bytes", "explain"):
        raise Refused(400, f"signature_name {signature!a} is not served here; known: image_bytes, explain")
    columns = "inputs" in tree
    images = tree["inputs" if columns else "instances"]
    if columns and isinstance(images, dict) and "image_bytes" in images:
        images = images["image_bytes"]
    if isinstance(images, list):
        images = [one.get("image_bytes", one) if isinstance(one, dict) else one for one in images]
    files = _listed(images, "inputs" if columns else "instances", settings.max_images)
    return Asked(_pictures(files, settings), explain=explain or signature == "explain", columns=columns)


def _pictures(files: list[tuple[str, bytes]], settings: Settings) -> list[Picture]:
    if not files:
        raise Refused(400, "there is no image in the request")
    return [examined(data, name, settings.max_pixels) for name, data in files]


def _object(body: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the request is not valid JSON") from None
    if not isinstance(tree, dict):
        raise Refused(400, "the request is not a JSON object")
    return tree


def _listed(images: Any, key: str, most: int) -> list[tuple[str, bytes]]:
    if not isinstance(images, list):
        raise Refused(400, f'"{key}" must be a list of images in base64')
    if len(images) > most:
        raise _too_many(most)
    return [(f"{key}[{i}]", _decoded(one, f"{key}[{i}]")) for i, one in enumerate(images)]


def _decoded(value: Any, name: str) -> bytes:
    text = value.get("b64") if isinstance(value, dict) else value
    if not isinstance(text, str) or (isinstance(value, dict) and len(value) > 1):
        raise Refused(400, f'{name} must be an image in base64: "..." or {{"b64": "..."}}')
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(400, f"{name} is not valid base64") from None


def _form(body: bytes, boundary: bytes, most: int) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    said: dict[str, Any] = {}
    files: list[tuple[str, bytes]] = []
    whole = False

    def on_field(field: Field) -> None:
        said[(field.field_name or b"").decode(errors="replace")[:50]] = (field.value or b"").decode(errors="replace")
        if len(said) > FIELDS:
            raise Refused(400, f"the form has more than {FIELDS} fields beside its files")

    def on_file(file: File) -> None:
        if len(files) == most:
            raise _too_many(most)
        file.file_object.seek(0)
        name = (file.file_name or file.field_name or b"").decode(errors="replace")
        files.append((name[:200] or f"file {len(files) + 1}", file.file_object.read()))

    def on_end() -> None:
        nonlocal whole
        whole = True

    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    with contextlib.suppress(FormParserError):
        parser = FormParser("multipart/form-data", on_field, on_file, on_end, boundary=boundary, config=in_memory)
        parser.write(body)
        parser.finalize()
        if whole:
            return said, files
    raise Refused(400, "the form is damaged: multipart/form-data needs its boundary and whole parts")


def _too_many(most: int) -> Refused:
    return Refused(413, f"a request may hold {most} images; send the others in another one")


def _whole(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise Refused(400, "top_k must be a whole number from 1")
    return value


def _flag(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    flag = known.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(flag, bool):
        raise Refused(400, "explain must be true or false")
    return flag
