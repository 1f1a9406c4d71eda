"""Lossless decoding writes what autoregressive decoding writes, whatever was drafted."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import transformers
from factory import FAMILIES
from tiny_decoders import DECODERS, MASK, prompt, ragged, tiny

from dllm_convert.modeling.published import lossless
from dllm_convert.modeling.published.drafting import LARGEST, DraftPolicy, Tree


def causal(family: str, **fields: Any) -> Any:
    """A random BD3LM whose clean stream is strictly causal, as `ar_loss_weight` trains it."""
    model = tiny(family, block=8, **fields)
    model.config.diffusion["context"] = "causal"
    return model


def stock(model: Any, family: str) -> Any:
    """The stock class with the same weights."""
    config_class, model_class, _ = FAMILIES[family]
    fields = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in ("diffusion", "is_causal", "mask_token_id", "block_size", "auto_map")
    }
    config = getattr(transformers, config_class)(**fields)
    other = getattr(transformers, model_class)(config).eval().double()
    other.load_state_dict(model.state_dict())
    return other


def written(
    model: Any, ids: torch.Tensor, mask: torch.Tensor, new: int, eos: list[int] | None
) -> list[list[int]]:
    """What transformers writes greedily behind each prompt, the mask ruled out as ours does."""
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, eos_token_id=eos,
        pad_token_id=1, suppress_tokens=[MASK],
    )  # fmt: skip
    rows = out[:, ids.shape[1] :].tolist()
    return [row + [1] * (new - len(row)) for row in rows]


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("shift", [True, False])
def test_the_text_is_the_verifiers(family: str, rows: int, shift: bool) -> None:
    model = causal(family, shift=shift)
    base = stock(model, family)
    ids, mask = ragged([3, 9, 17, 4, 8, 1, 12, 5][:rows])
    expected = written(base, ids, mask, 40, None)
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=40, verify_with="self", eos_token_id=-1,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert found.sequences[:, ids.shape[1] :].tolist() == expected
    assert found.forwards <= 41
    ends = [expected[0][7], expected[-1][19]]
    stopped = model.generate(
        ids, attention_mask=mask, max_new_tokens=40, verify_with="self", eos_token_id=ends,
        pad_token_id=1,
    )  # fmt: skip
    assert stopped[:, ids.shape[1] :].tolist() == written(base, ids, mask, 40, ends)


class AnyTree(DraftPolicy):
    """Draws the shape of every forward, so that all of them are tried."""

    generator = torch.Generator()

    def choose(self, available: int, left: int) -> Tree:
        def drawn(below: int) -> int:
            return int(torch.randint(below, (1,), generator=self.generator))

        if not drawn(8):
            return Tree((), self._ahead + 1 + drawn(6), refines=True)
        widths = tuple(1 + drawn(4) for _ in range(min(drawn(5), available)))
        masks = self._ahead + drawn(5)
        return Tree(widths, masks if masks > self._ahead else 0, bool(drawn(2)))


def drawn_trees(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    AnyTree.generator.manual_seed(seed)
    monkeypatch.setattr(lossless, "DraftPolicy", AnyTree)


def told_drafts(monkeypatch: pytest.MonkeyPatch, lengths: list[int], text: list[list[int]]) -> None:
    """Drafts that are right two times of three, at any rank: long paths, and branches."""
    judge, generator = lossless._judge, torch.Generator().manual_seed(0)

    def knowing(verdict: Any, behind: Any, rows: Any, tree: Tree, choice: Any) -> Any:
        said, near, candidates, sure = judge(verdict, behind, rows, tree, choice)
        for row, groups in zip(rows, candidates, strict=True):
            known = text[row.number]
            for group, positions in enumerate(groups):
                place = row.clean + tree.nodes[group][1] + 2 - lengths[row.number]
                for step, ranks in enumerate(positions):
                    right, rank = torch.randint(3, (2,), generator=generator).tolist()
                    if right and place + step < len(known) and known[place + step] not in ranks:
                        ranks[rank] = known[place + step]
        return said, near, candidates, sure

    monkeypatch.setattr(lossless, "_judge", knowing)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_no_tree_changes_the_text(
    family: str, implementation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, new = [3, 9, 17, 1], 48
    ids, mask = ragged(lengths)
    model = causal(family, shift=implementation == "sdpa")
    model.set_attn_implementation(implementation)
    expected = written(stock(model, family), ids, mask, new, None)
    drawn_trees(monkeypatch, seed=len(family))
    told_drafts(monkeypatch, lengths, expected)
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=new, verify_with="self", eos_token_id=-1,
        return_dict_in_generate=True, output_order=True,
    )  # fmt: skip
    assert found.sequences[:, ids.shape[1] :].tolist() == expected
    assert found.forwards < 46, "several tokens of a row were accepted in some forwards"
    assert found.close == 0
    order = found.order[:, ids.shape[1] :]
    assert (order.diff(dim=-1) >= 0).all(), "written from left to right"


def test_what_is_drawn_is_the_seeds_not_the_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal("llama")
    lengths = [3, 9, 17]
    ids, mask = ragged(lengths)
    settings: dict[str, Any] = {
        "max_new_tokens": 30, "verify_with": "self", "eos_token_id": -1, "temperature": 0.8,
        "top_k": 20, "attention_mask": mask, "seed": [4, 5, 6],
    }  # fmt: skip
    plain = model.generate(ids, **settings)
    alone = model.generate(ids[1:2], **settings | {"attention_mask": mask[1:2], "seed": [5]})
    assert torch.equal(alone, plain[1:2])
    told_drafts(monkeypatch, lengths, plain[:, ids.shape[1] :].tolist())
    for seed in range(3):
        drawn_trees(monkeypatch, seed)
        assert torch.equal(model.generate(ids, **settings), plain)
    assert not torch.equal(model.generate(ids, **settings | {"seed": [7, 8, 9]}), plain)


def test_drawn_tokens_have_the_verifiers_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    # All pairs of tokens behind a prompt, their probability by enumeration against how often they
    # were drawn, drafts of every kind beside them.
    model = causal("llama", vocab_size=12, num_hidden_layers=1)
    drawn_trees(monkeypatch, seed=3)
    given, rows, words = prompt(4) % 6 + 6, 4000, 12
    everything = torch.cartesian_prod(torch.arange(words), torch.arange(words))
    base = stock(model, "llama")
    with torch.no_grad():
        text = torch.cat([given.expand(len(everything), -1), everything], 1)
        logits = base(text).logits[:, 3:5] / 0.9
    logits[..., MASK] = -torch.inf
    likely = logits.softmax(-1).gather(-1, everything[..., None]).squeeze(-1).prod(-1)
    found = model.generate(
        given.expand(rows, -1), max_new_tokens=2, temperature=0.9, verify_with="self",
        eos_token_id=-1, seed=11,
    )  # fmt: skip
    counted = torch.bincount(found[:, 4] * words + found[:, 5], minlength=words**2)
    assert counted[likely == 0].sum() == 0
    # Cells of at least five; the rest in one.
    large = likely * rows >= 5
    observed = torch.cat([counted[large], counted[~large].sum()[None]]).double()
    expected = torch.cat([likely[large], likely[~large].sum()[None]]) * rows
    chi = float(((observed - expected) ** 2 / expected).sum())
    freedom = len(expected) - 1
    # Four standard deviations of the distribution of chi above its mean.
    assert chi < freedom + 4 * (2 * freedom) ** 0.5, (chi, freedom)


@pytest.mark.parametrize("kind", ["cpu", "gated cpu", "cuda"])
def test_drafts_that_are_never_right_cost_little(kind: str) -> None:
    policy = DraftPolicy(kind, rows=1, ahead=0)
    spent, tokens, available = 0.0, 256, 0
    for left in range(tokens, 0, -1):
        tree = policy.choose(available, left)
        spent += policy._cost(tree.size)
        for depth in range(1, min(available, 1) + 1):
            policy.observe(depth, None)
        policy.drafted(tree, 1)
        available = tree.masks
    assert spent <= 1.1 * tokens


def simulated(policy: DraftPolicy, tokens: int, right: Any) -> tuple[float, int, set[Tree]]:
    """Time of a decoding beside that of as many forwards of a token, forwards, and what they held.

    `right` says how likely a draft of a depth is right, denoised in so many forwards.
    """
    draws, shapes = random.Random(0), set()
    spent, forwards, left, available = 0.0, 0, tokens, 0
    while left > 0:
        tree = policy.choose(available, left)
        spent, forwards = spent + policy._cost(tree.size), forwards + 1
        shapes.add(tree)
        written, depth = 1, 1
        while depth <= available:
            hit = draws.random() < right(depth, policy._drafted_in)
            policy.observe(depth, 0 if hit else None)
            if not hit or depth > tree.depth:
                break
            written, depth = written + 1, depth + 1
        policy.drafted(tree, written)
        left, available = left - written, max(tree.masks - policy._ahead, 0)
    return spent / tokens, forwards, shapes


@pytest.mark.parametrize("kind", ["cpu", "gated cpu", "cuda"])
def test_where_drafts_go_wrong_it_takes_a_tenth_more_at_most(kind: str) -> None:
    """Drafts that stop being right, that are right by the first token only, that get no better."""
    for right in (
        lambda depth, steps: 0.0,
        lambda depth, steps: 0.02,
        lambda depth, steps: 0.5 if depth == 1 else 0.0,
        lambda depth, steps: 0.9 if steps == 1 else 0.0,
    ):
        spent, _, _ = simulated(DraftPolicy(kind, rows=1, ahead=0, most=31), 2000, right)
        assert spent <= 1.1
    policy = DraftPolicy(kind, rows=1, ahead=0, most=31)
    simulated(policy, 500, lambda depth, steps: 0.95)
    spent, _, _ = simulated(policy, 1000, lambda depth, steps: 0.0)
    assert spent <= 1.15, "what was right for long is unlearnt in some forwards"


def test_long_drafts_are_verified_apart_where_tokens_cost() -> None:
    def right(depth: int, steps: int) -> float:
        return 0.97

    fused, _, _ = simulated(DraftPolicy("cuda", rows=1, ahead=0, most=31), 1000, right)
    policy = DraftPolicy("gated cpu", rows=1, ahead=0, most=31)
    spent, forwards, shapes = simulated(policy, 1000, right)
    apart = [tree for tree in shapes if tree.depth > 8]
    assert apart
    assert all(not tree.masks for tree in apart)
    assert forwards < 1000 / 4
    assert fused < spent < 0.3


def test_drafts_are_denoised_further_where_that_makes_them_right() -> None:
    def better(depth: int, steps: int) -> float:
        return 0.95 if steps > 1 else 0.45

    policy = DraftPolicy("gated cpu", rows=1, ahead=0, most=31)
    spent, _, shapes = simulated(policy, 3000, better)
    assert any(tree.refines for tree in shapes)
    never, _, _ = simulated(
        DraftPolicy("gated cpu", rows=1, ahead=0, most=31), 3000, lambda depth, steps: 0.45
    )
    assert spent < never


class Apart(DraftPolicy):
    """Drafts in one forward or several, and verifies in another."""

    def _fused(self, most: int, shares: Any) -> tuple[float, Tree]:
        return 1.0, Tree((), 0)

    def _apart(self, most: int, shares: Any) -> tuple[float, int, int]:
        return 2.0, 1 + self._forwards % 3, min(most, 5)


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("shift", [True, False])
def test_drafting_apart_changes_no_text(
    family: str, shift: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, new = [3, 9, 17, 1], 40
    ids, mask = ragged(lengths)
    model = causal(family, shift=shift)
    expected = written(stock(model, family), ids, mask, new, None)
    monkeypatch.setattr(lossless, "DraftPolicy", Apart)
    settings: dict[str, Any] = {
        "attention_mask": mask, "max_new_tokens": new, "verify_with": "self", "pad_token_id": 1,
        "return_dict_in_generate": True,
    }  # fmt: skip
    wrong = model.generate(ids, eos_token_id=-1, **settings)
    assert wrong.sequences[:, ids.shape[1] :].tolist() == expected
    told_drafts(monkeypatch, lengths, expected)
    found = model.generate(ids, eos_token_id=-1, **settings)
    assert found.sequences[:, ids.shape[1] :].tolist() == expected
    assert found.forwards < wrong.forwards
    ends = [expected[0][7], expected[-1][19]]
    stopped = model.generate(ids, eos_token_id=ends, **settings).sequences
    assert stopped[:, ids.shape[1] :].tolist() == written(
        stock(model, family), ids, mask, new, ends
    )


def test_drafts_that_are_right_are_deep() -> None:
    policy = DraftPolicy("cpu", rows=1, ahead=0)
    for _ in range(100):
        for depth in range(1, 9):
            policy.observe(depth, 0)
    assert policy.choose(8, 100).depth >= 4
    assert policy.choose(8, 100).size <= LARGEST.size
    assert policy.choose(2, 100).depth == 2, "no more than was drafted"
    assert policy.choose(8, 1) == Tree((), 0), "nothing behind the last token"
    shallow = DraftPolicy("cpu", rows=1, ahead=0, most=2)
    shallow._records = policy._records
    assert shallow.choose(8, 100).depth == 2, "no deeper than it was trained"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"verify_with": "base"}, "gated adapter"),
        ({"verify_with": "all"}, "expected one of"),
        ({"verify_with": "self", "guidance_scale": 2.0}, "leave guidance_scale"),
        ({"verify_with": "self", "remasking": "random"}, "leave guidance_scale"),
    ],
)
def test_what_cannot_be_verified_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        causal("llama").generate(prompt(5), max_new_tokens=4, **settings)


def test_masks_in_a_prompt_and_open_contexts_are_refused() -> None:
    given = prompt(5)
    given[0, 2] = MASK
    with pytest.raises(ValueError, match="left to right"):
        causal("llama").generate(given, max_new_tokens=4, verify_with="self")
    with pytest.raises(ValueError, match="strictly causally"):
        tiny("llama", block=8).generate(prompt(5), max_new_tokens=4, verify_with="self")
    with pytest.raises(ValueError, match="strictly causally"):
        tiny("llama").generate(prompt(5), max_new_tokens=4, verify_with="self")


def test_it_streams_from_left_to_right() -> None:
    model, given = causal("qwen3"), prompt(5)
    pieces: list[int] = []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            pieces.extend(value.flatten().tolist())

        def end(self) -> None:
            pieces.append(-1)

    whole = model.generate(
        given, max_new_tokens=12, verify_with="self", eos_token_id=-1, streamer=Streamer()
    )
    assert pieces == [*whole[0].tolist(), -1]
