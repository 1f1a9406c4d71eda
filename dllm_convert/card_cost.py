"""What training cost, as far as a run records it, and an estimate of the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FLOPS_FULL = 6
"""Floating-point operations per weight and token of a forward and a backward pass."""

FLOPS_LORA = 4
"""The same where the gradients of frozen weights are not needed."""

FLOPS_ATTENTION = 12
"""Operations per layer, hidden unit, token and token it looks at, forward and backward."""

FORWARD_AGAIN = 4 / 3
"""Factor of gradient checkpointing: a third of a step, the forward pass, is run twice."""


@dataclass(frozen=True)
class Cost:
    """What training cost.

    Attributes:
        seconds: Wall time of training, in seconds.
        tokens: Clean tokens seen, padding included.
        device: What computed, None if it was not recorded.
        devices: How many of them.
        flops: Floating-point operations, estimated; None if what it is made from is not known.
    """

    seconds: float
    tokens: int
    device: str | None
    devices: int
    flops: float | None

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second of wall time, None if no time was measured."""
        return self.tokens / self.seconds if self.seconds > 0 else None


def cost_of(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> Cost | None:
    """Read what training cost; None if there was no training.

    Args:
        config: The checkpoint's config.json.
        manifest: Content of its dllm_convert.json.
    """
    train = (manifest.get("measurements") or {}).get("train")
    if not train:
        return None
    return Cost(
        float(train["seconds"]),
        int(train["tokens"]),
        train.get("device"),
        int(train.get("devices") or 1),
        _flops(config, manifest, int(train["tokens"])),
    )


def _flops(config: Mapping[str, Any], manifest: Mapping[str, Any], tokens: int) -> float | None:
    """Estimate the arithmetic of training.

    Per token and stream: 6 operations for each weight of the Transformer layers (4 with LoRA) and
    12 * layers * hidden * length for attention; BD3LM runs a noisy and a clean stream. The output
    head, which is computed at masked positions only, and the optimizer are left out.
    """
    plan, recipe = manifest["plan"], manifest["recipe"]
    parameters = (plan.get("source") or {}).get("parameters")
    hidden, layers = config.get("hidden_size"), config.get("num_hidden_layers")
    if not (parameters and isinstance(hidden, int) and isinstance(layers, int)):
        return None
    tied = config.get("tie_word_embeddings", True)
    training = recipe["training"]
    body = int(parameters) - int(plan["mask"]["rows_before"]) * hidden * (1 if tied else 2)
    per_weight = FLOPS_LORA if training["method"] == "lora" else FLOPS_FULL
    attention = FLOPS_ATTENTION * layers * hidden * int(recipe["data"]["sequence_length"])
    train = manifest["measurements"]["train"]
    noise = recipe.get("noise") or {}
    views = int(noise.get("views", 1)) * (2 if noise.get("complementary") else 1)
    streams = float(train.get("streams") or views + (plan["target"] == "bd3lm"))
    # True is what earlier versions wrote for `full`; `selective` repeats no matrix product.
    again = FORWARD_AGAIN if training.get("gradient_checkpointing") in ("full", True) else 1
    return tokens * streams * (per_weight * body + attention) * again if body > 0 else None
