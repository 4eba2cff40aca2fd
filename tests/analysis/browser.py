"""A headless Chromium over the DevTools protocol, through a pipe: no driver, no port."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",  # it refuses to run as root with it, as in containers
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
)


def executable() -> str | None:
    """A Chromium or Chrome on the PATH."""
    return next(filter(None, map(shutil.which, NAMES)), None)


# What reaches beyond the window's sides.
OUTSIDE = (
    "[...document.querySelectorAll('h1, h2, p, li, .card, img, figcaption, .scroll')]"
    ".filter(e => { const r = e.getBoundingClientRect();"
    " return r.width > 0 && (r.left < 0 || r.right > innerWidth); }).map(e => e.outerHTML)"
)


class Browser:
    """A browser with one page, as a context.

    Args:
        profile: an empty directory for it.
        seconds: that an answer may take.
    """

    def __init__(self, profile: Path, seconds: float = 60.0) -> None:
        self.profile, self.seconds = profile, seconds
        self.events: list[dict[str, Any]] = []
        self._number = 0
        self._session: str | None = None
        self._buffer = b""

    def __enter__(self) -> Browser:
        command = executable()
        assert command is not None
        theirs_in, self._out = os.pipe()
        self._in, theirs_out = os.pipe()
        # The browser reads the protocol from descriptor 3 and writes it to 4.
        script = f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._log = (self.profile.parent / "browser.log").open("w")
        self._process = subprocess.Popen(
            [
                *("bash", "-c", script, "bash", command, *FLAGS, "--remote-debugging-pipe"),
                *(f"--user-data-dir={self.profile}", "about:blank"),
            ],
            pass_fds=(theirs_in, theirs_out),
            stdout=self._log,
            stderr=self._log,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self._in, False)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._in)
        os.close(self._out)
        self._log.close()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; events are kept."""
        self._number += 1
        request: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            request["sessionId"] = self._session
        os.write(self._out, json.dumps(request).encode() + b"\0")
        while True:
            message = self._receive()
            if message.get("id") == self._number:
                assert "error" not in message, message
                result: dict[str, Any] = message["result"]
                return result

    def open(self, path: Path, width: int, height: int = 900) -> None:
        """Load a file in a window of that many CSS pixels, and wait until it is complete."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )
        self.events.clear()
        self.call("Page.navigate", url=path.resolve().as_uri())
        while not any(e["method"] == "Page.loadEventFired" for e in self.events):
            self._receive()

    def value(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + self.seconds
        while b"\0" not in self._buffer:
            try:
                part = os.read(self._in, 1 << 20)
            except BlockingIOError:
                part = None
            if part == b"" or time.monotonic() > end:
                log = Path(self._log.name).read_text()[-2000:]
                raise AssertionError(f"the browser {'ended' if part == b'' else 'hangs'}: {log}")
            if part is None:
                time.sleep(0.005)
            else:
                self._buffer += part
        line, self._buffer = self._buffer.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        if "method" in message:
            self.events.append(message)
        return message
