"""Start the same program several times: Accelerate's launcher, with our exit codes."""

from __future__ import annotations

import logging
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.common.interruption import INTERRUPTED, SIGNALS
from dllm_convert.common.ranks import lost_process
from dllm_convert.errors import DllmConvertError, RequestError
from dllm_convert.planning.launch import Launch, read_config

_LOGGERS = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.agent.server.api",
)

PORT = 29500
"""Where machines find each other unless they are told otherwise: torchrun's default."""
_ELSEWHERE = "--main-address HOST:PORT, the same on every machine"
_REFUSALS = (ValueError, TypeError, KeyError, AttributeError, ImportError)
"""What Accelerate raises of a config that it cannot follow."""

_HEARD = (*SIGNALS, signal.SIGQUIT)
"""Signals that the launcher ends at."""


@dataclass(frozen=True)
class Machine:
    """Where this machine stands among those of a launch.

    Attributes:
        rank: Its number, from 0.
        address: Name or address of machine 0, which all of them reach.
        port: Port there.
    """

    rank: int = 0
    address: str | None = None
    port: int = PORT

    @classmethod
    def asked(cls, launch: Launch, rank: int | None = None, address: str | None = None) -> Machine:
        """Return where this machine stands, as was asked or as the launch's config says.

        Args:
            launch: Who trains together.
            rank: Number of this machine; None: what the config says.
            address: `HOST` or `HOST:PORT` of machine 0; None: what the config says.

        Raises:
            RequestError: There is no such machine; or several cannot find each other.
        """
        if launch.machines == 1:
            for name, value in (("machine_rank", rank), ("main_address", address)):
                if value is not None:
                    raise RequestError(
                        "it would change nothing: there is one machine; add `num_machines`",
                        argument=name,
                    )
            return cls()
        said = {} if launch.config is None else read_config(Path(launch.config))
        number = said.get("machine_rank") if rank is None else rank
        if type(number) is not int or not 0 <= number < launch.machines:
            raise RequestError(
                f"found {number}, expected 0 to {launch.machines - 1}, another on each machine",
                argument="machine_rank",
            )
        if address is None:
            host, port = said.get("main_process_ip"), said.get("main_process_port") or PORT
        else:
            host, port = _host_and_port(address)
        if not host or type(port) is not int:
            raise RequestError(
                "found none, expected HOST or HOST:PORT of machine 0: where all of them meet",
                argument="main_address",
            )
        return cls(number, str(host), port)


ONLY = Machine()
"""The one machine of most launches."""


def _host_and_port(address: str) -> tuple[str, int]:
    found = re.fullmatch(
        r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+)(?::(?P<port>\d{1,5}))?", address
    )
    port = int(found["port"] or PORT) if found else 0
    if found is None or not 0 < port < 1 << 16:
        raise RequestError(
            f"{address!r} is no HOST or HOST:PORT, as in 10.0.0.1:29500", argument="main_address"
        )
    return found["host"].strip("[]"), port


def launcher_arguments(asked: Launch, machine: Machine = ONLY) -> list[str]:
    """Return the arguments of `accelerate launch` that come before the command.

    Args:
        asked: Who trains together.
        machine: Which of the machines this is.
    """
    line = ["--num_processes", str(asked.processes), "--num_machines", str(asked.machines)]
    if machine.address is not None:
        line += ["--machine_rank", str(machine.rank), "--rdzv_backend", "static"]
        line += ["--main_process_ip", machine.address, "--main_process_port", str(machine.port)]
    if asked.config is not None:
        # Its other launchers for machines are programs of their own.
        own = asked.strategy == "zero" and asked.machines > 1
        standard = ["--deepspeed_multinode_launcher", "standard"] if own else []
        return ["--config_file", asked.config, *line, *standard]
    # On a CPU this starts the same torchrun, whose processes then meet over gloo.
    alone = ["--mixed_precision", "no", "--dynamo_backend", "no"]
    port = ["--main_process_port", "0"] if machine.address is None else []
    return ["--multi_gpu", *line, *alone, *port]


def launch(
    asked: Launch,
    command: Sequence[str],
    *,
    module: str = "dllm_convert",
    machine: Machine = ONLY,
) -> int:
    """Run this program several times and wait for all of it.

    Args:
        asked: Who trains together; of several machines each calls this.
        command: Arguments of this program.
        module: The program.
        machine: Which of the machines this is.

    Returns:
        The exit code of the first process that failed, 0 if none did; 130 if a signal stopped them.

    Raises:
        DllmConvertError: There are fewer devices than processes, the config is wrong, or something
            killed a process.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    from dllm_convert.pipeline.agent import patient

    _check_devices(asked.per_machine)
    for name in _LOGGERS:
        # What failed says so itself, in one line.
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    share = max((os.cpu_count() or 1) // asked.per_machine, 1)
    line = [*launcher_arguments(asked, machine), "--module", module, *command]
    try:
        with _undone(), patient():
            os.environ.setdefault("OMP_NUM_THREADS", str(share))
            if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
                # `nohup` means it; torchrun would hear the signal all the same.
                os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
            launch_command(launch_command_parser().parse_args(line))
    except ChildFailedError as error:
        return exit_code(error)
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    except ConnectionError as error:
        raise DllmConvertError(str(error), hint=f"Another port: {_ELSEWHERE}") from error
    except RuntimeError as error:
        if machine.address is None or lost_process(error) is None:
            raise
        raise DllmConvertError(
            f"the machines do not meet at {machine.address}:{machine.port} "
            f"({str(error).splitlines()[0]})",
            hint=f"It is {_ELSEWHERE}",
        ) from error
    except _REFUSALS as error:
        raise DllmConvertError(
            f"accelerate launch refuses: {error}", hint="Look into the file of --launch-config"
        ) from error
    return 0


@contextmanager
def _undone() -> Iterator[None]:
    """Put the environment and the signals' handlers back afterwards.

    The launcher sets and hears more than it gives back; a program of somebody else goes on.
    """
    own = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in _HEARD} if own else {}
    environment = dict(os.environ)
    try:
        yield
    finally:
        for name in os.environ.keys() - environment.keys():
            del os.environ[name]
        os.environ.update(environment)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _check_devices(processes: int) -> None:
    """Refuse more processes than this machine has devices for."""
    import torch

    if not torch.accelerator.is_available():
        return
    found = torch.accelerator.device_count()
    if processes > found:
        raise DllmConvertError(
            f"--num-processes asks for {processes} on this machine, which has {found} devices",
            hint=f"Use at most {found} for each machine",
        )


def exit_code(error: Any) -> int:
    """Return the exit code of the process that failed first; 130 if a signal told it to end.

    Raises:
        DllmConvertError: It was killed, as by a system that has no memory left.
    """
    rank, failure = error.get_first_failure()
    code = int(failure.exitcode)
    if code >= 0:
        return code
    if -code in SIGNALS:
        return INTERRUPTED
    raise DllmConvertError(
        f"process {rank} was ended by {signal.Signals(-code).name}",
        hint="SIGKILL is what a system sends that has no memory left; the same command goes on "
        "from the last checkpoint",
    )
