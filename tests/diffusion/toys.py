"""Models small enough to enumerate, and texts for them."""

from __future__ import annotations

import itertools

import torch
from torch import nn
from transformers import LlamaConfig

from dllm_convert.diffusion.losses import cross_entropy
from dllm_convert.diffusion.objective import TextBatch
from dllm_convert.modeling.published.modeling import DiffusionLlamaForCausalLM

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


class Table(nn.Module):
    """A model that looks its logits up by the visible tokens: everything can be enumerated."""

    def __init__(self, length: int, words: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.table = torch.randn((words + 1,) * length + (length, words + 1), generator=generator)

    def forward(self, input_ids: torch.Tensor, logits_at: torch.Tensor, **kwargs: object) -> object:
        logits = self.table[tuple(input_ids.T)]
        return type("Output", (), {"logits": logits.flatten(0, 1)[logits_at]})


def exact_bound(model: Table, tokens: torch.Tensor, scorable: list[int], mask: int) -> float:
    """The bound by enumeration: the mean over all orders of the chain-rule likelihood (MD4)."""
    orders = list(itertools.permutations(scorable))
    total = sum(float(chain(model, tokens, order, mask)) for order in orders)
    return total / len(orders) / len(scorable)


def chain(model: Table, tokens: torch.Tensor, order: tuple[int, ...], mask: int) -> torch.Tensor:
    """Nats of a text whose tokens are revealed in an order."""
    visible, total = tokens.clone(), torch.zeros(())
    visible[list(order)] = mask
    for position in order:
        logits = model.table[tuple(visible.tolist())][position : position + 1]
        total = total + cross_entropy(logits, tokens[position : position + 1], mask)
        visible[position] = tokens[position]
    return total


def masked_loss(model: Table, tokens: torch.Tensor, where: tuple[int, ...], mask: int) -> float:
    """Summed cross-entropy at the masked positions, in nats."""
    visible = tokens.clone()
    visible[list(where)] = mask
    logits = model.table[tuple(visible.tolist())][list(where)]
    return float(cross_entropy(logits, tokens[list(where)], mask).sum())
