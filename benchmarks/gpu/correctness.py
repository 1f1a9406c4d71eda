"""Whether the device computes what a CPU does: masks, gradients, short trainings, decoding."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.devices import current_device
from benchmarks.gpu.checks import Check, Options
from benchmarks.gpu.models import ADAPTER, MASK, build, columns, recipe_of
from benchmarks.gpu.table import CORRECTNESS, Results
from benchmarks.steps import ours, trained_weights
from dllm_convert.behaviour.influence import STILL, Pattern, measure_influence
from dllm_convert.diffusion.attention import TILE
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.objective import Objective, TextBatch
from dllm_convert.diffusion.prediction import predict
from dllm_convert.diffusion.streams import WIDTH_MULTIPLE
from dllm_convert.training.cpu_attention import register_tiles
from dllm_convert.training.data.rows import text_batch
from dllm_convert.training.gpu_attention import register_flex
from dllm_convert.training.setup import make_trainable

BLOCK = 8
STEPS = 10
_REFERENCE_S = 240
"""What the CPU's process may take for its trainings."""


def checks(options: Options, results: Results) -> Iterator[Check]:
    """Yield all of it, the cheapest first."""
    add = partial(results.add, CORRECTNESS)
    reference = Reference(options.out / "reference.json")
    yield Check("types of what LoRA trains", partial(lora_types, add))
    for target in ("bd3lm", "mdlm"):
        for attention in ("sdpa", "eager", "flex_attention"):
            for dtype in (torch.float32, torch.bfloat16):
                what = f"influence, {target} {attention} {_name(dtype)}"
                yield Check(what, partial(influence, add, what, target, attention, dtype))
    for attention in ("eager", sparse_attention()):
        yield Check(f"two streams, {attention}", partial(two_streams, add, attention))
    yield Check("packed documents", partial(packed, add))
    for target, settings in (
        ("bd3lm", {}),
        ("bd3lm", {"confidence_threshold": 0.01}),
        ("mdlm", {}),
        ("mdlm", {"block_length": 8}),
    ):
        shown = ", ".join([target, *settings])
        yield Check(f"decoding, {shown}", partial(decoding, add, target, settings, shown))
    yield Check("decoding with its cache", partial(cached_decoding, add))
    for method, precision in (("full", "fp32"), ("full", "bf16"), ("lora", "bf16")):
        what = f"{STEPS} steps, {method} {precision}"
        yield Check(what, partial(same_training, add, what, method, precision, reference))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sparse_attention() -> str:
    """Register the attention of training that skips what nobody sees, and return its name."""
    return register_flex() if torch.cuda.is_available() else register_tiles()


def lora_types(add: Any) -> None:
    """All that LoRA trains is float32, whatever is frozen."""
    recipe = recipe_of("bd3lm", BLOCK, 64, 4, method="lora")
    model = make_trainable(build("tiny", dtype=torch.bfloat16), ADAPTER, recipe.training)
    kinds = {_name(weight.dtype) for weight in trained_weights(model)}
    add(
        "types of what LoRA trains",
        ", ".join(sorted(kinds)),
        goal="float32",
        ok=kinds == {"float32"},
    )


