"""A checkpoint of 3.1 GB goes up, comes back and is compared without a shard in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hub_server import LoopbackHub, serve
from pushing import TOKEN, checkpoint

import dllm_convert
from dllm_convert.common.manifest import MANIFEST_FILE, hash_files, read_manifest, write_manifest
from dllm_convert.source.safetensors_header import INDEX_FILE, encode_header

SHARD_BYTES = 1_550_000_000
MEMORY_BYTES = 300 << 20
"""What the push may take beyond the modules it has loaded; a fifth of one shard."""

CLIENT = """
import resource, sys
from contextlib import nullcontext
from pathlib import Path
from dllm_convert.common.console import Reporter
from dllm_convert.publishing import PushOptions, confirm, push_checkpoint, run
confirm.short_verification = lambda *_: ()
run.quiet_libraries = nullcontext
import dllm_convert.card.readme, dllm_convert.card.checks, huggingface_hub.hf_api, yaml
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = push_checkpoint(Path(sys.argv[1]), PushOptions("me/large"), Reporter(quiet=True))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(result.uploaded_bytes, (peak - before) * 1024, before * 1024)
"""


def sparse_shards(folder: Path) -> None:
    """Put two shards of holes in the place of the weights."""
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for number in (1, 2):
        name, file = f"layer.{number}", f"model-0000{number}-of-00002.safetensors"
        header = encode_header({name: ("BF16", (SHARD_BYTES // 2,), SHARD_BYTES)}, {})
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + SHARD_BYTES)
        weight_map[name] = file
    metadata = {"total_size": 2 * SHARD_BYTES, "total_parameters": SHARD_BYTES}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))


@pytest.mark.slow
def test_a_large_folder_goes_through_in_little_memory(
    source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    folder = checkpoint(source_cache("llama"), tmp_path / "large")
    sparse_shards(folder)
    files = hash_files(folder, exclude=(MANIFEST_FILE, "README.md"))
    write_manifest(folder, read_manifest(folder) | {"format_version": 1, "files": files})
    hub = LoopbackHub(tmp_path / "hub")
    hub.add_user("me", TOKEN)
    with serve(hub):
        environment = hub.environment(tmp_path / "home", TOKEN)
        done = subprocess.run(
            [sys.executable, "-c", CLIENT, str(folder)],
            capture_output=True,
            text=True,
            env=environment | {"PYTHONPATH": str(Path(dllm_convert.__file__).parents[1])},
            timeout=900,
        )
    assert done.returncode == 0, done.stderr
    uploaded, taken, modules = map(int, done.stdout.split())
    assert uploaded > 3_100_000_000
    assert taken < MEMORY_BYTES, f"{taken:,} bytes over {modules:,}"
    commit = hub.store.repos["me/large"].find("main")
    assert commit is not None
    sent = {name: blob.sha256 for name, blob in commit.files.items() if blob.lfs}
    assert sent == {name: files[name] for name in sent} and len(sent) == 2
    # What was downloaded to compare is gone again.
    assert not list((folder / ".work").rglob("*.safetensors"))
