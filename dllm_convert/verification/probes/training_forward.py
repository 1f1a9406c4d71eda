"""The forward that trains: who sees whom in it, and does it predict what decoding predicts?

BD3LM trains on noisy and clean streams side by side, `[x_t ; x_0]` (arXiv 2503.09573, figure 3). A
noisy block that sees its own clean tokens learns to copy, and its loss looks wonderful.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from dllm_convert.behaviour.influence import Pattern
from dllm_convert.diffusion.attention import StreamMask
from dllm_convert.diffusion.corruption import Corruption, NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import measured_process
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import Prediction, predict
from dllm_convert.verification.probes.influence import observe
from dllm_convert.verification.probes.invariance import invariant
from dllm_convert.verification.report import Probe, largest, skipped
from dllm_convert.verification.subject import SEED, Subject

PADDING = 3


def check_training(subject: Subject) -> list[Probe]:
    """Return the probes `training-mask`, `training-influence` and `packed`."""
    names = ("training-mask", "training-influence", "packed")
    objective = subject.objective
    batch = packed_row(subject, objective)
    if batch is None:
        reason = f"a context of {subject.context} tokens has no room for two documents"
        return [skipped(name, "0", reason) for name in names]
    (noise,) = corrupt(
        batch, objective, measured_process(objective), NoiseKey(SEED, 0, 0, 1, "verify")
    )
    forward = predict(batch, [noise], objective)
    if forward.mask is None:
        return [Probe(names[0], False, "no mask for two documents", "0 pairs wrong")]
    measure = partial(_difference, subject, objective, batch, noise, forward)
    same = skipped(names[2], "no difference", "the noise that was drawn masks nothing")
    if noise.scored.any():
        same = invariant(subject, names[2], measure, measure())
    return [
        _mask(forward, forward.mask, objective),
        _influence(subject, forward, forward.mask, objective),
        same,
    ]


def packed_row(subject: Subject, objective: Objective) -> TextBatch | None:
    """Return two documents that end inside blocks and padding, in one row; None without room."""
    # Past the reach of a local layer, so that its window shows.
    size = objective.block_size or max(8, subject.reach or 0)
    # The clean copy of a document's last block does not run: of three blocks one has a later one.
    lengths = [2 * size + size // 2 + 1, size // 2 + 2]
    width = sum(lengths) + PADDING
    if width > subject.context:
        return None
    places = [torch.arange(length) for length in lengths]
    owners = [torch.full((length,), number) for number, length in enumerate(lengths)]
    return TextBatch(
        subject.tokens(1, width),
        torch.cat([*owners, torch.full((PADDING,), -1)])[None],
        torch.cat([*places, torch.zeros(PADDING, dtype=torch.long)])[None],
    )


def claimed_mask(mask: StreamMask, objective: Objective) -> torch.Tensor:
    """Return who may see whom in the training forward, shape (width, width), bool.

    Written out here a second time on purpose, from positions alone; blocks are counted anew.
    """
    stream, segment, position = mask.streams[0], mask.segments[0], mask.positions[0]
    block = position // objective.size if objective.block_size else torch.zeros_like(position)
    earlier, own = block[:, None] > block[None], block[:, None] == block[None]
    upto = own & (position[:, None] >= position[None]) if objective.context == "causal" else own
    clean = stream == 0
    among = own & (position[:, None] >= position[None]) if objective.draft == "causal" else own
    noisy_query = (stream[:, None] == stream[None]) & among | (clean[None] & earlier)
    clean_query = clean[None] & (earlier | upto)
    seen = torch.where(clean[:, None], clean_query, noisy_query)
    real = (stream >= 0) & (segment >= 0)
    return seen & (segment[:, None] == segment[None]) & real[None]


def _real(mask: StreamMask) -> torch.Tensor:
    return (mask.streams[0] >= 0) & (mask.segments[0] >= 0)


def _name(mask: StreamMask, column: int) -> str:
    stream = "noisy" if int(mask.streams[0, column]) else "clean"
    place = f"{int(mask.positions[0, column])} of document {int(mask.segments[0, column])}"
    return f"{stream} token {place}"


def _first(mask: StreamMask, wrong: torch.Tensor, allowed: torch.Tensor) -> str:
    """Describe the first wrong pair of (width, width), empty if there is none."""
    if not wrong.any():
        return ""
    query, key = (int(value) for value in wrong.nonzero()[0])
    verb = "does not see" if allowed[query, key] else "sees"
    return f"{_name(mask, query)} {verb} {_name(mask, key)}"


def _mask(forward: Prediction, mask: StreamMask, objective: Objective) -> Probe:
    allowed, real = claimed_mask(mask, objective), _real(mask)
    wrong = (mask.dense()[0, 0] != allowed) & real[:, None]
    flex = mask.block_mask()
    index = torch.arange(len(real))
    first = torch.zeros((), dtype=torch.long)
    rule = flex.mask_mod(first, first, index[:, None], index[None])
    wrong_flex = (rule != allowed) & real[:, None]
    pairs = int(real.sum()) * len(real)
    return Probe(
        "training-mask",
        not (wrong | wrong_flex).any(),
        f"{int(wrong.sum())} of {pairs} pairs wrong, {int(wrong_flex.sum())} as flex reads it",
        "0, 0",
        _first(mask, wrong | wrong_flex, allowed),
    )


def _influence(
    subject: Subject, forward: Prediction, mask: StreamMask, objective: Objective
) -> Probe:
    """Change one token of every document, stream and block; look at all real positions."""
    pattern, first = observe_training(subject, forward, mask, objective, mask.dense())
    return Probe(
        "training-influence",
        not pattern.wrong.any(),
        f"{int(pattern.wrong.sum())} of {pattern.allowed.numel()} pairs wrong",
        f"0 pairs: closed up to {pattern.limit:.2g}, open above",
        first(pattern.wrong),
    )


def told_of_noise(forward: Prediction) -> dict[str, torch.Tensor]:
    """Return what a gated model is told of a forward, nothing of any other."""
    return {name: value for name, value in forward.inputs.items() if name == "noisy"}


def observe_training(
    subject: Subject,
    forward: Prediction,
    mask: StreamMask,
    objective: Objective,
    attention_mask: Any,
) -> tuple[Pattern, Callable[[torch.Tensor], str]]:
    """Measure who moves whom in a training forward.

    Args:
        subject: The checkpoint.
        forward: The forward of one row, where the subject's model is.
        mask: Its mask, on the CPU.
        objective: What is trained.
        attention_mask: The same mask as the model's attention takes it.

    Returns:
        The pattern of all real positions, and what describes the first of its pairs that are wrong.
    """
    allowed, real = claimed_mask(mask, objective), _real(mask)
    keys = torch.stack([mask.streams[0], mask.segments[0], mask.blocks[0]], dim=-1)
    groups: dict[tuple[int, ...], int] = {}
    for column in real.nonzero().flatten().tolist():
        groups[tuple(keys[column].tolist())] = column
    columns = sorted(groups.values())
    settings = {
        "attention_mask": attention_mask,
        "position_ids": forward.inputs["position_ids"],
        **told_of_noise(forward),
    }

    def text(draw: int) -> torch.Tensor:
        row = forward.inputs["input_ids"][0]
        masked = row == subject.claim.mask_token_id
        return torch.where(masked, row, subject.tokens(1, len(row), draw=draw)[0])

    model = partial(subject.model, **settings)
    pattern = observe(subject, model, text, columns, allowed[:, columns] & real[:, None])
    rows = real.nonzero().flatten()
    pattern = replace(
        pattern,
        moved=pattern.moved[rows],
        allowed=pattern.allowed[rows],
        rows=rows.tolist(),
    )

    def first(wrong: torch.Tensor) -> str:
        everywhere = torch.zeros_like(allowed)
        everywhere[rows[:, None], torch.tensor(columns)] = wrong
        return _first(mask, everywhere, allowed)

    return pattern, first


@torch.no_grad()
def _difference(
    subject: Subject,
    objective: Objective,
    batch: TextBatch,
    noise: Corruption,
    forward: Prediction,
) -> float:
    """Return the largest difference between training's predictions and decoding's.

    Training predicts from one packed row; decoding from one document, its finished blocks clean,
    its present block noisy.
    """
    trained = subject.model(
        **forward.inputs, attention_mask=forward.dense_mask(), use_cache=False
    ).logits
    hidden = noise.tokens
    if hidden is None:
        hidden = batch.tokens.masked_fill(noise.scored, objective.mask_token_id)
    differences = []
    seen = 0
    for segment in range(int(batch.segments.max()) + 1):
        inside = batch.segments[0] == segment
        scored = noise.scored[0, inside]
        alone = _alone(subject, objective, batch.tokens[0, inside], hidden[0, inside])
        count = int(scored.sum())
        differences.append(trained[seen : seen + count] - alone[scored])
        seen += count
    return largest(differences)


def _alone(
    subject: Subject, objective: Objective, clean: torch.Tensor, noisy: torch.Tensor
) -> torch.Tensor:
    """Return the logits that predict each position of one document, shape (length, vocab)."""
    length = len(clean)
    size = objective.block_size or length
    found: list[torch.Tensor] = []
    for first in range(0, length, size):
        end = min(first + size, length)
        tokens = torch.cat([clean[:first], noisy[first:end]])[None]
        settings: dict[str, Any] = {}
        if objective.block_size is not None:  # without blocks decoding has no mask
            settings["attention_mask"] = _decoding_mask(objective, first, end)
        if objective.is_gated:
            settings["noisy"] = torch.arange(end)[None] >= first
        logits = subject.model(tokens, use_cache=False, **settings).logits[0]
        if objective.token_shift:
            # The first token of a document follows nothing and is never scored.
            logits = torch.cat([logits[:1], logits[:-1]])
        found.append(logits[first:])
    return torch.cat(found)


def _decoding_mask(objective: Objective, first: int, end: int) -> torch.Tensor:
    """Return the mask of clean tokens before `first` and a noisy block, (1, 1, end, end), bool."""
    position = torch.arange(end)
    block = position // (objective.block_size or end)
    seen = block[:, None] >= block[None]
    if objective.context == "causal":
        is_open = (position[:, None] >= first) & (objective.draft == "open")
        seen &= (position[:, None] >= position[None]) | is_open
    return seen[None, None]
