"""Decoding behind a copy of the base's cache: the text is the base's own, whatever is drafted."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from kept import KEPT, RECURRENT, instance, texts

from dllm_convert.modeling.published import behind, lossless
from dllm_convert.modeling.published.drafting import DraftPolicy, Tree
from dllm_convert.probing.facts import norm_names

NEW = 18


def of_the_base(base: Any, ids: torch.Tensor, mask: torch.Tensor, eos: list[int] | None) -> Any:
    """What transformers writes greedily behind each prompt alone, ids after an end replaced."""
    rows = []
    for row, seen in zip(ids, mask, strict=True):
        prompt = row[seen.bool()][None]
        out = base.generate(
            prompt, max_new_tokens=NEW, do_sample=False, eos_token_id=eos, pad_token_id=1
        )
        new = out[0, prompt.shape[1] :].tolist()
        rows.append(new + [1] * (NEW - len(new)))
    return rows


def written(model: Any, ids: torch.Tensor, mask: torch.Tensor, eos: list[int] | None) -> Any:
    return model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, verify_with="base", eos_token_id=eos or [],
        pad_token_id=1, return_dict_in_generate=True,
    )  # fmt: skip


class AnyTree(DraftPolicy):
    """Draws the shape of every forward, so that all of them are tried."""

    generator = torch.Generator()

    def choose(self, available: int, left: int) -> Tree:
        def drawn(below: int) -> int:
            return int(torch.randint(below, (1,), generator=self.generator))

        if not drawn(8):
            return Tree((), 1 + drawn(6), refines=True)
        widths = tuple(1 + drawn(3) for _ in range(min(drawn(5), available)))
        return Tree(widths, drawn(4), bool(drawn(2)))


def mostly_right(monkeypatch: pytest.MonkeyPatch, ids: Any, mask: Any, text: Any) -> None:
    """Have drafts be right two times of three, at any rank: long paths, and branches."""
    judge, generator = lossless._judge, torch.Generator().manual_seed(0)

    def knowing(verdict: Any, drafted: Any, rows: Any, tree: Tree, choice: Any) -> Any:
        said, near, candidates, sure = judge(verdict, drafted, rows, tree, choice)
        for row, groups in zip(rows, candidates, strict=True):
            known, length = text[row.number], int(mask[row.number].sum())
            for group, positions in enumerate(groups):
                place = row.clean + tree.nodes[group][1] + 2 - length
                for step, ranks in enumerate(positions):
                    right, rank = torch.randint(3, (2,), generator=generator).tolist()
                    if right and place + step < len(known) and known[place + step] not in ranks:
                        ranks[rank] = known[place + step]
        return said, near, candidates, sure

    monkeypatch.setattr(lossless, "_judge", knowing)


@pytest.mark.parametrize(
    ("family", "lengths"),
    [
        *((family, [9]) for family in ("lfm2", "qwen3_5_text")),
        *((family, [5, 12, 60]) for family in KEPT),
    ],
    ids=lambda value: value if isinstance(value, str) else f"batch of {len(value)}",
)
def test_lossless_is_what_the_base_generates(
    family: str, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = instance(family)
    model, (ids, mask) = made.gated(), texts(lengths)
    expected = of_the_base(made.base, ids, mask, None)
    found = written(model, ids, mask, None)
    assert found.sequences[:, ids.shape[1] :].tolist() == expected
    assert found.close == 0
    # Drafts of a random adapter are never right; these are, and trees have any shape.
    mostly_right(monkeypatch, ids, mask, expected)
    monkeypatch.setattr(lossless, "DraftPolicy", AnyTree)
    AnyTree.generator.manual_seed(7)
    drafted = written(model, ids, mask, None)
    assert drafted.sequences[:, ids.shape[1] :].tolist() == expected
    assert drafted.forwards < found.forwards
    ends = [expected[0][3], expected[-1][NEW // 2]]
    stopped = written(model, ids, mask, ends)
    assert stopped.sequences[:, ids.shape[1] :].tolist() == of_the_base(made.base, ids, mask, ends)


@pytest.mark.parametrize("family", KEPT)
@torch.no_grad()
def test_a_copy_of_a_cache_has_nothing_of_its_original(family: str) -> None:
    made, (ids, _) = instance(family), texts([12, 12])
    cache = made.base(ids, use_cache=True).past_key_values
    before = [one.clone() for *_, one in behind.held_tensors(cache)]
    rows = torch.tensor([1, 0, 1])
    expected, twin = copy.deepcopy(cache), behind.branched(cache, rows)
    expected.reorder_cache(rows)
    wanted, held = behind.held_tensors(expected), behind.held_tensors(twin)
    assert [name for _, name, _ in held] == [name for _, name, _ in wanted]
    for (*_, one), (*_, other) in zip(held, wanted, strict=True):
        assert torch.equal(one, other)
        one.zero_()
    after = [one for *_, one in behind.held_tensors(cache)]
    assert before
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


@pytest.mark.parametrize("family", KEPT)
def test_norms_of_noisy_tokens_leave_the_text_the_bases(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their weights are noisy tokens' own; clean ones pass the base's, behind a cache as well."""
    made = instance(family)
    plain, model = made.gated(), made.gated(norm_names(made.base))
    ids, mask = texts([5, 12, 60])
    noisy = torch.zeros_like(ids[2:], dtype=torch.bool)
    noisy[:, -3:] = True
    with torch.no_grad():
        clean = made.base(ids[2:]).logits
        found, other = (one(ids[2:], noisy=noisy).logits for one in (model, plain))
        assert torch.equal(model(ids[2:]).logits, clean)
    assert (found[:, :-3] - clean[:, :-3]).abs().max() < 1e-5
    assert (found - other)[:, -3:].abs().amax((0, 2)).min() > 1e-3
    expected = of_the_base(made.base, ids, mask, None)
    mostly_right(monkeypatch, ids, mask, expected)
    monkeypatch.setattr(lossless, "DraftPolicy", AnyTree)
    AnyTree.generator.manual_seed(7)
    drafted = written(model, ids, mask, None)
    assert drafted.sequences[:, ids.shape[1] :].tolist() == expected


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "gemma3_text"])
def test_rows_denoise_as_they_would_alone(family: str) -> None:
    """And what each block sees is the whole text before it, clean, and itself, noisy."""
    made = instance(family)
    model, (ids, mask) = made.gated(), texts([6, 13, 50])
    settings: dict[str, Any] = {
        "max_new_tokens": 11,
        "eos_token_id": [],
        "return_dict_in_generate": True,
        "output_order": True,
    }
    together = model.generate(ids, attention_mask=mask, **settings)
    size, masked = model.config.block_size, model.config.mask_token_id
    for row, (text, seen) in enumerate(zip(ids, mask, strict=True)):
        prompt = text[seen.bool()]
        alone = model.generate(prompt[None], **settings).sequences[0]
        assert torch.equal(alone[len(prompt) :], together.sequences[row, ids.shape[1] :])
        # One token a forward, the surest first: written out here without a cache.
        expected = prompt
        while len(expected) < len(prompt) + 11:
            first = len(expected) // size * size
            canvas = torch.full((first + size,), masked)
            canvas[: len(expected)] = expected
            while (canvas == masked).any():
                noisy = (torch.arange(len(canvas)) >= first)[None]
                logits = model(canvas[None], noisy=noisy).logits[0]
                places = (canvas == masked).nonzero().squeeze(-1)
                shares, tokens = logits[places - 1].softmax(-1).max(-1)
                canvas[places[shares.argmax()]] = tokens[shares.argmax()]
            expected = canvas
        assert torch.equal(alone, expected[: len(alone)])


