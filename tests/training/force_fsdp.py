"""The command line, in processes that Accelerate lets shard on a CPU.

Accelerate chooses FSDP on accelerators only; FSDP2 itself works on gloo. This sets the distributed
type when the plugin is there, in every process, and says whether parameters were sharded.
"""

from __future__ import annotations

import os
import sys

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
    from accelerate import state
    from accelerate.utils import DistributedType

    initialise = state.AcceleratorState.__init__

    def forced(self: object, *args: object, **kwargs: object) -> None:
        initialise(self, *args, **kwargs)  # type: ignore[arg-type, misc]
        # Every later instance resets the shared type to that of the process group.
        shared = self._shared_state  # type: ignore[attr-defined]
        plugin = kwargs.get("fsdp_plugin") or shared.get("fsdp_plugin")
        if plugin is not None:
            shared |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}

    state.AcceleratorState.__init__ = forced  # type: ignore[method-assign, assignment]

    from dllm_convert.training import distributed, writing

    gather = distributed.gathered_weights

    def watched(trainer: object) -> object:
        from torch.distributed.tensor import DTensor

        weights = list(trainer.model_wrapped.parameters())  # type: ignore[attr-defined]
        sharded = all(isinstance(weight, DTensor) for weight in weights)
        sys.stderr.write(f"sharded parameters: {'yes' if sharded else 'no'}\n")
        return gather(trainer)

    writing.gathered_weights = watched  # type: ignore[assignment]

from dllm_convert.cli.app import main

main()
