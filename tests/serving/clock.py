"""A clock of an event loop that the test advances, so that a busy machine does not."""

import asyncio


class LoopClock:
    """The time of the running event loop in seconds: that of deadlines, timeouts and `asyncio.sleep`."""

    def __init__(self) -> None:
        self.now = 0.0
        asyncio.get_running_loop().time = lambda: self.now  # type: ignore[method-assign]

    async def advance(self, seconds: float) -> None:
        """Advance the clock, and let the loop call what is due by then."""
        self.now += seconds
        for _ in range(3):
            await asyncio.sleep(0)
