"""Images of many requests in one call: when it is made, with whom, and what happens when it fails."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from trainer.serving.batching import Batcher, Full
from trainer.serving.requests import Picture

Ask = Callable[[list[bytes]], list[Any]]


def pictures(*names: str, pixels: int = 1) -> list[Picture]:
    return [Picture(name.encode(), name, pixels) for name in names]


def running(ask: Ask, story: Callable[[Batcher], Awaitable[None]], **limits: Any) -> None:
    async def run() -> None:
        with ThreadPoolExecutor(1) as pool:
            batcher = Batcher(ask, pool, **({"size": 4, "window": 0.0, "queue": 8, "pixels": 100} | limits))
            work = asyncio.create_task(batcher.work())
            await story(batcher)
            work.cancel()

    asyncio.run(run())


class Model:
    """Answers with the names; waits where it is told to."""

    def __init__(self) -> None:
        self.calls: list[list[bytes]] = []
        self.may = threading.Event()
        self.may.set()

    def __call__(self, images: list[bytes]) -> list[Any]:
        self.calls.append(images)
        assert self.may.wait(20)
        return [image.decode().upper() for image in images]


def asking(batcher: Batcher, *names: str) -> asyncio.Task[list[Any]]:
    return asyncio.create_task(batcher.ask(pictures(*names)))


async def busy_with_a(model: Model, batcher: Batcher) -> asyncio.Task[list[Any]]:
    """A request for "a", which the model works at until it may go on."""
    model.may.clear()
    first = asking(batcher, "a")
    while not model.calls:
        await asyncio.sleep(0.01)
    return first


def test_what_gathers_while_the_model_works_goes_together() -> None:
    model = Model()

    async def story(batcher: Batcher) -> None:
        first = await busy_with_a(model, batcher)
        others = [asking(batcher, *names) for names in ("bc", "d", "ef")]
        await asyncio.sleep(0.05)
        assert len(batcher) == 5
        model.may.set()
        assert await first == ["A"]
        assert await asyncio.gather(*others) == [["B", "C"], ["D"], ["E", "F"]]

    running(model, story)
    assert model.calls == [[b"a"], [b"b", b"c", b"d", b"e"], [b"f"]]


def test_an_idle_model_waits_for_others_but_not_long() -> None:
    model = Model()

    async def story(batcher: Batcher) -> None:
        began = time.monotonic()
        alone = await batcher.ask(pictures("a"))
        assert time.monotonic() - began >= 0.3
        assert alone == ["A"]
        began = time.monotonic()
        await asyncio.gather(*(batcher.ask(pictures(name)) for name in "bcde"))
        assert time.monotonic() - began < 0.3  # full: nobody waits

    running(model, story, window=0.3)
    assert [len(call) for call in model.calls] == [1, 4]


def test_large_images_go_in_smaller_batches_and_in_order() -> None:
    model = Model()

    async def story(batcher: Batcher) -> None:
        many = [
            *pictures("a", pixels=60),
            *pictures("b", pixels=50),
            *pictures("c", "d", pixels=25),
            *pictures("e", pixels=500),
        ]
        assert await batcher.ask(many) == ["A", "B", "C", "D", "E"]

    running(model, story)
    assert model.calls == [[b"a"], [b"b", b"c", b"d"], [b"e"]]


def test_a_full_queue_takes_all_of_a_request_or_nothing() -> None:
    model = Model()

    async def story(batcher: Batcher) -> None:
        first = await busy_with_a(model, batcher)
        waiting = asking(batcher, *"bcdefgh")
        await asyncio.sleep(0)
        with pytest.raises(Full):
            await batcher.ask(pictures("x", "y"))
        last = asking(batcher, "i")
        await asyncio.sleep(0)
        assert len(batcher) == 8
        model.may.set()
        assert [*await first, *await waiting, *await last] == list("ABCDEFGHI")

    running(model, story)


def test_a_call_that_fails_fails_for_those_in_it_alone() -> None:
    def ask(images: list[bytes]) -> list[Any]:
        if b"bad" in images:
            raise RuntimeError("no memory")
        return list(images)

    async def story(batcher: Batcher) -> None:
        with pytest.raises(RuntimeError, match="no memory"):
            await batcher.ask(pictures("a", "bad"))
        assert await batcher.ask(pictures("b")) == [b"b"]

    running(ask, story)
