"""A cache as huggingface_hub lays it out, and a hub on this machine that answers what its client asks."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cache_model(cache: Path, repo: str, directory: str | Path, *, revision: str = "main", commit: str = COMMIT) -> Path:
    """Put a model directory into a cache under `repo`: blobs, a snapshot of links to them, a ref. The snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    for folder in (root / "blobs", root / "refs", snapshot):
        folder.mkdir(parents=True, exist_ok=True)
    (root / "refs" / revision).write_text(commit)
    for file in Path(directory).iterdir():
        blob = root / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blob)
        os.symlink(os.path.relpath(blob, snapshot), snapshot / file.name)
    return snapshot


@dataclass
class LocalHub:
    """`fetched`: the files that were sent. `errors`: repo -> (status, X-Error-Code) instead of any answer."""

    url: str
    models: dict[str, Path] = field(default_factory=dict)
    errors: dict[str, tuple[int, str]] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    hub = server.hub = LocalHub(f"http://127.0.0.1:{server.server_address[1]}")  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """What snapshot_download asks: the commit of a revision, its files, and each file (HEAD, then GET)."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub: LocalHub = self.server.hub  # type: ignore[attr-defined]
        path = self.path.partition("?")[0]
        found = re.fullmatch(r"(?:/api/models)?/([^/]+/[^/]+)/(revision|tree|resolve)/([^/]+)(?:/(.+))?", path)
        if found is None:
            return self._send(404, b"")
        repo, what, revision, name = found.groups()
        if repo in hub.errors:
            status, code = hub.errors[repo]
            return self._send(status, b"", {"X-Error-Code": code})
        if repo not in hub.models:
            return self._send(404, b"", {"X-Error-Code": "RepoNotFound"})
        if revision not in ("main", COMMIT):
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        directory = hub.models[repo]
        if what == "revision":
            return self._json({"id": repo, "sha": COMMIT, "siblings": []})
        if what == "tree":
            return self._json([self._entry(file) for file in sorted(directory.iterdir())])
        data = (directory / name).read_bytes()
        if self.command == "GET":
            hub.fetched.append(name)
        self._send(200, data, {"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"})

    @staticmethod
    def _entry(file: Path) -> dict[str, Any]:
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": _oid(file.read_bytes())}

    def _json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Not to stderr."""


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
