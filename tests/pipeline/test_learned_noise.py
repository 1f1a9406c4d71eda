"""A noise schedule that is learnt, through a whole conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from tiny_runs import recipe

from dllm_convert.common.console import Reporter
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.pipeline.extension import begin
from dllm_convert.pipeline.run import plan_conversion, run
from dllm_convert.recipe.loading import amend_recipe
from dllm_convert.sampling.run import decode_sample

QUIET = Reporter(quiet=True)
NOISE: dict[str, Any] = {
    "noise.schedule": "learned",
    "noise.classes": 3,
    "noise.exponent_rate": 0.05,
    "generation.sampler": "ancestral",
    "generation.temperature": 1.0,
}


@pytest.mark.parametrize(
    ("family", "target", "method"), [("qwen2", "bd3lm", "lora"), ("bert", "mdlm", "full")]
)
def test_a_conversion_learns_its_schedule_and_says_so(
    family: str, target: str, method: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    out = tmp_path / "out"
    made = amend_recipe(recipe(source_cache(family), target, method=method), NOISE)
    result = run(made, out, QUIET)
    probes = result.manifest["verification"]["probes"]
    assert result.passed, [probe for probe in probes if probe["passed"] is False]
    measured = result.manifest["measurements"]
    before, after = (measured[f"nelbo_{when}"]["nats_per_token"] for when in ("before", "after"))
    assert after < before
    section = json.loads((out / "config.json").read_text())["diffusion"]
    assert len(section["noise_exponents"]) == 3
    assert all(one != 1 for one in section["noise_exponents"])
    card = " ".join((out / "README.md").read_text().split())
    shown = ", ".join(f"{one:.3g}" for one in section["noise_exponents"])
    assert f"from the frequent to the rare with w = {shown}; alpha(t) = 1 - t^w" in card
    assert "whose exponents are learnt with it (REINFORCE leave-one-out)" in card
    # By default it draws by those classes, step by step or a token each.
    loaded = load_checkpoint(out)
    torch.manual_seed(0)
    for more in ({}, {"max_denoising_steps": 3}):
        said = decode_sample(loaded.model, loaded.tokenizer, "A name", seed=1, **more)
        assert 1 <= said.new_tokens <= 16
    # It can be trained further, which leaves no other field of its config to chance.
    assert len(begin(plan_conversion(made, out), out)["history"]) == 1
    other = amend_recipe(made, {"noise.schedule": "cosine", "noise.classes": None,
                                "noise.exponent_rate": None})  # fmt: skip
    with pytest.raises(IncompatibleError, match="holds another conversion"):
        begin(plan_conversion(other, out), out)
