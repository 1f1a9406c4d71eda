"""How the C library hands memory out, where computing on a CPU waits for it."""

from __future__ import annotations

import ctypes
import sys

import torch

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> bool:
    """Let glibc keep freed memory for the next step instead of giving it back to the system.

    Every step of training or denoising allocates the same tensors of many megabytes. By default
    each is mapped anew, and clearing its pages takes a large part of a step on a CPU. Of the whole
    process; nothing happens where the tensors are on a GPU or the C library is another one.

    Returns:
        Whether it was done.
    """
    if not sys.platform.startswith("linux") or torch.accelerator.is_available():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_MAX, 0)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
