"""The plan: what is decided from headers, what is refused, and that it is JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.planning.conversion import ConversionPlan, make_plan, plan_as_dict
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.base_card import BaseCard
from dllm_convert.source.inspect import SourceInfo, TensorInfo, inspect_source

DECODERS = ("llama", "qwen2", "qwen3", "mistral")
ENCODERS = ("bert", "roberta")
Sources = Callable[..., Path]


def plan(path: Path, target: str = "mdlm", **fields: Any) -> ConversionPlan:
    recipe = Recipe.model_validate({"source": str(path), "target": target, **fields})
    return make_plan(recipe, inspect_source(str(path)))


def replan(info: SourceInfo, target: str = "mdlm", **fields: Any) -> ConversionPlan:
    recipe = Recipe.model_validate({"source": "changed", "target": target, **fields})
    return make_plan(recipe, info)


def with_config(info: SourceInfo, **config: Any) -> SourceInfo:
    return replace(info, config={**info.config, **config})


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
def test_decoders_open_every_layer(source_cache: Sources, family: str, target: str) -> None:
    block = 32 if target == "bd3lm" else None
    made = plan(source_cache(family), target, block_size=block)
    updates = made.config_updates
    assert updates["is_causal"] is False
    assert updates["mask_token_id"] == made.mask.id < updates["vocab_size"]
    assert updates["architectures"] == [made.adapter.diffusion_class]
    assert updates["auto_map"] == {
        "AutoModelForCausalLM": f"modeling_dllm.{made.adapter.diffusion_class}"
    }
    assert updates["diffusion"] == {
        "objective": target,
        "block_size": block,
        "mask_token_id": made.mask.id,
        "token_shift": True,
        "noise_schedule": "linear",
        "attention": "bidirectional" if target == "mdlm" else "block-causal",
        "format_version": 1,
    }
    assert ("block_size" in updates) == (target == "bd3lm")
    assert "on all 2 layers" in made.attention_changes[-1]


@pytest.mark.parametrize("family", ENCODERS)
def test_encoders_keep_their_attention_and_have_no_shift(
    source_cache: Sources, family: str
) -> None:
    made = plan(source_cache(family))
    assert made.attention_changes == ()
    assert made.tensors_changed == ()
    assert made.config_updates["diffusion"]["token_shift"] is False
    assert list(made.config_updates["auto_map"]) == ["AutoModelForMaskedLM"]


@pytest.mark.parametrize("family", ENCODERS)
def test_bd3lm_is_refused_for_encoders_with_the_reason(source_cache: Sources, family: str) -> None:
    with pytest.raises(UnsupportedError, match="see both sides") as caught:
        plan(source_cache(family), "bd3lm", block_size=32)
    assert caught.value.exit_code == 3
    assert caught.value.hint == "Use --to mdlm"


@pytest.mark.parametrize("tied", [True, False])
def test_changed_tensors_follow_the_head(source_cache: Sources, tied: bool) -> None:
    changed = plan(source_cache("llama", tied=tied)).tensors_changed
    head = () if tied else ("lm_head.weight",)
    assert changed == ("model.embed_tokens.weight", *head)


def test_token_shift_dropped(source_cache: Sources) -> None:
    made = plan(source_cache("llama"), token_shift="drop")
    assert made.config_updates["diffusion"]["token_shift"] is False
    assert made.token_shift is False


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"target": "bd3lm", "block_size": 512, "data": {"sequence_length": 512}},
            "larger than the model's context of 256",
        ),
        ({"data": {"sequence_length": 512}}, "larger than the model's context of 256"),
        ({"generation": {"max_new_tokens": 1000}}, "context of this model is 256"),
    ],
)
def test_lengths_that_do_not_fit(
    source_cache: Sources, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(IncompatibleError, match=message) as caught:
        plan(source_cache("llama"), **fields)
    assert caught.value.hint


@pytest.mark.parametrize("block", [1, 256])
def test_the_extreme_blocks_are_allowed(source_cache: Sources, block: int) -> None:
    assert (
        plan(source_cache("llama"), "bd3lm", block_size=block).config_updates["block_size"] == block
    )


def test_robertas_context_leaves_out_the_positions_before_its_text(source_cache: Sources) -> None:
    info = inspect_source(str(source_cache("roberta")))
    assert plan_as_dict(replan(info))["source"]["context"] == 256
    name = "roberta.embeddings.position_embeddings.weight"
    shorter = replace(info.tensors[name], shape=(257, info.tensors[name].shape[1]))
    info = replace(info, tensors={**info.tensors, name: shorter})
    with pytest.raises(IncompatibleError, match="context of 255"):
        replan(with_config(info, max_position_embeddings=257))


class TestWindow:
    """Sliding windows, by family and by the way the config states them."""

    def test_mistral_with_a_window_on_all_layers(self, source_cache: Sources) -> None:
        made = plan(source_cache("mistral", sliding_window=8))
        assert "sliding window of 8 tokens opened" in made.attention_changes[0]
        assert "2 of 2 layers" in made.attention_changes[0]
        assert made.config_updates["sliding_window"] is None

    def test_a_mistral_config_that_is_silent_means_4096(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("mistral")))
        config = {k: v for k, v in info.config.items() if k != "sliding_window"}
        assert "of 4096 tokens" in replan(replace(info, config=config)).attention_changes[0]

    def test_mistral_without_a_window(self, source_cache: Sources) -> None:
        made = plan(source_cache("mistral"))
        assert len(made.attention_changes) == 1
        assert "sliding_window" not in made.config_updates

    @pytest.mark.parametrize("family", ["qwen2", "qwen3"])
    def test_qwen_opens_the_layers_from_max_window_layers_on(
        self, source_cache: Sources, family: str
    ) -> None:
        options = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
        made = plan(source_cache(family, **options))
        assert "1 of 2 layers (sliding_attention, from layer 1)" in made.attention_changes[0]
        assert made.config_updates["use_sliding_window"] is False
        assert made.config_updates["sliding_window"] is None
        assert made.config_updates["layer_types"] == ["full_attention"] * 2

    def test_qwen_without_layer_types_derives_them(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("qwen2")))
        config = {k: v for k, v in info.config.items() if k != "layer_types"}
        config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0}
        made = replan(replace(info, config=config))
        assert "2 of 2 layers" in made.attention_changes[0]
        assert "layer_types" not in made.config_updates

    def test_qwen_with_the_flag_off_has_no_window(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("qwen2")))
        made = replan(with_config(info, use_sliding_window=False, sliding_window=8))
        assert len(made.attention_changes) == 1

    def test_a_window_beyond_the_last_layer_is_switched_off_quietly(
        self, source_cache: Sources
    ) -> None:
        info = inspect_source(str(source_cache("qwen2")))
        config = {k: v for k, v in info.config.items() if k != "layer_types"}
        config |= {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28}
        made = replan(replace(info, config=config))
        assert len(made.attention_changes) == 1
        assert made.config_updates["use_sliding_window"] is False

    def test_refusing(self, source_cache: Sources) -> None:
        with pytest.raises(IncompatibleError, match="sliding window of 8 tokens on 2 of 2 layers"):
            plan(source_cache("mistral", sliding_window=8), sliding_window="refuse")
        plan(source_cache("mistral"), sliding_window="refuse")

    @pytest.mark.parametrize("kind", ["chunked_attention", "linear_attention"])
    def test_other_layer_types_are_unsupported(self, source_cache: Sources, kind: str) -> None:
        info = inspect_source(str(source_cache("qwen3")))
        with pytest.raises(UnsupportedError, match=kind):
            replan(with_config(info, layer_types=["full_attention", kind]))

    def test_layer_types_of_the_wrong_length(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("qwen3")))
        with pytest.raises(IncompatibleError, match="one entry for each of 2"):
            replan(with_config(info, layer_types=["full_attention"]))

    @pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
    def test_opened_configs_have_no_window_in_transformers(
        self, source_cache: Sources, family: str
    ) -> None:
        from transformers import AutoConfig

        options: dict[str, Any] = {"sliding_window": 8}
        if family != "mistral":
            options |= {"use_sliding_window": True, "max_window_layers": 1}
        path = source_cache(family, **options)
        made = plan(path)
        stock = {**made.source.config, **made.config_updates}
        config = AutoConfig.for_model(**{k: v for k, v in stock.items() if k != "auto_map"})
        assert config.sliding_window is None
        assert set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}


def test_rope_scaling_is_kept_and_mentioned(source_cache: Sources) -> None:
    info = inspect_source(str(source_cache("llama")))
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    made = replan(with_config(info, rope_parameters=rope))
    assert made.notes == ("rotary scaling kept: linear, factor 4.0",)
    assert "rope_parameters" not in made.config_updates
    old = replan(
        with_config(info, rope_parameters=None, rope_scaling={"type": "dynamic", "factor": 2})
    )
    assert "dynamic" in old.notes[0]
    assert replan(info).notes == ()


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("key", ["is_decoder", "add_cross_attention"])
def test_an_encoder_trained_as_decoder_is_refused(
    source_cache: Sources, family: str, key: str
) -> None:
    info = inspect_source(str(source_cache(family)))
    with pytest.raises(IncompatibleError, match=key):
        replan(with_config(info, **{key: True}))


def test_relative_positions_are_unsupported(source_cache: Sources) -> None:
    info = inspect_source(str(source_cache("bert")))
    with pytest.raises(UnsupportedError, match="relative_key"):
        replan(with_config(info, position_embedding_type="relative_key"))


class TestTensors:
    """The weights must be a complete language model."""

    @pytest.mark.parametrize("family", ENCODERS)
    def test_an_encoder_without_head_is_refused(self, source_cache: Sources, family: str) -> None:
        info = inspect_source(str(source_cache(family)))
        kept = {n: t for n, t in info.tensors.items() if not n.startswith(("cls.", "lm_head."))}
        with pytest.raises(IncompatibleError, match="head would be random"):
            replan(replace(info, tensors=kept))

    def test_an_untied_decoder_without_head_is_refused(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("llama", tied=False)))
        kept = {n: t for n, t in info.tensors.items() if n != "lm_head.weight"}
        with pytest.raises(IncompatibleError, match=r"no lm_head\.weight"):
            replan(replace(info, tensors=kept))

    def test_a_checkpoint_of_another_class_is_refused(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("llama")))
        other = {n.replace("embed_tokens", "wte"): t for n, t in info.tensors.items()}
        with pytest.raises(IncompatibleError, match=r"no model\.embed_tokens\.weight"):
            replan(replace(info, tensors=other))

    def test_the_name_of_the_body_may_be_left_out(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("llama")))
        bare = {n.removeprefix("model."): t for n, t in info.tensors.items()}
        assert replan(replace(info, tensors=bare)).source.tensors.keys() == info.tensors.keys()

    def test_a_head_of_another_size(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("llama", tied=False)))
        head = info.tensors["lm_head.weight"]
        other = replace(head, shape=(head.shape[0] + 1, head.shape[1]))
        with pytest.raises(IncompatibleError, match="rows as the embedding"):
            replan(replace(info, tensors={**info.tensors, "lm_head.weight": other}))

    def test_a_layer_with_a_gap(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("llama")))
        name = "model.layers.1.mlp.up_proj.weight"
        kept = {n: t for n, t in info.tensors.items() if n != name}
        with pytest.raises(IncompatibleError, match=r"layer 1 has no mlp\.up_proj\.weight"):
            replan(replace(info, tensors=kept))

    def test_fewer_layers_than_the_config_says(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("llama")))
        with pytest.raises(IncompatibleError, match="2 layers, config"):
            replan(with_config(info, num_hidden_layers=3))

    def test_quantised_weights(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("llama")))
        with pytest.raises(IncompatibleError, match="quantization_config"):
            replan(with_config(info, quantization_config={"quant_method": "awq"}))
        name = "model.embed_tokens.weight"
        packed = TensorInfo("I8", info.tensors[name].shape, "model.safetensors")
        with pytest.raises(IncompatibleError, match="dtype I8"):
            replan(replace(info, tensors={**info.tensors, name: packed}))

    def test_unused_heads_are_left_out(self, source_cache: Sources) -> None:
        info = inspect_source(str(source_cache("bert")))
        extra = {
            "bert.pooler.dense.weight": TensorInfo("F32", (32, 32), "model.safetensors"),
            "cls.seq_relationship.bias": TensorInfo("F32", (2,), "model.safetensors"),
        }
        made = replan(replace(info, tensors={**info.tensors, **extra}))
        assert made.tensors_dropped == tuple(extra)


def test_unsupported_family_lists_what_is_supported(source_cache: Sources) -> None:
    info = inspect_source(str(source_cache("llama")))
    with pytest.raises(UnsupportedError, match="adapters exist for bert, llama"):
        replan(with_config(info, model_type="gpt2"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"training": {"learning_rate": 1e-5, "steps": 60}}, "Efficient-DLM"),
        ({"training": {"method": "lora", "lora": {"rank": 16}}}, "rank 16"),
        ({"training": {"method": "lora", "lora": {"norms": False}}}, "must stay trainable"),
        ({"target": "mdlm"}, "19.3"),
        (
            {
                "target": "bd3lm",
                "block_size": 8,
                "training": {
                    "method": "lora",
                    "lora": {"acts_on": "noisy", "learning_rate": 2e-3},
                    "steps": 60,
                    "distillation": {"weight": 0.5},
                },
            },
            "two were lost",
        ),
    ],
)
def test_warnings_name_their_source(
    source_cache: Sources, fields: dict[str, Any], words: str
) -> None:
    assert any(words in warning for warning in plan(source_cache("llama"), **fields).warnings)


def test_licence_warnings(source_cache: Sources) -> None:
    info = inspect_source(str(source_cache("llama")))
    assert any("unknown" in w for w in replan(info).warnings)
    licensed = replace(info, card=BaseCard(license="mit"))
    assert not any("licence" in w for w in replan(licensed).warnings)
    assert any("source says mit" in w for w in replan(licensed, license="llama2").warnings)


@pytest.mark.parametrize("family", [*ENCODERS, *DECODERS])
def test_the_plan_is_json(source_cache: Sources, family: str) -> None:
    made = plan_as_dict(plan(source_cache(family)))
    assert json.loads(json.dumps(made)) == made
    assert made["source"]["parameters"] > 0
    assert made["source"]["dtype"] == "F32"
    assert made["training_tokens"] == 1000 * 4 * 256
    assert made["mask"]["id"] == made["config_updates"]["mask_token_id"]


def test_no_training_costs_no_tokens(source_cache: Sources) -> None:
    made = plan(source_cache("llama"), training={"method": "none"})
    assert plan_as_dict(made)["training_tokens"] == 0
