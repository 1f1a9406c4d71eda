"""Attention in training on a CPU, tile by tile: only pairs that somebody sees are computed.

The two-stream mask of block diffusion leaves two thirds of the pairs shut, and torch's kernel for
CPUs computes all of them; flex attention, which skips them, has no backward there. Scores are kept
in float32 and computed again in the backward pass from the logarithm of each softmax's sum
(FlashAttention, arXiv 2205.14135; tiles without an open pair are left out as in its section 3.3).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

TILED = "dllm_tiles"
"""Name of this attention in transformers; its masks are those of sdpa."""
_LOG2_E = math.log2(math.e)
# Powers of two take a third of the time of powers of e, and no more where they underflow.

SIZE = 32
"""Queries and keys of a tile: the scores of all heads stay in a core's cache between their uses."""


@dataclass(frozen=True)
class Tile:
    """Queries that are computed together.

    Attributes:
        start: First query.
        end: Query behind the last.
        keys: Ranges of keys that one of them sees, in any row or head.
        is_open: Whether each of them sees all of these keys.
    """

    start: int
    end: int
    keys: tuple[tuple[int, int], ...]
    is_open: bool

    def pick(self, values: torch.Tensor, dim: int) -> torch.Tensor:
        """The tile's keys of `values`."""
        parts = [values.narrow(dim, start, end - start) for start, end in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def add(self, part: torch.Tensor, to: torch.Tensor) -> None:
        """Add what was computed for the tile's keys, (batch * heads, n, width), to all keys'."""
        part, first = torch.unflatten(part, 0, to.shape[:2]), 0
        for start, end in self.keys:
            to[:, :, start:end] += part[:, :, first : first + end - start]
            first += end - start

    def put(self, part: torch.Tensor, to: torch.Tensor) -> None:
        """Write what was computed for the tile's queries, (batch * kv heads, n, width), to `to`.

        That has the shape (batch, queries, heads, width).
        """
        batch, _, heads, width = to.shape
        to[:, self.start : self.end] = part.view(batch, heads, -1, width).transpose(1, 2)


def tiles(mask: torch.Tensor | None, queries: int, keys: int, size: int = SIZE) -> list[Tile]:
    """Cut attention into tiles and leave out those that nobody sees into.

    Args:
        mask: True where a query may look, shape (batch or 1, heads or 1, queries, keys), bool; None
            if everybody sees everybody.
        queries: Number of queries.
        keys: Number of keys.
        size: Queries, and keys, of a tile.
    """
    starts = range(0, queries, size)
    if mask is None:
        return [Tile(at, min(at + size, queries), ((0, keys),), True) for at in starts]
    # What pads the last tiles is seen by nobody, and does not make one of them less open.
    pad = (0, -keys % size, 0, -queries % size)
    shape = (len(starts), size, -1, size)
    # (query tiles, size, key tiles, size): who sees whom in some row or head, and in every one.
    some = torch.nn.functional.pad(mask.any(1).any(0), pad, value=False).view(shape)
    every = torch.nn.functional.pad(mask.all(1).all(0), pad, value=True).view(shape)
    # (query tiles, key tiles): a tile is computed if one pair is open, unmasked if all are.
    seen, whole = some.any(3).any(1), every.all(3).all(1)
    found = []
    for at, row, is_open in zip(
        starts, seen.tolist(), (whole | ~seen).all(1).tolist(), strict=True
    ):
        ranges = tuple(_ranges(row, size, keys)) or ((0, keys),)
        found.append(Tile(at, min(at + size, queries), ranges, is_open and any(row)))
    return found


def _ranges(row: list[bool], size: int, keys: int) -> Iterator[tuple[int, int]]:
    start = None
    for number, wanted in enumerate([*row, False]):
        if wanted and start is None:
            start = number * size
        elif not wanted and start is not None:
            yield start, min(number * size, keys)
            start = None


def _wide(values: torch.Tensor) -> torch.Tensor:
    # float64 stays what it is, for checks of gradients.
    return values if values.dtype == torch.float64 else values.float()


def _grouped(values: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """Heads by the key and value head that they read: (batch, kv heads, groups, ...)."""
    return torch.unflatten(values, 1, (kv_heads, -1))


def _flat(grouped: torch.Tensor, tile: Tile) -> torch.Tensor:
    """A tile's queries of (batch, kv heads, groups, queries, width), as (batch * kv, n, width)."""
    return grouped[:, :, :, tile.start : tile.end].flatten(2, 3).flatten(0, 1)


def _scores(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, tile: Tile, kv_heads: int
) -> torch.Tensor:
    # (batch * kv heads, groups * n, keys): heads that share keys are more queries of one product.
    scores = torch.bmm(query, key.transpose(1, 2))
    if mask is not None and not tile.is_open:
        seen = tile.pick(mask[:, :, tile.start : tile.end], 3)
        # Added, since that takes a seventh of the time of a masked_fill that broadcasts.
        shut = scores.new_zeros(seen.shape).masked_fill_(~seen, -torch.inf)
        # Heads of the mask, if it has any, are kv heads times groups.
        shut = _grouped(shut, kv_heads) if shut.shape[1] > 1 else shut[:, :, None]
        count = tile.end - tile.start
        scores.view(-1, kv_heads, scores.shape[1] // count, count, scores.shape[2]).add_(shut)
    return scores


@torch.library.custom_op("dllm_convert::tiled_attention", mutates_args=())
def tiled_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the tiles that somebody sees.

    Args:
        query: Shape (batch, heads, queries, width).
        key: Shape (batch, kv heads, keys, width); heads are a multiple of kv heads.
        value: Shape (batch, kv heads, keys, width).
        mask: Shape (batch or 1, heads or 1, queries, keys), bool, True where a query may look; None
            if everywhere. A query that sees nothing gets zeros.
        scale: What scores are multiplied with.

    Returns:
        Shape (batch, queries, heads, width), of the type of `value`, and the logarithm to base 2
        of each softmax's sum, shape (batch, kv heads, groups, queries).
    """
    kv_heads = key.shape[1]
    # (batch, kv heads, groups, queries, width), scaled once so that exp2 of a score is its weight.
    grouped = _grouped(_wide(query) * (scale * _LOG2_E), kv_heads)
    wide_key, wide_value = _wide(key), _wide(value)
    sums = grouped.new_empty(grouped.shape[:-1])
    result = value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    with torch.autocast(query.device.type, enabled=False):
        for tile in tiles(mask, query.shape[2], key.shape[2]):
            keys, values = (tile.pick(x, 2).flatten(0, 1) for x in (wide_key, wide_value))
            scores = _scores(_flat(grouped, tile), keys, mask, tile, kv_heads)
            # Clamped: a query that sees nothing has -inf everywhere, and -inf - -inf is no number.
            highest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
            weights = scores.sub_(highest).exp2_()
            total = weights.sum(-1, keepdim=True)
            tile.put(torch.bmm(weights, values).div_(total.clamp(min=1e-30)), result)
            # All that the backward pass needs of a softmax: log2 of its sum.
            part = sums[..., tile.start : tile.end]
            part.copy_(total.log2_().add_(highest).view(part.shape))
    return result, sums


@torch.library.custom_op("dllm_convert::tiled_attention_backward", mutates_args=())
def tiled_attention_backward(
    gradient: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    result: torch.Tensor,
    sums: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of `tiled_attention` for query, key and value, of their shapes and types.

    Args:
        gradient: Of the result, shape (batch, queries, heads, width).
        query: As in `tiled_attention`.
        key: The same.
        value: The same.
        mask: The same.
        result: What it returned.
        sums: What it returned.
        scale: As given to it.
    """
    kv_heads = key.shape[1]
    grouped = _grouped(_wide(query) * (scale * _LOG2_E), kv_heads)
    wide_key, wide_value = _wide(key), _wide(value)
    outward, made = (_wide(x).transpose(1, 2) for x in (gradient, result))
    # d softmax: weights * (dP - sum(dO * O)); the sum is one number per query, (..., queries, 1).
    inner = _grouped((outward * made).sum(-1, keepdim=True), kv_heads)
    outward = _grouped(outward, kv_heads)
    # A query that sees nothing has no softmax: any finite number keeps its weights at zero.
    logarithms = sums.nan_to_num(neginf=0.0).unsqueeze(-1)
    for_query = query.new_empty(query.shape[0], query.shape[2], query.shape[1], query.shape[3])
    for_key, for_value = torch.zeros_like(wide_key), torch.zeros_like(wide_value)
    with torch.autocast(query.device.type, enabled=False):
        for tile in tiles(mask, query.shape[2], key.shape[2]):
            keys, values = (tile.pick(x, 2).flatten(0, 1) for x in (wide_key, wide_value))
            queries, out = _flat(grouped, tile), _flat(outward, tile)
            scores = _scores(queries, keys, mask, tile, kv_heads)
            # The same weights as in the forward pass, already divided by their sum.
            weights = scores.sub_(_flat(logarithms, tile)).exp2_()
            # dV = P^T dO, dS = P * (dO V^T - inner), dK = dS^T Q, dQ = dS K.
            tile.add(torch.bmm(weights.transpose(1, 2), out), for_value)
            back = torch.bmm(out, values.transpose(1, 2)).sub_(_flat(inner, tile)).mul_(weights)
            tile.add(torch.bmm(back.transpose(1, 2), queries), for_key)
            tile.put(torch.bmm(back, keys).mul_(scale), for_query)
    # Queries were scaled by scale * log2(e); the gradient of a key wants scale alone.
    for_key.div_(_LOG2_E)
    return for_query.transpose(1, 2), for_key.to(key.dtype), for_value.to(value.dtype)


@tiled_attention.register_fake
def _(query: Any, key: Any, value: Any, mask: Any, scale: float) -> Any:
    batch, heads, length, _ = query.shape
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    sums = query.new_empty(batch, key.shape[1], heads // key.shape[1], length, dtype=wide)
    return value.new_empty(batch, length, heads, value.shape[3]), sums


@tiled_attention_backward.register_fake
def _(gradient: Any, query: Any, key: Any, value: Any, *others: Any) -> Any:
    batch, heads, length, width = query.shape
    for_query = query.new_empty(batch, length, heads, width).transpose(1, 2)
    return for_query, torch.empty_like(key), torch.empty_like(value)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    query, key, value, mask, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
    query, key, value, mask, result, sums = ctx.saved_tensors
    found = tiled_attention_backward(gradient, query, key, value, mask, result, sums, ctx.scale)
    return *found, None, None


tiled_attention.register_autograd(_backward, setup_context=_remember)


def tiled_attention_forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers' layers call it; what tiles do not compute goes to sdpa.

    Args:
        module: The attention layer.
        query: Shape (batch, heads, queries, width).
        key: Shape (batch, kv heads, keys, width).
        value: The same.
        attention_mask: Shape (batch, 1, queries, keys), bool; None if nothing is shut but what
            causality shuts.
        dropout: Share of the weights that is dropped.
        scaling: What scores are multiplied with.
        is_causal: Whether a query sees what stands before it only, where there is no mask.
        **kwargs: What else the layer says.

    Returns:
        Shape (batch, queries, heads, width), and no weights.
    """
    is_plain = attention_mask is not None and attention_mask.dtype == torch.bool
    known = all(kwargs.get(name) is None for name in ("position_bias", "cache", "softcap", "s_aux"))
    if dropout or not is_plain or not known:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask,
            dropout=dropout, scaling=scaling, is_causal=is_causal, **kwargs,
        )  # fmt: skip
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return tiled_attention(query, key, value, attention_mask, scale)[0], None


def register_tiles() -> str:
    """Make the implementation known to transformers, and return its name there."""
    AttentionInterface.register(TILED, tiled_attention_forward)
    AttentionMaskInterface.register(TILED, sdpa_mask)
    return TILED
