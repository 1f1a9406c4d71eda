"""On-policy steps: the model writes by its own decoding, and is trained where it went through.

OPDLM (arXiv 2606.06712) converts an autoregressive model by nothing else: the student goes on from
a prompt, a state of each block that it passed through is kept, and the base, which reads the text
that came of it, says what it would have written at the masks of that state. What is written
depends on the weights, the prompts and the rows' own seeds: a step that is taken again after an
interruption writes the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.fsdp import FSDPModule

from dllm_convert.diffusion.corruption import Corruption, NoiseKey
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.visited import visited_states
from dllm_convert.modeling.published.ends import read_ids
from dllm_convert.training.cpu_attention import TILED
from dllm_convert.training.gpu_attention import FLEX

_CHOICE, _SEED = 4, 5
"""Uses of a row's noise: which of its documents is gone on from, and the seed of what is drawn."""


@dataclass(frozen=True)
class OnPolicy:
    """When a model writes what it is trained on, and how much.

    Attributes:
        share: Share of the steps, evenly spread; above 0.
        prompt_tokens: Tokens of a text's beginning.
        new_tokens: Tokens that are written at most.
        temperature: Of its sampling; None for what the model's generation config says.
        views: States that are drawn of each trajectory.
    """

    share: float
    prompt_tokens: int
    new_tokens: int
    temperature: float | None = None
    views: int = 1

    def writes(self, step: int) -> bool:
        """Whether the model writes in a step, counted from 0; told by its number alone."""
        share = Fraction(repr(self.share))
        return int((step + 1) * share) > int(step * share)


def beginnings(
    batch: TextBatch, how: OnPolicy, key: NoiseKey, mask_token_id: int, ends: tuple[int, ...]
) -> list[torch.Tensor]:
    """Take of each row the beginning of one of its documents.

    Of a chat that is what stands before the first token that is learnt, of another text its first
    tokens; at most as many as leave room for the new ones in a row.

    Args:
        batch: Rows of training text, on the CPU.
        how: How many tokens.
        key: Of the rows, which decides the documents.
        mask_token_id: What fills a block up is no text.
        ends: Tokens that end a text, which nothing goes on from.

    Returns:
        Token ids of each row, shape (length,), at least one.
    """
    room, found = max(batch.tokens.shape[1] - how.new_tokens, 1), []
    learnt = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.loss is None else batch.loss
    for number, segments in enumerate(batch.segments):
        documents = segments[segments >= 0].unique_consecutive()
        if not len(documents):
            # A row of padding alone: what comes of it is one row of many.
            found.append(batch.tokens[number, :1])
            continue
        drawn = key.generator(key.first_row + number, _CHOICE)
        chosen = documents[int(torch.randint(len(documents), (1,), generator=drawn))]
        inside = segments == chosen
        tokens, learns = batch.tokens[number, inside], learnt[number, inside]
        length = how.prompt_tokens
        if not learns[0]:
            length = int(learns.int().argmax()) if learns.any() else len(tokens)
        tokens = tokens[: min(length, room)]
        if (tokens == mask_token_id).any():
            tokens = tokens[: max(int((tokens == mask_token_id).int().argmax()), 1)]
        if learns[0] and len(tokens) > 1 and int(tokens[-1]) in ends:
            tokens = tokens[:-1]
        found.append(tokens)
    return found


