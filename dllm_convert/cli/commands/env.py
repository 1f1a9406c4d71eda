"""`env`: what a bug report needs to know of this machine."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from dllm_convert.cli import options as option
from dllm_convert.cli import output
from dllm_convert.common.tables import Table

_VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "HF_DEBUG", "HF_HUB_OFFLINE", "OMP_NUM_THREADS"),
    *("PYTORCH_CUDA_ALLOC_CONF", "TOKENIZERS_PARALLELISM", "TRANSFORMERS_OFFLINE", "WORLD_SIZE"),
)
"""Variables that change what happens. None of them holds a name, a path of a person or a token."""


def env(as_json: option.Json = False) -> None:
    """Show versions and devices, for a bug report; it holds no names, paths or tokens."""
    found = _environment()
    if as_json:
        output.write_json(found)
        return
    rows = [(name, _shown(value)) for name, value in found.items() if value not in (None, {}, [])]
    output.write(str(Table(("", ""), rows)))


def _environment() -> dict[str, Any]:
    from dllm_convert.common.manifest import versions
    from dllm_convert.common.quantities import bytes_text
    from dllm_convert.common.version import __version__
    from dllm_convert.planning.devices import this_cpu

    cpu = this_cpu()
    return {
        "dllm-convert": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu.name.removeprefix("this CPU, ") + (", bf16" if cpu.bf16 else ", no bf16"),
        "memory": bytes_text(cpu.memory) if cpu.memory else None,
        **_devices(),
        "packages": versions(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "terminal": {
            "stdout": "terminal" if sys.stdout.isatty() else "no terminal",
            "encoding": sys.stdout.encoding,
            "TERM": os.environ.get("TERM", ""),
        },
    }


def _devices() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"torch": f"cannot be imported ({error})"}
    if not torch.cuda.is_available():
        # Where there is none, torch 2.6 raises.
        has_any = torch.accelerator.is_available()
        found = torch.accelerator.current_accelerator() if has_any else None
        return {"gpus": [] if found is None else [found.type], "cuda": None}
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"gpus": names, "cuda": torch.version.cuda}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return ", ".join(value) if isinstance(value, list) else str(value)
