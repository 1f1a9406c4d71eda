"""What the costs of a model depend on, counted from headers and config."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.planning.attention import layer_types
from dllm_convert.planning.checks import layer_count
from dllm_convert.planning.gated import behind_of
from dllm_convert.planning.mask_token import MaskTokenDecision
from dllm_convert.source.fit import is_tied
from dllm_convert.source.info import SourceInfo, TensorInfo

_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_NUMBERED = re.compile(r"(.+?)\.(\d+)\..+")
_QUERIES = frozenset({"q_proj", "query", "q_b_proj"})
_KEYS = frozenset({"k_proj", "key"})
_LINEAR = "linear_attention"
_STATE_SIZES = ("linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
"""Fields that the recurrent state of a gated delta rule is as large as, multiplied."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the conversion that comes out.

    Attributes:
        embedding: Parameters of the input embedding.
        head: Parameters of the output projection and its biases; of a tied one the biases only.
        layer_parameters: Parameters of all layers.
        other: The rest: final norm, position embeddings, a head's own transformation.
        tied: Whether the head is the embedding.
        vocabulary: Rows of the embedding.
        hidden: Width of the residual stream.
        layers: Number of layers.
        queries: Width of the queries: heads times their size.
        heads: Number of attention heads.
        matrices: Parameters of the layers' matrices that one token passes through.
        outputs: What those return for one token, in numbers, over all layers.
        stored_matrices: Parameters of the layers' matrices, all experts included.
        adapted: Sum of inputs and outputs of the matrices that LoRA adapts: times the rank it is
            the number of LoRA's parameters.
        adapted_matrices: How many those are.
        adapted_outputs: What they return for one token, in numbers.
        norms: Parameters of the normalisation layers that stay trainable beside LoRA.
        stream_norms: Parameters of those of whole hidden states, of which noisy tokens beside a
            kept base may have their own.
        copied: Keys of one clean token, in numbers over all layers, where noisy rows beside a kept
            base stand behind copies of its cache; 0 where a mask keeps them apart. As many values.
        states: Numbers of the recurrent states of such a row.
    """

    embedding: int
    head: int
    layer_parameters: int
    other: int
    tied: bool
    vocabulary: int
    hidden: int
    layers: int
    queries: int
    heads: int
    matrices: float
    outputs: float
    stored_matrices: int
    adapted: int
    adapted_matrices: int
    adapted_outputs: float
    norms: int
    stream_norms: int = 0
    copied: int = 0
    states: int = 0

    @property
    def cached(self) -> bool:
        """Whether noisy tokens beside a kept base stand behind copies of its cache."""
        return self.copied > 0

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        return self.embedding + self.head + self.layer_parameters + self.other

    @property
    def vocabulary_matrix(self) -> int:
        """Parameters of the matrix that logits are computed with."""
        return self.vocabulary * self.hidden


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _ends_in(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.endswith("." + name) for name in names)


def _active_share(config: Mapping[str, Any]) -> float:
    """Share of the experts that one token passes through; 1 in a dense model."""
    chosen = config.get("num_experts_per_tok")
    total = next((config[key] for key in _EXPERT_COUNTS if config.get(key)), None)
    if isinstance(chosen, int) and isinstance(total, int) and 0 < chosen <= total:
        return chosen / total
    return 1.0


def _counted(config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def layer_tensors(names: Iterable[str], count: int) -> list[str]:
    """Return the names that belong to layers, whatever a family calls them.

    Layers are the modules that are numbered from 0 to `count` - 1 where a name is first numbered:
    `model.layers.0.`, `transformer.h.0.`, `transformer.blocks.0.`, `h.0.`.

    Args:
        names: Names of tensors.
        count: Number of layers.
    """
    numbered: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        found = _NUMBERED.fullmatch(name)
        if found:
            numbered.setdefault(found[1], []).append((int(found[2]), name))
    return [
        name
        for members in numbered.values()
        if {number for number, _ in members} >= set(range(count))
        for _, name in members
    ]


def model_shape(source: SourceInfo, adapter: Adapter, mask: MaskTokenDecision) -> ModelShape | None:
    """Count the sizes of a conversion; None if the headers tell no shapes.

    Args:
        source: The checkpoint.
        adapter: Its family.
        mask: Decides how many rows the embedding has.
    """
    tensors = source.tensors
    if adapter.embedding not in tensors:
        return None
    hidden = tensors[adapter.embedding].shape[-1]
    tied = is_tied(source.config, adapter)
    used = {name: tensor for name, tensor in tensors.items() if not (tied and name == adapter.head)}
    head_names = {adapter.head, *adapter.head_biases}
    # Files of BERT name the head's bias twice; the model has it once.
    biases = mask.rows_after if any(name in used for name in adapter.head_biases) else 0
    layers = {name: used[name] for name in layer_tensors(used, layer_count(source.config))}
    vocabulary = mask.rows_after * hidden
    other = set(used) - set(layers) - head_names - {adapter.embedding}
    share = _active_share(source.config)
    matrices = [
        (tensor, share if ".experts." in name else 1.0, _module(name))
        for name, tensor in layers.items()
        if len(tensor.shape) >= 2
    ]
    adapted = [
        tensor
        for name, tensor in used.items()
        if len(tensor.shape) == 2 and _ends_in(_module(name), adapter.lora_targets)
    ]
    return ModelShape(
        embedding=vocabulary,
        head=(0 if tied else vocabulary) + biases,
        layer_parameters=sum(tensor.size for tensor in layers.values()),
        other=sum(used[name].size for name in other),
        tied=tied,
        vocabulary=mask.rows_after,
        hidden=hidden,
        layers=layer_count(source.config),
        queries=_query_width(matrices, hidden),
        heads=_counted(source.config, "num_attention_heads"),
        matrices=sum(tensor.size * active for tensor, active, _ in matrices),
        outputs=sum(prod(tensor.shape[:-1]) * active for tensor, active, _ in matrices),
        stored_matrices=sum(tensor.size for tensor, _, _ in matrices),
        adapted=sum(sum(tensor.shape) for tensor in adapted),
        adapted_matrices=len(adapted),
        adapted_outputs=sum(tensor.shape[0] for tensor in adapted),
        norms=sum(
            tensor.size
            for name, tensor in used.items()
            # PEFT compares the ends of names, whatever stands before.
            if _module(name).endswith(adapter.norm_modules)
        ),
        stream_norms=hidden
        * sum(
            tensor.shape == (hidden,)
            and name.endswith(".weight")
            and _on_stream(_module(name), adapter.norm_modules)
            for name, tensor in used.items()
        ),
        **_behind_cache(source.config, adapter, matrices, hidden),
    )


def _on_stream(module: str, norms: tuple[str, ...]) -> bool:
    """Whether a norm is one of whole hidden states: of a layer or behind them, not of heads."""
    *above, own = module.split(".")
    within = any(part.isdecimal() for part in above) and not above[-1].isdecimal()
    return own in norms and not within


def _behind_cache(
    config: Mapping[str, Any],
    adapter: Adapter,
    matrices: list[tuple[TensorInfo, float, str]],
    hidden: int,
) -> dict[str, int]:
    """Count what a row behind a copy of a cache holds, `copied` and `states`; 0 where none does.

    The attention of a family that was measured repeats keys for every head that reads them.
    """
    if behind_of(config, adapter) != "cache":
        return {"copied": 0, "states": 0}
    names = _KEYS if adapter.measured is None else _QUERIES
    widths = [t.shape[0] for t, _, module in matrices if module.rpartition(".")[2] in names]
    linear = layer_types(config, adapter).count(_LINEAR)
    sizes = [_counted(config, key) for key in _STATE_SIZES]
    return {
        "copied": sum(widths) or _query_width(matrices, hidden) * layer_count(config),
        "states": linear * prod(sizes),
    }


def _query_width(matrices: list[tuple[TensorInfo, float, str]], hidden: int) -> int:
    found = (t.shape[0] for t, _, module in matrices if module.rpartition(".")[2] in _QUERIES)
    return next(found, hidden)
