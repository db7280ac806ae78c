"""A web server on this machine that serves a folder, knows ranges, and fails when told to."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

Fault = Literal["drop", "500", "503", "404", "403", "flip", "hang", "slow"]


class Server(ThreadingHTTPServer):
    """Serves `root`; `fault(name, number)` says what the number-th request of a GET meets, `requests` what came."""

    daemon_threads = True

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.root = root
        self.fault: Callable[[str, int], Fault | None] = lambda name, number: None
        self.requests: list[tuple[str, str | None]] = []
        self.tells_length = True  # some send in chunks, and answer HEAD without a Content-Length
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self) -> None:
        path = self.server.root / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        self.send_response(200)
        if self.server.tells_length:
            self.send_header("Content-Length", str(path.stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        name, wanted = self.path.lstrip("/"), self.headers.get("Range")
        with self.server.lock:
            self.server.requests.append((name, wanted))
            fault = self.server.fault(name, len(self.server.requests))
        path = self.server.root / name
        if fault in ("500", "503", "404", "403") or not path.is_file():
            self.send_error(int(fault) if fault in ("500", "503", "403") else 404)
            return
        data = path.read_bytes()
        if wanted:
            first, last = wanted.removeprefix("bytes=").split("-")
            data = data[int(first) : int(last) + 1]
        if fault == "flip":
            data = bytes([data[0] ^ 0xFF]) + data[1:-1] + bytes([data[-1] ^ 0xFF])
        self.send_response(206 if wanted else 200)
        if self.server.tells_length:
            self.send_header("Content-Length", str(len(data)))
        else:
            self.send_header("Connection", "close")  # the end of the answer is the end of the connection
            self.close_connection = True
        self.end_headers()
        if fault == "drop":
            self.wfile.write(data[: len(data) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif fault == "hang":
            time.sleep(2)
        elif fault == "slow":
            for begin in range(0, len(data), -(-len(data) // 5)):
                self.wfile.write(data[begin : begin + -(-len(data) // 5)])
                time.sleep(0.05)
        else:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Quiet."""


@contextmanager
def serve(root: Path) -> Iterator[Server]:
    """A running server."""
    server = Server(root)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
