"""Which activations are kept for the backward pass, and which are computed again."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from dllm_convert.modeling.published.behind import stands_behind_cache
from dllm_convert.recipe.schema import Checkpointing
from dllm_convert.training.gated import gated_again, may_checkpoint

_KEPT = frozenset(
    {
        "mm",
        "addmm",
        "bmm",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_attention_math",
        "flex_attention",
        "tiled_attention",
        "gated_linear",
    }
)
"""Operations whose results cost more to compute than to keep."""


def _keep(context: Any, operation: Any, *inputs: Any, **options: Any) -> CheckpointPolicy:
    # "aten::mm.default"; operators of higher order, such as flex attention, have no namespace.
    name = operation.name().rpartition("::")[2].partition(".")[0]
    # Autocast's copies of the weights: one per layer, not one per token.
    cast_weight = name == "_to_copy" and isinstance(inputs[0], torch.nn.Parameter)
    if name in _KEPT or cast_weight:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def _nothing_kept() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), nullcontext()


def checkpoint_activations(model: Any, how: Checkpointing) -> None:
    """Make a model keep less for the backward pass; its results and gradients stay the same.

    `selective` keeps what matrix products and attention return, and computes norms, activations and
    rotations again (Korthikanti et al., arXiv 2205.05198, section 5). `full` keeps one tensor per
    layer and computes the layer again (Chen et al., arXiv 1604.06174).
    A gated model keeps all with a transformers whose layers are not computed again beside a cache,
    and where its rows add to one.

    Args:
        model: A transformers model.
        how: off, selective or full; auto, where no plan has chosen, is selective.
    """
    if how == "off":
        return
    if stands_behind_cache(model.config) or (model.is_gated and not may_checkpoint(model)):
        return
    contexts: Contexts = _nothing_kept
    if how != "full":
        contexts = partial(create_selective_checkpoint_contexts, _keep)
    settings: dict[str, Any] = {"use_reentrant": False, "context_fn": contexts}
    if model.is_gated:
        settings["context_fn"] = lambda: gated_again(model, contexts())
    # The older name until transformers 5.2, the newer one since.
    newer = getattr(model, "activation_checkpointing_enable", None)
    (newer or model.gradient_checkpointing_enable)(settings)
