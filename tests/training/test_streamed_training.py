"""Training on a stream and on chats, with an interruption, through the real Trainer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from transformers import AutoTokenizer

from dllm_convert.common.console import Reporter
from dllm_convert.modeling.loading import load_model
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.training.data.streaming import TextStream
from dllm_convert.training.data.text import TextData, prepare_data
from dllm_convert.training.resume import checkpoint_step, last_whole_checkpoint
from dllm_convert.training.run import train
from dllm_convert.weights.run import adapt

QUIET = Reporter(quiet=True)


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    folder = tmp_path / "chats"
    folder.mkdir()
    for part in range(3):
        lines = [
            json.dumps({"prompt": f"Count to {n}", "completion": " ".join(map(str, range(n)))})
            for n in range(3 + part, 40, 3)
        ]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    return folder


def prepared(plan: ConversionPlan, untrained: Path, folder: Path) -> TextData:
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    data = prepare_data(plan.recipe, tokenizer, QUIET, folder)
    if isinstance(data.train, TextStream):
        object.__setattr__(data.train, "window_tokens", 200)
    return data


@pytest.mark.parametrize("streaming", ["off", "on"])
def test_a_resumed_training_on_chats_equals_an_uninterrupted_one(
    streaming: str, tmp_path: Path, chats: Path, source_cache: SourceFactory
) -> None:
    base = source_cache("llama")
    recipe = Recipe.model_validate(
        {
            "source": str(base),
            "target": "bd3lm",
            "block_size": 8,
            "data": {"source": str(chats), "sequence_length": 64, "streaming": streaming},
            "training": {
                "steps": 6,
                "batch_size": 2,
                "gradient_accumulation": 2,
                "learning_rate": 1e-2,
                "precision": "fp32",
                "save_steps": 2,
            },
        }
    )
    plan = make_plan(recipe, inspect_source(str(base)))
    adapt(plan, base, tmp_path / "untrained", QUIET)
    weights: list[dict[str, Any]] = []
    for name in ("whole", "resumed"):
        data = prepared(plan, tmp_path / "untrained", tmp_path / "data")
        out = tmp_path / name
        train(plan, data, tmp_path / "untrained", out, tmp_path / "work", QUIET)
        weights.append(load_model(out, plan.adapter).state_dict())
        if name == "whole":
            shutil.rmtree(tmp_path / "work/trainer/checkpoint-6")
            last = last_whole_checkpoint(tmp_path / "work/trainer")
            assert last is not None and checkpoint_step(last) == 4
    before = load_model(tmp_path / "untrained", plan.adapter).state_dict()
    moved = max(float((weights[0][name] - before[name]).abs().max()) for name in before)
    worst = max(float((weights[0][name] - weights[1][name]).abs().max()) for name in before)
    assert worst < 1e-6 < moved
