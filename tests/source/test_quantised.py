"""Quantised checkpoints are told as such, by the method, before anything else is said of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.errors import IncompatibleError
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.info import SourceInfo, TensorInfo
from dllm_convert.source.inspect import inspect_source

Sources = Callable[..., Path]
FILE = "model.safetensors"
LAYERS = [
    f"model.layers.{n}.{part}" for n in (0, 1) for part in ("self_attn.q_proj", "mlp.up_proj")
]


def replan(info: SourceInfo) -> ConversionPlan:
    return make_plan(Recipe.model_validate({"source": "x", "target": "mdlm"}), info)


def packed(info: SourceInfo, weight: str | None, **more: tuple[str, tuple[int, ...]]) -> SourceInfo:
    """Return the source with its layers' matrices in another type, and tensors beside them."""
    tensors = dict(info.tensors)
    for layer in LAYERS:
        plain = tensors.pop(f"{layer}.weight")
        if weight is not None:
            tensors[f"{layer}.weight"] = replace(plain, dtype=weight)
        for name, (dtype, shape) in more.items():
            tensors[f"{layer}.{name.replace('__', '.')}"] = TensorInfo(dtype, shape, FILE)
    return replace(info, tensors=tensors)


CASES: dict[str, tuple[str | None, dict[str, tuple[str, tuple[int, ...]]], str]] = {
    "gptq": (None, {"qweight": ("I32", (4, 32)), "qzeros": ("I32", (1, 4)),
                    "scales": ("F16", (1, 32)), "g_idx": ("I32", (32,))}, "GPTQ"),
    "awq": (None, {"qweight": ("I32", (32, 4)), "qzeros": ("I32", (1, 4)),
                   "scales": ("F16", (1, 32))}, "AWQ"),
    "bitsandbytes-4": ("U8", {"weight__absmax": ("F32", (16,)),
                              "weight__quant_map": ("F32", (16,)),
                              "weight__quant_state__bitsandbytes__nf4": ("U8", (80,))},
                       "bitsandbytes"),
    "bitsandbytes-8": ("I8", {"SCB": ("F32", (32,))}, "bitsandbytes"),
    "fp8": ("F8_E4M3", {"weight_scale": ("F32", ())}, "FP8"),
    "fp8-blocks": ("F8_E4M3", {"weight_scale_inv": ("F32", (1, 1))}, "FP8"),
    "fp8-alone": ("F8_E5M2", {}, "FP8"),
    "nvfp4": ("U8", {"weight_scale": ("F8_E4M3", (32, 2)), "weight_scale_2": ("F32", ())},
              "ModelOpt"),
    "compressed-tensors": (None, {"weight_packed": ("I32", (32, 4)), "weight_shape": ("I64", (2,)),
                                  "weight_scale": ("BF16", (32, 1))}, "compressed-tensors"),
    "mlx": ("U32", {"scales": ("F16", (32, 1)), "biases": ("F16", (32, 1))}, "MLX"),
    "hqq": (None, {"W_q": ("U8", (16, 32))}, "HQQ"),
    "eetq": ("I8", {"weight_scales": ("F16", (32,))}, "EETQ"),
    "quanto": (None, {"weight___data": ("I8", (32, 32)), "weight___scale": ("F32", (32, 1))},
               "quanto"),
    "int8-alone": ("I8", {}, "dtype I8"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_the_tensors_tell_the_method(source_cache: Sources, case: str) -> None:
    weight, more, method = CASES[case]
    info = packed(inspect_source(str(source_cache("llama"))), weight, **more)
    with pytest.raises(IncompatibleError, match=f"quantised .*{method}") as caught:
        replan(info)
    assert caught.value.exit_code == 3
    assert "that it was made from" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("section", "method"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "GPTQ"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"quant_algo": "FP8"}}, "FP8"),
        ({"quantization_config": {"quant_method": "something-new"}}, "something-new"),
        ({"compression_config": {"format": "x"}}, "compression_config"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_the_config_tells_the_method(
    source_cache: Sources, section: dict[str, Any], method: str, family: str
) -> None:
    info = inspect_source(str(source_cache(family)))
    with pytest.raises(IncompatibleError, match=f"quantised .*{method}"):
        replan(replace(info, config={**info.config, **section}))


@pytest.mark.parametrize("section", [None, {}])
def test_an_empty_section_says_nothing(source_cache: Sources, section: Any) -> None:
    info = inspect_source(str(source_cache("llama")))
    made = replan(replace(info, config={**info.config, "quantization_config": section}))
    assert made.tensors_dropped == ()


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json"])
def test_a_file_beside_plain_weights_is_mentioned(source_factory: Sources, file: str) -> None:
    folder = source_factory("llama")
    (folder / file).write_text("{}")
    assert any(file in warning for warning in replan(inspect_source(str(folder))).warnings)


def test_a_file_beside_packed_weights_names_whose_they_are(source_cache: Sources) -> None:
    info = packed(inspect_source(str(source_cache("llama"))), "F8_E4M3")
    with pytest.raises(IncompatibleError, match=r"ModelOpt: hf_quant_config\.json beside them"):
        replan(replace(info, beside=("hf_quant_config.json",)))


def test_a_file_beside_a_pickle_is_believed(source_cache: Sources) -> None:
    info = inspect_source(str(source_cache("llama")))
    with pytest.raises(IncompatibleError, match="GPTQ"):
        replan(replace(info, tensors={}, beside=("quantize_config.json",)))


def test_a_packed_pickle_is_told_when_it_is_read(source_factory: Sources, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from dllm_convert.source.from_pickle import convert_pickles

    folder = source_factory("llama")
    state = load_file(folder / FILE)
    for layer in LAYERS:
        del state[f"{layer}.weight"]
        state[f"{layer}.qweight"] = torch.zeros(4, 32, dtype=torch.int32)
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(IncompatibleError, match=r"quantised .*GPTQ"):
        convert_pickles(folder, ["pytorch_model.bin"], tmp_path, "model.embed_tokens.weight")
