"""The forward process: which tokens are corrupted, and what each of them weighs in the bound.

Noise depends on where a row stands in a training and on nothing else: on how many processes the
rows are spread, how they are accumulated and where a run was interrupted changes none of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch

from dllm_convert.diffusion.device import moved
from dllm_convert.diffusion.neighbours import Walk
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.diffusion.word_classes import WordClasses

Uniforms = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class ForwardProcess:
    """How text is corrupted.

    Attributes:
        schedule: Noise schedule.
        draw: `time`: draw t per group; `count`: draw how many of its tokens are masked; `draft`:
            masks behind clean tokens, which `diffusion.drafts` draws.
        position_bias: Position-dependent masking (Efficient-DLM): of a group, token i is masked
            before others with weight exp(bias * (1 - level) * i). 0 masks all alike; with any other
            value the loss is no longer a bound.
        views: Independent draws over the same clean text.
        paired: Draw twice at each time, for exponents that are learnt (`word_classes`).
        complementary: Add to every view the one that masks exactly the other tokens (Fast-dLLM v2,
            arXiv 2509.26328).
    """

    schedule: Schedule = field(default_factory=Schedule)
    draw: Literal["time", "count", "draft"] = "time"
    position_bias: float = 0.0
    views: int = 1
    complementary: bool = False
    paired: bool = False


@dataclass(frozen=True)
class NoiseKey:
    """Which noise is meant.

    Attributes:
        seed: Seed of the run.
        step: Optimizer step in training, number of the draw in a measurement.
        first_row: Number of the batch's first row among `rows`.
        rows: Rows of the step over all forwards and processes: noise levels are stratified over
            them.
        purpose: Keeps the noise of measurements apart from that of training.
    """

    seed: int
    step: int
    first_row: int
    rows: int
    purpose: str = "train"

    def generator(self, *where: int) -> torch.Generator:
        """Return a generator for one row and view, or without arguments one for the whole step."""
        key = "/".join(map(str, (self.purpose, self.seed, self.step, *where)))
        digest = hashlib.blake2b(key.encode(), digest_size=7).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big"))

    def each_row(
        self, count: int, draw: Callable[[torch.Generator], torch.Tensor], *use: int
    ) -> torch.Tensor:
        """Stack what `draw` makes of each row's own generator, shape (count, ...).

        Args:
            count: Rows of the batch.
            draw: Draws the noise of a row.
            use: Tells uses of a row's noise apart.
        """
        rows = range(self.first_row, self.first_row + count)
        return torch.stack([draw(self.generator(row, *use)) for row in rows])


@dataclass(frozen=True)
class Corruption:
    """One draw of noise.

    Attributes:
        scored: Tokens whose prediction enters the loss, shape (batch, length), bool: the masked
            ones, or where tokens are replaced all that may be corrupted.
        weight: What each of them weighs in the NELBO, shape (batch, length), float32; else 0.
        tokens: The corrupted text, shape (batch, length); None: scored tokens become the mask.
        kept: Probability that a token is still clean before and at its time, alpha(t - 1/T) and
            alpha(t), shape (batch, length, 2), float64; where tokens are replaced only.
        time: t of each token, shape (batch, length), float64; where words have classes only.
        behind: How many masks stand behind each token, shape (batch, length); drafts only, see
            `diffusion.drafts`.
    """

    scored: torch.Tensor
    weight: torch.Tensor
    tokens: torch.Tensor | None = None
    kept: torch.Tensor | None = None
    behind: torch.Tensor | None = None
    time: torch.Tensor | None = None

    def to(self, device: torch.device) -> Corruption:
        """Return the same noise on a device."""
        return replace(self, **{name: moved(value, device) for name, value in vars(self).items()})


def number_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Number the groups of a batch consecutively, row by row.

    Args:
        groups: Group of each token, rising along its row, shape (batch, length), int.

    Returns:
        The same with numbers that are unique in the batch, shape (batch, length), and how many
        groups each row has, shape (batch,).
    """
    # A group begins where the number changes, and with each row; counting beginnings over the whole
    # flattened batch numbers them without a loop.
    starts = groups.diff(dim=-1, prepend=groups[:, :1]) != 0
    starts[:, 0] = True
    return starts.flatten().cumsum(0).view_as(groups) - 1, starts.sum(-1)


