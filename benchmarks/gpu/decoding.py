"""How fast decoding is: against one forward of a block, and against the autoregressive model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.devices import current_device, median_seconds, release
from benchmarks.gpu.checks import Check, Options
from benchmarks.gpu.models import MASK, SIZES, build
from benchmarks.gpu.table import Results
from dllm_convert.modeling.published.cache import BlockCache

GROUP = "decoding"
FORWARDS = {"135M": (500, 16_000), "1.5B": (450, 1_393), "7B": (220, 282)}
"""Forwards per second of one row on an H200: the goal, and what reading the weights allows."""
TOKENS = {("1.5B", 64): 23_000}
"""Tokens per second on an H200 of a size and rows, four tokens a forward."""


def checks(options: Options, results: Results) -> Iterator[Check]:
    """Yield each size with one row and with many."""
    sizes = ["tiny"] if options.tiny else list(FORWARDS)
    for size in sizes:
        for rows in (1, 2) if options.tiny else (1, 64):
            label = f"{size}, {rows} rows" if rows > 1 else f"{size}, 1 row"
            yield Check(label, partial(measure, options, results, size, rows, label))


def measure(options: Options, results: Results, size: str, rows: int, label: str) -> None:
    """Time the bare forward, decoding at one and four tokens a forward, and the base's decoding."""
    add = partial(results.add, GROUP)
    block, prompt, new = (8, 16, 16) if options.tiny else (32, 128, 128)
    device = current_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = build(size, "bd3lm", block, dtype=dtype)
    ids = torch.randint(10, min(500, SIZES[size].vocab_size), (rows, prompt), device=device)
    forward = bare_forward(model, rows, block, prompt)
    bare = median_seconds(forward, 5, warm=3)
    add(f"{label}: one forward of a block, as it is", bare * 1e3, "ms")
    if device.type == "cuda":
        what = f"{label}: one forward of a block, from a CUDA graph"
        try:
            bare = replayed(forward)
            add(what, bare * 1e3, "ms")
        except RuntimeError as error:  # decoding is to be timed all the same
            results.broke(GROUP, what, str(error))
    rates = {}
    for tokens in (1, 4):
        rates[tokens] = decode(results, model, ids, new, block, tokens, size, label, bare)
    del model, forward
    release()
    plain = build(size, None, dtype=dtype)
    mask = torch.ones_like(ids)
    own = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 2}
    took = median_seconds(lambda: plain.generate(ids, attention_mask=mask, **own), 1)
    rate = rows * new / took
    add(f"{label}: autoregressive, by transformers", rate, "tokens/s")
    for tokens, ours in rates.items():
        add(f"{label}: ours with {tokens} a forward over it", ours / rate, "x")


def decode(
    results: Results,
    model: Any,
    ids: torch.Tensor,
    new: int,
    block: int,
    tokens: int,
    size: str,
    label: str,
    bare: float,
) -> float:
    """Time a decoding that writes so many tokens a forward; return tokens per second."""
    add, rows = partial(results.add, GROUP), len(ids)
    label = f"{label}, {tokens} tokens a forward" if tokens > 1 else f"{label}, 1 token a forward"
    made: list[Any] = []

    def run() -> None:
        output = model.generate(
            ids,
            max_new_tokens=new,
            max_denoising_steps=block // tokens,
            eos_token_id=None,
            return_dict_in_generate=True,
        )
        made.append(output)

    took = median_seconds(run, 1)
    per_second, rate = made[-1].forwards / took, rows * new / took
    goal, ok = "", None
    if rows == 1 and tokens == 1 and size in FORWARDS:
        least, most = FORWARDS[size]
        goal, ok = f"> {least:,}, of at most {most:,}", per_second > least
    add(f"{label}: forwards", per_second, "1/s", goal=goal, ok=ok)
    goal, ok = "", None
    if tokens == 4 and (size, rows) in TOKENS:
        wanted = TOKENS[size, rows]
        goal, ok = f"> {wanted:,}", rate > wanted
    add(f"{label}: tokens", rate, "tokens/s", goal=goal, ok=ok)
    add(f"{label}: share of it that is bare forwards", bare * per_second)
    replays = getattr(model, "graph_replays", None)
    if replays is not None:
        add(f"{label}: steps replayed from a graph, of {made[-1].forwards}", replays)
    return rate


def bare_forward(model: Any, rows: int, block: int, cached: int) -> Callable[[], Any]:
    """Return one denoising forward behind a cache: a call that writes over what it wrote before.

    Args:
        model: A bd3lm.
        rows: Rows.
        block: Tokens of the forward.
        cached: Clean tokens before them.
    """
    device = current_device()
    cache = BlockCache(cached + block)
    ids = torch.randint(10, 60, (rows, cached), device=device)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    cache.frozen = True
    columns = torch.arange(cached, cached + block, device=device).expand(rows, -1).contiguous()
    tokens = torch.full((rows, block), MASK, device=device)
    # Of half of the positions, as in the middle of a block.
    wanted = torch.arange(rows * block, device=device)[::2]
    cache.place(columns)

    @torch.no_grad()
    def run() -> Any:
        return model(
            tokens,
            past_key_values=cache,
            use_cache=True,
            position_ids=columns,
            logits_at=wanted,
            sees_all=True,
        ).logits

    return run


def replayed(run: Callable[[], Any]) -> float:
    """Seconds of a piece of work, replayed from a CUDA graph."""
    cuda: Any = torch.cuda
    side = cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return median_seconds(graph.replay, 10, warm=3)
