"""The text of a planned training: what it holds, and how often the training would read it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from dllm_convert.common.quantities import count_text
from dllm_convert.errors import DataError, HubError, IncompatibleError
from dllm_convert.planning.conversion import ConversionPlan
from dllm_convert.recipe.budget import MOST_EPOCHS

if TYPE_CHECKING:
    from dllm_convert.recipe.schema import Data, Recipe
    from dllm_convert.training.data.look import TextLook

Counter = Callable[[Sequence[str]], Sequence[int]]
"""Counts the tokens of texts."""


@dataclass(frozen=True)
class TextPlan:
    """A text, and what a training does with it.

    Attributes:
        look: What the text is.
        wanted: Tokens that the training reads, over all processes.
        epochs: How often it reads the whole text; None where nobody knows how large that is.
        ends: Whether it ends once all of the text was read as often as it may be, which trainings
            with a time limit do.
    """

    look: TextLook
    wanted: int
    epochs: float | None
    ends: bool

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for `check --json`."""
        known = {**self.look.as_dict(), "wanted": self.wanted, "epochs": self.epochs}
        return {**known, "said": self.line()}

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
        said = f"{said}, {times} time{'s' if self.epochs != 1 else ''} all of it"
        if self.ends and self.epochs > MOST_EPOCHS:
            return f"{said}, if there is time; it ends after {MOST_EPOCHS} times"
        return said


@dataclass(frozen=True)
class WrittenPlan:
    """Text that the base writes before a training, and what that costs.

    Attributes:
        asked: The text that prompts are taken from.
        prompts: Prompts that it is known to have, at most as many as are asked for.
        new_tokens: Tokens that the base writes, at most.
        forwards: Forwards of the base, at most.
        batch_size: Prompts in each of them.
        text: What is trained on, as if every text were as long as it may be.
    """

    asked: TextLook
    prompts: int
    new_tokens: int
    forwards: int
    batch_size: int
    text: TextPlan

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for `check --json`."""
        known = {**self.asked.as_dict(), "wanted": self.text.wanted, "epochs": self.text.epochs}
        names = ("prompts", "new_tokens", "forwards", "batch_size")
        written = {name: getattr(self, name) for name in names}
        return {**known, "written_with_base": written, "said": self.line()}

    def line(self) -> str:
        """Say it in one sentence."""
        rows = f"rows of {self.batch_size}" if self.batch_size > 1 else "single rows"
        epochs = self.text.epochs or 0.0
        return (
            f"{self.asked.source}: the base answers {self.prompts:,} prompts of it before the "
            f"training, at most {count_text(self.new_tokens)} tokens in {self.forwards:,} forwards "
            f"of {rows}; the training reads {count_text(self.text.wanted)}, at least {epochs:.2g} "
            "times all of it"
        )


@dataclass(frozen=True)
class MixturePlan:
    """Texts that are mixed, and what a training does with each.

    Attributes:
        source: The mixture, as it was named.
        shares: Part of the sequences that are of each text.
        texts: What each of them is.
    """

    source: str
    shares: tuple[float, ...]
    texts: tuple[TextPlan, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for `check --json`."""
        each = [
            {"share": share, **text.as_dict(), "said": f"{share:.1%} {text.line()}"}
            for share, text in zip(self.shares, self.texts, strict=True)
        ]
        return {
            "source": self.source,
            "kind": "mixture",
            "wanted": sum(text.wanted for text in self.texts),
            "texts": each,
            "said": self.line(),
        }

    def line(self) -> str:
        """Say it, a line for each text."""
        each = zip(self.shares, self.texts, strict=True)
        return "\n".join(f"{share:.1%} {text.line()}" for share, text in each)


