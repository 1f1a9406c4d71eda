"""What a conversion is shown by: a few texts, through its chat template where it has one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dllm_convert.errors import DataError
from dllm_convert.modeling.published.options import Observer
from dllm_convert.modeling.text_bounds import end_ids, until_end
from dllm_convert.sampling import DEFAULT_PROMPT
from dllm_convert.sampling.prompts import encode_prompt
from dllm_convert.sampling.run import Sample, decode_sample, fit

NEW_TOKENS = 32
TEXTS = (DEFAULT_PROMPT, "The capital of France is", "Once upon a time")
QUESTIONS = (
    "What is a variable in a program?",
    "What is the capital of France?",
    "Write one sentence about the sea.",
)
"""Chosen once, and not for how any model goes on from them."""


@dataclass(frozen=True)
class Showcase:
    """What is asked of a conversion, and of its base.

    Attributes:
        prompts: Each with how many tokens are written.
        chat: Whether they are put into the chat template.
    """

    prompts: tuple[tuple[str, int], ...]
    chat: bool


def choose(model: Any, tokenizer: Any) -> Showcase:
    """Return what to ask: questions where there is a template that takes them, else texts."""
    chat = bool(tokenizer.chat_template)
    try:
        for question in QUESTIONS if chat else ():
            encode_prompt(tokenizer, question, chat=True)
    except DataError:
        chat = False
    prompts = QUESTIONS if chat else TEXTS
    fitted = (fit(model, tokenizer, text, NEW_TOKENS, chat=chat) for text in prompts)
    return Showcase(tuple(fitted), chat)


def decode_showcase(
    model: Any, tokenizer: Any, asked: Showcase, observer: Observer | None = None
) -> tuple[Sample, ...]:
    """Write each text by itself, so that its forwards are its own; the first one is observed."""
    return tuple(
        decode_sample(
            model,
            tokenizer,
            prompt,
            chat=asked.chat,
            max_new_tokens=new,
            observer=None if number else observer,
        )
        for number, (prompt, new) in enumerate(asked.prompts)
    )


def base_texts(base: Any, tokenizer: Any, asked: Showcase, ends: Sequence[int]) -> tuple[str, ...]:
    """Return what the base writes, autoregressively and always the likeliest token.

    Args:
        base: The stock model.
        tokenizer: The conversion's tokenizer, whose other tokens are the base's.
        asked: What the conversion is asked.
        ends: Tokens that end a text.
    """
    from transformers import GenerationConfig

    written = []
    for prompt, new in asked.prompts:
        ids = encode_prompt(tokenizer, prompt, chat=asked.chat)
        settings = GenerationConfig(  # type: ignore[no-untyped-call]
            max_new_tokens=new,
            do_sample=False,
            eos_token_id=list(ends) or None,
            pad_token_id=0,
            # What is not said here the base's own settings say.
            return_dict_in_generate=False,
        )
        given = torch.tensor([ids], device=base.device)
        out = base.generate(
            given, attention_mask=torch.ones_like(given), generation_config=settings
        )
        tokens = until_end(out[0, len(ids) :].tolist(), frozenset(ends))
        written.append(str(tokenizer.decode(tokens, skip_special_tokens=True)))
    return tuple(written)


def showcase(
    model: Any,
    tokenizer: Any,
    observer: Observer | None,
    load_base: Callable[[], Any | None],
) -> dict[str, Any]:
    """Return the section `sample` of a manifest: the first text, and the others under `more`.

    Args:
        model: The conversion. It is let go of before the base is loaded.
        tokenizer: Its tokenizer.
        observer: Follows the first text.
        load_base: Gives the base; None where it writes no text of its own.
    """
    asked, ends = choose(model, tokenizer), sorted(end_ids(model))
    samples = decode_showcase(model, tokenizer, asked, observer)
    del model
    base = load_base()
    texts = [None] * len(samples) if base is None else base_texts(base, tokenizer, asked, ends)
    first, *more = (
        {**sample.as_dict(), "chat": asked.chat, "base": text}
        for sample, text in zip(samples, texts, strict=True)
    )
    return {**first, "more": more}
