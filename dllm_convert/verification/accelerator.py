"""Where a checkpoint will be used: its device and the type its weights are held in there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dllm_convert.errors import RequestError
from dllm_convert.modeling.loading import device_and_dtype


@dataclass(frozen=True)
class Accelerator:
    """A device and a type, of which verification runs the kernels.

    Attributes:
        device: As torch names it, such as `cuda` or `cuda:1`.
        dtype: As torch names it, such as `bfloat16`.
    """

    device: str
    dtype: str

    def __str__(self) -> str:
        """Name both."""
        return f"{self.device}, {self.dtype}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found


HOST = Accelerator("cpu", "float32")
"""Where everything is verified in any case."""
DTYPES = ("bfloat16", "float16", "float32")
"""Types that weights are held in to be used."""


def accelerator_here() -> Accelerator | None:
    """Return where this machine runs a checkpoint, None if that is its CPU."""
    found = Accelerator(*device_and_dtype())
    return None if found == HOST else found


def asked_for(device: str | None, dtype: str | None) -> Accelerator | None:
    """Return what somebody asks to be looked at, None if nothing is named.

    Args:
        device: As torch names it; None for the GPU that is here, or the CPU.
        dtype: As torch names it; None for what a device is used in.

    Raises:
        RequestError: There is no such device here, or no such type.
    """
    if device is None and dtype is None:
        return None
    if dtype is not None and dtype not in DTYPES:
        raise RequestError(f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}")
    where, held = device_and_dtype(device, dtype)
    try:
        torch.empty(0, device=where)
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise RequestError(
            f"device is {where!r}, which does not work here "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        ) from error
    if torch.device(where).type == "meta":
        raise RequestError("device is 'meta', which holds no numbers")
    return Accelerator(where, held)
