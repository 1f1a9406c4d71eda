"""A tokenizer in the keys of a GGUF file, as llama.cpp's own tokenizer reads them.

Two differences are llama.cpp's and stay: its cut of Mistral's tekken knows no combining marks, and
where a space is put before a text it puts one before a text that begins with a space, too, and
behind tokens of the protocol.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.text_bounds import bounds_of

_NORMAL, _UNKNOWN, _CONTROL, _TYPED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
"""Types of a token: of the vocabulary, unknown, of the protocol, added by somebody, no token, a
byte."""
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+|[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_PRE: Mapping[tuple[str, ...], str] = {
    ("bytes of words",): "gpt-2",
    ("single digits", "bytes of words"): "smollm",
    (_LLAMA3, "bytes"): "llama-bpe",
    (_QWEN2, "bytes"): "qwen2",
    (_TEKKEN, "bytes"): "tekken",
}
"""How text is cut before merging, to the name that llama.cpp has for it."""
_WHOLE_WORDS = frozenset({"llama-bpe", "tekken"})
"""Those for which a word that is a token is taken as it stands, whatever merging makes of it."""
_SPACE = "▁"


@dataclass(frozen=True)
class _Cut:
    """What is known of a tokenizer.json.

    Attributes:
        model: Its model: vocabulary and merges.
        added: Tokens beside the vocabulary, or named in it.
        steps: How text is cut, one text per step.
        spaced: Whether a space is put before a text.
    """

    model: Mapping[str, Any]
    added: Sequence[Mapping[str, Any]]
    steps: tuple[str, ...]
    spaced: bool

    @property
    def is_bytes(self) -> bool:
        """Whether its tokens are made of bytes, each shown as a letter."""
        return any(step.startswith("bytes") for step in self.steps)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> _Cut:
        """Read a tokenizer.json."""
        steps = [_step(node) for node in _flat(content.get("pre_tokenizer"), "pretokenizers")]
        before = list(_flat(content.get("normalizer"), "normalizers"))
        spaced = any(node["type"] == "Prepend" for node in before) or any(
            step in ("spaces always", "spaces first") for step in steps
        )
        return cls(content["model"], content.get("added_tokens") or (), tuple(steps), spaced)


def _flat(node: Mapping[str, Any] | None, inner: str) -> Iterator[Mapping[str, Any]]:
    if node is None:
        return
    if node["type"] == "Sequence":
        for part in node[inner]:
            yield from _flat(part, inner)
    else:
        yield node


def _step(node: Mapping[str, Any]) -> str:
    """Say in a text what a step of cutting does; two that do the same are the same text."""
    kind = node["type"]
    if kind == "ByteLevel" and not node.get("add_prefix_space"):
        return "bytes of words" if node.get("use_regex", True) else "bytes"
    if kind == "Digits" and node.get("individual_digits"):
        return "single digits"
    if kind == "Metaspace" and node.get("replacement") == _SPACE:
        return f"spaces {node.get('prepend_scheme', 'always')}"
    pattern = (node.get("pattern") or {}).get("Regex")
    if kind == "Split" and pattern and node.get("behavior") == "Isolated":
        return str(pattern)
    return json.dumps(node, sort_keys=True)


def tokenizer_keys(
    tokenizer: Any, *, rows: int, mask: int, ends: Sequence[int] = ()
) -> dict[str, Any]:
    """Return what llama.cpp's own tokenizer is built from.

    Args:
        tokenizer: A fast tokenizer of transformers.
        rows: Rows of the embedding: as many tokens have to be named.
        mask: Id of the mask.
        ends: Ids at which a text ends.

    Raises:
        IncompatibleError: llama.cpp has no tokenizer that does the same.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unlike(f"it is a {type(tokenizer).__name__}, which has no tokenizer.json")
    cut = _Cut.of(json.loads(backend.to_str()))
    kind = cut.model.get("type")
    if kind != "BPE":
        raise _unlike(f"its model is {kind}, and here BPE is written")
    known = _byte_level(cut) if cut.is_bytes else _sentencepiece(cut)
    texts, types = _tokens(cut, rows)
    bounds = bounds_of(tokenizer)
    ids = {
        name: getattr(tokenizer, f"{name}_token_id")
        for name in ("bos", "eos", "unk", "pad")
        if getattr(tokenizer, f"{name}_token_id") is not None
    }
    found = {
        **known,
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.mask_token_id": mask,
        "tokenizer.ggml.add_bos_token": bool(bounds.begin) and bounds.begin[0] == ids.get("bos"),
        "tokenizer.ggml.add_eos_token": bool(bounds.closing)
        and bounds.closing[-1] == ids.get("eos"),
    }
    for name, key in (
        ("bos", "bos_token_id"),
        ("eos", "eos_token_id"),
        ("unk", "unknown_token_id"),
        ("pad", "padding_token_id"),
    ):
        if name in ids:
            found[f"tokenizer.ggml.{key}"] = int(ids[name])
    turn = [end for end in ends if end != ids.get("eos")]
    if turn:
        found["tokenizer.ggml.eot_token_id"] = turn[0]
    if not cut.is_bytes:
        found["tokenizer.ggml.scores"] = _scores(cut, texts)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if template:
        found["tokenizer.chat_template"] = template
    return found


