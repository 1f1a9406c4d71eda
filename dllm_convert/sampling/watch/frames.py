"""What stood on the canvas after every forward, as values: an observer in, a film out."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllm_convert.modeling.published.options import Progress

GIVEN = 0
UNWRITTEN = -1


class Fate(StrEnum):
    """What became of a draft."""

    OPEN = "open"
    HELD = "held"
    REJECTED = "rejected"


@dataclass(frozen=True)
class Draft:
    """A token that was drafted, of lossless decoding.

    Attributes:
        position: Where.
        token: The token.
        fate: Whether it is what the verifier writes there, as far as that is known.
    """

    position: int
    token: int
    fate: Fate


@dataclass(frozen=True)
class Frame:
    """One row after a forward.

    Attributes:
        forward: Forwards run so far.
        tokens: Prompt and new tokens, the mask token where nothing is written yet.
        written: For each position the number of the frame that wrote it: 0 if it was given, -1 if
            nothing is written yet.
        drafts: What is drafted, and what the forward made of the drafts before; in the order of
            their positions.
    """

    forward: int
    tokens: tuple[int, ...]
    written: tuple[int, ...]
    drafts: tuple[Draft, ...] = ()

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
                    frame.drafts,
                )
                for frame in frames
            ),
            self.end_ids,
            self.block_size,
        )


def _fates(
    before: Sequence[Draft], tokens: Sequence[int], known: Sequence[bool], drafted: dict[int, int]
) -> tuple[Draft, ...]:
    """Say what became of the drafts of a frame, in the next one: its tokens, and its own drafts."""
    found = [Draft(place, token, Fate.OPEN) for place, token in drafted.items()]
    for draft in before:
        place, token = draft.position, draft.token
        if draft.fate is Fate.OPEN and drafted.get(place) != token:
            held = known[place] and tokens[place] == token
            found.append(Draft(place, token, Fate.HELD if held else Fate.REJECTED))
    return tuple(sorted(found, key=lambda draft: (draft.position, draft.fate is Fate.OPEN)))


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
        drafted: list[dict[int, int]] = [{} for _ in self._lengths]
        for row, position, token in progress.drafts:
            drafted[row][position] = token
        for frames, length, tokens, known, drafts in zip(
            self._frames, self._lengths, canvas, committed, drafted, strict=True
        ):
            end = length + new
            frame = self._follow(frames, progress.forwards, tokens[:end], known[:end], drafts)
            if not frames or (frame.written, frame.drafts) != (
                frames[-1].written,
                frames[-1].drafts,
            ):
                frames.append(frame)

    def _follow(
        self,
        frames: Sequence[Frame],
        forward: int,
        tokens: list[int],
        known: list[bool],
        drafted: dict[int, int],
    ) -> Frame:
        number = len(frames)
        shown = [t if k else self.mask_token_id for t, k in zip(tokens, known, strict=True)]
        if frames:
            last = zip(frames[-1].tokens, frames[-1].written, strict=True)
            written = [
                UNWRITTEN if not k else w if w != UNWRITTEN and t == old else number
                for t, k, (old, w) in zip(shown, known, last, strict=True)
            ]
        else:
            written = [GIVEN if k else UNWRITTEN for k in known]
        before = frames[-1].drafts if frames else ()
        return Frame(forward, tuple(shown), tuple(written), _fates(before, shown, known, drafted))

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
