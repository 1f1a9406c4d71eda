"""Tokens: one mask id everywhere, in range, with an embedding row that can be trained."""

from __future__ import annotations

from typing import Any

import torch

from dllm_convert.errors import DataError
from dllm_convert.verification.instruments.reading import read_rows
from dllm_convert.verification.probes.gated import mask_vector
from dllm_convert.verification.probes.generation_config import (
    check_generation_config,
    read_generation_config,
)
from dllm_convert.verification.probes.text_end import check_text_end
from dllm_convert.verification.probes.vocabulary import check_text, check_vocabulary
from dllm_convert.verification.report import Probe, first_items
from dllm_convert.verification.subject import Subject

MASK_ROW_SHARE = 1e-3
"""Least norm of the mask's row, as a share of the median row's. The mean of n random rows has about
1/sqrt(n) of a row's norm, 0.003 for 128,000 rows; a row that was never written has nearly none, and
such rows blow up gradients at high mask rates (LLaDA2)."""
MASK_ROW_TIMES = 10.0
"""Most norm of the mask's row, in median norms: the start of training takes the same for sound
(`training/expectation.py`). Rows of published models lie within a factor of three of the median."""
_ROWS_AT_ONCE = 1 << 14


def check_tokens(subject: Subject) -> list[Probe]:
    """Return the probes of one mask everywhere, and of nothing else changed."""
    try:
        tokenizer = subject.tokenizer
    except DataError as error:
        return [Probe("tokenizer", False, "does not load", "loads", str(error)), _row(subject)]
    return [
        _ids(subject, tokenizer),
        _row(subject),
        _tokenizer(subject, tokenizer),
        check_text(subject, tokenizer),
        check_generation_config(subject, tokenizer),
        check_text_end(subject, tokenizer),
        *check_vocabulary(subject, tokenizer),
    ]


def _ids(subject: Subject, tokenizer: Any) -> Probe:
    rows = subject.shapes[subject.adapter.embedding][0]
    mask = subject.claim.mask_token_id
    places = {
        "config.json": subject.config.get("mask_token_id"),
        "generation_config.json": read_generation_config(subject.folder).get("mask_token_id"),
        "the tokenizer": tokenizer.mask_token_id,
    }
    wrong = {
        place: f"has mask id {'none' if found is None else found}"
        for place, found in places.items()
        if found != mask
    }
    gated = subject.claim.is_gated
    if mask >= rows and not gated:
        wrong["the embedding"] = f"has {rows} rows"
    return Probe(
        "mask-id",
        not wrong,
        f"{mask} in {sum(found == mask for found in places.values())} of {len(places)} places",
        "the same in all" if gated else f"the same in all, below {rows} rows",
        first_items(wrong),
    )


def _row_norms(subject: Subject) -> torch.Tensor:
    """Return the 2-norm of every row of the input embedding, shape (rows,)."""
    name = subject.adapter.embedding
    header = next(header for header in subject.headers.values() if name in header.entries)
    pieces = read_rows(subject.folder, header, name, at_once=_ROWS_AT_ONCE)
    return torch.cat([piece.float().norm(dim=-1) for piece in pieces])


def _row(subject: Subject) -> Probe:
    required = f"{MASK_ROW_SHARE:g} to {MASK_ROW_TIMES:g}"
    norms = _row_norms(subject)
    mask = subject.claim.mask_token_id
    if subject.claim.is_gated:
        norm = float(mask_vector(subject.folder).norm())
    elif mask >= len(norms):
        return Probe("mask-row", False, f"no row {mask}", required)
    else:
        norm = float(norms[mask])
    median = float(norms.median())
    share = norm / median if median else norm
    return Probe(
        "mask-row",
        MASK_ROW_SHARE <= share <= MASK_ROW_TIMES and norm > 0,
        f"{share:.3g} of the median norm, above {float((norms < norm).float().mean()):.0%} of rows",
        required,
    )


def _tokenizer(subject: Subject, tokenizer: Any) -> Probe:
    """Judge the round trip: the mask's text to its id, alone and inside a text, and back."""
    rows = subject.shapes[subject.adapter.embedding][0]
    claimed, mask = subject.claim.mask_token_id, tokenizer.mask_token
    if subject.claim.is_gated:
        rows = max(rows, claimed + 1)
    wrong: list[str] = []
    if len(tokenizer) > rows:
        wrong.append(f"{len(tokenizer)} tokens for {rows} embedding rows")
    ids = tokenizer(mask, add_special_tokens=False)["input_ids"] if mask else []
    if ids != [claimed]:
        wrong.append(f"the mask's text {mask!r} becomes ids {ids}")
    elif tokenizer(f"a{mask}b")["input_ids"].count(claimed) != 1:
        wrong.append(f"{mask!r} is not found inside a text")
    elif mask not in tokenizer.decode(ids):
        wrong.append(f"id {claimed} decodes as {tokenizer.decode(ids)!r}")
    return Probe(
        "tokenizer",
        not wrong,
        f"{len(tokenizer)} tokens, the mask is {len(ids)}",
        f"at most {rows}, the mask is 1",
        first_items(wrong),
    )
