"""What an engine that is to serve a conversion asks of its recipe; `serve` chooses it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Serve = Literal["sglang", "lmdeploy", "mlx-vlm", "vllm", "llama.cpp", "llama-diffusion-cli", "dllm"]
"""Engines, their names in small letters as `export` has them."""


@dataclass(frozen=True)
class Need:
    """A field of the recipe that an engine cares about.

    Attributes:
        value: What is chosen where nobody said otherwise.
        reason: Why, as the end of "the engine ...".
        also: Other values that do as well.
        above: Whether anything above 0 does.
    """

    value: Any
    reason: str
    also: tuple[Any, ...] = ()
    above: bool = False

    def met_by(self, value: Any) -> bool:
        """Whether a field's value is one that the engine can do with."""
        return bool(value) if self.above else value in (self.value, *self.also)


_MASKS = {
    "noise.kernel": Need("absorbing", "fills masks in, and corrects nothing"),
    "block_attention": Need("auto", "lets all tokens of a block see each other", ("open",)),
}
_OPEN = {**_MASKS, "training.ar_loss_weight": Need(0.0, "reads finished blocks open")}
_BLOCKS = {
    "target": Need("bd3lm", "decodes block by block"),
    "token_shift": Need("drop", "reads logits at a token's own position"),
    **_OPEN,
}
_CAUSAL = {
    **_BLOCKS,
    "training.ar_loss_weight": Need(
        1.0,
        "reads finished blocks strictly causally, and begins each with the next token",
        above=True,
    ),
}
NEEDS: Mapping[str, Mapping[str, Need]] = {
    "sglang": _BLOCKS,
    "lmdeploy": _BLOCKS,
    "mlx-vlm": _BLOCKS,
    "vllm": _CAUSAL,
    "llama.cpp": _MASKS,
    "llama-diffusion-cli": {"target": Need("mdlm", "denoises a whole text at once"), **_MASKS},
    "dllm": _OPEN,
}
"""Engine to dotted fields of a recipe. What it asks of the family is not the recipe's: the plan
says that. The mask's id is nobody's to choose here: an export moves the mask to where an engine has
it, and a plan says where it cannot."""
NAMES: tuple[str, ...] = get_args(Serve)
