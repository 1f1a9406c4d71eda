"""Run two models on the same text and name the first module whose output differs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _tensors(value: Any) -> tuple[torch.Tensor, ...]:
    if isinstance(value, torch.Tensor):
        return (value,)
    if isinstance(value, tuple | list):
        return tuple(tensor for item in value for tensor in _tensors(item))
    return ()


@contextmanager
def _watch(model: Any, see: Callable[[str, tuple[torch.Tensor, ...]], None]) -> Iterator[None]:
    """Hand the output of every module without children to `see`, in the order they run.

    A linear layer is one, with an adapter on it or without.
    """

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, output: see(name, _tensors(output))

    hooks = [
        module.register_forward_hook(hook(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) or not any(module.children())
    ]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


class Trace:
    """What the modules of a model put out, in order.

    Args:
        model: The model that is compared with.
        inputs: Keyword arguments of its forward.
        skip: A module whose output is compared elsewhere: the head, which may have grown.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], skip: torch.nn.Module) -> None:
        self._outputs: list[tuple[str, tuple[torch.Tensor, ...]]] = []
        self._head = next((n for n, module in model.named_modules() if module is skip), "")
        self.logits = self._run(model, inputs, lambda *seen: self._outputs.append(seen))

    def _run(
        self, model: Any, inputs: dict[str, Any], see: Callable[[str, tuple[Any, ...]], None]
    ) -> torch.Tensor:
        with torch.no_grad(), _watch(model, see):
            logits: torch.Tensor = model(**inputs).logits
        return logits

    def compare(self, model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, int, str]:
        """Run another model.

        Returns:
            Its logits, how many of its modules put out something else, and the first of them with
            the largest difference.
        """
        expected = iter(self._outputs)
        wrong: list[str] = []

        def see(name: str, found: tuple[torch.Tensor, ...]) -> None:
            known, values = next(expected, ("", ()))
            if name == self._head and known == name:
                return
            reason = _difference(known, values, name, found)
            if reason:
                wrong.append(reason)

        logits = self._run(model, inputs, see)
        wrong += [f"{name} does not run" for name, _ in expected]
        return logits, len(wrong), wrong[0] if wrong else ""

    def __len__(self) -> int:
        """How many outputs were seen."""
        return len(self._outputs)


def _difference(
    known: str, values: tuple[torch.Tensor, ...], name: str, found: tuple[torch.Tensor, ...]
) -> str:
    if known != name:
        return f"{name} runs where the base runs {known or 'nothing'}"
    pairs = [_alike(a, b) for a, b in zip(values, found, strict=False)]
    if len(values) != len(found) or None in pairs:
        return f"{name} puts out another shape"
    apart = [(a - b).abs() for a, b in filter(None, pairs) if not torch.equal(a, b)]
    most = max((float(difference.max()) for difference in apart), default=0.0)
    return f"{name} differs by {most:.3g}" if apart else ""


def _alike(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return two outputs in one shape, None if they have none: positions may come once for all."""
    if a.shape == b.shape:
        return a, b
    if a.dim() == b.dim() > 0 and a.shape[1:] == b.shape[1:] and 1 in (len(a), len(b)):
        rows = max(len(a), len(b))
        return a.expand(rows, *a.shape[1:]), b.expand(rows, *b.shape[1:])
    return None
