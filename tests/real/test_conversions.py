"""Weights somebody really trained: SmolLM2 as Llama, Mistral and Qwen2, and AntiBERTy."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from real import assets
from safetensors.torch import load_file, save_file

from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import read_manifest
from dllm_convert.pipeline.run import run
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.materialise import materialise

pytestmark = pytest.mark.real
QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, dequantised once."""
    return materialise(inspect_source(str(assets.smollm2_gguf())), QUIET).folder


def as_mistral(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Mistral without a window is Llama."""
    config |= {
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "sliding_window": None,
    }


def as_qwen2(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    """Qwen2 is Llama with biases on q, k and v; zero here."""
    config |= {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": False,
    }
    for name in [
        name
        for name in weights
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    ]:
        weights[name.replace(".weight", ".bias")] = torch.zeros(weights[name].shape[0])


def recast(
    source: Path, folder: Path, change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None]
) -> Path:
    """Write the same function under another architecture."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((source / "config.json").read_text())
    weights = load_file(source / "model.safetensors")
    change(config, weights)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def check_made(manifest: Any) -> None:
    """Check what a conversion to BD3LM says of itself."""
    probes = manifest["verification"]["probes"]
    assert probes and not [probe for probe in probes if probe["passed"] is False]
    assert manifest["sample"]["new_tokens"] > 0
    assert manifest["plan"]["mask"]["rule"] == "grow"


def test_smollm2_converts_verifies_and_samples(smollm2: Path, tmp_path: Path) -> None:
    """As the demo does, whose result is looked at where somebody has made it."""
    made = os.environ.get("DLLM_CONVERT_DEMO")
    if made is None:
        convert_to_blocks(smollm2, tmp_path / "out")
    else:
        manifest = read_manifest(Path(made))
        assert (manifest["plan"]["target"], manifest["plan"]["block_size"]) == ("bd3lm", 32)
        check_made(manifest)


@pytest.mark.parametrize("change", [as_mistral, as_qwen2])
def test_smollm2_is_the_same_in_another_family(
    change: Callable[[dict[str, Any], dict[str, torch.Tensor]], None], smollm2: Path, tmp_path: Path
) -> None:
    convert_to_blocks(recast(smollm2, tmp_path / "source", change), tmp_path / "out")


def convert_to_blocks(source: Path, out: Path) -> None:
    """Convert to blocks of 32 without training, and check the result."""
    recipe = Recipe.model_validate(
        {"source": str(source), "target": "bd3lm", "block_size": 32, "training": {"method": "none"}}
    )
    result = run(recipe, out, QUIET)
    assert result.passed
    check_made(result.manifest)


def test_antiberty_converts_to_mdlm(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        {
            "source": str(assets.antiberty_folder()),
            "target": "mdlm",
            "training": {"method": "none"},
            "allow_pickle": True,
        }
    )
    result = run(recipe, tmp_path / "out", QUIET)
    probes = result.manifest["verification"]["probes"]
    assert result.passed, [probe for probe in probes if probe["passed"] is False]
    assert result.manifest["plan"]["mask"]["rule"] == "tokenizer"
