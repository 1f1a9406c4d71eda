"""A Hub on the loopback: standard library, readable and writable, with faults on demand.

Speaks what huggingface_hub 1.31 to 2.x asks while reading and publishing models. Two ways to take
files: `lfs` sends weights to a storage host of another name (LFS batch, PUT, verify), `regular`
takes everything inside the commit, which 2.x sends through its pipelined upload.

    hub = LoopbackHub(tmp_path / "hub", mode="lfs")
    hub.add_user("me", token="hf_secret")
    hub.repos["someone/tiny"] = folder            # read-only, as one commit
    with serve(hub):
        run_python(code, env=hub.environment(home, token="hf_secret"))
    hub.store.repos["me/model"].history()         # commits, newest first
    hub.faults = FaultPlan([Fault("cut-upload", "PUT", "/lfs/", value=1000)])
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import ThreadingHTTPServer
from pathlib import Path

import forks
from hub_faults import FaultPlan
from hub_handler import Handler
from hub_store import COMMIT, Repo, Store

__all__ = ["COMMIT", "LoopbackHub", "User", "run_python", "serve"]


@dataclass(frozen=True)
class User:
    """Somebody with a token; `write` says whether the token may write."""

    name: str
    orgs: tuple[str, ...] = ()
    write: bool = True


@dataclass(frozen=True)
class Seen:
    """One request, as it was recorded."""

    method: str
    path: str
    host: str
    token: str | None
    size: int


@dataclass
class LoopbackHub:
    """The server's state.

    Attributes:
        root: Folder for what is written; a new one by default.
        mode: lfs or regular.
        repos: Repository id to folder, read-only.
        gated: Ids that answer 403 GatedRepo.
        bad_token: Whether every request is refused as by a wrong token.
        users: Token to user; nobody may write without one.
        quota: Bytes of LFS objects that fit, None for any.
        part_size: LFS objects above this many bytes are sent in parts.
        faults: What goes wrong.
        endpoint: Base address, set once the server runs.
        requests: Method and path of everything that was asked.
        seen: The same with host, token and bytes received.
        bytes_sent: Body bytes of all answers.
    """

    root: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="loopback-hub-")))
    mode: str = "lfs"
    repos: dict[str, Path] = field(default_factory=dict)
    gated: set[str] = field(default_factory=set)
    bad_token: bool = False
    users: dict[str, User] = field(default_factory=dict)
    quota: int | None = None
    part_size: int = 1 << 40
    faults: FaultPlan = field(default_factory=FaultPlan)
    endpoint: str = ""
    requests: list[str] = field(default_factory=list)
    seen: list[Seen] = field(default_factory=list)
    bytes_sent: int = 0

    def __post_init__(self) -> None:
        self.store = Store(self.root)
        self.parts: dict[tuple[str, int], Path] = {}

    @property
    def storage(self) -> str:
        """Address of the storage host: the same server by another name, as a CDN is another."""
        return self.endpoint.replace("127.0.0.1", "localhost")

    def add_user(
        self, name: str, token: str, *, orgs: tuple[str, ...] = (), write: bool = True
    ) -> None:
        self.users[token] = User(name, orgs, write)

    def expire(self) -> None:
        """Make every token void."""
        self.users = {"hf_of_nobody": User("nobody", write=False)}

    def find(self, repo_id: str) -> Repo | None:
        if repo_id in self.repos:
            return self.store.import_folder(self.repos[repo_id])
        return self.store.repos.get(repo_id)

    def record(self, method: str, path: str, host: str, token: str | None, size: int) -> None:
        self.requests.append(f"{method} {path}")
        self.seen.append(Seen(method, path, host, token, size))

    def environment(self, home: Path, token: str | None = None) -> dict[str, str]:
        """Return the environment of a process that uses this Hub and nothing else."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        given = {"HF_TOKEN": token} if token else {}
        xet = {"HF_HUB_DISABLE_XET": "1"} if self.mode == "lfs" else {}
        return {
            **kept,
            **given,
            **xet,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "NO_PROXY": "*",
        }


class _Server(ThreadingHTTPServer):
    """A server on the port of the last one, if that is free: warm processes know that address."""

    daemon_threads = True
    port = 0

    def __init__(self, handler: type[Handler]) -> None:
        try:
            super().__init__(("127.0.0.1", _Server.port), handler)
        except OSError:
            super().__init__(("127.0.0.1", 0), handler)
        _Server.port = self.server_address[1]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is what these tests are about; anything else is a bug here."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


@contextmanager
def serve(hub: LoopbackHub) -> Iterator[LoopbackHub]:
    """Run the server while the block runs."""
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    server = _Server(handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def run_python(
    code: str, *arguments: str, env: Mapping[str, str], modules: Sequence[str] = ()
) -> str:
    """Run code in a process of its own, return its stdout; a fresh one if no modules are named.

    Args:
        code: What runs.
        arguments: Its arguments.
        env: The environment, see `LoopbackHub.environment`.
        modules: What it imports: it is forked from a process that has done so, see `forks.py`.
    """
    line = [sys.executable, "-c", code, *arguments]
    if modules:
        done = forks.run(line, env=env, modules=modules, timeout=120)
    else:
        done = subprocess.run(line, capture_output=True, text=True, env=dict(env), timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout
