"""A source that is a conversion itself: it goes on, or is refused where that would be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conversion import convert

from dllm_convert.adapters import get_adapter
from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.loading import load_base
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.planning.environment import check_converted
from dllm_convert.recipe.schema import Noise, Recipe
from dllm_convert.source.inspect import inspect_source
from dllm_convert.verification import verify_checkpoint

Sources = Callable[..., Path]
GROUPS = ["files", "tokens", "attention", "base", "base-logits", "generate"]


def plan_of(source: Path, **fields: Any) -> ConversionPlan:
    values = {"source": str(source), "data": {"sequence_length": 32}, **fields}
    return make_plan(Recipe.model_validate(values), inspect_source(str(source)))


@pytest.fixture(scope="module")
def converted(source_cache: Sources, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "bd3lm"
    convert(source_cache("llama"), folder, "bd3lm")
    return folder


def test_blocks_are_left_behind(converted: Path, tmp_path: Path) -> None:
    """A block size left in config.json would keep the attention of an MDLM block-causal."""
    convert(converted, tmp_path / "mdlm", "mdlm")
    assert json.loads((tmp_path / "mdlm/config.json").read_text())["block_size"] is None
    report = verify_checkpoint(tmp_path / "mdlm", against=converted, untrained=True, groups=GROUPS)
    assert [f"{p.name}: {p.measured}; {p.detail}" for p in report.failed] == []


@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
def test_the_plan_says_what_it_is(converted: Path, target: str) -> None:
    plan = plan_of(converted, target=target, block_size=16 if target == "bd3lm" else None)
    assert {group.before for group in plan.layers} == {"block-causal"}
    assert plan.attention_changes[-1].startswith("block-causal attention becomes")
    warning = next(text for text in plan.warnings if "diffusion model already" in text)
    assert "(bd3lm in blocks of" in warning
    assert plan.tensors_changed == ()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [("kernel", "neighbours", "near each other is found again"),
     ("schedule", "learned", "noise schedule is learnt again")],
)  # fmt: skip
def test_noise_that_is_made_anew_is_said(
    converted: Path, field: str, value: str, said: str
) -> None:
    config = json.loads((converted / "config.json").read_text())
    section = config["diffusion"]
    known = {"mask_id": section["mask_token_id"], "token_shift": section["token_shift"]}
    noise = Noise.model_validate({field: value})
    assert said not in (check_converted(config, noise, **known) or "")
    section[f"noise_{field}"] = value
    assert said in (check_converted(config, noise, **known) or "")
    assert said not in (check_converted(config, Noise(), **known) or "")


def test_the_base_of_the_second_is_seen_as_what_it_is(converted: Path) -> None:
    """The stock class would let it look ahead across its blocks."""
    subject: Any = SimpleNamespace(adapter=get_adapter("llama"))
    model = load_base(converted, subject.adapter)
    first = torch.arange(5, 29)[None]
    other = first.clone()
    other[0, 12] = 50
    with torch.no_grad():
        moved = (model(first).logits - model(other).logits).abs().amax(-1)[0] > 1e-6
    assert not moved[:8].any()
    assert moved[8:16].all()


def test_a_base_is_none(source_cache: Sources) -> None:
    plan = plan_of(source_cache("llama"), target="mdlm")
    assert {group.before for group in plan.layers} == {"causal"}
    assert not any("diffusion model" in text for text in plan.warnings)
    assert "block_size" not in plan.config_updates


def test_another_alignment_is_refused(converted: Path) -> None:
    with pytest.raises(IncompatibleError, match=r"wrong position.*token_shift=keep"):
        plan_of(converted, target="mdlm", token_shift="drop")


def test_another_mask_is_refused(converted: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in converted.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config["diffusion"]["mask_token_id"] -= 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(IncompatibleError, match=r"whose mask token is .*, which it never saw"):
        plan_of(folder, target="mdlm")
