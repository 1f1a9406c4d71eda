"""A dequantised GGUF file is, bit for bit, what transformers loads; memory stays bounded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from factory import TOKENIZERS
from safetensors.torch import load_file

from dllm_convert.errors import DataError
from dllm_convert.source.from_gguf import dequantise

FAMILIES = ("llama", "qwen2", "qwen3")
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_1", "Q5_0")
HIDDEN, WIDE, LAYERS, HEADS, KEYS = 64, 96, 2, 4, 2


def write_gguf(path: Path, family: str, kind: str, *, tied: bool = False) -> Path:
    """Write a tiny model of `family` with matrices of type `kind`, as llama.cpp lays it out."""
    tokenizer = TOKENIZERS[family]()
    # llama.cpp knows Mistral as Llama; transformers tells them apart by general.name.
    writer = gguf.GGUFWriter(path, "llama" if family == "mistral" else family)
    writer.add_name(family)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDE)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    vocab = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([text for text, _ in vocab])
    special = set(tokenizer.all_special_ids)
    writer.add_token_types([3 if row in special else 1 for _, row in vocab])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(m) if isinstance(m, list) else m for m in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    random, quantised = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape, dtype=np.float32)
        if len(shape) == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            stored = gguf.quants.quantize(values, quantised)
            writer.add_tensor(name, stored, raw_dtype=quantised)

    # transformers reads no head size from the file, and Qwen3's is 128 by default.
    head = 128 if family == "qwen3" else HIDDEN // HEADS
    add("token_embd.weight", len(vocab), HIDDEN)
    for layer in range(LAYERS):
        for part, rows in (("q", HEADS), ("k", KEYS), ("v", KEYS)):
            add(f"blk.{layer}.attn_{part}.weight", rows * head, HIDDEN)
            if family == "qwen2":
                add(f"blk.{layer}.attn_{part}.bias", rows * head)
            if family == "qwen3" and part != "v":
                add(f"blk.{layer}.attn_{part}_norm.weight", head)
        add(f"blk.{layer}.attn_output.weight", HIDDEN, HEADS * head)
        add(f"blk.{layer}.ffn_gate.weight", WIDE, HIDDEN)
        add(f"blk.{layer}.ffn_up.weight", WIDE, HIDDEN)
        add(f"blk.{layer}.ffn_down.weight", HIDDEN, WIDE)
        add(f"blk.{layer}.attn_norm.weight", HIDDEN)
        add(f"blk.{layer}.ffn_norm.weight", HIDDEN)
    add("output_norm.weight", HIDDEN)
    if not tied:
        add("output.weight", len(vocab), HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_transformers(path: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        dtype=dtype,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )


def equal_to_transformers(path: Path, out: Path, dtype: torch.dtype) -> None:
    model = by_transformers(path, dtype)
    expected, found = model.state_dict(), load_file(out / "model.safetensors")
    tied = set(model.all_tied_weights_keys)
    assert found.keys() == expected.keys() - tied
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype == dtype
        assert torch.equal(tensor, expected[name]), name
    model.save_pretrained(out.parent / "reference")
    ours, theirs = (
        json.loads((folder / "config.json").read_text())
        for folder in (out, out.parent / "reference")
    )
    theirs.pop("quantization_config", None)
    assert ours == theirs
    _, info = type(model).from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


@pytest.mark.parametrize(
    ("family", "kind", "tied"),
    [
        *((family, "Q4_1", False) for family in FAMILIES),
        *(("llama", kind, True) for kind in TYPES),
        ("qwen2", "F16", True),
    ],
)
def test_equal_to_transformers(family: str, kind: str, tied: bool, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", family, kind, tied=tied)
    (tmp_path / "out").mkdir()
    dequantise(path, tmp_path / "out", family)
    half = torch.bfloat16 if kind in ("F16", "BF16") else torch.float32
    equal_to_transformers(path, tmp_path / "out", half)


def test_a_mistral_has_the_tensors_of_its_llama(tmp_path: Path) -> None:
    """Transformers itself refuses a file that says it is one: the gguf package has no such name."""
    for family in ("mistral", "llama"):
        (tmp_path / family).mkdir()
        path = write_gguf(tmp_path / f"{family}.gguf", family, "Q8_0")
        dequantise(path, tmp_path / family, "llama")
    mistral, llama = (
        load_file(tmp_path / family / "model.safetensors") for family in ("mistral", "llama")
    )
    assert mistral.keys() == llama.keys()
    rows = min(len(m["model.embed_tokens.weight"]) for m in (mistral, llama))
    assert rows > 300
    config = json.loads((tmp_path / "mistral" / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert torch.equal(
        mistral["model.embed_tokens.weight"][:rows], llama["model.embed_tokens.weight"][:rows]
    )


def test_rows_in_several_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dllm_convert.source.from_gguf._VALUES_AT_ONCE", 5 * HIDDEN)
    path = write_gguf(tmp_path / "m.gguf", "llama", "Q8_0")
    (tmp_path / "out").mkdir()
    dequantise(path, tmp_path / "out", "llama")
    equal_to_transformers(path, tmp_path / "out", torch.float32)


def test_a_tensor_that_is_missing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", "F32")
    whole = path.read_bytes()
    (tmp_path / "out").mkdir()
    path.write_bytes(whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_qq"))
    with pytest.raises(DataError, match=r"no tensor for model\.layers\.1\.mlp\.up_proj\.weight"):
        dequantise(path, tmp_path / "out", "llama")


def test_a_shape_that_the_config_does_not_give(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", "llama", "F32")
    key = b"llama.feed_forward_length"
    whole = bytearray(path.read_bytes())
    at = whole.index(key) + len(key) + 4
    whole[at : at + 4] = (WIDE * 2).to_bytes(4, "little")
    path.write_bytes(whole)
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match=r"blk\.0\.ffn_\w+\.weight has shape"):
        dequantise(path, tmp_path / "out", "llama")
