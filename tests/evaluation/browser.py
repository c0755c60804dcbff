"""A headless Chromium, driven by its DevTools protocol over a pipe, without a port or a library.

https://chromedevtools.github.io/devtools-protocol; `--remote-debugging-pipe` reads requests from file descriptor 3 and
writes responses to 4, JSON separated by zero bytes.
"""

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.waiting import wait_until

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")

# Executes the browser with the two ends of the pipes as file descriptors 3 and 4.
LAUNCH = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(end), fcntl.F_DUPFD, 10) for end in sys.argv[1:3]]
for end, wanted in zip(ends, (3, 4)):
    os.dup2(end, wanted)
os.execv(sys.argv[3], sys.argv[3:])
"""


class Tab:
    """One page, with the `errors` of its console and the addresses of its `requests`."""

    def __init__(self, out: Any, into: Any) -> None:
        self._out, self._into, self._number, self._session = out, into, 0, ""
        self._rest = b""
        self.errors: list[str] = []
        self.requests: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a request and return its response."""
        self._number += 1
        request = {"id": self._number, "method": method, "params": parameters}
        request |= {"sessionId": self._session} if self._session else {}
        self._out.write(json.dumps(request).encode() + b"\0")
        self._out.flush()
        while (message := self._next()).get("id") != self._number:
            self._note(message)
        assert "error" not in message, f"{method}: {message['error']}"
        return dict(message["result"])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._into.fileno(), 1 << 16)
            assert part, "Chromium has ended"
            self._rest += part
        line, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(line))

    def _note(self, message: dict[str, Any]) -> None:
        kind, event = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(event["exceptionDetails"]))
        elif kind == "Runtime.consoleAPICalled" and event["type"] in ("error", "warning", "assert"):
            self.errors.append(json.dumps(event["args"]))
        elif kind == "Log.entryAdded" and event["entry"]["level"] in ("error", "warning"):
            self.errors.append(event["entry"]["text"])
        elif kind == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])

    def open(self, page: Path, width: int = 1280, height: int = 800, phone: bool = False, dark: bool = False) -> None:
        """Open a file and wait until it is loaded."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **screen)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=page.absolute().as_uri())
        self.until("document.readyState === 'complete'")

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        response = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in response, response["exceptionDetails"]
        return response["result"].get("value")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        wait_until(lambda: self.run(expression), expression)

    def centre(self, selector: str) -> tuple[float, float]:
        """Scroll to the first element of a selector, and return its centre in the window."""
        x, y = self.run(
            f"(() => {{ const e = document.querySelector({json.dumps(selector)}); "
            "e.scrollIntoView({block: 'center', behavior: 'instant'}); const r = e.getBoundingClientRect(); "
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return float(x), float(y)

    def point_at(self, selector: str) -> None:
        """Move the mouse over an element."""
        x, y = self.centre(selector)
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """Click at the centre of an element; an element that covers it gets the click."""
        x, y = self.centre(selector)
        for kind in ("mouseMoved", "mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def tap(self, selector: str) -> None:
        x, y = self.centre(selector)
        self.call("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
        self.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])

    def screenshot(self) -> bytes:
        """Return a PNG of the window."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=False)["data"])


def find_chromium() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def chromium(profile: Path) -> Iterator[Tab]:
    """Start a browser, and end it afterwards."""
    program = find_chromium()
    assert program, "Chromium is not installed"
    to_it, ours = os.pipe()
    theirs, from_it = os.pipe()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    flags += ["--blink-settings=primaryHoverType=2,availableHoverTypes=2"]  # a mouse, which headless lacks
    command = [program, *flags, f"--user-data-dir={profile}", "about:blank"]
    launch = [sys.executable, "-c", LAUNCH, str(to_it), str(from_it), *command]
    null = subprocess.DEVNULL
    child = subprocess.Popen(launch, pass_fds=(to_it, from_it), stdout=null, stderr=null)
    os.close(to_it)
    os.close(from_it)
    with os.fdopen(ours, "wb") as out, os.fdopen(theirs, "rb") as into:
        try:
            yield Tab(out, into)
        finally:
            child.terminate()
            try:
                child.wait(20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
