"""What a base is asked to go on from: questions of conversations, beginnings of documents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from dllm_convert.errors import DataError
from dllm_convert.modeling.text_bounds import end_token
from dllm_convert.recipe.schema import Data
from dllm_convert.training.data.content import Document, find_documents
from dllm_convert.training.data.documents import open_corpus
from dllm_convert.training.data.messages import Conversation, Message
from dllm_convert.training.data.plain_text import PlainText
from dllm_convert.training.data.reading import Split
from dllm_convert.training.data.rendering import ChatTemplate

_AT_ONCE = 64


@dataclass(frozen=True)
class Prompt:
    """What is gone on from.

    Attributes:
        ids: Its tokens.
        key: Of the document that it is of.
        messages: Of a conversation, what comes before the answer; None of a document.
        tools: Tools of the conversation.
    """

    ids: list[int]
    key: int
    messages: list[Message] | None = None
    tools: tuple[Any, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return {
            "ids": self.ids,
            "key": self.key,
            "messages": self.messages,
            "tools": list(self.tools),
        }


def find_prompts(data: Data, tokenizer: Any) -> tuple[list[Prompt], dict[str, Any]]:
    """Take prompts from a text, in its order; none from what is held out of it.

    Of a conversation that is everything before the assistant's first turn, up to where its template
    has the answer begin; of a document its first tokens.

    Args:
        data: What is read, and in `write_with_base` how much of it.
        tokenizer: The base's, or the conversion's.

    Returns:
        The prompts, and what was read for them: the text's name, kind and commit, and how many
        documents gave no prompt.

    Raises:
        DataError: There is none.
        HubError: A Hub dataset cannot be read.
    """
    asked, corpus = data.write_with_base, open_corpus(data)
    split = Split.by_fraction(data.held_out_fraction)
    maker = _Prompts(tokenizer, data)
    read = 0

    def kept() -> Iterator[Document]:
        nonlocal read
        for shard in corpus.shards:
            for index, row in enumerate(shard.read(0), start=1):
                for document in find_documents(row, data, shard.place_of(index)):
                    read += 1
                    if not split.holds_out(document.key):
                        yield document

    limited = islice(kept(), data.max_documents)
    some = iter(lambda: list(islice(limited, _AT_ONCE)), [])
    made = (prompt for documents in some for prompt in maker.of(documents) if prompt)
    prompts = list(islice(made, asked.prompts))
    if not prompts:
        raise DataError(
            f"--data {corpus.name} holds nothing for the base to go on from: no conversation in "
            "which somebody speaks before the assistant, and no text, of fewer tokens than "
            f"data.sequence_length {data.sequence_length}",
            hint="Give other text, or leave data.write_with_base out",
        )
    facts = {"source": corpus.name, "kind": corpus.kind, "revision": corpus.revision}
    return prompts, {**facts, "looked_at": read, "prompts": len(prompts)}


class _Prompts:
    """Makes prompts of documents.

    Args:
        tokenizer: The base's.
        data: How long they are.
    """

    def __init__(self, tokenizer: Any, data: Data) -> None:
        self._tokenizer = tokenizer
        self._data = data
        self._plain = PlainText(tokenizer)
        self._template: ChatTemplate | None = None
        self._end = end_token(tokenizer)

    def of(self, documents: list[Document]) -> list[Prompt | None]:
        """Return the prompt of each document, None where there is none."""
        texts = [d.content for d in documents if isinstance(d.content, str)]
        tokens = iter(self._plain.encode(texts)[0])
        return [
            self._beginning(next(tokens), document.key)
            if isinstance(document.content, str)
            else self._question(document.content, document)
            for document in documents
        ]

    def _beginning(self, ids: list[int], key: int) -> Prompt | None:
        length = min(self._data.write_with_base.prompt_tokens, self._data.sequence_length - 1)
        begun = [token for token in ids[:length] if token != self._end]
        return Prompt(begun, key) if begun else None

    def _question(self, messages: tuple[Message, ...], document: Document) -> Prompt | None:
        where = document.where
        roles = [message["role"] for message in messages]
        before = list(messages[: roles.index("assistant") if "assistant" in roles else None])
        if "user" not in roles[: len(before)]:
            return None
        if self._template is None:
            if not self._tokenizer.chat_template:
                raise DataError(
                    f"{where} is a conversation, and the base has no chat template to be asked in",
                    hint="Start from the -Instruct base, or go on from texts: --set "
                    "data.text_field=COLUMN",
                )
            self._template = ChatTemplate(self._tokenizer)
        tools = messages.tools if isinstance(messages, Conversation) else ()
        said = self._plain.mark([dict(message) for message in before])
        text = self._template.render(
            said, where, add_generation_prompt=True, tools=list(self._plain.mark(tools)) or None
        )
        ids = list(self._plain.encode_marked(text).ids)
        if not 0 < len(ids) < self._data.sequence_length:
            return None
        return Prompt(ids, document.key, before, tools)
