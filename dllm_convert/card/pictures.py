"""Pictures of a run for its card and its report, drawn from what the manifest holds."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dllm_convert.verification.observe.observations import Observations

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A picture the card shows where its file lies in the folder.

    Attributes:
        file: Its name.
        chart: Function of `charts` that draws it.
        section: Where the card shows it: attention, training, measures or sample.
        title: A few words.
        alt: What it shows, for those who cannot see it.
        caption: A sentence beneath it.
    """

    file: str
    chart: str
    section: str
    title: str
    alt: str
    caption: str


ATTENTION = Picture(
    "attention.png",
    "attention_figure",
    "attention",
    "Attention: who sees whom",
    "Heat-maps of how far the prediction at each position moves when one token is changed: a lower "
    "triangle where attention is causal, a full square where it is bidirectional, a staircase of "
    "squares where it is open inside blocks",
    "One token is changed at a time, and the logits at every position are watched: dark pairs do "
    "not move at all, bright ones do. What lies above the diagonal looks ahead.",
)
LOSS = Picture(
    "loss.png",
    "loss_figure",
    "training",
    "Training",
    "Line chart of the training loss and of the training NELBO, in nats per token, over optimizer "
    "steps",
    "Training loss and NELBO per logged step, thin, and their running median, thick; crosses are "
    "the NELBO on held-out text before and after.",
)
RATES = Picture(
    "mask_rates.png",
    "rates_figure",
    "measures",
    "Held-out loss at each mask rate",
    "Line chart of the nats per masked token on held-out text over the share of the tokens that "
    "are masked, before and after training",
    "The same tokens are masked before and after; bars are one standard error over sequences. The "
    "mean of a curve over all rates is the NELBO.",
)
DECODING = Picture(
    "decoding.png",
    "decoding_figure",
    "sample",
    "Faster decoding, and what it changes",
    "Chart of the share of tokens that agree with decoding one token per forward, over tokens per "
    "forward, one point per confidence threshold",
    "Numbers are confidence thresholds: the lower, the more tokens become final at once. The cross "
    "is one token per forward, which the others are compared with; forwards that read the prompt "
    "count.",
)
PICTURES = (ATTENTION, LOSS, RATES, DECODING)
DENOISING = Picture(
    "sample.gif",
    "",
    "sample",
    "The sample while it was denoised",
    "Animation of a sample: grey boxes stand for masked tokens and turn into text, one "
    "forward pass after the other, with the newest tokens highlighted",
    "A sample while it was denoised; grey is not written yet, orange was written last.",
)
"""Recorded while the sample is decoded; the others are drawn from what was measured."""


def draw_all(measurements: Mapping[str, Any], folder: Path) -> list[str]:
    """Draw every picture of which something was measured, as PNG.

    Args:
        measurements: Section of the manifest.
        folder: Where the files are written.

    Returns:
        Names of the files that were written.
    """
    return [picture.file for picture in PICTURES if draw(picture, measurements, folder)]


def draw(picture: Picture, measurements: Mapping[str, Any], folder: Path) -> bool:
    """Draw one picture into `folder`; return whether there was anything to draw."""
    figure = _figure(picture, Observations.from_measurements(measurements))
    if figure is None:
        return False
    # Without a date or a version inside, the same run gives the same file.
    figure.savefig(folder / picture.file, transparent=True, metadata={"Software": None})
    return True


def draw_svg(picture: Picture, seen: Observations) -> str | None:
    """Return a picture as SVG to stand inside a page, in the page's colour and font.

    Text stays text, so that it can be read aloud, found and copied.

    Args:
        picture: What to draw.
        seen: What was measured.

    Returns:
        An `svg` element; None if there is nothing to draw.
    """
    figure = _figure(picture, seen)
    return None if figure is None else as_svg(figure, picture)


def as_svg(figure: Figure, picture: Picture) -> str:
    """Return a figure as an `svg` element to stand inside a page, in the page's colour and font.

    Args:
        figure: The drawing.
        picture: What it shows.
    """
    import matplotlib

    from dllm_convert.common.colours import GREY

    sheet = io.StringIO()
    # The salt keeps the ids of several pictures on one page apart, and the same for the same run.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": picture.file}
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(settings):
        figure.savefig(sheet, format="svg", transparent=True, metadata=nothing)
    text = sheet.getvalue()
    element = text[text.index("<svg") :].replace(GREY, "currentColor")
    element = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", element)
    element = element.replace("*{stroke", "svg *{stroke")
    box = re.search(r'viewBox="[^"]*"', element)
    start = f'<svg role="img" aria-label="{picture.alt}" {box[0] if box else ""}>'
    body = element[element.index(">") + 1 :].strip()
    return start + _own_ids(body, picture.file.partition(".")[0])


def _own_ids(element: str, name: str) -> str:
    """Make ids unique on the page: matplotlib numbers groups alike in every figure."""
    element = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', element)
    return re.sub(r'(url\(|href=")#', rf"\1#{name}-", element)


def _figure(picture: Picture, seen: Observations) -> Figure | None:
    from dllm_convert.card import charts

    figure: Figure | None = getattr(charts, picture.chart)(seen)
    return figure
