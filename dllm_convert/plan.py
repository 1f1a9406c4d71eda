"""ConversionPlan: everything a run will do, as one printable value; reads headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dllm_convert.adapters import get_adapter
from dllm_convert.adapters.base import Adapter
from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.mask_token import MaskRule, MaskTokenDecision, decide_mask_token
from dllm_convert.plan_advice import advise
from dllm_convert.plan_attention import open_attention
from dllm_convert.schema import Recipe
from dllm_convert.source_info import SourceInfo, TensorInfo

__all__ = [
    "FORMAT_VERSION",
    "ConversionPlan",
    "MaskRule",
    "MaskTokenDecision",
    "check_tensors",
    "context_length",
    "make_plan",
    "plan_as_dict",
]

FORMAT_VERSION = 1
"""Version of the `diffusion` section of config.json."""

_FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True)
class ConversionPlan:
    """Everything a run will do.

    Attributes:
        recipe: The resolved recipe.
        source: The checkpoint, seen through its headers.
        adapter: The family's declaration.
        mask: The mask-token decision.
        attention_changes: One sentence per change to the attention.
        config_updates: Keys written into config.json; None is written as null.
        tensors_changed: Names of tensors whose bytes will differ before training.
        warnings: Sentences the user should read before starting.
        notes: What stays as it is although one might expect otherwise.
    """

    recipe: Recipe
    source: SourceInfo
    adapter: Adapter
    mask: MaskTokenDecision
    attention_changes: tuple[str, ...]
    config_updates: Mapping[str, Any]
    tensors_changed: tuple[str, ...]
    warnings: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def token_shift(self) -> bool:
        """Whether position i is predicted from the hidden state of i-1."""
        return _keeps_shift(self.recipe, self.adapter)


def _keeps_shift(recipe: Recipe, adapter: Adapter) -> bool:
    """Whether the autoregressive alignment is kept; an encoder has none to keep."""
    return adapter.attention == "causal" and recipe.token_shift == "keep"  # noqa: S105


def context_length(config: Mapping[str, Any], adapter: Adapter) -> int | None:
    """Return the longest text in tokens, None if the config does not say."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or isinstance(positions, bool):
        return None
    if adapter.positions_after_pad:
        pad = config.get("pad_token_id")
        positions -= (pad if isinstance(pad, int) else 1) + 1
    return positions


def _is_tied(config: Mapping[str, Any], adapter: Adapter) -> bool:
    """Whether head and embedding share weights; absent means the default of transformers' config.

    That default is true for the encoders and false for the decoders here.
    """
    return bool(config.get("tie_word_embeddings", adapter.attention == "bidirectional"))


def check_tensors(
    config: Mapping[str, Any], tensors: Mapping[str, TensorInfo], adapter: Adapter, *, rows: int
) -> tuple[str, ...]:
    """Check that the weights are a complete language model; return names of vocabulary tensors.

    Args:
        config: config.json.
        tensors: Tensor name to description, of all files.
        adapter: The family.
        rows: Expected rows of embedding and head.

    Raises:
        IncompatibleError: The head or the embedding is missing, or a shape does not fit.
    """
    stock = f"a checkpoint of {adapter.stock_class}"
    if adapter.embedding not in tensors:
        raise IncompatibleError(f"the weights have no {adapter.embedding}, expected {stock}")
    missing = [name for name in adapter.head_required if name not in tensors]
    if adapter.head not in tensors and not _is_tied(config, adapter):
        missing.append(adapter.head)
    if missing:
        raise IncompatibleError(
            f"the weights have no {', '.join(missing)}: their language-model head would be random",
            hint=f"Take {stock}, not of a headless encoder",
        )
    present = [n for n in (adapter.embedding, adapter.head, *adapter.head_biases) if n in tensors]
    for name in present:
        if not tensors[name].shape or tensors[name].shape[0] != rows:
            raise IncompatibleError(
                f"{name} has shape {tensors[name].shape}, expected {rows} rows as the embedding"
            )
    return tuple(present)


def _check_quantised(source: SourceInfo, vocabulary_tensors: tuple[str, ...]) -> None:
    if "quantization_config" in source.config:
        raise IncompatibleError(
            "config.json has a quantization_config: quantised weights cannot be trained on",
            hint="Take the checkpoint in bfloat16, float16 or float32 that it was made from",
        )
    if source.kind == "gguf":
        return
    for name in vocabulary_tensors:
        if source.tensors[name].dtype not in _FLOAT_DTYPES:
            raise IncompatibleError(
                f"{name} has dtype {source.tensors[name].dtype}, "
                f"expected one of {', '.join(sorted(_FLOAT_DTYPES))}"
            )


def _check_target(recipe: Recipe, adapter: Adapter) -> None:
    if recipe.target not in adapter.targets:
        raise UnsupportedError(
            f"{adapter.model_type} converts to {' or '.join(adapter.targets)}, not "
            f"{recipe.target}: it was trained to see both sides of every token, so there is no "
            "causal pass over earlier blocks that block diffusion could keep",
            hint=f"Use --to {adapter.targets[0]}",
        )


