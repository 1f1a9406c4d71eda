"""Rotary frequencies that depend on a text's length: one set per row, fixed for a decoding.

Dynamic NTK and LongRoPE choose the frequencies of a forward by its longest text, and keep what an
earlier forward chose. Keys in a cache would then be turned otherwise than the queries that meet
them, and a row otherwise beside a longer neighbour. Here each row has the frequencies of its own
length: of the text in a forward, of the final text in a decoding.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from .moving import sent

_LENGTHS: ContextVar[torch.Tensor | None] = ContextVar("dllm_final_lengths", default=None)


def _kinds(module: Any) -> dict[str | None, str]:
    """Kind of layer to its rotary type, those whose frequencies depend on the length only."""
    found = getattr(module, "rope_type", None)
    kinds = found if isinstance(found, dict) else {None: found}
    return {
        layer: kind
        for layer, kind in kinds.items()
        if isinstance(kind, str) and ("dynamic" in kind or kind == "longrope")
    }


def _threshold(module: Any, layer: str | None) -> int:
    """Tokens up to which the frequencies are those of any shorter text."""
    config, kind = module.config, _kinds(module)[layer]
    if kind != "longrope":
        return int(config.max_position_embeddings)
    parameters = config.rope_parameters if layer is None else config.rope_parameters[layer]
    return int(parameters["original_max_position_embeddings"])


def _turned_for(module: Any, layer: str | None, length: int) -> Any:
    """Return a rotary module that stands in for another, with the frequencies of a length."""
    kind = _kinds(module)[layer]
    prefix = "" if layer is None else f"{layer}_"
    old = getattr(module, f"{prefix}inv_freq")
    frequencies, _ = ROPE_INIT_FUNCTIONS[kind](
        module.config,
        old.device,
        # As transformers calls it: with a number, the last bits differ.
        seq_len=sent(length, old.device),
        **({} if layer is None else {"layer_type": layer}),
    )
    stand_in = copy.copy(module)
    # As a plain attribute, which is found before the buffer that the copy shares with the module.
    object.__setattr__(stand_in, f"{prefix}inv_freq", frequencies)
    return stand_in


def _rotate(
    module: Any, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **named: Any
) -> Any:
    lengths = _LENGTHS.get()
    layer = args[0] if args else named.get("layer_type")
    rows = position_ids.shape[0]
    if lengths is None or layer not in _kinds(module) or len(lengths) not in (1, rows):
        return type(module).forward(module, x, position_ids, *args, **named)
    forward = inspect.unwrap(type(module).forward)
    limit = _threshold(module, layer)
    kept = lengths.clamp(min=limit)
    if _kinds(module)[layer] == "longrope":
        kept = kept.clamp(max=limit + 1)
    # Which rows have which length: (rows,) on the host, where a decoding has them already.
    kept = kept.expand(rows).cpu()
    parts: tuple[torch.Tensor, ...] | None = None
    with torch.no_grad():
        for length in sorted(set(kept.tolist())):
            at = sent((kept == length).nonzero().squeeze(-1), position_ids.device)
            found = forward(_turned_for(module, layer, length), x, position_ids[at], *args, **named)
            if len(at) == rows:
                return found
            if parts is None:
                parts = tuple(part.new_empty((rows, *part.shape[1:])) for part in found)
            for part, piece in zip(parts, found, strict=True):
                part[at] = piece
    return parts


def depends_on_length(model: Any) -> bool:
    """Whether rotary frequencies depend on the length; from then on each row has its own."""
    known: bool | None = vars(model).get("_length_dependent")
    if known is None:
        found = [module for module in model.modules() if _kinds(module)]
        for module in found:
            module.forward = partial(_rotate, module)
        known = model._length_dependent = bool(found)
    return known


@contextmanager
def final_lengths(model: Any, lengths: Callable[[], torch.Tensor]) -> Iterator[None]:
    """Turn each row of the forwards inside by the frequencies of a length.

    `lengths` returns (rows,) of them, or (1,) for all rows; it is asked only where it matters.
    """
    if not depends_on_length(model):
        yield
        return
    token = _LENGTHS.set(lengths())
    try:
        yield
    finally:
        _LENGTHS.reset(token)


@contextmanager
def own_lengths(model: Any, positions: torch.Tensor) -> Iterator[None]:
    """Turn each row by its own length, from positions (rows, length), unless the final is known."""
    if _LENGTHS.get() is not None or not depends_on_length(model) or not positions.numel():
        yield
        return
    with final_lengths(model, lambda: positions.amax(-1) + 1):
        yield
