"""Read and parse requests within limits on size, time and memory, and check their images' headers."""

import asyncio
import base64
import contextlib
import io
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from trainer.serving.settings import Settings

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF")  # image formats that exports can decode
MAX_SCANS = 100  # per progressive JPEG; each scan costs about as much as a baseline JPEG, and files usually have ten
# Decoding time per pixel, relative to a PNG. Measured with 7,000 x 7,000 pixels on one core: PNG, WebP, GIF and BMP 2.1
# to 2.6 s; JPEG with 10 scans 1.1 s; baseline JPEG 0.1 s, because it is decoded at a fraction of its size.
BASELINE_JPEG_COST, SCAN_COST = 1 / 8, 1 / 10
BODY_TIMEOUT_SECONDS = 30.0  # for receiving a body, plus one second per MIN_BYTES_PER_SECOND bytes received so far
MIN_BYTES_PER_SECOND = 100_000
CONCURRENT_BODIES_FACTOR = 8  # memory limit for the bodies of all requests in progress, as a multiple of `max_bytes`
CONCURRENT_PIXELS_FACTOR = 4  # limit of the decoding cost per client, as a multiple of `max_pixels`
# Up to this multiple of `max_bytes`, an overlong body is read and discarded, so that the client gets the response.
DISCARDED_BODIES_FACTOR = 4
MAX_FIELDS = 16  # maximum per form, in addition to its files
CLOSE_HEADERS = {"Connection": "close"}  # header of the response if a body is not read to the end

Image.MAX_IMAGE_PIXELS = None  # disables Pillow's own limit, which warns or raises; `max_pixels` replaces it


@dataclass(frozen=True)
class EncodedImage:
    """An encoded image whose header has been checked."""

    data: bytes
    name: str  # file name, or position in the request such as "images[0]"
    pixels: int  # width x height
    cost: int = 0  # decoding cost: the number of pixels of a PNG that takes equally long to decode
    request_id: str = ""  # identifier of the request, for the prediction log


@dataclass(frozen=True)
class PredictRequest:
    """A request's images, and what the response must contain."""

    images: list[EncodedImage]
    top_k: int = 5  # number of classes per image in a response of /predict
    explain: bool = False  # the response has heatmaps and, except on the route /predict, embeddings
    columnar: bool = False  # the request has `inputs` instead of `instances`; the response has one list per output


def check_image(data: bytes, name: str, max_pixels: int) -> EncodedImage:
    """Check an image's header, and estimate the decoding cost, without decoding the image.

    Args:
        data: content of an image file.
        name: the image's name for error messages and the log.
        max_pixels: limit on width x height.

    Raises:
        HTTPException: 400 not an image, or a JPEG with too many scans; 413 too many pixels; 415 an animation.
    """
    if not data:
        raise HTTPException(400, f"{name} is empty")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            (width, height), file_format = image.size, image.format
            pixels = width * height
            progressive = "progressive" in image.info
            animated = pixels <= max_pixels and file_format in ("GIF", "WEBP") and getattr(image, "is_animated", False)
    except Exception as error:  # arbitrary bytes raise errors of many classes
        raise HTTPException(400, f"{name} is not an image in a supported format: {', '.join(FORMATS)}") from error
    if animated:
        raise HTTPException(415, f"{name} is an animation; send one frame of it")
    if pixels > max_pixels:
        raise HTTPException(413, f"{name} has {width} x {height} pixels, the limit is {max_pixels:,}; send it smaller")
    cost = 1.0
    if file_format == "JPEG":
        if (scans := data.count(b"\xff\xda")) > MAX_SCANS:
            raise HTTPException(400, f"{name} is a JPEG with more than {MAX_SCANS} scans; save it as a baseline JPEG")
        cost = scans * SCAN_COST if progressive else BASELINE_JPEG_COST
    return EncodedImage(data, name, pixels, round(pixels * cost))


@dataclass
class MemoryBudget:
    """A memory limit for the bodies of all requests in progress: `CONCURRENT_BODIES_FACTOR` times `max_bytes`."""

    max_bytes: int  # limit per body
    reserved: int = 0  # bytes

    @contextlib.contextmanager
    def reservation(self) -> Iterator[Callable[[int], None]]:
        """Yield a function that reserves bytes within the context, and raises HTTPException 503 if too few are left."""
        size = 0

        def reserve(count: int) -> None:
            """Reserve `count` more bytes."""
            nonlocal size
            if self.reserved + count > CONCURRENT_BODIES_FACTOR * self.max_bytes:
                raise make_unavailable_error("too many large requests at the same time")
            self.reserved += count
            size += count

        try:
            yield reserve
        finally:
            self.reserved -= size


