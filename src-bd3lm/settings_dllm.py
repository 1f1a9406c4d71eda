"""Settings of decoding, written by dllm-convert 0.1.0.

What can be asked for, of a text and of transformers' `generate`; and which of a call, a generation
config and a default wins.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from numbers import Integral, Real
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ForcedBOSTokenLogitsProcessor,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitsProcessorList,
    MaxTimeCriteria,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SynthIDTextWatermarkingConfig,
    TopHLogitsWarper,
    TypicalLogitsWarper,
    WatermarkingConfig,
)

from .gated_dllm import sent

# What a text may hold beside what the model says: transformers' logits processors, denoising.


Processor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A `LogitsProcessor` of transformers: ids (n, length) and logits (n, vocab) to other logits."""


@dataclass(frozen=True)
class TextRules:
    """Changes to the logits before a token is chosen, and to what is drawn from.

    They make another distribution, as guidance does: how sure the model is is measured on it. All
    but the last three hold wherever a position is, so that many are written in one forward; what a
    processor says of a token depends on all before it, so they are written from left to right,
    one in a forward.

    Attributes:
        repetition_penalty: Divides the odds of tokens that the row holds already, prompt included.
        token_bias: Added to the logits of single tokens: ids and how much; -inf bans one.
        min_new_tokens: New tokens before which no text ends.
        begin_suppress_tokens: Ids that are not the first new token.
        forced_last: Ids of which the last new token is one; none: any.
        decay: New tokens from which on an end becomes likelier, and the factor by which.
        is_finite: Whether logits that are no numbers, or infinite, are made finite.
        top_h: Draw from tokens that hold this share of the entropy (arXiv 2509.02510).
        typical_p: Draw from the most typical tokens that hold this probability (arXiv 2202.00666).
        epsilon_cutoff: Draw from tokens at least this likely (arXiv 2210.15191).
        eta_cutoff: The same, less where the entropy is large.
        processors: Asked with the ids before a token, row by row.
        allowed: Row and ids before a token to the ids that may follow.
        custom: The caller's own processors, asked last.
    """

    repetition_penalty: float = 1.0
    token_bias: tuple[tuple[int, float], ...] = ()
    min_new_tokens: int = 0
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_last: tuple[int, ...] = ()
    decay: tuple[int, float] | None = None
    is_finite: bool = False
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None
    processors: tuple[Processor, ...] = ()
    allowed: Callable[[int, torch.Tensor], list[int]] | None = None
    custom: tuple[Processor, ...] = ()

    @property
    def is_set(self) -> bool:
        """Whether any of them changes anything."""
        return any(getattr(self, field.name) != field.default for field in fields(self))

    @property
    def is_ordered(self) -> bool:
        """Whether a position has to wait for all before it."""
        return bool(self.processors or self.custom or self.allowed)

    def add_warpers(self, warpers: LogitsProcessorList) -> None:
        """Add what decides of what tokens are drawn; behind the warpers of the other settings."""
        if self.top_h is not None:
            warpers.append(TopHLogitsWarper(self.top_h))
        if self.typical_p is not None:
            warpers.append(TypicalLogitsWarper(mass=self.typical_p))
        if self.epsilon_cutoff is not None:
            warpers.append(EpsilonLogitsWarper(epsilon=self.epsilon_cutoff))
        if self.eta_cutoff is not None:
            warpers.append(EtaLogitsWarper(epsilon=self.eta_cutoff))


