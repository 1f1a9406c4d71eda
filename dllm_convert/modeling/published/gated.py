"""A gate: low-rank layers and a mask vector that act on noisy tokens; clean ones pass the base.

LoRA (arXiv 2106.09685) where a token is noisy and nowhere else (I-DLM, arXiv 2604.11035; FLUID,
arXiv 2605.27387): the base stays what it is, and is what clean tokens are computed by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import load_state_dict
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from .gate import Gate, spread

ADAPTER_FOLDER = "adapter"
"""Where the adapter lies. Not beside the weights: there transformers would look for an adapter of
PEFT, and whoever loads the base alone would get it with one on."""
ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before the names of a model's tensors."""
_PARTS = ("lora_A.weight", "lora_B.weight", "mask_vector", "noisy_scale")
_HUB = ("cache_dir", "force_download", "local_files_only", "revision", "token", "subfolder")


def is_gated(config: Any) -> bool:
    """Whether a model's adapter acts on noisy tokens only, as its config says."""
    section = getattr(config, "diffusion", None) or {}
    return bool(section.get("acts_on", "all") == "noisy")


def has_causal_drafts(config: Any) -> bool:
    """Whether a noisy token sees of its block only what stands before it, as a config says.

    Without an adapter on noisy tokens alone, clean ones see nothing ahead then either.
    """
    section = getattr(config, "diffusion", None) or {}
    return bool(section.get("draft") == "causal")


def gated_mask(
    positions: torch.Tensor,
    valid: torch.Tensor,
    noisy: torch.Tensor,
    block_size: int,
    queries: int,
    *,
    causal_drafts: bool = False,
) -> torch.Tensor:
    """Causal, but for the noisy tokens of one block, which see each other.

    Args:
        positions: Position of each key in its text, counted from 0, shape (batch, keys), int.
        valid: False at padding, shape (batch, keys), bool.
        noisy: Where a token is noisy, shape (batch, keys), bool.
        block_size: Tokens per block.
        queries: The last `queries` keys are also the queries.
        causal_drafts: Noisy tokens see those of their block that stand before them only.

    Returns:
        Which queries see which keys, themselves included, shape (batch, queries, keys), bool. No
        clean query sees a noisy key.
    """
    block = positions // block_size
    own, theirs = positions[:, -queries:, None], positions[:, None, :]
    together = block[:, -queries:, None] == block[:, None, :]
    among = noisy[:, -queries:, None] & noisy[:, None, :] & together
    if causal_drafts:
        among = among & (theirs <= own)
    before = (theirs <= own) & ~noisy[:, None, :]
    return (among | before) & valid[:, None, :]


