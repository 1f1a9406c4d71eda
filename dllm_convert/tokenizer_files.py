"""Read from tokenizer files what the mask-token rules need, without transformers.

A loaded tokenizer would answer the same questions, after four seconds of imports; and a plan for a
checkpoint on the Hub has only these small files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dllm_convert.errors import DataError
from dllm_convert.safetensors_header import load_json, load_json_object
from dllm_convert.sentencepiece_model import read_pieces
from dllm_convert.source_info import TokenizerInfo

VOCABULARY_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model", "tekken.json")
"""Files that hold a vocabulary, in the order in which they are believed."""

SIDE_FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)

_TEKKEN_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]"),
    *("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    "[TOOL_CONTENT]",
)
"""The first ids of tekken files that do not list their special tokens, as the first ones do not."""

NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls")
_ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")


def build_info(
    vocab: dict[str, int],
    *,
    special: Iterable[str],
    named: Mapping[str, str],
    templates: Iterable[str],
    used_ids: Iterable[int],
) -> TokenizerInfo:
    """Assemble a TokenizerInfo.

    Args:
        vocab: Token text to id; named tokens that are missing are appended, as at loading.
        special: Texts the tokenizer treats as special.
        named: Role (`bos`, ..., `mask`) to text.
        templates: Chat templates.
        used_ids: Ids used by post-processors and configs.
    """
    for text in named.values():
        vocab.setdefault(text, max(vocab.values(), default=-1) + 1)
    special_set = (frozenset(special) & vocab.keys()) | frozenset(named.values())
    reachable = {vocab[text] for role, text in named.items() if role != "mask"} | set(used_ids)
    for template in templates:
        reachable |= {vocab[text] for text in special_set if text in template}
    return TokenizerInfo(
        vocab=vocab,
        special=special_set,
        reachable=frozenset(reachable),
        size=max(vocab.values(), default=-1) + 1,
        mask_token=named.get("mask"),
        named=dict(named),
    )


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


def _from_tokenizer_json(path: Path) -> tuple[dict[str, int], set[str], set[int], str | None]:
    content = load_json_object(path)
    try:
        model = content["model"]
        raw = model["vocab"]
        # Unigram models list [piece, score]; the others map text to id.
        vocab = (
            {piece: row for row, (piece, _) in enumerate(raw)}
            if isinstance(raw, list)
            else dict(raw)
        )
        special = set()
        for token in content.get("added_tokens") or ():
            vocab[token["content"]] = token["id"]
            if token.get("special"):
                special.add(token["content"])
        used = set(_processor_ids(content.get("post_processor")))
        if content.get("padding"):
            used.add(content["padding"]["pad_id"])
        if not all(isinstance(row, int) for row in vocab.values()):
            raise TypeError("an id is not a number")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{path.name}: not a tokenizer of the tokenizers library ({error!r})",
            hint="Save the tokenizer again with save_pretrained",
        ) from error
    unknown = model.get("unk_token") if isinstance(model, Mapping) else None
    return vocab, special, used, unknown


def _read_lines(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path.name}: cannot be read as UTF-8 text ({error})") from error
    if lines and not lines[-1]:
        lines.pop()
    return {line.rstrip("\r"): row for row, line in enumerate(lines)}


def _from_tekken(path: Path) -> tuple[dict[str, int], set[str], set[int]]:
    """Read Mistral's tekken: special tokens first, then text, `default_vocab_size` in all."""
    content = load_json_object(path)
    try:
        settings = content["config"]
        first = int(settings["default_num_special_tokens"])
        listed = content.get("special_tokens")
        if listed:
            named = {str(token["token_str"]): int(token["rank"]) for token in listed}
        else:
            named = {text: row for row, text in enumerate(_TEKKEN_SPECIAL)}
        taken = set(named.values())
        vocab = {f"<SPECIAL_{row}>": row for row in range(first) if row not in taken} | named
        used = {row for text, row in named.items() if not text.startswith("<SPECIAL_")}
        special = set(vocab)
        for token in content["vocab"][: int(settings["default_vocab_size"]) - first]:
            vocab.setdefault(token["token_bytes"], first + int(token["rank"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{path.name}: not a tekken vocabulary ({error!r})") from error
    return vocab, special, used


def _read_vocabulary(folder: Path) -> tuple[dict[str, int], set[str], set[int], dict[str, str]]:
    """Return vocab, special texts, used ids and named tokens of the first vocabulary file."""
    found = next((name for name in VOCABULARY_FILES if (folder / name).is_file()), None)
    path = folder / (found or "")
    if found == "tokenizer.json":
        vocab, special, used, unknown = _from_tokenizer_json(path)
        return vocab, special, used, {"unk": unknown} if unknown else {}
    if found == "vocab.txt":
        vocab = _read_lines(path)
        # BertTokenizer's defaults hold where tokenizer_config.json says nothing.
        defaults = {
            "unk": "[UNK]",
            "sep": "[SEP]",
            "pad": "[PAD]",
            "cls": "[CLS]",
            "mask": "[MASK]",
        }
        named = {role: text for role, text in defaults.items() if text in vocab}
        return vocab, set(named.values()), set(), named
    if found == "vocab.json":
        vocab = load_json_object(path)
        defaults = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "pad": "<pad>", "mask": "<mask>"}
        return vocab, set(), set(), {r: t for r, t in defaults.items() if t in vocab}
    if found == "tokenizer.model":
        pieces = read_pieces(path)
        vocab = {piece.text: row for row, piece in enumerate(pieces)}
        return vocab, {piece.text for piece in pieces if piece.special}, set(), {}
    if found == "tekken.json":
        vocab, special, used = _from_tekken(path)
        return vocab, special, used, {}
    raise DataError(
        f"no tokenizer in {folder}: expected one of {', '.join(VOCABULARY_FILES)}",
        hint="Put the tokenizer of the base model beside the weights",
    )


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
            try:
                yield path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise DataError(f"{path.name}: cannot be read as UTF-8 text ({error})") from error


def _optional(path: Path) -> dict[str, Any]:
    return load_json_object(path) if path.is_file() else {}


def read_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerInfo:
    """Read the tokenizer of a checkpoint folder.

    Args:
        folder: Folder with the tokenizer files.
        config: The model's config, whose token ids count as used.

    Raises:
        DataError: There is no tokenizer, or one of its files is broken.
    """
    vocab, special, used, named = _read_vocabulary(folder)
    added = folder / "added_tokens.json"
    if added.is_file():
        extra = load_json(added)
        vocab.update(extra if isinstance(extra, dict) else {})
    settings = _optional(folder / "tokenizer_config.json")
    for row, token in (settings.get("added_tokens_decoder") or {}).items():
        text = _text(token)
        if text is not None and str(row).isdecimal():
            vocab[text] = int(row)
            special |= {text} if isinstance(token, Mapping) and token.get("special") else set()
    for source in (_optional(folder / "special_tokens_map.json"), settings):
        for role in (*NAMED_TOKENS, "mask"):
            text = _text(source.get(f"{role}_token"))
            if text is not None:
                named[role] = text
    generation = _optional(folder / "generation_config.json")
    return build_info(
        vocab,
        special=special,
        named=named,
        templates=_templates(folder, settings),
        used_ids={*used, *config_ids(config, generation)},
    )