def shape_logits(
    logits: torch.Tensor,
    texts: Sequence[tuple[int, torch.Tensor, int]],
    places: torch.Tensor,
    rules: TextRules,
    *,
    eos: Sequence[int],
    new: int,
) -> torch.Tensor:
    """Apply rules in the order transformers has.

    Args:
        logits: Of n positions, row after row, float32, shape (n, vocab); may be written over.
        texts: Of each row its number, the ids its text holds (before the position, where rules are
            ordered), shape (length,), and how many of the n positions are the row's.
        places: How many new tokens stand before each position, shape (n,), int; negative in a
            prompt.
        rules: What is applied.
        eos: Tokens that end a text.
        new: New tokens of a row at the most.

    Returns:
        Logits, shape (n, vocab).
    """
    if rules.token_bias:
        ids, values = zip(*rules.token_bias, strict=True)
        added = torch.tensor(values, dtype=logits.dtype, device=logits.device)
        logits[:, list(ids)] += added
    repeated: list[Processor] = []
    if rules.repetition_penalty != 1:
        repeated.append(RepetitionPenaltyLogitsProcessor(float(rules.repetition_penalty)))
    logits = _ask((*repeated, *rules.processors), texts, logits)
    _allow(logits, texts, rules)
    if rules.is_finite:
        logits = InfNanRemoveLogitsProcessor()(places[None], logits)
    _go_by_place(logits, places, rules, sent(eos, logits.device), new)
    return _ask(rules.custom, texts, logits)


def _go_by_place(
    logits: torch.Tensor, places: torch.Tensor, rules: TextRules, ends: torch.Tensor, new: int
) -> None:
    # What depends on how many new tokens stand before a position, `places` (n,), alone.
    device = logits.device
    _forbid(logits, (places >= 0) & (places < rules.min_new_tokens), ends)
    if rules.forced_last:
        last, at_last = sent(rules.forced_last, device), places == new - 1
        _leave(logits, at_last, last)
        logits[at_last[:, None] & torch.isin(_ids(logits), last)] = 0
    if rules.decay is not None:
        start, factor = rules.decay
        beyond = (places - start).clamp(min=0)[:, None].to(logits.dtype)  # (n, 1)
        said = logits[:, ends]
        more = said.abs() * (factor**beyond - 1)
        logits[:, ends] = said + more.masked_fill(~said.isfinite(), 0)
    _forbid(logits, places == 0, sent(rules.begin_suppress_tokens, device))


def _allow(
    logits: torch.Tensor, texts: Sequence[tuple[int, torch.Tensor, int]], rules: TextRules
) -> None:
    first = 0
    for row, text, count in texts if rules.allowed is not None else ():
        may = list(rules.allowed(row, text)) if count and rules.allowed is not None else [0]
        if not may:
            raise ValueError(
                f"prefix_allowed_tokens_fn allows nothing behind {len(text)} tokens of row {row}"
            )
        _leave(logits, slice(first, first + count), sent(may, logits.device))
        first += count


def _ask(
    processors: Sequence[Processor],
    texts: Sequence[tuple[int, torch.Tensor, int]],
    logits: torch.Tensor,
) -> torch.Tensor:
    # Row by row, for their texts are of different lengths: (count, length) and (count, vocab).
    if not processors:
        return logits
    parts, first = [], 0
    for _, text, count in texts:
        piece = logits[first : first + count]
        for processor in processors if count else ():
            piece = processor(text[None].expand(count, -1), piece)
        parts.append(piece)
        first += count
    return torch.cat(parts) if parts else logits


def _forbid(logits: torch.Tensor, where: torch.Tensor, tokens: torch.Tensor) -> None:
    # Of the positions `where` (n,) is true.
    if len(tokens):
        logits[where[:, None] & torch.isin(_ids(logits), tokens)] = -torch.inf


def _leave(logits: torch.Tensor, where: Any, tokens: torch.Tensor) -> None:
    # Of the positions `where`, nothing but the tokens.
    kept = torch.isin(_ids(logits), tokens)
    logits[where] = logits[where].masked_fill(~kept, -torch.inf)


def _ids(logits: torch.Tensor) -> torch.Tensor:
    return torch.arange(logits.shape[-1], device=logits.device)


# Where a text ends besides at its end token: stop strings, other criteria, and the time.


Criterion = Callable[[torch.Tensor, Any], Any]
"""A `StoppingCriteria` of transformers: ids of shape (1, length) and None, for there are no scores;
True where the text ends with the last of them."""


_MARGIN = 8
"""Tokens looked at beyond as many as a stop string has bytes: some have no text of their own."""


