"""Noisy rows behind the base's cache: the same losses and gradients as under a mask."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from kept import KEPT, instance

from dllm_convert.diffusion.cached import (
    CleanReader,
    cached_nats,
    noisy_logits,
    predict_behind_cache,
    read_in_turn,
)
from dllm_convert.diffusion.corruption import Corruption, ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.drafts import draft_groups, predict_drafts
from dllm_convert.diffusion.gated import predict_beside_base
from dllm_convert.diffusion.likelihood import autoregressive_nll, nats_at_rate, nelbo
from dllm_convert.diffusion.losses import cross_entropy
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.modeling.published.gated import adapter_parameters
from dllm_convert.probing.facts import norm_names
from dllm_convert.training.gated import read_clean

KEY = NoiseKey(0, 0, 0, 3)


def batch() -> TextBatch:
    """Rows of two documents and padding, of one that is scored in part, of short ones."""
    segments = torch.tensor([[0] * 10 + [1] * 13 + [-1], [0] * 24, [0] * 5 + [1] * 17 + [-1] * 2])
    rows = [
        torch.cat([torch.arange(int((row == one).sum())) for one in row.unique_consecutive()])
        for row in segments
    ]
    draws = torch.Generator().manual_seed(2)
    loss = torch.ones_like(segments, dtype=torch.bool)
    loss[1, :7] = False
    tokens = torch.randint(16, 90, segments.shape, generator=draws)
    return TextBatch(tokens, segments, torch.stack(rows), loss)


def views_of(draw: str, objective: Objective) -> tuple[Corruption, ...]:
    if draw == "draft":
        return draft_groups(batch(), objective, KEY)
    return corrupt(batch(), objective, ForwardProcess(draw="count", complementary=True), KEY)


def trainable(family: str, *, norms: bool = False) -> Any:
    made = instance(family)
    model = made.gated(norm_names(made.base) if norms else ())
    for weight in adapter_parameters(model).values():
        weight.requires_grad_(True)
    return model


def trained_on(model: Any, draw: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted loss, differentiated, and the sum of what the base predicts."""
    objective = Objective.from_config(model.config)
    laid_out = predict_behind_cache(batch(), views_of(draw, objective), objective)
    loss, first, seen = torch.zeros(()), torch.zeros(()), 0
    for turn in read_in_turn(model, laid_out, objective):
        first = first + turn.firsts.sum()
        if turn.rows is not None:
            span = turn.span
            assert (span.start, span.stop) == (seen, seen + len(turn.rows.at))
            seen = span.stop
            logits = noisy_logits(model, turn.rows, turn.beside)
            found = cross_entropy(logits, laid_out.targets[span], objective.mask_token_id)
            loss = loss + (found * laid_out.weight[span]).sum()
    assert seen == len(laid_out.targets) > 0
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach(), first


@pytest.mark.parametrize("draw", ["count", "draft"])
def test_it_is_what_a_mask_with_causal_drafts_predicts(draw: str) -> None:
    model = trainable("llama")
    objective = Objective.from_config(model.config)
    views = views_of(draw, objective)
    found = trained_on(model, draw)
    gradients = {name: weight.grad.clone() for name, weight in adapter_parameters(model).items()}
    model.zero_grad()
    del model.config.diffusion["behind"]
    masked = replace(objective, behind="mask")
    lay_out = predict_drafts if draw == "draft" else predict_beside_base
    reading, forward = lay_out(batch(), views, masked)
    states, first, _ = read_clean(model, reading, reading.dense_mask(), masked)
    logits = model(
        **forward.inputs,
        attention_mask=forward.dense_mask(),
        past_key_values=states,
        use_cache=False,
    ).logits
    loss = (forward.nats(logits, masked) * forward.weight).sum()
    loss.backward()
    torch.testing.assert_close(torch.stack(found), torch.stack([loss.detach(), first.sum()]))
    for name, weight in adapter_parameters(model).items():
        assert weight.grad is not None
        torch.testing.assert_close(weight.grad, gradients[name], atol=1e-4, rtol=1e-4)


