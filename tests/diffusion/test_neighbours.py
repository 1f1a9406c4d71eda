"""D3PM's nearest-neighbour kernel against dense matrices, all paths enumerated on a toy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from toys import Table, single

from dllm_convert.common.diffusion_section import NEIGHBOURS_FILE
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import nelbo
from dllm_convert.diffusion.losses import uniform_divergence
from dllm_convert.diffusion.neighbours import (
    TAIL,
    Walk,
    nearest,
    neighbour_divergence,
    poisson,
    read_walk,
)
from dllm_convert.diffusion.objective import Objective
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.errors import DataError

WORDS, MASK, STEPS, JUMPS = 4, 4, 3, 1.7
TEXT = torch.tensor([0, 3, 1])
# A line 0 - 1 - 2 - 3 of nearest neighbours, of which 1 is near to two others.
LINE = Walk(torch.tensor([[1], [2], [1], [2], [-1]], dtype=torch.int32), JUMPS)


def dense(walk: Walk) -> torch.Tensor:
    return walk.matrix.to_dense().double()[:WORDS, :WORDS]


def schedule() -> Schedule:
    return Schedule("cosine", discrete_steps=STEPS)


def kept() -> torch.Tensor:
    return 1 - schedule().mask_probability(torch.arange(STEPS + 1, dtype=torch.float64) / STEPS)


def through(keep: float, time: float) -> torch.Tensor:
    """Q by the matrix exponential of the dense generator."""
    generator = dense(LINE) - torch.eye(WORDS).double()
    return keep * torch.matrix_exp(time * generator) + (1 - keep) / WORDS


def matrices(t: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of step t alone, of all before it, and of both."""
    alpha = kept().tolist()
    one = through(alpha[t] / alpha[t - 1], JUMPS * (alpha[t - 1] - alpha[t]))
    return (
        one,
        through(alpha[t - 1], JUMPS * (1 - alpha[t - 1])),
        through(alpha[t], JUMPS * (1 - alpha[t])),
    )


def test_a_jump_is_symmetric_and_keeps_the_uniform_distribution() -> None:
    generator = torch.Generator().manual_seed(0)
    near = nearest(torch.randn(300, 8, generator=generator), 5, 17, lambda done: None)
    walk = Walk(torch.from_numpy(near), 2.0)
    matrix = walk.matrix.to_dense().double()
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix.sum(-1), torch.ones(300).double(), atol=1e-6)
    assert (matrix >= 0).all()
    assert matrix[17, 17] == 1
    line = [[0.5, 0.5, 0, 0], [0.5, 0, 0.5, 0], [0, 0.5, 0, 0.5], [0, 0, 0.5, 0.5]]
    assert torch.equal(dense(LINE), torch.tensor(line).double())


def test_neighbours_are_those_of_the_largest_cosine() -> None:
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    near = nearest(rows, 3, 59, lambda done: None)
    unit = torch.nn.functional.normalize(rows, dim=-1)
    for row in range(59):
        others = [other for other in range(59) if other != row]
        others.sort(key=lambda other: -float(unit[row] @ unit[other]))
        assert near[row].tolist() == others[:3]
    assert near[59].tolist() == [-1, -1, -1]
    with pytest.raises(DataError, match="have no 59 neighbours"):
        nearest(rows, 59, 59, lambda done: None)


def test_steps_compose_and_end_in_nothing() -> None:
    alpha = kept()
    whole = torch.eye(WORDS).double()
    for t in range(1, STEPS + 1):
        one, _, so_far = matrices(t)
        whole = whole @ one
        assert torch.allclose(whole, so_far, atol=1e-12)
    assert float(alpha[-1]) == pytest.approx(0, abs=1e-12)
    assert torch.allclose(whole, torch.full_like(whole, 1 / WORDS))


@pytest.mark.parametrize("time", [0.0, 0.01, 1.0, 7.5, 60.0])
def test_uniformisation_is_the_matrix_exponential(time: float) -> None:
    assert sum(poisson(time)) == pytest.approx(1)
    found = LINE.spread(torch.eye(5), torch.full((5,), time).double())[:WORDS, :WORDS]
    generator = dense(LINE) - torch.eye(WORDS).double()
    assert torch.allclose(found.double(), torch.matrix_exp(time * generator), atol=1e-6 + TAIL)


def test_walks_are_distributed_as_the_matrix_says() -> None:
    draws, time = 40_000, 1.3
    means = torch.full((draws,), time).double()
    ends = LINE.walked(torch.full((draws,), 3), means, torch.Generator().manual_seed(0))
    found = torch.bincount(ends, minlength=WORDS) / draws
    generator = dense(LINE) - torch.eye(WORDS).double()
    expected = torch.matrix_exp(time * generator)[3]
    statistic = float((draws * (found - expected) ** 2 / expected).sum())
    assert statistic < 16.3  # three degrees of freedom, 0.1 %


def noisy_pairs(t: int) -> list[tuple[tuple[int, int], float]]:
    now = matrices(t)[2]
    return [
        ((a, b), float(now[TEXT[1], a] * now[TEXT[2], b]))
        for a in range(WORDS)
        for b in range(WORDS)
    ]


def reverse(model: Table, pair: tuple[int, int], t: int) -> torch.Tensor:
    """p(x_{t-1} | x_t) by D3PM's sum over the predicted clean token, shape (2, words)."""
    one, before, _ = matrices(t)
    guess = model.table[int(TEXT[0]), pair[0], pair[1]][1:, :WORDS].double().softmax(-1)
    joint = torch.stack([guess[i] @ before * one[:, pair[i]] for i in range(2)])
    return joint / joint.sum(-1, keepdim=True)


