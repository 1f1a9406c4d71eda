"""Text is text: no token of the protocol is made of what a document or a message says.

A document about BERT says `[MASK]`, one about chat formats `<|im_end|>`. A tokenizer makes its
special tokens of these, whoever wrote them. Here they become the letters that they are. Other added
tokens (`<think>`, runs of spaces) are vocabulary and stay; so does a special token that the
vocabulary spells by itself, as where `!` is declared to be the padding.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from dllm_convert.errors import DataError
from dllm_convert.source.tokenizer_loading import TokenizerErrors
from dllm_convert.training.data.rendering import ChatTemplate

_FAILURE = ("the tokenizer cannot encode a document", "Correct its tokenizer.json")
BEGIN, END = "\U0001fffe", "\U0001ffff"
"""Non-characters of Unicode, which no text has: they stand around a token's name."""
MARKED = re.compile(f"{BEGIN}([^{BEGIN}{END}]*){END}|[{BEGIN}{END}]")


@dataclass(frozen=True)
class Tokens:
    """Tokens of a text.

    Attributes:
        ids: Token ids, shape (n,).
        offsets: Characters of the text that each stands for.
    """

    ids: list[int]
    offsets: list[tuple[int, int]]


class PlainText:
    """A tokenizer that keeps what a text says apart from the tokens of the protocol.

    Args:
        tokenizer: The converted checkpoint's tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def control(self) -> dict[str, int]:
        """Tokens of the protocol by their text: special ones, and those between a chat's turns."""
        added = self._tokenizer.added_tokens_decoder.items()
        between = self._between_turns()
        chosen = {
            token.content: number
            for number, token in added
            if token.special or (token.content in between and not token.content.isspace())
        }
        mask = self._tokenizer.mask_token
        return {t: n for t, n in chosen.items() if t and (t == mask or not self._spelled(t))}

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Finds the text of a control token, the longest first."""
        texts = sorted(map(re.escape, self.control), key=len, reverse=True)
        return re.compile("|".join(texts) or "(?!)")

    @cached_property
    def ids(self) -> frozenset[int]:
        """Ids of the control tokens."""
        return frozenset(self.control.values())

    def encode(self, texts: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """Tokenise documents the way the base was trained to see them.

        Args:
            texts: The documents.

        Returns:
            Ids of each, with what the tokenizer puts around a text, and whether a control token's
            text was spelled out in it.
        """
        if not texts:
            return [], []
        fast = self._tokenizer.is_fast
        asked = {"return_special_tokens_mask" if fast else "split_special_tokens": True}
        with TokenizerErrors(*_FAILURE):
            out = self._tokenizer([*texts], verbose=False, **asked)
        if not fast:
            return out["input_ids"], [False] * len(texts)
        ids: list[list[int]] = out["input_ids"]
        # The unknown token stands for what has no token, more often than for its own text.
        unknown = self._tokenizer.unk_token
        control = np.array(sorted(self.ids - {self.control.get(unknown)}), dtype=np.int64)
        spelled = [
            bool((np.isin(own, control) & (np.array(around) == 0)).any())
            or (unknown in self.control and unknown in text)
            for own, around, text in zip(ids, out["special_tokens_mask"], texts, strict=True)
        ]
        with TokenizerErrors(*_FAILURE):
            for i in (i for i, one in enumerate(spelled) if one):
                ids[i] = self._renamed.encode(texts[i]).ids
        return ids, spelled

    def mark(self, value: Any) -> Any:
        """Put marks around every control token's text in strings, lists and objects."""
        if isinstance(value, str):
            bare = value.replace(BEGIN, "").replace(END, "")
            return self.pattern.sub(rf"{BEGIN}\g<0>{END}", bare)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        return [self.mark(item) for item in value] if isinstance(value, list | tuple) else value

    def occurs_in(self, value: Any) -> bool:
        """Whether a control token's text stands in strings, lists or objects."""
        if isinstance(value, str):
            return bool(self.pattern.search(value))
        inside = value.values() if isinstance(value, Mapping) else value
        return isinstance(value, Mapping | list | tuple) and any(map(self.occurs_in, inside))

    def encode_marked(self, text: str) -> Tokens:
        """Tokenise what a template made: its own control tokens, not those inside marks.

        Args:
            text: A rendering, in which `mark` stands around what the messages said.

        Returns:
            Its tokens; marks belong to no token.
        """
        if BEGIN not in text and END not in text:
            with TokenizerErrors(*_FAILURE):
                out = self._tokenizer(
                    text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
                )
            return Tokens(out["input_ids"], out["offset_mapping"])
        swapped, origin = self._swap(text)
        with TokenizerErrors(*_FAILURE):
            out = self._renamed.encode(swapped, add_special_tokens=False)
        return Tokens(out.ids, [(origin[a], origin[b - 1] + 1 if b else 0) for a, b in out.offsets])

    def _swap(self, text: str) -> tuple[str, list[int]]:
        """Take marks away where there are some, and put them where the template wrote a token."""
        pieces: list[str] = []
        origin: list[int] = []

        def add(piece: str, start: int, *, moves: bool = True) -> None:
            pieces.append(piece)
            origin.extend(range(start, start + len(piece)) if moves else [start] * len(piece))

        def written_by_the_template(start: int, end: int) -> None:
            for match in self.pattern.finditer(text, start, end):
                add(text[start : match.start()], start)
                start = match.end()
                add(BEGIN, match.start(), moves=False)
                add(match[0], match.start())
                add(END, start - 1, moves=False)
            add(text[start:end], start)

        at = 0
        for match in MARKED.finditer(text):
            written_by_the_template(at, match.start())
            add(match[1] or "", match.start() + 1)
            at = match.end()
        written_by_the_template(at, len(text))
        return "".join(pieces), [*origin, len(text)]

    @cached_property
    def _renamed(self) -> Any:
        """The tokenizer whose control tokens have marks around their names, under the same ids."""
        from tokenizers import Tokenizer

        def name(text: str) -> str:
            return f"{BEGIN}{text}{END}" if text in self.control else text

        state = json.loads(self._tokenizer.backend_tokenizer.to_str())
        for token in state["added_tokens"]:
            if token["content"] in self.control:
                token |= {"content": name(token["content"]), "normalized": False}
        model = state["model"]
        vocab = model["vocab"]
        if isinstance(vocab, Mapping):
            model["vocab"] = {name(text): number for text, number in vocab.items()}
        else:
            model["vocab"] = [[name(text), score] for text, score in vocab]
        if isinstance(model.get("unk_token"), str):
            model["unk_token"] = name(model["unk_token"])
        if "merges" in model:
            pairs = (m if isinstance(m, list) else m.split(" ", 1) for m in model["merges"])
            model["merges"] = [
                pair for pair in pairs if self.control.keys().isdisjoint({*pair, "".join(pair)})
            ]
        renamed = Tokenizer.from_str(json.dumps(state))
        renamed.no_truncation()
        renamed.no_padding()
        return renamed

    @cached_property
    def _merged(self) -> frozenset[str]:
        if not self._tokenizer.is_fast:
            return frozenset()
        model = json.loads(self._tokenizer.backend_tokenizer.to_str())["model"]
        merges = (m if isinstance(m, list) else m.split(" ", 1) for m in model.get("merges", ()))
        return frozenset("".join(pair) for pair in merges)

    def _spelled(self, text: str) -> bool:
        """Whether the vocabulary makes a token of this text without its being declared special."""
        return len(text) == 1 or text in self._merged

    def _between_turns(self) -> str:
        """What the chat template writes around the messages of a conversation."""
        if not self._tokenizer.chat_template:
            return ""
        turns = [{"role": role, "content": ""} for role in ("user", "assistant", "user")]
        try:
            return ChatTemplate(self._tokenizer).render(turns, "turns of a user and an assistant")
        except DataError:
            return ""  # A template that takes no such conversation says so when it gets a real one.
