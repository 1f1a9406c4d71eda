"""Code of others that runs for a while, and a bound on how long and how much memory it takes.

A chat template is a program. One that never ends, or whose text never ends, cannot be told from a
slow one by looking at it, so it is stopped from a second thread.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

SECONDS = 20.0
"""Long for a template: the slowest one seen took 30 ms for a conversation of 2,000 messages."""
MEMORY = 2 << 30
"""Bytes that the process may grow by meanwhile."""
MEMORY_AFTER_S = 1.0
"""Seconds from which memory is looked at: what else the process does takes memory too."""
INTERVAL_S = 0.1

Result = TypeVar("Result")


class BoundError(Exception):
    """Code ran into its bound; the text says which."""


class _Watch:
    """Looks at what runs in other threads, and stops what exceeds its bounds."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: dict[int, tuple[float, int]] = {}
        self.stopped: dict[int, str] = {}
        self._thread: threading.Thread | None = None
        self._process = 0

    def start(self) -> None:
        """Begin to look, once in a process."""
        alive = self._thread is not None and self._thread.is_alive()
        if not alive or self._process != os.getpid():
            self._process = os.getpid()
            self._thread = threading.Thread(target=self._look, name="bounds", daemon=True)
            self._thread.start()

    def _look(self) -> None:
        while True:
            time.sleep(INTERVAL_S)
            with self.lock:
                used = _memory() if self.running else 0
                for thread, (began, before) in [*self.running.items()]:
                    since = time.monotonic() - began
                    if since > SECONDS:
                        self._stop(thread, f"did not end within {SECONDS:g} seconds")
                    elif since > MEMORY_AFTER_S and used - before > MEMORY:
                        self._stop(thread, f"took more than {MEMORY >> 30} GiB of memory")

    def _stop(self, thread: int, reason: str) -> None:
        del self.running[thread]
        self.stopped[thread] = reason
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread), ctypes.py_object(BoundError)
        )


_WATCH = _Watch()


def bounded(function: Callable[[], Result]) -> Result:
    """Call a function that is written in Python, within bounds of time and memory.

    Raises:
        BoundError: If it exceeds one of them.
    """
    _WATCH.start()
    thread = threading.get_ident()
    try:
        with _WATCH.lock:
            _WATCH.running[thread] = (time.monotonic(), _memory())
        try:
            result = function()
        finally:
            with _WATCH.lock:
                _WATCH.running.pop(thread, None)
        while thread in _WATCH.stopped:
            time.sleep(INTERVAL_S)  # It ended just then; the exception is on its way.
        return result
    except BoundError:
        raise BoundError(_WATCH.stopped.get(thread, "took too long")) from None
    except MemoryError:
        raise BoundError("took more memory than there is") from None
    finally:
        _WATCH.stopped.pop(thread, None)


def _memory() -> int:
    """Bytes that the process holds; 0 where the system does not say."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
