"""Films made by hand: texts denoised in an order drawn from a seed, without a model."""

from __future__ import annotations

import random
from typing import Any

from dllm_convert.sampling.watch.frames import UNWRITTEN, Film, Frame

MASK = 1 << 20


def denoised(
    prompt: list[int],
    new: list[int],
    *,
    per_frame: int = 2,
    block: int | None = None,
    ends: frozenset[int] = frozenset(),
    seed: int = 0,
) -> Film:
    """Return a film in which `per_frame` tokens of the working block are written in each frame."""
    draw, full = random.Random(seed), [*prompt, *new]
    tokens = [*prompt, *[MASK] * len(new)]
    written = [0] * len(prompt) + [UNWRITTEN] * len(new)
    frames = [Frame(0, tuple(tokens), tuple(written))]
    while UNWRITTEN in written:
        first = written.index(UNWRITTEN)
        end = (first // block + 1) * block if block else len(full)
        open_ = [i for i in range(first, min(end, len(full))) if written[i] == UNWRITTEN]
        for position in draw.sample(open_, min(per_frame, len(open_))):
            tokens[position], written[position] = full[position], len(frames)
        frames.append(Frame(len(frames), tuple(tokens), tuple(written)))
    return Film(len(prompt), tuple(frames), ends, block)


def film_of(tokenizer: Any, prompt: str, text: str, **options: Any) -> Film:
    """Return a film of a text and of the end of it."""
    before = tokenizer(prompt)["input_ids"]
    after = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    return denoised(before, after, ends=frozenset([tokenizer.eos_token_id]), **options)
