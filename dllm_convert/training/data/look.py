"""A look at training text before anything is done with it: is it there, is it text, how much."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

from dllm_convert.recipe.schema import Data
from dllm_convert.training.data.content import Document, find_documents
from dllm_convert.training.data.corpus import Corpus
from dllm_convert.training.data.documents import no_text, open_corpus

MOST_DOCUMENTS = {"pydoc": 5000, "files": 5000, "hub": 256}
"""Documents that are looked at; of the Hub each batch is fetched."""
MOST_CHARACTERS = 8_000_000
_COUNTED = 200
"""Documents whose tokens are counted."""
_COUNTED_CHARACTERS = 256_000
"""Characters of them that are counted: how many bytes a token has shows in fewer than all."""
BYTES_PER_TOKEN = 4.0
"""English under a vocabulary of 50,000 to 150,000 tokens, where nothing counts them."""


@dataclass(frozen=True)
class TextLook:
    """What a look at a text shows.

    Attributes:
        source: The text, as it was named.
        kind: pydoc, files or hub.
        whole: Whether all of it was looked at; else counts are of its beginning.
        documents: Documents that were looked at.
        chats: Conversations among them.
        tokens: Tokens of all of it, estimated; None where nothing tells how large it is.
        longest: Tokens of the longest document that was looked at, estimated.
        beyond: Documents among them that are longer than a training sequence.
    """

    source: str
    kind: str
    whole: bool
    documents: int
    chats: int
    tokens: int | None
    longest: int
    beyond: int

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def look_at(data: Data, count: Callable[[Sequence[str]], Sequence[int]] | None = None) -> TextLook:
    """Open a text and read the beginning of it.

    Args:
        data: What is trained on.
        count: Counts the tokens of texts; None estimates them from their length.

    Raises:
        DataError: There is no such text, it says nothing, or it is something else.
        HubError: A Hub dataset cannot be read.
    """
    corpus = open_corpus(data)
    most = MOST_DOCUMENTS[corpus.kind]
    if data.max_documents is not None:
        most = min(most, data.max_documents)
    documents: list[Document] = []
    characters, whole = 0, True
    for document in _documents(corpus, data):
        if len(documents) >= most or characters >= MOST_CHARACTERS:
            whole = len(documents) == data.max_documents
            break
        documents.append(document)
        characters += _size(document)
    if whole and not any(map(_says_something, documents)):
        raise no_text(corpus.name)
    rate = _tokens_per_byte(documents, count)
    sizes = [round(_size(document) * rate) for document in documents]
    tokens: int | None = sum(sizes)
    if not whole:
        # Files of text are as large as what they say; others are larger, or compressed.
        tokens = None if corpus.size is None else max(sum(sizes), round(corpus.size * rate))
    return TextLook(
        source=corpus.name,
        kind=corpus.kind,
        whole=whole,
        documents=len(documents),
        chats=sum(not isinstance(document.content, str) for document in documents),
        tokens=tokens,
        longest=max(sizes, default=0),
        beyond=sum(size > data.sequence_length for size in sizes),
    )


def _documents(corpus: Corpus, data: Data) -> Iterator[Document]:
    for shard in corpus.shards:
        for index, row in enumerate(shard.read(0), start=1):
            yield from find_documents(row, data, shard.place_of(index))


def _text(document: Document) -> str:
    if isinstance(document.content, str):
        return document.content
    return "\n".join(str(message.get("content") or "") for message in document.content)


def _says_something(document: Document) -> bool:
    """Whether there may be something to learn; of a chat only its template can tell."""
    return not isinstance(document.content, str) or bool(document.content.strip())


def _size(document: Document) -> int:
    return len(_text(document).encode(errors="replace"))


def _tokens_per_byte(
    documents: Sequence[Document], count: Callable[[Sequence[str]], Sequence[int]] | None
) -> float:
    texts = [text for text in map(_text, islice(documents, _COUNTED)) if text.strip()]
    if sum(map(len, texts)) > _COUNTED_CHARACTERS:
        # A part of each, as one long document need not be like the others.
        most = _COUNTED_CHARACTERS // len(texts)
        texts = [text[:most] for text in texts if text[:most].strip()]
    if count is None or not texts:
        return 1 / BYTES_PER_TOKEN
    sizes = [len(text.encode(errors="replace")) for text in texts]
    return sum(count(texts)) / sum(sizes)
