"""Host memory of each process where several share a model: loading, training, saving, writing.

    python -m benchmarks.sharded --processes 2 4 --gib 1

Makes a model of random weights, converts it, and trains it for two steps under FSDP2 over gloo,
each process on a CPU, through the function that `run` calls. Measured is the high-water mark of
each process's resident memory (VmHWM of Linux, set back before each part) above what it was before
a weight was read: its interpreter, its libraries and the text. What is freed is given back at once
(MALLOC_MMAP_THRESHOLD_), so that it is what is held. Asked is at most 1.3 times its share of what
there is, and a constant: two of the largest tensor, which FSDP and the first process put together,
and room for buffers.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dllm_convert.cli.output import write
from dllm_convert.common.tables import Table
from dllm_convert.source.safetensors_header import read_header

TIMES, BUFFERS = 1.3, 96 << 20
"""What is asked: times the share, and bytes for buffers."""
HELD = {"loading": 4, "training": 16, "saving": 12, "writing": 12}
"""Bytes a weight in float32 takes with its moments, and while a step is taken its gradient."""
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
"""recipes/launch/fsdp2.yaml, as Accelerate's launcher hands it on."""


def shard_on_cpu() -> None:
    """Have Accelerate shard on a CPU: it chooses FSDP on accelerators only; FSDP2 works on gloo."""
    from accelerate import state
    from accelerate.utils import DistributedType

    initialise = state.AcceleratorState.__init__

    def forced(self: Any, *args: Any, **kwargs: Any) -> None:
        initialise(self, *args, **kwargs)
        # Every later instance resets the shared type to that of the process group.
        shared = self._shared_state
        plugin = kwargs.get("fsdp_plugin") or shared.get("fsdp_plugin")
        if plugin is not None:
            shared |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}

    state.AcceleratorState.__init__ = forced


def make_source(folder: Path, gib: float) -> None:
    """Write a Llama of random float32 weights, of about `gib` GiB, with a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: at for at, letter in enumerate(["<s>", "</s>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast: Any = PreTrainedTokenizerFast
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    width = 512 if gib < 0.5 else 1024
    # A layer is 16 squares of its width; a vocabulary of 8,000 rows twice.
    layers = max(1, round((gib * 2**28 - 2 * 8000 * width) / (16 * width**2)))
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        vocab_size=8000,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        dtype="float32",
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def prepare(work: Path, gib: float) -> None:
    """Make a source and its untrained conversion, in a process of its own."""
    from dllm_convert.common.console import Reporter
    from dllm_convert.weights.run import adapt

    make_source(work / "source", gib)
    adapt(plan_of(work), work / "source", work / "untrained", Reporter(quiet=True))


def plan_of(work: Path) -> Any:
    """Plan a training of two steps that is saved once."""
    from dllm_convert.pipeline.run import plan_conversion
    from dllm_convert.recipe.loading import load_recipe

    overrides = {
        "target": "bd3lm",
        "block_size": 8,
        "data.sequence_length": 32,
        "data.max_documents": 5,
        "data.allow_epochs": True,
        "training.method": "full",
        "training.precision": "fp32",
        "training.batch_size": 1,
        "training.steps": 2,
        "training.log_steps": 1,
        "training.save_steps": 2,
        "training.max_minutes": None,
    }
    return plan_conversion(load_recipe(str(work / "source"), overrides=overrides))


def resident(name: str) -> int:
    """Return `VmHWM` or `VmRSS` of this process, in bytes."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise SystemExit(f"the system does not say {name}")
    return int(found[1]) * 1024


class Peaks:
    """High-water marks of the parts of a training, in bytes above what was there before it."""

    def __init__(self) -> None:
        self.found: dict[str, int] = {}
        self._before, self._part = 0, ""

    def turn(self, part: str) -> None:
        """End a part and begin another; the first one ends what came before."""
        if self._part:
            peak = resident("VmHWM") - self._before
            self.found[self._part] = max(peak, self.found.get(self._part, 0))
        else:
            self._before = resident("VmRSS")
        # Linux: sets VmHWM back to what is resident now.
        Path("/proc/self/clear_refs").write_text("5")
        self._part = part

    def around(self, call: Callable[..., Any], part: str, then: str) -> Callable[..., Any]:
        """Return a function with which a part begins, and another one after it.

        Args:
            call: The function.
            part: What it is part of.
            then: What comes after it.
        """

        def measured(*args: Any, **kwargs: Any) -> Any:
            self.turn(part)
            result = call(*args, **kwargs)
            self.turn(then)
            return result

        return measured


