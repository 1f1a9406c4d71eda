"""Models load completely or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from dllm_convert.adapters import get_adapter
from dllm_convert.common.console import Reporter
from dllm_convert.errors import DataError, DllmConvertError
from dllm_convert.modeling.loading import (
    device_and_dtype,
    load_base,
    load_checkpoint,
    load_complete,
)
from dllm_convert.planning.conversion import make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.weights.run import adapt

Sources = Callable[..., Path]
SINGLE = "model.safetensors"


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def lose(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["model.norm.weight"]


def add(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)


def reshape(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.norm.weight"] = torch.ones(31)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lose, r"random: it has no model\.norm\.weight"),
        (add, "does not compute with"),
        (reshape, "model.norm.weight|size mismatch|does not load"),
    ],
)
def test_a_partial_load_is_refused(
    source_factory: Sources,
    tmp_path: Path,
    change: Callable[[dict[str, torch.Tensor]], None],
    words: str,
) -> None:
    source = source_factory("llama")
    recipe = Recipe.model_validate({"source": "x", "target": "mdlm"})
    plan = make_plan(recipe, inspect_source(str(source)))
    adapt(plan, source, tmp_path / "out", Reporter(quiet=True), light=True)
    rewrite(tmp_path / "out", change)
    with pytest.raises(DataError, match=words):
        load_checkpoint(tmp_path / "out")
    rewrite(source, change)
    with pytest.raises(DllmConvertError):
        load_base(source, get_adapter("llama"))
    with pytest.raises(DataError, match=words):
        load_complete(transformers.AutoModelForCausalLM, source, trust_remote_code=False)


def test_leftovers_do_not_keep_a_base_from_loading(source_factory: Sources) -> None:
    source = source_factory("llama")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(
        source, lambda tensors: tensors.update({name: torch.ones(4), "v_head.w": torch.ones(1)})
    )
    load_base(source, get_adapter("llama"))
    load_complete(transformers.AutoModelForCausalLM, source)


@pytest.mark.parametrize(
    "values", [{"hidden_act": "no-such"}, {"hidden_size": "x"}, {"num_attention_heads": 0}]
)
def test_what_the_library_raises_is_one_line(
    source_factory: Sources, values: dict[str, object]
) -> None:
    source = source_factory("llama")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, **values}))
    with pytest.raises(DataError, match="does not load as") as caught:
        load_complete(transformers.LlamaForCausalLM, source)
    assert "\n" not in str(caught.value)


def test_a_pad_token_that_only_the_conversion_has(source_factory: Sources) -> None:
    source = source_factory("llama")
    config = json.loads((source / "config.json").read_text())
    rows = config["vocab_size"]
    (source / "config.json").write_text(json.dumps({**config, "pad_token_id": rows}))
    assert load_base(source, get_adapter("llama")).config.vocab_size == rows


@pytest.mark.parametrize(
    ("given", "gpu", "expected"),
    [
        ((), False, ("cpu", "float32")),
        ((), True, ("cuda", "bfloat16")),
        (("cpu",), True, ("cpu", "float32")),
        (("cuda:1",), True, ("cuda:1", "bfloat16")),
        ((None, "float16"), True, ("cuda", "float16")),
        (("mps", None), False, ("mps", "float32")),
    ],
)
def test_where_a_model_runs_and_in_what(
    monkeypatch: pytest.MonkeyPatch,
    given: tuple[str | None, ...],
    gpu: bool,
    expected: tuple[str, str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert device_and_dtype(*given) == expected
