"""What engines do not rule out: that the mask, or a row that is no token, is predicted.

Ours sets the mask's logit to minus infinity, in training as in decoding, so that nothing ever
taught it to be small; engines take a plain softmax over all rows of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dllm_convert.errors import IncompatibleError

MASK_BOUND = 1e-3
"""Mean probability of the mask above which an export is refused: about one in a thousand positions
would stay masked, and engines write the mask then."""
ROWS_BOUND = 1e-2
"""Mean probability of all rows past the tokenizer: thresholds of confidence shift by as much."""
_SHARES = (0.3, 0.7, 1.0)
_FAR = 80.0
"""Nats that a row which must not be predicted stands below 0, where it stands highest."""
_LEANING = 0.05
"""How far along their mean all hidden states have to reach, as a share of how far it does."""


@dataclass(frozen=True)
class Dangers:
    """Probabilities at masked positions of held-out text, means.

    Attributes:
        mask: Of the mask itself.
        mask_wins: Share of positions at which the mask is the likeliest token.
        spare_rows: Of all rows past the tokenizer, those the export adds included.
        positions: Positions that were looked at.
        closed: Row of a head whose logit is far below all others at each of them, float32; None
            if there is none that is.
    """

    mask: float
    mask_wins: float
    spare_rows: float
    positions: int
    closed: Any = field(default=None, repr=False, compare=False)

    @property
    def sound(self) -> bool:
        """Whether an engine can be left to it."""
        return self.mask <= MASK_BOUND and self.spare_rows <= ROWS_BOUND

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, but for the row."""
        kept = ("mask", "mask_wins", "spare_rows", "positions")
        return {name: getattr(self, name) for name in kept}


def measure(
    folder: Path, texts: Sequence[str], *, tokens: int, rows: int, device: str | None = None
) -> Dangers:
    """Mask held-out text by 30, 70 and 100 percent, and read all of the softmax.

    Args:
        folder: The converted checkpoint.
        texts: Held-out text.
        tokens: Ids that the tokenizer has.
        rows: Rows of the export's vocabulary; added ones are zeros, whose logit is 0.
        device: Where to compute; None: a GPU if there is one.
    """
    import torch

    from dllm_convert.modeling.loading import load_checkpoint

    loaded = load_checkpoint(folder, device=device, dtype="float32")
    model, mask = loaded.model, int(loaded.config["mask_token_id"])
    # Behind a causal context clean tokens predict, too: the next one.
    everywhere = loaded.config["diffusion"].get("context") == "causal"
    draw = torch.Generator().manual_seed(0)
    total = wins = spare = 0.0
    count, states = 0, []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([loaded.tokenizer(text)["input_ids"][:256]])
            if ids.shape[1] < 2:
                continue
            for share in _SHARES:
                masked = torch.rand(ids.shape, generator=draw) < share
                if not masked.any():
                    continue
                noisy = ids.masked_fill(masked, mask).to(model.device)
                output = model(input_ids=noisy, use_cache=False, output_hidden_states=True)
                at = (masked | everywhere).to(model.device)
                logits = output.logits[at]
                states.append(output.hidden_states[-1][at].float().cpu())
                # Rows that the export adds to a tied head are zeros: each has logit 0.
                added = max(0, rows - logits.shape[1])
                alone = logits.float().logsumexp(-1)
                extra = torch.full_like(alone, float(added)).log()
                every = torch.logaddexp(alone, extra)
                spread = (logits.float() - every[:, None]).exp()
                total += float(spread[:, mask].sum())
                wins += float((logits.argmax(-1) == mask).sum())
                beyond = [row for row in range(tokens, logits.shape[1]) if row != mask]
                spare += float(spread[:, beyond].sum() + (extra - every).exp().sum())
                count += len(logits)
    if not count:
        raise IncompatibleError(
            "there is no text to measure the mask's probability on",
            hint="Give some with --data FILE",
        )
    return Dangers(total / count, wins / count, spare / count, count, _closed(torch.cat(states)))


def _closed(states: Any) -> Any:
    """Return a row whose product with every hidden state, (n, width), is far below 0.

    Hidden states behind a final norm lean to one side: against their mean. None if some do not.
    """
    mean = states.mean(0)
    along = states @ mean
    if float(along.min()) < _LEANING * float(along.mean()):
        return None
    return mean * (-_FAR / along.min())


def check(found: Dangers, *, repaired: bool, tied: bool) -> Mapping[str, str]:
    """Refuse what an engine would write wrong; return what to say of the rest.

    Args:
        found: What was measured.
        repaired: Whether the head is written anew, so that neither can be predicted.
        tied: Whether the head is the embedding.

    Raises:
        IncompatibleError: A probability is above its bound.
    """
    if repaired:
        return {
            "mask": f"{found.mask:.2g} in the conversion, shut out of the head here",
            "rows past the tokenizer": f"{found.spare_rows:.2g} with zeros, shut out here",
        }
    for what, value, bound in (
        ("the mask itself", found.mask, MASK_BOUND),
        ("rows past the tokenizer", found.spare_rows, ROWS_BOUND),
    ):
        if value > bound:
            why = (
                "its head is tied to the embedding"
                if tied
                else "its hidden states point everywhere, so that no row of the head is always shut"
            )
            raise IncompatibleError(
                f"the model gives {what} a probability of {value:.2g}, expected at most {bound:g}: "
                f"engines do not rule it out, and {why}",
                hint="Train longer: a trained model gives them next to nothing",
            )
    return {
        "mask": f"{found.mask:.2g} (bound {MASK_BOUND:g})",
        "rows past the tokenizer": f"{found.spare_rows:.2g} (bound {ROWS_BOUND:g})",
    }
