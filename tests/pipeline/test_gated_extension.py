"""A finished gated folder takes the place of the untrained one, adapter and all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gated import ADAPTER, gated_folder

from dllm_convert.common.manifest import hash_files, write_manifest
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.pipeline.extension import take_over


def test_it_is_taken_over_whole(source_cache: Callable[..., Path], tmp_path: Path) -> None:
    plan = gated_folder(source_cache("llama"), tmp_path / "done")
    write_manifest(tmp_path / "done", {"format_version": 1, "files": hash_files(tmp_path / "done")})
    take_over(plan, tmp_path / "done", tmp_path / "again")
    for name in (ADAPTER, "adapter/adapter_config.json", "config.json", "gated_dllm.py"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "done" / name).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "again" / weights).samefile(tmp_path / "done" / weights)
    assert load_checkpoint(tmp_path / "again").model.is_gated
