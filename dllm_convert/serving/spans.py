"""Tensors of an export as rows of the source's tensors, so that every byte has an origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from dllm_convert.source.safetensors_header import DTYPE_BYTES, Header, TensorEntry


@dataclass(frozen=True)
class Span:
    """Rows that stand one behind the other in a tensor of the source.

    Attributes:
        source: Name of the tensor; None: a row of its own.
        first: First row.
        rows: How many.
        own: That row, as the tensor's type has it; None: zeros.
    """

    source: str | None
    first: int
    rows: int
    own: bytes | None = None


@dataclass(frozen=True)
class Piece:
    """One tensor of the export: spans of rows, one behind the other.

    Stacking, growing a vocabulary and moving the mask's row are all of this form.

    Attributes:
        name: Its name there.
        dtype: As headers name it.
        shape: Sizes, outermost first.
        spans: Where its rows come from.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    spans: tuple[Span, ...]

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return prod(self.shape[1:]) * DTYPE_BYTES[self.dtype]


def whole(name: str, entry: TensorEntry, sources: Sequence[tuple[str, TensorEntry]] = ()) -> Piece:
    """Return a tensor as it is, or with others stacked below it.

    Args:
        name: Name in the export.
        entry: A tensor that gives the type and all sizes but the first.
        sources: Name and entry of each tensor to stack.
    """
    rows = sum(part.shape[0] for _, part in sources)
    spans = tuple(Span(source, 0, part.shape[0]) for source, part in sources)
    return Piece(name, entry.dtype, (rows, *entry.shape[1:]), spans)


@dataclass(frozen=True)
class Vocabulary:
    """How the tensors with a row per token change.

    Attributes:
        old: Row of the mask in the source.
        new: Row that the engine takes for the mask.
        rows: Rows of the export.
    """

    old: int
    new: int
    rows: int


def moved(name: str, source: str, entry: TensorEntry, vocabulary: Vocabulary) -> Piece:
    """Return a vocabulary tensor with the mask's row where the engine looks for it.

    What stood in that row, if anything did, was never a token of the text: it is past the
    tokenizer's, which the target checks.
    """
    before, after = entry.shape[0], vocabulary.new + 1
    kept = min(before, vocabulary.new)
    spans = (
        Span(source, 0, kept),
        Span(None, 0, vocabulary.new - kept),
        Span(source, vocabulary.old, 1),
        Span(source, after, before - after),
        Span(None, 0, vocabulary.rows - max(after, before)),
    )
    shape = (vocabulary.rows, *entry.shape[1:])
    return Piece(name, entry.dtype, shape, tuple(span for span in spans if span.rows > 0))


def shut(
    name: str, source: str, entry: TensorEntry, vocabulary: Vocabulary, *, tokens: int, row: bytes
) -> Piece:
    """Return a head that can predict neither the mask nor a row past the tokenizer.

    Args:
        name: Name in the export.
        source: The head, or the embedding it was tied to.
        entry: Its entry.
        vocabulary: Rows of the export and of the mask.
        tokens: Ids that the tokenizer has.
        row: Row that stands in for theirs; its logit is far below all others.
    """
    spans, at = [], 0
    for mask in sorted({row for row in (vocabulary.old, vocabulary.new) if row < tokens}):
        spans += [Span(source, at, mask - at), Span(None, 0, 1, own=row)]
        at = mask + 1
    end = min(tokens, entry.shape[0])
    spans += [Span(source, at, end - at), Span(None, 0, vocabulary.rows - end, own=row)]
    shape = (vocabulary.rows, *entry.shape[1:])
    return Piece(name, entry.dtype, shape, tuple(span for span in spans if span.rows > 0))


def entries_of(headers: Mapping[str, Header]) -> dict[str, TensorEntry]:
    """Return all tensors of a checkpoint by name."""
    return {name: entry for header in headers.values() for name, entry in header.entries.items()}


def unused(pieces: Sequence[Piece], entries: Mapping[str, TensorEntry]) -> list[str]:
    """Return tensors of the source of which some row but the overwritten one is in no piece."""
    seen: dict[str, set[int]] = {name: set() for name in entries}
    for piece in pieces:
        for span in piece.spans:
            if span.source is not None:
                seen[span.source].update(range(span.first, span.first + span.rows))
    # A row past the tokenizer may make room for the mask: one, in a tensor with a row per token.
    return [name for name, rows in seen.items() if len(rows) < entries[name].shape[0] - 1]
