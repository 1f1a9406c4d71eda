"""Have an engine's own loader read an export, in the engine's process: whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


def load_whole(model: Any, out: Path) -> None:
    """Give an engine's model the tensors of an export by its `load_weights`.

    Args:
        model: A module of the engine; what it had is lost.
        out: The export.

    Raises:
        ValueError: A parameter of its class is in no file.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    files = sorted(out.glob("*.safetensors"))
    model.load_weights(item for file in files for item in load_file(file).items())
    unread = [name for name, value in model.named_parameters() if bool(value.isnan().any())]
    if unread:
        raise ValueError(f"{unread[0]} is in no file of the export")
