"""Which engines a planned conversion could be exported to: told before anybody trains."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.planning.layouts.registry import reachable
from dllm_convert.planning.layouts.target import Converted
from dllm_convert.source.safetensors_header import TensorEntry

if TYPE_CHECKING:
    from dllm_convert.planning.conversion import ConversionPlan


def servable(plan: ConversionPlan) -> dict[str, dict[str, Any]]:
    """Return layout to its engines and to what stands in the way; nothing: it can be had.

    Args:
        plan: The plan. Of a source whose headers tell no names, biases are not seen here; the
            export sees them.
    """
    config = {**plan.source.config, **plan.config_updates}
    dropped = set(plan.tensors_dropped)
    vocabulary = plan.source.tokenizer.vocab
    converted = Converted(
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
    return {
        target.name: {
            "engines": list(target.engines),
            "refused": [refusal.reason for refusal in refusals],
            "way_out": refusals[0].way_out if refusals else None,
        }
        for target, refusals in reachable(converted)
    }
