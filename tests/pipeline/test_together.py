"""Several processes that Python asked for: the same checkpoint, failures raised, nothing left."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import SourceFactory

import dllm_convert as dc
from dllm_convert.common.json_files import write_json
from dllm_convert.common.ranks import Rank
from dllm_convert.errors import DllmConvertError
from dllm_convert.pipeline import together
from dllm_convert.planning.launch import Launch
from dllm_convert.recipe.schema import Recipe

SMALL: dict[str, Any] = {
    "data.sequence_length": 32,
    "data.max_documents": 20,
    "data.held_out_sequences": 4,
    "training.batch_size": 2,
    "training.precision": "fp32",
    "generation.max_new_tokens": 16,
}
QUIET = dc.Reporter(quiet=True)
TWO = Launch(2, strategy="ddp")


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What would be launched; one process, in this one, takes part instead."""
    seen: list[dict[str, Any]] = []

    def launch(asked: Launch, command: list[str], module: str) -> int:
        seen.append({"launch": asked, "module": module})
        return together.main(Path(command[0]))

    monkeypatch.setattr(together, "launch", launch)
    yield seen


def test_it_is_the_same_conversion(
    launched: list[dict[str, Any]], tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan = dc.plan(source_cache("llama"), to="bd3lm", block=8, train=False)
    out = tmp_path / "out"
    done = dc.convert(plan, out, num_processes=2, verify="files", reporter=QUIET)
    assert launched == [{"launch": TWO, "module": "dllm_convert.pipeline.together"}]
    assert done.report.passed
    assert done.path == out
    again = dc.convert(plan, out, verify="files", reporter=QUIET)
    assert again.manifest == done.manifest


def test_a_failure_is_raised_as_what_it_is(
    launched: list[dict[str, Any]], tmp_path: Path, source_cache: SourceFactory
) -> None:
    out = tmp_path / "out"
    with pytest.raises(dc.DataError, match="nothing\\.txt") as caught:
        dc.convert(
            source_cache("llama"), out, to="mdlm", data=tmp_path / "nothing.txt", steps=1,
            overrides=SMALL, num_processes=2, reporter=QUIET,
        )  # fmt: skip
    assert len(launched) == 1
    assert caught.value.hint
    assert not (out / "config.json").exists()


@pytest.mark.parametrize(
    ("code", "left", "raised", "said"),
    [
        (130, None, KeyboardInterrupt, "^$"),
        (1, None, DllmConvertError, "ended with code 1"),
        (3, {"kind": "IncompatibleError", "message": "no"}, dc.IncompatibleError, "no"),
        (2, {"kind": "RequestError", "message": "no"}, dc.RequestError, "no"),
        (1, {"kind": "NobodyKnowsError", "message": "no"}, DllmConvertError, "no"),
    ],
)
def test_how_the_processes_end(
    code: int,
    left: dict[str, Any] | None,
    raised: type[BaseException],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    def launch(_: Launch, command: list[str], module: str) -> int:
        if left is not None:
            write_json(Path(command[0]).with_name("failure-000000.json"), {"hint": "so"} | left)
        return code

    monkeypatch.setattr(together, "launch", launch)
    recipe = Recipe(source="nobody/nothing", target="mdlm")
    with pytest.raises(raised, match=said):
        together.run_together(recipe, tmp_path, together.RunOptions(), launched=TWO)


@pytest.mark.parametrize("processes", [0, -1, True, "2", 1.5])
def test_a_number_of_processes_that_is_none(
    processes: Any, launched: list[dict[str, Any]], source_cache: SourceFactory, tmp_path: Path
) -> None:
    with pytest.raises(dc.RequestError, match="processes is"):
        dc.convert(source_cache("llama"), tmp_path / "out", to="mdlm", num_processes=processes)
    assert launched == []


def test_a_config_that_is_not_there(source_cache: SourceFactory, tmp_path: Path) -> None:
    base = source_cache("llama")
    with pytest.raises(dc.DataError, match="no such file"):
        dc.convert(base, tmp_path / "out", to="mdlm", launch_config=tmp_path / "none.yaml")


def test_the_others_follow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from dllm_convert.pipeline import run

    followed: list[Any] = []
    monkeypatch.setattr(run, "follow", lambda *where: followed.append(where))
    monkeypatch.setattr(run, "run", lambda *_, **__: pytest.fail("the first alone converts"))
    recipe = Recipe(source="nobody/nothing", target="mdlm", training={"method": "none"})
    job = tmp_path / "job.json"
    asked = {"link": False, "verify": "auto", "extend": False, "quiet": True}
    write_json(job, {"recipe": recipe.model_dump(mode="json"), "out": "out", **asked})
    place = Rank(rank=1, world=2, launched=True)
    together.take_part(job, place)
    assert followed == [(Path("out"), place)]


@pytest.mark.slow
def test_two_real_processes(tmp_path: Path, source_cache: SourceFactory) -> None:
    """Handlers and variables of the caller are as before."""
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in signals]
    environment = dict(os.environ)
    asked: dict[str, Any] = {"to": "bd3lm", "block": 8, "steps": 2, "overrides": SMALL}
    out = tmp_path / "out"
    done = dc.convert(
        source_cache("llama"), out, verify="files", num_processes=2, reporter=QUIET, **asked
    )
    assert done.manifest["measurements"]["train"]["devices"] == 2
    assert done.report.passed
    assert [signal.getsignal(number) for number in signals] == before
    assert dict(os.environ) == environment
    # Alone each step reads what two read together.
    asked["overrides"] = {**SMALL, "training.batch_size": 4}
    alone = dc.convert(source_cache("llama"), out, verify="files", reporter=QUIET, **asked)
    assert alone.manifest == done.manifest


def test_a_plan_of_several_processes_starts_them(
    launched: list[dict[str, Any]], tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan = dc.plan(source_cache("llama"), to="bd3lm", block=8, train=False, processes=2)
    dc.convert(plan, tmp_path / "out", verify="files", reporter=QUIET)
    assert [start["launch"] for start in launched] == [TWO]
