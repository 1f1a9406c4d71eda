"""The forward that is run against the textbook's: all of `[x_t ; x_0]`, logits everywhere."""

from __future__ import annotations

import pytest
import torch
from masks import two_stream_mask
from toys import MASK, packed, single, tiny_model

from dllm_convert.diffusion.attention import document_mask
from dllm_convert.diffusion.corruption import Corruption, ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.likelihood import autoregressive_nll
from dllm_convert.diffusion.losses import cross_entropy
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import Prediction, closed_pairs, predict

COUNT = ForwardProcess(draw="count")


def chat() -> TextBatch:
    """Packed text of which only some tokens are learnt from, none of them in the first row."""
    batch = packed(rows=4, length=24)
    loss = torch.zeros_like(batch.tokens, dtype=torch.bool)
    loss[1:, 5:7] = True
    loss[2:, 15:17] = True
    return TextBatch(batch.tokens, batch.segments, batch.positions, loss)


def dense(forward: Prediction) -> torch.Tensor:
    assert forward.mask is not None
    return forward.mask.dense()


def run(forward: Prediction, objective: Objective) -> torch.Tensor:
    with torch.no_grad():
        logits = tiny_model()(**forward.inputs, attention_mask=forward.dense_mask()).logits
    return forward.nats(logits, objective)


def textbook(batch: TextBatch, view: Corruption, objective: Objective) -> torch.Tensor:
    """Both streams whole, logits at every position, then those that are needed."""
    noisy = batch.tokens.masked_fill(view.scored, MASK)
    length, size = batch.tokens.shape[1], objective.block_size
    rows, columns = view.scored.nonzero(as_tuple=True)
    with torch.no_grad():
        if size is None:
            logits = tiny_model()(
                noisy,
                position_ids=batch.positions,
                attention_mask=document_mask(batch.segments),
            ).logits
            read = columns - int(objective.token_shift)
        else:
            logits = tiny_model()(
                torch.cat([noisy, batch.tokens], 1),
                position_ids=batch.positions.repeat(1, 2),
                attention_mask=two_stream_mask(batch.blocks(size), batch.segments),
            ).logits
            first = (batch.positions[rows, columns] % size == 0) & objective.token_shift
            read = columns - int(objective.token_shift) + length * first
    return cross_entropy(logits[rows, read], batch.tokens[rows, columns], MASK)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("size", [1, 4, 7, None])
@pytest.mark.parametrize("batch", [packed(), chat()], ids=["packed", "chat"])
def test_what_is_left_out_changes_no_loss(batch: TextBatch, size: int | None, shift: bool) -> None:
    objective = Objective("bd3lm" if size else "mdlm", MASK, shift, size)
    rows = len(batch.tokens)
    process = ForwardProcess(draw="count", views=2)
    views = corrupt(batch, objective, process, NoiseKey(0, 0, 0, rows))
    expected = torch.cat([textbook(batch, view, objective) for view in views])
    together = predict(batch, views, objective)
    assert torch.allclose(run(together, objective), expected, atol=1e-5)
    assert torch.equal(together.weight, torch.cat([v.weight[v.scored] for v in views]))
    one = predict(batch, views[:1], objective)
    assert torch.allclose(run(one, objective), expected[: len(one.targets)], atol=1e-5)


def test_views_share_the_clean_stream_and_last_blocks_are_left_out() -> None:
    batch = single(torch.randint(6, 40, (2, 128)))
    objective = Objective("bd3lm", MASK, True, 32)
    for count in (1, 2, 3):
        views = corrupt(
            batch, objective, ForwardProcess(draw="count", views=count), NoiseKey(0, 0, 0, 2)
        )
        width = predict(batch, views, objective).inputs["input_ids"].shape[1]
        assert width == count * 128 + 96


def test_prompts_of_a_chat_do_not_run_twice() -> None:
    tokens = torch.randint(6, 40, (2, 128))
    loss = torch.zeros_like(tokens, dtype=torch.bool)
    loss[:, 70:90] = True
    text = single(tokens)
    batch = TextBatch(text.tokens, text.segments, text.positions, loss)
    objective = Objective("bd3lm", MASK, False, 32)
    views = corrupt(batch, objective, COUNT, NoiseKey(0, 0, 0, 2))
    # The answer's one noisy block and the clean blocks before it.
    assert predict(batch, views, objective).inputs["input_ids"].shape[1] == 32 + 64


def test_a_batch_without_a_scored_token_still_runs() -> None:
    batch = packed()
    empty = TextBatch(
        batch.tokens, batch.segments, batch.positions, torch.zeros_like(batch.tokens).bool()
    )
    for objective in (Objective("bd3lm", MASK, True, 4), Objective("mdlm", MASK, True)):
        views = corrupt(empty, objective, COUNT, NoiseKey(0, 0, 0, 3))
        assert run(predict(empty, views, objective), objective).shape == (0,)


