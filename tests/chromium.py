"""A headless Chromium for tests, driven over its debugging pipe.

Chrome DevTools Protocol: JSON messages, each ended by a zero byte, on descriptors 3 (to the browser) and 4 (from it);
https://chromedevtools.github.io/devtools-protocol/. No port, no driver program, no package.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    *("--headless=new", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage"),
    *("--disable-background-networking", "--disable-component-update", "--disable-extensions", "--mute-audio"),
    "--no-sandbox",  # of a test in a container, where the user is root
)
BECOME = """
import fcntl, os, sys
ends = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, end in zip((3, 4), ends):
    os.dup2(end, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Program that becomes another one, with these two descriptors as its 3 and 4."""
LIMIT = 60.0  # seconds that anything may take


def executable() -> str | None:
    """The first browser of its kind on the PATH."""
    return next((found for name in NAMES if (found := shutil.which(name))), None)


class Page:
    """One tab. `errors` are what scripts raised or logged as errors; `requests` are the addresses that it asked for."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._session: str | None = None
        self._loaded = asyncio.Event()
        self.errors: list[str] = []
        self.requests: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of one command. Raises RuntimeError with the browser's words."""
        number = next(self._numbers)
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._answers[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps(message).encode() + b"\0")
        answer = await asyncio.wait_for(self._answers[number], LIMIT)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        result: dict[str, Any] = answer["result"]
        return result

    async def attach(self) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            await self.call(f"{domain}.enable")

    async def go(self, url: str) -> None:
        self._loaded.clear()
        await self.call("Page.navigate", url=url)
        await asyncio.wait_for(self._loaded.wait(), LIMIT)  # what is evaluated on the way may never be answered

    async def evaluate(self, expression: str) -> Any:
        """Value of a JavaScript expression; a promise is awaited."""
        result = await self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']['exception'].get('description')}")
        return result["result"].get("value")

    async def until(self, expression: str) -> None:
        """Wait for an expression to be true; TimeoutError says which one never was."""
        try:
            async with asyncio.timeout(LIMIT):
                while not await self.evaluate(f"Boolean({expression})"):  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0.05)
        except TimeoutError:
            shown = await self.evaluate("document.body.innerText")
            raise TimeoutError(f"never true: {expression}; errors: {self.errors}; shown: {shown}") from None

    async def type(self, text: str) -> None:
        """Into whatever has the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str, code: int, text: str = "") -> None:
        for kind in ("keyDown", "keyUp"):
            extra = {"text": text} if text and kind == "keyDown" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **extra)

    async def resize(self, width: int, height: int) -> None:
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    async def receive(self) -> None:
        """Deliver answers and note events until the browser ends."""
        while True:
            message = json.loads((await self._reader.readuntil(b"\0"))[:-1])
            if (number := message.get("id")) is not None:
                answer = self._answers.pop(number)
                if not answer.done():
                    answer.set_result(message)
                continue
            details = message.get("params", {})
            match message["method"]:
                case "Page.loadEventFired":
                    self._loaded.set()
                case "Runtime.exceptionThrown":
                    self.errors.append(details["exceptionDetails"]["exception"].get("description", "?"))
                case "Log.entryAdded" if details["entry"]["level"] == "error":
                    self.errors.append(f"{details['entry']['text']} {details['entry'].get('url', '')}")
                case "Network.requestWillBeSent":
                    self.requests.append(details["request"]["url"])


@asynccontextmanager
async def browse(profile: Path) -> AsyncIterator[Page]:
    """A page of a browser of its own, whose profile is in an empty folder."""
    program = executable()
    assert program is not None
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", BECOME, str(their_in), str(their_out)),
        *(program, *FLAGS, f"--user-data-dir={profile}", "about:blank"),
        pass_fds=(their_in, their_out),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    os.close(their_in)
    os.close(their_out)
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(our_in, "rb", 0))
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, os.fdopen(our_out, "wb", 0))
    writer = asyncio.StreamWriter(transport, protocol, None, loop)
    page = Page(reader, writer)
    receiving = asyncio.create_task(page.receive())
    try:
        await page.attach()
        yield page
    finally:
        receiving.cancel()
        with suppress(asyncio.CancelledError, asyncio.IncompleteReadError):
            await receiving
        writer.close()
        if process.returncode is None:
            process.kill()
        await process.wait()
