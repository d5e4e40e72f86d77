"""``vft serve``: a server for this machine alone that turns an uploaded video or ``.vft`` file into a page.

    GET /           the form
    POST /view      the file as the body, its name in X-Name (percent-encoded) -> the page of :mod:`vft.view`

Errors are one line of text with a status of 4xx. An upload lies in a temporary folder while it is read.
"""

from __future__ import annotations

import tempfile
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePath
from urllib.parse import unquote

from . import view

FORM = Path(__file__).parent / "assets" / "serve.html"
HOST = "127.0.0.1"
# seconds that a browser may send nothing
PATIENCE = 30
NAME_LENGTH = 200


class Server(ThreadingHTTPServer):
    """Listens on 127.0.0.1 and encodes one upload at a time. ``port`` 0 takes any free one.

    ``most``: bytes of an upload. ``sampler`` goes to ``tokenizer.decode``. Raises OSError where the port is taken.
    """

    daemon_threads = True

    def __init__(self, tokenizer, port: int, most: int, **sampler) -> None:
        if port > 65535:
            raise ValueError(f"port must be at most 65535, got {port}")
        self.tokenizer, self.most, self.sampler = tokenizer, most, sampler
        self.working = threading.Lock()
        super().__init__((HOST, port), _Handler)

    def page(self, body, length: int, name: str) -> str:
        """The page of an upload. Raises ValueError where it is no video, no ``.vft`` file, or not whole."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "upload"
            path.write_bytes(body.read(length))
            if path.stat().st_size < length:
                raise ValueError(f"{name}: {path.stat().st_size} of {length} bytes came")
            with self.working:
                try:
                    clip = view.of_file(self.tokenizer, path, name=name, **self.sampler)
                except ValueError as error:
                    raise ValueError(str(error).replace(str(path), name)) from error
        return view.page([clip], name)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = PATIENCE

    def do_GET(self) -> None:
        if self._ours():
            if self.path == "/":
                self._send(HTTPStatus.OK, FORM.read_text(encoding="utf-8"), "text/html")
            else:
                self._send(HTTPStatus.NOT_FOUND, f"no such page: {self.path}")

    def do_POST(self) -> None:
        if not self._ours():
            return
        length = self.headers.get("Content-Length", "")
        if self.path != "/view":
            self._send(HTTPStatus.NOT_FOUND, f"no such page: {self.path}")
        elif not length.isascii() or not length.isdecimal() or int(length) == 0:
            self._send(HTTPStatus.LENGTH_REQUIRED, "a file must be sent, with its length")
        elif int(length) > self.server.most:
            most = self.server.most >> 20
            self._send(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a file must have at most {most} MiB, got {length} bytes")
        else:
            name = PurePath(unquote(self.headers.get("X-Name", ""))).name[:NAME_LENGTH] or "upload"
            try:
                made = self.server.page(self.rfile, int(length), name)
            except ValueError as error:
                self._send(HTTPStatus.UNPROCESSABLE_ENTITY, " ".join(str(error).split()))
            except TimeoutError:
                self._send(HTTPStatus.REQUEST_TIMEOUT, f"{name}: nothing came for {PATIENCE} seconds")
            else:
                self._send(HTTPStatus.OK, made, "text/html")

    def _ours(self) -> bool:
        """Refuses what a page of another site had the browser send here, under any name that leads to this machine."""
        hosts = {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}
        origin = self.headers.get("Origin")
        if self.headers.get("Host") in hosts and (origin is None or origin in {f"http://{host}" for host in hosts}):
            return True
        self._send(HTTPStatus.FORBIDDEN, "this server answers its own page only")
        return False

    def _send(self, status: HTTPStatus, text: str, kind: str = "text/plain") -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        # the rest of a refused upload is not read
        self.send_header("Connection", "close")
        self.close_connection = True
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_) -> None:
        """Nothing: the page shows what went wrong."""
