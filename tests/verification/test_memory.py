"""What does not fit memory is skipped with its numbers; headers are probed all the same."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_cases import WEIGHTS, edit_json, make_foreign
from safetensors.torch import load, save_file

from dllm_convert.source.safetensors_header import encode_header, read_header
from dllm_convert.verification import GROUPS, Probe, memory, verify_checkpoint
from dllm_convert.verification.instruments.reading import read_rows, read_tensor
from dllm_convert.verification.memory import WITHOUT_MODEL

GIB = 1 << 30
NEED_A_MODEL = [
    group
    for group in GROUPS
    if group not in {*WITHOUT_MODEL, "device", "gated", "behind", "lossless"}
]


def verify(folder: Path, groups: Collection[str] = GROUPS, **options: Any) -> dict[str, Probe]:
    report = verify_checkpoint(folder, groups=groups, **options)
    assert report.passed, [probe for probe in report.failed]
    return {probe.name: probe for probe in report.probes}


def make_sparse(folder: Path, intermediate: int) -> None:
    """Widen the MLPs of a tiny checkpoint: the file has that size, and takes almost no disk."""
    edit_json(folder / "config.json", lambda config: config.update(intermediate_size=intermediate))
    small: dict[str, torch.Tensor] = {}
    entries: dict[str, tuple[str, list[int], int]] = {}
    wide: list[tuple[str, tuple[str, list[int], int]]] = []
    for name, tensor in load((folder / WEIGHTS).read_bytes()).items():
        shape = list(tensor.shape)
        if ".mlp." in name:
            shape = [intermediate if size == 64 else size for size in shape]
            wide.append((name, ("F32", shape, 4 * shape[0] * shape[1])))
        else:
            small[name] = tensor
            entries[name] = ("F32", shape, 4 * tensor.numel())
    entries |= dict(wide)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(encode_header(entries, {}))
        for tensor in small.values():
            file.write(tensor.numpy().tobytes())
        file.truncate(file.tell() + sum(size for _, (_, _, size) in wide))


def test_a_file_larger_than_any_memory(converted: Callable[..., Any]) -> None:
    folder = converted("llama", "bd3lm").folder
    make_sparse(folder, 1 << 33)
    assert (folder / WEIGHTS).stat().st_size > 5 << 40

    probes = verify(folder)

    assert {"config", "weights", "mask-id", "mask-row", "tokenizer"} <= {
        name for name, probe in probes.items() if probe.passed
    }
    for name in NEED_A_MODEL:
        assert probes[name].passed is None
        assert "the model in float32 needs" in probes[name].detail
        assert "TiB of memory" in probes[name].detail
        assert "are free" in probes[name].detail
    assert probes["finite"].passed is None
    assert "alone needs 1 TiB" in probes["finite"].detail


def test_a_limit_below_the_model(
    converted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted("qwen3", "mdlm").folder
    make_sparse(folder, 1 << 18)  # 192 MiB of weights
    monkeypatch.setattr(memory, "available_bytes", lambda: GIB // 8)

    probes = verify(folder)

    assert probes["finite"].passed
    assert all(probes[name].passed is None for name in NEED_A_MODEL)
    assert probes["attention"].detail.endswith("128 MiB are free")


def test_a_limit_below_a_second_model(
    converted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = converted("llama", "mdlm").folder
    logits = 3 * 512 * 4 * json.loads((folder / "config.json").read_text())["vocab_size"]
    weights = (folder / WEIGHTS).stat().st_size
    monkeypatch.setattr(memory, "available_bytes", lambda: int(1.5 * weights) + logits)

    probes = verify(folder, ["portability", "attention"])

    assert probes["portability"].passed is None
    assert probes["attention-sdpa"].passed


def test_a_layout_with_other_names_is_not_copied_in_vain(
    source_factory: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_foreign(source_factory, "LLaDA")
    monkeypatch.setattr(memory, "available_bytes", lambda: 100_000)

    probes = verify(folder)

    passed = {name for name, probe in probes.items() if probe.passed}
    assert {"claim", "weights", "finite", "mask-id", "mask-row", "tokenizer"} <= passed
    assert all("needs" in probes[name].detail for name in NEED_A_MODEL)


# Reading without a mapping -------------------------------------------------------------------

TENSORS = {
    "matrix": torch.arange(24.0).view(6, 4),
    "half": torch.randn(5, 2, 3).to(torch.bfloat16),
    "eighth": torch.randn(4, 2).to(torch.float8_e4m3fn),
    "scalar": torch.tensor(7, dtype=torch.int64),
    "flags": torch.tensor([True, False, True]),
    "nothing": torch.zeros(0, 3),
    "no-columns": torch.zeros(3, 0),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_is_read_as_it_was_written(tmp_path: Path, name: str) -> None:
    save_file(TENSORS, tmp_path / WEIGHTS)
    header = read_header(tmp_path / WEIGHTS)
    expected = TENSORS[name]
    found = read_tensor(tmp_path, header, name)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert torch.equal(found.double(), expected.double())
    if expected.dim():
        pieces = list(read_rows(tmp_path, header, name, at_once=4))
        assert torch.equal(torch.cat(pieces).double(), expected.double())
        assert all(len(piece) <= 4 for piece in pieces)
