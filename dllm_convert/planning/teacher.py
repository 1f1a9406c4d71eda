"""What learning from the base needs of a checkpoint: from its predictions, from its own text."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.planning.launch import Launch
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.info import SourceInfo


def check_teacher(recipe: Recipe, source: SourceInfo, adapter: Adapter) -> None:
    """Check that the base can teach, if that is asked for: it predicts the next token.

    Raises:
        UnsupportedError: It reads both sides of every token.
        IncompatibleError: It is a diffusion model already.
    """
    _check_writer(recipe, source, adapter)
    if not recipe.training.learns_from_base:
        return
    aligned = recipe.training.alignment_loss_weight > 0
    field = "training.alignment_loss_weight" if aligned else "training.distillation"
    if recipe.training.on_policy.share and not aligned:
        field = "training.on_policy"
    out = f"Leave {field} out"
    if aligned and adapter.measured is not None:
        raise UnsupportedError(
            f"{adapter.model_type} was measured, not declared, and what its layers return is not "
            f"known; {field} compares it",
            hint=out,
        )
    if adapter.attention != "causal":
        raise UnsupportedError(
            f"{adapter.model_type} reads both sides of every token; {field} learns "
            "from a base that predicts the next one from those before it",
            hint=out,
        )
    if diffusion_section(source.config) is not None:
        raise IncompatibleError(
            "the source is a diffusion model already, so there is no autoregressive base that "
            "could teach",
            hint=f"{out}, or take the model it was converted from",
        )


def check_on_policy(recipe: Recipe, launch: Launch) -> None:
    """Check that each process can write by itself, if a model is to write what it is trained on.

    Raises:
        IncompatibleError: None of them can hold all weights.
    """
    shares = launch.sharing.weights > 1 and launch.strategy != "fsdp2"
    if recipe.training.on_policy.share and shares:
        raise IncompatibleError(
            f"training.on_policy and {launch.name} do not go together: each process writes its own "
            "texts, for which it gathers all weights, as FSDP2 lets it",
            hint="--launch-config recipes/launch/fsdp2.yaml; ZeRO-2 and DDP share no weights",
        )


def _check_writer(recipe: Recipe, source: SourceInfo, adapter: Adapter) -> None:
    """Check that the base can write, if that is asked for.

    Raises:
        UnsupportedError: It reads both sides of every token.
        IncompatibleError: It is a diffusion model already.
    """
    if not recipe.data.write_with_base.prompts:
        return
    out = "Leave data.write_with_base out"
    if adapter.attention != "causal":
        raise UnsupportedError(
            f"{adapter.model_type} reads both sides of every token and writes no text; "
            "data.write_with_base is for a base that predicts the next one",
            hint=out,
        )
    if diffusion_section(source.config) is not None:
        raise IncompatibleError(
            "the source is a diffusion model already, and data.write_with_base asks an "
            "autoregressive base",
            hint=f"{out}, or take the model it was converted from",
        )