class StopText:
    """Ends a text with the token that completes one of the stop strings.

    As transformers' `StopStringCriteria`, which looks through the vocabulary for over a second.

    Args:
        tokenizer: Says what tokens are as text.
        strings: The stop strings.
    """

    def __init__(self, tokenizer: Any, strings: tuple[str, ...]) -> None:
        self._tokenizer, self._strings = tokenizer, strings
        self._window = max(len(string.encode()) for string in strings) + _MARGIN

    def __call__(self, ids: torch.Tensor, scores: Any) -> bool:
        """Whether the last of the ids, shape (1, length), completes one."""
        tail = ids[0, -self._window :].tolist()
        # Half a character is no text yet.
        whole, before = self._text(tail), len(self._text(tail[:-1]).rstrip("\ufffd"))
        places = ((whole.rfind(string), string) for string in self._strings)
        return any(place >= 0 and place + len(string) > before for place, string in places)

    def _text(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


@dataclass(frozen=True)
class Stops:
    """What ends a text early.

    Attributes:
        criteria: Asked of every row by itself, prompt included, once for each new token that is
            final with all before it: as autoregressive decoding asks, whatever the order in which
            tokens were written.
        max_time: Seconds after which no further forward is begun; what is written by then from left
            to right is the text.
    """

    criteria: tuple[Criterion, ...] = ()
    max_time: float | None = None

    @property
    def is_set(self) -> bool:
        """Whether there is anything to look for."""
        return bool(self.criteria) or self.max_time is not None


class Watch:
    """Looks, after every forward of a decoding, which rows have ended.

    Args:
        stops: What ends a text.
        eos: Tokens that end one anyway: what stands behind them is nobody's.
        lengths: Tokens of each prompt, shape (batch,).
    """

    def __init__(self, stops: Stops, eos: tuple[int, ...], lengths: torch.Tensor) -> None:
        self._stops, self._eos = stops, frozenset(eos)
        self._asked = lengths.tolist() if stops.criteria else []
        self._started = time.monotonic()
        self.stopped: set[int] = set()
        """Rows that were ended."""

    def is_late(self) -> bool:
        """Whether the time is up."""
        most = self._stops.max_time
        return most is not None and time.monotonic() - self._started >= most

    def end_of(self, row: int, tokens: torch.Tensor) -> int | None:
        """How long a row's text is, if a criterion ends it.

        Args:
            row: Its number in the batch.
            tokens: What is final of it from its first token on, shape (length,).
        """
        for end in range(self._asked[row] + 1, len(tokens) + 1) if self._asked else ():
            text = tokens[None, :end]
            if any(torch.as_tensor(ends(text, None)).any() for ends in self._stops.criteria):
                return end
            if int(tokens[end - 1]) in self._eos:
                break
            self._asked[row] = end
        return None


# What decoding is asked for, what it shows on its way and what it returns.


ORDERS = ("confidence", "margin", "entropy", "random")
REMASKING = ("low_confidence", "random")
VERIFIERS = ("self", "base")
_NO_RULES, _NO_STOPS = TextRules(), Stops()

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
        max_denoising_steps: Most forwards per block (BD3LM, and MDLM with `block_length`) or per
            text (MDLM); None: one token each.
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
        num_return_sequences: Texts of each prompt.
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
    approximate_cache: bool = False
    suppress_tokens: tuple[int, ...] = ()
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int = 0
    seeds: tuple[int, ...] = ()
    noise_tokens: int = 0
    causal_context: bool = False
    verify_with: str | None = None
    num_return_sequences: int = 1
    rules: TextRules = _NO_RULES
    stops: Stops = _NO_STOPS

    def __post_init__(self) -> None:
        for name in (
            "max_new_tokens",
            "max_denoising_steps",
            "block_length",
            "num_return_sequences",
        ):
            value = getattr(self, name)
            if value is not None and not (_is_whole(value) and value >= 1):
                raise ValueError(f"{name} is {value!r}, expected at least 1")
        self._check_choices()
        self._check_combinations()
        for name, limit in _IDLE.items():
            value = getattr(self, name)
            if value is not None and (value <= 0 if limit == 0 else value >= limit):
                object.__setattr__(self, name, None)
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
        if self.block_size and (self.block_length or self.approximate_cache):
            raise ValueError(
                "block_length and approximate_cache are for MDLM; this model has blocks of its own"
            )
        if self.approximate_cache and not self.block_length:
            raise ValueError("approximate_cache needs block_length, such as block_length=32")
        if self.remasking and self.block_length:
            raise ValueError("remasking and block_length do not go together: leave one out")
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
        if self.remasking and self.rules.is_ordered:
            raise ValueError(
                "remasking takes tokens back that a logits processor has seen: leave one out"
            )
        if self.num_return_sequences > 1 and not self.is_drawn:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}, and nothing is drawn: all "
                "would be the same; give a temperature above 0"
            )

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
    """

    canvas: torch.Tensor
    committed: torch.Tensor
    lengths: torch.Tensor
    ends: torch.Tensor
    rows: torch.Tensor
    forwards: int


Observer = Callable[[Progress], None]


# Rules and stops of a text from the settings that transformers has for them.


RULES = frozenset(
    {
        *("repetition_penalty", "no_repeat_ngram_size", "bad_words_ids", "sequence_bias"),
        *("min_length", "min_new_tokens", "begin_suppress_tokens", "remove_invalid_values"),
        *("forced_bos_token_id", "forced_eos_token_id", "exponential_decay_length_penalty"),
        *("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff", "watermarking_config"),
        *("logits_processor", "prefix_allowed_tokens_fn"),
    }
)
"""Settings that change what a token may be."""
STOPS = frozenset({"max_time", "stop_strings", "stopping_criteria"})
"""Settings that end a text."""


def _number(settings: Mapping[str, Any], name: str, idle: float, most: float) -> float | None:
    """A number above 0, up to `most`, of a setting; None where it is not given or is `idle`."""
    value = settings[name]
    if value is None or value == idle:
        return None
    is_number = isinstance(value, int | float | Real) and not isinstance(value, bool)
    if not (is_number and 0 < float(value) <= most):
        limit = "" if most == math.inf else f", at most {most:g}"
        raise ValueError(f"{name} is {value!r}, expected a number above 0{limit}")
    return float(value)


def _count(settings: Mapping[str, Any], name: str) -> int:
    value = settings[name]
    if value is None:
        return 0
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} is {value!r}, expected a whole number from 0 on")
    return int(value)


def _called(settings: Mapping[str, Any], name: str) -> tuple[Callable[..., Any], ...]:
    """The processors or criteria of a call: one, or several."""
    given = settings[name]
    found = tuple(given if isinstance(given, Iterable) else [] if given is None else [given])
    for one in found:
        if not callable(one):
            raise ValueError(
                f"{name} has {one!r}, expected objects of transformers that are called"
            )
    return found


def _shaped(settings: Mapping[str, Any], name: str, make: Callable[[Any], Any]) -> Any:
    """Make something of a setting's value; what is no such value is refused by its name."""
    value = settings[name]
    try:
        return make(value)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ValueError(f"{name} is {value!r}, which is none that is taken: {error}") from error


