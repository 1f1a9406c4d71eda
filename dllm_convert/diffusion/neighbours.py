"""D3PM's nearest-neighbour kernel (arXiv 2107.03006, appendix A.2.4): a word becomes one like it.

Words walk over a graph: each is joined to the k nearest in the source's embedding, and to those it
is one of the k nearest of. A jump goes along an edge (i, j) with probability 1 / max(d_i, d_j), of
degrees d, and stays with the rest (Metropolis): a symmetric A whose rows sum to one. The paper's
rates, (G + G^T) / 2k, are symmetric too, but of a word that is near to thousands they are those of
thousands, and so is the number of terms of what follows.

A walk forgets slowly, and never where the graph falls apart. So it stands beside the uniform
kernel: with probability 1 - alpha(t) a word has been replaced by any, and else has walked for a
time beta(t) = jumps (1 - alpha(t)):

    Q_t = alpha(t) exp(beta(t) (A - 1)) + (1 - alpha(t)) / V.

Both parts commute, so Q is a semigroup in t, and at t = 1 nothing is left of a text. What is exact
here: exp(beta (A - 1)) = sum_n Poisson(n; beta) A^n (uniformisation), by products with a sparse
matrix; terms are left out whose probabilities sum to less than `TAIL`. No matrix of V x V entries
is made: products are with the rows of the tokens that are scored.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from dllm_convert.common.diffusion_section import NEIGHBOURS_FILE
from dllm_convert.diffusion.device import row_pieces
from dllm_convert.errors import DataError

TAIL = 1e-8
"""Probability of the numbers of jumps that are left out, at the most."""
_ENTRIES = 1 << 24
"""Entries of one tensor of tokens times words at a time; eight times as many but on a CPU."""


def poisson(mean: float, tail: float = TAIL) -> list[float]:
    """Probabilities of 0, 1, ... events, as many as leave out less than `tail`; they sum to one."""
    terms, total = [math.exp(-mean)], math.exp(-mean)
    # What is left out behind the mean falls faster than geometrically.
    while total < 1 - tail or len(terms) <= mean:
        terms.append(terms[-1] * mean / len(terms))
        total += terms[-1]
    return [term / total for term in terms]


@dataclass(frozen=True, eq=False)
class Walk:
    """The graph, as the matrix of a jump.

    Attributes:
        near: Ids of the words nearest to each, shape (V, k), int32; a row of -1 is no word.
        jumps: Expected number of jumps at t = 1, of words that nothing replaced.
    """

    near: torch.Tensor
    jumps: float

    @property
    def rows(self) -> int:
        """Rows of the embedding, V."""
        return len(self.near)

    @cached_property
    def matrix(self) -> torch.Tensor:
        """A, sparse CSR, float32, shape (V, V): symmetric, rows sum to one; no words stay."""
        count, k = self.near.shape
        start = torch.arange(count).repeat_interleave(k)
        end = self.near.flatten().long()
        start, end = start[end >= 0], end[end >= 0]
        # Both directions of an edge, once each: numbers start * V + end.
        pairs = torch.cat([start * count + end, end * count + start])
        both: torch.Tensor = torch.unique(pairs)
        start, end = both // count, both % count
        degree = torch.bincount(start, minlength=count)
        share = 1 / torch.maximum(degree[start], degree[end]).double()
        stays = 1 - torch.zeros(count, dtype=torch.float64).index_add_(0, start, share)
        self_loop = torch.arange(count)
        at = torch.stack([torch.cat([start, self_loop]), torch.cat([end, self_loop])])
        values = torch.cat([share, stays.clamp(min=0)]).float()
        made = torch.sparse_coo_tensor(at, values, (count, count), check_invariants=True)
        made = made.coalesce()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that torch calls them beta
            return made.to_sparse_csr()

    @cached_property
    def _ahead(self) -> tuple[torch.Tensor, torch.Tensor]:
        # Where each row's words end on a line on which row i has the stretch from i to i + 1.
        columns, values = self.matrix.col_indices(), self.matrix.values().double()
        bounds = self.matrix.crow_indices()
        row = torch.arange(self.rows).repeat_interleave(bounds.diff())
        total = values.cumsum(0)
        before = torch.cat([total.new_zeros(1), total])[bounds[:-1]]
        within = total - before[row]
        ends = (within / within[bounds[1:] - 1][row]).clamp(max=1)
        return columns, row + ends

    def walked(
        self, words: torch.Tensor, mean: torch.Tensor, draw: torch.Generator
    ) -> torch.Tensor:
        """Let words (n,) jump, on the CPU, as often as Poisson numbers of means (n,), float64."""
        columns, ends = self._ahead
        left = torch.poisson(mean, generator=draw).long()
        words = words.clone()
        for _ in range(int(left.max()) if len(left) else 0):
            place = words.double() + torch.rand(len(words), generator=draw, dtype=torch.float64)
            after = columns[torch.searchsorted(ends, place, right=True).clamp(max=len(ends) - 1)]
            words = torch.where(left > 0, after, words)
            left -= 1
        return words

    def spread(self, rows: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        """Multiply rows (n, V), float32, with exp(beta (A - 1)), beta of each row (n,)."""
        weights = [poisson(float(time)) for time in times.tolist()]
        terms = max(map(len, weights), default=1)
        table = torch.tensor([w + [0.0] * (terms - len(w)) for w in weights], device=rows.device)
        matrix = self.matrix.to(rows.device)
        state = rows.T.contiguous()
        total = state * table[:, 0]
        for number in range(1, terms):
            state = matrix @ state
            total.addcmul_(state, table[:, number])
        return total.T


def nearest(embeddings: torch.Tensor, k: int, mask: int, advance: Callable[[int], None]) -> Any:
    """Find the k nearest words of each by the cosine of their rows.

    Args:
        embeddings: Shape (V, hidden).
        k: How many.
        mask: Row that is no word.
        advance: Told how many rows are done.

    Returns:
        Ids, int32, shape (V, k); the mask's row is -1, and near to none.

    Raises:
        DataError: A row has numbers that are not finite, or there are too few words.
    """
    rows = embeddings.float()
    if len(rows) - 1 <= k:
        raise DataError(
            f"{len(rows) - 1} words have no {k} neighbours each",
            hint=f"--set noise.neighbours={max(1, min(10, len(rows) - 2))}",
        )
    if not bool(rows.isfinite().all()):
        raise DataError("the embedding has numbers that are not finite, so nothing is near to it")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = torch.nn.functional.normalize(rows, dim=-1).to(device)
    found = torch.full((len(rows), k), -1, dtype=torch.int32)
    size = max(1, (1 << 26) // len(rows))
    for first in range(0, len(rows), size):
        piece = rows[first : first + size] @ rows.T
        here = torch.arange(len(piece), device=device)
        piece[here, first + here] = -torch.inf
        piece[:, mask : mask + 1] = -torch.inf
        found[first : first + size] = piece.topk(k, -1).indices.int().cpu()
        advance(len(piece))
    found[mask : mask + 1] = -1
    return found.numpy()


def read_walk(folder: Path, rows: int, jumps: float) -> Walk:
    """Read the graph that a conversion has beside its weights.

    Args:
        folder: The conversion.
        rows: Rows of its embedding.
        jumps: What its config says.

    Raises:
        DataError: It is not there, or not what it should be.
    """
    path = folder / NEIGHBOURS_FILE
    hint = "Put back the file that dllm-convert run wrote, or convert the model again"
    if not path.is_file():
        raise DataError(f"{folder} has no {NEIGHBOURS_FILE}, which its noise walks on", hint=hint)
    try:
        near = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is no array of numpy ({error})", hint=hint) from error
    sound = near.dtype == np.int32 and near.ndim == 2 and len(near) == rows and near.shape[1] > 0
    if not (sound and near.min() >= -1 and near.max() < rows):
        raise DataError(
            f"{path} holds {near.dtype} of shape {near.shape}, expected ids, int32, of {rows} rows",
            hint=hint,
        )
    return Walk(torch.from_numpy(near), jumps)


def neighbour_divergence(
    logits: torch.Tensor,
    targets: torch.Tensor,
    noisy: torch.Tensor,
    kept: torch.Tensor,
    mask_token_id: int,
    walk: Walk,
) -> torch.Tensor:
    """KL of q(x_{t-1} | x_t, x_0) from p(x_{t-1} | x_t), as `uniform_divergence` has it.

    With r the row of the step at x_t, q is r times the row of Q_{t-1} at x_0, and p is r times the
    model's prediction multiplied with Q_{t-1}; both normalised (D3PM, section 3.3).

    Args:
        logits: Predictions of the clean tokens, shape (n, vocab).
        targets: Clean tokens x_0, shape (n,).
        noisy: Noisy tokens x_t, shape (n,).
        kept: alpha(t - 1/T) and alpha(t), shape (n, 2), float64.
        mask_token_id: Token that is never predicted and never noise.
        walk: The graph.

    Returns:
        Nats, shape (n,), not multiplied by T.
    """
    function: Any = _NeighbourDivergence
    nats: torch.Tensor = function.apply(logits, targets, noisy, kept, mask_token_id, walk)
    return nats


class _NeighbourDivergence(torch.autograd.Function):
    """The divergence some rows at a time, with its gradient: of each row there are few tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        noisy: torch.Tensor,
        kept: torch.Tensor,
        mask_token_id: int,
        walk: Walk,
    ) -> torch.Tensor:
        nats = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
        gradients = torch.empty_like(logits)
        for rows in row_pieces(logits, cpu=_ENTRIES, other=8 * _ENTRIES):
            part = _Piece(targets[rows], noisy[rows], kept[rows], mask_token_id, walk)
            nats[rows], gradients[rows] = part.compare(logits[rows])
        ctx.save_for_backward(gradients)
        return nats

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        (gradients,) = ctx.saved_tensors
        return gradients * gradient[:, None].to(gradients.dtype), None, None, None, None, None


