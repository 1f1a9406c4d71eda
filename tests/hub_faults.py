"""Things that go wrong between a client and the loopback Hub, on schedule."""

from __future__ import annotations

import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

BEFORE = ("status", "cut", "cut-upload", "slow", "expire", "stale", "kill")
AFTER = ("lost", "cut-download", "corrupt", "kill-after")


@dataclass(frozen=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
        action: status: answer `value` instead. cut: close without an answer. cut-upload: close
            after `value` bytes of the body. slow: wait `value` ms. expire: the token is void from
            here on. stale: somebody commits first. kill: call the plan's `kill`. lost: do it, then
            close without an answer. cut-download: close after `value` bytes of the answer.
            corrupt: flip a bit of the answer. kill-after: do it, then call `kill`.
        method: HTTP method, a regular expression.
        path: Path, a regular expression searched for.
        nth: Which matching request, from 1.
        value: See `action`.
    """

    action: str
    method: str = ".*"
    path: str = ""
    nth: int = 1
    value: int = 0


@dataclass
class FaultPlan:
    """Faults still to come, and what happened.

    Attributes:
        faults: What is to go wrong.
        kill: Called for kill and kill-after.
        happened: Faults that took place, in order.
    """

    faults: list[Fault] = field(default_factory=list)
    kill: Callable[[], None] | None = None
    happened: list[Fault] = field(default_factory=list)
    _seen: dict[Fault, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, method: str, path: str) -> Fault | None:
        """Count a request and return the fault that strikes it, if one does."""
        with self._lock:
            due = None
            for fault in self.faults:
                if re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    self._seen[fault] = self._seen.get(fault, 0) + 1
                    if (
                        due is None
                        and self._seen[fault] >= fault.nth
                        and fault not in self.happened
                    ):
                        due = fault
            if due is not None:
                self.happened.append(due)
            return due


_PLACES = (
    ("GET", "whoami"),
    ("POST", "repos/create"),
    ("POST", "validate-yaml"),
    ("POST", "preupload"),
    ("POST", "objects/batch"),
    ("PUT", "/lfs/"),
    ("POST", "/lfs/verify"),
    ("POST", "/commit/"),
    ("POST", "discussions"),
    ("GET", "/api/models/"),
    ("GET", "/tree/"),
    ("HEAD", "/resolve/"),
    ("GET", "/resolve/|/lfs/"),
)


def random_plan(seed: int) -> list[Fault]:
    """Return one to three faults at random places; the same seed gives the same ones."""
    draw = random.Random(seed)
    faults = []
    for _ in range(draw.randint(1, 3)):
        method, path = draw.choice(_PLACES)
        actions = ["status", "cut", "slow", "lost", "expire", "kill", "kill-after"]
        if method in ("PUT", "POST"):
            actions += ["cut-upload"]
        if path == "/commit/":
            actions += ["stale", "lost", "kill-after"]
        if method == "GET":
            actions += ["cut-download"]
        if "resolve" in path and method == "GET":
            actions += ["corrupt", "corrupt"]
        action = draw.choice(actions)
        value = {
            "status": draw.choice([500, 502, 503, 429]),
            "slow": draw.randint(1, 30),
            "cut-upload": draw.randint(0, 4000),
            "cut-download": draw.randint(0, 400),
        }.get(action, 0)
        faults.append(Fault(action, method, path, draw.randint(1, 3), value))
    return faults
