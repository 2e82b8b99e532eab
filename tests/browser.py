"""A headless Chromium, spoken to over its debugging pipe: opens a page, clicks, presses keys, takes pictures."""

import base64
import contextlib
import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COMMAND = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page:
    """An open page; positions are in pixels of the window."""

    def __init__(self, into: int, out: int, target: str):
        self._into, self._out, self._count, self._session = into, os.fdopen(out, "rb"), 0, None
        self._session = self.do("Target.attachToTarget", targetId=self._open(target), flatten=True)["sessionId"]
        self.do("Page.enable")
        while self.script("[location.href, document.readyState]") != [target, "complete"]:
            time.sleep(0.05)

    def _open(self, target: str) -> str:
        return self.do("Target.createTarget", url=target)["targetId"]

    def do(self, method: str, **parameters: Any) -> dict:
        """Call a method of the DevTools protocol and return its answer."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._into, json.dumps(message).encode() + b"\0")
        while True:
            answer = bytearray()
            while (byte := self._out.read(1)) != b"\0":
                if not byte:
                    raise RuntimeError("the browser closed its pipe")
                answer += byte
            answer = json.loads(answer)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(answer["error"]["message"])
                return answer["result"]

    def script(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        return self.do("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def click(self, x: float, y: float) -> None:
        for kind in ("mousePressed", "mouseReleased"):
            self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def picture(self) -> np.ndarray:
        """What the window shows, "h w 3", 8 bits."""
        data = base64.b64decode(self.do("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@contextlib.contextmanager
def opened(page: Path, folder: Path, size: tuple[int, int] = (900, 800)) -> Iterator[Page]:
    """The page in a browser of its own, whose profile is in `folder`."""
    read_by_browser, into = os.pipe()
    out, written_by_browser = os.pipe()
    command = [
        COMMAND, "--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--hide-scrollbars",
        f"--user-data-dir={folder}", f"--window-size={size[0]},{size[1]}", "--force-device-scale-factor=1",
        "about:blank",
    ]  # fmt: skip

    def pipes() -> None:  # the browser reads its file 3 and writes its file 4
        reading, writing = os.dup(read_by_browser), os.dup(written_by_browser)
        os.dup2(reading, 3)
        os.dup2(writing, 4)

    process = subprocess.Popen(
        command, preexec_fn=pipes, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(read_by_browser)
    os.close(written_by_browser)
    try:
        yield Page(into, out, page.as_uri())
    finally:
        process.terminate()
        process.wait(20)
        os.close(into)
