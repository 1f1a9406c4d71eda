"""Accelerate's tensor and context parallelism: what that does to a mask, and that both stop."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from conftest import SourceFactory
from test_trainer import converted
from torch.nn.parallel import DistributedDataParallel

from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.loading import load_model
from dllm_convert.training.distributed import check_strategy, part


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


def test_who_leaves_a_group_is_not_the_last_to_hold_it(tmp_path: Path) -> None:
    """DDP's reducer holds the group in C++; freed by the collector it waited for its threads."""
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    wrapped = DistributedDataParallel(torch.nn.Linear(2, 2))
    wrapped(torch.ones(1, 2)).sum().backward()
    reducer = weakref.ref(wrapped.reducer)
    part(wrapped)
    assert reducer() is None
    assert not dist.is_initialized()
