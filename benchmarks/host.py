"""Host time of a micro-step: what a device waits for when its own work is short.

    python -m benchmarks.host
    python -m benchmarks.host --repeats 50 --rows 4 --length 1024

28 layers whose matrices are 32 wide: arithmetic is next to nothing, what is left is Python, the
dispatch of operations and the autograd graph. A line a kind of training, a forward and backward
each: median, least and largest milliseconds, and the median of the processor's, which is what is
left where other work is beside it. Then, for rows as they are trained on, what lays them out:
noise, the two streams, and the block mask of flex attention. All on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.devices import add_device, chosen_device, current_device, settle
from benchmarks.gpu.models import ADAPTER, build, columns, recipe_of
from benchmarks.steps import Columns, micro_step
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.common.tables import Table
from dllm_convert.diffusion.attention import TILE
from dllm_convert.diffusion.corruption import ForwardProcess, NoiseKey, corrupt
from dllm_convert.diffusion.objective import Objective
from dllm_convert.diffusion.prediction import predict
from dllm_convert.training.checkpointing import checkpoint_activations
from dllm_convert.training.data.rows import text_batch
from dllm_convert.training.gpu_attention import register_flex
from dllm_convert.training.setup import make_trainable

BLOCK = 16
METHODS = ("full", "lora")
KINDS = ("off", "selective", "full")
GOAL_MS = {"full, off": 60.0, "block mask": 2.0}


@dataclass(frozen=True)
class Times:
    """How long calls took to return, in milliseconds.

    Attributes:
        wall: By the clock, rising.
        processor: Of this process, median: what it would have been with nothing beside it.
    """

    wall: list[float]
    processor: float

    @property
    def median(self) -> float:
        """Of the times by the clock."""
        return statistics.median(self.wall)


def host_time(run: Callable[[], Any], repeats: int) -> Times:
    """Time a call until it returns, the device idle when it begins."""
    run()
    wall, processor = [], []
    for _ in range(repeats):
        settle()
        started, used = time.perf_counter(), time.process_time()
        run()
        wall.append(1e3 * (time.perf_counter() - started))
        processor.append(1e3 * (time.process_time() - used))
    return Times(sorted(wall), statistics.median(processor))


def micro_steps(method: str, checkpointing: str, repeats: int) -> Times:
    """Time of a forward and backward of the layers without arithmetic."""
    cuda = torch.cuda.is_available()
    recipe = recipe_of(
        *("bd3lm", BLOCK, 32, 1),
        name="nil",
        method=method,
        gradient_checkpointing=checkpointing,
        lora={"rank": 4},
        precision="bf16" if cuda else "fp32",
    )
    # Not the tiles of a CPU, which are Python and no part of what a GPU runs.
    dtype = torch.bfloat16 if cuda and method == "lora" else torch.float32
    model = build("nil", attention=register_flex() if cuda else "sdpa", dtype=dtype, block=BLOCK)
    objective = Objective.from_config(model.config)
    checkpoint_activations(model, recipe.training.gradient_checkpointing)
    model = make_trainable(model, ADAPTER, recipe.training)
    _, step = micro_step(model, recipe, objective)
    row = columns(1, 32, vocabulary=60)

    def forward_and_backward() -> None:
        step(row)
        model.zero_grad()

    return host_time(forward_and_backward, repeats)


def layout(rows: int, length: int, repeats: int) -> dict[str, Times]:
    """Time of drawing noise, laying out two streams, and their block mask."""
    text: Columns = columns(rows, length)
    batch = text_batch(text)
    objective = Objective("bd3lm", 5, token_shift=True, block_size=BLOCK)
    key, process = NoiseKey(0, 0, 0, rows), ForwardProcess()
    views = corrupt(batch, objective, process, key)
    forward = predict(batch, views, objective, multiple=TILE)
    device = current_device()

    found: dict[str, Callable[[], Any]] = {
        "noise": lambda: corrupt(batch, objective, process, key),
        "two streams": lambda: predict(batch, views, objective, multiple=TILE),
    }
    if (mask := forward.mask) is not None:
        # A copy has not been asked for its rule yet.
        found |= {
            "who sees whom": lambda: replace(mask).rule,
            "block mask": lambda: mask.rule.block_mask(device),
        }
    return {name: host_time(run, repeats) for name, run in found.items()}


def measure(rows: int, length: int, repeats: int) -> dict[str, Times]:
    """All of it, by name."""
    found = {
        f"{method}, {kind}": micro_steps(method, kind, repeats)
        for method in METHODS
        for kind in KINDS
    }
    return found | layout(rows, length, repeats)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4, help="of the block mask")
    parser.add_argument("--length", type=int, default=1024, help="of the block mask")
    parser.add_argument("--repeats", type=int, default=20)
    add_device(parser)
    options = parser.parse_args()
    chosen_device(options)
    torch.set_num_threads(1)
    with quiet_libraries():
        found = measure(options.rows, options.length, options.repeats)
    table = [
        (name, times.median, times.wall[0], times.wall[-1], times.processor, GOAL_MS.get(name))
        for name, times in found.items()
    ]
    print(Table(("", "median ms", "least", "largest", "processor", "goal"), table))


if __name__ == "__main__":
    main()
