"""The attention modules of a model, and the calls they receive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dllm_convert.errors import IncompatibleError


def attention_modules(model: Any, count: int) -> list[torch.nn.Module]:
    """Return the attention module of each layer.

    Raises:
        IncompatibleError: The model is not built of that many layers with attention in each.
    """
    stacks = (m for m in model.base_model.modules() if isinstance(m, torch.nn.ModuleList))
    layers = next((stack for stack in stacks if len(stack) == count), None)
    if layers is None:
        raise IncompatibleError(f"the model has no list of {count} layers")
    found = []
    for number, layer in enumerate(layers):
        inside = (m for m in layer.modules() if type(m).__name__.endswith("Attention"))
        module = next(inside, None)
        if module is None:
            raise IncompatibleError(f"layer {number} has no attention module")
        found.append(module)
    return found


@dataclass(frozen=True)
class AttentionCall:
    """One call of an attention module, which can be made again with other inputs.

    Attributes:
        module: The module.
        hidden: Its input, shape (batch, length, hidden).
        rest: Positional arguments after the input.
        named: Keyword arguments: mask, position embeddings.
    """

    module: torch.nn.Module
    hidden: torch.Tensor
    rest: tuple[Any, ...]
    named: dict[str, Any]

    def run(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the output, (batch, length, hidden), for another input of that shape."""
        found = self.module(hidden, *self.rest, **self.named)
        output: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return output


@torch.no_grad()
def record_calls(
    model: Any, modules: list[torch.nn.Module], **inputs: torch.Tensor
) -> list[AttentionCall]:
    """Run a model and return how each of the modules was called, in order."""
    calls: list[AttentionCall] = []

    def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = dict(kwargs)
        hidden = args[0] if args else named.pop("hidden_states")
        calls.append(AttentionCall(module, hidden, args[1:], named))

    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in modules]
    try:
        model(**inputs, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return calls
