"""Config against the base's: what the conversion does not mean to change is as it was.

Weights that were trained cannot be compared with the base's; a rotary base or a norm's epsilon that
went wrong shows here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers

from dllm_convert.modeling.loading import base_config
from dllm_convert.verification.report import Probe, first_items, none_wrong
from dllm_convert.verification.subject import Subject

CHANGED = frozenset(
    {
        *("architectures", "auto_map", "diffusion", "is_causal", "mask_token_id", "block_size"),
        *("dtype", "torch_dtype", "layer_types", "quantization_config", "transformers_version"),
        *("use_cache", "vocab_size", "_name_or_path", "_attn_implementation_internal"),
    }
)
"""Fields a conversion changes, or that say how a file is stored and not what is computed."""
KEPT_BASE = frozenset({"architectures", "is_causal", "layer_types", "vocab_size"})
"""Fields of those that stay as they are where the base is kept."""


def check_base_config(subject: Subject, base: Path) -> Probe:
    """Return the probe `base-config`.

    Both are read as transformers reads them: a field left out counts as its default. What the
    base's files contradict counts as the files say.
    """
    adapter = subject.adapter
    cls = getattr(transformers, adapter.stock_class).config_class
    ours = cls.from_pretrained(subject.folder).to_dict()
    theirs = base_config(base, adapter).to_dict()
    free = CHANGED | (set(adapter.window.overrides) if adapter.window else set())
    if subject.claim.is_gated:
        free = CHANGED - KEPT_BASE
    if theirs.get("architectures") is None:
        free = free | {"architectures"}  # of a text model whose class its holder does not name
    compared = sorted(theirs.keys() - free)
    wrong = {
        key: f"is {_short(ours.get(key))}, the base's {_short(theirs[key])}"
        for key in compared
        if ours.get(key) != theirs[key]
    }
    return Probe(
        "base-config",
        none_wrong(len(wrong), len(compared)),
        f"{len(wrong)} of {len(compared)} fields differ",
        "0, those of attention, mask and storage aside",
        first_items(wrong),
    )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
