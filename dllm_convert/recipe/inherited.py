"""What a conversion that is converted again hands down: target, blocks, noise and shift.

Nothing else of its recipe: how long it was trained says nothing of how long to go on. A conversion
on the Hub hands down what a folder does: two small files of it are fetched.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dllm_convert.common.diffusion_section import ATTENTION, diffusion_section
from dllm_convert.common.hub_names import is_hub_id

Fetch = Callable[[str, str | None, tuple[str, ...]], Path | None]
"""Brings small files of a Hub id, at a revision, into a folder; None if it is no repository."""
CONFIG, MANIFEST = _READ = ("config.json", "dllm_convert.json")
LARGEST = 16 << 20
"""Bytes of a config or manifest that is looked into here."""
_NOISE = {
    "noise_schedule": "schedule",
    "noise_power": "power",
    "noise_kernel": "kernel",
    "discrete_steps": "discrete_steps",
    "noise_jumps": "jumps",
}


def handed_down(
    source: str, revision: str | None = None, *, fetch: Fetch | None = None
) -> dict[str, Any]:
    """Return fields of a recipe that a conversion was made with; none for a base.

    Args:
        source: A recipe's source.
        revision: Branch, tag or commit of a Hub id.
        fetch: How a Hub id is looked up; None: it hands nothing down.

    Raises:
        HubError: The Hub does not have it, refuses it or cannot be reached.
    """
    folder: Path | None = Path(source).expanduser()
    if fetch is not None and is_hub_id(source):
        folder = fetch(source, revision, _READ)
    if folder is None:
        return {}
    section = diffusion_section(_object(folder / CONFIG))
    if section is None or section.get("objective") not in tuple(ATTENTION):
        return {}
    recipe = _object(folder / MANIFEST).get("recipe")
    noise = recipe.get("noise") if isinstance(recipe, Mapping) else None
    found: dict[str, Any] = (
        {f"noise.{name}": value for name, value in noise.items() if value is not None}
        if isinstance(noise, Mapping)
        else {}
    )
    found |= {f"noise.{to}": section[key] for key, to in _NOISE.items() if section.get(key)}
    found["target"] = section["objective"]
    if found["target"] == "bd3lm" and isinstance(section.get("block_size"), int):
        found["block_size"] = section["block_size"]
    if isinstance(section.get("token_shift"), bool):
        found["token_shift"] = "keep" if section["token_shift"] else "drop"
    if section.get("draft") == "causal" and section.get("acts_on", "all") == "all":
        found["block_attention"] = "causal"
    return found


def _object(path: Path) -> dict[str, Any]:
    """Return what a file of JSON holds; nothing if there is none, whose reader says why."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return {}
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
