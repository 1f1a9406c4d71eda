"""Write generation_config.json, and the padding token that batches of prompts need.

Both follow the tokenizer's files, which are written before them: where a text ends is asked of the
tokenizer that the conversion has, not of the plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.common.json_files import write_config
from dllm_convert.modeling.text_bounds import (
    TextBounds,
    bounds_of,
    end_set,
    find_bounds,
    stated_ids,
)
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.planning.mask_token import unused_ids
from dllm_convert.source.chat_turns import read_template, turn_end
from dllm_convert.source.safetensors_header import load_json_object
from dllm_convert.source.tokenizer_classes import GENERIC, loading_class
from dllm_convert.source.tokenizer_files import ID_ROLES
from dllm_convert.source.tokenizer_loading import TokenizerErrors, load_tokenizer

GENERATION_FILE = "generation_config.json"
_TOKENIZER, _SETTINGS, _MAP = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"
_PAD_TEXTS = ("<pad>", "<|pad|>", "[PAD]", "<|PAD|>", "<|finetune_right_pad_id|>")
"""Texts of padding tokens that vendors ship without naming them."""


@dataclass(frozen=True)
class _Written:
    """What the written tokenizer says.

    Attributes:
        bounds: What it puts around every text.
        special: Text of each special token to its id.
    """

    bounds: TextBounds
    special: Mapping[str, int]


def _read(folder: Path, model_type: str) -> _Written:
    """Ask the written tokenizer; without transformers where its rules add nothing to the file.

    A class of its own builds the tokenizer anew, and what is put around a text with it:
    `RobertaTokenizer` closes every text, whatever tokenizer.json says.
    """
    declared = _optional(folder / _SETTINGS).get("tokenizer_class")
    kind = loading_class(model_type, declared, byte_level=False)
    if kind != GENERIC or not (folder / _TOKENIZER).is_file():
        loaded = load_tokenizer(folder)
        added = loaded.added_tokens_decoder.items()
        return _Written(bounds_of(loaded), {t.content: i for i, t in added if t.special})
    from tokenizers import Tokenizer

    with TokenizerErrors(f"{_TOKENIZER}: tokenizers cannot read it"):
        tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        bounds = find_bounds(
            lambda text, wanted: tokenizer.encode(text, add_special_tokens=wanted).ids
        )
    added = tokenizer.get_added_tokens_decoder().items()
    return _Written(bounds, {token.content: row for row, token in added if token.special})


def _optional(path: Path) -> dict[str, Any]:
    return load_json_object(path) if path.is_file() else {}


def _turn_end(plan: ConversionPlan, out: Path, written: _Written) -> int | None:
    template = read_template(out)
    if template is None:
        return None
    roles = {f"{role}_token": text for role, text in plan.source.tokenizer.named.items()}
    text = turn_end(template, roles, written.special)
    return None if text is None else written.special[text]


def _end_token(plan: ConversionPlan) -> int | None:
    """What training ends a text with, as `text_bounds.end_token` finds it once it is loaded."""
    tokenizer = plan.source.tokenizer
    ids = {role: tokenizer.vocab[text] for role, text in tokenizer.named.items()}
    return ids.get("eos", ids.get("sep"))


def choose_padding(
    plan: ConversionPlan, stated: tuple[int, ...], ends: tuple[int, ...]
) -> tuple[str, int] | None:
    """Choose a padding token for a tokenizer without one; None if it names one, or there is none.

    What the base's configs name; a token that is there for it; the unknown token; an end that is
    not the tokenizer's; the tokenizer's, which serves as well here, for nothing is left out of a
    loss by comparing ids.

    Args:
        plan: The conversion.
        stated: Ids that the base's configs give to padding.
        ends: Tokens that end a text.

    Returns:
        Text and id.
    """
    tokenizer = plan.source.tokenizer
    if "pad" in tokenizer.named:
        return None
    by_id = {row: text for text, row in tokenizer.vocab.items()}
    unknown, *roles = (tokenizer.named.get(role) for role in ("unk", "eos", "sep", "bos"))
    others = [text for text in map(by_id.get, ends) if text not in roles]
    texts = (*map(by_id.get, stated), *_PAD_TEXTS, unknown, *others, *roles)
    for text in texts:
        if text in tokenizer.special and tokenizer.vocab[text] != plan.mask.id:
            return str(text), tokenizer.vocab[text]
    return None


def name_padding(folder: Path, text: str) -> None:
    """Name a token of the vocabulary as the padding, on the left, where prompts are padded."""
    settings = _optional(folder / _SETTINGS)
    write_config(folder / _SETTINGS, {**settings, "pad_token": text, "padding_side": "left"})
    if (folder / _MAP).is_file():
        write_config(folder / _MAP, {**_optional(folder / _MAP), "pad_token": text})


def _suppressed(plan: ConversionPlan) -> list[int]:
    """Return the ids that decoding never writes: the base's, and those that no token has."""
    stated = plan.source.generation.get("suppress_tokens")
    base = stated if isinstance(stated, list) else []
    rows = range(plan.mask.rows_after)
    unused = unused_ids(plan.source.tokenizer, plan.mask)
    ids = {token for token in base if _is_id(token) and token in rows and token != plan.mask.id}
    return sorted(ids.union(*(range(first, end) for first, end in unused)))


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def write_generation(plan: ConversionPlan, out: Path) -> None:
    """Write generation_config.json into a folder that has its tokenizer, and name its padding.

    Args:
        plan: The conversion.
        out: Folder of the conversion.

    Raises:
        DataError: The tokenizer's files cannot be read.
        IncompatibleError: The base's files name an end that is no id.
    """
    config, base = plan.source.config, plan.source.generation
    stated = {role: stated_ids(role, config, base) for role in ID_ROLES}
    written = _read(out, str(config.get("model_type")))
    closing = written.bounds.closing
    ends = end_set(stated["eos"], _end_token(plan), _turn_end(plan, out, written), closing)
    padding = choose_padding(plan, stated["pad"], ends)
    if padding is not None:
        text, row = padding
        name_padding(out, text)
        stated["pad"] = (row,)
    ids: dict[str, Any] = {
        "bos": stated["bos"][0] if stated["bos"] else None,
        "eos": ends[0] if len(ends) == 1 else list(ends) or None,
        "pad": stated["pad"][0] if stated["pad"] else None,
    }
    chosen = plan.recipe.generation
    settings = {
        **{f"{role}_token_id": value for role, value in ids.items()},
        "closing_token_ids": list(closing),
        "suppress_tokens": _suppressed(plan) or None,
        "mask_token_id": plan.mask.id,
        # transformers takes a temperature for a mistake unless sampling is said to be meant.
        "temperature": chosen.temperature or None,
        "do_sample": True if chosen.temperature else None,
        "block_size": plan.recipe.block_size,
        **chosen.model_dump(exclude={"temperature", "approximate_cache"}),
        "approximate_cache": chosen.approximate_cache or None,
    }
    known = {key: value for key, value in settings.items() if value is not None}
    write_config(out / GENERATION_FILE, known)
