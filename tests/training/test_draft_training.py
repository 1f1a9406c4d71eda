"""Training to draft: groups of masks behind clean tokens, and the lossless decoding they serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import SourceFactory
from gated import FAMILIES, gated_folder
from test_gated_training import DATA, QUIET, SHORT, plan_of, rows_of, texts
from transformers import AutoModelForCausalLM

from dllm_convert.diffusion.corruption import NoiseKey
from dllm_convert.diffusion.drafts import draft_groups, predict_drafts
from dllm_convert.diffusion.objective import Objective
from dllm_convert.errors import DllmConvertError
from dllm_convert.modeling.loading import load_model
from dllm_convert.modeling.published.gated import adapter_parameters
from dllm_convert.recipe.loading import load_recipe
from dllm_convert.training.gated import read_clean
from dllm_convert.training.run import train
from dllm_convert.training.setup import trainable_model


@pytest.mark.parametrize(
    ("family", "attention"),
    [*((family, "tiles") for family in FAMILIES), ("llama", "sdpa"), ("llama", "eager")],
)
def test_a_group_sees_what_a_lossless_forward_shows_it(
    family: str, attention: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan = plan_of(source_cache(family), tmp_path / "g", attention=attention)
    model = trainable_model(plan, tmp_path / "g").train()
    objective, batch = Objective.from_config(model.config), texts()
    views = draft_groups(batch, objective, NoiseKey(0, 0, 0, 3))
    reading, forward = predict_drafts(batch, views, objective)
    states, first, _ = read_clean(model, reading, reading.dense_mask(), objective)
    assert not first.numel()
    logits = model(
        **forward.inputs, attention_mask=forward.dense_mask(), past_key_values=states,
        use_cache=False,
    ).logits  # fmt: skip
    nats = forward.nats(logits, objective)
    (nats * forward.weight).sum().backward()
    assert all(weight.grad.abs().max() > 0 for weight in adapter_parameters(model).values())
    model.eval()
    number, row, at = torch.stack([view.scored for view in views]).nonzero(as_tuple=True)
    # One by one: the document up to a token, then the masks behind it.
    chosen = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))[:25]
    for place in chosen.tolist():
        r, target, step = int(row[place]), int(at[place]), int(number[place])
        p = target - step - 2
        begins = p - int(batch.positions[r, p])
        size = max(s + 1 for s, view in enumerate(views) if target_of(view, r, p, s))
        ids = torch.cat([batch.tokens[r, begins : p + 1], torch.full((size,), plan.mask.id)])[None]
        clean = p + 1 - begins
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        seen[clean:, clean:] = True
        with torch.no_grad():
            alone = model(
                ids, attention_mask=seen[None, None],
                noisy=(torch.arange(ids.shape[1]) >= clean)[None],
            ).logits[0, clean + step]  # fmt: skip
        alone[plan.mask.id :][:1] = -torch.inf
        expected = -alone.log_softmax(-1)[batch.tokens[r, target]]
        torch.testing.assert_close(nats[place].detach(), expected, atol=1e-4, rtol=1e-4)


def target_of(view: Any, row: int, token: int, step: int) -> bool:
    """Whether mask `step` behind a token predicts something that is scored."""
    at = token + step + 2
    return at < view.scored.shape[1] and bool(view.scored[row, at])


def test_every_depth_weighs_the_same_and_only_what_is_scored_counts(
    tmp_path: Path, source_cache: SourceFactory
) -> None:
    plan = plan_of(source_cache("llama"), tmp_path / "g")
    objective = Objective.from_config(load_model(tmp_path / "g", plan.adapter).config)
    batch, draws = texts(), 400
    weights = torch.zeros(objective.size - 1, *batch.tokens.shape)
    masks = 0
    for draw in range(draws):
        views = draft_groups(batch, objective, NoiseKey(0, draw, 0, 3))
        weights += torch.stack([view.weight for view in views])
        masks += int(views[0].behind.sum())
        assert not any((view.scored & ~batch.scorable).any() for view in views)
    for step, weight in enumerate(weights):
        # A document's first tokens have nobody so far before them.
        may = batch.scorable & (batch.positions >= step + 2)
        assert not weight[~may].any()
        assert float(weight[may].mean()) / draws == pytest.approx(1, rel=0.1)
    assert masks / draws / batch.tokens.numel() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("family", FAMILIES)
def test_training_teaches_to_draft_and_the_text_stays_the_bases(
    family: str, tmp_path: Path, source_cache: SourceFactory
) -> None:
    lora = {"rank": 8, "acts_on": "noisy"}
    training = {"method": "lora", "lora": lora, "precision": "fp32", **SHORT, "steps": 20}
    plan = gated_folder(
        source_cache(family), tmp_path / "a", filled=False, training=training, data=DATA,
        noise={"draw": "draft"}, block_size=4,
    )  # fmt: skip
    data = rows_of(plan, tmp_path / "a")
    train(plan, data, tmp_path / "a", tmp_path / "b", tmp_path / "work", QUIET)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "b", trust_remote_code=False).eval()
    prompts = data.held_out[0].tokens[:3, :9]
    expected = base.generate(
        prompts, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    lines = [json.loads(line) for line in (tmp_path / "work/metrics.jsonl").open()]
    losses = [line["loss"] for line in lines]
    assert not any("nelbo" in line for line in lines), "it is no bound"
    assert sum(losses[-3:]) < 0.95 * sum(losses[:3])
    # A base that was never trained writes what nobody could guess; what is drafted changes nothing.
    for folder in "ab":
        model = load_model(tmp_path / folder, plan.adapter).eval()
        found = model.generate(
            prompts, max_new_tokens=60, verify_with="base", eos_token_id=-1,
            return_dict_in_generate=True,
        )  # fmt: skip
        assert torch.equal(found.sequences, expected)
        assert found.forwards <= 61


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"noise.draw": "draft"}, "acts_on"),
        ({"noise.draw": "draft", "keep_base": True, "block_size": 1}, "at least one draft"),
        ({"noise.draw": "draft", "keep_base": True, "noise.complementary": True}, "complementary"),
        ({"noise.draw": "draft", "keep_base": True, "noise.views": 2}, "views"),
    ],
)
def test_what_drafts_need_is_said(asked: dict[str, Any], said: str) -> None:
    fields = dict(asked)
    if fields.pop("keep_base", False):
        fields |= {"training.method": "lora", "training.lora.acts_on": "noisy"}
    given = {"target": "bd3lm", "block_size": 4, **fields}
    with pytest.raises(DllmConvertError, match=said):
        load_recipe("smollm2-135m", overrides=given)
