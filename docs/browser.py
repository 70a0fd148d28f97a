"""Screenshots of web pages by a headless Chromium, over its debugging protocol."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
START_S = 30.0
LARGEST = 280_000


def find_browser() -> str:
    """Path of a Chromium or Chrome: $BROWSER_BINARY, else the first one on PATH."""
    asked = os.environ.get("BROWSER_BINARY")
    found = [asked] if asked else [path for name in NAMES if (path := shutil.which(name))]
    if not found:
        raise SystemExit(f"no browser found ({', '.join(NAMES)}): apt install chromium, or set BROWSER_BINARY to one")
    return found[0]


class Page:
    """One tab."""

    def __init__(self, socket: Any) -> None:
        self._socket, self._calls = socket, 0

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._calls += 1
        self._socket.send(json.dumps({"id": self._calls, "method": method, "params": parameters}))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("id") == self._calls:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return dict(answer["result"])

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        return self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get(
            "value"
        )

    def open(self, url: str, until: str, within_s: float = 60.0, settle_s: float = 1.0) -> None:
        """Go there and wait.

        Args:
            until: a text that is on the page when it is ready.
            within_s: limit.
            settle_s: afterwards, for charts that draw themselves.

        Raises:
            TimeoutError: with what the page shows instead.
        """
        self.call("Page.navigate", url=url)
        self.wait(until, within_s)
        time.sleep(settle_s)

    def wait(self, until: str, within_s: float = 60.0) -> None:
        end_at = time.monotonic() + within_s
        while until not in (text := str(self.run("document.body ? document.body.innerText : ''"))):
            if time.monotonic() > end_at:
                raise TimeoutError(f"{until!r} did not appear within {within_s:.0f} s. The page shows:\n{text[:2000]}")
            time.sleep(0.3)

    def wait_for(self, script: str, within_s: float = 90.0) -> None:
        """Until a JavaScript expression is true."""
        end_at = time.monotonic() + within_s
        while not self.run(script):
            if time.monotonic() > end_at:
                raise TimeoutError(f"not true within {within_s:.0f} s: {script}")
            time.sleep(0.3)

    def click(self, selector: str, text: str) -> None:
        """The element with exactly this text."""
        all_of_them = f"[...document.querySelectorAll({json.dumps(selector)})]"
        one = f"{all_of_them}.find(e => e.innerText.trim() === {json.dumps(text)})"
        if not self.run(f"(e => e ? (e.click(), true) : false)({one})"):
            raise LookupError(f"no {selector} on the page reads {text!r}")

    def picture(self, path: Path, width: int = 1400, height: int = 1150, whole: bool = False, top: int = 0) -> None:
        """PNG of `height` pixels from `top` on; `whole`: of everything, at most `height`."""
        if whole:
            height = min(height, int(self.run("document.documentElement.scrollHeight")))
        clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
        data = self.call("Page.captureScreenshot", format="png", clip=clip, captureBeyondViewport=True)["data"]
        path.write_bytes(_small(base64.b64decode(data)))


def _small(png: bytes) -> bytes:
    """256 colours where it would be too large for a repository."""
    if len(png) <= LARGEST:
        return png
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(png)).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(out, "png", optimize=True)
    return out.getvalue()


@contextmanager
def browser(width: int = 1400, height: int = 1150) -> Iterator[Page]:
    """A tab of a browser of our own, which ends with the block."""
    from websockets.sync.client import connect

    profile = tempfile.mkdtemp(prefix="browser-")
    command = [find_browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    command += ["--disable-dev-shm-usage", "--hide-scrollbars", "--no-first-run", f"--window-size={width},{height}"]
    command += [f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"HOME": profile})
    try:
        address = _address(process)
        with connect(f"{address.rsplit('/', 3)[0]}/devtools/page/{_tab(address)}", max_size=None) as socket:
            page = Page(socket)
            page.call("Page.enable")
            metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
            page.call("Emulation.setDeviceMetricsOverride", **metrics)
            yield page
    finally:
        process.terminate()
        process.wait(10)
        shutil.rmtree(profile, ignore_errors=True)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stderr is not None
    lines = []
    for line in process.stderr:  # ends with the process where it cannot start
        lines.append(line)
        if found := re.search(r"DevTools listening on (ws://\S+)", line):
            return found[1]
    raise SystemExit("the browser does not start:\n" + "".join(lines[-10:]))


def _tab(address: str) -> str:
    import urllib.request

    port = address.split("/")[2]
    with urllib.request.urlopen(f"http://{port}/json", timeout=START_S) as answer:
        return next(str(tab["id"]) for tab in json.loads(answer.read()) if tab["type"] == "page")
