"""A pseudo-terminal, and the program on it."""

from __future__ import annotations

import fcntl
import os
import select
import struct
import subprocess
import sys
import termios
import time


class Terminal:
    """A child that runs the command line on a pseudo-terminal of its own."""

    def __init__(self, *arguments: str, term: str = "xterm-256color") -> None:
        self.master, self.slave = os.openpty()
        self.resize(24, 80)
        self.before = termios.tcgetattr(self.slave)
        environment = os.environ | {"TERM": term, "OMP_NUM_THREADS": "1"}
        environment.pop("NO_COLOR", None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dllm_convert", *arguments],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env=environment,
        )
        self.written = b""

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read_until(self, marker: bytes, seconds: float = 40.0) -> None:
        end = time.monotonic() + seconds
        while marker not in self.written and self.process.poll() is None:
            assert time.monotonic() < end, self.written[-2000:]
            self.read(0.2)

    def type(self, line: str, marker: bytes, seconds: float = 40.0) -> str:
        """Type a line, and return what is written from there to a marker."""
        start = len(self.written)
        os.write(self.master, line.encode())
        end = time.monotonic() + seconds
        while marker not in self.written[start:] and self.process.poll() is None:
            assert time.monotonic() < end, self.written[-2000:]
            self.read(0.2)
        return self.written[start:].decode(errors="replace")

    def wait_for_prompt(self, prompt: bytes, seconds: float = 40.0) -> None:
        """Wait until a prompt is the last thing there: what is typed before may be lost."""
        end = time.monotonic() + seconds
        while not self.written.endswith(prompt) and self.process.poll() is None:
            assert time.monotonic() < end, self.written[-2000:]
            self.read(0.2)

    def read(self, seconds: float) -> bool:
        if not select.select([self.master], [], [], seconds)[0]:
            return False
        self.written += os.read(self.master, 1 << 16)
        return True

    def close(self) -> int:
        end = time.monotonic() + 60
        while self.process.poll() is None:
            if time.monotonic() > end:
                self.process.kill()
            self.read(0.1)
        while self.read(0.1):
            pass
        return self.process.returncode
