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
    low = torch.mm(x, down.T).mul_(scale)
    result = torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
    return result.addmm_(low, up.T), low


@gated_linear.register_fake
def _(x: Any, weight: Any, bias: Any, down: Any, up: Any, scale: float) -> Any:
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(down))


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, Any]) -> None:
    x, weight, _, down, up, ctx.scale = inputs
    ctx.save_for_backward(x, weight, down, up, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, gradient: torch.Tensor, _: Any) -> tuple[Any, ...]:
    x, weight, down, up, low = ctx.saved_tensors
    # dA = scale (g B)^T x, dB = g^T (scale A x), dx = g W + scale g B A.
    back = torch.mm(gradient, up).mul_(ctx.scale)
    for_x = torch.mm(gradient, weight).addmm_(back, down) if ctx.needs_input_grad[0] else None
    return for_x, None, None, torch.mm(back.T, x), torch.mm(gradient.T, low), None


gated_linear.register_autograd(_backward, setup_context=_remember)


def _forward(layer: Any, hook: LowRank, x: torch.Tensor) -> torch.Tensor:
    seen = hook.gate.seen
    if not seen.everywhere or torch.is_autocast_enabled(x.device.type):
        plain = nn.functional.linear(x, layer.weight, layer.bias)
        changed = hook(layer, (x,), plain)
        return plain if changed is None else changed
    rows = x.reshape(-1, x.shape[-1])
    matrices = layer.weight, layer.bias, layer.lora_A.weight, layer.lora_B.weight
    result: torch.Tensor = gated_linear(rows, *matrices, hook.scale)[0]
    return result.view(*x.shape[:-1], -1)


def fuse_adapters(model: Any) -> None:
    """Have the adapted layers of a gated model be one operation each, on a CPU in float32.

    Where some tokens are clean, or autocast chooses the types, they are what they were.
    """
    for layer in model.modules():
        hooks: dict[int, Any] = getattr(layer, "_forward_hooks", {})
        for number, hook in list(hooks.items()):
            plain = isinstance(layer, nn.Linear) and layer.weight.dtype == torch.float32
            if isinstance(hook, LowRank) and plain and layer.weight.device.type == "cpu":
                del hooks[number]
                layer.forward = partial(_forward, layer, hook)
