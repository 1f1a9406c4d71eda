"""The three standard streams of the program: closed, full, without a reader, or never waiting.

Whoever starts a command may close a stream (`>&-`), leave it (`| head`), fill its disk, or make it
one that never waits. None of that is a failure of the work, and none may reach a file of it: a
descriptor that is closed goes to the next file that is opened, and what a library prints to it
would land there.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any, TextIO, cast

from dllm_convert.errors import OutputError

_MODES = ("r", "w", "w")


def prepare() -> None:
    """Make the standard streams ones that can be written without a thought; called once."""
    for number, (name, mode) in enumerate(zip(("stdin", "stdout", "stderr"), _MODES, strict=True)):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, which is this one: those below are open by now.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))
    for number in (1, 2):
        with suppress(OSError):
            # Shared with whoever started us, Node for one: a slow reader is waited for.
            os.set_blocking(number, True)
    sys.stdout = cast(TextIO, _Guarded(sys.stdout, told=True))
    sys.stderr = cast(TextIO, _Guarded(sys.stderr, told=False))


def silence(stream: TextIO) -> None:
    """Let what is left in the buffer go nowhere: Python flushes it once more when it ends."""
    with suppress(OSError, ValueError):
        handle = os.open(os.devnull, os.O_WRONLY)
        os.dup2(handle, stream.fileno())
        os.close(handle)


def lost(error: OSError) -> OutputError:
    """Return the error for a stdout that cannot be written."""
    return OutputError(
        f"stdout cannot be written ({error.strerror}): what the command did is done, and only "
        "its result is not shown",
        hint="The same command shows it again",
    )


class _Guarded:
    """A stream that whoever prints can write to, help and libraries as well as we.

    Args:
        stream: The stream itself.
        told: Whether a disk that is full is told. Of stderr there is nobody to tell.
    """

    def __init__(self, stream: TextIO, *, told: bool) -> None:
        self._stream = stream
        self._told = told

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's own."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text; where nobody reads it, nothing was asked for.

        Raises:
            OutputError: It cannot be written for another reason, such as a full disk.
        """
        try:
            return self._stream.write(text)
        except OSError as error:
            self._failed(error)
            return len(text)

    def flush(self) -> None:
        """Write what is in the buffer.

        Raises:
            OutputError: As `write`.
        """
        try:
            self._stream.flush()
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        silence(self._stream)
        if self._told and not isinstance(error, BrokenPipeError):
            raise lost(error) from error
