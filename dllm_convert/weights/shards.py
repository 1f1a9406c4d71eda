"""Write one weight file of the conversion: a copy, but for the rows that the mask token changes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dllm_convert.common.copying import Advance, TwinHash, Way, copy_part, pieces, place, write_all
from dllm_convert.planning.mask_token import MaskTokenDecision
from dllm_convert.source.safetensors_header import Header, TensorEntry, encode_header
from dllm_convert.weights.mean_row import mean_row


@dataclass(frozen=True)
class RowEdit:
    """New rows of one vocabulary tensor.

    Attributes:
        row: Bytes of one row, the mean of the used ones.
        index: Row that is overwritten, None if it is among the appended ones.
        appended: How many times `row` is appended.
    """

    row: bytes
    index: int | None
    appended: int


@dataclass(frozen=True)
class Changes:
    """What is different in the weights of a conversion.

    Attributes:
        mask: The mask-token decision.
        vocabulary: Names in the output of the tensors that have a row per token.
        dropped: Names in the source of the tensors that the conversion does not have.
        renamed: Names in the source to names in the output, where they differ.
    """

    mask: MaskTokenDecision
    vocabulary: tuple[str, ...]
    dropped: frozenset[str]
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def appended(self) -> int:
        """Rows that every vocabulary tensor gains."""
        return self.mask.rows_after - self.mask.rows_before

    def changed(self, header: Header) -> tuple[str, ...]:
        """Return the tensors of a file whose rows change, by their names there."""
        if not (self.mask.write_row or self.appended):
            return ()
        return tuple(name for name in header.entries if self.name(name) in self.vocabulary)

    def name(self, name: str) -> str:
        """Return the name of a tensor in the output."""
        return self.renamed.get(name, name)

    def keeps(self, header: Header) -> bool:
        """Whether a file is taken over byte for byte; transformers wants its format named."""
        left_out = (self.dropped | self.renamed.keys()) & header.entries.keys()
        return not (self.changed(header) or left_out) and "format" in header.metadata

    def edits(self, handle: int, header: Header) -> dict[str, RowEdit]:
        """Compute the new rows of a file's vocabulary tensors."""
        mask = self.mask
        index = mask.id if mask.write_row and mask.id < mask.rows_before else None
        return {
            name: RowEdit(
                mean_row(handle, header, header.entries[name], mask.used_rows), index, self.appended
            )
            for name in self.changed(header)
        }


@dataclass(frozen=True)
class WrittenFile:
    """One weight file, with what was read for it.

    Attributes:
        name: Name in both folders.
        way: How it came about.
        read: SHA-256 of the source's file.
        written: SHA-256 of the output's.
    """

    name: str
    way: Way
    read: str
    written: str


def _new_header(
    kept: Mapping[str, TensorEntry],
    metadata: Mapping[str, str],
    edits: Mapping[str, RowEdit],
    changes: Changes,
) -> bytes:
    """Return length and JSON of the header with grown tensors and the output's names."""
    tensors: dict[str, tuple[str, list[int], int]] = {}
    for name, entry in kept.items():
        edit = edits.get(name)
        added = edit.appended if edit else 0
        shape = [entry.shape[0] + added, *entry.shape[1:]] if edit else list(entry.shape)
        size = entry.end - entry.start + (added * len(edit.row) if edit else 0)
        tensors[changes.name(name)] = (entry.dtype, shape, size)
    return encode_header(tensors, metadata)


class _Rewriter:
    """Streams one file into another, hashing both."""

    def __init__(
        self, source: int, out: int, header: Header, changes: Changes, advance: Advance
    ) -> None:
        self._source, self._out, self._header, self._advance = source, out, header, advance
        self._changes = changes
        self.hashes = TwinHash()

    def header(self, kept: Mapping[str, TensorEntry], edits: Mapping[str, RowEdit]) -> None:
        same = len(kept) == len(self._header.entries) and "format" in self._header.metadata
        same = same and self._changes.renamed.keys().isdisjoint(kept)
        if same and not any(edit.appended for edit in edits.values()):
            self._copy(0, self._header.data_start)
            return
        self._skip(0, self._header.data_start)
        self._new(_new_header(kept, self._header.metadata, edits, self._changes))

    def tensor(self, entry: TensorEntry, edit: RowEdit | None) -> None:
        start, end = (self._header.data_start + offset for offset in (entry.start, entry.end))
        if edit is not None and edit.index is not None:
            at = start + edit.index * len(edit.row)
            self._copy(start, at - start)
            self._skip(at, len(edit.row))
            self._new(edit.row)
            start = at + len(edit.row)
        self._copy(start, end - start)
        if edit is not None and edit.appended:
            self._new(edit.row * edit.appended)

    def drop(self, entry: TensorEntry) -> None:
        self._skip(self._header.data_start + entry.start, entry.end - entry.start)

    def _copy(self, start: int, length: int) -> None:
        copy_part(self._source, self._out, start, length, self.hashes, self._advance)

    def _skip(self, start: int, length: int) -> None:
        for piece, _ in pieces(self._source, start, length):
            self.hashes.read(piece)
            self._advance(len(piece))

    def _new(self, data: bytes) -> None:
        self.hashes.written(data)
        write_all(self._out, data)


def write_shard(
    source: Path, out: Path, header: Header, changes: Changes, *, link: bool, advance: Advance
) -> WrittenFile:
    """Write one file: as it is, or its kept tensors in their order with their new rows.

    The source is opened for reading only. A file that is rewritten is always a new one.

    Args:
        source: The source's file.
        out: File to create.
        header: Header of the source's file.
        changes: What is different.
        link: Whether an unchanged file may be a hard link.
        advance: Called with the bytes that were read.
    """
    if changes.keeps(header):
        way, digest = place(source, out, link=link, advance=advance)
        return WrittenFile(out.name, way, digest, digest)
    kept = {name: e for name, e in header.entries.items() if name not in changes.dropped}
    with source.open("rb", buffering=0) as old, out.open("xb", buffering=0) as new:
        edits = changes.edits(old.fileno(), header)
        rewriter = _Rewriter(old.fileno(), new.fileno(), header, changes, advance)
        rewriter.header(kept, edits)
        for name, entry in header.entries.items():
            if name in kept:
                rewriter.tensor(entry, edits.get(name))
            else:
                rewriter.drop(entry)
        os.ftruncate(new.fileno(), os.lseek(new.fileno(), 0, os.SEEK_CUR))
    return WrittenFile(out.name, "rewritten", *rewriter.hashes.digests)