def plan_text(plan: ConversionPlan) -> TextPlan | MixturePlan | WrittenPlan | None:
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
    tokens, count = plan.training_tokens, _counter(plan)
    if recipe.data.write_with_base.prompts:
        return _written(recipe, _planned(recipe, recipe.data, tokens, count))
    texts = [_planned(recipe, data, math.ceil(tokens * share), count) for share, data in
             recipe.data.texts]  # fmt: skip
    for text, (_, data) in zip(texts, recipe.data.texts, strict=True):
        if count is not None:
            _refuse_scraps(recipe, data, text.look)
        if not recipe.data.allow_epochs:
            _refuse_epochs(text, recipe.training.steps)
    if not recipe.data.mixture:
        return texts[0]
    shares = tuple(float(share) for share, _ in recipe.data.texts)
    return MixturePlan(recipe.data.source, shares, tuple(texts))


def _planned(recipe: Recipe, data: Data, wanted: int, count: Counter | None) -> TextPlan:
    """Look at one text of which so many tokens are read."""
    from dllm_convert.training.data.look import look_at

    look = look_at(data, count)
    epochs = None
    if look.tokens:
        apart = 0.0 if data.held_out_source else data.held_out_fraction
        epochs = float(f"{wanted / (look.tokens * (1 - apart)):.3g}")
    limited = recipe.training.max_minutes is not None and not recipe.data.allow_epochs
    # Of a stream nobody knows when all of it was read.
    return TextPlan(look, wanted, epochs, ends=limited and data.streaming != "on")


def _refuse_scraps(recipe: Recipe, data: Data, look: TextLook) -> None:
    """Refuse a text that cannot be divided into a block to train on and one to measure on.

    Raises:
        DataError: It is shorter than both.
    """
    smallest = max(recipe.block_size or 2, 2)
    needed = smallest if data.held_out_source else 2 * smallest
    filled = data.fill_blocks == "on" or (data.fill_blocks == "auto" and look.chats)
    if not look.whole or look.tokens is None or filled or data.supervise_padding:
        return
    # A token more at either end of a document, where a tokenizer marks those.
    if look.tokens + 2 * look.documents >= needed:
        return
    raise DataError(
        f"--data {data.source} has {look.tokens} tokens, expected at least {needed}: a block of "
        f"{smallest} to train on" + ("" if data.held_out_source else " and one to measure on"),
        hint="Give more text" + (", or a smaller --block" if recipe.block_size else ""),
    )


def _written(recipe: Recipe, found: TextPlan) -> WrittenPlan:
    """Say what writing costs, from a look at the text that prompts are taken from.

    Raises:
        IncompatibleError: The training would read what is written more than `MOST_EPOCHS` times.
    """
    asked, look = recipe.data.write_with_base, found.look
    prompts = asked.prompts
    if look.whole:
        kept = round(look.documents * (1 - recipe.data.held_out_fraction))
        prompts = max(1, min(prompts, kept))
    new = prompts * asked.max_new_tokens
    begun = 0 if look.chats else prompts * asked.prompt_tokens
    written = replace(look, source=f"what the base writes from {look.source}", tokens=new + begun)
    text = replace(found, look=written, epochs=float(f"{found.wanted / (new + begun):.3g}"))
    if not recipe.data.allow_epochs:
        _refuse_epochs(text, recipe.training.steps)
    forwards = -(-prompts // asked.batch_size) * asked.max_new_tokens
    return WrittenPlan(look, prompts, new, forwards, asked.batch_size, text)


def looked_at(plan: ConversionPlan) -> dict[str, Any]:
    """Return what `check` says of the text; a dataset out of reach is said, not refused."""
    try:
        text = plan_text(plan)
    except HubError as error:
        return {"text": {"unread": str(error)}}
    if text is None:
        return {}
    return {"text": text.as_dict()}


def _refuse_epochs(text: TextPlan, steps: int) -> None:
    if text.epochs is None or text.epochs <= MOST_EPOCHS or text.ends:
        return
    fewer = math.floor(steps * MOST_EPOCHS / text.epochs)
    shorter = f", or --steps {fewer}" if fewer else ""
    raise IncompatibleError(
        f"{text.line()}; more than {MOST_EPOCHS} times teaches it by heart",
        hint=f"Give more text with --data{shorter}, or --allow-epochs",
    )


def _counter(plan: ConversionPlan) -> Counter | None:
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
