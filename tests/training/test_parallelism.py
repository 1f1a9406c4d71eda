"""Accelerate's tensor and context parallelism: what that does to a mask, and that both stop."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.parallelism_config import ParallelismConfig
from conftest import SourceFactory
from test_trainer import converted

from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.loading import load_model
from dllm_convert.training.distributed import check_strategy


def accelerator(**sizes: int) -> Any:
    return SimpleNamespace(
        parallelism_config=ParallelismConfig(**sizes), distributed_type=None, device=None
    )


@pytest.mark.parametrize("sizes", [{"cp_size": 2}, {"tp_size": 4}, {"tp_size": 2, "cp_size": 2}])
def test_sharing_sequences_or_matrices_is_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(IncompatibleError, match=f"{next(iter(sizes))}={sizes[next(iter(sizes))]}"):
        check_strategy(accelerator(**sizes), {})


def test_sharing_weights_within_machines_is_not() -> None:
    check_strategy(accelerator(dp_replicate_size=2, dp_shard_size=8), {})
    check_strategy(SimpleNamespace(parallelism_config=None), {})


def test_accelerates_context_parallelism_makes_a_diffusion_model_causal(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    """The reason, measured: if this fails, Accelerate keeps masks, and docs/scale.md is wrong."""
    from accelerate.big_modeling import _attach_context_parallel_hooks

    plan, _ = converted(source_cache("llama"), tmp_path / "a", method="full")
    model = load_model(tmp_path / "a", plan.adapter, attention="sdpa")
    tokens = torch.arange(10, 26)[None]
    others = tokens.clone()
    others[0, -1] = 5
    mask = torch.ones(1, 1, 16, 16, dtype=torch.bool)

    def first(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = model(input_ids=ids, attention_mask=mask).logits[0, 0]
        return logits

    assert not torch.allclose(first(tokens), first(others))
    _attach_context_parallel_hooks(model)
    assert torch.equal(first(tokens), first(others))
