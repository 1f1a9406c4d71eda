"""The whole conversion on tiny checkpoints, and what happens to it when it is killed."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from conftest import SourceFactory
from factory import FAMILIES
from tiny_runs import recipe, wait_for

from dllm_convert.adapters import get_adapter
from dllm_convert.common.console import Reporter
from dllm_convert.errors import DataError, DllmConvertError
from dllm_convert.modeling.bundle import CODE_FILES
from dllm_convert.pipeline.options import Depth, RunOptions
from dllm_convert.pipeline.run import RunResult, run

QUIET = Reporter(quiet=True)
PAIRS = [(family, target) for family in FAMILIES for target in get_adapter(family).targets]


def failed(result: RunResult) -> list[dict[str, Any]]:
    return [
        probe for probe in result.manifest["verification"]["probes"] if probe["passed"] is False
    ]


@pytest.mark.parametrize("method", ["full", "lora", "none"])
@pytest.mark.parametrize(("family", "target"), PAIRS)
def test_every_family_converts(
    family: str, target: str, method: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    result = run(recipe(source_cache(family), target, method=method), tmp_path / "out", QUIET)
    assert not failed(result)
    assert result.passed
    measured = result.manifest["measurements"]
    if method == "none":
        assert set(measured) == {"influence"}
    else:
        after, before = measured["nelbo_after"], measured["nelbo_before"]
        assert after["nats_per_token"] < before["nats_per_token"]
        assert ("ar_nll" in measured) == (get_adapter(family).attention == "causal")
        assert {"influence", "mask_rates", "decoding", "curves"} <= set(measured)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        *CODE_FILES,
        "README.md",
        "report.html",
        "attention.png",
        "dllm_convert.json",
        "recipe.yaml",
        "sample.gif",
        ".work",
    } <= names
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["architectures"] == [get_adapter(family).diffusion_class]
    assert config["is_causal"] is False
    assert config["diffusion"]["objective"] == target
    assert config.get("block_size") == (8 if target == "bd3lm" else None)


def test_the_same_command_again_changes_nothing(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    asked = recipe(source_cache("llama"))
    first = run(asked, tmp_path / "out", QUIET)
    stamps = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir() if path.is_file()
    }
    again = run(asked, tmp_path / "out", QUIET)
    assert again.manifest == first.manifest
    assert stamps == {path: path.stat().st_mtime_ns for path in stamps}
    with pytest.raises(DataError, match="different recipe"):
        run(recipe(source_cache("llama"), steps=7), tmp_path / "out", QUIET)
    (tmp_path / "out/report.html").unlink()
    assert run(asked, tmp_path / "out", QUIET).passed
    (tmp_path / "out/config.json").unlink()
    with pytest.raises(DataError, match=r"is finished, and config\.json is no longer there"):
        run(asked, tmp_path / "out", QUIET)


def test_files_alone_are_verified_after_training_if_that_is_asked(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    result = run(
        recipe(source_cache("llama")), tmp_path / "out", QUIET, how=RunOptions(verify=Depth.FILES)
    )
    probes = {probe["name"]: probe for probe in result.manifest["verification"]["probes"]}
    assert result.passed
    assert probes["hashes"]["passed"] is True
    assert probes["attention"]["passed"] is None
    assert "--verify files" in probes["attention"]["detail"]


def test_the_source_is_never_touched(tmp_path: Path, source_factory: SourceFactory) -> None:
    source = source_factory("qwen2")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    run(recipe(source), tmp_path / "out", QUIET)
    assert before == {path.name: path.read_bytes() for path in source.iterdir()}


def test_a_diverging_run_writes_no_checkpoint(tmp_path: Path, source_cache: SourceFactory) -> None:
    asked = recipe(source_cache("llama"), learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0.0)
    with pytest.raises(DllmConvertError, match="diverged"):
        run(asked, tmp_path / "out", QUIET)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".work"]


def command(source: Path, out: Path, *more: str) -> list[str]:
    settings = {
        "data.sequence_length": 32,
        "data.max_documents": 40,
        "data.held_out_sequences": 4,
        "training.batch_size": 1,
        "training.precision": "fp32",
        "training.save_steps": 5,
        "training.learning_rate": "5e-3",
        "training.max_minutes": 10,
    }
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    return [
        sys.executable, "-m", "dllm_convert", "run", str(source), "--to", "bd3lm", "--block", "8",
        "--out", str(out), "--data", "pydoc", *flags, *more,
    ]  # fmt: skip


@pytest.mark.slow
def test_killed_in_training_the_same_command_goes_on(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    out = tmp_path / "out"
    line = command(source_cache("llama"), out, "--steps", "60")
    process = forks.start(line)
    wait_for(out / ".work/trainer", process)
    process.kill()
    process.communicate()
    assert [path.name for path in out.iterdir()] == [".work"]
    # A real interpreter, once.
    done = subprocess.run([*line, "--json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "resuming" not in done.stdout
    document = json.loads(done.stdout)
    assert document["passed"]
    assert document["manifest"]["measurements"]["train"]["steps"] == 60
    steps = [
        json.loads(row)["step"] for row in (out / ".work/metrics.jsonl").read_text().splitlines()
    ]
    assert steps == list(range(1, 61))


@pytest.mark.slow
def test_ctrl_c_exits_130_and_says_how_to_go_on(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    out = tmp_path / "out"
    process = forks.start(command(source_cache("llama"), out, "--steps", "2000"))
    wait_for(out / ".work/trainer", process)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == ""
    assert "same command goes on where" in stderr
    assert re.search(r"^finishing step \d+, saving; again: lose it$", stderr, re.MULTILINE)
    assert "Traceback" not in stderr
    assert [path.name for path in out.iterdir()] == [".work"]


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_loses_nothing(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    out = tmp_path / "out"
    line = command(source_cache("llama"), out, "--steps", "5")
    done = forks.run(line, before=[("faults:plant", {"file_bytes": 40 << 10})])
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "config.json" not in [path.name for path in out.iterdir()]
    done = forks.run(line)
    assert done.returncode == 0, done.stderr
