"""Noise on the mask's embedding in the first steps (LLaDA2, arXiv 2512.15745)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from dllm_convert.diffusion.corruption import NoiseKey
from dllm_convert.diffusion.device import moved
from dllm_convert.training.growth import faded


def standard_deviation(weight: torch.Tensor) -> float:
    """Return the standard deviation of all entries; of a sharded tensor all processes call this."""
    if not isinstance(weight, DTensor):
        return float(weight.std())
    count, own = weight.numel(), weight.to_local().double()
    sums = torch.stack([own.sum(), own.square().sum()])
    for dimension, placement in enumerate(weight.placements):
        if placement.is_shard():
            dist.all_reduce(sums, group=weight.device_mesh.get_group(dimension))
    total, squares = sums.tolist()
    return math.sqrt((squares - total * total / count) / (count - 1))


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
        self._times, self._std = std, 0.0
        if next(self._embedding.parameters()).device.type != "meta":
            self.measure()

    def measure(self) -> None:
        """Take the embedding's standard deviation as it is now, before a training."""
        if self._steps:
            weight = next(self._embedding.parameters()).detach()
            self._std = self._times * standard_deviation(weight)

    @contextmanager
    def at(self, key: NoiseKey, now: Fraction) -> Iterator[None]:
        """Add the noise of a step while the block runs; nothing once the steps are over.

        Args:
            key: Which noise.
            now: The step, as one of the plan.
        """
        share = faded(self._steps, now)
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
