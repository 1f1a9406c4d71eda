"""How engines of Nemotron-Labs-Diffusion write, with our forwards: what their text is held against.

Blocks are counted from the end of the prompt, not from its beginning: behind a strictly causal
context with rotary positions that changes nothing. The first token of each block is the next token
after what is written; the others are denoised, in their own positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def write_causal(
    model: Any, prompt: Sequence[int], new: int, block: int, threshold: float
) -> list[int]:
    """Write behind a prompt.

    Args:
        model: A conversion with a causal context and without token shift.
        prompt: Ids.
        new: Tokens to write.
        block: Tokens per block.
        threshold: Positions at least this sure are written together, one at the least.

    Returns:
        `new` tokens.
    """
    mask, text = model.config.mask_token_id, list(prompt)
    while (left := len(prompt) + new - len(text)) > 0:
        clean, size = len(text), min(block, left)
        (following,) = _logits(model, text, clean, [clean - 1])
        text += [int(following.argmax()), *[mask] * (size - 1)]
        while masked := [at for at in range(clean, len(text)) if text[at] == mask]:
            sure, token = _logits(model, text, clean, masked).softmax(-1).max(-1)  # (masked,) each
            best = int(sure.argmax())
            for number, at in enumerate(masked):
                if number == best or sure[number] >= threshold:
                    text[at] = int(token[number])
    return text[len(prompt) :]


def _logits(model: Any, text: Sequence[int], clean: int, at: Sequence[int]) -> torch.Tensor:
    """Return logits (wanted, rows): a clean token sees what stands before it, the block all."""
    index = torch.arange(len(text))
    last = index.clone()  # last position that each one sees, (length,)
    last[clean:] = len(text) - 1
    seen = (index[None] <= last[:, None])[None, None]  # (1, 1, length, length)
    with torch.no_grad():
        output = model(input_ids=torch.tensor([list(text)]), attention_mask=seen, use_cache=False)
    logits: torch.Tensor = output.logits[0, list(at)].clone()
    # As where a conversion decodes itself: the mask is never written.
    logits[:, model.config.mask_token_id] = -torch.inf
    return logits
