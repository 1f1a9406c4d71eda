"""Two gloo processes against one: the same curve, files and exit codes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import forks
import pytest
import running
import yaml
from conftest import SourceFactory
from forks import Forked
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_runs import wait_for

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "recipes/launch"
BESIDE_LOSS = ("nelbo", "divergence", "own_divergence", "cosine", "entropy", "block_size")
TOLERANCE = 1e-4
"""Of losses, relative, and of weights, absolute: sums are taken in another order."""


def command(source: Path, out: Path, *more: str, batch: int = 4) -> list[str]:
    settings = {
        "noise__draw": "count",
        "training__batch_size": batch,
        "training__learning_rate": "1e-3",
        "training__max_minutes": 10,
    }
    return running.command(source, out, "--steps", "12", "--full", *more, **settings)


def start(
    arguments: list[str], *, program: str | Path = "dllm_convert", pids: Path | None = None
) -> Forked:
    """Start a command whose launcher, if it has one, forks its processes as well.

    Args:
        arguments: Of the command line.
        program: A script in the place of the package.
        pids: File for the process ids of the launched.
    """
    entry = ["-m", program] if program == "dllm_convert" else [str(program)]
    hook = ("forks:fork_ranks", {"pids": str(pids or os.devnull)})
    return forks.start([sys.executable, *entry, *arguments], cwd=ROOT, before=[hook])


def finish(process: Forked, code: int = 0) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == code, err
    return out, err


def curve(out: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (out / ".work/metrics.jsonl").read_text().splitlines()]


def assert_same(one: Path, other: Path) -> None:
    """Losses, weights, and the names, types and files of the weights."""
    for mine, theirs in zip(curve(one), curve(other), strict=True):
        assert mine.keys() == theirs.keys()
        for name in {"loss", *BESIDE_LOSS} & mine.keys():
            assert theirs[name] == pytest.approx(mine[name], rel=TOLERANCE)
        assert theirs["tokens"] == mine["tokens"]
    mine, theirs = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert theirs[name].dtype == tensor.dtype
        assert float((theirs[name] - tensor).abs().max()) < TOLERANCE
    names = {path.name for path in one.iterdir()}
    assert names == {path.name for path in other.iterdir()}


@pytest.fixture(scope="module")
def source(source_cache: SourceFactory) -> Path:
    return source_cache("llama", tied=True)


@pytest.fixture(scope="module")
def single(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of batches of 4."""
    out = tmp_path_factory.mktemp("single") / "out"
    finish(start(command(source, out)))
    return out