def _biases(settings: Mapping[str, Any], ends: tuple[int, ...]) -> dict[tuple[int, ...], float]:
    """What is added to the logits of a token, or of one that ends a sequence of tokens."""
    found: dict[tuple[int, ...], float] = {}

    def of_sequences(bias: Any) -> Any:
        pairs = bias.items() if isinstance(bias, Mapping) else bias
        given = {tuple(ids): float(value) for ids, value in pairs}
        return SequenceBiasLogitsProcessor(given).sequence_bias  # type: ignore[arg-type]

    def of_words(banned: Any) -> Any:
        return NoBadWordsLogitsProcessor(banned, list(ends)).sequence_bias

    if settings["sequence_bias"]:
        found |= _shaped(settings, "sequence_bias", of_sequences)
    if settings["bad_words_ids"]:
        found |= _shaped(settings, "bad_words_ids", of_words)
    return found


def _watermark(mark: Any, vocabulary: int, device: torch.device | str) -> Callable[..., Any]:
    if isinstance(mark, SynthIDTextWatermarkingConfig):
        raise ValueError(
            "SynthID's, whose processor keeps a state from token to token; WatermarkingConfig's "
            "does not"
        )
    mark = WatermarkingConfig(**mark) if isinstance(mark, Mapping) else mark
    return mark.construct_processor(vocabulary, str(device))  # type: ignore[no-any-return]


