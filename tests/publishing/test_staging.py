"""What goes up: exactly the verified files, split as asked, byte for byte the same tensors."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pushing import checkpoint
from safetensors import safe_open
from safetensors.torch import save_file

from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import MANIFEST_FILE, changed_files, read_manifest, write_manifest
from dllm_convert.errors import DataError
from dllm_convert.publishing.reshard import needs_reshard, parse_size, reshard
from dllm_convert.publishing.staging import stage
from dllm_convert.source.safetensors_header import INDEX_FILE, read_checkpoint

QUIET = Reporter(quiet=True)


@pytest.fixture(scope="module")
def original(source_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(source_cache("llama", shards=2), tmp_path_factory.mktemp("staging") / "it")


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "it"))


def tensors(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return type, shape and bytes of every tensor, read by hand."""
    found = {}
    for file, header in read_checkpoint(folder).items():
        raw = (folder / file).read_bytes()[header.data_start :]
        for name, entry in header.entries.items():
            found[name] = (entry.dtype, entry.shape, raw[entry.start : entry.end])
    return found


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5_000_000_000),
        ("500 mb", 500_000_000),
        ("1GiB", 1 << 30),
        ("1.5KB", 1500),
        ("12", 12),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5XB", "-1GB", "0", "0.0GB", "five", "5GB5"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("seed", range(12))
def test_any_split_keeps_every_byte(tmp_path: Path, seed: int) -> None:
    draw = random.Random(seed)
    types = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
    content = {}
    for number in range(draw.randint(1, 9)):
        shape = [draw.randint(0, 7) for _ in range(draw.randint(0, 3))]
        raw = torch.randint(0, 255, (*shape, 8), dtype=torch.uint8)
        wanted = draw.choice(types)
        content[f"layer.{number}.{draw.random()}"] = raw.view(wanted)[..., 0].contiguous()
    source, out, back = tmp_path / "source", tmp_path / "out", tmp_path / "back"
    for path in (source, out, back):
        path.mkdir()
    save_file(content, source / "model.safetensors", metadata={"format": "pt", "made": "by us"})
    limit = draw.randint(1, 400)
    written = reshard(source, out, limit)
    assert tensors(out) == tensors(source)
    assert sorted(written) == sorted(path.name for path in out.iterdir())
    headers = read_checkpoint(out)
    for file, header in headers.items():
        size = sum(entry.end - entry.start for entry in header.entries.values())
        assert size <= limit or len(header.entries) == 1
        with safe_open(out / file, framework="pt") as handle:
            assert handle.metadata() == {"format": "pt", "made": "by us"}
    assert (INDEX_FILE in written) == (len(headers) > 1)
    reshard(out, back, 1 << 40)
    assert [path.name for path in back.iterdir()] == ["model.safetensors"]
    assert tensors(back) == tensors(source)


def test_staged_files_are_links_and_the_manifest_is_true(folder: Path, tmp_path: Path) -> None:
    (folder / ".env").write_text("SECRET=1")
    (folder / "scatter.png").write_bytes(b"picture")
    (folder / "NOTICE").write_text("Made by me.")
    stage(folder, tmp_path / "up", QUIET, max_shard_size=None)
    names = {path.name for path in (tmp_path / "up").iterdir()}
    assert {"scatter.png", "NOTICE", "README.md"} <= names
    assert not names & {".env", ".work"}
    manifest = read_manifest(tmp_path / "up")
    assert changed_files(tmp_path / "up", manifest["files"]) == {}
    assert set(manifest["files"]) == names - {"README.md", MANIFEST_FILE}
    shard = "model-00001-of-00002.safetensors"
    assert (folder / shard).samefile(tmp_path / "up" / shard)
    # The folder's own manifest is a file of its own: writing the staged one left it alone.
    assert "NOTICE" not in read_manifest(folder)["files"]


def test_other_shards(folder: Path, tmp_path: Path) -> None:
    assert not needs_reshard(folder, 1 << 30)
    before = tensors(folder)
    stage(folder, tmp_path / "up", QUIET, max_shard_size=30_000)
    assert tensors(tmp_path / "up") == before == tensors(folder)
    manifest = read_manifest(tmp_path / "up")
    assert changed_files(tmp_path / "up", manifest["files"]) == {}
    assert "model-00001-of-00002.safetensors" not in manifest["files"]


@pytest.mark.parametrize("name", ["optimizer.pt", "notes.txt", "sub/secret.json"])
def test_what_nobody_knows_is_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("x")
    with pytest.raises(DataError, match=name):
        stage(folder, tmp_path / "up", QUIET, max_shard_size=None)


def test_missing_and_changed_files(folder: Path, tmp_path: Path) -> None:
    weights = folder / "model-00002-of-00002.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(DataError, match=r"model-00002-of-00002\.safetensors .* was changed"):
        stage(folder, tmp_path / "a", QUIET, max_shard_size=None)
    weights.unlink()
    with pytest.raises(DataError, match=r"lacks model-00002-of-00002\.safetensors"):
        stage(folder, tmp_path / "b", QUIET, max_shard_size=None)
    write_manifest(folder, read_manifest(folder) | {"format_version": 1, "files": {}})
    with pytest.raises(DataError, match="lists no files"):
        stage(folder, tmp_path / "c", QUIET, max_shard_size=None)
