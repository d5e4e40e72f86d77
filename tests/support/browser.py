"""Headless Chromium through chromedriver's own protocol (W3C WebDriver): JSON over HTTP, no package needed."""

import base64
import json
import shutil
import socket
import subprocess
import time
from urllib.error import URLError
from urllib.request import Request, urlopen

NAMES = ("chromium", "chromium-browser", "google-chrome")
# code points of WebDriver's keys
KEYS = {"up": "\ue013", "down": "\ue015", "left": "\ue012", "right": "\ue014", "space": " "}


def found() -> str | None:
    """The path of a browser, where it and its driver are installed."""
    paths = [path for path in map(shutil.which, NAMES) if path]
    return paths[0] if paths and shutil.which("chromedriver") else None


class Browser:
    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.root = f"http://127.0.0.1:{free.getsockname()[1]}"
        port = self.root.rpartition(":")[2]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        try:
            self._wait()
            arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1100,1400"]
            options = {"binary": found(), "args": arguments}
            wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            session = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
            self.root += f"/session/{session['sessionId']}"
        except BaseException:
            self.driver.kill()
            raise

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_) -> None:
        try:
            self._call("DELETE", "")
        finally:
            self.driver.terminate()
            self.driver.wait(10)

    def open(self, url: str) -> None:
        self._call("POST", "/url", {"url": url})

    def run(self, script: str):
        """What a JavaScript function body returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def until(self, script: str, seconds: float = 20):
        """Waits until the script's value is true, and returns it."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.05)
        return value

    def press(self, key: str) -> None:
        stroke = [{"type": kind, "value": KEYS.get(key, key)} for kind in ("keyDown", "keyUp")]
        self._call("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": stroke}]})

    def type_into(self, selector: str, text: str) -> None:
        found = self._call("POST", "/element", {"using": "css selector", "value": selector})
        self._call("POST", f"/element/{next(iter(found.values()))}/value", {"text": text})

    def screenshot(self) -> bytes:
        return base64.b64decode(self._call("GET", "/screenshot"))

    def errors(self) -> list[str]:
        """The console's errors since the last call."""
        return [e["message"] for e in self._call("POST", "/se/log", {"type": "browser"}) if e["level"] == "SEVERE"]

    def _wait(self) -> None:
        for _ in range(200):
            try:
                return self._call("GET", "/status")
            except URLError:
                time.sleep(0.05)
        raise RuntimeError("chromedriver does not answer")

    def _call(self, method: str, path: str, body: dict | None = None):
        data = None if body is None else json.dumps(body).encode()
        with urlopen(Request(self.root + path, data, method=method), timeout=60) as answer:
            return json.load(answer)["value"]
