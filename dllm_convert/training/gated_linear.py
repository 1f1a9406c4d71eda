"""A frozen linear layer and its adapter as one operation, for training on a CPU.

Apart, the base's product, the adapter's and their sum are three tensors of the layer's width, of
which two are kept for the backward pass; together there is one. The adapter's products are added
in place by the matrix kernels themselves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from dllm_convert.modeling.published.gated import LowRank


@torch.library.custom_op("dllm_convert::gated_linear", mutates_args=())
def gated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """W x + b + scale B A x, where W and b are not trained (LoRA, arXiv 2106.09685).

    All of it is multiplied in the type of W, as autocast would.

    Args:
        x: Inputs, shape (n, inputs).
        weight: W, shape (outputs, inputs).
        bias: b, shape (outputs,), or None.
        down: A, shape (rank, inputs).
        up: B, shape (outputs, rank).
        scale: What the adapter is multiplied with.

    Returns:
        Shape (n, outputs), and scale A x, (n, rank), which the backward pass needs.
    """
    kind = weight.dtype
    rows = x.to(kind)
    low = torch.mm(rows, down.to(kind).T).mul_(scale)
    plain = torch.mm(rows, weight.T)
    result = plain if bias is None else plain.add_(bias)
    return result.addmm_(low, up.to(kind).T), low


@gated_linear.register_fake
def _(x: Any, weight: Any, bias: Any, down: Any, up: Any, scale: float) -> Any:
    return weight.new_empty(len(x), len(weight)), weight.new_empty(len(x), len(down))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    x, weight, _, down, up, ctx.scale = inputs
    ctx.save_for_backward(x, weight, down, up, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, down, up, low = ctx.saved_tensors
    kind = weight.dtype
    # dA = scale (g B)^T x, dB = g^T (scale A x), dx = g W + scale g B A.
    back = torch.mm(gradient, up.to(kind)).mul_(ctx.scale)
    for_x = None
    if ctx.needs_input_grad[0]:
        for_x = torch.mm(gradient, weight).addmm_(back, down.to(kind)).to(x.dtype)
    for_down, for_up = torch.mm(back.T, x.to(kind)), torch.mm(gradient.T, low)
    return for_x, None, None, for_down.to(down.dtype), for_up.to(up.dtype), None


gated_linear.register_autograd(_backward, setup_context=_remember)


def _forward(layer: Any, hook: LowRank, x: torch.Tensor) -> torch.Tensor:
    seen, kind = hook.gate.seen, x.dtype
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
    if not seen.everywhere or layer.weight.dtype != kind:
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        changed = hook(layer, (x,), plain)
        return plain if changed is None else changed
    rows = x.reshape(-1, x.shape[-1])
    matrices = layer.weight, layer.bias, layer.lora_A.weight, layer.lora_B.weight
    with torch.autocast(x.device.type, enabled=False):
        result: torch.Tensor = gated_linear(rows, *matrices, hook.scale)[0]
    return result.view(*x.shape[:-1], -1)


def fuse_adapters(model: Any, dtype: torch.dtype | None = None) -> None:
    """Have the adapted layers of a gated model be one operation each, on a CPU.

    Where some tokens are clean, or autocast chooses another type, they are what they were.

    Args:
        model: A gated model.
        dtype: Type to hold the frozen matrices of those layers in, if they are multiplied in it:
            autocast, which keeps no copy of what is not trained, would make one in every forward.
    """
    for layer in model.modules():
        hooks: dict[int, Any] = getattr(layer, "_forward_hooks", {})
        for number, hook in list(hooks.items()):
            plain = isinstance(layer, nn.Linear) and layer.weight.is_floating_point()
            # What waits for its weights is filled where it is trained.
            here = plain and layer.weight.device.type in ("cpu", "meta")
            if isinstance(hook, LowRank) and here:
                if dtype is not None:
                    layer.weight.data = layer.weight.data.to(dtype)
                del hooks[number]
                layer.forward = partial(_forward, layer, hook)
