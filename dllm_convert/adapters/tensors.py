"""The tensors of a family's stock class, by name and by the sizes that its config gives."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

Sizes = tuple[str, ...]
"""Sizes of a tensor, outermost first: names of what `sizes_of` computes."""

_MODEL, _LAYER, _NORM = "model.", "model.layers.", ("hidden_size",)


@dataclass(frozen=True)
class ClassTensors:
    """What a stock class holds; a test compares it with the class itself, on the meta device.

    Attributes:
        prefix: Name of the body in the class; files may leave it out (`base_model_prefix`).
        layers: What the name of a tensor of a layer begins with; a number follows.
        outside: Tensors outside the layers.
        inside: Tensors of every layer, by the rest of the name.
        flagged: Config flag to the tensors that every layer has besides where it is true.
        defaults: What the class takes for a number that config.json leaves out.
        nullable: Fields that may be null, which counts as left out.
        heads_divide: Whether the class wants the heads to divide the hidden size.
        absent: Tensors of `inside` that a layer does without, by their whole names.
    """

    prefix: str
    layers: str
    outside: Mapping[str, Sizes]
    inside: Mapping[str, Sizes]
    flagged: Mapping[str, Mapping[str, Sizes]]
    defaults: Mapping[str, int]
    nullable: tuple[str, ...] = ()
    heads_divide: bool = False
    absent: tuple[str, ...] = ()

    def names(self, layers: int, flags: Mapping[str, bool]) -> dict[str, Sizes]:
        """Return every tensor of the class, untied, by name.

        Args:
            layers: Number of layers.
            flags: Value of every flag of `flagged`.
        """
        inside = dict(self.inside)
        for flag, more in self.flagged.items():
            inside |= more if flags[flag] else {}
        numbered = {
            f"{self.layers}{number}.{name}": sizes
            for number in range(layers)
            for name, sizes in inside.items()
            if name in self.of_layer(number, inside)
        }
        return {**self.outside, **numbered}

    def of_layer(self, number: int, names: Collection[str]) -> set[str]:
        """Return those of the layers' names that a layer has."""
        return {name for name in names if f"{self.layers}{number}.{name}" not in self.absent}


def sizes_of(tensors: ClassTensors, config: Mapping[str, Any]) -> dict[str, int]:
    """Return every size by name, as the class reads a config whose numbers were checked.

    `queries` and `keys` are heads times their width; what is one matrix in some classes has a name
    for both or all three.
    """
    found = dict(tensors.defaults)
    found |= {key: config[key] for key in tensors.defaults if config.get(key) is not None}
    heads = found["num_attention_heads"]
    # Left out it is the class's default, null is as many as there are heads.
    groups = config.get("num_key_value_heads", tensors.defaults.get("num_key_value_heads"))
    width = config.get("head_dim") or tensors.defaults.get("head_dim")
    found["head_dim"] = width = width or found["hidden_size"] // heads
    found["queries"] = heads * width
    found["keys"] = (groups or heads) * width
    found["queries_keys_values"] = found["queries"] + 2 * found["keys"]
    found["gate_and_up"] = 2 * found["intermediate_size"]
    return found


def _biases(*names: str) -> dict[str, Sizes]:
    sizes = {"q_proj": "queries", "k_proj": "keys", "v_proj": "keys", "o_proj": "hidden_size"}
    return {f"self_attn.{name}.bias": (sizes[name],) for name in names}


QKV_BIASES = _biases("q_proj", "k_proj", "v_proj")
ATTENTION_BIASES = {"attention_bias": _biases("q_proj", "k_proj", "v_proj", "o_proj")}
MLP_BIASES: Mapping[str, Mapping[str, Sizes]] = {
    "mlp_bias": {
        "mlp.gate_proj.bias": ("intermediate_size",),
        "mlp.up_proj.bias": ("intermediate_size",),
        "mlp.down_proj.bias": ("hidden_size",),
    }
}
QK_NORMS: Mapping[str, Sizes] = {
    "self_attn.q_norm.weight": ("head_dim",),
    "self_attn.k_norm.weight": ("head_dim",),
}
_DECODER_LAYER: Mapping[str, Sizes] = {
    "self_attn.q_proj.weight": ("queries", "hidden_size"),
    "self_attn.k_proj.weight": ("keys", "hidden_size"),
    "self_attn.v_proj.weight": ("keys", "hidden_size"),
    "self_attn.o_proj.weight": ("hidden_size", "queries"),
    "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
    "input_layernorm.weight": _NORM,
    "post_attention_layernorm.weight": _NORM,
}


def decoder(
    *,
    inside: Mapping[str, Sizes] | None = None,
    flagged: Mapping[str, Mapping[str, Sizes]] | None = None,
    nullable: tuple[str, ...] = ("num_key_value_heads",),
    heads_divide: bool = False,
    **defaults: int,
) -> ClassTensors:
    """Declare the tensors of a decoder shaped like Llama.

    Args:
        inside: What every layer has besides.
        flagged: What it has besides by flags of the config.
        nullable: Fields that may be null.
        heads_divide: Whether the class wants the heads to divide the hidden size.
        **defaults: Numbers of the class's config.
    """
    outside = {
        f"{_MODEL}embed_tokens.weight": ("vocab_size", "hidden_size"),
        f"{_MODEL}norm.weight": _NORM,
        "lm_head.weight": ("vocab_size", "hidden_size"),
    }
    layer = {**_DECODER_LAYER, **(inside or {})}
    return ClassTensors(
        "model", _LAYER, outside, layer, flagged or {}, defaults, nullable, heads_divide
    )


ENCODER_DEFAULTS: Mapping[str, int] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
}


def encoder(prefix: str, head: Mapping[str, Sizes], **defaults: int) -> ClassTensors:
    """Declare the tensors of an encoder shaped like BERT.

    Args:
        prefix: Name of the body.
        head: Tensors of its language-model head.
        **defaults: Numbers of the class's config.
    """
    hidden, norm = ("hidden_size", "hidden_size"), ("weight", "bias")
    outside: dict[str, Sizes] = {
        f"{prefix}.embeddings.word_embeddings.weight": ("vocab_size", "hidden_size"),
        f"{prefix}.embeddings.position_embeddings.weight": (
            "max_position_embeddings",
            "hidden_size",
        ),
        f"{prefix}.embeddings.token_type_embeddings.weight": ("type_vocab_size", "hidden_size"),
        **{f"{prefix}.embeddings.LayerNorm.{kind}": _NORM for kind in norm},
        **head,
    }
    linear: dict[str, Sizes] = {
        **{f"attention.self.{name}": hidden for name in ("query", "key", "value")},
        "attention.output.dense": hidden,
        "intermediate.dense": ("intermediate_size", "hidden_size"),
        "output.dense": ("hidden_size", "intermediate_size"),
    }
    inside: dict[str, Sizes] = {}
    for name, sizes in linear.items():
        inside |= {f"{name}.weight": sizes, f"{name}.bias": sizes[:1]}
    for name in ("attention.output.LayerNorm", "output.LayerNorm"):
        inside |= {f"{name}.{kind}": _NORM for kind in norm}
    return ClassTensors(
        prefix, f"{prefix}.encoder.layer.", outside, inside, {}, defaults, heads_divide=True
    )