def read_rules(
    settings: Mapping[str, Any],
    vocabulary: int,
    ends: tuple[int, ...],
    width: int,
    device: torch.device | str,
) -> TextRules:
    """Return what settings say of the tokens of a text.

    Args:
        settings: Those of `RULES`, None where one is not given.
        vocabulary: Ids there are.
        ends: Tokens that end a text.
        width: Columns of the prompts, which `min_length` counts in.
        device: Where the logits will be.

    Raises:
        ValueError: A value is none that transformers takes.
    """
    biases = _biases(settings, ends)
    long = {ids: value for ids, value in biases.items() if len(ids) > 1}
    never = read_ids(settings["begin_suppress_tokens"], "begin_suppress_tokens")
    last = read_ids(settings["forced_eos_token_id"], "forced_eos_token_id")
    high = max((*never, *last, *(token for ids in biases for token in ids)), default=0)
    if high >= vocabulary:
        raise ValueError(f"there is no token with the id {high}: expected ids below {vocabulary}")
    processors: list[Processor] = []
    if long:
        processors.append(SequenceBiasLogitsProcessor(long))  # type: ignore[arg-type]
    if ngram := _count(settings, "no_repeat_ngram_size"):
        processors.append(NoRepeatNGramLogitsProcessor(ngram))
    if settings["forced_bos_token_id"] is not None:
        first = _shaped(settings, "forced_bos_token_id", int)
        processors.append(ForcedBOSTokenLogitsProcessor(first))
    custom = _called(settings, "logits_processor")
    if settings["watermarking_config"] is not None:
        mark = partial(_watermark, vocabulary=vocabulary, device=device)
        custom = (*custom, _shaped(settings, "watermarking_config", mark))
    decay = None
    if settings["exponential_decay_length_penalty"] is not None:
        decay = _shaped(
            settings,
            "exponential_decay_length_penalty",
            lambda pair: (int(pair[0]), float(pair[1])),
        )
    return TextRules(
        repetition_penalty=_number(settings, "repetition_penalty", 1, math.inf) or 1.0,
        token_bias=tuple((ids[0], value) for ids, value in biases.items() if len(ids) == 1),
        min_new_tokens=max(
            _count(settings, "min_new_tokens"), _count(settings, "min_length") - width, 0
        ),
        begin_suppress_tokens=never,
        forced_last=last,
        decay=decay,
        is_finite=bool(settings["remove_invalid_values"]),
        top_h=_number(settings, "top_h", 1, 1),
        typical_p=_number(settings, "typical_p", 1, 1),
        epsilon_cutoff=_number(settings, "epsilon_cutoff", 0, 1),
        eta_cutoff=_number(settings, "eta_cutoff", 0, 1),
        processors=tuple(processors),
        allowed=settings["prefix_allowed_tokens_fn"],
        custom=custom,
    )