class Writer:
    """Has a model write what it is trained on.

    Args:
        model: As it is trained, in no wrapper but those that share its weights or adapt it.
        how: When and how much.
        keeps_gathered: Whether weights that are shared stay gathered from forward to backward.
    """

    def __init__(self, model: Any, how: OnPolicy, *, keeps_gathered: bool = False) -> None:
        self.how = how
        self._model, self._keeps_gathered = model, keeps_gathered
        self._begun = False

    @property
    def _inner(self) -> Any:
        return self._model.get_base_model() if isinstance(self._model, PeftModel) else self._model

    @contextmanager
    def ready(self, objective: Objective) -> Iterator[None]:
        """Let the model decode while the block runs, as it will where nobody trains it.

        Of weights that several processes share each process has all of them meanwhile: how many
        forwards a text takes is told by the text, and gathering is done by all at once.

        Args:
            objective: Says how large blocks are in this step.
        """
        model, inner = self._model, self._inner
        config, training = inner.config, model.training
        attention, size = config._attn_implementation, getattr(config, "block_size", None)
        model.eval()
        try:
            with _whole(model, self._first, keeps=self._keeps_gathered):
                if attention in (TILED, FLEX):
                    # Made for many queries, and block masks would be built in every forward.
                    config._attn_implementation = "sdpa"
                if objective.block_size is not None:
                    config.block_size = objective.block_size
                yield
        finally:
            config._attn_implementation = attention
            if objective.block_size is not None:
                config.block_size = size
            model.train(training)

    def _first(self) -> None:
        """Run the model once as those who share its weights do, who have to see its root first."""
        if not self._begun:
            token = torch.zeros(1, 1, dtype=torch.long, device=self._inner.device)
            with torch.no_grad():
                self._model(input_ids=token, use_cache=False)
        self._begun = True

    def write(
        self, batch: TextBatch, objective: Objective, key: NoiseKey
    ) -> tuple[TextBatch, tuple[Corruption, ...]]:
        """Go on from the beginnings of some rows, and draw states that this passed through.

        Args:
            batch: Rows of training text, on the CPU.
            objective: What is learnt in this step.
            key: Of these rows in the step.

        Returns:
            A text to each row, (batch, width), of which the new tokens are learnt, and the states.
        """
        inner, how = self._inner, self.how
        ends = read_ids(inner.generation_config.eos_token_id)
        prompts = beginnings(batch, how, key, objective.mask_token_id, ends)
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)  # (rows, longest prompt)
        lengths = torch.tensor([len(prompt) for prompt in prompts])
        shown = torch.arange(ids.shape[1]) < lengths[:, None]
        rows = range(key.first_row, key.first_row + len(prompts))
        sampled = {} if how.temperature is None else {"temperature": how.temperature}
        output = inner.generate(
            ids.to(inner.device),
            attention_mask=shown.long().to(inner.device),
            max_new_tokens=how.new_tokens,
            seed=[key.generator(row, _SEED).initial_seed() for row in rows],
            return_dict_in_generate=True,
            output_order=True,
            **sampled,
        )
        new, order = (part[:, ids.shape[1] :].cpu() for part in (output.sequences, output.order))
        found = new, order, output.new_tokens.cpu()
        text, when = put_behind(prompts, found, batch.tokens.shape[1], how, objective)
        return text, visited_states(text, when, objective, key, how.views)


def put_behind(
    prompts: list[torch.Tensor],
    written: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    width: int,
    how: OnPolicy,
    objective: Objective,
) -> tuple[TextBatch, torch.Tensor]:
    """Put new tokens behind their prompts.

    Behind the last of them a row had masks while it was written, which are kept: up to the end of
    its block, or where there are none as many as could have been written.

    Args:
        prompts: Token ids of each row.
        written: New tokens, the forward that each was committed in, both (rows, new_tokens), and
            how many of them are text, (rows,).
        width: Of a row, whatever rows it stands beside.
        how: How many new tokens there can be.
        objective: How large blocks are.

    Returns:
        The text, of which the new tokens are learnt, and the forwards of its tokens, 0 where they
        were given; (rows, width).
    """
    new, order, counts = written
    ends = [len(prompt) + int(count) for prompt, count in zip(prompts, counts, strict=True)]
    if objective.target == "bd3lm":
        limits = [-(-end // objective.size) * objective.size for end in ends]
    else:
        limits = [len(prompt) + how.new_tokens for prompt in prompts]
    tokens = torch.zeros(len(prompts), max(width, *limits), dtype=torch.long)
    when, loss = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
    index = torch.arange(tokens.shape[1]).expand_as(tokens)
    inside = index < torch.tensor(limits)[:, None]
    for row, (prompt, end, limit) in enumerate(zip(prompts, ends, limits, strict=True)):
        first, count = len(prompt), end - len(prompt)
        tokens[row, :first], tokens[row, first:end] = prompt, new[row, :count]
        tokens[row, end:limit] = objective.mask_token_id
        when[row, first:end], loss[row, first:end] = order[row, :count], True
    segments = torch.where(inside, 0, -1)
    return TextBatch(tokens, segments, index * inside, loss), when


@contextmanager
def _whole(model: Any, first: Any, *, keeps: bool) -> Iterator[None]:
    """Have each process hold all weights that FSDP2 shares; do nothing where none are."""
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    if not parts:
        yield
        return
    first()
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # What is asked for at last is given back at last: so the root keeps its own anyway.
            part.set_reshard_after_forward(not keeps and part is not model, recurse=False)
