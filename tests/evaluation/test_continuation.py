"""Bounds of continuations against enumeration, the base's own likelihood and themselves."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert
from diffusion.toys import MASK, Table, exact_bound, masked_loss, tiny_model

from dllm_convert.diffusion.likelihood import next_token_nats
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.evaluation.continuation import (
    Continuation,
    Estimator,
    cut_left,
    score_round,
)
from dllm_convert.modeling.loading import load_model

WORDS, LENGTH = 5, 5
TOKENS = (1, 3, 0, 2, 4)


@torch.no_grad()
def score_autoregressive(
    model: Any, texts: list[Continuation], rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Nats of each continuation read through a causal mask, and whether it is the likeliest."""
    nats, greedy = [], []
    for text in texts:
        tokens = torch.tensor([text.tokens])
        index = torch.arange(tokens.shape[1])[None]
        batch = TextBatch(tokens, torch.zeros_like(tokens), index, index >= text.start)
        found, _, likeliest = next_token_nats(model, batch, rows)
        nats.append(found.sum())
        greedy.append(likeliest.all())
    return torch.stack(nats).double(), torch.stack(greedy)


class OnCpu(Table):
    device = torch.device("cpu")


@pytest.mark.parametrize("masking", ["count", "time"])
@pytest.mark.parametrize("start", [1, 2, 4])
def test_the_estimate_is_unbiased(masking: Any, start: int) -> None:
    model, tokens = OnCpu(LENGTH, WORDS), torch.tensor(TOKENS)
    scored = list(range(start, LENGTH))
    exact = exact_bound(model, tokens, scored, MASK) * len(scored)
    texts = [Continuation(TOKENS, start, item) for item in range(160)]
    draws = score_round(
        model, texts, Objective("mdlm", MASK, False), Estimator(masking, 4, batch_size=100)
    )
    means = draws.mean(-1)
    error = float(means.std()) / len(texts) ** 0.5
    assert abs(float(means.mean()) - exact) <= 4 * error + 1e-5


def test_drawing_counts_has_the_variance_that_enumeration_gives() -> None:
    """One draw: k uniform, then a uniform subset of size k, weighted n/k."""
    model, tokens = OnCpu(LENGTH, WORDS), torch.tensor(TOKENS)
    scored = range(1, LENGTH)
    first = second = 0.0
    for k in range(1, 5):
        subsets = list(itertools.combinations(scored, k))
        for where in subsets:
            value = masked_loss(model, tokens, where, MASK) * 4 / k
            first += value / 4 / len(subsets)
            second += value**2 / 4 / len(subsets)
    variance = second - first**2
    objective = Objective("mdlm", MASK, False)
    texts = [Continuation(TOKENS, 1, item) for item in range(800)]
    found = score_round(model, texts, objective, Estimator("count", 1, batch_size=500))
    independent = score_round(model, texts, objective, Estimator("time", 1, batch_size=500))
    stratified = score_round(model, texts[:200], objective, Estimator("count", 4, batch_size=250))
    assert float(found.var()) == pytest.approx(variance, rel=0.25)
    assert float(independent.var()) > 1.3 * variance
    assert float(stratified.mean(-1).var()) * 4 < variance


def small(target: Any, block: int | None = None, *, shift: bool = False) -> Objective:
    return Objective(target, MASK, shift, block)


TEXTS = [
    Continuation((7, 8, 9, 10, 11, 12, 13), 4, 0),
    Continuation((7, 8, 9, 10, 20), 4, 0),
    Continuation((30, 31), 1, 1),
    Continuation((9,) * 9 + tuple(range(8, 20)), 9, 2),
    Continuation((14, 15, 16), 3, 3),
]


@pytest.mark.parametrize(
    "objective",
    [small("mdlm"), small("mdlm", shift=True), small("bd3lm", 4), small("bd3lm", 4, shift=True)],
)
@pytest.mark.parametrize("masking", ["count", "time"])
def test_batch_size_and_company_change_nothing(objective: Objective, masking: Any) -> None:
    model = tiny_model()
    alone = torch.cat(
        [score_round(model, [text], objective, Estimator(masking, 3)) for text in TEXTS]
    )
    for size in (1, 3, 8):
        found = score_round(model, TEXTS, objective, Estimator(masking, 3, batch_size=size))
        assert torch.allclose(found, alone, atol=1e-9)
    backwards = score_round(model, TEXTS[::-1], objective, Estimator(masking, 3, batch_size=2))
    assert torch.allclose(backwards.flip(0), alone, atol=1e-9)
    assert float(alone[-1].abs().max()) == 0, "an empty continuation costs nothing"
    again = score_round(model, TEXTS, objective, Estimator(masking, 3), 1)
    assert not torch.allclose(again[:4], alone[:4])