def defined_bound(model: Table) -> float:
    """The bound in nats per token, from its definition by matrices and all noisy texts."""
    total = 0.0
    for t in range(1, STEPS + 1):
        one, before, _ = matrices(t)
        for pair, chance in noisy_pairs(t):
            p = reverse(model, pair, t)
            for place in range(2):
                q = one[:, pair[place]] * before[TEXT[place + 1]]
                q = q / q.sum()
                total += chance * float(
                    (torch.special.xlogy(q, q) - torch.special.xlogy(q, p[place])).sum()
                )
    return total / 2


def closed_bound(model: Table) -> float:
    total, alpha = 0.0, kept()
    for t in range(1, STEPS + 1):
        for pair, chance in noisy_pairs(t):
            logits = model.table[int(TEXT[0]), pair[0], pair[1]][1:]
            between = alpha[t - 1 : t + 1].expand(2, 2)
            nats = neighbour_divergence(logits, TEXT[1:], torch.tensor(pair), between, MASK, LINE)
            total += chance * float(nats.sum())
    return total / 2


def true_nll(model: Table) -> float:
    states = [(a, b) for a in range(WORDS) for b in range(WORDS)]
    now = torch.full((len(states),), 1 / len(states)).double()
    for t in range(STEPS, 0, -1):
        then = torch.zeros_like(now)
        for number, pair in enumerate(states):
            p = reverse(model, pair, t)
            then += now[number] * torch.stack([p[0, a] * p[1, b] for a, b in states])
        now = then
    return -float(now[states.index((int(TEXT[1]), int(TEXT[2])))].log()) / 2


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_the_bound_is_its_definition_and_bounds_the_likelihood(scale: float) -> None:
    model = Table(3, WORDS)
    model.table = model.table * scale
    assert closed_bound(model) == pytest.approx(defined_bound(model), abs=1e-5)
    assert closed_bound(model) >= true_nll(model) - 1e-6


def test_without_jumps_it_is_the_uniform_kernel() -> None:
    still = Walk(LINE.near, 0.0)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(6, WORDS + 1, generator=generator)
    clean, noisy = torch.randint(WORDS, (2, 6), generator=generator)
    between = torch.tensor([[0.9, 0.4]] * 3 + [[1.0, 0.7]] * 3).double()
    ours = neighbour_divergence(logits, clean, noisy, between, MASK, still)
    theirs = uniform_divergence(logits.clone(), clean, noisy, between, MASK)
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_its_gradient_is_that_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(4, WORDS + 1, generator=generator).requires_grad_()
    clean, noisy = torch.randint(WORDS, (2, 4), generator=generator)
    alpha = kept()
    between = torch.stack([alpha[[t - 1, t]] for t in (1, 2, 3, 2)])
    weight = torch.tensor([1.0, 2.0, 0.5, 3.0])
    nats = neighbour_divergence(logits, clean, noisy, between, MASK, LINE)
    (found,) = torch.autograd.grad((nats * weight).sum(), logits)
    by_hand = logits.detach().clone().double().requires_grad_()
    total = torch.zeros(()).double()
    for row, t in enumerate((1, 2, 3, 2)):
        one, before, _ = matrices(t)
        guess = by_hand[row, :WORDS].softmax(-1)
        p = guess @ before * one[:, noisy[row]]
        q = one[:, noisy[row]] * before[clean[row]]
        q = q / q.sum()
        log = torch.special.xlogy(q, q) - torch.where(q > 0, q * (p / p.sum()).log(), 0)
        total = total + float(weight[row]) * log.sum()
    (expected,) = torch.autograd.grad(total, by_hand)
    assert torch.allclose(found.double(), expected, atol=1e-5)


def test_the_estimate_converges_to_the_enumerated_bound() -> None:
    model = Table(3, WORDS)
    objective = Objective(
        "mdlm", MASK, False, None, "neighbours", WORDS + 1, "block", schedule(), walk=LINE
    )
    rows = single(TEXT[None].repeat(4000, 1))
    estimate = nelbo(model, [rows], objective, seed=0, draws=4)
    assert estimate.nats_per_token == pytest.approx(defined_bound(model), abs=4 * estimate.stderr)
    assert estimate.stderr < 0.03


def test_noise_of_a_row_is_its_own() -> None:
    objective = Objective(
        "mdlm", MASK, False, None, "neighbours", WORDS + 1, "block", schedule(), walk=LINE
    )
    batch = single(TEXT[None].repeat(8, 1))
    process = ForwardProcess(schedule())
    (whole,) = corrupt(batch, objective, process, NoiseKey(0, 0, 0, 8))
    (part,) = corrupt(single(TEXT[None].repeat(3, 1)), objective, process, NoiseKey(0, 0, 2, 8))
    assert whole.tokens is not None
    assert part.tokens is not None
    assert torch.equal(whole.tokens[2:5], part.tokens)
    assert (whole.tokens != MASK).all()
    assert (whole.tokens[:, 0] == TEXT[0]).all()


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (None, "has no noise_neighbours.npy"),
        (b"rubbish", "is no array of numpy"),
        (np.zeros((5, 2)), "holds float64"),
        (np.full((5, 2), 9, dtype=np.int32), "expected ids"),
        (np.zeros((4, 2), dtype=np.int32), r"shape \(4, 2\)"),
    ],
    ids=str,
)
def test_a_graph_that_is_none_is_refused(tmp_path: Path, array: object, said: str) -> None:
    if isinstance(array, bytes):
        (tmp_path / NEIGHBOURS_FILE).write_bytes(array)
    elif array is not None:
        np.save(tmp_path / NEIGHBOURS_FILE, array)
    with pytest.raises(DataError, match=said):
        read_walk(tmp_path, 5, 1.0)
