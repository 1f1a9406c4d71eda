"""Lossless decoding with two models: one drafts block after block, the other is who writes.

The text is the verifier's own, token for token, as where a model verifies itself; the drafter is
a block diffusion model with weights of its own, such as a conversion whose clean tokens were
opened, behind text that was verified. Each model has its cache, and each forward is counted.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch

from .behind import CacheTreeReader
from .canvas import Canvas
from .drafting import SURE, PairPolicy
from .lossless import Choice, VerifierError, open_rows, write_verified
from .moving import sent
from .options import Decoded, DecodingOptions, Observer
from .reading import BlockReader

NO_BLOCKS = (
    "drafts for another model are denoised block by block behind masks (bd3lm, absorbing kernel); "
    "this model has no such blocks, so that each forward of a draft would read the whole text anew"
)


class StockModel:
    """A decoder of transformers, called as a model here is: logits only where they are wanted."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def modules(self) -> Any:
        """None whose frequencies are chosen for it: it turns keys and queries as it always does."""
        return ()

    def parameters(self) -> Any:
        """Its weights."""
        return self.model.parameters()

    def __call__(
        self,
        input_ids: torch.Tensor,
        *,
        logits_at: torch.Tensor,
        past_key_values: Any = None,
        **more: Any,
    ) -> Any:
        """Run tokens (rows, width) behind a cache; logits at flat places in (rows * width), (n,).

        Of the output, which is not the model's own class, only these and the cache are read.
        """
        more.pop("noisy", None)  # what nobody sees, behind shorter rows; it knows no noise
        # Whoever asks for none fills the cache.
        output = self.model(
            input_ids=input_ids,
            past_key_values=past_key_values,
            return_dict=True,
            logits_to_keep=0 if len(logits_at) else 1,
            **more,
        )
        logits = output.logits.flatten(0, 1)
        return SimpleNamespace(
            logits=logits[logits_at] if len(logits_at) else logits[:0],
            past_key_values=output.past_key_values,
        )


