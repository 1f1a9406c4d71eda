"""How positions and tokens are chosen: every rule against its definition."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_decoders import DECODERS, MASK, WORDS, Forwards, prompt, ragged, tiny
from transformers import GenerationConfig, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper

from dllm_convert.modeling.published import choosing
from dllm_convert.modeling.published.choosing import (
    Ratings,
    choose_commits,
    make_warpers,
    rate_tokens,
)
from dllm_convert.modeling.published.options import DecodingOptions

FREE: dict[str, Any] = {"eos_token_id": None}


def options(**fields: Any) -> DecodingOptions:
    return DecodingOptions(**{"mask_token_id": MASK, "max_new_tokens": 8, **fields})


def rate(logits: torch.Tensor, **fields: Any) -> Ratings:
    chosen = options(**fields)
    counts = [len(logits)]
    generator = torch.Generator().manual_seed(0)
    return rate_tokens(logits.clone(), counts, chosen, [generator], make_warpers(chosen))


def commits(ratings: Ratings, quota: int, **fields: Any) -> list[int]:
    masked = torch.ones(1, len(ratings.score), dtype=torch.bool)
    chosen = choose_commits(ratings, masked, torch.tensor([quota]), options(**fields))
    return list(chosen[0].nonzero().squeeze(-1).tolist())


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(6, WORDS, generator=torch.Generator().manual_seed(1)) * 3


def test_scores_follow_their_definitions(logits: torch.Tensor) -> None:
    without = logits.clone()
    without[:, MASK] = -torch.inf
    p = without.softmax(-1)
    two = p.sort(-1, descending=True).values[:, :2]
    entropy = torch.distributions.Categorical(p).entropy()
    assert torch.allclose(rate(logits).score, two[:, 0])
    assert torch.allclose(rate(logits, unmasking="margin").score, two[:, 0] - two[:, 1])
    assert torch.allclose(rate(logits, unmasking="entropy").score, -entropy, atol=1e-5)
    uniform = rate(logits, unmasking="random").score
    assert ((uniform >= 0) & (uniform < 1)).all()
    assert len(set(uniform.tolist())) == len(uniform)


@pytest.mark.parametrize("unmasking", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize("rows", [0, 1, 4, 6])
def test_ratings_are_the_same_however_many_rows_are_at_hand(
    logits: torch.Tensor, monkeypatch: pytest.MonkeyPatch, unmasking: str, rows: int
) -> None:
    whole = rate(logits, unmasking=unmasking, entropy_bound=0.1)
    monkeypatch.setattr(choosing, "_PIECE", rows * WORDS)
    parts = rate(logits, unmasking=unmasking, entropy_bound=0.1)
    for name in ("confidence", "score", "entropy"):
        assert torch.equal(getattr(whole, name), getattr(parts, name)), name


def test_the_entropy_bound_is_that_of_the_paper() -> None:
    entropy = torch.tensor([0.5, 0.1, 2.0, 0.2, 0.05])
    ratings = Ratings(torch.zeros(5), -entropy, entropy)
    # In order 0.05, 0.1, 0.2, 0.5, 2: what stands before each sums to 0, 0.05, 0.15, 0.35, 0.85.
    assert commits(ratings, 1, entropy_bound=0.01) == [4]
    assert commits(ratings, 1, entropy_bound=0.15) == [1, 3, 4]
    assert commits(ratings, 1, entropy_bound=0.5) == [0, 1, 3, 4]
    assert commits(ratings, 1, entropy_bound=0.9) == [0, 1, 2, 3, 4]


def test_a_threshold_commits_at_least_what_the_steps_ask_for() -> None:
    confidence = torch.tensor([0.2, 0.95, 0.5, 0.9])
    ratings = Ratings(confidence, confidence, confidence[:0])
    assert commits(ratings, 1, confidence_threshold=0.9) == [1, 3]
    assert commits(ratings, 1, confidence_threshold=0.99) == [1]
    assert commits(ratings, 3, confidence_threshold=0.99) == [1, 2, 3]
    assert commits(ratings, 2) == [1, 3]


@pytest.mark.parametrize(
    ("fields", "warper"),
    [({"top_k": 3}, TopKLogitsWarper(3)), ({"top_p": 0.6}, TopPLogitsWarper(0.6))],
)
def test_draws_stay_within_what_transformers_leaves(
    logits: torch.Tensor, fields: dict[str, Any], warper: Any
) -> None:
    many = logits[:1].repeat(400, 1)
    ratings = rate(many, temperature=2.0, **fields)
    scaled = many[:1] / 2.0
    scaled[:, MASK] = -torch.inf
    p = warper(torch.empty(1, 0, dtype=torch.long), scaled).softmax(-1)[0]
    assert ratings.token is not None
    assert set(ratings.token.tolist()) <= set(p.nonzero().squeeze(-1).tolist())
    own = many[:1].clone()
    own[:, MASK] = -torch.inf
    assert torch.allclose(ratings.confidence, own.softmax(-1)[0, ratings.token])
    seen = torch.bincount(ratings.token, minlength=WORDS) / 400
    assert (seen - p).abs().max() < 0.1


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "steps": {"max_denoising_steps": 3},
    "threshold": {"confidence_threshold": 0.2},
    "entropy-bound": {"entropy_bound": 2.0},
    "margin": {"unmasking": "margin"},
    "random": {"unmasking": "random"},
    "drawn": {"temperature": 1.0, "top_k": 20},
    "nucleus": {"do_sample": True, "top_p": 0.9, "confidence_threshold": 0.1},
    "guided": {"guidance_scale": 2.0},
    "remasked": {"remasking": "low_confidence", "remasking_ratio": 0.4, "max_denoising_steps": 4},
    "remasked-threshold": {
        "remasking": "low_confidence",
        "remasking_ratio": 0.4,
        "confidence_threshold": 0.05,
    },
    "remasked-random": {"remasking": "random", "remasking_ratio": 0.4},
}


@pytest.mark.parametrize("block", [None, 4, 16])
@pytest.mark.parametrize("rule", list(RULES))
def test_a_row_does_not_depend_on_its_batch(block: int | None, rule: str) -> None:
    model = tiny("llama", block=block)
    lengths = [3, 14, 9]
    ids, mask = ragged(lengths)
    settings = {"max_new_tokens": 11, **FREE, **RULES[rule]}
    together = model.generate(ids, attention_mask=mask, seed=[7, 8, 9], **settings)
    assert not (together[:, 14:] == MASK).any()
    for row, length in enumerate(lengths):
        alone = model.generate(prompt(length, seed=length), seed=7 + row, **settings)
        assert together[row, 14:].tolist() == alone[0, length:].tolist()


@pytest.mark.parametrize("block", [None, 4])
def test_seeds_decide_what_is_drawn(block: int | None) -> None:
    model, ids = tiny("llama", block=block), prompt(5).repeat(2, 1)
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, **FREE}
    same = model.generate(ids, seed=[3, 3], **settings)
    assert same[0].tolist() == same[1].tolist()
    other = model.generate(ids, seed=3, **settings)
    assert other[0].tolist() == same[0].tolist()
    assert other[1].tolist() != same[1].tolist()
    with pytest.raises(ValueError, match="3 seeds for 2 rows"):
        model.generate(ids, seed=[1, 2, 3])


@torch.no_grad()
def guided_reference(model: PreTrainedModel, ids: torch.Tensor, new: int, scale: float) -> Any:
    """Ten lines of LLaDA's guidance in transformers' scale: the prompt masked in a second text."""
    length, size = ids.shape[1], model.config.block_size or ids.shape[1] + new
    canvas = ids
    for end in range((length // size + 1) * size, -(-(length + new) // size) * size + 1, size):
        canvas = torch.cat([canvas, torch.full((1, end - canvas.shape[1]), MASK)], 1)
        while (canvas[:, : length + new] == MASK).any():
            hidden = canvas.clone()
            hidden[:, :length] = MASK
            given, free = (model(text, use_cache=False).logits[0] for text in (canvas, hidden))
            logits = (free + scale * (given - free))[:-1]
            logits[:, MASK] = -torch.inf
            confidence, token = logits.float().softmax(-1).max(-1)
            confidence[canvas[0, 1:] != MASK] = -1
            confidence[length + new - 1 :] = -1
            best = int(confidence.argmax())
            canvas[0, best + 1] = token[best]
    return canvas[0, length : length + new].tolist()


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("family", DECODERS)
def test_guidance_in_a_batch(family: str, block: int | None) -> None:
    model = tiny(family, block=block)
    if not block:
        model.config.block_size = None
    ids, mask = ragged([6, 3], "right")
    got = model.generate(ids, attention_mask=mask, max_new_tokens=7, guidance_scale=2.5, **FREE)
    for row, length in enumerate([6, 3]):
        expected = guided_reference(model, prompt(length, seed=length), 7, 2.5)
        assert got[row, 6:].tolist() == expected


def test_guidance_of_one_is_no_second_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny("llama", block=4), prompt(6)
    watched = Forwards(monkeypatch, model)
    plain = model.generate(ids, max_new_tokens=6, **FREE)
    assert {rows for rows, _ in watched.shapes} == {1}
    assert torch.equal(model.generate(ids, max_new_tokens=6, guidance_scale=1.0, **FREE), plain)
    assert {rows for rows, _ in watched.shapes} == {1}


@pytest.mark.parametrize("block", [None, 8])
@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_remasking_takes_back_and_ends_in_time(block: int | None, remasking: str) -> None:
    model, ids = tiny("llama", block=block), prompt(8)
    seen: list[Any] = []
    got = model.generate(
        ids,
        max_new_tokens=16,
        max_denoising_steps=6,
        remasking=remasking,
        remasking_ratio=0.5,
        seed=0,
        observer=seen.append,
        return_dict_in_generate=True,
        **FREE,
    )
    assert not (got.sequences == MASK).any()
    assert got.forwards == (1 + 6 + 6 if block else 6)
    taken = [bool((a.committed & ~b.committed).any()) for a, b in itertools.pairwise(seen)]
    assert any(taken)
    assert all(progress.committed[0, :8].all() for progress in seen)


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_an_mdlm_fills_masks_anywhere_in_the_prompt(family: str) -> None:
    model, ids = tiny(family), prompt(9)
    holes = ids.clone()
    holes[0, [2, 3, 7]] = MASK
    got = model.generate(
        holes, max_new_tokens=3, return_dict_in_generate=True, output_order=True, **FREE
    )
    assert not (got.sequences == MASK).any()
    kept = holes[0] != MASK
    assert torch.equal(got.sequences[0, :9][kept], ids[0][kept])
    assert got.forwards == 6
    assert sorted(got.order[0].tolist()) == [0] * 6 + [1, 2, 3, 4, 5, 6]
    assert (got.order[0, :9] > 0).tolist() == (~kept).tolist()


@torch.no_grad()
def filled_reference(model: PreTrainedModel, ids: torch.Tensor, new: int) -> list[int]:
    """Block after block, the likeliest masked position of the block first, nothing cached."""
    size, length = model.config.block_size, ids.shape[1]
    whole = torch.full((1, -(-(length + new) // size) * size), MASK)
    whole[:, :length] = ids
    for end in range(size, whole.shape[1] + 1, size):
        canvas = whole[:, :end]
        while (canvas[:, : length + new] == MASK).any():
            logits = model(canvas, use_cache=False).logits[0, :-1]
            logits[:, MASK] = -torch.inf
            confidence, token = logits.float().softmax(-1).max(-1)
            confidence[canvas[0, 1:] != MASK] = -1
            confidence[length + new - 1 :] = -1
            best = int(confidence.argmax())
            canvas[0, best + 1] = token[best]
    return list(whole[0, : length + new].tolist())


def test_blocks_fill_masks_in_the_prompt_each_inside_its_own() -> None:
    model = tiny("llama", block=4)
    ids, mask = ragged([14, 11])
    holes = ids.clone()
    holes[0, [5, 6]] = MASK
    holes[1, [4, 13]] = MASK
    got = model.generate(holes, attention_mask=mask, max_new_tokens=5, **FREE)
    assert got[0].tolist() == filled_reference(model, holes[:1], 5)
    assert got[1, 3:].tolist() == filled_reference(model, holes[1:, 3:], 5)
    assert torch.equal(got[:, :14][holes != MASK], ids[holes != MASK])


def test_order_names_the_forward_of_every_token() -> None:
    model = tiny("llama", block=4)
    ids, mask = ragged([6, 3])
    seen: list[Any] = []
    got = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=7,
        confidence_threshold=0.1,
        return_dict_in_generate=True,
        output_order=True,
        observer=seen.append,
        **FREE,
    )
    assert got.order.shape == got.sequences.shape
    assert (got.order[:, :6] == 0).all()
    for row, length in enumerate([6, 3]):
        for place in range(7):
            first = next(p.forwards for p in seen if p.committed[row, length + place])
            assert int(got.order[row, 6 + place]) == first
    plain = model.generate(ids, attention_mask=mask, return_dict_in_generate=True)
    assert plain.order is None


def test_semi_autoregressive_mdlm_goes_from_left_to_right() -> None:
    model, ids = tiny("llama"), prompt(5)
    got = model.generate(
        ids,
        max_new_tokens=12,
        block_length=4,
        return_dict_in_generate=True,
        output_order=True,
        **FREE,
    )
    groups = got.order[0, 5:].view(3, 4)
    assert [sorted(group.tolist()) for group in groups] == [
        [1, 2, 3, 4],
        [5, 6, 7, 8],
        [9, 10, 11, 12],
    ]


@pytest.mark.parametrize("rule", ["plain", "threshold", "guided", "steps"])
def test_the_approximate_cache_runs_a_window_at_a_time(
    rule: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny("llama")
    ids, mask = ragged([5, 9, 30])
    settings = {"max_new_tokens": 10, "block_length": 4, **FREE, **RULES[rule]}
    watched = Forwards(monkeypatch, model)
    got = model.generate(ids, attention_mask=mask, approximate_cache=True, **settings)
    assert not (got[:, 30:] == MASK).any()
    lengths = [length for _, length in watched.shapes]
    assert set(lengths) <= {40, 5}
    assert lengths.count(40) == 3
    for row, length in enumerate([5, 9, 30]):
        alone = model.generate(prompt(length, seed=length), approximate_cache=True, **settings)
        assert got[row, 30:].tolist() == alone[0, length:].tolist()


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "roberta"])
def test_with_one_layer_the_approximate_cache_is_exact(family: str) -> None:
    # Keys and values of the first layer depend on their own token only, so nothing goes stale.
    model = tiny(family, num_hidden_layers=1)
    ids, mask = ragged([7, 12])
    settings: dict[str, Any] = {"max_new_tokens": 10, "block_length": 4, **FREE}
    exact = model.generate(ids, attention_mask=mask, **settings)
    kept = model.generate(ids, attention_mask=mask, approximate_cache=True, **settings)
    assert kept.tolist() == exact.tolist()
    model = tiny(family)
    exact = model.generate(ids, attention_mask=mask, **settings)
    kept = model.generate(ids, attention_mask=mask, approximate_cache=True, **settings)
    assert kept.tolist() != exact.tolist()


@pytest.mark.parametrize(
    ("family", "block", "settings", "message"),
    [
        ("llama", 4, {"block_length": 4}, "are for MDLM"),
        ("llama", None, {"approximate_cache": True}, "needs block_length"),
        ("llama", None, {"remasking": "random", "block_length": 4}, "do not go together"),
        ("llama", 4, {"unmasking": "best"}, "expected one of \\['confidence', 'margin'"),
        ("llama", 4, {"remasking": "all"}, "expected one of \\['low_confidence'"),
        ("llama", 4, {"max_new_tokens": 0}, "max_new_tokens is 0, expected at least 1"),
        ("llama", 4, {"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    family: str, block: int | None, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(family, block=block).generate(prompt(4), **{"max_new_tokens": 8, **settings})


def test_a_mask_that_nothing_precedes_is_refused_with_a_shift() -> None:
    ids = prompt(4)
    ids[0, 0] = MASK
    with pytest.raises(ValueError, match="no mask in its place"):
        tiny("llama", block=4).generate(ids)
    assert not (tiny("llama", shift=False).generate(ids, max_new_tokens=2) == MASK).any()


def test_settings_live_in_the_generation_config(tmp_path: Path) -> None:
    model, ids = tiny("llama", block=4), prompt(6)
    wanted = {"max_new_tokens": 9, "entropy_bound": 3.0, "unmasking": "margin", "top_k": 7}
    GenerationConfig(**wanted, do_sample=True, temperature=0.8).save_pretrained(tmp_path)
    config = GenerationConfig.from_pretrained(tmp_path)
    got = model.generate(ids, config, seed=1, **FREE)
    said = model.generate(ids, seed=1, do_sample=True, temperature=0.8, **wanted, **FREE)
    assert got.tolist() == said.tolist()
    greedy = model.generate(ids, config, seed=1, do_sample=False, **FREE)
    assert greedy.tolist() == model.generate(ids, seed=2, **{**wanted, **FREE}).tolist()


@pytest.mark.parametrize("block", [None, 4])
def test_columns_that_no_row_uses_change_nothing(block: int | None) -> None:
    model, one = tiny("llama", block=block), prompt(3)
    wide = torch.ones(1, 30, dtype=torch.long)
    wide[0, 20:23] = one[0]
    mask = torch.zeros_like(wide)
    mask[0, 20:23] = 1
    got = model.generate(wide, attention_mask=mask, max_new_tokens=5, **FREE)
    assert torch.equal(got[:, :30], wide)
    assert torch.equal(got[:, 30:], model.generate(one, max_new_tokens=5, **FREE)[:, 3:])
