"""Numbers and flags of config.json: wrong ones are refused in words, right ones never."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.adapters import all_adapters
from dllm_convert.errors import DllmConvertError, IncompatibleError
from dllm_convert.modeling.converted_config import check_converted_config
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.config_numbers import check_numbers
from dllm_convert.source.inspect import inspect_source

Sources = Callable[..., Path]
ALL = all_adapters()
SIZES = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers")
NO_SIZES: list[Any] = [
    *(0, -1, 1.0, 64.5, "x", "64", True, False, None, [], [64], {}, float("nan"), float("inf")),
    *(10**12, 2**63, -(10**4000), 10**4000),
]


def plan_with(source: Path, **config: Any) -> None:
    info = inspect_source(str(source))
    recipe = Recipe.model_validate({"source": "x", "target": "mdlm"})
    make_plan(recipe, replace(info, config={**info.config, **config}))


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
@pytest.mark.parametrize("known", [True, False], ids=["headers", "pickle"])
def test_what_is_no_size(source_cache: Sources, adapter: Any, known: bool) -> None:
    info = inspect_source(str(source_cache(adapter.model_type)))
    count = len(info.tensors) if known else 0
    for key in (*SIZES, "max_position_embeddings", "vocab_size"):
        for value in NO_SIZES:
            if key == "max_position_embeddings" and value is None:
                continue
            with pytest.raises(IncompatibleError) as caught:
                check_numbers({**info.config, key: value}, adapter, count)
            said = str(caught.value)
            assert key in said and "\n" not in said and len(said) < 300


@pytest.mark.parametrize(
    "values",
    [
        {"head_dim": 0}, {"head_dim": -8}, {"head_dim": 7}, {"head_dim": "8"},
        {"num_key_value_heads": 0}, {"num_key_value_heads": 3}, {"num_key_value_heads": 2.0},
        {"rms_norm_eps": "x"}, {"rms_norm_eps": float("nan")}, {"rms_norm_eps": -1e-6},
        {"rms_norm_eps": 10**400}, {"rope_theta": 0}, {"rope_theta": "x"},
        {"rope_scaling": {"type": "linear", "factor": 0}}, {"rope_scaling": [1]},
        {"rope_parameters": {"rope_type": "default", "rope_theta": float("inf")}},
        {"attention_dropout": 2}, {"attention_dropout": "0"}, {"initializer_range": -1},
        {"tie_word_embeddings": "false"}, {"tie_word_embeddings": None},
        {"attention_bias": 1}, {"mlp_bias": None}, {"sliding_window": "x"},
        {"sliding_window": 0}, {"num_attention_heads": 3},
        {"num_labels": 10**9}, {"num_labels": "2"},
        {"pad_token_id": 10**6}, {"pad_token_id": "x"}, {"pad_token_id": [0]},
    ],
)  # fmt: skip
def test_other_numbers_and_flags(source_cache: Sources, values: dict[str, Any]) -> None:
    with pytest.raises(IncompatibleError, match=r"config\.json"):
        plan_with(source_cache("llama"), **values)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers"])
def test_more_layers_than_tensors_cost_no_memory(source_cache: Sources, key: str) -> None:
    started = time.monotonic()
    with pytest.raises(IncompatibleError, match=key):
        plan_with(source_cache("llama"), **{key: 10**12})
    with pytest.raises(IncompatibleError, match=key):
        check_numbers({key: 10**12}, None, 30)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("adapter", ALL, ids=lambda a: a.model_type)
def test_good_configs_pass(source_cache: Sources, adapter: Any) -> None:
    info = inspect_source(str(source_cache(adapter.model_type)))
    nothing = dict.fromkeys(("rope_scaling", "attention_dropout", "pretraining_tp", "sliding"))
    check_numbers({**info.config, **nothing}, adapter, len(info.tensors))
    check_numbers({**info.config, "max_position_embeddings": 10_485_760}, adapter, 0)
    for pad in (None, -1, 0):
        plan_with(source_cache(adapter.model_type), pad_token_id=pad)
    if adapter.attention == "causal":
        check_numbers({**info.config, "sliding_window": None}, adapter, 0)


def test_random_configs_end_in_known_errors(source_factory: Sources) -> None:
    dice = random.Random(3)
    values = [*NO_SIZES, 1, 2, 31, 1e300, "\ud800", {"factor": "x"}, ["full_attention"] * 2]
    for family in ("llama", "qwen3", "mistral", "bert", "roberta"):
        folder = source_factory(family)
        config = json.loads((folder / "config.json").read_text())
        for _ in range(60):
            keys = dice.sample(sorted(config), 2)
            broken = {key: dice.choice(values) for key in keys if key != "model_type"}
            (folder / "config.json").write_text(json.dumps({**config, **broken}))
            try:
                plan_with(folder)
            except DllmConvertError as error:
                assert "\n" not in str(error)


def test_a_block_longer_than_the_context_takes_no_memory(source_cache: Sources) -> None:
    source = source_cache("llama")
    mask = {"objective": "bd3lm", "mask_token_id": 3, "token_shift": True}
    said = {"attention": "block-causal", "noise_schedule": "linear"}

    def config(size: int) -> dict[str, Any]:
        section = {**mask, **said, "block_size": size}
        ours = {"is_causal": False, "mask_token_id": 3, "block_size": size, "diffusion": section}
        return {**inspect_source(str(source)).config, **ours}

    check_converted_config(config(256), source)
    for size, expected in ((257, "from 1 to the context of 256"), (0, "of at least 1")):
        with pytest.raises(IncompatibleError, match=expected):
            check_converted_config(config(size), source)


ID_FIELDS = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id",
             "mask_token_id", "unk_token_id", "decoder_start_token_id", "image_token_id",
             "stop_token_ids", "suppress_tokens", "begin_suppress_tokens")  # fmt: skip


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("field", ID_FIELDS)
def test_a_field_of_token_ids_holds_ids(
    file: str, field: str, source_factory: Callable[..., Path]
) -> None:
    source = source_factory("llama")
    content = json.loads((source / file).read_text())

    def planned(value: Any) -> ConversionPlan:
        (source / file).write_text(json.dumps(content | {field: value}))
        recipe = Recipe(source=str(source), target="mdlm")
        return make_plan(recipe, inspect_source(str(source)))

    for value in (1.5, True, "1", 2**31, -(2**40), {"a": 1}, [1.5], ["1"], [True], [[1]]):
        with pytest.raises(IncompatibleError, match=f"{field} is .*expected the id of a token"):
            planned(value)
    for value in (None, -1, 0):
        planned(value)
