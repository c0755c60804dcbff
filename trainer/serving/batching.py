"""Form batches for the model from concurrent requests' images, in order of arrival (large images separately)."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

from trainer.serving.requests import EncodedImage

LARGE_IMAGE_COST = 2_000_000  # an image is large if its decoding cost (`EncodedImage.cost`) exceeds this, in PNG pixels
Model = Callable[[list[EncodedImage]], Sequence[Any]]  # returns one prediction per image


@dataclass(frozen=True)
class _QueuedImage:
    image: EncodedImage
    prediction: asyncio.Future[Any]
    arrived_at: float  # by the event loop's clock, in seconds


class Batcher:
    """A queue of images, from which `run` forms batches for the model.

    An idle model gets the next batch as soon as the queue has `max_batch` images or the oldest image has waited for
    `window_seconds`. While the model is busy, images wait.

    Large images (`LARGE_IMAGE_COST`) are in separate batches. They get at most half of the model's time while small
    images wait: after a batch of large images that took t seconds, small images are preferred for t seconds.

    Args:
        run_model: predicts a batch.
        pool: executor in which `run_model` is called.
        max_batch: maximum number of images per batch.
        window_seconds: seconds for which an image waits for further images while the model is idle.
        max_queued: maximum number of waiting images.
        max_pixels: maximum pixels (width x height) per batch; an image with more pixels is a batch by itself.
    """

    def __init__(
        self,
        run_model: Model,
        pool: Executor,
        *,
        max_batch: int,
        window_seconds: float,
        max_queued: int,
        max_pixels: int,
    ) -> None:
        self._run_model, self._pool = run_model, pool
        self.max_batch, self.window_seconds = max_batch, window_seconds
        self.max_queued, self.max_pixels = max_queued, max_pixels
        self._small: deque[_QueuedImage] = deque()
        self._large: deque[_QueuedImage] = deque()
        self._prefer_small_until = 0.0  # by the event loop's clock, in seconds
        self._arrived = asyncio.Event()  # set when images are queued

    def __len__(self) -> int:
        """Return the number of images in the queue."""
        return len(self._small) + len(self._large)

    async def predict(self, images: Sequence[EncodedImage]) -> list[Any]:
        """Queue images and wait for their predictions; return one prediction per image, in order.

        Raises:
            asyncio.QueueFull: the queue does not have room for all the images; none is queued.
            Exception: an error from `run_model`, for a batch that contains one of the images.
        """
        if len(self) + len(images) > self.max_queued:
            raise asyncio.QueueFull
        loop = asyncio.get_running_loop()
        queued_images = [_QueuedImage(image, loop.create_future(), loop.time()) for image in images]
        for queued in queued_images:
            (self._large if queued.image.cost > LARGE_IMAGE_COST else self._small).append(queued)
        self._arrived.set()
        return list(await asyncio.gather(*(queued.prediction for queued in queued_images)))

    async def run(self) -> None:
        """Form batches and call `run_model` on them until cancelled. `predict` raises the errors from `run_model`."""
        loop = asyncio.get_running_loop()
        while True:
            batch = await self._next_batch()
            start_time = loop.time()
            try:
                images = [queued.image for queued in batch]
                predictions = await loop.run_in_executor(self._pool, self._run_model, images)
                for queued, prediction in zip(batch, predictions, strict=True):
                    if not queued.prediction.done():
                        queued.prediction.set_result(prediction)
            except Exception as error:
                for queued in batch:
                    if not queued.prediction.done():
                        queued.prediction.set_exception(error)
            if batch[0].image.cost > LARGE_IMAGE_COST:
                self._prefer_small_until = 2 * loop.time() - start_time  # for as long again as this batch took

    async def _next_batch(self) -> list[_QueuedImage]:
        """Wait for a full batch, but at most until the oldest image has waited `window_seconds`; dequeue the batch."""
        while not len(self):
            self._arrived.clear()
            await self._arrived.wait()
        first_arrival = min(queue[0].arrived_at for queue in (self._small, self._large) if queue)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(first_arrival + self.window_seconds):
                while len(self) < self.max_batch:
                    self._arrived.clear()
                    await self._arrived.wait()
        take_large = self._large and (not self._small or asyncio.get_running_loop().time() >= self._prefer_small_until)
        queue = self._large if take_large else self._small
        batch = [queue.popleft()]
        pixels_left = self.max_pixels - batch[0].image.pixels
        while queue and len(batch) < self.max_batch and queue[0].image.pixels <= pixels_left:
            batch.append(queue.popleft())
            pixels_left -= batch[-1].image.pixels
        return batch
