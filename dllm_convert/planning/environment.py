"""Whether weights, config and the installed transformers fit together, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

from packaging.version import Version

from dllm_convert.common.diffusion_section import diffusion_section
from dllm_convert.errors import IncompatibleError
from dllm_convert.recipe.schema import Noise


def check_transformers(needed: str) -> None:
    """Check that the installed transformers honours what the conversion relies on.

    Raises:
        IncompatibleError: It is older: it would load the result causal, without a warning.
    """
    try:
        found = metadata.version("transformers")
    except metadata.PackageNotFoundError:
        return
    if Version(found) < Version(needed):
        raise IncompatibleError(
            f"transformers {found} is installed, which would load the result with causal attention "
            f"and no warning, expected at least {needed}",
            hint=f"pip install 'transformers>={needed}'",
        )


def check_converted(
    config: Mapping[str, Any], noise: Noise, *, mask_id: int, token_shift: bool
) -> str | None:
    """Check that a source that was converted before goes on as it was; return what to know of it.

    Args:
        config: config.json of the source.
        noise: That of this conversion.
        mask_id: The mask token of this conversion.
        token_shift: Whether it reads predictions one position earlier.

    Raises:
        IncompatibleError: It masks with another token, or reads predictions at another position.
    """
    section = diffusion_section(config)
    if section is None:
        return None
    if section.get("acts_on") == "noisy":
        raise IncompatibleError(
            "the source is a base with an adapter beside it, which another conversion would lose",
            hint="Give the base it was made from; --extend with the same --out trains it on",
        )
    shift, mask = section.get("token_shift"), section.get("mask_token_id")
    if shift is not None and shift is not token_shift:
        was, flag = ("with", "keep") if shift else ("without", "drop")
        raise IncompatibleError(
            f"the source is a diffusion model that was trained {was} the token shift: read "
            "otherwise, each of its predictions would be for the wrong position",
            hint=f"--set token_shift={flag}",
        )
    if mask is not None and mask != mask_id:
        raise IncompatibleError(
            f"the source is a diffusion model whose mask token is {mask}, and this would mask with "
            f"{mask_id}, which it never saw",
            hint=f"--set mask_token.id={mask}",
        )
    blocks = f" in blocks of {section['block_size']}" if section.get("block_size") else ""
    return (
        f"the source is a diffusion model already ({section.get('objective')}{blocks}): training "
        "goes on from it, and the autoregressive NLL of the base is that of this model under a "
        f"causal mask{''.join(_made_anew(section, noise))}"
    )


def _made_anew(section: Mapping[str, Any], noise: Noise) -> Iterator[str]:
    """Say what of a conversion's noise is found again instead of being handed on."""
    if section.get("noise_kernel") == noise.kernel == "neighbours":
        yield "; which words are near each other is found again, in its embedding as it is now"
    if section.get("noise_schedule") == noise.schedule == "learned":
        yield "; its noise schedule is learnt again from the first step on"
