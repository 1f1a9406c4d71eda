"""Documents: rows of a corpus with what identifies their content, and the tokens they become."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from dllm_convert.errors import DataError
from dllm_convert.modeling.text_bounds import end_token
from dllm_convert.recipe.schema import Data
from dllm_convert.training.data.chat import ChatEncoder
from dllm_convert.training.data.file_rows import Row
from dllm_convert.training.data.messages import (
    BESIDE_CHATS,
    CHAT_COLUMNS,
    Message,
    advice,
    find_messages,
)
from dllm_convert.training.data.plain_text import PlainText

LONGEST = 1 << 20
"""Characters above which a document is cut: tokenizers take memory by the document."""
KEYS = 1 << 64
"""Keys are whole numbers from 0 up to this."""

_CHAT_COLUMNS = sorted(frozenset().union(*CHAT_COLUMNS, BESIDE_CHATS))

IdArray = np.ndarray[Any, np.dtype[np.int32]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Document:
    """A text or a conversation.

    Attributes:
        content: The text, or the messages.
        where: What an error calls it.
    """

    content: str | tuple[Message, ...]
    where: str

    @property
    def key(self) -> int:
        """Hash of the content, the same for every copy of it, whatever its white space."""
        if isinstance(self.content, str):
            text = " ".join(self.content.split())
        else:
            turns = [[m["role"], m.get("content"), m.get("tool_calls")] for m in self.content]
            text = json.dumps(turns, ensure_ascii=False, default=str)
        return int.from_bytes(blake2b(text.encode(errors="replace"), digest_size=8).digest(), "big")


@dataclass(frozen=True)
class Encoded:
    """A tokenised document.

    Attributes:
        key: Of the document.
        ids: Token ids, shape (n,), int32.
        scored: Tokens that may be masked and scored, shape (n,), bool; None for all of them.
        truncated: Whether tokens beyond the sequence's length were cut off.
        spelled: Whether it says the text of a control token, which became letters.
    """

    key: int
    ids: IdArray
    scored: BoolArray | None = None
    truncated: bool = False
    spelled: bool = False


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
    value = row.get(data.text_field)
    _check_characters(row, data, where)
    if isinstance(value, str):
        for part in _parts(value) if value.strip() else ():
            yield Document(part, where)
        return
    messages = find_messages(row, data.text_field, where)
    if messages is not None:
        yield Document(messages, where)
    elif not any(names <= row.keys() for names in ({data.text_field}, *CHAT_COLUMNS)):
        raise DataError(
            f"{where} has no column {data.text_field!r}, it has {sorted(row)}",
            hint=advice([*row]),
        )


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


class Encoder:
    """Tokenises documents, many at a time.

    Args:
        tokenizer: The converted checkpoint's tokenizer.
        data: How chats are scored and how long a sequence is.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._end = end_token(tokenizer)
        self._plain = PlainText(tokenizer)
        self._chat: ChatEncoder | None = None

    def encode(self, documents: Sequence[Document]) -> list[Encoded]:
        """Tokenise documents.

        A text is tokenised the way the base was trained to see it, and ended by its end token. A
        conversation of more than `sequence_length` tokens keeps its beginning.

        Args:
            documents: Texts and conversations.

        Returns:
            As many, in their order; those with nothing to learn from have no tokens.

        Raises:
            DataError: If a conversation cannot be encoded, or a text becomes the mask.
        """
        texts = [d.content for d in documents if isinstance(d.content, str)]
        tokens = iter(zip(*self._plain.encode(texts), strict=True))
        encoded = [
            self._text(document, *next(tokens))
            if isinstance(document.content, str)
            else self._conversation(document, document.content)
            for document in documents
        ]
        for document, found in zip(documents, encoded, strict=True):
            self._check(document, found)
        return encoded

    def _check(self, document: Document, encoded: Encoded) -> None:
        """See to it that no token of a text is the mask: nothing could be predicted in its place.

        What a tokenizer without a backend of its own makes of a text cannot be kept from it.
        """
        mask = self._tokenizer.mask_token_id
        if mask is not None and (encoded.ids == mask).any():
            raise DataError(
                f"{document.where} becomes the mask token {self._tokenizer.mask_token!r} in places",
                hint="Remove that text, or name another mask with --set mask_token.token=TEXT",
            )

    def _text(self, document: Document, ids: list[int], spelled: bool) -> Encoded:
        if self._end is not None and (not ids or ids[-1] != self._end):
            ids = [*ids, self._end]
        return Encoded(document.key, np.array(ids, dtype=np.int32), spelled=spelled)

    def _conversation(self, document: Document, messages: Sequence[Message]) -> Encoded:
        if self._chat is None:
            self._chat = ChatEncoder(self._tokenizer, self._data.scored_turns, self._plain)
        ids, scored = self._chat.encode(messages, document.where)
        length = self._data.sequence_length
        kept = length if any(scored[1:length]) else 0
        return Encoded(
            document.key,
            np.array(ids[:kept], dtype=np.int32),
            np.array(scored[:kept], dtype=np.bool_),
            truncated=len(ids) > length,
            spelled=self._plain.occurs_in(messages),
        )