class LowRank:
    """Adds B A x to what a linear layer returns for noisy tokens; a hook of that layer."""

    def __init__(self, gate: Gate, scale: float) -> None:
        self.gate, self.scale = gate, scale

    def __call__(
        self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        """Return what the layer returns instead; None where nothing is noisy."""
        return self.add(layer, inputs[0], output)

    def add(
        self, layer: Any, x: torch.Tensor, output: torch.Tensor, low: torch.Tensor | None = None
    ) -> torch.Tensor | None:
        """Return the layer's output with the adapter's; None where that is `output` itself.

        Args:
            layer: The layer.
            x: What it was given, shape (..., inputs).
            output: What it returned, shape (..., outputs); written to where only decoding asks.
            low: A x of all tokens, shape (..., rank), where it was computed with the output.
        """
        seen, down, up = self.gate.seen, layer.lora_A.weight, layer.lora_B.weight
        if seen.noisy is None:
            return None
        in_rows = output.dim() == 3 and output.shape[:2] == seen.noisy.shape[:2]
        if seen.first is not None and in_rows and not torch.is_grad_enabled():
            # Decoding: a few tokens, and each operation more is as long as their arithmetic.
            if low is None:
                low = torch.nn.functional.linear(x[:, seen.first :].to(down.dtype), down)
            else:
                low = low[:, seen.first :]
            if len(output) == 1 and output.dtype == up.dtype:
                output[0, seen.first :].addmm_(low[0], up.T, alpha=self.scale)
            else:
                change = torch.nn.functional.linear(low, up).to(output.dtype)
                output[:, seen.first :].add_(change, alpha=self.scale)
            return None
        # (batch, length, rank); scaled there, since that is the smallest.
        low = (layer.lora_A(x.to(down.dtype)) if low is None else low) * self.scale
        changed: torch.Tensor = output + layer.lora_B(low).to(output.dtype)
        if seen.everywhere:
            return changed
        return torch.where(spread(seen.noisy, output), changed, output)


class _NoisyNorm:
    """Multiplies what a norm returns for noisy tokens by 1 + s; a hook of that norm.

    That is a norm whose weight is (1 + s) times the base's, whatever way its class has it.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(
        self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        seen = self.gate.seen
        if seen.noisy is None:
            return None
        changed = torch.addcmul(output, output, layer.noisy_scale.to(output.dtype))
        if seen.everywhere:
            return changed
        return torch.where(spread(seen.noisy, output), changed, output)


class _MaskVector:
    """Puts the mask vector where the mask is noisy; a hook of the embedding."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate

    def __call__(
        self, layer: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor
    ) -> torch.Tensor | None:
        masked = self.gate.seen.masked
        if masked is None:
            return None
        return torch.where(masked.to(output.device), layer.mask_vector.to(output.dtype), output)


def attach_adapter(model: Any, *, dtype: torch.dtype | None = None) -> None:
    """Give a base its gate and an adapter that is not filled yet.

    Args:
        model: A diffusion model whose config says rank, alpha and targets.
        dtype: Type of the adapter's numbers; None for the model's.
    """
    facts, embedding = model.config.diffusion, model.get_input_embeddings()
    rank, targets = facts["adapter_rank"], tuple(facts["adapter_targets"])
    gate = Gate(int(model.config.mask_token_id), embedding.num_embeddings)
    hook = LowRank(gate, facts["adapter_alpha"] / rank)
    held = dtype or model.dtype
    adapted: list[Any] = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and ends_in(name, targets)
    ]
    for layer in adapted:
        settings: dict[str, Any] = {"bias": False, "device": layer.weight.device, "dtype": held}
        # GPT-2's own linear layer has its matrix the other way round, and no other names for this.
        is_turned = isinstance(layer, Conv1D)
        inputs, outputs = (
            layer.weight.shape if is_turned else (layer.in_features, layer.out_features)
        )
        layer.lora_A = nn.Linear(inputs, rank, **settings)
        layer.lora_B = nn.Linear(rank, outputs, **settings)
        layer.register_forward_hook(hook)
    width = embedding.embedding_dim
    for layer in gated_norms(model, facts.get("adapter_norms", ()), width):
        scale = torch.zeros(width, dtype=held, device=layer.weight.device)
        layer.noisy_scale = nn.Parameter(scale)
        layer.register_forward_hook(_NoisyNorm(gate))
    vector = torch.zeros(width, dtype=held, device=embedding.weight.device)
    embedding.mask_vector = nn.Parameter(vector)
    embedding.register_forward_hook(_MaskVector(gate))
    model.gate = gate


def ends_in(name: str, targets: Sequence[str]) -> bool:
    """Whether the name of a module is, or ends in, one of those that get an adapter."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def gated_norms(model: Any, names: Sequence[str], width: int) -> list[Any]:
    """Return the norms of a model that noisy tokens may have weights of their own in.

    Those of whole hidden states, in their order: not those of heads or inside an attention.

    Args:
        model: A model.
        names: What such norms are called in their layers.
        width: Features of a hidden state.
    """
    found = []
    for name, module in model.named_modules():
        *above, own = name.split(".")
        within = any(part.isdecimal() for part in above) and not above[-1].isdecimal()
        weight = getattr(module, "weight", None)
        if own in names and not within and weight is not None and weight.shape == (width,):
            found.append(module)
    return found


def is_adapter(name: str) -> bool:
    """Whether a tensor of a gated model, by its name there, belongs to the adapter."""
    return name.endswith(_PARTS)


def adapter_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Return what the adapter of a gated model consists of, by its names in the model."""
    return {name: weight for name, weight in model.named_parameters() if is_adapter(name)}


