"""A model drafts for another one: the text is the verifier's, whatever was drafted."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from kept import instance
from test_lossless import stock, written
from tiny_decoders import DECODERS, MASK, prompt, ragged, tiny
from transformers import GPT2Config, GPT2LMHeadModel

from dllm_convert.modeling.published import paired
from dllm_convert.modeling.published.drafting import PairPolicy

NEW = 30


class Eager(PairPolicy):
    """Drafts always, in another number of forwards each time, as much as there is room for."""

    turn = 0

    def plan(self, left: int, room: int, behind: int, prompt: int = 0) -> tuple[int, int]:
        self.turn += 1
        most = min(left - 1, room)
        return (1 + self.turn % len(self._records), most) if self.turn % 5 and most > 0 else (1, 0)


def verifier_of(model: Any, family: str, seed: int | None = None) -> Any:
    """The stock class with a drafter's weights; with a seed moved, so that they seldom agree."""
    base = stock(model, family)
    if seed is not None:
        draws = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in base.parameters():
                noise = torch.randn(weight.shape, generator=draws, dtype=weight.dtype)
                weight.add_(0.1 * noise)
    return base


def told(monkeypatch: pytest.MonkeyPatch, lengths: list[int], text: list[list[int]]) -> None:
    """Drafts that are right nine times of ten."""
    denoised, draws = paired.BlockDrafter._denoised, random.Random(0)

    def knowing(self: Any, steps: int, count: int, choice: Any) -> Any:
        found = denoised(self, steps, count, choice)
        for number, own in zip(self.canvas.rows.tolist(), found, strict=True):
            for at in own:
                place = at - lengths[number]
                if draws.random() < 0.9 and place < len(text[number]):
                    own[at] = text[number][place]
        return found

    monkeypatch.setattr(paired.BlockDrafter, "_denoised", knowing)


