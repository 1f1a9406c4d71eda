"""What belongs to the layers, by the names of headers alone."""

from __future__ import annotations

import pytest

from dllm_convert.planning.model_shape import layer_tensors


@pytest.mark.parametrize(
    ("layer", "beside"),
    [
        ("model.layers.{}.self_attn.q_proj.weight", ["model.embed_tokens.weight", "lm_head.bias"]),
        ("bert.encoder.layer.{}.output.dense.weight", ["cls.predictions.bias"]),
        (
            "transformer.h.{}.attn.c_attn.weight",
            ["transformer.wte.weight", "transformer.ln_f.bias"],
        ),
        ("h.{}.attn.c_attn.weight", ["wte.weight", "wpe.weight"]),
        ("transformer.blocks.{}.ffn.up_proj.weight", ["transformer.norm_f.weight"]),
        ("gpt_neox.layers.{}.mlp.dense_h_to_4h.bias", ["embed_out.weight"]),
        ("model.decoder.layers.{}.fc1.weight", ["model.decoder.embed_positions.weight"]),
        ("model.layers.{}.mlp.experts.0.w1.weight", ["model.norm.weight"]),
        # Numbered, and no layers of this model: two of three, and a number that ends the name.
        ("model.layers.{}.mlp.gate.weight", ["model.mtp.0.norm.weight", "model.mtp.1.norm.weight"]),
        ("model.layers.{}.mlp.gate.weight", ["model.scales.0", "model.scales.1", "model.scales.2"]),
    ],
)
def test_layers_are_what_is_numbered(layer: str, beside: list[str]) -> None:
    layers = [layer.format(number) for number in range(3)]
    assert layer_tensors([*beside, *layers], 3) == layers


def test_experts_are_no_layers_and_a_layer_more_than_the_config_says_is_one() -> None:
    """Layers are numbered before experts; layers for predicting ahead follow the others."""
    names = [f"model.layers.{n}.mlp.experts.{e}.w1.weight" for n in range(5) for e in range(4)]
    assert layer_tensors(names, 4) == names
    assert layer_tensors(names, 6) == []
