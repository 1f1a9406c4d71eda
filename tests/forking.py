"""A warm process: it imports modules once, then forks a Python program for everybody who asks.

    python forking.py SOCKET MODULE...

Whoever connects to the socket sends one JSON object and the descriptors of two streams, and reads
the program's process id, and its exit code (negative if a signal ended it) when it has ended.
A program has its own arguments, folder, environment and streams, as if started by
`python script|-m module|-c code`; `forks.py` is the other end. Standard library only: what is
imported besides is what was asked for.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import traceback
import types
from pathlib import Path
from typing import Any

ADDRESS = "FORKING_SOCKET"
"""Variable that tells a forked program where the next may be forked."""


WHERE = signal.SIGUSR2
"""Signal at which a forked program writes to stderr where its threads are."""


def execute(argv: list[str]) -> None:
    """Run what the arguments of a Python interpreter say."""
    while argv[0] in ("-u", "-I"):
        argv = argv[1:]
    if argv[0] == "-c":
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        sys.argv = ["-c", *argv[2:]]
        exec(compile(argv[1], "<string>", "exec"), main.__dict__)
    elif argv[0] == "-m":
        sys.argv = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = argv
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")


def exit_code(argv: list[str]) -> int:
    """Run a program and return its exit code, as the interpreter finds it."""
    try:
        execute(argv)
    except SystemExit as end:
        if isinstance(end.code, str):
            sys.stderr.write(f"{end.code}\n")
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def child(order: dict[str, Any], streams: list[int]) -> int:
    if order["session"]:
        os.setsid()
    for number, stream in enumerate((os.open(os.devnull, os.O_RDONLY), *streams)):
        os.dup2(stream, number)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.register(WHERE, file=2, all_threads=True)
    for place, arguments in order["before"]:
        module, _, name = place.partition(":")
        getattr(importlib.import_module(module), name)(**arguments)
    code = exit_code(order["argv"])
    threading._shutdown()  # type: ignore[attr-defined]
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def forked(order: dict[str, Any], streams: list[int]) -> int:
    """Fork a program and return its process id."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = child(order, streams)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        os._exit(code)
    return pid


def mind(connection: socket.socket) -> None:
    """Fork one program, say its process id, wait for it and say its exit code."""
    first, streams, _, _ = socket.recv_fds(connection, 1, 2)
    assert first == b"{"
    with connection, connection.makefile("rw") as file:
        pid = forked(json.loads("{" + file.readline()), streams)
        file.write(f"{pid}\n")
        file.flush()
        # Whoever asked may signal it, as a child of its own, until it has read that it ended.
        ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert ended is not None
        exited = ended.si_code == os.CLD_EXITED
        file.write(f"{ended.si_status if exited else -ended.si_status}\n")
        file.flush()
        connection.recv(1)
        os.waitpid(pid, 0)


def bury() -> None:
    """Take leave of those that have ended: their time counts as this process's."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    address, *modules = sys.argv[1:]
    listener = socket.socket(socket.AF_UNIX)
    # The name appears when somebody listens.
    listener.bind(f"{address}.new")
    listener.listen(64)
    Path(f"{address}.new").rename(address)
    os.environ[ADDRESS] = address
    for place in modules:
        module, _, name = place.partition(":")
        # transformers loads its parts when they are first asked for.
        getattr(importlib.import_module(module), name or "__name__")
    gc.freeze()
    while True:
        bury()
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            bury()
            return
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            try:
                mind(connection)
            except (OSError, BrokenPipeError):
                # Whoever asked is gone.
                os._exit(1)
            os._exit(0)
        connection.close()


if __name__ == "__main__":
    main()
