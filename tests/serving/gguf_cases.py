"""Tiny conversions that GGUF files are made of."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversion import convert

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
Make = Callable[..., Path]
ENGINE = pytest.mark.skipif(
    importlib.util.find_spec("cyllama") is None,
    reason="cyllama is not installed: make test-serving installs it",
)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


def maker(root: Path, source_cache: Callable[..., Path]) -> Make:
    """Return a maker of tiny conversions, each once."""
    made: dict[str, Path] = {}

    def make(
        family: str,
        *,
        target: str = "bd3lm",
        shift: str = "keep",
        block: int = 4,
        recipe: dict[str, Any] | None = None,
        **source: Any,
    ) -> Path:
        key = repr((family, target, shift, block, recipe, sorted(source.items())))
        if key not in made:
            made[key] = root / f"{family}-{target}-{len(made)}"
            fields = {"token_shift": shift, **(recipe or {})}
            convert(source_cache(family, **source), made[key], target, block=block, **fields)
        return made[key]

    return make


def with_rope(folder: Path, **rope: Any) -> Path:
    """Return a copy of a conversion with another rotary embedding."""
    copy = folder.with_name(f"{folder.name}-{len(list(folder.parent.iterdir()))}")
    folder = Path(shutil.copytree(folder, copy))
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 1e4, **rope}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def file_of(folder: Path) -> Path:
    """Return the one GGUF file of an export."""
    (file,) = folder.glob("*.gguf")
    return file
