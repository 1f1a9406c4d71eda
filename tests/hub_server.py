"""A Hub on the loopback: read-only, standard library, one folder per repository.

Speaks what huggingface_hub 1.31 to 2.x asks while reading a model: model info, HEAD and ranged GET
of files at a commit, and the errors for a missing, a gated and a private repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class LoopbackHub:
    """The server's state.

    Attributes:
        repos: Repository id to folder.
        gated: Ids that answer 403 GatedRepo.
        bad_token: Whether every request is refused as by a wrong token.
        endpoint: Base address, set once the server runs.
        requests: Method and path of everything that was asked.
        bytes_sent: Body bytes of all answers.
    """

    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    bad_token: bool = False
    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    bytes_sent: int = 0

    def environment(self, home: Path) -> dict[str, str]:
        """Return the environment of a process that uses this Hub and nothing else."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "*",
        }


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def _answer(
        self, status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        headers = dict(headers or {})
        headers.setdefault("Content-Length", str(len(body)))
        for key, value in headers.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
            self.hub.bytes_sent += len(body)

    def _fail(self, status: int, code: str, message: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

    def _respond(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        path = self.path.partition("?")[0]
        if self.hub.bad_token:
            message = "Invalid credentials in Authorization header"
            self._answer(401, b'{"error": "%s"}' % message.encode(), {"X-Error-Message": message})
            return
        api = path.startswith("/api/models/")
        rest = path.removeprefix("/api/models/").lstrip("/")
        repo_id = "/".join(rest.split("/")[:2])
        if repo_id not in self.hub.repos:
            self._fail(401 if api else 404, "RepoNotFound", "Repository not found")
        elif api:
            self._info(repo_id, rest.removeprefix(repo_id))
        elif repo_id in self.hub.gated:
            self._fail(403, "GatedRepo", f"Access to model {repo_id} is restricted")
        else:
            self._file(self.hub.repos[repo_id], rest.removeprefix(repo_id))

    do_GET = do_HEAD = _respond

    def _info(self, repo_id: str, rest: str) -> None:
        known = ("", f"/revision/{COMMIT}", "/revision/main", f"/tree/{COMMIT}")
        if rest not in known:
            self._fail(404, "RevisionNotFound", "Invalid rev id")
            return
        if repo_id in self.hub.gated:
            self._fail(403, "GatedRepo", f"Access to model {repo_id} is restricted")
            return
        folder = self.hub.repos[repo_id]
        names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        if rest.startswith(f"/tree/{COMMIT}"):
            entries = [
                {
                    "type": "file",
                    "path": name,
                    "size": (folder / name).stat().st_size,
                    "oid": COMMIT,
                }
                for name in names
            ]
            self._answer(200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
            return
        info = {
            "id": repo_id,
            "sha": COMMIT,
            "private": False,
            "gated": False,
            "tags": [],
            "siblings": [{"rfilename": name} for name in names],
            "cardData": {"license": "apache-2.0"},
        }
        self._answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, folder: Path, rest: str) -> None:
        _, _, revision, name = rest.split("/", 3)
        path = folder / name
        if revision not in (COMMIT, "main"):
            self._fail(404, "RevisionNotFound", "Invalid rev id")
        elif not path.is_file():
            self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        else:
            body = path.read_bytes()
            etag = hashlib.sha256(body).hexdigest()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
            wanted = self.headers.get("Range", "")
            if wanted.startswith("bytes="):
                first, _, last = wanted.removeprefix("bytes=").partition("-")
                end = min(int(last or len(body)) + 1, len(body))
                headers["Content-Range"] = f"bytes {first}-{end - 1}/{len(body)}"
                self._answer(206, body[int(first) : end], headers)
            else:
                headers["Content-Length"] = str(len(body))
                self._answer(200, body, headers)


@contextmanager
def serve(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """Run the server while the block runs."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_python(code: str, *arguments: str, env: Mapping[str, str]) -> str:
    """Run code in a fresh process, return its stdout; the Hub's constants are read at import."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=dict(env),
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
