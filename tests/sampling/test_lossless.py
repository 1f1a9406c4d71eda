"""Lossless decoding writes what autoregressive decoding writes, whatever was drafted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from factory import FAMILIES
from tiny_decoders import DECODERS, MASK, prompt, ragged, tiny

from dllm_convert.modeling.published import lossless
from dllm_convert.modeling.published.drafting import DraftPolicy, Tree


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


class Apart(DraftPolicy):
    """Drafts in one forward or several, and verifies in another."""

    def _fused(self, most: int, shares: Any) -> tuple[float, Tree]:
        return 1.0, Tree((), 0)

    def _apart(self, most: int, shares: Any) -> tuple[float, int, int]:
        return 2.0, 1 + self._forwards % 3, min(most, 5)

    def drafted(self, tree: Tree, written: float) -> None:
        super().drafted(tree, written)
        self._over = 0.0  # whatever it takes


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
