"""A local HTTP server over a folder that counts requests and fails on demand."""

from __future__ import annotations

import http.server
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

Fault = Callable[[str, int], str | None]
"""Given a file's name and how often it was asked for before, says what goes wrong: an HTTP status as text,
``cut`` (the connection ends half-way), ``short`` (half the file, declared as the whole),
``flip`` (a bit of every block).
"""


class HttpFolder:
    """Serves ``folder`` on 127.0.0.1 while the context is open."""

    def __init__(self, folder: Path, fault: Fault = lambda name, before: None, bytes_per_s: float = 0) -> None:
        self.folder, self.fault, self.bytes_per_s = folder, fault, bytes_per_s
        self.requests: Counter[str] = Counter()
        self._lock = threading.Lock()
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def do_HEAD(self) -> None:
                outer.answer(self, head=True)

            def log_message(self, *_: object) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_: object) -> None:
                """Clients are killed here on purpose."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def answer(self, handler: http.server.BaseHTTPRequestHandler, head: bool = False) -> None:
        """Answer one request."""
        name = handler.path.strip("/")
        fault = None
        if not head:
            with self._lock:
                fault = self.fault(name, self.requests[name])
                self.requests[name] += 1
        path = self.folder / name
        if not path.is_file() or (fault and fault.isdigit()):
            handler.send_response(int(fault) if fault else 404)
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        data = path.read_bytes()
        if fault == "flip":
            flipped = bytearray(data)
            flipped[642::512] = bytes(byte ^ 1 for byte in flipped[642::512])
            data = bytes(flipped)
        if fault == "short":
            data = data[: len(data) // 2]
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        if head:
            return
        if fault == "cut":
            data = data[: len(data) // 2]
            handler.close_connection = True
        try:
            for begin in range(0, len(data), 1 << 14):
                handler.wfile.write(data[begin : begin + (1 << 14)])
                if self.bytes_per_s:
                    time.sleep((1 << 14) / self.bytes_per_s)
        except OSError:
            handler.close_connection = True  # the client was killed

    def __enter__(self) -> HttpFolder:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