def read_stops(settings: Mapping[str, Any]) -> Stops:
    """Return what settings say of where a text ends, those of `STOPS`, and the `tokenizer`.

    Raises:
        ValueError: There are stop strings and no tokenizer, or a value is none that is taken.
    """
    most = _number(settings, "max_time", math.inf, math.inf)
    criteria: list[Criterion] = []
    strings = settings["stop_strings"]
    if strings:
        named = [strings] if isinstance(strings, str) else _shaped(settings, "stop_strings", list)
        if not all(isinstance(one, str) and one for one in named):
            raise ValueError(f"stop_strings is {strings!r}, expected texts")
        if settings["tokenizer"] is None:
            raise ValueError(
                f"stop_strings is {strings!r}, and the text of tokens is not known: give generate "
                "the tokenizer too, tokenizer=tokenizer"
            )
        criteria.append(StopText(settings["tokenizer"], tuple(named)))
    for one in _called(settings, "stopping_criteria"):
        if isinstance(one, MaxTimeCriteria):
            # Looked at after every forward, not only where a token became final.
            most = min(one.max_time, math.inf if most is None else most)
        else:
            criteria.append(one)
    return Stops(tuple(criteria), most)


# Decoding options from a checkpoint's files and what a caller says.


_OWN = {
    "mask_token_id",
    "block_size",
    "token_shift",
    "eos_token_ids",
    "seeds",
    "noise_tokens",
    "causal_context",
    "rules",
    "stops",
}
TAKEN = {field.name for field in fields(DecodingOptions)} - _OWN
TAKEN |= {"do_sample", "eos_token_id", "max_length"} | RULES | STOPS
"""Settings that decide what is written, by the names that `generate` has for them."""
_FACTS = ("mask_token_id", "block_size")
"""What a generation config repeats of the model's config."""
HARMLESS: Mapping[str, str] = {
    **dict.fromkeys(_FACTS, "a fact of the model, which it has to agree with"),
    "bos_token_id": "nothing is put before a prompt",
    "closing_token_ids": "read with the prompt",
    "return_dict_in_generate": "read where the output is put together",
    "use_cache": "the text is the same with and without",
    "max_cache_len": "the cache is as long as the text",
    "renormalize_logits": "probabilities always sum to one",
    "compile_config": "it decides how fast, and nothing is compiled",
    "disable_compile": "nothing is compiled",
    "tokenizer": "read where there are stop strings",
    "transformers_version": "says who wrote the file",
}
"""Settings that decide nothing that is written, or are read elsewhere, and why."""
_BEAMS = (
    "a diffusion writes many tokens at once and has no beams of next tokens to keep; "
    "num_return_sequences with a temperature writes several texts"
)
_SEARCH = "it searches among next tokens, and a diffusion writes them in no order"
_DRAFTS = "drafts are denoised here by the model itself: verify_with"
_ENCODER = "it is for models that have an encoder and a decoder"
_KEPT = "a text is not written token by token: an observer is shown every step"
_CACHE = "decoding has a cache of its own, on the model's device"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        (
            *("num_beams", "num_beam_groups", "early_stopping", "length_penalty"),
            *("diversity_penalty", "constraints", "force_words_ids"),
        ),
        _BEAMS,
    ),
    **dict.fromkeys(("penalty_alpha", "low_memory", "dola_layers"), _SEARCH),
    **dict.fromkeys(
        (
            *("assistant_model", "assistant_tokenizer", "is_assistant", "num_assistant_tokens"),
            *("num_assistant_tokens_schedule", "assistant_confidence_threshold"),
            *("assistant_early_exit", "assistant_lookbehind", "target_lookbehind"),
            *("assistant_ensemble_weight", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
            *("speculation_type", "use_mtp"),
        ),
        _DRAFTS,
    ),
    **dict.fromkeys(
        (
            *("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"),
            *("decoder_start_token_id",),
        ),
        _ENCODER,
    ),
    **dict.fromkeys(
        ("output_attentions", "output_hidden_states", "output_scores", "output_logits"), _KEPT
    ),
    **dict.fromkeys(("cache_implementation", "cache_config", "prefill_chunk_size"), _CACHE),
    "continuous_batching_config": "it pages a cache that denoising does not have",
    "custom_generate": "it would be another decoding",
    "negative_prompt_ids": "guidance_scale hides the prompt behind masks instead",
    "negative_prompt_attention_mask": "guidance_scale hides the prompt behind masks instead",
    "synced_gpus": "each process decodes by itself",
    "token_healing": "prompts are not changed: leave their last token away",
}
"""Settings of transformers that denoising cannot honour, and why."""
_NOTHING: dict[str, Any] = {
    **dict.fromkeys(("num_beams", "num_beam_groups"), 1),
    **dict.fromkeys(("encoder_repetition_penalty", "length_penalty"), 1),
    **dict.fromkeys(("encoder_no_repeat_ngram_size", "diversity_penalty", "penalty_alpha"), 0),
    "num_assistant_tokens": 20,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.4,
    "assistant_lookbehind": 10,
    "target_lookbehind": 10,
}
"""Values at which refused settings do nothing; so do None, False and empty lists."""
_CACHES = ("dynamic", "static")
"""Caches of transformers that differ from ours in speed alone."""
DEFAULT_NEW_TOKENS = 128


