"""GGUF of what somebody trained: llama.cpp writes our text, and cuts text as real tokenizers do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conversion import convert
from real import assets
from serving.gguf_cases import ENGINE, engine_of, file_of
from transformers import PreTrainedTokenizerFast

import dllm_convert as dc
from dllm_convert.common.console import Reporter
from dllm_convert.serving.gguf_model import load_gguf
from dllm_convert.source.inspect import inspect_source
from dllm_convert.source.materialise import materialise
from dllm_convert.source.tokenizer_loading import load_tokenizer
from dllm_convert.weights.tokenizer import SAMPLES

pytestmark = [pytest.mark.real, ENGINE]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's conversion, before it is trained."""
    source = materialise(inspect_source(str(assets.smollm2_gguf())), Reporter(quiet=True)).folder
    folder = tmp_path_factory.mktemp("smollm2") / "smollm2-bd3lm"
    convert(source, folder, "bd3lm", block=32)
    return folder


def test_engine_writes_the_demos_32_tokens(smollm2: Path, tmp_path: Path) -> None:
    made = dc.export(smollm2, "gguf", tmp_path / "x", outtype="f32")
    theirs = load_gguf(file_of(made.path), 1)
    model, tokenizer = dc.load(smollm2, device="cpu", dtype="float32")
    ids = torch.tensor([tokenizer("The meaning of a name in a program is")["input_ids"]])
    assert theirs.tokenizer("The meaning of a name in a program is")["input_ids"] == ids[0].tolist()
    for threshold in (None, 0.5):
        settings = {"max_new_tokens": 32, "confidence_threshold": threshold, "eos_token_id": None}
        one, other = model.generate(ids, **settings), theirs.model.generate(ids, **settings)
        assert one[0].tolist() == other[0].tolist()
        assert one.shape == (1, ids.shape[1] + 32)


REAL: dict[str, Callable[[], Path]] = {
    "qwen2": assets.qwen3_tokenizer,
    "llama-bpe": assets.llama3_tokenizer,
    "default": assets.llama2_tokenizer,
}


@pytest.mark.parametrize("pre", REAL)
def test_engine_cuts_text_as_real_tokenizers_do(pre: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(REAL[pre]())
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    theirs = engine_of(tokenizer, tmp_path / "a.gguf")
    for text in SAMPLES:
        # Llama 2 begins a text that begins with spaces otherwise: see serving/gguf_tokens.py.
        cut = text.lstrip() if pre == "default" else text
        assert theirs.tokenize(cut) == tokenizer(cut)["input_ids"], text
