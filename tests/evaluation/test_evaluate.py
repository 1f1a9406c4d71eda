"""`evaluate`: both models on the same items, held-out text, the manifest and the card."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from card_cases import fill, llama_bd3lm
from card_rules import card_problems
from conversion import convert
from report_cases import evaluated as evaluated_by_hand

from dllm_convert.card.evaluation_curve import PARALLELISM
from dllm_convert.card.readme import render_card
from dllm_convert.card.report import write_report
from dllm_convert.common.console import Reporter
from dllm_convert.common.manifest import REPORT_FILE, read_manifest, write_manifest
from dllm_convert.common.quiet import quiet_libraries
from dllm_convert.errors import DataError, DllmConvertError, IncompatibleError, RequestError
from dllm_convert.evaluation.record import evaluate_checkpoint, record_evaluation
from dllm_convert.evaluation.request import Request
from dllm_convert.evaluation.settings import PUBLISHED, Settings, find_settings, merge
from dllm_convert.evaluation.shown import Evaluation

QUIET = Reporter(quiet=True)
QUICK = Settings(draws=2, rounds=2)


@pytest.fixture(scope="module")
def checkpoint(source_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained conversion with the manifest of a run, as far as an evaluation reads it."""
    folder = tmp_path_factory.mktemp("evaluate") / "bd3lm"
    plan = convert(source_cache("llama"), folder, "bd3lm", block=4)
    recipe = plan.recipe.model_dump(mode="json")
    recipe["data"] |= {"held_out_fraction": 0.5, "held_out_sequences": 4}
    write_manifest(folder, {"recipe": recipe, "files": {}})
    return folder


