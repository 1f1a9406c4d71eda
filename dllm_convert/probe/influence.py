"""Who reaches whom: of the whole model, and of every layer alone.

End to end one full layer hides every window behind it. So each layer is measured by itself, inside
the model: one position of its input is changed, and its output is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dllm_convert.probe.instance import decoder_layers, other, text

STILL = 1e-5
"""Share of the largest value below which float32 counts as still: about 80 roundings."""
DRAWS = 3
"""Texts tried until every allowed influence shows: one text may hide a weak one by chance."""

Allowed = torch.Tensor


def compare(
    moved: torch.Tensor, allowed: Allowed, scale: float, judged: torch.Tensor | None = None
) -> tuple[int, str]:
    """Return how many pairs are wrong and the first of them in words.

    Args:
        moved: How far position i moved when token j was changed, shape (length, length).
        allowed: Where it may, and must.
        scale: The largest value that was looked at.
        judged: Pairs that count; all if None.
    """
    wrong = ((moved > STILL * scale) != allowed) | moved.isnan()
    if judged is not None:
        wrong &= judged
    if not wrong.any():
        return 0, ""
    position, token = (int(value) for value in wrong.nonzero()[0])
    verb = "does not see" if allowed[position, token] else "sees"
    return int(wrong.sum()), f"position {position} {verb} token {token}"


@torch.no_grad()
def whole(
    model: Any, length: int, allowed: Allowed, judged: torch.Tensor | None = None
) -> tuple[int, str]:
    """Measure the whole model from tokens to logits; returns as `compare`.

    Args:
        model: A decoder.
        length: Tokens per text.
        allowed: Who may reach whom, shape (length, length), bool.
        judged: Pairs that count; all if None.
    """
    moved, scale = torch.zeros(length, length), 0.0
    result = (allowed.numel(), "")
    for draw in range(DRAWS):
        tokens = text(length, draw)
        rows = tokens.repeat(length + 1, 1)
        index = torch.arange(length)
        rows[index + 1, index] = other(tokens)
        logits = model(rows, use_cache=False).logits
        moved = torch.maximum(moved, (logits[1:] - logits[0]).abs().amax(-1).T)
        scale = max(scale, float(logits[0].abs().max()))
        result = compare(moved, allowed, scale, judged)
        if not result[0]:
            break
    return result


class _Disturbance:
    """Changes one position per row of a layer's input and keeps the layer's output."""

    def __init__(self, length: int) -> None:
        self._length = length
        self.output: torch.Tensor | None = None

    def before(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        positional = bool(args)
        hidden = (args[0] if positional else kwargs["hidden_states"]).clone()
        rows, index = self._by_row(hidden), torch.arange(self._length)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(rows[index + 1, index].shape, generator=generator)
        rows[index + 1, index] += noise * rows.std()
        if positional:
            return (hidden, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden}

    def after(self, _: Any, __: Any, output: Any) -> None:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        self.output = self._by_row(hidden).flatten(2)

    def _by_row(self, hidden: torch.Tensor) -> torch.Tensor:
        """View hidden states as (rows, length, ...); some models hold several streams in front."""
        shape = (self._length + 1, self._length)
        for first in range(hidden.dim() - 1):
            if tuple(hidden.shape[first : first + 2]) == shape:
                return hidden.movedim((first, first + 1), (0, 1))
        raise ValueError(f"a layer works on a tensor of shape {tuple(hidden.shape)}")


@torch.no_grad()
def by_layer(model: Any, length: int, allowed: Allowed) -> Mapping[int, tuple[int, str]]:
    """Measure every layer by itself; returns number of a layer to what `compare` says.

    Args:
        model: A decoder.
        length: Tokens per text.
        allowed: Who may reach whom in one layer, shape (length, length), bool.
    """
    found: dict[int, tuple[int, str]] = {}
    for number, layer in enumerate(decoder_layers(model)):
        moved, scale = torch.zeros(length, length), 0.0
        for draw in range(DRAWS):
            output = _disturbed(model, layer, text(length, draw).repeat(length + 1, 1))
            moved = torch.maximum(moved, (output[1:] - output[0]).abs().amax(-1).T)
            scale = max(scale, float(output[0].abs().max()))
            found[number] = compare(moved, allowed, scale)
            if not found[number][0]:
                break
    return found


def _disturbed(model: Any, layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Return a layer's output where row i + 1 has another input at position i; (rows, length, n)."""
    disturbance = _Disturbance(rows.shape[1])
    handles = (
        layer.register_forward_pre_hook(disturbance.before, with_kwargs=True),
        layer.register_forward_hook(disturbance.after),
    )
    try:
        model(rows, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    if disturbance.output is None:
        raise ValueError("a layer was not called")
    return disturbance.output
