"""What a text may hold and where it ends, as `generate` is told: the same in every decoding."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert
from factory import TOKENIZERS
from recording import record_on_a_cpu
from test_lossless import causal, stock
from tiny_decoders import DECODERS, MASK, WORDS, prompt, ragged, tiny
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    WatermarkingConfig,
)

from dllm_convert.modeling.published import modeling
from dllm_convert.modeling.published.stopping import StopText

NEW, PAD = 14, 1
SHAPES = [("bert", None, {}), ("llama", None, {"block_length": 4}), ("qwen2", 4, {})]
"""Family, block size, and settings: the whole text, windows, blocks."""


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Sixty tokens, one for each id the tiny models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {f"<{n}>": n for n in range(6)} | {chr(0x61 + n - 6): n for n in range(6, WORDS)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<3>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


def written(model: Any, ids: Any, *config: Any, new: int = NEW, **settings: Any) -> list[list[int]]:
    given = {"eos_token_id": -1, "pad_token_id": PAD, **settings}
    if not config:
        given["max_new_tokens"] = new
    tokens: list[list[int]] = model.generate(ids, *config, **given)[:, ids.shape[1] :].tolist()
    return tokens


class Ban(LogitsProcessor):
    """Forbids what follows a token in the alphabet, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        assert len(input_ids) == len(scores)
        self.asked += input_ids.tolist()
        scores = scores.clone()
        scores.scatter_(1, (input_ids[:, -1:] + 1) % WORDS, -torch.inf)
        scores[:, :30] = -torch.inf
        return scores


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.7},
        {"repetition_penalty": 3.0, "min_new_tokens": 5, "eos_token_id": list(range(30, 60))},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[7], [9, 10]], "sequence_bias": {(12,): 1.5, (13, 20): 4.0}},
        {"begin_suppress_tokens": list(range(6, 40)), "remove_invalid_values": True},
        {"forced_eos_token_id": 33, "eos_token_id": 33},
        {"exponential_decay_length_penalty": (3, 1.4), "eos_token_id": [33, 34]},
        {"min_length": 16, "eos_token_id": list(range(30, 60))},
        {"logits_processor": [Ban()]},
        {"prefix_allowed_tokens_fn": lambda row, ids: [20 + row, 30, 40 + len(ids)]},
        {"watermarking_config": WatermarkingConfig(bias=8.0, seeding_scheme="selfhash")},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_lossless_is_what_transformers_writes(family: str, settings: dict[str, Any]) -> None:
    model = causal(family)
    base = stock(model, family)
    ids = torch.cat([prompt(6, seed=seed) for seed in (1, 2, 3)])
    given = {"eos_token_id": None, **settings}
    expected = base.generate(
        ids, max_new_tokens=NEW, do_sample=False, pad_token_id=PAD, suppress_tokens=[MASK], **given
    )[:, 6:].tolist()
    expected = [row + [PAD] * (NEW - len(row)) for row in expected]
    plain = written(model, ids, verify_with="self")
    assert written(model, ids, verify_with="self", **settings) == expected
    if family == "llama" and "exponential_decay_length_penalty" not in settings:
        assert expected != plain, "the setting does nothing here"


@pytest.mark.parametrize("family", DECODERS)
def test_lossless_stops_where_transformers_stops(family: str) -> None:
    model, tokenizer = causal(family), TOKENIZERS["llama"]()
    base = stock(model, family)
    ids = torch.cat([prompt(6, seed=seed) for seed in (1, 2, 3)])
    given: dict[str, Any] = {"max_new_tokens": NEW, "pad_token_id": PAD, "tokenizer": tokenizer}
    free = written(model, ids, verify_with="self")
    whole = [tokenizer.decode(row) for row in free]
    for stops in ([whole[0][3:6], whole[2][7:9]], whole[1][4:5], "never"):
        given["stop_strings"] = stops
        expected = []
        for row in ids:  # without an end token its batches go on until every row has stopped
            out = base.generate(
                row[None], do_sample=False, suppress_tokens=[MASK], eos_token_id=None, **given
            )[0, 6:].tolist()
            expected.append(out + [PAD] * (NEW - len(out)))
        found = model.generate(ids, verify_with="self", eos_token_id=-1, **given)[:, 6:].tolist()
        assert found == expected
        assert (found == free) is (stops == "never")


