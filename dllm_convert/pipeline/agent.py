"""torchrun's agent of one machine, patient with processes that save their work.

The stock one kills its processes half a minute after a signal, whatever they save, and hears
no signal at all while it waits for other machines.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.launcher import api

from dllm_convert.common.interruption import INTERRUPTED, SAME_REQUEST_S

_POLL_S = 0.1
_ESCAPE_S = 5.0
"""How long Python may take to hear a signal before it is taken to wait in C, without end."""


class PatientAgent(LocalElasticAgent):
    """Passes a signal on, and waits for as long as whoever sent it does.

    Slurm and spot instances kill everything when their time is over; a second signal does it here.

    Args:
        *given: As the stock agent takes them.
        heard: Set when a signal was heard.
        **named: As the stock agent takes them.
    """

    def __init__(self, *given: Any, heard: threading.Event, **named: Any) -> None:
        super().__init__(*given, **named)
        self._heard = heard

    def _shutdown(self, death_sig: Any = None, *rest: Any, **named: Any) -> None:
        """End the processes: at a signal when they have saved, after a failure soon."""
        self._heard.set()
        error = sys.exception()
        if death_sig is None and isinstance(error, SignalException):
            # The same request came twice, and the second cut the answer to the first one off.
            death_sig = error.sigval
        if death_sig is None:
            # One of them failed; what the others wait for will not come.
            super()._shutdown(signal.SIGTERM, *rest, **named)
            return
        self._pass_on(death_sig)
        super()._shutdown(signal.SIGKILL, *rest, **named)

    def _pass_on(self, number: signal.Signals) -> None:
        """Send a signal to the processes and wait until all have ended, or a second one comes."""
        context: Any = self._pcontext
        if context is None:
            return
        processes = [handler.proc for handler in context.subprocess_handlers.values()]
        began = time.monotonic()
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)
        while True:
            try:
                while any(process.poll() is None for process in processes):
                    time.sleep(_POLL_S)
                return
            except SignalException:
                # Slurm signals the launcher, and srun passes the same signal on.
                if time.monotonic() - began >= SAME_REQUEST_S:
                    return


@contextmanager
def patient() -> Iterator[None]:
    """Have torchrun's library use `PatientAgent`, and hear signals wherever it waits."""
    heard = threading.Event()
    # torch has no place to say which agent is to be used.
    namespace = vars(api)
    stock = namespace["LocalElasticAgent"]
    namespace["LocalElasticAgent"] = partial(PatientAgent, heard=heard)
    try:
        with _heard_in_c(heard):
            yield
    finally:
        namespace["LocalElasticAgent"] = stock


@contextmanager
def _heard_in_c(heard: threading.Event) -> Iterator[None]:
    """End this process at a signal that Python's handlers do not get to see.

    They run between two steps of the interpreter, and a rendezvous waits in C++ for minutes. Only
    processes that are ready to be ended by anybody are lost: those that train were told.

    Args:
        heard: Set as soon as somebody has heard a signal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    numbers = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}

    def watch() -> None:
        while received := os.read(reader, 64):
            if numbers & set(received) and not heard.wait(_ESCAPE_S):
                os._exit(INTERRUPTED)

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        heard.set()
        signal.set_wakeup_fd(before, warn_on_full_buffer=False)
        os.close(writer)
        thread.join()
        os.close(reader)
