"""Ctrl-C, SIGTERM (Slurm, spot instances) and SIGHUP (a terminal that is closed).

A command ends soon, a training at its next step.

Nothing here protects work: a run survives SIGKILL at any moment. A signal only says that it has to
end, and lets a training save what the last checkpoint does not hold.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Self

from dllm_convert.common.ranks import Rank

INTERRUPTED = 130
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_REQUEST_S = 2.0
"""Launchers pass a signal on that the process group has received as well."""
ESCAPE_S = 10.0
"""How long a command may take to end after it was told to."""


def heard() -> list[signal.Signals]:
    """Return the signals to listen to: `nohup` has SIGHUP ignored, and means it."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in SIGNALS if not (number == signal.SIGHUP and ignored)]


class Interruption:
    """Listens to `SIGNALS` while a block runs; does nothing outside the main thread.

    Args:
        gently: The block looks at `requested` and ends by itself, with its work saved; a second
            signal goes to whoever listened before. Otherwise KeyboardInterrupt is raised in it;
            should something swallow that, as destructors and some callbacks do, the process ends
            all the same.
        farewell: Called before the process ends at once: at the second signal, or when the block
            does not end.
        answer: Says that the signal was heard, and what happens now; called at once.
    """

    def __init__(
        self,
        *,
        gently: bool,
        farewell: Callable[[], None] = lambda: None,
        answer: Callable[[], None] = lambda: None,
    ) -> None:
        self._gently = gently
        self._farewell = farewell
        self._answer = answer
        self._before: list[tuple[signal.Signals, object]] = []
        self._first: float | None = None
        self._number: int | None = None
        self._escape: threading.Timer | None = None
        self._process = os.getpid()

    @property
    def requested(self) -> bool:
        """Whether the block has been told to end."""
        return self._first is not None

    @property
    def typed(self) -> bool:
        """Whether somebody typed Ctrl-C: the other signals mean the program, not what it does."""
        return self._number == signal.SIGINT

    def __enter__(self) -> Self:
        """Begin to listen."""
        if threading.current_thread() is threading.main_thread():
            self._before = [(n, signal.signal(n, self._receive)) for n in heard()]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the earlier handlers back."""
        if self._escape is not None:
            self._escape.cancel()
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before:
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._before = []

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A forked worker inherits the handler; it is not what was told to save its work.
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
            return
        now = time.monotonic()
        if self._first is None:
            self._first, self._number = now, number
            # In a thread: what the signal came into may be writing to the same stream.
            threading.Thread(target=self._answer, daemon=True).start()
            if not self._gently:
                self._escape = threading.Timer(ESCAPE_S, self._end)
                self._escape.daemon = True
                self._escape.start()
                raise KeyboardInterrupt
        elif now - self._first >= (SAME_REQUEST_S if Rank.from_environment().world > 1 else 0.0):
            if not self._gently:
                self._end()
            self._restore()
            signal.raise_signal(number)

    def _end(self) -> None:
        self._farewell()
        os._exit(INTERRUPTED)