def take_part(work: Path) -> None:
    """Train as one of several processes, and write what each part took."""
    shard_on_cpu()
    from transformers import AutoTokenizer

    from dllm_convert.common.console import Reporter
    from dllm_convert.common.ranks import Rank
    from dllm_convert.training import run, trainer
    from dllm_convert.training.data.text import prepare_data
    from dllm_convert.training.distributed import meet

    place, peaks, quiet = Rank.from_environment(), Peaks(), Reporter(quiet=True)
    plan = meet(place, plan_of(work))
    if plan is None:
        raise SystemExit("the first process has no plan")
    tokenizer = AutoTokenizer.from_pretrained(work / "untrained")
    data = prepare_data(plan.recipe, tokenizer, quiet, work / f"data{place.rank}")
    kind: Any = trainer.DiffusionTrainer
    for owner, name, part, then in (
        (run, "trainable_model", "loading", "loading"),
        (trainer, "fill_shards", "loading", "training"),
        (kind, "_save_checkpoint", "saving", "training"),
        (run, "write_result", "writing", "the end"),
    ):
        setattr(owner, name, peaks.around(getattr(owner, name), part, then))
    run.train(plan, data, work / "untrained", work / "out", work / "run", quiet)
    (work / f"rank{place.rank}.json").write_text(json.dumps(peaks.found))


def run_apart(work: Path, do: str, *more: str) -> None:
    """Do a part of this in a process of its own, which gives back what it took."""
    line = [sys.executable, "-m", "benchmarks.sharded", "--work", str(work), "--do", do, *more]
    subprocess.run(line, check=True)


def measure(work: Path, processes: int) -> list[dict[str, int]]:
    """Train in so many processes; what each part took of each of them, in bytes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    for left in ("out", "run"):
        shutil.rmtree(work / left, ignore_errors=True)
    common = {**os.environ, **FSDP2, "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(processes)}
    common |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 16)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "benchmarks.sharded", "--work", str(work), "--do", "take-part"]
    running = [
        subprocess.Popen(line, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(processes)
    ]
    codes = [process.wait() for process in running]
    if any(codes):
        raise SystemExit(f"processes ended with {codes}")
    found = [json.loads((work / f"rank{rank}.json").read_text()) for rank in range(processes)]
    shutil.rmtree(work / "run")
    return found


def limits(work: Path, processes: int) -> dict[str, float]:
    """Return what each part may take of a process, in bytes."""
    entries = read_header(work / "untrained/model.safetensors").entries.values()
    sizes = [entry.end - entry.start for entry in entries]
    weights, room = sum(sizes) / 4, 2 * max(sizes) + BUFFERS
    return {part: TIMES * held * weights / processes + room for part, held in HELD.items()}


def main() -> int:
    """Print what each process took, and whether all of them stayed below what is asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--gib", type=float, default=1.0, help="size of the weights")
    parser.add_argument(
        "--work", type=Path, default=None, help="folder; a temporary one by default"
    )
    parser.add_argument("--do", choices=["prepare", "take-part"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.do == "prepare":
        prepare(options.work, options.gib)
        return 0
    if options.do == "take-part":
        take_part(options.work)
        return 0
    passed = True
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        work = Path(folder)
        run_apart(work, "prepare", "--gib", str(options.gib))
        rows = []
        for processes in options.processes:
            allowed = limits(work, processes)
            for rank, found in enumerate(measure(work, processes)):
                passed &= all(found[part] <= allowed[part] for part in HELD)
                cells = [f"{found[part] / 1e6:.0f} ({allowed[part] / 1e6:.0f})" for part in HELD]
                rows.append((f"{rank} of {processes}", *cells))
        write(str(Table(("process", *(f"{part}, MB (at most)" for part in HELD)), rows)))
    write("all below" if passed else "above what is asked")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
