"""`check --probe` and `run --allow-generic`: refused, measured, recorded, resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generic
import pytest
from transformers import AutoConfig
from typer.testing import CliRunner

from dllm_convert.adapters import adapter_of
from dllm_convert.adapters.measured import adapter_as_dict, adapter_from_dict
from dllm_convert.cli.app import app
from dllm_convert.common.console import Reporter
from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.pipeline import family as families
from dllm_convert.pipeline.run import run
from dllm_convert.probing import run as probing
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.safetensors_header import read_checkpoint

QUIET = Reporter(quiet=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DLLM_CONVERT_CACHE", str(tmp_path / "cache"))


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def recipe(source: Path, **fields: Any) -> Recipe:
    values: dict[str, Any] = {
        "source": str(source),
        "target": "bd3lm",
        "block_size": 8,
        "allow_generic": True,
        "data": {"sequence_length": 32, "max_documents": 40, "held_out_sequences": 8},
        "training": {
            **{"steps": 12, "batch_size": 2, "learning_rate": 1e-2, "precision": "fp32"},
            **{"method": "lora", "lora": {"rank": 4}},
        },
        "generation": {"max_new_tokens": 16},
    }
    return Recipe.model_validate(values | fields)


@pytest.mark.parametrize("command", ["check", "run"])
def test_an_unknown_family_is_refused_and_the_way_out_is_named(
    generic_source: Callable[[str], Path], tmp_path: Path, command: str
) -> None:
    source = str(generic_source("olmo2"))

    result = invoke(command, source, "--to", "mdlm", "--out", str(tmp_path / "out"))

    assert result.exit_code == 3
    assert result.stdout == ""
    assert "'olmo2' has no adapter" in result.stderr
    assert "--probe" in result.stderr
    assert "--allow-generic" in result.stderr


def test_check_probe_measures_in_a_process_and_keeps_the_answer(
    generic_source: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("check", str(generic_source("gemma2")), "--to", "bd3lm", "--probe", "--json")

    first = invoke(*arguments)
    monkeypatch.setattr(probing, "_measure", lambda *_: pytest.fail("measured again"))
    second = invoke(*arguments)

    assert first.exit_code == 0, first.stderr
    assert first.stdout == second.stdout
    shown = invoke(*arguments[:-1]).stdout
    assert "Measured in small" in shown
    assert "blocks-layers" in shown
    plan = json.loads(first.stdout)
    assert all(finding["passed"] for finding in plan["probe"]["findings"])
    assert plan["measured"]["narrow"] == ["sliding_attention"]
    assert plan["config_updates"]["sliding_window"] == 256
    assert "layer_types" not in plan["config_updates"]


def test_check_probe_refuses_with_what_was_measured(
    generic_source: Callable[[str], Path],
) -> None:
    result = invoke("check", str(generic_source("mamba")), "--to", "mdlm", "--probe")

    assert result.exit_code == 3
    assert "'mamba' cannot be converted, measured on a small random MambaForCausalLM" in (
        result.stderr
    )
    assert "position 0 does not see token 1" in result.stderr


def test_a_probe_that_does_not_end_is_ended(generic_source: Callable[[str], Path]) -> None:
    config = json.loads((generic_source("olmo2") / "config.json").read_text())

    with pytest.raises(UnsupportedError, match=r"did not come to an end in 0\.1 s"):
        probing.probe_family(config, timeout_s=0.1)


def _measure_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Measure without the process, which takes seconds to start; returns what is measured."""
    calls: list[str] = []

    def measure(request: dict[str, Any], _: float) -> dict[str, Any]:
        from dllm_convert.probing.family import measure_family

        calls.append(request["config"]["model_type"])
        report = measure_family(request["config"], request["tensors"])
        answer: dict[str, Any] = json.loads(json.dumps(report.as_dict()))
        return answer

    monkeypatch.setattr(probing, "_measure", measure)
    return calls


@pytest.mark.parametrize("model_type", ["gemma2", "mixtral"])
def test_run_trains_a_measured_family_and_the_card_says_so(
    generic_source: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    model_type: str,
) -> None:
    calls, out = _measure_here(monkeypatch), tmp_path / "out"
    asked = recipe(generic_source(model_type))

    result = run(asked, out, QUIET)

    failed = [p for p in result.manifest["verification"]["probes"] if p["passed"] is False]
    assert failed == []
    assert result.manifest["plan"]["measured"]["transformers"]
    assert "measured, not written" in (out / "README.md").read_text()
    assert "allow_generic: true" in (out / "recipe.yaml").read_text()
    assert calls == [model_type]