def test_blocks_of_one_are_exactly_autoregressive() -> None:
    """With the token shift; the mask, which a diffusion model never writes, left out of both."""
    model = tiny_model()
    one = score_round(model, TEXTS, small("bd3lm", 1, shift=True), Estimator("count", 2))
    exact, with_mask = [], []
    for text in TEXTS:
        nats, mine = 0.0, 0.0
        for at in range(text.start, len(text.tokens)):
            ids = torch.tensor([text.tokens[:at]])
            seen = torch.ones(at, at, dtype=torch.bool).tril()[None, None]
            logits = model(ids, attention_mask=seen, use_cache=False).logits[0, -1].detach()
            mine -= float(logits.log_softmax(-1)[text.tokens[at]])
            logits[MASK] = -torch.inf
            nats -= float(logits.log_softmax(-1)[text.tokens[at]])
        exact.append(nats)
        with_mask.append(mine)
    assert torch.allclose(one, torch.tensor(exact, dtype=torch.float64)[:, None], atol=1e-9)
    found, _ = score_autoregressive(model, TEXTS, 40)
    assert torch.allclose(found, torch.tensor(with_mask, dtype=torch.float64), atol=1e-5)


def test_a_block_as_long_as_the_text_is_mdlm() -> None:
    model = tiny_model()
    whole = score_round(model, TEXTS, small("bd3lm", 64), Estimator("count", 4))
    assert torch.allclose(whole, score_round(model, TEXTS, small("mdlm"), Estimator("count", 4)))


def test_the_unfinished_block_of_the_prompt_is_clean() -> None:
    """What stands in a prompt moves the score of a later token of its own block."""
    model, objective = tiny_model(), small("bd3lm", 4)
    first = Continuation((7, 8, 9, 10, 11, 12), 6 - 1, 0)
    found = score_round(model, [first], objective, Estimator("count", 1))
    other = dataclasses.replace(first, tokens=(7, 8, 9, 10, 21, 12))
    assert not torch.allclose(found, score_round(model, [other], objective, Estimator("count", 1)))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_the_base_is_scored_as_the_base(family: str, tmp_path: Path, source_cache: Any) -> None:
    from transformers import AutoModelForCausalLM

    source = source_cache(family)
    base = AutoModelForCausalLM.from_pretrained(source).eval()
    plan = convert(source, tmp_path / "out", "bd3lm", block=4)
    model = load_model(tmp_path / "out", plan.adapter)
    texts = [Continuation((20, 30, 40, 50, 60, 70), 2, 0), Continuation((21, 22, 23), 1, 1)]
    found, greedy = score_autoregressive(model, texts, base.config.vocab_size)
    for text, nats in zip(texts, found, strict=True):
        logits = base(torch.tensor([text.tokens])).logits[0].log_softmax(-1).double()
        at = range(text.start, len(text.tokens))
        exact = -sum(float(logits[i - 1, text.tokens[i]].detach()) for i in at)
        assert float(nats) == pytest.approx(exact, abs=1e-4)
    assert greedy.dtype == torch.bool


def test_greedy_is_what_greedy_decoding_writes() -> None:
    model = tiny_model()
    tokens = [7, 8]
    for _ in range(3):
        seen = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()[None, None]
        logits = model(torch.tensor([tokens]), attention_mask=seen, use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % 40]
    texts = [Continuation(tuple(tokens), 2), Continuation(tuple(other), 2)]
    assert score_autoregressive(model, texts, 40)[1].tolist() == [True, False]


def test_a_long_text_keeps_its_end() -> None:
    text = Continuation(tuple(range(10)), 8, 3)
    assert cut_left(text, 10) == text
    assert cut_left(text, 5) == Continuation((5, 6, 7, 8, 9), 3, 3)
    assert cut_left(text, 2) == Continuation((8, 9), 1, 3)
    with pytest.raises(ValueError, match="start is 0"):
        Continuation((1, 2), 0)
