"""A hub on the loopback interface that speaks the protocol of huggingface.co for reading, and can misbehave on demand.

Repository info, file tree, resolve with its headers, large files behind a redirect with byte ranges, and the error
codes the client distinguishes. It knows nothing of the code under test.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE_SUFFIXES = (".safetensors", ".parquet", ".bin")


@dataclass
class Fault:
    """Something goes wrong with the next `times` answers whose path matches `path` (shell pattern)."""

    path: str
    times: int = 1
    status: int | None = None
    """Answer with this status instead."""
    break_after: int | None = None
    """Close the connection after so many bytes of the body."""
    stall_after: int | None = None
    """Send nothing more after so many bytes of the body, and keep the connection."""
    corrupt: bool = False
    """Send other bytes of the same length."""
    ignore_range: bool = False
    """Send the whole file although a part was asked for."""


@dataclass
class Repo:
    """Files at one commit; every branch and tag points to it."""

    files: dict[str, bytes]
    commit: str
    names: set[str] = field(default_factory=lambda: {"main"})
    claimed_sizes: dict[str, int] = field(default_factory=dict)
    """What the hub says about a file's size where that is not the truth."""
    gated: bool = False

    def entry(self, path: str) -> dict[str, object]:
        data = self.files[path]
        size = self.claimed_sizes.get(path, len(data))
        digest = hashlib.sha256(data).hexdigest()
        lfs = {"sha256": digest, "oid": digest, "size": size, "pointerSize": 134}
        return {"size": size, "blob": blob_id(data)} | ({"lfs": lfs} if path.endswith(LARGE_SUFFIXES) else {})


@dataclass
class Request:
    method: str
    path: str
    start: int
    """First byte asked for."""
    authorised: bool
    sent: int = 0
    """Bytes of the body that were sent."""


class Hub:
    """State of the server: repositories by "models/org/name" or "datasets/org/name", faults to come, requests seen."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self.endpoint = ""
        self.content_host = ""
        """Where large files come from: to a client another host, that must not be shown the token."""
        self.closing = threading.Event()
        self._guard = threading.Lock()

    def add(self, kind: str, name: str, files: dict[str, bytes]) -> Repo:
        content = json.dumps({path: hashlib.sha1(data).hexdigest() for path, data in sorted(files.items())})
        repo = Repo(dict(files), hashlib.sha1(content.encode()).hexdigest())
        self.repos[f"{kind}/{name}"] = repo
        return repo

    def bytes_sent(self, pattern: str) -> int:
        return sum(r.sent for r in self.requests if fnmatch.fnmatch(r.path, pattern))

    def fault_for(self, path: str) -> Fault | None:
        with self._guard:
            for fault in self.faults:
                if fault.times > 0 and fnmatch.fnmatch(path, fault.path):
                    fault.times -= 1
                    return fault
        return None


def blob_id(data: bytes) -> str:
    """The id git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub on a free port of the loopback interface, stopped at the end of the block."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    hub.content_host = f"http://localhost:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def answer(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        self.seen = Request(self.command, path, start, "Authorization" in self.headers)
        self.hub.requests.append(self.seen)
        self.fault = self.hub.fault_for(path)
        if self.fault and self.fault.status:
            return self.send(self.fault.status, b"not now")
        if path.startswith("/api/"):
            return self.api(path.removeprefix("/api/"), parse_qs(url.query))
        if path.startswith("/cdn/"):
            return self.cdn(path.rsplit("/", 1)[1])
        return self.resolve(path.removeprefix("/"))

    def api(self, path: str, query: dict[str, list[str]]) -> None:
        kind, org, name, *rest = path.split("/")
        repo = self.hub.repos.get(f"{kind}/{org}/{name}")
        if repo is None:
            return self.refuse(401, "RepoNotFound")
        if repo.gated:
            return self.refuse(403, "GatedRepo")
        action, revision = (rest[0], "/".join(rest[1:])) if rest else ("revision", "main")
        if action == "tree":
            revision = rest[1]
        if revision != repo.commit and revision not in repo.names:
            return self.refuse(404, "RevisionNotFound")
        if action == "tree":
            tree = []
            for file in repo.files:
                entry = repo.entry(file)
                tree.append({"type": "file", "path": file, "oid": entry.pop("blob"), **entry})
            return self.send(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        siblings = []
        for file in repo.files:
            entry = repo.entry(file)
            shown = {"blobId": entry.pop("blob"), **entry} if "blobs" in query else {}
            siblings.append({"rfilename": file, **shown})
        info = {"id": f"{org}/{name}", "sha": repo.commit, "siblings": siblings, "private": False, "tags": []}
        return self.send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def resolve(self, path: str) -> None:
        kind = "datasets" if path.startswith("datasets/") else "models"
        org, name, _, rest = path.removeprefix("datasets/").split("/", 3)
        repo = self.hub.repos.get(f"{kind}/{org}/{name}")
        if repo is None:
            return self.refuse(401, "RepoNotFound")
        revision, _, file = rest.partition("/")
        if revision != repo.commit and revision not in repo.names:
            return self.refuse(404, "RevisionNotFound")
        commit = {"X-Repo-Commit": repo.commit}
        if file not in repo.files:
            return self.refuse(404, "EntryNotFound", commit)
        data = repo.files[file]
        if not file.endswith(LARGE_SUFFIXES):
            return self.body(data, commit | {"ETag": f'"{blob_id(data)}"'})
        digest = hashlib.sha256(data).hexdigest()
        linked = {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(data)), "ETag": f'"{blob_id(data)}"'}
        return self.send(302, b"", commit | linked | {"Location": f"{self.hub.content_host}/cdn/{file}/{digest}"})

    def cdn(self, digest: str) -> None:
        for repo in self.hub.repos.values():
            for data in repo.files.values():
                if hashlib.sha256(data).hexdigest() == digest:
                    return self.body(data, {"ETag": f'"{digest}"'})
        return self.refuse(404, "EntryNotFound")

    def body(self, data: bytes, headers: dict[str, str]) -> None:
        total, start = len(data), self.seen.start
        if self.fault and self.fault.corrupt:
            data = bytes(255 - byte for byte in data[:64]) + data[64:]
        if start and not (self.fault and self.fault.ignore_range):
            ranged = {"Content-Range": f"bytes {start}-{total - 1}/{total}", "Accept-Ranges": "bytes"}
            return self.send(206, data[start:], headers | ranged)
        return self.send(200, data, headers | {"Accept-Ranges": "bytes"})

    def refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self.send(status, b"{}", (headers or {}) | {"X-Error-Code": code, "X-Error-Message": code})

    def send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = [self.fault.break_after, self.fault.stall_after] if self.fault else []
        cut = min([len(data), *(c for c in cuts if c is not None)])
        try:
            self.wfile.write(data[:cut])
        except OSError:
            return  # the client went away
        self.seen.sent = cut
        if cut < len(data):
            if self.fault and self.fault.stall_after is not None:
                self.hub.closing.wait(60)
            self.close_connection = True
