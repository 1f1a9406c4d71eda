"""Where a text begins and ends: the one definition that every part of the package asks.

A *text* begins with what the tokenizer puts before it and is ended, in training, by its end token;
some tokenizers put that behind every text themselves. A *prompt* is a text left open: without what
would close it. A *conversation* is what its template makes of it, tokenised as it stands. Decoding
ends at any token of the end set: what the base's generation config names, what training ends a text
with, and what the chat template ends a turn of the assistant with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.published.ends import read_ids
from dllm_convert.source.tokenizer_loading import TokenizerErrors

_LETTERS = ("a", "A", "1", ".")
"""Texts to see what a tokenizer puts around one; a vocabulary of proteins has no small letters."""


@dataclass(frozen=True)
class TextBounds:
    """What a tokenizer puts around every text.

    Attributes:
        begin: Ids before it.
        closing: Ids behind it.
    """

    begin: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()


def find_bounds(encode: Callable[[str, bool], list[int]]) -> TextBounds:
    """Find what a tokenizer puts around a text, by asking it with and without special tokens.

    Args:
        encode: Turns a text into ids; the second argument says whether special tokens are wanted.
    """
    for letter in _LETTERS:
        plain, whole = encode(letter, False), encode(letter, True)
        for first in range(len(whole) - len(plain) + 1):
            if plain and whole[first : first + len(plain)] == plain:
                return TextBounds(tuple(whole[:first]), tuple(whole[first + len(plain) :]))
    return TextBounds()


def bounds_of(tokenizer: Any) -> TextBounds:
    """Return what a tokenizer of transformers puts around every text."""
    return find_bounds(lambda text, special: _encode(tokenizer, text, special=special))


def _encode(tokenizer: Any, text: str, *, special: bool) -> list[int]:
    with TokenizerErrors("the tokenizer cannot encode a text", "Correct its tokenizer.json"):
        return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def open_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a text that is to go on: begun as every text, closed by nothing.

    A text that begins with those tokens already, as a chat template writes them, gets no second.

    Args:
        tokenizer: A tokenizer of transformers.
        text: Any text.
    """
    ids = _encode(tokenizer, text, special=False)
    begin = list(bounds_of(tokenizer).begin)
    return ids if ids[: len(begin)] == begin else [*begin, *ids]


def leave_open(tokenizer: Any) -> None:
    """Have a tokenizer put nothing behind texts from now on, for those who call it themselves."""
    bounds, backend = bounds_of(tokenizer), getattr(tokenizer, "backend_tokenizer", None)
    if not bounds.closing or backend is None:
        return
    from tokenizers.processors import TemplateProcessing

    begin = [str(tokenizer.convert_ids_to_tokens(token)) for token in bounds.begin]
    single = " ".join([*begin, "$A"])
    backend.post_processor = TemplateProcessing(
        single=single,
        pair=f"{single} $B",
        special_tokens=list(zip(begin, bounds.begin, strict=True)),
    )


def conversation_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenise what a chat template wrote: the template says how it begins."""
    return _encode(tokenizer, text, special=False)


def first_token(tokenizer: Any) -> int | None:
    """Return what stands before a text with nothing before it, None if the tokenizer has no such.

    lm-eval's convention: what begins every text, or could, or else what ends one.
    """
    named = (*bounds_of(tokenizer).begin, tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in named if token is not None), None)


def end_token(tokenizer: Any) -> int | None:
    """Return the token that training ends a text with: the end token, or an encoder's separator."""
    named = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    return next((int(token) for token in named if token is not None), None)


def end_ids(model: Any) -> frozenset[int]:
    """Return the tokens at which a loaded model's texts end, as its generation config has them."""
    return frozenset(read_ids(model.generation_config.eos_token_id))


def until_end(tokens: list[int], ends: frozenset[int]) -> list[int]:
    """Return tokens up to and including the first that ends a text."""
    first = next((number for number, token in enumerate(tokens, 1) if token in ends), len(tokens))
    return tokens[:first]


def stated_ids(
    role: str, config: Mapping[str, Any], generation: Mapping[str, Any]
) -> tuple[int, ...]:
    """Return the ids that a checkpoint's files give a role, by transformers' precedence.

    Args:
        role: One of `ID_ROLES`.
        config: config.json.
        generation: generation_config.json; where it names none, the config does.

    Raises:
        IncompatibleError: A file has something else than ids there.
    """
    name = f"{role}_token_id"
    for file, content in (("generation_config.json", generation), ("config.json", config)):
        if content.get(name) is None:
            continue
        try:
            return read_ids(content[name], name)
        except ValueError as error:
            raise IncompatibleError(
                f"{file}: {error}", hint=f"Correct it; the tokenizer knows the {role} token's id"
            ) from error
    return ()


def end_set(
    stated: tuple[int, ...], end: int | None, turn: int | None, closing: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the tokens at which decoding ends: the stated ones first, each once.

    Args:
        stated: What the base's files say.
        end: What training ends a text with.
        turn: What ends a turn of the assistant.
        closing: What the tokenizer puts behind every text: at the first of it the text is over.
    """
    more = (end, turn, *closing[:1])
    return tuple(dict.fromkeys((*stated, *(token for token in more if token is not None))))
