"""An evaluation loses nothing: recorded as it goes, gone on with after a stop, task by task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conversion import convert

from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import read_manifest, write_manifest
from dllm_convert.errors import DataError, DllmConvertError
from dllm_convert.evaluation import run
from dllm_convert.evaluation.kept import FOLDER
from dllm_convert.evaluation.record import evaluate_checkpoint
from dllm_convert.evaluation.request import Request
from dllm_convert.evaluation.settings import Settings

pytest.importorskip("lm_eval", reason="lm-eval is not installed")
QUIET = Reporter(quiet=True)
BROKEN = """task: broken
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "x"
generation_kwargs:
  until: ["."]
  max_gen_toks: 4
metric_list:
  - metric: exact_match
"""


@pytest.fixture
def request_of(source_cache: Any, tmp_path: Path) -> Any:
    from tasks_on_disk import write_tasks

    checkpoint = tmp_path / "model"
    plan = convert(source_cache("llama"), checkpoint, "bd3lm", block=4)
    recipe = plan.recipe.model_dump(mode="json")
    write_manifest(checkpoint, {"recipe": recipe, "files": {}})
    (tmp_path / "tasks").mkdir()
    folder = write_tasks(tmp_path / "tasks")
    (folder / "broken.yaml").write_text(BROKEN.format(data=tmp_path / "nothing.json"))

    def make(*tasks: str, **fields: Any) -> Request:
        settings = Settings(draws=2, rounds=1)
        known = {"base": str(source_cache("llama")), "limit": 2, "settings": settings}
        return Request(checkpoint, tasks, include=(str(folder),), **{**known, **fields})

    return make


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Which model ran which task, in their order."""
    done: list[tuple[str, str]] = []
    plain = run.run_task

    def counted(request: Request, model: Any, manager: Any, name: str) -> Any:
        done.append((type(model).__name__, name))
        return plain(request, model, manager, name)

    monkeypatch.setattr(run, "run_task", counted)
    return done


def rows_of(section: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {f"{row['task']} {row['metric']}": row for row in section["results"]}


def test_what_was_stopped_goes_on(
    request_of: Any, ran: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every place between two tasks; the result is that of an undisturbed evaluation."""
    asked = request_of("capitals", "writing", thresholds=(0.5,))
    whole = evaluate_checkpoint(asked, QUIET)
    expected = list(ran)
    assert len(expected) == 5
    counted = run.run_task
    for stop in range(1, 5):
        manifest = read_manifest(asked.checkpoint)
        del manifest["evaluation"]
        write_manifest(asked.checkpoint, manifest)
        ran.clear()

        def stopped(*given: Any, stop: int = stop) -> Any:
            if len(ran) == stop:
                raise KeyboardInterrupt
            return counted(*given)

        monkeypatch.setattr(run, "run_task", stopped)
        with pytest.raises(KeyboardInterrupt):
            evaluate_checkpoint(asked, QUIET)
        # What was found stands in the manifest already.
        assert read_manifest(asked.checkpoint)["evaluation"]["results"]
        monkeypatch.setattr(run, "run_task", counted)
        found = evaluate_checkpoint(asked, QUIET)
        assert ran == expected, "nothing was done twice, nothing left out"
        assert rows_of(found) == rows_of(whole)
        assert [row["value"] for row in found["sweep"]] == [row["value"] for row in whole["sweep"]]
        assert not (asked.checkpoint / FOLDER).exists()


def test_a_task_that_fails_leaves_the_others(request_of: Any, ran: list[tuple[str, str]]) -> None:
    asked = request_of("capitals", "broken", "writing")
    with pytest.raises(DllmConvertError, match="1 of 3 tasks failed: broken"):
        evaluate_checkpoint(asked, QUIET)
    section = read_manifest(asked.checkpoint)["evaluation"]
    assert {row["task"] for row in section["results"]} == {"capitals", "writing"}
    assert all("before" in row for row in section["results"])
    assert list(section["failed"]) == ["broken"] and section["failed"]["broken"]
    # The base is not asked what the conversion could not be.
    assert [name for _, name in ran].count("broken") == 1
    ran.clear()
    (Path(asked.include[0]).parent / "nothing.json").write_text('{"question": "a"}\n')
    found = evaluate_checkpoint(asked, QUIET)
    assert ran == [("DiffusionLM", "broken"), ("AutoregressiveLM", "broken")]
    assert "failed" not in found


def test_tasks_with_the_same_settings_come_together(request_of: Any) -> None:
    first = evaluate_checkpoint(request_of("capitals"), QUIET)
    both = evaluate_checkpoint(request_of("writing"), QUIET)
    assert {row["task"] for row in both["results"]} == {"capitals", "writing"}
    assert rows_of(first).items() <= rows_of(both).items()
    assert both["tasks"].keys() == {"capitals", "writing"}
    # Other settings are another evaluation.
    other = evaluate_checkpoint(request_of("writing", limit=1), QUIET)
    assert {row["task"] for row in other["results"]} == {"writing"}
    assert read_manifest(request_of().checkpoint)["evaluation"] == other


class Told(Reporter):
    """Keeps what it warns of."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.warnings: list[str] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)


def test_what_is_found_of_another_model_does_not_come_together(
    request_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a folder of its own, where two models, or two states of one, may be recorded."""

    def found(request: Request, *_: Any) -> dict[str, Any]:
        return {"tasks": {name: {} for name in request.tasks}}

    monkeypatch.setattr(run, "evaluate_tasks", found)
    out, teller = tmp_path / "found", Told()
    first = evaluate_checkpoint(request_of("capitals", record=out), teller)
    both = evaluate_checkpoint(request_of("writing", record=out), teller)
    assert both["tasks"].keys() == {"capitals", "writing"}
    assert not teller.warnings
    of_one = first["settings"]["checkpoint"]
    assert of_one.startswith("model@")
    trained = request_of("writing", record=out)
    manifest = read_manifest(trained.checkpoint)
    files = {"model.safetensors": "0" * 64}
    write_manifest(trained.checkpoint, {**manifest, "files": files})
    other = evaluate_checkpoint(trained, teller)
    assert other["tasks"].keys() == {"writing"}
    assert other["settings"]["checkpoint"] != of_one
    assert f"holds what was found of {of_one}" in " ".join(teller.warnings)


def test_the_base_is_looked_for_first(request_of: Any, ran: list[tuple[str, str]]) -> None:
    with pytest.raises(DataError):
        evaluate_checkpoint(request_of("capitals", base="no/such-folder/anywhere"), QUIET)
    assert not ran
