"""What decoding is asked for, what it shows on its way and what it returns."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real

import torch

from .noising import Noising
from .rules import TextRules
from .stopping import Stops

ORDERS = ("confidence", "margin", "entropy", "random")
REMASKING = ("low_confidence", "random")
VERIFIERS = ("self", "base")
SAMPLERS = ("ancestral",)
_NO_RULES, _NO_STOPS, _LINEAR = TextRules(), Stops(), Noising()

_LIMITS = {
    "confidence_threshold": (0, math.inf),
    "entropy_bound": (0, math.inf),
    "remasking_ratio": (0, math.nextafter(1, 0)),
    "temperature": (0, math.inf),
    "top_k": (0, math.inf),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "guidance_scale": (0, 1000),
}
"""Least and largest value of each setting."""
_EXPECTED = {(0, math.inf): "at least 0", (0, 1): "0 to 1", (0, 1000): "0 to 1000"}
_IDLE = {"confidence_threshold": 1, "entropy_bound": 0, "top_k": 0, "top_p": 1, "min_p": 0}
"""Where a setting does nothing: from there on it is as if it were not given, rounding included."""


@dataclass(frozen=True)
class DecodingOptions:
    """How text is denoised.

    Attributes:
        mask_token_id: Token that stands for "not written yet"; never written itself.
        max_new_tokens: Tokens written per row.
        block_size: Tokens per block, or None for MDLM.
        token_shift: Whether position i is predicted from the hidden state of i-1.
        max_denoising_steps: Most forwards per block (BD3LM, and MDLM with `block_length`), per part
            of one (`sub_block_size`) or per text (MDLM); None: one token each.
        confidence_threshold: Commit every position whose token the model holds at least this
            likely, at least one per forward (Fast-dLLM, arXiv 2505.22618); None, or 1 and above:
            no more than the number of steps asks for.
        entropy_bound: Commit as many positions, in the order of `unmasking`, as their summed
            entropy in nats, the largest left out, is at most this (EB-Sampler, arXiv 2505.24857);
            None or 0: no more than the number of steps asks for.
        unmasking: What a fixed number of positions is chosen by: `confidence`; `margin`, between
            the two likeliest tokens; `entropy`; or `random`.
        remasking: Take committed tokens back before the last step, those of `low_confidence` or at
            `random` (after ReMDM, arXiv 2503.00307); None: what is committed stays.
        remasking_ratio: Share of the tokens of earlier steps taken back in each step, rounded down.
        temperature: 0 takes the likeliest token. Like the next three it decides what is drawn, not
            how sure the model is: that is measured on the model's own distribution.
        top_k: Draw from the k likeliest tokens; 0 is none, as in transformers.
        top_p: Draw from the fewest tokens that hold this probability.
        min_p: Draw from tokens at least this likely, relative to the likeliest.
        guidance_scale: Classifier-free guidance, the prompt masked for the second opinion (LLaDA,
            arXiv 2502.09992); 1 is none, as in transformers.
        block_length: MDLM writes this many positions at a time from left to right (LLaDA).
        sub_block_size: BD3LM writes a block so many positions at a time from left to right, behind
            and before masks that it sees (Fast-dLLM v2, arXiv 2509.26328).
        approximate_cache: MDLM reads what lies outside the current `block_length` positions from
            states kept since their first forward (Fast-dLLM's dual cache). Not exact.
        suppress_tokens: Ids that are never written, such as rows that no token has.
        eos_token_ids: Tokens that end a row.
        pad_token_id: Token that fills a row after its end.
        seeds: One seed per row; empty draws from torch's global generator.
        noise_tokens: What stands where nothing is written yet: 0 the mask; n, for the uniform
            kernel (D3PM, arXiv 2107.03006), tokens drawn anew in every forward from ids below n.
        causal_context: Whether finished blocks are read strictly causally, as they were trained.
        verify_with: Write what autoregressive decoding would write, token for token, and denoise
            only to draft it: `self` by the weights that draft, `base` by the model that was
            converted, which a gated adapter leaves as it was; None: what is denoised is written.
        sampler: `ancestral`: draw texts from the reverse process of the noise that the model was
            trained with, in `max_denoising_steps` steps (None: its own T, or continuous time, a
            token each), and rank nothing (D3PM, arXiv 2107.03006); needs a temperature, of which 1
            is exact. None: commit by what follows from the settings above.
        num_return_sequences: Texts of each prompt.
        noising: The noise that the model was trained with.
        rules: What a text may hold beside what the model says.
        stops: What ends a text beside its end token.

    Raises:
        ValueError: If a value is out of its range or two do not go together.
    """

    mask_token_id: int
    max_new_tokens: int
    block_size: int | None = None
    token_shift: bool = False
    max_denoising_steps: int | None = None
    confidence_threshold: float | None = None
    entropy_bound: float | None = None
    unmasking: str = "confidence"
    remasking: str | None = None
    remasking_ratio: float = 0.1
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    guidance_scale: float = 1.0
    block_length: int | None = None
    sub_block_size: int | None = None
    approximate_cache: bool = False
    suppress_tokens: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    seeds: tuple[int, ...] = ()
    noise_tokens: int = 0
    causal_context: bool = False
    verify_with: str | None = None
    sampler: str | None = None
    num_return_sequences: int = 1
    noising: Noising = _LINEAR
    rules: TextRules = _NO_RULES
    stops: Stops = _NO_STOPS

    def __post_init__(self) -> None:
        for name in (
            "max_new_tokens",
            "max_denoising_steps",
            "block_length",
            "sub_block_size",
            "num_return_sequences",
        ):
            value = getattr(self, name)
            if value is not None and not (_is_whole(value) and value >= 1):
                raise ValueError(f"{name} is {value!r}, expected at least 1")
        self._check_choices()
        self._drop_idle()
        self._check_combinations()
        if self.sampler:
            # What is ranked, or found sure enough, where positions are chosen.
            for name in ("confidence_threshold", "entropy_bound"):
                object.__setattr__(self, name, None)

    def _drop_idle(self) -> None:
        # What does nothing contradicts nothing, and is how a saved setting is switched off.
        for name, limit in _IDLE.items():
            value = getattr(self, name)
            if value is not None and (value <= 0 if limit == 0 else value >= limit):
                object.__setattr__(self, name, None)
        if self.block_size and (self.sub_block_size or 0) >= self.block_size:
            object.__setattr__(self, "sub_block_size", None)
        if self.remasking_ratio == 0:
            object.__setattr__(self, "remasking", None)

    def _check_choices(self) -> None:
        if self.unmasking not in ORDERS:
            raise ValueError(f"unmasking is {self.unmasking!r}, expected one of {list(ORDERS)}")
        if self.remasking not in (None, *REMASKING):
            raise ValueError(f"remasking is {self.remasking!r}, expected one of {list(REMASKING)}")
        if self.verify_with not in (None, *VERIFIERS):
            raise ValueError(
                f"verify_with is {self.verify_with!r}, expected one of {list(VERIFIERS)}"
            )
        if self.sampler not in (None, *SAMPLERS):
            raise ValueError(f"sampler is {self.sampler!r}, expected one of {list(SAMPLERS)}")
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value is None and name not in ("remasking_ratio", "temperature", "guidance_scale"):
                continue
            number = isinstance(value, Real) and not isinstance(value, bool)
            if not (number and least <= value <= most and value < math.inf):
                expected = _EXPECTED.get((least, most), "0 to below 1")
                raise ValueError(f"{name} is {value!r}, expected {expected}")
        if self.top_k is not None and not _is_whole(self.top_k):
            raise ValueError(f"top_k is {self.top_k!r}, expected a whole number")

    def _check_combinations(self) -> None:
        self._check_parts()
        if self.block_size and (self.block_length or self.approximate_cache):
            raise ValueError(
                "block_length and approximate_cache are for MDLM; this model has blocks of its own"
            )
        if self.approximate_cache and not self.block_length:
            raise ValueError("approximate_cache needs block_length, such as block_length=32")
        if self.guided and self.noise_tokens:
            raise ValueError("guidance_scale needs a mask to hide the prompt; this model has none")
        if self.verify_with and not self.causal_context:
            raise ValueError(
                "verify_with needs clean tokens that are read strictly causally, as "
                "training.ar_loss_weight or a gated adapter trains them; this model's are not"
            )
        if self.verify_with and (self.guided or self.remasking):
            raise ValueError(
                "verify_with writes what the verifier says: leave guidance_scale and remasking out"
            )
        if self.sampler:
            self._check_sampler()
        if self.remasking and self.rules.is_ordered:
            raise ValueError(
                "remasking takes tokens back that a logits processor has seen: leave one out"
            )
        if self.num_return_sequences > 1 and not self.is_drawn:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, and nothing is drawn: all "
                "would be the same; give a temperature above 0"
            )

    def _check_sampler(self) -> None:
        if not self.temperature:
            raise ValueError(
                "sampler draws every token: give a temperature above 0; at 1 it is exact"
            )
        for name in ("remasking", "verify_with", "block_length", "sub_block_size"):
            if getattr(self, name):
                raise ValueError(
                    f"{name} and sampler do not go together: each says what a step writes"
                    f"{self._off(name)}"
                )
        if self.rules.is_ordered:
            raise ValueError(
                "sampler writes tokens in an order of its own, and a logits processor asks for "
                "that from left to right: leave one out"
            )

    def _check_parts(self) -> None:
        # Of what is written from left to right, nothing is taken back.
        for name in ("block_length", "sub_block_size"):
            if self.remasking and getattr(self, name):
                raise ValueError(
                    f"remasking and {name} do not go together: leave one out{self._off(name)}"
                )
        if self.sub_block_size and not self.block_size:
            raise ValueError(
                "sub_block_size is a part of a block, and MDLM has none; block_length is for MDLM"
            )

    def _off(self, name: str) -> str:
        # How a setting that the checkpoint has saved is switched off, where it can be.
        none = {
            "remasking": "remasking_ratio=0",
            "sub_block_size": f"sub_block_size={self.block_size}",
        }.get(name)
        return "" if none is None else f"; {none} is none"

    @property
    def is_drawn(self) -> bool:
        """Whether chance decides anything of a text."""
        random = "random" in (self.unmasking, self.remasking)
        return bool(self.temperature or random or self.noise_tokens)

    @property
    def guided(self) -> bool:
        """Whether every forward is run with and without the prompt."""
        return self.guidance_scale != 1


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Decoded:
    """What decoding returns.

    Attributes:
        rows: New tokens, shape (batch, max_new_tokens), padded after the end of each row.
        prompts: The prompts with their masks written, shape (batch, longest prompt).
        order: The forward, counted from 1, in which each token of `rows` was committed; 0 after the
            end of a row.
        prompt_order: The same for `prompts`; 0 where a token was given.
        forwards: Forward passes run, those that fill the cache included.
        new: New tokens written in each row, the end-of-text token included, shape (batch,).
        verifier_forwards: Of two models: how many of the forwards were the verifier's.
        close: Of lossless decoding: how many of them stood so near another token's logit that a
            forward of a single token may have rounded otherwise, summed over rows.
    """

    rows: torch.Tensor
    prompts: torch.Tensor
    order: torch.Tensor
    prompt_order: torch.Tensor
    forwards: int
    new: torch.Tensor
    close: int | None = None
    verifier_forwards: int | None = None


@dataclass(frozen=True)
class Progress:
    """What an observer of decoding is shown, after the prompt and after every denoising forward.

    Attributes:
        canvas: Prompt, then new tokens, of every row, the mask where nothing is written yet; shape
            (batch, longest prompt + max_new_tokens). Prompts start at column 0, whatever their
            padding was. Not to be written to.
        committed: Where a token is final, prompts included, shape (batch, width), bool.
        lengths: Tokens of each prompt: column `lengths[r]` holds row r's first new token.
        ends: Column behind the last new token that each row can have, as far as that is known: what
            ends it early beside an end-of-text token shortens it, shape (batch,).
        rows: Rows still being written, shape (rows,), int.
        forwards: Forward passes run so far.
        drafts: Of lossless decoding: row, column and token of what is drafted and not verified.
    """

    canvas: torch.Tensor
    committed: torch.Tensor
    lengths: torch.Tensor
    ends: torch.Tensor
    rows: torch.Tensor
    forwards: int
    drafts: tuple[tuple[int, int, int], ...] = ()


Observer = Callable[[Progress], None]
