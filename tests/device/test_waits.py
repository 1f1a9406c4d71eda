"""How often the host waits for a device, and what it launches: seen on a pretend one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from packaging.version import Version

from benchmarks import pretend

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        Version(torch.__version__) < Version(pretend.MIN_TORCH),
        reason=f"a device can be written in Python since torch {pretend.MIN_TORCH}",
    ),
]
ROOT = Path(__file__).parents[2]
Walk = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def walk() -> Walk:
    """Return a function that runs a group of `benchmarks.walk`, once, in a process of its own."""
    found: dict[str, dict[str, Any]] = {}

    def get(group: str) -> dict[str, Any]:
        if group not in found:
            done = forks.run(
                [sys.executable, "-m", "benchmarks.walk", group],
                env=os.environ | {"PYTHONPATH": str(ROOT)},
                cwd=ROOT,
                timeout=600,
            )
            assert done.returncode == 0, done.stderr[-3000:]
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            found[group] = {line["name"]: line for line in lines}
        return found[group]

    return get


IN_PEFT = "trainable_tokens/layer.py"
"""PEFT makes a tensor of the trained rows' numbers out of a list, in every forward."""


def test_a_training_step_waits_for_nothing(walk: Walk) -> None:
    steps = walk("train")
    waited = {name: step["waited"] for name, step in steps.items() if step["waits"]}
    assert list(waited) == ["qwen2 bd3lm: lora, mask row"]
    (line,) = waited["qwen2 bd3lm: lora, mask row"]
    assert IN_PEFT in line
    assert steps["qwen2 bd3lm: lora, mask row"]["waits"] == 1
    assert len(steps) == 12


def test_whether_processes_agree_is_asked_without_a_wait(walk: Walk) -> None:
    calls = [line for name, line in walk("measure").items() if name.startswith("Consensus.any")]
    assert [call["waits"] for call in calls] == [0, 0, 0]
    assert len({call["kernels"] for call in calls}) == 1


def test_a_measurement_waits_for_its_result_only(walk: Walk) -> None:
    lines = walk("measure")
    for target in ("bd3lm", "mdlm"):
        for name in ("nelbo", "nats_at_rate", "score_round"):
            assert lines[f"{target}: {name}"]["waits"] == 1
        # Of each token how likely it was, and whether it was the likeliest.
        assert lines[f"{target}: autoregressive_nll"]["waits"] == 2
        assert lines[f"{target}: decode_samples"]["waits"] < 1
    assert lines["bd3lm: autoregressive_nll of the base"]["waits"] == 2


def test_decoding_on_a_device_writes_what_a_cpu_writes(walk: Walk) -> None:
    assert all(line["same"] in (True, None) for line in walk("decode").values())


FORESEEABLE = "greedy", "steps", "temperature", "random order", "guidance", "windows, 4 rows"


def test_decoding_waits_where_a_block_may_be_written(walk: Walk) -> None:
    for name, line in walk("decode").items():
        if "approximate cache" in name:
            continue
        assert line["once"] <= 8, name
        if any(part in name for part in FORESEEABLE):
            assert line["waits"] == 0, (name, line["waited"])
            assert line["once"] <= 3, name
        else:
            assert line["waits"] < 0.5, (name, line["waited"])


@pytest.mark.parametrize(
    ("name", "most"),
    [
        # Nine of a step, three that see where a text ends, the head's, and 15 of a new block, which
        # has 8 tokens here.
        ("bd3lm: greedy", 15),
        ("bd3lm: greedy, 4 rows", 15),
        ("bd3lm: steps, 4 rows", 25),
        ("bd3lm: threshold, 4 rows", 18),
        ("bd3lm: temperature and seed", 17),
        ("bd3lm: temperature and seed, 4 rows", 20),
        ("bd3lm: guidance, 4 rows", 24),
        ("bd3lm: remasking, 4 rows", 45),
        ("mdlm: greedy", 19.5),
        ("mdlm: windows, 4 rows", 17.5),
    ],
)
def test_a_forward_of_decoding_launches_little_beside_the_model(
    name: str, most: float, walk: Walk
) -> None:
    assert walk("decode")[name]["kernels"] <= most
