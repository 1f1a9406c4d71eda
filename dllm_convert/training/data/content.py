"""Documents: what a row of a corpus holds, and what identifies it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from dllm_convert.errors import DataError
from dllm_convert.recipe.schema import Columns, Data
from dllm_convert.training.data.file_rows import Row
from dllm_convert.training.data.messages import (
    BESIDE_CHATS,
    CHAT_COLUMNS,
    Message,
    advice,
    find_messages,
)

LONGEST = 1 << 20
"""Characters above which a document is cut: tokenizers take memory by the document."""

FROM = "dllm_convert_from"
"""Column of what a base wrote: the key of the document that it was begun from."""
OPEN = "dllm_convert_is_open"
"""Column of what a base wrote (`training.base_text`): true of a text that was cut off."""

_CHAT_COLUMNS = sorted(frozenset().union(*CHAT_COLUMNS, BESIDE_CHATS))


@dataclass(frozen=True)
class Document:
    """A text or a conversation.

    Attributes:
        content: The text, or the messages.
        where: What an error calls it.
        is_open: Whether the text was cut off and goes on: it is not learnt with an end.
        origin: Key of the document that a base began it from, None for a text of its own.
    """

    content: str | tuple[Message, ...]
    where: str
    is_open: bool = False
    origin: int | None = None

    @property
    def key(self) -> int:
        """Hash of the content, the same for every copy of it, whatever its white space.

        What a base went on with falls on the side of what it went on from.
        """
        if self.origin is not None:
            return self.origin
        if isinstance(self.content, str):
            text = " ".join(self.content.split())
        else:
            turns = [[m["role"], m.get("content"), m.get("tool_calls")] for m in self.content]
            text = json.dumps(turns, ensure_ascii=False, default=str)
        return int.from_bytes(blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")


def find_documents(row: Row, data: Data, where: str) -> Iterator[Document]:
    """Yield what a row of a corpus holds: one document, none if it is empty, parts if it is huge.

    Args:
        row: Its columns.
        data: Names of the columns.
        where: What an error calls the row.

    Raises:
        DataError: If the row has neither text nor messages.
    """
    if row is None:
        return
    row = _renamed(row, data.columns, where)
    value = row.get(data.text_field)
    _check_characters(row, data, where)
    if isinstance(value, str):
        if data.containing is None or data.containing in value:
            for part in _parts(value) if value.strip() else ():
                yield Document(part, where, row.get(OPEN) is True, row.get(FROM))
        return
    messages = find_messages(row, data.text_field, where)
    if messages is not None:
        if data.containing is None or any(data.containing in said for said in _answers(messages)):
            yield Document(messages, where, origin=row.get(FROM))
    elif not any(names <= row.keys() for names in ({data.text_field}, *CHAT_COLUMNS)):
        raise DataError(
            f"{where} has no column {data.text_field!r}, it has {sorted(row)}",
            hint=advice([*row]),
        )


def _renamed(row: Mapping[str, Any], columns: Columns, where: str) -> Mapping[str, Any]:
    """Return the columns that were named, under the names that conversations have here.

    Where some are named nothing else of the row is looked at.

    Raises:
        DataError: The row lacks one of the question or of the answer.
    """
    named = columns.named
    if not named:
        return row
    for part in ("prompt", "completion", "instruction", "output"):
        if part in named and named[part] not in row:
            raise DataError(
                f"{where} has no column {named[part]!r} (data.columns.{part}), it has "
                f"{sorted(row)}",
                hint=f"Name the right one with --set data.columns.{part}=COLUMN",
            )
    return {part: row.get(column) for part, column in named.items()}


def _answers(messages: Sequence[Message]) -> Iterator[str]:
    """Yield what the assistant says; of content in parts, their texts."""
    for message in messages:
        if message.get("role") == "assistant":
            content = message.get("content") or ""
            if isinstance(content, str):
                yield content
            else:
                yield "".join(str(part.get("text") or "") for part in content)


def _check_characters(row: Mapping[str, Any], data: Data, where: str) -> None:
    """See to it that text can be written as UTF-8: JSON can say half of a character."""
    chat = () if isinstance(row.get(data.text_field), str) else _CHAT_COLUMNS
    for name in (data.text_field, *chat):
        value = row.get(name)
        if value is None:
            continue
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        )
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(
                f"{where} holds {text[error.start]!a} in {name}, half of a surrogate pair, which "
                "is no character",
                hint="Remove that row, or write the character whole",
            ) from error


def _parts(text: str) -> Iterator[str]:
    """Cut a text that is too long, at the end of a paragraph, a line or a word if there is one."""
    while len(text) > LONGEST:
        ends = (text.rfind(mark, LONGEST // 2, LONGEST) for mark in ("\n\n", "\n", " "))
        end = next((end + 1 for end in ends if end >= 0), LONGEST)
        yield text[:end]
        text = text[end:]
    if text.strip():
        yield text
