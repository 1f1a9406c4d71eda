"""Tokens: one mask id everywhere, in range, with an embedding row that can be trained."""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors import safe_open

from dllm_convert.errors import DataError
from dllm_convert.verify.report import Probe, first_items
from dllm_convert.verify.subject import Subject
from dllm_convert.verify.tokenizer_loading import load_tokenizer

MASK_ROW_SHARE = 1e-3
"""Least norm of the mask's row, as a share of the median row's. The mean of n random rows has about
1/sqrt(n) of a row's norm, 0.003 for 128,000 rows; a row that was never written has nearly none, and
such rows blow up gradients at high mask rates (LLaDA2)."""
_ROWS_AT_ONCE = 1 << 14


def check_tokens(subject: Subject) -> list[Probe]:
    """Return the probes `mask-id`, `mask-row` and `tokenizer`."""
    try:
        tokenizer = subject.tokenizer
    except DataError as error:
        return [Probe("tokenizer", False, "does not load", "loads", str(error)), _row(subject)]
    return [_ids(subject, tokenizer), _row(subject), _tokenizer(subject, tokenizer)]


def _generation_config(subject: Subject) -> dict[str, Any]:
    path = subject.folder / "generation_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def _ids(subject: Subject, tokenizer: Any) -> Probe:
    rows = subject.shapes[subject.adapter.embedding][0]
    mask = subject.claim.mask_token_id
    places = {
        "config.json": subject.config.get("mask_token_id"),
        "generation_config.json": _generation_config(subject).get("mask_token_id"),
        "the tokenizer": tokenizer.mask_token_id,
    }
    wrong = {
        place: f"has mask id {'none' if found is None else found}"
        for place, found in places.items()
        if found != mask
    }
    if mask >= rows:
        wrong["the embedding"] = f"has {rows} rows"
    return Probe(
        "mask-id",
        not wrong,
        f"{mask} in {sum(found == mask for found in places.values())} of {len(places)} places",
        f"the same in all, below {rows} rows",
        first_items(wrong),
    )


def _row_norms(subject: Subject) -> torch.Tensor:
    """Return the 2-norm of every row of the input embedding, shape (rows,)."""
    name = subject.adapter.embedding
    file = next(file for file, header in subject.headers.items() if name in header.entries)
    norms: list[torch.Tensor] = []
    with safe_open(subject.folder / file, framework="pt") as shard:
        matrix = shard.get_slice(name)
        for first in range(0, subject.shapes[name][0], _ROWS_AT_ONCE):
            norms.append(matrix[first : first + _ROWS_AT_ONCE].float().norm(dim=-1))
    return torch.cat(norms)


def _row(subject: Subject) -> Probe:
    required = f"at least {MASK_ROW_SHARE:g}"
    norms = _row_norms(subject)
    mask = subject.claim.mask_token_id
    if mask >= len(norms):
        return Probe("mask-row", False, f"no row {mask}", required)
    norm, median = float(norms[mask]), float(norms.median())
    return Probe(
        "mask-row",
        norm >= MASK_ROW_SHARE * median and norm > 0,
        f"{norm / median if median else norm:.3g} of the median norm",
        required,
    )


def _tokenizer(subject: Subject, tokenizer: Any) -> Probe:
    rows = subject.shapes[subject.adapter.embedding][0]
    wrong: list[str] = []
    if len(tokenizer) > rows:
        wrong.append(f"{len(tokenizer)} tokens for {rows} embedding rows")
    mask = tokenizer.mask_token
    ids = tokenizer(mask, add_special_tokens=False)["input_ids"] if mask else []
    if ids != [subject.claim.mask_token_id]:
        wrong.append(f"the mask's text {mask!r} becomes ids {ids}")
    if subject.against is not None and not tokenizer.chat_template:
        base = load_tokenizer(subject.against)
        if base.chat_template:
            wrong.append("the base has a chat template, this tokenizer has none")
    return Probe(
        "tokenizer",
        not wrong,
        f"{len(tokenizer)} tokens, the mask is {len(ids)}",
        f"at most {rows}, the mask is 1",
        first_items(wrong),
    )
