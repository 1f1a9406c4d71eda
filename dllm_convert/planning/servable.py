"""Which engines a planned conversion could be exported to: told before anybody trains."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, Any

from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.errors import IncompatibleError
from dllm_convert.planning.layouts.registry import TARGETS, reachable
from dllm_convert.planning.layouts.target import Converted, Layout, Target
from dllm_convert.recipe.engines import NEEDS
from dllm_convert.source.safetensors_header import TensorEntry

if TYPE_CHECKING:
    from dllm_convert.planning.conversion import ConversionPlan


def servable(plan: ConversionPlan) -> dict[str, dict[str, Any]]:
    """Return layout to its engines and to what stands in the way; nothing: it can be had.

    Args:
        plan: The plan. Of a source whose headers tell no names, biases are not seen here; the
            export sees them.
    """
    return {
        target.name: {
            "engines": list(target.engines),
            "refused": [refusal.reason for refusal in refusals],
            "way_out": refusals[0].way_out if refusals else None,
        }
        for target, refusals in reachable(_converted(plan))
    }


def _converted(plan: ConversionPlan) -> Converted:
    config = {**plan.source.config, **plan.config_updates}
    dropped = set(plan.tensors_dropped)
    vocabulary = plan.source.tokenizer.vocab
    return Converted(
        config=config,
        section=DiffusionSection.of(config["diffusion"]),
        adapter=plan.adapter,
        entries={
            name: TensorEntry(info.dtype, tuple(info.shape), 0, 0)
            for name, info in plan.source.tensors.items()
            if name not in dropped
        },
        tokens=max([plan.mask.id, *vocabulary.values()]) + 1,
    )


def served(plan: ConversionPlan) -> dict[str, Any] | None:
    """Return how the engine that the recipe names will read the conversion; None: it names none.

    Raises:
        IncompatibleError: No layout that it reads can hold the conversion; says why.
    """
    engine = plan.recipe.serve
    if engine is None:
        return None
    layouts = [target for target in TARGETS.values() if engine in _readers(target)]
    if not layouts:
        raise IncompatibleError(
            f"this version writes no layout that {engine} reads",
            hint=f"Engines that one is written for: {', '.join(_engines())}",
        )
    refused = {target.name: why for target, why in reachable(_converted(plan))}
    found = next((target for target in layouts if not refused[target.name]), None)
    if found is None:
        name, refusals = min(
            ((target.name, refused[target.name]) for target in layouts),
            key=lambda item: len(item[1]),
        )
        raise IncompatibleError(
            f"{engine} could not serve it ({name}): "
            + "; ".join(refusal.reason for refusal in refusals),
            hint=refusals[0].way_out,
        )
    moved = found.mask_row if isinstance(found, Target) else None
    return {
        "engine": next(name for name in found.engines if name.casefold() == engine),
        "layout": found.name,
        "because": {
            name: {"value": attrgetter(name)(plan.recipe), "reason": need.reason}
            for name, need in NEEDS[engine].items()
        },
        "mask_row": plan.mask.id if moved is None else moved,
    }


def _readers(target: Layout) -> list[str]:
    return [name.casefold() for name in target.engines]


def _engines() -> list[str]:
    return sorted({name for target in TARGETS.values() for name in _readers(target)})
