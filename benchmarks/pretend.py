"""A pretend device: what a GPU would refuse, wait for and launch, seen on a machine without one.

Tensors on the device `pgpu` hold a tensor of the CPU inside. Every operation is checked as CUDA
checks it (operands on one device, numbers of no dimension aside), counted, and run on the CPU.
What would have the host wait for the device is counted with the line that asked for it:

    register()
    model = move(model)
    with watching() as seen:
        model.generate(prompt.to("pgpu"), max_new_tokens=64)
    print(seen.waits, seen.kernels.total())

Needs torch >= 2.9, where a device can be written in Python, and a process of its own: from
`register` on torch names an accelerator. Autograd works; flex attention does not. What it cannot
know: how long anything takes, whether something fits, and what a kernel of a GPU rounds.
"""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from packaging.version import Version
from torch.utils._pytree import tree_leaves, tree_map

NAME = "pgpu"
MIN_TORCH = "2.9"
"""The first torch that lets a device be written in Python."""
HOST = torch.device("cpu")
DEVICE_INDEX = 0

_PACKAGES = ("dllm_convert", "transformers", "peft", "accelerate")
_LAUNCH_NOTHING = frozenset({
    "view", "_unsafe_view", "reshape", "expand", "slice", "select", "transpose", "t", "permute",
    "unsqueeze", "squeeze", "detach", "alias", "as_strided", "split", "split_with_sizes", "chunk",
    "unbind", "narrow", "empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided",
    "_reshape_alias", "unfold", "diagonal", "lift_fresh", "is_same_size", "sym_size", "sym_stride",
    "set_", "resize_", "is_pinned",
})  # fmt: skip
"""Operations on shapes and memory only."""
_WAIT = frozenset({
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique_dim",
    "_unique2", "unique_consecutive", "multinomial", "bincount", "repeat_interleave", "allclose",
    "argwhere",
})  # fmt: skip
"""Operations whose result the host needs to go on: a number, or how many there are."""
_INDEXING = frozenset({
    "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put",
})  # fmt: skip


@dataclass
class Seen:
    """What was seen while something ran.

    Attributes:
        waits: How often the host would have waited, by kind and by the line that asked.
        late: Copies to the host that nobody waited for, by line.
        kernels: Operations that launch something, by name.
    """

    waits: Counter[tuple[str, str]] = field(default_factory=Counter)
    late: Counter[str] = field(default_factory=Counter)
    kernels: Counter[str] = field(default_factory=Counter)


_SEEN: list[Seen] = []
"""Whoever watches, the innermost last."""
_INSIDE: list[str] = []
"""Operations that are one kernel on a GPU and several here."""
_DRAWERS: set[int] = set()
"""Generators that were made for the device, by address."""


