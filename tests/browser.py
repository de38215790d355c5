"""A page in headless Chromium, driven over its pipe for DevTools."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

__all__ = ["Browser", "needs_browser"]

_CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Chromium reads commands from descriptor 3 and writes answers to 4.
_START = (
    "import os, sys; r, w = map(int, sys.argv[1:3]); os.dup2(r, 3); os.dup2(w, 4); os.execv(sys.argv[3], sys.argv[3:])"
)
_ENOUGH_S = 30.0
_KEYS = {"End": (35, ""), "Home": (36, ""), "Tab": (9, ""), "Enter": (13, "\r")}

needs_browser = pytest.mark.skipif(_CHROMIUM is None, reason="needs chromium (Debian's package)")


class Browser:
    """One tab. `events`: what it told since the last `open`, as DevTools calls it."""

    def __init__(self, folder: Path) -> None:
        assert _CHROMIUM is not None
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        os.set_inheritable(theirs_in, True)
        os.set_inheritable(theirs_out, True)
        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={folder / 'profile'}"]
        options += ["--disable-gpu", "--no-first-run", "--hide-scrollbars", "--force-color-profile=srgb"]
        options += ["--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update"]
        if os.geteuid() == 0:
            options.append("--no-sandbox")
        self.downloads = folder / "downloads"
        with (folder / "chromium.log").open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _START, str(theirs_in), str(theirs_out), _CHROMIUM, *options],
                pass_fds=(theirs_in, theirs_out),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb", buffering=0), os.fdopen(ours_in, "rb")
        self._number, self._session, self._rest = 0, "", b""
        self.events: list[dict[str, Any]] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            self.send(f"{domain}.enable")

    def close(self) -> None:
        self._session = ""
        self.send("Browser.close")
        self._process.wait(_ENOUGH_S)
        self._in.close()
        self._out.close()

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What DevTools answers to a command."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, (method, answer["error"])
                result: dict[str, Any] = answer["result"]
                return result
            self.events.append(answer)

    def _receive(self) -> Any:
        while b"\0" not in self._rest:
            part = os.read(self._in.fileno(), 1 << 20)
            assert part, "chromium has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        return json.loads(text)

    def open(self, url: str, *, width: int = 1200, height: int = 900, phone: bool = False, dark: bool = False) -> None:
        """Load a page, in a window of so many CSS pixels."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.events.clear()
        self.send("Page.navigate", url=url)
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str) -> Any:
        """The value of an expression, of a promise what it resolves to."""
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, (script, answer["exceptionDetails"])
        return answer["result"].get("value")

    def wait(self, script: str) -> None:
        """Until an expression is true."""
        until = time.monotonic() + _ENOUGH_S
        while not self.run(script):
            assert time.monotonic() < until, (script, self.text("body"))
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """What a person reads there."""
        found: str = self.run(f"document.querySelector({json.dumps(selector)}).innerText")
        return found

    def choose(self, selector: str, *files: Path) -> None:
        """Give files to a file input."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(file) for file in files])

    def drop(self, selector: str, *files: Path) -> None:
        """Drop files there."""
        x, y = self.middle(selector)
        data = {"items": [], "files": [str(file) for file in files], "dragOperationsMask": 1}
        for kind in ("dragEnter", "dragOver", "drop"):
            self.send("Input.dispatchDragEvent", type=kind, x=x, y=y, data=data)

    def middle(self, selector: str) -> tuple[float, float]:
        """Of an element, scrolled into view: x, y in the window."""
        box = self.run(
            f"(element => {{ element.scrollIntoView({{block: 'nearest'}}); const box = element.getBoundingClientRect();"
            f" return [box.x + box.width / 2, box.y + box.height / 2]; }})"
            f"(document.querySelector({json.dumps(selector)}))"
        )
        return box[0], box[1]

    def point(self, x: float, y: float) -> None:
        """Move the mouse there."""
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str) -> None:
        """With the mouse."""
        x, y = self.middle(selector)
        self.point(x, y)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str) -> None:
        """A key, where the focus is."""
        code, text = _KEYS[key]
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, text=text)

    def download(self, selector: str, name: str) -> bytes:
        """Click, and wait for the file of that name."""
        session, self._session = self._session, ""
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(self.downloads))
        self._session = session
        self.click(selector)
        until = time.monotonic() + _ENOUGH_S
        while not (self.downloads / name).exists():
            assert time.monotonic() < until, name
            time.sleep(0.02)
        return (self.downloads / name).read_bytes()

    def offline(self, offline: bool) -> None:
        """Cut it off from the server, or not any more."""
        self.send(
            "Network.emulateNetworkConditions", offline=offline, latency=0, downloadThroughput=-1, uploadThroughput=-1
        )

    def canvas(self, selector: str) -> npt.NDArray[np.uint8]:
        """The pixels (H, W, 4) RGBA of a canvas."""
        url = self.run(f"document.querySelector({json.dumps(selector)}).toDataURL()")
        return np.array(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """As PNG; the whole page, or what the window shows of it."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