def test_a_stop_string_is_completed_by_any_token() -> None:
    """Also by half a character, in the middle of a token, and across the end of the prompt."""
    tokenizer = TOKENIZERS["llama"]()

    def ends(stop: str, text: str, *, prompt: int = 0) -> int | None:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        criterion = StopText(tokenizer, (stop,))
        sizes = range(prompt + 1, len(ids) + 1)
        return next((n for n in sizes if criterion(torch.tensor([ids[:n]]), None)), None)

    for stop, text in (
        ("é", "a é b"),
        ("日本", "x日本語"),
        ("\n\n", "one\n\ntwo"),
        ("ab", "xabab"),
    ):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        found = ends(stop, text)
        assert found is not None
        assert stop in tokenizer.decode(ids[:found])
        assert stop not in tokenizer.decode(ids[: found - 1])
        assert ends("q" + stop, text) is None
    first = ends("ab", "xabab")
    assert first is not None
    again = ends("ab", "xabab", prompt=first)
    assert again is None or again > first, "what the prompt holds ends nothing"


@pytest.mark.parametrize("family", DECODERS)
def test_a_block_of_one_token_is_autoregressive(family: str) -> None:
    """With blocks of one token the same rules give, without lossless decoding, the same text."""
    model = causal(family)
    model.config.block_size = 1
    ids = prompt(6)
    for settings in ({"repetition_penalty": 2.0}, {"no_repeat_ngram_size": 2}):
        expected = written(model, ids, verify_with="self", **settings)
        assert written(model, ids, **settings) == expected


