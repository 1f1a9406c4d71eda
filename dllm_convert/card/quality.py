"""What the numbers say of a model's quality, in words: beside the verdict on its correctness."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dllm_convert.card.text import figures
from dllm_convert.common.tables import Table

if TYPE_CHECKING:
    from dllm_convert.card.facts import Facts

SCRATCH = (0.17, 0.33)
"""How far the bounds of block and masked diffusion models that were trained from scratch lie above
the likelihood of an autoregressive model of as many parameters and tokens, in nats per token: the
perplexities of BD3LM (arXiv 2503.09573), 20.7 to 23.0 against 17.5 on OpenWebText and 28.2 to 31.8
against 22.8 on LM1B."""
_HALF = 0.5


@dataclass(frozen=True)
class Quality:
    """A verdict.

    Attributes:
        kind: `good`, `fair`, `poor`, or `open` where nothing is known.
        headline: In a few words.
        sentence: What was measured, and what it is compared with.
    """

    kind: str
    headline: str
    sentence: str


@dataclass(frozen=True)
class Number:
    """A number for the top of a page.

    Attributes:
        what: What it is.
        value: As text; empty where it was not measured.
        unit: Beneath it.
    """

    what: str
    value: str
    unit: str


def numbers(facts: Facts) -> Iterator[Number]:
    """Yield the four numbers that say what came of a conversion; of an encoder three."""
    whats = {"nelbo_before": "NELBO before", "nelbo_after": "NELBO after"}
    if not facts.encoder:
        whats["ar_nll"] = "base, autoregressive"
    for key, what in whats.items():
        found = facts.measure(key)
        yield Number(what, "" if found is None else figures(found.nats, 3), "nats per token")
    written, forwards = (
        sum(sample[name] for sample in facts.samples) for name in ("new_tokens", "forwards")
    )
    spent = figures(written / forwards, 3) if forwards else ""
    where = "in the sample" if len(facts.samples) == 1 else "in the samples"
    yield Number("tokens per forward", spent, where)


def glance_table(facts: Facts) -> Table:
    """The four numbers, one below the other: a phone has room for two columns."""
    rows = tuple(
        (number.what, f"{number.value} {number.unit}" if number.value else "not measured")
        for number in numbers(facts)
    )
    return Table(("at a glance", "measured"), rows)


def quality_of(facts: Facts) -> Quality:
    """Judge what was measured on held-out text."""
    before, after = facts.measure("nelbo_before"), facts.measure("nelbo_after")
    if facts.train is None:
        return Quality(
            "poor", "Not trained yet", "The weights are the base's: it was never taught to denoise."
        )
    if after is None:
        return Quality(
            "open", "Quality not measured", "No likelihood of held-out text is recorded."
        )
    fell = before is not None and after.nats < before.nats
    if before is not None and not fell:
        return Quality(
            "poor",
            "No better than before training",
            f"Its bound on held-out text is {figures(after.nats, 3)} nats per token, and was "
            f"{figures(before.nats, 3)} before.",
        )
    if facts.gap is None:
        start = f" from {figures(before.nats, 3)}" if before is not None else ""
        return Quality(
            "open",
            "Trained; nothing to compare with",
            f"Its bound on held-out text came down{start} to {figures(after.nats, 3)} nats per "
            "token. The base has no likelihood of its own that could stand beside it.",
        )
    return _beside_base(facts, facts.gap, None if before is None else before.nats)


def _beside_base(facts: Facts, gap: float, before: float | None) -> Quality:
    after = facts.measure("nelbo_after")
    base = facts.measure("ar_nll")
    if after is None or base is None or not math.isfinite(gap):
        return Quality("poor", "Far from its base", "Its bound on held-out text is beyond measure.")
    times = f"{figures(math.exp(gap), 3)} times its perplexity" if gap < 20 else "without measure"
    least, most = SCRATCH
    if gap <= 0:
        said = "no higher than the base's own likelihood"
    else:
        said = f"{figures(gap, 3)} nats per token above the base's own likelihood, {times}"
    sentence = f"Its bound on held-out text lies {said}."
    closed = None if before is None else (before - after.nats) / (before - base.nats)
    way = "" if closed is None else f" Training closed {min(closed, 1):.0%} of the distance."
    lossless = (
        " Decoded losslessly it writes the base's own text all the same."
        if facts.keeps_base
        else ""
    )
    if gap <= most:
        known = (
            f" Diffusion models trained from scratch lie {least:g} to {most:g} above "
            "autoregressive ones (arXiv 2503.09573)."
        )
        return Quality("good", "Near its base", f"{sentence}{known}")
    if closed is not None and closed >= _HALF:
        return Quality("fair", "Behind its base", f"{sentence}{way}{lossless}")
    return Quality(
        "poor", "Far from its base", f"{sentence}{way} Expect little of its text.{lossless}"
    )
