"""Planted faults in how the model runs: each is caught, by the probe that is there for it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factory import FAMILIES
from planting import edit_json, edit_tensors, failed, failing_report
from torch.nn.attention.flex_attention import create_block_mask

from dllm_convert.adapters import get_adapter
from dllm_convert.common.manifest import write_manifest
from dllm_convert.diffusion.attention import CLEAN, UNUSED, StreamMask
from dllm_convert.modeling.published.modeling import DiffusionMixin

# Every family --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_left_causal(converted: Callable[..., Any], family: str) -> None:
    made = converted(family, "mdlm")
    # Encoders are causal as decoders only; decoders do not know the field.
    edit_json(made.folder, "config.json", is_causal=True, is_decoder=True)
    names = failed(made.folder, ["attention", "gradient"])
    expected = {"attention-sdpa", "gradient", "gradient-layers"}
    if family != "modernbert":  # there only sdpa, without a mask, asks whether it is causal
        expected |= {"attention-eager", "attention-layers", "attention-flex"}
    assert names == expected


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_faults_in_the_weights_of_every_family(converted: Callable[..., Any], family: str) -> None:
    made = converted(family, "mdlm")
    embedding = get_adapter(family).embedding
    mask = json.loads((made.folder / "config.json").read_text())["mask_token_id"]

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[embedding][mask].zero_()
        tensors[embedding][mask - 1, 0] += 1e-3
        next(value for name, value in tensors.items() if "norm" in name.lower())[0] = torch.nan

    edit_tensors(made.folder, spoil)
    names = failed(made.folder, ["files", "tokens"], against=made.base)
    assert names == {"finite", "mask-row"}
    edit_tensors(made.folder, lambda t: [value.nan_to_num_(1.0) for value in t.values()])
    assert "base-tensors" in failed(made.folder, ["base"], against=made.base)


# Attention implementations -------------------------------------------------------------------


def test_flex_attention_left_causal(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_convert.modeling.published import modeling

    real = modeling.create_block_mask

    def causal(rule: Any, *rest: Any, **options: Any) -> Any:
        return real(lambda b, h, q, k: rule(b, h, q, k) & (k <= q), *rest, **options)

    monkeypatch.setattr(modeling, "create_block_mask", causal)
    names = failed(llama.folder, ["attention", "gradient", "batch"])
    assert names == {"attention-flex", "implementations"}


def test_eager_attention_without_its_mask(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = DiffusionMixin._in_form

    def forget(self: Any, mask: Any) -> Any:
        found = real(self, mask)
        return found * 0 if self.config._attn_implementation == "eager" else found

    monkeypatch.setattr(DiffusionMixin, "_in_form", forget)
    names = failed(llama.folder, ["attention", "gradient", "batch"])
    assert names == {"attention-eager", "attention-layers", "gradient-layers", "implementations"}


def test_window_left_on_one_layer_type(converted: Callable[..., Any]) -> None:
    made = converted("qwen2", "bd3lm")
    edit_json(
        made.folder,
        "config.json",
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention"],
    )
    # Block-causal masks are given whole; only the config still speaks of the window.
    assert failed(made.folder, ["files", "attention", "gradient"]) == {"config"}
    open_made = converted("qwen2", "mdlm")
    edit_json(
        open_made.folder,
        "config.json",
        use_sliding_window=True,
        sliding_window=3,
        layer_types=["full_attention", "sliding_attention"],
    )
    names = failed(open_made.folder, ["files", "attention", "gradient"])
    assert names == {"config", "attention-layers", "gradient-layers"}


# Training's forward --------------------------------------------------------------------------


class Mistaken:
    """Stands in for the rule that a mask becomes."""

    def __init__(self, mask: StreamMask, allows: Callable[..., Any]) -> None:
        self._allows = allows
        for name in ("streams", "blocks", "segments", "positions"):
            setattr(self, name, getattr(mask, name))

    def to(self, device: torch.device) -> Mistaken:
        return self

    def dense(self, first: int = 0) -> torch.Tensor:
        rows, width = self.streams.shape
        index = torch.arange(width)
        row = torch.arange(rows)[:, None, None]
        mask: torch.Tensor = self._allows(self, row, index[None, :, None], index[None, None])
        return mask[:, first:].unsqueeze(1)

    def block_mask(self, device: torch.device | None = None, first: int = 0) -> Any:
        rows, width = self.streams.shape
        return create_block_mask(
            lambda b, _, q, k: self._allows(self, b, q + first, k),
            *(rows, None, width - first, width),
            device="cpu",
        )

    streams: torch.Tensor
    blocks: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor


def rule(
    *,
    own_clean: bool = False,
    later_clean: bool = False,
    clean_sees_noise: bool = False,
    other_documents: bool = False,
    everybody: bool = False,
) -> property:
    """Return the rule of training's mask with one mistake in it."""

    def allows(self: Any, row: Any, query: Any, key: Any) -> Any:
        stream, own_stream = self.streams[row, key], self.streams[row, query]
        block, own_block = self.blocks[row, key], self.blocks[row, query]
        before = block <= own_block if own_clean else block < own_block
        if later_clean:
            before = before | (block > own_block)
        seen = ((stream == CLEAN) & before) | ((stream == own_stream) & (block == own_block))
        if clean_sees_noise:
            seen = seen | ((own_stream == CLEAN) & (block == own_block))
        same = self.segments[row, key] == self.segments[row, query]
        if other_documents:
            same = same | (self.segments[row, key] >= 0)
        real = (stream != UNUSED) & (self.segments[row, key] >= 0)
        if everybody:
            return real | (query == key)
        return (seen & same & real) | (query == key)

    return property(lambda mask: Mistaken(mask, allows))


