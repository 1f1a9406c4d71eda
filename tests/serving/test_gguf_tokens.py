"""Tokenizers in the keys of a GGUF file: llama.cpp cuts text as transformers does."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from factory import prose
from gguf_cases import ENGINE, engine_of
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AddedToken, PreTrainedTokenizerFast

from dllm_convert.errors import IncompatibleError
from dllm_convert.serving import gguf_tokens
from dllm_convert.serving.gguf_tokens import tokenizer_keys
from dllm_convert.weights.tokenizer import SAMPLES

SPECIAL = ["<unk>", "<s>", "</s>"]
WORDS = [
    *("the", " The", "THE", "don't", "we'LL", "I'd", "naïve", "Größe", "漢字", "и", "кириллица"),
    *("12", "345", "6,789", "0x1F", "³", "½", "🙂", "👩‍🔬", "e\u0301", "  ", "\t", "\n", "\r\n"),
    *("\n\n  ", "...", "->", "/path/to", "a_b", "__init__", "(x)", "«»", "؟", "ไทย", " ", "\u3000"),
]


def texts() -> list[str]:
    """Return prose, and words of all kinds side by side as nobody writes them."""
    draw = random.Random(0)
    mixed = [
        "".join(draw.choice(WORDS) + draw.choice(["", "", " "]) for _ in range(draw.randint(1, 12)))
        for _ in range(300)
    ]
    return [*SAMPLES, *prose(20), *mixed]


def split(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def of_bytes(cut: pre_tokenizers.PreTokenizer, *, whole: bool = False) -> Tokenizer:
    """Return a tokenizer of bytes whose merges cross what another cut would not."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer, tokenizer.decoder = cut, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=2500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([*prose(150), *texts()], trainer)
    return tokenizer


def of_characters(spaces: str) -> Tokenizer:
    """Return a tokenizer as those that were SentencePiece models: bytes for unknown characters."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if spaces == "normalizer":
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    elif spaces == "normalizer, none before":
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
    own = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=1500, special_tokens=own, limit_alphabet=90, show_progress=False
    )
    # Words alone: without a cut at spaces whole sentences would be merged.
    words = [word for text in prose(150) for word in text.split()]
    tokenizer.train_from_iterator(words, trainer)
    content = tokenizer.to_str()
    made = Tokenizer.from_str(content)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    return made


TOKENIZERS: dict[str, Callable[[], Tokenizer]] = {
    "gpt-2": lambda: of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "smollm": lambda: of_bytes(
        pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    ),
    "llama-bpe": lambda: of_bytes(split(gguf_tokens._LLAMA3), whole=True),
    "qwen2": lambda: of_bytes(split(gguf_tokens._QWEN2)),
    "tekken": lambda: of_bytes(split(gguf_tokens._TEKKEN), whole=True),
    "spaces by a normalizer": lambda: of_characters("normalizer"),
    "no space before a text": lambda: of_characters("normalizer, none before"),
    "spaces always": lambda: of_characters("always"),
    "spaces first": lambda: of_characters("first"),
    "spaces never": lambda: of_characters("never"),
}


APART: dict[str, Callable[[str], bool]] = {
    "tekken": lambda text: any(map(unicodedata.combining, text)),
    "spaces always": lambda text: text.startswith(" ") or "<tool>" in text,
    "spaces first": lambda text: text.startswith(" ") or "<tool>" in text,
}
"""Where llama.cpp is known to cut otherwise, as `serving/gguf_tokens.py` says."""


def fast(tokenizer: Tokenizer, *, begins: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of transformers that has a mask, and perhaps begins every text."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.add_tokens([AddedToken("<|mask|>", special=True, normalized=False)], special_tokens=True)
    made.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    made.mask_token = "<|mask|>"
    if begins:
        made.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 1)]
        )
    return made


@ENGINE
@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_engine_cuts_text_as_we_do(name: str, begins: bool, tmp_path: Path) -> None:
    tokenizer = fast(TOKENIZERS[name](), begins=begins)
    theirs = engine_of(tokenizer, tmp_path / "a.gguf")
    assert theirs.rows == len(tokenizer) + 5
    apart = APART.get(name, lambda text: False)
    cases = [text for text in (*texts(), "a<|mask|>b <tool> c</s>") if not apart(text)]
    assert len(cases) > 200
    pairs = [(text, tokenizer(text)["input_ids"], theirs.tokenize(text)) for text in cases]
    wrong = [pair for pair in pairs if pair[1] != pair[2]]
    assert not wrong, (len(wrong), wrong[:3])


def test_what_has_no_name_there_is_refused() -> None:
    cases = {
        "cut by": of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "its model is WordPiece": Tokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]")),
        "its model is Unigram": Tokenizer(models.Unigram([("a", 0.0)], 0)),
        "ignore_merges is True": of_bytes(split(gguf_tokens._QWEN2), whole=True),
        "no bytes for unknown": Tokenizer(models.BPE({"a": 0}, [])),
    }
    for reason, tokenizer in cases.items():
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        with pytest.raises(IncompatibleError, match=reason) as caught:
            tokenizer_keys(made, rows=3000, mask=1)
        assert caught.value.hint
