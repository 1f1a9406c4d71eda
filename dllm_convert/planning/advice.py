"""What published runs say about a plan's settings; advice only, nothing here stops a run."""

from __future__ import annotations

from dllm_convert.adapters.base import Adapter
from dllm_convert.planning.launch import Launch
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.info import SourceInfo

LARGE_BUDGET = 1_000_000_000
"""Training tokens from which the learning rates of long published runs apply."""
SMALL_BUDGET = 10_000_000
"""Training tokens below which they are known to be too low."""
LONG_BUDGET = 10_000_000_000
"""Training tokens from which the token shift is known to cost more than it saves."""
SMALL_MODEL, MEDIUM_MODEL = 2_500_000_000, 3_500_000_000
"""Parameters up to and from which the best block sizes at 1.5B and 4B are taken to apply."""
PYDOC_TOKENS = 113_000
"""Tokens of the language reference in CPython 3.11, SmolLM2's tokenizer."""


def _learning_rate(recipe: Recipe, tokens: int) -> str | None:
    rate = recipe.training.peak_learning_rate
    if recipe.training.method != "full":
        return None
    if tokens <= SMALL_BUDGET and rate >= 5e-4:
        return (
            f"learning rate {rate:g} with full training: measured on SmolLM2-135M in 30 steps, "
            "held-out NELBO 5.94 at 5e-4 and 5.33 at 3e-4 (--set training.learning_rate=3e-4)"
        )
    if tokens >= LARGE_BUDGET and rate >= 1e-4:
        return (
            f"learning rate {rate:g} over {tokens:.1e} tokens: Efficient-DLM (Qwen3-4B, 25B "
            "tokens) measured 51.0 at 1e-4 and 60.6 at 1e-5"
        )
    if tokens <= SMALL_BUDGET and rate <= 2e-5:
        return (
            f"learning rate {rate:g} over only {tokens:.1e} tokens: rates like 1e-5 are from runs "
            "of billions of tokens (Efficient-DLM); a run of minutes needs more"
        )
    return None


def _lora(recipe: Recipe) -> str | None:
    lora = recipe.training.lora
    if recipe.training.method != "lora" or recipe.training.keeps_base:
        return None
    if lora.embeddings == "mask_row" or not lora.norms:
        return (
            "LoRA with frozen embeddings or norms: Efficient-DLM (Qwen2.5-1.5B) finds that "
            "embeddings, norms and the head must stay trainable"
        )
    if lora.rank < 64:
        return (
            f"LoRA of rank {lora.rank}: Efficient-DLM (Qwen2.5-1.5B, 50B tokens) measured 27.9 at "
            "rank 16, 30.8 at rank 64 and 38.4 with full training"
        )
    return None


def _taught(recipe: Recipe, tokens: int) -> str | None:
    training = recipe.training
    teaches = training.keeps_base and training.distillation.weight > 0
    if not teaches or tokens > SMALL_BUDGET or training.peak_learning_rate < 2e-3:
        return None
    return (
        f"learning rate {training.peak_learning_rate:g} beside a base that teaches: of three runs "
        "on SmolLM2-135M at 2e-3 two were lost within 60 steps, of two at 1e-3 none "
        "(--set training.lora.learning_rate=1e-3)"
    )


def _objective(recipe: Recipe, adapter: Adapter, tokens: int) -> str | None:
    if adapter.attention != "causal":
        return None
    if recipe.target == "mdlm":
        return (
            "a causal model opened to mdlm: Efficient-DLM (Qwen2.5-1.5B, 50B tokens) measured "
            "19.3, against 38.4 for block diffusion (--to bd3lm --block 16)"
        )
    if recipe.token_shift == "drop" and tokens <= SMALL_BUDGET:  # noqa: S105
        return (
            "token_shift drop on a small budget: keeping the shift learnt faster in our runs of 60 "
            "steps (SmolLM2-135M, held-out NELBO 5.20 against 5.53); at 50B tokens dropping it "
            "wins slightly (Efficient-DLM)"
        )
    if recipe.token_shift == "keep" and tokens >= LONG_BUDGET:  # noqa: S105
        return (
            f"token_shift keep over {tokens:.1e} tokens: Efficient-DLM "
            "(Qwen2.5-1.5B, 50B tokens) measured 37.7 with and 38.4 without the shift "
            "(--set token_shift=drop)"
        )
    return None


def _block(recipe: Recipe, source: SourceInfo) -> str | None:
    block, size = recipe.block_size, source.parameters
    if block is None or not size or recipe.training.method == "none":
        return None
    if recipe.noise.draw == "draft":
        # What is drafted behind a token, no block of a diffusion.
        return None
    of = f"blocks of {block} for {size / 1e9:.2g}B parameters: Efficient-DLM"
    if size <= SMALL_MODEL and block >= 128:
        return f"{of} (Qwen2.5-1.5B) measured 33.7 at 128 and 38.4 at 16, the best (--block 16)"
    if size <= SMALL_MODEL and block <= 4:
        return f"{of} (Qwen2.5-1.5B) measured 25.1 at 4 and 38.4 at 16, the best (--block 16)"
    if size >= MEDIUM_MODEL and block < 16:
        return f"{of} found 64 best at 4B (Qwen3-4B) and 16 at 1.5B (--block 64)"
    return None


def _data(recipe: Recipe, tokens: int) -> str | None:
    if recipe.training.method == "none" or recipe.data.source != "pydoc":
        return None
    if tokens < 20 * PYDOC_TOKENS:
        return None
    return (
        f"data pydoc holds about {PYDOC_TOKENS:.1e} tokens and the plan trains on {tokens:.1e}: "
        "every document would be seen more than 20 times; give text of your own with --data"
    )


def _licence(recipe: Recipe, source: SourceInfo) -> str | None:
    if source.license and recipe.license and source.license != recipe.license:
        return (
            f"the recipe says licence {recipe.license}, the source says {source.license}: "
            "the source's is used"
        )
    if not source.license and not recipe.license:
        return "the licence of the base is unknown: look it up before publishing (--set license=ID)"
    return None


def _lengths(recipe: Recipe, context: int | None) -> str | None:
    wanted = recipe.generation.max_new_tokens
    if context is not None and wanted > context:
        return f"generation.max_new_tokens {wanted} is larger than the context of {context} tokens"
    return None


def advise(
    recipe: Recipe, source: SourceInfo, adapter: Adapter, context: int | None, launch: Launch
) -> tuple[str, ...]:
    """Return the warnings of a plan, one sentence each, with the source of every number."""
    tokens = recipe.training_tokens * launch.processes
    found = (
        _learning_rate(recipe, tokens),
        _lora(recipe),
        _taught(recipe, tokens),
        _objective(recipe, adapter, tokens),
        _block(recipe, source),
        _data(recipe, tokens),
        _licence(recipe, source),
        _lengths(recipe, context),
    )
    return tuple(sentence for sentence in found if sentence is not None)
