"""Which of two fields holds where one of them says the other more narrowly.

A later layer beats an earlier one field by field: preset, recipe file, `--preset`, flags and
`--set`. But fields overlap: a learning rate for LoRA beats the learning rate, and minutes end a
training before its steps. There, too, nothing beats what was said later: the narrower field of an
earlier layer is forgotten where a later one sets the broader.
"""

from __future__ import annotations

from collections.abc import Mapping

FORGOTTEN: Mapping[str, tuple[str, ...]] = {
    "source": ("revision", "license", "parameters"),
    "training.learning_rate": ("training.lora.learning_rate",),
    "training.steps": ("training.max_minutes", "training.tokens"),
    "training.tokens": ("training.max_minutes", "training.steps"),
    "training.lora.rank": ("training.lora.alpha",),
    "noise.schedule": ("noise.power",),
    "mask_token.token": ("mask_token.id",),
    "mask_token.id": ("mask_token.token",),
    # These name parts of one dataset, and which of it is measured on.
    "data.source": (
        *("data.mixture", "data.subset", "data.split", "data.revision"),
        *("data.containing", "data.held_out_split"),
    ),
    "data.held_out_source": ("data.held_out_split",),
    # Each says when a position is sure enough; together the laxer one rules.
    "generation.max_denoising_steps": (
        "generation.confidence_threshold",
        "generation.entropy_bound",
    ),
    "generation.confidence_threshold": ("generation.entropy_bound",),
    "generation.entropy_bound": ("generation.confidence_threshold",),
    "generation.remasking": ("generation.remasking_ratio",),
}
"""Broader field to narrower ones that say the same, or that made sense for its old value only."""

NAMES = frozenset({"source", "data.source", "data.held_out_source"})
"""Broader fields that make narrower ones void only where they name something else than before."""


def forgotten(ranks: Mapping[str, int]) -> set[str]:
    """Return the fields that a later layer's broader field makes void.

    Args:
        ranks: Dotted field to the number of the layer that set it, later layers the higher.
    """
    return {
        narrow
        for broad, narrows in FORGOTTEN.items()
        for narrow in narrows
        if broad in ranks and ranks.get(narrow, ranks[broad]) < ranks[broad]
    }
