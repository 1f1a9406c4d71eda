"""What an engine's layout is, as a small declaration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_convert.adapters.base import Adapter
from dllm_convert.common.diffusion_section import DiffusionSection
from dllm_convert.source.safetensors_header import TensorEntry


@dataclass(frozen=True)
class Converted:
    """A converted checkpoint, as far as its headers and configs tell.

    Attributes:
        config: Its config.json.
        section: The `diffusion` section of that.
        adapter: Its family.
        entries: Its tensors by name.
        tokens: Ids that its tokenizer has, the mask's included.
    """

    config: Mapping[str, Any]
    section: DiffusionSection
    adapter: Adapter
    entries: Mapping[str, TensorEntry] = field(repr=False)
    tokens: int

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.adapter.head not in self.entries

    @property
    def rope(self) -> Mapping[str, Any]:
        """The rotary embedding's parameters, as transformers puts them together.

        The older field wins where there are two, and older names stand where newer ones lack.
        """
        config = self.config
        given = config.get("rope_scaling") or config.get("rope_parameters") or {}
        return {
            "rope_type": given.get("type", "default"),
            "rope_theta": config.get("rope_theta", 1e4),
            **given,
        }

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        width, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        return int(self.config.get("head_dim") or width // heads)

    def has(self, ending: str) -> bool:
        """Whether some tensor's name ends so."""
        return any(name.endswith(ending) for name in self.entries)


@dataclass(frozen=True)
class Refusal:
    """Why a checkpoint cannot be served in a layout.

    Attributes:
        reason: What was found and what the engine does.
        way_out: What to type, or which other target takes it.
    """

    reason: str
    way_out: str


@dataclass(frozen=True)
class Layout:
    """What engines read, and what stands in the way.

    Attributes:
        name: As `--to` takes it.
        engines: Who reads it, for people.
        summary: What it is, in a line.
        refusals: What stands in the way, given the checkpoint.
        launch: How to start an engine: lines with `{out}`, `{block}`, `{sampler}`, `{shift}`.
    """

    name: str
    engines: tuple[str, ...]
    summary: str
    refusals: Callable[[Converted], Iterator[Refusal]]
    launch: tuple[str, ...]

    def stands_in_the_way(self, converted: Converted) -> Iterator[Refusal]:
        """Yield why a checkpoint cannot be had in this layout: nothing, and it can."""
        if converted.section.is_gated:
            yield Refusal(
                "its adapter acts on noisy tokens only, beside a base that stays: merged into the "
                "weights it would act on every token",
                "Sample it with dllm-convert, or convert again without --keep-base",
            )
        yield from self.refusals(converted)

    def started(self, converted: Converted, out: Path | str) -> tuple[str, ...]:
        """Return how to start an engine on an export of a checkpoint that lies at `out`."""
        section = converted.section
        return tuple(
            line.format(
                out=out,
                block=section.block_size,
                sampler="BD3LMSampler" if section.objective == "bd3lm" else "MDLMSampler",
                shift=section.token_shift,
            )
            for line in self.launch
        )


@dataclass(frozen=True)
class Target(Layout):
    """A layout of safetensors: other names, under a config of the engine's.

    Attributes:
        config: config.json of the export, given the checkpoint and the row of the mask.
        names: Name in the export of each tensor, or of the stack it is a part of.
        mask_row: Row that the engine takes for the mask; None: the config's own.
        rows: Least rows of its vocabulary; 0 for those there are.
        unties: Whether the head is written although it is the embedding.
        may_untie: Whether it can be, where the tied one would predict what is no token.
        files: More files, name to text, given the checkpoint.
    """

    config: Callable[[Converted, int, int], dict[str, Any]]
    names: Callable[[str], str]
    mask_row: int | None = None
    rows: int = 0
    unties: bool = False
    may_untie: bool = False
    files: Callable[[Converted], Mapping[str, str]] = lambda _: {}


_SHIFT = "--set token_shift=drop"


def no_shift(converted: Converted) -> Iterator[Refusal]:
    """Refuse a model that predicts position i from i - 1."""
    if converted.section.token_shift:
        # That layout says where its engine reads them, and imports this module.
        from dllm_convert.planning.layouts import a2d

        other = ", or export --to a2d" if not any(a2d.TARGET.stands_in_the_way(converted)) else ""
        yield Refusal(
            "it predicts a token at the position before (token_shift), and the engine reads logits "
            "at the token's own",
            f"Convert with {_SHIFT}{other}",
        )


def blocks_only(converted: Converted) -> Iterator[Refusal]:
    """Refuse what has no blocks."""
    if converted.section.objective != "bd3lm":
        yield Refusal(
            f"it is {converted.section.objective}, and the engine decodes block by block",
            "Convert with --to bd3lm --block 32",
        )


