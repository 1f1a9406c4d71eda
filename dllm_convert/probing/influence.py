"""Who reaches whom: of the whole model, and of every layer alone.

End to end one full layer hides every window behind it. So each layer is measured by itself, inside
the model: one position of its input is changed, and its output is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dllm_convert.probing.instance import decoder_layers, other, text

STILL = 1e-5
"""Share of the largest value below which float32 counts as still: about 80 roundings."""
STILL_FLOAT64 = 1e-14
"""The same in float64, where equal rows are equal to the bit."""
LAYER_DRAWS = 2
"""Texts that every layer is measured with."""
DRAWS = 3
"""Texts tried until every allowed influence shows: one text may hide a weak one by chance."""

Allowed = torch.Tensor


def compare(
    moved: torch.Tensor,
    allowed: Allowed,
    scale: float,
    still: float,
    judged: torch.Tensor | None = None,
) -> tuple[int, str]:
    """Return how many pairs are wrong and the first of them in words.

    Args:
        moved: How far position i moved when token j was changed, shape (length, length).
        allowed: Where it may, and must.
        scale: The largest value that was looked at.
        still: Share of it below which nothing moved.
        judged: Pairs that count; all if None.
    """
    wrong = ((moved > still * scale) != allowed) | moved.isnan()
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
        result = compare(moved, allowed, scale, STILL, judged)
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
        noise = torch.randn(rows[index + 1, index].shape, generator=generator).to(rows.dtype)
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

    Every text has to show every allowed influence: attention that picks its keys by their content
    shows each of them in one text or another. What float32 hides is looked for in float64.

    Args:
        model: A decoder.
        length: Tokens per text.
        allowed: Who may reach whom in one layer, shape (length, length), bool.
    """
    found = _layers(model, length, allowed, STILL)
    if not any(wrong for wrong, _ in found.values()):
        return found
    try:
        return _layers(model.to(torch.float64), length, allowed, STILL_FLOAT64)
    except RuntimeError:
        # Some part insists on float32.
        return found
    finally:
        model.to(torch.float32)


def _layers(model: Any, length: int, allowed: Allowed, still: float) -> dict[int, tuple[int, str]]:
    found: dict[int, tuple[int, str]] = {}
    for number, layer in enumerate(decoder_layers(model)):
        for draw in range(LAYER_DRAWS):
            output = _disturbed(model, layer, text(length, draw).repeat(length + 1, 1))
            moved = (output[1:] - output[0]).abs().amax(-1).T
            found[number] = compare(moved, allowed, float(output[0].abs().max()), still)
            if found[number][0]:
                break
    return found


def _disturbed(model: Any, layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Return a layer's output, (rows, length, n), with another input at i in row i + 1."""
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
