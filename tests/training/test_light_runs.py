"""Conversions without training, as real commands: killed anywhere, sources that change, links."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory
from running import Launcher

from dllm_convert.common.copying import sha256_files
from dllm_convert.common.manifest import checkpoint_files

CHANGES_BY_TIME = ("dllm_convert.json", "README.md", "report.html")
"""Files that say when they were made, or how long that took."""


def state(folder: Path) -> dict[str, str]:
    """Return every file with its hash, but for those that hold times."""
    names = [name for name in checkpoint_files(folder) if name not in CHANGES_BY_TIME]
    return sha256_files({name: folder / name for name in names})


def command(source: Path, out: Path, *more: str) -> list[str]:
    return ["run", str(source), "--to", "mdlm", "--no-train", "--verify", "files",
            "--out", str(out), *more]  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """A warm process, a source, and what an undisturbed conversion of it ends in."""

    run: Launcher
    source: Path
    whole: dict[str, str]
    changes: list[str]

    def finish(self, out: Path, *more: str) -> dict[str, Any]:
        assert self.run.run(command(self.source, out, *more)) == 0, self.run.said
        assert state(out) == self.whole
        manifest: dict[str, Any] = json.loads((out / "dllm_convert.json").read_text())
        assert manifest["verification"]["passed"]
        assert sorted(path.name for path in (out / ".work").iterdir()) == ["journal.json", "lock"]
        return manifest


@pytest.fixture(scope="module")
def bench(source_cache: SourceFactory, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("light")
    source = Path(shutil.copytree(source_cache("llama", tied=False, shards=3), root / "source"))
    run = Launcher(root)
    log = root / "changes"
    argv = command(source, root / "out")
    code = run.run(argv, kill_at=0, below=str(root / "out"), count=str(log))
    assert code == 0, run.said
    return Bench(run, source, state(root / "out"), log.read_text().splitlines())


def test_what_is_recorded(bench: Bench, tmp_path: Path) -> None:
    before = state(bench.source)
    manifest = bench.finish(tmp_path / "out")
    assert manifest["source"]["files"] == before
    assert manifest["files"] == bench.whole
    assert "torch" in manifest["versions"]
    probes = {probe["name"]: probe for probe in manifest["verification"]["probes"]}
    assert probes["base-tensors"]["passed"] is True
    assert probes["attention"]["passed"] is None
    assert "--verify files" in probes["attention"]["detail"]
    assert manifest["sample"] is None
    assert state(bench.source) == before


def test_every_group_that_is_left_out_is_named() -> None:
    from dllm_convert.verification import GROUPS
    from dllm_convert.verification.bytes import NEEDS_MODEL

    some = {"device", "gated", "behind", "lossless"}
    assert set(GROUPS) - {"files", "base", *some} == set(NEEDS_MODEL) - {"base-logits"}


def test_neither_torch_nor_transformers_is_imported(bench: Bench, tmp_path: Path) -> None:
    argv = command(bench.source, tmp_path / "out")
    code = f"""
import sys
from dllm_convert.cli.app import app
try:
    app({argv!r})
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "transformers", "datasets", "matplotlib", "safetensors.torch"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
    assert state(tmp_path / "out") == bench.whole


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_killed_before_every_other_change_of_a_file(
    part: int, bench: Bench, tmp_path: Path
) -> None:
    before = state(bench.source)
    assert len(bench.changes) > 30
    for number in range(1 + 2 * part, len(bench.changes) + 1, 4):
        out = tmp_path / str(number)
        argv = command(bench.source, out, *(["--link"] if number % 3 else []))
        code = bench.run.run(argv, kill_at=number, below=str(out))
        assert code in (0, -signal.SIGKILL), bench.run.said
        whole = (out / "config.json").exists()
        assert not whole or state(out).keys() >= bench.whole.keys()
        bench.finish(out)
        shutil.rmtree(out)
    assert state(bench.source) == before


def interrupted(bench: Bench, out: Path, place: str) -> None:
    """Kill a run at the first change of a kind."""
    number = min(n for n, line in enumerate(bench.changes, 1) if place in line)
    code = bench.run.run(command(bench.source, out), kill_at=number, below=str(out))
    assert code == -signal.SIGKILL, bench.run.said


@pytest.mark.parametrize("folder", ["untrained", "staged"])
@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_an_output_that_changed_is_made_again(
    folder: str, damage: str, bench: Bench, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted(bench, out, "README.md")
    file = out / ".work" / folder / "model-00002-of-00003.safetensors"
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    bench.finish(out)


@pytest.mark.parametrize("name", ["model-00002-of-00003.safetensors", "LICENSE"])
def test_a_source_that_changed_is_refused(name: str, bench: Bench, tmp_path: Path) -> None:
    """Even with its size and time put back, as a restored backup may have them."""
    out, file = tmp_path / "out", bench.source / name
    whole, stat = file.read_bytes(), file.stat()
    interrupted(bench, out, "README.md")
    try:
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert bench.run.run(command(bench.source, out)) == 1
        assert f"{name} changed since this run began" in bench.run.said
    finally:
        file.write_bytes(whole)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    bench.finish(out)


def test_links_and_what_never_writes_through_them(bench: Bench, tmp_path: Path) -> None:
    before, out = state(bench.source), tmp_path / "out"
    manifest = bench.finish(out, "--link")
    ways = next(s["result"]["ways"] for s in manifest["stages"] if s["name"] == "adapt")
    assert sorted(ways.values()) in (
        ["linked", "linked", "rewritten"],
        ["rewritten"] + 2 * ["shared"],
    )
    for name, way in ways.items():
        same = (out / name).samefile(bench.source / name)
        assert same == (way == "linked")
    for argv in (
        ["card", str(out)],
        ["verify", str(out), "--files", "--against", str(bench.source)],
        command(bench.source, out),
    ):
        assert bench.run.run(argv) == 0, bench.run.said
        assert state(bench.source) == before


def test_files_are_compared_byte_by_byte(bench: Bench, tmp_path: Path) -> None:
    out = tmp_path / "out"
    bench.finish(out)
    argv = ["verify", str(out), "--files", "--json", "--against", str(bench.source)]
    assert bench.run.run(argv) == 0, bench.run.said
    probes = {probe["name"]: probe for probe in json.loads(bench.run.said)["probes"]}
    assert probes["base-tensors"]["measured"].startswith("0 of ")
    assert "read" in probes["base-tensors"]["detail"]
    assert probes["hashes"]["passed"] is True
    for name in bench.whole:
        if name.endswith(".safetensors"):
            whole = (out / name).read_bytes()
            (out / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
            assert bench.run.run(argv) == 4, bench.run.said
            (out / name).write_bytes(whole)
    assert bench.run.run(argv) == 0