def _byte_level(cut: _Cut) -> dict[str, Any]:
    """Return the keys of a vocabulary of bytes, with the merges in order."""
    name = _PRE.get(cut.steps)
    if name is None:
        raise _unlike(f"its text is cut by {' then '.join(cut.steps)}, which has no name there")
    if bool(cut.model.get("ignore_merges")) != (name in _WHOLE_WORDS):
        raise _unlike(
            f"its ignore_merges is {bool(cut.model.get('ignore_merges'))}, "
            f"{name in _WHOLE_WORDS} where text is cut so"
        )
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in _merges(cut.model)],
    }


def _sentencepiece(cut: _Cut) -> dict[str, Any]:
    """Return the keys of a vocabulary of characters, with bytes for those it lacks."""
    spaces = [step for step in cut.steps if not step.startswith("spaces ")]
    if spaces or not cut.model.get("byte_fallback"):
        cause = " then ".join(spaces) or "no step, and it has no bytes for unknown characters"
        raise _unlike(f"its text is cut by {cause}, which has no name there")
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.add_space_prefix": cut.spaced,
    }


def _merges(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for merge in model["merges"]:
        first, second = merge.split(" ") if isinstance(merge, str) else merge
        yield first, second


def _tokens(cut: _Cut, rows: int) -> tuple[list[str], list[int]]:
    """Return text and type of every row; those that are no token are named after their number."""
    texts, types = [f"[PAD{row}]" for row in range(rows)], [_UNUSED] * rows
    unknown = cut.model.get("unk_token")
    for text, row in cut.model["vocab"].items():
        texts[row], types[row] = text, _NORMAL
        if not cut.is_bytes and len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
            types[row] = _BYTE
    for token in cut.added:
        row = token["id"]
        texts[row], types[row] = token["content"], _CONTROL if token["special"] else _TYPED
    for row, text in enumerate(texts):
        if text == unknown and types[row] != _UNUSED and not cut.is_bytes:
            types[row] = _UNKNOWN
    return texts, types


def _scores(cut: _Cut, texts: Sequence[str]) -> list[float]:
    """Return how early a token is merged: the place of the merge that makes it, counted down."""
    ranks: dict[str, int] = {}
    for rank, pair in enumerate(_merges(cut.model)):
        ranks.setdefault("".join(pair), rank)
    # What no merge makes is never merged to.
    return [-float(ranks.get(text, len(ranks) + row)) for row, text in enumerate(texts)]


def _unlike(what: str) -> IncompatibleError:
    return IncompatibleError(
        f"llama.cpp has no tokenizer that does what this one does: {what}",
        hint="Sample it with dllm-convert in torch, or with an engine that reads tokenizer.json",
    )