def test_bounds_and_likelihoods_are_those_under_a_mask() -> None:
    model = instance("llama").gated()
    objective, rows = Objective.from_config(model.config), model.config.vocab_size
    cached = [
        nelbo(model, [batch()], objective, seed=1, draws=2),
        *nats_at_rate(model, [batch()], objective, [0.3, 0.9], seed=1),
        autoregressive_nll(model, [batch()], rows, behind="cache"),
    ]
    del model.config.diffusion["behind"]
    masked = replace(objective, behind="mask")
    expected = [
        nelbo(model, [batch()], masked, seed=1, draws=2),
        *nats_at_rate(model, [batch()], masked, [0.3, 0.9], seed=1),
        autoregressive_nll(model, [batch()], rows),
    ]
    for one, other in zip(cached, expected, strict=True):
        assert one is not None
        assert other is not None
        assert one.tokens == other.tokens
        assert one.nats_per_token == pytest.approx(other.nats_per_token, abs=1e-5)
        assert one.stderr == pytest.approx(other.stderr, abs=1e-5)


@pytest.mark.parametrize("norms", [False, True])
@pytest.mark.parametrize("family", KEPT)
def test_every_tensor_of_an_adapter_learns_and_blocks_of_one_are_the_base(
    family: str, norms: bool
) -> None:
    model = trainable(family, norms=norms)
    scales = [name for name in adapter_parameters(model) if name.endswith("noisy_scale")]
    # Of every layer at least one, and the one behind them all.
    assert len(scales) > model.config.num_hidden_layers if norms else not scales
    for draw in ("count", "draft"):
        model.zero_grad()
        trained_on(model, draw)
        for name, weight in adapter_parameters(model).items():
            assert weight.grad is not None, name
            assert weight.grad.isfinite().all(), name
            assert weight.grad.any(), name
    model.eval()
    single = replace(Objective.from_config(model.config), block_size=1)
    bound = nelbo(model, [batch()], single, seed=0).nats_per_token
    rows = model.config.vocab_size
    exact = autoregressive_nll(model, [batch()], rows, behind="cache").nats_per_token
    assert bound == pytest.approx(exact, abs=1e-5)


def test_predictions_are_those_of_whole_texts() -> None:
    """Each noisy row against one forward of the text before it and itself, without a cache."""
    model = instance("qwen3_5_text").gated()
    objective = Objective.from_config(model.config)
    text = batch()
    views = views_of("count", objective)
    laid_out = predict_behind_cache(text, views, objective)
    nats, _ = cached_nats(model, laid_out, objective)
    size, mask = objective.size, objective.mask_token_id
    for found, row, column, view in zip(
        nats, laid_out.rows, laid_out.columns, laid_out.views, strict=True
    ):
        place = int(text.positions[row, column])
        begin, block = int(column) - place, place // size * size
        shown = text.tokens[row].masked_fill(views[view].scored[row], mask)[begin : int(column)]
        shown = torch.cat([text.tokens[row, begin : begin + block], shown[block:]])[None]
        noisy = (torch.arange(shown.shape[1]) >= block)[None]
        with torch.no_grad():
            logits = model(shown, noisy=noisy).logits[0, -1:]
        expected = cross_entropy(logits, text.tokens[row, column][None], mask)[0]
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_text_without_anything_masked_has_no_rows() -> None:
    model = instance("lfm2").gated()
    objective = Objective.from_config(model.config)
    nothing = Corruption(
        torch.zeros_like(batch().tokens, dtype=torch.bool), torch.zeros(batch().tokens.shape)
    )
    laid_out = predict_behind_cache(batch(), [nothing], objective)
    assert laid_out.groups == ()
    nats, firsts = cached_nats(model, laid_out, objective)
    assert len(nats) == 0
    assert len(firsts) == len(laid_out.first_targets) > 0
    reader = CleanReader(model, laid_out.documents)
    assert reader.behind(torch.tensor([0])) == {"use_cache": False}
