"""Prompts as tokens: text to go on from, chats, and what is to be filled in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.modeling.text_bounds import conversation_ids, open_ids
from dllm_convert.source.chat_rendering import chat_text

_BEFORE = ("a", ".", "\n", "1", "\u4e00")
"""What a text is tokenised behind, to see its tokens in the middle of one: the first of these that
does not melt into it."""


def with_masks(tokenizer: Any, prompt: str, mark: str) -> str:
    """Put a mask where a prompt says that something is to be written.

    A space before it goes with it: most vocabularies have words with the space before them.

    Args:
        tokenizer: A transformers tokenizer with a mask token.
        prompt: Text with marks.
        mark: What stands for one token.

    Raises:
        DataError: The mark is empty or not in the prompt.
    """
    if not mark or mark not in prompt:
        raise DataError(
            f"the prompt has no {mark!r} to be written", hint="--infill names text that is in it"
        )
    return re.sub(rf" ?{re.escape(mark)}", lambda _: str(tokenizer.mask_token), prompt)


def _around_masks(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    """Tokenise a text whose masks are one token each, and what stands around them as it is typed.

    A tokenizer takes what follows a special token for the beginning of a text, and some put a space
    before that.
    """
    begun = conversation_ids if chat else open_ids
    first, *others = text.split(tokenizer.mask_token) if tokenizer.mask_token else [text]
    if not others:
        return begun(tokenizer, text)
    ids = begun(tokenizer, first)
    for piece in others:
        ids += [tokenizer.mask_token_id, *_behind_mask(tokenizer, piece)]
    return ids


def _behind_mask(tokenizer: Any, piece: str) -> list[int]:
    """Tokenise what follows a mask, as the middle of a text."""

    def encode(text: str) -> list[int]:
        return conversation_ids(tokenizer, text)

    def show(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    special = "|".join(re.escape(token) for token in tokenizer.all_special_tokens)
    cut = re.search(special, piece)
    head, rest = (piece[: cut.start()], piece[cut.start() :]) if cut else (piece, "")
    ids = encode(head)
    mask = show([tokenizer.mask_token_id])
    shown = show([tokenizer.mask_token_id, *ids])
    if shown != mask + head:
        for before in _BEFORE:
            known, whole = encode(before), encode(before + head)
            if whole[: len(known)] == known and show(whole).startswith(show(known)):
                # What a vocabulary cannot say looks as it would in the middle of any text.
                if shown != mask + show(whole)[len(show(known)) :]:
                    ids = whole[len(known) :]
                break
    return [*ids, *(encode(rest) if rest else ())]


def check_text(prompt: str) -> None:
    """Check that what was typed is text that can be tokenised.

    Raises:
        DataError: It holds half a character, which is what Python makes of bytes that are no UTF-8.
    """
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{prompt[error.start]!a}"
        raise DataError(
            f"the prompt is not UTF-8: its character {error.start + 1} is {found}",
            hint="Type it in a terminal with UTF-8, or give it on stdin with --prompt -",
        ) from error


def encode_prompt(tokenizer: Any, prompt: str, *, chat: bool = False) -> list[int]:
    """Return the tokens of a prompt, left open at its end.

    Args:
        tokenizer: A transformers tokenizer.
        prompt: Text to go on from, or what the user says.
        chat: Put it into the chat template, as one turn of the user.

    Raises:
        DataError: The prompt is empty or no text, or the chat template refuses it.
        IncompatibleError: The tokenizer has no chat template.
    """
    if chat:
        return encode_messages(tokenizer, [{"role": "user", "content": prompt}], "the prompt")
    check_text(prompt)
    ids = _around_masks(tokenizer, prompt, chat=False)
    if not ids:
        raise DataError("the prompt is empty", hint="Give at least one word")
    return ids


def encode_messages(tokenizer: Any, messages: Sequence[Mapping[str, str]], where: str) -> list[int]:
    """Return the tokens of messages in the chat template, up to where the reply begins.

    Args:
        tokenizer: A transformers tokenizer.
        messages: `role` and `content` of each turn.
        where: What they are, for messages.

    Raises:
        DataError: A message is no text, or the chat template refuses them.
        IncompatibleError: The tokenizer has no chat template.
    """
    for message in messages:
        check_text(message["content"])
    if not tokenizer.chat_template:
        raise IncompatibleError(
            "the tokenizer has no chat template",
            hint="Leave out --chat to go on from the text, as sample does",
        )
    hint = "Correct chat_template.jinja, or go on from a text with sample, without --chat"
    turns = [dict(message) for message in messages]
    text = chat_text(tokenizer, turns, where, hint, add_generation_prompt=True)
    ids = _around_masks(tokenizer, text, chat=True)
    if not ids:
        raise DataError(f"the chat template makes nothing of {where}", hint=hint)
    return ids


def encode_prompts(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, chat: bool, mark: str | None
) -> list[list[int]]:
    """Return the tokens of each prompt, masks where something is to be written.

    Args:
        model: Diffusion model.
        tokenizer: Its tokenizer.
        prompts: Texts to go on from.
        chat: Put each prompt into the chat template.
        mark: Text in the prompts that stands for a token to be written; None for none.

    Raises:
        DataError: A prompt is empty, has no mark where one was named, or begins with a mask that
            nothing stands before.
        IncompatibleError: The tokenizer has no chat template, or the model knows no mask.
    """
    section = DiffusionSection.of(model.config.diffusion)
    if mark is not None:
        if not section.masks:
            raise IncompatibleError(
                "this model was trained without a mask, so it cannot tell what is to be written",
                hint="Leave out --infill",
            )
        prompts = [with_masks(tokenizer, prompt, mark) for prompt in prompts]
    encoded = [encode_prompt(tokenizer, prompt, chat=chat) for prompt in prompts]
    mask = model.config.mask_token_id
    if section.token_shift and any(ids[0] == mask for ids in encoded):
        raise DataError(
            "the prompt begins with a mask, and this model predicts a token from the one before",
            hint="Begin with at least one word",
        )
    return encoded
