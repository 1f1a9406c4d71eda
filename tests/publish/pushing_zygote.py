"""A process that has imported everything once and forks a real client for every push.

Reads one JSON object a line from stdin (folder, repo_id, create_pr), prints the child's pid, then
its exit code. What loads torch is left out: what is published is compared byte by byte, and other
tests run the whole command.
"""

from __future__ import annotations

import json
import os
import sys
import time

import huggingface_hub  # noqa: F401
from huggingface_hub import HfApi, hf_hub_download, snapshot_download  # noqa: F401

from dllm_convert import card, licences, quiet  # noqa: F401
from dllm_convert.console import Reporter
from dllm_convert.errors import DllmConvertError
from dllm_convert.publish import PushOptions, confirm, push_checkpoint
from dllm_convert.publish import run as publish_run

real_sleep = time.sleep


def child(order: dict[str, object]) -> int:
    confirm.short_verification = lambda *_: ()
    # Backing off is the client's; waiting for it proves nothing more.
    time.sleep = lambda seconds: real_sleep(min(seconds, 0.01))
    options = PushOptions(str(order["repo_id"]), create_pr=bool(order["create_pr"]))
    from pathlib import Path

    try:
        push_checkpoint(Path(str(order["folder"])), options, Reporter(quiet=True))
    except DllmConvertError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return error.exit_code
    return 0


def main() -> None:
    from contextlib import nullcontext

    publish_run.quiet_libraries = nullcontext
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(json.loads(line))
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stderr.flush()
            os._exit(code)
        say(pid)
        _, status = os.waitpid(pid, 0)
        say(os.waitstatus_to_exitcode(status))


def say(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


main()
