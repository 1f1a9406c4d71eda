"""Text models inside models of text and pictures: taken out, under their own class's names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import generic
import pytest
import torch
import transformers
from factory import CONTEXT, TOKENIZERS
from gated import gated_folder
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.loading import load_base, load_model
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.probing.family import measure_family
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.text_model import text_config, text_names
from dllm_convert.verification import verify_checkpoint

SAID = "Gr\u00f6\u00dfe 12 \u041c\u0430\u0301\u0439"
"""A text with a mark of its own, at which tokenizers of one file and two classes differ."""
_PICTURES = {"hidden_size": 16, "intermediate_size": 32}
_TOWER = {**_PICTURES, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28}
HOLDERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5": (
        "qwen3_5_text",
        "Qwen3_5ForConditionalGeneration",
        {
            "vision_config": {
                **_PICTURES,
                **{"depth": 1, "num_heads": 2, "out_hidden_size": 32},
                "num_position_embeddings": 16,
            }
        },
    ),
    "gemma3": (
        "gemma3_text",
        "Gemma3ForConditionalGeneration",
        {"vision_config": {**_TOWER, "patch_size": 14}, "mm_tokens_per_image": 4},
    ),
    # Its text model has an adapter, so that it can be opened, too.
    "llava": (
        "llama",
        "LlavaForConditionalGeneration",
        {
            "vision_config": {
                **_TOWER,
                **{"model_type": "clip_vision_model", "patch_size": 14, "projection_dim": 16},
            }
        },
    ),
}
"""Family to its text model, its class and the rest of its small config."""


@pytest.fixture(scope="module")
def holder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a function that writes a model that holds a text model, each once."""
    root = tmp_path_factory.mktemp("holders")

    def get(outer: str) -> Path:
        folder = root / outer
        if folder.exists():
            return folder
        inner, name, rest = HOLDERS[outer]
        tokenizer = TOKENIZERS["qwen2" if outer == "qwen3_5" else "llama"]()
        own = {**generic.CONFIGS, **generic.CLOSED}.get(inner, {})
        text = {
            **{"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2},
            **own,
            **{"max_position_embeddings": CONTEXT, "vocab_size": len(tokenizer)},
            **{"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id},
        }
        torch.manual_seed(0)
        config = CONFIG_MAPPING[outer](text_config=text, **rest)
        getattr(transformers, name)(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return get


def kept(folder: Path, out: Path) -> ConversionPlan:
    source = inspect_source(str(folder))
    measured = None
    if source.model_type != "llama":
        stored = {
            new: (source.tensors[old].dtype, source.tensors[old].shape)
            for old, new in text_names(source.tensors).items()
        }
        measured = measure_family(source.config, stored).require()
    return gated_folder(folder, out, measured=measured)


@pytest.mark.parametrize("outer", HOLDERS)
def test_a_text_model_is_taken_out_with_all_of_its_weights(
    outer: str, holder: Any, tmp_path: Path
) -> None:
    folder, out = holder(outer), tmp_path / "out"
    inner, name, _ = HOLDERS[outer]
    plan = kept(folder, out)
    assert any("left behind" in said and inner in said for said in plan.warnings)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == inner
    assert config["architectures"] == [plan.adapter.stock_class]
    assert "text_config" not in config
    stored = load_file(out / "model.safetensors")
    assert not any("language_model" in key or "vis" in key for key in stored)
    # What transformers' own class for both computes of text.
    whole = getattr(transformers, name).from_pretrained(folder, dtype=torch.float32).eval()
    tokens = torch.randint(5, 300, (2, 19), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = whole(input_ids=tokens).logits
        stock = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
        assert type(stock).__name__ == plan.adapter.stock_class
        assert (stock(tokens).logits - expected).abs().max() <= 1e-4
        assert torch.equal(load_model(out, plan.adapter)(tokens).logits, stock(tokens).logits)
        assert torch.equal(load_base(folder, plan.adapter)(tokens).logits, stock(tokens).logits)
    ids = [AutoTokenizer.from_pretrained(at)(SAID)["input_ids"] for at in (folder, out)]
    assert ids[0] == ids[1]
    groups = ("files", "tokens", "gated", "base", "lossless")
    report = verify_checkpoint(out, against=folder, untrained=False, groups=groups)
    assert [f"{p.name}: {p.measured} {p.detail}" for p in report.failed] == []


def test_one_whose_family_has_an_adapter_is_opened_too(holder: Any, tmp_path: Path) -> None:
    values = {
        "source": str(holder("llava")),
        "target": "mdlm",
        "training": {"method": "none"},
    }
    plan = make_plan(Recipe.model_validate(values), inspect_source(values["source"]))
    assert plan.adapter.model_type == "llama"
    assert plan.config_updates["is_causal"] is False
    assert any(name.startswith("vision_tower") for name in plan.tensors_dropped)


def test_what_is_said_outside_holds_inside() -> None:
    outer = {
        "model_type": "a",
        "architectures": ["A"],
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "gptq"},
        "eos_token_id": 7,
        "text_config": {"model_type": "b", "eos_token_id": 3, "pad_token_id": None},
    }
    inner = text_config(outer)
    assert inner == {
        "model_type": "b",
        "tie_word_embeddings": False,
        "quantization_config": {"quant_method": "gptq"},
        "eos_token_id": 3,
        "pad_token_id": None,
    }
    assert text_config({"model_type": "a", "text_config": {}}) is None
    assert text_config({"model_type": "a"}) is None


def test_names_inside_are_those_of_the_class() -> None:
    assert text_names(
        ["model.language_model.layers.0.a", "lm_head.weight", "model.visual.b", "mtp.c"]
    ) == {"model.language_model.layers.0.a": "model.layers.0.a", "lm_head.weight": "lm_head.weight"}
    assert text_names(
        ["language_model.model.norm.weight", "language_model.lm_head.weight", "vision_tower.x"]
    ) == {
        "language_model.model.norm.weight": "model.norm.weight",
        "language_model.lm_head.weight": "lm_head.weight",
    }
    assert text_names(["model.a"]) == {"model.a": "model.a"}


def test_a_quantised_one_is_refused(holder: Any, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(holder("llava"), tmp_path / "q"))
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    values = {"source": str(folder), "target": "mdlm", "training": {"method": "none"}}
    with pytest.raises(IncompatibleError, match=r"gptq|quantis"):
        make_plan(Recipe.model_validate(values), inspect_source(str(folder)))