def watched_widths(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each forward is given from now on."""
    widths: list[int] = []
    forward = behind.Prefixes._forward

    def watched(self: Any, numbers: Any, cache: Any, tokens: Any, *rest: Any) -> Any:
        widths.append(len(tokens[0]))
        return forward(self, numbers, cache, tokens, *rest)

    monkeypatch.setattr(behind.Prefixes, "_forward", watched)
    return widths


def test_known_tokens_run_again_go_into_the_cache_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recurrent states do not roll back: what is run again in front of drafts stays short."""
    made = instance("qwen3_5_text")
    model, (ids, mask) = made.gated(), texts([9, 14])
    widths = watched_widths(monkeypatch)
    monkeypatch.setattr(DraftPolicy, "choose", lambda *_: Tree((), 2))
    found = model.generate(
        ids, attention_mask=mask, max_new_tokens=60, verify_with="base", eos_token_id=[],
        return_dict_in_generate=True,
    )  # fmt: skip
    assert max(widths) <= behind._HEAD + behind._SPREAD + 3
    # One forward in so many more.
    assert found.forwards <= 60 * (1 + 1 / behind._HEAD) + 2


@pytest.mark.parametrize("family", KEPT)
def test_what_rolls_back_runs_nothing_again(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = instance(family)
    model, (ids, mask) = made.gated(), texts([20])
    widths = watched_widths(monkeypatch)
    monkeypatch.setattr(DraftPolicy, "choose", lambda *_: Tree((), 2))
    model.generate(ids, attention_mask=mask, max_new_tokens=12, verify_with="base", eos_token_id=[])
    again = max(widths[1:]) > 3
    assert again == (family in RECURRENT)


def test_a_clean_token_behind_noisy_ones_and_masks_of_ones_own_are_refused() -> None:
    model, (ids, _) = instance("lfm2").gated(), texts([9])
    noisy = torch.zeros_like(ids, dtype=torch.bool)
    noisy[:, 3:5] = True
    with pytest.raises(ValueError, match="the last ones of their row"):
        model(ids, noisy=noisy)
    with pytest.raises(ValueError, match="no 4-D mask"):
        model(ids, attention_mask=torch.ones(1, 1, 9, 9, dtype=torch.bool).tril())
