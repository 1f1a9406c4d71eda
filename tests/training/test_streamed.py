"""Files that are written tensor by tensor are, byte for byte, those of a model that is whole."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from factory import FAMILIES
from test_shards import METHODS
from test_trainer import converted

from dllm_convert.modeling.hollow import hollow_model
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.training import streamed, writing
from dllm_convert.training.setup import trainable_model
from dllm_convert.training.writing import write_merged, write_shards, write_trained


def trained_model(plan: ConversionPlan, untrained: Path) -> Any:
    """A model whose trained weights are others than they were, biases and norms too."""
    model = trainable_model(plan, untrained)
    draws = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight += 0.1 * torch.randn(weight.shape, generator=draws)
    return model


def stream(model: Any, untrained: Path, out: Path, plan: ConversionPlan) -> None:
    """Write a model as the first of several processes does, with all of it on this side."""
    trainer = SimpleNamespace(
        model=model, model_wrapped=model, args=SimpleNamespace(process_index=0)
    )
    hollow = hollow_model(untrained, plan.adapter, dtype=torch.float32, attention="sdpa")
    write = write_shards if plan.recipe.training.method == "full" else write_merged
    write(trainer, hollow, untrained, out, plan)


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", list(FAMILIES))
def test_streamed_files_are_those_of_the_whole(
    family: str, method: str, tied: bool, tmp_path: Path, source_cache: SourceFactory
) -> None:
    fields = {**METHODS[method], "keep_adapter": method != "full"}
    plan, _ = converted(source_cache(family, tied=tied), tmp_path / "a", **fields)
    model = trained_model(plan, tmp_path / "a")
    stream(model, tmp_path / "a", tmp_path / "streamed", plan)
    write_trained(model, tmp_path / "a", tmp_path / "whole", plan)
    ours, theirs = contents(tmp_path / "streamed"), contents(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    untrained = contents(tmp_path / "a")
    assert ours["model.safetensors"] != untrained["model.safetensors"]
    if method != "full":
        assert "adapter/adapter_model.safetensors" in ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["full", "mask-row"])
def test_several_files_of_16_bits_too(
    method: str,
    dtype: torch.dtype,
    tmp_path: Path,
    source_factory: SourceFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Of rows cast a few at a time, and of files that begin anew after 30 kB.
    monkeypatch.setattr(streamed, "_PIECE", 100)
    monkeypatch.setattr(writing, "MAX_FILE", "30KB")
    monkeypatch.setattr(
        writing, "layout_of", lambda *given: streamed.layout_of(*given, max_file="30KB")
    )
    source = source_factory("qwen2", tied=False, dtype=dtype)
    plan, _ = converted(source, tmp_path / "a", **METHODS[method])
    model = trained_model(plan, tmp_path / "a")
    stream(model, tmp_path / "a", tmp_path / "streamed", plan)
    write_trained(model, tmp_path / "a", tmp_path / "whole", plan)
    ours, theirs = contents(tmp_path / "streamed"), contents(tmp_path / "whole")
    assert "model.safetensors.index.json" in theirs
    assert ours == theirs
