"""A real web server on loopback that serves a folder badly: drops connections, is busy, ignores ranges."""

import base64
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class Unsteady:
    """How it behaves towards requests for tars, and what it was asked.

    drops: bodies that break off after `drop_after` bytes, the connection with them. busy: answers 503 before others.
    ranges: whether a range is honoured. hide_length: no Content-Length, so the end of the connection is the end.
    login: user:password that every request must bring. delay_s: before it answers. silent_after: bytes of a body, after
    which it sends nothing but keeps the connection.
    """

    folder: Path
    drops: int = 0
    drop_after: int = 10_000
    busy: int = 0
    ranges: bool = True
    hide_length: bool = False
    delay_s: float = 0
    silent_after: int | None = None
    login: str = ""
    asked: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def take(self, what: str) -> bool:
        """Use up one of `what`, if any is left."""
        with self.lock:
            left = getattr(self, what)
            setattr(self, what, max(0, left - 1))
            return bool(left)

    def find_downloads(self, file: str) -> list[str]:
        """Ranges that were asked for a file, one entry per GET; "" is the whole file."""
        return [asked_range for path, asked_range in self.asked if path == f"/{file}"]


@contextmanager
def serve(behaviour: Unsteady) -> Iterator[Unsteady]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked_range = self.headers.get("Range", "")
            with behaviour.lock:
                behaviour.asked.append((self.path, asked_range))
            if behaviour.login:
                expected = "Basic " + base64.b64encode(behaviour.login.encode()).decode()
                if self.headers.get("Authorization") != expected:
                    self._end(403)
                    return
            tar = self.path.endswith(".tar")
            if tar:
                time.sleep(behaviour.delay_s)
            if tar and behaviour.take("busy"):
                self._end(503)
                return
            path = behaviour.folder / Path(self.path.partition("?")[0]).name
            if not path.is_file():
                self._end(404)
                return
            data = path.read_bytes()
            start = 0
            if behaviour.ranges and asked_range:
                start = int(asked_range.removeprefix("bytes=").split("-")[0])
            body = data[start:]
            self.send_response(206 if start else 200)
            if not behaviour.hide_length:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if tar and behaviour.take("drops"):
                body = body[: behaviour.drop_after]
            if tar and behaviour.silent_after is not None:
                self.wfile.write(body[: behaviour.silent_after])
                self.wfile.flush()
                behaviour.closing.wait(60)
                body = b""
            self.wfile.write(body)
            self.close_connection = True

        def _end(self, status: int) -> None:
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    behaviour.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield behaviour
    finally:
        behaviour.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
