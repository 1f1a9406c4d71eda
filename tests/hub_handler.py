"""The loopback Hub's connection: reads a request, lets its faults strike, answers."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_api import Answer, Asked, answer
from hub_faults import Fault

if TYPE_CHECKING:
    from hub_server import LoopbackHub


PIECE = 1 << 20


class _Gone(Exception):
    """The connection is to be closed without another byte."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Headers and body are two writes: the second would wait for the first to be acknowledged.
    disable_nagle_algorithm = True
    hub: LoopbackHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def _handle(self) -> None:
        parts = urlsplit(self.path)
        path, query = unquote(parts.path), parse_qs(parts.query, keep_blank_values=True)
        fault = self.hub.faults.take(self.command, path)
        try:
            reply = self._reply(fault, path, query)
            self._send(reply, fault)
        except (_Gone, ConnectionError, TimeoutError):
            self._close()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _handle

    def _reply(self, fault: Fault | None, path: str, query: Mapping[str, list[str]]) -> Answer:
        header = self.headers.get("Authorization", "")
        token = header.removeprefix("Bearer ") or None
        host = self.headers.get("Host", "").partition(":")[0]
        limit = fault.value if fault and fault.action == "cut-upload" else None
        body = self._body(limit)
        size = body.stat().st_size if isinstance(body, Path) else len(body)
        self.hub.record(self.command, self.path, host, token, size)
        if fault is not None:
            early = self._before(fault, path)
            if early is not None:
                return early
        asked = Asked(self.command, path, query, token, self.headers, body)
        return answer(self.hub, asked)

    def _before(self, fault: Fault, path: str) -> Answer | None:
        hub = self.hub
        if fault.action == "cut":
            raise _Gone
        if fault.action == "kill" and hub.faults.kill:
            hub.faults.kill()
            raise _Gone
        if fault.action == "slow":
            time.sleep(fault.value / 1000)
        if fault.action == "expire":
            hub.expire()
        if fault.action == "status":
            return Answer.error(fault.value, None, "Something went wrong on our side")
        if fault.action == "stale" and "/commit/" in path:
            repo_id, _, revision = path.removeprefix("/api/models/").partition("/commit/")
            repo = hub.find(repo_id)
            if repo is not None:
                other = hub.store.add_bytes(b"somebody else\n")
                with hub.store.lock:
                    hub.store.commit(repo, revision, {".gitattributes": other}, "somebody else")
        return None

    def _body(self, limit: int | None) -> bytes | Path:
        """Read the request's body; what is put is written to a file, however big it is."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        length = int(self.headers.get("Content-Length") or 0)
        if limit is not None:
            self.rfile.read(min(limit, length))
            raise _Gone
        if self.command != "PUT":
            return self._read(length)
        path = self.hub.store.new_file()
        with path.open("wb") as out:
            while length:
                piece = self._read(min(length, PIECE))
                length -= len(piece)
                # Sparse files stay sparse: a test of gigabytes takes none of the disk.
                if piece.count(0) == len(piece):
                    out.truncate(out.seek(len(piece), 1))
                else:
                    out.write(piece)
        return path

    def _read(self, length: int) -> bytes:
        body = self.rfile.read(length)
        if len(body) < length:
            raise _Gone
        return body

    def _send(self, reply: Answer, fault: Fault | None) -> None:
        action = fault.action if fault else None
        if action == "kill-after" and self.hub.faults.kill:
            self.hub.faults.kill()
            raise _Gone
        if action == "lost":
            raise _Gone
        self.send_response(reply.status)
        for key, value in {"Content-Length": str(reply.length), **reply.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        left = fault.value if fault and action == "cut-download" else reply.length
        for piece in reply.pieces(PIECE):
            sent = bytes([piece[0] ^ 1]) + piece[1:] if action == "corrupt" and piece else piece
            action = None
            self.wfile.write(sent[:left])
            left -= len(sent)
            if left < 0:
                raise _Gone
        self.hub.bytes_sent += reply.length

    def _close(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
