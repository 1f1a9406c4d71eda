"""What learning from the base (`training.distillation`) needs of a checkpoint."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.planning.gated import behind_of
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.info import SourceInfo


def check_teacher(recipe: Recipe, source: SourceInfo, adapter: Adapter) -> None:
    """Check that the base can teach, if that is asked for: it predicts the next token.

    Raises:
        UnsupportedError: It reads both sides of every token.
        IncompatibleError: It is a diffusion model already.
    """
    if not recipe.training.distillation.weight:
        return
    out = "Leave training.distillation out"
    if adapter.attention != "causal":
        raise UnsupportedError(
            f"{adapter.model_type} reads both sides of every token; training.distillation learns "
            "from a base that predicts the next one from those before it",
            hint=out,
        )
    if recipe.training.keeps_base and behind_of(source.config, adapter) == "cache":
        raise UnsupportedError(
            f"{adapter.model_type} keeps its base behind a cache, which is read block by block; "
            "training.distillation is not written for that",
            hint=out,
        )
    if diffusion_section(source.config) is not None:
        raise IncompatibleError(
            "the source is a diffusion model already, so there is no autoregressive base that "
            "could teach",
            hint=f"{out}, or take the model it was converted from",
        )
