"""Flex attention in training: losses and gradients of sdpa, in the types it is to run in.

Its kernels are for GPUs, and only they have a backward pass. The operator itself has one
everywhere, so that here torch's own mathematics runs behind the same compiled call.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.flex_attention as flex
from torch.utils.checkpoint import CheckpointPolicy
from transformers import Qwen2Config

from dllm_convert.adapters import get_adapter
from dllm_convert.modeling.published.modeling import DiffusionQwen2ForCausalLM
from dllm_convert.planning.estimate import has_flex
from dllm_convert.recipe.schema import Recipe
from dllm_convert.training import checkpointing, gpu_attention
from dllm_convert.training.asked import process_of, weights_of
from dllm_convert.training.gpu_attention import FLEX, register_flex
from dllm_convert.training.run import _arguments
from dllm_convert.training.setup import make_trainable
from dllm_convert.training.trainer import DiffusionTrainer

LENGTH, BLOCK, MASK = 64, 8, 5
Steps = list[tuple[float, dict[str, torch.Tensor]]]


def model(attention: str, target: str, dtype: torch.dtype) -> Any:
    """A model whose heads are no power of two, three query heads to a key."""
    torch.manual_seed(0)
    config: Any = Qwen2Config(
        vocab_size=512, hidden_size=96, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    config.is_causal, config.mask_token_id = False, MASK
    config.block_size = BLOCK if target == "bd3lm" else None
    config.diffusion = {
        "objective": target, "mask_token_id": MASK, "token_shift": True, "noise_schedule": "linear",
        "block_size": config.block_size,
    }  # fmt: skip
    cls: Any = DiffusionQwen2ForCausalLM
    made = cls._from_config(config, attn_implementation=attention)
    return made.to(dtype)


def steps(attention: str, recipe: Recipe, folder: Path, whole: bool) -> Steps:
    """Losses and gradients of three steps over rows of two documents, or of a whole one."""
    training = recipe.training
    bf16 = training.precision == "bf16"
    frozen = torch.bfloat16 if bf16 and training.method == "lora" else torch.float32
    made = model(attention, recipe.target, frozen)
    checkpointing.checkpoint_activations(made, training.gradient_checkpointing)
    made = make_trainable(made, get_adapter("qwen2"), training)
    arguments = _arguments(recipe, folder / "a/.work/trainer", bf16, False)
    trainer = DiffusionTrainer(
        made, arguments, process=process_of(recipe.noise), weights=weights_of(training)
    )
    trainer.current_gradient_accumulation_steps = 1
    prepared = trainer.accelerator.prepare_model(made)
    optimizer = torch.optim.AdamW([w for w in made.parameters() if w.requires_grad], lr=1e-3)
    cut = LENGTH if whole else 30
    segments = (torch.arange(LENGTH) >= cut).long().expand(2, -1).contiguous()
    positions = torch.arange(LENGTH) - cut * segments
    found = []
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        row = {
            "input_ids": torch.randint(10, 500, (2, LENGTH), generator=draw),
            "segment_ids": segments,
            "position_ids": positions,
        }
        batches, _ = trainer.get_batch_samples(iter([row]), 1, torch.device("cpu"))
        loss = trainer.training_step(prepared, batches[0])
        weights = [(name, w.grad) for name, w in made.named_parameters() if w.grad is not None]
        found.append((float(loss), {name: grad.float().clone() for name, grad in weights}))
        optimizer.step()
        optimizer.zero_grad()
        trainer.state.global_step += 1
    return found


def recipe(target: str, **training: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "source": "x", "target": target, "block_size": BLOCK if target == "bd3lm" else None,
            "data": {"sequence_length": LENGTH},
            "training": {"steps": 9, "batch_size": 2, "lora": {"rank": 4}, **training},
        }
    )  # fmt: skip


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """Leave no shapes behind: a second one has the compiler take all for variable."""
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("checkpoint", ["off", "selective", "full"])
@pytest.mark.parametrize(
    ("target", "method", "precision"),
    [
        ("bd3lm", "full", "fp32"),
        ("bd3lm", "full", "bf16"),
        ("bd3lm", "lora", "bf16"),
        ("mdlm", "full", "bf16"),
        ("mdlm-open", "full", "fp32"),
    ],
)
def test_flex_attention_trains_as_sdpa_does(
    target: str,
    method: str,
    precision: str,
    checkpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)
    compiled = torch.compile(flex.flex_attention, backend="aot_eager")
    types, kept = [], []

    def attend(query: Any, key: Any, value: Any, **settings: Any) -> Any:
        types.append({query.dtype, key.dtype, value.dtype})
        assert query.shape[2] % 128 == 0
        return compiled(query, key, value, **settings)

    plain = checkpointing._keep

    def keep(context: Any, operation: Any, *inputs: Any, **options: Any) -> Any:
        chosen = plain(context, operation, *inputs, **options)
        if operation.name() == "flex_attention":
            kept.append(chosen)
        return chosen

    monkeypatch.setattr(gpu_attention, "_compiled", lambda: attend)
    monkeypatch.setattr(checkpointing, "_keep", keep)
    target, _, whole = target.partition("-")
    asked = recipe(target, method=method, precision=precision, gradient_checkpointing=checkpoint)
    expected = steps("sdpa", asked, tmp_path, bool(whole))
    found = steps(register_flex(), asked, tmp_path, bool(whole))
    exact = precision == "fp32"
    for (loss, gradients), (other, others) in zip(expected, found, strict=True):
        assert other == pytest.approx(loss, rel=1e-5 if exact else 1e-2)
        assert set(gradients) == set(others)
    for name, gradient in expected[0][1].items():
        apart = (gradient - found[0][1][name]).norm() / gradient.norm().clamp(min=1e-6)
        assert apart < (1e-4 if exact else 5e-2), name
    dtype = torch.float32 if exact else torch.bfloat16
    assert types
    assert all(seen == {dtype} for seen in types)
    # Its result is kept: the backward pass does not compute attention once more.
    saved = CheckpointPolicy.MUST_SAVE
    assert kept == ([saved] * 9 if checkpoint == "selective" else [])


@pytest.mark.parametrize(
    ("version", "trains"),
    [("2.6.0+cu124", False), ("2.7.0", True), ("2.11.0+cu130", True), ("2.10.1", True)],
)
def test_flex_is_chosen_from_the_torch_on_whose_backward_is_right(
    version: str, trains: bool
) -> None:
    assert has_flex(version) is trains
    assert FLEX != "flex_attention"
