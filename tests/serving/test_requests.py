"""From bodies to images: both formats, their limits, and arbitrary input."""

import asyncio
import base64
import functools
import io
import json
from collections import Counter
from typing import Any

import httpx
import pytest
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request

from tests.serving.clock import LoopClock
from tests.serving.images import mutated, photo
from trainer.serving.requests import (
    BODY_TIMEOUT_SECONDS,
    CONCURRENT_BODIES_FACTOR,
    MIN_BYTES_PER_SECOND,
    ClientBudget,
    EncodedImage,
    MemoryBudget,
    PredictRequest,
    check_image,
    parse_instances,
    parse_predict,
    read_body,
)
from trainer.serving.settings import parse_settings

SETTINGS = parse_settings({"model": "any", "max_images": "3", "max_pixels": "5000"})
B64 = base64.b64encode(photo()).decode()


def form(*files: tuple[str, tuple[str, bytes]], **fields: str) -> tuple[bytes, str]:
    """A body and its content type, as another library writes them."""
    kind = {"content-type": "multipart/form-data; boundary=here"}  # a random one would be in the names of the tests
    request = httpx.Request("POST", "http://any/", files=list(files), data=fields, headers=kind)
    return request.read(), request.headers["content-type"]


def predict(body: bytes, kind: str, query: dict[str, str] | None = None) -> PredictRequest:
    return parse_predict(body, kind, query or {}, SETTINGS)


def as_json(tree: Any) -> tuple[bytes, str]:
    return json.dumps(tree).encode(), "application/json; charset=utf-8"


def result(call: Any, *arguments: Any) -> tuple[int, str]:
    """HTTP status and error."""
    try:
        call(*arguments)
    except HTTPException as error:
        return error.status_code, error.detail
    return 200, ""


def test_a_form_has_files_and_parameters() -> None:
    first, second = photo(1), photo(2, "PNG")
    parsed = predict(*form(("file", ("a.jpg", first)), ("other", ("ü.png", second)), top_k="2", explain="true"))
    assert [(image.name, image.data) for image in parsed.images] == [("a.jpg", first), ("ü.png", second)]
    assert (parsed.top_k, parsed.explain) == (2, True)
    parsed = predict(*form(("file", ("a.jpg", first))), query={"top_k": "7"})
    assert (parsed.top_k, parsed.explain) == (7, False)


def test_json_has_base64() -> None:
    parsed = predict(*as_json({"images": [B64, {"b64": B64}], "top_k": 1, "explain": False}))
    names = [(image.name, image.data) for image in parsed.images]
    assert names == [("images[0]", photo()), ("images[1]", photo())]


@pytest.mark.parametrize(
    ("body", "kind", "status", "text"),
    [
        (photo(), "image/jpeg", 415, "send images as multipart/form-data"),
        (b"", "", 415, "send images as"),
        (b"{", "application/json", 400, "not valid JSON"),
        (b"\xff\xfe", "application/json", 400, "not valid JSON"),
        (b"[" * 100_000, "application/json", 400, "not valid JSON"),
        (b"[]", "application/json", 400, "not a JSON object"),
        (*as_json({}), 400, '"images" must be a list'),
        (*as_json({"images": []}), 400, "there is no image"),
        (*as_json({"images": [B64] * 4}), 413, "a request may have at most 3 images"),
        (*as_json({"images": [B64, "%%%"]}), 400, "images[1] is not valid base64"),
        (*as_json({"images": ["é"]}), 400, "images[0] is not valid base64"),
        (*as_json({"images": [7]}), 400, "images[0] must be an image in base64"),
        (*as_json({"images": [{"b64": B64, "x": 1}]}), 400, "images[0] must be an image in base64"),
        (*as_json({"images": [base64.b64encode(b"no").decode()]}), 400, "images[0] is not an image"),
        (*as_json({"images": [B64], "top_k": 0}), 400, "top_k must be a positive integer"),
        (*as_json({"images": [B64], "top_k": True}), 400, "top_k must be a positive integer"),
        (*as_json({"images": [B64], "explain": "perhaps"}), 400, "explain must be true or false"),
        (*as_json({"images": [B64], "topk": 1}), 400, "unknown parameter 'topk'"),
        (b"--x--\r\n", "multipart/form-data", 400, "the form is malformed"),
        (b"no form", "multipart/form-data; boundary=x", 400, "the form is malformed"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "there is no image"),
        (*form(*[("file", ("a.jpg", photo()))] * 4), 413, "a request may have at most 3 images"),
        (*form(("file", ("a.jpg", photo(width=200)))), 413, "a.jpg has 200 x 60 pixels"),
        (*form(("file", ("a.jpg", photo())), **{f"f{i}": "" for i in range(20)}), 400, "more than 16 fields"),
    ],
)
def test_an_invalid_request_is_an_error(body: bytes, kind: str, status: int, text: str) -> None:
    response = result(predict, body, kind)
    assert (response[0], text in response[1]) == (status, True), response


