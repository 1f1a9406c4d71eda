"""mlx-vlm's own code on the CPU: imported in a process of its own, see `engines.py`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class _Model:
    """A model of mlx-vlm.

    Attributes:
        mx: Its arrays.
        language: Its language model.
        block: Tokens per block when a text is read.
    """

    mx: Any
    language: Any
    block: int

    def logits(self, prompt: Sequence[int]) -> Any:
        """Return logits of a text, (length, rows), its blocks causal and open inside."""
        number = np.arange(len(prompt)) // self.block  # (length,)
        mask = self.mx.array((number[:, None] >= number[None])[None, None])
        return np.array(self.language(self.mx.array([list(prompt)]), mask=mask).logits[0])

    def write(self, prompt: Sequence[int], new: int, block: int, threshold: float) -> list[int]:
        """Return new tokens behind a prompt."""
        written = self.language.generate(
            self.mx.array([list(prompt)]),
            block_length=block,
            steps=block,
            gen_length=new,
            threshold=threshold,
            temperature=0.0,
            eos_id=-1,
        )
        found: list[int] = np.array(written).reshape(-1).tolist()
        return found


def load(out: Path) -> _Model:
    """Load an export as mlx-vlm does, in float32.

    Args:
        out: The export.
    """
    mx: Any = importlib.import_module("mlx.core")
    mx.set_default_device(mx.cpu)
    raw = json.loads((out / "config.json").read_text(encoding="utf-8"))
    home: Any = importlib.import_module(f"mlx_vlm.models.{raw['model_type']}")
    model = home.Model(home.ModelConfig.from_dict(raw))
    weights: dict[str, Any] = {}
    for file in sorted(out.glob("*.safetensors")):
        weights |= mx.load(str(file))
    weights = {name: weight.astype(mx.float32) for name, weight in weights.items()}
    weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    model.load_weights(list(weights.items()), strict=True)
    mx.eval(model.parameters())
    return _Model(mx, model.language_model, raw["block_size"])
