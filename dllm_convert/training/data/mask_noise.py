"""Noise on the mask's embedding in the first steps (LLaDA2, arXiv 2512.15745)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dllm_convert.diffusion.corruption import NoiseKey
from dllm_convert.diffusion.device import moved


class MaskNoise:
    """Adds Gaussian noise to what the embedding returns for the mask, fading over the first steps.

    A row that was never trained sends the same vector to every masked position, and gradients
    explode where most are masked; LLaDA2 found that noise on it prevents that.

    Args:
        model: The model to be trained.
        mask_token_id: The mask.
        std: Standard deviation of the noise, in units of the embedding's own.
        steps: Steps over which it fades.
    """

    def __init__(self, model: Any, mask_token_id: int, *, std: float, steps: int) -> None:
        self._embedding = model.get_input_embeddings()
        self._steps = steps
        self._mask_token_id = mask_token_id
        weight = next(self._embedding.parameters())
        self._std = std * (float(weight.detach().std()) if self._steps else 0.0)

    @contextmanager
    def at(self, key: NoiseKey) -> Iterator[None]:
        """Add the noise of a step while the block runs; nothing once the steps are over."""
        share = 1 - key.step / self._steps if self._steps else 0.0
        if self._std == 0 or share <= 0:
            yield
            return

        def add(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            masked = inputs[0] == self._mask_token_id
            noise = key.each_row(
                len(output), lambda g: torch.randn(output.shape[1:], generator=g), 3
            )
            noise = moved(noise, output.device).to(output.dtype)
            return output + self._std * share * noise * masked[..., None]

        handle = self._embedding.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()