def test_two_processes_train_what_one_does(source: Path, single: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = command(source, out, "--num-processes", "2", "--json", batch=2)
    stdout, _ = finish(start(line))
    document = json.loads(stdout)
    assert document["passed"]
    assert document["manifest"]["measurements"]["train"]["devices"] == 2
    assert_same(single, out)
    # Done already: nothing to train, and nobody waits for anybody. Real interpreters, once.
    real = [sys.executable, "-m", "dllm_convert", *line]
    again = subprocess.run(real, capture_output=True, text=True, cwd=ROOT)
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["manifest"] == document["manifest"]


def sharding(folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Arguments and program of a run under FSDP2 on gloo."""
    config = folder / "fsdp2.yaml"
    config.write_text((LAUNCH / "fsdp2.yaml").read_text())
    return ["--launch-config", str(config)], {"program": Path(__file__).with_name("force_fsdp.py")}


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_killed_and_resumed_two_processes_still_do(
    strategy: str, source: Path, single: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    more, how = sharding(tmp_path) if strategy == "fsdp2" else ([], {})
    line = command(source, out, "--num-processes", "2", *more, batch=2)
    process = start(line, pids=tmp_path / "pids", **how)
    wait_for(out / ".work/trainer", process)
    ranks = (tmp_path / "pids").read_text().split()
    assert len(ranks) == 2
    os.kill(int(ranks[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert "config.json" not in {path.name for path in out.iterdir()}
    _, err = finish(start(line, **how))
    assert "resuming from step" in err
    assert_same(single, out)


@pytest.mark.parametrize(("processes", "method"), [(4, "lora"), (1, "full")])
def test_a_run_goes_on_with_another_number_of_processes(
    processes: int, method: str, source: Path, single: Path, tmp_path: Path
) -> None:
    out, expected = tmp_path / "out", single
    more = ["--lora", "4", "--set", "training.lora.embeddings=full"] if method == "lora" else []
    # Of the embedding's spread, which no process sees by itself.
    noise = ("mask_noise_std=0.5", "mask_noise_steps=8")
    more += [part for field in noise if more for part in ("--set", f"training.{field}")]

    def line(out: Path, batch: int, *flags: str) -> list[str]:
        found = command(source, out, *more, *flags, batch=batch)
        return [part for part in found if part != "--full" or not more]

    if more:
        expected = tmp_path / "single"
        finish(start(line(expected, 4)))
    config, how = sharding(tmp_path)
    process = start(line(out, 2, "--num-processes", "2", *config), pids=tmp_path / "pids", **how)
    wait_for(out / ".work/trainer", process)
    os.kill(int((tmp_path / "pids").read_text().split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    # With steps of another size its text would be counted wrongly.
    if processes == 1:
        _, err = finish(start(line(out, 2)), 1)
        assert "training.sequences_per_step is 2, it was 4" in err
        assert "--global-batch 4" in err
    launched = ["--num-processes", str(processes), *config] if processes > 1 else []
    _, err = finish(start(line(out, 4 // processes, *launched), **(how if launched else {})))
    assert "resuming from step" in err
    assert_same(expected, out)


# Hidden states of shards, and entropies, of blocks that grow.
BESIDE = [
    *("--set", "training.alignment_loss_weight=0.3"),
    *("--set", "training.confidence_loss_weight=0.2"),
    *("--set", "training.block_growth.steps=2"),
    *("--set", "training.block_growth.sizes=[2,4]"),
]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_fsdp2_shards_and_gathers(method: str, source: Path, single: Path, tmp_path: Path) -> None:
    out, expected = tmp_path / "out", single
    # The base teaches: of shards its head is whole only while it runs.
    more = ["--set", "training.method=lora", "--set", "training.lora.rank=4"]
    more += ["--set", "training.distillation.weight=0.5", *BESIDE]
    more = more if method == "lora" else []
    if method == "lora":
        expected = tmp_path / "single"
        finish(start([part for part in command(source, expected, *more) if part != "--full"]))
    line = [part for part in command(source, out, *more, batch=2) if part != "--full" or not more]
    config, how = sharding(tmp_path)
    _, err = finish(start([*line, *config, "--num-processes", "2"], **how))
    assert "sharded parameters: yes" in err
    # Each process reads what it holds; adapters are drawn, not read.
    parts = [tuple(map(int, found)) for found in re.findall(r"read (\d+) of (\d+) numbers", err)]
    assert len(parts) == 2
    assert all(0.4 < read / whole < 0.52 for read, whole in parts), parts
    if method == "full":
        assert sum(read for read, _ in parts) == parts[0][1]
    assert_same(expected, out)


# Every second step is of the model's own text, which each process writes its rows of.
OWN = [
    *("--set", "training.on_policy.share=0.5"),
    *("--set", "training.on_policy.prompt_tokens=6"),
    *("--set", "training.on_policy.new_tokens=16"),
    *("--set", "training.on_policy.temperature=1"),
]
TOGETHER = {
    "ddp-gated": ("ddp", ["--lora", "4", "--keep-base", *OWN]),
    "fsdp2-full": ("fsdp2", ["--full", *OWN]),
    "fsdp2-lora": ("fsdp2", ["--lora", "4", *OWN]),
    # What only a copy of the base can say of shards, all at once.
    "fsdp2-beside": ("fsdp2", ["--full", *BESIDE]),
}


@pytest.mark.parametrize("case", TOGETHER)
def test_two_processes_learn_from_the_base_as_one_does(
    case: str, source: Path, tmp_path: Path
) -> None:
    strategy, more = TOGETHER[case]

    def line(out: Path, batch: int, *flags: str) -> list[str]:
        found = command(source, out, "--steps", "6", *flags, batch=batch)
        return [part for part in found if part != "--full"] + more

    finish(start(line(tmp_path / "one", 4)))
    config, how = sharding(tmp_path) if strategy == "fsdp2" else ([], {})
    _, err = finish(start(line(tmp_path / "two", 2, "--num-processes", "2", *config), **how))
    assert ("sharded parameters: yes" in err) == (strategy == "fsdp2")
    assert_same(tmp_path / "one", tmp_path / "two")
    names = {name for one in curve(tmp_path / "one") for name in one}
    asked = {"cosine", "entropy", "block_size"} if case == "fsdp2-beside" else {"own_divergence"}
    assert asked <= names


def test_three_processes_share_a_gated_model(source: Path, tmp_path: Path) -> None:
    """Rows that three cannot share alike, an adapter beside frozen weights, and a resume."""
    gated = ["--keep-base", "--lora", "4"]

    def line(out: Path, batch: int, *more: str) -> list[str]:
        return [
            part for part in command(source, out, *gated, *more, batch=batch) if part != "--full"
        ]

    finish(start(line(tmp_path / "one", 3)))
    config, how = sharding(tmp_path)
    launched = ["--num-processes", "3", *config]
    out = tmp_path / "three"
    process = start(line(out, 1, *launched), pids=tmp_path / "pids", **how)
    wait_for(out / ".work/trainer", process)
    os.kill(int((tmp_path / "pids").read_text().split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    _, err = finish(start(line(out, 1, *launched), **how))
    assert "resuming from step" in err
    adapters = [
        load_file(folder / "adapter/adapter_model.safetensors")
        for folder in (tmp_path / "one", out)
    ]
    for name, tensor in adapters[0].items():
        assert float((adapters[1][name] - tensor).abs().max()) < TOLERANCE
    assert_same(tmp_path / "one", out)


def test_two_processes_learn_from_a_copy_of_the_base(source: Path, tmp_path: Path) -> None:
    more = ["--set", "training.distillation.weight=0.5", *BESIDE, "--steps", "4"]
    finish(start(command(source, tmp_path / "one", *more)))
    line = command(source, tmp_path / "two", *more, "--num-processes", "2", batch=2)
    finish(start(line))
    assert_same(tmp_path / "one", tmp_path / "two")
    for name in ("divergence", "cosine", "block_size"):
        ours, theirs = (curve(tmp_path / folder)[-1][name] for folder in ("one", "two"))
        assert ours == pytest.approx(theirs, rel=TOLERANCE)


def test_another_strategy_than_asked_for_is_refused(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = LAUNCH / "fsdp2.yaml"
    line = command(source, out, "--num-processes", "2", "--launch-config", str(config), batch=2)
    _, err = finish(start(line), 3)
    assert "FSDP was asked for" in err
    assert "Traceback" not in err
    assert not list((out / ".work/trainer").glob("checkpoint-*"))


def test_a_failure_of_the_first_ends_all_with_its_code(source: Path, tmp_path: Path) -> None:
    line = command(source, tmp_path / "out", "--num-processes", "2", batch=2)
    began = time.monotonic()
    _, err = finish(start([*line, "--data", str(tmp_path / "nothing.txt")]), 1)
    # The launcher kills those that do not end in half a minute.
    assert time.monotonic() - began < 25
    assert err.count("error:") == 1
    assert "Traceback" not in err


def test_sigterm_saves_and_exits_130(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    line = command(source, out, "--num-processes", "2", "--steps", "5000", batch=2)
    process = start(line)
    deadline = time.monotonic() + 120
    while not (out / ".work/metrics.jsonl").is_file() or len(curve(out)) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = finish(process, 130)
    assert "Traceback" not in err
    assert "same command" in err
    steps = [int(path.parent.name.split("-")[1]) for path in out.glob(".work/trainer/*/complete")]
    assert max(steps) >= len(curve(out))


@pytest.mark.parametrize("name", sorted(path.name for path in LAUNCH.glob("*.yaml")))
def test_configs_are_what_accelerate_reads(name: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(LAUNCH / name))
    settings = yaml.safe_load((LAUNCH / name).read_text())
    assert config.distributed_type.value == settings["distributed_type"]
    if settings["distributed_type"] == "FSDP":
        from accelerate.utils import FullyShardedDataParallelPlugin

        assert settings["fsdp_config"]["fsdp_version"] == 2
        FullyShardedDataParallelPlugin(fsdp_version=2)


def test_launch_files_are_no_recipes() -> None:
    from dllm_convert.recipe.loading import list_recipes

    assert not {"ddp", "fsdp2", "zero2", "zero3", "multi-node"} & {r.name for r in list_recipes()}


def test_a_sharded_run_writes_the_head_once(single: Path) -> None:
    with safe_open(single / "model.safetensors", framework="pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118
