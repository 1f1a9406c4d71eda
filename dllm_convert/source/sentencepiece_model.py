"""Read a SentencePiece `tokenizer.model`: enough protobuf for its pieces and named tokens.

`ModelProto.pieces` is field 1, a message of text (1), score (2, float32) and type (3);
`ModelProto.trainer_spec` is field 2 and gives the ids and texts of the unknown, first and last
token. The rest of the file is skipped, so neither sentencepiece nor protobuf has to be installed
for a plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from dllm_convert.common.foreign_files import MAX_VOCABULARY_BYTES, read_bytes
from dllm_convert.errors import DataError

_NORMAL = 1
_SPECIAL_TYPES = frozenset({2, 3, 5})  # UNKNOWN, CONTROL, UNUSED: never produced by text
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One row of the vocabulary.

    Attributes:
        text: The piece.
        special: Whether no text produces it (unknown, control and unused pieces).
    """

    text: str
    special: bool


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError("a number longer than 64 bits")


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield field number and value of each field of a message."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value: int | bytes
            value, position = _varint(data, position)
        elif wire in (_FIXED64, _FIXED32, _BYTES):
            if wire == _BYTES:
                length, position = _varint(data, position)
            else:
                length = 8 if wire == _FIXED64 else 4
            if position + length > len(data):
                raise ValueError(f"a field of {length} bytes runs past the end")
            value, position = data[position : position + length], position + length
        else:
            raise ValueError(f"wire type {wire}")
        yield number, value


def _piece(data: bytes) -> Piece:
    text, kind = "", _NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 3 and isinstance(value, int):
            kind = value
    return Piece(text, kind in _SPECIAL_TYPES)


@dataclass(frozen=True)
class SentencePieceModel:
    """A SentencePiece model.

    Attributes:
        pieces: Its vocabulary, in id order.
        named: Role (`bos`, `eos`, `unk`) to text, of the tokens that it uses.
    """

    pieces: tuple[Piece, ...]
    named: Mapping[str, str]


# Fields of TrainerSpec: id, its default, text, its default.
_ROLES = {
    "unk": (40, 0, 45, "<unk>"),
    "bos": (41, 1, 46, "<s>"),
    "eos": (42, 2, 47, "</s>"),
}


def _named(spec: bytes) -> dict[str, str]:
    """Return role to text; an id is stored as a number of 64 bits, -1 for none."""
    fields = dict(_fields(spec))
    named = {}
    for role, (id_field, default_id, text_field, default_text) in _ROLES.items():
        row, text = fields.get(id_field, default_id), fields.get(text_field)
        if isinstance(row, int) and row < 1 << 31:
            named[role] = text.decode("utf-8") if isinstance(text, bytes) else default_text
    return named


def read_model(path: Path) -> SentencePieceModel:
    """Read a SentencePiece model.

    Raises:
        DataError: The file cannot be read or is not a SentencePiece model.
    """
    try:
        fields = list(_fields(read_bytes(path, MAX_VOCABULARY_BYTES)))
        pieces = [_piece(v) for number, v in fields if number == 1 and isinstance(v, bytes)]
        specs = [v for number, v in fields if number == 2 and isinstance(v, bytes)]
        named = _named(specs[0]) if specs else {}
    except (ValueError, IndexError) as error:
        raise DataError(
            f"{path.name}: not a SentencePiece model ({error})",
            hint="Its tokenizer.json does as well; a git-lfs pointer is a common cause: download "
            "the file itself",
        ) from error
    if not pieces:
        raise DataError(f"{path.name}: a SentencePiece model without pieces")
    return SentencePieceModel(tuple(pieces), named)