def masks_only(converted: Converted) -> Iterator[Refusal]:
    """Refuse kernels without a mask: engines unmask, they do not correct."""
    if not converted.section.masks:
        yield Refusal(
            f"it was trained to correct replaced tokens (noise.kernel: "
            f"{converted.section.noise_kernel}), and engines only fill masks in",
            "Convert with --set noise.kernel=absorbing",
        )


def open_context(converted: Converted) -> Iterator[Refusal]:
    """Refuse a strictly causal context: engines keep the states that a block's last step made."""
    if converted.section.draft == "causal":
        yield from open_blocks(converted)
    elif converted.section.context == "causal":
        yield Refusal(
            "its finished blocks were trained to be read strictly causally (ar_loss_weight), and "
            "the engine reads them open",
            "Export --to nemotron, or convert with --set training.ar_loss_weight=0",
        )


def open_blocks(converted: Converted) -> Iterator[Refusal]:
    """Refuse noisy tokens that see nothing ahead: engines let a block see all of itself."""
    if converted.section.draft == "causal":
        yield Refusal(
            "its attention is strictly causal (block_attention: causal), and the engine lets the "
            "tokens of a block see each other",
            "Convert with --set block_attention=open",
        )


def default_rope(converted: Converted) -> Iterator[Refusal]:
    """Refuse rotary embeddings that the engine would take for plain ones."""
    kind = converted.rope.get("rope_type", "default")
    if kind != "default":
        yield Refusal(
            f"its rotary embedding is of type {kind}, which the engine ignores without a word",
            "No export of it is right; sample it with dllm-convert",
        )


def no_window(converted: Converted) -> Iterator[Refusal]:
    """Refuse sliding windows."""
    kinds = converted.config.get("layer_types") or ()
    if "sliding_attention" in kinds:
        yield Refusal(
            "some of its layers have a sliding window, and the engine has none",
            "Convert it again; --to bd3lm drops the window where that is exact",
        )


def mask_row_is_free(row: int, converted: Converted) -> Iterator[Refusal]:
    """Refuse where the engine's mask is a token of the text."""
    mask = converted.section.mask_token_id
    if mask != row and row < converted.tokens:
        yield Refusal(
            f"the engine's mask is row {row}, which is a token of this tokenizer "
            f"({converted.tokens} of them)",
            "Another target has its mask elsewhere: llada2 takes any tokenizer below 156,895",
        )


def decoded_by_blocks(converted: Converted) -> Iterator[Refusal]:
    """Refuse what engines that fill in masks block by block, at their own position, read wrong."""
    for rule in (blocks_only, no_shift, masks_only, open_context, default_rope, no_window):
        yield from rule(converted)


SGLANG = (
    "python -m sglang.launch_server --model-path {out} --trust-remote-code "
    "--dllm-algorithm LowConfidence --dllm-algorithm-config {out}/sglang_dllm.yaml"
)


MLX_VLM = (
    "python -m mlx_vlm.generate --model {out} --prompt 'A list is' --max-tokens 64 "
    "--block-length {block} --max-denoising-steps {block}"
)
"""mlx-vlm takes blocks of 32 tokens and 32 steps unless it is told."""


def sglang_files(converted: Converted) -> dict[str, str]:
    """Return the file that `SGLANG` names: its server reads no block size from config.json."""
    return {"sglang_dllm.yaml": f"block_size: {converted.section.block_size}\nthreshold: 0.95\n"}


def families(names: tuple[str, ...], why: str, converted: Converted) -> Iterator[Refusal]:
    """Refuse other families than those of a list."""
    family = converted.adapter.model_type
    if family not in names:
        yield Refusal(f"it is {family}, and {why}", f"This layout takes {', '.join(names)}")


def common_config(converted: Converted, rows: int, mask: int) -> dict[str, Any]:
    """Return the fields that all engines read.

    `rope_theta` stands flat beside `rope_parameters`: engines and transformers before 5 read 10,000
    where it is missing, without a word. No `rope_scaling`: as null it erases the parameters.
    """
    config = converted.config
    kept = (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("max_position_embeddings", "rms_norm_eps", "initializer_range", "hidden_act"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "dtype", "attention_dropout"),
    )
    heads = config["num_attention_heads"]
    return {
        **{key: config[key] for key in kept if config.get(key) is not None},
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
        "head_dim": converted.head_dim,
        "hidden_act": config.get("hidden_act", "silu"),
        "vocab_size": rows,
        "rope_theta": converted.rope["rope_theta"],
        "rope_parameters": dict(converted.rope),
        "mask_token_id": mask,
        "block_size": converted.section.block_size,
        "tie_word_embeddings": converted.tied,
        "torch_dtype": config.get("dtype"),
        "use_cache": True,
    }


def config_class(name: str, model_type: str) -> str:
    """Return the code of a config that transformers does not know by itself."""
    return (
        f'"""Config of {model_type}, for engines that ask transformers for it."""\n\n'
        "from transformers import PretrainedConfig\n\n\n"
        f"class {name}(PretrainedConfig):\n"
        f'    """Keeps every field as config.json has it."""\n\n    model_type = "{model_type}"\n'
    )