def _check_lengths(recipe: Recipe, context: int | None) -> None:
    """Check block, sequence and context: block divides sequence, sequence fits the context."""
    block, length = recipe.block_size, recipe.data.sequence_length
    if recipe.target == "mdlm" and block is not None:
        raise IncompatibleError(
            f"block_size {block} is for bd3lm, the target is mdlm",
            hint="Leave the block size out, or use --to bd3lm",
        )
    if recipe.target == "bd3lm" and block is None:
        raise IncompatibleError("bd3lm needs a block size", hint="Add --block 32, for instance")
    if block is not None and context is not None and block > context:
        raise IncompatibleError(
            f"block size {block} is larger than the model's context of {context} tokens",
            hint=f"Use a block of at most {context}; 16 to 64 is usual",
        )
    if context is not None and length > context:
        raise IncompatibleError(
            f"data.sequence_length {length} is larger than the model's context of {context} tokens",
            hint=f"--set data.sequence_length={context}",
        )
    if block is not None and length % block:
        nearest = max(block, length // block * block)
        raise IncompatibleError(
            f"block size {block} does not divide data.sequence_length {length}: a training "
            "sequence must be a whole number of blocks",
            hint=f"--set data.sequence_length={nearest}, or another block size",
        )


def _check_noise(recipe: Recipe) -> None:
    if recipe.noise.min_time >= recipe.noise.max_time:
        raise IncompatibleError(
            f"noise.min_time {recipe.noise.min_time} is not below noise.max_time "
            f"{recipe.noise.max_time}",
            hint="Times lie in (0, 1], the smaller one first",
        )


def _diffusion_section(recipe: Recipe, mask: MaskTokenDecision, *, shift: bool) -> dict[str, Any]:
    section: dict[str, Any] = {
        "objective": recipe.target,
        "block_size": recipe.block_size,
        "mask_token_id": mask.id,
        "token_shift": shift,
        "noise_schedule": recipe.noise.schedule,
        "attention": "bidirectional" if recipe.target == "mdlm" else "block-causal",
        "format_version": FORMAT_VERSION,
    }
    if recipe.noise.schedule == "polynomial":
        section["noise_power"] = recipe.noise.power
    return section


def _config_updates(
    recipe: Recipe, adapter: Adapter, mask: MaskTokenDecision, opened: Mapping[str, Any]
) -> dict[str, Any]:
    updates: dict[str, Any] = {
        "architectures": [adapter.diffusion_class],
        "auto_map": {adapter.auto_class: f"modeling_dllm.{adapter.diffusion_class}"},
        "is_causal": False,
        "mask_token_id": mask.id,
        "vocab_size": mask.rows_after,
        **opened,
        "diffusion": _diffusion_section(recipe, mask, shift=_keeps_shift(recipe, adapter)),
    }
    if recipe.target == "bd3lm":
        updates["block_size"] = recipe.block_size
    return updates


def make_plan(recipe: Recipe, source: SourceInfo) -> ConversionPlan:
    """Decide everything a run will do, from the recipe and the source's headers.

    Raises:
        UnsupportedError: The family, or this target for it, has no conversion.
        IncompatibleError: The checkpoint or the recipe cannot be converted as asked.
    """
    adapter = get_adapter(source.model_type)
    _check_target(recipe, adapter)
    mask = decide_mask_token(recipe, source, adapter)
    names: tuple[str, ...] = ()
    if source.tensors:
        names = check_tensors(source.config, source.tensors, adapter, rows=mask.rows_before)
    _check_quantised(source, names)
    context = context_length(source.config, adapter)
    _check_lengths(recipe, context)
    _check_noise(recipe)
    attention = open_attention(recipe, source.config, adapter)
    return ConversionPlan(
        recipe=recipe,
        source=source,
        adapter=adapter,
        mask=mask,
        attention_changes=attention.changes,
        config_updates=_config_updates(recipe, adapter, mask, attention.config_updates),
        tensors_changed=names if mask.write_row or mask.rows_after != mask.rows_before else (),
        warnings=(*source.warnings, *advise(recipe, source, adapter, context)),
        notes=attention.notes,
    )


def _main_dtype(source: SourceInfo) -> str | None:
    """Return the dtype that holds most of the weights."""
    sizes: dict[str, int] = {}
    for tensor in source.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def plan_as_dict(plan: ConversionPlan) -> dict[str, Any]:
    """Return the plan as plain values for JSON; `training_tokens` counts padding-free positions."""
    recipe, source = plan.recipe, plan.source
    training = recipe.training
    tokens_per_step = (
        training.batch_size * training.gradient_accumulation * recipe.data.sequence_length
    )
    return {
        "source": {
            "given": source.given,
            "kind": source.kind,
            "repo_id": source.repo_id,
            "revision": source.revision,
            "family": plan.adapter.model_type,
            "parameters": source.parameters or None,
            "dtype": _main_dtype(source),
            "tokenizer_size": source.tokenizer.size,
            "context": context_length(source.config, plan.adapter),
            "license": source.license or recipe.license,
        },
        "target": recipe.target,
        "block_size": recipe.block_size,
        "token_shift": plan.token_shift,
        "mask": asdict(plan.mask),
        "attention_changes": list(plan.attention_changes),
        "config_updates": dict(plan.config_updates),
        "tensors_changed": list(plan.tensors_changed),
        "training": training.model_dump(mode="json"),
        "training_tokens": 0 if training.method == "none" else training.steps * tokens_per_step,
        "data": recipe.data.model_dump(mode="json"),
        "min_transformers": plan.adapter.min_transformers,
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
    }
