"""A choice of which nothing is left on the way must not be certain, and with that the best."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from bounds_cases import wrapped_source
from conversion import convert
from tokenizers import AddedToken

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install dllm-convert[eval]")

from lm_eval.api.instance import Instance

from dllm_convert.errors import DataError, IncompatibleError
from dllm_convert.evaluation.harness import DiffusionLM
from dllm_convert.evaluation.subject import EvaluatedCheckpoint

QUICK = {"rounds": 1, "draws": 2}


@pytest.fixture(scope="module")
def subjects(source_cache: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, EvaluatedCheckpoint] = {}
    root = tmp_path_factory.mktemp("empty")

    def get(family: str) -> EvaluatedCheckpoint:
        if family not in made:
            target = "mdlm" if family == "bert" else "bd3lm"
            convert(source_cache(family), root / family, target, block=4)
            made[family] = EvaluatedCheckpoint.load(root / family)
        return made[family]

    return get


def score(subject: EvaluatedCheckpoint, *pairs: tuple[str, str], **options: Any) -> list[float]:
    model = DiffusionLM(subject=subject, **QUICK, **options)
    asked = [Instance("loglikelihood", {}, pair, 0, ("a", 3, 1)) for pair in pairs]
    return [nats for nats, _ in model.loglikelihood(asked)]


@pytest.mark.parametrize("text", [" ", "\n\t", "\u200b", "\x00"], ids=ascii)
def test_a_continuation_without_tokens_is_told(subjects: Any, text: str) -> None:
    """WordPiece drops white space and control characters."""
    for context in ("the value of", ""):
        with pytest.raises(DataError, match="has no tokens in this model's vocabulary"):
            score(subjects("bert"), (context, "a name"), (context, text))
    assert score(subjects("bert"), ("the value of", ""))[0] == 0, "nothing was asked for"


def test_a_continuation_that_melts_into_the_context_is_scored(
    source_factory: Any, tmp_path: Path
) -> None:
    """`Hel` and `lo` are three tokens apart and one together."""
    from transformers import AutoTokenizer

    source = source_factory("llama", vocab_padding=8)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens([AddedToken("xyz!", normalized=False)])
    tokenizer.save_pretrained(source)
    convert(source, tmp_path / "out", "bd3lm", block=4)
    subject = EvaluatedCheckpoint.load(tmp_path / "out")
    melted = tokenizer.convert_tokens_to_ids("xyz!")
    given, scored = subject.encode_pair("a xyz", "!")
    assert melted in scored
    assert given + scored == subject.encode("a xyz!")
    assert score(subject, ("a xyz", "!"), ("a xyz", " is a name"))[0] < 0
    from dllm_convert.common.console import Reporter
    from dllm_convert.evaluation.base import AutoregressiveLM

    base = AutoregressiveLM(
        pretrained=str(source), device="cpu", batch_size=1, reporter=Reporter(quiet=True)
    )
    asked = Instance("loglikelihood", {}, ("a xyz", "!"), 0, ("a", 3, 1))
    assert base._encode_pair("a xyz", "!") == (given, scored)
    assert base.loglikelihood([asked])[0][0] < 0
    given, scored = subject.encode_pair("xyz", "!")
    assert scored == [melted]
    assert len(given) == 1


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_continuation_longer_than_the_context_is_told(subjects: Any, family: str) -> None:
    long = " a name" * 200
    with pytest.raises(IncompatibleError, match=r"continuation of \d+ tokens \(task a, item 3\)"):
        score(subjects(family), ("the value of", " a"), ("the value of", long))
    for context in (2, 6):
        with pytest.raises(IncompatibleError, match=f"does not fit into a context of {context}"):
            score(subjects(family), ("one", " two three four five six"), max_length=context)
    # As long as it fits, all of it is scored, however long what stands before it.
    subject = subjects(family)
    given, scored = subject.encode_pair("word " * 300, " two three")
    assert len(given) > subject.context
    room = len(scored) + 1
    short = score(subject, ("word " * 300, " two three"), max_length=room)[0]
    assert short < 0
    for wrong in (0, 1):
        with pytest.raises(DataError, match=f"max_length is {wrong}, expected at least 2"):
            DiffusionLM(subject=subject, max_length=wrong)


def test_a_text_without_tokens_has_no_likelihood(subjects: Any) -> None:
    model = DiffusionLM(subject=subjects("bert"), **QUICK)

    def rolling(text: str) -> float:
        asked = Instance("loglikelihood_rolling", {}, (text,), 0, ("a", 0, 1))
        return float(model.loglikelihood_rolling([asked])[0])

    assert rolling("") == rolling("  \n") == 0
    assert rolling("the value") < 0
    with pytest.raises(DataError, match="has no tokens"):
        rolling("\x00\u200b")


def test_a_beginning_is_not_put_twice(tmp_path: Path) -> None:
    source = wrapped_source(tmp_path / "source", "begin")
    convert(source, tmp_path / "out", "bd3lm", block=4)
    subject = EvaluatedCheckpoint.load(tmp_path / "out")
    assert subject.encode_pair("", "<|begin|>a") == ([0], subject.encode("a", special=False))
    assert subject.encode_pair("", "<|begin|>") == ([0], [0])
    model = DiffusionLM(subject=subject, **QUICK)
    chat = "<|start|>user\nHi"
    plain = [model.subject.encode(chat)[0], model.subject.encode(chat, special=False)[0]]
    assert plain == [0, 2]
    model.chat_template(True)
    assert model._chats
    model.chat_template(False)
    assert not model._chats


@pytest.mark.parametrize(
    ("asked", "given", "temperature"),
    [
        ({"do_sample": False}, {}, 0.0),
        ({"temperature": 0.0}, {}, 0.0),
        ({}, {}, None),
        ({"do_sample": True, "temperature": 0.7}, {}, 0.7),
        ({"do_sample": False}, {"temperature": 0.5}, 0.5),
    ],
)
def test_a_task_that_wants_the_likeliest_gets_it(
    subjects: Any,
    monkeypatch: pytest.MonkeyPatch,
    asked: dict[str, Any],
    given: dict[str, Any],
    temperature: float | None,
) -> None:
    subject, seen = subjects("llama"), {}
    write = EvaluatedCheckpoint.write

    def watched(self: EvaluatedCheckpoint, *arguments: Any, **options: Any) -> Any:
        seen.update(options)
        return write(self, *arguments, **options)

    monkeypatch.setattr(EvaluatedCheckpoint, "write", watched)
    model = DiffusionLM(subject=subject, **given)
    options = {"until": [], "max_gen_toks": 2, **asked}
    model.generate_until([Instance("generate_until", {}, ("A", options), 0, ("a", 0, 1))])
    assert seen.get("temperature") == temperature
