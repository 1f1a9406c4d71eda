"""Fresh processes for the checks that load a checkpoint as a stranger would, forked.

Importing torch and transformers takes most of such a process's time, and a run of the tests starts
hundreds. So one process imports them once, never this package, and forks a child for every script:
the child has the script's arguments, folder, environment and streams, and knows no dllm_convert.
Tests marked `stranger` or `real` start real processes instead.
"""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


class Strangers:
    """Stands in for `subprocess` where a fresh process is started."""

    DEVNULL = subprocess.DEVNULL
    TimeoutExpired = subprocess.TimeoutExpired

    def __init__(self) -> None:
        self._parent: subprocess.Popen[str] | None = None
        self._home: tempfile.TemporaryDirectory[str] | None = None

    def run(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        """Fork a child that runs a script as `python -I script arguments` would."""
        if command[:2] != [sys.executable, "-I"]:
            return subprocess.run(command, **options)
        parent = self._started(options["env"])
        with tempfile.TemporaryDirectory() as name:
            streams = [str(Path(name, stream)) for stream in ("out", "err")]
            order = {
                "argv": command[2:],
                "cwd": str(options["cwd"]),
                "env": dict(options["env"]),
                "streams": streams,
            }
            assert parent.stdin is not None
            assert parent.stdout is not None
            parent.stdin.write(json.dumps(order) + "\n")
            parent.stdin.flush()
            code = int(parent.stdout.readline())
            texts = [Path(stream).read_text(errors="replace") for stream in streams]
        return subprocess.CompletedProcess(command, code, *texts)

    def _started(self, environment: dict[str, str]) -> subprocess.Popen[str]:
        if self._parent is None:
            self._home = tempfile.TemporaryDirectory(prefix="strangers-")
            home = Path(self._home.name)
            # Read once, when huggingface_hub and transformers are imported.
            own = {"HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
            self._parent = subprocess.Popen(
                [sys.executable, "-I", __file__],
                cwd=home,
                env={**environment, **own},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        return self._parent

    def close(self) -> None:
        """End the parent."""
        if self._parent is not None:
            self._parent.communicate()
        if self._home is not None:
            self._home.cleanup()


def child(order: dict[str, Any]) -> int:
    for number, path in enumerate(order["streams"], 1):
        stream = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, number)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.argv = order["argv"]
    try:
        runpy.run_path(order["argv"][0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def main() -> None:
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    # transformers loads its parts when they are first asked for.
    for name in ("LlamaForCausalLM", "PreTrainedTokenizerFast", "BertForMaskedLM"):
        getattr(transformers, name)
    assert "dllm_convert" not in sys.modules
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = child(json.loads(line))
            except BaseException:
                import traceback

                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(pid, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
