"""A Hugging Face hub on this machine, of the few routes that a fetch asks for."""

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class LocalHub:
    """The repositories, by their path in a URL (`datasets/org/set`, `org/model`), and what goes wrong in them."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.broken: set[str] = set()
        """Names of files that the server does not give."""
        self.requests: list[str] = []

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Returns status, headers and body."""
        self.requests.append(path)
        kind, _, rest = path.strip("/").partition("/")
        repo = next((name for name in self.files if f"/{name.removeprefix('datasets/')}/" in path), None)
        if repo is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if kind == "api":
            return self._api(repo, rest)
        name = path.partition(f"/resolve/{COMMIT}/")[2]
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if name in self.broken:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = self.files[repo][name]
        etag = hashlib.sha1(body, usedforsecurity=False).hexdigest()
        return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'}, body

    def _api(self, repo: str, rest: str) -> tuple[int, dict[str, str], bytes]:
        found: Any
        if "/tree/" in rest:
            found = [
                {
                    "type": "file",
                    "path": name,
                    "size": len(body),
                    "oid": hashlib.sha256(body).hexdigest()[:40],
                }
                for name, body in self.files[repo].items()
            ]
        elif rest.endswith(("/revision/main", f"/revision/{COMMIT}")):
            found = {"id": repo.removeprefix("datasets/"), "sha": COMMIT}
        else:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()


@contextlib.contextmanager
def serve(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Starts the server and makes huggingface_hub, which read its environment at import, talk to it alone."""
    hub = LocalHub(home)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = hub.answer(self.path.partition("?")[0])
            self.send_response(status)
            for name, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HOME", str(hub.home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(hub.home / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(hub.home / "token"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
