"""Conversations: from messages to tokens, and which of them the assistant wrote.

A conversation becomes text through the tokenizer's own chat template. What the assistant wrote is
what the template marks with `{% generation %}`; a template without such marks is rendered up to
each of the assistant's turns, and what the whole conversation has beyond that is the turn, if it is
exactly that. A template that renders a conversation's beginning differently from the conversation
is refused rather than guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dllm_convert.errors import DataError
from dllm_convert.training.data.forms import pieces
from dllm_convert.training.data.messages import CHAT_COLUMNS, Conversation, Message, find_messages
from dllm_convert.training.data.plain_text import PlainText
from dllm_convert.training.data.rendering import ChatTemplate, Rendered

__all__ = ["CHAT_COLUMNS", "ChatEncoder", "Conversation", "Message", "find_messages"]

_HOW_TO_MARK = (
    "Mark what the assistant writes with {% generation %} ... {% endgeneration %} in the base's "
    "chat_template.jinja, or learn from the last turn only: --set data.scored_turns=last"
)
_OPENS = "messagesaid"
"""Words in the place of an answer, to see what the template writes before it."""


@dataclass(frozen=True)
class Chat:
    """A rendered conversation.

    Attributes:
        text: What the template makes of it, up to the end of the assistant's last turn.
        spans: Ranges of characters that the assistant wrote, with the mark that ends its turn.
    """

    text: str
    spans: tuple[tuple[int, int], ...]


class ChatEncoder:
    """Turns conversations into tokens and says which of them are scored.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        turns: Whether all turns of the assistant are scored, or its last.
        plain: Knows the tokenizer's control tokens; made of the tokenizer if it is None.

    Raises:
        DataError: If the tokenizer has no chat template, no end token, or no character offsets.
    """

    def __init__(
        self, tokenizer: Any, turns: Literal["all", "last"], plain: PlainText | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._turns = turns
        if not tokenizer.chat_template:
            raise DataError(
                "the data holds conversations, but the tokenizer has no chat template",
                hint="Start from the -Instruct base, put a chat_template.jinja beside the base's "
                "tokenizer, or train on a column of plain text: --set data.text_field=COLUMN",
            )
        if tokenizer.eos_token_id is None or not tokenizer.is_fast:
            lacks = "an end token" if tokenizer.eos_token_id is None else "character offsets"
            raise DataError(
                f"chats need a tokenizer with {lacks}",
                hint="Train on a column of plain text: --set data.text_field=COLUMN",
            )
        self._plain = plain or PlainText(tokenizer)
        self._template = ChatTemplate(tokenizer)

    @cached_property
    def _end_mark(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:{self._plain.pattern.pattern})")

    def encode(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[bool]]:
        """Tokenise one conversation, ended by the end token, which is scored.

        What follows the assistant's last turn is left out: nothing in it is learnt from.

        Args:
            messages: The conversation, as `find_messages` returns it.
            where: What an error calls it.

        Returns:
            Token ids and whether each is scored; nothing at all if the assistant says nothing.

        Raises:
            DataError: If the template refuses it, loses part of it, or hides which part the
                assistant wrote.
        """
        for i, message in enumerate(messages, 1):  # Those that are not learnt from, too.
            self._template.with_role(message, f"{where}, message {i}")
        learnt = [i for i, m in enumerate(messages) if m["role"] == "assistant" and _counts(m)]
        if not learnt:
            return [], []
        last = max(learnt)
        tools = messages.tools if isinstance(messages, Conversation) else ()
        said = self._plain.mark([dict(message) for message in messages[: last + 1]])
        rendered = self._template.fit(Conversation(said, self._plain.mark(tools)), where)
        turns = learnt if self._turns == "all" else learnt[-1:]
        chat = (
            self._by_prefix(rendered, turns, where)
            if rendered.marked is None
            else self._by_marks(rendered, turns, where)
        )
        if not chat.spans:
            return [], []
        # A token that begins in the prompt and ends in the answer is the prompt's.
        tokens = self._plain.encode_marked(chat.text)
        scored = [
            any(start <= first < last <= end for start, end in chat.spans)
            for first, last in tokens.offsets
        ]
        return self._ended(tokens.ids, scored) if any(scored) else ([], [])

    def _ended(self, ids: list[int], scored: list[bool]) -> tuple[list[int], list[bool]]:
        """End every scored turn with the template's end mark, and the whole with the end token."""
        special, end = self._plain.ids, self._tokenizer.eos_token_id
        last = len(ids) - scored[::-1].index(True)
        tail = [token for token in ids[last:] if token in special]
        # The mark that closes the last turn is the one that closes the others.
        marks = {end, *tail[:1]} | ({ids[last - 1]} & special)
        for i in range(1, len(ids)):
            scored[i] = scored[i] or (scored[i - 1] and ids[i] in marks and ids[i - 1] not in marks)
        last = len(ids) - scored[::-1].index(True)
        ids, scored = ids[:last], scored[:last]
        if ids[-1] != end:
            ids, scored = [*ids, end], [*scored, True]
        return ids, scored

    def _by_marks(self, rendered: Rendered, turns: Sequence[int], where: str) -> Chat:
        """Take what stands inside `{% generation %}`."""
        spans = rendered.marked or ()
        answers = [i for i, m in enumerate(rendered.messages) if m["role"] == "assistant"]
        if len(turns) == len(answers):
            return Chat(rendered.text, spans)
        if len(spans) != len(answers):
            if turns == answers[-1:] and spans:
                return Chat(rendered.text, spans[-1:])
            raise DataError(
                f"the chat template marks {len(spans)} turns of {where}, expected "
                f"{len(answers)}, so that it hides which of them are not to be learnt",
                hint="Remove that conversation, or its weights",
            )
        return Chat(
            rendered.text, tuple(s for s, i in zip(spans, answers, strict=True) if i in turns)
        )

    def _by_prefix(self, rendered: Rendered, turns: Sequence[int], where: str) -> Chat:
        """Find what the assistant wrote by rendering what stood before each of its turns."""
        text, messages, tools = rendered.text, rendered.messages, list(rendered.tools) or None
        spans = []
        for i in turns:
            before = self._before(rendered, i, where)
            start = len(before)
            end = self._end_of_turn(text, start, messages[: i + 1], tools, where)
            if not text.startswith(before) or end is None:
                raise DataError(
                    f"the chat template renders {where} in a way that hides where the assistant's "
                    f"turn (message {i + 1}) begins or ends",
                    hint=_HOW_TO_MARK,
                )
            spans.append((start, start + len(text[start:end].rstrip())))
        return Chat(text[: spans[-1][1]], tuple(spans))

    def _before(self, rendered: Rendered, turn: int, where: str) -> str:
        """Return what the template writes before a turn of the assistant."""
        messages, tools = rendered.messages, list(rendered.tools) or None
        if turn:
            return self._template.render(
                messages[:turn], where, tools=tools, add_generation_prompt=True
            )
        # Nothing stood before the assistant; templates need not take a conversation of nothing.
        content = messages[0].get("content")
        other = [{"type": "text", "text": _OPENS}] if isinstance(content, list) else _OPENS
        opened = self._template.render(
            [{**messages[0], "content": other}, *messages[1:]], where, tools=tools
        )
        return opened.partition(_OPENS)[0]

    def _end_of_turn(
        self, text: str, start: int, messages: Sequence[Message], tools: Any, where: str
    ) -> int | None:
        """Return where the turn that begins at `start` ends, its end mark included."""
        alone = self._template.render(messages, where, tools=tools)
        # Some templates render a last turn differently (Qwen3 opens it with an empty thought), or
        # follow it by the beginning of another: then its content and the mark that closes a turn
        # have to do.
        limit = len(alone) if text.startswith(alone) else None
        end = self._closed(text, start, messages[-1])
        return limit if end is None else min(end, limit or end)

    def _closed(self, text: str, start: int, message: Message) -> int | None:
        """Return the end of the mark that closes what a message says."""
        if message.get("tool_calls") or not _spoken(message).strip():
            said = [text.find(piece, start) + len(piece) for _, piece in pieces(message)]
            at = text.find(self._closing, max(said, default=start)) if self._closing else -1
            return at + len(self._closing) if at >= 0 else None
        content = _spoken(message).strip()
        at = text.find(content, start)
        while at >= 0 and not self._plain.pattern.search(text, start, at):
            if mark := self._end_mark.match(text, at + len(content)):
                return mark.end()
            at = text.find(content, at + 1)
        return None

    @cached_property
    def _closing(self) -> str:
        """What the template closes a turn of the assistant with; empty if with no control token."""
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": _OPENS}]
        try:
            text = self._template.render(turns, "a question and its answer")
        except DataError:
            return ""
        mark = self._end_mark.match(text, text.find(_OPENS) + len(_OPENS))
        return mark[0].strip() if mark else ""


def _counts(message: Message) -> bool:
    return bool(message.get("weight", 1))


def _spoken(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part["text"] for part in content)
