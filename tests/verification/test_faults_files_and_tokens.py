"""Planted faults in files and tokenizers: each is caught, by the probe that is there for it."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import EMBEDDING, WEIGHTS, edit_json, edit_tensors, failed, failing_report
from safetensors.torch import load_file, save_file

from dllm_convert.common.manifest import hash_files, write_manifest
from dllm_convert.verification import verify_checkpoint

INDEX = "model.safetensors.index.json"
SHARD = "model-0000{}-of-00003.safetensors"


@pytest.fixture
def sharded(converted: Callable[..., Any]) -> Any:
    return converted("llama", "bd3lm", shards=3)


def read(folder: Path, file: str) -> Any:
    return json.loads((folder / file).read_text())


# Files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model-00004-of-00003.safetensors", "pytorch_model.bin"])
def test_stray_weights(sharded: Any, name: str) -> None:
    shutil.copyfile(sharded.folder / SHARD.format(1), sharded.folder / name)
    report = failing_report(sharded.folder, ["files"])
    assert [(probe.name, name in probe.detail) for probe in report.failed] == [("index", True)]


def test_index_left_beside_a_single_file(sharded: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for number in (1, 2, 3):
        tensors |= load_file(sharded.folder / SHARD.format(number))
    save_file(tensors, sharded.folder / WEIGHTS, metadata={"format": "pt"})
    assert failed(sharded.folder, ["files"]) == {"index"}


@pytest.mark.parametrize("key", ["total_size", "total_parameters"])
def test_index_that_counts_wrong(sharded: Any, key: str) -> None:
    index = read(sharded.folder, INDEX)
    index["metadata"][key] += 2
    edit_json(sharded.folder, INDEX, **index)
    assert failed(sharded.folder, ["files"]) == {"index"}


def test_shard_of_another_save(sharded: Any) -> None:
    name = "model-00003-of-00004.safetensors"
    (sharded.folder / SHARD.format(3)).rename(sharded.folder / name)
    text = (sharded.folder / INDEX).read_text().replace(SHARD.format(3), name)
    (sharded.folder / INDEX).write_text(text)
    assert failed(sharded.folder, ["files"]) == {"index"}


def test_index_without_a_tensor_that_is_there(sharded: Any) -> None:
    index = read(sharded.folder, INDEX)
    del index["weight_map"]["model.norm.weight"]
    (sharded.folder / INDEX).write_text(json.dumps(index))
    assert failed(sharded.folder, ["files"]) == {"weights"}


def test_truncated_shard(sharded: Any) -> None:
    path = sharded.folder / SHARD.format(2)
    path.write_bytes(path.read_bytes()[:-7])
    assert failed(sharded.folder, ["files"]) == {"weights"}


def test_wrong_type_declared(llama: Any) -> None:
    edit_json(llama.folder, "config.json", dtype="bfloat16")
    assert failed(llama.folder, ["files"]) == {"dtypes"}


def test_one_matrix_of_another_type(llama: Any) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(llama.folder, lambda t: t.update({name: t[name].half()}))
    report = failing_report(llama.folder, ["files"])
    assert [(probe.name, name in probe.detail) for probe in report.failed] == [("dtypes", True)]


def test_type_that_the_base_declares_wrong_too(llama: Any, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base, tmp_path / "base"))
    edit_json(base, "config.json", dtype="bfloat16")
    edit_json(llama.folder, "config.json", dtype="bfloat16")
    report = verify_checkpoint(llama.folder, groups=["files"], against=base, untrained=True)
    assert report.passed
    assert failed(llama.folder, ["files"], against=llama.base) == {"dtypes"}


def test_types_that_the_base_mixes(llama: Any, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base, tmp_path / "base"))
    for folder in (base, llama.folder):
        edit_tensors(folder, lambda t: t.update({n: t[n].bfloat16() for n in t if "layers" in n}))
    edit_json(base, "config.json", dtype="float32")
    sizes: Counter[str] = Counter()
    for tensor in load_file(llama.folder / WEIGHTS).values():
        sizes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    edit_json(llama.folder, "config.json", dtype=sizes.most_common(1)[0][0])
    report = verify_checkpoint(llama.folder, groups=["files"], against=base, untrained=True)
    assert report.passed
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(llama.folder, lambda t: t.update({name: t[name].half()}))
    report = verify_checkpoint(llama.folder, groups=["files"], against=base, untrained=True)
    assert "dtypes" in {probe.name for probe in report.failed}


def test_one_flipped_bit_in_the_tokenizer(llama: Any) -> None:
    write_manifest(llama.folder, {"format_version": 1, "files": hash_files(llama.folder)})
    path = llama.folder / "tokenizer.json"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert failed(llama.folder, ["files"]) == {"hashes"}


def test_tie_declared_where_there_is_none(llama: Any) -> None:
    edit_json(llama.folder, "config.json", tie_word_embeddings=True)
    assert failed(llama.folder, ["files"]) == {"weights"}


# Tokens --------------------------------------------------------------------------------------


def set_mask(folder: Path, text: str) -> int:
    """Make a token that the vocabulary has the mask, everywhere."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    mask = tokenizer.convert_tokens_to_ids(text)
    tokenizer.add_special_tokens({"mask_token": text})
    tokenizer.save_pretrained(folder)
    section = {**read(folder, "config.json")["diffusion"], "mask_token_id": mask}
    edit_json(folder, "config.json", mask_token_id=mask, diffusion=section)
    edit_json(folder, "generation_config.json", mask_token_id=mask)
    return int(mask)


