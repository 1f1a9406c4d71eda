"""What `generate` is given, as a tokenizer returns it."""

from __future__ import annotations

from typing import Any

import torch

from .ends import read_ids
from .moving import sent


def given_prompts(
    inputs: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return prompts (batch, length) and where they have tokens, 1 or 0, of the same shape."""
    if inputs is not None and input_ids is not None:
        raise ValueError("inputs and input_ids are the same: give one of them")
    prompts = input_ids if inputs is None else inputs
    if prompts is None:
        raise ValueError("give input_ids: a prompt of at least one token")
    if not isinstance(prompts, torch.Tensor) or prompts.dim() != 2 or prompts.is_floating_point():
        shape = tuple(getattr(prompts, "shape", ())) or type(prompts).__name__
        raise ValueError(f"input_ids is {shape}, expected token ids of shape (batch, length)")
    mask = torch.ones_like(prompts) if attention_mask is None else attention_mask.long()
    for name, other in (("attention_mask", mask), ("token_type_ids", token_type_ids)):
        if other is not None and other.shape != prompts.shape:
            raise ValueError(
                f"{name} has shape {tuple(other.shape)}, input_ids {tuple(prompts.shape)}"
            )
    if token_type_ids is not None and bool((token_type_ids * mask).any()):
        raise ValueError(
            "token_type_ids names a second text; a prompt is one, with 0 at every token"
        )
    return prompts, mask


def left_open(prompts: torch.Tensor, mask: torch.Tensor, closing: Any) -> torch.Tensor:
    """Return the mask (batch, length) without the `closing` ids behind the text of each prompt.

    A prompt of nothing else is left as it is.
    """
    ids = read_ids(closing, "closing_token_ids")
    count = len(ids)
    if not count or prompts.shape[1] <= count:
        return mask
    order = mask.argsort(dim=-1, descending=True, stable=True)
    lengths = mask.sum(-1, keepdim=True)
    places = (lengths - count + torch.arange(count, device=mask.device)).clamp(min=0)
    columns = order.gather(1, places)
    expected = sent(ids, prompts.device)
    closed = (prompts.gather(1, columns) == expected).all(-1, keepdim=True) & (lengths > count)
    return torch.where(closed, mask.scatter(1, columns, 0), mask)
