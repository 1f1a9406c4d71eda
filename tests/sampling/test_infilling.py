"""Masks in a prompt leave the text around them as it was typed, whatever the tokenizer's rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from factory import TOKENIZERS, prose
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaTokenizer, PreTrainedTokenizerFast

from dllm_convert.modeling.text_bounds import bounds_of
from dllm_convert.sampling.prompts import encode_prompt, with_masks

SPECIAL = ["<unk>", "<s>", "</s>"]
SPACED = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])


def _trained(tokenizer: Tokenizer, **more: Any) -> PreTrainedTokenizerFast:
    more = {"initial_alphabet": ["\n", "\t", "é", "▁"], **more}
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, show_progress=False, **more
    )
    tokenizer.train_from_iterator(prose(100), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.add_special_tokens({"mask_token": "<|mask|>"})
    return fast


def _prepend() -> PreTrainedTokenizerFast:
    """As Llama 2 and Mistral v1 have it."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = SPACED
    return _trained(tokenizer)


def _metaspace(scheme: str) -> Callable[[], PreTrainedTokenizerFast]:
    def make() -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
        return _trained(tokenizer)

    return make


def _byte_level(*, prefix: bool) -> Callable[[], PreTrainedTokenizerFast]:
    def make() -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        tokenizer.decoder = decoders.ByteLevel()
        return _trained(tokenizer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())

    return make


def _llama_class(*, legacy: bool) -> Callable[[], PreTrainedTokenizerFast]:
    def make() -> PreTrainedTokenizerFast:
        import json

        model = json.loads(_prepend().backend_tokenizer.to_str())["model"]
        merges = [tuple(pair) for pair in model["merges"]]
        made = LlamaTokenizer(vocab=model["vocab"], merges=merges, legacy=legacy)
        made.add_special_tokens({"mask_token": "<|mask|>"})
        return made

    return make


KINDS: dict[str, Callable[[], Any]] = {
    "prepend": _prepend,
    **{f"metaspace {scheme}": _metaspace(scheme) for scheme in ("always", "first", "never")},
    "byte level": _byte_level(prefix=False),
    "byte level, space before": _byte_level(prefix=True),
    "LlamaTokenizer": _llama_class(legacy=False),
    "LlamaTokenizer, legacy": _llama_class(legacy=True),
}
TEXTS = [
    "the ___ house",
    "the ___ ___ house ___",
    "the ______ of",
    "___ is a name",
    "___, and a ___. Then ___: (___) ___",
    "a ___  two spaces and___none, in___",
    "a list of\n___\n\nnames ___\tand ___-value ___'s",
    "___",
    "é ___ é ___é",
]


@pytest.fixture(scope="module", params=list(KINDS))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return KINDS[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_what_stands_around_is_as_typed(tokenizer: Any, text: str) -> None:
    marked = with_masks(tokenizer, text, "___")
    ids = encode_prompt(tokenizer, marked)
    begin = len(bounds_of(tokenizer).begin)
    assert ids.count(tokenizer.mask_token_id) == text.count("___")
    pieces: list[list[int]] = [[]]
    for token in ids[begin:]:
        pieces.append([]) if token == tokenizer.mask_token_id else pieces[-1].append(token)
    mask = tokenizer.mask_token_id
    shown = [tokenizer.decode([mask, *piece])[len(tokenizer.mask_token) :] for piece in pieces]
    first, *others = marked.split(tokenizer.mask_token)
    assert shown[1:] == others
    assert shown[0].lstrip(" ") == first.lstrip(" ")
    assert tokenizer.decode(ids[begin:]).lstrip(" ") == marked.lstrip(" ")


def test_what_the_vocabulary_cannot_say_brings_no_space(tokenizer: Any) -> None:
    ids = encode_prompt(tokenizer, "the<|mask|> house ☃ and<|mask|>, ☃ a")
    shown = tokenizer.decode(ids, skip_special_tokens=False)
    assert "<|mask|> house" in shown
    assert "<|mask|>, " in shown


@pytest.mark.parametrize("family", list(TOKENIZERS))
def test_other_tokenizers_do_as_before(family: str) -> None:
    tokenizer = TOKENIZERS[family]()
    if tokenizer.mask_token is None:
        tokenizer.add_special_tokens({"mask_token": "<|mask|>"})
    for text in TEXTS[:5]:
        marked = with_masks(tokenizer, text, "___")
        plain = tokenizer(marked).input_ids
        closing = len(bounds_of(tokenizer).closing)
        assert encode_prompt(tokenizer, marked) == plain[: len(plain) - closing]


def test_a_mask_in_a_conversation() -> None:
    tokenizer = KINDS["prepend"]()
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content }}</s>{% endfor %}"
    ids = encode_prompt(tokenizer, "the<|mask|> house", chat=True)
    assert ids[0] == 1
    assert ids[-1] == 2
    assert tokenizer.decode(ids[1:-1]) == "the<|mask|> house"
