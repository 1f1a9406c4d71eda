"""Who reaches whom: of the whole model, and of every layer alone.

End to end one full layer hides every window behind it. So each layer is measured by itself, inside
the model: one position of its input is changed, and its output is looked at.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from dllm_convert.behaviour.influence import STILL, Pattern, patterns
from dllm_convert.probing.instance import decoder_layers, other, text

STILL_FLOAT64 = 1e-14
"""Share of the largest value below which float64 counts as still: equal rows are equal to the bit
there."""
LAYER_DRAWS = 2
"""Texts that every layer is measured with."""

Allowed = torch.Tensor


def _judge(pattern: Pattern, judged: torch.Tensor | None = None) -> tuple[int, str]:
    """Return how many pairs are wrong and the first of them in words."""
    wrong = pattern.wrong if judged is None else pattern.wrong & judged
    return int(wrong.sum()), pattern.first_wrong(judged)


@torch.no_grad()
def whole(
    model: Any, length: int, allowed: Allowed, judged: torch.Tensor | None = None
) -> tuple[int, str]:
    """Measure the whole model from tokens to logits.

    Args:
        model: A decoder.
        length: Tokens per text.
        allowed: Who may reach whom, shape (length, length), bool.
        judged: Pairs that count; all if None.

    Returns:
        How many pairs are wrong and the first of them in words.
    """
    columns = list(range(length))
    for pattern in patterns(model, partial(text, length), other, columns, allowed):
        result = _judge(pattern, judged)
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
    """Measure every layer by itself; returns by number of a layer as `whole`.

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
            limit = still * float(output[0].abs().max())
            found[number] = _judge(Pattern(moved, allowed, limit, list(range(length))))
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
