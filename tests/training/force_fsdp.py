"""The command line, in processes that Accelerate lets shard on a CPU.

This says whether parameters were sharded, and how many numbers each process read.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if "RANK" not in os.environ:
    # The launcher: its processes have to run this file, not the package.
    from dllm_convert.pipeline import launch

    original = launch.launcher_arguments

    def launch_this(asked: object, command: list[str], **how: object) -> int:
        from accelerate.commands.launch import launch_command, launch_command_parser

        line = [*original(asked, how["machine"]), __file__, *command]  # type: ignore[arg-type]
        launch_command(launch_command_parser().parse_args(line))
        return 0

    launch.launch = launch_this  # type: ignore[assignment]
else:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    from benchmarks.sharded import shard_on_cpu

    shard_on_cpu()

    from dllm_convert.modeling.slices import Slices
    from dllm_convert.training import distributed, trainer, writing

    read, fill, fill_shards = [0], Slices.fill, trainer.fill_shards

    def counted(self: object, name: str, target: object, *first: object) -> None:
        read[0] += target.numel()  # type: ignore[attr-defined]
        fill(self, name, target, *first)  # type: ignore[arg-type]

    def told(model: object, *where: object) -> None:
        read[0] = 0
        fill_shards(model, *where)  # type: ignore[arg-type]
        weights = model.parameters()  # type: ignore[attr-defined]
        whole = sum(weight.numel() for weight in weights)
        sys.stderr.write(f"read {read[0]} of {whole} numbers\n")

    Slices.fill, trainer.fill_shards = counted, told  # type: ignore[method-assign, assignment]

    in_shards = distributed.in_shards

    def watched(trained: object) -> bool:
        from torch.distributed.tensor import DTensor

        weights = list(trained.model_wrapped.parameters())  # type: ignore[attr-defined]
        sharded = all(isinstance(weight, DTensor) for weight in weights)
        sys.stderr.write(f"sharded parameters: {'yes' if sharded else 'no'}\n")
        return in_shards(trained)

    def never(trained: object) -> object:
        raise AssertionError("no process holds all weights")

    writing.in_shards = watched  # type: ignore[attr-defined]
    writing.gathered_weights = never  # type: ignore[assignment]

from dllm_convert.cli.app import main

main()