@pytest.fixture(scope="module")
def evaluated(
    checkpoint: Path, source_cache: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from tasks_on_disk import write_tasks

    folder = write_tasks(tmp_path_factory.mktemp("tasks"))
    request = Request(
        checkpoint,
        ("capitals", "writing", "dllm_copy"),
        base=str(source_cache("llama")),
        include=(str(folder),),
        limit=2,
        thresholds=(1e-6, 1.0),
        batch_sizes=(1, 2),
        settings=QUICK,
    )
    return evaluate_checkpoint(request, QUIET)


def test_both_models_on_the_same_items(evaluated: dict[str, Any], checkpoint: Path) -> None:
    rows = {(row["task"], row["metric"]): row for row in evaluated["results"]}
    assert {("capitals", "acc"), ("capitals", "acc_norm")} < rows.keys()
    assert {task for task, _ in rows} == {"capitals", "writing", "dllm_copy"}
    for row in rows.values():
        assert row["after"]["items"] == row["before"]["items"] == row["difference"]["items"] == 2
        difference = row["after"]["value"] - row["before"]["value"]
        assert row["difference"]["value"] == pytest.approx(difference)
    after, before = evaluated["effort"]["after"], evaluated["effort"]["before"]
    assert after["new_tokens"] > 0
    assert after["tokens_per_forward"] > 0
    assert 0 < after["draws"] <= after["most_draws"] == 2 * 2 * 5
    assert before["writing_seconds"] > 0
    assert json.loads(json.dumps(evaluated)) == read_manifest(checkpoint)["evaluation"]


def test_more_tokens_per_forward_with_a_lower_threshold(
    evaluated: dict[str, Any], checkpoint: Path
) -> None:
    rates: dict[float, set[float]] = {}
    for row in evaluated["sweep"]:
        rates.setdefault(row["threshold"], set()).add(row["tokens_per_forward"])
    assert rates.keys() == {1e-6, 1.0}
    assert {row["task"] for row in evaluated["sweep"]} == {"writing", "dllm_copy"}
    assert min(rates[1e-6]) > max(rates[1.0])
    assert (checkpoint / PARALLELISM.file).read_bytes()[:4] == b"\x89PNG"
    assert PARALLELISM.file in read_manifest(checkpoint)["files"]


def test_batch_sizes_change_seconds_and_no_score(evaluated: dict[str, Any]) -> None:
    rows = {
        batch: [
            (row["threshold"], row["task"], row["metric"], row["value"])
            for row in evaluated["sweep"]
            if row["batch_size"] == batch
        ]
        for batch in (1, 2)
    }
    assert rows[1] == rows[2] and len(rows[1]) == len(evaluated["sweep"]) / 2 > 2
    assert all(row["writing_seconds"] > 0 for row in evaluated["sweep"])
    for row in evaluated["parallelism"]:
        assert row["thresholds"] == [1e-6, 1.0] and row["aup"] >= 0 and row["best"] <= 100
    named = {(row["task"], row["metric"]) for row in evaluated["parallelism"]}
    assert ("dllm_copy", "exact_match") in named or {task for task, _ in named} >= {"dllm_copy"}


def test_text_is_measured_as_in_a_run(checkpoint: Path, source_cache: Any, tmp_path: Path) -> None:
    """The stock base has the NLL that a run measures through the conversion's causal mask."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from dllm_convert.adapters import get_adapter
    from dllm_convert.diffusion.likelihood import autoregressive_nll
    from dllm_convert.evaluation.text import measure_text
    from dllm_convert.modeling.loading import load_model
    from dllm_convert.recipe.schema import Recipe
    from dllm_convert.training.data.text import text_to_measure

    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"Text {number} of a list, and what follows. " * 5)
    source = source_cache("llama")
    request = Request(checkpoint, base=str(source), data=str(tmp_path), settings=QUICK)
    found = measure_text(request, QUIET)
    recipe = Recipe.model_validate(read_manifest(checkpoint)["recipe"])
    data = recipe.data.model_copy(update={"source": str(tmp_path)})
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    recipe = recipe.model_copy(update={"data": data})
    texts, _ = text_to_measure(recipe, tokenizer, QUIET, held_out=False)
    rows = AutoModelForCausalLM.from_pretrained(source).config.vocab_size
    exact = autoregressive_nll(load_model(checkpoint, get_adapter("llama")), texts, rows)
    assert found["nll"]["nats_per_token"] == pytest.approx(exact.nats_per_token, abs=1e-4)
    assert found["nll"]["tokens"] == found["nelbo"]["tokens"] == exact.tokens
    assert found["nelbo"]["nats_per_token"] > 0
    assert str(tmp_path) not in json.dumps(found)
    with pytest.raises(IncompatibleError, match="another vocabulary"):
        measure_text(replace(request, base=str(source_cache("bert"))), QUIET)


@pytest.mark.parametrize("with_tasks", [False, True])
@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("base.gguf", "is a file"),
        ("bsae", "Did you mean base"),
        ("nowhere", "there is no --against nowhere"),
    ],
)
def test_a_base_that_is_not_there_is_found_out_first(
    base: str,
    said: str,
    with_tasks: bool,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dllm_convert.evaluation.run import evaluate_tasks
    from dllm_convert.evaluation.text import measure_text

    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.gguf").touch()
    (tmp_path / "base").mkdir()
    monkeypatch.setattr("dllm_convert.evaluation.subject.EvaluatedCheckpoint.load", None)
    request = Request(checkpoint, ("dllm_copy",), base=base, data="pydoc")
    with pytest.raises(DataError) as caught:
        if with_tasks:
            evaluate_tasks(request, QUIET, lambda found: None)
        else:
            measure_text(request, QUIET)
    assert said in f"{caught.value}. {caught.value.hint}"


def test_the_card_shows_it(tmp_path: Path, evaluated: dict[str, Any], checkpoint: Path) -> None:
    manifest = llama_bd3lm()
    folder = fill(tmp_path / "model", {**manifest, "evaluation": evaluated})
    (folder / PARALLELISM.file).write_bytes((checkpoint / PARALLELISM.file).read_bytes())
    text = render_card(folder, read_manifest(folder))
    assert card_problems(text, folder) == []
    assert "## Evaluation" in text
    assert "| capitals | acc | 2 |" in text
    assert f"]({PARALLELISM.file})" in text
    assert str(checkpoint) not in text
    assert "/" not in evaluated["settings"]["base"]
    results = yaml.safe_load(text.split("---")[1])["model-index"][0]["results"]
    types = {result["dataset"]["type"]: result["metrics"][0] for result in results}
    assert types["capitals"]["type"] == "accuracy"
    # A table is no table with a line missing or of another width.
    table = [line for line in text.split("## Evaluation")[1].splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table[: 2 + len(evaluated["results"])]}) == 1


def test_a_report_that_is_there_shows_it_and_no_other_is_made(tmp_path: Path) -> None:
    folder = fill(tmp_path / "model", llama_bd3lm())
    record_evaluation(folder, evaluated_by_hand())
    assert not (folder / REPORT_FILE).exists()
    write_report(folder)
    before = (folder / REPORT_FILE).read_text(encoding="utf-8")
    again = evaluated_by_hand()
    again["results"][0]["after"]["value"] = 0.125
    record_evaluation(folder, {**again, "sweep": []})
    after = (folder / REPORT_FILE).read_text(encoding="utf-8")
    assert "0.500 ± 0.125" in before
    assert "0.125 ± 0.125" in after
    assert "Score against tokens per forward" in before
    assert "Score against tokens per forward" not in after
    assert not (folder / PARALLELISM.file).exists(), "a curve of an earlier evaluation"


def test_a_base_that_nobody_named_is_said_to_be_missing() -> None:
    record = evaluated_by_hand()
    for base, missing in ((None, True), ("llama", False)):
        settings = {**record["settings"], "base": base, "generation": {}}
        said = str(Evaluation({**record, "settings": settings}).as_blocks())
        assert ("--against BASE" in said) == missing


class Lines(Reporter):
    """Keeps what it is told to print."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def line(self, text: str) -> None:
        self.lines.append(text)


def test_progress_counts_answers_and_says_how_long(
    checkpoint: Path,
    source_cache: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from tasks_on_disk import write_tasks

    from dllm_convert.common import console
    from dllm_convert.evaluation.run import evaluate_tasks

    monkeypatch.setattr(console, "PLAIN_INTERVAL_S", 0.0)
    reporter = Lines()
    folder = write_tasks(tmp_path)
    base = str(source_cache("llama"))
    request = Request(
        checkpoint, ("capitals", "writing"), base, (str(folder),), limit=2, settings=QUICK
    )
    with quiet_libraries():
        evaluate_tasks(replace(request, batch_size=1), reporter, lambda found: None)
    spoken = "\n".join(reporter.lines)
    # The conversion counts a choice and round, decided early or not; the base counts answers.
    assert "score: 10/10, 0:00:00 left" in spoken
    assert "score: 5/5, 0:00:00 left" in spoken
    assert spoken.count("write: 1/2, 0:00:0") == 2
    assert capfd.readouterr() == ("", ""), "bars of lm-eval"


@pytest.mark.parametrize("name", [f.name for f in fields(Settings) if f.name != "generation"])
@pytest.mark.parametrize("value", [-3, 10**12, 0.5, "abc", True, [1], float("nan")])
def test_what_no_setting_can_be_is_refused(name: str, value: Any) -> None:
    if (name, value) == ("confidence", 0.5):
        assert merge(Settings(), {name: value}).confidence == value
        return
    with pytest.raises(RequestError, match=f"{name} is .*, expected"):
        merge(Settings(), {name: value})
    if name != "seed":
        with pytest.raises(RequestError, match=f"{name} is 0, expected"):
            merge(Settings(), {name: 0})
    assert merge(Settings(), {name: getattr(Settings(), name)}) == Settings()


def test_what_cannot_be_evaluated(
    checkpoint: Path, source_cache: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(DllmConvertError, match="nothing to evaluate"):
        evaluate_checkpoint(Request(checkpoint), QUIET)
    with pytest.raises(RequestError, match="no published settings"):
        find_settings("llada-bas")
    with pytest.raises(RequestError, match="no setting of an evaluation is called 'treshold'"):
        merge(Settings(), {"treshold": 0.5})
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(IncompatibleError, match="in one process"):
        evaluate_checkpoint(Request(checkpoint, ("dllm_copy",)), QUIET)
    monkeypatch.delenv("RANK")
    lm_eval = pytest.importorskip("lm_eval.tasks")
    manager = lm_eval.TaskManager
    # Reading lm-eval's own thousands of tasks takes longer than all tests here.
    monkeypatch.setattr(
        lm_eval,
        "TaskManager",
        lambda include_path, include_defaults: manager(
            include_path=include_path, include_defaults=False
        ),
    )
    with pytest.raises(DataError, match="no task dllm_cpoy"):
        evaluate_checkpoint(Request(checkpoint, ("dllm_cpoy",)), QUIET)


def test_a_masked_language_model_has_no_before(source_cache: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    source = source_cache("bert")
    convert(source, tmp_path / "mdlm", "mdlm")
    request = Request(tmp_path / "mdlm", ("dllm_copy",), base=str(source), limit=1)
    with pytest.raises(IncompatibleError, match="masked language model"):
        evaluate_checkpoint(request, QUIET)


def test_published_settings() -> None:
    for name, published in PUBLISHED.items():
        assert published.source
        assert find_settings(name) == published.settings
        # They say what decoding does, whatever a checkpoint's generation_config.json says.
        assert published.settings.generation["max_denoising_steps"] is None
    changed = merge(PUBLISHED["llada-base"].settings, {"draws": 1, "confidence_threshold": 0.9})
    assert (changed.draws, changed.length) == (1, 1024)
    assert changed.generation["confidence_threshold"] == 0.9
    request = Request(Path(), published="llada-base")
    assert (request.shots_of("winogrande"), request.shots_of("gsm8k")) == (5, None)
    assert replace(request, shots=2).shots_of("winogrande") == 2


def test_the_command_line_says_what_is_evaluated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from typer.testing import CliRunner

    from dllm_convert.cli.app import app
    from dllm_convert.evaluation import record

    asked: list[Request] = []

    def evaluate(request: Request, reporter: Reporter) -> dict[str, Any]:
        asked.append(request)
        return {"settings": {}, "seconds": 0.0}

    monkeypatch.setattr(record, "evaluate_checkpoint", evaluate)
    arguments = ["evaluate", str(tmp_path), "--tasks", "a, b", "--against", "me/base"]
    more = ["--thresholds", "0.5,1", "--published", "tiny-a2d-bd3lm", "--set", "draws=2"]
    result = CliRunner().invoke(app, [*arguments, *more, "--set", "temperature=0.5", "--json"])
    assert result.exit_code == 0, result.output
    (request,) = asked
    assert (request.tasks, request.base) == (("a", "b"), "me/base")
    assert (request.thresholds, request.chat) == ((0.5, 1.0), True)
    assert (request.settings.block_size, request.settings.draws) == (32, 2)
    assert request.settings.generation["temperature"] == 0.5
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    both = {"block_size": 4, "mask_token_id": 3}
    section = {"objective": "bd3lm", "attention": "block-causal", "noise_schedule": "linear"}
    config = {
        **{"model_type": "llama", "vocab_size": 9, "is_causal": False, **sizes, **both},
        "diffusion": {"token_shift": True, **section, **both},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    for wrong in ("block_length=4", "unmasking=best", "temperature=hot", "top_p=0.5"):
        result = CliRunner().invoke(app, [*arguments, "--set", wrong])
        assert result.exit_code == 2, wrong
    for wrong in ("0", "2", "much"):
        result = CliRunner().invoke(app, [*arguments, "--thresholds", wrong])
        assert result.exit_code == 2
