"""A headless Chromium that says what a page asked for and how large its images are shown."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe",
)  # fmt: skip


def find() -> str | None:
    return next((path for path in map(shutil.which, NAMES) if path), None)


class Browser:
    """Speaks the DevTools protocol over two pipes: JSON messages that end with a zero byte."""

    def __init__(self, to: int, back: int) -> None:
        self._to, self._back, self._rest = to, back, b""
        self._number = itertools.count(1)
        self.events: list[dict] = []

    def _message(self) -> dict:
        while b"\0" not in self._rest:
            piece = os.read(self._back, 1 << 16)
            assert piece, "Chromium has ended"
            self._rest += piece
        text, self._rest = self._rest.split(b"\0", 1)
        return json.loads(text)

    def call(self, method: str, session: str | None = None, **parameters: object) -> dict:
        number = next(self._number)
        message = {"id": number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._message()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    def open(
        self, file: Path, width: int, shot: Path | None = None
    ) -> tuple[list[str], list[tuple[float, float, int]]]:
        """Opens a file in a window `width` wide; the addresses it asked for, and (width, height, natural width) of
        every image; with a screenshot of the whole page."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable", session)
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        self.events.clear()
        self.call("Page.navigate", session, url=file.as_uri())
        while self._value(session, "document.readyState") != "complete":
            time.sleep(0.1)
        images = "[...document.images].map(i => [i.clientWidth, i.clientHeight, i.naturalWidth])"
        sizes = [tuple(size) for size in json.loads(self._value(session, f"JSON.stringify({images})"))]
        if shot is not None:
            data = self.call("Page.captureScreenshot", session, captureBeyondViewport=True, format="png")["data"]
            shot.write_bytes(base64.b64decode(data))
        self.width = self._value(session, "document.documentElement.scrollWidth")
        asked = [
            event["params"]["request"]["url"] for event in self.events if event["method"] == "Network.requestWillBeSent"
        ]
        self.call("Target.closeTarget", targetId=target)
        return asked, sizes

    def _value(self, session: str, expression: str) -> object:
        return self.call("Runtime.evaluate", session, expression=expression, returnByValue=True)["result"].get("value")


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    """A running Chromium with its own profile folder."""
    (their_read, our_write), (our_read, their_write) = os.pipe(), os.pipe()
    script = f'exec "$@" 3<&{their_read} 4>&{their_write}'
    command = ["bash", "-c", script, "bash", str(find()), *FLAGS, f"--user-data-dir={profile}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, pass_fds=(their_read, their_write), start_new_session=True, **quiet)
    os.close(their_read)
    os.close(their_write)
    try:
        yield Browser(our_write, our_read)
    finally:
        os.close(our_write)
        os.close(our_read)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