@dataclass
class ClientBudget:
    """A limit on the decoding cost of each client's images in progress: `CONCURRENT_PIXELS_FACTOR` times `max_pixels`.

    It limits the time for which one client's requests keep the model busy.
    """

    max_pixels: int  # limit per image
    reserved: Counter[str] = field(default_factory=Counter)  # decoding cost by the client's address

    @contextlib.contextmanager
    def reservation(self, client: str, images: Sequence[EncodedImage]) -> Iterator[None]:
        """Reserve the decoding cost of a client's images until the context ends.

        Raises HTTPException: 413 the images alone exceed the limit; 429 they exceed it with others in progress.
        """
        cost, limit = sum(image.cost for image in images), CONCURRENT_PIXELS_FACTOR * self.max_pixels
        if cost > limit:
            problem = f"the images take as long to decode as {cost:,} pixels of a PNG, the limit is {limit:,}"
            raise HTTPException(413, f"{problem}; send fewer or smaller images")
        if self.reserved[client] + cost > limit:
            problem = f"too many large images of {client} at the same time ({limit:,} pixels)"
            raise HTTPException(429, f"{problem}; try again", {"Retry-After": "1"})
        self.reserved[client] += cost
        try:
            yield
        finally:
            self.reserved[client] -= cost
            if not self.reserved[client]:
                del self.reserved[client]


def make_unavailable_error(reason: str) -> HTTPException:
    """Return an HTTP error 503 with the header `Retry-After`."""
    return HTTPException(503, f"{reason}; try again", {"Retry-After": "1"})


async def read_body(request: Request, reserve: Callable[[int], None], max_bytes: int) -> bytes:
    """Read a request's body.

    Args:
        reserve: called with each chunk's size in bytes before the chunk is stored; may raise an HTTPException.
        max_bytes: maximum size of the body.

    Raises:
        HTTPException: 400 the client disconnected; 408 the body was sent too slowly; 413 it exceeds `max_bytes`; 503
            raised by `reserve`.
    """
    header = request.headers.get("content-length", "")
    declared_size = int(header) if header.isdigit() else 0
    size_error = HTTPException(
        413, f"the request exceeds {max_bytes:,} bytes; send fewer or smaller images", CLOSE_HEADERS
    )
    if declared_size > max_bytes and request.headers.get("expect", "").lower() == "100-continue":
        raise size_error  # before the client sends the body
    body = bytearray()
    num_discarded = 0
    deadline = asyncio.get_running_loop().time() + BODY_TIMEOUT_SECONDS
    try:
        async with asyncio.timeout_at(deadline) as timeout:
            async for chunk in request.stream():
                if num_discarded or declared_size > max_bytes or len(body) + len(chunk) > max_bytes:
                    num_discarded += len(chunk)
                    if num_discarded > DISCARDED_BODIES_FACTOR * max_bytes:
                        raise size_error
                    continue  # the deadline is not extended for discarded bytes
                deadline += len(chunk) / MIN_BYTES_PER_SECOND
                timeout.reschedule(deadline)
                reserve(len(chunk))
                body += chunk
    except TimeoutError:
        raise (
            size_error if num_discarded else HTTPException(408, "the request was sent too slowly", CLOSE_HEADERS)
        ) from None
    except ClientDisconnect:
        raise HTTPException(400, "the request is incomplete", CLOSE_HEADERS) from None
    if num_discarded:
        raise size_error
    return bytes(body)


def parse_predict(body: bytes, content_type: str, query: dict[str, str], settings: Settings) -> PredictRequest:
    """Parse the body of `POST /predict`: a form, or JSON `{"images": [base64, ...], "top_k": 5, "explain": false}`.

    Args:
        content_type: the header Content-Type, which distinguishes a form from JSON.
        query: parameters in the URL; parameters in the body have precedence.

    Raises:
        HTTPException: 400 invalid form, JSON, base64, parameter or image; 413 too many images or pixels; 415 another
            content type, or an animation.
    """
    media_type, options = parse_options_header(content_type)
    if media_type == b"multipart/form-data":
        parameters, files = _parse_form(body, options.get(b"boundary", b""), settings.max_images)
    elif media_type == b"application/json":
        parameters = _parse_object(body)
        files = _parse_images(parameters.pop("images", None), "images", settings.max_images)
    else:
        form, example = "multipart/form-data (curl -F file=@photo.jpg)", '{"images": ["..."]}'
        raise HTTPException(415, f"send images as {form}, or in base64 as application/json: {example}")
    parameters = query | parameters
    if unknown := sorted(parameters.keys() - {"top_k", "explain"}):
        raise HTTPException(400, f"unknown parameter {unknown[0]!a}; known: images, top_k, explain")
    images = _check_images(files, settings)
    top_k, explain = _parse_top_k(parameters.get("top_k", 5)), _parse_explain(parameters.get("explain", False))
    return PredictRequest(images, top_k, explain)


