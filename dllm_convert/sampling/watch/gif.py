"""A film as an animated GIF: the same lines in every frame, so that nothing moves but the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from rich.cells import cell_len

from dllm_convert.common.colours import BLUE, GREY, VERMILION
from dllm_convert.sampling.watch.cells import UNVERIFIED, Cell, State, caption, cells_of, count_new
from dllm_convert.sampling.watch.frames import Film
from dllm_convert.sampling.watch.layout import Line, Segment, wrap
from dllm_convert.sampling.watch.pieces import TokenText

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw
    from PIL.ImageFont import FreeTypeFont

MOST_FRAMES = 120
MOST_BYTES = 1_000_000
COLUMNS = 64
MOST_LINES = 20

_FONT_SIZE = 20
_COLUMN = 12
"""Pixels a character of DejaVu Sans Mono takes at this size."""
_LINE_HEIGHT = 28
_MARGIN = 24
_FOOTER = 44
_SMALL = 15

_PAPER, _INK = "#ffffff", "#1a1a1a"
_BOX, _LATER = "#c8c8c8", "#ececec"
# Lighter with age; the newest is bold as well, for whoever cannot tell the tints.
_TINTS = ("#f5a35c", "#fbd0a8", "#fdeadb")
_HELD = "#8fd8c0"
"""Of what was drafted and is what the verifier writes, when it is written."""
_STEPS = 7
"""Colours between a ground and an ink, which smooth letters need."""

_ALL_MS, _LEAST_MS, _MOST_MS = 9000, 60, 400
_FIRST_MS, _LAST_MS = 900, 4000


def render_gif(film: Film, text: TokenText) -> bytes:
    """Draw a film, in at most `MOST_FRAMES` frames and with fewer ones below `MOST_BYTES` bytes.

    Args:
        film: What was recorded.
        text: Texts of tokens.

    Returns:
        The file. The same film gives the same bytes.
    """
    most = MOST_FRAMES
    while True:
        shown = film.thinned(most)
        data = _encoded(draw_frames(shown, text))
        if len(data) < MOST_BYTES or most <= 2:
            return data
        most = max(int(0.9 * len(shown.frames) * MOST_BYTES / len(data)), 2)


def draw_frames(film: Film, text: TokenText) -> list[Image]:
    """Draw every frame of a film, all of one size.

    Args:
        film: What was recorded.
        text: Texts of tokens.
    """
    frames = [cells_of(film, f, number, text) for number, f in enumerate(film.frames)]
    final = frames[-1]
    longest = max(len(cells) for cells in frames)
    # Positions behind the end have no final text; before the end is known they are masks there.
    texts = [cell.text for cell in final] + [" _", *["_"] * longest][: longest - len(final)]
    drafts = any(frame.drafts for frame in film.frames)
    stage = Stage(wrap(texts, COLUMNS), tuple(texts), drafts)
    return [
        stage.draw(cells, caption(film, frame), *count_new(film, frame))
        for cells, frame in zip(frames, film.frames, strict=True)
    ]


@dataclass(frozen=True)
class Stage:
    """Where everything stands.

    Attributes:
        lines: Lines of the final text.
        texts: Final text of each cell.
        drafts: Whether anything was drafted.
    """

    lines: tuple[Line, ...]
    texts: tuple[str, ...]
    drafts: bool = False

    @property
    def _height(self) -> int:
        return min(len(self.lines), MOST_LINES)

    def draw(self, cells: Sequence[Cell], words: str, done: int, total: int) -> Image:
        """Draw one frame.

        Args:
            cells: Its cells.
            words: What to say beneath.
            done: New tokens written.
            total: New tokens there will be.
        """
        from PIL import Image, ImageDraw

        width = COLUMNS * _COLUMN + 2 * _MARGIN
        height = self._height * _LINE_HEIGHT + 2 * _MARGIN + _FOOTER
        image = Image.new("RGB", (width, height), _PAPER)
        pen = ImageDraw.Draw(image)
        first = self._first_line(cells)
        for row, line in enumerate(self.lines[first : first + self._height]):
            for segment in line:
                if segment.cell < len(cells):
                    top = _MARGIN + row * _LINE_HEIGHT
                    self._segment(pen, segment, cells[segment.cell], top)
        _footer(pen, (width, height), words, done / max(total, 1), drafts=self.drafts)
        pen.rectangle((0, 0, width - 1, height - 1), outline=_BOX)
        return image

    def _first_line(self, cells: Sequence[Cell]) -> int:
        """Return the first line in view: a text longer than the picture scrolls."""
        masked = [number for number, cell in enumerate(cells) if cell.state is State.MASKED]
        busy = masked[0] if masked else len(cells)
        line = next((n for n, line in enumerate(self.lines) if line[-1].cell >= busy), None)
        last = len(self.lines) - self._height
        return last if line is None else min(max(line - self._height // 2, 0), last)

    def _segment(self, pen: ImageDraw, segment: Segment, cell: Cell, top: int) -> None:
        left = _MARGIN + segment.column * _COLUMN
        right = left + segment.width * _COLUMN
        # Boxes leave the space in front of a word free, and look like words themselves.
        blank = not self.texts[segment.cell].strip(" ")
        space = 0 if blank else len(segment.text) - len(segment.text.lstrip(" "))
        boxed = segment.width > space
        box = (left + space * _COLUMN + 1, top + 2, right - 2, top + _LINE_HEIGHT - 4)
        if cell.state in (State.MASKED, State.WAITING):
            if boxed:
                fill = _BOX if cell.state is State.MASKED else _LATER
                pen.rounded_rectangle(box, 4, fill=fill)
            return
        newest = cell.state is State.WRITTEN and cell.age == 0
        if cell.state in UNVERIFIED:
            self._unverified(pen, segment, cell, box)
            return
        if cell.held and boxed:
            pen.rounded_rectangle(box, 4, fill=_HELD)
        elif cell.state is State.WRITTEN and cell.age < len(_TINTS) and boxed:
            pen.rounded_rectangle(box, 4, fill=_TINTS[cell.age])
        same = cell.text == self.texts[segment.cell]
        shown = segment.text if same else _fitted(cell.text, segment.width)
        colour = BLUE if cell.state is State.PROMPT else _INK
        _write(pen, left, top, shown, colour, bold=newest)

    def _unverified(
        self, pen: ImageDraw, segment: Segment, cell: Cell, box: tuple[int, int, int, int]
    ) -> None:
        """Write a draft in the room of what stands there in the end: framed, or struck out."""
        left, top = _MARGIN + segment.column * _COLUMN, box[1] - 2
        _write(pen, left, top, _fitted(cell.text, segment.width), GREY, bold=False)
        if box[2] <= box[0]:
            return
        if cell.state is State.DRAFTED:
            pen.rounded_rectangle(box, 4, outline=_BOX)
        else:
            middle = (box[1] + box[3]) // 2
            pen.line((box[0], middle, box[2], middle), fill=GREY, width=2)


def _fitted(text: str, columns: int) -> str:
    """Cut a text that is replaced later to the room of the final one."""
    line = text.replace("\n", "")
    return line if cell_len(line) <= columns else line[: max(columns - 1, 0)] + "…"[:columns]


def _write(pen: ImageDraw, left: int, top: int, text: str, colour: str, *, bold: bool) -> None:
    if text.isascii():
        pen.text((left, top + 1), text, fill=colour, font=font_for("a", bold=bold))
        return
    for segment in (segment for line in wrap([text], cell_len(text) + 2) for segment in line):
        column = segment.column
        for char in _clusters(segment.text):
            width = cell_len(char[0])
            face = font_for(char[0], bold=bold)
            wide = face.getlength(char) / max(width * _COLUMN, 1)
            if wide > 1:
                face = font_for(char[0], bold=bold, size=int(_FONT_SIZE / wide))
            pen.text((left + column * _COLUMN, top + 1), char, fill=colour, font=face)
            column += width


def _clusters(text: str) -> list[str]:
    found: list[str] = []
    for char in text:
        if found and cell_len(char) == 0:
            found[-1] += char
        else:
            found.append(char)
    return found


def _footer(
    pen: ImageDraw, size: tuple[int, int], words: str, share: float, *, drafts: bool
) -> None:
    width, height = size
    top = height - _FOOTER - _MARGIN // 2
    left, right = _MARGIN, width - _MARGIN
    pen.rectangle((left, top, right, top + 3), fill=_LATER)
    if share > 0:
        pen.rectangle((left, top, left + round((right - left) * share), top + 3), fill=VERMILION)
    small = font_for("a", size=_SMALL)
    line = top + 14
    pen.text((left, line), words, fill=GREY, font=small)
    new = ("just written", _TINTS[0])
    # What is said of drafts takes room, too.
    legend = (new, ("draft held", _HELD)) if drafts else (("not written", _BOX), new)
    for label, fill in legend:
        right -= round(pen.textlength(label, font=small))
        pen.text((right, line), label, fill=GREY, font=small)
        right -= 22
        pen.rounded_rectangle((right, line + 1, right + 15, line + 16), 3, fill=fill)
        right -= 22


def _encoded(images: Sequence[Image]) -> bytes:
    from PIL import Image

    palette = _palette()
    paletted = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    between = len(paletted) - 2
    each = min(max(_ALL_MS // max(between, 1), _LEAST_MS), _MOST_MS)
    durations = [_FIRST_MS, *[each] * between, _LAST_MS][-len(paletted) :]
    out = BytesIO()
    paletted[0].save(
        out,
        format="GIF",
        save_all=True,
        append_images=paletted[1:],
        duration=durations,
        loop=0,
        disposal=1,
    )
    return out.getvalue()


@cache
def _palette() -> Image:
    """Return the colours there are: each ground, and steps from it to each ink used on it."""
    from PIL import Image, ImageColor

    pairs = [(_PAPER, ink) for ink in (_INK, BLUE, GREY, VERMILION)]
    pairs += [(tint, _INK) for tint in (*_TINTS, _HELD)]
    channels = [level for box in (_BOX, _LATER) for level in ImageColor.getrgb(box)[:3]]
    for ground, ink in pairs:
        low, high = ImageColor.getrgb(ground)[:3], ImageColor.getrgb(ink)[:3]
        for step in range(_STEPS):
            share = step / (_STEPS - 1)
            channels += [round(a + (b - a) * share) for a, b in zip(low, high, strict=True)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(channels)
    return palette


@cache
def font_for(char: str, *, bold: bool = False, size: int = _FONT_SIZE) -> FreeTypeFont:
    """Return a font that has a character: DejaVu, which matplotlib brings, or one of this machine.

    Args:
        char: The character.
        bold: Whether the text is bold.
        size: Pixels.
    """
    from PIL import ImageFont

    mono = "DejaVuSansMono-Bold.ttf" if bold else "DejaVuSansMono.ttf"
    for path in (_bundled(mono), _bundled("DejaVuSans.ttf")):
        if ord(char) in _characters(path):
            return ImageFont.truetype(path, size)
    found = next((p for p in _installed() if ord(char) in _characters(p)), _bundled(mono))
    return ImageFont.truetype(found, size)


def _bundled(name: str) -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@cache
def _installed() -> tuple[str, ...]:
    """Return the outline fonts of this machine; coloured ones cannot be drawn at any size."""
    from matplotlib.font_manager import fontManager

    unfit = ("Emoji", "Last Resort")
    paths = {e.fname for e in fontManager.ttflist if not any(part in e.name for part in unfit)}
    return tuple(sorted(paths))


@cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())
