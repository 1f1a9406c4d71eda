"""Streamers of transformers: they get each final token once, in order, and drafts in between."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from factory import FAMILIES, TOKENIZERS
from test_decoding import DECODERS, MASK, prompt, tiny

CASES = [(f, b) for f in FAMILIES for b in (None, 1, 4) if b is None or f in DECODERS]


class Listener:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.puts: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        assert value.shape[0] == 1 and value.device.type == "cpu" and not self.ended
        self.puts.append(value[0].tolist())

    def end(self) -> None:
        self.ended += 1


class Drafter(Listener):
    """Checks each draft against what was final before."""

    def __init__(self) -> None:
        super().__init__()
        self.drafts: list[tuple[int, list[int]]] = []

    def put_draft(self, value: torch.Tensor) -> None:
        assert value.shape[0] == 1
        sent = sum(map(len, self.puts[1:]))
        self.drafts.append((sent, value[0].tolist()))


@pytest.mark.parametrize(("family", "block"), CASES)
@pytest.mark.parametrize("steps", [None, 2])
def test_each_final_token_comes_once(family: str, block: int | None, steps: int | None) -> None:
    model, ids, streamer = tiny(family, block=block), prompt(6), Drafter()
    settings: dict[str, Any] = {"max_new_tokens": 11, "max_denoising_steps": steps}
    expected = model.generate(ids, eos_token_id=None, **settings)
    got = model.generate(ids, eos_token_id=None, streamer=streamer, **settings)
    assert torch.equal(got, expected)
    assert streamer.puts[0] == ids[0].tolist()
    new = [token for part in streamer.puts[1:] for token in part]
    assert new == got[0, 6:].tolist()
    assert streamer.ended == 1
    for sent, draft in streamer.drafts:
        assert MASK in draft
        assert draft[0] == MASK, "what is final is put, not drafted"
        for token, final in zip(draft, new[sent:], strict=False):
            assert token in (MASK, final)
        assert len(draft) <= (block or 11)


def test_nothing_comes_behind_the_end() -> None:
    model, ids = tiny("llama", block=4), prompt(6)
    free = model.generate(ids, max_new_tokens=16, eos_token_id=None)[0, 6:].tolist()
    end = free[5]
    streamer = Drafter()
    model.generate(ids, max_new_tokens=16, eos_token_id=end, streamer=streamer)
    new = [token for part in streamer.puts[1:] for token in part]
    assert new == free[: free.index(end) + 1]


def test_a_listener_without_drafts_and_an_observer_beside() -> None:
    model, ids, streamer = tiny("llama", block=4), prompt(6), Listener()
    seen: list[Any] = []
    got = model.generate(
        ids, max_new_tokens=9, eos_token_id=None, streamer=streamer, observer=seen.append
    )
    assert [t for part in streamer.puts for t in part] == got[0].tolist()
    assert seen[-1].committed.all()


def test_padding_of_the_prompt_is_not_streamed() -> None:
    model, streamer = tiny("llama", block=4), Listener()
    ids, mask = prompt(9), torch.tensor([[0] * 4 + [1] * 5])
    model.generate(ids, attention_mask=mask, max_new_tokens=3, eos_token_id=None, streamer=streamer)
    assert streamer.puts[0] == ids[0, 4:].tolist()


def test_one_prompt_and_no_logits() -> None:
    model = tiny("llama", block=4)
    with pytest.raises(ValueError, match="one prompt, these are 2"):
        model.generate(prompt(5).repeat(2, 1), max_new_tokens=2, streamer=Listener())
    wants = Drafter()
    wants._takes_logits = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="takes logits"):
        model.generate(prompt(5), max_new_tokens=2, streamer=wants)


@pytest.mark.parametrize("block", [None, 4])
def test_the_streamers_of_transformers(
    block: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = TOKENIZERS["llama"]()
    model = tiny("llama", block=block, vocab_size=len(tokenizer))
    settings: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": None}
    text = tokenizer.decode(model.generate(prompt(6), **settings)[0, 6:])
    streamer = transformers.TextIteratorStreamer(tokenizer, skip_prompt=True)
    model.generate(prompt(6), streamer=streamer, **settings)
    assert "".join(streamer) == text
    kind = getattr(transformers, "TextDiffusionStreamer", None)
    if kind is None:
        pytest.skip("this transformers has no TextDiffusionStreamer")
    model.generate(prompt(6), streamer=kind(tokenizer, skip_prompt=True), **settings)
    printed = capsys.readouterr().out
    assert "\x1b[33m" in printed
    final = "".join(part.rpartition("\x1b8\x1b[J")[2] for part in printed.split("\x1b7")[:1])
    pieces = [part.partition("\x1b8\x1b[J")[2] for part in printed.split("\x1b7")[1:]]
    assert final + "".join(pieces) == text + "\n"
