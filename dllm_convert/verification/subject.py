"""The checkpoint under verification: what it claims, and its parts, each loaded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dllm_convert.adapters import Adapter
from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.diffusion.objective import Objective
from dllm_convert.modeling.classes import diffusion_class
from dllm_convert.modeling.loading import load_model
from dllm_convert.modeling.published.ends import read_ids
from dllm_convert.planning.attention import layer_types
from dllm_convert.planning.layers import SLIDING
from dllm_convert.source.context import ASSUMED_CONTEXT, context_length
from dllm_convert.source.safetensors_header import Header, read_checkpoint
from dllm_convert.source.tokenizer_files import ID_ROLES
from dllm_convert.source.tokenizer_loading import load_tokenizer
from dllm_convert.verification.accelerator import HOST, Accelerator

if TYPE_CHECKING:
    from dllm_convert.verification.foreign.probes import Foreign

SEED = 20240607


def claimed_mask(claim: DiffusionSection, length: int) -> torch.Tensor:
    """Return which token may reach which position, shape (positions, tokens), bool.

    Written out here a second time on purpose: verification must not trust `attention.py`.

    Args:
        claim: What the checkpoint says it is.
        length: Tokens of the text.
    """
    position = torch.arange(length)
    if claim.is_gated or claim.draft == "causal":
        # Of clean text: the base's; or strictly causal, whatever is noisy.
        return position[:, None] >= position[None, :]
    if claim.block_size is None:
        return torch.ones(length, length, dtype=torch.bool)
    return position[:, None] >= position[None, :] // claim.block_size * claim.block_size


@dataclass
class Subject:
    """A checkpoint folder and what it is compared with.

    Attributes:
        folder: The checkpoint.
        config: Its config.json.
        adapter: Its family.
        claim: What it says it is.
        manifest: Its dllm_convert.json; empty if there is none.
        against: Folder of the base's safetensors weights.
        quality: Held-out measurements.
        untrained: Whether the weights are the base's; None if that is not known.
        trust_remote_code: Whether code of the folder that is not ours may run.
        foreign: What is known of a third-party checkpoint; None for one of ours.
        accelerator: Where the checkpoint will be used, None if that is the CPU.
        runs_on: Where its model is, and in what.
    """

    folder: Path
    config: Mapping[str, Any]
    adapter: Adapter
    claim: DiffusionSection
    manifest: Mapping[str, Any]
    against: Path | None
    quality: Mapping[str, Any]
    untrained: bool | None
    trust_remote_code: bool = False
    foreign: Foreign | None = None
    accelerator: Accelerator | None = None
    runs_on: Accelerator = HOST

    @cached_property
    def headers(self) -> Mapping[str, Header]:
        """Headers of the weights, file name to header."""
        return read_checkpoint(self.folder)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in the files."""
        entries = (header.entries.items() for header in self.headers.values())
        return {name: entry.shape for items in entries for name, entry in items}

    @property
    def diffusion_class(self) -> Any:
        """This package's diffusion class of the family."""
        return diffusion_class(self.adapter)

    @property
    def _attention(self) -> str:
        return self.adapter.implementations[0]

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer as transformers loads it."""
        return load_tokenizer(self.folder)

    @cached_property
    def model(self) -> Any:
        """The diffusion class where it runs, with its family's first implementation.

        Raises:
            DataError: It does not load, or not completely.
        """
        where, dtype = self.runs_on.device, self.runs_on.torch_dtype
        model = load_model(self.folder, self.adapter, device=where, dtype=dtype)
        return model.requires_grad_(False)

    @cached_property
    def objective(self) -> Objective:
        """What the checkpoint is trained and measured on, as it claims."""
        return Objective.from_section(
            self.claim, self.shapes[self.adapter.embedding][0], self.folder
        )

    @contextmanager
    def attention(self, implementation: str) -> Iterator[Any]:
        """Lend the model with another attention implementation."""
        self.model.set_attn_implementation(implementation)
        try:
            yield self.model
        finally:
            self.model.set_attn_implementation(self._attention)

    @contextmanager
    def float64(self) -> Iterator[Any]:
        """Lend the model in double precision; back in float32 its weights are what they were."""
        self.model.to(torch.float64)
        try:
            yield self.model
        finally:
            self.model.to(torch.float32)

    def allowed(self, length: int) -> torch.Tensor:
        """Return which token may reach which position by the claim, shape (positions, tokens)."""
        return claimed_mask(self.claim, length)

    @cached_property
    def reach(self) -> int | None:
        """Tokens to each side that a local layer sees, None where no layer is local."""
        local = self.adapter.local
        return None if local is None else int(self.config.get(local.size, local.default)) // 2

    def allowed_in(self, layer: int, length: int) -> torch.Tensor:
        """Return the same of one layer's attention: of what is claimed, a local one sees a part."""
        allowed = self.allowed(length)
        if self.reach is None or layer_types(self.config, self.adapter)[layer] != SLIDING:
            return allowed
        at = torch.arange(length)
        return allowed & ((at[:, None] - at).abs() <= self.reach)

    @cached_property
    def context(self) -> int:
        """Longest text in tokens."""
        return context_length(self.config, self.adapter) or ASSUMED_CONTEXT

    @cached_property
    def _ordinary_ids(self) -> torch.Tensor:
        """Ids of tokens that ordinary text has, shape (n,)."""
        rows = self.shapes[self.adapter.embedding][0]
        special = {*self.tokenizer.all_special_ids, self.claim.mask_token_id}
        for name in ID_ROLES:
            special |= {*read_ids(self.config.get(f"{name}_token_id"), f"{name}_token_id")}
        count = min(len(self.tokenizer), rows)
        return torch.tensor([token for token in range(count) if token not in special])

    def tokens(self, rows: int, length: int, *, draw: int = 0) -> torch.Tensor:
        """Return random ordinary tokens, shape (rows, length), where the model runs.

        They are the same for the same arguments, whatever the device.
        """
        generator = torch.Generator().manual_seed(SEED + draw)
        ids = self._ordinary_ids
        drawn = ids[torch.randint(len(ids), (rows, length), generator=generator)]
        return drawn.to(self.runs_on.device)

    def other_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return tokens that differ from `tokens` everywhere, same shape."""
        index = torch.searchsorted(self._ordinary_ids, tokens.cpu())
        step = 1 + len(self._ordinary_ids) // 3
        return self._ordinary_ids[(index + step) % len(self._ordinary_ids)].to(tokens.device)