class BlockDrafter:
    """Drafts what comes next in each row's block, behind text that was verified.

    Args:
        model: A block diffusion model.
        text: The batch as it is verified.
        options: How it is decoded; `confidence_threshold` is what a draft needs to be denoised
            beside, `max_denoising_steps` a limit on forwards of a draft.
        words: Size of the verifier's vocabulary.

    Attributes:
        shows: Whether what it drafted is shown before it is verified.
    """

    shows = True

    def __init__(self, model: Any, text: Canvas, options: DecodingOptions, words: int) -> None:
        self.text, self.size, self.words = text, options.block_size or 1, words
        self.forwards = 0
        self.sure = options.confidence_threshold or SURE
        limits = (text.ends + self.size - 1) // self.size * self.size
        prompts = text.tokens[:, : text.prompt_width]
        self.canvas = Canvas(prompts, text.lengths, options, limits=limits)
        self.reader = BlockReader(model, self.canvas, self.size)
        self._known = model.get_input_embeddings().num_embeddings
        self._begun = False
        # Past the text, up to the end of its last block: never verified. (batch, columns) each.
        shared = text.tokens.shape[1]
        self._past = self.canvas.tokens[:, shared:].clone(), self.canvas.masked[:, shared:].clone()

    def _room(self, rows: list[Any]) -> tuple[int, int, int]:
        """What a policy is told: tokens left in the block of most; blocks, and tokens, unread."""
        first = [row.clean + 1 for row in rows]
        left = max(self.size - at % self.size for at in first)
        starts = self.reader.starts.tolist()
        behind = max((at - start) // self.size for at, start in zip(first, starts, strict=True))
        return left, behind, 0 if self._begun else max(starts)

    def draft(self, rows: list[Any], policy: PairPolicy, choice: Choice) -> None:
        """Give rows `candidates` behind their last known token, as far as a policy says.

        Args:
            rows: The rows, in the order of the batch.
            policy: In how many forwards, how much.
            choice: Which token a distribution writes.
        """
        steps, count = policy.plan(max(row.left for row in rows), *self._room(rows))
        found = self._denoised(steps, count, choice) if count else [{} for _ in rows]
        for row, drafted in zip(rows, found, strict=True):
            row.candidates = []
            while (at := row.clean + 1 + len(row.candidates)) in drafted:
                row.candidates.append([drafted[at]])

    def _denoised(self, steps: int, count: int, choice: Choice) -> list[dict[int, int]]:
        """Denoise behind the text as it is; of each row tokens by column."""
        canvas, reader, mask = self.canvas, self.reader, self.canvas.options.mask_token_id
        shared = self.text.tokens.shape[1]
        before, unknown = canvas.forwards, self.text.masked
        # A word that only the verifier has is one that the drafter cannot read.
        unread = self.text.tokens >= self._known
        canvas.tokens[:, :shared] = self.text.tokens.masked_fill(unknown | unread, mask)
        canvas.masked[:, :shared] = unknown
        canvas.tokens[:, shared:], canvas.masked[:, shared:] = self._past
        # What is drafted below is not written: it makes no block clean. (batch, width)
        unverified = canvas.masked.clone()
        if not self._begun:
            reader.read_prompt()
            self._begun = True
        drafted: list[dict[int, int]] = [{} for _ in range(len(canvas.rows))]
        done = 0
        while done < steps:
            columns, clean, masked = self._open(unverified, count)
            if not (clean | masked.any(-1)).any():
                break  # every draft is sure
            logits = reader.read_ahead(columns) if clean.all() else None
            if logits is not None:
                # All masks of the blocks behind, of which the first are wanted.
                every = canvas.masked[canvas.rows[:, None], reader.columns()]
                columns, _, masked = self._open(unverified, count)
                logits = logits[masked[every]]
            else:
                logits = reader.read(columns, masked, clean)
            if len(logits):
                self._fill(logits, columns, masked, drafted, choice, last=done == steps - 1)
                done += 1
        self.forwards += canvas.forwards - before
        self.text.forwards += canvas.forwards - before
        return drafted

    def _open(
        self, unverified: torch.Tensor, count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return columns of each row's block, which blocks are verified, what is left to draft.

        That is, of the first `count` tokens that are not verified, those that no draft is sure of.
        Shapes (rows, block), (rows,), (rows, block).
        """
        columns, rows = self.reader.columns(), self.canvas.rows[:, None]
        wanted = unverified[rows, columns]
        first = wanted & (wanted.cumsum(-1) <= count)
        return columns, ~wanted.any(-1), first & self.canvas.masked[rows, columns]

    def _fill(
        self,
        logits: torch.Tensor,
        columns: torch.Tensor,
        masked: torch.Tensor,
        drafted: list[dict[int, int]],
        choice: Choice,
        *,
        last: bool,
    ) -> None:
        """Put drafts where they are sure, in the last step everywhere; logits (n, vocab)."""
        line, _ = masked.nonzero(as_tuple=True)
        number, column = self.canvas.rows[line], columns[masked]
        # Of words that the verifier has, and there may be more of those.
        logits = logits.float()[:, : self.words]
        more = (0, self.words - logits.shape[-1])
        logits = torch.nn.functional.pad(logits, more, value=-torch.inf)
        told = torch.stack([line, number, column], 1).tolist()
        scores = choice.scores(logits, [(row, at) for _, row, at in told])
        tokens = scores.argmax(-1)
        share = (logits.amax(-1) - logits.logsumexp(-1)).exp()
        sure = torch.ones_like(share, dtype=torch.bool) if last else share >= self.sure
        self.canvas.tokens[number[sure], column[sure]] = tokens[sure]
        self.canvas.masked[number[sure], column[sure]] = False
        for (own, _, at), token, kept in zip(told, tokens.tolist(), sure.tolist(), strict=True):
            if kept:
                drafted[own][at] = token

    def select(self, rows: list[Any], kept: list[int]) -> None:
        """Keep only `rows`, which were these lines."""
        lines = sent(kept, self.canvas.rows.device)
        self.canvas.rows = self.canvas.rows[lines]
        self.reader.select(lines)


def check_paired(model: Any, verifier: Any, options: DecodingOptions) -> None:
    """Refuse pairs and settings that are none.

    Raises:
        VerifierError: They are.
    """
    if getattr(model, "is_gated", False):
        raise VerifierError(
            'this model holds its base, which verifies without another: verify_with="base"'
        )
    if not options.block_size or options.noise_tokens or getattr(model, "reader", None) is not None:
        raise VerifierError(NO_BLOCKS)
    if (getattr(verifier.config, "diffusion", None) or {}) or not hasattr(verifier, "generate"):
        raise VerifierError(
            "verify_with takes a model of transformers that goes on from left to right, such as "
            "the base of the conversion"
        )
    if verifier.device != model.device:
        raise VerifierError(
            f"the drafter is on {model.device} and the verifier on {verifier.device}: both have to "
            "be on one device"
        )
    if options.guided or options.remasking or options.sampler:
        raise VerifierError(
            "verify_with writes what the verifier says: leave guidance_scale, remasking and "
            "sampler out"
        )


def decode_paired(
    model: Any,
    prompts: torch.Tensor,
    lengths: torch.Tensor,
    options: DecodingOptions,
    observer: Observer | None = None,
    *,
    verifier: Any,
) -> Decoded:
    """Decode what `verifier` alone would write, drafted by `model`.

    Other arguments are those of `decode_blocks`; `prompts` hold no masks.
    """
    canvas, rows = open_rows(prompts, lengths, options, observer)
    words = verifier.get_output_embeddings().weight.shape[0]
    # Of the settings of denoising, a threshold and steps are what a draft has.
    drafts = replace(options, seeds=(), sub_block_size=None, entropy_bound=None)
    drafter = BlockDrafter(model, canvas, drafts, words)
    choice = Choice(options, len(rows), prompts.device, words)
    policy = PairPolicy(
        prompts.device.type,
        max(len(rows), 1),
        options.block_size or 1,
        _parameters(model) / max(_parameters(verifier), 1),
        steps=options.max_denoising_steps,
    )
    reader = CacheTreeReader(StockModel(verifier), canvas, filler=0)

    decoded = write_verified(canvas, rows, reader, policy, choice, drafter)
    return replace(decoded, verifier_forwards=decoded.forwards - drafter.forwards)


def _parameters(model: Any) -> int:
    return sum(weight.numel() for weight in model.parameters())
