"""MD4's state-dependent schedule against enumeration: bound, gradient, the chain behind it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from toys import Table, exact_bound, single

from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt, number_groups
from dllm_convert.diffusion.likelihood import nelbo
from dllm_convert.diffusion.objective import Objective
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.diffusion.word_classes import (
    ClassDraw,
    WordClasses,
    class_divergence,
    classes_by_frequency,
    exponent_gradient,
)

WORDS, MASK = 3, 3
TEXT = torch.tensor([0, 2, 1])
PLACES = (1, 2)
EXPONENTS = (0.8, 1.5, 2.5)
CLASSES = WordClasses(EXPONENTS, ((1,), (0,)), WORDS + 1)
OWN = [1, 0, 2]
"""Class of each word."""


def model(scale: float = 1.0) -> Table:
    made = Table(3, WORDS)
    made.table = made.table * scale
    return made


def predicted(table: Table, visible: tuple[int, ...]) -> torch.Tensor:
    """Probabilities (length, words), float64."""
    return table.table[visible][:, :WORDS].double().softmax(-1)


def shown(masked: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(MASK if place in masked else int(TEXT[place]) for place in range(3))


def bound(table: Table, exponents: torch.Tensor, *, rates: bool = True) -> torch.Tensor:
    """The bound in nats per token by quadrature over t and a sum over all masks.

    Without the `rates` it is a weighted cross-entropy, and no bound.
    """
    # Nodes in u = t^(1/4): what is steep near 0 is smooth there.
    nodes, weights = np.polynomial.legendre.leggauss(200)
    u = torch.tensor((nodes + 1) / 2)
    t, measure = u**4, torch.tensor(weights / 2) * 4 * u**3
    each = exponents[torch.tensor(OWN)]
    total = torch.zeros(()).double()
    for size in (1, 2):
        for masked in itertools.combinations(PLACES, size):
            said = predicted(table, shown(masked))
            cost = torch.zeros(()).double()
            for place in masked:
                true = each[TEXT[place]]
                cost = cost - true * said[place, TEXT[place]].log()
                cost = cost + rates * (said[place] @ each - true)
            chance = torch.ones_like(t)
            for place in PLACES:
                share = t ** each[TEXT[place]]
                chance = chance * (share if place in masked else 1 - share)
            total = total + (measure * chance / t).sum() * cost
    return total / len(PLACES)


def chain_nll(table: Table) -> float:
    """-log p of the text: masks open one by one, into word k at a rate of w_k mu_k."""
    each = torch.tensor([EXPONENTS[one] for one in OWN]).double()
    total = 0.0
    for order in itertools.permutations(PLACES):
        masked, chance = list(PLACES), 1.0
        for place in order:
            rates = predicted(table, shown(tuple(masked)))[masked] * each
            own = rates[masked.index(place), TEXT[place]]
            chance *= float(own / rates.sum())
            masked.remove(place)
        total += chance
    return -float(np.log(total)) / len(PLACES)


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_it_bounds_the_likelihood_of_its_chain(scale: float) -> None:
    found = float(bound(model(scale), CLASSES.weights))
    assert found >= chain_nll(model(scale)) - 1e-9


def test_of_one_exponent_it_is_the_bound_of_all_schedules() -> None:
    for exponent in (0.7, 1.0, 3.0):
        found = bound(model(), torch.full((3,), exponent).double())
        assert float(found) == pytest.approx(exact_bound(model(), TEXT, [1, 2], MASK), abs=1e-5)


def objective(classes: WordClasses = CLASSES) -> Objective:
    return Objective("mdlm", MASK, False, vocabulary=WORDS + 1, classes=classes)


def test_the_estimate_converges_to_the_enumerated_bound() -> None:
    rows = single(TEXT[None].repeat(5000, 1))
    estimate = nelbo(model(), [rows], objective(), seed=0, draws=4)
    expected = float(bound(model(), CLASSES.weights))
    assert estimate.nats_per_token == pytest.approx(expected, abs=4 * estimate.stderr)
    assert estimate.stderr < 0.03
    other = float(bound(model(), CLASSES.weights, rates=False))
    assert abs(other - expected) > 8 * estimate.stderr, "the test could not fail"


def test_the_gradient_is_that_of_the_enumerated_bound() -> None:
    """REINFORCE leave-one-out, within the Monte-Carlo error of its mean."""
    weights = CLASSES.weights.clone().requires_grad_()
    (expected,) = torch.autograd.grad(bound(model(), weights), weights)
    # As the sums here are over both draws, of two tokens each.
    expected = expected * 2 * len(PLACES)
    batches, rows = 60, 500
    found = torch.stack([gradient(step, rows) / rows for step in range(batches)])
    error = found.std(0) / batches**0.5
    assert ((found.mean(0) - expected).abs() < 4 * error).all(), (found.mean(0), expected, error)
    assert (expected.abs() > 5 * error).sum() >= 2, "the test could not fail"


def gradient(step: int, rows: int) -> torch.Tensor:
    batch = single(TEXT[None].repeat(rows, 1))
    process = ForwardProcess(Schedule(), paired=True)
    views = corrupt(batch, objective(), process, NoiseKey(7, step, 0, rows))
    assert len(views) == 2
    nats, slopes = [], []
    for view in views:
        visible = batch.tokens.masked_fill(view.scored, MASK)
        logits = model().table[tuple(visible.T)][view.scored]
        terms, by_exponents = class_divergence(logits, batch.tokens[view.scored], CLASSES, MASK)
        nats.append(terms)
        slopes.append(by_exponents)
    time = views[0].time
    assert time is not None
    assert torch.equal(time, views[1].time if views[1].time is not None else time * 0)
    groups, _ = number_groups(batch.noise_groups(objective()))
    masked = views[0].scored, views[1].scored
    draw = ClassDraw(batch.tokens, groups, batch.scorable, time, masked)
    return exponent_gradient(draw, CLASSES, nats, slopes)


def test_gradients_by_logits_and_exponents_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, WORDS + 1, generator=generator).requires_grad_()
    targets = torch.randint(WORDS, (6,), generator=generator)
    scale = torch.rand(6, generator=generator)
    nats, slopes = class_divergence(logits, targets, CLASSES, MASK)
    (found,) = torch.autograd.grad((nats * scale).sum(), logits)
    by_hand = logits.detach().double().requires_grad_()
    weights = CLASSES.weights.clone().requires_grad_()
    each = weights[torch.tensor(OWN)]
    guess = by_hand[:, :WORDS].softmax(-1)
    said = guess.gather(-1, targets[:, None]).squeeze(-1).log()
    terms = guess @ each - each[targets] * (1 + said)
    assert torch.allclose(nats.double(), terms, atol=1e-5)
    by_logits, by_weights = torch.autograd.grad((terms * scale.double()).sum(), (by_hand, weights))
    assert torch.allclose(found.double(), by_logits, atol=1e-5)
    assert torch.allclose((slopes * scale[:, None]).sum(0).double(), by_weights, atol=1e-5)


def test_blocks_have_times_of_their_own() -> None:
    blocks = Objective("bd3lm", MASK, True, block_size=2, vocabulary=WORDS + 1, classes=CLASSES)
    batch = single(TEXT.repeat(4, 2))
    (one, two) = corrupt(
        batch, blocks, ForwardProcess(Schedule(), paired=True), NoiseKey(0, 0, 0, 4)
    )
    assert one.time is not None
    assert (one.time[:, 0] != one.time[:, 2]).all()
    assert torch.equal(one.time[:, 2], one.time[:, 3])
    assert not torch.equal(one.scored, two.scored)
    assert torch.allclose(one.weight[one.scored].double(), 1 / one.time[one.scored], rtol=1e-6)


def test_classes_have_as_much_of_the_text_each() -> None:
    counts = torch.tensor([50, 30, 20, 60, 25, 9, 6, 0, 0, 1000])
    members = classes_by_frequency(counts, 4, 9)
    assert members == ((3,), (0,), (1, 4))
    classes = WordClasses((1.0,) * 4, members, 10)
    assert classes.of_word.tolist() == [1, 2, 3, 0, 2, 3, 3, 3, 3, 3]
    assert classes_by_frequency(counts, 1, 9) == ()
    assert classes_by_frequency(torch.zeros(4), 3, 0) == ()
    few = classes_by_frequency(torch.tensor([5, 5, 0]), 40, 2)
    assert sorted(word for words in few for word in words) == [0, 1]
