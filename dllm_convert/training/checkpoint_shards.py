"""Checkpoints that several processes wrote together, read by one that holds everything.

Accelerate writes them with torch's distributed checkpoint, which knows where in the whole each part
belongs: whoever reads gets what it holds, however many wrote. Between processes that share weights
Accelerate reads them as well.
"""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import (
    FullyShardedDataParallelPlugin,
    load_fsdp_model,
    load_fsdp_optimizer,
)
from transformers.trainer import SCHEDULER_NAME


def load_shards(trainer: Any, model: Any, folder: Path) -> None:
    """Read the weights of a checkpoint in parts.

    Args:
        trainer: A Trainer whose processes share no weights.
        model: What it trains.
        folder: The checkpoint.
    """
    load_fsdp_model(_plugin(), trainer.accelerator, model, str(folder), **_adapter_alone())


def load_optimizer_shards(trainer: Any, folder: Path) -> None:
    """Read the moments of a checkpoint in parts, and its schedule.

    Args:
        trainer: A Trainer whose processes share no weights, with its optimizer.
        folder: The checkpoint.
    """
    load_fsdp_optimizer(
        _plugin(), trainer.accelerator, trainer.optimizer, trainer.model, str(folder)
    )
    schedule = torch.load(folder / SCHEDULER_NAME, weights_only=True)
    trainer.lr_scheduler.load_state_dict(schedule)


def _plugin() -> FullyShardedDataParallelPlugin:
    return FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")


def _adapter_alone() -> dict[str, bool]:
    """Have an adapter be read without its base, as the Trainer writes it where it can."""
    known = inspect.signature(load_fsdp_model).parameters
    return {"adapter_only": True} if "adapter_only" in known else {}
