"""Memory and operations: known cases by hand, and what the product's own training makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from dllm_convert.planning.conversion import make_plan
from dllm_convert.planning.costs import (
    CPU_RUNTIME,
    activation_bytes,
    flops_per_token,
    lora_parameters,
    peak_memory,
    trainable_parameters,
)
from dllm_convert.planning.devices import GPUS, USABLE_MEMORY, Device, cpu, this_cpu
from dllm_convert.planning.estimate import (
    devices_needed,
    estimate,
    estimate_device,
    settled,
)
from dllm_convert.planning.model_shape import ModelShape, model_shape
from dllm_convert.planning.needs_text import fits_text
from dllm_convert.planning.sharing import Sharing
from dllm_convert.planning.streams import mean_masked_share, streams
from dllm_convert.recipe.schema import Noise, Recipe
from dllm_convert.source.inspect import inspect_source

Sources = Callable[..., Path]

SMOLLM2 = ModelShape(
    **{"embedding": 28_348_416, "head": 0, "layer_parameters": 106_202_880, "other": 576},
    **{"tied": True, "vocabulary": 49_216, "hidden": 576, "layers": 30, "queries": 576},
    **{"heads": 9, "matrices": 106_168_320.0, "outputs": 155_520.0},
    **{"stored_matrices": 106_168_320, "adapted": 305_280, "adapted_matrices": 210},
    **{"adapted_outputs": 155_520.0, "norms": 35_136},
)
"""SmolLM2-135M with an embedding that has grown by a mask."""


def recipe(target: str = "mdlm", **fields: Any) -> Recipe:
    block = {"block_size": 32} if target == "bd3lm" else {}
    return Recipe.model_validate({"source": "x", "target": target, **block, **fields})


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({"min_time": 0.0}, 0.5),
        ({"min_time": 0.3, "max_time": 0.8}, 0.55),
        ({"schedule": "cosine", "min_time": 0.0}, 2 / math.pi),
        ({"schedule": "polynomial", "power": 2.0, "min_time": 0.0}, 1 / 3),
        ({"draw": "count", "schedule": "cosine"}, 0.5),
    ],
)
def test_share_of_masked_tokens(fields: dict[str, Any], share: float) -> None:
    assert mean_masked_share(Noise(**fields)) == pytest.approx(share)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "polynomial"])
def test_share_agrees_with_the_schedule_that_trains(schedule: str) -> None:
    import torch

    from dllm_convert.training.asked import schedule_of

    noise = Noise(schedule=schedule, min_time=0.2, max_time=0.9)
    level = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    drawn = schedule_of(noise)
    mean = float(drawn.mask_probability(drawn.times(level)).mean())
    assert mean_masked_share(noise) == pytest.approx(mean, abs=1e-4)


class TestStreams:
    """What one forward runs is what `diffusion/prediction.py` lays out."""

    @pytest.mark.parametrize(
        ("target", "noise", "ar"),
        [
            ("mdlm", {}, 0.0),
            ("mdlm", {"views": 2}, 0.0),
            ("bd3lm", {}, 0.0),
            ("bd3lm", {"views": 2}, 0.0),
            ("bd3lm", {"complementary": True}, 0.0),
            ("bd3lm", {}, 0.5),
        ],
    )
    def test_counts(self, target: str, noise: dict[str, Any], ar: float) -> None:
        import torch

        from dllm_convert.diffusion.corruption import NoiseKey, corrupt
        from dllm_convert.diffusion.objective import Objective, TextBatch
        from dllm_convert.diffusion.prediction import predict
        from dllm_convert.training.asked import process_of

        made = recipe(
            target,
            noise=noise,
            training={"ar_loss_weight": ar, "batch_size": 4},
            data={"sequence_length": 256},
        )
        objective = Objective(
            target, mask_token_id=99, block_size=made.block_size, token_shift=True,
            context="causal" if ar else "block", vocabulary=100,
        )  # fmt: skip
        shape = (4, 256)
        batch = TextBatch(
            torch.ones(shape, dtype=torch.long),
            torch.zeros(shape, dtype=torch.long),
            torch.arange(256).expand(shape).contiguous(),
        )
        views = corrupt(batch, objective, process_of(made.noise), NoiseKey(0, 0, 0, 4))
        forward = predict(batch, views, objective, ar_loss=ar > 0)
        run = streams(made, sparse=False)
        assert forward.inputs["input_ids"].shape == (run.rows, run.width)
        logits = forward.inputs["logits_at"].numel()
        # Masks are drawn, so this one is an expectation.
        assert logits == pytest.approx(run.scored, rel=0.05)
        if forward.mask is not None:
            seen = float(forward.mask.dense().sum())
            # Blocks in which nothing was masked do not run, which the plan does not foresee.
            assert streams(made, sparse=True).pairs == pytest.approx(seen, rel=0.2)


class TestFlops:
    """6 N and 12 l h L, and what departs from it."""

    def test_mdlm_in_full(self) -> None:
        made = recipe(data={"sequence_length": 1024}, noise={"draw": "count"})
        layers = 6 * SMOLLM2.matrices + 12 * 30 * 576 * 1024
        head = 6 * SMOLLM2.vocabulary_matrix / 2
        assert flops_per_token(SMOLLM2, made, sparse=False) == pytest.approx(layers + head)

    def test_block_diffusion_costs_about_twice(self) -> None:
        length = {"data": {"sequence_length": 1024}}
        one = flops_per_token(SMOLLM2, recipe("mdlm", **length), sparse=False)
        two = flops_per_token(SMOLLM2, recipe("bd3lm", **length), sparse=True)
        assert 1.6 < two / one < 2.0

    def test_lora_saves_the_frozen_gradients(self) -> None:
        lora = {"method": "lora", "lora": {"rank": 8, "embeddings": "mask_row"}}
        made = recipe(training=lora, noise={"draw": "count"})
        assert flops_per_token(SMOLLM2, made, sparse=False) == pytest.approx(
            4 * SMOLLM2.matrices
            + 12 * 30 * 576 * 256
            + 4 * SMOLLM2.vocabulary_matrix / 2
            + 6 * lora_parameters(SMOLLM2, made.training)
        )

    def test_full_checkpointing_runs_the_layers_once_more(self) -> None:
        base = recipe(data={"sequence_length": 512})
        again = recipe(data={"sequence_length": 512}, training={"gradient_checkpointing": "full"})
        more = flops_per_token(SMOLLM2, again, sparse=False)
        more -= flops_per_token(SMOLLM2, base, sparse=False)
        assert more == pytest.approx(2 * SMOLLM2.matrices + 4 * 30 * 576 * 512)


class TestMemory:
    """States by ZeRO's count, activations by what is kept, and what is measured."""

    @pytest.mark.parametrize(
        ("method", "batch", "length", "measured"),
        [
            ("full", 4, 128, 3.45e9),
            ("full", 8, 128, 3.97e9),
            ("full", 4, 512, 6.09e9),
            ("full", 8, 512, 9.59e9),
            ("lora", 4, 128, 3.49e9),
            ("lora", 8, 128, 4.78e9),
        ],
    )
    def test_within_15_percent_of_the_measured_peaks(
        self, method: str, batch: int, length: int, measured: float
    ) -> None:
        # benchmarks/memory.py on 2 cores with avx512_bf16.
        made = recipe(
            "bd3lm",
            training={"method": method, "batch_size": batch},
            data={"sequence_length": length},
            noise={"draw": "count"},
        )
        found = peak_memory(SMOLLM2, made, gpu=False, bf16=True, flex=False)
        assert found.total == pytest.approx(measured, rel=0.15)

    def test_sixteen_bytes_per_weight_in_full_training(self) -> None:
        found = peak_memory(SMOLLM2, recipe(), gpu=True, bf16=True, flex=False)
        assert found.weights + found.gradients + found.moments == 16 * SMOLLM2.parameters
        assert found.heap == 0
        assert found.total > found.weights + found.gradients + found.moments

    @pytest.mark.parametrize("gpu", [True, False])
    def test_what_costs_more_is_said_to(self, gpu: bool) -> None:
        def total(**fields: Any) -> int:
            return peak_memory(
                SMOLLM2, recipe("bd3lm", **fields), gpu=gpu, bf16=True, flex=False
            ).total

        base = total(training={"batch_size": 8})
        assert total(training={"batch_size": 16}) > base
        assert total(training={"batch_size": 8, "gradient_checkpointing": "full"}) < base
        assert total(training={"batch_size": 8, "gradient_checkpointing": "off"}) > base
        assert total(training={"batch_size": 8, "gradient_accumulation": 8}) == base
        assert total(training={"batch_size": 8, "ar_loss_weight": 1.0}) > base
        assert total(training={"batch_size": 8}, noise={"complementary": True}) > base

    def test_shards_divide_states_only(self) -> None:
        one = peak_memory(SMOLLM2, recipe(), gpu=True, bf16=True, flex=False)
        four = peak_memory(
            SMOLLM2, recipe(), gpu=True, bf16=True, flex=False, sharing=Sharing.all_by(4)
        )
        assert four.moments == one.moments // 4
        assert four.logits == one.logits
        assert four.total < one.total

    def test_four_bits(self) -> None:
        lora = {"method": "lora", "lora": {"quantize": "nf4"}}
        plain = peak_memory(
            SMOLLM2, recipe(training={"method": "lora"}), gpu=True, bf16=True, flex=False
        )
        packed = peak_memory(SMOLLM2, recipe(training=lora), gpu=True, bf16=True, flex=False)
        saved = plain.weights - packed.weights
        # 2 bytes become 0.516; embeddings and norms become float32.
        kept = SMOLLM2.parameters - SMOLLM2.stored_matrices
        assert saved == pytest.approx(SMOLLM2.stored_matrices * 1.484 - 2 * kept, rel=0.01)

    def test_activations_by_hand(self) -> None:
        made = recipe(training={"gradient_checkpointing": "full", "batch_size": 1})
        run = streams(made, sparse=True)
        kept, again = activation_bytes(
            SMOLLM2, made.training, run, compute=2, residual=4, flex=True, cast=True
        )
        inputs = 4 * 576 * 30 * 256
        assert kept == inputs
        # One layer with its gradients: what it kept if nothing were computed again, and its rest.
        assert 2 * 2 * 5184 * 256 < again < 40 * inputs / 30 + 64 * 5184 * 256

    def test_the_logits_have_gone_when_a_layer_is_computed_again(self) -> None:
        made = recipe(training={"gradient_checkpointing": "full"})
        found = peak_memory(SMOLLM2, made, gpu=False, bf16=False, flex=False)
        run = streams(made, sparse=False)
        kept, again = activation_bytes(
            SMOLLM2, made.training, run, compute=4, residual=4, flex=False, cast=False
        )
        assert found.activations + found.logits == kept + max(again, found.logits)


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "bert", "roberta")


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_and_trainable_parameters_are_those_of_the_model(
    source_cache: Sources, family: str
) -> None:
    from dllm_convert.modeling.published import modeling
    from dllm_convert.training.setup import count_trainable, make_trainable

    source = inspect_source(str(source_cache(family)))
    import transformers

    plan = make_plan(recipe(), source)
    shape = model_shape(plan.source, plan.adapter, plan.mask)
    assert shape is not None
    stock = transformers.AutoConfig.from_pretrained(str(source.path))
    stock.vocab_size = plan.mask.rows_after
    stock.mask_token_id = plan.mask.id
    cls = getattr(modeling, plan.adapter.diffusion_class)
    for lora in (
        {"rank": 4},
        {"rank": 3, "norms": False},
        {"rank": 2, "embeddings": "mask_row"},
    ):
        training = recipe(training={"method": "lora", "lora": lora}).training
        model = cls(stock)
        assert sum(p.numel() for p in model.parameters()) == shape.parameters
        trained = count_trainable(make_trainable(model, plan.adapter, training))
        assert trainable_parameters(shape, training) == trained
    assert trainable_parameters(shape, recipe().training) == shape.parameters