def fill_adapter(model: Any, states: Mapping[str, torch.Tensor]) -> None:
    """Put numbers into the adapter of a gated model.

    Args:
        model: A model with an adapter attached.
        states: Its tensors by the names that PEFT gives them.

    Raises:
        ValueError: They are not those of this adapter.
    """
    own = {PREFIX + name: weight for name, weight in adapter_parameters(model).items()}
    wrong = sorted(own.keys() ^ states.keys())
    both = own.keys() & states.keys()
    wrong += sorted(name for name in both if own[name].shape != states[name].shape)
    if wrong:
        raise ValueError(
            f"{ADAPTER_FOLDER}/{ADAPTER_WEIGHTS} is not the adapter of this model: {wrong[0]} is "
            f"missing, unknown or of another shape ({len(wrong)} such tensors)"
        )
    with torch.no_grad():
        for name, weight in own.items():
            weight.copy_(states[name])


def load_adapter(
    model: Any, source: Any, options: Mapping[str, Any], *, dtype: torch.dtype | None = None
) -> None:
    """Attach the adapter that lies in a gated checkpoint, without gradients.

    Args:
        model: The base, loaded from the same place.
        source: Folder or Hub id.
        options: Arguments of `from_pretrained`; those of the Hub are read.
        dtype: Type of the adapter's numbers; None for the model's.

    Raises:
        ValueError: There is none, or it is another model's.
    """
    known = {name: options[name] for name in _HUB if options.get(name) is not None}
    known["subfolder"] = "/".join(filter(None, (known.get("subfolder"), ADAPTER_FOLDER)))
    try:
        path = cached_file(source, ADAPTER_WEIGHTS, **known)
    except OSError as error:
        raise ValueError(f"{source} has no {ADAPTER_FOLDER}/{ADAPTER_WEIGHTS}") from error
    attach_adapter(model, dtype=dtype)
    fill_adapter(model, load_state_dict(str(path)))
    for weight in adapter_parameters(model).values():
        weight.requires_grad_(False)


class GatedMixin:
    """What a diffusion class has more where its adapter acts on noisy tokens only.

    Attributes:
        gate: Of a gated model, what tells its layers which tokens are noisy.
    """

    config: Any
    gate: Any = None

    @property
    def is_gated(self) -> bool:
        """Whether an adapter acts on noisy tokens only, and clean ones are the base's."""
        return is_gated(self.config)

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **settings: Any) -> Any:
        """Load a checkpoint, and of a gated one the adapter that lies in it.

        Args:
            source: Folder or Hub id of the weights.
            *args: As transformers takes them.
            **settings: The same; and `adapter`, where the adapter lies if not with the weights.

        Raises:
            ValueError: An adapter is named, and the config is not of a gated model.
        """
        stock: Any = super()
        beside = settings.pop("adapter", None)
        loaded = stock.from_pretrained(source, *args, **settings)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if model.is_gated:
            load_adapter(model, beside or source, {} if beside else settings)
        elif beside is not None:
            raise ValueError("adapter is for a gated model, and this config is not of one")
        return loaded

    def save_pretrained(self, *args: Any, **settings: Any) -> Any:
        """Write a checkpoint.

        Raises:
            ValueError: The model is gated: its files are its base's, and an adapter beside them.
        """
        if self.gate is not None:
            raise ValueError(
                "a gated model is its base's own files and an adapter: copy its folder"
            )
        stock: Any = super()
        return stock.save_pretrained(*args, **settings)