FORMS = {
    "wrapped": base64.encodebytes(photo()).decode(),
    "wrapped for mail": base64.encodebytes(photo()).decode().replace("\n", "\r\n"),
    "unpadded": B64.rstrip("="),
    "URL-safe": base64.urlsafe_b64encode(photo()).decode(),
    "URL-safe and unpadded": base64.urlsafe_b64encode(photo()).decode().rstrip("="),
    "data:": f"data:image/jpeg;base64,{B64}",
    "data: with a parameter": f"DATA:image/jpeg;name=a.jpg;base64,\n{B64}",
    "data: without a type": f"data:;base64,{B64}",
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("wrap", [lambda text: text, lambda text: {"b64": text}])
def test_every_form_of_base64_is_read(form: str, wrap: Any) -> None:
    assert len(photo()) % 3  # it needs padding
    parsed = predict(*as_json({"images": [wrap(FORMS[form])]}))
    assert [image.data for image in parsed.images] == [photo()]
    parsed = parse_instances(json.dumps({"instances": [wrap(FORMS[form])]}).encode(), SETTINGS)
    assert [image.data for image in parsed.images] == [photo()]


@pytest.mark.parametrize(
    "text", ["%%%", "a", "aGk=aGk=", "a*b", "data:image/jpeg,%FF%D8", "https://any/a.jpg", "rose.jpg", B64 + "A%3D"]
)
def test_what_is_not_base64_gets_a_hint(text: str) -> None:
    status, error = result(predict, *as_json({"images": [text]}))
    assert status == 400
    assert error.startswith("images[0] is not valid base64; send the bytes of an image file in base64: standard or")
    assert error.endswith("data:image/jpeg;base64,...")


def read(chunks: list[tuple[float, bytes]], headers: dict[str, str] | None = None) -> tuple[int, str, float]:
    """Status, error and seconds of a body whose chunks come after these pauses in seconds; without length by default."""

    async def receive_all() -> tuple[int, str, float]:
        left, clock = list(chunks), LoopClock()

        async def receive() -> dict[str, Any]:
            pause, chunk = left.pop(0)
            await clock.advance(pause)
            return {"type": "http.request", "body": chunk, "more_body": bool(left)}

        raw = [(name.encode(), value.encode()) for name, value in (headers or {}).items()]
        request = Request({"type": "http", "method": "POST", "headers": raw}, receive)
        try:
            await read_body(request, lambda _: None, 10_000_000)
        except HTTPException as error:
            return error.status_code, error.detail, clock.now
        return 200, "", clock.now

    return asyncio.run(receive_all())


SLOW = (408, "the request was sent too slowly")
LONG = (413, "the request exceeds 10,000,000 bytes; send fewer or smaller images")


@pytest.mark.parametrize(
    ("headers", "expected"), [({}, SLOW), ({"content-length": "9999999"}, SLOW), ({"content-length": "99999999"}, LONG)]
)
def test_a_body_without_progress_ends_after_the_grace_period(
    headers: dict[str, str], expected: tuple[int, str]
) -> None:
    status, text, seconds = read([(0.0, b"x")] * 3 + [(0.5, b"x")] * 1000, headers)
    assert (status, text) == expected
    assert seconds == pytest.approx(BODY_TIMEOUT_SECONDS, abs=1)  # not 10,000,000 bytes / MIN_BYTES_PER_SECOND


def test_a_body_that_is_too_long_has_no_more_time_at_the_lowest_rate() -> None:
    for headers in ({"content-length": "99999999"}, {}):
        chunks = [(0.0, b"x" * 10_000_001)] * (not headers) + [(0.5, b"x" * MIN_BYTES_PER_SECOND)] * 1000
        status, text, seconds = read(chunks, headers)
        assert (status, text) == LONG
        assert seconds == pytest.approx(BODY_TIMEOUT_SECONDS, abs=1)


def test_a_body_that_comes_at_the_lowest_rate_may_take_longer() -> None:
    status, _, seconds = read([(1.0, b"x" * MIN_BYTES_PER_SECOND)] * 90)
    assert (status, seconds) == (200, 90)


def test_the_cost_of_an_image_is_its_time_to_decode() -> None:
    def cost(data: bytes) -> tuple[int, int]:
        image = check_image(data, "a", 10**9)
        return image.pixels, image.cost

    smooth, out = Image.open(io.BytesIO(photo(width=400, height=200))), io.BytesIO()
    smooth.save(out, "JPEG", progressive=True)
    scans = out.getvalue().count(b"\xff\xda")
    assert cost(photo(width=400, height=200)) == (80_000, 10_000)
    assert cost(out.getvalue()) == (80_000, 8000 * scans)
    for kind in ("PNG", "WEBP", "BMP", "GIF"):
        assert cost(photo(0, kind, 400, 200)) == (80_000, 80_000)


def test_the_cost_in_progress_is_limited_per_client() -> None:
    def images(*costs: int) -> list[EncodedImage]:
        return [EncodedImage(b"", "a", cost, cost) for cost in costs]

    def reserve(client: str, *costs: int) -> tuple[int, str]:
        def enter() -> None:
            with budget.reservation(client, images(*costs)):
                pass

        return result(enter)

    budget = ClientBudget(100)
    assert reserve("a", *[90] * 5)[0] == 413  # as five PNGs of 49 megapixels with max_pixels of 50 megapixels
    assert reserve("a", 100, 100, 100, 100) == (200, "")
    with budget.reservation("a", images(90, 90)), budget.reservation("a", images(100, 100)):
        status, text = reserve("a", 30)
        assert (status, "images of a at the same time (400 pixels); try again" in text) == (429, True)
        assert reserve("a", 20) == reserve("b", 400) == (200, "")
    assert not budget.reserved


def test_half_a_form_is_damaged() -> None:
    body, kind = form(("file", ("a.jpg", photo())), ("file", ("b.jpg", photo())))
    assert result(predict, body[: len(body) - 200], kind)[1].startswith("the form is malformed")


@pytest.mark.parametrize("value", [{"b64": B64}, {"image_bytes": {"b64": B64}}])
def test_the_protocol_of_tensorflow_serving(value: Any) -> None:
    parsed = parse_instances(json.dumps({"instances": [value, value]}).encode(), SETTINGS)
    assert ([image.data for image in parsed.images], parsed.columnar, parsed.explain) == ([photo()] * 2, False, False)


@pytest.mark.parametrize("inputs", [[{"b64": B64}], {"image_bytes": [{"b64": B64}]}])
def test_the_columnar_format(inputs: Any) -> None:
    parsed = parse_instances(json.dumps({"signature_name": "explain", "inputs": inputs}).encode(), SETTINGS)
    assert ([image.data for image in parsed.images], parsed.columnar, parsed.explain) == ([photo()], True, True)


@pytest.mark.parametrize(
    ("tree", "text"),
    [
        ({}, 'needs either "instances"'),
        ({"instances": [], "inputs": []}, 'needs either "instances"'),
        ({"instances": []}, "there is no image"),
        ({"instances": "no"}, '"instances" must be a list'),
        ({"instances": [[0.5]]}, "instances[0] must be an image in base64"),
        ({"instances": [{"images": 1}]}, "instances[0] must be an image in base64"),
        ({"instances": [{"b64": B64}], "signature_name": "images"}, "unknown signature_name 'images'"),
        ({"instances": [{"b64": B64}], "signature_name": ["\ud800"]}, "unknown signature_name"),
    ],
)
def test_invalid_instances_are_an_error(tree: Any, text: str) -> None:
    response = result(parse_instances, json.dumps(tree).encode(), SETTINGS)
    assert (response[0], text in response[1]) == (400, True), response


def test_a_mutated_body_raises_nothing_else() -> None:
    (body, kind), (tree, json_kind) = form(("file", ("a.jpg", photo())), top_k="2"), as_json({"images": [B64]})
    calls: list[Any] = []
    for number in range(500):
        calls += [
            functools.partial(predict, mutated(body, number), kind),
            functools.partial(predict, body, mutated(kind.encode(), number).decode("latin-1")),
            functools.partial(predict, mutated(tree, number), json_kind),
            functools.partial(parse_instances, mutated(tree.replace(b"images", b"instances"), number), SETTINGS),
        ]
    statuses = Counter(result(call)[0] for call in calls)
    assert statuses.keys() <= {200, 400, 413, 415}
    assert min(statuses[200], statuses[400]) > 100


def test_memory_for_bodies_is_limited_and_released() -> None:
    memory = MemoryBudget(100)
    with memory.reservation() as first, memory.reservation() as second:
        first(60)
        second(100 * CONCURRENT_BODIES_FACTOR - 60)
        assert result(second, 1) == (503, "too many large requests at the same time; try again")
    assert memory.reserved == 0