@torch.no_grad()
def influence(add: Any, what: str, target: str, attention: str, dtype: torch.dtype) -> None:
    """Who moves when a token changes is who the claim says.

    In bfloat16 weak influences round away; there nothing that is shut may move at all, and at
    least half of what is open has to.
    """
    length, device = 27, current_device()
    model = build("tiny", target, BLOCK, attention=attention, dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(10, 500, (length,), generator=generator).to(device)
    other = (tokens - 10 + 117) % 490 + 10
    # On a CPU flex attention is not compiled: the same masks and the same function.
    stance = "default" if torch.cuda.is_available() else "force_eager"
    with torch.compiler.set_stance(stance):
        moved, scale = measure_influence(model, tokens, other, list(range(length)))
    position = torch.arange(length)
    allowed = torch.ones(length, length, dtype=torch.bool)
    if target == "bd3lm":
        allowed = position[:, None] >= position[None] // BLOCK * BLOCK
    limit = STILL * scale if dtype == torch.float32 else 0.0
    found = Pattern(moved.cpu().float(), allowed, limit, list(range(length)))
    wrong = found.wrong if dtype == torch.float32 else found.wrong & ~found.hidden
    seen = 1 - int(found.hidden.sum()) / int(allowed.sum())
    add(what, f"{int(wrong.sum())} of {wrong.numel()} pairs wrong", goal="0", ok=not wrong.any())
    if dtype != torch.float32:
        add(f"{what}: open pairs that move", seen, goal="> 0.5", ok=seen > 0.5)


def _loss_and_gradients(attention: str, batch: TextBatch) -> tuple[float, dict[str, torch.Tensor]]:
    model = build("tiny", "bd3lm", BLOCK, attention=attention).train()
    objective = Objective.from_config(model.config)
    views = corrupt(batch, objective, ForwardProcess(complementary=True), NoiseKey(0, 0, 0, 2))
    flex = attention == "dllm_flex"
    multiple = TILE if flex else WIDTH_MULTIPLE
    forward = predict(batch, views, objective, multiple=multiple).to(current_device())
    mask = forward.block_mask() if flex else forward.dense_mask()
    output = model(**forward.inputs, attention_mask=mask, use_cache=False)
    loss = (forward.nats(output.logits, objective) * forward.weight).sum() / batch.tokens.numel()
    torch.autograd.backward(loss)
    gradients = {name: w.grad.double().cpu() for name, w in model.named_parameters()}
    return float(loss.detach()), gradients


def two_streams(add: Any, attention: str) -> None:
    """Training's forward and backward, against sdpa with the dense mask and the same noise."""
    batch = text_batch(columns(2, 96, documents=3))
    loss, gradients = _loss_and_gradients("sdpa", batch)
    found, own = _loss_and_gradients(attention, batch)
    apart = abs(found / loss - 1)
    add(f"two streams, {attention} against sdpa: loss", apart, goal="< 1e-5", ok=apart < 1e-5)
    worst = max(
        float((own[name] - gradient).norm() / gradient.norm().clamp(min=1e-9))
        for name, gradient in gradients.items()
    )
    what = f"two streams, {attention} against sdpa: worst gradient"
    add(what, worst, goal="< 1e-3", ok=worst < 1e-3)


@torch.no_grad()
def packed(add: Any) -> None:
    """Documents of one row are predicted as each is alone."""
    model = build("tiny", "bd3lm", BLOCK)
    objective = Objective.from_config(model.config)
    row = text_batch(columns(1, 96, documents=3))
    (view,) = corrupt(row, objective, ForwardProcess(draw="count"), NoiseKey(1, 0, 0, 1))

    def nats(batch: TextBatch, noise: Any) -> torch.Tensor:
        forward = predict(batch, [noise], objective).to(current_device())
        mask = forward.dense_mask()
        output = model(**forward.inputs, attention_mask=mask, use_cache=False)
        return forward.nats(output.logits, objective)

    alone = []
    for number in range(3):
        inside = row.segments[0] == number
        document = replace(
            row,
            tokens=row.tokens[:, inside],
            segments=row.segments[:, inside] * 0,
            positions=row.positions[:, inside],
            loss=None,
        )
        noise = replace(view, scored=view.scored[:, inside], weight=view.weight[:, inside])
        alone.append(nats(document, noise))
    worst = float((nats(row, view) - torch.cat(alone)).abs().max())
    add("packed documents against each alone", worst, "nats", goal="< 1e-4", ok=worst < 1e-4)


def train_briefly(method: str, precision: str, attention: str) -> list[float]:
    """Losses of a short training; weights, text and noise are the same on every device."""
    recipe = recipe_of(
        *("bd3lm", BLOCK, 64, 4),
        method=method,
        precision=precision,
        lora={"rank": 16},
        noise={"complementary": True},
    )
    frozen = torch.bfloat16 if method == "lora" and precision == "bf16" else torch.float32
    # On the CPU first: its random numbers are not the device's.
    model = build("tiny", attention=attention, device=torch.device("cpu"), block=BLOCK).to(frozen)
    objective = Objective.from_config(model.config)
    model = make_trainable(model, ADAPTER, recipe.training).to(current_device())
    optimizer = torch.optim.AdamW(trained_weights(model), lr=1e-3, fused=True)
    step = ours(model, recipe, objective, optimizer)
    return [float(step(columns(4, 64, seed=number % 4))) for number in range(STEPS)]


def write_reference(path: Path) -> None:
    """Train on the CPU in float32, with sdpa, and write the losses."""
    found = {method: train_briefly(method, "fp32", "sdpa") for method in ("full", "lora")}
    path.write_text(json.dumps(found))


class Reference:
    """The CPU's losses, from a process that sees no GPU and runs beside the first checks."""

    def __init__(self, path: Path) -> None:
        self._path = path
        line = [sys.executable, "-m", "benchmarks.gpu", "--reference", str(path)]
        self._process = subprocess.Popen(line, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})

    def losses(self, method: str) -> list[float]:
        """Wait for them."""
        try:
            code = self._process.wait(_REFERENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise RuntimeError(f"the CPU's process took more than {_REFERENCE_S} s") from None
        if code:
            raise RuntimeError(f"the CPU's process ended with {code}")
        found: list[float] = json.loads(self._path.read_text())[method]
        return found


def same_training(add: Any, what: str, method: str, precision: str, reference: Reference) -> None:
    """The losses of a short training are those of the CPU in float32."""
    attentions = ["sdpa"] if precision == "fp32" else ["sdpa", sparse_attention()]
    limit = 1e-4 if precision == "fp32" else 3e-2
    for attention in attentions:
        losses = train_briefly(method, precision, attention)
        pairs = zip(losses, reference.losses(method), strict=True)
        worst = max(abs(here / there - 1) for here, there in pairs)
        shown = f"{what} {attention} against the CPU, {losses[0]:.2f} to {losses[-1]:.2f} nats"
        add(shown, worst, goal=f"< {limit:g}", ok=worst < limit)


def decoding(add: Any, target: str, settings: dict[str, Any], shown: str) -> None:
    """Tokens on the device are those of the CPU; a row of a batch is what it is alone."""
    prompts = torch.randint(10, 500, (3, 13), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(prompts)
    mask[1, :4] = 0
    device, new = current_device(), 24
    host = build("tiny", target, BLOCK, device=torch.device("cpu"))
    model = copy.deepcopy(host).to(device)
    settings = {"max_new_tokens": new, **settings}
    here = model.generate(prompts.to(device), attention_mask=mask.to(device), **settings).cpu()
    there = host.generate(prompts, attention_mask=mask, **settings)
    _same(add, f"decoding, {shown}: on the device and on the CPU", here, there)
    alone = model.generate(prompts[1:2, 4:].to(device), **settings).cpu()
    _same(add, f"decoding, {shown}: in a batch and alone", here[1, -new:], alone[0, -new:])
    if hasattr(model, "record_graphs"):
        # A switch of devices whose steps are recorded.
        model.record_graphs = False
        plain = model.generate(prompts.to(device), attention_mask=mask.to(device), **settings)
        _same(add, f"decoding, {shown}: recorded and not", here, plain.cpu())
    drawn = [
        model.generate(prompts.to(device), temperature=1.0, seed=7, **settings) for _ in range(2)
    ]
    _same(add, f"decoding, {shown}: a seed repeats", *drawn)


def _same(add: Any, what: str, one: torch.Tensor, other: torch.Tensor) -> None:
    share = float((one == other).float().mean())
    add(what, share, "of the tokens the same", goal="1", ok=share == 1)


def cached_decoding(add: Any) -> None:
    """Blocks behind a cache are written as they are where all is run anew in each forward."""
    model, new = build("tiny", "bd3lm", BLOCK), 24
    prompt = torch.randint(10, 500, (1, 13), generator=torch.Generator().manual_seed(1))
    prompt = prompt.to(current_device())
    cached = model.generate(prompt, max_new_tokens=new)[0, 13:]
    _same(add, "decoding with its cache and without", cached, decode_anew(model, prompt, new))


@torch.no_grad()
def decode_anew(model: Any, prompt: torch.Tensor, new: int) -> torch.Tensor:
    """Write one token per forward, the surest first, the whole text in every forward.

    Args:
        model: A bd3lm with token shift.
        prompt: Shape (1, length).
        new: Tokens to write.

    Returns:
        New tokens, shape (new,).
    """
    size, length = model.config.block_size, prompt.shape[1]
    total = -(-(length + new) // size) * size
    canvas = torch.full((1, total), MASK, device=prompt.device)
    canvas[:, :length] = prompt
    for start in range(length // size * size, total, size):
        end = start + size
        while bool((canvas[0, start:end] == MASK).any()):
            logits = model(canvas[:, :end], use_cache=False).logits[0].float()
            # The token before predicts: (end, vocab), then the block's.
            logits = torch.cat([logits[:1], logits[:-1]])[start:end]
            logits[:, MASK] = -torch.inf
            confidence, token = logits.softmax(-1).max(-1)
            confidence = confidence.masked_fill(canvas[0, start:end] != MASK, -1)
            at = int(confidence.argmax())
            canvas[0, start + at] = token[at]
    return canvas[0, length : length + new]