def levels(key: NoiseKey, counts: torch.Tensor, view: int, views: int) -> torch.Tensor:
    """Draw a level in (0, 1] per group, shape (groups,), float64; `counts` are a row's groups.

    Stratified over the groups of each row and over all rows and views of the step: with n groups to
    every row the levels of a step are the lattice (i + u) / (n * rows * views), shuffled.
    """
    # One offset and one shuffle for the step, the same on every rank: they place (row, view)
    # on the lattice of rows * views, so no two rows of a step have nearly the same levels.
    step = key.generator()
    # rand is in [0, 1): turned round it is in (0, 1], and no level is 0, where nothing is masked.
    offset = 1 - float(torch.rand(1, generator=step, dtype=torch.float64))
    places = torch.randperm(key.rows * views, generator=step)
    drawn = []
    for number, count in enumerate(counts.tolist()):
        row = key.first_row + number
        place = (int(places[(row % key.rows) * views + view]) + offset) / len(places)
        # Each of the row's n groups gets one n-th of (0, 1], in an order of this row and view
        # alone, and stands in it where the step has placed the row. float64, shape (count,).
        order = torch.randperm(count, generator=key.generator(row, view, 0))
        drawn.append((order.double() + place) / count)
    return torch.cat(drawn)


@dataclass(frozen=True)
class _Draw:
    """What one view draws from: all on the CPU, groups numbered over the batch."""

    groups: torch.Tensor
    level: torch.Tensor
    scorable: torch.Tensor
    positions: torch.Tensor
    uniforms: torch.Tensor

    @property
    def sizes(self) -> torch.Tensor:
        """Scorable tokens of each group, shape (groups,), float64."""
        return self.per_group(self.scorable)

    def per_group(self, values: torch.Tensor) -> torch.Tensor:
        """Sum (batch, length) over each group, shape (groups,), float64."""
        total = torch.zeros(len(self.level), dtype=torch.float64)
        return total.index_add_(0, self.groups.flatten(), values.flatten().double())

    def first(self, chosen: torch.Tensor, bias: float) -> torch.Tensor:
        """Choose `chosen` scorable tokens of each group, (batch, length), bool.

        With a bias token i comes first with weight exp(bias * (1 - level) * i): the smallest of
        exponential times divided by weights (Efraimidis and Spirakis, 2006).
        """
        # First position of each group, (groups,): the bias counts from there.
        start = torch.full((len(self.level),), torch.inf, dtype=torch.float64)
        place = self.positions.double()
        flat = self.groups.flatten()
        start.scatter_reduce_(0, flat, place.flatten(), "amin")
        slope = bias * (1 - self.level)
        # log of an exponential time divided by its weight, (batch, length): in logarithms, since
        # exp(bias * i) overflows on a long document. Who may not be masked never arrives.
        race = (-self.uniforms.log()).log() - slope[self.groups] * (place - start[self.groups])
        race = torch.where(self.scorable, race, torch.inf).flatten()
        # Sorted by time first and, keeping that order, by group: each group's tokens in a run.
        order = race.argsort()
        order = order[flat[order].argsort(stable=True)]
        # A token's rank in its group is its place in that run: (batch * length,).
        lengths = torch.bincount(flat, minlength=len(self.level))
        starts = lengths.cumsum(0) - lengths
        rank = torch.empty_like(flat)
        rank[order] = torch.arange(len(flat)) - starts[flat[order]]
        return self.scorable & (rank.view_as(self.groups) < chosen[self.groups])


def _by_time(draw: _Draw, process: ForwardProcess) -> list[Corruption]:
    """Draw t per group and mask each token with 1 - alpha(t)."""
    schedule = process.schedule
    # t and 1 - alpha(t) per group, (groups,); spread to tokens by indexing with (batch, length).
    t = schedule.times(draw.level)
    share = schedule.mask_probability(t)
    masked = draw.scorable & (draw.uniforms < share[draw.groups])
    if process.position_bias:
        # How many are masked stays what the draw said, only which changes.
        masked = draw.first(draw.per_group(masked), process.position_bias)
    weight = schedule.weight(t)
    pair = [(masked, weight)]
    if process.complementary:
        # The complement is masked with probability alpha(t), drawn as densely as t is: the bound
        # as an integral over the masked share is the same on both sides.
        pair.append((draw.scorable & ~masked, weight * share / (1 - share).clamp(min=1e-12)))
    return [Corruption(where, torch.where(where, w[draw.groups], 0.0).float()) for where, w in pair]


def _by_count(draw: _Draw, process: ForwardProcess) -> list[Corruption]:
    """Draw how many of each group's n tokens are masked, uniformly from 1..n, then which.

    Integrating the continuous-time bound over t leaves, for every schedule, the sum over m of the
    expected cross-entropy at m masked tokens divided by m: the likelihood estimator of LLaDA (arXiv
    2502.09992, equation 6), with weight n/m. The same bound as by time, without its noise in the
    number of masked tokens and without weights near t = 0. A complementary pair draws from 0..n, so
    that both sides are uniform, and weighs (n+1)/m.
    """
    sizes = draw.sizes
    if not process.complementary:
        chosen = (draw.level * sizes).ceil().clamp(min=1)
        masked = draw.first(chosen, process.position_bias)
        weight = (sizes / chosen)[draw.groups]
        return [Corruption(masked, torch.where(masked, weight, 0.0).float())]
    # level in (0, 1]: ceil makes 1..n+1 equally likely, minus one 0..n.
    chosen = (draw.level * (sizes + 1)).ceil() - 1
    masked = draw.first(chosen, process.position_bias)
    pair = [(masked, chosen), (draw.scorable & ~masked, sizes - chosen)]
    return [
        Corruption(
            where, torch.where(where, ((sizes + 1) / m.clamp(min=1))[draw.groups], 0.0).float()
        )
        for where, m in pair
    ]


