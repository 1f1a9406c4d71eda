"""Checkpoints whose files have the right size and the wrong content."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dllm_convert.training.resume import damage, find_resumption, mark_whole


def checkpoint(folder: Path, step: int) -> Path:
    """Write what a Trainer saves, as far as it is looked at."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    weight = torch.nn.Parameter(torch.ones(8, 8))
    optimizer = torch.optim.AdamW([weight])
    weight.sum().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), made / "optimizer.pt")
    torch.save({"last_epoch": step}, made / "scheduler.pt")
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    mark_whole(made)
    return made


def zeros(data: bytes) -> bytes:
    return bytes(len(data))


def another_pickle(data: bytes) -> bytes:
    """Return a sound archive of the same size whose pickle is nonsense."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            content = old.read(info)
            new.writestr(info, content[::-1] if info.filename.endswith("data.pkl") else content)
    return out.getvalue()[: len(data)].ljust(len(data), b"\0")


def forbidden(data: bytes) -> bytes:
    return pickle.dumps(Path("/")).ljust(len(data), b"\0")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("spoil", [zeros, another_pickle, forbidden])
def test_the_one_before_stands_in(
    tmp_path: Path, name: str, spoil: Callable[[bytes], bytes]
) -> None:
    checkpoint(tmp_path, 2)
    newest = checkpoint(tmp_path, 4)
    assert damage(newest) is None
    path = newest / name
    data = path.read_bytes()
    path.write_bytes(spoil(data))
    assert path.stat().st_size == len(data)
    assert damage(newest) == f"{name} is broken"
    told: list[str] = []
    assert find_resumption(tmp_path, told.append, clean=True).step == 2
    assert len(told) == 1
    assert not newest.exists()


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"global_step": "4"}', "", "{"])
def test_a_state_that_is_no_state(tmp_path: Path, content: str) -> None:
    made = checkpoint(tmp_path, 2)
    (made / "trainer_state.json").write_text(content)
    (made / "complete").unlink()
    mark_whole(made)
    assert damage(made) == "trainer_state.json is broken"
