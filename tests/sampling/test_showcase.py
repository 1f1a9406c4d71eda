"""The texts a conversion is shown by: asked as it wants to be asked, beside its base's own."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conversion import convert

from dllm_convert.adapters import get_adapter
from dllm_convert.card.facts import _samples
from dllm_convert.common.manifest_form import _Sample
from dllm_convert.modeling.loading import load_base, load_checkpoint
from dllm_convert.pipeline.shown import detail_blocks
from dllm_convert.sampling.prompts import encode_prompt
from dllm_convert.sampling.run import recorder_of
from dllm_convert.sampling.showcase import NEW_TOKENS, QUESTIONS, TEXTS, choose, showcase
from dllm_convert.sampling.shown import sample_text


def loaded(source: Path, folder: Path, target: str) -> tuple[Any, Any]:
    convert(source, folder, target)
    found = load_checkpoint(folder)
    return found.model, found.tokenizer


@pytest.mark.parametrize(
    ("family", "target", "chat"),
    [("llama", "bd3lm", True), ("qwen3", "mdlm", False), ("bert", "mdlm", False)],
)
def test_each_is_asked_as_it_wants_beside_its_base(
    family: str, target: str, chat: bool, source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    source = source_cache(family)
    model, tokenizer = loaded(source, tmp_path / "out", target)
    causal = get_adapter(family).attention == "causal"
    base = load_base(source, get_adapter(family)) if causal else None
    recorder = recorder_of(model)
    section = showcase(model, tokenizer, recorder, lambda: base)
    every = [section, *section["more"]]
    assert [one["prompt"] for one in every] == list(QUESTIONS if chat else TEXTS)
    assert all(one["chat"] == chat for one in every)
    assert all(0 < one["new_tokens"] <= NEW_TOKENS for one in every)
    _Sample.model_validate(section)
    # The film is the first one's.
    first = encode_prompt(tokenizer, every[0]["prompt"], chat=chat)
    assert recorder.rows == 1
    assert list(recorder.film().frames[0].tokens[: len(first)]) == first
    for one in every:
        if base is None:
            assert one["base"] is None
            continue
        ids = encode_prompt(tokenizer, one["prompt"], chat=chat)
        ends = model.generation_config.eos_token_id
        out = base.generate(
            torch.tensor([ids]), max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=ends
        )
        assert one["base"] == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)


def test_the_conversion_is_gone_before_the_base_comes(
    source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    model, tokenizer = loaded(source_cache("llama"), tmp_path / "out", "bd3lm")
    held, gone, recorder = [model], weakref.ref(model), recorder_of(model)
    del model

    def base() -> None:
        gc.collect()
        assert gone() is None

    section = showcase(held.pop(), tokenizer, recorder, base)
    assert section["base"] is None


def test_a_template_that_takes_no_questions_is_not_asked(
    source_cache: Callable[..., Path], tmp_path: Path
) -> None:
    model, tokenizer = loaded(source_cache("llama"), tmp_path / "out", "bd3lm")
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    assert choose(model, tokenizer).chat is False


def test_earlier_manifests_and_questions_read_as_they_should() -> None:
    old = {"prompt": "Once", "text": " upon", "tokens_per_forward": 1.0, "seconds": 1.0}
    (one,) = _samples(old)
    assert (one["chat"], one["base"]) == (False, None)
    assert sample_text(one) == "Once upon"
    asked = {**old, "chat": True, "base": " of course", "more": [old]}
    assert sample_text(asked) == "Once\n\n upon"
    assert [sample["text"] for sample in _samples(asked)] == [" upon", " upon"]
    assert list(_samples(None)) == []
    manifest = {"verification": {"passed": True, "probes": []}, "sample": asked}
    lines = [str(block) for block in detail_blocks({"path": "x", "manifest": manifest})]
    assert "Once\n\n of course" in lines
    assert lines.count("Once upon") == 1
