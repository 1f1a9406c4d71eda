"""D3PM's uniform kernel against its definition: transition matrices and all paths enumerated."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from toys import Table, single

from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import nelbo
from dllm_convert.diffusion.losses import uniform_divergence
from dllm_convert.diffusion.objective import Objective
from dllm_convert.diffusion.schedule import Schedule

WORDS, MASK, STEPS = 3, 3, 4
TEXT = torch.tensor([0, 2, 1])


def schedule(steps: int = STEPS) -> Schedule:
    return Schedule("cosine", discrete_steps=steps)


def kept(steps: int = STEPS) -> torch.Tensor:
    """alpha at 0, 1/T, ..., 1."""
    return 1 - schedule(steps).mask_probability(
        torch.arange(steps + 1, dtype=torch.float64) / steps
    )


def transition(keep: float) -> torch.Tensor:
    return keep * torch.eye(WORDS).double() + (1 - keep) / WORDS


def transitions(t: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of step t alone, and of all before it."""
    alpha = kept()
    return transition(float(alpha[t] / alpha[t - 1])), transition(float(alpha[t - 1]))


def reverse(model: Table, visible: tuple[int, ...], t: int) -> torch.Tensor:
    """p(x_{t-1} | x_t) by D3PM's sum over the predicted clean token, shape (2, words)."""
    one, before = transitions(t)
    guess = model.table[visible][1:, :WORDS].double().softmax(-1)
    # q(x_{t-1}, x_t | x_0) summed over x_0: one[k, x_t] * before[x_0, k].
    joint = torch.stack(
        [guess[i] @ before * one[:, visible[i + 1]] for i in range(len(visible) - 1)]
    )
    return joint / joint.sum(-1, keepdim=True)


def posterior(noisy: int, clean: int, t: int) -> torch.Tensor:
    one, before = transitions(t)
    joint = one[:, noisy] * before[clean]
    return joint / joint.sum()


def noisy_pairs() -> Iterator[tuple[int, tuple[int, int], float]]:
    """Yield every step, what the two last tokens may be then, and how likely they are that."""
    alpha = kept()
    for t in range(1, STEPS + 1):
        now = transition(float(alpha[t]))
        for a, b in itertools.product(range(WORDS), repeat=2):
            yield t, (a, b), float(now[TEXT[1], a] * now[TEXT[2], b])


def defined_bound(model: Table) -> float:
    """The discrete-time bound in nats per token, from its definition."""
    total = 0.0
    for t, pair, chance in noisy_pairs():
        p = reverse(model, (int(TEXT[0]), *pair), t)
        for place, (noisy, clean) in enumerate(zip(pair, TEXT[1:].tolist(), strict=True)):
            q = posterior(noisy, clean, t)
            total += chance * float((torch.special.xlogy(q, q) - q * p[place].log()).sum())
    return total / 2


def true_nll(model: Table) -> float:
    """-log p(x_0) of the chain of T steps that starts from uniform noise, in nats per token."""
    states = list(itertools.product(range(WORDS), repeat=2))
    now = torch.full((len(states),), 1 / len(states)).double()
    for t in range(STEPS, 0, -1):
        then = torch.zeros_like(now)
        for number, pair in enumerate(states):
            p = reverse(model, (int(TEXT[0]), *pair), t)
            then += now[number] * torch.stack([p[0, a] * p[1, b] for a, b in states])
        now = then
    return -float(now[states.index((int(TEXT[1]), int(TEXT[2])))].log()) / 2


def closed_bound(model: Table) -> float:
    """The same bound through `uniform_divergence`."""
    total, alpha = 0.0, kept()
    for t, pair, chance in noisy_pairs():
        nats = uniform_divergence(
            model.table[int(TEXT[0]), pair[0], pair[1]][1:],
            TEXT[1:],
            torch.tensor(pair),
            alpha[t - 1 : t + 1].expand(2, 2),
            MASK,
        )
        total += chance * float(nats.sum())
    return total / 2


def test_the_closed_form_is_the_definition() -> None:
    model = Table(3, WORDS)
    assert closed_bound(model) == pytest.approx(defined_bound(model), abs=1e-5)


def test_it_bounds_the_likelihood_of_the_chain() -> None:
    for scale in (0.1, 1.0, 3.0):
        model = Table(3, WORDS)
        model.table = model.table * scale
        assert closed_bound(model) >= true_nll(model) - 1e-6
        assert closed_bound(model) == pytest.approx(defined_bound(model), abs=1e-4)


def test_one_step_is_a_prediction_from_nothing() -> None:
    logits = torch.randn(1, WORDS + 1)
    nats = uniform_divergence(
        logits, torch.tensor([1]), torch.tensor([2]), torch.tensor([[1.0, 0.0]]).double(), MASK
    )
    expected = -logits[:, :WORDS].log_softmax(-1)[0, 1]
    assert float(nats) == pytest.approx(float(expected), abs=1e-5)


def test_the_estimate_converges_to_the_enumerated_bound() -> None:
    model = Table(3, WORDS)
    objective = Objective("mdlm", MASK, False, None, "uniform", WORDS + 1, "block", schedule())
    rows = single(TEXT[None].repeat(4000, 1))
    estimate = nelbo(model, [rows], objective, seed=0, draws=4)
    assert estimate.nats_per_token == pytest.approx(defined_bound(model), abs=4 * estimate.stderr)
    assert estimate.stderr < 0.03


def test_noise_is_uniform_over_words_and_never_the_mask() -> None:
    objective = Objective("mdlm", 1, False, None, "uniform", 5, "block", schedule(2))
    batch = single(torch.zeros(20_000, 2, dtype=torch.long))
    (view,) = corrupt(batch, objective, ForwardProcess(schedule(2)), NoiseKey(0, 0, 0, 20_000))
    assert view.tokens is not None
    assert view.kept is not None
    assert (view.tokens[:, 0] == 0).all()
    last = view.tokens[view.kept[:, 1, 1] == 0, 1]
    shares = torch.bincount(last, minlength=5) / len(last)
    assert shares[1] == 0
    assert torch.allclose(shares[[0, 2, 3, 4]], torch.tensor(0.25), atol=0.02)
    assert view.scored[:, 1].all()
    assert not view.scored[:, 0].any()