class TestEstimate:
    """Hours, tokens and GPUs."""

    def test_hours_follow_from_operations(self) -> None:
        made = recipe(training={"steps": 1000})
        device = cpu(10, 64 * 10**9, bf16=True)
        found = estimate_device(SMOLLM2, made, device)
        rate = 1.8e12 / flops_per_token(SMOLLM2, made, sparse=False)
        assert found.tokens_per_second == pytest.approx(rate, rel=0.01)
        assert found.hours == pytest.approx(made.training_tokens / rate / 3600, rel=0.01)
        assert found.tokens == made.training_tokens
        assert found.fits
        limited = recipe(training={"steps": 1000, "max_minutes": 1.0})
        assert estimate_device(SMOLLM2, limited, device).tokens == pytest.approx(
            60 * rate, rel=0.01
        )

    def test_a_model_that_needs_several_gpus(self) -> None:
        big = ModelShape(
            **{"embedding": 10**9, "head": 10**9, "layer_parameters": 68 * 10**9, "other": 8192},
            **{"tied": False, "vocabulary": 128_256, "hidden": 8192, "layers": 80},
            **{"queries": 8192, "heads": 64, "matrices": 68e9, "outputs": 80 * 92e3},
            **{"stored_matrices": 68 * 10**9, "adapted": 1, "adapted_matrices": 560},
            **{"adapted_outputs": 1.0, "norms": 8192},
        )
        needed = devices_needed(big, recipe(training={"batch_size": 1}), GPUS[0])
        # 16 bytes for each of 70e9 weights over 76 GB.
        assert needed is not None
        assert 15 <= needed <= 18
        huge = recipe(training={"batch_size": 4096}, data={"sequence_length": 4096})
        assert devices_needed(big, huge, GPUS[0]) is None

    def test_memory_that_is_not_known_decides_nothing(self) -> None:
        assert estimate_device(SMOLLM2, recipe(), cpu(2, 0, bf16=False)).fits is None
        assert not estimate_device(SMOLLM2, recipe(), cpu(2, 10**9, bf16=False)).fits

    @pytest.mark.parametrize(
        ("device", "batch", "words"),
        [
            (cpu(2, 10**9, bf16=False), 2, "does not fit 1 GB"),
            (cpu(2, 0, bf16=False), 2, "memory unknown"),
            (GPUS[0], 2, "1 is enough"),
            (GPUS[0], 10**6, "baseline takes 126 TB: measured on the CPU"),
        ],
    )
    def test_is_said_in_words(self, device: Device, batch: int, words: str) -> None:
        made = recipe(training={"batch_size": batch})
        assert fits_text(asdict(estimate_device(SMOLLM2, made, device))) == words

    def test_of_a_plan(self, source_cache: Sources) -> None:
        source = inspect_source(str(source_cache("llama")))
        found = estimate(make_plan(recipe(), source), this_cpu())
        assert found is not None
        assert [d["device"] for d in found["devices"][1:]] == [gpu.name for gpu in GPUS]
        assert {(m["method"], m["on"]) for m in found["memory"]} == {
            (method, on) for method in ("full", "lora") for on in ("cpu", "gpu")
        }
        assert found["memory"][0]["total"] > CPU_RUNTIME
        untrained = make_plan(recipe(training={"method": "none"}), source)
        assert estimate(untrained, this_cpu()) is None

    def test_published_hours(self) -> None:
        # Fast-dLLM v2 7B: about 1.3B tokens, complementary masks, 768 A100-hours.
        shape = ModelShape(
            **{"embedding": 544_997_376, "head": 544_997_376, "layer_parameters": 6_525_621_248},
            **{"other": 3584, "tied": False, "vocabulary": 152_064, "hidden": 3584},
            **{"layers": 28, "queries": 3584, "heads": 28, "matrices": 6_525_288_448.0},
            **{"outputs": 28 * 50e3, "stored_matrices": 6_525_288_448, "adapted": 1},
            **{"adapted_matrices": 196, "adapted_outputs": 1.0, "norms": 1},
        )
        made = recipe(
            "bd3lm",
            noise={"complementary": True},
            data={"sequence_length": 512},
            training={"steps": 10_000, "batch_size": 8, "gradient_accumulation": 32},
        )
        assert estimate_device(shape, made, GPUS[0]).hours == pytest.approx(768, rel=0.2)


