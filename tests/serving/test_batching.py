"""Batches: when they are formed, of which images, and failed calls."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.serving.clock import LoopClock
from tests.waiting import PATIENCE
from trainer.serving import batching
from trainer.serving.batching import Batcher
from trainer.serving.requests import EncodedImage


def images(*names: str, pixels: int = 1) -> list[EncodedImage]:
    return [EncodedImage(name.encode(), name, pixels) for name in names]


def run(
    model: Callable[[list[bytes]], list[Any]], scenario: Callable[[Batcher], Awaitable[None]], **limits: Any
) -> None:
    async def run_both() -> None:
        with ThreadPoolExecutor(1) as pool:
            call = lambda images: model([image.data for image in images])  # noqa: E731
            batcher = Batcher(
                call, pool, **({"max_batch": 4, "window_seconds": 0.0, "max_queued": 8, "max_pixels": 100} | limits)
            )
            task = asyncio.create_task(batcher.run())
            await scenario(batcher)
            task.cancel()

    asyncio.run(run_both())


class Model:
    """Predicts the names in upper case; blocks while `may_run` is cleared."""

    def __init__(self) -> None:
        self.calls: list[list[bytes]] = []
        self.may_run = threading.Event()
        self.may_run.set()

    def __call__(self, images: list[bytes]) -> list[Any]:
        self.calls.append(images)
        assert self.may_run.wait(PATIENCE)
        return [image.decode().upper() for image in images]


def request(batcher: Batcher, *names: str) -> asyncio.Task[list[Any]]:
    return asyncio.create_task(batcher.predict(images(*names)))


async def block_with_a(model: Model, batcher: Batcher) -> asyncio.Task[list[Any]]:
    """A request for "a", which occupies the model until `may_run` is set."""
    model.may_run.clear()
    first = request(batcher, "a")
    while not model.calls:
        await asyncio.sleep(0.01)
    return first


def test_images_that_arrive_while_the_model_is_busy_form_one_batch() -> None:
    model = Model()

    async def scenario(batcher: Batcher) -> None:
        first = await block_with_a(model, batcher)
        others = [request(batcher, *names) for names in ("bc", "d", "ef")]
        await asyncio.sleep(0.05)
        assert len(batcher) == 5
        model.may_run.set()
        assert await first == ["A"]
        assert await asyncio.gather(*others) == [["B", "C"], ["D"], ["E", "F"]]

    run(model, scenario)
    assert model.calls == [[b"a"], [b"b", b"c", b"d", b"e"], [b"f"]]


def test_an_idle_model_waits_for_the_window_or_a_full_batch() -> None:
    model = Model()

    async def predict_one(batcher: Batcher) -> None:
        began = time.monotonic()
        assert await batcher.predict(images("a")) == ["A"]
        assert time.monotonic() - began >= 0.3

    async def predict_a_full_batch(batcher: Batcher) -> None:
        await asyncio.gather(*(batcher.predict(images(name)) for name in "bcde"))

    run(model, predict_one, window_seconds=0.3)
    run(model, predict_a_full_batch, window_seconds=900.0)  # longer than pytest lets a test run
    assert [len(call) for call in model.calls] == [1, 4]


def test_large_images_are_in_smaller_batches_and_in_order() -> None:
    model = Model()
    sizes = {"a": 60, "b": 50, "c": 25, "d": 25, "e": 500}

    async def scenario(batcher: Batcher) -> None:
        requested = [image for name, pixels in sizes.items() for image in images(name, pixels=pixels)]
        assert await batcher.predict(requested) == ["A", "B", "C", "D", "E"]

    run(model, scenario)
    assert model.calls == [[b"a"], [b"b", b"c", b"d"], [b"e"]]


def test_large_images_and_others_each_get_half_of_the_time_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """While large images wait, others are not delayed by more than one of them, and both get half of the time."""
    monkeypatch.setattr(batching, "LARGE_IMAGE_COST", 50)
    calls: list[list[bytes]] = []
    clocks: list[LoopClock] = []

    def model(images: list[bytes]) -> list[Any]:
        clocks[0].now += 0.2 if images[0].startswith(b"L") else 0.05
        calls.append(images)
        assert may_run.wait(PATIENCE)
        return images

    may_run = threading.Event()

    async def scenario(batcher: Batcher) -> None:
        clocks.append(LoopClock())
        large = [EncodedImage(f"L{i}".encode(), "", 90, 90) for i in range(3)]
        all_large = asyncio.create_task(batcher.predict(large))
        while not calls:
            await asyncio.sleep(0)
        small = [request(batcher, *names) for names in ("abcd", "ef")]
        await asyncio.sleep(0)
        may_run.set()
        assert await asyncio.gather(*small) == [[b"a", b"b", b"c", b"d"], [b"e", b"f"]]
        assert not all_large.done()
        assert await all_large == [b"L0", b"L1", b"L2"]

    run(model, scenario)
    assert calls == [[b"L0"], [b"a", b"b", b"c", b"d"], [b"e", b"f"], [b"L1"], [b"L2"]]


def test_large_images_are_served_while_others_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "LARGE_IMAGE_COST", 50)
    calls: list[list[bytes]] = []

    def model(images: list[bytes]) -> list[Any]:
        calls.append(images)
        time.sleep(0.02)
        return images

    async def scenario(batcher: Batcher) -> None:
        done = asyncio.create_task(batcher.predict([EncodedImage(b"L", "", 90, 90)] * 3))

        async def small() -> None:
            while not done.done():
                await batcher.predict(images("s"))

        await asyncio.gather(done, small(), small())

    run(model, scenario)
    assert calls.count([b"L"]) == 3


def test_a_full_queue_accepts_all_images_of_a_request_or_none() -> None:
    model = Model()

    async def scenario(batcher: Batcher) -> None:
        first = await block_with_a(model, batcher)
        queued = request(batcher, *"bcdefgh")
        await asyncio.sleep(0)
        with pytest.raises(asyncio.QueueFull):
            await batcher.predict(images("x", "y"))
        last = request(batcher, "i")
        await asyncio.sleep(0)
        assert len(batcher) == 8
        model.may_run.set()
        assert [*await first, *await queued, *await last] == list("ABCDEFGHI")

    run(model, scenario)


def test_a_call_that_fails_fails_for_its_own_requests_only() -> None:
    def model(images: list[bytes]) -> list[Any]:
        if b"bad" in images:
            raise RuntimeError("no memory")
        return list(images)

    async def scenario(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="no memory"):
            await batcher.predict(images("a", "bad"))
        assert await batcher.predict(images("b")) == [b"b"]

    run(model, scenario)
