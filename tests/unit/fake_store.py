"""A web server in a thread that serves ranges of files and misbehaves on demand."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Fault = Callable[[str, str], str | int | None]


class FakeStore:
    """Files by their paths, what has been asked for, and how many bytes of each were sent.

    A fault, asked with method and path, is the number of an answer, or `reset`, `hang`, `drip` (one byte), `cut` (half
    of what is promised), `short` (half, and no more promised), `whole` (no ranges) or `no size`; none: as it should be.
    """

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.fault: Fault = lambda method, path: None
        self.asked: collections.Counter[tuple[str, str]] = collections.Counter()
        self.sent: collections.Counter[str] = collections.Counter()
        self.delay_s = 0.0
        self.num_now = self.most_at_once = 0
        self.lock = threading.Lock()
        self.ended = threading.Event()
        self.url = ""

    def num_reads(self) -> int:
        return sum(count for (method, _), count in self.asked.items() if method == "GET")

    def forget(self) -> None:
        self.asked.clear()
        self.sent.clear()


def failing(fault: str | int, times: int, method: str = "GET") -> Fault:
    """A fault that passes after so many requests."""
    left = [times]

    def now(asked: str, path: str) -> str | int | None:
        if asked != method or not left[0]:
            return None
        left[0] -= 1
        return fault

    return now


def _handler(store: FakeStore) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

        def log_message(self, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self._answer("HEAD")

        def do_GET(self) -> None:
            self._answer("GET")

        def _answer(self, method: str) -> None:
            with store.lock:
                store.asked[method, self.path] += 1
                fault = store.fault(method, self.path)
                store.num_now += 1
                store.most_at_once = max(store.most_at_once, store.num_now)
            time.sleep(store.delay_s)
            try:
                self._answer_with(method, fault)
            finally:
                with store.lock:
                    store.num_now -= 1

        def _answer_with(self, method: str, fault: str | int | None) -> None:
            if fault == "hang":
                store.ended.wait()
            if fault in ("reset", "hang"):
                self.close_connection = True
                self.connection.close()
                return
            data = store.files.get(self.path)
            if data is None and self.path.endswith("/"):
                data = "".join(f'<a href="{path}">{path}</a>' for path in store.files).encode()
            if data is None or isinstance(fault, int):
                self.send_response(404 if data is None else int(str(fault)))
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self._send(method, data, fault)

        def _send(self, method: str, data: bytes, fault: str | int | None) -> None:
            etag, asked = hash(data), self.headers.get("Range")
            if asked and fault != "whole":
                first, last = asked.removeprefix("bytes=").split("-")
                data = data[int(first) : int(last) + 1]
            data = data[: len(data) // 2] if fault == "short" else data
            self.send_response(206 if asked and fault != "whole" else 200)
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/x-tar")
            self.send_header("ETag", f'"{etag}"')
            if fault != "no size":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if method == "GET":
                data = data[: len(data) // 2] if fault == "cut" else data
                self.close_connection = fault in ("cut", "drip", "no size")
                with store.lock:  # before they are: whoever has them may look at once
                    store.sent[self.path] += len(data)
                with contextlib.suppress(OSError):
                    if fault == "drip":
                        self.wfile.write(data[:1])
                        store.ended.wait()
                    self.wfile.write(data)

    return Handler


@contextlib.contextmanager
def serve() -> Iterator[FakeStore]:
    store = FakeStore()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(store))
    server.daemon_threads, server.block_on_close = True, False
    store.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield store
    finally:
        store.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