class TestSettled:
    """What `auto` leaves to the device."""

    CPU = cpu(2, 16 * 10**9, bf16=True)

    @staticmethod
    def gpu(gigabytes: float) -> Device:
        return replace(GPUS[0], memory=round(gigabytes * 1e9))

    def test_a_cpu_keeps_what_products_return(self) -> None:
        assert settled(SMOLLM2, recipe(), self.CPU).training.gradient_checkpointing == "selective"
        assert settled(None, recipe(), self.CPU).training.gradient_checkpointing == "selective"

    def test_a_gpu_computes_nothing_again_where_that_fits(self) -> None:
        made = recipe(training={"batch_size": 32}, data={"sequence_length": 1024})
        kinds = {}
        for gigabytes in (80, 40, 20, 10, 5, 1):
            chosen = settled(SMOLLM2, made, self.gpu(gigabytes))
            kinds[gigabytes] = chosen.training.gradient_checkpointing
            off = settled(SMOLLM2, with_training(made, gradient_checkpointing="off"), self.CPU)
            need = peak_memory(SMOLLM2, off, gpu=True, bf16=True, flex=True).total
            assert (kinds[gigabytes] == "off") == (need <= gigabytes * 1e9 * USABLE_MEMORY)
        assert set(kinds.values()) == {"off", "full"}

    def test_what_the_recipe_says_stays(self) -> None:
        for how in ("off", "selective", "full"):
            made = recipe(training={"gradient_checkpointing": how})
            for device in (self.CPU, self.gpu(80), self.gpu(0.5)):
                assert settled(SMOLLM2, made, device) == made

    def test_a_forward_holds_as_many_rows_as_fit(self) -> None:
        made = recipe(
            training={"batch_size": "auto", "gradient_accumulation": 24},
            data={"sequence_length": 1024},
        )
        assert made.training.sequences_per_step == 24
        found = []
        for gigabytes in (200, 40, 24, 12):
            training = settled(SMOLLM2, made, self.gpu(gigabytes)).training
            assert training.sequences_per_step == 24
            assert isinstance(training.batch_size, int)
            found.append(training.batch_size)
        assert found[0] == 24
        assert found == sorted(found, reverse=True)
        assert found[-1] < 12
        assert settled(SMOLLM2, made, self.CPU).training.batch_size == 1
        assert made.training_tokens == settled(SMOLLM2, made, self.gpu(40)).training_tokens

    def test_smaller_moments_are_proposed_where_one_gpu_is_not_enough(self) -> None:
        full = recipe(training={"method": "full"}, data={"sequence_length": 512})
        states = 16 * SMOLLM2.parameters
        device = self.gpu((states + 1.9e9) / 1e9)
        for gigabytes in (80.0, device.memory / 1e9, 2.4, 0.5):
            found = estimate_device(SMOLLM2, full, self.gpu(gigabytes))
            if found.fits:
                assert found.fits_with is None
            elif found.fits_with:
                name, _, value = found.fits_with.partition("=")
                smaller = recipe(
                    training={"method": "full", name.split(".")[1]: value},
                    data={"sequence_length": 512},
                )
                assert estimate_device(SMOLLM2, smaller, self.gpu(gigabytes)).fits
                assert found.fits_with in fits_text(asdict(found))
        found = [
            estimate_device(SMOLLM2, full, self.gpu(tenths / 10)).fits_with
            for tenths in range(5, 60)
        ]
        assert "training.optimizer=adamw_8bit" in found
        assert "training.optimizer=paged_adamw_8bit" in found


def with_training(made: Recipe, **fields: Any) -> Recipe:
    return made.model_copy(update={"training": made.training.model_copy(update=fields)})
