"""The LoRA adapter as files that load on the base model, wherever they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_convert.plan import ConversionPlan

ADAPTER = "adapter"
"""Folder of the adapter inside a checkpoint."""


def save_adapter(model: Any, folder: Path, plan: ConversionPlan) -> None:
    """Write the adapter without a trace of the machine it was made on.

    Args:
        model: PEFT model.
        folder: New folder.
        plan: The conversion.
    """
    source = plan.source
    config = model.peft_config[model.active_adapter]
    # PEFT would write the path of the untrained conversion, which nobody else has.
    config.base_model_name_or_path = source.repo_id or Path(source.given).name
    config.revision = source.revision
    # Loading it by PEFT's own classes would put it on a causal model: nothing of that name exists.
    config.auto_mapping = {
        "base_model_class": plan.adapter.diffusion_class,
        "parent_library": "modeling_dllm",
    }
    # Rows that the conversion added are nowhere else if only the mask's row is trained.
    grown = plan.mask.rows_after != plan.mask.rows_before
    model.save_pretrained(folder, save_embedding_layers=True if grown else "auto")
    (folder / "README.md").unlink(missing_ok=True)
