"""A small server on loopback that speaks the part of Google Cloud Storage's JSON API by which objects are read.

Metadata, listing and media with ranges, as cloud.google.com/storage/docs/json_api describes them.
"""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import md5
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass
class Bucket:
    """name, prefix: where the files of `folder` lie. drops: media answers that break off. asked: paths and ranges."""

    folder: Path
    name: str = "sets"
    prefix: str = "demo/scenes/"
    drops: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    url: str = ""

    def metadata(self, path: Path) -> dict[str, str]:
        data = path.read_bytes()
        name = self.prefix + path.name
        return {
            "kind": "storage#object",
            "id": f"{self.name}/{name}/1",
            "name": name,
            "bucket": self.name,
            "size": str(len(data)),
            "md5Hash": base64.b64encode(md5(data, usedforsecurity=False).digest()).decode(),
            "generation": "1",
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "contentType": "application/octet-stream",
        }


@contextmanager
def serve_bucket(bucket: Bucket) -> Iterator[Bucket]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked_range = self.headers.get("Range", "")
            parts = urlsplit(self.path)
            with bucket.lock:
                bucket.asked.append((unquote(parts.path), asked_range))
            if parts.path.rstrip("/").endswith(f"/b/{bucket.name}/o"):
                prefix = parse_qs(parts.query).get("prefix", [""])[0]
                items = [bucket.metadata(path) for path in sorted(bucket.folder.iterdir())]
                self._json(200, {"items": [item for item in items if item["name"].startswith(prefix)]})
                return
            _, found, name = unquote(parts.path).partition(f"/b/{bucket.name}/o/")
            path = bucket.folder / name.removeprefix(bucket.prefix)
            if not found or not name.startswith(bucket.prefix) or not path.is_file():
                self._json(404, {"error": {"code": 404, "message": f"No such object: {name}"}})
            elif "media" in parse_qs(parts.query).get("alt", []) or parts.path.startswith("/download/"):
                self._media(path.read_bytes(), asked_range)
            else:
                self._json(200, bucket.metadata(path))

        def _media(self, data: bytes, asked_range: str) -> None:
            body = data
            if asked_range:
                first, _, last = asked_range.removeprefix("bytes=").partition("-")
                body = data[int(first) : int(last) + 1 if last else None]
            self.send_response(206 if asked_range else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with bucket.lock:
                breaks = bool(bucket.drops) and len(body) > 20_000
                bucket.drops -= breaks
            self.wfile.write(body[:5000] if breaks else body)
            self.close_connection = breaks

        def _json(self, status: int, content: object) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    bucket.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield bucket
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