def test_a_resumed_run_measures_no_more(
    generic_source: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, out = _measure_here(monkeypatch), tmp_path / "out"
    asked = recipe(generic_source("olmo2"), training={"method": "none"})
    first = run(asked, out, QUIET)
    monkeypatch.setenv("DLLM_CONVERT_CACHE", str(tmp_path / "another"))

    again = run(asked, out, QUIET)

    assert calls == ["olmo2"]
    assert again.manifest["files"] == first.manifest["files"]
    config = json.loads((out / "config.json").read_text())
    assert adapter_of(config) == families._recorded(out, "olmo2")


def test_what_it_was_not_measured_for_is_refused(
    generic_source: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    from dllm_convert.planning.conversion import make_plan
    from dllm_convert.source.inspect import inspect_source

    source = generic_source("olmo2")
    adapter = replace(generic.measured(source).require(), targets=("bd3lm",))
    asked = recipe(source, target="mdlm", block_size=None)

    with pytest.raises(UnsupportedError, match="measured to convert to bd3lm, not to mdlm"):
        make_plan(asked, inspect_source(str(source)), adapter)


def test_weights_that_lack_a_tensor_are_refused(generic_source: Callable[[str], Path]) -> None:
    from dllm_convert.probing.family import measure_family

    source = generic_source("olmo2")
    config = json.loads((source / "config.json").read_text())

    report = measure_family(config, ["model.embed_tokens.weight", "lm_head.weight"])

    assert "the weights lack" in str(report.reason)


def test_a_file_of_the_body_alone_is_refused_with_the_way_out(
    generic_source: Callable[[str], Path],
) -> None:
    """GPT-2's file says `h.0.`, its class `transformer.h.0.`: nothing is missing."""
    from dllm_convert.probing.facts import _loaded

    source = generic_source("gpt2")
    config = AutoConfig.from_pretrained(source)
    names = {n for header in read_checkpoint(source).values() for n in header.entries}
    assert _loaded(config, "GPT2LMHeadModel", names) is None
    bare = {name.removeprefix("transformer.") for name in names}
    with pytest.raises(UnsupportedError, match=r"called h\.0\..*GPT2LMHeadModel\.from_pretrained"):
        _loaded(config, "GPT2LMHeadModel", bare)
    with pytest.raises(UnsupportedError, match="the weights lack 1 tensors"):
        _loaded(config, "GPT2LMHeadModel", names - {"transformer.h.1.ln_1.weight"})


def test_tensors_that_no_class_loads_are_left_out(generic_source: Callable[[str], Path]) -> None:
    from dllm_convert.probing.family import measure_family
    from dllm_convert.source.tensor_names import leftovers

    source = generic_source("olmo2")
    config = json.loads((source / "config.json").read_text())
    stale = "model.layers.{}.self_attn.rotary_emb.inv_freq"
    names = [n for h in read_checkpoint(source).values() for n in h.entries]

    adapter = measure_family(config, [*names, stale.format(0)]).require()

    assert leftovers([*names, stale.format(17)], adapter) == (stale.format(17),)


@pytest.mark.parametrize(
    "broken",
    [
        {"measured": None},
        {"stock_class": "__import__('os')"},
        {"unknown": 1},
        {"diffusion_class": "Diffusion"},
        {"min_transformers": '5.2"; import os; "'},
        {"window": {"size": 3}},
        {
            "measured": {
                **{"transformers": "5.23.0", "config": {}, "layers": {"decoder": 2}},
                "order": [0, 1],
            }
        },
    ],
    ids=str,
)
def test_a_broken_record_is_refused(
    generic_source: Callable[[str], Path], broken: dict[str, Any]
) -> None:
    record = adapter_as_dict(generic.measured(generic_source("olmo2")).require())
    assert adapter_from_dict(record).model_type == "olmo2"

    with pytest.raises(IncompatibleError, match="no record of a measured family"):
        adapter_from_dict(record | broken)


def test_a_record_names_decoders_only(generic_source: Callable[[str], Path]) -> None:
    from dataclasses import replace

    from dllm_convert.modeling.classes import diffusion_class

    adapter = generic.measured(generic_source("olmo2")).require()

    with pytest.raises(UnsupportedError, match="no decoder Trainer"):
        diffusion_class(replace(adapter, stock_class="Trainer", diffusion_class="DiffusionTrainer"))
