"""The processes that share an evaluation: each scores its part, the first one reports."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dllm_convert.common.ranks import Rank


@dataclass(frozen=True)
class Ranks:
    """This process among those that `accelerate launch` started.

    Attributes:
        rank: Number of this process.
        world: How many there are.
        device: Where this one computes.
        accelerator: Accelerate's, None if there is one process only.
    """

    rank: int
    world: int
    device: torch.device
    accelerator: Any = None

    @classmethod
    def find(cls, device: str | None) -> Ranks:
        """Join the other processes, if a launcher started any.

        Args:
            device: Where to run; a GPU if there is one.
        """
        if Rank.from_environment().world > 1:
            from accelerate import Accelerator

            own = Accelerator(cpu=not torch.accelerator.is_available() or device == "cpu")
            return cls(own.process_index, own.num_processes, own.device, own)
        return cls(0, 1, torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")))

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate a tensor over all processes."""
        if self.accelerator is None:
            return tensor
        gathered: torch.Tensor = self.accelerator.gather(tensor)
        return gathered

    def gather_object(self, value: Any, to: int = 0) -> list[Any] | None:
        """Collect a value of each process on one of them; the others get None."""
        if self.accelerator is None:
            return [value]
        found = [None] * self.world if self.rank == to else None
        torch.distributed.gather_object(value, found, dst=to)
        return found

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()