def settings(mask: torch.Tensor, verifier: Any, **more: Any) -> dict[str, Any]:
    return {
        "attention_mask": mask, "max_new_tokens": NEW, "verify_with": verifier, "pad_token_id": 1,
        "eos_token_id": -1, "return_dict_in_generate": True, **more,
    }  # fmt: skip


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(("shift", "context"), [(True, "block"), (False, "causal")])
def test_the_text_is_the_verifiers(
    family: str, rows: int, shift: bool, context: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(family, block=8, shift=shift)
    model.config.diffusion["context"] = context
    base = verifier_of(model, family, seed=1)
    lengths = [3, 9, 17, 4, 8, 1, 12, 5][:rows]
    ids, mask = ragged(lengths)
    expected = written(base, ids, mask, NEW, None)
    found = model.generate(ids, **settings(mask, base))
    assert found.sequences[:, ids.shape[1] :].tolist() == expected
    monkeypatch.setattr(paired, "PairPolicy", Eager)
    eager = model.generate(ids, **settings(mask, base))
    assert eager.sequences[:, ids.shape[1] :].tolist() == expected
    assert eager.verifier_forwards <= NEW + 1 < eager.forwards
    told(monkeypatch, lengths, expected)
    right = model.generate(ids, **settings(mask, base, output_order=True))
    assert right.sequences[:, ids.shape[1] :].tolist() == expected
    assert right.verifier_forwards < 0.8 * NEW
    order = right.order[:, ids.shape[1] :]
    assert (order.diff(dim=-1) >= 0).all()
    ends = [expected[0][7], expected[-1][19]]
    stopped = model.generate(ids, **settings(mask, base, eos_token_id=ends))
    assert stopped.sequences[:, ids.shape[1] :].tolist() == written(base, ids, mask, NEW, ends)


class Whole(PairPolicy):
    """Drafts in three forwards, as much as there is room for."""

    def plan(self, left: int, room: int, behind: int, prompt: int = 0) -> tuple[int, int]:
        assert behind >= 0
        most = min(left - 1, room)
        return (3, most) if most > 0 else (1, 0)


class Few(Whole):
    """Drafts so many tokens in three forwards that a block is filled by several calls."""

    def plan(self, left: int, room: int, behind: int, prompt: int = 0) -> tuple[int, int]:
        steps, most = super().plan(left, room, behind)
        return steps, min(most, 3)


@pytest.mark.parametrize("policy", [Eager, Whole, Few])
@pytest.mark.parametrize("lengths", [[3], [3, 3], [3, 9, 17]], ids=str)
@pytest.mark.parametrize(("seed", "context"), [(None, "block"), (1, "causal")])
def test_sure_drafts_are_not_taken_for_the_text(
    policy: type[PairPolicy],
    lengths: list[int],
    seed: int | None,
    context: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One forward fills a block with what is sure; only what was verified gets into the cache."""
    model = tiny("llama", block=8)
    model.config.diffusion["context"] = context
    base = verifier_of(model, "llama", seed=seed)
    ids, mask = ragged(lengths)
    expected = written(base, ids, mask, NEW, None)
    texts = [
        [*row[given.bool()].tolist(), *new]
        for row, given, new in zip(ids, mask, expected, strict=True)
    ]
    kept: list[int] = []

    class Watched(paired.BlockReader):
        def check(self, columns: torch.Tensor, clean: torch.Tensor) -> None:
            for row in clean.nonzero().squeeze(-1).tolist():
                number, at = int(self.canvas.rows[row]), columns[row].tolist()
                assert self.canvas.tokens[number, at].tolist() == [texts[number][c] for c in at]
                kept.append(number)

        def read(self, columns: Any, masked: Any, clean: Any) -> Any:
            self.check(columns, clean)
            return super().read(columns, masked, clean)

        def read_ahead(self, columns: Any) -> Any:
            self.check(columns, torch.ones(len(columns), dtype=torch.bool))
            return super().read_ahead(columns)

    count = paired.BlockDrafter._denoised

    def no_more(self: Any, steps: int, most: int, choice: Any) -> Any:
        found = count(self, steps, most, choice)
        assert all(len(own) <= most for own in found)
        return found

    monkeypatch.setattr(paired, "BlockReader", Watched)
    monkeypatch.setattr(paired.BlockDrafter, "_denoised", no_more)
    monkeypatch.setattr(paired, "PairPolicy", policy)
    for threshold in (0.001, None):
        found = model.generate(ids, **settings(mask, base, confidence_threshold=threshold))
        assert found.sequences[:, ids.shape[1] :].tolist() == expected
    assert set(kept) == set(range(len(lengths)))


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("lengths", [[3], [8], [3, 9, 17]], ids=str)
def test_what_denoising_has_saved_is_left_aside(
    shift: bool, lengths: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Drafts are written in whole blocks, whatever parts the checkpoint denoises alone in."""
    model = tiny("llama", block=8, shift=shift)
    base = verifier_of(model, "llama")
    ids, mask = ragged(lengths)
    expected = written(base, ids, mask, NEW, None)
    monkeypatch.setattr(paired, "PairPolicy", Whole)
    plain = model.generate(ids, **settings(mask, base))
    for name, value in {"sub_block_size": 4, "entropy_bound": 0.5, "unmasking": "margin"}.items():
        setattr(model.generation_config, name, value)
    found = model.generate(ids, **settings(mask, base))
    assert found.sequences[:, ids.shape[1] :].tolist() == expected
    assert (found.forwards, found.verifier_forwards) == (plain.forwards, plain.verifier_forwards)


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5_text", "gemma3_text", "llama"])
def test_whatever_the_verifier_is(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, convolutions, recurrent states; and a vocabulary of another size."""
    base = instance(family).base.eval().double()
    model = tiny("llama", block=8)
    ids, mask = ragged([3, 20, 6])
    expected = written(base, ids, mask, NEW, None)
    monkeypatch.setattr(paired, "PairPolicy", Eager)
    told(monkeypatch, [3, 20, 6], [[min(t, 59) for t in row] for row in expected])
    found = model.generate(ids, **settings(mask, base))
    assert found.sequences[:, ids.shape[1] :].tolist() == expected


def test_a_stock_verifier_is_told_of_no_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what stands behind the shorter rows, which nobody sees; a class may refuse arguments."""
    model = tiny("llama", block=8)
    base = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=model.config.vocab_size, n_embd=32, n_layer=2, n_head=2, n_positions=128
        )
    )
    base.eval().double()
    plain = base.forward

    def strict(*given: Any, **more: Any) -> Any:
        assert "noisy" not in more
        return plain(*given, **more)

    ids, mask = ragged([3, 9, 17])
    expected = written(base, ids, mask, NEW, None)
    monkeypatch.setattr(base, "forward", strict)
    monkeypatch.setattr(paired, "PairPolicy", Whole)
    found = model.generate(ids, **settings(mask, base))
    assert found.sequences[:, ids.shape[1] :].tolist() == expected


def test_every_forward_of_both_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("qwen3", block=8)
    base, counted = verifier_of(model, "qwen3", seed=1), {"draft": 0, "verify": 0}
    for name, one in (("draft", model), ("verify", base)):
        forward = one.forward

        def watched(*args: Any, name: str = name, forward: Any = forward, **more: Any) -> Any:
            counted[name] += 1
            return forward(*args, **more)

        monkeypatch.setattr(one, "forward", watched)
    monkeypatch.setattr(paired, "PairPolicy", Eager)
    ids, mask = ragged([5, 12])
    found = model.generate(ids, **settings(mask, base))
    assert found.verifier_forwards == counted["verify"] > 0
    assert found.forwards == counted["draft"] + counted["verify"]


def test_what_is_drawn_is_the_seeds_not_the_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", block=8)
    base, lengths = verifier_of(model, "llama", seed=1), [3, 9, 17]
    ids, mask = ragged(lengths)
    warm = {"temperature": 0.8, "top_k": 20, "seed": [4, 5, 6]}
    plain = model.generate(ids, **settings(mask, base, **warm)).sequences
    own = tiny("llama", block=8)
    own.config.diffusion["context"] = "causal"
    own.load_state_dict(base.state_dict())
    # A model that verifies itself draws the same.
    verified = own.generate(ids, **settings(mask, "self", **warm)).sequences
    assert torch.equal(plain, verified)
    monkeypatch.setattr(paired, "PairPolicy", Eager)
    assert torch.equal(model.generate(ids, **settings(mask, base, **warm)).sequences, plain)
    told(monkeypatch, lengths, plain[:, ids.shape[1] :].tolist())
    assert torch.equal(model.generate(ids, **settings(mask, base, **warm)).sequences, plain)


def test_it_streams_and_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny("qwen3", block=8), prompt(5)
    base, pieces = verifier_of(model, "qwen3"), []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            pieces.extend(value.flatten().tolist())

        def end(self) -> None:
            pieces.append(-1)

    monkeypatch.setattr(paired, "PairPolicy", Eager)
    mask = torch.ones_like(given)
    whole = model.generate(given, **settings(mask, base, streamer=Streamer())).sequences
    assert pieces == [*whole[0].tolist(), -1]
    assert whole[:, 5:].tolist() == written(base, given, mask, NEW, None)


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
@pytest.mark.parametrize("size", [0.25, 1.0])
@pytest.mark.parametrize("block", [4, 32])
def test_drafts_that_are_never_right_cost_little(kind: str, size: float, block: int) -> None:
    spent, _ = simulated(PairPolicy(kind, 1, block, size), block, 256, lambda depth: 0.0)
    assert spent <= 1.1
    spent, _ = simulated(PairPolicy(kind, 1, block, size), block, 2000, lambda depth: 0.02)
    assert spent <= 1.1


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_a_long_prompt_is_read_when_that_is_little_beside_the_text(kind: str) -> None:
    """The drafter has to read it, too: for the first draft that is ever tried."""
    policy = PairPolicy(kind, 1, 32, 1.0)
    reading, tokens = policy._costs.of(2048), 0
    while not policy.plan(10_000, 32, 0, 2048)[1]:
        policy.drafted(policy.choose(0, 10_000), 1)
        tokens += 1
    assert reading <= 0.07 * tokens < reading + 0.1
    assert policy.plan(100, 32, 0, 0)[1], "and a short one at once"


def test_what_it_buys_is_found_out() -> None:
    """Where a forward costs by itself nearly everything; on a CPU, with a drafter as large, not."""
    found = {
        kind: simulated(PairPolicy(kind, 1, 32, 1.0), 32, 1000, lambda depth: 0.9)[0]
        for kind in ("cpu", "cuda")
    }
    assert found["cuda"] < 0.4
    assert found["cpu"] < 0.9
    small, _ = simulated(PairPolicy("cpu", 1, 32, 0.1), 32, 1000, lambda depth: 0.8)
    assert small < 0.6


def simulated(policy: PairPolicy, block: int, tokens: int, right: Any) -> tuple[float, int]:
    """Time of a decoding beside that of plain decoding, and forwards of the drafter."""
    draws = random.Random(0)
    spent, drafted, written, read = 0.0, 0, 0, 0
    while written < tokens:
        room, behind = block - written % block, written // block - read
        steps, count = policy.plan(tokens - written, room, behind)
        if count:
            spent += (steps + behind) * policy._drafting
            drafted, read = drafted + steps + behind, written // block
        tree = policy.choose(count, tokens - written)
        spent += policy._costs.of(tree.size)
        new = 1
        for depth in range(1, tree.depth + 1):
            hit = draws.random() < right(depth)
            policy.observe(depth, 0 if hit else None)
            if not hit:
                break
            new += 1
        policy.drafted(tree, new)
        written += new
    return spent / tokens, drafted


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"verify_with": "model"}, "from left to right"),
        ({"guidance_scale": 2.0}, "leave guidance_scale"),
        ({"remasking": "random"}, "leave guidance_scale"),
        ({"sampler": "ancestral", "temperature": 1.0}, "sampler out"),
    ],
)
def test_what_is_no_pair_is_refused(change: dict[str, Any], said: str) -> None:
    model = tiny("llama", block=8)
    verifier = model if change.pop("verify_with", None) else stock(model, "llama")
    with pytest.raises(ValueError, match=said):
        model.generate(prompt(5), max_new_tokens=4, verify_with=verifier, **change)


def test_models_without_blocks_and_masks_in_prompts_are_refused() -> None:
    whole, model = tiny("llama"), tiny("llama", block=8)
    with pytest.raises(ValueError, match="block by block"):
        whole.generate(prompt(5), max_new_tokens=4, verify_with=stock(model, "llama"))
    with pytest.raises(ValueError, match="holds its base"):
        instance("llama").gated().generate(prompt(5), verify_with=stock(model, "llama"))
    with pytest.raises(ValueError, match="on one device"):
        model.generate(prompt(5), max_new_tokens=4, verify_with=stock(model, "llama").to("meta"))
    given = prompt(5)
    given[0, 2] = MASK
    with pytest.raises(ValueError, match="left to right"):
        model.generate(given, max_new_tokens=4, verify_with=stock(model, "llama"))
