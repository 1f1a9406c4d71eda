"""What is written when, counted before anything runs: the host asks a device for none of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .options import DecodingOptions


@dataclass(frozen=True)
class Region:
    """Columns that every row writes in the same forwards: a block or part of one, a window, or all.

    Attributes:
        starts: First of the columns at hand in each row; every row has as many.
        begins: First of them that the row may write.
        ends: The one behind the last that the row may write.
        counts: Masks of each row there; 0 where a row has no such region, or nothing to write.
    """

    starts: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    counts: tuple[int, ...]


def _spans(
    masked: list[int], length: int, limit: int, options: DecodingOptions
) -> list[tuple[int, int]]:
    """Return where a row's regions begin and end, from its `masked` columns in order."""
    if size := options.block_size:
        part = options.sub_block_size or size
        return [
            (begin, min(begin + part, block + size))
            for block in range(masked[0] // size * size, limit, size)
            for begin in range(block, block + size, part)
        ]
    if size := options.block_length:
        # Counted from the first new token: masks in a prompt lie in negative windows.
        windows = sorted({(column - length) // size for column in masked})
        firsts = [length + window * size for window in windows]
        return [(max(first, 0), min(first + size, limit)) for first in firsts]
    return [(masked[0], limit)]


def plan_regions(
    masked: torch.Tensor, lengths: Sequence[int], limits: Sequence[int], options: DecodingOptions
) -> tuple[int, list[Region]]:
    """Return how many columns are at hand at once, and the regions in order.

    Rows go from region to region in step: row r writes its third block beside every other row's
    third one. A row that has fewer stays at its last.

    Args:
        masked: Where something is to be written, shape (batch, width), bool, on the CPU.
        lengths: Tokens of each prompt.
        limits: Columns of each row.
        options: How text is denoised.
    """
    spans = [
        _spans(row.nonzero().squeeze(-1).tolist(), length, limit, options)
        for row, length, limit in zip(masked, lengths, limits, strict=True)
    ]
    block = options.block_size
    # Of a block all columns are at hand, whichever part of it is written.
    columns = block or max(end - begin for row in spans for begin, end in row)
    before = torch.nn.functional.pad(masked.long().cumsum(-1), (1, 0)).tolist()
    regions = []
    for number in range(max(map(len, spans))):
        here = [row[min(number, len(row) - 1)] for row in spans]
        regions.append(
            Region(
                # No column is at hand twice: a row that ends early has earlier ones beside its own.
                starts=tuple(
                    begin // block * block if block else min(begin, masked.shape[1] - columns)
                    for begin, _ in here
                ),
                begins=tuple(begin for begin, _ in here),
                ends=tuple(end for _, end in here),
                counts=tuple(
                    counted[end] - counted[begin] if number < len(row) else 0
                    for counted, (begin, end), row in zip(before, here, spans, strict=True)
                ),
            )
        )
    return columns, regions


def is_foreseeable(options: DecodingOptions) -> bool:
    """Whether how many tokens a step commits depends on nothing that the model says."""
    unsure = options.confidence_threshold is not None or options.entropy_bound is not None
    return not unsure and options.remasking is None


def counts_ahead(options: DecodingOptions) -> bool:
    """Whether how many tokens each step commits can be counted before anything is written.

    Where a text may end early fewer are left, and each step commits its share of those.
    """
    return is_foreseeable(options) and (not options.eos_token_ids or commits_one(options))


def commits_one(options: DecodingOptions) -> bool:
    """Whether the number of steps asks each of them for one token."""
    return options.max_denoising_steps is None and options.remasking is None


def plan_steps(counts: Sequence[int], options: DecodingOptions) -> list[list[int]]:
    """Return a row of numbers for each step that writes masks, `counts` of each row.

    Where it can be foreseen they are how many tokens each row commits; else how many steps it has
    left, of as many steps as it can take at the most.
    """
    most, plan = options.max_denoising_steps, []
    budgets = [count if most is None else most for count in counts]
    remaining, foreseeable = list(counts), counts_ahead(options)
    steps = max(
        budget if options.remasking else min(budget, count)
        for budget, count in zip(budgets, counts, strict=True)
    )
    for step in range(steps if any(counts) else 0):
        left = [max(budget - step, 1) for budget in budgets]
        if not foreseeable:
            plan.append(left)
            continue
        if not any(remaining):
            break
        quota = [-(-count // steps) for count, steps in zip(remaining, left, strict=True)]
        remaining = [count - now for count, now in zip(remaining, quota, strict=True)]
        plan.append(quota)
    return plan
