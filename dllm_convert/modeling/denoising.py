"""What has `generate` write the text that is denoised, whatever a checkpoint does by itself."""

from __future__ import annotations

from typing import Any


def denoised(model: Any) -> dict[str, Any]:
    """Return settings for `generate` that measure denoising itself.

    A checkpoint may write its verifier's text by default (`generation.verify_with`), or draw from
    the reverse process (`generation.sampler`): thresholds change nothing of either.
    """
    config = getattr(model, "generation_config", None)
    return {name: None for name in ("verify_with", "sampler") if getattr(config, name, None)}
