"""Probe a family in a process of its own, with a time limit; the answer is kept."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dllm_convert.common.json_files import write_json
from dllm_convert.common.version import __version__
from dllm_convert.errors import DllmConvertError, UnsupportedError
from dllm_convert.probing.report import ProbeReport
from dllm_convert.source.info import TensorInfo
from dllm_convert.source.materialise import cache_dir

TIMEOUT_S = 300
_PACKAGES = ("torch", "transformers")


def probe_family(
    config: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo] | None = None,
    *,
    timeout_s: float = TIMEOUT_S,
) -> ProbeReport:
    """Measure on a small random instance whether a family can be converted.

    The same question with the same versions is answered from the cache.

    Args:
        config: config.json of a checkpoint.
        tensors: Its tensors by name; None if they are not known.
        timeout_s: Seconds after which the process is ended.

    Raises:
        UnsupportedError: It did not come to an end.
    """
    stored = {name: [info.dtype, info.shape] for name, info in sorted((tensors or {}).items())}
    request = {"config": dict(config), "tensors": stored}
    path = cache_dir() / "probes" / f"{_key(request)}.json"
    kept = _read(path)
    if kept is not None:
        return kept
    report = ProbeReport.from_dict(_measure(request, timeout_s))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, report.as_dict())
    return report


def _key(request: Mapping[str, Any]) -> str:
    versions = [__version__, *(metadata.version(package) for package in _PACKAGES)]
    text = json.dumps([request, versions], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _read(path: Path) -> ProbeReport | None:
    try:
        return ProbeReport.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, LookupError, TypeError, DllmConvertError):
        # Not there, or half written by somebody who was killed: measured again.
        return None


def _measure(request: Mapping[str, Any], timeout_s: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "dllm_convert.probing"]
    model_type = request["config"].get("model_type")
    try:
        done = subprocess.run(
            command,
            input=json.dumps(request, default=str),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UnsupportedError(
            f"measuring {model_type!r} did not come to an end in {timeout_s:g} s"
        ) from error
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "no message"
        raise UnsupportedError(
            f"measuring {model_type!r} ended with code {done.returncode} ({last})"
        )
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer
