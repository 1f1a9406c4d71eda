"""Stream the pieces of an export into files, and read them back against their source."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from dllm_convert.common.copying import Advance, TwinHash, Way, copy_part, place, write_all
from dllm_convert.common.json_files import write_config
from dllm_convert.errors import DataError
from dllm_convert.serving.spans import Piece, Span, entries_of
from dllm_convert.source.safetensors_header import (
    INDEX_FILE,
    SINGLE_FILE,
    Header,
    encode_header,
    read_header,
)

_AT_ONCE = 1 << 22
"""Bytes that are compared at once."""


def files_of(pieces: Sequence[Piece], headers: Mapping[str, Header]) -> dict[str, list[Piece]]:
    """Put every piece into the file that its first row comes from."""
    home = {name: file for file, header in headers.items() for name in header.entries}
    found: dict[str, list[Piece]] = {file: [] for file in headers}
    for piece in pieces:
        source = next(span.source for span in piece.spans if span.source is not None)
        found[home[source]].append(piece)
    return {file: held for file, held in found.items() if held}


def _is_same(held: Sequence[Piece], header: Header) -> bool:
    """Whether a file is taken over as it is; transformers wants its format named."""
    if "format" not in header.metadata or len(held) != len(header.entries):
        return False
    return all(
        piece.name in header.entries
        and piece.spans == (Span(piece.name, 0, header.entries[piece.name].shape[0]),)
        for piece in held
    )


def write_pieces(
    pieces: Sequence[Piece],
    source: Path,
    out: Path,
    headers: Mapping[str, Header],
    advance: Advance,
) -> dict[str, tuple[Way, str]]:
    """Write all weight files; those that stay the same are hard links or copies.

    Args:
        pieces: All tensors of the export.
        source: Folder of the source.
        out: Folder to write to.
        headers: Headers of the source's files.
        advance: Called with the bytes that were written.

    Returns:
        Name of a file to how it came about and its SHA-256.
    """
    made: dict[str, tuple[Way, str]] = {}
    held_by = files_of(pieces, headers)
    with ExitStack() as stack:
        handles = {
            file: stack.enter_context((source / file).open("rb", buffering=0)).fileno()
            for file in headers
        }
        for file, held in held_by.items():
            if _is_same(held, headers[file]):
                made[file] = place(source / file, out / file, link=True, advance=advance)
                continue
            tensors = {
                piece.name: (
                    piece.dtype,
                    list(piece.shape),
                    piece.row_bytes * sum(span.rows for span in piece.spans),
                )
                for piece in held
            }
            hashes = TwinHash()
            with (out / file).open("xb", buffering=0) as new:
                head = encode_header(tensors, {**headers[file].metadata, "format": "pt"})
                hashes.written(head)
                write_all(new.fileno(), head)
                for piece in held:
                    _write(piece, handles, headers, new.fileno(), hashes, advance)
                os.ftruncate(new.fileno(), os.lseek(new.fileno(), 0, os.SEEK_CUR))
            made[file] = ("rewritten", hashes.digests[1])
    if list(held_by) != [SINGLE_FILE]:
        write_config(
            out / INDEX_FILE,
            {
                "metadata": {"total_size": sum(_bytes(piece) for piece in pieces)},
                "weight_map": {p.name: file for file, held in held_by.items() for p in held},
            },
        )
    return made


def _bytes(piece: Piece) -> int:
    return piece.row_bytes * piece.shape[0]


def _write(
    piece: Piece,
    handles: Mapping[str, int],
    headers: Mapping[str, Header],
    out: int,
    hashes: TwinHash,
    advance: Advance,
) -> None:
    for span in piece.spans:
        if span.source is None:
            for part in _repeated(span.own or bytes(piece.row_bytes), span.rows):
                hashes.written(part)
                write_all(out, part)
            continue
        handle, start = _place_of(span, piece.row_bytes, handles, headers)
        copy_part(handle, out, start, span.rows * piece.row_bytes, hashes, advance)


def _place_of(
    span: Span, row_bytes: int, handles: Mapping[str, int], headers: Mapping[str, Header]
) -> tuple[int, int]:
    """Return the file of a span's rows and the byte at which they begin."""
    for file, header in headers.items():
        entry = header.entries.get(str(span.source))
        if entry is not None:
            return handles[file], header.data_start + entry.start + span.first * row_bytes
    raise KeyError(span.source)


def prove(pieces: Sequence[Piece], source: Path, out: Path, headers: Mapping[str, Header]) -> int:
    """Read the export back: every tensor is there, and every row is the source's row.

    What is compared was read from the files, not remembered from writing them.

    Returns:
        Bytes that were compared.

    Raises:
        DataError: Something differs; names the first tensor.
    """
    written = {path.name: read_header(path) for path in sorted(out.glob("*.safetensors"))}
    entries, compared = entries_of(written), 0
    wanted = {piece.name: piece for piece in pieces}
    if set(entries) != set(wanted):
        odd = sorted(set(entries) ^ set(wanted))[0]
        raise _differs(odd, "is in one of the export and its plan only")
    with ExitStack() as stack:
        old = {
            file: stack.enter_context((source / file).open("rb", buffering=0)).fileno()
            for file in headers
        }
        new = {
            file: stack.enter_context((out / file).open("rb", buffering=0)).fileno()
            for file in written
        }
        for name, piece in wanted.items():
            entry = entries[name]
            if (entry.dtype, entry.shape) != (piece.dtype, piece.shape):
                raise _differs(name, f"is {entry.dtype} {entry.shape}")
            handle, at = _place_of(Span(name, 0, piece.shape[0]), piece.row_bytes, new, written)
            for span in piece.spans:
                size = span.rows * piece.row_bytes
                if span.source is None:
                    offset, same = at, True
                    for part in _repeated(span.own or bytes(piece.row_bytes), span.rows):
                        same = same and os.pread(handle, len(part), offset) == part
                        offset += len(part)
                else:
                    origin, start = _place_of(span, piece.row_bytes, old, headers)
                    same = all(
                        os.pread(handle, part, at + offset)
                        == os.pread(origin, part, start + offset)
                        for offset, part in _parts(size)
                    )
                if not same:
                    raise _differs(name, "does not hold the rows of its source")
                at, compared = at + size, compared + size
    return compared


def _repeated(row: bytes, count: int) -> Iterator[bytes]:
    """Yield a row so many times over, many at once: a vocabulary grows by a hundred thousand."""
    together = max(1, min(count, _AT_ONCE // max(1, len(row))))
    block, (whole, rest) = row * together, divmod(count, together)
    for _ in range(whole):
        yield block
    if rest:
        yield row * rest


def _parts(size: int) -> Iterator[tuple[int, int]]:
    for offset in range(0, size, _AT_ONCE):
        yield offset, min(_AT_ONCE, size - offset)


def _differs(name: str, what: str) -> DataError:
    return DataError(
        f"the export is not its source: {name} {what}",
        hint="Export it again; if that says the same, the disk or this program is at fault",
    )