def _by_replacing(
    draw: _Draw, process: ForwardProcess, batch: TextBatch, objective: Objective, key: NoiseKey
) -> list[Corruption]:
    """D3PM's kernels without a mask (arXiv 2107.03006): a token becomes any other but the mask.

    With `neighbours` those that nothing has replaced yet have walked among words like them. Every
    token that may be corrupted is scored, at one of T equally likely times: weight T.
    """
    schedule = process.schedule
    t = schedule.times(draw.level)
    steps = schedule.discrete_steps or 1
    # alpha one step before t and at t: (2, groups), then (batch, length, 2).
    kept = 1 - torch.stack([schedule.mask_probability(t - 1 / steps), schedule.mask_probability(t)])
    kept = kept.T[draw.groups]
    count, length = batch.tokens.shape
    other = key.each_row(
        count, lambda g: torch.randint(objective.vocabulary - 1, (length,), generator=g), 0, 2
    )
    # Drawn from one token fewer, then moved past the mask: uniform over all others.
    other = other + (other >= objective.mask_token_id).long()
    replaced = draw.scorable & (draw.uniforms >= kept[..., 1])
    tokens = batch.tokens.cpu()
    if objective.walk is not None:
        tokens = _walked(objective.walk, tokens, 1 - kept[..., 1], key, count)
        tokens = torch.where(draw.scorable, tokens, batch.tokens.cpu())
    tokens = torch.where(replaced, other, tokens)
    weight = torch.where(draw.scorable, float(steps), 0.0)
    return [Corruption(draw.scorable, weight, tokens, kept)]


def _by_class(
    draw: _Draw, process: ForwardProcess, batch: TextBatch, classes: WordClasses, again: Uniforms
) -> list[Corruption]:
    """Draw t per group and mask each token with t^w, w that of its class (MD4, section 6).

    A masked token weighs 1/t: its exponent is in what it costs.
    """
    t = process.schedule.times(draw.level)[draw.groups]
    share = classes.masked_share(t, batch.tokens.cpu())
    views = []
    for uniforms in (draw.uniforms, again()) if process.paired else (draw.uniforms,):
        masked = draw.scorable & (uniforms < share)
        views.append(Corruption(masked, torch.where(masked, 1 / t, 0.0).float(), time=t))
    return views


def _walked(
    walk: Walk, tokens: torch.Tensor, share: torch.Tensor, key: NoiseKey, rows: int
) -> torch.Tensor:
    """Let tokens (rows, length) walk for their shares of the jumps, of the same shape."""
    generators = (key.generator(row, 0, 3) for row in range(key.first_row, key.first_row + rows))
    return torch.stack(
        [
            walk.walked(words, walk.jumps * part, generator)
            for words, part, generator in zip(tokens, share, generators, strict=True)
        ]
    )


def corrupt(
    batch: TextBatch, objective: Objective, process: ForwardProcess, key: NoiseKey
) -> tuple[Corruption, ...]:
    """Corrupt text, once per view.

    Args:
        batch: Clean text.
        objective: What shares a noise level: a block (BD3LM) or a document (MDLM).
        process: How text is corrupted.
        key: Which noise.

    Returns:
        One draw per view, on the device of the text; a complement follows its view.
    """
    # All draws are made on the CPU: the same noise whatever computes, and nothing waits for a GPU.
    scorable = batch.scorable.cpu()
    groups, counts = number_groups(batch.noise_groups(objective).cpu())
    rows, length = scorable.shape
    views: list[Corruption] = []
    for view in range(process.views):
        # One level per group, (groups,); one uniform number per token, (batch, length).
        level = levels(key, counts, view, process.views)
        drawn = partial(
            key.each_row,
            rows,
            lambda g: torch.rand(length, generator=g, dtype=torch.float64),
            view,
        )
        draw = _Draw(groups, level, scorable, batch.positions.cpu(), drawn(1))
        if objective.classes is not None:
            views += _by_class(draw, process, batch, objective.classes, partial(drawn, 4))
        elif not objective.masks:
            views += _by_replacing(draw, process, batch, objective, key)
        else:
            views += (_by_count if process.draw == "count" else _by_time)(draw, process)
    return tuple(view.to(batch.tokens.device) for view in views)
