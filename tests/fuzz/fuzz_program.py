"""Feed mutations to the commands, many in one process: what a test forks.

    python fuzz_program.py PREPARED KIND FIRST COUNT LOG

PREPARED holds for each family a source, `NAME`, and its conversion, `NAME-out`. Every command's
outcome is one line of LOG: seed, what was damaged, arguments, exit code, and the traceback if there
was one.
"""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import mutations
from typer.testing import CliRunner

from dllm_convert.cli.app import app

FAMILIES = {"llama": "bd3lm", "qwen2": "mdlm", "bert": "mdlm"}
CPU_SECONDS = 60
"""Of computing, after which a command hangs: those of the clock depend on what else runs."""
SECONDS = 600
"""After which it hangs though it does not compute: it waits for what never comes."""
MEMORY = 6 << 30
"""Bytes that a command may reserve: a mutation must not take the machine."""
TRAIN = ["--steps", "1", "--set", "training.batch_size=2", "--set", "data.sequence_length=32",
         "--set", "data.held_out_sequences=2", "--set", "training.attention=sdpa",
         "--set", "training.gradient_checkpointing=off"]  # fmt: skip
Command = list[str]


class Hang(BaseException):
    """Nothing of ours catches this."""


def _hang(*_: object) -> None:
    raise Hang


def invoke(arguments: Command) -> dict[str, Any]:
    """Run a command in this process."""
    began, used = time.monotonic(), time.process_time()
    trace, code, said = "", None, ""
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.alarm(SECONDS)
    try:
        result = CliRunner().invoke(app, arguments)
        code, said = result.exit_code, result.stderr[-600:]
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            trace = "".join(traceback.format_exception(result.exception))
        elif "Traceback (most recent" in result.stderr:
            trace = result.stderr
        out = result.stdout
    except BaseException as error:  # a panic of Rust is no Exception
        trace, out = "".join(traceback.format_exception(error)), ""
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
    seconds, cpu = (round(a - b, 2) for a, b in
                    ((time.monotonic(), began), (time.process_time(), used)))  # fmt: skip
    return {"code": code, "said": said, "trace": trace, "seconds": seconds, "cpu": cpu, "out": out}


