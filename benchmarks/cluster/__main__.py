r"""What the owner of a cluster has to know before a long training, one command per machine.

    python -m benchmarks.cluster --num-processes 16 --num-machines 2 --machine-rank 0 \
        --main-address 10.0.0.1 --out /shared/cluster
    python -m benchmarks.cluster ... --machine-rank 1 ...       # at the same time, on the other

Starts the processes three times: they measure what they exchange; they train and the last one is
killed; the same command goes on from the checkpoint, and the result is verified. --out is a new
folder that all machines see. Machine 0 prints and writes cluster.json; every machine ends with 0
if all of it went as it should, with 1 otherwise.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dllm_convert.cli.output import write
from dllm_convert.common.json_files import write_json
from dllm_convert.common.tables import Table
from dllm_convert.errors import DllmConvertError
from dllm_convert.pipeline.launch import Machine, launch
from dllm_convert.planning.launch import Launch

SAVED, KILLED = 4, 6
"""Steps between checkpoints, and the step after which a process dies."""
_WAIT_S = 600.0
_READY = "ready"

Start = Callable[[list[str], int], int]
"""Starts the processes of this machine with arguments, at the next port; returns their code."""


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
        question: What was looked at.
        found: What was found, in words.
        fine: Whether that is as it should be; None for a number that is good or bad by its use.
    """

    question: str
    found: str
    fine: bool | None = None


