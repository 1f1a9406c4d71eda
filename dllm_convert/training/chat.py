"""Conversations: from a dataset's columns to text, and which of it the assistant wrote.

A conversation becomes text through the tokenizer's own chat template. What the assistant wrote is
what the template marks with `{% generation %}`; a template without such marks is rendered up to
each of the assistant's turns, and what the whole conversation has beyond that is the turn, if it is
exactly that. A template that renders a conversation's beginning differently from the conversation
is refused rather than guessed at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from dllm_convert.errors import DataError

Message = Mapping[str, Any]

CHAT_COLUMNS: tuple[frozenset[str], ...] = (
    frozenset({"messages"}),
    frozenset({"conversations"}),
    frozenset({"prompt", "completion"}),
)
"""Columns that hold a conversation where nothing else is named."""
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_GENERATION = re.compile(r"\{%-?\s*generation\b")
_HOW_TO_MARK = (
    "Mark what the assistant writes with {% generation %} ... {% endgeneration %} in the base's "
    "chat_template.jinja, or learn from the last turn only: --set data.scored_turns=last"
)


def find_messages(row: Mapping[str, Any], field: str, where: str) -> tuple[Message, ...] | None:
    """Return the conversation in a row, None if it has none.

    Args:
        row: Its columns.
        field: Column that may hold messages; the usual ones are looked at if it is missing.
        where: What an error calls the row.

    Raises:
        DataError: If there is a conversation without roles or content.
    """
    for name in (field, "messages", "conversations"):
        if row.get(name) is not None:
            return _messages(row[name], where)
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None or completion is None:
        return None
    return _turn(prompt, "user", where) + _turn(completion, "assistant", where)


def _turn(value: Any, role: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return _messages(value, where)


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if isinstance(value, Mapping):
        # A list of structs as older datasets store it: a struct of lists.
        lists = {key: items for key, items in value.items() if isinstance(items, Sequence)}
        value = [dict(zip(lists, items, strict=False)) for items in zip(*lists.values())]  # noqa: B905
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise DataError(
            f"{where} holds a {type(value).__name__}, expected a text or a list of messages",
            hint="Name the right column with --set data.text_field=COLUMN",
        )
    return tuple(_message(message, f"{where}, message {i}") for i, message in enumerate(value, 1))


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise DataError(
            f"{where} is a {type(message).__name__}, expected an object with role and content",
            hint="Name the right column with --set data.text_field=COLUMN",
        )
    given = {key: value for key, value in message.items() if value is not None}
    role = given.pop("role", None) or given.pop("from", None)
    content = given.pop("content", None)
    content = given.pop("value", None) if content is None else content
    if not isinstance(role, str) or (content is None and "tool_calls" not in given):
        missing = "role" if not isinstance(role, str) else "content"
        raise DataError(
            f"{where} has no {missing}, it has {sorted(message)}",
            hint='Messages look like {"role": "user", "content": "..."}',
        )
    return {**given, "role": _ROLES.get(role, role)} | (
        {} if content is None else {"content": content}
    )


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

    Raises:
        DataError: If the tokenizer has no chat template, no end token, or no character offsets.
    """

    def __init__(self, tokenizer: Any, turns: Literal["all", "last"]) -> None:
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

    @cached_property
    def _marked(self) -> bool:
        return bool(_GENERATION.search(self._tokenizer.get_chat_template()))

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self._tokenizer.added_tokens_decoder.items()
        return frozenset(token for token, text in added if text.special)

    @cached_property
    def _mark(self) -> re.Pattern[str]:
        added = self._tokenizer.added_tokens_decoder
        texts = (re.escape(added[token].content) for token in self._special)
        return re.compile("|".join(sorted(texts, key=len, reverse=True)) or "(?!)")

    @cached_property
    def _end_mark(self) -> re.Pattern[str]:
        return re.compile(rf"\s*(?:{self._mark.pattern})")

    def encode(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[bool]]:
        """Tokenise one conversation, ended by the end token, which is scored.

        What follows the assistant's last turn is left out: nothing in it is learnt from.

        Args:
            messages: The conversation.
            where: What an error calls it.

        Returns:
            Token ids and whether each is scored; nothing at all if the assistant says nothing.

        Raises:
            DataError: If the template refuses it, or hides which part the assistant wrote.
        """
        roles = [message["role"] for message in messages]
        if "assistant" not in roles:
            return [], []
        messages = messages[: len(roles) - roles[::-1].index("assistant")]
        ids, scored = (
            self._by_marks(messages, where) if self._marked else self._by_prefix(messages, where)
        )
        if not any(scored):
            return [], []
        return self._ended(ids, scored)

    def _ended(self, ids: list[int], scored: list[bool]) -> tuple[list[int], list[bool]]:
        """End every scored turn with the template's end mark, and the whole with the end token."""
        special, end = self._special, self._tokenizer.eos_token_id
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

    def _by_marks(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[bool]]:
        out = self._render(
            messages,
            where,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        ids, scored = list(out["input_ids"]), [bool(value) for value in out["assistant_masks"]]
        spans = out["offset_mapping"]
        for i in range(1, len(ids)):
            # The mask stops at the first of the tokens that make up a turn's last character.
            first, last = spans[i]
            scored[i] = scored[i] or (scored[i - 1] and first < last and spans[i] == spans[i - 1])
        if self._turns == "last" and True in scored:
            end = len(scored) - scored[::-1].index(True)
            before = scored[:end][::-1]
            start = end - (before.index(False) if False in before else end)
            scored = [start <= i < end for i in range(len(scored))]
        return ids, scored

    def _by_prefix(self, messages: Sequence[Message], where: str) -> tuple[list[int], list[bool]]:
        chat = self.find_spans(messages, where)
        encoded = self._tokenizer(
            chat.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        # A token that begins in the prompt and ends in the answer is the prompt's.
        scored = [
            any(start <= first < last <= end for start, end in chat.spans)
            for first, last in encoded["offset_mapping"]
        ]
        return encoded["input_ids"], scored

    def find_spans(self, messages: Sequence[Message], where: str) -> Chat:
        """Find what the assistant wrote by rendering what stood before each of its turns.

        Args:
            messages: A conversation that ends with a turn of the assistant.
            where: What an error calls it.

        Raises:
            DataError: If the whole does not begin with what stood before.
        """
        text = str(self._render(messages, where, tokenize=False))
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        spans = []
        for i in turns if self._turns == "all" else turns[-1:]:
            before = str(
                self._render(messages[:i], where, tokenize=False, add_generation_prompt=True)
            )
            start = len(before)
            end = self._end_of_turn(text, start, messages[: i + 1], where)
            if not text.startswith(before) or end is None:
                raise DataError(
                    f"the chat template renders {where} in a way that hides where the assistant's "
                    f"turn (message {i + 1}) begins or ends",
                    hint=_HOW_TO_MARK,
                )
            spans.append((start, start + len(text[start:end].rstrip())))
        return Chat(text[: spans[-1][1]], tuple(spans))

    def _end_of_turn(
        self, text: str, start: int, messages: Sequence[Message], where: str
    ) -> int | None:
        """Return where the turn that begins at `start` ends, its end mark included."""
        alone = str(self._render(messages, where, tokenize=False))
        # Some templates render a last turn differently (Qwen3 opens it with an empty thought), or
        # follow it by the beginning of another: then its content and a special token have to do.
        limit = len(alone) if text.startswith(alone) else None
        content = messages[-1].get("content")
        content = content.strip() if isinstance(content, str) else ""
        at = text.find(content, start) if content else -1
        mark = self._end_mark.match(text, at + len(content)) if at >= 0 else None
        if mark and not self._mark.search(text, start, at):
            return min(mark.end(), limit or mark.end())
        return limit

    def _render(self, messages: Sequence[Message], where: str, **options: Any) -> Any:
        import jinja2

        try:
            return self._tokenizer.apply_chat_template([dict(m) for m in messages], **options)
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(
                f"the chat template refuses {where} ({reason})",
                hint="Correct or remove that conversation: the template says which order of roles "
                "and which kinds of content it takes",
            ) from error
