"""Images that are refused by their header alone, in little time and memory."""

import time
import tracemalloc

import pytest
from starlette.exceptions import HTTPException

from tests.serving import images
from tests.serving.images import photo
from trainer.serving.requests import FORMATS, check_image

MAX_PIXELS = 1_000_000


def result(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[int, str]:
    """HTTP status and error."""
    try:
        check_image(data, "it", max_pixels)
    except HTTPException as error:
        return error.status_code, error.detail
    return 200, ""


@pytest.mark.parametrize("kind", FORMATS)
def test_images_pass(kind: str) -> None:
    data = photo(kind=kind)
    image = check_image(data, "it", 4800)
    assert (image.data, image.name, image.pixels) == (data, "it", 4800)
    status, text = result(data, 4799)
    assert (status, "80 x 60 pixels" in text, "4,799" in text) == (413, True, True)


@pytest.mark.parametrize(
    ("data", "status", "text"),
    [
        (b"", 400, "it is empty"),
        (b"hello", 400, "it is not an image in a supported format: JPEG, PNG, BMP, WEBP, GIF"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400, "not an image"),
        (b"%PDF-1.7\n", 400, "not an image"),
        (b"II*\0" + b"\0" * 100, 400, "not an image"),
        (b"\x89PNG\r\n\x1a\n", 400, "not an image"),
        (images.text_bomb(), 400, "not an image"),
        (images.bomb(20_000, 20_000), 413, "it has 20000 x 20000 pixels"),
        (images.huge(2**31 - 1, 2**31 - 1), 413, "it has 2147483647 x 2147483647 pixels"),
        (images.huge_jpeg(65_500, 65_500), 413, "it has 65500 x 65500 pixels"),
        (images.animation("GIF"), 415, "animation"),
        (images.animation("WEBP"), 415, "animation"),
        (photo()[:-2] + b"\xff\xda" * 101 + b"\xff\xd9", 400, "more than 100 scans"),
    ],
    ids=["empty", "text", "svg", "pdf", "tiff", "png", "comment", "bomb", "huge", "jpeg", "gif", "webp", "scans"],
)
def test_what_is_rejected_costs_little(data: bytes, status: int, text: str) -> None:
    tracemalloc.start()
    began = time.process_time()
    response = result(data)
    spent, (_, peak) = time.process_time() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (response[0], text in response[1]) == (status, True), response
    assert spent < 1
    assert peak < len(data) * 3 + 20e6


def test_a_mutated_image_raises_nothing_else() -> None:
    statuses = {result(images.mutated(photo(kind=kind), n))[0] for n in range(100) for kind in FORMATS}
    assert {200, 400} <= statuses <= {200, 400, 413, 415}
