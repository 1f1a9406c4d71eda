"""Small random instances of one architecture: the stock class, and opened for both objectives."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from dllm_convert.adapters.base import Adapter, Implementation, Measured
from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.errors import UnsupportedError
from dllm_convert.modeling.classes import diffusion_class
from dllm_convert.modeling.loading import BROKEN
from dllm_convert.modeling.published.gated import adapter_parameters, attach_adapter
from dllm_convert.probing.shrink import shrink
from dllm_convert.probing.sizes import VOCABULARY

SEED = 20240607
SPREAD = 0.1
"""Standard deviation of the weights, five times the usual one: a changed token visibly moves every
logit it reaches, and no softmax is so sharp that it rounds one away."""
MAX_PARAMETERS = 30_000_000
TRIED = 7
"""Tokens of a text on which layers are looked at."""
ADAPTER_BLOCK = 4
"""Tokens of a block where an adapter is tried; any would do."""
ORDINARY = range(16, VOCABULARY)
"""Tokens of the texts: no special token has an id as high."""


def full_config(values: Mapping[str, Any]) -> PreTrainedConfig:
    """Build the config of a checkpoint as its stock class reads it; no remote code is run.

    Raises:
        UnsupportedError: This transformers does not know the family, or not as a decoder.
    """
    model_type = str(values.get("model_type"))
    version = transformers.__version__
    if model_type not in CONFIG_MAPPING:
        raise UnsupportedError(f"transformers {version} has no model_type {model_type!r}")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UnsupportedError(f"transformers {version} has no decoder for {model_type!r}")
    config = CONFIG_MAPPING[model_type].from_dict(dict(values))
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{model_type!r} is an encoder-decoder: its decoder needs another text"
        )
    if config.get_text_config() is not config:
        raise UnsupportedError(
            f"the config of {model_type!r} holds the one of its text model inside: that is measured"
        )
    return config


def stock_name(model_type: str) -> str:
    """Return the name of the class that the mapping of decoders gives a family."""
    return MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]


def draft_adapter(model_type: str) -> Adapter:
    """Return what is known of a family before anything is measured."""
    name = stock_name(model_type)
    return Adapter(
        model_type,
        name,
        f"Diffusion{name}",
        implementations=implementations(getattr(transformers, name)),
        measured=Measured(transformers.__version__, {}, {}),
    )


def implementations(stock: Any) -> tuple[Implementation, ...]:
    """Return the implementations of attention a class has; one without sdpa has eager alone."""
    return ("sdpa", "eager") if getattr(stock, "_supports_sdpa", False) else ("eager",)


def build(cls: Any, config: PreTrainedConfig, attention: str) -> Any:
    """Build a model on the CPU, in evaluation mode, from a copy of the config."""
    config = copy.deepcopy(config)
    torch.manual_seed(SEED)
    return cls._from_config(config, attn_implementation=attention, dtype=torch.float32).eval()


@torch.no_grad()
def _randomise(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() < 2 or "norm" in name:
            parameter.add_(noise * 0.05)
        else:
            parameter.copy_(noise * SPREAD)


@torch.no_grad()
def adapted_names(model: Any) -> tuple[str, ...]:
    """Return what the names end in of linear layers in the decoder layers that an adapter can join.

    They have to return a tensor of all tokens of a forward in their order, in training and behind a
    cache as well. What is run by its matrix alone, on some tokens only, on those in the cache once
    more, or returns something else besides, is left out.
    """
    sound: dict[int, int] = {}
    tokens = torch.stack([text(TRIED), text(TRIED, 1)])
    given = tokens

    def look(module: nn.Module, _: Any, output: Any) -> None:
        is_tensor = isinstance(output, torch.Tensor)
        per_token = is_tensor and (
            output.shape[:2] == given.shape or output.shape[:-1].numel() == given.numel()
        )
        seen.setdefault(id(module), True)
        seen[id(module)] &= per_token

    handles = [
        module.register_forward_hook(look)
        for layer in decoder_layers(model)
        for module in layer.modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]
    passes = 0
    try:
        for training, first in ((False, 0), (True, 0), (False, TRIED // 2)):
            seen: dict[int, bool] = {}
            past: dict[str, Any] = {"use_cache": False}
            model.train(training)
            given = tokens[:, first:]
            try:
                if first:
                    cache = model(tokens[:, :first], use_cache=True)["past_key_values"]
                    past, seen = {"past_key_values": cache, "use_cache": True}, {}
                model(given, **past)
            except BROKEN:
                if not first:
                    raise
                continue  # it does not go on from a cache, and nothing stands behind one
            passes += 1
            for module, per_token in seen.items():
                sound[module] = sound.get(module, 0) + per_token
    finally:
        model.eval()
        for handle in handles:
            handle.remove()
    return _endings(model, {module for module, count in sound.items() if count == passes})


def _endings(model: nn.Module, chosen: Collection[int]) -> tuple[str, ...]:
    """Return the shortest endings of names that some modules, by id, have, and no others."""
    modules = dict(model.named_modules())
    wanted = [name for name, module in modules.items() if id(module) in chosen]
    endings: dict[str, None] = {}
    for name in wanted:
        parts = name.split(".")
        for size in range(1, len(parts) + 1):
            ending = ".".join(parts[-size:])
            if parts[-size].isdigit():
                continue  # The number of a layer is another name in a model with more of them.
            hits = [m for n, m in modules.items() if n == ending or n.endswith(f".{ending}")]
            if all(id(module) in chosen for module in hits):
                endings[ending] = None
                break
    return tuple(endings)


def decoder_layers(model: Any) -> list[nn.Module]:
    """Return the layers: of all lists of modules as long as the config says, the heaviest."""
    count = int(model.config.num_hidden_layers)
    every = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    lists = [m for m in every if len(m) == count] or every
    sizes = [sum(p.numel() for p in found.parameters()) for found in lists]
    return list(lists[sizes.index(max(sizes))]) if lists else []


@dataclass
class Instance:
    """One architecture in small.

    Attributes:
        adapter: What is known of it.
        config: The small config, attention as in the base.
        kinds: Kind of each layer.
        base: The stock class with it.
    """

    adapter: Adapter
    config: PreTrainedConfig
    kinds: tuple[str, ...]
    base: Any

    @classmethod
    def of(cls, config: PreTrainedConfig) -> Instance:
        """Build the small instance of a full config.

        Raises:
            UnsupportedError: It does not get small.
        """
        small = shrink(config)
        adapter = draft_adapter(config.model_type)
        stock = getattr(transformers, adapter.stock_class)
        with torch.device("meta"):
            counts = {
                n: p.numel() for n, p in stock(copy.deepcopy(small.config)).named_parameters()
            }
        if sum(counts.values()) > MAX_PARAMETERS:
            worst = max(counts, key=lambda name: counts[name])
            raise UnsupportedError(
                f"it was not built: shrunken it still has {sum(counts.values()):,} parameters, "
                f"most in {worst}"
            )
        base = build(stock, small.config, adapter.implementations[0])
        _randomise(base)
        base.tie_weights()
        return cls(adapter, small.config, small.kinds, base)

    def opened(self, *, block_size: int | None = None, causal: bool = False, **updates: Any) -> Any:
        """Return the diffusion class with the same weights.

        Args:
            block_size: Tokens per block; None for none.
            causal: Leave the attention as it is in the base.
            **updates: Other fields of the config.
        """
        config = copy.deepcopy(self.config)
        for key, value in updates.items():
            setattr(config, key, value)
        if not causal:
            config.is_causal = False
        if block_size is not None:
            config.block_size = block_size
        model = build(diffusion_class(self.adapter), config, self.adapter.implementations[0])
        model.load_state_dict(self.base.state_dict())
        return model

    def gated(self, norms: tuple[str, ...] = ()) -> Any:
        """Return the diffusion class as a gated model with the same weights: its adapter acts.

        Args:
            norms: Names of norms whose weights noisy tokens have scaled.
        """
        config = copy.deepcopy(self.config)
        rows = int(config.vocab_size)
        config.mask_token_id, config.block_size = rows, ADAPTER_BLOCK
        targets = adapted_names(self.base)
        section = DiffusionSection(
            *("bd3lm", ADAPTER_BLOCK, rows, True),
            context="causal",
            acts_on="noisy",
            adapter_rank=2,
            adapter_alpha=4,
            adapter_targets=targets,
            adapter_norms=norms,
            draft="causal",
            behind="cache",
        )
        config.diffusion = section.as_dict()
        model = build(diffusion_class(self.adapter), config, self.adapter.implementations[0])
        model.load_state_dict(self.base.state_dict())
        attach_adapter(model)
        generator = torch.Generator().manual_seed(SEED)
        with torch.no_grad():
            for weight in adapter_parameters(model).values():
                weight.copy_(torch.randn(weight.shape, generator=generator) * SPREAD)
                weight.requires_grad_(False)
        return model


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[Any]:
    """Lend a model with another attention implementation."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def text(length: int, draw: int = 0) -> torch.Tensor:
    """Return random tokens, shape (length,)."""
    generator = torch.Generator().manual_seed(SEED + draw)
    return torch.randint(ORDINARY.start, ORDINARY.stop, (length,), generator=generator)


def other(tokens: torch.Tensor) -> torch.Tensor:
    """Return tokens that differ from `tokens` everywhere, same shape."""
    span = len(ORDINARY)
    return (tokens - ORDINARY.start + 1 + span // 3) % span + ORDINARY.start
