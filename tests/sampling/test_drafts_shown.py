"""Films of lossless decoding: what was drafted, what of it held, what was rejected."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factory import TOKENIZERS
from test_lossless import DraftPolicy, causal, told_drafts
from test_lossless import stock as stock_of
from test_lossless import written as stock_text
from test_recordings import pixels, replay
from test_two_models import Eager, settings, told, verifier_of
from tiny_decoders import MASK, ragged, tiny

from dllm_convert.modeling.published import lossless, paired
from dllm_convert.modeling.published.drafting import Tree
from dllm_convert.sampling.watch import gif
from dllm_convert.sampling.watch.cells import State, caption, cells_of, plain
from dllm_convert.sampling.watch.frames import UNWRITTEN, Draft, Fate, Film, Frame, Recorder
from dllm_convert.sampling.watch.page import render_page
from dllm_convert.sampling.watch.pieces import TokenText
from dllm_convert.sampling.watch.terminal import Scene, style_of

NEW = 24


class Deep(DraftPolicy):
    """Drafts three tokens behind everything."""

    def choose(self, available: int, left: int) -> Tree:
        return Tree((1,) * min(available, 3), 3 + self._ahead)


def check(film: Film, final: list[int]) -> tuple[int, int]:
    """Whether every draft met the fate that the final text says; how many held and not."""
    found = {fate: 0 for fate in Fate}
    for before, frame in zip(film.frames, film.frames[1:], strict=False):
        assert frame.forward >= before.forward
        for draft in frame.drafts:
            found[draft.fate] += 1
            written = frame.written[draft.position]
            if draft.fate is Fate.HELD:
                assert written != UNWRITTEN
                assert draft.token == final[draft.position]
            elif draft.fate is Fate.OPEN:
                assert written == UNWRITTEN
            elif written != UNWRITTEN:
                assert draft.token != final[draft.position]
        judged = {draft.position for draft in frame.drafts if draft.fate is not Fate.OPEN}
        kept = {(draft.position, draft.token) for draft in frame.drafts}
        for draft in before.drafts:
            if draft.fate is Fate.OPEN:
                assert draft.position in judged or (draft.position, draft.token) in kept
    return found[Fate.HELD], found[Fate.REJECTED]


@pytest.mark.parametrize("models", [1, 2])
def test_a_film_says_what_became_of_every_draft(
    models: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [4, 11]
    ids, mask = ragged(lengths, side="right")
    model = causal("llama") if models == 1 else tiny("llama", block=8)
    base = stock_of(model, "llama") if models == 1 else verifier_of(model, "llama", seed=1)
    expected = stock_text(base, *ragged(lengths), NEW, None)
    recorder = Recorder(MASK)
    more: dict[str, Any] = {"observer": recorder, "max_new_tokens": NEW}
    if models == 1:
        monkeypatch.setattr(lossless, "DraftPolicy", Deep)
        told_drafts(monkeypatch, lengths, expected)
        model.generate(ids, **settings(mask, "self", **more))
    else:
        monkeypatch.setattr(paired, "PairPolicy", Eager)
        told(monkeypatch, lengths, expected)
        model.generate(ids, **settings(mask, base, **more))
    for row, length in enumerate(lengths):
        film = recorder.film(row)
        final = list(film.frames[-1].tokens)
        assert final[length:] == expected[row]
        held, rejected = check(film, final)
        assert held >= 3
        assert rejected > 0
        fewer = film.thinned(4)
        assert fewer.frames[-1].tokens == film.frames[-1].tokens


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return TOKENIZERS["llama"]()


@pytest.fixture(scope="module")
def film(tokenizer: Any) -> Film:
    """Three tokens drafted; one held, one rejected where another was written, one behind it."""
    a, b, c, d, e = tokenizer(" one two three four five", add_special_tokens=False)["input_ids"][:5]
    mask = 1 << 20
    drafted = tuple(Draft(place, t, Fate.OPEN) for place, t in ((1, b), (2, e), (3, d)))
    judged = (
        Draft(1, b, Fate.HELD), Draft(2, e, Fate.REJECTED), Draft(3, d, Fate.REJECTED),
        Draft(4, e, Fate.OPEN),
    )  # fmt: skip
    return Film(
        1,
        (
            Frame(0, (a, mask, mask, mask, mask), (0, -1, -1, -1, -1), drafted),
            Frame(1, (a, b, c, mask, mask), (0, 1, 1, -1, -1), judged),
            Frame(2, (a, b, c, d, e), (0, 1, 1, 2, 2)),
        ),
    )


def test_cells_show_what_is_drafted_and_what_is_rejected(film: Film, tokenizer: Any) -> None:
    text = TokenText(tokenizer, film.end_ids)
    first, second, last = (cells_of(film, f, n, text) for n, f in enumerate(film.frames))
    p, w, d, x = State.PROMPT, State.WRITTEN, State.DRAFTED, State.REJECTED
    assert [cell.state for cell in first] == [p, d, d, d, State.MASKED]
    assert [cell.state for cell in second] == [p, w, w, x, d]
    assert [cell.held for cell in second] == [False, True, False, False, False]
    assert [cell.state for cell in last] == [p, w, w, w, w]
    assert second[3].text == last[3].text, "a draft behind a wrong one may be right by chance"
    assert caption(film, film.frames[1]).endswith("1 of 3 drafts held")
    assert "drafts" not in caption(film, film.frames[2])
    # What is not verified is nothing yet where there is one line.
    assert plain(second, "_").endswith("__")
    styles = {style_of(cell) for cell in (*first, *second)}
    assert len(styles) == len({"prompt", "drafted", "masked", "held", "written", "rejected"})


def test_terminal_page_and_gif_show_it(film: Film, tokenizer: Any) -> None:
    text = TokenText(tokenizer, film.end_ids)
    images = gif.draw_frames(film, text)
    shown = [pixels(image, gif._HELD) for image in images]
    assert shown[0] == shown[2] > 100, "the legend"
    assert shown[1] > shown[0] + 100, "and a token"
    plain_film = Film(1, tuple(Frame(f.forward, f.tokens, f.written) for f in film.frames))
    assert not any(pixels(image, gif._HELD) for image in gif.draw_frames(plain_film, text))
    source = render_page(film, text, title="t")
    states = replay(source)
    assert [cell[0] for cell in states[0] if cell] == ["p", "d", "d", "d", "m"]
    assert [cell[0] for cell in states[1] if cell] == ["p", "h", "n0", "x", "d"]
    assert "rejected" in source
    assert 'class="x"' not in render_page(plain_film, text, title="t")
    recorder = Recorder(1 << 20)
    recorder._lengths, recorder._frames = [1], [list(film.frames[:2])]
    assert "1 of 3 drafts held" in " ".join(Scene(recorder, text).lines("utf-8"))


def test_a_streamed_text_is_of_what_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """Showing drafts hands a streamer nothing that is not final."""
    model = tiny("qwen3", block=8)
    base, pieces = verifier_of(model, "qwen3", seed=1), []

    class Streamer:
        def put(self, value: torch.Tensor) -> None:
            pieces.extend(value.flatten().tolist())

        def end(self) -> None:
            pieces.append(-1)

    monkeypatch.setattr(paired, "PairPolicy", Eager)
    ids, mask = ragged([5])
    whole = model.generate(
        ids, **settings(mask, base, streamer=Streamer(), observer=Recorder(MASK))
    )
    assert pieces == [*whole.sequences[0].tolist(), -1]
