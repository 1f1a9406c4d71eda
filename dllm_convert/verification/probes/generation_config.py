"""The generation config: does it denoise what the checkpoint is, and stop where the base stops?"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_convert.source.tokenizer_files import ID_ROLES
from dllm_convert.verification.report import Probe, first_items, skipped
from dllm_convert.verification.subject import Subject

_LEAST: Mapping[str, float] = {
    "max_new_tokens": 1,
    "max_denoising_steps": 1,
    "confidence_threshold": 0,
    "temperature": 0,
}


def read_generation_config(folder: Path) -> dict[str, Any]:
    """Return generation_config.json, empty if there is none."""
    path = folder / "generation_config.json"
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content if isinstance(content, dict) else {}


def check_generation_config(subject: Subject, tokenizer: Any) -> Probe:
    """Return the probe `generation-config`.

    The end of a text may have several ids and need not be the config's: chat models end a turn with
    another token than a document. It has to be the base's, or one that config or tokenizer name.
    """
    found = read_generation_config(subject.folder)
    wrong: dict[str, str] = {}
    block = found.get("block_size", subject.claim.block_size)
    if block != subject.claim.block_size:
        wrong["block_size"] = f"is {block}, claimed is {subject.claim.block_size}"
    for name, least in _LEAST.items():
        value = found.get(name)
        if value is not None and not (_is_number(value) and value >= least):
            wrong[name] = f"is {value!r}, expected at least {least:g}"
    rows = subject.shapes[subject.adapter.embedding][0]
    for role in ID_ROLES:
        ids = _ids(found.get(f"{role}_token_id"))
        known = _known(subject, tokenizer, role)
        if any(not 0 <= token < rows for token in ids):
            wrong[f"{role}_token_id"] = f"is {sorted(ids)}, the embedding has {rows} rows"
        elif ids and known and not ids & known:
            wrong[f"{role}_token_id"] = f"is {sorted(ids)}, expected {sorted(known)}"
        elif subject.claim.mask_token_id in ids:
            wrong[f"{role}_token_id"] = "is the mask"
    if not found:
        return skipped("generation-config", "0", "generation_config.json is missing or empty")
    return Probe(
        "generation-config",
        not wrong,
        f"{len(wrong)} of {len(found)} fields wrong",
        "0",
        first_items(wrong),
    )


def _known(subject: Subject, tokenizer: Any, role: str) -> set[int]:
    if subject.against is not None:
        base = _ids(read_generation_config(subject.against).get(f"{role}_token_id"))
        if base:
            return base
    own = getattr(tokenizer, f"{role}_token_id", None)
    return _ids(subject.config.get(f"{role}_token_id")) | _ids(own)


def _ids(value: Any) -> set[int]:
    values = value if isinstance(value, list) else [value]
    return {token for token in values if isinstance(token, int) and not isinstance(token, bool)}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
