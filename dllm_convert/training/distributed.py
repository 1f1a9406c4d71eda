"""Several processes: they meet before the training, share its strategy, and part after it."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from dllm_convert.common.interruption import heard
from dllm_convert.common.ranks import Rank
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.published.gated import is_adapter
from dllm_convert.training.shards import own_name

PATIENCE = timedelta(hours=24)
"""The others wait while the first process downloads, adapts and measures."""

Job = TypeVar("Job")

_ASKED = {
    "ACCELERATE_USE_FSDP": (DistributedType.FSDP, "FSDP"),
    "ACCELERATE_USE_DEEPSPEED": (DistributedType.DEEPSPEED, "DeepSpeed"),
}


def meet(place: Rank, job: Job | None = None) -> Job | None:
    """Wait for all processes; return what the first one hands out, or leave the group.

    Args:
        place: This process.
        job: What there is to train, None for nothing; of the first process, the others' is not
            looked at. It goes from one process of this run to another, and to no file.

    Returns:
        The same value in every process. The others never plan for themselves: a source may have
        moved since the first one did.
    """
    if place.world == 1:
        return job
    cpu = not torch.accelerator.is_available()
    with nullcontext() if place.main else _nothing_to_save():
        state = PartialState(cpu=cpu, timeout=PATIENCE)
        box = [job]
        dist.broadcast_object_list(box, src=0, device=state.device)
    if box[0] is None:
        part()
    return box[0]


@contextmanager
def _nothing_to_save() -> Iterator[None]:
    """End at a signal while waiting for the first process.

    Python's handlers do not run while torch waits: when the first process failed, a launcher gave
    the others half a minute before it killed them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(number, signal.signal(number, signal.SIG_DFL)) for number in heard()]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def part(wrapped: Any = None) -> None:
    """Leave the group, if there is one: what comes after is the first process's work alone.

    Args:
        wrapped: The model as it was trained, in the wrapper that held the group.
    """
    if isinstance(wrapped, DistributedDataParallel):
        # Its reducer holds the group in C++. Freed later, by the collector, it would be the last to
        # do so, and wait for the group's threads while those wait for the interpreter.
        del wrapped.logger, wrapped.reducer
    if dist.is_initialized():
        dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)


def check_strategy(accelerator: Any, environment: Mapping[str, str] = os.environ) -> None:
    """Refuse to train in another way than was asked for, or something else than a diffusion model.

    Accelerate chooses FSDP on accelerators only, and silently trains with DDP elsewhere: every
    process would hold the whole model. Its context parallelism takes each layer's mask away and has
    attention be causal; the processes that share a sequence, or a matrix, would each draw noise of
    their own.

    Raises:
        IncompatibleError: The strategy in force is not the one asked for, or processes share
            sequences or matrices.
    """
    parallel = getattr(accelerator, "parallelism_config", None)
    shared = {
        name: size
        for name in ("tp_size", "cp_size", "sp_size")
        if (size := getattr(parallel, name, 1) or 1) > 1
    }
    if shared:
        found = ", ".join(f"{name}={size}" for name, size in shared.items())
        raise IncompatibleError(
            f"Accelerate's parallelism_config has {found}, expected data parallelism alone: of "
            "processes that share a sequence or a matrix each would draw noise of its own, and "
            "context parallelism drops the masks that diffusion is trained with",
            hint="Leave them out: FSDP2 over more processes shares weights, gradients and moments",
        )
    for variable, (expected, name) in _ASKED.items():
        if _is_set(environment, variable) and accelerator.distributed_type != expected:
            raise IncompatibleError(
                f"{name} was asked for, and Accelerate would train with "
                f"{accelerator.distributed_type.value} on {accelerator.device.type}",
                hint=f"{name} needs GPUs; without them launch with recipes/launch/ddp.yaml",
            )


