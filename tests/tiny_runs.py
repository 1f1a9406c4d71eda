"""Whole conversions of tiny checkpoints: what is asked of them, and waiting for one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from forks import Forked

from dllm_convert.recipe.schema import Recipe


def recipe(source: Path, target: str = "bd3lm", **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "source": str(source),
            "target": target,
            "block_size": 8 if target == "bd3lm" else None,
            "data": {"sequence_length": 32, "max_documents": 40, "held_out_sequences": 8},
            "training": {
                "steps": 24,
                "batch_size": 2,
                "learning_rate": 1e-2,
                "precision": "fp32",
                "lora": {"rank": 4},
                **training,
            },
            "generation": {"max_new_tokens": 16},
        }
    )


def wait_for(path: Path, process: Forked, pattern: str = "checkpoint-*/complete") -> None:
    deadline = time.monotonic() + 120
    while not list(path.glob(pattern)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
