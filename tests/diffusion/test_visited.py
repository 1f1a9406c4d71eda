"""States of a trajectory: those that decoding really passed through, all of them, and no others."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from toys import MASK, tiny_model

from dllm_convert.diffusion.corruption import NoiseKey
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.streams import corrupted
from dllm_convert.diffusion.visited import visited_states
from dllm_convert.modeling.published.options import Progress

SIZE, NEW = 4, 9
WAYS: dict[str, dict[str, Any]] = {
    "a token each": {},
    "two steps": {"max_denoising_steps": 2},
    "a threshold": {"confidence_threshold": 0.05},
    "drawn": {"temperature": 1.5, "unmasking": "random"},
}


def written(target: str, way: str) -> tuple[TextBatch, torch.Tensor, list[torch.Tensor]]:
    """Three texts of one decoding, when tokens were committed, and every canvas on the way."""
    model = tiny_model()
    size = SIZE if target == "bd3lm" else None
    model.config.block_size, model.config.mask_token_id = size, MASK
    model.config.diffusion = {"token_shift": False, "objective": target}
    model.generation_config.eos_token_id = None
    lengths = (3, 4, 6)
    generator = torch.Generator().manual_seed(3)
    prompts = torch.randint(6, 40, (3, 6), generator=generator)
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    canvases: list[torch.Tensor] = []

    def see(progress: Progress) -> None:
        canvases.append(progress.canvas.clone())

    found = model.generate(
        prompts, attention_mask=mask.long(), max_new_tokens=NEW, seed=7, observer=see,
        return_dict_in_generate=True, output_order=True, **WAYS[way],
    )  # fmt: skip
    width = max(lengths) + NEW
    tokens = torch.full((3, width + SIZE), MASK)
    order, loss = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    segments = torch.full_like(tokens, -1)
    for row, length in enumerate(lengths):
        end = length + NEW
        tokens[row, :length], tokens[row, length:end] = (
            prompts[row, :length],
            found.sequences[row, 6:],
        )
        order[row, length:end], loss[row, length:end] = found.order[row, 6:], True
        segments[row, : -(-end // SIZE) * SIZE if size else end] = 0
    positions = torch.arange(tokens.shape[1]) * (segments >= 0)
    return TextBatch(tokens, segments, positions, loss), order, canvases


def objective(target: str) -> Objective:
    return Objective("bd3lm" if target == "bd3lm" else "mdlm", MASK, False,
                     SIZE if target == "bd3lm" else None)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("target", ["bd3lm", "mdlm"])
def test_they_are_what_decoding_passed_through(target: str, way: str) -> None:
    batch, order, canvases = written(target, way)
    chosen = objective(target)
    groups = batch.noise_groups(chosen)
    # What each block looked like before a forward that wrote some of it, and its masks.
    passed: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for row in range(3):
        for group in groups[row][batch.loss[row]].unique().tolist():  # type: ignore[index]
            inside = (groups[row] == group).nonzero().squeeze(-1)
            inside = inside[inside < canvases[0].shape[1]]
            new = order[row, inside] > 0
            seen = {tuple(canvas[row, inside].tolist()) for canvas in canvases}
            passed[row, group] = {
                state for state in seen if (torch.tensor(state)[new] == MASK).any()
            }
    drawn: dict[tuple[int, int], Counter[tuple[int, ...]]] = {key: Counter() for key in passed}
    for step in range(60):
        views = visited_states(batch, order, chosen, NoiseKey(0, step, 0, 3), views=2)
        assert len(views) == 2
        for view in views:
            noisy = corrupted(batch, view, chosen)
            assert not (view.scored & ~batch.scorable).any()
            assert torch.equal(view.weight > 0, view.scored)
            for row, group in passed:
                inside = (groups[row] == group).nonzero().squeeze(-1)
                inside = inside[inside < canvases[0].shape[1]]
                drawn[row, group][tuple(noisy[row, inside].tolist())] += 1
                masked = view.scored[row, inside]
                size = int(batch.scorable[row, inside].sum())
                weights = view.weight[row, inside][masked]
                assert masked.any() and bool((weights == size / int(masked.sum())).all())
    for key, states in passed.items():
        # None that it did not pass through, all that it did, each as likely as any other.
        assert set(drawn[key]) == states, key
        assert min(drawn[key].values()) > 0.4 * 120 / len(states)


def test_a_draw_depends_on_the_row_and_not_on_the_batch() -> None:
    batch, order, _ = written("bd3lm", "a threshold")
    chosen = objective("bd3lm")
    whole = visited_states(batch, order, chosen, NoiseKey(0, 5, 0, 3))[0]
    for row in range(3):
        one = TextBatch(
            *(
                part[row : row + 1]
                for part in (batch.tokens, batch.segments, batch.positions, batch.loss)
            )
        )  # type: ignore[index, arg-type]
        alone = visited_states(one, order[row : row + 1], chosen, NoiseKey(0, 5, row, 3))[0]
        assert torch.equal(alone.scored[0], whole.scored[row])
        assert torch.equal(alone.weight[0], whole.weight[row])


def test_one_token_a_forward_weighs_what_a_draw_by_count_does() -> None:
    """Of n tokens m are masked, each m from 1 to n equally often, and weigh n / m."""
    batch, order, _ = written("bd3lm", "a token each")
    counts: Counter[int] = Counter()
    for step in range(200):
        (view,) = visited_states(batch, order, objective("bd3lm"), NoiseKey(1, step, 0, 3))
        masked = view.scored[1, SIZE : 2 * SIZE]
        counts[int(masked.sum())] += 1
        assert float(view.weight[1, SIZE : 2 * SIZE].sum()) == pytest.approx(SIZE)
    assert sorted(counts) == [1, 2, 3, 4] and min(counts.values()) > 30
