"""ConversionPlan: everything a run will do, as one printable value; reads headers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any

from dllm_convert.adapters import get_adapter
from dllm_convert.adapters.base import Adapter
from dllm_convert.adapters.measured import RECORD, adapter_as_dict
from dllm_convert.common.diffusion_section import DiffusionSection, diffusion_section
from dllm_convert.common.secrets_found import refuse_secrets
from dllm_convert.common.tables import Block, Printed
from dllm_convert.modeling.bundle import auto_map
from dllm_convert.planning.advice import advise
from dllm_convert.planning.attention import open_attention
from dllm_convert.planning.checks import (
    check_context,
    check_target,
)
from dllm_convert.planning.config_code import (
    check_adapter_beside,
    check_class,
    check_weights_named,
    code_warnings,
)
from dllm_convert.planning.environment import check_converted, check_transformers
from dllm_convert.planning.gated import (
    behind_of,
    check_kept_base,
    draft_of,
    kept_attention,
    without_row,
)
from dllm_convert.planning.ids import check_token_ids
from dllm_convert.planning.launch import ALONE, Launch
from dllm_convert.planning.layers import AttentionLayers
from dllm_convert.planning.mask_token import MaskRule, MaskTokenDecision, decide_mask_token
from dllm_convert.planning.model_shape import ModelShape, model_shape
from dllm_convert.planning.servable import served
from dllm_convert.planning.streams import writing
from dllm_convert.planning.teacher import check_on_policy, check_teacher
from dllm_convert.planning.tokenizer import check_tokenizer
from dllm_convert.planning.writes import Writes, count_writes
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.config_numbers import check_numbers, check_padding
from dllm_convert.source.context import context_length
from dllm_convert.source.folder import check_pickle
from dllm_convert.source.info import SourceInfo
from dllm_convert.source.quantised import check_quantised, side_file_warning
from dllm_convert.source.source_fit import fit_source

__all__ = [
    "ConversionPlan",
    "MaskRule",
    "MaskTokenDecision",
    "make_plan",
    "plan_as_dict",
]


@dataclass(frozen=True)
class ConversionPlan(Printed):
    """Everything a run will do.

    Attributes:
        recipe: The resolved recipe.
        source: The checkpoint, seen through its headers.
        adapter: The family's declaration.
        mask: The mask-token decision.
        attention_changes: One sentence per change to the attention.
        config_updates: Keys written into config.json; None is written as null.
        tensors_changed: Names of tensors whose bytes will differ before training.
        tensors_dropped: Names of tensors that the stock class does not load and the output lacks.
        layers: Attention of the layers, by type.
        writes: Bytes of weights that are written; None if the headers tell no shapes.
        shape: Sizes that costs depend on; None if the headers tell no shapes.
        warnings: Sentences the user should read before starting.
        notes: What stays as it is although one might expect otherwise.
        launch: Who trains together.
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
    tensors_dropped: tuple[str, ...] = ()
    layers: tuple[AttentionLayers, ...] = ()
    writes: Writes | None = None
    shape: ModelShape | None = None
    launch: Launch = ALONE

    @property
    def training_tokens(self) -> int:
        """Tokens that all planned steps see over all processes, padding included."""
        return self.recipe.training_tokens * self.launch.processes

    @property
    def token_shift(self) -> bool:
        """Whether position i is predicted from the hidden state of i-1."""
        return _keeps_shift(self.recipe, self.adapter)

    def as_dict(self) -> dict[str, Any]:
        """Return what `check --json` prints."""
        from dllm_convert.planning.document import plan_document

        return plan_document(self)

    def as_blocks(self) -> list[Block]:
        """Return what `check` shows."""
        from dllm_convert.planning.plan_text import plan_blocks

        return plan_blocks(self.as_dict())


def _keeps_shift(recipe: Recipe, adapter: Adapter) -> bool:
    """Whether the autoregressive alignment is kept; an encoder has none to keep."""
    return adapter.attention == "causal" and recipe.token_shift == "keep"  # noqa: S105


