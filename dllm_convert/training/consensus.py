"""Yes or no, agreed on by all processes of a training without making the GPU wait."""

from __future__ import annotations

import torch
import torch.distributed as dist


def _together() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def barrier() -> None:
    """Wait for the other processes of the training, if there are any."""
    if _together():
        dist.barrier()


class Consensus:
    """Answers whether any process says yes.

    On a GPU the answer is that of the call before: reading today's would make the CPU wait for the
    step that it has just queued, and the GPU then for the CPU.

    Args:
        device: Where the processes' tensors live.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: torch.Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def _on_device(self, answer: bool | torch.Tensor) -> torch.Tensor:
        if isinstance(answer, torch.Tensor):
            return answer.to(self._device).float()
        # Filled there: copying a number from ordinary memory has the host wait.
        return torch.full((), float(answer), device=self._device)

    def told(self, number: int) -> int:
        """Return the first process's number; all processes must ask. The host waits for it."""
        box = torch.full((), number, device=self._device)
        if _together():
            dist.broadcast(box, 0)
        return int(box)

    def any(self, *answers: bool | torch.Tensor) -> tuple[bool, ...]:
        """Return, for each question, whether any process says yes; all processes must ask."""
        flags = torch.stack([self._on_device(answer) for answer in answers])
        if _together():
            dist.all_reduce(flags, dist.ReduceOp.MAX)
        if self._device.type != "cuda":
            return tuple(flags.bool().tolist())
        before, copied = self._pending, self._copied
        self._pending = flags.to("cpu", non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()
        if before is None or copied is None:
            return (False,) * len(answers)
        copied.synchronize()
        return tuple(before.bool().tolist())
