"""LMDeploy's class of SDAR on the CPU: imported in a process of its own, see `engines.py`.

Theirs are the class and how it loads weights, its layers, norms and rotary embedding. Its attention
and its sampler have no CPU code: attention is stood in for by torch's, and nothing is written.
"""

from __future__ import annotations

import importlib
import json
import types
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dllm_convert.serving.engines import MASK
from dllm_convert.serving.own_weights import load_whole


class _Attention(torch.nn.Module):
    """Attention over a whole text, causal across blocks and open inside."""

    def __init__(self, *_: Any, block_sparse_size: int, sliding_window: Any, **__: Any) -> None:
        super().__init__()
        if sliding_window:
            raise ValueError("the export asks for a sliding window")
        self.block = block_sparse_size

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Return the mixed values, (1, length, heads, width), of (length, heads, width) each."""
        number = torch.arange(len(q)) // self.block
        mixed = torch.nn.functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            k.transpose(0, 1)[None],
            v.transpose(0, 1)[None],
            attn_mask=number[:, None] >= number[None],
            enable_gqa=True,
        )
        return mixed.transpose(1, 2)


@dataclass(frozen=True)
class _Model:
    """A model of LMDeploy.

    Attributes:
        model: Its class's instance.
        layers: How many there are.
        mask: Row of the mask.
    """

    model: Any
    layers: int
    mask: int

    def logits(self, text: Sequence[int]) -> Any:
        """Return logits of a text, (length, rows)."""
        ids = torch.tensor([[self.mask if one == MASK else one for one in text]])
        with torch.no_grad():
            hidden = self.model(
                input_ids=ids,
                position_ids=torch.arange(len(text))[None],
                past_key_values=[[None, None]] * self.layers,
                attn_metadata=None,
            )
            logits: torch.Tensor = self.model.get_logits(hidden)[0]
        return logits.float().numpy()

    def write(self, prompt: Sequence[int], new: int, block: int, threshold: float) -> list[int]:
        """Refuse: its sampler is part of an engine that needs a GPU."""
        raise NotImplementedError


def load(out: Path) -> _Model:
    """Load an export as LMDeploy does, in float32.

    Args:
        out: The export.

    Raises:
        ValueError: A parameter of its class is in no file.
    """
    selector: Any = importlib.import_module("lmdeploy.pytorch.backends.selector")
    backend: Any = importlib.import_module("lmdeploy.pytorch.backends.default.op_backend")
    selector._get_backend = lambda *_, **__: backend.DefaultOpsBackend
    sdar: Any = importlib.import_module("lmdeploy.pytorch.models.sdar")
    sdar.Attention = _Attention
    devices: Any = importlib.import_module("lmdeploy.pytorch.devices")
    transformers: Any = importlib.import_module("transformers")
    raw = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config = transformers.PretrainedConfig.from_dict(raw)
    # Told when it starts, see the launch line.
    config.dllm_block_length = block = raw["block_size"]
    build = types.SimpleNamespace(
        dllm_config=types.SimpleNamespace(block_length=block), quant_config=None
    )
    manager = devices.get_device_manager()
    with manager.context(devices.DeviceContext("cpu")):
        context = types.SimpleNamespace(build_ctx=build)
        model = sdar.SDARForCausalLM(config, context, dtype=torch.float32, device="cpu").eval()
        load_whole(model, out)
    return _Model(model, raw["num_hidden_layers"], raw["mask_token_id"])
