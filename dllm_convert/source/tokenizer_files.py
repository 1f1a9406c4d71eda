"""Read from tokenizer files what the mask-token rules need, without transformers.

A loaded tokenizer would answer the same questions, after four seconds of imports; and a plan for a
checkpoint on the Hub has only these small files. The files are read by the rules of
`AutoTokenizer`, which a test compares with it: which class is loaded and what it has by itself
(`tokenizer_classes.py`), which file is believed over which, and which id a token gets.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dllm_convert.common.foreign_files import read_text
from dllm_convert.errors import DataError
from dllm_convert.source.info import TokenizerInfo
from dllm_convert.source.safetensors_header import load_json_object
from dllm_convert.source.tokenizer_classes import GENERIC, default_tokens, loading_class
from dllm_convert.source.tokenizer_settings import check_settings
from dllm_convert.source.vocabulary_files import (
    VOCABULARY_FILES,
    AddedText,
    Vocabulary,
    read_vocabulary,
)

__all__ = ["SIDE_FILES", "VOCABULARY_FILES", "build_info", "config_ids", "read_tokenizer"]

SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
KEPT_ROLES = tuple(role for role in ROLES if role != "mask")
"""Roles that a conversion leaves to the tokens that have them."""
ID_ROLES = ("bos", "eos", "pad")
"""Roles that configs name by id."""
"""Names of tokens, in the order in which transformers adds those that a vocabulary lacks."""
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
_SPACES = " ▁Ġ"
"""How vocabularies write the space before a word."""
_EXTRA = ("extra_special_tokens", "additional_special_tokens")


def build_info(
    vocab: dict[str, int],
    *,
    special: Iterable[str],
    named: Mapping[str, str],
    templates: Iterable[str],
    used_ids: Iterable[int],
    proper: int | None = None,
    beside: Iterable[str] = (),
    file: str | None = None,
    declared_class: str | None = None,
    code: str | None = None,
) -> TokenizerInfo:
    """Assemble a TokenizerInfo.

    Args:
        vocab: Token text to id; named tokens that are missing are appended, as at loading.
        special: Texts the tokenizer treats as special.
        named: Role (`bos`, ..., `mask`) to text.
        templates: Chat templates.
        used_ids: Ids used by post-processors and configs.
        proper: Rows that the vocabulary without added tokens needs.
        beside: Texts that the vocabulary file lacks.
        file: Name of the vocabulary file.
        declared_class: `tokenizer_class` of the folder.
        code: Class of the folder's own code that `auto_map` names.
    """
    for text in named.values():
        vocab.setdefault(text, max(vocab.values(), default=-1) + 1)
    special = frozenset(special)
    mask = named.get("mask")
    special_set = (special & vocab.keys()) | frozenset(named.values())
    reachable = {vocab[text] for role, text in named.items() if role != "mask"} | set(used_ids)
    for template in templates:
        reachable |= {vocab[text] for text in special_set if text in template}
    return TokenizerInfo(
        vocab=vocab,
        special=special_set,
        reachable=frozenset(reachable),
        size=max(vocab.values(), default=-1) + 1,
        mask_token=mask,
        proper=proper,
        beside=tuple(beside),
        mask_is_word=mask is not None and mask not in special and _is_word(mask),
        file=file,
        declared_class=declared_class,
        code=code,
        named=dict(named),
    )


def _is_word(text: str) -> bool:
    """Whether text has a token as it stands: letters and digits, or one character."""
    plain = text.strip(_SPACES)
    return len(plain) == 1 or plain.isalnum()


def config_ids(*configs: Mapping[str, Any]) -> Iterator[int]:
    """Yield the token ids that model and generation configs use, the mask token's left out."""
    for config in configs:
        for key, value in config.items():
            is_id = key.endswith("_token_id") and key != "mask_token_id"
            if not (is_id or key in _ID_LISTS):
                continue
            values = value if isinstance(value, list) else [value]
            yield from (v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _text(value: object) -> str | None:
    """Return the text of a token that may be written as text or as an AddedToken."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


@dataclass(frozen=True)
class _SideFiles:
    """What stands beside the vocabulary.

    Attributes:
        settings: tokenizer_config.json.
        listed: special_tokens_map.json, empty where transformers does not read it.
        added: Tokens beside the vocabulary.
        complete: Whether they are all: `added_tokens_decoder` leaves nothing to other files.
    """

    settings: Mapping[str, Any]
    listed: Mapping[str, Any]
    added: tuple[AddedText, ...]
    complete: bool

    def names(self, defaults: Mapping[str, str]) -> dict[str, str]:
        """Return role to text: of the files, or where they do not speak of a role, of the class."""
        named: dict[str, str | None] = dict(defaults)
        for file in (self.settings, self.listed):
            for role in ROLES:
                # A null says that the class's own token is not there.
                if f"{role}_token" in file:
                    named[role] = _text(file[f"{role}_token"])
        return {role: text for role in ROLES if (text := named.get(role)) is not None}

    def extra(self) -> Iterator[str]:
        """Yield the special tokens that have a role of the model's own, then those without one."""
        own = (
            k for k in self.settings if k.endswith("_token") and k[: -len("_token")] not in ROLES
        )
        yield from (text for key in own if isinstance(text := self.settings[key], str) and text)
        stated = (file.get(key) for file in (self.settings, self.listed) for key in _EXTRA)
        value = next((value for value in stated if value), ())
        entries = value.values() if isinstance(value, Mapping) else value
        yield from (text for entry in entries if (text := _text(entry)))


def _read_side_files(folder: Path) -> _SideFiles:
    settings = _optional(folder / "tokenizer_config.json")
    check_settings(settings, "tokenizer_config.json", ROLES)
    decoder = settings.get("added_tokens_decoder")
    if isinstance(decoder, Mapping):
        # Written since transformers 4.34; the older files beside it are leftovers.
        added = tuple(
            AddedText(int(row), text, bool(_mapping(token).get("special")))
            for row, token in decoder.items()
            if str(row).isdecimal() and (text := _text(token)) is not None
        )
        return _SideFiles(settings, {}, added, complete=True)
    listed = _optional(folder / "special_tokens_map.json")
    check_settings(listed, "special_tokens_map.json", ROLES)
    side = _SideFiles(settings, listed, (), complete=False)
    older = _optional(folder / "added_tokens.json")
    if not all(isinstance(row, int) for row in older.values()):
        raise DataError("added_tokens.json: an id is not a whole number")
    special = {*side.names({}).values(), *side.extra()}
    return replace(
        side, added=tuple(AddedText(row, text, text in special) for text, row in older.items())
    )


class _Ids:
    """Gives ids as the tokenizers library does: by order, whatever id a file writes beside."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.ids = dict(vocabulary.ids)
        self._size, self._last = len(self.ids), -1

    def add(self, text: str) -> None:
        """Add a token, or remember that one of the vocabulary is an added token too."""
        if text not in self.ids:
            self.ids[text] = max(self._last + 1, self._size)
        self._last = max(self._last, self.ids[text])


def _templates(folder: Path, settings: Mapping[str, Any]) -> Iterator[str]:
    inline = settings.get("chat_template")
    if isinstance(inline, str):
        yield inline
    elif isinstance(inline, list):
        yield from (json.dumps(entry, ensure_ascii=False) for entry in inline)
    files = [folder / "chat_template.jinja", folder / "chat_template.json"]
    files += sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in files:
        if path.is_file():
            yield read_text(path)


def _optional(path: Path) -> dict[str, Any]:
    return load_json_object(path) if path.is_file() else {}


def _vocabulary_file(folder: Path, declared: str | None) -> Path:
    """Return the file that holds the vocabulary: tokenizer.json, or what the class reads."""
    words = "vocab.txt" if declared and "Bert" in declared else None
    order = ("tokenizer.json", *([words] if words else []), *VOCABULARY_FILES)
    found = next((name for name in order if (folder / name).is_file()), None)
    if found is None:
        raise DataError(
            f"no tokenizer in {folder}: expected one of {', '.join(VOCABULARY_FILES)}",
            hint="Put the tokenizer of the base model beside the weights",
        )
    return folder / found


def _own_code(settings: Mapping[str, Any]) -> str | None:
    """Return the class that `auto_map` names, as in `tokenization_x.XTokenizer`."""
    entry = settings.get("auto_map")
    if isinstance(entry, Mapping):
        entry = entry.get("AutoTokenizer")
    names = entry if isinstance(entry, list) else [entry]
    return next((name for name in reversed(names) if isinstance(name, str)), None)


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerInfo:
    """Read the tokenizer of a checkpoint folder.

    Args:
        folder: Folder with the tokenizer files.
        config: The model's config, whose token ids count as used.

    Raises:
        DataError: There is no tokenizer, or one of its files is broken.
    """
    side = _read_side_files(folder)
    declared = side.settings.get("tokenizer_class") or config.get("tokenizer_class")
    declared = declared if isinstance(declared, str) else None
    path = _vocabulary_file(folder, declared)
    vocabulary = read_vocabulary(path)
    kind = loading_class(
        str(config.get("model_type")),
        declared,
        byte_level=path.name == "tokenizer.json" and vocabulary.byte_level,
    )
    defaults = {**vocabulary.named, **default_tokens(kind)}
    if kind == GENERIC and path.name in ("vocab.txt", "vocab.json"):
        defaults |= {"bos": "<s>", "eos": "</s>"}
    named = side.names(defaults)
    beside = {token.row: token for token in side.added}
    if not side.complete:
        beside |= {token.row: token for token in vocabulary.added}
    ids = _Ids(vocabulary)
    # A class of its own builds the tokenizer anew, from the vocabulary proper.
    whole = vocabulary.added if kind == GENERIC else ()
    for token in (*whole, *(beside[row] for row in sorted(beside))):
        ids.add(token.text)
    extra = list(side.extra())
    for text in (*named.values(), *extra):
        ids.add(text)
    special = {t.text for t in (*vocabulary.added, *beside.values()) if t.special}
    generation = _optional(folder / "generation_config.json")
    return build_info(
        ids.ids,
        special={*vocabulary.special, *extra, *special},
        named=named,
        templates=_templates(folder, side.settings),
        used_ids={*vocabulary.used, *config_ids(config, generation)},
        proper=max(vocabulary.ids.values(), default=-1) + 1,
        beside=sorted(ids.ids.keys() - vocabulary.texts, key=ids.ids.__getitem__),
        file=path.name,
        declared_class=declared,
        code=_own_code(side.settings),
    )
