"""What an evaluation took: tokens, forwards, draws, seconds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Effort:
    """What an evaluation took so far.

    Attributes:
        new_tokens: Tokens written.
        forwards: Forward passes that wrote them, of whole batches.
        row_forwards: The same counted per row of a batch.
        writing_seconds: Time spent on them.
        draws: Draws of noise for likelihoods.
        most_draws: What they would have been without stopping early.
        scoring_seconds: Time spent on them.
    """

    new_tokens: int = 0
    forwards: int = 0
    row_forwards: int = 0
    writing_seconds: float = 0.0
    draws: int = 0
    most_draws: int = 0
    scoring_seconds: float = 0.0

    def __add__(self, other: Effort) -> Effort:
        """Return what both took together."""
        return Effort(
            *(
                one + more
                for one, more in zip(vars(self).values(), vars(other).values(), strict=True)
            )
        )

    def as_dict(self) -> dict[str, float | int | None]:
        """Return the counts with the ratios people read."""
        return {
            **{name: round(value, 3) for name, value in vars(self).items()},
            "tokens_per_forward": _ratio(self.new_tokens, self.row_forwards),
            "tokens_per_second": _ratio(self.new_tokens, self.writing_seconds),
            "draws_saved": None if not self.most_draws else 1 - self.draws / self.most_draws,
        }


def _ratio(what: float, per: float) -> float | None:
    return round(what / per, 3) if per else None