def _diffusion_section(
    recipe: Recipe, config: Mapping[str, Any], adapter: Adapter, mask: MaskTokenDecision
) -> DiffusionSection:
    noise, training = recipe.noise, recipe.training
    lora = training.lora
    adapter_facts: dict[str, Any] = {}
    if training.keeps_base:
        adapter_facts = {
            "acts_on": lora.acts_on,
            "adapter_rank": lora.rank,
            "adapter_alpha": lora.alpha or 2 * lora.rank,
            "adapter_targets": adapter.lora_targets,
            "adapter_norms": adapter.norm_modules if lora.noisy_norms else (),
            "behind": behind_of(config, adapter),
        }
    return DiffusionSection(
        objective=recipe.target,
        block_size=recipe.block_size,
        mask_token_id=mask.id,
        token_shift=_keeps_shift(recipe, adapter),
        noise_schedule=noise.schedule,
        noise_power=noise.power,
        noise_kernel=noise.kernel,
        discrete_steps=noise.discrete_steps,
        noise_jumps=noise.jumps,
        # Before training all words are masked alike, with the linear schedule.
        noise_exponents=(1.0,) if noise.schedule == "learned" else (),
        context="causal" if recipe.reads_causally else "block",
        draft=draft_of(recipe, config, adapter),
        **adapter_facts,
    )


def _config_updates(
    recipe: Recipe,
    config: Mapping[str, Any],
    adapter: Adapter,
    mask: MaskTokenDecision,
    opened: Mapping[str, Any],
    stored: Mapping[str, Any],
) -> dict[str, Any]:
    if recipe.training.keeps_base:
        # To everybody who does not load our class the folder is the base.
        section = _diffusion_section(recipe, config, adapter, mask).as_dict()
        if "architectures" not in config:
            # A text model that another one held need not say what it is.
            stored = {**stored, "architectures": [adapter.stock_class]}
        if adapter.measured is not None:
            section[RECORD] = adapter_as_dict(adapter)
        return {
            **stored,
            "auto_map": auto_map(adapter),
            "mask_token_id": mask.id,
            "diffusion": section,
            "block_size": recipe.block_size,
        }
    updates: dict[str, Any] = {
        **stored,
        "architectures": [adapter.diffusion_class],
        "auto_map": auto_map(adapter),
        **(adapter.measured.config if adapter.measured else {}),
        "is_causal": False,
        "mask_token_id": mask.id,
        "vocab_size": mask.rows_after,
        **opened,
        "diffusion": _diffusion_section(recipe, config, adapter, mask).as_dict(),
    }
    if recipe.target == "bd3lm":
        updates["block_size"] = recipe.block_size
    elif diffusion_section(config) is not None:
        # Left by a conversion to bd3lm it would keep the attention block-causal.
        updates["block_size"] = None
    if adapter.measured is not None:
        # Whoever reads the folder later has no file to look the family up in.
        updates["diffusion"][RECORD] = adapter_as_dict(adapter)
    return updates


def make_plan(
    recipe: Recipe,
    source: SourceInfo,
    measured: Adapter | None = None,
    launch: Launch = ALONE,
) -> ConversionPlan:
    """Decide everything a run will do, from the recipe and the source's headers.

    Args:
        recipe: What to do.
        source: The checkpoint, seen through its headers.
        measured: The family, where it was measured and no file declares it.
        launch: Who trains together.

    Raises:
        UnsupportedError: The family, or this target for it, has no conversion.
        IncompatibleError: The checkpoint or the recipe cannot be converted as asked.
    """
    refuse_secrets(recipe.model_dump())
    adapter = measured or get_adapter(source.model_type)
    check_quantised(source)
    if adapter.measured is not None:
        source = replace(source, config={**source.config, **adapter.measured.config})
    check_numbers(source.config, adapter, len(source.tensors))
    check_transformers(adapter.min_transformers)
    check_class(source.config, adapter)
    check_adapter_beside(source.beside)
    check_weights_named(source.config, source.files)
    check_target(recipe, adapter)
    check_pickle(source, allowed=recipe.allow_pickle)
    tokenizer = check_tokenizer(source)
    fit, source, files = fit_source(source, adapter)
    mask = decide_mask_token(recipe, source, adapter)
    check_teacher(recipe, source, adapter)
    check_on_policy(recipe, launch)
    kept = recipe.training.keeps_base
    if kept:
        check_kept_base(source, adapter)
        mask = without_row(mask)
    check_padding(source.config, mask.rows_after)
    check_token_ids(source, mask.rows_after)
    shift = _keeps_shift(recipe, adapter)
    converted = check_converted(source.config, recipe.noise, mask_id=mask.id, token_shift=shift)
    context = context_length(source.config, adapter)
    check_context(recipe, context, source.config)
    attention = (kept_attention if kept else open_attention)(recipe, source, adapter)
    changed = fit.vocabulary if mask.write_row or mask.rows_after != mask.rows_before else ()
    known = (converted, side_file_warning(source), *code_warnings(source, adapter), *fit.warnings)
    plan = ConversionPlan(
        recipe=recipe,
        source=source,
        adapter=adapter,
        mask=mask,
        attention_changes=attention.changes,
        config_updates=_config_updates(
            recipe, source.config, adapter, mask, attention.config_updates, fit.config
        ),
        tensors_changed=changed,
        warnings=(
            *source.warnings,
            *tokenizer,
            *(sentence for sentence in known if sentence),
            *advise(recipe, source, adapter, context, launch),
        ),
        notes=(*attention.notes, *fit.notes, *_taken_out(source)),
        tensors_dropped=fit.dropped,
        layers=attention.layers,
        writes=count_writes(source, mask, changed=changed, rewritten=files)
        if source.tensors
        else None,
        shape=model_shape(source, adapter, mask),
        launch=launch,
    )
    served(plan)
    return plan


