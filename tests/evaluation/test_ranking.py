"""Stopping early: how often it is wrong, and what it saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusion.toys import MASK, tiny_model

from dllm_convert.diffusion.objective import Objective
from dllm_convert.evaluation import ranking
from dllm_convert.evaluation.continuation import Continuation, Estimator
from dllm_convert.evaluation.paired import mean_of, paired_difference
from dllm_convert.evaluation.ranking import Budget, is_decided, score, student_quantile


@pytest.mark.parametrize(
    ("probability", "freedom", "exact"),
    # Two-sided tables of Student's t: 95 % and 99 %.
    [
        *[(0.975, 7, 2.3646), (0.975, 15, 2.1314), (0.995, 7, 3.4995), (0.995, 31, 2.7440)],
        # Few degrees of freedom, where an expansion around the normal distribution is far off.
        *[(0.9995, 3, 12.9240), (0.995, 1, 63.6567)],
    ],
)
def test_quantiles_of_student(probability: float, freedom: int, exact: float) -> None:
    assert student_quantile(probability, freedom) == pytest.approx(exact, rel=1e-4)


def test_what_is_decided() -> None:
    ones = [torch.ones(2, dtype=torch.float64)]
    noise = torch.randn(32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert is_decided(torch.stack([noise, noise + 1]), ones, 0.05), "shared noise cancels"
    assert not is_decided(torch.stack([noise, -noise]), ones, 0.05)
    lengths = torch.tensor([1.0, 4.0], dtype=torch.float64)
    apart = torch.stack([noise * 0.1 + 10, noise * 0.1 + 40])
    assert is_decided(apart, ones, 0.05)
    assert not is_decided(apart, [*ones, lengths], 0.05), "per character they are equal"
    assert is_decided(apart[:1], ones[:1], 0.05)
    assert not is_decided(apart[:, :1], ones, 0.05)


def test_a_ranking_decided_early_is_rarely_wrong(monkeypatch: Any) -> None:
    """Gaussian draws with a known winner: wrong less often than 1 - confidence says."""
    generator = torch.Generator().manual_seed(3)
    gaps = torch.rand(400, generator=generator, dtype=torch.float64)

    def fake(model: Any, texts: Any, objective: Any, estimator: Any, number: int, **_: Any) -> Any:
        rows = [
            torch.randn(estimator.draws, generator=generator, dtype=torch.float64)
            + (gaps[text.item] if text.start == 2 else 0)
            for text in texts
        ]
        return torch.stack(rows)

    monkeypatch.setattr(ranking, "score_round", fake)
    texts = [Continuation((1, 2, 3), start, item) for item in range(400) for start in (1, 2)]
    found = score(None, texts, None, Estimator(draws=8), Budget(32, 0.95))  # type: ignore[arg-type]
    early = found.draws[::2] < found.most
    wrong = (found.nats[1::2] < found.nats[::2]) & early
    assert int(early.sum()) > 100
    assert int(wrong.sum()) / int(early.sum()) <= 0.05
    assert 0.1 < found.saving < 0.95


def test_stopping_early_on_a_model() -> None:
    model, objective = tiny_model(), Objective("bd3lm", MASK, False, 4)
    texts = [
        Continuation((7, 8, 9, *end), 3, item)
        for item, ends in enumerate(([(10, 11), (12, 13)], [(14, 15, 16), (17,)], [(20, 21)]))
        for end in ends
    ]
    estimator = Estimator(draws=4)
    all_of_it = score(model, texts, objective, estimator, Budget(6))
    assert all_of_it.draws.tolist() == [24] * 5
    assert all_of_it.saving == 0
    early = score(
        model, texts, objective, estimator, Budget(6, 0.9), characters=dict.fromkeys(range(5), 3)
    )
    assert 0 < early.saving < 1
    assert early.draws[-1] == 24, "a single continuation is scored for its value"
    for first in (0, 2):
        if early.draws[first] < 24:
            assert (
                early.nats[first : first + 2].argmin() == all_of_it.nats[first : first + 2].argmin()
            )
    # Common random numbers: the first draws are the same ones.
    once = score(model, texts, objective, estimator, Budget(1))
    assert torch.allclose(once.nats, score(model, texts, objective, estimator, Budget(1)).nats)


def test_a_mean_has_an_interval_where_the_items_differ() -> None:
    mean = mean_of([0.0, 1.0, 1.0, 1.0])
    # Student's quantile of 3 degrees of freedom is 3.182; the variance is 1/4.
    assert mean.half_width == pytest.approx(3.182 * 0.25, rel=0.02)
    assert mean_of([1.0, 1.0, 1.0]).as_dict() == {"value": 1.0, "half_width": None, "items": 3}
    before, after = {1: 0.0, 2: 1.0, 3: 0.0}, {1: 1.0, 2: 1.0, 4: 0.0}
    assert paired_difference(before, after).items == 2
    assert paired_difference(before, after).value == 0.5
