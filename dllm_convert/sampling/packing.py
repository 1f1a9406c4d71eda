"""Linear layers for few rows on a CPU: weights in the order that oneDNN's kernels read them in.

A block of 32 tokens is few rows for a matrix product: BLAS then spends as long on rearranging the
weights as on multiplying, in every forward. Rearranged once, they are read as they are. Measured
(2 cores with AVX-512, float32, 32 rows): 140 to 175 GFLOP/s where `torch.nn.functional.linear`
reaches 66 to 90.

The operations are private ones of torch. So they are used by this tool's own decoding only, while
it runs; the published file knows nothing of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from dllm_convert.common.memory import available_bytes

_KEPT: WeakKeyDictionary[nn.Module, PackedLinears] = WeakKeyDictionary()
"""The packed weights of each model, for as long as it lives."""
_LOCK = Lock()
_SHARE = 4
"""The second copy of the weights takes at most this part of the memory that is available."""


def _multiply(packed: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


def _forward(module: nn.Linear, packed: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return _multiply(packed, module.bias, x) if x.numel() else nn.Linear.forward(module, x)


def _pack(weight: torch.Tensor) -> torch.Tensor:
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
    return packed


@cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this torch has the operations, and they multiply as `linear` does.

    They are the ones torch's own compiler (inductor) uses for frozen weights, and have no public
    name: so they are tried, and without them everything runs as before.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not torch._C._has_mkldnn:
        return False
    weight = torch.linspace(-1, 1, 24, dtype=torch.float32).view(3, 8).to(dtype)
    x = torch.linspace(0, 2, 16, dtype=torch.float32).view(2, 8).to(dtype)
    expected = nn.functional.linear(x, weight)
    try:
        found = _multiply(_pack(weight), None, x)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return torch.allclose(found.float(), expected.float(), rtol=1e-2, atol=1e-2)


@dataclass(frozen=True)
class _Packed:
    """A weight as oneDNN reads it, and which weight that was."""

    weight: torch.Tensor
    of: tuple[int, int, torch.dtype]


def _identity(weight: torch.Tensor) -> tuple[int, int, torch.dtype]:
    # Storage that is written to in place counts its versions.
    return weight.data_ptr(), weight._version, weight.dtype


def _is_eligible(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    is_plain = type(weight.data) is torch.Tensor and weight.layout == torch.strided
    return is_plain and weight.device.type == "cpu" and can_pack(weight.dtype)


class PackedLinears:
    """The packed weights of one model, made when they are first needed and kept.

    A weight that was changed since is packed anew.
    """

    def __init__(self) -> None:
        self._lock, self._users = Lock(), 0
        self._packed: WeakKeyDictionary[nn.Linear, _Packed] = WeakKeyDictionary()
        self._replaced: list[nn.Linear] = []

    @contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Have the model's linear layers multiply with packed weights while the block runs."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._install(model)
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if not self._users:
                    self._remove()

    def _install(self, model: nn.Module) -> None:
        # What lies inside a linear layer is an adapter of it, which is multiplied there.
        inside = {
            part
            for module in model.modules()
            if isinstance(module, nn.Linear)
            for part in module.children()
        }
        linears: list[Any] = [
            module for module in model.modules() if module not in inside and _is_eligible(module)
        ]
        stale = [module for module in linears if not self._is_fresh(module)]
        for module in stale:
            self._packed.pop(module, None)
        needed = sum(module.weight.numel() * module.weight.element_size() for module in stale)
        if needed and needed > available_bytes() // _SHARE:
            return
        for module in stale:
            self._packed[module] = _Packed(_pack(module.weight), _identity(module.weight))
        for module in linears:
            module.forward = partial(_forward, module, self._packed[module].weight)
            self._replaced.append(module)

    def _is_fresh(self, module: nn.Linear) -> bool:
        known = self._packed.get(module)
        return known is not None and known.of == _identity(module.weight)

    def _remove(self) -> None:
        for module in self._replaced:
            del module.forward
        self._replaced.clear()


@contextmanager
def packed_linears(model: Any) -> Iterator[None]:
    """Let a model on a CPU read packed weights while the block runs, if they fit into memory.

    Results differ from those of `torch.nn.functional.linear` by rounding. No gradients. The model
    is afterwards what it was before; its packed weights are kept beside it for the next time.

    Args:
        model: Anything with linear layers.
    """
    if torch.is_autocast_enabled("cpu"):
        yield
        return
    with _LOCK:
        kept = _KEPT.setdefault(model, PackedLinears())
    with kept.installed(model):
        yield
