"""Planted faults that only the device that will be used has: here a type that nothing else runs in.

What runs in float32 on the CPU is sound throughout, and says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from planting import failed
from transformers import AttentionInterface

import dllm_convert as dc
from dllm_convert.errors import RequestError
from dllm_convert.modeling.published.cache import BlockCache
from dllm_convert.modeling.published.modeling import DiffusionMixin
from dllm_convert.training import cpu_attention
from dllm_convert.verification import GROUPS, run, verify_checkpoint
from dllm_convert.verification.accelerator import HOST, Accelerator, accelerator_here, asked_for
from dllm_convert.verification.catalogue import DEVICE

THERE = Accelerator("cpu", "bfloat16")
BOTH = ["attention", "gradient", "training", "cache", "padding", "batch", "generate", "device"]
Attend = Callable[..., tuple[torch.Tensor, Any]]


def found_wrong(folder: Any) -> set[str]:
    return failed(folder, BOTH, accelerator=THERE)


def attending(
    monkeypatch: pytest.MonkeyPatch, change: Callable[..., Any], *, training: bool = False
) -> None:
    """Let the attention that decodes, or the one that trains, do something else in bfloat16."""
    real: Attend = AttentionInterface()["sdpa"]
    if training:
        real = cpu_attention.tiled_attention_forward

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
        if query.dtype != torch.bfloat16:
            return real(module, query, key, value, mask, **rest)
        return change(partial(real, module), query, key, value, mask, **rest)

    if training:
        # It is registered anew whenever it is asked for.
        monkeypatch.setattr(cpu_attention, "tiled_attention_forward", attend)
    else:
        monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attend)


def forgets_the_mask(real: Attend, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
    return real(query, key, value, None if mask is None else torch.ones_like(mask), **rest)


def is_causal(real: Attend, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
    seen = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
    return real(query, key, value, seen.tril(key.shape[2] - query.shape[2])[None, None], **rest)


def adds_a_tenth(real: Attend, *inputs: Any, **rest: Any) -> Any:
    output, weights = real(*inputs, **rest)
    return output * 1.1, weights


def lets_through_a_thousandth(
    real: Attend, query: Any, key: Any, value: Any, mask: Any, **rest: Any
) -> Any:
    output, weights = real(query, key, value, mask, **rest)
    open_to_all, _ = forgets_the_mask(real, query, key, value, mask, **rest)
    # As a finite penalty in the place of minus infinity does.
    return output + open_to_all / 50, weights


@pytest.mark.parametrize(
    ("fault", "names"),
    [
        (forgets_the_mask, {"device-attention", "device-gradient", "device-logits"}),
        (lets_through_a_thousandth, {"device-attention", "device-gradient"}),
        (is_causal, {"device-gradient", "device-logits"}),
        (adds_a_tenth, {"device-logits"}),
    ],
)
def test_a_kernel_that_decodes_is_wrong(
    llama: Any, monkeypatch: pytest.MonkeyPatch, fault: Callable[..., Any], names: set[str]
) -> None:
    attending(monkeypatch, fault)
    wrong = found_wrong(llama.folder)
    assert wrong >= names
    assert wrong <= set(DEVICE)


def test_a_kernel_is_causal_where_everybody_sees_everybody(
    open_llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    attending(monkeypatch, is_causal)
    wrong = found_wrong(open_llama.folder)
    assert wrong >= {"device-gradient", "device-logits"}
    assert wrong <= set(DEVICE)


@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
def test_a_kernel_that_trains_is_wrong(
    converted: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    attending(monkeypatch, forgets_the_mask, training=True)
    wrong = found_wrong(converted("llama", target).folder)
    assert wrong == {"device-training", "device-training-gradient"}


def test_a_kernel_is_wrong_backwards(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Straight(torch.autograd.Function):
        """Gives every key a gradient."""

        @staticmethod
        def forward(ctx: Any, output: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            ctx.shape = value.shape
            return output.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0], gradients[0].mean().expand(ctx.shape)

    def straight(real: Attend, query: Any, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
        output, weights = real(query, key, value, mask, **rest)
        return Straight.apply(output, value), weights

    attending(monkeypatch, straight, training=True)
    assert found_wrong(llama.folder) == {"device-training-gradient"}


def test_not_a_number(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def overflows(real: Attend, *inputs: Any, **rest: Any) -> Any:
        output, weights = real(*inputs, **rest)
        return output * torch.inf * 0, weights

    attending(monkeypatch, overflows)
    assert found_wrong(llama.folder) >= {
        *("device-logits", "device-attention", "device-gradient", "device-cache"),
        *("device-padding-left", "device-padding-right", "device-batch"),
    }


def test_a_type_that_ruins_the_model_everywhere(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DiffusionMixin.forward

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        output = real(self, *inputs, **options)
        if self.dtype == torch.bfloat16:
            output.logits = output.logits.roll(1, -1)
        return output

    monkeypatch.setattr(DiffusionMixin, "forward", forward)
    assert found_wrong(llama.folder) >= {"device-logits"}


def in_bfloat16(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, Any], None]) -> None:
    """Let a forward of the model put out something else in bfloat16."""
    real = DiffusionMixin.forward

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        output = real(self, *inputs, **options)
        if self.dtype == torch.bfloat16 and self.config._attn_implementation == "sdpa":
            bound = inspect.signature(real).bind(self, *inputs, **options).arguments
            change(bound, output)
        return output

    monkeypatch.setattr(DiffusionMixin, "forward", forward)


def test_neighbours_in_the_batch_leak(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def mix(_: Any, output: Any) -> None:
        if output.logits.dim() == 3:
            output.logits = output.logits + output.logits.mean(0, keepdim=True)

    in_bfloat16(monkeypatch, mix)
    wrong = found_wrong(llama.folder)
    assert {"device-batch", "device-padding-left", "device-padding-right"} <= wrong <= set(DEVICE)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_attended(llama: Any, monkeypatch: pytest.MonkeyPatch, side: str) -> None:
    real = DiffusionMixin.forward

    def forward(self: Any, *inputs: Any, attention_mask: Any = None, **options: Any) -> Any:
        if self.dtype == torch.bfloat16 and attention_mask is not None:
            padded = attention_mask.dim() == 2 and bool((attention_mask == 0).any())
            at = 0 if side == "left" else -1
            if padded and bool((attention_mask[:, at] == 0).any()):
                attention_mask = torch.ones_like(attention_mask)
        return real(self, *inputs, attention_mask=attention_mask, **options)

    monkeypatch.setattr(DiffusionMixin, "forward", forward)
    wrong = found_wrong(llama.folder)
    assert f"device-padding-{side}" in wrong
    assert wrong <= {f"device-padding-{side}", "device-generate", "device-generate-end"}


def test_a_cache_loses_a_token(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = BlockCache.update

    def update(self: Any, keys: Any, values: Any, *rest: Any, **options: Any) -> Any:
        seen_keys, seen_values = real(self, keys, values, *rest, **options)
        if keys.dtype == torch.bfloat16 and seen_keys.shape[-2] > keys.shape[-2]:
            seen_values = seen_values.clone()
            seen_values[..., 0, :] = 0
        return seen_keys, seen_values

    monkeypatch.setattr(BlockCache, "update", update)
    assert found_wrong(llama.folder) == {"device-cache"}


def test_denoising_changes_the_cache(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def dirty(arguments: Any, _: Any) -> None:
        cache = arguments.get("past_key_values") or arguments.get("kwargs", {}).get(
            "past_key_values"
        )
        if cache is not None and cache.frozen and cache.layers and cache.get_seq_length():
            cache.layers[0].values[..., 0, 0] += 1

    in_bfloat16(monkeypatch, dirty)
    wrong = found_wrong(llama.folder)
    assert "device-cache-clean" in wrong
    assert wrong <= set(DEVICE)


def test_decoding_changes_the_prompt_and_runs_past_the_end(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = DiffusionMixin.generate

    def generate(self: Any, *arguments: Any, **options: Any) -> Any:
        if self.dtype == torch.bfloat16:
            options["eos_token_id"] = []
        output = real(self, *arguments, **options)
        if self.dtype == torch.bfloat16:
            output[:, 0] += 1
        return output

    monkeypatch.setattr(DiffusionMixin, "generate", generate)
    assert found_wrong(llama.folder) == {"device-generate", "device-generate-end"}


def test_rows_that_the_kernel_adds_up_in_another_order_are_no_leak(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def shaken(_: Any, output: Any) -> None:
        if output.logits.dim() == 3:
            rows = torch.arange(len(output.logits)) % 2
            output.logits = output.logits + rows[:, None, None] * 2**-6

    in_bfloat16(monkeypatch, shaken)
    report = verify_checkpoint(
        llama.folder, groups=["files", "device"], accelerator=THERE, untrained=True
    )
    assert report.passed, report.failed
    probe = {probe.name: probe for probe in report.probes}["device-attention"]
    assert "more than 0," not in probe.required


# Where it runs -------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["mdlm", "bd3lm"])
@pytest.mark.parametrize("family", ["bert", "roberta", "llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_sound_checkpoint_raises_no_alarm(
    converted_cache: Callable[..., Any], family: str, target: str, dtype: str
) -> None:
    if target == "bd3lm" and family in ("bert", "roberta"):
        pytest.skip("encoders have no blocks")
    folder = converted_cache(family, target).folder
    where = replace(THERE, dtype=dtype)
    report = verify_checkpoint(
        folder, groups=["files", "device"], accelerator=where, untrained=True
    )
    assert report.passed, report.failed
    found = {probe.name: probe for probe in report.probes if probe.name.startswith("device")}
    assert list(found) == list(DEVICE)
    assert all(found[name].origin == entry.origin for name, entry in DEVICE.items())
    assert all(p.measured.startswith(f"cpu, {dtype}: ") for p in found.values() if p.passed)
    assert {name for name, probe in found.items() if probe.passed is None} == (
        set() if target == "bd3lm" else {"device-attention", "device-cache", "device-cache-clean"}
    )


def test_without_an_accelerator_nothing_is_added(llama: Any) -> None:
    report = verify_checkpoint(llama.folder, groups=["files"], untrained=True)
    names = {probe.name for probe in report.probes}
    assert not any(name.startswith("device") for name in names)
    # A group that was not asked for is one line, but this one and that of gated models.
    assert set(GROUPS) - {"device", "gated", "behind", "lossless", "files"} <= names


def test_a_gpu_is_looked_at_unasked(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(
        run._GROUPS, "device", run._Group(lambda subject: seen.append(subject) or [])
    )
    verify_checkpoint(llama.folder, groups=["files", "device"], untrained=True)
    verify_checkpoint(llama.folder, groups=["files", "device"], accelerator=THERE, untrained=True)
    assert [subject.accelerator for subject in seen] == [Accelerator("cuda", "bfloat16"), THERE]
    assert [subject.runs_on for subject in seen] == [HOST, HOST]


def test_a_model_that_the_device_cannot_hold_is_skipped(
    llama: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (1000, 1 << 40))
    there = Accelerator("cuda", "bfloat16")
    report = verify_checkpoint(
        llama.folder, groups=["files", "device"], accelerator=there, untrained=True
    )
    probe = report.probes[-1]
    assert (probe.name, probe.passed) == ("device", None)
    assert "in bfloat16 needs" in probe.detail
    assert "1e+03 B are free" in probe.detail


def test_what_is_asked_for_in_python(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = run.verify_checkpoint

    def verify(*arguments: Any, accelerator: Any, **options: Any) -> Any:
        asked.append(accelerator)
        return real(*arguments, **{**options, "groups": ["files"]})

    monkeypatch.setattr(run, "verify_checkpoint", verify)
    dc.verify(llama.folder)
    dc.verify(llama.folder, device="cpu", dtype="bfloat16")
    dc.verify(llama.folder, dtype="float16")
    assert asked == [None, THERE, Accelerator("cpu", "float16")]
    assert asked_for(None, None) is None
    assert accelerator_here() in (None, Accelerator("cuda", "bfloat16"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": "int8"}, "dtype is 'int8', expected one of bfloat16, float16, float32"),
        ({"dtype": "nonsense"}, "dtype is 'nonsense'"),
        ({"device": "nowhere"}, "device is 'nowhere', which does not work here"),
        ({"device": "cuda:99"}, "device is 'cuda:99', which does not work here"),
        ({"device": "meta"}, "device is 'meta', which holds no numbers"),
        ({"device": "cpu", "files": True}, "leave `files` out"),
    ],
    ids=str,
)
def test_a_device_that_is_none(llama: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError) as raised:
        dc.verify(llama.folder, **options)
    assert said in str(raised.value)


def test_every_probe_of_the_device_has_a_fault_that_it_catches() -> None:
    from pathlib import Path

    text = Path(__file__).read_text(encoding="utf-8")
    quoted = [name for name in DEVICE if f'"{name}"' not in text]
    assert [name for name in quoted if not name.startswith("device-padding")] == []