def _does_nothing(name: str, value: Any) -> bool:
    """Whether a setting of transformers' decoding is at the value at which it does nothing."""
    if name == "cache_implementation" and value in _CACHES:
        return True
    if isinstance(value, list | tuple | dict | str) or hasattr(value, "__len__"):
        return not len(value) or (name in _NOTHING and bool(value == _NOTHING[name]))
    return value is None or value is False or (name in _NOTHING and value == _NOTHING[name])


def _refuse(given: Mapping[str, Any]) -> None:
    """Refuse settings that are not honoured, unless they do nothing."""
    for name in sorted(set(given) & set(REFUSED)):
        if not _does_nothing(name, given[name]):
            raise ValueError(f"{name} is {given[name]!r}, which is refused: {REFUSED[name]}")
    unknown = set(given) - TAKEN - set(HARMLESS) - set(REFUSED)
    # What a later transformers knows and this file does not, at the value it has by itself.
    standard = vars(GenerationConfig())  # type: ignore[no-untyped-call]
    unknown = {n for n in unknown if n not in standard or not _does_nothing(n, given[n])}
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}; known: {sorted(TAKEN)}")


def set_fields(generation: Any) -> dict[str, Any]:
    """Return the fields of a generation config that are set, by name."""
    every = generation if isinstance(generation, Mapping) else vars(generation)
    return {
        name: value
        for name, value in every.items()
        if value is not None and not name.startswith("_") and name != "transformers_version"
    }


def check_given(config: Any, given: Mapping[str, Any]) -> None:
    """Refuse fields set in a generation config that decoding would ignore, or that contradict."""
    _refuse(given)
    for name in _FACTS:
        mine = getattr(config, name, None)
        if name in given and given[name] != mine:
            raise ValueError(f"{name} is {given[name]}, this model's is {mine}")


def _new_tokens(levels: list[Mapping[str, Any]], width: int) -> int:
    """How many tokens to write: the first level that says so, `max_new_tokens` first of each."""
    for level in levels:
        new: int | None = level.get("max_new_tokens")
        if new is not None:
            return new
        longest = level.get("max_length")
        if longest is not None:
            if longest <= width:
                raise ValueError(
                    f"max_length is {longest}, and the prompt takes {width} tokens of it: "
                    "give a larger one, or max_new_tokens"
                )
            return int(longest - width)
    return DEFAULT_NEW_TOKENS


def _temperature(levels: list[Mapping[str, Any]]) -> float:
    """What to draw with: the first level that says whether, or how, decides; 0 is not to draw."""
    drawn = False
    for level in levels:
        if level.get("do_sample") is False and not drawn:
            return 0.0
        drawn = drawn or bool(level.get("do_sample"))
        temperature: float | None = level.get("temperature")
        if temperature is not None:
            return temperature
    return 1.0 if drawn else 0.0


