"""Drafts on weights that somebody trained: the base's text, in fewer forwards."""

from __future__ import annotations

from pathlib import Path

import pytest
from real import assets
from transformers import AutoModelForCausalLM, AutoTokenizer

from dllm_convert.common.console import Reporter
from dllm_convert.modeling.loading import load_model
from dllm_convert.modeling.published import drafting
from dllm_convert.planning.conversion import make_plan
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.sampling.packing import packed_linears
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.materialise import materialise
from dllm_convert.training.data.text import prepare_data
from dllm_convert.training.run import train
from dllm_convert.weights.run import adapt

pytestmark = pytest.mark.real
QUIET = Reporter(quiet=True)
PROMPT, NEW = 32, 48


def test_smollm2_writes_its_own_text_in_fewer_forwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # After so few steps drafts do not pay on a CPU; here they are tried as where they are free.
    monkeypatch.setattr(drafting, "_table", lambda kind: drafting._COSTS[""])
    base = materialise(inspect_source(str(assets.smollm2_gguf())), QUIET).folder
    given = {
        "training.steps": 20,
        "training.max_minutes": None,
        "data.max_documents": 60,
        "data.held_out_sequences": 4,
    }
    recipe = load_recipe(str(base), overrides=given, preset="lossless")
    plan = make_plan(recipe, inspect_source(str(base)))
    untrained, trained = tmp_path / "untrained", tmp_path / "trained"
    adapt(plan, base, untrained, QUIET)
    tokenizer = AutoTokenizer.from_pretrained(untrained)
    data = prepare_data(plan.recipe, tokenizer, QUIET)
    train(plan, data, untrained, trained, tmp_path / "work", QUIET)

    stock = AutoModelForCausalLM.from_pretrained(trained, trust_remote_code=False).eval()
    model = load_model(trained, plan.adapter).eval()
    own = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    forwards, prompts = 0, [batch.tokens[:1, :PROMPT] for batch in data.held_out]
    prompts += [batch.tokens[:1, -PROMPT:] for batch in data.held_out]
    for prompt in prompts:
        # The preset has the checkpoint verify by itself.
        with packed_linears(model):
            found = model.generate(
                prompt, max_new_tokens=NEW, eos_token_id=[], return_dict_in_generate=True
            )
        assert found.sequences.tolist() == stock.generate(prompt, **own).tolist()
        assert found.close == 0
        forwards += found.forwards
    # 1.2 after these minutes on other machines; one prompt more or less makes a tenth of it.
    assert NEW * len(prompts) / forwards > 1.05
