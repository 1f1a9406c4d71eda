"""Change one token, see what moves."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import torch

from dllm_convert.behaviour.influence import DRAWS, Pattern, measure_influence, patterns


def test_measured_influence_of_a_causal_sum() -> None:
    def model(tokens: torch.Tensor, *, use_cache: bool) -> Any:
        del use_cache
        return SimpleNamespace(logits=tokens.float().cumsum(1)[..., None])

    tokens = torch.arange(6)
    moved, scale = measure_influence(model, tokens, tokens + 1, [0, 3, 5])
    assert (moved > 0).int().tolist() == [
        [1, 0, 0],
        [1, 0, 0],
        [1, 0, 0],
        [1, 1, 0],
        [1, 1, 0],
        [1, 1, 1],
    ]
    assert scale == 15


def test_pattern_names_the_first_difference() -> None:
    allowed = torch.tensor([[True, False], [True, True]])
    moved = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    pattern = Pattern(moved, allowed, 0.1, [3, 4])
    assert int(pattern.wrong.sum()) == 2
    assert pattern.first_wrong() == "position 0 sees token 4"
    assert pattern.worst_forbidden == 0.5
    assert pattern.weakest_allowed == 0.0


def test_not_a_number_is_wrong_in_a_pattern() -> None:
    pattern = Pattern(torch.tensor([[math.nan]]), torch.tensor([[True]]), 0.1, [0])
    assert pattern.wrong.all()


def test_pairs_that_do_not_count_are_not_told() -> None:
    allowed = torch.tensor([[True, False], [True, True]])
    moved = torch.tensor([[1.0, 0.5], [0.0, 1.0]])
    pattern = Pattern(moved, allowed, 0.1, [3, 4])
    judged = torch.tensor([[False, False], [True, True]])
    assert pattern.first_wrong(judged) == "position 1 does not see token 3"
    assert pattern.first_wrong(torch.zeros(2, 2, dtype=torch.bool)) == ""


def test_texts_add_up() -> None:
    """What one text hides another shows; nothing that moved once is forgotten."""

    def model(tokens: torch.Tensor, *, use_cache: bool) -> Any:
        del use_cache
        # A switch: the second token is heard behind an odd one only.
        heard = tokens[:, :1] % 2 * tokens
        return SimpleNamespace(logits=(heard.cumsum(1).float() + tokens)[..., None])

    allowed = torch.ones(3, 3, dtype=torch.bool).tril()
    texts = [torch.tensor([0, 5, 9]), torch.tensor([1, 5, 9]), torch.tensor([0, 5, 9])]
    asked = patterns(model, texts.__getitem__, lambda tokens: tokens + 2, [0, 1, 2], allowed)
    found = list(asked)
    assert len(found) == DRAWS
    assert [bool(one.hidden.any()) for one in found] == [True, False, False]
    assert torch.equal(found[2].moved, found[1].moved)


def test_whoever_asks_stops() -> None:
    asked: list[int] = []

    def text(draw: int) -> torch.Tensor:
        asked.append(draw)
        return torch.arange(3)

    def model(tokens: torch.Tensor, *, use_cache: bool) -> Any:
        return SimpleNamespace(logits=tokens.float()[..., None])

    next(patterns(model, text, lambda tokens: tokens + 1, [0], torch.zeros(3, 1).bool()))
    assert asked == [0]
