"""The objectives against what they must equal: enumeration, the AR likelihood, and each other."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from dllm_convert.diffusion.corruption import corrupt_by_count, corrupt_by_time
from dllm_convert.diffusion.likelihood import autoregressive_nll, nelbo
from dllm_convert.diffusion.objective import Objective, TextBatch, cross_entropy, predict
from dllm_convert.diffusion.schedule import Schedule
from dllm_convert.modeling import DiffusionLlamaForCausalLM

MASK = 5


def tiny_model() -> DiffusionLlamaForCausalLM:
    """A random Llama in float64 that takes the masks it is given."""
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.3,
        is_causal=False,
    )
    torch.manual_seed(0)
    return DiffusionLlamaForCausalLM(config).eval().double()


def packed(rows: int = 3, length: int = 12) -> TextBatch:
    """Rows of two documents each and, in the last row, padding."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(6, 40, (rows, length), generator=generator)
    segments = torch.zeros(rows, length, dtype=torch.long)
    segments[:, 7:] = 1
    segments[-1, 10:] = -1
    positions = torch.arange(length).expand(rows, -1).clone()
    positions[:, 7:] -= 7
    return TextBatch(tokens, segments, positions)


def single(tokens: torch.Tensor) -> TextBatch:
    """One document per row."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return TextBatch(tokens, torch.zeros_like(tokens), positions)


def test_block_size_one_with_shift_is_the_autoregressive_likelihood() -> None:
    model, batch = tiny_model(), packed()
    ours = nelbo(model, [batch], Objective("bd3lm", MASK, True, 1), seed=0)
    base = autoregressive_nll(model, [batch], 40)
    never_mask = ours.nats_per_token
    with torch.no_grad():
        scorable = batch.scorable
        rows, columns = scorable.nonzero(as_tuple=True)
        logits = torch.cat(
            [
                model(
                    batch.tokens[row : row + 1, start:stop],
                    attention_mask=torch.ones(1, 1, stop - start, stop - start).tril().bool(),
                ).logits[0, :-1]
                for row, start, stop in [
                    (0, 0, 7),
                    (0, 7, 12),
                    (1, 0, 7),
                    (1, 7, 12),
                    (2, 0, 7),
                    (2, 7, 10),
                ]
            ]
        )
        targets = batch.tokens[rows, columns]
        excluded = cross_entropy(logits, targets, MASK).double().mean()
        plain = torch.nn.functional.cross_entropy(logits.float(), targets).double()
    assert never_mask == pytest.approx(float(excluded), abs=1e-6)
    assert base.nats_per_token == pytest.approx(float(plain), abs=1e-6)
    assert ours.tokens == base.tokens == int(scorable.sum()) == 3 * (6 + 4) - 2


@pytest.mark.parametrize("shift", [True, False])
def test_one_block_as_long_as_the_text_is_mdlm(shift: bool) -> None:
    model, batch = tiny_model(), packed()
    block = nelbo(model, [batch], Objective("bd3lm", MASK, shift, 12), seed=3, draws=4)
    whole = nelbo(model, [batch], Objective("mdlm", MASK, shift), seed=3, draws=4)
    assert block.nats_per_token == pytest.approx(whole.nats_per_token, abs=1e-6)


class Table(nn.Module):
    """A model that looks its logits up by the visible tokens: everything can be enumerated."""

    def __init__(self, length: int, words: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.table = torch.randn((words + 1,) * length + (length, words + 1), generator=generator)

    def forward(self, input_ids: torch.Tensor, logits_at: torch.Tensor, **kwargs: object) -> object:
        logits = torch.stack([self.table[tuple(row.tolist())] for row in input_ids])
        return type("Output", (), {"logits": logits.flatten(0, 1)[logits_at]})


def exact_bound(model: Table, tokens: torch.Tensor, scorable: list[int], mask: int) -> float:
    """The bound by enumeration: the mean over all orders of the chain-rule likelihood (MD4)."""
    total, orders = 0.0, list(itertools.permutations(scorable))
    for order in orders:
        visible = tokens.clone()
        visible[list(order)] = mask
        for position in order:
            logits = model.table[tuple(visible.tolist())][position : position + 1]
            total += float(cross_entropy(logits, tokens[position : position + 1], mask))
            visible[position] = tokens[position]
    return total / len(orders) / len(scorable)


def test_the_count_estimator_converges_to_the_enumerated_bound() -> None:
    model, tokens = Table(4, 3), torch.tensor([[0, 2, 1, 2]])
    exact = exact_bound(model, tokens[0], [1, 2, 3], 3)
    estimate = nelbo(
        model, [single(tokens.repeat(300, 1))], Objective("mdlm", 3, False), seed=0, draws=4
    )
    assert estimate.nats_per_token == pytest.approx(exact, abs=4 * estimate.stderr + 1e-9)
    assert estimate.stderr < 0.05


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial"])
def test_every_schedule_estimates_the_same_bound(name: str) -> None:
    model, tokens = Table(4, 3), torch.tensor([[0, 2, 1, 2]])
    objective = Objective("mdlm", 3, False)
    exact = exact_bound(model, tokens[0], [1, 2, 3], 3)
    batch = single(tokens.repeat(20_000, 1))
    noise = torch.Generator().manual_seed(0)
    corruption = corrupt_by_time(
        batch.noise_groups(objective), batch.scorable, Schedule(name), noise
    )
    forward = predict(batch, corruption, objective)
    logits = model(**forward.inputs).logits
    nats = cross_entropy(logits, forward.targets, 3) * forward.weight
    assert float(nats.sum() / forward.scored) == pytest.approx(exact, rel=0.05)


def test_the_bound_is_above_the_true_likelihood() -> None:
    model, mask, length = Table(3, 3), 3, 3
    for text in itertools.product(range(3), repeat=length):
        tokens = torch.tensor(text)
        orders = list(itertools.permutations(range(1, length)))
        likelihood = 0.0
        for order in orders:
            visible, logp = tokens.clone(), 0.0
            visible[list(order)] = mask
            for position in order:
                logits = model.table[tuple(visible.tolist())][position : position + 1]
                logp -= float(cross_entropy(logits, tokens[position : position + 1], mask))
                visible[position] = tokens[position]
            likelihood += torch.tensor(logp).exp().item() / len(orders)
        nll = -torch.tensor(likelihood).log().item() / (length - 1)
        assert exact_bound(model, tokens, [1, 2], mask) >= nll - 1e-6


def test_counts_are_uniform_and_never_zero() -> None:
    groups = torch.zeros(4000, 5, dtype=torch.long)
    scorable = torch.tensor([False, True, True, True, True]).expand(4000, -1)
    corruption = corrupt_by_count(groups, scorable, torch.Generator().manual_seed(0))
    counts = corruption.masked.sum(-1)
    assert not corruption.masked[:, 0].any()
    assert torch.bincount(counts, minlength=5).tolist() == [0, 1000, 1000, 1000, 1000]
    assert torch.equal(corruption.weight.amax(-1), (4 / counts).float())
    share = corruption.masked[:, 1:].float().mean(0)
    assert torch.allclose(share, torch.full((4,), 0.625), atol=0.03)


def test_every_block_has_a_noise_level_of_its_own() -> None:
    batch = single(torch.randint(6, 40, (64, 64)))
    groups = batch.noise_groups(Objective("bd3lm", MASK, True, 8))
    corruption = corrupt_by_time(
        groups, batch.scorable, Schedule(), torch.Generator().manual_seed(0)
    )
    shares = corruption.masked.view(64, 8, 8).float().mean(-1)
    assert shares.std(dim=1).mean() > 0.2


def test_blocks_restart_with_every_document() -> None:
    assert packed().blocks(4)[0].tolist() == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4]
    assert packed().blocks(4)[2].tolist() == [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4]


def test_the_mask_is_never_predicted() -> None:
    logits = torch.zeros(1, 8)
    logits[0, MASK] = 100.0
    nats = cross_entropy(logits, torch.tensor([1]), MASK)
    assert float(nats) == pytest.approx(torch.tensor(7.0).log().item(), abs=1e-6)


@pytest.mark.parametrize("shift", [True, False])
def test_a_masked_position_reads_the_right_hidden_state(shift: bool) -> None:
    batch = single(torch.arange(6, 18)[None])
    objective = Objective("bd3lm", MASK, shift, 4)
    groups = batch.noise_groups(objective)
    corruption = corrupt_by_time(groups, batch.scorable, Schedule(min_time=0.999), None)
    forward = predict(batch, corruption, objective)
    masked = corruption.masked[0].nonzero().squeeze(-1).tolist()
    noisy = {i: i for i in masked}
    aligned = {i: (12 + i - 1 if i % 4 == 0 else i - 1) for i in masked}
    assert forward.inputs["logits_at"].tolist() == list((aligned if shift else noisy).values())
    assert forward.targets.tolist() == [6 + i for i in masked]
