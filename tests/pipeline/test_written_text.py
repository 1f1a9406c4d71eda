"""A run whose base writes what is trained on: planned, shared, stopped, recorded."""

from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import forks
import pytest
from conftest import SourceFactory
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import read_manifest
from dllm_convert.errors import IncompatibleError
from dllm_convert.pipeline.options import Depth, RunOptions
from dllm_convert.pipeline.run import run
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training import base_text

QUIET = Reporter(quiet=True)
ASKED = {
    "prompts": 40, "prompt_tokens": 8, "max_new_tokens": 16, "batch_size": 8,
}  # fmt: skip
FILES = RunOptions(verify=Depth.FILES)


def recipe(source: Path) -> Recipe:
    return Recipe.model_validate(
        {
            "source": str(source),
            "target": "bd3lm",
            "block_size": 8,
            "data": {"sequence_length": 32, "held_out_sequences": 4, "write_with_base": ASKED},
            "training": {"steps": 4, "batch_size": 2, "precision": "fp32"},
            "generation": {"max_new_tokens": 8},
        }
    )


@pytest.mark.slow
def test_a_run_that_is_stopped_while_the_base_writes(
    tmp_path: Path, source_cache: SourceFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recipe(source_cache("llama"))
    whole = run(asked, tmp_path / "whole", QUIET, how=FILES)
    real, calls = base_text.write, [0]

    def stopped(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] in (2, 5):
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(base_text, "write", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run(asked, tmp_path / "stopped", QUIET, how=FILES)
    done = run(asked, tmp_path / "stopped", QUIET, how=FILES)
    assert calls[0] == 5 + 2, "a batch that was written was written again"
    weights = [(r.path / "model.safetensors").read_bytes() for r in (whole, done)]
    assert weights[0] == weights[1]
    facts = [r.manifest["measurements"]["data"]["written_with_base"] for r in (whole, done)]
    assert facts[0] == facts[1]
    assert facts[0]["prompts"] == 40 and facts[0]["seed"] == 0 and facts[0]["temperature"] == 1
    assert whole.manifest["measurements"]["data"]["source"] == "pydoc"
    card = " ".join((whole.path / "README.md").read_text().split())
    assert "that the base wrote before the training" in card and "40 prompts from" in card
    assert "at most 16 tokens each, seed 0" in card
    assert str(tmp_path) not in json.dumps(whole.manifest["measurements"])
    # What it wrote stays, to be looked at.
    assert (whole.path / ".work/written/text.jsonl").is_file()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
def test_two_processes_write_what_one_writes(tmp_path: Path, source_cache: SourceFactory) -> None:
    source = source_cache("llama")
    # One sequence per process: the text of two is that of one, and so are the steps.
    one = run(recipe(source), tmp_path / "one", QUIET, how=FILES)
    fields = {
        **{f"data.write_with_base.{name}": value for name, value in ASKED.items()},
        **{
            "data.sequence_length": 32,
            "data.held_out_sequences": 4,
            "training.batch_size": 1,
            "training.learning_rate": 1e-2,
        },
        **{"training.precision": "fp32", "generation.max_new_tokens": 8},
    }
    line = [sys.executable, "-m", "dllm_convert", "run", str(source), "--to", "bd3lm",
            "--block", "8", "--data", "pydoc", "--steps", "8", "--out", str(tmp_path / "two"),
            *(w for k, v in fields.items() for w in ("--set", f"{k}={v}"))]  # fmt: skip
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    ranks = [
        forks.start(line, env={**os.environ, **address, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=180)
        # Text of a base with random weights does not help with real text: a failed probe is fine.
        assert process.returncode in (0, 4), errors
    facts = [
        read_manifest(folder)["measurements"]["data"]["written_with_base"]
        for folder in (one.path, tmp_path / "two")
    ]
    assert facts[0] == facts[1]


def test_check_says_what_writing_costs(source_cache: SourceFactory, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        "\n".join(json.dumps({"text": f"Text {n} and more of it."}) for n in range(30))
    )
    line = ["check", str(source_cache("llama")), "--to", "mdlm", "--data", f"{tmp_path}/a.jsonl",
            "--set", "data.write_with_base.prompts=1000", "--steps", "1",
            "--set", "data.write_with_base.max_new_tokens=100",
            "--set", "data.write_with_base.batch_size=4"]  # fmt: skip
    found = json.loads(CliRunner().invoke(app, [*line, "--json"]).output)["text"]
    # Of 30 documents three are held out: 27 prompts, in 7 batches.
    assert found["written_with_base"] == {
        "prompts": 27, "new_tokens": 2700, "forwards": 700, "batch_size": 4,
    }  # fmt: skip
    shown = " ".join(CliRunner().invoke(app, line).output.split())
    assert "answers 27 prompts" in shown and "2.7k tokens in 700 forwards of rows of 4" in shown
    refused = CliRunner().invoke(app, [*line, "--steps", "5000"])
    assert refused.exit_code == 3 and "by heart" in " ".join(refused.stderr.split())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"training.method": "none"}, "nothing is trained"),
        ({"data.source": "a/b:1,c/d:1"}, "prompts are taken from one text"),
        ({"data.write_with_base.temperature": 0.0, "data.write_with_base.top_p": 0.5},
         "nothing is drawn"),
        ({"data.write_with_base.prompts": 0, "data.write_with_base.top_p": 0.5}, "does nothing"),
        ({"data.write_with_base.top_p": 0.0}, "top_p is 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused(fields: dict[str, Any], message: str) -> None:
    known = {"target": "mdlm", "data.write_with_base.prompts": 5}
    with pytest.raises(IncompatibleError) as caught:
        load_recipe("x/y", overrides=known | fields)
    assert message in str(caught.value)


def test_what_writes_no_text_is_refused(source_cache: SourceFactory, tmp_path: Path) -> None:
    line = ["--set", "data.write_with_base.prompts=5"]
    encoder = CliRunner().invoke(app, ["check", str(source_cache("bert")), "--to", "mdlm", *line])
    assert encoder.exit_code == 3 and "writes no text" in " ".join(encoder.stderr.split())
    made = tmp_path / "made"
    untrained = {"source": str(source_cache("llama")), "target": "mdlm"}
    asked = Recipe.model_validate({**untrained, "training": {"method": "none"}})
    run(asked, made, QUIET, how=FILES)
    again = CliRunner().invoke(app, ["check", str(made), *line])
    assert again.exit_code == 3 and "a diffusion model already" in " ".join(again.stderr.split())
