"""mlx-vlm's own code on the CPU: imported in a process of its own, see `engines.py`."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dllm_convert.serving.engines import MASK


@dataclass(frozen=True)
class _Model:
    """A model of mlx-vlm.

    Attributes:
        mx: Its arrays.
        language: Its language model.
        block: Tokens per block when a text is read.
        mask: Row of the mask.
    """

    mx: Any
    language: Any
    block: int
    mask: int

    def logits(self, text: Sequence[int]) -> Any:
        """Return logits of a text, (length, rows), its blocks causal and open inside."""
        number = np.arange(len(text)) // self.block  # (length,)
        seen = self.mx.array((number[:, None] >= number[None])[None, None])
        ids = self.mx.array([[self.mask if one == MASK else one for one in text]])
        # Of Nemotron's class only the mask decides what is seen, unless it is told to be causal.
        return np.array(self.language(ids, mask=seen, use_causal_mask=False).logits[0])

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
    config = home.ModelConfig.from_dict(raw)
    model = home.Model(config)
    weights: dict[str, Any] = {}
    for file in sorted(out.glob("*.safetensors")):
        weights |= mx.load(str(file))
    weights = {name: weight.astype(mx.float32) for name, weight in weights.items()}
    weights = model.sanitize(weights) if hasattr(model, "sanitize") else weights
    model.load_weights(list(weights.items()), strict=True)
    mx.eval(model.parameters())
    return _Model(mx, model.language_model, raw["block_size"], config.mask_token_id)