@pytest.mark.parametrize(("family", "block", "more"), SHAPES)
class TestDenoised:
    """What holds of a text that is written in no order."""

    def test_processors_see_all_before_a_token(
        self, family: str, block: int | None, more: dict[str, Any]
    ) -> None:
        model, ban = tiny(family, block=block), Ban()
        ids, mask = ragged([3, 7])
        found = written(
            model,
            ids,
            attention_mask=mask,
            logits_processor=[ban],
            confidence_threshold=0.0,
            **more,
        )
        for row, length in zip(found, (3, 7), strict=True):
            whole = [*prompt(length, seed=length)[0].tolist(), *row]
            for place in range(length, len(whole)):
                assert whole[place] != (whole[place - 1] + 1) % WORDS
                assert whole[place] >= 30
                assert whole[:place] in ban.asked
        assert not any(MASK in text for text in ban.asked)
        alone = [
            written(model, prompt(n, seed=n), logits_processor=[Ban()], **more)[0] for n in (3, 7)
        ]
        assert alone == found

    def test_no_sequence_comes_twice(
        self, family: str, block: int | None, more: dict[str, Any]
    ) -> None:
        model, ids = tiny(family, block=block), prompt(6)
        row = written(model, ids, new=40, no_repeat_ngram_size=2, **more)[0]
        whole = [*ids[0].tolist(), *row]
        pairs = list(pairwise(whole))
        assert len(set(pairs)) == len(pairs)
        free = written(model, ids, new=40, **more)[0]
        assert len(set(pairwise(free))) < 39

    def test_many_are_written_in_one_forward_where_rules_allow(
        self, family: str, block: int | None, more: dict[str, Any]
    ) -> None:
        model, ids = tiny(family, block=block), prompt(6)
        settings = {
            "bad_words_ids": [[n] for n in range(6, 30)],
            "begin_suppress_tokens": list(range(30, 50)),
            "repetition_penalty": 1.3,
            "min_new_tokens": 10,
            "eos_token_id": list(range(30, 55)),
        }
        out = model.generate(
            ids, max_new_tokens=NEW, max_denoising_steps=2, return_dict_in_generate=True,
            **settings, **more,
        )  # fmt: skip
        row = out.sequences[0, 6:].tolist()
        assert out.forwards < NEW
        assert not set(row[:10]) & set(range(6, 55)), "an end before its time"
        assert row[0] not in range(6, 50)
        assert written(model, ids, max_denoising_steps=2, **settings, **more) == [row]

    def test_stop_strings_cut_the_text_where_it_has_one(
        self, family: str, block: int | None, more: dict[str, Any],
        tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        model = tiny(family, block=block)
        ids, mask = ragged([3, 7, 6], side="right")
        more = {**more, "suppress_tokens": list(range(6))}
        free = written(model, ids, attention_mask=mask, **more)
        texts = [tokenizer.decode(row) for row in free]
        stops = [texts[0][3:5], texts[1][8]]
        expected = []
        for row, text, length in zip(free, texts, (3, 7, 6), strict=True):
            before = tokenizer.decode(prompt(length, seed=length)[0])
            ends = [n for n in range(1, NEW + 1) if (before + text[:n]).endswith(tuple(stops))]
            kept = min(ends, default=NEW)
            expected.append(row[:kept] + [PAD] * (NEW - kept))
        assert expected[0][5:] == [PAD] * (NEW - 5) and expected != free
        both = {"stop_strings": stops, "tokenizer": tokenizer, "attention_mask": mask, **more}
        assert written(model, ids, **both) == expected
        config = GenerationConfig(max_new_tokens=NEW, stop_strings=stops)
        del both["stop_strings"]
        assert written(model, ids, config, **both) == expected
        both["stop_strings"] = stops
        record_on_a_cpu(monkeypatch)
        with monkeypatch.context() as patch:
            patch.setattr(modeling, "is_queued", lambda device, options: True)
            assert written(model, ids, **both) == expected
        out = model.generate(
            ids, max_new_tokens=NEW, eos_token_id=-1, return_dict_in_generate=True, **both
        )
        assert out.new_tokens.tolist() == [
            next((n for n in range(NEW) if row[n:] == [PAD] * (NEW - n)), NEW) for row in expected
        ]
        assert out.tokens_per_forward == pytest.approx(int(out.new_tokens.sum()) / 3 / out.forwards)

    def test_time_ends_a_text(
        self, family: str, block: int | None, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, ids = tiny(family, block=block), prompt(6)
        free = written(model, ids, **more)[0]
        for given in ({"max_time": 3.5}, {"stopping_criteria": [MaxTimeCriteria(3.5)]}):
            ticks = iter(range(1000))
            monkeypatch.setattr(time, "monotonic", lambda ticks=ticks: float(next(ticks)))
            out = model.generate(
                ids, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=PAD,
                return_dict_in_generate=True, **given, **more,
            )  # fmt: skip
            monkeypatch.undo()
            kept = int(out.new_tokens[0])
            assert 0 < out.forwards < NEW and kept < NEW
            assert out.sequences[0, 6:].tolist() == free[:kept] + [PAD] * (NEW - kept)


def test_criteria_are_asked_once_for_each_token_in_order(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    for block, more in ((None, {}), (4, {}), (4, {"remasking": "low_confidence"})):
        model, asked = tiny("llama", block=block), []

        def stop(ids: torch.Tensor, scores: Any, asked: list[list[int]] = asked) -> bool:
            assert scores is None
            asked.append(ids[0].tolist())
            return len(asked) == 9

        ids = prompt(6)
        more = {"max_denoising_steps": 6, "remasking_ratio": 0.4, **more}
        free = written(model, ids, **more)[0]
        row = written(model, ids, stopping_criteria=[stop], **more)[0]
        assert row == free[:9] + [PAD] * 5
        assert asked == [[*ids[0].tolist(), *free[:n]] for n in range(1, 10)]


def test_a_streamer_gets_nothing_behind_the_stop(tokenizer: PreTrainedTokenizerFast) -> None:
    from test_streaming import Drafter

    for block in (None, 4):
        model, ids, streamer = tiny("llama", block=block), prompt(6), Drafter()
        text = tokenizer.decode(written(model, ids)[0])
        given = {"stop_strings": text[4:6], "tokenizer": tokenizer, "eos_token_id": None}
        row = model.generate(ids, max_new_tokens=NEW, streamer=streamer, **given)[0, 6:].tolist()
        assert [token for part in streamer.puts[1:] for token in part] == row[:6]
        assert streamer.ended == 1


@pytest.mark.parametrize(("name", "value"), [("typical_p", 0.2), ("epsilon_cutoff", 0.2),
                                              ("eta_cutoff", 0.2), ("top_h", 0.1)])  # fmt: skip
def test_what_is_drawn_from_is_narrowed(name: str, value: float) -> None:
    model, ids = tiny("llama", block=4), prompt(6)
    many = ids.expand(64, -1)
    hot = written(model, many, new=1, temperature=1.0, seed=0)
    narrow = written(model, many, new=1, temperature=1.0, seed=0, **{name: value})
    assert len({row[0] for row in narrow}) < len({row[0] for row in hot})
    config = GenerationConfig(max_new_tokens=NEW, do_sample=True, **{name: value})
    found = written(model, ids, config, seed=0)
    assert found == written(model, ids, temperature=1.0, seed=0, **{name: value})


def test_several_texts_of_a_prompt() -> None:
    model = tiny("llama", block=4)
    ids, mask = ragged([3, 6])
    settings: dict[str, Any] = {"temperature": 1.5, "attention_mask": mask}
    found = written(model, ids, num_return_sequences=3, seed=5, **settings)
    twice, kept = ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0)
    assert found == written(model, twice, seed=5, **{**settings, "attention_mask": kept})
    assert len({str(row) for row in found}) == 6
    config = GenerationConfig(max_new_tokens=NEW, num_return_sequences=3, do_sample=True)
    assert written(model, ids, config, seed=5, **settings) == found
    with pytest.raises(ValueError, match="nothing is drawn"):
        written(model, ids, num_return_sequences=3)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"stop_strings": ["."]}, "give generate the tokenizer too"),
        ({"stop_strings": [1], "tokenizer": object()}, r"stop_strings is \[1\]"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, expected a number above 0"),
        ({"repetition_penalty": -1.0}, "expected a number above 0"),
        ({"typical_p": 2.0}, "expected a number above 0, at most 1"),
        ({"max_time": 0}, "max_time is 0"),
        ({"max_time": "long"}, "max_time is 'long'"),
        ({"min_new_tokens": -1}, "min_new_tokens is -1"),
        ({"no_repeat_ngram_size": 1.5}, "no_repeat_ngram_size is 1.5"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"bad_words_ids": [[WORDS]]}, f"expected ids below {WORDS}"),
        ({"begin_suppress_tokens": [WORDS + 4]}, f"no token with the id {WORDS + 4}"),
        ({"logits_processor": [3]}, "logits_processor has 3"),
        ({"prefix_allowed_tokens_fn": lambda row, ids: []}, "allows nothing behind 6 tokens"),
        ({"logits_processor": [Ban()], "remasking": "random"}, "leave one out"),
    ],
    # Some have objects, which are called otherwise in every process.
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)  # fmt: skip
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        written(tiny("llama", block=None), prompt(6), **settings)


