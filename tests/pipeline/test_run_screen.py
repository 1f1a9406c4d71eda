"""What `run` shows when it begins and when it is done: a screenful, whatever is in it."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from dllm_convert.cli import output
from dllm_convert.common.console import Reporter
from dllm_convert.common.interruption import Interruption
from dllm_convert.common.tables import Block, Printed, Toned, text_of
from dllm_convert.pipeline.opening import opening_lines, training_line
from dllm_convert.pipeline.shown import run_blocks
from dllm_convert.planning.conversion import make_plan
from dllm_convert.planning.devices import GPUS, Device, cpu, known_gpu
from dllm_convert.planning.launch import Launch
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source

LONG = "the 世界 is\x1b[2J\u202e all that is the case, " * 30
MEASURE = {"nats_per_token": 8.5, "stderr": 0.125, "tokens": 512}
PUSHED = {
    "uploaded": ["a"],
    "uploaded_bytes": 1,
    "deleted": ["b"],
    "confirmed": {"files": 1, "probes": []},
    "commit_url": "https://hub/commit",
    "pull_request": "https://hub/pull",
    "private": True,
    "url": "https://hub/a/b",
}


def probe(number: int, passed: bool | None) -> dict[str, Any]:
    return {"name": f"p{number}", "passed": passed, "measured": LONG, "required": LONG}


def document(failed: int, *, text: str, pushed: bool = False, sample: bool = True) -> Any:
    probes = [probe(n, n >= failed) for n in range(41)] + [probe(41, None)]
    manifest = {
        "verification": {"passed": not failed, "probes": probes, "seconds": 1234.0},
        "measurements": dict.fromkeys(("nelbo_before", "nelbo_after", "ar_nll"), MEASURE),
        "sample": {"prompt": "Say", "text": text, "tokens_per_forward": 1.5} if sample else None,
        "files": {"chat_template.jinja": ""},
    }
    found = {"path": "some-model-bd3lm", "passed": not failed, "manifest": manifest}
    return found | ({"published": PUSHED} if pushed else {})


@pytest.mark.parametrize("text", ["", " a name.", LONG, "\n\n\t\n", "世界" * 500, "x" * 999])
@pytest.mark.parametrize("failed", [0, 1, 3, 4, 41])
def test_it_is_a_screenful(failed: int, text: str) -> None:
    lines = str(text_of(run_blocks(document(failed, text=text, pushed=not failed)))).split("\n")
    assert len(lines) <= 25
    assert all(cell_len(line) <= 80 for line in lines)
    assert not {"\x1b", "\u202e", "\r"} & set("".join(lines))


def test_commands_of_a_long_path_stay_whole() -> None:
    path = f"{'long/' * 12}name of it"
    shown = text_of(run_blocks(document(0, text="") | {"path": path}))
    assert f"  dllm-convert verify '{path}'\n" in shown


def test_it_says_what_failed_and_what_to_type() -> None:
    shown = text_of(run_blocks(document(5, text=" a name.")))
    assert shown.startswith("VERIFICATION FAILED: 36 of 42 probes passed, 5 failed, 1 not run")
    assert [name in shown for name in ("p0: ", "p2: ", "p3: ")] == [True, True, False]
    assert "and 2 more; the same command with --verbose" in shown
    assert "push" not in shown, "what failed is not offered to the world"
    assert shown.endswith("\nCheckpoint: some-model-bd3lm")
    passed = text_of(run_blocks(document(0, text=" a name.")))
    for words in ("sample", "chat", "verify", "push", "report.html", "tokens per forward"):
        assert words in passed
    assert "Sample" not in text_of(run_blocks(document(0, text="", sample=False)))


class Verdict(Printed):
    def as_dict(self) -> dict[str, Any]:
        return {}

    def as_blocks(self) -> list[Block]:
        return [Toned("Verified", "good"), Toned("FAILED", "bad"), "plain\x1b[2J"]


@pytest.mark.parametrize(
    ("term", "no_color", "colours"),
    [("xterm", "", 2), ("xterm", "1", 0), ("dumb", "", 0)],
)
def test_colours_are_for_terminals_that_have_them(
    term: str, no_color: str, colours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    monkeypatch.setenv("NO_COLOR", no_color)
    master, slave = pty.openpty()
    with os.fdopen(slave, "w", encoding="utf-8") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        output.show(Verdict(), as_json=False)
        terminal.flush()
        seen = os.read(master, 4096).decode()
    os.close(master)
    assert len(re.findall(r"\x1b\[1;3[12]m", seen)) == colours
    assert "\x1b[2J" not in seen
    plain = re.sub(r"\x1b\[[0-9;]*m", "", seen).split()
    assert plain[:2] == ["Verified", "FAILED"]


def test_the_first_lines_say_plan_folder_and_time(source_factory: Callable[..., Path]) -> None:
    source = source_factory("llama")
    training = {"steps": 100, "batch_size": 4}
    recipe = {"source": str(source), "target": "bd3lm", "block_size": 8, "training": training}
    plan = make_plan(Recipe.model_validate(recipe), inspect_source(str(source)))
    first, second = opening_lines(plan, Path("there"))
    assert f"{source}: llama, " in first
    assert "becomes bd3lm in blocks of 8 in there" in second
    slow = replace(cpu(1, 2**30, bf16=False), flops=1e6)
    assert re.search(
        r"pydoc: 100 steps, about [\d.,]+ \w+ on this CPU, 1 c", training_line(plan, slow)
    )
    assert "less than a minute" in training_line(plan, cpu(2, 2**30, bf16=True))
    assert training_line(plan, None).endswith("100 steps"), "of nothing known nothing is said"
    two = replace(plan, launch=Launch(4, 2, "fsdp2", 3))
    line = "4 processes on 2 machines (FSDP2), 16 sequences per step"
    assert opening_lines(two, Path("there")) == [first, second, line]
    training["max_minutes"] = 0.5
    limited = make_plan(Recipe.model_validate(recipe), inspect_source(str(source)))
    assert training_line(limited, slow).endswith("100 steps or 30 s, whichever comes first")


@pytest.mark.parametrize(
    ("name", "known"),
    [("NVIDIA H200", GPUS[2]), ("NVIDIA A100-SXM4-80GB", GPUS[0]), ("NVIDIA T4", None)],
)
def test_a_gpu_is_known_by_its_drivers_name(name: str, known: Device | None) -> None:
    assert known_gpu(name) == known


def test_a_signal_is_answered_at_once() -> None:
    heard = threading.Event()
    with Interruption(gently=True, answer=heard.set) as interruption:
        signal.raise_signal(signal.SIGINT)
        assert heard.wait(2), "the block has not looked yet"
        assert interruption.requested


def test_quiet_says_nothing_of_a_signal(capfd: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter(quiet=True)
    with (
        reporter.task("train", total=3) as task,
        Interruption(
            gently=True, answer=lambda: reporter.line(f"finishing step {task.done + 1:g}")
        ),
    ):
        signal.raise_signal(signal.SIGINT)
    assert capfd.readouterr() == ("", "")
