"""Form batches for the model from the images of concurrent requests, in order of arrival (large images separately)."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from trainer.serving.requests import EncodedImage

LARGE_PIXELS = 2_000_000  # limit of `EncodedImage.cost`, in pixels of a PNG, above which an image is a large one
Model = Callable[[list[EncodedImage]], Sequence[Any]]  # returns one prediction per image


@dataclass(frozen=True)
class _Pending:
    image: EncodedImage
    prediction: asyncio.Future[Any]
    arrived_at: float  # time of the event loop, in seconds


class Batcher:
    """A queue of images, from which `run` forms batches for the model.

    While the model is idle, it gets the next batch as soon as the queue has `size` images or the oldest image has
    waited for `window` seconds. While it is busy, images wait until it is idle.

    Large images (`LARGE_PIXELS`) are in separate batches. They get at most half of the model's time while small images
    wait: after a batch of large images that took t seconds, small ones are preferred for t seconds.

    Args:
        run_model: predicts a batch; called in `pool`.
        size: maximum number of images per batch.
        window: seconds for which an image waits for others while the model is idle.
        queue: maximum number of waiting images.
        pixels: maximum pixels (width x height) per batch; an image with more pixels is a batch by itself.
    """

    def __init__(self, run_model: Model, pool: Executor, *, size: int, window: float, queue: int, pixels: int) -> None:
        self._run_model, self._pool = run_model, pool
        self.size, self.window, self.queue, self.pixels = size, window, queue, pixels
        self._small: deque[_Pending] = deque()
        self._large: deque[_Pending] = deque()
        self._small_until = 0.0  # time of the event loop in seconds, until which small images are preferred
        self._arrived = asyncio.Event()  # set when images are queued

    def __len__(self) -> int:
        """Return the number of images in the queue."""
        return len(self._small) + len(self._large)

    async def predict(self, images: Sequence[EncodedImage]) -> list[Any]:
        """Queue images and wait for their predictions; return one prediction per image, in order.

        Raises:
            asyncio.QueueFull: not all of the images fit into the queue; none is queued.
            Exception: any error of `run_model` for a batch with one of the images.
        """
        if len(self) + len(images) > self.queue:
            raise asyncio.QueueFull
        loop = asyncio.get_running_loop()
        new_images = [_Pending(image, loop.create_future(), loop.time()) for image in images]
        for pending in new_images:
            (self._large if pending.image.cost > LARGE_PIXELS else self._small).append(pending)
        self._arrived.set()
        return list(await asyncio.gather(*(pending.prediction for pending in new_images)))

    async def run(self) -> None:
        """Form batches and call `run_model` on them until cancelled; `predict` raises the errors of `run_model`."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            began = loop.time()
            try:
                images = [pending.image for pending in batch]
                predictions = await loop.run_in_executor(self._pool, self._run_model, images)
                for pending, prediction in zip(batch, predictions, strict=True):
                    if not pending.prediction.done():
                        pending.prediction.set_result(prediction)
            except Exception as error:
                for pending in batch:
                    if not pending.prediction.done():
                        pending.prediction.set_exception(error)
            if batch[0].image.cost > LARGE_PIXELS:
                self._small_until = 2 * loop.time() - began  # for as long again as this batch took

    async def _next_batch(self) -> list[_Pending]:
        """Wait for a full batch, or until the oldest image has waited for `window`; dequeue a batch and return it."""
        while not len(self):
            self._arrived.clear()
            await self._arrived.wait()
        oldest = min(queued[0].arrived_at for queued in (self._small, self._large) if queued)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(oldest + self.window):
                while len(self) < self.size:
                    self._arrived.clear()
                    await self._arrived.wait()
        take_large = self._large and (not self._small or asyncio.get_running_loop().time() >= self._small_until)
        waiting = self._large if take_large else self._small
        batch = [waiting.popleft()]
        pixels_left = self.pixels - batch[0].image.pixels
        while waiting and len(batch) < self.size and waiting[0].image.pixels <= pixels_left:
            batch.append(waiting.popleft())
            pixels_left -= batch[-1].image.pixels
        return batch
