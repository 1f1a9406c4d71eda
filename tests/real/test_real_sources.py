"""Real checkpoints through materialise and adapt, loaded by stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import assets
import pytest

from dllm_convert.common.console import Reporter
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.materialise import materialise
from dllm_convert.weights.run import adapt

pytestmark = [pytest.mark.real, pytest.mark.slow]

QUIET = Reporter(quiet=True)


def convert(source: Path, out: Path, **fields: Any) -> tuple[ConversionPlan, Path]:
    recipe = Recipe.model_validate({"source": str(source), **fields})
    plan = make_plan(recipe, inspect_source(str(source)))
    folder = materialise(plan.source, QUIET).folder
    adapt(plan, folder, out, QUIET)
    return plan, folder


def test_smollm2_keeps_its_logits(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plan, folder = convert(assets.smollm2_gguf(), tmp_path / "out", target="mdlm")
    base = AutoModelForCausalLM.from_pretrained(folder).eval()
    new = AutoModelForCausalLM.from_pretrained(tmp_path / "out", is_causal=True).eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.mask_token_id == plan.mask.id
    ids = tokenizer("Lists are mutable sequences.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before, after = base(ids).logits, new(ids).logits
    torch.testing.assert_close(before, after[..., : plan.mask.rows_before], rtol=0, atol=1e-4)
    row = new.get_input_embeddings().weight[plan.mask.id]
    mean = base.get_input_embeddings().weight.double().mean(0).float()
    torch.testing.assert_close(row, mean, rtol=0, atol=1e-7)


def test_antiberty_loads_without_its_other_heads(tmp_path: Path) -> None:
    from transformers import AutoModelForMaskedLM

    convert(assets.antiberty_folder(), tmp_path / "out", target="mdlm", allow_pickle=True)
    model, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert model.num_parameters() > 25_000_000
