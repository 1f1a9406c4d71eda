"""What a user may choose anew each time: how files are brought over, how much is verified."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

MODEL_BYTES_AT_HAND = 1 << 30
"""A model of at most this size in float32 is loaded and run even where nothing is trained."""


class Depth(StrEnum):
    """How much of a checkpoint is verified."""

    AUTO = "auto"
    FULL = "full"
    FILES = "files"


@dataclass(frozen=True)
class RunOptions:
    """How a run is done, whatever it makes.

    Attributes:
        link: Whether weight files that do not change may be hard links to the source's.
        verify: full loads the model and runs every probe, files reads files only, auto is full
            after a training and for a model of at most `MODEL_BYTES_AT_HAND`.
        extend: Whether a finished checkpoint in the output folder is trained on.
    """

    link: bool = False
    verify: Depth = Depth.AUTO
    extend: bool = False

    def streams(self, parameters: int) -> bool:
        """Whether only files are verified where nothing was trained.

        Args:
            parameters: Weights of the model; 0 if headers do not tell.
        """
        if self.verify is Depth.AUTO:
            return 4 * parameters > MODEL_BYTES_AT_HAND
        return self.verify is Depth.FILES

    def reason(self, parameters: int) -> str:
        """Say why probes that need the model were not run."""
        why = "as --verify files asks"
        if self.verify is Depth.AUTO:
            why = f"{4 * parameters / 1e9:.1f} GB in float32"
        return f"the model was not loaded ({why}): dllm-convert verify CHECKPOINT runs this"


DEFAULT = RunOptions()
