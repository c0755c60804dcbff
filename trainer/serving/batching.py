"""Batch the images of many requests into one call of the model, in order of arrival."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from trainer.serving.requests import EncodedImage

Model = Callable[[list[bytes]], Sequence[Any]]  # encoded images -> one prediction per image


@dataclass(frozen=True)
class _Pending:
    image: EncodedImage
    prediction: asyncio.Future[Any]
    since: float  # in seconds of the event loop


class Batcher:
    """A queue of images, and the calls of the model that process them.

    A call takes at most `size` images and at most `pixels` pixels (a larger image goes alone). While the model is busy
    the next images queue; only if it is idle does an image wait up to `window` seconds for others.
    """

    def __init__(self, model: Model, pool: Executor, *, size: int, window: float, queue: int, pixels: int) -> None:
        self._model, self._pool = model, pool
        self.size, self.window, self.queue, self.pixels = size, window, queue, pixels
        self._pending: deque[_Pending] = deque()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        """The number of images in the queue."""
        return len(self._pending)

    async def predict(self, images: Sequence[EncodedImage]) -> list[Any]:
        """One prediction per image.

        Raises:
            asyncio.QueueFull: the queue has no room for all of them; none is added.
        """
        if len(self._pending) + len(images) > self.queue:
            raise asyncio.QueueFull
        loop = asyncio.get_running_loop()
        added = [_Pending(image, loop.create_future(), loop.time()) for image in images]
        self._pending.extend(added)
        self._arrived.set()
        return list(await asyncio.gather(*(pending.prediction for pending in added)))

    async def run(self) -> None:
        """Form batches and run the model on them, forever."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            try:
                images = [pending.image.data for pending in batch]
                predictions = await loop.run_in_executor(self._pool, self._model, images)
                for pending, prediction in zip(batch, predictions, strict=True):
                    if not pending.prediction.done():
                        pending.prediction.set_result(prediction)
            except Exception as error:
                for pending in batch:
                    if not pending.prediction.done():
                        pending.prediction.set_exception(error)

    async def _next_batch(self) -> list[_Pending]:
        while not self._pending:
            self._arrived.clear()
            await self._arrived.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._pending[0].since + self.window):
                while len(self._pending) < self.size:
                    self._arrived.clear()
                    await self._arrived.wait()
        batch = [self._pending.popleft()]
        room = self.pixels - batch[0].image.pixels
        while self._pending and len(batch) < self.size and self._pending[0].image.pixels <= room:
            batch.append(self._pending.popleft())
            room -= batch[-1].image.pixels
        return batch
