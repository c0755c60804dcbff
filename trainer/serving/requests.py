"""Read and parse requests within limits, and check the headers of their images."""

import asyncio
import base64
import contextlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from trainer.serving.settings import Settings

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # as trainer.data.decoding
MAX_SCANS = 100  # of a progressive JPEG, each as costly as decoding the image; usual files have about ten
BODY_SECONDS = 30.0  # time limit of a body, plus its size over this rate:
MIN_BYTES_PER_SECOND = 100_000
CONCURRENT_BODIES = 8  # bodies of the largest size in memory at once
DISCARDED_BODIES = 4  # bodies of the largest size that are read and discarded, so that the client gets the response
MAX_FIELDS = 16  # of a form, not counting files
CLOSE = {"Connection": "close"}

Image.MAX_IMAGE_PIXELS = None  # PIL's limit warns, or raises while the header is read; `max_pixels` replaces it


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image whose header is valid; `pixels` is width x height."""

    data: bytes
    name: str
    pixels: int


@dataclass(frozen=True)
class PredictRequest:
    """The images of a request, and the form of its response; `columnar`: TensorFlow Serving's response to `inputs`."""

    images: list[EncodedImage]
    top_k: int = 5
    explain: bool = False
    columnar: bool = False


def check_image(data: bytes, name: str, max_pixels: int) -> EncodedImage:
    """Check the header of an image without decoding it.

    Raises:
        HTTPException: 400 not an image; 413 too many pixels; 415 an animation.
    """
    if not data:
        raise HTTPException(400, f"{name} is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height, kind = *image.size, image.format
            animated = width * height <= max_pixels and kind in ("GIF", "WEBP") and getattr(image, "is_animated", False)
    except Exception as error:  # of any class: the bytes are not trusted
        raise HTTPException(400, f"{name} is not an image in a supported format: {', '.join(FORMATS)}") from error
    if animated:
        raise HTTPException(415, f"{name} is an animation; send one frame of it")
    if width * height > max_pixels:
        raise HTTPException(413, f"{name} has {width} x {height} pixels, the limit is {max_pixels:,}; send it smaller")
    if kind == "JPEG" and data.count(b"\xff\xda") > MAX_SCANS:
        raise HTTPException(400, f"{name} is a JPEG with more than {MAX_SCANS} scans; save it as a baseline JPEG")
    return EncodedImage(data, name, width * height)


@dataclass
class MemoryBudget:
    """Memory for request bodies, `CONCURRENT_BODIES` of `max_bytes`; a request that exceeds it gets 503."""

    max_bytes: int
    reserved: int = 0

    @contextlib.contextmanager
    def reservation(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that reserves more bytes; all of them are released at the end."""
        size = 0

        def reserve(count: int) -> None:
            nonlocal size
            if self.reserved + count > CONCURRENT_BODIES * self.max_bytes:
                raise unavailable("too many large requests at once")
            self.reserved += count
            size += count

        try:
            yield reserve
        finally:
            self.reserved -= size


def unavailable(reason: str) -> HTTPException:
    """HTTP error 503 with `Retry-After`."""
    return HTTPException(503, f"{reason}; try again", {"Retry-After": "1"})


async def read_body(request: Request, reserve: Callable[[int], None], limit: int) -> bytes:
    """Read the whole body; `reserve` is called with the size of each chunk before it is stored.

    Raises:
        HTTPException: 408 too slow; 413 too long; 503 no memory left.
    """
    header = request.headers.get("content-length", "")
    declared = int(header) if header.isdigit() else 0
    too_long = HTTPException(413, f"the request is longer than {limit:,} bytes; send fewer or smaller images", CLOSE)
    if declared > limit and request.headers.get("expect", "").lower() == "100-continue":
        raise too_long  # before it is sent
    body = bytearray()
    discarded = 0
    seconds = BODY_SECONDS + min(declared or limit, DISCARDED_BODIES * limit) / MIN_BYTES_PER_SECOND
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                if discarded or declared > limit or len(body) + len(chunk) > limit:
                    discarded += len(chunk)
                    if discarded > DISCARDED_BODIES * limit:
                        raise too_long
                    continue
                reserve(len(chunk))
                body += chunk
    except TimeoutError:
        raise HTTPException(408, "the request was sent too slowly", CLOSE) from None
    except ClientDisconnect:
        raise HTTPException(400, "the request is incomplete", CLOSE) from None
    if discarded:
        raise too_long
    return bytes(body)


def read_predict(body: bytes, content_type: str, query: dict[str, str], settings: Settings) -> PredictRequest:
    """`POST /predict`: a form with files, or JSON `{"images": [base64, ...], "top_k": 5, "explain": false}`.

    Raises:
        HTTPException: 400, 413, 415.
    """
    kind, options = parse_options_header(content_type)
    parameters: dict[str, Any]
    if kind == b"multipart/form-data":
        parameters, files = _read_form(body, options.get(b"boundary", b""), settings.max_images)
    elif kind == b"application/json":
        parameters = _read_object(body)
        files = _read_list(parameters.pop("images", None), "images", settings.max_images)
    else:
        form, tree = "multipart/form-data (curl -F file=@photo.jpg)", '{"images": ["..."]}'
        raise HTTPException(415, f"send images as {form}, or in base64 as application/json: {tree}")
    parameters = query | parameters
    unknown = sorted(set(parameters) - {"top_k", "explain"})
    if unknown:
        raise HTTPException(400, f"unknown parameter {unknown[0]!a}; known: images, top_k, explain")
    images = _checked(files, settings)
    return PredictRequest(images, _read_int(parameters.get("top_k", 5)), _read_bool(parameters.get("explain", False)))


def read_instances(body: bytes, settings: Settings, explain: bool = False) -> PredictRequest:
    """`POST /v1/models/NAME:predict`: `{"instances": [{"b64": "..."}]}`, or `inputs` for a columnar response.

    Accepts both formats of TensorFlow Serving's REST API, with the name of the input (`image_bytes`) or without:
    https://www.tensorflow.org/tfx/serving/api_rest. The content type does not matter, as there.

    Raises:
        HTTPException: 400, 413, 415.
    """
    tree = _read_object(body)
    if ("instances" in tree) == ("inputs" in tree):
        raise HTTPException(400, 'the request needs either "instances": [{"b64": "..."}] or "inputs"')
    signature = tree.get("signature_name", "serving_default")
    if signature not in ("", "serving_default", "image_bytes", "explain"):
        raise HTTPException(400, f"unknown signature_name {signature!a}; known: image_bytes, explain")
    key = "inputs" if "inputs" in tree else "instances"
    images = tree[key]
    if key == "inputs" and isinstance(images, dict) and "image_bytes" in images:
        images = images["image_bytes"]
    if isinstance(images, list):
        images = [image.get("image_bytes", image) if isinstance(image, dict) else image for image in images]
    images = _checked(_read_list(images, key, settings.max_images), settings)
    return PredictRequest(images, explain=explain or signature == "explain", columnar=key == "inputs")


def _checked(files: list[tuple[str, bytes]], settings: Settings) -> list[EncodedImage]:
    if not files:
        raise HTTPException(400, "there is no image in the request")
    return [check_image(data, name, settings.max_pixels) for name, data in files]


def _read_object(body: bytes) -> dict[str, Any]:
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is not valid JSON") from None
    if not isinstance(tree, dict):
        raise HTTPException(400, "the request is not a JSON object")
    return tree


def _read_list(images: Any, key: str, limit: int) -> list[tuple[str, bytes]]:
    if not isinstance(images, list):
        raise HTTPException(400, f'"{key}" must be a list of images in base64')
    if len(images) > limit:
        raise _too_many(limit)
    return [(f"{key}[{i}]", _decode_base64(image, f"{key}[{i}]")) for i, image in enumerate(images)]


def _decode_base64(value: Any, name: str) -> bytes:
    text = value.get("b64") if isinstance(value, dict) else value
    if not isinstance(text, str) or (isinstance(value, dict) and len(value) > 1):
        raise HTTPException(400, f'{name} must be an image in base64: "..." or {{"b64": "..."}}')
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:
        raise HTTPException(400, f"{name} is not valid base64") from None


def _read_form(body: bytes, boundary: bytes, limit: int) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    fields: dict[str, Any] = {}
    files: list[tuple[str, bytes]] = []
    complete = False

    def on_field(field: Field) -> None:
        fields[(field.field_name or b"").decode(errors="replace")[:50]] = (field.value or b"").decode(errors="replace")
        if len(fields) > MAX_FIELDS:
            raise HTTPException(400, f"the form has more than {MAX_FIELDS} fields in addition to its files")

    def on_file(file: File) -> None:
        if len(files) == limit:
            raise _too_many(limit)
        file.file_object.seek(0)
        name = (file.file_name or file.field_name or b"").decode(errors="replace")
        files.append((name[:200] or f"file {len(files) + 1}", file.file_object.read()))

    def on_end() -> None:
        nonlocal complete
        complete = True

    in_memory = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}
    with contextlib.suppress(FormParserError):
        parser = FormParser("multipart/form-data", on_field, on_file, on_end, boundary=boundary, config=in_memory)
        parser.write(body)
        parser.finalize()
        if complete:
            return fields, files
    raise HTTPException(400, "the form is damaged: multipart/form-data needs a boundary and complete parts")


def _too_many(limit: int) -> HTTPException:
    return HTTPException(413, f"a request may hold {limit} images; split it")


def _read_int(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise HTTPException(400, "top_k must be a positive integer")
    return value


def _read_bool(value: Any) -> bool:
    known = {"true": True, "1": True, "false": False, "0": False}
    flag = known.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(flag, bool):
        raise HTTPException(400, "explain must be true or false")
    return flag