def _taken_out(source: SourceInfo) -> tuple[str, ...]:
    if source.inside is None:
        return ()
    return (f"the text model of a {source.inside}: nothing else of it was taken",)


def _main_dtype(source: SourceInfo) -> str | None:
    """Return the dtype that holds most of the weights."""
    sizes: dict[str, int] = {}
    for tensor in source.tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.size
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def _parts(shape: ModelShape | None) -> dict[str, Any] | None:
    """Return the conversion's parameters by part."""
    if shape is None:
        return None
    return {
        "embedding": shape.embedding,
        "layers": shape.layer_parameters,
        "head": shape.head,
        "other": shape.other,
        "tied": shape.tied,
        "total": shape.parameters,
    }


def _on_policy(recipe: Recipe) -> dict[str, int] | None:
    """Say how often the model writes what it is trained on, and what that takes; None for never."""
    chosen = recipe.training.on_policy
    if not chosen.share:
        return None
    return {
        "steps": int(Fraction(repr(chosen.share)) * recipe.training.steps),
        "prompt_tokens": chosen.prompt_tokens,
        "new_tokens": chosen.new_tokens,
        "forwards": writing(recipe).forwards,
    }


def plan_as_dict(plan: ConversionPlan) -> dict[str, Any]:
    """Return the plan as plain values for JSON; tokens are those of all processes."""
    recipe, source = plan.recipe, plan.source
    training = recipe.training
    return {
        "source": {
            "given": source.given,
            "kind": source.kind,
            "repo_id": source.repo_id,
            "revision": source.revision,
            "family": plan.adapter.model_type,
            "parameters": source.parameters or None,
            "parts": _parts(plan.shape),
            "dtype": _main_dtype(source),
            "weight_files": sorted({tensor.file for tensor in source.tensors.values()}),
            "tokenizer_size": source.tokenizer.size,
            "context": context_length(source.config, plan.adapter),
            "license": source.license or recipe.license,
            "license_name": source.card.license_name,
            "gated": source.gated,
        },
        "target": recipe.target,
        "block_size": recipe.block_size,
        "growing_sizes": list(recipe.growing_sizes),
        "on_policy": _on_policy(recipe),
        "token_shift": plan.token_shift,
        "mask": asdict(plan.mask),
        "attention_layers": [
            asdict(group) | {"layers": list(group.layers)} for group in plan.layers
        ],
        "attention_changes": list(plan.attention_changes),
        "config_updates": dict(plan.config_updates),
        "tensors_changed": list(plan.tensors_changed),
        "tensors_dropped": list(plan.tensors_dropped),
        "writes": plan.writes.as_dict() if plan.writes else None,
        "training": training.model_dump(mode="json"),
        "training_tokens": 0 if training.method == "none" else plan.training_tokens,
        "noise": recipe.noise.model_dump(mode="json"),
        "data": recipe.data.model_dump(mode="json"),
        "measured": asdict(plan.adapter.measured) if plan.adapter.measured else None,
        "min_transformers": plan.adapter.min_transformers,
        "warnings": list(plan.warnings),
        "notes": list(plan.notes),
    }


def source_facts(plan: ConversionPlan) -> dict[str, Any]:
    """Return the `source` section: what was converted, and what its author says of it."""
    source = plan.source
    return {
        "given": source.given,
        "kind": source.kind,
        "repo_id": source.repo_id,
        "revision": source.revision,
        "license": source.license or plan.recipe.license,
        "license_name": source.card.license_name,
        "license_link": source.card.license_link,
        "language": list(source.card.languages),
        "origin": source.card.origin,
        "model_type": source.model_type,
        "parameters": source.parameters,
        "fingerprint": dict(source.fingerprint),
    }