class Case:
    """One mutation, in a folder of its own."""

    def __init__(self, prepared: Path, folder: Path, kind: str, seed: int) -> None:
        self.prepared, self.folder, self.kind, self.seed = prepared, folder, kind, seed
        self.dice = random.Random(f"{kind} {seed}")
        self.family = self.dice.choice(list(FAMILIES))
        self.target = FAMILIES[self.family]
        self.done = ""

    def copy(self, suffix: str = "") -> Path:
        name = self.family + suffix
        return Path(shutil.copytree(self.prepared / name, self.folder / name))

    def run(self, source: Path, *more: str) -> Command:
        out = str(self.folder / f"made-{self.dice.randrange(10**9)}")
        return ["run", str(source), "--out", out, *more]

    def outcomes(self) -> Iterator[tuple[Command, dict[str, Any]]]:
        steps = getattr(self, f"{self.kind}_commands")()
        try:
            command = next(steps)
            while True:
                outcome = invoke(command)
                yield command, outcome
                command = steps.send(outcome)
        except StopIteration:
            return

    def source_commands(self, source: Path, full: float, train: float) -> Iterator[Command]:
        to = ["--to", self.target]
        yield ["check", str(source), *to, *self.dice.choice([[], ["--json"], ["--lora", "4"]])]
        depth = "full" if self.dice.random() < full else "files"
        command = self.run(source, *to, "--no-train", "--verify", depth)
        found = yield command
        if found["code"] == 0:
            yield self.sample(Path(command[3]))
        if self.dice.random() < train:
            method = self.dice.choice(["--lora=4", "--full"])
            yield self.run(source, *to, method, "--data", "pydoc", "--verify", "files", *TRAIN,
                           "--set", "data.max_documents=60")  # fmt: skip

    def sample(self, folder: Path, *more: str) -> Command:
        return ["sample", str(folder), "--max-new-tokens", "4", "--prompt", "A list", *more]

    def converted_commands(self, folder: Path, full: float, chat: bool) -> Iterator[Command]:
        if self.dice.randrange(2) and (folder / "dllm_convert.json").is_file():
            self.hash_anew(folder)
        yield self.sample(folder)
        if chat:
            yield self.sample(folder, "--chat")
        yield ["verify", str(folder), "--files"]
        if self.dice.random() < full:
            yield ["verify", str(folder)]
        if self.dice.randrange(2):
            yield ["card", str(folder)]
        name = f"me/{self.kind}-{self.seed}"
        if self.dice.random() < 0.12:
            yield ["push", str(folder), name, *self.dice.choice([[], ["--force-unverified"]])]
        if self.dice.randrange(2):
            yield ["evaluate", str(folder), "--data", str(self.prepared / "text.txt")]
        else:
            tasks = ["--tasks", "capitals,writing", "--include-path", str(self.prepared / "tasks")]
            more = ["--apply-chat-template"] if chat else []
            yield ["evaluate", str(folder), *tasks, "--limit", "1", *more]

    @staticmethod
    def hash_anew(folder: Path) -> None:
        """Have the manifest list what is there, as somebody's tool would."""
        from dllm_convert.common.manifest import WRITTEN_LAST, hash_files

        path = folder / "dllm_convert.json"
        try:
            manifest = json.loads(path.read_bytes())
        except ValueError:
            return
        if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict):
            manifest["files"] = hash_files(folder, exclude=WRITTEN_LAST)
            mutations.write(path, manifest)

    def config_commands(self) -> Iterator[Command]:
        if self.seed % 2:
            source = self.copy()
            self.done = mutations.mutate_config(source, self.dice)
            yield from self.source_commands(source, 0.06, 0.06)
        else:
            folder = self.copy("-out")
            self.done = mutations.mutate_converted(folder, self.dice)
            yield from self.converted_commands(folder, 0.06, chat=False)

    def tokenizer_commands(self) -> Iterator[Command]:
        if self.seed % 2:
            source = self.copy()
            self.done = mutations.mutate_tokenizer(source, self.dice)
            yield from self.source_commands(source, 0.06, 0.12)
        else:
            folder = self.copy("-out")
            self.done = mutations.mutate_tokenizer(folder, self.dice)
            yield from self.converted_commands(folder, 0.06, chat=self.dice.randrange(2) == 0)

    def recipe_commands(self) -> Iterator[Command]:
        path = self.folder / "mine.yaml"
        source = self.prepared / self.family
        self.done, given = mutations.mutate_recipe(path, source, self.target, self.dice)
        found = yield ["check", str(path), *given, "--json"]
        if found["code"] != 0:
            if self.dice.randrange(4) == 0:
                yield self.run(path, *given)
            return
        plan = json.loads(found["out"])
        training, data = plan["training"], plan["data"]
        work = training["steps"] * training["batch_size"] * data["sequence_length"]
        light = work * data["held_out_sequences"] <= 1024 and not training["compile"]
        if (training["method"] == "none" or light) and self.dice.randrange(5) < 3:
            yield self.run(path, *given, "--verify", "files")

    def prompt_commands(self) -> Iterator[Command]:
        options = mutations.make_prompts(self.dice)
        self.done = "prompts"
        limit = [] if "--max-new-tokens" in options else ["--max-new-tokens", "4"]
        folder = (
            self.copy("-out") if "--record" in options else self.prepared / f"{self.family}-out"
        )
        yield ["sample", str(folder), *limit, *options]

    def rows_commands(self) -> Iterator[Command]:
        path, self.done = mutations.make_rows(self.folder, self.dice)
        data = str(self.dice.choice([path, path, path, self.folder, f"{self.folder}/*"]))
        streaming = self.dice.choice(["auto", "off", "on"])
        more = ["--set", f"data.streaming={streaming}", "--set", "data.held_out_fraction=0.2"]
        method = self.dice.choice(["--lora=4", "--full"])
        source, to = self.prepared / self.family, ["--to", self.target]
        if self.dice.randrange(3) == 0:
            yield ["check", str(source), *to, "--data", data]
        if self.dice.randrange(2):
            yield self.run(source, *to, method, "--data", data, "--verify", "files", *TRAIN, *more)
        else:
            yield ["evaluate", str(self.copy("-out")), "--data", data]


def main(prepared: str, kind: str, first: str, count: str, log: str) -> None:
    signal.signal(signal.SIGALRM, _hang)
    signal.signal(signal.SIGPROF, _hang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    with Path(log).open("a") as lines:
        for seed in range(int(first), int(first) + int(count)):
            folder = Path(log).with_name(f"{kind}-{seed}")
            folder.mkdir()
            case = Case(Path(prepared), folder, kind, seed)
            for command, outcome in case.outcomes():
                shown = {name: value for name, value in outcome.items() if name != "out"}
                line = {"kind": kind, "seed": seed, "done": case.done, "command": command, **shown}
                lines.write(json.dumps(line) + "\n")
                lines.flush()
            shutil.rmtree(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
