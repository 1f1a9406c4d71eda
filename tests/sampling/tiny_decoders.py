"""Tiny random diffusion models and prompts for the tests of decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factory import FAMILIES
from transformers import PreTrainedModel

from dllm_convert.adapters import get_adapter
from dllm_convert.modeling.published import modeling

MASK, WORDS = 5, 60
DECODERS = [family for family in FAMILIES if "bd3lm" in get_adapter(family).targets]


def tiny(
    family: str, *, block: int | None = None, shift: bool = True, **fields: Any
) -> PreTrainedModel:
    """A random diffusion model in float64."""
    import transformers

    config_class, _, base = FAMILIES[family]
    config = getattr(transformers, config_class)(
        **{
            **base,
            "vocab_size": WORDS,
            "num_hidden_layers": 2,
            "max_position_embeddings": 130,
            **fields,
        },
        initializer_range=0.3,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=2,
        is_causal=False,
        mask_token_id=MASK,
        diffusion={"token_shift": shift and family in DECODERS},
    )
    if block:
        config.block_size = block
    torch.manual_seed(0)
    model = getattr(modeling, get_adapter(family).diffusion_class)(config)
    return model.eval().double()


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, WORDS, (1, length), generator=torch.Generator().manual_seed(seed))


def ragged(lengths: list[int], side: str = "left") -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths in one batch, padded on a side, and their attention mask."""
    width = max(lengths)
    ids, mask = torch.ones(len(lengths), width, dtype=torch.long), torch.zeros(len(lengths), width)
    for row, length in enumerate(lengths):
        place = slice(width - length, width) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = prompt(length, seed=length)[0], 1
    return ids, mask.long()


class Forwards:
    """Counts the forwards of a model and the tokens they run, padding included."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: PreTrainedModel) -> None:
        self.shapes: list[tuple[int, ...]] = []
        self.inputs: list[dict[str, Any]] = []
        original = type(model).forward

        def watched(this: Any, input_ids: torch.Tensor, **kwargs: Any) -> Any:
            self.shapes.append(tuple(input_ids.shape))
            self.inputs.append({"input_ids": input_ids, **kwargs})
            return original(this, input_ids, **kwargs)

        monkeypatch.setattr(type(model), "forward", watched)

    @property
    def tokens(self) -> int:
        return sum(rows * length for rows, length in self.shapes)
