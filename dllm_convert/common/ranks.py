"""Where a process stands among those that train together; imports no torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from dllm_convert.errors import DllmConvertError


@dataclass(frozen=True)
class Rank:
    """A process among several.

    Attributes:
        rank: Number of the process, from 0. The first one converts, writes, verifies and prints;
            the others take part in the training only.
        world: How many there are.
        launched: Whether a launcher started it.
    """

    rank: int = 0
    world: int = 1
    launched: bool = False

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Rank:
        """Read what torchrun, `accelerate launch` and Slurm scripts around them set."""
        if "RANK" not in environment:
            return cls()
        return cls(int(environment["RANK"]), int(environment.get("WORLD_SIZE", "1")), True)

    @property
    def main(self) -> bool:
        """Whether it is the process that writes and prints."""
        return self.rank == 0


ALONE = Rank()
"""A process that trains by itself."""


def lost_process(error: BaseException) -> DllmConvertError | None:
    """Return what to say where another process is gone that this one waited for; else None.

    torch raises errors of its own for NCCL and for its stores, and a plain one for gloo.
    """
    names = {kind.__name__ for kind in type(error).__mro__}
    if not names & {"DistError"} and "gloo/transport" not in str(error):
        return None
    return DllmConvertError(
        "another process of the training is gone",
        hint="What it said last, or its launcher, says why; the same command goes on from the last "
        "checkpoint",
    )
