"""Headless Chromium over its WebDriver, for tests and timings of pages: standard library and Debian's two programs."""

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1440,1000",
]


class Browser:
    """One window. A page is opened from a file; nothing else can be reached."""

    def __init__(self, url: str, session: str):
        self._url = f"{url}/session/{session}"

    def call(self, path: str, body: dict | None = None, method: str | None = None):
        return _call(f"{self._url}/{path}", body, method)

    def open(self, path: Path, until: str = "openedMs") -> None:
        """Open a page and wait until it says that it is ready: ``openedMs``, or ``readableMs`` (charts follow)."""
        self.call("url", {"url": path.resolve().as_uri()})
        deadline = time.monotonic() + 60
        while not self.run("return document.documentElement.dataset[arguments[0]]", until):
            assert time.monotonic() < deadline, "the page did not open within a minute"
            time.sleep(0.05)

    def run(self, script: str, *arguments):
        """Run JavaScript; its return value."""
        return self.call("execute/sync", {"script": script, "args": list(arguments)})

    def devtools(self, command: str, **parameters):
        """A command of Chromium's DevTools protocol; its result."""
        return self.call("goog/cdp/execute", {"cmd": command, "params": parameters})

    def draw_all(self) -> None:
        """Scroll through the page until every chart is drawn and every table built, which the page does when idle."""
        deadline = time.monotonic() + 60
        script = "const c = document.querySelector('.chart:not([data-drawn]), .table:empty'); c?.scrollIntoView();"
        while not self.run(script + " return !c"):
            assert time.monotonic() < deadline, "some charts or tables were never drawn"
            time.sleep(0.1)
        self.run("scrollTo(0, 0)")

    def errors(self) -> list[str]:
        """What the page's console complained of, violations of its own security policy included."""
        return [e["message"] for e in self.call("se/log", {"type": "browser"}) if e["level"] == "SEVERE"]

    def screenshot(self, path: Path) -> None:
        height = self.run("return document.documentElement.scrollHeight")
        self.call("window/rect", {"width": 1440, "height": int(height) + 150})
        time.sleep(0.5)
        path.write_bytes(base64.b64decode(self.call("screenshot", method="GET")))


def _call(url: str, body: dict | None = None, method: str | None = None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=90) as answer:
            return json.load(answer)["value"]
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()[:2000]) from error


@contextlib.contextmanager
def browser(profile: Path):
    """A :class:`Browser`, gone at the end.

    Raises:
        FileNotFoundError: Chromium or its driver is not installed.
    """
    missing = [p for p in ("chromium", "chromedriver") if shutil.which(p) is None]
    if missing:
        raise FileNotFoundError(
            f"not installed: {', '.join(missing)} (Debian: apt-get install chromium chromium-driver)"
        )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = open(profile / "chromedriver.log", "wb")
    driver = subprocess.Popen([shutil.which("chromedriver"), f"--port={port}"], stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            try:
                _call(f"{url}/status")
                break
            except OSError:
                time.sleep(0.1)
        options = {
            "binary": shutil.which("chromium"),
            "args": [*FLAGS, f"--user-data-dir={profile / 'profile'}"],
        }
        capabilities = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        session = _call(f"{url}/session", {"capabilities": {"alwaysMatch": capabilities}})["sessionId"]
        yield Browser(url, session)
        _call(f"{url}/session/{session}", method="DELETE")
    finally:
        driver.terminate()
        driver.wait(30)
        log.close()
