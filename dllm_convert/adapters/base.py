"""What a model family declares so that it can be converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dllm_convert.adapters.tensors import ClassTensors
from dllm_convert.common.terms import Behind, Target

Implementation = Literal["sdpa", "eager"]


@dataclass(frozen=True)
class SlidingWindow:
    """A sliding window as a family's config declares it; its size is `sliding_window`.

    Attributes:
        overrides: Config values that open it to full attention on every layer.
        default: Size where the config does not name one.
        flag: Config key that must be true for the window to be in force.
        first_layer: Config key of the first layer that has it; below it attention is full.
        first_layer_default: Value where the config does not name one.
    """

    overrides: Mapping[str, Any]
    default: int
    flag: str | None = None
    first_layer: str | None = None
    first_layer_default: int = 0


@dataclass(frozen=True)
class LocalLayers:
    """Layers of an encoder that see a window to both sides, and keep it.

    Attributes:
        size: Config key of the window's tokens, half of them to each side.
        default: Size where the config does not name one.
        every: Config key of how many layers apart those are that see everything, from the first on.
        every_default: Value where the config does not name one.
    """

    size: str
    default: int
    every: str
    every_default: int = 3


@dataclass(frozen=True)
class Measured:
    """Where a declaration comes from that nobody wrote: see `dllm_convert.probing`.

    Attributes:
        transformers: Version the family was measured with.
        config: Fields that this checkpoint's config leaves to its class or calls by names of its
            own, under the names all decoders share.
        layers: Kind of layer to how many of them the checkpoint has.
        narrow: Kinds whose window had to be opened.
        order: Kind of each layer, as its place among the sorted names of `layers`; empty where all
            layers are of one kind.
    """

    transformers: str
    config: Mapping[str, Any]
    layers: Mapping[str, int]
    narrow: tuple[str, ...] = ()
    order: tuple[int, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kind of each layer, from the first to the last."""
        names = sorted(self.layers)
        if self.order:
            return tuple(names[place] for place in self.order)
        return tuple(name for name in names for _ in range(self.layers[name]))


@dataclass(frozen=True)
class Adapter:
    """A family, as data. Adding one is one file beside this one, see docs/add-a-family.md.

    The defaults are those of decoders shaped like Llama; a family says where it differs.

    Attributes:
        model_type: `model_type` of the stock config; the registry's key.
        stock_class: Class in transformers that holds the base weights.
        diffusion_class: Class in `dllm_convert.modeling.published.modeling` that replaces it.
        auto_class: Auto class under which both are found.
        attention: Attention of the base: `causal` or `bidirectional`.
        targets: Objectives this family converts to exactly.
        embedding: Name of the input embedding tensor, shape (vocab, hidden).
        head: Name of the output projection, shape (vocab, hidden); absent from the file when tied.
        head_biases: Names of vectors of shape (vocab,) that go with the head, may be absent.
        head_required: Tensors without which the language-model head would be random.
        lora_targets: Module names that receive LoRA.
        norm_modules: Module names of normalisation layers, kept trainable beside LoRA.
        embedding_module: Module name of the input embedding.
        head_module: Module name of the output projection.
        also_of: Other classes of transformers whose checkpoints hold all of `stock_class`.
        tensors: What `stock_class` holds; None where it was measured instead.
        unused_tensors: Regular expression of tensors that `stock_class` does not load and a
            measurement found; left out.
        reserved_tokens: Regular expression of tokens the vendor reserved and never trained.
        window: The family's sliding window, None if it has none.
        local: Layers that see a window and keep it, None if there are none.
        positions_after_pad: Whether positions count from `pad_token_id + 1`, as in RoBERTa.
        min_transformers: First transformers release that honours what the conversion relies on.
        tolerance: Largest absolute difference of float32 logits counted as equal.
        implementations: Implementations of attention the class has, the preferred one first.
        behind: How noisy tokens can stand behind a base that stays as it is: by a mask over both
            (then also by a cache), by a copy of its cache only; None if not at all.
        measured: Set where no file declares the family and it was measured instead.
    """

    model_type: str
    stock_class: str
    diffusion_class: str
    auto_class: Literal["AutoModelForCausalLM", "AutoModelForMaskedLM"] = "AutoModelForCausalLM"
    attention: Literal["causal", "bidirectional"] = "causal"
    targets: tuple[Target, ...] = ("mdlm", "bd3lm")
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    lora_targets: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    norm_modules: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm", "norm")
    embedding_module: str = "embed_tokens"
    head_module: str = "lm_head"
    head_biases: tuple[str, ...] = ()
    head_required: tuple[str, ...] = ()
    also_of: tuple[str, ...] = ()
    tensors: ClassTensors | None = None
    unused_tensors: str | None = None
    reserved_tokens: str | None = None
    window: SlidingWindow | None = None
    local: LocalLayers | None = None
    positions_after_pad: bool = False
    min_transformers: str = "5.2.0"
    tolerance: float = 1e-4
    implementations: tuple[Implementation, ...] = ("sdpa", "eager")
    behind: Behind | None = "mask"
    measured: Measured | None = None
