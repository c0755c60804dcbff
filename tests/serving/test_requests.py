"""From bodies to images: both forms, their limits, and whatever a stranger sends."""

import base64
import functools
import json
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.serving.pictures import mutated, photo
from trainer.serving.requests import Asked, Refused, Room, read_instances, read_predict
from trainer.serving.settings import read_settings

SETTINGS = read_settings({"model": "any", "max_images": "3", "max_pixels": "5000"})
B64 = base64.b64encode(photo()).decode()


def form(*files: tuple[str, tuple[str, bytes]], **fields: str) -> tuple[bytes, str]:
    """A body and its content type, as another library writes them."""
    kind = {
        "content-type": "multipart/form-data; boundary=here"
    }  # a random one would give a test another name each time
    request = httpx.Request("POST", "http://any/", files=list(files), data=fields, headers=kind)
    return request.read(), request.headers["content-type"]


def predict(body: bytes, kind: str, query: dict[str, str] | None = None) -> Asked:
    return read_predict(body, kind, query or {}, SETTINGS)


def as_json(tree: Any) -> tuple[bytes, str]:
    return json.dumps(tree).encode(), "application/json; charset=utf-8"


def refusal(call: Any, *arguments: Any) -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        call(*arguments)
    return caught.value.status, caught.value.text


def test_a_form_holds_files_and_wishes() -> None:
    first, second = photo(1), photo(2, "PNG")
    asked = predict(*form(("file", ("a.jpg", first)), ("other", ("ü.png", second)), top_k="2", explain="true"))
    assert [(p.name, p.data) for p in asked.pictures] == [("a.jpg", first), ("ü.png", second)]
    assert (asked.top_k, asked.explain) == (2, True)
    asked = predict(*form(("file", ("a.jpg", first))), query={"top_k": "7"})
    assert (asked.top_k, asked.explain) == (7, False)


def test_json_holds_base64() -> None:
    asked = predict(*as_json({"images": [B64, {"b64": B64}], "top_k": 1, "explain": False}))
    assert [(p.name, p.data) for p in asked.pictures] == [("images[0]", photo()), ("images[1]", photo())]


@pytest.mark.parametrize(
    ("body", "kind", "status", "words"),
    [
        (photo(), "image/jpeg", 415, "send images as multipart/form-data"),
        (b"", "", 415, "send images as"),
        (b"{", "application/json", 400, "not valid JSON"),
        (b"\xff\xfe", "application/json", 400, "not valid JSON"),
        (b"[" * 100_000, "application/json", 400, "not valid JSON"),
        (b"[]", "application/json", 400, "not a JSON object"),
        (*as_json({}), 400, '"images" must be a list'),
        (*as_json({"images": []}), 400, "there is no image"),
        (*as_json({"images": [B64] * 4}), 413, "a request may hold 3 images"),
        (*as_json({"images": [B64, "%%%"]}), 400, "images[1] is not valid base64"),
        (*as_json({"images": ["é"]}), 400, "images[0] is not valid base64"),
        (*as_json({"images": [7]}), 400, "images[0] must be an image in base64"),
        (*as_json({"images": [{"b64": B64, "x": 1}]}), 400, "images[0] must be an image in base64"),
        (*as_json({"images": [base64.b64encode(b"no").decode()]}), 400, "images[0] is not an image"),
        (*as_json({"images": [B64], "top_k": 0}), 400, "top_k must be a whole number"),
        (*as_json({"images": [B64], "top_k": True}), 400, "top_k must be a whole number"),
        (*as_json({"images": [B64], "explain": "perhaps"}), 400, "explain must be true or false"),
        (*as_json({"images": [B64], "topk": 1}), 400, "'topk' means nothing here"),
        (b"--x--\r\n", "multipart/form-data", 400, "the form is damaged"),
        (b"no form", "multipart/form-data; boundary=x", 400, "the form is damaged"),
        (b"--x--\r\n", "multipart/form-data; boundary=x", 400, "there is no image"),
        (*form(*[("file", ("a.jpg", photo()))] * 4), 413, "a request may hold 3 images"),
        (*form(("file", ("a.jpg", photo(width=200)))), 413, "a.jpg has 200 x 60 pixels"),
        (*form(("file", ("a.jpg", photo())), **{f"f{i}": "" for i in range(20)}), 400, "more than 16 fields"),
    ],
)
def test_what_is_wrong_is_said(body: bytes, kind: str, status: int, words: str) -> None:
    found = refusal(predict, body, kind)
    assert found[0] == status
    assert words in found[1]


def test_half_a_form_is_no_form() -> None:
    body, kind = form(("file", ("a.jpg", photo())), ("file", ("b.jpg", photo())))
    assert refusal(predict, body[: len(body) - 200], kind)[1].startswith("the form is damaged")


@pytest.mark.parametrize("value", [{"b64": B64}, {"image_bytes": {"b64": B64}}])
def test_the_protocol_of_tensorflow_serving(value: Any) -> None:
    asked = read_instances(json.dumps({"instances": [value, value]}).encode(), SETTINGS)
    assert ([p.data for p in asked.pictures], asked.columns, asked.explain) == ([photo()] * 2, False, False)


def test_its_columns_too() -> None:
    for inputs in ([{"b64": B64}], {"image_bytes": [{"b64": B64}]}):
        body = json.dumps({"signature_name": "explain", "inputs": inputs}).encode()
        asked = read_instances(body, SETTINGS)
        assert ([p.data for p in asked.pictures], asked.columns, asked.explain) == ([photo()], True, True)


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({}, 'needs "instances"'),
        ({"instances": [], "inputs": []}, 'needs "instances"'),
        ({"instances": []}, "there is no image"),
        ({"instances": "no"}, '"instances" must be a list'),
        ({"instances": [[0.5]]}, "instances[0] must be an image in base64"),
        ({"instances": [{"images": 1}]}, "instances[0] must be an image in base64"),
        ({"instances": [{"b64": B64}], "signature_name": "images"}, "'images' is not served here"),
        ({"instances": [{"b64": B64}], "signature_name": ["\ud800"]}, "is not served here"),
    ],
)
def test_what_is_wrong_with_instances_is_said(tree: Any, words: str) -> None:
    found = refusal(read_instances, json.dumps(tree).encode(), SETTINGS)
    assert found[0] == 400
    assert words in found[1]


def test_no_change_of_a_body_raises_anything_else() -> None:
    (body, kind), (tree, json_kind) = form(("file", ("a.jpg", photo())), top_k="2"), as_json({"images": [B64]})
    calls: list[Any] = []
    for number in range(500):
        calls += [
            functools.partial(predict, mutated(body, number), kind),
            functools.partial(predict, body, mutated(kind.encode(), number).decode("latin-1")),
            functools.partial(predict, mutated(tree, number), json_kind),
            functools.partial(read_instances, mutated(tree.replace(b"images", b"instances"), number), SETTINGS),
        ]
    seen = Counter(map(status_of, calls))
    assert seen.keys() <= {200, 400, 413, 415}
    assert min(seen[200], seen[400]) > 100


def status_of(call: Any) -> int:
    try:
        call()
    except Refused as refused:
        return refused.status
    return 200


def test_memory_for_bodies_is_shared_and_given_back() -> None:
    room = Room(100)
    with room.held() as one, room.held() as other:
        one(60)
        other(40)
        status, text = refusal(other, 1)
        assert (status, text) == (503, "too many large requests at once; try again")
    assert room.taken == 0
