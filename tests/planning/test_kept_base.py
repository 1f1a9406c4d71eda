"""Plans that keep the base: what they change, what they cost, and what they refuse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gated import FAMILIES
from typer.testing import CliRunner

from dllm_convert.cli.app import app
from dllm_convert.errors import IncompatibleError, UnsupportedError
from dllm_convert.pipeline.asked import resolve
from dllm_convert.planning.conversion import ConversionPlan, make_plan
from dllm_convert.planning.costs import (
    flops_per_token,
    idle_flops_per_token,
    peak_memory,
    trainable_parameters,
)
from dllm_convert.planning.devices import cpu
from dllm_convert.planning.estimate import estimate, settled
from dllm_convert.planning.plan_text import DRAFTS_MEASURED
from dllm_convert.planning.streams import streams
from dllm_convert.recipe.schema import Recipe
from dllm_convert.source.inspect import inspect_source

Sources = Callable[..., Path]


def plan(base: Path, **fields: Any) -> ConversionPlan:
    recipe = {
        "source": str(base),
        "target": "bd3lm",
        "block_size": 8,
        "data": {"sequence_length": 32},
        "training": {"method": "lora", "lora": {"rank": 4, "acts_on": "noisy"}},
        **fields,
    }
    return make_plan(Recipe.model_validate(recipe), inspect_source(str(base)))


@pytest.mark.parametrize("padding", [0, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_of_the_base_is_changed(family: str, padding: int, source_cache: Sources) -> None:
    made = plan(source_cache(family, vocab_padding=padding))
    updates = dict(made.config_updates)
    assert updates.keys() == {"auto_map", "mask_token_id", "block_size", "diffusion"}
    assert made.tensors_changed == ()
    assert made.mask.rows_after == made.mask.rows_before
    assert not made.mask.write_row
    assert (made.mask.id >= made.mask.rows_before) == (padding == 0)
    section = updates["diffusion"]
    assert (section["acts_on"], section["context"], section["token_shift"]) == (
        "noisy", "causal", True,
    )  # fmt: skip
    assert (section["adapter_rank"], section["adapter_alpha"]) == (4, 8)
    assert made.writes is not None and made.writes.as_dict()["changed_tensors"] == {}
    text = "\n".join(map(str, made.as_blocks()))
    assert "the base is kept" in text
    assert "a vector beside the base stands for it" in text


def test_a_training_to_draft_says_what_was_bought_elsewhere(source_cache: Sources) -> None:
    def said(**noise: Any) -> str:
        made = plan(source_cache("llama"), block_size=4, noise=noise)
        return " ".join("\n".join(map(str, made.as_blocks())).split())

    measured = "1.64 tokens per forward (1.45 in chats) after 151,000"
    assert measured in said(draw="draft")
    assert measured not in said(draw="count")
    page = (Path(__file__).parents[2] / "docs" / "lossless.md").read_text()
    for tokens, text, chat in DRAFTS_MEASURED:
        assert any(
            f" {tokens:,} tokens" in line and f"{text:.2f}, {chat:.2f}" in line
            for line in page.splitlines()
        )


def test_it_costs_less_than_the_same_adapter_on_all_tokens(source_cache: Sources) -> None:
    base = source_cache("llama")
    noise = {"draw": "count", "complementary": True}
    kept = plan(base, noise=noise)
    lora = {"method": "lora", "lora": {"rank": 4}}
    merged = plan(base, noise=noise, training=lora)
    assert kept.shape is not None and merged.shape is not None
    trained = [trainable_parameters(one.shape, one.recipe.training) for one in (kept, merged)]
    assert trained[0] == 4 * kept.shape.adapted + kept.shape.hidden < trained[1]
    for sparse in (True, False):
        flops = [flops_per_token(one.shape, one.recipe, sparse=sparse) for one in (kept, merged)]
        assert flops[0] < flops[1]
    memory = [
        peak_memory(one.shape, one.recipe, gpu=False, bf16=False, flex=False).total
        for one in (kept, merged)
    ]
    assert memory[0] < memory[1]


UNIFORM = {
    "noise.kernel": "uniform",
    "noise.discrete_steps": 10,
    "noise.draw": "time",
    "noise.complementary": False,
}


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        ({"target": "mdlm", "block_size": None}, "mdlm has none"),
        ({"token_shift": "drop"}, "the token shift is kept"),
        (UNIFORM, "the uniform kernel has none"),
        ({"generation.guidance_scale": 2.0}, "knows no mask"),
        ({"training.ar_loss_weight": 0.5}, "that is the base, which stays"),
        ({"training.attention_annealing_steps": 5}, "opened step by step"),
        ({"training.lora.dropout": 0.1}, "no dropout"),
        ({"training.compile": True}, "not told which tokens are noisy"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_go_with_it_says_the_way_out(
    overrides: dict[str, Any], why: str, source_cache: Sources
) -> None:
    with pytest.raises(IncompatibleError, match=why) as caught:
        resolve(source_cache("llama"), lora=4, keep_base=True, overrides=overrides)
    assert "--keep-base" in caught.value.message
    assert caught.value.hint and "training.lora.acts_on=all" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--keep-base",), "--lora"),
        (("--full", "--keep-base"), "--lora"),
        (("--no-train", "--keep-base"), "--lora"),
        (("--lora", "4", "--keep-base", "--keep-adapter"), "lies beside it anyway"),
        (("--lora", "4", "--keep-base", "--set", "training.lora.norms=true"), "lies beside it"),
        (("--lora", "4", "--keep-base", "--set", "training.lora.acts_on=all"), "contradicts"),
    ],
)
def test_what_was_typed_and_contradicts_it_is_a_usage_error(
    options: tuple[str, ...], said: str, source_cache: Sources
) -> None:
    arguments = ["check", str(source_cache("llama")), *options]
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "400", "TERM": "dumb"})
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())


def test_causal_drafts_are_beside_a_kept_base(source_cache: Sources) -> None:
    kept = plan(source_cache("llama"), block_attention="causal")
    assert kept.config_updates["diffusion"]["draft"] == "causal"
    assert "those before them" in kept.attention_changes[0]


def test_a_window_stays_and_noisy_tokens_stand_behind_the_cache(source_cache: Sources) -> None:
    window = source_cache("mistral", sliding_window=16)
    kept = plan(window)
    section = kept.config_updates["diffusion"]
    assert (section["draft"], section["behind"]) == ("causal", "cache")
    assert any("copy of the base's cache" in note for note in kept.notes)
    with pytest.raises(IncompatibleError, match="stays as it is") as caught:
        plan(window, block_attention="open")
    assert caught.value.hint == "Leave block_attention out"


def test_bases_that_cannot_be_kept(source_cache: Sources) -> None:
    with pytest.raises(UnsupportedError, match="both sides"):
        plan(source_cache("bert"), target="bd3lm")
    base = source_cache("llama")
    source = inspect_source(str(base))
    more = replace(source, tokenizer=replace(source.tokenizer, size=source.tokenizer.size + 3))
    recipe = plan(base).recipe
    with pytest.raises(IncompatibleError, match=r"adds none|only \d+ rows"):
        make_plan(recipe, more)


def test_a_kept_base_is_no_source_and_no_export(source_cache: Sources, tmp_path: Path) -> None:
    from gated import gated_folder

    from dllm_convert.planning.layouts.registry import reachable
    from dllm_convert.serving.run import read_converted

    gated_folder(source_cache("llama"), tmp_path / "g")
    opened = Recipe.model_validate(
        {"source": str(tmp_path / "g"), "target": "bd3lm", "block_size": 8,
         "data": {"sequence_length": 32}, "training": {"method": "none"}}
    )  # fmt: skip
    with pytest.raises(IncompatibleError, match="another conversion would lose"):
        make_plan(opened, inspect_source(str(tmp_path / "g")))
    with pytest.raises(IncompatibleError, match="no autoregressive base to keep"):
        plan(tmp_path / "g")
    for _, refusals in reachable(read_converted(tmp_path / "g")[0]):
        assert "acts on noisy tokens only" in refusals[0].reason


@pytest.mark.parametrize("draw", ["count", "draft"])
def test_what_rows_behind_a_cache_cost(draw: str, source_cache: Sources) -> None:
    """Copies of keys and values instead of a mask, nothing computed again, and small forwards."""
    fields: dict[str, Any] = {"noise": {"draw": draw}}
    window = plan(source_cache("mistral", sliding_window=16), **fields)
    masked = plan(source_cache("mistral"), **fields)
    assert window.shape is not None and masked.shape is not None
    assert window.shape.cached and not masked.shape.cached
    read, behind = (streams(window.recipe, sparse=False, cached=c) for c in (False, True))
    assert behind.scored == read.scored
    assert behind.stops == (32 if draw == "draft" else 4)
    # Each noisy row has half a text before it, and attends to no more.
    assert behind.copied == behind.rows * 16
    assert behind.pairs < read.pairs
    found = [idle_flops_per_token(one.shape, one.recipe) for one in (window, masked)]
    assert found[0] > 0 and found[1] == 0
    kinds = [settled(one.shape, one.recipe, cpu(2, 10**11, bf16=False)) for one in (window, masked)]
    again = [one.training.gradient_checkpointing for one in kinds]
    assert again == ["off", "selective"]
    longer = window.recipe.model_copy(
        update={"data": window.recipe.data.model_copy(update={"sequence_length": 512})}
    )
    sizes = [
        peak_memory(window.shape, recipe, gpu=False, bf16=False, flex=False).activations
        for recipe in (window.recipe, longer)
    ]
    # 16 times the text has rows 16 times as many, with 16 times as much before each.
    assert 16 < sizes[1] / sizes[0] < 256
    taught = {**window.recipe.training.model_dump(), "distillation": {"weight": 0.5}}
    again_with = plan(source_cache("mistral", sliding_window=16), **fields, training=taught)
    assert flops_per_token(again_with.shape, again_with.recipe, sparse=True) > flops_per_token(
        window.shape, window.recipe, sparse=True
    )
    with_teacher, without = (
        estimate(one, cpu(2, 10**11, bf16=False)) for one in (again_with, window)
    )
    assert with_teacher is not None and without is not None
    assert any("takes as long as" in one for one in without["assumptions"])


def test_rows_hold_the_keys_of_layers_that_attend_and_the_states_of_others(
    source_cache: Sources, generic_source: Callable[[str], Path]
) -> None:
    import generic

    source = generic_source("qwen3_5_text")
    recipe = plan(source_cache("llama")).recipe.model_copy(update={"source": str(source)})
    mixed = make_plan(recipe, inspect_source(str(source)), generic.measured(source).require())
    assert mixed.shape is not None and mixed.shape.cached
    # One layer of each kind; 4 heads of 8 by 8.
    assert mixed.shape.states == 4 * 8 * 8
    assert mixed.shape.copied == mixed.shape.queries
    window = plan(source_cache("mistral", sliding_window=16)).shape
    assert window is not None and 0 < window.copied < window.queries * window.layers
    assert window.states == 0
