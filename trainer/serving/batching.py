"""Batch images of concurrent requests for the model, in order of arrival."""

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
    arrived_at: float  # time of the event loop, in seconds


class Batcher:
    """Queue of images, from which `run` forms batches for the model.

    A batch has at most `size` images and `pixels` pixels; an image with more pixels is a batch by itself. When the
    model is idle, it gets the next batch as soon as the queue has `size` images or the oldest one has waited for
    `window` seconds. At most `queue` images wait. `run_model` is called in `pool`.
    """

    def __init__(self, run_model: Model, pool: Executor, *, size: int, window: float, queue: int, pixels: int) -> None:
        self._run_model, self._pool = run_model, pool
        self.size, self.window, self.queue, self.pixels = size, window, queue, pixels
        self._pending: deque[_Pending] = deque()
        self._arrived = asyncio.Event()

    def __len__(self) -> int:
        """Return the number of images in the queue."""
        return len(self._pending)

    async def predict(self, images: Sequence[EncodedImage]) -> list[Any]:
        """Queue images, and return one prediction per image; `asyncio.QueueFull` if there is not space for all."""
        if len(self._pending) + len(images) > self.queue:
            raise asyncio.QueueFull
        loop = asyncio.get_running_loop()
        added = [_Pending(image, loop.create_future(), loop.time()) for image in images]
        self._pending.extend(added)
        self._arrived.set()
        return list(await asyncio.gather(*(pending.prediction for pending in added)))

    async def run(self) -> None:
        """Form batches and run the model on them until cancelled; an error of the model is raised in `predict`."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            try:
                images = [pending.image.data for pending in batch]
                predictions = await loop.run_in_executor(self._pool, self._run_model, images)
                for pending, prediction in zip(batch, predictions, strict=True):
                    if not pending.prediction.done():
                        pending.prediction.set_result(prediction)
            except Exception as error:
                for pending in batch:
                    if not pending.prediction.done():
                        pending.prediction.set_exception(error)

    async def _next_batch(self) -> list[_Pending]:
        """Wait for a full batch or until the window of the oldest image ends, and take the batch from the queue."""
        while not self._pending:
            self._arrived.clear()
            await self._arrived.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(self._pending[0].arrived_at + self.window):
                while len(self._pending) < self.size:
                    self._arrived.clear()
                    await self._arrived.wait()
        batch = [self._pending.popleft()]
        pixels_left = self.pixels - batch[0].image.pixels
        while self._pending and len(batch) < self.size and self._pending[0].image.pixels <= pixels_left:
            batch.append(self._pending.popleft())
            pixels_left -= batch[-1].image.pixels
        return batch
