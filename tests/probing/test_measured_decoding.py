"""Measured families decode ragged batches: rows at different blocks, and rows that leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dllm_convert.common.console import Reporter
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.pipeline.options import Depth, RunOptions
from dllm_convert.pipeline.run import run
from dllm_convert.recipe.schema import Recipe


@pytest.mark.parametrize("model_type", ["mixtral", "gemma2"])
def test_rows_are_what_they_are_alone(
    generic_source: Callable[[str], Path], tmp_path: Path, model_type: str
) -> None:
    recipe = {
        **{"source": str(generic_source(model_type)), "target": "bd3lm", "block_size": 8},
        **{"allow_generic": True, "training": {"method": "none"}},
        "data": {"sequence_length": 32},
    }
    out = tmp_path / "out"
    run(
        Recipe.model_validate(recipe), out, Reporter(quiet=True), how=RunOptions(verify=Depth.FILES)
    )
    model = load_checkpoint(out).model
    settings = {"max_new_tokens": 8, "max_denoising_steps": 2, "eos_token_id": []}
    generator = torch.Generator().manual_seed(1)
    for width in (10, 16, *(20,) * 8):
        ids = torch.randint(3, 300, (2, width), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, : width // 2] = 0
        both = model.generate(ids, attention_mask=mask, **settings)
        for row, text in enumerate(ids):
            alone = model.generate(text[mask[row].bool()][None], **settings)
            assert torch.equal(alone[0, -8:], both[row, -8:]), (width, row)