@pytest.mark.parametrize("family", sorted(set(TOKENIZERS) & {"llama", "bert"}))
def test_a_gated_or_larger_mask_is_no_obstacle(family: str) -> None:
    """Ids of texts are those that are written: never the mask, which need not have a row."""
    model = tiny(family)
    seen: list[int] = []

    def look(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.extend(ids.flatten().tolist())
        return scores

    written(model, prompt(6), logits_processor=[look], repetition_penalty=1.2)
    assert MASK not in seen


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_from_python_by_name_and_in_a_config(
    family: str, source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    import dllm_convert as dc

    out = tmp_path / "out"
    convert(source_cache(family), out, "bd3lm" if family == "llama" else "mdlm", block=4)
    pair = dc.load(out, device="cpu")
    free = dc.sample(pair, "a name", max_new_tokens=NEW)
    stop = next(text for text in free.text[3:] if text.isascii() and text.strip())
    config = GenerationConfig(max_new_tokens=NEW, stop_strings=[stop], min_new_tokens=2)
    named = {"max_new_tokens": NEW, "stop_strings": [stop], "min_new_tokens": 2}
    for checkpoint in (out, pair):
        by_name = dc.sample(checkpoint, "a name", **named)
        in_config = dc.sample(checkpoint, "a name", generation_config=config)
        assert (by_name.text, by_name.new_tokens) == (in_config.text, in_config.new_tokens)
        assert stop in by_name.text and free.text.startswith(by_name.text)
        assert by_name.new_tokens < NEW
    found = dc.sample(
        pair, ["a", "the"], max_new_tokens=4, temperature=1.0, seed=3, num_return_sequences=3
    )
    assert [one.prompt for one in found] == ["a"] * 3 + ["the"] * 3
    several: Any = dc.sample(
        out, "a", max_new_tokens=4, temperature=1.0, seed=3, num_return_sequences=2
    )
    assert [one.text for one in several] == [one.text for one in found[:2]]
    for wrong in ({"num_beams": 4}, {"generation_config": GenerationConfig(num_beams=4)}):
        with pytest.raises(dc.RequestError, match="num_beams is 4, which is refused"):
            dc.sample(out, "a", **wrong)
