"""What is refused by its header alone, in little time and memory."""

import time
import tracemalloc

import pytest

from tests.serving import pictures
from tests.serving.pictures import photo
from trainer.serving.requests import FORMATS, Refused, examined

MOST = 1_000_000


def refusal(data: bytes, most: int = MOST) -> tuple[int, str]:
    with pytest.raises(Refused) as caught:
        examined(data, "it", most)
    return caught.value.status, caught.value.text


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "GIF"])
def test_pictures_pass(kind: str) -> None:
    data = photo(kind=kind)
    found = examined(data, "it", 4800)
    assert (found.data, found.name, found.pixels) == (data, "it", 4800)
    assert refusal(data, 4799) == (413, "it has 80 x 60 pixels, at most 4,799 are decoded; send it smaller")


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 400, "it is empty"),
        (b"hello", 400, "it is not an image that can be read: JPEG, PNG, BMP, WEBP, GIF can"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "not an image"),
        (b"%PDF-1.7\n", 400, "not an image"),
        (b"II*\0" + b"\0" * 100, 400, "not an image"),
        (b"\x89PNG\r\n\x1a\n", 400, "not an image"),
        (pictures.text_bomb(), 400, "not an image"),
        (pictures.bomb(20_000, 20_000), 413, "it has 20000 x 20000 pixels"),
        (pictures.huge(2**31 - 1, 2**31 - 1), 413, "it has 2147483647 x 2147483647 pixels"),
        (pictures.huge_jpeg(65_500, 65_500), 413, "it has 65500 x 65500 pixels"),
        (pictures.animation("GIF"), 415, "it is an animation; send one picture of it"),
        (pictures.animation("WEBP"), 415, "it is an animation"),
        (photo()[:-2] + b"\xff\xda" * 101 + b"\xff\xd9", 400, "it is a JPEG of more than 100 scans"),
    ],
    ids=["empty", "text", "svg", "pdf", "tiff", "png", "comment", "bomb", "huge", "jpeg", "gif", "webp", "scans"],
)
def test_what_is_refused_costs_little(data: bytes, status: int, words: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    found = refusal(data)
    spent, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found[0] == status
    assert words in found[1]
    assert spent < 1
    assert peak < len(data) * 3 + 20e6


def test_no_change_of_a_picture_raises_anything_else() -> None:
    seen = {status_of(pictures.mutated(photo(kind=kind), n)) for n in range(100) for kind in FORMATS}
    assert seen >= {200, 400}
    assert seen <= {200, 400, 413, 415}


def status_of(data: bytes) -> int:
    try:
        examined(data, "it", MOST)
    except Refused as refused:
        return refused.status
    return 200
