"""Images of many requests in one call of the model, in the order they came."""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from trainer.serving.requests import Picture

Ask = Callable[[list[bytes]], Sequence[Any]]  # encoded images -> one answer for each


class Full(Exception):
    """The queue has no room for the images of a request."""


@dataclass(frozen=True)
class _Waiting:
    picture: Picture
    answer: asyncio.Future[Any]
    since: float = field(default_factory=time.monotonic)


class Batcher:
    """A queue of images, and the calls of the model that answer them.

    A call takes at most `size` images and at most `pixels` pixels (a larger image goes alone). While the model works
    the next images gather by themselves; only where it is idle does one wait up to `window` seconds for others.
    """

    def __init__(self, ask: Ask, pool: Executor, *, size: int, window: float, queue: int, pixels: int) -> None:
        self._ask, self._pool = ask, pool
        self.size, self.window, self.queue, self.pixels = size, window, queue, pixels
        self._waiting: deque[_Waiting] = deque()
        self._came = asyncio.Event()

    def __len__(self) -> int:
        """The number of images that wait."""
        return len(self._waiting)

    async def ask(self, pictures: Sequence[Picture]) -> list[Any]:
        """The answers of the model, one for each picture.

        Raises:
            Full: not all of them find room; none is taken.
        """
        if len(self._waiting) + len(pictures) > self.queue:
            raise Full
        loop = asyncio.get_running_loop()
        taken = [_Waiting(picture, loop.create_future()) for picture in pictures]
        self._waiting.extend(taken)
        self._came.set()
        return list(await asyncio.gather(*(one.answer for one in taken)))

    async def work(self) -> None:
        """Gather a batch and have it answered, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._gather()
            try:
                answers = await loop.run_in_executor(self._pool, self._ask, [one.picture.data for one in batch])
                for one, answer in zip(batch, answers, strict=True):
                    if not one.answer.done():
                        one.answer.set_result(answer)
            except Exception as error:
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)

    async def _gather(self) -> list[_Waiting]:
        while not self._waiting:
            self._came.clear()
            await self._came.wait()
        until = self._waiting[0].since + self.window
        while len(self._waiting) < self.size and (left := until - time.monotonic()) > 0:
            self._came.clear()
            try:
                await asyncio.wait_for(self._came.wait(), left)
            except TimeoutError:
                break
        batch = [self._waiting.popleft()]
        room = self.pixels - batch[0].picture.pixels
        while self._waiting and len(batch) < self.size and self._waiting[0].picture.pixels <= room:
            batch.append(self._waiting.popleft())
            room -= batch[-1].picture.pixels
        return batch
