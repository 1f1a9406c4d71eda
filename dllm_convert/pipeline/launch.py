"""Start the same program several times: Accelerate's launcher, with our exit codes."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dllm_convert.common.interruption import INTERRUPTED, SIGNALS
from dllm_convert.errors import DllmConvertError
from dllm_convert.planning.launch import read_config

_LOGGERS = (
    "torch.distributed.elastic.multiprocessing.api",
    "torch.distributed.elastic.agent.server.api",
)

_HEARD = (*SIGNALS, signal.SIGQUIT)
"""Signals that the launcher ends at."""


def launcher_arguments(processes: int | None, config: Path | None) -> list[str]:
    """Return the arguments of `accelerate launch` that come before the command.

    Args:
        processes: Processes on this machine; None: what the config says.
        config: An Accelerate config; None: data parallel on this machine.
    """
    count = ["--num_processes", str(processes)] if processes else []
    if config is not None:
        return ["--config_file", str(config), *count]
    # On a CPU this starts the same torchrun, whose processes then meet over gloo.
    alone = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    return ["--multi_gpu", *count, *alone, "--main_process_port", "0"]


def launch(
    processes: int | None,
    config: Path | None,
    command: Sequence[str],
    *,
    module: str = "dllm_convert",
) -> int:
    """Run this program several times and wait for all of it.

    Args:
        processes: Processes on this machine.
        config: An Accelerate config.
        command: Arguments of this program.
        module: The program.

    Returns:
        The exit code of the first process that failed, 0 if none did.

    Raises:
        DataError: If there is no such config.
        IncompatibleError: If it is no YAML mapping.
        DllmConvertError: If there are fewer devices than processes, or the config is wrong.
    """
    if config is not None:
        read_config(config)
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    _check_devices(processes)
    for name in _LOGGERS:
        # What failed says so itself, in one line.
        logging.getLogger(name).setLevel(logging.CRITICAL + 1)
    share = max((os.cpu_count() or 1) // (processes or 1), 1)
    line = [*launcher_arguments(processes, config), "--module", module, *command]
    try:
        with _undone():
            os.environ.setdefault("OMP_NUM_THREADS", str(share))
            launch_command(launch_command_parser().parse_args(line))
    except ChildFailedError as error:
        return exit_code(error)
    except (SignalException, KeyboardInterrupt):
        return INTERRUPTED
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
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


def _check_devices(processes: int | None) -> None:
    import torch

    if not torch.accelerator.is_available() or processes is None:
        return
    found = torch.accelerator.device_count()
    if processes > found:
        raise DllmConvertError(
            f"--num-processes {processes}, and this machine has {found} devices",
            hint=f"Use at most --num-processes {found}",
        )


def exit_code(error: Any) -> int:
    """Return the exit code of the process that failed first; 130 if a signal ended it."""
    code = int(error.get_first_failure()[1].exitcode)
    return code if code > 0 else INTERRUPTED
