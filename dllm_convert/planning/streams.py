"""How many tokens, pairs and logits one training forward runs, from the recipe alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dllm_convert.recipe.schema import Noise, Recipe


@dataclass(frozen=True)
class Streams:
    """What one forward of one device runs.

    Attributes:
        rows: Rows of the batch as the model sees it.
        width: Tokens of a row.
        clean: Clean tokens that the batch stands for.
        scored: Positions that logits are computed at.
        pairs: Pairs of query and key that attention looks at, over all rows.
        read: Clean tokens that run beforehand, without a gradient, where the base is kept.
        read_pairs: Pairs that attention looks at there.
        copied: Clean columns whose states noisy rows have copies of, over all rows: behind a cache.
        stops: Places at which such rows begin: the base reads up to each in a forward of its own,
            and the rows there run in another.
    """

    rows: int
    width: int
    clean: int
    scored: float
    pairs: float
    read: int = 0
    read_pairs: float = 0.0
    copied: float = 0.0
    stops: int = 0

    @property
    def tokens(self) -> int:
        """Tokens that run through the layers."""
        return self.rows * self.width


def mean_masked_share(noise: Noise) -> float:
    """Expected share of tokens that one view masks: the mean of 1 - alpha(t) over the times.

    MDLM (2406.07524) and MD4 (2406.04329) name the schedules; drawn by count (LLaDA, 2502.09992,
    equation 6) it is a half for each of them.
    """
    if noise.draw == "count":
        return 0.5
    if noise.draw == "draft":
        # On average a text has as many masks as tokens.
        return 1.0
    a, b = noise.min_time, noise.max_time
    if noise.schedule in ("linear", "learned"):  # which begins as that
        return (a + b) / 2
    if noise.schedule == "cosine":
        quarter = math.pi / 2
        return (math.sin(quarter * (1 - a)) - math.sin(quarter * (1 - b))) / (quarter * (b - a))
    power = noise.power + 1
    return float((b**power - a**power) / (power * (b - a)))


def streams(recipe: Recipe, *, sparse: bool, cached: bool = False) -> Streams:
    """Count what one forward runs, for text that fills its rows with whole documents.

    Block diffusion runs K noisy views and one clean stream without its last block, which nobody
    looks at: (K + 1) L - b tokens a row. The views of masked diffusion are rows of their own. Where
    the base is kept, its clean stream runs beforehand, and the K views alone are what is trained.

    Args:
        recipe: The resolved recipe.
        sparse: Whether attention skips pairs that nobody sees; otherwise it looks at all of a row.
        cached: Whether noisy rows beside a kept base stand behind copies of its cache.
    """
    noise, length, batch = (
        recipe.noise,
        recipe.data.sequence_length,
        recipe.training.sequences_per_forward,
    )
    views = noise.views * (2 if noise.complementary or noise.schedule == "learned" else 1)
    share = mean_masked_share(noise)
    if not noise.masks:
        share = 1.0
    elif noise.complementary:
        share = 0.5
    scored = batch * views * length * share
    clean = batch * length
    if recipe.target == "mdlm":
        rows = batch * views
        return Streams(rows, length, clean, scored, rows * length**2)
    block = recipe.block_size or 1
    if recipe.training.keeps_base:
        if noise.draw != "draft":
            # A block's first token is the base's to predict.
            scored *= 1 - 1 / block
        if cached:
            return _behind_cache(recipe, block, views, scored)
        width, seen = views * length, (length + block) / 2
        pairs = width * seen if sparse else width * (width + length)
        read_pairs = length**2 / 2 if sparse else length**2
        return Streams(batch, width, clean, scored, batch * pairs, clean, batch * read_pairs)
    ar_loss = recipe.training.ar_loss_weight > 0
    width = (views + 1) * length - (0 if ar_loss else block)
    scored += clean if ar_loss else 0
    # A query sees its block and, on average, half of what is outside of it; so does a clean one.
    pairs = (views + 1) * length * (length + block) / 2 if sparse else width**2
    return Streams(batch, width, clean, scored, batch * pairs)


def _behind_cache(recipe: Recipe, block: int, views: int, scored: float) -> Streams:
    """Count rows of blocks, or of drafts, each behind a copy of a cache half as long as a text."""
    length, batch = recipe.data.sequence_length, recipe.training.sequences_per_forward
    if recipe.noise.draw == "draft":
        # Behind two of `block` tokens there are masks; rows are as wide as the widest there.
        stops, rows, width = length, batch * length * min(1.0, 2 / block), max(block - 1, 2)
    else:
        stops = math.ceil(length / block)
        rows, width = float(batch * views * stops), block
    count = math.ceil(rows)
    return Streams(
        count,
        width,
        batch * length,
        scored,
        count * width * (length + width) / 2,
        read=batch * length,
        read_pairs=batch * length**2 / 2,
        copied=count * length / 2,
        stops=stops,
    )


@dataclass(frozen=True)
class Writing:
    """What the model writes in an on-policy step, a row of each of its texts.

    Attributes:
        rows: Texts that one forward of one device has at once.
        width: Tokens of a text at most, its prompt included.
        forwards: Forwards that write it at most, one after the other.
        run: Tokens that run through the layers in all of them.
        pairs: Pairs that attention looks at in them.
        logits: Positions that logits are computed at.
        at_once: The most of those in one forward.
    """

    rows: int
    width: int
    forwards: int
    run: float
    pairs: float
    logits: float
    at_once: int


def writing(recipe: Recipe) -> Writing:
    """Count what writing the rows of one forward takes at the most.

    A threshold commits several tokens in a forward, and an end token ends a text early; how often
    is the model's to say. Of bd3lm a block, or a part of it, runs behind what is cached, and the
    block once more when it is written; of mdlm every forward runs the whole text.
    """
    chosen, rows = recipe.training.on_policy, recipe.training.sequences_per_forward
    steps, new = recipe.generation.max_denoising_steps, chosen.new_tokens
    # What stands before an answer of a chat is as long as a row leaves room for.
    width, usual = recipe.data.sequence_length, chosen.prompt_tokens + new
    if recipe.target == "mdlm":
        windows = -(-new // (recipe.generation.block_length or new))
        forwards = min(new, windows * steps) if steps else new
        logits = rows * forwards * (new + 1) / 2
        return Writing(rows, width, forwards, rows * forwards * usual,
                       rows * forwards * usual**2, logits, rows * new)  # fmt: skip
    block = recipe.block_size or 1
    blocks = -(-new // block)
    parts = -(-block // (recipe.generation.sub_block_size or block))
    each = min(block, parts * steps) if steps else block
    run = rows * (chosen.prompt_tokens + blocks * (each + 1) * block)
    logits = rows * blocks * each * (block + 1) / 2
    pairs = run * (chosen.prompt_tokens + usual) / 2
    return Writing(rows, width, blocks * (each + 1), run, pairs, logits, rows * block)