@pytest.mark.parametrize("shift", [True, False])
def test_a_masked_position_reads_the_right_hidden_state(shift: bool) -> None:
    batch = single(torch.arange(6, 18)[None])
    objective = Objective("bd3lm", MASK, shift, 4)
    view = Corruption(batch.scorable, batch.scorable.float())
    forward = predict(batch, [view], objective)
    # 12 noisy columns, then the 8 clean ones of the first two blocks.
    aligned = [12 + i - 1 if i % 4 == 0 else i - 1 for i in range(1, 12)]
    expected = aligned if shift else list(range(1, 12))
    assert forward.inputs["logits_at"].tolist() == expected
    assert forward.targets.tolist() == list(range(7, 18))


def test_the_autoregressive_loss_is_the_base_models_own() -> None:
    model, batch = tiny_model(), packed()
    objective = Objective("bd3lm", MASK, True, 4, context="causal")
    views = corrupt(batch, objective, COUNT, NoiseKey(0, 0, 0, 3))
    forward = predict(batch, views, objective, ar_loss=True)
    with torch.no_grad():
        logits = model(**forward.inputs, attention_mask=dense(forward)).logits
    nats = forward.ar_nats(logits.clone(), objective)
    words = logits[len(forward.targets) :].float()
    plain = torch.nn.functional.cross_entropy(words, forward.ar_targets, reduction="none")
    base = autoregressive_nll(model, [batch], 40)
    assert float(plain.mean()) == pytest.approx(base.nats_per_token, abs=1e-5)
    assert len(nats) == base.tokens
    # The mask is never predicted, so every word is a little likelier.
    assert (nats < plain).all()


def test_a_causal_context_never_looks_ahead_in_the_clean_stream() -> None:
    batch = single(torch.arange(6, 18)[None])
    objective = Objective("bd3lm", MASK, True, 4, context="causal")
    view = Corruption(batch.scorable, batch.scorable.float())
    forward = predict(batch, [view], objective, ar_loss=True)
    mask = dense(forward)[0, 0]
    clean = mask[12:24, 12:24]
    assert torch.equal(clean, torch.ones(12, 12).tril().bool())
    assert not mask[12:24, :12].any()
    noisy = mask[:12, :12]
    assert torch.equal(noisy, torch.block_diag(*[torch.ones(4, 4)] * 3).bool())


def test_annealing_closes_all_pairs_that_look_ahead_then_none() -> None:
    batch = single(torch.arange(6, 18)[None])
    for objective in (Objective("mdlm", MASK, True), Objective("bd3lm", MASK, True, 4)):
        view = Corruption(batch.scorable, batch.scorable.float())
        if objective.target == "mdlm":
            assert predict(batch, [view], objective).mask is None
            opened = torch.ones(1, 1, 12, 12, dtype=torch.bool)
        else:
            opened = dense(predict(batch, [view], objective))
        generator = torch.Generator().manual_seed(0)
        masks = {
            share: dense(
                predict(batch, [view], objective, closed=closed_pairs(12, share, generator))
            )
            for share in (1.0, 0.5, 0.0)
        }
        ahead = torch.ones(12, 12).triu(1).bool()
        assert not (masks[1.0][0, 0, :12, :12] & ahead).any()
        assert torch.equal(masks[0.0], opened)
        total = int((opened[0, 0, :12, :12] & ahead).sum())
        some = int((masks[0.5][0, 0, :12, :12] & ahead).sum())
        assert 0.2 * total < some < 0.8 * total


def test_a_flex_mask_is_the_dense_one() -> None:
    batch = packed()
    objective = Objective("bd3lm", MASK, True, 4)
    views = corrupt(batch, objective, COUNT, NoiseKey(0, 0, 0, 3))
    mask = predict(batch, views, objective).mask
    assert mask is not None
    rule = mask.block_mask().mask_mod
    rows, width = mask.streams.shape
    every = mask.dense()
    for row in range(rows):
        for query in range(width):
            seen = rule(row, 0, torch.tensor(query), torch.arange(width))
            assert torch.equal(seen, every[row, 0, query])
    again = predict(batch, views, objective).mask
    assert again is not None
    assert mask.equals(again)
    other = corrupt(batch, Objective("bd3lm", MASK, True, 2), COUNT, NoiseKey(0, 0, 0, 3))
    smaller = predict(batch, other, Objective("bd3lm", MASK, True, 2)).mask
    assert smaller is not None
    assert not mask.equals(smaller)


def test_one_whole_document_needs_no_mask() -> None:
    objective = Objective("mdlm", MASK, True)
    text, other = single(torch.randint(6, 40, (2, 12))), packed()
    for batch, plain in ((text, True), (other, False)):
        views = corrupt(batch, objective, COUNT, NoiseKey(0, 0, 0, len(batch.tokens)))
        forward = predict(batch, views, objective)
        assert (forward.mask is None) == plain
        expected = textbook(batch, views[0], objective)
        assert torch.allclose(run(forward, objective), expected, atol=1e-5)
