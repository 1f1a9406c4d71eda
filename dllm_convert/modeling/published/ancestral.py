"""Ancestral sampling: texts drawn from the reverse process that the bound is a bound of.

Time runs from 1, where a text is all noise, to 0. In each step x_s is drawn from
q(x_s | x_t, x_0), mixed over what the model takes x_0 for (D3PM, arXiv 2107.03006; MDLM,
2406.07524; MD4, 2406.04329). Nothing is ranked by how sure the model is.
"""

from __future__ import annotations

from typing import Any

import torch

from .choosing import Generators, draw_tokens, draw_uniform, likely_tokens
from .noising import class_of_word
from .options import DecodingOptions

_FINE = 2.0**-24
"""What two numbers of float32's generator are apart."""


def make_ancestry(
    options: DecodingOptions, limits: torch.Tensor, width: int, generators: Generators
) -> Unmasking | Opening | Replacing | None:
    """Return what samples a batch of texts; None where nothing was asked to.

    Args:
        options: How text is denoised.
        limits: Columns each row has, shape (batch,).
        width: Columns of the batch.
        generators: One per row.
    """
    if options.sampler is None:
        return None
    if options.noising.exponents:
        return Opening(options, limits)
    kind = Replacing if options.noise_tokens else Unmasking
    return kind(options, limits, width, generators)