@pytest.mark.parametrize("text", ["e", "Ġthe"])
def test_mask_that_text_produces(llama: Any, text: str) -> None:
    set_mask(llama.folder, text)
    assert "mask-text" in failed(llama.folder, ["files", "tokens"])


def test_mask_row_out_of_scale(llama: Any) -> None:
    mask = read(llama.folder, "config.json")["mask_token_id"]
    edit_tensors(llama.folder, lambda t: t[EMBEDDING][mask].fill_(100.0))
    assert failed(llama.folder, ["tokens"]) == {"mask-row"}


def test_changed_chat_template(llama: Any) -> None:
    path = llama.folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|start|>", "<|begin|>"))
    assert failed(llama.folder, ["tokens"], against=llama.base) == {"chat-template"}


def test_changed_special_token(llama: Any) -> None:
    edit_json(llama.folder, "tokenizer_config.json", eos_token="<|start|>")
    # With it, training ends texts at which decoding goes on.
    assert failed(llama.folder, ["tokens"], against=llama.base) == {"special-tokens", "text-end"}


def test_stale_tokenizer(llama: Any) -> None:
    content = read(llama.folder, "tokenizer.json")
    vocabulary = content["model"]["vocab"]
    one, two = sorted(vocabulary, key=vocabulary.get)[300:302]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (llama.folder / "tokenizer.json").write_text(json.dumps(content))
    assert failed(llama.folder, ["tokens"], against=llama.base) == {"special-tokens"}


@pytest.mark.parametrize(
    "change",
    [
        {"eos_token_id": 3},
        {"eos_token_id": 100_000},
        {"block_size": 16},
        {"max_denoising_steps": 0},
        {"confidence_threshold": "high"},
    ],
    ids=str,
)
def test_generation_config_that_disagrees(llama: Any, change: dict[str, Any]) -> None:
    edit_json(llama.folder, "generation_config.json", **change)
    also = {"text-end"} if "eos_token_id" in change else set()
    assert failed(llama.folder, ["tokens"]) == {"generation-config", *also}


# Ends of a text ------------------------------------------------------------------------------


@pytest.mark.parametrize("ends", [None, [], [2], "1", 1.0, [1, "2"]], ids=repr)
def test_decoding_that_does_not_know_the_end_of_training(llama: Any, ends: Any) -> None:
    edit_json(llama.folder, "generation_config.json", eos_token_id=ends)
    assert "text-end" in failed(llama.folder, ["tokens"])


def test_an_end_of_the_base_that_was_lost(llama: Any, tmp_path: Path) -> None:
    base = Path(shutil.copytree(llama.base, tmp_path / "base"))
    edit_json(base, "generation_config.json", eos_token_id=[1, 2])
    report = failing_report(llama.folder, ["tokens"], against=base)
    (probe,) = report.failed
    assert probe.name == "text-end"
    assert "base's generation config (2)" in probe.detail


def test_a_turn_that_ends_otherwise(llama: Any) -> None:
    path = llama.folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("<|end|>", "<|begin|>"))
    assert failed(llama.folder, ["tokens"]) == {"text-end"}


def test_a_tokenizer_that_closes_every_text(llama: Any) -> None:
    content = read(llama.folder, "tokenizer.json")
    (template,) = (step for step in content["post_processor"]["processors"] if "single" in step)
    template["single"].append({"SpecialToken": {"id": "<|end|>", "type_id": 0}})
    template["special_tokens"]["<|end|>"] = {"id": "<|end|>", "ids": [1], "tokens": ["<|end|>"]}
    (llama.folder / "tokenizer.json").write_text(json.dumps(content))
    assert failed(llama.folder, ["tokens"]) == {"text-end"}


def test_mask_that_ends_a_text(llama: Any) -> None:
    mask = read(llama.folder, "config.json")["mask_token_id"]
    ends = [read(llama.folder, "config.json")["eos_token_id"], mask]
    edit_json(llama.folder, "generation_config.json", eos_token_id=ends)
    assert failed(llama.folder, ["tokens"]) == {"generation-config"}
