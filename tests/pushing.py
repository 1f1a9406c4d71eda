"""Checkpoints to publish, and the real command run against a loopback Hub."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forks
from conversion import convert
from hub_server import LoopbackHub

from dllm_convert.card.readme import write_card
from dllm_convert.common.manifest import MANIFEST_FILE, hash_files, versions, write_manifest
from dllm_convert.planning.conversion import plan_as_dict, source_facts

TOKEN = "hf_abcdefghijklmnopqrstuvwx"

PROBES = [
    {"name": "config", "passed": True, "measured": "0", "required": "0", "detail": ""},
    {"name": "portable", "passed": True, "measured": "0", "required": "0", "detail": ""},
]


def checkpoint(base: Path, folder: Path, target: str = "bd3lm", **changes: Any) -> Path:
    """Write a converted, documented checkpoint with a manifest as `run` writes it."""
    plan = convert(base, folder, target)
    manifest = {
        "format_version": 1,
        "created": "2026-11-23T22:30:00+00:00",
        "dllm_convert": "0.1.0",
        "versions": versions(),
        "source": source_facts(plan) | {"license": "apache-2.0"},
        "recipe": plan.recipe.model_dump(mode="json"),
        "plan": plan_as_dict(plan),
        "stages": [],
        "measurements": {},
        "sample": None,
        "verification": {"passed": True, "probes": PROBES, "seconds": 1.0},
        "files": hash_files(folder, exclude=(MANIFEST_FILE, "README.md")),
    }
    write_manifest(folder, json.loads(json.dumps(manifest | changes)))
    write_card(folder)
    return folder


@dataclass(frozen=True)
class Done:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> Any:
        return json.loads(self.stdout)


def command(
    hub: LoopbackHub, home: Path, *arguments: str, token: str | None = TOKEN, **env: str
) -> Done:
    """Run `dllm-convert` in a process of its own, forked where many are alike."""
    line = [sys.executable, "-m", "dllm_convert", *arguments]
    environment = hub.environment(home, token) | {"OMP_NUM_THREADS": "1"} | env
    if hub.mode == "lfs" and "HF_HUB_OFFLINE" not in env:
        hurry = ("faults:plant", {"hurry": True})
        done = forks.run(line, env=environment, before=[hurry], timeout=300)
    else:
        done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=300)
    return Done(done.returncode, done.stdout, done.stderr)
