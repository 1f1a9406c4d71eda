"""How much is drafted, in which schedule: what pays, and what it may cost where nothing does."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dllm_convert.modeling.published.drafting import LARGEST, Costs, DraftPolicy, Tree


@pytest.fixture(autouse=True)
def vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has: costs are those of a processor with AVX-512, or as named."""
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX512")


def test_costs_are_those_of_the_processors_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    named, known = Costs("gated cpu avx2", 1).of(4), Costs("gated cpu", 1).of(4)
    assert named > known
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    assert Costs("gated cpu", 1).of(4) == named
    # Where nobody measured it apart, it is what is known of the kind.
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    assert Costs("gated cpu", 1).of(4) == known
    assert Costs("gated cuda", 1).of(4) == Costs("cuda", 1).of(4)


@pytest.mark.parametrize("kind", ["cpu", "gated cpu", "gated cpu avx2", "cuda"])
def test_drafts_that_are_never_right_cost_little(kind: str) -> None:
    policy = DraftPolicy(kind, rows=1, ahead=0)
    spent, tokens, available = 0.0, 256, 0
    for left in range(tokens, 0, -1):
        tree = policy.choose(available, left)
        spent += policy._cost(tree.size)
        for depth in range(1, min(available, 1) + 1):
            policy.observe(depth, None)
        policy.drafted(tree, 1)
        available = tree.masks
    assert spent <= 1.1 * tokens


def simulated(policy: DraftPolicy, tokens: int, right: Any) -> tuple[float, int, set[Tree]]:
    """Time of a decoding beside that of as many forwards of a token, forwards, and what they held.

    `right` says how likely a draft of a depth is right, denoised in so many forwards.
    """
    draws, shapes = random.Random(0), set()
    spent, forwards, left, available = 0.0, 0, tokens, 0
    while left > 0:
        tree = policy.choose(available, left)
        spent, forwards = spent + policy._cost(tree.size), forwards + 1
        shapes.add(tree)
        written, depth = 1, 1
        while depth <= available:
            hit = draws.random() < right(depth, policy._drafted_in)
            policy.observe(depth, 0 if hit else None)
            if not hit or depth > tree.depth:
                break
            written, depth = written + 1, depth + 1
        policy.drafted(tree, written)
        left, available = left - written, max(tree.masks - policy._ahead, 0)
    return spent / tokens, forwards, shapes


@pytest.mark.parametrize("kind", ["cpu", "gated cpu", "gated cpu avx2", "cuda"])
def test_where_drafts_go_wrong_it_takes_a_tenth_more_at_most(kind: str) -> None:
    """Drafts that stop being right, that are right by the first token only, that get no better."""
    for right in (
        lambda depth, steps: 0.0,
        lambda depth, steps: 0.02,
        lambda depth, steps: 0.5 if depth == 1 else 0.0,
        lambda depth, steps: 0.9 if steps == 1 else 0.0,
    ):
        spent, _, _ = simulated(DraftPolicy(kind, rows=1, ahead=0, most=31), 600, right)
        assert spent <= 1.1
    policy = DraftPolicy(kind, rows=1, ahead=0, most=31)
    simulated(policy, 300, lambda depth, steps: 0.95)
    spent, _, _ = simulated(policy, 1000, lambda depth, steps: 0.0)
    assert spent <= 1.15, "what was right for long is unlearnt in some forwards"


def test_long_drafts_are_verified_apart_where_tokens_cost() -> None:
    def right(depth: int, steps: int) -> float:
        return 0.97

    fused, _, _ = simulated(DraftPolicy("cuda", rows=1, ahead=0, most=31), 1000, right)
    policy = DraftPolicy("gated cpu", rows=1, ahead=0, most=31)
    spent, forwards, shapes = simulated(policy, 1000, right)
    apart = [tree for tree in shapes if tree.depth > 8]
    assert apart
    assert all(not tree.masks for tree in apart)
    assert forwards < 1000 / 4
    assert fused < spent < 0.3


def test_drafts_are_denoised_further_where_that_makes_them_right() -> None:
    def better(depth: int, steps: int) -> float:
        return 0.95 if steps > 1 else 0.45

    policy = DraftPolicy("gated cpu", rows=1, ahead=0, most=31)
    spent, _, shapes = simulated(policy, 3000, better)
    assert any(tree.refines for tree in shapes)
    never, _, _ = simulated(
        DraftPolicy("gated cpu", rows=1, ahead=0, most=31), 3000, lambda depth, steps: 0.45
    )
    assert spent < never


def test_drafts_that_are_right_are_deep() -> None:
    policy = DraftPolicy("cpu", rows=1, ahead=0)
    for _ in range(100):
        for depth in range(1, 9):
            policy.observe(depth, 0)
    assert policy.choose(8, 100).depth >= 4
    assert policy.choose(8, 100).size <= LARGEST.size
    assert policy.choose(2, 100).depth == 2, "no more than was drafted"
    assert policy.choose(8, 1) == Tree((), 0), "nothing behind the last token"
    shallow = DraftPolicy("cpu", rows=1, ahead=0, most=2)
    shallow._records = policy._records
    assert shallow.choose(8, 100).depth == 2, "no deeper than it was trained"


@pytest.mark.parametrize("kind", ["cpu", "gated cpu", "gated cpu avx2", "cuda"])
def test_of_a_short_text_trying_takes_little_too(kind: str) -> None:
    for share in (0.0, 0.1, 0.2):
        policy = DraftPolicy(kind, rows=1, ahead=0, most=2)
        spent, _, _ = simulated(policy, 64, lambda depth, steps, share=share: share)
        # What may be tried, and one forward more that was begun before that was reached.
        assert spent <= 1.07 + (1.5 + 1.4) / 64
