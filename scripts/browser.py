"""Opens a local page in a Chromium without a window, and takes its picture.

    python scripts/browser.py runs/smollm2/report.html report.png [--size 1280x900] [--dark] [--full]

The browser has an empty profile and no way to any network; it is driven through two pipes, so no port is opened. What the page
says as errors, throws, or asks of anything but its own file is printed, and the exit code is then 1. Tests use the same browser.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import itertools
import json
import os
import select
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio"),
    *("--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe"),
)
PATIENCE = 60.0
"""Seconds that any one answer of the browser may take on a busy machine."""

KEYS = {
    "Tab": (9, ""),
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Space": (32, " "),
    "End": (35, ""),
    "Home": (36, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}
"""Windows' number of a key, and the text that it writes."""

COUNT_COLOURS = """
(async () => {
  const bytes = Uint8Array.from(atob(PICTURE), (letter) => letter.charCodeAt(0));
  const image = await createImageBitmap(new Blob([bytes]));
  const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
  context.drawImage(image, 0, 0);
  return new Set(new Uint32Array(context.getImageData(0, 0, image.width, image.height).data.buffer)).size;
})()
"""


class PageError(Exception):
    """What went wrong in a page: errors, exceptions, requests, or something awaited that did not come."""


def find_chromium() -> str | None:
    """The browser's program; None where none is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """A Chromium of its own. Leaving the `with` block ends it, and nothing else."""

    def __init__(self, program: str) -> None:
        self.program = program
        self._numbers = itertools.count(1)
        self._rest = b""
        self._heard: dict[str, Callable[[str, dict[str, Any]], None]] = {}
        """What each session's events go to."""

    def __enter__(self) -> Browser:
        self.profile = tempfile.mkdtemp(prefix="browser-")
        told, self._out = _pipe()
        self._in, says = _pipe()
        actions = [
            (os.POSIX_SPAWN_DUP2, told, 3),
            (os.POSIX_SPAWN_DUP2, says, 4),
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ]
        command = [self.program, *FLAGS, f"--user-data-dir={self.profile}", "about:blank"]
        self.process = os.posix_spawn(self.program, command, os.environ, file_actions=actions, setpgroup=0)
        os.close(told)
        os.close(says)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, PageError):
            self.send("Browser.close")
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self.profile, ignore_errors=True)

    @contextlib.contextmanager
    def page(
        self, file: Path, *, hash: str = "", size: tuple[int, int] = (1280, 900), dark: bool = False, print: bool = False
    ) -> Iterator[Page]:
        """The page in the file, loaded; `hash` is what follows # in its address.

        Raises:
            PageError: on leaving, where the page said an error, threw, or asked for anything but itself, `data:` and `blob:`.
        """
        with self._opened() as page:
            features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            page.send("Emulation.setEmulatedMedia", media="print" if print else "", features=features)
            page.resize(*size)
            page.go(file.absolute().as_uri() + (f"#{hash}" if hash else ""))
            yield page
            page.evaluate("0")  # what has happened is heard before this is answered
            if page.problems:
                raise PageError("\n".join(page.problems))

    def colours(self, png: bytes) -> int:
        """How many colours a picture has; one, if it is blank."""
        with self._opened() as page:
            return int(page.evaluate(COUNT_COLOURS.replace("PICTURE", json.dumps(base64.b64encode(png).decode()))))

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the DevTools protocol."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters, **({"sessionId": session} if session else {})}
        rest = json.dumps(message).encode() + b"\0"
        while rest:
            rest = rest[os.write(self._out, rest) :]
        deadline = time.monotonic() + PATIENCE
        while True:
            heard = self._hear(deadline, method)
            if heard.get("id") == number:
                if "error" in heard:
                    raise PageError(f"{method}: {heard['error']['message']}")
                result: dict[str, Any] = heard["result"]
                return result

    def hear(self, deadline: float, what: str) -> None:
        """Wait for the next event."""
        self._hear(deadline, what)

    def _hear(self, deadline: float, what: str) -> dict[str, Any]:
        """The browser's next message; an event has gone where it belongs."""
        while b"\0" not in self._rest:
            if not select.select([self._in], [], [], max(deadline - time.monotonic(), 0))[0]:
                raise PageError(f"{what}: nothing came in {PATIENCE:g} seconds")
            more = os.read(self._in, 2**20)
            if not more:
                raise PageError(f"{what}: the browser has ended")
            self._rest += more
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        listener = self._heard.get(message.get("sessionId", ""))
        if listener and "method" in message:
            listener(message["method"], message["params"])
        return message

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Page]:
        """An empty page that shares nothing with others."""
        context = self.send("Target.createBrowserContext")["browserContextId"]
        target = self.send("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        self._heard[session] = page.heard
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.send(f"{domain}.enable")
        try:
            yield page
        finally:
            del self._heard[session]
            self.send("Target.disposeBrowserContext", browserContextId=context)


class Page:
    """A page, as a person at a keyboard has it."""

    def __init__(self, browser: Browser, session: str) -> None:
        self._browser, self._session = browser, session
        self._address = ""
        self._loaded = False
        self.problems: list[str] = []
        """Errors on the console, exceptions, and requests for anything but the page itself."""

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer to a command of the DevTools protocol."""
        return self._browser.send(method, self._session, **parameters)

    def heard(self, method: str, event: dict[str, Any]) -> None:
        """Take an event."""
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.problems.append(f"exception: {details.get('exception', {}).get('description', details['text'])}")
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            said = [str(one.get("value", one.get("description", ""))) for one in event["args"]]
            self.problems.append(f"console: {' '.join(said)}")
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.problems.append(f"log: {event['entry']['text']}")
        elif method == "Network.requestWillBeSent" and not self._is_own(event["request"]["url"]):
            self.problems.append(f"request: {event['request']['url']}")
        elif method == "Network.webSocketCreated":
            self.problems.append(f"request: {event['url']}")

    def go(self, address: str) -> None:
        """Load what is at this address, which counts as the page itself."""
        self._address, self._loaded = address.partition("#")[0], False
        answer = self.send("Page.navigate", url=address)
        if "errorText" in answer:
            raise PageError(f"{address}: {answer['errorText']}")
        deadline = time.monotonic() + PATIENCE
        while not self._loaded:
            self._browser.hear(deadline, address)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression as JSON has it; a promise is waited for."""
        answer = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            details = answer["exceptionDetails"]
            raise PageError(f"{expression}: {details.get('exception', {}).get('description', details['text'])}")
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """The value of a JavaScript expression, as soon as it is true of the page; looked at before every frame.

        An element of the page, which has no value outside, is given as true.
        """
        value = f"const value = {condition}; return value instanceof Node ? true : value;"
        look = f"(() => {{ try {{ {value} }} catch {{ return null; }} }})()"
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            if value := self.evaluate(f"new Promise((done) => setTimeout(() => done({look}), 16))"):
                return value
            if self.problems:
                raise PageError("\n".join(self.problems))
        raise PageError(f"{condition}: not true after {PATIENCE:g} seconds")

    def press(self, *keys: str, shift: bool = False) -> None:
        """Press named keys, one after the other."""
        for key in keys:
            number, text = KEYS[key]
            event = {"key": " " if key == "Space" else key, "code": key, "windowsVirtualKeyCode": number}
            event |= {"modifiers": 8 if shift else 0}
            self.send("Input.dispatchKeyEvent", type="keyDown", **event, **({"text": text} if text else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **event)

    def write(self, text: str) -> None:
        """Write text where the cursor is."""
        self.send("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        """Click the middle of the element that a CSS selector names."""
        place = self.evaluate(
            f"(() => {{ const element = document.querySelector({json.dumps(selector)}); "
            "element.scrollIntoView({ block: 'center', behavior: 'instant' }); const box = element.getBoundingClientRect(); "
            "return [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def resize(self, width: int, height: int) -> None:
        """Give the page a window of this many pixels."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def screenshot(self, *, full: bool = False) -> bytes:
        """A PNG of the window, or of the whole page."""
        area: dict[str, Any] = {}
        if full:
            size = self.send("Page.getLayoutMetrics")["cssContentSize"]
            area = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        return base64.b64decode(self.send("Page.captureScreenshot", format="png", **area)["data"])

    def _is_own(self, url: str) -> bool:
        return url.partition("#")[0] == self._address or url.startswith(("data:", "blob:"))


def _pipe() -> tuple[int, int]:
    """Reading and writing end, with numbers that are not in the way of 3 and 4."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Take the picture; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", type=Path, help="an HTML file; what follows # in its name goes to the page")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    parser.add_argument("--size", default="1280x900", help="of the window in pixels, 1280x900 by default")
    parser.add_argument("--dark", action="store_true", help="as a system with dark windows shows it")
    parser.add_argument("--print", action="store_true", help="as a printer gets it")
    parser.add_argument("--full", action="store_true", help="the whole page, not only what fits the window")
    options = parser.parse_args(arguments)
    program = find_chromium()
    if program is None:
        print(f"no Chromium is installed (looked for {', '.join(NAMES)}); Debian: apt-get install chromium", file=sys.stderr)
        return 2
    file, _, hash = str(options.page).partition("#")
    width, _, height = options.size.partition("x")
    try:
        with (
            Browser(program) as browser,
            browser.page(Path(file), hash=hash, size=(int(width), int(height)), dark=options.dark, print=options.print) as page,
        ):
            page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 500)))")
            options.picture.write_bytes(page.screenshot(full=options.full))
    except PageError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
