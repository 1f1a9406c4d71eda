"""Planted faults: each is caught, by the probe that is there for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from planting import EMBEDDING, WEIGHTS, edit_json, edit_tensors, failed, failing_report

from dllm_convert.common.manifest import hash_files, write_manifest
from dllm_convert.modeling.bundle import CODE_FILES
from dllm_convert.verification import verify_checkpoint

ATTENTION = {
    *("attention-sdpa", "attention-eager", "attention-flex", "attention-layers"),
    *("gradient", "gradient-layers"),
}


# Files ---------------------------------------------------------------------------------------


def test_truncated_weights(llama: Any) -> None:
    path = llama.folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    assert failed(llama.folder, ["files"]) == {"weights"}


def test_nothing_runs_on_weights_that_cannot_be_read(llama: Any) -> None:
    (llama.folder / WEIGHTS).write_bytes(b"not safetensors at all")
    report = verify_checkpoint(llama.folder, untrained=True)
    assert {probe.name for probe in report.failed} == {"weights"}
    assert not any(probe.passed for probe in report.probes if probe.name not in {"config"})
    assert all("weights failed" in p.detail for p in report.probes if p.name == "attention")


def test_missing_shard(converted: Callable[..., Any]) -> None:
    made = converted("llama", "bd3lm", shards=3)
    (made.folder / "model-00002-of-00003.safetensors").unlink()
    assert failed(made.folder, ["files"]) == {"weights"}


def test_swapped_shards(converted: Callable[..., Any]) -> None:
    made = converted("llama", "bd3lm", shards=3)
    one, two = (made.folder / f"model-0000{n}-of-00003.safetensors" for n in (1, 2))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    assert failed(made.folder, ["files"]) == {"weights"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_value_that_is_not_finite(llama: Any, value: float) -> None:
    edit_tensors(llama.folder, lambda t: t["model.norm.weight"].fill_(value))
    assert failed(llama.folder, ["files"]) == {"finite"}


def test_missing_tensor(llama: Any) -> None:
    edit_tensors(llama.folder, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    assert failed(llama.folder, ["files"]) == {"weights"}


def test_missing_head_of_an_untied_model(llama: Any) -> None:
    edit_tensors(llama.folder, lambda t: t.pop("lm_head.weight"))
    assert failed(llama.folder, ["files"]) == {"weights"}


def test_stray_tensor(llama: Any) -> None:
    edit_tensors(llama.folder, lambda t: t.update({"model.layers.9.stray": torch.ones(2)}))
    assert failed(llama.folder, ["files"]) == {"weights"}


def test_config_with_more_rows_than_the_weights(llama: Any) -> None:
    edit_json(llama.folder, "config.json", vocab_size=512)
    assert failed(llama.folder, ["files"]) == {"weights"}


def test_tied_head_stored_out_of_date(converted: Callable[..., Any]) -> None:
    made = converted("llama", "bd3lm", tied=True)
    edit_tensors(made.folder, lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}))
    assert failed(made.folder, ["files"]) == {"weights"}


def test_one_flipped_bit(llama: Any) -> None:
    write_manifest(llama.folder, {"format_version": 1, "files": hash_files(llama.folder)})
    path = llama.folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert failed(llama.folder, ["files"]) == {"hashes"}


def test_one_flipped_bit_against_the_base(llama: Any) -> None:
    path = llama.folder / WEIGHTS
    data = bytearray(path.read_bytes())
    data[-4] ^= 1
    path.write_bytes(data)
    assert "base-tensors" in failed(llama.folder, ["base"], against=llama.base)


def test_file_of_the_manifest_is_gone(llama: Any) -> None:
    write_manifest(llama.folder, {"format_version": 1, "files": hash_files(llama.folder)})
    (llama.folder / "LICENSE").unlink()
    assert failed(llama.folder, ["files"]) == {"hashes"}


def test_manifest_that_names_a_file_outside(llama: Any) -> None:
    write_manifest(llama.folder, {"format_version": 1, "files": {"../outside": "0" * 64}})
    assert failed(llama.folder, ["files"]) == {"hashes"}


def test_architecture_of_the_stock_class(llama: Any) -> None:
    edit_json(llama.folder, "config.json", architectures=["LlamaForCausalLM"])
    assert failed(llama.folder, ["files"]) == {"config"}


# Tokens --------------------------------------------------------------------------------------


def test_zero_mask_row(llama: Any) -> None:
    mask = json.loads((llama.folder / "config.json").read_text())["mask_token_id"]
    edit_tensors(llama.folder, lambda t: t[EMBEDDING][mask].zero_())
    assert failed(llama.folder, ["tokens"]) == {"mask-row"}


def test_mask_id_off_by_one_in_the_generation_config(llama: Any) -> None:
    path = llama.folder / "generation_config.json"
    edit_json(
        llama.folder, path.name, mask_token_id=json.loads(path.read_text())["mask_token_id"] + 1
    )
    assert failed(llama.folder, ["tokens"]) == {"mask-id"}


def test_mask_id_beyond_the_rows(llama: Any) -> None:
    config = json.loads((llama.folder / "config.json").read_text())
    config["diffusion"]["mask_token_id"] = config["mask_token_id"] = config["vocab_size"]
    edit_json(llama.folder, "config.json", **config)
    assert failed(llama.folder, ["tokens"]) == {"mask-id", "mask-row", "tokenizer"}


def test_tokenizer_of_the_base_without_the_mask(llama: Any) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llama.base / name, llama.folder / name)
    assert failed(llama.folder, ["tokens"]) == {"mask-id", "tokenizer"}


def test_tokenizer_larger_than_the_embedding(llama: Any) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(llama.folder)
    tokenizer.add_tokens([f"<extra{number}>" for number in range(100)])
    tokenizer.save_pretrained(llama.folder)
    assert failed(llama.folder, ["tokens"]) == {"tokenizer"}


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "BPE", "vocab": 3}}'])
def test_broken_tokenizer(llama: Any, content: str) -> None:
    (llama.folder / "tokenizer.json").write_text(content)
    assert "tokenizer" in failed(llama.folder, ["tokens", "attention"])


def test_lost_chat_template(llama: Any) -> None:
    (llama.folder / "chat_template.jinja").unlink()
    assert failed(llama.folder, ["tokens"], against=llama.base) == {"chat-template"}


# Attention -----------------------------------------------------------------------------------


def test_causal_flag_left_on(open_llama: Any) -> None:
    edit_json(open_llama.folder, "config.json", is_causal=True)
    names = failed(open_llama.folder, ["files", "attention", "gradient"])
    assert names == {"config", *ATTENTION}


def test_blocks_of_another_size_than_claimed(llama: Any) -> None:
    edit_json(llama.folder, "config.json", block_size=4)
    names = failed(llama.folder, ["files", "attention", "gradient"])
    assert names == {"config", *ATTENTION}


def test_blocks_off_by_one(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_convert.modeling.published import modeling

    real = modeling.block_causal_mask
    monkeypatch.setattr(
        modeling,
        "block_causal_mask",
        lambda positions, *rest: real(positions + 1, *rest),
    )
    names = failed(llama.folder, ["attention", "gradient"])
    assert names == ATTENTION


def test_window_left_closed(converted: Callable[..., Any]) -> None:
    made = converted("mistral", "mdlm")
    edit_json(made.folder, "config.json", sliding_window=4)
    names = failed(made.folder, ["files", "attention"])
    assert {"config", "attention-layers"} <= names


def test_window_too_long_for_any_probe_to_meet(converted: Callable[..., Any]) -> None:
    made = converted("mistral", "mdlm")
    config = json.loads((made.folder / "config.json").read_text())
    del config["sliding_window"]  # absent means 4096
    (made.folder / "config.json").write_text(json.dumps(config))
    assert failed(made.folder, ["files", "attention"]) == {"config"}


def test_one_causal_layer_behind_an_open_one(
    open_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    real = LlamaDecoderLayer.forward

    def forward(self: Any, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
        flex = self.self_attn.config._attn_implementation == "flex_attention"
        if self.self_attn.layer_idx == 1 and not flex:
            length = hidden_states.shape[1]
            closed = torch.full((length, length), torch.finfo(hidden_states.dtype).min).triu(1)
            kwargs["attention_mask"] = closed[None, None]
        return real(self, hidden_states, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", forward)
    # End to end every token still reaches every position, through the layer before.
    names = failed(open_llama.folder, ["attention", "gradient"])
    assert names == {"attention-layers", "gradient-layers"}


# Portability ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CODE_FILES)
def test_modelling_file_missing(llama: Any, name: str) -> None:
    (llama.folder / name).unlink()
    assert failed(llama.folder, ["portability"]) == {"portable"}


def test_modelling_file_that_ignores_the_blocks(llama: Any) -> None:
    path = llama.folder / "modeling_dllm.py"
    source = path.read_text()
    changed = source.replace(
        "block[:, -queries:, None] >= block", "block[:, -queries:, None] > block"
    )
    assert changed != source
    path.write_text(changed)
    assert failed(llama.folder, ["portability"], trust_remote_code=True) == {"portable"}


def test_modelling_file_that_needs_the_package(llama: Any) -> None:
    path = llama.folder / "modeling_dllm.py"
    path.write_text(path.read_text() + "\nfrom dllm_convert import attention\n")
    assert failed(llama.folder, ["portability"], trust_remote_code=True) == {"portable"}


# Parity --------------------------------------------------------------------------------------


def test_untouched_tensor_changed(llama: Any) -> None:
    edit_tensors(llama.folder, lambda t: t["model.layers.1.mlp.up_proj.weight"].mul_(1.01))
    report = failing_report(llama.folder, ["base"], against=llama.base)
    assert {probe.name for probe in report.failed} == {"base-tensors", "base-logits"}
    assert "the first is model.layers.1.mlp.up_proj" in report.failed[-1].detail


def test_another_row_than_the_masks_changed(llama: Any) -> None:
    edit_tensors(llama.folder, lambda t: t[EMBEDDING][7].add_(1))
    assert "base-tensors" in failed(llama.folder, ["base"], against=llama.base)


def test_wrong_rope_theta(llama: Any) -> None:
    config = json.loads((llama.folder / "config.json").read_text())
    rope = {**config["rope_parameters"], "rope_theta": 500.0}
    edit_json(llama.folder, "config.json", rope_parameters=rope)
    names = failed(llama.folder, ["base"], against=llama.base)
    assert names == {"base-config", "base-logits"}
    # Trained weights are not compared; the field is.
    assert failed(llama.folder, ["base"], against=llama.base, untrained=False) == {"base-config"}


def test_base_of_another_shape(llama: Any, source_cache: Callable[..., Path]) -> None:
    other = source_cache("llama", intermediate_size=96)
    names = failed(llama.folder, ["base"], against=other, untrained=False)
    assert names == {"base-config", "base-tensors"}


def test_base_of_another_family(llama: Any, source_cache: Callable[..., Path]) -> None:
    assert failed(llama.folder, ["base"], against=source_cache("bert")) == {"base"}


# Cache, padding, decoding, quality -----------------------------------------------------------


def test_cache_polluted_by_denoising(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import DynamicCache

    from dllm_convert.modeling.published.cache import BlockCache

    monkeypatch.setattr(BlockCache, "update", DynamicCache.update)
    assert "cache-clean" in failed(llama.folder, ["cache"])


def test_cache_that_loses_a_block(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_convert.modeling.published.cache import BlockCache

    real = BlockCache.update

    def update(self: Any, keys: torch.Tensor, values: torch.Tensor, *rest: Any, **kw: Any) -> Any:
        return real(self, keys * 1.01, values, *rest, **kw)

    monkeypatch.setattr(BlockCache, "update", update)
    assert failed(llama.folder, ["cache"]) == {"cache"}


@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
def test_padding_attended(
    converted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    from dllm_convert.modeling.published.modeling import DiffusionMixin

    real = DiffusionMixin._open

    def leak(self: Any, tokens: Any, mask: Any, *rest: Any) -> Any:
        return real(self, tokens, None, *rest)

    monkeypatch.setattr(DiffusionMixin, "_open", leak)
    names = failed(converted("llama", target).folder, ["padding"])
    assert names == {"padding-left", "padding-right"}


def test_mask_left_in_the_output(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_convert.modeling.published import modeling

    real = modeling.decode_blocks

    def decode(model: Any, prompts: Any, lengths: Any, options: Any, *rest: Any) -> Any:
        decoded = real(model, prompts, lengths, options, *rest)
        decoded.rows[0, 0] = options.mask_token_id
        return decoded

    monkeypatch.setattr(modeling, "decode_blocks", decode)
    assert failed(llama.folder, ["generate"]) == {"generate", "generate-batch"}


@pytest.mark.parametrize("after", [8.0, 9.5, float("nan"), float("inf")])
def test_bound_not_lowered_by_training(llama: Any, after: float) -> None:
    quality = {
        "nelbo_before": {"nats_per_token": 8.0},
        "nelbo_after": {"nats_per_token": after},
        "ar_nll": {"nats_per_token": 3.0},
    }
    names = failed(llama.folder, ["quality"], quality=quality, untrained=False)
    assert names == {"quality"}
