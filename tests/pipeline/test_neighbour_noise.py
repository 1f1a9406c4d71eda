"""Noise that walks among near words, through a whole conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SourceFactory
from safetensors.torch import load_file
from tiny_runs import recipe

from dllm_convert.common.console import Reporter
from dllm_convert.common.copying import sha256_file
from dllm_convert.common.diffusion_section import NEIGHBOURS_FILE
from dllm_convert.diffusion.objective import Objective
from dllm_convert.errors import DataError
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.pipeline.run import run
from dllm_convert.recipe.loading import amend_recipe
from dllm_convert.recipe.schema import Recipe

QUIET = Reporter(quiet=True)
NOISE = {
    "noise.kernel": "neighbours",
    "noise.neighbours": 4,
    "noise.jumps": 2.0,
    "noise.discrete_steps": 8,
    "noise.schedule": "cosine",
}


def walking(source: Path, target: str, **training: Any) -> Recipe:
    return amend_recipe(recipe(source, target, **training), NOISE)


@pytest.mark.parametrize(
    ("family", "target", "method"),
    [("qwen2", "bd3lm", "lora"), ("bert", "mdlm", "full")],
)
def test_a_conversion_walks_and_says_so(
    family: str, target: str, method: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    source, out = source_cache(family), tmp_path / "out"
    result = run(walking(source, target, method=method), out, QUIET)
    probes = result.manifest["verification"]["probes"]
    assert result.passed, [probe for probe in probes if probe["passed"] is False]
    measured = result.manifest["measurements"]
    before, after = (measured[f"nelbo_{when}"]["nats_per_token"] for when in ("before", "after"))
    assert after < before
    # The graph is of the source's embedding, and its fingerprint is in the manifest.
    near = np.load(out / NEIGHBOURS_FILE)
    mask = json.loads((out / "config.json").read_text())["mask_token_id"]
    base = load_file(source / "model.safetensors")
    ends = "embed_tokens.weight", "word_embeddings.weight"
    name = next(name for name in base if name.endswith(ends))
    unit = torch.nn.functional.normalize(base[name].float(), dim=-1)
    word = 7
    alike = unit @ unit[word]
    alike[[word, mask] if mask < len(alike) else [word]] = -2
    assert int(near[word, 0]) == int(alike.argmax())
    assert near.shape[1] == 4
    files = result.manifest["files"]
    assert files[NEIGHBOURS_FILE] == sha256_file(out / NEIGHBOURS_FILE)
    card = (out / "README.md").read_text()
    assert "4 nearest neighbours, 2 jumps until t = 1" in card
    assert "discrete-time bound of the neighbours kernel" in card
    # It decodes, and its bound is measured from the folder alone.
    loaded = load_checkpoint(out)
    walk = Objective.from_config(loaded.model.config).walk
    assert walk is not None
    assert walk.jumps == 2.0
    (out / NEIGHBOURS_FILE).unlink()
    with pytest.raises(DataError, match=f"has no {NEIGHBOURS_FILE}"):
        Objective.from_config(loaded.model.config)
