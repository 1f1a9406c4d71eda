"""The text of single tokens, fit to be shown: no control characters, no halves of a character."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dllm_convert.common.shown_text import BROKEN, glyph
from dllm_convert.modeling.text_bounds import conversation_ids

NEWLINE = "\N{RETURN SYMBOL}"
END = "\N{END OF PROOF}"

_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def visible(text: str) -> str:
    """Return text in which every character has a glyph and none moves a cursor.

    A line end is shown as a sign in front of the line end.
    """
    return "".join(_visible(char) for char in text.replace("\r\n", "\n"))


def _visible(char: str) -> str:
    if char in _LINE_ENDS:
        return f"{NEWLINE}\n"
    return "    " if char == "\t" else glyph(char)


class TokenText:
    """Texts of tokens as their neighbours make them: with spaces, and whole characters only.

    Args:
        tokenizer: A transformers tokenizer.
        end_ids: Tokens that end a text, shown as one sign.
    """

    def __init__(self, tokenizer: Any, end_ids: frozenset[int] = frozenset()) -> None:
        self._tokenizer = tokenizer
        self._special = frozenset(tokenizer.all_special_ids)
        self._ends = end_ids
        letter = conversation_ids(tokenizer, "a")
        # A word in front shows whether a token brings a space; alone, many lose theirs.
        self._before: list[int] = letter[-1:]
        self._before_text = self._decode(self._before)
        self._pieces: dict[int, str] = {}

    def texts(self, tokens: Sequence[int | None], prompt_length: int = 0) -> tuple[str, ...]:
        """Return what to show of each token.

        A character whose bytes are spread over several tokens stands at the last of them, once all
        of them are there.

        Args:
            tokens: Tokens of one text, None where nothing is written.
            prompt_length: How many of them are the prompt, whose special tokens are not shown.
        """
        shown = [
            "" if token is None else self._piece(token, prompt=position < prompt_length)
            for position, token in enumerate(tokens)
        ]
        start = 0
        while start < len(shown):
            stop = start
            while stop < len(shown) and BROKEN in shown[stop] and tokens[stop] is not None:
                stop += 1
            if stop - start > 1:
                group = [token for token in tokens[start:stop] if token is not None]
                shown[start:stop] = self._joined(group)
            start = max(stop, start + 1)
        return tuple(visible(text) for text in shown)

    def _piece(self, token: int, *, prompt: bool) -> str:
        if token in self._special or token in self._ends:
            if prompt:
                return ""
            return END if token in self._ends else str(self._tokenizer.decode([token]))
        if token not in self._pieces:
            self._pieces[token] = self._added([token])
        return self._pieces[token]

    def _added(self, tokens: list[int]) -> str:
        """Return what tokens add to the text of a word in front of them."""
        text = self._decode([*self._before, *tokens])
        if self._before and text.startswith(self._before_text):
            return text[len(self._before_text) :]
        return self._decode(tokens)

    def _joined(self, group: list[int]) -> list[str]:
        """Give each of several tokens the characters that it completes."""
        done, texts = 0, []
        for count in range(1, len(group) + 1):
            text = self._added(group[:count])
            whole = text.rstrip(BROKEN) if count < len(group) else text
            texts.append(whole[done:])
            done = max(done, len(whole))
        return texts

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))
