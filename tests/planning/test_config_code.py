"""Files and fields beside the weights that decide which model it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.common.console import Reporter
from dllm_convert.errors import IncompatibleError
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.weights.run import adapt

Sources = Callable[..., Path]


def plan(folder: Path, **config: Any) -> ConversionPlan:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    recipe = Recipe.model_validate({"source": str(folder), "target": "mdlm"})
    return make_plan(recipe, inspect_source(str(folder)))


@pytest.mark.parametrize(
    "names",
    [
        None, [], ["LlamaForCausalLM"], ["LLaMAForCausalLM"], ["FSDPLlamaForCausalLM"],
        ["SpecialModel", "LlamaForCausalLM"],
    ],
)  # fmt: skip
def test_the_familys_own_class(source_factory: Sources, names: Any) -> None:
    plan(source_factory("llama"), architectures=names)


def test_bert_may_come_with_its_other_head(source_factory: Sources) -> None:
    plan(source_factory("bert"), architectures=["BertForPreTraining"])


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "SpecialForCausalLM"),
        ("llama", "LlamaModel"),
        ("llama", "MistralForCausalLM"),
        ("qwen2", "Qwen2ForSequenceClassification"),
        ("bert", "BertModel"),
        ("roberta", "RobertaForTokenClassification"),
        ("llama", "<script>\x1b[31m" + "x" * 500),
    ],
)
def test_another_class_is_refused(source_factory: Sources, family: str, name: str) -> None:
    with pytest.raises(IncompatibleError, match="architectures names") as caught:
        plan(source_factory(family), architectures=[name])
    assert "\x1b" not in str(caught.value) and len(str(caught.value)) < 500


def test_own_code_under_the_stock_name_is_told(source_factory: Sources, tmp_path: Path) -> None:
    folder = source_factory("qwen2")
    (folder / "modeling_special.py").write_text("raise SystemExit('ran')\n")
    own = {"AutoModelForCausalLM": "modeling_special.SpecialForCausalLM"}
    made = plan(folder, auto_map=own)
    assert any("modeling_special" in w and "neither run nor copied" in w for w in made.warnings)
    adapt(made, folder, tmp_path / "out", Reporter(quiet=True), light=True)
    assert not (tmp_path / "out" / "modeling_special.py").exists()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(written["auto_map"].values()) == ["modeling_dllm.DiffusionQwen2ForCausalLM"]


def test_own_code_and_own_class_are_refused(source_factory: Sources) -> None:
    own = {"AutoModelForCausalLM": "modeling_special.SpecialForCausalLM"}
    with pytest.raises(IncompatibleError, match="modeling_special"):
        plan(source_factory("llama"), auto_map=own, architectures=["SpecialForCausalLM"])


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("attn_implementation", "kernels-community/flash-attn", True),
        ("_attn_implementation", "someone/kernel", True),
        ("attn_implementation", "sdpa", False),
        ("_attn_implementation_internal", "flash_attention_2", False),
        ("experts_implementation", "someone/experts", True),
        ("custom_generate", "someone/generate", True),
        ("custom_pipelines", {"text": {"impl": "code.Pipeline"}}, True),
        ("trust_remote_code", True, False),
    ],
)
def test_fields_that_name_code_are_never_copied(
    source_factory: Sources, tmp_path: Path, key: str, value: Any, told: bool
) -> None:
    folder = source_factory("llama")
    made = plan(folder, **{key: value})
    assert any(key in warning for warning in made.warnings) is told
    adapt(made, folder, tmp_path / "out", Reporter(quiet=True), light=True)
    assert key not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_an_adapter_beside_the_weights_is_refused(source_factory: Sources) -> None:
    folder = source_factory("llama")
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(IncompatibleError, match=r"adapter_config\.json lies beside") as caught:
        plan(folder)
    assert "merge_and_unload" in str(caught.value.hint)


def test_a_source_that_is_open_already_is_told(source_factory: Sources) -> None:
    assert any(
        "is_causal false" in w for w in plan(source_factory("llama"), is_causal=False).warnings
    )


def test_a_conversion_of_ours_is_no_foreign_code(source_factory: Sources, tmp_path: Path) -> None:
    folder = source_factory("llama")
    adapt(plan(folder), folder, tmp_path / "out", Reporter(quiet=True), light=True)
    again = plan(tmp_path / "out")
    assert not any("code of its own" in warning for warning in again.warnings)


def test_weights_that_only_the_config_names(source_factory: Sources) -> None:
    folder = source_factory("llama")
    plan(folder, transformers_weights="model.safetensors")
    for named in ("other.safetensors", "../other.safetensors", 5):
        with pytest.raises(IncompatibleError, match="would load the other file"):
            plan(folder, transformers_weights=named)


def test_fields_that_name_files_and_classes_are_not_copied(
    source_factory: Sources, tmp_path: Path
) -> None:
    named = {"transformers_weights": "model.safetensors", "compile_config": {"backend": "evil"}}
    folder = source_factory("llama")
    made = plan(folder, **named, tokenizer_class="evil.Evil")
    adapt(made, folder, tmp_path / "out", Reporter(quiet=True))
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert not {*named, "tokenizer_class"} & written.keys()
    assert any("evil.Evil" in warning for warning in made.warnings)
    made = plan(source_factory("qwen2"), tokenizer_class="Qwen2Tokenizer")
    assert not any("tokenizer_class" in warning for warning in made.warnings)
