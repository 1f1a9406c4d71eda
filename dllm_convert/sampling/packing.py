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
from threading import Lock, local
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, WeakValueDictionary, ref

import torch
from torch import nn

from dllm_convert.common.memory import available_bytes
from dllm_convert.modeling.published.gated import LowRank

_KEPT: WeakKeyDictionary[nn.Module, PackedLinears] = WeakKeyDictionary()
"""The packed weights of each model, for as long as it lives."""
_PACKED: WeakValueDictionary[tuple[int, ...], _Packed] = WeakValueDictionary()
"""The same by the tensors that they are of: models that share those share these."""
_LOCK = Lock()
_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"))
"""Names of layers of one module that are given the same tensor. Where a class gives them several
after all, they are multiplied more often than needed, and nothing else."""
_SHARE = 4
"""The second copy of the weights takes at most this part of the memory that is available."""


def _multiply(packed: torch.Tensor, bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return product


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
    """Matrices below each other as oneDNN reads them, and which those were.

    Attributes:
        weight: All of them in one, packed.
        bias: Of their rows, shape (rows,), or None.
        rows: Rows of each.
        of: What tells whether one was changed since.
        tensors: The matrices themselves, while they are there.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    rows: tuple[int, ...]
    of: tuple[Any, ...]
    tensors: tuple[ReferenceType[torch.Tensor], ...]


class _Joint:
    """Linear layers that are given the same tensor, and their gated adapters, in one product.

    The first that is called multiplies for all. A layer that is given another tensor after all
    multiplies anew.
    """

    def __init__(self, group: _Group, packed: _Packed) -> None:
        self._group, self._packed = group, packed
        self._now = local()

    def __call__(self, number: int, x: torch.Tensor) -> torch.Tensor:
        """What the layer of a number returns for x (..., inputs), its adapter included."""
        layer, hook = self._group.layers[number], self._group.adapter
        if not x.numel():
            return nn.Linear.forward(layer, x)
        if len(self._packed.rows) == 1:  # alone, with no adapter: there is nothing to hand out
            return _multiply(self._packed.weight, self._packed.bias, x)
        output, low = self._parts(number, x)
        changed = None if hook is None else hook.add(layer, x, output, low)
        return output if changed is None else changed

    def _parts(self, number: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The layer's own product and its adapter's first; handed out once."""
        now, packed, count = vars(self._now), self._packed, len(self._group.layers)
        which = x, None if x.is_inference() else x._version
        known, parts = now.get("of"), now.get("parts", {})
        if known is None or known[0] is not x or known[1] != which[1] or number not in parts:
            product: Any = _multiply(packed.weight, packed.bias, x)
            parts = dict(enumerate(product.split(packed.rows, -1)))
            now.update(of=which, parts=parts)
        output, low = parts.pop(number), parts.pop(count + number, None)
        if not parts:
            now.clear()
        return output, low


def _identity(weight: torch.Tensor) -> tuple[int, int, torch.dtype]:
    # Storage that is written to in place counts its versions.
    return weight.data_ptr(), weight._version, weight.dtype


def _is_eligible(module: nn.Module) -> bool:
    if type(module) is not nn.Linear or "forward" in vars(module):
        return False
    weight = module.weight
    is_plain = type(weight.data) is torch.Tensor and weight.layout == torch.strided
    return is_plain and weight.device.type == "cpu" and can_pack(weight.dtype)


@dataclass(frozen=True)
class _Group:
    """Layers that are packed together, and the gated adapter that all of them have, or None."""

    layers: tuple[nn.Linear, ...]
    adapter: LowRank | None

    @property
    def weights(self) -> list[torch.Tensor]:
        """What is packed: the layers' matrices, and the first ones of their adapters."""
        layers: Any = self.layers
        firsts = [layer.lora_A.weight for layer in layers] if self.adapter else []
        return [*(layer.weight for layer in layers), *firsts]

    @property
    def identity(self) -> tuple[Any, ...]:
        """Another one once any of it was changed."""
        biases = [layer.bias for layer in self.layers if layer.bias is not None]
        return tuple(_identity(tensor) for tensor in (*self.weights, *biases))

    @property
    def bytes(self) -> int:
        """What it takes packed."""
        return sum(weight.numel() * weight.element_size() for weight in self.weights)

    def known(self) -> _Packed | None:
        """What another model has packed of the same tensors; None for nothing."""
        found = _PACKED.get(tuple(map(id, self.weights)))
        if found is None or found.of != self.identity:
            return None
        # A number may be another tensor's by now.
        pairs = zip(found.tensors, self.weights, strict=True)
        return found if all(one() is weight for one, weight in pairs) else None

    def packed(self) -> _Packed:
        """The same as oneDNN reads it."""
        weights, bias = [weight.detach() for weight in self.weights], None
        if any(layer.bias is not None for layer in self.layers):
            own: list[torch.Tensor | None] = [layer.bias for layer in self.layers]
            own += [None] * (len(weights) - len(own))
            bias = torch.cat(
                [
                    weight.new_zeros(len(weight)) if part is None else part.detach()
                    for weight, part in zip(weights, own, strict=True)
                ]
            )
        joined = weights[0] if len(weights) == 1 else torch.cat(weights)
        tensors = tuple(map(ref, self.weights))
        found = _Packed(_pack(joined), bias, tuple(map(len, weights)), self.identity, tensors)
        _PACKED[tuple(map(id, self.weights))] = found
        return found


def _groups(model: nn.Module) -> list[_Group]:
    """What is packed of a model, and together with what."""
    # What lies inside a linear layer is an adapter of it, which is multiplied there.
    inside = {
        part
        for module in model.modules()
        if isinstance(module, nn.Linear)
        for part in module.children()
    }
    left: dict[Any, None] = dict.fromkeys(
        module for module in model.modules() if module not in inside and _is_eligible(module)
    )
    groups = []
    for parent in model.modules():
        children = dict(parent.named_children())
        for names in _TOGETHER:
            layers: list[Any] = [children[name] for name in names if children.get(name) in left]
            kinds = {(layer.in_features, layer.weight.dtype, _adapter(layer)) for layer in layers}
            if len(layers) > 1 and len(kinds) == 1:
                groups.append(_Group(tuple(layers), _adapter(layers[0])))
                for layer in layers:
                    del left[layer]
    return groups + [_Group((layer,), _adapter(layer)) for layer in left]


def _adapter(layer: nn.Linear) -> LowRank | None:
    """The gated adapter of a layer, if its first matrix can be multiplied with the layer's."""
    hooks = list(layer._forward_hooks.values())
    if len(hooks) != 1 or not isinstance(hooks[0], LowRank):
        return None
    first: Any = layer.lora_A
    return hooks[0] if first.weight.dtype == layer.weight.dtype else None


class PackedLinears:
    """The packed weights of one model, made when they are first needed and kept.

    A weight that was changed since is packed anew.
    """

    def __init__(self) -> None:
        self._lock, self._users = Lock(), 0
        self._packed: WeakKeyDictionary[nn.Linear, _Packed] = WeakKeyDictionary()
        self._replaced: list[tuple[nn.Linear, dict[int, Any]]] = []

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
        groups = _groups(model)
        stale = [group for group in groups if not self._is_fresh(group)]
        for group in stale:
            self._packed.pop(group.layers[0], None)
        shared = {group: known for group in stale if (known := group.known()) is not None}
        needed = sum(group.bytes for group in stale if group not in shared)
        if needed and needed > available_bytes() // _SHARE:
            return
        for group in stale:
            self._packed[group.layers[0]] = shared.get(group) or group.packed()
        for group in groups:
            joint = _Joint(group, self._packed[group.layers[0]])
            layers: Any = group.layers
            for number, layer in enumerate(layers):
                hooks = layer._forward_hooks
                self._replaced.append((layer, dict(hooks)))
                layer.forward = partial(joint, number)
                if group.adapter is not None:
                    hooks.clear()

    def _is_fresh(self, group: _Group) -> bool:
        known = self._packed.get(group.layers[0])
        return known is not None and known.of == group.identity

    def _remove(self) -> None:
        for layer, hooks in self._replaced:
            del layer.forward
            layer._forward_hooks.update(hooks)
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
