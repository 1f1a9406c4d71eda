"""Host memory of processes that share a model, measured on one of 160 MB."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import sharded
from dllm_convert.source.safetensors_header import read_header

pytestmark = pytest.mark.slow


def test_two_processes_take_their_share_and_no_more(tmp_path: Path) -> None:
    sharded.run_apart(tmp_path, "prepare", "--gib", "0.15")
    entries = read_header(tmp_path / "untrained/model.safetensors").entries.values()
    sizes = [entry.end - entry.start for entry in entries]
    allowed = sharded.limits(tmp_path, 2)
    first, other = sharded.measure(tmp_path, 2)
    for found in (first, other):
        assert all(found[part] <= allowed[part] for part in sharded.HELD), (found, allowed)
        # Whoever loads the whole model is above this.
        assert found["loading"] < 0.75 * sum(sizes)
    # To write, the first process puts one tensor together, and the other none.
    assert (
        first["writing"]
        < first["saving"] + 2 * max(sizes) + (32 << 20)
        < first["saving"] + sum(sizes)
    )
    assert other["writing"] < other["saving"] + (16 << 20)
    assert (tmp_path / "out/model.safetensors").stat().st_size > sum(sizes)