def decoding_options(
    config: Any,
    generation: Any,
    rows: int,
    seed: int | list[int] | None,
    overrides: dict[str, Any],
    *,
    given: Any | None = None,
    width: int = 0,
    device: torch.device | str = "cpu",
) -> DecodingOptions:
    """Put the options together, as transformers does.

    The call's come before those of the generation config it gives, before the checkpoint's, before
    the defaults; a field that is not set, or None in a generation config, is left to the next.

    Args:
        config: The model's config, which says what was trained.
        generation: The checkpoint's generation config, its fields named as in `DecodingOptions`.
        rows: Rows of the batch.
        seed: Row r draws from `seed + r`, or from its own in a list.
        overrides: The call's settings.
        given: A generation config that the call gives.
        width: Columns of the prompts, which `max_length` and `min_length` count in.
        device: Where the logits will be.
    """
    _refuse(overrides)
    own = set_fields(generation)
    said = {} if given is None else set_fields(given)
    check_given(config, said)
    idle = sorted(name for name in set(own) & set(REFUSED) if not _does_nothing(name, own[name]))
    if idle:
        warnings.warn(
            f"the generation config has {idle}, which denoising has no use for", stacklevel=3
        )
    asked = {"tokenizer": None, **dict.fromkeys(TAKEN)}
    settings = {**asked, **own, **said, **overrides}
    settings["max_new_tokens"] = _new_tokens([overrides, said, own], width)
    settings["temperature"] = _temperature([overrides, said, own])
    ends = read_ids(settings["eos_token_id"])
    padding = read_ids(settings["pad_token_id"], "pad_token_id")
    settings["pad_token_id"] = next(iter((*padding, *ends)), 0)
    never = read_ids(settings["suppress_tokens"], "suppress_tokens")
    if any(token >= config.vocab_size for token in never):
        raise ValueError(
            f"suppress_tokens has {max(never)}, expected ids below {config.vocab_size}"
        )
    settings["suppress_tokens"] = never
    may_be_none = {"max_denoising_steps", "confidence_threshold"}
    facts = config.diffusion
    copies = settings["num_return_sequences"]
    many = rows * copies if isinstance(copies, int) and copies > 1 else rows
    options = DecodingOptions(
        **{
            name: settings[name]
            for name in {field.name for field in fields(DecodingOptions)} - _OWN
            if settings[name] is not None or name in may_be_none
        },
        mask_token_id=config.mask_token_id,
        block_size=getattr(config, "block_size", None),
        token_shift=bool(facts["token_shift"]),
        causal_context=facts.get("context") == "causal",
        noise_tokens=config.vocab_size if facts.get("noise_kernel") == "uniform" else 0,
        eos_token_ids=ends,
        seeds=_seeds(seed, many),
        rules=read_rules(settings, config.vocab_size, ends, width, device),
        stops=read_stops(settings),
    )
    if options.guided and facts.get("acts_on") == "noisy":
        raise ValueError(
            "guidance_scale hides the prompt behind masks, and what reads the prompt here is the "
            "base, which knows no mask"
        )
    return options


def _seeds(seed: int | list[int] | None, rows: int) -> tuple[int, ...]:
    if seed is None:
        return ()
    if isinstance(seed, Integral):
        return tuple(int(seed) + row for row in range(rows))
    if not isinstance(seed, list | tuple) or not all(isinstance(one, Integral) for one in seed):
        raise ValueError(f"seed is {seed!r}, expected a whole number, or a list with one per row")
    if len(seed) != rows:
        raise ValueError(f"{len(seed)} seeds for {rows} rows; give one number or one per row")
    return tuple(map(int, seed))


# Token ids as configs give them: one, several, or none.


def read_ids(value: Any, name: str = "eos_token_id") -> tuple[int, ...]:
    """Return the ids that a field of a config names, each once; None and negative ones are none."""
    given = value.tolist() if hasattr(value, "tolist") else value
    several = isinstance(given, list | tuple | set | frozenset)
    values = () if given is None else tuple(given) if several else (given,)
    for token in values:
        if not isinstance(token, Integral) or isinstance(token, bool):
            raise ValueError(f"{name} is {value!r}, expected the id of a token or a list of ids")
    return tuple(dict.fromkeys(int(token) for token in values if token >= 0))