class Unmasking:
    """The absorbing kernel: tokens are masked until, one by one or some at once, they are not.

    What is masked at t is masked at s < t with probability (1 - alpha(s)) / (1 - alpha(t)),
    whatever the token, and else becomes what the model predicts. So the time at which each position
    is written is drawn first, and no forward is run for steps that write nothing. In continuous
    time no two positions are written together: the limit of many steps, in one forward per token.
    """

    def __init__(
        self, options: DecodingOptions, limits: torch.Tensor, width: int, generators: Generators
    ) -> None:
        self._generators = generators
        steps = options.max_denoising_steps or options.noising.steps
        device = limits.device
        self._grid = None if steps is None else options.noising.grid(steps).to(device)
        # The share of noise, or the number of the step, at which each is written, (batch, width).
        self._when = torch.zeros(len(limits), width, dtype=torch.float64, device=device)

    def begin(self, rows: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor) -> None:
        """Draw when the `masked` of these rows are written; (rows,), (rows, n), (rows, n)."""
        generators = [self._generators[row] for row in rows.tolist()]
        counts = masked.sum(-1).tolist()
        coarse, fine = (draw_uniform(counts, generators, masked.device) for _ in range(2))
        # Two draws, so that of many positions no two come out the same by rounding.
        share = coarse.double() + _FINE * fine.double()
        if self._grid is not None:
            # Step n goes from n/T to (n-1)/T: the last one in which noise has reached it is n.
            share = torch.searchsorted(self._grid[1:-1], share, right=True).double()
        self._when[rows[:, None].expand_as(columns)[masked], columns[masked]] = share

    def due(self, rows: torch.Tensor, columns: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        """Which of the masked positions (rows, n) are written next, of the same shape."""
        when = self._when[rows[:, None], columns].masked_fill(~masked, -1)
        return masked & (when == when.amax(-1, keepdim=True))


class Opening:
    """The absorbing kernel with exponents of words' classes (MD4, arXiv 2406.04329, section 6).

    A mask that is word k opens between t and s < t with probability 1 - (s/t)^{w_k}, so when it
    opens says something of the word. In continuous time it opens into k at rate w_k p(k) / t: the
    next one of a row is found at once, since all rates have the same factor. In T steps a
    prediction holds until something opens, and no forward is run for steps that open nothing.
    """

    def __init__(self, options: DecodingOptions, limits: torch.Tensor) -> None:
        noising, device = options.noising, limits.device
        self._steps = options.max_denoising_steps or noising.steps
        self._members = noising.classes
        self._exponents = torch.tensor(noising.exponents, dtype=torch.float64, device=device)
        self._of_word: torch.Tensor | None = None
        self._left = torch.ones_like(limits)  # steps to go, (batch,)

    def _classes(self, words: int) -> torch.Tensor:
        # Class of each word, (vocab,): known when the model says how many there are.
        if self._of_word is None:
            self._of_word = class_of_word(self._members, words).to(self._exponents.device)
        return self._of_word

    def step(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        masked: torch.Tensor,
        begins: torch.Tensor,
        drawn_by: tuple[Generators, Generators],
        warpers: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Go on until something opens in every row that has masks.

        Args:
            logits: Predictions of the `masked`, row after row, the mask ruled out, (n, vocab).
            rows: Numbers of the rows.
            masked: What is masked, shape (rows, columns), bool.
            begins: Rows that begin a block or a text, shape (rows,), bool.
            drawn_by: Generators of each row, and those of its tokens.
            warpers: What temperature and the like make of logits.

        Returns:
            Which positions open, shape (rows, columns), bool, and what they become, in their order.
        """
        others, own = drawn_by
        likely = likely_tokens(logits, warpers)
        of_word = self._classes(logits.shape[-1])
        if self._steps is None:
            each = likely * self._exponents[of_word].to(likely.dtype)  # rates, up to 1/t
            drawn = draw_uniform(masked.sum(-1).tolist(), others, logits.device).double()
            when = (drawn + _FINE).log() / each.sum(-1).double()
            latest = torch.full(masked.shape, -torch.inf, dtype=torch.float64, device=when.device)
            latest.masked_scatter_(masked, when)
            best = latest.argmax(-1, keepdim=True)
            chosen = masked & (torch.arange(masked.shape[1], device=best.device) == best)
            return chosen, draw_tokens(each[chosen[masked]], chosen.sum(-1).tolist(), own)
        self._left[rows[begins]] = self._steps
        mass = torch.zeros(len(likely), len(self._exponents), dtype=torch.float64).to(likely.device)
        mass.index_add_(-1, of_word, likely.double())
        chosen, kinds = self._open(mass, rows, masked, others)
        at = chosen[masked]
        inside = likely[at] * (of_word == kinds[at, None])
        return chosen, draw_tokens(inside, chosen.sum(-1).tolist(), own)

    def _open(
        self, mass: torch.Tensor, rows: torch.Tensor, masked: torch.Tensor, others: Generators
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a class for each mask and whether it opens, step after step, until some does.

        Of which word within a class it is nothing else depends.

        Args:
            mass: Probability of each class at the masked positions, shape (n, classes).
            rows: Numbers of the rows.
            masked: As in `step`.
            others: Generators of each row.
        """
        device = mass.device
        chosen = torch.zeros_like(masked)
        kinds = torch.zeros(len(mass), dtype=torch.long, device=device)
        bounds = mass.cumsum(-1)
        while True:
            waits = masked.any(-1) & ~chosen.any(-1)  # rows
            if not bool(waits.any()):
                return chosen, kinds
            here = masked & waits[:, None]
            among = here[masked]
            counts = here.sum(-1).tolist()
            place, drawn = (draw_uniform(counts, others, device).double() for _ in range(2))
            ends = bounds[among]
            kind = (ends[:, :-1] <= place[:, None] * ends[:, -1:]).sum(-1)
            left = self._left[rows][:, None].expand_as(masked)[here].double()
            opens = drawn < 1 - ((left - 1) / left) ** self._exponents[kind]
            kinds[among] = kind
            chosen = chosen.masked_scatter(here, opens)
            self._left[rows[waits]] -= 1


class Replacing:
    """The uniform kernel: all positions hold tokens, and every step may replace any of them.

    With V words, a = alpha(t)/alpha(s) and the model's prediction p, x_s = k has the probability of
    (a [k = x_t] + (1-a)/V) (alpha(s) p(k) + (1-alpha(s))/V), normalised (D3PM, arXiv 2107.03006,
    section 3.3): a mixture of three, of any word, of the one that is there, and of p.

    Attributes:
        steps: T, the steps of a block or a text.
    """

    def __init__(
        self, options: DecodingOptions, limits: torch.Tensor, width: int, generators: Generators
    ) -> None:
        self._mask, self._words = options.mask_token_id, options.noise_tokens - 1
        self._generators, device = generators, limits.device
        steps = options.max_denoising_steps or options.noising.steps or options.max_new_tokens
        self.steps = steps
        self._kept = (1 - options.noising.grid(steps)).tolist()
        counts = limits.tolist()
        inside = torch.arange(width, device=device) < limits[:, None]
        self._tokens = torch.full(inside.shape, self._mask, device=device)
        self._tokens[inside] = self._any_word(counts, generators, device)

    def _any_word(
        self, counts: list[int], generators: Generators, device: torch.device
    ) -> torch.Tensor:
        drawn = draw_uniform(counts, generators, device, self._words)
        # From one token fewer, then moved past the mask.
        return drawn + (drawn >= self._mask).long()

    def shown(
        self, tokens: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor
    ) -> torch.Tensor:
        """What the model sees of tokens (rows, n), where the mask stands for noise."""
        return torch.where(tokens == self._mask, self._tokens[rows[:, None], columns], tokens)

    def step(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        columns: torch.Tensor,
        masked: torch.Tensor,
        left: torch.Tensor,
        drawn_by: tuple[Generators, Generators],
        warpers: Any,
    ) -> torch.Tensor:
        """Go from t to the time before it.

        Args:
            logits: Predictions of the `masked`, row after row, the mask ruled out, (n, vocab).
            rows: Numbers of the rows.
            columns: Columns at hand, shape (rows, columns).
            masked: Those that hold noise, shape (rows, columns), bool.
            left: Steps that each row has left, this one included, shape (rows,).
            drawn_by: Generators of each row, and those of its tokens.
            warpers: What temperature and the like make of logits.

        Returns:
            What each position is now, shape (n,).
        """
        counts, device = masked.sum(-1).tolist(), logits.device
        others, own = drawn_by
        likely = likely_tokens(logits, warpers)
        guess = draw_tokens(likely, counts, own)
        at = rows[:, None].expand_as(columns)[masked], columns[masked]
        noisy = self._tokens[at]
        kept = torch.tensor(self._kept, dtype=torch.float64, device=device)
        number = left.clamp(max=self.steps)[:, None].expand_as(columns)[masked]
        before, now = kept[number - 1], kept[number]
        step = now / before
        stays = likely.gather(-1, noisy[:, None]).squeeze(-1).double()
        # Weights of the three parts, (n,).
        word = (1 - step) * (1 - before) / self._words
        same = step * ((1 - before) / self._words + before * stays)
        said = (1 - step) * before / self._words
        place = draw_uniform(counts, others, device).double() * (word + same + said)
        any_word = self._any_word(counts, others, device)
        became = torch.where(place < word, any_word, torch.where(place < word + same, noisy, guess))
        self._tokens[at] = became
        return became