def shards_weights(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether FSDP2 was asked for, for several processes: each reads its own weights."""
    several = int(environment.get("WORLD_SIZE", "1")) > 1
    version = environment.get("FSDP_VERSION", "1")
    return several and version == "2" and _is_set(environment, "ACCELERATE_USE_FSDP")


def _is_set(environment: Mapping[str, str], variable: str) -> bool:
    return environment.get(variable, "false").lower() in ("1", "true", "yes")


def reduce_in_float32(accelerator: Any) -> None:
    """Have FSDP2 add up gradients in float32, before it prepares a model.

    Accelerate adds them in the type that matrices are multiplied in: of 64 gradients in bfloat16
    whose sum has eight significant bits, the small ones are gone.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    policy = getattr(plugin, "mixed_precision_policy", None)
    if plugin is not None and isinstance(policy, MixedPrecisionPolicy):
        plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32)


def share_no_weights(accelerator: Any) -> None:
    """Have FSDP2 send no weights from the first process to the others: each reads its own."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.cpu_ram_efficient_loading = False


def device_of_shards(accelerator: Any) -> torch.device:
    """Return where FSDP2 wants the weights to lie."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    offloads = isinstance(getattr(plugin, "cpu_offload", None), CPUOffloadPolicy)
    return torch.device("cpu") if offloads else torch.device(accelerator.device)


def keeps_gathered(accelerator: Any) -> bool:
    """Whether FSDP2 keeps gathered weights from the forward to the backward pass."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    return getattr(plugin, "reshard_after_forward", None) is False


def is_sharded(trainer: Any) -> bool:
    """Whether no process holds the whole model: seen in its weights, whatever the settings say."""
    # What FSDP1 and DeepSpeed hold are no DTensors.
    shares = (DistributedType.DEEPSPEED, DistributedType.FSDP)
    return trainer.accelerator.distributed_type in shares or in_shards(trainer)


def in_shards(trainer: Any) -> bool:
    """Whether FSDP2 shares the weights, which can then be gathered one by one."""
    return any(isinstance(weight, DTensor) for weight in trainer.model_wrapped.parameters())


@torch.no_grad()
def gathered(weight: torch.Tensor) -> torch.Tensor | None:
    """Put one weight together in the first process; all have to call this, in the same order.

    Its parts are sent one by one: no process but the first holds more than its own.

    Returns:
        The whole on the CPU in the first process, None in the others.
    """
    first = not dist.is_initialized() or dist.get_rank() == 0
    if not isinstance(weight, DTensor):
        return weight.detach().cpu() if first else None
    mesh, own = weight.device_mesh, weight.to_local()
    sharded = [at for at, placement in enumerate(weight.placements) if placement.is_shard()]
    if len(sharded) != 1 or weight.placements[sharded[0]] != Shard(0):
        whole = weight.full_tensor()
        return whole.cpu() if first else None
    group = mesh.get_group(sharded[0])
    ranks = dist.get_process_group_ranks(group)
    if 0 not in ranks:
        # A copy, of which the first process's own group has another.
        return None
    if not first:
        if own.numel():
            dist.send(own.contiguous(), 0, group=group)
        return None
    # As torch cuts: all but the last parts have as many rows, and the last may have none.
    rows = -(-weight.shape[0] // len(ranks))
    whole = torch.empty(weight.shape, dtype=weight.dtype)
    for at, rank in enumerate(ranks):
        place = whole[at * rows : (at + 1) * rows]
        if rank == 0:
            place.copy_(own)
        elif place.numel() and own.device == place.device:
            dist.recv(place, rank, group=group)
        elif place.numel():
            part_of = torch.empty(place.shape, dtype=place.dtype, device=own.device)
            dist.recv(part_of, rank, group=group)
            place.copy_(part_of)
    return whole


def gathered_adapter(trainer: Any) -> dict[str, torch.Tensor]:
    """Put the adapter of a gated model together, by its names there; all processes call this."""
    if is_sharded(trainer) and not in_shards(trainer):
        return gathered_weights(trainer)
    found = {
        own_name(name): gathered(weight)
        for name, weight in trainer.model.named_parameters()
        if is_adapter(name)
    }
    return {name: weight for name, weight in found.items() if weight is not None}


def gathered_weights(trainer: Any) -> dict[str, torch.Tensor]:
    """Put sharded weights together; all processes have to call it.

    Returns:
        Name to weight on the CPU, in the first process; possibly nothing in the others.
    """
    if trainer.accelerator.distributed_type == DistributedType.DEEPSPEED:
        return dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights: Any = get_model_state_dict(trainer.model_wrapped, options=whole)
    return dict(weights)
