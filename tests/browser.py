"""Headless Chromium for the tests of the report page, spoken to over a pipe: no driver, no port, no network."""

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe",
)  # fmt: skip
# Keys by what the page hears; Windows' codes are what Chromium moves the focus by.
KEYS = {
    "Tab": 9,
    "Enter": 13,
    "End": 35,
    "Home": 36,
    "ArrowLeft": 37,
    "ArrowUp": 38,
    "ArrowRight": 39,
    "ArrowDown": 40,
}
PATIENCE = 60
# Chromium reads from descriptor 3 and writes to 4; the two are first put out of the way of each other.
_START = (
    "import os, sys; ends = [os.dup(int(end)) for end in sys.argv[1:3]]; os.dup2(ends[0], 3); os.dup2(ends[1], 4); "
    "os.set_inheritable(3, True); os.set_inheritable(4, True); "
    "os.execv(sys.argv[3], sys.argv[3:])"
)


def chromium() -> str | None:
    """The path of an installed Chromium."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Browser:
    """One page of a Chromium of its own, with a profile that is new and removed afterwards."""

    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="report-browser-")
        to_browser, self.writing = os.pipe()
        self.reading, from_browser = os.pipe()
        words = [chromium(), *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _START, str(to_browser), str(from_browser), *words],
            pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self.pending, self.count, self.session = b"", 0, None
        self.events: list[dict] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=30)
        os.close(self.writing)
        os.close(self.reading)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, **parameters) -> dict:
        self.count += 1
        number, message = self.count, {"id": self.count, "method": method, "params": parameters}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.writing, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, answer["error"]
                return answer["result"]
            self.events.append(answer)

    def _message(self) -> dict:
        limit = time.monotonic() + PATIENCE
        while b"\0" not in self.pending:
            ready, _, _ = select.select([self.reading], [], [], max(0, limit - time.monotonic()))
            assert ready, f"the browser did not answer within {PATIENCE} s"
            read = os.read(self.reading, 2**20)
            assert read, "the browser has ended"
            self.pending += read
        message, _, self.pending = self.pending.partition(b"\0")
        return json.loads(message)

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, awaited."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, expression: str) -> None:
        """Returns when the expression is true."""
        limit = time.monotonic() + PATIENCE
        while not self.evaluate(expression):
            assert time.monotonic() < limit, f"never true: {expression}"
            time.sleep(0.02)

    def open(self, page: Path, address: str = "", *, width: int = 1200, height: int = 900, dark: bool = False) -> None:
        """Loads a file and waits until the prompt's weights are shown."""
        self.events.clear()
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1,
                  mobile=width < 600)  # fmt: skip
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        # Another address of the same page alone would not load it anew.
        self.call("Page.navigate", url="about:blank")
        self.wait("location.href === 'about:blank'")
        self.call("Page.navigate", url=page.resolve().as_uri() + address)
        self.wait("document.querySelector('main')?.dataset.shown !== undefined")

    def press(self, key: str) -> None:
        for kind in ("rawKeyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def click(self, selector: str, across: float = 0.5, down: float = 0.5) -> None:
        """Presses the mouse on an element, at shares of its width and height."""
        box = self.evaluate(
            f"(() => {{ const found = document.querySelector({json.dumps(selector)}); "
            "found.scrollIntoView({block: 'center'}); const {x, y, width, height} = found.getBoundingClientRect(); "
            "return [x, y, width, height]; })()"
        )
        point = {"x": box[0] + across * box[2], "y": box[1] + down * box[3]}
        self.call("Input.dispatchMouseEvent", type="mouseMoved", **point)
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **point)

    def complaints(self) -> list[str]:
        """Errors of the script and of the Content-Security-Policy, and every address but the page's own."""
        self.evaluate("1")
        found = []
        for event in self.events:
            content = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(json.dumps(content["exceptionDetails"]))
            elif event.get("method") == "Log.entryAdded" and content["entry"]["level"] in ("error", "warning"):
                found.append(content["entry"]["text"])
            elif event.get("method") == "Network.requestWillBeSent" and content["type"] != "Document":
                found.append(content["request"]["url"])
        return found

    def screenshot(self, path: Path, *, whole: bool = True, clip: dict | None = None) -> None:
        options = {"clip": {**clip, "scale": 1}} if clip else {}
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=whole, **options)
        path.write_bytes(base64.b64decode(answer["data"]))
