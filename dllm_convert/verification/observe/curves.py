"""Curves: what masked tokens cost at each mask rate, and what faster decoding changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dllm_convert.diffusion.likelihood import nats_at_rate
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.modeling.denoising import denoised
from dllm_convert.sampling.packing import packed_linears
from dllm_convert.verification.observe.observations import DecodingPoint, RatePoint

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Midpoints of five equal parts of all rates: the mean of the five estimates the NELBO."""
ROWS = 4
WIDTH = 128

THRESHOLDS = (0.9, 0.5, 0.2, 0.05)
PROMPTS = 2
PROMPT_TOKENS = 32
NEW_TOKENS = 16
WIDE = 64
"""Tokens per forward above which fewer prompts are decoded."""


def excerpt(batches: Sequence[TextBatch], block_size: int | None) -> list[TextBatch]:
    """Return the beginnings of the first held-out rows, each a batch of its own.

    Args:
        batches: Held-out text.
        block_size: Tokens per block; two of them fit in any case, if the rows are that long.
    """
    width = max(WIDTH, 2 * (block_size or 0))
    rows = [
        TextBatch(
            *(
                None if part is None else part[row : row + 1, :width]
                for part in (batch.tokens, batch.segments, batch.positions, batch.loss)
            )  # type: ignore[arg-type]
        )
        for batch in batches
        for row in range(len(batch.tokens))
    ]
    return [row for row in rows if row.scorable.any()][:ROWS]


def measure_rates(
    model: Any, batches: Sequence[TextBatch], objective: Objective, *, seed: int
) -> tuple[RatePoint, ...]:
    """Measure what masked tokens cost at each of `RATES`.

    The same tokens are masked for every model, and those of a rate are masked at all higher ones.
    Nothing is returned for kernels without a mask, whose text has no masked tokens.

    Args:
        model: A diffusion model.
        batches: Held-out text.
        objective: mdlm or bd3lm.
        seed: Seed of the noise.
    """
    if not objective.masks:
        return ()
    texts = excerpt(batches, objective.block_size)
    found = nats_at_rate(model, texts, objective, RATES, seed=seed)
    return tuple(
        RatePoint(rate, one.nats_per_token, one.stderr, one.tokens)
        for rate, one in zip(RATES, found, strict=True)
        if one is not None
    )


def prompt_length(block_size: int | None, context: int) -> int:
    """Return how many tokens prompts have: the new tokens end where a block ends.

    0 if the context has no room for a prompt and the new tokens.
    """
    size = block_size or 1
    length = PROMPT_TOKENS + (-(PROMPT_TOKENS + NEW_TOKENS)) % size
    room = (context - NEW_TOKENS) // size * size if size > 1 else context - NEW_TOKENS
    return length if length + NEW_TOKENS <= context else max(min(length, room), 0)


def choose_prompts(batches: Sequence[TextBatch], length: int, count: int) -> list[torch.Tensor]:
    """Return the first tokens of held-out documents, one per row, each of shape (1, length)."""
    prompts = []
    for batch in batches:
        for tokens, segments in zip(batch.tokens, batch.segments, strict=True):
            sizes = torch.bincount(segments[segments >= 0])
            if len(sizes) and int(sizes.max()) >= length:
                document = tokens[segments == int(sizes.argmax())]
                prompts.append(document[None, :length])
    return prompts[:count]


@dataclass(frozen=True)
class _Decoded:
    """What prompts were continued with: new tokens of each, and forwards of all."""

    texts: tuple[torch.Tensor, ...]
    forwards: int

    def compare(self, reference: _Decoded, threshold: float | None) -> DecodingPoint:
        tokens = sum(len(text) for text in self.texts)
        pairs = zip(self.texts, reference.texts, strict=True)
        same = sum(int((new == old).sum()) for new, old in pairs)
        return DecodingPoint(threshold, tokens / self.forwards, same / tokens, tokens)


def _decode(model: Any, prompts: Sequence[torch.Tensor], threshold: float | None) -> _Decoded:
    texts, forwards = [], 0
    for prompt in prompts:
        with packed_linears(model):
            output = model.generate(
                prompt.to(model.device),
                max_new_tokens=NEW_TOKENS,
                max_denoising_steps=None,
                confidence_threshold=threshold,
                temperature=0.0,
                eos_token_id=(),
                return_dict_in_generate=True,
                **denoised(model),
            )
        texts.append(output.sequences[0, prompt.shape[1] :].cpu())
        forwards += output.forwards
    return _Decoded(tuple(texts), forwards)


def measure_decoding(
    model: Any, batches: Sequence[TextBatch], *, context: int
) -> tuple[DecodingPoint, ...]:
    """Decode the same prompts one token per forward, then at each of `THRESHOLDS`.

    Texts do not end before their length: what is compared is always as long. Prompts are decoded
    one by one, since of a batch all rows wait for the slowest. Where a threshold takes as many
    forwards as one token each, no second token was ever that sure, and nothing changes at a higher
    threshold, which is not decoded again.

    Args:
        model: A diffusion model.
        batches: Held-out text, whose documents begin the prompts.
        context: Longest text in tokens.

    Returns:
        One token per forward first; empty if no document is long enough for a prompt.
    """
    block = getattr(model.config, "block_size", None)
    length = prompt_length(block, context)
    count = PROMPTS if (block or length + NEW_TOKENS) <= WIDE else 1
    prompts = choose_prompts(batches, length, count) if length else []
    if not prompts:
        return ()
    reference = found = _decode(model, prompts, None)
    points: list[DecodingPoint] = []
    for threshold in sorted(THRESHOLDS):
        if not points or found.forwards < reference.forwards:
            found = _decode(model, prompts, threshold)
        points.append(found.compare(reference, threshold))
    return (reference.compare(reference, None), *reversed(points))
