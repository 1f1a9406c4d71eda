"""Shards of every kind are filled from files and put together again, over forked gloo processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dllm_convert.errors import IncompatibleError
from dllm_convert.training.data.mask_noise import standard_deviation
from dllm_convert.training.distributed import gathered
from dllm_convert.training.shards import fill_shards, hand_over, parameter_names
from dllm_convert.training.trainer import DiffusionTrainer

SHAPES = {"even": (8, 3), "uneven": (7, 5), "few": (1, 4), "line": (3,), "cube": (5, 2, 3)}


class Model(nn.Module):
    """Parameters of the shapes that shards come in: some processes hold none of some."""

    def __init__(self) -> None:
        super().__init__()
        for name, shape in SHAPES.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, device="meta")))


def tensors() -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()}


def share(folder: Path, mesh: tuple[int, ...]) -> None:
    """What each process does: shard, read, put together."""
    model, expected = Model(), tensors()
    optimizer = torch.optim.AdamW([{"params": list(model.parameters())}])
    groups = parameter_names(model, optimizer)
    names = ("replicate", "shard")[-len(mesh) :]
    fully_shard(model, mesh=init_device_mesh("cpu", mesh, mesh_dim_names=names))
    fill_shards(model, folder, torch.device("cpu"))
    hand_over(model, optimizer, groups)
    held = optimizer.param_groups[0]["params"]
    assert [id(one) for one in held] == [id(one) for one in model.parameters()]
    for name, weight in model.named_parameters():
        assert weight.to_local().shape[0] <= -(-SHAPES[name][0] // mesh[-1])
        spread = standard_deviation(weight.detach())
        if weight.numel() > 1:
            assert spread == pytest.approx(float(expected[name].std()), rel=1e-5)
        whole = gathered(weight)
        assert (whole is not None) == (dist.get_rank() == 0)
        if whole is not None:
            assert torch.equal(whole, expected[name]), name


def in_process(rank: int, world: int, store: Path, work: Callable[..., None], args: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    work(*args)
    dist.destroy_process_group()


@pytest.mark.parametrize("mesh", [(2,), (3,), (4,), (2, 2)])
def test_every_part_is_read_and_put_together(mesh: tuple[int, ...], tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "model.safetensors", {"format": "pt"})
    world = mesh[0] * (mesh[1] if len(mesh) > 1 else 1)
    forking = multiprocessing.get_context("fork")
    running = [
        forking.Process(
            target=in_process, args=(rank, world, tmp_path / "store", share, (tmp_path, mesh))
        )
        for rank in range(world)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(60)
    codes = [process.exitcode for process in running]
    for process in running:
        process.kill()
    assert codes == [0] * world


def test_a_checkpoint_of_the_whole_is_not_read_by_those_who_share(tmp_path: Path) -> None:
    class Sharing(DiffusionTrainer):
        def __init__(self) -> None:
            self.model = nn.Linear(1, 1)  # type: ignore[assignment]
            self.is_fsdp_enabled = True

    folder = tmp_path / "checkpoint-4"
    folder.mkdir()
    (folder / "model.safetensors").touch()
    with pytest.raises(IncompatibleError, match="checkpoint-4 holds the whole model") as refused:
        Sharing()._load_from_checkpoint(str(folder))
    assert "one process, or data parallel" in str(refused.value.hint)
