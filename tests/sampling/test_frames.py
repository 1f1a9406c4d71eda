"""What is recorded is what was decoded, and nothing that is written is lost or changed."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factory import FAMILIES
from films import denoised

from dllm_convert.adapters import get_adapter
from dllm_convert.sampling.watch.cells import State, caption, cells_of, count_new
from dllm_convert.sampling.watch.frames import UNWRITTEN, Film, Frame, Recorder

MASK, WORDS, END = 5, 60, 2


def tiny(family: str, block: int | None) -> Any:
    import transformers

    from dllm_convert.modeling.published import modeling

    config_class, _, base = FAMILIES[family]
    sizes = {**base, "vocab_size": WORDS, "num_hidden_layers": 1, "max_position_embeddings": 130}
    config = getattr(transformers, config_class)(
        **sizes, initializer_range=0.3, pad_token_id=1, eos_token_id=END, is_causal=False
    )
    config.mask_token_id, config.block_size = MASK, block
    config.diffusion = {"token_shift": get_adapter(family).attention == "causal"}
    torch.manual_seed(0)
    return getattr(modeling, get_adapter(family).diffusion_class)(config).eval()


CASES = [
    (family, block)
    for family in FAMILIES
    for block in (None, 1, 4)
    if block is None or "bd3lm" in get_adapter(family).targets
]


@pytest.mark.parametrize(("family", "block"), CASES)
def test_frames_lead_to_what_generate_returns(family: str, block: int | None) -> None:
    model, ends = tiny(family, block), frozenset([END])
    recorder = Recorder(MASK, ends, block)
    ids = torch.randint(6, WORDS, (3, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    got = model.generate(
        *(ids,),
        attention_mask=mask,
        observer=recorder,
        max_new_tokens=11,
        confidence_threshold=0.3,
        temperature=1.0,
        seed=4,
    )
    for row in range(3):
        film = recorder.film(row)
        last, length = film.frames[-1], int(mask[row].sum())
        assert film.prompt_length == length
        assert film.frames[0].written == (0,) * length + (UNWRITTEN,) * 11
        new = last.tokens[length : film.end(last)]
        assert list(new) == got[row, 7 : 7 + len(new)].tolist()
        assert UNWRITTEN not in last.written[: film.end(last)]
        check_growing(film)
    assert recorder.latest(1) == (
        replace(recorder.film(1), frames=(recorder.film(1).frames[-1],)),
        len(recorder.film(1).frames) - 1,
    )


def check_growing(film: Film) -> None:
    for number, (before, after) in enumerate(pairwise(film.frames), 1):
        assert number in after.written
        assert after.forward > before.forward
        for old, new, token, later in zip(
            before.written, after.written, before.tokens, after.tokens, strict=True
        ):
            assert old == UNWRITTEN or (old, token) == (new, later)
            assert old != UNWRITTEN or new in (UNWRITTEN, number)
            assert (new == UNWRITTEN) == (later == MASK) or new != UNWRITTEN


def shown(recorder: Recorder, canvas: list[int], forwards: int) -> None:
    known = [token != MASK for token in canvas]
    recorder(
        SimpleNamespace(  # type: ignore[arg-type]
            canvas=torch.tensor([canvas]),
            committed=torch.tensor([known]),
            lengths=torch.tensor([1]),
            rows=torch.tensor([0]),
            forwards=forwards,
            drafts=(),
        )
    )


def test_a_token_that_is_masked_again_is_new_when_it_comes_back() -> None:
    recorder = Recorder(MASK)
    assert recorder.rows == 0
    for forwards, canvas in enumerate(([9, 5, 5], [9, 7, 5], [9, 5, 8], [9, 7, 8], [9, 7, 8])):
        shown(recorder, canvas, forwards)
    frames = recorder.film().frames
    assert [frame.written for frame in frames] == [(0, -1, -1), (0, 1, -1), (0, -1, 2), (0, 3, 2)]
    assert [frame.remaining() for frame in frames] == [2, 1, 1, 0]


def test_a_token_that_is_replaced_is_new() -> None:
    recorder = Recorder(MASK)
    for forwards, canvas in enumerate(([9, 5], [9, 7], [9, 8])):
        shown(recorder, canvas, forwards)
    assert recorder.film().frames[-1] == Frame(2, (9, 8), (0, 2))


@pytest.mark.parametrize("most", [2, 3, 7, 20, 21, 100])
def test_fewer_frames_show_the_same_text(most: int) -> None:
    film = denoised([1], list(range(10, 50)), per_frame=2)
    thin = film.thinned(most)
    assert len(thin.frames) == min(most, len(film.frames))
    assert thin.frames[0] == film.frames[0]
    assert thin.frames[-1].tokens == film.frames[-1].tokens
    assert thin.frames[-1].forward == film.frames[-1].forward
    for number, (before, after) in enumerate(pairwise(thin.frames), 1):
        assert number in after.written
        for old, new in zip(before.written, after.written, strict=True):
            assert old == new or (old, new) == (UNWRITTEN, number)


class Letters:
    """Texts of tokens without a tokenizer."""

    def texts(self, tokens: list[int | None], prompt_length: int = 0) -> tuple[str, ...]:
        return tuple("" if token is None else chr(token) for token in tokens)


def test_cells_say_what_and_how_new() -> None:
    film = Film(
        2,
        (
            Frame(1, (65, 66, MASK, MASK, MASK, MASK), (0, 0, -1, -1, -1, -1)),
            Frame(2, (65, 66, 67, MASK, MASK, MASK), (0, 0, 1, -1, -1, -1)),
            Frame(3, (65, 66, 67, 68, MASK, MASK), (0, 0, 1, 2, -1, -1)),
            Frame(5, (65, 66, 67, 68, END, MASK), (0, 0, 1, 2, 3, -1)),
        ),
        frozenset([END]),
        block_size=4,
    )
    text: Any = Letters()
    states = [[c.state for c in cells_of(film, f, n, text)] for n, f in enumerate(film.frames)]
    p, m, later, w = State.PROMPT, State.MASKED, State.WAITING, State.WRITTEN
    assert states == [
        [p, p, m, m, later, later],
        [p, p, w, m, later, later],
        [p, p, w, w, m, m],
        [p, p, w, w, w],
    ]
    ages = [cell.age for cell in cells_of(film, film.frames[3], 3, text)]
    assert ages[2:] == [2, 1, 0]
    assert [count_new(film, frame) for frame in film.frames] == [(0, 4), (1, 4), (2, 4), (3, 3)]
    assert caption(film, film.frames[3]) == "forward 5, 3 of 3 tokens"


def test_a_mask_given_in_the_prompt_becomes_a_written_token() -> None:
    film = Film(3, (Frame(0, (65, MASK, 66), (0, -1, 0)), Frame(1, (65, 67, 66), (0, 1, 0))))
    text: Any = Letters()
    assert [c.state for c in cells_of(film, film.frames[0], 0, text)][1] is State.MASKED
    assert [c.state for c in cells_of(film, film.frames[1], 1, text)][1] is State.WRITTEN
    assert count_new(film, film.frames[1]) == (1, 1)
