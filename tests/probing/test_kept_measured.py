"""What is measured of a base that is to stay: families that can, and faults that it sees."""

from __future__ import annotations

import json
from typing import Any

import generic
import pytest
import torch
from kept import KEPT, RECURRENT, instance

from dllm_convert.adapters.measured import adapter_as_dict, adapter_from_dict
from dllm_convert.errors import UnsupportedError
from dllm_convert.modeling.published import gated
from dllm_convert.planning.conversion import make_plan
from dllm_convert.probing import kept
from dllm_convert.probing.kept import measure_kept
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source


def failures(family: str) -> set[str]:
    return {finding.name for finding in measure_kept(instance(family)) if not finding.passed}


@pytest.mark.parametrize("family", KEPT)
def test_families_that_go_on_from_their_cache(family: str) -> None:
    findings = measure_kept(instance(family))
    assert [f"{f.name}: {f.measured} {f.detail}" for f in findings if not f.passed] == []
    (rolls,) = (finding for finding in findings if finding.name == "rolls-back")
    assert ("recurrent" in rolls.measured) == (family in RECURRENT)


def test_a_state_that_forgets_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = "transformers.cache_utils.LinearAttentionLayer.update_recurrent_state"

    def forgetful(self: Any, states: torch.Tensor, state_idx: int = 0, **_: Any) -> torch.Tensor:
        self.is_recurrent_states_initialized[state_idx] = True
        self.recurrent_states[state_idx] = torch.zeros_like(states)
        return states

    monkeypatch.setattr(layer, forgetful)
    assert {"goes-on", "copies"} <= failures("qwen3_5_text")


def test_a_copy_that_is_none_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def shared(cache: Any, rows: torch.Tensor) -> Any:
        cache.reorder_cache(rows[: 1 + int(cache.layers[1].keys.shape[0] == 1)])
        return cache

    monkeypatch.setattr(kept, "branched", shared)
    assert "copies" in failures("llama")


def test_a_roll_back_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "transformers.cache_utils.LinearAttentionCacheLayerMixin.crop", lambda *_: None
    )
    assert failures("lfm2") == {"rolls-back"}


def test_an_adapter_that_leaks_or_sleeps_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    call = gated.LowRank.__call__

    def everywhere(self: Any, layer: Any, inputs: Any, output: torch.Tensor) -> Any:
        return output + layer.lora_B(layer.lora_A(inputs[0]))

    for wrong in (everywhere, lambda *_: None):
        monkeypatch.setattr(gated.LowRank, "__call__", wrong)
        assert failures("llama") == {"beside-base"}
    monkeypatch.setattr(gated.LowRank, "__call__", call)
    assert failures("llama") == set()


@pytest.mark.parametrize("family", generic.CLOSED)
def test_a_closed_family_converts_beside_its_base_only(family: str, generic_source: Any) -> None:
    base = generic_source(family)
    report = generic.measured(base)
    adapter = report.require()
    assert adapter.targets == ()
    assert adapter.behind == "cache"
    # A later run compares what it plans with what stands in config.json.
    record = adapter_as_dict(adapter)
    assert json.loads(json.dumps(record)) == record
    assert adapter_from_dict(record) == adapter
    values: dict[str, Any] = {
        "source": str(base),
        "target": "bd3lm",
        "block_size": 8,
        "data": {"sequence_length": 32},
    }
    source = inspect_source(str(base))
    with pytest.raises(UnsupportedError, match="in no other way") as caught:
        make_plan(Recipe.model_validate(values), source, adapter)
    assert caught.value.hint
    assert "--keep-base" in caught.value.hint
    training = {"method": "lora", "lora": {"rank": 4, "acts_on": "noisy"}}
    plan = make_plan(Recipe.model_validate({**values, "training": training}), source, adapter)
    section = plan.config_updates["diffusion"]
    assert (section["behind"], section["draft"]) == ("cache", "causal")
    assert section["adapter_targets"]
