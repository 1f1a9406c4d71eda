"""Which tokens are corrupted: uniform counts, strata, views, complements, and the same anywhere."""

from __future__ import annotations

import pytest
import torch
from toys import packed, single

from dllm_convert.diffusion.corruption import Corruption, ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.schedule import Schedule

COUNT = ForwardProcess(draw="count")


def text(rows: int, length: int) -> TextBatch:
    return single(torch.randint(6, 40, (rows, length)))


def draw(batch: TextBatch, size: int | None, process: ForwardProcess, **key: int) -> Corruption:
    objective = Objective("mdlm" if size is None else "bd3lm", 5, False, size)
    rows = key.pop("rows", len(batch.tokens))
    return corrupt(batch, objective, process, NoiseKey(0, 0, key.get("first", 0), rows))[0]


def test_counts_are_uniform_and_never_zero() -> None:
    corruption = draw(text(4000, 5), None, COUNT)
    counts = corruption.scored.sum(-1)
    assert not corruption.scored[:, 0].any()
    assert torch.bincount(counts, minlength=5).tolist() == [0, 1000, 1000, 1000, 1000]
    assert torch.equal(corruption.weight.amax(-1), (4 / counts).float())
    share = corruption.scored[:, 1:].float().mean(0)
    assert torch.allclose(share, torch.full((4,), 0.625), atol=0.03)


def test_every_block_has_a_noise_level_of_its_own() -> None:
    shares = draw(text(64, 64), 8, ForwardProcess()).scored.view(64, 8, 8).float().mean(-1)
    assert shares.std(dim=1).mean() > 0.2


def test_levels_are_spread_evenly_over_rows_and_blocks() -> None:
    # 6 rows of 5 blocks of 30: with even levels each count 1..30 comes up exactly once.
    batch = text(6, 150)
    batch = TextBatch(batch.tokens, batch.segments, batch.positions + 30)
    counts = draw(batch, 30, COUNT).scored.view(6, 5, 30).sum(-1).flatten()
    assert sorted(counts.tolist()) == list(range(1, 31))


@pytest.mark.parametrize("process", [COUNT, ForwardProcess(Schedule("cosine"), views=2)])
def test_a_row_gets_the_same_noise_wherever_it_runs(process: ForwardProcess) -> None:
    batch = packed(rows=6)
    objective = Objective("bd3lm", 5, True, 4)
    whole = corrupt(batch, objective, process, NoiseKey(0, 7, 0, 6))
    for first, last in ((0, 1), (1, 4), (4, 6)):
        rows = slice(first, last)
        part = TextBatch(batch.tokens[rows], batch.segments[rows], batch.positions[rows])
        views = corrupt(part, objective, process, NoiseKey(0, 7, first, 6))
        for ours, all_rows in zip(views, whole, strict=True):
            assert torch.equal(ours.scored, all_rows.scored[rows])
            assert torch.equal(ours.weight, all_rows.weight[rows])


def test_steps_views_seeds_and_purposes_draw_different_noise() -> None:
    batch, objective = text(4, 64), Objective("bd3lm", 5, False, 16)
    process = ForwardProcess(draw="count", views=2)
    keys = [
        NoiseKey(0, 0, 0, 4),
        NoiseKey(0, 1, 0, 4),
        NoiseKey(1, 0, 0, 4),
        NoiseKey(0, 0, 0, 4, "measure"),
    ]
    drawn = [view.scored for key in keys for view in corrupt(batch, objective, process, key)]
    for number, first in enumerate(drawn):
        for second in drawn[number + 1 :]:
            assert not torch.equal(first, second)


@pytest.mark.parametrize("how", ["time", "count"])
def test_a_complement_masks_exactly_the_other_tokens(how: str) -> None:
    batch = packed()
    process = ForwardProcess(draw=how, complementary=True)  # type: ignore[arg-type]
    one, other = corrupt(batch, Objective("bd3lm", 5, True, 4), process, NoiseKey(0, 0, 0, 3))
    assert torch.equal(one.scored ^ other.scored, batch.scorable)
    assert not (one.scored & other.scored).any()
    assert torch.isfinite(one.weight).all()
    assert torch.isfinite(other.weight).all()


@pytest.mark.parametrize("how", ["time", "count"])
def test_position_bias_masks_later_tokens_first_where_little_is_masked(how: str) -> None:
    batch = text(3000, 8)
    batch = TextBatch(batch.tokens, batch.segments, batch.positions + 8)
    plain, biased = (
        draw(batch, 8, ForwardProcess(draw=how, position_bias=bias)).scored  # type: ignore[arg-type]
        for bias in (0.0, 0.5)
    )
    assert torch.equal(plain.sum(-1), biased.sum(-1))
    few = plain.sum(-1) == 2
    assert few.sum() > 200
    share = biased[few].float().mean(0)
    assert share[7] > 3 * share[0]
    assert torch.equal(share, share.sort().values) or share.diff().min() > -0.05
    steep = draw(batch, 8, ForwardProcess(draw="count", position_bias=1e6)).scored
    count = steep.sum(-1)
    some = (count > 0) & (count < 8)
    assert all(steep[row, -int(count[row]) :].all() for row in some.nonzero().flatten().tolist())


def test_times_stay_in_their_interval_and_on_their_grid() -> None:
    level = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    clipped = Schedule(min_time=0.3, max_time=0.8).times(level)
    assert 0.3 < float(clipped.min()) < 0.301
    assert float(clipped.max()) == pytest.approx(0.8)
    grid = Schedule(discrete_steps=10).times(level)
    assert sorted(set((grid * 10).round(decimals=6).tolist())) == list(range(1, 11))
    assert torch.bincount((grid * 10).round().long())[1:].tolist() == [100] * 10


def test_blocks_restart_with_every_document() -> None:
    assert packed().blocks(4)[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]
    assert packed().blocks(4)[2].tolist() == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]
