"""The text of a planned training: what it holds, and how often the training would read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dllm_convert.errors import HubError, IncompatibleError
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.planning.plan_text import count_text

if TYPE_CHECKING:
    from dllm_convert.training.data.look import TextLook

MOST_EPOCHS = 20
"""Times that a training may read its text unasked. Beyond 4 repeated tokens are worth less than new
ones, beyond 16 next to nothing (Muennighoff et al., arXiv 2305.16264, of autoregressive models)."""


@dataclass(frozen=True)
class TextPlan:
    """A text, and what a training does with it.

    Attributes:
        look: What the text is.
        wanted: Tokens that the training reads, over all processes.
        epochs: How often it reads the whole text; None where nobody knows how large that is.
        limited: Whether a time limit may end it before.
    """

    look: TextLook
    wanted: int
    epochs: float | None
    limited: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for `check --json`."""
        return {**self.look.as_dict(), "wanted": self.wanted, "epochs": self.epochs}

    def line(self) -> str:
        """Say it in one sentence."""
        look = self.look
        what = f"{look.documents:,} document{'s' if look.documents != 1 else ''}"
        if look.chats:
            what += f", {look.chats:,} of them chats" if look.chats < look.documents else ", chats"
        what = what if look.whole else f"the first {what}, of more"
        size = (
            "of unknown size" if look.tokens is None else f"about {count_text(look.tokens)} tokens"
        )
        said = f"{look.source}: {what}, {size}; the training reads {count_text(self.wanted)}"
        if self.epochs is None:
            return said
        times = f"{self.epochs:.2g}" if self.epochs < 10 else f"{self.epochs:,.0f}"
        return f"{said}, {times} time{'s' if self.epochs != 1 else ''} all of it"


def plan_text(plan: ConversionPlan) -> TextPlan | None:
    """Look at the text that a plan trains on; None if it trains on none.

    Args:
        plan: The conversion.

    Raises:
        DataError: There is no such text, or it is something else.
        HubError: A Hub dataset cannot be read.
        IncompatibleError: The training would read it more than `MOST_EPOCHS` times.
    """
    recipe = plan.recipe
    if recipe.training.method == "none":
        return None
    from dllm_convert.training.data.look import look_at

    look = look_at(recipe.data, _counter(plan))
    wanted = plan.training_tokens
    epochs = None
    if look.tokens:
        apart = 0.0 if recipe.data.held_out_source else recipe.data.held_out_fraction
        epochs = float(f"{wanted / (look.tokens * (1 - apart)):.3g}")
    text = TextPlan(look, wanted, epochs, limited=recipe.training.max_minutes is not None)
    if not recipe.data.allow_epochs:
        _refuse_epochs(text, recipe.training.steps)
    return text


def looked_at(plan: ConversionPlan) -> dict[str, Any]:
    """Return what `check` says of the text; a dataset out of reach is said, not refused."""
    try:
        text = plan_text(plan)
    except HubError as error:
        return {"text": {"unread": str(error)}}
    if text is None:
        return {}
    return {"text": {**text.as_dict(), "said": text.line()}}


def _refuse_epochs(text: TextPlan, steps: int) -> None:
    if text.epochs is None or text.epochs <= MOST_EPOCHS or text.limited:
        return
    fewer = math.floor(steps * MOST_EPOCHS / text.epochs)
    shorter = f", or --steps {fewer}" if fewer else ""
    raise IncompatibleError(
        f"{text.line()}; more than {MOST_EPOCHS} times teaches it by heart",
        hint=f"Give more text with --data{shorter}, or --allow-epochs",
    )


def _counter(plan: ConversionPlan) -> Callable[[Sequence[str]], Sequence[int]] | None:
    """Return what counts tokens as the source does, where reading one file is enough for it."""
    path = plan.source.path
    file = None if path is None else path / "tokenizer.json"
    if file is None or not file.is_file():
        return None
    from dllm_convert.source.tokenizer_loading import TokenizerErrors

    with TokenizerErrors("tokenizer.json cannot be read"):
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(file))

    def count(texts: Sequence[str]) -> Sequence[int]:
        return [len(found.ids) for found in tokenizer.encode_batch_fast(list(texts))]

    return count
