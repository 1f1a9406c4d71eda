"""The tokens that documents become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dllm_convert.errors import DataError
from dllm_convert.modeling.text_bounds import end_token
from dllm_convert.recipe.schema import Data
from dllm_convert.training.data.chat import ChatEncoder
from dllm_convert.training.data.content import Document
from dllm_convert.training.data.messages import Message
from dllm_convert.training.data.plain_text import PlainText

KEYS = 1 << 64
"""Keys are whole numbers from 0 up to this."""

IdArray = np.ndarray[Any, np.dtype[np.int32]]
BoolArray = np.ndarray[Any, np.dtype[np.bool_]]


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
        end = None if document.is_open else self._end
        if end is not None and (not ids or ids[-1] != end):
            ids = [*ids, end]
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
