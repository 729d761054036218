"""An HTTP server on loopback that fails on demand, for the tests of remote shards."""

import contextlib
import hashlib
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

Fault = dict[str, Any]


class BadServer:
    """Serves a folder, with the faults in `faults` by path.

    A fault may have a `status`, `cut` (bytes sent before the connection ends), `stall` (bytes sent before the server
    falls silent), `delay` (seconds before the answer ends), `length` (in the header), `etag`, `body`, `methods` (GET by
    default) and `times` (number of answers; unlimited if missing). `always` holds settings for all paths: those of a
    fault, `no_range`, `no_head`, `chunked`, `auth` and `query`. An empty `etag` sends none.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.faults: dict[str, list[Fault]] = {}
        self.always: Fault = {}
        self.requests: list[tuple[str, str, dict[str, str], int]] = []
        self.is_closing = threading.Event()
        self.num_open = 0
        self.most_open = 0
        self.lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with server.lock:
                    server.num_open += 1
                    server.most_open = max(server.most_open, server.num_open)
                try:
                    server.answer(self)
                finally:
                    with server.lock:
                        server.num_open -= 1

            do_HEAD = do_GET

            def log_message(self, *_: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass

        self.http = Server(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.http.server_address[1]}"
        self.url = f"http://{self.host}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def close(self) -> None:
        self.is_closing.set()
        self.http.shutdown()
        self.http.server_close()

    def fail(self, path: str, **fault: Any) -> None:
        self.faults.setdefault(path, []).append(fault)

    def gets(self, path: str) -> list[str]:
        """Return the ranges of the GET requests for a path; empty for requests without a range."""
        return [headers.get("Range", "") for method, at, headers, _ in self.requests if (method, at) == ("GET", path)]

    def num_by_status(self) -> Counter[int]:
        return Counter(status for _, _, _, status in self.requests)

    def _next_fault(self, path: str, method: str) -> Fault:
        with self.lock:
            for fault in self.faults.get(path, []):
                if fault.get("times", 1) > 0 and method in fault.get("methods", ("GET",)):
                    if "times" in fault:
                        fault["times"] -= 1
                    return fault
        return {}

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        path, _, query = handler.path.partition("?")
        fault = {**self.always, **self._next_fault(path, handler.command)}
        file = self.root / path.lstrip("/")
        status = 200
        if "auth" in self.always and handler.headers.get("Authorization") != self.always["auth"]:
            status = 401
        elif "query" in self.always and path.endswith(".tar") and query != self.always["query"]:
            status = 403
        elif "status" in fault:
            status = fault["status"]
        elif fault.get("no_head") and handler.command == "HEAD":
            status = 405
        elif not file.is_file():
            status = 404
        body = fault.get("body", file.read_bytes()) if status == 200 else b""
        etag = fault.get("etag", f'"{hashlib.sha1(body).hexdigest()}"')
        start, total = 0, len(body)
        match = re.fullmatch(r"bytes=(\d+)-0?", handler.headers.get("Range", ""))
        condition = handler.headers.get("If-Range")
        if status == 200 and match and not fault.get("no_range") and condition in (None, etag):
            start = int(match[1])
            status = 206 if start < total else 416
            body = body[start:] if status == 206 else b""
        self.requests.append((handler.command, path, dict(handler.headers), status))
        handler.send_response(status)
        if etag and status in (200, 206):
            handler.send_header("ETag", etag)
        if status == 206:
            handler.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        is_chunked = bool(fault.get("chunked")) and handler.command == "GET" and status == 200
        if is_chunked:
            handler.send_header("Transfer-Encoding", "chunked")
        else:
            handler.send_header("Content-Length", str(fault.get("length", len(body)) if body else 0))
        handler.end_headers()
        if handler.command == "HEAD":
            return
        sent = body[: fault.get("cut", fault.get("stall", len(body)))]
        with contextlib.suppress(OSError):
            if is_chunked:
                for at in range(0, len(sent), 5000):
                    piece = sent[at : at + 5000]
                    handler.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                sent = b"0\r\n\r\n" if len(sent) == len(body) else b""
            handler.wfile.write(sent)
            if "delay" in fault:
                time.sleep(fault["delay"])
            if "stall" in fault:
                self.is_closing.wait(60)
            if "cut" in fault or "stall" in fault:
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serving(root: Path) -> Iterator[BadServer]:
    server = BadServer(root)
    try:
        yield server
    finally:
        server.close()
