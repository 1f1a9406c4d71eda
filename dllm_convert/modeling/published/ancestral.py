"""Ancestral sampling: texts drawn from the reverse process that the bound is a bound of.

Time runs from 1, where a text is all noise, to 0. In each step x_s is drawn from
q(x_s | x_t, x_0), mixed over what the model takes x_0 for (D3PM, arXiv 2107.03006; MDLM,
2406.07524; MD4, 2406.04329). Nothing is ranked by how sure the model is.
"""

from __future__ import annotations

from typing import Any

import torch

from .choosing import Generators, draw_tokens, draw_uniform
from .options import DecodingOptions

_FINE = 2.0**-24
"""What two numbers of float32's generator are apart."""


def make_ancestry(
    options: DecodingOptions, limits: torch.Tensor, width: int, generators: Generators
) -> Unmasking | Replacing | None:
    """Return what samples a batch of texts; None where nothing was asked to.

    Args:
        options: How text is denoised.
        limits: Columns each row has, shape (batch,).
        width: Columns of the batch.
        generators: One per row.
    """
    if options.sampler is None:
        return None
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
        guess, likely = draw_tokens(logits, counts, own, warpers)
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
