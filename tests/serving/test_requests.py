"""From bodies to images: both formats, their limits, and arbitrary input."""

import base64
import functools
import json
from collections import Counter
from typing import Any

import httpx
import pytest
from starlette.exceptions import HTTPException

from tests.serving.images import mutated, photo
from trainer.serving.requests import CONCURRENT_BODIES, MemoryBudget, PredictRequest, read_instances, read_predict
from trainer.serving.settings import read_settings

SETTINGS = read_settings({"model": "any", "max_images": "3", "max_pixels": "5000"})
B64 = base64.b64encode(photo()).decode()


def form(*files: tuple[str, tuple[str, bytes]], **fields: str) -> tuple[bytes, str]:
    """A body and its content type, as another library writes them."""
    kind = {"content-type": "multipart/form-data; boundary=here"}  # a random one would be in the names of the tests
    request = httpx.Request("POST", "http://any/", files=list(files), data=fields, headers=kind)
    return request.read(), request.headers["content-type"]


def predict(body: bytes, kind: str, query: dict[str, str] | None = None) -> PredictRequest:
    return read_predict(body, kind, query or {}, SETTINGS)


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
        (b"--x--\r\n", "multipart/form-data", 400, "the form is damaged"),
        (b"no form", "multipart/form-data; boundary=x", 400, "the form is damaged"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "there is no image"),
        (*form(*[("file", ("a.jpg", photo()))] * 4), 413, "a request may have at most 3 images"),
        (*form(("file", ("a.jpg", photo(width=200)))), 413, "a.jpg has 200 x 60 pixels"),
        (*form(("file", ("a.jpg", photo())), **{f"f{i}": "" for i in range(20)}), 400, "more than 16 fields"),
    ],
)
def test_an_invalid_request_is_an_error(body: bytes, kind: str, status: int, text: str) -> None:
    response = result(predict, body, kind)
    assert (response[0], text in response[1]) == (status, True), response


def test_half_a_form_is_damaged() -> None:
    body, kind = form(("file", ("a.jpg", photo())), ("file", ("b.jpg", photo())))
    assert result(predict, body[: len(body) - 200], kind)[1].startswith("the form is damaged")


@pytest.mark.parametrize("value", [{"b64": B64}, {"image_bytes": {"b64": B64}}])
def test_the_protocol_of_tensorflow_serving(value: Any) -> None:
    parsed = read_instances(json.dumps({"instances": [value, value]}).encode(), SETTINGS)
    assert ([image.data for image in parsed.images], parsed.columnar, parsed.explain) == ([photo()] * 2, False, False)


@pytest.mark.parametrize("inputs", [[{"b64": B64}], {"image_bytes": [{"b64": B64}]}])
def test_the_columnar_format(inputs: Any) -> None:
    parsed = read_instances(json.dumps({"signature_name": "explain", "inputs": inputs}).encode(), SETTINGS)
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
    response = result(read_instances, json.dumps(tree).encode(), SETTINGS)
    assert (response[0], text in response[1]) == (400, True), response


def test_a_mutated_body_raises_nothing_else() -> None:
    (body, kind), (tree, json_kind) = form(("file", ("a.jpg", photo())), top_k="2"), as_json({"images": [B64]})
    calls: list[Any] = []
    for number in range(500):
        calls += [
            functools.partial(predict, mutated(body, number), kind),
            functools.partial(predict, body, mutated(kind.encode(), number).decode("latin-1")),
            functools.partial(predict, mutated(tree, number), json_kind),
            functools.partial(read_instances, mutated(tree.replace(b"images", b"instances"), number), SETTINGS),
        ]
    statuses = Counter(result(call)[0] for call in calls)
    assert statuses.keys() <= {200, 400, 413, 415}
    assert min(statuses[200], statuses[400]) > 100


def test_memory_for_bodies_is_limited_and_released() -> None:
    memory = MemoryBudget(100)
    with memory.reservation() as first, memory.reservation() as second:
        first(60)
        second(100 * CONCURRENT_BODIES - 60)
        assert result(second, 1) == (503, "too many large requests at the same time; try again")
    assert memory.reserved == 0
