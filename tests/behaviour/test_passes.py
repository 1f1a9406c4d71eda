"""Padded and alone, block by block and whole: what is compared, and that a fault shows in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_convert.behaviour.passes import block_by_block, padded

FILLER = torch.tensor([[7, 7, 7, 7], [8, 8, 8, 8]])
TEXTS = [torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6])]


class Model:
    """A running sum of tokens; a faulty one hears the padding too."""

    def __init__(self, *, deaf: bool = True) -> None:
        self.deaf = deaf

    def __call__(self, rows: torch.Tensor, attention_mask: Any = None, **_: Any) -> Any:
        heard = rows if attention_mask is None or not self.deaf else rows * attention_mask
        return SimpleNamespace(logits=heard.cumsum(1).float()[..., None])


@pytest.mark.parametrize("left", [True, False])
def test_padding(left: bool) -> None:
    pairs = padded(Model(), TEXTS, FILLER, left=left)
    for (found, expected), text in zip(pairs, TEXTS, strict=True):
        assert found.shape == (len(text), 1)
        assert torch.equal(found, expected)
        assert torch.equal(expected[:, 0], text.cumsum(0).float())
    assert torch.equal(FILLER, torch.tensor([[7] * 4, [8] * 4]))


def test_padding_that_is_heard() -> None:
    (whole, _), (short, alone) = padded(Model(deaf=False), TEXTS, FILLER, left=True)
    assert whole.shape == (4, 1)
    assert not torch.equal(short, alone)


@pytest.mark.parametrize(("length", "size"), [(7, 3), (6, 3), (2, 5), (4, 1)])
def test_every_block_noisy_then_clean(length: int, size: int) -> None:
    seen: list[tuple[list[int], list[int], bool]] = []

    def model(
        text: torch.Tensor, *, position_ids: torch.Tensor, past_key_values: Any, use_cache: bool
    ) -> Any:
        assert use_cache
        seen.append((text[0].tolist(), position_ids[0].tolist(), past_key_values.frozen))
        return SimpleNamespace(logits=text[..., None])

    tokens, noisy = torch.arange(length)[None], 100 + torch.arange(length)[None]
    steps = list(block_by_block(model, tokens, noisy, size))
    assert len(steps) == len(seen) == 2 * -(-length // size)
    assert len({id(step.cache) for step in steps}) == 1
    for step, (text, places, frozen) in zip(steps, seen, strict=True):
        span = list(range(step.first, min(step.first + size, length)))
        assert places == span
        assert text == (span if step.clean else [100 + place for place in span])
        assert frozen is not step.clean
    assert [step.clean for step in steps] == [False, True] * (len(steps) // 2)
