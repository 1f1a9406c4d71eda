"""Vocabulary files as they are: tokenizer.json, vocab.txt, vocab.json, SentencePiece and tekken.

What a file means beside the others of its folder is the business of `tokenizer_files.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_convert.common.foreign_files import MAX_VOCABULARY_BYTES, read_text
from dllm_convert.errors import DataError
from dllm_convert.source.safetensors_header import load_json_object
from dllm_convert.source.sentencepiece_model import read_model

VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "tekken.json")
"""Files that hold a vocabulary, in the order in which they are believed."""

_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
"""The first ids of tekken files that do not list their special tokens, as the first ones do not."""


@dataclass(frozen=True)
class AddedText:
    """A token beside the vocabulary proper.

    Attributes:
        row: The id that the file gives it; the tokenizers library counts for itself.
        text: The token.
        special: Whether it is one of the protocol, which decoding leaves out.
    """

    row: int
    text: str
    special: bool


@dataclass(frozen=True)
class Vocabulary:
    """What one file says.

    Attributes:
        ids: Text to id of the vocabulary proper.
        added: Tokens beside it, in the order of the file.
        special: Texts of `ids` that no text produces.
        used: Ids that a post-processor or the padding inserts.
        named: Role to text of the tokens that the file itself names.
        byte_level: Whether it works on bytes.
    """

    ids: Mapping[str, int]
    added: tuple[AddedText, ...] = ()
    special: frozenset[str] = frozenset()
    used: frozenset[int] = frozenset()
    named: Mapping[str, str] = field(default_factory=dict)
    byte_level: bool = False

    @property
    def texts(self) -> frozenset[str]:
        """All texts that have an id."""
        return frozenset(self.ids) | {token.text for token in self.added}


def _processor_ids(node: Any) -> Iterator[int]:
    """Yield the ids that a post-processor inserts, at any depth of `Sequence`."""
    if not isinstance(node, Mapping):
        return
    for inner in node.get("processors") or ():
        yield from _processor_ids(inner)
    for entry in (node.get("special_tokens") or {}).values():
        yield from entry.get("ids", ())
    for role in ("sep", "cls"):
        pair = node.get(role)
        if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int):
            yield pair[1]


def _has_byte_level(node: Any) -> bool:
    """Whether a pre-tokenizer or a decoder works on bytes, at any depth of `Sequence`."""
    if not isinstance(node, Mapping):
        return False
    inner = (*(node.get("pretokenizers") or ()), *(node.get("decoders") or ()))
    return node.get("type") == "ByteLevel" or any(_has_byte_level(part) for part in inner)


def _ids(raw: Any) -> dict[str, int]:
    """Return text to id of a vocabulary as JSON: Unigram's pieces with scores, or text to id."""
    pieces = {piece: row for row, (piece, _) in enumerate(raw)} if isinstance(raw, list) else raw
    ids = dict(pieces)
    if not all(isinstance(row, int) and not isinstance(row, bool) for row in ids.values()):
        raise TypeError("an id is not a whole number")
    if any(row < 0 for row in ids.values()):
        raise ValueError("an id is negative")
    return ids


def _from_tokenizer_json(path: Path) -> Vocabulary:
    content = load_json_object(path)
    try:
        model = content["model"]
        ids = _ids(model["vocab"])
        added = tuple(
            AddedText(int(token["id"]), str(token["content"]), bool(token.get("special")))
            for token in content.get("added_tokens") or ()
        )
        used = set(_processor_ids(content.get("post_processor")))
        named: dict[str, str] = {}
        padding = content.get("padding")
        if padding:
            used.add(int(padding["pad_id"]))
            named["pad"] = str(padding["pad_token"])
        if model.get("unk_token") in ids:
            used.add(ids[model["unk_token"]])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path.name}: not a tokenizer of the tokenizers library ({error!r})",
            hint="Save the tokenizer again with save_pretrained",
        ) from error
    byte_level = _has_byte_level(content.get("pre_tokenizer")) or _has_byte_level(
        content.get("decoder")
    )
    return Vocabulary(ids, added, used=frozenset(used), named=named, byte_level=byte_level)


def _from_lines(path: Path) -> Vocabulary:
    lines = read_text(path, MAX_VOCABULARY_BYTES).split("\n")
    if lines and not lines[-1]:
        lines.pop()
    return Vocabulary({line.rstrip(): row for row, line in enumerate(lines)})


def _from_vocab_json(path: Path) -> Vocabulary:
    try:
        return Vocabulary(_ids(load_json_object(path)), byte_level=True)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path.name}: not a vocabulary of text to id ({error})") from error


def _from_sentencepiece(path: Path) -> Vocabulary:
    model = read_model(path)
    return Vocabulary(
        {piece.text: row for row, piece in enumerate(model.pieces)},
        special=frozenset(piece.text for piece in model.pieces if piece.special),
        named=model.named,
    )


def _from_tekken(path: Path) -> Vocabulary:
    """Read Mistral's tekken: special tokens first, then text, `default_vocab_size` in all."""
    content = load_json_object(path)
    try:
        settings = content["config"]
        first = int(settings["default_num_special_tokens"])
        listed = content.get("special_tokens")
        if listed:
            tokens = {str(token["token_str"]): int(token["rank"]) for token in listed}
        else:
            tokens = {text: row for row, text in enumerate(_TEKKEN_SPECIAL)}
        taken = set(tokens.values())
        ids = {f"<SPECIAL_{row}>": row for row in range(first) if row not in taken} | tokens
        used = {row for text, row in tokens.items() if not text.startswith("<SPECIAL_")}
        special = frozenset(ids)
        for token in content["vocab"][: int(settings["default_vocab_size"]) - first]:
            ids.setdefault(token["token_bytes"], first + int(token["rank"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path.name}: not a tekken vocabulary ({error!r})") from error
    return Vocabulary(ids, special=special, used=frozenset(used), byte_level=True)


_READERS = {
    "tokenizer.json": _from_tokenizer_json,
    "vocab.txt": _from_lines,
    "vocab.json": _from_vocab_json,
    "tokenizer.model": _from_sentencepiece,
    "tekken.json": _from_tekken,
}


def read_vocabulary(path: Path) -> Vocabulary:
    """Read one of `VOCABULARY_FILES`.

    Raises:
        DataError: The file is not what its name says.
    """
    return _READERS[path.name](path)