@dataclass(frozen=True)
class _Piece:
    """Some tokens, and what became of them: as in `neighbour_divergence`."""

    targets: torch.Tensor
    noisy: torch.Tensor
    kept: torch.Tensor
    mask: int
    walk: Walk

    def _through(
        self, rows: torch.Tensor, kept: torch.Tensor, walked: torch.Tensor
    ) -> torch.Tensor:
        """Multiply rows (n, V), zero at the mask, with Q; alpha of each and its share of jumps."""
        keep = kept.float().to(rows.device)[:, None]
        floor = (1 - keep) / (self.walk.rows - 1) * rows.sum(-1, keepdim=True)
        found = keep * self.walk.spread(rows, self.walk.jumps * walked) + floor
        found[:, self.mask] = 0
        return found

    def _at(self, words: torch.Tensor) -> torch.Tensor:
        found = torch.zeros(len(words), self.walk.rows, device=words.device)
        return found.scatter_(-1, words[:, None], 1.0)

    def compare(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return nats (n,) and their gradient by the logits (n, V)."""
        before, now = self.kept.cpu().double().unbind(-1)
        scores = logits.to(torch.float32, copy=True)
        scores[:, self.mask] = -torch.inf
        guess = scores.softmax(-1)
        tiny = torch.finfo(guess.dtype).tiny
        # r, the clean token's row of Q_{t-1}, and the prediction's: (n, V) each.
        step = self._through(self._at(self.noisy), now / before, before - now)
        clean = self._through(self._at(self.targets), before, 1 - before)
        mixed = self._through(guess, before, 1 - before)
        q, p = step * clean, step * mixed
        q_total = q.sum(-1, keepdim=True).clamp(min=tiny)
        p_total = p.sum(-1, keepdim=True).clamp(min=tiny)
        q = q / q_total
        apart = torch.special.xlogy(q, clean.clamp(min=tiny)) - torch.special.xlogy(
            q, mixed.clamp(min=tiny)
        )
        nats = apart.sum(-1) + (p_total / q_total).log().squeeze(-1)
        # By the mixture, and through Q_{t-1}, which is symmetric, by the prediction.
        by_mixed = step / p_total - q / mixed.clamp(min=tiny)
        by_mixed[:, self.mask] = 0
        by_guess = self._through(by_mixed, before, 1 - before)
        by_logits = guess * (by_guess - (guess * by_guess).sum(-1, keepdim=True))
        return nats, by_logits.to(logits.dtype)
