"""The adapter alone turns the base into the same model as the merged weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forks
import pytest
import torch
from conversion import convert
from factory import FAMILIES

from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import MANIFEST_FILE, hash_files, read_manifest, write_manifest
from dllm_convert.errors import DataError
from dllm_convert.modeling.bundle import CODE_FILES
from dllm_convert.modeling.loading import load_model
from dllm_convert.planning.conversion import plan_as_dict
from dllm_convert.publishing.adapter import adapter_checkpoint
from dllm_convert.training.setup import make_trainable
from dllm_convert.training.writing import write_trained

LOAD = """
import sys
sys.modules["dllm_convert"] = None
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer
from transformers.dynamic_module_utils import get_class_from_dynamic_module

adapter, base, merged, name, rows_before = sys.argv[1:]
config = AutoConfig.from_pretrained(adapter)
rows, tied = config.vocab_size, config.tie_word_embeddings
config.vocab_size = int(rows_before)
model_class = get_class_from_dynamic_module(f"modeling_dllm.{name}", adapter)
model = model_class.from_pretrained(base, config=config)
model.resize_token_embeddings(rows, mean_resizing=False)
model = PeftModel.from_pretrained(model, adapter).merge_and_unload().eval()
if tied:
    model.get_output_embeddings().weight = model.get_input_embeddings().weight
tokenizer = AutoTokenizer.from_pretrained(adapter)
whole = model_class.from_pretrained(merged).eval()
tokens = torch.arange(20)[None] % tokenizer.vocab_size
tokens[0, 7] = tokenizer.mask_token_id
with torch.no_grad():
    print(float((model(tokens).logits - whole(tokens).logits).abs().max()))
    print(model(tokens).logits.shape == whole(tokens).logits.shape)
"""


def trained(base: Path, folder: Path, embeddings: str, *, keep: bool = True) -> Any:
    """Write a checkpoint whose LoRA matrices, norms and embeddings all moved."""
    training = {
        "method": "lora",
        "keep_adapter": keep,
        "lora": {"rank": 4, "embeddings": embeddings},
    }
    target = "mdlm"
    plan = convert(base, folder.with_name("untrained"), target, training=training, method="lora")
    model = load_model(folder.with_name("untrained"), plan.adapter)
    model = make_trainable(model, plan.adapter, plan.recipe.training)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    write_trained(model, folder.with_name("untrained"), folder, plan)
    files = hash_files(folder, exclude=(MANIFEST_FILE,))
    source = {"model_type": plan.source.model_type, "given": str(base)}
    write_manifest(
        folder, {"format_version": 1, "files": files, "plan": plan_as_dict(plan), "source": source}
    )
    return plan


@pytest.mark.parametrize("embeddings", ["full", "mask_row"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_base_and_adapter_are_the_merged_model(
    source_cache: Callable[..., Path], tmp_path: Path, family: str, embeddings: str
) -> None:
    base = source_cache(family)
    merged, out = tmp_path / "merged", tmp_path / "adapter"
    plan = trained(base, merged, embeddings)
    adapter_checkpoint(merged, out, Reporter(quiet=True))
    names = {path.name for path in out.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", *CODE_FILES} <= names
    assert not {"model.safetensors", "adapter", "README.md"} & names
    manifest = read_manifest(out)
    assert manifest["adapter_only"] is True
    assert manifest["files"] == hash_files(out, exclude=(MANIFEST_FILE,))
    done = forks.run(
        [
            *(sys.executable, "-c", LOAD, str(out), str(base), str(merged)),
            *(plan.adapter.diffusion_class, str(plan.mask.rows_before)),
        ],
        modules=forks.STRANGER_WITH_PEFT,
        env=os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    difference, same_shape = done.stdout.split()[-2:]
    assert same_shape == "True"
    assert float(difference) <= plan.adapter.tolerance


def test_no_path_of_this_machine_travels(source_cache: Callable[..., Path], tmp_path: Path) -> None:
    base = source_cache("llama")
    trained(base, tmp_path / "merged", "full")
    config = json.loads((tmp_path / "merged" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base.name
    assert str(tmp_path) not in json.dumps(config) and str(base) not in json.dumps(config)
    assert config["auto_mapping"]["parent_library"] == "modeling_dllm"


def test_no_adapter_no_publication(source_cache: Callable[..., Path], tmp_path: Path) -> None:
    trained(source_cache("llama"), tmp_path / "merged", "full", keep=False)
    with pytest.raises(DataError, match="--keep-adapter"):
        adapter_checkpoint(tmp_path / "merged", tmp_path / "adapter", Reporter(quiet=True))
