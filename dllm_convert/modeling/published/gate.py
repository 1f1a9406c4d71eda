"""Which tokens of the forward that is running are noisy, as layers of a gated model are told."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import torch


@dataclass(frozen=True)
class _Seen:
    """What the layers are told of a forward.

    Attributes:
        noisy: Where the adapter acts, shape (batch, length, 1), bool; None for nowhere.
        everywhere: Whether that is everywhere.
        first: Column from which on it is everywhere, in all rows, and nowhere before; None where
            that is not so, or not known.
        masked: Where the mask vector stands, shape (batch, length, 1), bool; None for nowhere.
    """

    noisy: torch.Tensor | None = None
    everywhere: bool = False
    first: int | None = None
    masked: torch.Tensor | None = None


_SEEN: ContextVar[_Seen] = ContextVar("dllm_noisy")
"""Of the forward that runs in this thread; a server has several run one model."""
_NOTHING = _Seen()


class Gate:
    """Which tokens of the forward that is running are noisy.

    Args:
        mask_token_id: The mask.
        rows: Rows of the base's embedding, which need not have one for the mask.
    """

    def __init__(self, mask_token_id: int, rows: int) -> None:
        self.mask_token_id, self.rows = mask_token_id, rows

    @property
    def seen(self) -> _Seen:
        """What the layers are told."""
        return _SEEN.get(_NOTHING)

    @contextmanager
    def at(
        self, tokens: torch.Tensor | None, noisy: torch.Tensor | None
    ) -> Iterator[torch.Tensor | None]:
        """Tell the layers of a forward while the block runs.

        Args:
            tokens: Token ids, shape (batch, length); None if embeddings are given.
            noisy: Where tokens are noisy, of the same shape, bool; None for nowhere.

        Yields:
            Ids that all have a row, shape (batch, length).
        """
        seen = _Seen()
        if noisy is not None:
            # Looking on a device would have the host wait for it.
            first = _begins(noisy) if noisy.device.type == "cpu" else None
            seen = _Seen(noisy[..., None], first == 0, first)
        if tokens is not None and self.mask_token_id >= self.rows:
            masked = tokens == self.mask_token_id
            # Where nothing is noisy a mask is what nobody reads: a column that is written over.
            tokens, seen = tokens.masked_fill(masked, 0), replace(seen, masked=masked[..., None])
        elif tokens is not None and noisy is not None:
            seen = replace(seen, masked=((tokens == self.mask_token_id) & noisy)[..., None])
        with _told(seen):
            yield tokens

    def again(self) -> Any:
        """A context in which layers are computed a second time as they are computed now."""
        return _told(self.seen)


def _begins(noisy: torch.Tensor) -> int | None:
    """The column (of batch, length) from which on all is noisy and nothing before; else None."""
    first = int((~noisy[0]).sum()) if len(noisy) else 0
    level = bool(noisy[:, first:].all()) and not bool(noisy[:, :first].any())
    return first if level else None


@contextmanager
def _told(seen: _Seen) -> Iterator[None]:
    token = _SEEN.set(seen)
    try:
        yield
    finally:
        _SEEN.reset(token)


def spread(noisy: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Where an output is of noisy tokens, of a shape that broadcasts with it.

    Args:
        noisy: Shape (batch, length, 1), bool.
        output: Of tokens in their order: (batch, length, ...), or with the first two in one.
    """
    noisy = noisy.to(output.device)  # layers may be on several devices
    rows, length = noisy.shape[:2]
    # Of two dimensions the second is features, even where there are as many of them as tokens.
    if output.dim() > 2 and output.shape[1] == length and rows in (1, output.shape[0]):
        return noisy.view(rows, length, *(1,) * (output.dim() - 2))
    if rows * length != output.shape[:-1].numel():
        noisy = noisy.expand(output.shape[:-1].numel() // length, -1, -1)
    return noisy.reshape(*output.shape[:-1], 1)