def make_source(folder: Path, model: str) -> None:
    """Write a checkpoint with random weights, and a tokenizer of this machine's own text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from benchmarks.gpu.models import build

    special = ["<|pad|>", "<|start|>", "<|end|>"]
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer: Any = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    make: Any = PreTrainedTokenizerFast
    fast = make(
        tokenizer_object=tokenizer, pad_token=special[0], bos_token=special[1], eos_token=special[2]
    )
    fast.save_pretrained(folder)
    build(model, None).save_pretrained(folder)


def training_line(out: Path, steps: int, verify: str) -> list[str]:
    """Return the arguments of the run that is killed and goes on."""
    settings = {
        "data.sequence_length": 128,
        "training.save_steps": SAVED,
        "training.batch_size": 2,
        "generation.max_new_tokens": 32,
    }
    return [
        "run", str(out / "source"), "--to", "bd3lm", "--block", "16", "--full", "--data", "pydoc",
        "--allow-epochs", "--steps", str(steps), "--out", str(out / "run"), "--verify", verify,
        *(part for name, value in settings.items() for part in ("--set", f"{name}={value}")),
    ]  # fmt: skip


def last_checkpoint(out: Path) -> int:
    """Return the step of the last whole checkpoint of the run; 0 if there is none."""
    found = (out / "run/.work/trainer").glob("checkpoint-*/complete")
    return max((int(path.parent.name.rpartition("-")[2]) for path in found), default=0)


def _speed(count: float | None) -> str:
    return "one machine" if count is None else f"{count / 1e9:.3g} GB/s"


def network_findings(found: Mapping[str, Any]) -> list[Finding]:
    """Put what the processes measured into words."""
    hosts = dict.fromkeys(found["hosts"])
    within = found["within_bytes_per_second"]
    return [
        Finding("processes", f"{len(found['hosts'])} on {', '.join(hosts)}"),
        Finding("exchange over", f"{found['backend']}, {found['device']}"),
        Finding("latency of a sum over all", f"{found['all_reduce_latency'] * 1e6:,.0f} us"),
        Finding("bandwidth of a sum over all, ring", _speed(found["all_reduce_bytes_per_second"])),
        Finding(
            "one to one, inside a machine", "one process each" if within is None else _speed(within)
        ),
        Finding("one to one, between machines", _speed(found["between_bytes_per_second"])),
        Finding(
            "a step alone, with all (DDP)",
            f"{found['step_alone'] * 1e3:.3g} ms, {found['step_together'] * 1e3:.3g} ms",
        ),
        Finding("share of a step spent waiting", f"{found['waiting']:.0%}"),
    ]


def stopped_findings(out: Path, code: int, ended: float) -> list[Finding]:
    """Say what a killed process left on this machine.

    Args:
        out: The shared folder.
        code: How the processes of this machine ended.
        ended: When, in seconds of the system's clock.
    """
    path = out / "killed.json"
    if not path.is_file():
        return [
            Finding("a process is killed", f"it was not; the run ended with {code}", fine=False)
        ]
    killed = json.loads(path.read_text(encoding="utf-8"))
    saved = last_checkpoint(out)
    return [
        Finding(
            "a process is killed",
            f"process {killed['rank']} after step {killed['step']}; this machine noticed within "
            f"{max(ended - killed['time'], 0):.0f} s and ended with {code}",
            fine=code not in (0, 130),
        ),
        Finding("checkpoint to go on from", f"step {saved}", fine=saved == SAVED),
    ]


def resumed_findings(out: Path, code: int, steps: int) -> list[Finding]:
    """Say what the same command made of that, where the first process is."""
    manifest, curve = out / "run/dllm_convert.json", out / "run/.work/metrics.jsonl"
    if code or not manifest.is_file():
        return [Finding("the same command goes on", f"it ended with {code}", fine=False)]
    taken = [json.loads(line)["step"] for line in curve.read_text(encoding="utf-8").splitlines()]
    whole = taken == list(range(1, steps + 1))
    passed = json.loads(manifest.read_text(encoding="utf-8"))["verification"]["passed"]
    return [
        Finding("the same command goes on", f"to step {taken[-1] if taken else 0}", fine=whole),
        Finding("the result is verified", "passed" if passed else "failed", fine=bool(passed)),
    ]


def check(
    out: Path, start: Start, *, main: bool, model: str, steps: int, verify: str
) -> list[Finding]:
    """Run the three phases on this machine.

    Args:
        out: A new folder that all machines see.
        start: Starts the processes.
        main: Whether this is machine 0.
        model: Name of the model's sizes, a key of `benchmarks.gpu.models.SIZES`.
        steps: Optimizer steps.
        verify: Depth of the verification.
    """
    if main:
        make_source(out / "source", model)
        (out / _READY).touch()
    deadline = time.monotonic() + _WAIT_S
    while not (out / _READY).exists():
        if time.monotonic() > deadline:
            raise DllmConvertError(
                f"machine 0 wrote nothing into {out}",
                hint="Give a folder that all machines see, and start machine 0 too",
            )
        time.sleep(0.1)
    code = start(["network", str(out), model], 0)
    if code:
        return [Finding("the processes find each other", f"they ended with {code}", fine=False)]
    found = [Finding("the processes find each other", "yes", fine=True)]
    if main:
        found += network_findings(json.loads((out / "network.json").read_text(encoding="utf-8")))
    line = training_line(out, steps, verify)
    code = start(["train", str(out), str(KILLED), *line], 1)
    found += stopped_findings(out, code, time.time())
    code = start(["train", str(out), "0", *line], 2)
    if main:
        return [*found, *resumed_findings(out, code, steps)]
    return [*found, Finding("the same command goes on", f"it ended with {code}", fine=code == 0)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--num-processes", type=int, required=True, help="over all machines")
    parser.add_argument("--num-machines", type=int, default=1)
    parser.add_argument("--machine-rank", type=int)
    parser.add_argument("--main-address", help="HOST[:PORT]; three ports from there are used")
    parser.add_argument("--launch-config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a new folder all machines see")
    parser.add_argument("--model", default="135M", help="tiny, 135M, 1.5B or 7B; random weights")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--verify", default="auto", help="auto, full or files")
    return parser


def main() -> int:
    """Parse, run, print.

    Returns:
        0 if all went as it should, 1 if not, 2 if it was asked for wrongly.
    """
    options = _parser().parse_args()
    try:
        asked = Launch.asked(options.num_processes, options.launch_config, options.num_machines)
        machine = Machine.asked(asked, options.machine_rank, options.main_address)
        main = machine.rank == 0
        if options.steps <= KILLED or asked.processes < 2:
            raise DllmConvertError(f"it takes 2 processes and more than {KILLED} steps")
        if main and options.out.exists() and any(options.out.iterdir()):
            raise DllmConvertError(f"{options.out} is not empty", hint="Give a new folder")
        options.out.mkdir(parents=True, exist_ok=True)
    except DllmConvertError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2

    def start(line: list[str], phase: int) -> int:
        # The port of the phase before may not be free yet.
        there = Machine(machine.rank, machine.address, machine.port + phase)
        try:
            return launch(asked, line, module="benchmarks.cluster.ranks", machine=there)
        except DllmConvertError as error:
            sys.stderr.write(f"error: {error}\n")
            return error.exit_code

    found = check(
        options.out,
        start,
        main=main,
        model=options.model,
        steps=options.steps,
        verify=options.verify,
    )
    words = {None: "", True: "ok", False: "no"}
    rows = [(words[one.fine], one.question, one.found) for one in found]
    write(str(Table(("", f"machine {machine.rank}", "found"), rows)))
    if main:
        write_json(options.out / "cluster.json", [vars(one) for one in found])
    return int(any(one.fine is False for one in found))


if __name__ == "__main__":
    sys.exit(main())
