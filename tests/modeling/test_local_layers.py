"""ModernBERT: two layers of three see a window, and keep it under every mask of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert
from factory import make_source
from transformers import AutoModelForMaskedLM

from dllm_convert.errors import IncompatibleError
from dllm_convert.modeling.loading import load_checkpoint
from dllm_convert.modeling.published.modeling import DiffusionModernBertForMaskedLM
from dllm_convert.verification.run import verify_checkpoint

LENGTH = 40
"""Tokens of a text; a local layer of the tiny model sees 8 to each side."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("modernbert") / "source", "modernbert", layers=4)


@pytest.fixture(scope="module")
def converted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modernbert") / "converted"
    convert(source, folder, "mdlm")
    return folder


def ids(rows: int = 1) -> torch.Tensor:
    return torch.randint(5, 300, (rows, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_a_mask_of_ours_leaves_the_windows(
    source: Path, converted: Path, implementation: str
) -> None:
    base = AutoModelForMaskedLM.from_pretrained(source, attn_implementation=implementation).eval()
    model = load_checkpoint(converted, device="cpu").model
    model.set_attn_implementation(implementation)
    expected = base(ids()).logits
    every = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    torch.testing.assert_close(model(ids(), attention_mask=every).logits, expected)
    # The stock class, given the same mask, opens its local layers.
    opened = base(ids(), attention_mask=every if implementation == "sdpa" else every.float() - 1)
    assert (opened.logits - expected).abs().max() > 1e-2


@torch.no_grad()
def test_two_texts_in_one_row_are_each_by_itself(converted: Path) -> None:
    model, text = load_checkpoint(converted, device="cpu").model, ids(2)
    alone = model(text).logits
    segment = torch.arange(2).repeat_interleave(LENGTH)
    mask = (segment[:, None] == segment)[None, None]
    positions = torch.arange(LENGTH).repeat(2)[None]
    packed = model(text.view(1, -1), attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(packed.view(alone.shape), alone)


def test_a_lost_window_is_found(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = ("attention", "gradient", "training", "padding", "batch")
    found = [verify_checkpoint(converted, groups=groups)]
    monkeypatch.setattr(DiffusionModernBertForMaskedLM, "_by_layer", lambda _, mask, __: mask)
    found.append(verify_checkpoint(converted, groups=groups))
    failed = [{p.name for p in report.probes if p.passed is False} for report in found]
    assert not failed[0]
    assert failed[1]


def test_names_of_released_configs_mean_the_same(
    source: Path, converted: Path, tmp_path: Path
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for file in source.iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    config = json.loads((old / "config.json").read_text())
    kinds, rope = config.pop("layer_types"), config.pop("rope_parameters")
    assert [kind.split("_")[0] for kind in kinds] == ["full", "sliding", "full", "sliding"]
    config |= {
        "global_attn_every_n_layers": 2,
        "global_rope_theta": rope["full_attention"]["rope_theta"],
        "local_rope_theta": rope["sliding_attention"]["rope_theta"],
    }
    (old / "config.json").write_text(json.dumps(config))
    plan = convert(old, tmp_path / "out", "mdlm")
    assert "2 of 4 layers see 8 tokens to each side" in " ".join(plan.notes)
    with torch.no_grad():
        found = load_checkpoint(tmp_path / "out", device="cpu").model(ids()).logits
        expected = load_checkpoint(converted, device="cpu").model(ids()).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_flex_attention_is_refused(source: Path, tmp_path: Path) -> None:
    from dllm_convert.adapters import get_adapter
    from dllm_convert.recipe.loading import load_recipe
    from dllm_convert.training.setup import attention_implementation

    overrides: dict[str, Any] = {"target": "mdlm", "training.attention": "flex"}
    recipe = load_recipe(str(source), overrides=overrides)
    with pytest.raises(IncompatibleError, match="layers with a window"):
        attention_implementation(recipe, get_adapter("modernbert"))
