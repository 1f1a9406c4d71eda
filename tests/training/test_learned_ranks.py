"""Noise that is learnt, or that walks: two processes train what one does, also in shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from test_scale import assert_same, command, finish, sharding, start

pytestmark = pytest.mark.slow
NOISES = {
    "learned": ("noise.schedule=learned", "noise.classes=3", "noise.exponent_rate=0.05"),
    "walks": (
        *("noise.kernel=neighbours", "noise.neighbours=4", "noise.jumps=2"),
        "noise.discrete_steps=8",
    ),
}


def asked(source: Path, out: Path, noise: str, *more: str, batch: int) -> list[str]:
    line = [part.replace("draw=count", "draw=time") for part in command(source, out, batch=batch)]
    sets = [part for one in NOISES[noise] for part in ("--set", one)]
    return [*line, *more, "--set", "noise.complementary=false", *sets]


def exponents(out: Path) -> list[float]:
    found: list[float] = json.loads((out / "config.json").read_text())["diffusion"].get(
        "noise_exponents", []
    )
    return found


@pytest.mark.parametrize(("noise", "strategy"), [("learned", "fsdp2"), ("walks", "fsdp2")])
def test_two_processes_train_what_one_does(
    noise: str, strategy: str, source_cache: SourceFactory, tmp_path: Path
) -> None:
    source, one, two = source_cache("llama", tied=True), tmp_path / "one", tmp_path / "two"
    finish(start(asked(source, one, noise, batch=4)))
    config, how = sharding(tmp_path) if strategy == "fsdp2" else ([], {})
    settings: dict[str, Any] = how
    finish(start(asked(source, two, noise, "--num-processes", "2", *config, batch=2), **settings))
    assert_same(one, two)
    assert exponents(two) == pytest.approx(exponents(one), rel=1e-4)
    assert noise != "learned" or all(value != 1 for value in exponents(one))