TRAINING = {"training-mask", "training-influence", "packed"}


@pytest.mark.parametrize(
    ("mistake", "names"),
    [
        ({"own_clean": True}, TRAINING),
        ({"later_clean": True}, TRAINING),
        ({"other_documents": True}, TRAINING),
        ({"clean_sees_noise": True}, TRAINING),
    ],
    ids=lambda value: "-".join(sorted(value)),
)
def test_noisy_block_sees_too_much(
    llama: Any, monkeypatch: pytest.MonkeyPatch, mistake: dict[str, bool], names: set[str]
) -> None:
    monkeypatch.setattr(StreamMask, "rule", rule(**mistake))
    assert failed(llama.folder, ["training"]) == names


def test_the_rule_without_a_mistake(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_convert.verification import verify_checkpoint

    monkeypatch.setattr(StreamMask, "rule", rule())
    assert verify_checkpoint(llama.folder, groups=["training"], untrained=True).passed


def test_packed_documents_of_mdlm_see_each_other(
    open_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StreamMask, "rule", rule(everybody=True))
    assert failed(open_llama.folder, ["training"]) == TRAINING


@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
def test_predictions_read_one_position_off(
    converted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    from dllm_convert.verification.probes import training_forward

    real = training_forward.predict

    def late(*arguments: Any, **options: Any) -> Any:
        forward = real(*arguments, **options)
        at = (forward.inputs["logits_at"] + 1) % forward.inputs["input_ids"].numel()
        return replace(forward, inputs={**forward.inputs, "logits_at": at})

    monkeypatch.setattr(training_forward, "predict", late)
    assert failed(converted("llama", target).folder, ["training"]) == {"packed"}


def test_positions_that_run_on_in_the_next_document(
    converted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from dllm_convert.verification.probes import training_forward

    real = training_forward.predict

    def run_on(batch: Any, *arguments: Any, **options: Any) -> Any:
        forward = real(batch, *arguments, **options)
        places = torch.arange(batch.tokens.shape[1])[None]
        return replace(forward, inputs={**forward.inputs, "position_ids": places})

    monkeypatch.setattr(training_forward, "predict", run_on)
    # Rotary positions are relative; absolute ones show that they start elsewhere.
    assert failed(converted("bert", "mdlm").folder, ["training"]) == {"packed"}


# Batches, portability, decoding --------------------------------------------------------------


def test_neighbours_in_the_batch_leak(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = DiffusionMixin.forward

    def mix(self: Any, *arguments: Any, **options: Any) -> Any:
        output = real(self, *arguments, **options)
        if output.logits.dim() == 3:
            output.logits = output.logits + output.logits.mean(0, keepdim=True) / 100
        return output

    monkeypatch.setattr(DiffusionMixin, "forward", mix)
    assert failed(llama.folder, ["batch"]) == {"batch"}


def edit_code(folder: Path, *changes: tuple[str, str]) -> None:
    path = folder / "modeling_dllm.py"
    source = path.read_text()
    for old, new in changes:
        assert old in source
        source = source.replace(old, new)
    path.write_text(source)


@pytest.mark.parametrize(
    ("minimum", "refusal", "passed"),
    [
        ("5.2.0", "transformers 5.1.9 would run it causal; it needs at least 5.2.0", True),
        ("5.2.0", "", False),
        ("5.2.0", "no module named nowhere", False),
        ("4.40.0", "it needs at least 4.40.0", False),
        ("newest", "it needs the newest", False),
        (None, "", False),
    ],
)
def test_what_modelling_code_asks_for(minimum: str | None, refusal: str, passed: bool) -> None:
    from dllm_convert.adapters import get_adapter
    from dllm_convert.verification.probes.portability import judge_version

    facts = {"minimum": minimum, "older": "5.1.9", "refusal": refusal}
    probe = judge_version(get_adapter("llama"), facts)
    assert (probe.name, probe.passed) == ("portable-version", passed)


def test_code_that_computes_what_the_stock_class_does_not(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DiffusionMixin.forward

    def louder(self: Any, *arguments: Any, **options: Any) -> Any:
        output = real(self, *arguments, **options)
        output.logits = output.logits * 1.01
        return output

    monkeypatch.setattr(DiffusionMixin, "forward", louder)
    head = "logits=self._logits_of(hidden)"
    edit_code(llama.folder, (head, f"{head} * 1.01"))
    assert failed(llama.folder, ["portability"], trust_remote_code=True) == {"portable-stock"}


def test_modelling_code_that_lets_an_older_transformers_through(llama: Any) -> None:
    edit_code(llama.folder, ("raise ImportError(", "ImportError("))
    report = failing_report(llama.folder, ["portability"], trust_remote_code=True)
    assert [probe.name for probe in report.failed] == ["portable-version"]
    assert "5.1.9 is let through" in report.failed[0].detail


def decoding_with(monkeypatch: pytest.MonkeyPatch, change: Callable[..., tuple[Any, Any]]) -> None:
    """Decode with what `change` makes of the prompts' lengths and the options."""
    from dllm_convert.modeling.published import modeling

    for name in ("decode_blocks", "decode_canvas"):
        real = getattr(modeling, name)

        def decode(
            model: Any, prompts: Any, lengths: Any, options: Any, *rest: Any, _real: Any = real
        ) -> Any:
            lengths, options = change(lengths, options)
            return _real(model, prompts, lengths, options, *rest)

        monkeypatch.setattr(modeling, name, decode)


@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
def test_decoding_runs_past_the_end(
    converted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    decoding_with(monkeypatch, lambda n, options: (n, replace(options, eos_token_ids=())))
    assert failed(converted("llama", target).folder, ["generate"]) == {"generate-end"}


@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
def test_padding_counts_as_prompt(
    converted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    decoding_with(monkeypatch, lambda n, options: (torch.full_like(n, int(n.max())), options))
    assert failed(converted("llama", target).folder, ["generate"]) == {"generate-batch"}


def test_prompt_comes_back_changed(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = DiffusionMixin.generate

    def generate(self: Any, *arguments: Any, **options: Any) -> Any:
        output = real(self, *arguments, **options)
        output[:, 0] += 1
        return output

    monkeypatch.setattr(DiffusionMixin, "generate", generate)
    assert failed(llama.folder, ["generate"]) == {"generate"}


# Quality -------------------------------------------------------------------------------------


def test_shift_flag_wrong(llama: Any) -> None:
    write_manifest(llama.folder, {"recipe": {"token_shift": "keep"}})
    section = json.loads((llama.folder / "config.json").read_text())["diffusion"]
    edit_json(llama.folder, "config.json", diffusion={**section, "token_shift": False})
    assert failed(llama.folder, ["likelihood"]) == {"token-shift"}


def test_an_encoder_has_no_shift_to_keep(converted: Callable[..., Any]) -> None:
    from dllm_convert.verification import verify_checkpoint

    made = converted("bert", "mdlm")
    write_manifest(made.folder, {"recipe": {"token_shift": "keep"}})
    report = verify_checkpoint(made.folder, groups=["likelihood"], untrained=False)
    assert [probe.passed for probe in report.probes if probe.name == "token-shift"] == [True]


def test_shift_flag_wrong_without_a_manifest(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_convert.diffusion.likelihood import Likelihood
    from dllm_convert.verification.probes import likelihood

    def measured(model: Any, batches: Any, objective: Any, **options: Any) -> Likelihood:
        if objective.block_size == 1:
            return real(model, batches, objective, **options)
        return Likelihood(4.0 if objective.token_shift else 6.0, 0.1, 100)

    real = likelihood.nelbo
    monkeypatch.setattr(likelihood, "nelbo", measured)
    section = json.loads((llama.folder / "config.json").read_text())["diffusion"]
    edit_json(llama.folder, "config.json", diffusion={**section, "token_shift": False})
    names = failed(llama.folder, ["likelihood"], untrained=False)
    assert names == {"token-shift"}


def test_blocks_of_one_read_beside_the_base(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from dllm_convert.diffusion import likelihood

    real = likelihood.predict

    def late(*arguments: Any, **options: Any) -> Any:
        forward = real(*arguments, **options)
        at = (forward.inputs["logits_at"] + 1) % forward.inputs["input_ids"].numel()
        return replace(forward, inputs={**forward.inputs, "logits_at": at})

    monkeypatch.setattr(likelihood, "predict", late)
    assert failed(llama.folder, ["likelihood"]) == {"block-one"}


# The list ------------------------------------------------------------------------------------


def test_every_probe_has_a_fault_that_it_catches() -> None:
    from dllm_convert.verification.catalogue import CATALOGUE

    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_faults*.py"))
    assert [name for name in CATALOGUE if f'"{name}"' not in tests] == []
