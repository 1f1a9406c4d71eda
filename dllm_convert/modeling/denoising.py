"""What has `generate` write the text that is denoised, whatever a checkpoint does by itself."""

from __future__ import annotations

from typing import Any


def denoised(model: Any) -> dict[str, Any]:
    """Return settings for `generate` that measure denoising itself.

    A checkpoint may write its verifier's text by default (`generation.verify_with`), of which
    thresholds and steps change nothing.
    """
    config = getattr(model, "generation_config", None)
    return {"verify_with": None} if getattr(config, "verify_with", None) else {}
