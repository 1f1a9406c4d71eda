"""The LoRA adapter as files that load on the base model, wherever they were made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dllm_convert.common.json_files import write_json
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.source.safetensors_header import load_json_object

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
    # Rows that the conversion added are nowhere else if only the mask's row is trained.
    grown = plan.mask.rows_after != plan.mask.rows_before
    model.save_pretrained(folder, save_embedding_layers=grown)
    (folder / "README.md").unlink(missing_ok=True)
    written = load_json_object(folder / "adapter_config.json")
    # PEFT names the module of this package; a loader that trusts it alone has to stop, not go on
    # with a causal model.
    written["auto_mapping"] = {
        "base_model_class": plan.adapter.diffusion_class,
        "parent_library": "modeling_dllm",
    }
    write_json(folder / "adapter_config.json", written)
