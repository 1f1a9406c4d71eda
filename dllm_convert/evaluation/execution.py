"""Running code that a model wrote: a process of its own, with limits. No sandbox.

It may read files and use the network, as whoever runs it may: use a container for models you do not
trust.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

_LIMIT = """\
import resource, sys
seconds, memory, size = map(int, sys.argv[2:5])
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
text = open(sys.argv[1], encoding="utf-8").read()
exec(compile(text, "program", "exec"), {"__name__": "program"})
"""


@dataclass(frozen=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: Wall time, and processor time.
        memory: Bytes of address space.
        file_size: Bytes of any file it writes.
    """

    seconds: int = 5
    memory: int = 1 << 30
    file_size: int = 1 << 20


def passes(program: str, limits: Limits) -> bool:
    """Whether a Python program runs to its end without an error, within the limits.

    A program that ends early, as by `sys.exit(0)`, has not passed. Whatever it started is ended
    with it, and its working directory is removed.

    Args:
        program: Its source.
        limits: What it may use.
    """
    done = secrets.token_hex(16)
    with tempfile.TemporaryDirectory(prefix="dllm-convert-code-") as folder:
        path = Path(folder) / "program.py"
        path.write_text(f"{program}\nprint({done!r}, flush=True)\n", encoding="utf-8")
        numbers = [str(n) for n in (limits.seconds, limits.memory, limits.file_size)]
        output = Path(folder) / "output"
        with output.open("wb") as handle:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _LIMIT, str(path), *numbers],
                cwd=folder,
                env={"PATH": os.defpath, "HOME": folder},
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                code = process.wait(limits.seconds)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        return code == 0 and output.read_bytes().endswith(f"{done}\n".encode())


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and whatever it started in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
