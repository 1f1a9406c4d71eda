"""The objectives against what they must equal: enumeration, the AR likelihood, and each other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from toys import MASK, Table, chain, exact_bound, masked_loss, packed, single, tiny_model

from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import autoregressive_nll, nelbo
from dllm_convert.diffusion.losses import cross_entropy
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import predict
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.errors import DataError

TEXT = torch.tensor([[0, 2, 1, 2]])
TOY = Objective("mdlm", 3, False)
SCHEDULES = [
    Schedule("linear"),
    Schedule("cosine"),
    Schedule("polynomial", power=2.0),
    Schedule("polynomial", power=0.5),
]


def names(schedule: Schedule) -> str:
    return f"{schedule.name}-{schedule.power:g}"


def subsets(scorable: list[int]) -> list[tuple[int, ...]]:
    sizes = range(1, len(scorable) + 1)
    return [s for size in sizes for s in itertools.combinations(scorable, size)]


def bound_at(
    model: Table, share: torch.Tensor, weight: torch.Tensor, scorable: list[int]
) -> torch.Tensor:
    """Expected loss per token at times with these mask probabilities, by enumerating masks."""
    total = torch.zeros_like(share)
    for where in subsets(scorable):
        chance = share ** len(where) * (1 - share) ** (len(scorable) - len(where))
        total += chance * weight * masked_loss(model, TEXT[0], where, 3)
    return total / len(scorable)


def test_block_size_one_with_shift_is_the_autoregressive_likelihood() -> None:
    model, batch = tiny_model(), packed()
    ours = nelbo(model, [batch], Objective("bd3lm", MASK, True, 1), seed=0)
    base = autoregressive_nll(model, [batch], 40)
    with torch.no_grad():
        scorable = batch.scorable
        rows, columns = scorable.nonzero(as_tuple=True)
        pieces = [(0, 0, 7), (0, 7, 12), (1, 0, 7), (1, 7, 12), (2, 0, 7), (2, 7, 10)]
        logits = torch.cat(
            [
                model(
                    batch.tokens[row : row + 1, start:stop],
                    attention_mask=torch.ones(1, 1, stop - start, stop - start).tril().bool(),
                ).logits[0, :-1]
                for row, start, stop in pieces
            ]
        )
        targets = batch.tokens[rows, columns]
        excluded = cross_entropy(logits, targets, MASK).double().mean()
        plain = torch.nn.functional.cross_entropy(logits.float(), targets).double()
    assert ours.nats_per_token == pytest.approx(float(excluded), abs=1e-6)
    assert base.nats_per_token == pytest.approx(float(plain), abs=1e-6)
    assert ours.tokens == base.tokens == int(scorable.sum()) == 3 * (6 + 4) - 2


@pytest.mark.parametrize("shift", [True, False])
def test_one_block_as_long_as_the_text_is_mdlm(shift: bool) -> None:
    model, batch = tiny_model(), packed()
    block = nelbo(model, [batch], Objective("bd3lm", MASK, shift, 12), seed=3, draws=4)
    whole = nelbo(model, [batch], Objective("mdlm", MASK, shift), seed=3, draws=4)
    assert block.nats_per_token == pytest.approx(whole.nats_per_token, abs=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_the_bound_does_not_depend_on_the_schedule(schedule: Schedule) -> None:
    model = Table(4, 3)
    # Midpoints in a variable that squeezes the steep end of every schedule.
    s = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    t, density = s**4, 4 * s**3
    value = bound_at(model, schedule.mask_probability(t), schedule.weight(t), [1, 2, 3]) * density
    assert float(value.mean()) == pytest.approx(exact_bound(model, TEXT[0], [1, 2, 3], 3), rel=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=names)
def test_discrete_time_converges_from_above(schedule: Schedule) -> None:
    # From above where more context means better predictions, which a random table does not know.
    model = Table(4, 3)
    for where in subsets([1, 2, 3]):
        visible = TEXT[0].clone()
        visible[list(where)] = 3
        for position in where:
            model.table[tuple(visible.tolist())][position] = 0.0
            model.table[tuple(visible.tolist())][position, TEXT[0, position]] = 3.0 - len(where)
    exact = exact_bound(model, TEXT[0], [1, 2, 3], 3)
    bounds = []
    for steps in (1, 4, 16, 64, 256, 1024, 4096):
        discrete = Schedule(schedule.name, schedule.power, discrete_steps=steps)
        t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        value = bound_at(model, discrete.mask_probability(t), discrete.weight(t), [1, 2, 3])
        bounds.append(float(value.mean()))
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[0] > exact + 1e-3
    assert 0 <= bounds[-1] - exact + 1e-6 < 0.02 * (bounds[0] - exact)


PROCESSES = {
    # Below power 1 the weights have no finite variance.
    **{f"time-{names(s)}": ForwardProcess(s) for s in SCHEDULES if s.power >= 1},
    "count": ForwardProcess(draw="count"),
    "complementary-time": ForwardProcess(Schedule(), complementary=True),
    "complementary-cosine": ForwardProcess(Schedule("cosine"), complementary=True),
    "complementary-count": ForwardProcess(draw="count", complementary=True),
    "views": ForwardProcess(draw="count", views=3),
}


@pytest.mark.parametrize("name", list(PROCESSES))
def test_every_process_estimates_the_same_bound(name: str) -> None:
    model, process, rows = Table(4, 3), PROCESSES[name], 40_000
    batch = single(TEXT.repeat(rows, 1))
    views = corrupt(batch, TOY, process, NoiseKey(0, 0, 0, rows))
    assert len(views) == process.views * (2 if process.complementary else 1)
    forward = predict(batch, views, TOY)
    logits = model(**forward.inputs).logits
    nats = forward.nats(logits, TOY) * forward.weight
    per_row = torch.zeros(rows, dtype=torch.float64).index_add_(0, forward.rows, nats.double())
    mean = per_row / len(views) / 3
    error = float(mean.std()) / math.sqrt(rows)
    exact = exact_bound(model, TEXT[0], [1, 2, 3], 3)
    assert float(mean.mean()) == pytest.approx(exact, abs=5 * error)
    assert error < 0.03


def test_the_measured_bound_is_the_enumerated_one() -> None:
    model = Table(4, 3)
    estimate = nelbo(model, [single(TEXT.repeat(300, 1))], TOY, seed=0, draws=4)
    exact = exact_bound(model, TEXT[0], [1, 2, 3], 3)
    assert estimate.nats_per_token == pytest.approx(exact, abs=4 * estimate.stderr + 1e-9)
    assert estimate.stderr < 0.05


def test_a_measurement_does_not_depend_on_the_batches() -> None:
    model, batch = tiny_model(), packed(rows=5)
    objective = Objective("bd3lm", MASK, True, 4)
    parts = [
        type(batch)(*(column[rows] for column in (batch.tokens, batch.segments, batch.positions)))
        for rows in (slice(0, 2), slice(2, 5))
    ]
    whole, split = (nelbo(model, b, objective, seed=0, draws=2) for b in ([batch], parts))
    assert split.nats_per_token == pytest.approx(whole.nats_per_token, abs=1e-6)
    assert split.stderr == pytest.approx(whole.stderr, abs=1e-6)


def test_the_bound_is_above_the_true_likelihood() -> None:
    model, mask, length = Table(3, 3), 3, 3
    for text in itertools.product(range(3), repeat=length):
        tokens = torch.tensor(text)
        orders = list(itertools.permutations(range(1, length)))
        chains = torch.stack([chain(model, tokens, order, mask) for order in orders])
        nll = -float((-chains).exp().mean().log()) / (length - 1)
        assert exact_bound(model, tokens, [1, 2], mask) >= nll - 1e-6


def test_the_mask_is_never_predicted() -> None:
    logits = torch.zeros(1, 8)
    logits[0, MASK] = 100.0
    nats = cross_entropy(logits, torch.tensor([1]), MASK)
    assert float(nats) == pytest.approx(torch.tensor(7.0).log().item(), abs=1e-6)
    logits = torch.randn(4, 8, requires_grad=True)
    cross_entropy(logits * 1, torch.tensor([0, 1, 2, 3]), MASK).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[:, MASK] == 0).all()
    others = torch.cat([logits.detach()[:, :MASK], logits.detach()[:, MASK + 1 :]], dim=1)
    others.requires_grad_()
    torch.nn.functional.cross_entropy(
        others, torch.tensor([0, 1, 2, 3]), reduction="sum"
    ).backward()
    kept = [column for column in range(8) if column != MASK]
    assert torch.allclose(logits.grad[:, kept], others.grad)


@pytest.mark.parametrize("rows", [0, 1, 2])
@pytest.mark.parametrize("block", [None, 4])
def test_text_without_a_scored_token_is_told(rows: int, block: int | None) -> None:
    tokens = torch.zeros(rows, 8, dtype=torch.long)
    where = torch.arange(8).expand_as(tokens)
    batch = TextBatch(tokens, torch.zeros_like(tokens), where, torch.zeros_like(tokens).bool())
    objective = Objective("bd3lm" if block else "mdlm", MASK, True, block)
    with pytest.raises(DataError, match=f"none of {rows} rows"):
        nelbo(tiny_model(), [batch], objective, seed=0)
    with pytest.raises(DataError, match=f"none of {rows} rows"):
        autoregressive_nll(tiny_model(), [batch], MASK)