def parse_instances(body: bytes, settings: Settings, explain: bool = False) -> PredictRequest:
    """Parse the body of `POST /v1/models/NAME:predict`: `{"instances": [{"b64": "..."}]}` or `{"inputs": [...]}`.

    Accepts the row format (`instances`) and the column format (`inputs`) of TensorFlow Serving's REST API, with or
    without the input's name, `image_bytes`: https://www.tensorflow.org/tfx/serving/api_rest. Like TensorFlow Serving,
    it ignores the content type.

    Args:
        explain: whether the path ends in `:explain`, which has the same effect as `"signature_name": "explain"`.

    Raises:
        HTTPException: 400 invalid JSON, base64 or image; 413 too many images or pixels; 415 an animation.
    """
    tree = _parse_object(body)
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
    images = _check_images(_parse_images(images, key, settings.max_images), settings)
    return PredictRequest(images, explain=explain or signature == "explain", columnar=key == "inputs")


def _check_images(files: list[tuple[str, bytes]], settings: Settings) -> list[EncodedImage]:
    """Check the header of each image, which is given as (name, content)."""
    if not files:
        raise HTTPException(400, "there is no image in the request")
    return [check_image(data, name, settings.max_pixels) for name, data in files]


def _parse_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises HTTPException 400 if the body is not a JSON object."""
    try:
        tree = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, "the request is not valid JSON") from None
    if not isinstance(tree, dict):
        raise HTTPException(400, "the request is not a JSON object")
    return tree


def _parse_images(images: Any, key: str, max_images: int) -> list[tuple[str, bytes]]:
    """Decode a JSON list of images in base64; return each image as (name, content), with a name like "images[0]"."""
    if not isinstance(images, list):
        raise HTTPException(400, f'"{key}" must be a list of images in base64')
    if len(images) > max_images:
        raise _make_too_many_images_error(max_images)
    return [(f"{key}[{i}]", _decode_base64(image, f"{key}[{i}]")) for i, image in enumerate(images)]


_URL_SAFE_TO_STANDARD = str.maketrans("-_", "+/")  # base64 alphabets
_BASE64_FORMS = (
    "send the bytes of an image file in base64: standard or URL-safe, with or without padding and line breaks, or as "
    "data:image/jpeg;base64,..."
)


def _decode_base64(value: Any, name: str) -> bytes:
    """Decode an image in base64, which is a string or `{"b64": string}`. Raises HTTPException 400 if it is invalid."""
    encoded = value.get("b64") if isinstance(value, dict) else value
    if not isinstance(encoded, str) or (isinstance(value, dict) and len(value) > 1):
        raise HTTPException(400, f'{name} must be an image in base64: "..." or {{"b64": "..."}}')
    digits = re.sub(r"^data:[^,]*;base64,", "", "".join(encoded.split()), count=1, flags=re.IGNORECASE)
    digits = digits.translate(_URL_SAFE_TO_STANDARD).rstrip("=")
    try:
        return base64.b64decode(digits + "=" * (-len(digits) % 4), validate=True)
    except ValueError:
        raise HTTPException(400, f"{name} is not valid base64; {_BASE64_FORMS}") from None


def _parse_form(body: bytes, boundary: bytes, max_images: int) -> tuple[dict[str, Any], list[tuple[str, bytes]]]:
    """Parse a multipart form; return its fields by name, and its files as (name, content).

    Raises HTTPException: 400 it is malformed or has too many fields; 413 it has too many files.
    """
    fields: dict[str, Any] = {}
    files: list[tuple[str, bytes]] = []
    end_event = threading.Event()  # set by the parser at the end of a complete form

    def on_field(field: Field) -> None:
        fields[(field.field_name or b"").decode(errors="replace")[:50]] = (field.value or b"").decode(errors="replace")
        if len(fields) > MAX_FIELDS:
            raise HTTPException(400, f"the form has more than {MAX_FIELDS} fields in addition to its files")

    def on_file(file: File) -> None:
        """Store a file of the form. The parser calls this function."""
        if len(files) == max_images:
            raise _make_too_many_images_error(max_images)
        file.file_object.seek(0)
        name = (file.file_name or file.field_name or b"").decode(errors="replace")
        files.append((name[:200] or f"file {len(files) + 1}", file.file_object.read()))

    config = {"MAX_MEMORY_FILE_SIZE": len(body) + 1}  # no temporary files
    with contextlib.suppress(FormParserError):
        parser = FormParser("multipart/form-data", on_field, on_file, end_event.set, boundary=boundary, config=config)
        parser.write(body)
        parser.finalize()
        if end_event.is_set():
            return fields, files
    raise HTTPException(400, "the form is malformed: multipart/form-data needs a boundary and complete parts")


def _make_too_many_images_error(max_images: int) -> HTTPException:
    return HTTPException(413, f"a request may have at most {max_images} images; split it")


def _parse_top_k(value: Any) -> int:
    """Parse the parameter `top_k`, an integer or a string. Raises HTTPException 400 if it is not a positive integer."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise HTTPException(400, "top_k must be a positive integer")
    return value


def _parse_explain(value: Any) -> bool:
    """Parse the parameter `explain`, a boolean or a string. Raises HTTPException 400 if it is not true or false."""
    flags = {"true": True, "1": True, "false": False, "0": False}
    flag = flags.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(flag, bool):
        raise HTTPException(400, "explain must be true or false")
    return flag
