"""What stood on the canvas after every forward, as values: an observer in, a film out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm_convert.modeling.published.options import Progress

GIVEN = 0
UNWRITTEN = -1


@dataclass(frozen=True)
class Frame:
    """One row after a forward.

    Attributes:
        forward: Forwards run so far.
        tokens: Prompt and new tokens, the mask token where nothing is written yet.
        written: For each position the number of the frame that wrote it: 0 if it was given, -1 if
            nothing is written yet.
    """

    forward: int
    tokens: tuple[int, ...]
    written: tuple[int, ...]

    def remaining(self) -> int:
        """Count the positions that are still masked."""
        return self.written.count(UNWRITTEN)


@dataclass(frozen=True)
class Film:
    """Every frame of one row, the canvas as it was given first.

    Attributes:
        prompt_length: Tokens of the prompt.
        frames: At least one.
        end_ids: Tokens that end a text.
        block_size: Tokens per block, None if the text is denoised as a whole.
    """

    prompt_length: int
    frames: tuple[Frame, ...]
    end_ids: frozenset[int] = frozenset()
    block_size: int | None = None

    def end(self, frame: Frame) -> int:
        """Return where the text of a frame ends: behind its first new end-of-text token."""
        for position in range(self.prompt_length, len(frame.tokens)):
            known = frame.written[position] != UNWRITTEN
            if known and frame.tokens[position] in self.end_ids:
                return position + 1
        return len(frame.tokens)

    def working(self, frame: Frame) -> int:
        """Return where the positions end that the next forward may write."""
        if self.block_size is None or UNWRITTEN not in frame.written:
            return len(frame.tokens)
        first = frame.written.index(UNWRITTEN)
        return (first // self.block_size + 1) * self.block_size

    def thinned(self, most: int) -> Film:
        """Leave out frames evenly, never the first or the last, until at most `most` are left.

        What was written in between counts as written by the next frame that is kept.

        Args:
            most: At least 2.
        """
        last = len(self.frames) - 1
        if last < most:
            return self
        kept = sorted({round(number * last / (most - 1)) for number in range(most)})
        later = [bisect_left(kept, number) for number in range(last + 1)]
        frames = (self.frames[number] for number in kept)
        return Film(
            self.prompt_length,
            tuple(
                Frame(
                    frame.forward,
                    frame.tokens,
                    tuple(later[w] if w != UNWRITTEN else w for w in frame.written),
                )
                for frame in frames
            ),
            self.end_ids,
            self.block_size,
        )


@dataclass
class Recorder:
    """An observer of decoding that keeps a frame of every row after every forward.

    Attributes:
        mask_token_id: What stands where nothing is written.
        end_ids: Tokens that end a row.
        block_size: Tokens per block, None for MDLM.
    """

    mask_token_id: int
    end_ids: frozenset[int] = frozenset()
    block_size: int | None = None
    _lengths: list[int] = field(default_factory=list, repr=False)
    _frames: list[list[Frame]] = field(default_factory=list, repr=False)

    @property
    def rows(self) -> int:
        """How many rows were seen: none before decoding begins."""
        return len(self._lengths)

    def __call__(self, progress: Progress) -> None:
        """Keep what changed."""
        if not self._lengths:
            self._frames = [[] for _ in progress.lengths]
            self._lengths = progress.lengths.tolist()
        new = progress.canvas.shape[1] - max(self._lengths)
        canvas, committed = progress.canvas.tolist(), progress.committed.tolist()
        for frames, length, tokens, known in zip(
            self._frames, self._lengths, canvas, committed, strict=True
        ):
            end = length + new
            frame = self._follow(frames, progress.forwards, tokens[:end], known[:end])
            if not frames or frame.written != frames[-1].written:
                frames.append(frame)

    def _follow(
        self, frames: Sequence[Frame], forward: int, tokens: list[int], known: list[bool]
    ) -> Frame:
        number = len(frames)
        shown = [t if k else self.mask_token_id for t, k in zip(tokens, known, strict=True)]
        if frames:
            before = zip(frames[-1].tokens, frames[-1].written, strict=True)
            written = [
                UNWRITTEN if not k else w if w != UNWRITTEN and t == old else number
                for t, k, (old, w) in zip(shown, known, before, strict=True)
            ]
        else:
            written = [GIVEN if k else UNWRITTEN for k in known]
        return Frame(forward, tuple(shown), tuple(written))

    def latest(self, row: int) -> tuple[Film, int] | None:
        """Return a row's newest frame, as a film of its own, and its number; None before any."""
        frames = self._frames[row]
        if not frames:
            return None
        number = len(frames) - 1
        return self._film(row, (frames[number],)), number

    def film(self, row: int = 0) -> Film:
        """Return what was recorded of a row."""
        return self._film(row, tuple(self._frames[row]))

    def _film(self, row: int, frames: tuple[Frame, ...]) -> Film:
        return Film(self._lengths[row], frames, self.end_ids, self.block_size)