@contextlib.contextmanager
def watching() -> Iterator[Seen]:
    """Count what happens inside the block."""
    seen = Seen()
    _SEEN.append(seen)
    try:
        yield seen
    finally:
        _SEEN.remove(seen)


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Count nothing inside the block."""
    held, _SEEN[:] = list(_SEEN), []
    try:
        yield
    finally:
        _SEEN[:] = held


def asked_by() -> str:
    """The innermost line of the package, and of a library that it called."""
    frame: Any = sys._getframe(1)
    library = ""
    while frame is not None:
        path = frame.f_code.co_filename
        if "dllm_convert/" in path and "site-packages" not in path:
            ours = f"{path.rpartition('dllm_convert/')[2]}:{frame.f_lineno}"
            return f"{ours} <- {library}" if library else ours
        if not library and any(f"/{package}/" in path for package in _PACKAGES):
            library = f"{'/'.join(path.split('/')[-2:])}:{frame.f_lineno}"
        frame = frame.f_back
    return library or "elsewhere"


def _waited(kind: str) -> None:
    for seen in _SEEN[-1:]:
        seen.waits[kind, asked_by()] += 1


class PretendTensor(torch.Tensor):
    """A tensor on the device: shape, type and device outside, `inner` on the CPU inside."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls: type[PretendTensor], inner: torch.Tensor) -> PretendTensor:
        """Wrap a tensor of the CPU."""
        made: Any = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=torch.device(NAME, DEVICE_INDEX),
            requires_grad=False,
        )
        made.inner = inner
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self) -> str:
        """Show what is inside."""
        return f"Pretend({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        return _run(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Wait, and return numbers."""
        _waited("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        """Refuse, as CUDA does."""
        raise TypeError("can't convert a device tensor to numpy: use Tensor.cpu() first")


def _name(func: Any) -> str:
    return str(func.name().partition("::")[2].partition(".")[0])


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    # Check, count, and run on the CPU what was asked for on the device.
    name = _name(func)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    there = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"])
    lands_here = bool(here) if asked is None else asked.type == NAME
    if name in ("_to_copy", "copy_", "to"):
        _see_copy(name, args, kwargs, asked, bool(here))
    else:
        _check(name, func, here, there, args, kwargs, lands_here)
    if name not in _LAUNCH_NOTHING and (here or lands_here) and not _INSIDE:
        for seen in _SEEN[-1:]:
            seen.kernels[name] += 1
    given = dict(kwargs)
    if asked is not None:
        given["device"] = HOST
    if given.get("pin_memory"):
        given["pin_memory"] = False
    inner_args, inner_kwargs = tree_map(_inner, (args, given))
    out = func(*inner_args, **inner_kwargs)
    if name == "_local_scalar_dense" or (name == "_to_copy" and not lands_here):
        return out
    if name == "copy_" and not isinstance(args[0], PretendTensor):
        return args[0]
    if not lands_here and not here:
        return out
    wrapped = tree_map(_outer, out)
    schema = func._schema
    if schema.is_mutable or any(value.alias_info for value in schema.returns):
        return _given_back(schema, args, kwargs, wrapped)
    return wrapped


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, PretendTensor) else value


def _outer(value: Any) -> Any:
    is_plain = isinstance(value, torch.Tensor) and not isinstance(value, PretendTensor)
    return PretendTensor(value) if is_plain else value


def _given_back(schema: Any, args: Any, kwargs: Any, wrapped: Any) -> Any:
    # Operations in place, or with `out=`, return what they were given.
    outputs = wrapped if len(schema.returns) > 1 else [wrapped]
    returned = []
    for told, value in zip(schema.returns, outputs, strict=False):
        if told.alias_info is not None and told.alias_info.is_write:
            for number, argument in enumerate(schema.arguments):
                info = argument.alias_info
                if info is not None and info.before_set == told.alias_info.before_set:
                    value = args[number] if number < len(args) else kwargs[argument.name]
        returned.append(value)
    if len(schema.returns) > 1:
        return tuple(returned)
    return returned[0] if returned else None


def _see_copy(name: str, args: Any, kwargs: Any, asked: Any, is_here: bool) -> None:
    source = args[1] if name == "copy_" else args[0]
    leaves = isinstance(source, PretendTensor)
    if name == "copy_":
        crosses = isinstance(args[0], PretendTensor) != leaves
    else:
        crosses = asked is not None and (asked.type == NAME) != is_here
    if not crosses:
        return
    if not kwargs.get("non_blocking"):
        _waited(f"{name}: {'device to host' if leaves else 'host to device'}")
    elif leaves:
        for seen in _SEEN[-1:]:
            seen.late[asked_by()] += 1


def _check(
    name: str, func: Any, here: Any, there: Any, args: Any, kwargs: Any, lands_here: bool
) -> None:
    generator = kwargs.get("generator")
    if generator is not None and lands_here and not _DRAWERS:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if not here:
        return
    if there and name in _INDEXING:
        if not isinstance(args[0], PretendTensor):
            raise RuntimeError("indices should be on cpu or on the device of the indexed tensor")
        _waited(f"{name} with indices on the host")
    elif any(tensor.dim() for tensor in there):
        raise RuntimeError(
            f"{func}: Expected all tensors to be on the same device, but found at least two "
            f"devices, {NAME}:0 and cpu! at {asked_by()}"
        )
    if name in _INDEXING and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        _waited(f"{name} with a mask")
    told_size = name == "repeat_interleave" and kwargs.get("output_size") is not None
    if name in _WAIT and not told_size:
        _waited(name)


class _Backend:
    """What torch asks the module of a device."""

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return 1

    @staticmethod
    def current_device() -> int:
        return DEVICE_INDEX

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        pass

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


_LIBRARIES: list[torch.library.Library] = []
"""Holds the operations for as long as the process lives."""


def register() -> None:
    """Make the device known to torch, for the rest of the process.

    Raises:
        RuntimeError: This torch is too old.
    """
    if _LIBRARIES:
        return
    if Version(torch.__version__) < Version(MIN_TORCH):
        raise RuntimeError(f"torch is {torch.__version__}, expected at least {MIN_TORCH}")
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    # A kernel in Python belongs to one thread; autograd would run the backward in another.
    torch.autograd.set_multithreading_enabled(False)
    library = torch.library.Library("aten", "IMPL")
    for name, operation in _factories():
        with contextlib.suppress(RuntimeError):  # those that torch has for every device
            library.impl(name, _factory(operation), "PrivateUse1")
    library.impl("_copy_from", _copy_from, "PrivateUse1")
    library.impl("_to_copy", _to_copy, "PrivateUse1")
    _LIBRARIES.append(library)
    _replace_what_is_written_in_c()


def _factories() -> Iterator[tuple[str, Any]]:
    # Operations that make tensors out of none: `zeros`, `arange`, `randint` and the like.
    for full in torch._C._dispatch_get_all_op_names():
        package, _, qualified = full.partition("::")
        name, _, overload = qualified.partition(".")
        is_out = "out" in overload.split("_")
        if package != "aten" or is_out or name in ("_pin_memory", "pin_memory"):
            continue
        try:
            operation = getattr(getattr(torch.ops.aten, name), overload or "default")
        except (AttributeError, RuntimeError):
            continue
        arguments = operation._schema.arguments
        if any(argument.name == "device" for argument in arguments) and not any(
            "Tensor" in str(argument.type) for argument in arguments
        ):
            yield qualified, operation


def _factory(operation: Any) -> Any:
    def kernel(*args: Any, **kwargs: Any) -> Any:
        return _run(operation, args, kwargs | {"device": torch.device(NAME, DEVICE_INDEX)})

    return kernel


def _copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    return _run(torch.ops.aten.copy_.default, (target, source), {"non_blocking": non_blocking})


def _to_copy(source: Any, **kwargs: Any) -> Any:
    return _run(torch.ops.aten._to_copy.default, (source,), kwargs)


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    # The textbook's attention: under autograd, and one kernel.
    for seen in _SEEN[-1:]:
        seen.kernels["scaled_dot_product_attention"] += 1
    _INSIDE.append("attention")
    try:
        if enable_gqa:
            count = query.shape[1] // key.shape[1]
            size = key.shape[1] * count
            key, value = (
                part.repeat_interleave(count, 1, output_size=size) for part in (key, value)
            )
        scores = (query * (scale or query.shape[-1] ** -0.5)) @ key.transpose(-1, -2)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask
        return scores.softmax(-1).nan_to_num(0.0).to(value.dtype) @ value
    finally:
        _INSIDE.pop()


def _replace_what_is_written_in_c() -> None:
    # Functions that ask for the device in C++, and know no such one.
    functions: Any = torch.nn.functional
    attention, tensor = functions.scaled_dot_product_attention, torch.tensor
    generator: Any = torch.Generator

    def scaled_dot_product_attention(query: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(query, PretendTensor):
            return _attention(query, *args, **kwargs)
        return attention(query, *args, **kwargs)

    class Generator(generator):  # type: ignore[misc]
        def __new__(cls, device: Any = "cpu") -> Any:
            made = generator.__new__(cls)
            if torch.device(device).type == NAME:
                # Operations are handed another object of the same generator: that one was made
                # for the device is all that can be known.
                _DRAWERS.add(id(made))
            return made

    def made(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
        found = tensor(data, *args, **kwargs)
        return found if device is None else found.to(device)

    def taken(data: Any, dtype: Any = None, device: Any = None) -> Any:
        found = data if isinstance(data, torch.Tensor) else tensor(data)
        return found.to(device=device or found.device, dtype=dtype or found.dtype)

    functions.scaled_dot_product_attention = scaled_dot_product_attention
    for name, function in (("Generator", Generator), ("tensor", made), ("as_tensor", taken)):
        setattr(torch, name, function)
    import torch.utils.checkpoint as checkpoint

    # Its states of random numbers are the CPU's.
    checkpoint._infer_device_type = lambda *_: "cpu"  # type: ignore[assignment]


def moved_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor on the device, without a copy and unseen."""
    return PretendTensor(tensor.detach())


def move(module: torch.nn.Module) -> torch.nn.Module:
    """Put a module's weights and buffers on the device, where they are; tied ones stay tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                if id(weight) not in moved:
                    there = moved_tensor(weight)
                    moved[id(weight)] = torch.nn.Parameter(there, weight.requires_grad)
                    moved[id(moved[id(weight)])] = moved[id(weight)]
                part._parameters[name] = moved[id(weight)]
        for name, buffer in part._buffers.items():
            if buffer is not None and not isinstance(buffer, PretendTensor):
                part._buffers[name] = moved_tensor(buffer)
    return module
